"""
What stands on a terminal of a given width, after bars, lines and tables were written to it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import struct
import sys
import termios
import time

import pytest
from trees import write_files

from kserve_pvc import ModelStore
from kserve_pvc._cli.main import main
from kserve_pvc._cli.output import log_to_stderr, print_table, show_warmed
from kserve_pvc._cli.streams import say
from kserve_pvc._download.warm import WarmedModel
from kserve_pvc._show.events import BytesReceived, Subject, TransferStarted, WaitingForDownload
from kserve_pvc._show.progress import make_listener
from kserve_pvc._show.text import describe
from kserve_pvc._show.units import shorten
from kserve_pvc._source.ref import parse_ref
from kserve_pvc.errors import InsufficientSpaceError, LockTimeoutError

GIB = 2**30
END = "\a"
REF = "s3://bucket-of-a-team/with/a/long/prefix/llama-3-8b-instruct at 5c97e3b9"
ABOUT: Subject = {"store": "/mnt/models", "key": "llama-0123456789abcdef", "uri": REF, "ref": REF}
STARTED = TransferStarted(**ABOUT, bytes_total=15 * GIB, files=9)
UNKNOWN = WaitingForDownload(
    **ABOUT, holder="pod server-0", since="now", waited=3, idle=1, bytes_done=0, bytes_total=0, bytes_per_second=0
)


class Terminal:
    """
    A terminal that is standard output and standard error.
    """

    def __init__(self, columns: int, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self.near, far = os.openpty()
        fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        self.stream = os.fdopen(far, "w")

    def attach(self) -> None:
        """Be the streams of this process. Called by the test: pytest sets them before each of its phases."""
        for name in ("stdout", "stderr"):
            self._patch.setattr(sys, name, self.stream)

    def drawn(self) -> str:
        """What was written since the last call."""
        self.stream.write(END)
        self.stream.flush()
        drawn = b""
        while not drawn.endswith(END.encode()):
            drawn += os.read(self.near, 65536)
        return drawn.decode().removesuffix(END)


@pytest.fixture
def terminal(request, monkeypatch):
    """
    A terminal of as many columns as the test says.
    """
    found = Terminal(request.param, monkeypatch)
    yield found
    found.stream.close()
    os.close(found.near)


def screen(drawn: str) -> list[str]:
    """
    The lines that a person sees: after a carriage return, what comes is written over what was there.
    """
    lines = []
    for line in drawn.replace("\r\n", "\n").split("\n"):
        shown = ""
        for piece in line.split("\r"):
            shown = piece + shown[len(piece) :]
        lines.append(shown.rstrip())
    return lines


@pytest.mark.parametrize("terminal", [200, 120, 80, 72, 60, 40], indirect=True, ids=str)
def test_a_bar_has_room_for_rate_and_time(request, terminal):
    """
    However long a URI is and however narrow the terminal, the rate and what is left stand in the line.
    """
    terminal.attach()
    columns = request.node.callspec.params["terminal"]
    with make_listener(None, None) as tell:
        tell(STARTED)
        time.sleep(0.11)  # Bars are drawn ten times in a second at most.
        tell(BytesReceived(**ABOUT, size_bytes=GIB))
        line = terminal.drawn().rpartition("\r")[2]

    assert len(line) <= columns
    assert re.search(r"  7%.*[KMG]iB/s", line)
    assert re.search(r"<\d\d:\d\d,|\d\d:\d\d left", line)
    assert ("llama-3-8b-instruct" in line) == (columns >= 120)
    assert ("5c97e3b9" in line) == (columns >= 72)


@pytest.mark.parametrize("terminal", [80], indirect=True, ids=str)
def test_lines_stand_above_the_bars(terminal, tmp_path):
    """
    Results, messages and records that are written while bars are drawn are whole lines, and the bars go on below.
    """
    terminal.attach()
    write_files(tmp_path / "origin", {"a.bin": b"a"})
    (tmp_path / "volume").mkdir()
    model = ModelStore(tmp_path / "volume", mode="rw").ensure(f"file://{tmp_path}/origin", progress=False)

    class Arguments:
        json = quiet = verbose = False

    with make_listener(None, None) as first, make_listener(None, None) as second:
        for tell in (first, second):
            tell(STARTED)
            tell(BytesReceived(**ABOUT, size_bytes=GIB))
        show_warmed(WarmedModel(index=0, uri=model.uri, ref=parse_ref(model.uri), model=model), Arguments())
        say("a message")
        with log_to_stderr():
            logging.getLogger("kserve_pvc").debug("a record")
        second(BytesReceived(**ABOUT, size_bytes=GIB))

    lines = screen(terminal.drawn().replace("\x1b[A", ""))
    assert f"downloaded  {model.uri}  {model.path}" in lines
    assert {"kserve-pvc: a message", "kserve-pvc: a record"} <= set(lines)


ROWS = [
    ("s3://bucket/with/a/very/long/prefix/that/goes/on/and/on/llama-3-8b-instruct", "15.0 GiB", "9", "llama-3-8b-0123"),
    ("hf://org/m", "1 B", "1", "m-89ab"),
]
HEADS = ("URI", "SIZE", "FILES", "KEY")


@pytest.mark.parametrize("terminal", [200, 80, 60, 40], indirect=True, ids=str)
def test_a_table_is_as_wide_as_the_terminal(request, terminal):
    """
    Long values lose their middle, the columns stay in line, and keys, which the next command may need, stay whole.
    """
    terminal.attach()
    columns = request.node.callspec.params["terminal"]

    print_table(HEADS, ROWS)

    head, *rows = screen(terminal.drawn())[:-1]
    assert max(map(len, (head, *rows))) <= columns
    assert [row.index(cells[1]) for row, cells in zip(rows, ROWS, strict=True)] == [head.index("SIZE")] * 2
    assert ("llama-3-8b-0123" in rows[0], "m-89ab" in rows[1]) == (columns >= 60, True)
    assert (ROWS[0][0] in rows[0]) == (columns == 200)


def test_a_table_that_is_not_for_a_person_is_whole(capsys):
    """
    In a pipe no value is cut.
    """
    print_table(HEADS, ROWS)

    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["URI", *(row[0] for row in ROWS)]


@pytest.mark.parametrize("terminal", [80], indirect=True, ids=str)
@pytest.mark.parametrize("verb", ["ls", "info", "locks", "alias"])
def test_tables_of_verbs_fit(root, tmp_path, terminal, verb):
    """
    Each verb with a table keeps to the width of the terminal.
    """
    terminal.attach()
    source = tmp_path / ("deep/" * 20) / "origin"
    write_files(source, {"a-file-with-a-rather-long-name.safetensors": b"a"})
    ModelStore(root, mode="rw").ensure(f"file://{source}", progress=False)

    main(["--store", str(root), verb, *([f"file://{source}"] if verb == "info" else [])])

    lines = screen(terminal.drawn())
    start = next(number for number, line in enumerate(lines) if re.match(r"URI|FILE|NAME", line))
    assert [line for line in lines[start:] if len(line) > 80 and not line.startswith("kserve-pvc: ")] == []


@pytest.mark.parametrize(
    ("text", "width", "shown"),
    [
        ("abc", 3, "abc"),
        ("abcdef", 6, "abcdef"),
        ("abcdefghij", 9, "ab...ghij"),
        ("abcdef", 4, "...f"),
        ("abc", 1, "c"),
    ],
)
def test_the_middle_is_left_out(text, width, shown):
    """
    What is too wide keeps its two ends, more of the second.
    """
    assert shorten(text, width) == shown


@pytest.mark.parametrize("terminal", [80], indirect=True, ids=str)
def test_what_is_not_known_is_not_zero(terminal):
    """
    Before the size of a model is known, no line speaks of zero bytes, and no bar of zero per cent.
    """
    terminal.attach()
    with make_listener(None, None) as tell:
        tell(UNKNOWN)
        drawn = terminal.drawn()
    timeout = str(LockTimeoutError(REF, "pod server-0", 3.0, 1.0, 0, 0))

    for text in (drawn, describe(UNKNOWN), timeout):
        assert re.search(r"\b0 (B|bytes)\b|0%", text) is None
    assert "waiting for pod server-0" in drawn


def test_room_is_told_in_the_units_of_the_rest():
    """
    What is free and needed is in binary units, and in bytes only where these would look equal.
    """
    assert "has 1.5 GiB free and 15.0 GiB are needed" in str(InsufficientSpaceError("/mnt", 15 * GIB, 3 * GIB // 2))
    assert f"has {GIB} bytes free and {GIB + 1} bytes are needed" in str(InsufficientSpaceError("/mnt", GIB + 1, GIB))
