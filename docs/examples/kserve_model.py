"""
The same server on KServe's own runtime: `MODEL_URI=s3://… python kserve_model.py`.
"""

import json
import os

from kserve import Model, ModelServer

from kserve_pvc import ModelStore


class Line(Model):
    def load(self) -> bool:
        model = ModelStore.from_env().ensure(os.environ["MODEL_URI"])
        self.weights = json.loads((model.path / "model.json").read_text())
        self.ready = True
        return self.ready

    def predict(self, payload: dict, headers: dict | None = None) -> dict:
        return {
            "predictions": [
                self.weights["slope"] * x + self.weights["intercept"]
                for x in payload["instances"]
            ]
        }


if __name__ == "__main__":
    line = Line("line")
    line.load()
    ModelServer().start([line])
