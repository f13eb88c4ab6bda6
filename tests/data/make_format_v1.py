"""
How the store under `format-v1` was made. It is kept for ever and never made again: it stands for every store of format
1.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from memory import MemorySource

from kserve_pvc import ModelStore
from kserve_pvc._format.records import Holder
from kserve_pvc.locks import liveness

MODELS = {
    "s3://models/tiny": {"config.json": b'{"layers": 2}\n', "weights/part-1.bin": bytes(range(256)) * 8, "empty": b""},
    "s3://models/removed": {"model.bin": b"gone"},
    "s3://models/renewed": {"model.bin": b"old"},
}


def main(place: str) -> None:
    liveness.here = lambda *_: Holder(
        pod="warm-job-x7k2p", node="node-1", uid=1000, pid=7, boot_id="6f1c", pid_namespace="pid:[1]", started=12
    )
    source = MemorySource(MODELS)
    Path(place).mkdir()
    store = ModelStore(place, mode="rw", lease_seconds=30, backends={"s3": source})
    for uri in MODELS:
        store.ensure(uri, progress=False)
    store.ensure("s3://models/tiny", allow_patterns="*.json", progress=False)
    store.remove("s3://models/removed", trash_seconds=0)
    source.models["s3://models/renewed"] = {"model.bin": b"new"}
    store.ensure("s3://models/renewed", refresh=True, progress=False)


if __name__ == "__main__":
    main(sys.argv[1])
