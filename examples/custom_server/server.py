"""
A KServe predictor that takes its model from a shared volume: `MODEL_URI=s3://bucket/model python server.py --model_name
linear`.

The store is the one of the environment: `KSERVE_PVC_STORE`, and `KSERVE_PVC_MODE=rw` or the pod's annotation. SIGTERM
cancels what it downloads, so that its claims are free within a second.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import threading
from typing import Any

import numpy as np
from kserve import Model, ModelServer
from kserve.errors import InferenceError, InvalidInput
from kserve.logging import logger
from kserve.model_server import parser

from kserve_pvc import DownloadCancelledError, ModelStore, SourceNotFoundError

_ADAPTER = re.compile(r"[a-z0-9-]{1,40}")


class Linear(Model):
    """
    Predicts `x @ weights`. A request may name an adapter, whose low-rank update is added to the weights.
    """

    def __init__(self, name: str, store: ModelStore, uri: str) -> None:
        super().__init__(name)
        self._store = store
        self._uri = uri
        self._updates: dict[str, np.ndarray] = {}
        self._cancel = threading.Event()
        self._is_serving = False

    def load(self) -> bool:
        # Of all replicas that start, one downloads; the others wait for it.
        model = self._store.ensure(self._uri, ignore_patterns="adapters/", cancel=self._cancel)
        logger.info("weights: %s", model.status)
        self._weights = np.load(model.path / "weights.npy")
        self.ready = True
        return self.ready

    def stop(self) -> None:
        self._cancel.set()
        super().stop()

    def cancel_on_sigterm(self) -> None:
        """
        Cancel downloads on SIGTERM, before the current handler acts.
        """
        before = signal.getsignal(signal.SIGTERM)

        def handle(number: int, frame: Any) -> None:
            self._cancel.set()
            if not callable(before):  # Python's default is to exit.
                sys.exit(128 + number)
            before(number, frame)

        signal.signal(signal.SIGTERM, handle)

    async def predict(self, payload: dict[str, Any], headers: dict[str, str] | None = None, *_: Any) -> dict[str, Any]:
        weights = self._weights
        if (adapter := payload.get("adapter")) is not None:
            weights = weights + await self._update(adapter)
        return {"predictions": (np.asarray(payload["instances"]) @ weights).tolist()}

    async def _update(self, adapter: str) -> np.ndarray:
        # A name, never a URI: clients must not be able to choose what is fetched.
        if not (isinstance(adapter, str) and _ADAPTER.fullmatch(adapter)):
            raise InvalidInput("the name of an adapter is lower-case letters, digits and hyphens")
        if not self._is_serving and threading.current_thread() is threading.main_thread():
            # By now uvicorn has its own handler, which lets requests finish, and so waits for their downloads.
            self.cancel_on_sigterm()
            self._is_serving = True
        if adapter not in self._updates:
            # In a thread, so that other requests are served in the meantime.
            self._updates[adapter] = await asyncio.to_thread(self._load_update, adapter)
        return self._updates[adapter]

    def _load_update(self, adapter: str) -> np.ndarray:
        try:
            model = self._store.ensure(self._uri, allow_patterns=f"adapters/{adapter}/", cancel=self._cancel)
        except SourceNotFoundError as error:
            raise InvalidInput(f"unknown adapter `{adapter}`") from error
        except DownloadCancelledError as error:
            raise InferenceError("the server is shutting down") from error
        logger.info("adapter %s: %s", adapter, model.status)
        place = model.path / "adapters" / adapter
        return np.load(place / "a.npy") @ np.load(place / "b.npy")


if __name__ == "__main__":
    arguments, _ = parser.parse_known_args()
    server = ModelServer()
    model = Linear(arguments.model_name, ModelStore.from_env(), os.environ["MODEL_URI"])
    model.cancel_on_sigterm()
    model.load()
    server.start([model])
