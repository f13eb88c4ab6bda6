"""
A recorder of what a process does to a directory, and what a power cut may leave of it.

`strace` tells every call that changes the directory, with its data. A cut keeps what was synced before it and any part
of the rest: names of one directory persist in any order, a rename as a whole or not at all, and of the data of a file
a write may be lost, torn, or leave zeros.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

import attrs

# Whatever changes a file or directory. What `_step` does not understand below the root fails the recording.
_CALLS = (
    "openat,open,creat,mkdir,mkdirat,mknod,mknodat,link,linkat,symlink,symlinkat,rename,renameat,renameat2,unlink,unlinkat,rmdir,"
    "write,writev,pwrite64,pwritev,pwritev2,copy_file_range,sendfile,splice,ftruncate,truncate,fallocate,"
    "fsync,fdatasync,syncfs,sync,sync_file_range,msync,ioctl"
)
_TEXT = r"(?:\\x[0-9a-f]{2})*"
_WHOLE = re.compile(r"(\d+) +(\w+)\((.*)\) += (-?\d+|\?)")
_BEGUN = re.compile(r"(\d+) +(\w+)\((.*) <unfinished \.\.\.>")
_RESUMED = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>(.*)\) += (-?\d+|\?)")
_DESCRIPTOR = re.compile(r"(?:AT_FDCWD|\d+)<([^>]*)>")
_STRING = re.compile(rf'"({_TEXT})"')
_PLACE = re.compile(rf'(?:AT_FDCWD|\d+)<([^>]*)>, "({_TEXT})"')
_ROOT = 0
_CHANCES = (0.05, 0.3, 0.5, 0.7, 0.95, 1.0)


@attrs.frozen
class Names:
    """
    Changes of directories that persist together: which name of which directory means which file from now on.
    """

    changes: tuple[tuple[int, str, int | None], ...]
    made: tuple[int, bool] | None = None
    target: str | None = None


@attrs.frozen
class Write:
    file: int
    offset: int
    data: bytes


@attrs.frozen
class Sync:
    """
    One file or directory, or everything.
    """

    file: int | None


@attrs.frozen
class Mark:
    name: str


Step = Names | Write | Sync | Mark


@attrs.frozen
class _Call:
    name: str
    arguments: str
    began: int
    ended: int
    result: int


@attrs.define
class Image:
    """
    Directories, files and symbolic links by number.
    """

    directories: dict[int, dict[str, int]] = attrs.Factory(lambda: {_ROOT: {}})
    files: dict[int, bytearray] = attrs.Factory(dict)
    links: dict[int, str] = attrs.Factory(dict)

    def apply(self, step: Step) -> None:
        if isinstance(step, Write):
            content = self.files.setdefault(step.file, bytearray())
            content.extend(bytes(max(0, step.offset + len(step.data) - len(content))))
            content[step.offset : step.offset + len(step.data)] = step.data
        elif isinstance(step, Names):
            for directory, name, what in step.changes:
                if what is None:
                    self.directories[directory].pop(name, None)
                else:
                    self.directories[directory][name] = what

    def make(self, step: Step) -> None:
        """What a number stands for is known even where no name of it persists."""
        if isinstance(step, Names) and step.made is not None:
            number, is_directory = step.made
            if step.target is not None:
                self.links[number] = step.target
            elif is_directory:
                self.directories[number] = {}
            else:
                self.files[number] = bytearray()

    def find(self, path: str) -> int | None:
        number: int | None = _ROOT
        for part in path.split("/") if path else ():
            number = self.directories.get(number, {}).get(part) if number is not None else None
        return number

    def write_to(self, place: Path, directory: int = _ROOT, written: dict[int, Path] | None = None) -> None:
        written = {} if written is None else written
        place.mkdir(exist_ok=True)
        for name, what in self.directories[directory].items():
            target = place / name
            if what in self.directories:
                self.write_to(target, what, written)
            elif what in self.links:
                target.symlink_to(self.links[what])
            elif what in written:
                target.hardlink_to(written[what])
            else:
                target.write_bytes(self.files[what])
                written[what] = target

    def state(self, directory: int = _ROOT) -> Hashable:
        """What `write_to` would write, links between files aside."""
        names = self.directories[directory].items()
        return tuple(
            (
                name,
                self.state(what) if what in self.directories else self.links.get(what) or bytes(self.files[what]),
            )
            for name, what in sorted(names)
        )

    def load(self, place: Path, directory: int = _ROOT, numbers: dict[int, int] | None = None) -> None:
        numbers = {} if numbers is None else numbers
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
            inode = entry.inode()
            number = numbers.setdefault(inode, len(numbers) + 1)
            self.directories[directory][entry.name] = number
            if entry.is_symlink():
                self.links[number] = os.readlink(entry.path)
            elif entry.is_dir(follow_symlinks=False):
                self.directories[number] = {}
                self.load(Path(entry.path), number, numbers)
            else:
                self.files[number] = bytearray(Path(entry.path).read_bytes())


@attrs.define
class Recording:
    """
    What happened to a directory whose beginning was durable.

    `ended[i]` and `began[i]` say when step i happened; a sync covers what had ended before it began.
    """

    before: Path
    steps: list[Step] = attrs.Factory(list)
    began: list[int] = attrs.Factory(list)
    ended: list[int] = attrs.Factory(list)

    def secured(self) -> list[int]:
        """
        For each step, how many steps a cut must leave for it to be durable.
        """
        count = len(self.steps)
        return [next((j + 1 for j in range(i + 1, count) if self._covers(j, i)), count + 1) for i in range(count)]

    def _covers(self, sync: int, step: int) -> bool:
        by, what = self.steps[sync], self.steps[step]
        if not isinstance(by, Sync) or self.began[sync] < self.ended[step]:
            return False
        if by.file is None:
            return True
        if isinstance(what, Write):
            return what.file == by.file
        # A rename is durable once the directory of the new name is. That of the old one may be synced for other
        # reasons, which on some file systems keeps nothing but the loss.
        return isinstance(what, Names) and what.changes[-1][0] == by.file

    def marks(self, cut: int) -> set[str]:
        return {step.name for step in self.steps[:cut] if isinstance(step, Mark)}

    def find(self, name: str) -> int:
        """
        The first step that gives something this name.
        """
        return next(
            number for number, step in enumerate(self.steps) if isinstance(step, Names) and step.changes[-1][1] == name
        )

    def leave(self, cut: int, seed: int, place: Path, secured: Sequence[int]) -> None:
        """
        Write what a cut after so many steps may leave, as the seed chooses.
        """
        bits = random.Random(seed)
        chance = bits.choice(_CHANCES)
        image = self._begin(cut)
        for step, needs in zip(self.steps[:cut], secured, strict=False):
            if needs <= cut or bits.random() > chance:
                image.apply(step)
            elif isinstance(step, Write):
                image.apply(_damaged(step, bits))
        image.write_to(place)

    def distinct_cuts(self, secured: Sequence[int]) -> list[Cut]:
        """
        Of the cuts after which nothing, one step, all but one or all of what was not synced is lost, those that leave
        different states. Lost bytes are zeros, so no size tells.
        """
        found: dict[Hashable, Cut] = {}
        for count in range(len(self.steps) + 1):
            for lost in _losses([n for n in range(count) if secured[n] > count]):
                cut = Cut(count, lost)
                found.setdefault((self.image(cut).state(), frozenset(self.marks(count))), cut)
        return list(found.values())

    def image(self, cut: Cut) -> Image:
        """
        What a cut leaves.
        """
        image = self._begin(cut.count)
        for number, step in enumerate(self.steps[: cut.count]):
            if number not in cut.lost:
                image.apply(step)
            elif isinstance(step, Write):
                image.apply(attrs.evolve(step, data=bytes(len(step.data))))
        return image

    def _begin(self, count: int) -> Image:
        image = Image()
        image.load(self.before)
        for step in self.steps[:count]:
            image.make(step)
        return image


@attrs.frozen
class Cut:
    """
    A cut after so many steps that loses some of them.
    """

    count: int
    lost: frozenset[int]


def _losses(unsynced: Sequence[int]) -> set[frozenset[int]]:
    every = frozenset(unsynced)
    return {frozenset(), every, *(frozenset({n}) for n in every), *(every - {n} for n in every)}


def _damaged(write: Write, bits: random.Random) -> Step:
    kind = bits.choice(["lost", "torn", "zeros"])
    if kind == "lost":
        return attrs.evolve(write, data=b"", offset=0)
    kept = bits.randrange(len(write.data)) if kind == "torn" else 0
    return attrs.evolve(write, data=write.data[:kept] + (bytes(len(write.data) - kept) if kind == "zeros" else b""))


def record(strace: str, command: Sequence[str], root: Path, marks: Path, scratch: Path) -> Recording:
    """
    Run a command and record what it does below a root. A file that it creates in `marks` is a mark in the recording.

    Replaying all of it has to give what is on the disk, so nothing was overlooked.
    """
    import shutil

    before, log = scratch / "before", scratch / "calls.log"
    shutil.copytree(root, before, symlinks=True)
    _copy_links(root, before)
    options = ["-f", "-y", "-xx", "-qq", "-s", str(1 << 20), "-o", str(log), "-e", f"trace={_CALLS}"]
    done = subprocess.run([strace, *options, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    recording = Recording(before)
    image = Image()
    image.load(before)
    for call in _calls(log):
        step = _step(call, image, f"{root}/", f"{marks}/", _new_number(image))
        if step is not None:
            image.make(step)
            image.apply(step)
            recording.steps.append(step)
            recording.began.append(call.began)
            recording.ended.append(call.ended)
    image.write_to(scratch / "replayed")
    assert _tree(scratch / "replayed") == _tree(root)
    return recording


def _new_number(image: Image) -> int:
    return len(image.directories) + len(image.files) + len(image.links) + 10_000


def _copy_links(source: Path, target: Path) -> None:
    """Files that are one stay one."""
    first: dict[int, Path] = {}
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.stat().st_nlink > 1:
            copied = target / path.relative_to(source)
            known = first.setdefault(path.stat().st_ino, copied)
            if known != copied:
                copied.unlink()
                copied.hardlink_to(known)


def _tree(place: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(place)): _content(path) for path in sorted(place.rglob("*"))}


def _content(path: Path) -> bytes | None:
    if path.is_symlink():
        return os.fsencode(os.readlink(path))
    return path.read_bytes() if path.is_file() else None


def _calls(log: Path) -> Iterator[_Call]:
    """
    The calls that succeeded, in the order in which they ended.
    """
    begun: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(log.read_text().splitlines()):
        if match := _BEGUN.match(line):
            begun[match[1]] = (number, match[3])
            continue
        began, head = number, ""
        if match := _RESUMED.match(line):
            began, head = begun.pop(match[1])
        else:
            match = _WHOLE.match(line)
        if match and match[4] != "?" and int(match[4]) >= 0:
            yield _Call(match[2], head + match[3], began, number, int(match[4]))


def _decoded(text: str) -> bytes:
    return re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes([int(match[1], 16)]), text.encode("latin-1"))


def _step(call: _Call, image: Image, root: str, marks: str, new: int) -> Step | None:
    """What a call means, or None if it is not about the root."""
    descriptors = [os.fsdecode(_decoded(text)) for text in _DESCRIPTOR.findall(call.arguments)]
    places = [os.path.join(*map(os.fsdecode, map(_decoded, pair))) for pair in _PLACE.findall(call.arguments)]
    if call.name == "openat":
        if "O_CREAT" in call.arguments and places[0].startswith(marks):
            return Mark(places[0].removeprefix(marks))
        if "O_TRUNC" in call.arguments and places[0].startswith(root):
            raise AssertionError(f"a file is truncated: {places[0]}")
        if (
            "O_CREAT" not in call.arguments
            or not places[0].startswith(root)
            or image.find(places[0].removeprefix(root)) is not None
        ):
            return None
        return _made(image, places[0].removeprefix(root), new, is_directory=False)
    if call.name == "syncfs":
        return Sync(None)
    touched = [path for path in (*places, *descriptors) if f"{path}/".startswith(root)]
    if not touched:
        return None
    inside = [path.removeprefix(root) for path in places]
    match call.name:
        case "mkdirat":
            return _made(image, inside[0], new, is_directory=True)
        case "symlinkat":
            found = _STRING.search(call.arguments)
            assert found is not None
            made = _made(image, inside[0], new, is_directory=False)
            return attrs.evolve(made, target=os.fsdecode(_decoded(found[1])))
        case "linkat":
            return Names((_change(image, inside[1], image.find(inside[0])),))
        case "unlinkat":
            return Names((_change(image, inside[0], None),))
        case "renameat" | "renameat2":
            return Names((_change(image, inside[0], None), _change(image, inside[1], image.find(inside[0]))))
        case "pwrite64" | "copy_file_range":
            return _write(call, image, root, descriptors)
        case "fsync" | "fdatasync":
            number = image.find(f"{descriptors[0]}/".removeprefix(root).rstrip("/"))
            return None if number is None else Sync(number)
        case "fallocate" | "ioctl":
            return None
    raise AssertionError(f"`{call.name}` on the volume is not understood")


def _change(image: Image, path: str, what: int | None) -> tuple[int, str, int | None]:
    parent, _, name = path.rpartition("/")
    directory = image.find(parent)
    assert directory is not None, path
    return directory, name, what


def _made(image: Image, path: str, new: int, *, is_directory: bool) -> Names:
    return Names((_change(image, path, new),), (new, is_directory))


def _write(call: _Call, image: Image, root: str, descriptors: Sequence[str]) -> Step | None:
    target = image.find(descriptors[-1].removeprefix(root))
    if target is None:  # Its last name is gone, so nobody will ever see it.
        return None
    if call.name == "pwrite64":
        found = _STRING.search(call.arguments)
        assert found is not None
        return Write(target, int(call.arguments.rpartition(",")[2]), _decoded(found[1])[: call.result])
    at, to = map(int, re.findall(r">, \[(\d+)\]", call.arguments))
    source = image.find(descriptors[0].removeprefix(root)) if descriptors[0].startswith(root) else None
    content = Path(descriptors[0]).read_bytes() if source is None else bytes(image.files[source])
    return Write(target, to, content[at : at + call.result])
