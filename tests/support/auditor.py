"""
A process that knows what every model must contain, and watches a store while others stress it.

It shares no code with the package: it reads the directories and files that `docs/reference/format.md` describes,
from one mount, again and again until its input ends. Then it looks once more, and prints what it saw as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_RECORD = re.compile(r"([0-9]{12})\.(commit|restore|tombstone)")
_PAUSE = 0.02
_PIECE_BYTES = 1024 * 1024


class Auditor:
    """
    Looks at one store from one mount, and remembers what it has seen.

    Args:
        expected: By source URI, then by path: the SHA-256 that is right.
        settling_seconds: For how long a node may go on seeing, or not yet see, what another one changed.
    """

    def __init__(self, root: Path, expected: Mapping[str, Mapping[str, str]], settling_seconds: float = 5.0) -> None:
        self._root = root
        self._expected = expected
        self._settling_seconds = settling_seconds
        self._records: dict[str, bytes] = {}
        self._newest: dict[str, int] = {}
        self._generations: dict[str, set[str]] = {}
        self.models_hashed = 0
        self.violations: list[str] = []

    def look(self) -> None:
        """
        Check every key of the store once.
        """
        keys = self._root / ".kserve-pvc" / "keys"
        for key in _listed(keys):
            self._look_at(key, keys / key / "log")

    def report(self) -> Mapping[str, Any]:
        return {
            "models_hashed": self.models_hashed,
            "generations": {key: sorted(found) for key, found in self._generations.items()},
            "violations": self.violations,
        }

    def _look_at(self, key: str, log: Path) -> None:
        name, record = self._newest_record(key, log)
        if record is None or record["type"] == "tombstone":
            return
        problem = self._compare(key, record)
        if problem is None:
            self.models_hashed += 1
            self._generations.setdefault(key, set()).add(record["generation"])
            return
        # Whoever reads without a lease may meet a removal. It is not announced to him, but it is in the log.
        deadline = time.monotonic() + self._settling_seconds
        while problem is not None and time.monotonic() < deadline and self._newest_record(key, log)[0] == name:
            time.sleep(_PAUSE * 5)
            problem = self._compare(key, record)
        if problem is not None and self._newest_record(key, log)[0] == name:
            self.violations.append(f"{name} of {key} says {record['generation']}: {problem}")

    def _newest_record(self, key: str, log: Path) -> tuple[str, Mapping[str, Any] | None]:
        """
        Read the newest record, and check that none went away or changed.
        """
        numbers = sorted((int(match[1]), name) for name in _listed(log) if (match := _RECORD.fullmatch(name)))
        if not numbers:
            if key in self._newest:
                self._complain(f"all records of {key} are gone")
            return "", None
        number, name = numbers[-1]
        if number < self._newest.get(key, 0):
            self._complain(f"{key} went back from record {self._newest[key]} to {number}")
        self._newest[key] = max(number, self._newest.get(key, 0))
        return name, self._read_record(key, log / name)

    def _read_record(self, key: str, path: Path) -> Mapping[str, Any] | None:
        deadline = time.monotonic() + self._settling_seconds
        while True:
            with suppress(OSError, ValueError):
                data = path.read_bytes()
                body = json.loads(data)
                announced = body.pop("checksum")
                if (
                    announced
                    == hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
                ):
                    break
            if time.monotonic() > deadline:
                self._complain(f"{path.name} of {key} cannot be read")
                return None
            time.sleep(_PAUSE)
        if self._records.setdefault(f"{key}/{path.name}", data) != data:
            self._complain(f"{path.name} of {key} was changed")
        if body["key"] != key or f"{body['seq']:012d}.{body['type']}" != path.name:
            self._complain(f"{path.name} of {key} speaks of {body['key']}")
        return dict(body)

    def _compare(self, key: str, record: Mapping[str, Any]) -> str | None:
        """
        Say what is wrong with the model that a record names.
        """
        if record["uri"] not in self._expected:
            return f"nobody asked for {record['uri']}"
        try:
            found = hash_tree(self._root / "models" / key / record["generation"])
        except OSError as error:
            return f"it cannot be read: {error}"
        expected = self._expected[record["uri"]]
        wrong = sorted(path for path in {*expected, *found} if expected.get(path) != found.get(path))
        return f"wrong, missing or too many: {', '.join(wrong)}" if wrong else None

    def _complain(self, violation: str) -> None:
        if violation not in self.violations:
            self.violations.append(violation)


def hash_tree(place: Path) -> dict[str, str]:
    """
    The SHA-256 of every file below a directory, by path.
    """
    found = {}
    for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
        path = place / entry.name
        if entry.is_dir(follow_symlinks=False):
            found.update({f"{entry.name}/{inside}": digest for inside, digest in hash_tree(path).items()})
        else:
            found[entry.name] = _hash(path)
    return found


def _hash(path: Path) -> str:
    hashed = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            hashed.update(piece)
    return hashed.hexdigest()


def _listed(place: Path) -> Sequence[str]:
    for above in reversed(
        place.parents[:4]
    ):  # On NFS, what was not there a moment ago is looked for again only by who does this.
        with suppress(OSError):
            os.close(os.open(above, os.O_RDONLY | os.O_DIRECTORY))
    try:
        return sorted(os.listdir(place))
    except FileNotFoundError:
        return ()


@contextmanager
def auditing(roots: Sequence[Path], expected: Mapping[str, Mapping[str, str]]) -> Iterator[list[dict[str, Any]]]:
    """
    Have every one of these mounts watched by a process of its own, which has looked once when the `with` begins.

    Their reports are in the list when it is over.
    """
    reports: list[dict[str, Any]] = []
    command = [sys.executable, "-I", "-S", __file__]
    watchers = []
    try:
        for root in roots:
            watcher = subprocess.Popen([*command, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            watchers.append(watcher)
        for watcher in watchers:
            assert watcher.stdin is not None
            watcher.stdin.write(json.dumps(expected) + "\n")
            watcher.stdin.flush()
        for watcher in watchers:
            assert watcher.stdout is not None
            watcher.stdout.readline()
        yield reports
        reports += [json.loads(watcher.communicate(timeout=120)[0]) for watcher in watchers]
    finally:
        for watcher in watchers:
            watcher.kill()
            watcher.communicate()


def _main() -> None:
    auditor = Auditor(Path(sys.argv[1]), json.loads(sys.stdin.readline()))
    auditor.look()
    print("watching", flush=True)
    while not select.select([sys.stdin], [], [], _PAUSE)[0]:
        auditor.look()
    auditor.look()
    print(json.dumps(auditor.report()))


if __name__ == "__main__":
    _main()
