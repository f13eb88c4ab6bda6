"""
Put models on a shared volume, each of them once: `python warm.py STORE URI [URI …]`.
"""

import sys

from kserve_pvc import ModelStore


def main(root: str, *uris: str) -> None:
    store = ModelStore(root, mode="rw")
    for uri in uris:
        model = store.ensure(uri)
        print(f"{model.status}: {model.files} files, {model.size_bytes} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
