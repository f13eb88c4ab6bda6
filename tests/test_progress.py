"""
What a person and a callback are shown of a download.
"""

import fcntl
import io
import os
import struct
import termios

import pytest
from fsspec.callbacks import Callback

from kserve_pvc._show.events import (
    BytesAdopted,
    BytesReceived,
    CallFinished,
    ClaimTakenOver,
    RequestRetried,
    Subject,
    TransferStarted,
    WaitingForDownload,
)
from kserve_pvc._show.progress import Lines, make_listener
from kserve_pvc._show.text import describe
from kserve_pvc._show.units import format_bytes

REF = "s3://bucket/llama"
MIB = 2**20


def about(ref: str) -> Subject:
    """
    What an event is about.
    """
    return {"store": "/mnt/models", "key": "llama-0123456789abcdef", "uri": ref, "ref": ref}


ABOUT = about(REF)
STARTED = TransferStarted(**ABOUT, bytes_total=100 * MIB, files=3)
TOOK_OVER = ClaimTakenOver(**ABOUT, holder="pod server-0 on node-a", reason="no sign of life for 30 s")
RETRIED = RequestRetried(**ABOUT, reason="answered 503", delay=0.25)
WAITING = WaitingForDownload(
    **ABOUT,
    holder="pod server-0 on node-a",
    since="2026-02-03T04:05:06+00:00",
    waited=12.4,
    idle=3.0,
    bytes_done=10 * MIB,
    bytes_total=100 * MIB,
    bytes_per_second=MIB,
)
WAITING_LINE = (
    "waiting for pod server-0 on node-a, at work since 2026-02-03T04:05:06+00:00: 10.0 MiB of 100.0 MiB, 1.0 MiB/s; "
    "waited 12 s, last sign of life 3 s ago"
)


def finished(status: str, ref: str = REF) -> CallFinished:
    return CallFinished(**about(ref), status=status, size_bytes=100 * MIB, bytes_fetched=100 * MIB, seconds=1.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def received(size_bytes: int) -> BytesReceived:
    return BytesReceived(**ABOUT, size_bytes=size_bytes)


@pytest.mark.parametrize(("lines", "columns"), [(0, 0), (0, 100), (24, 0), (24, 100)])
def test_a_terminal_without_a_size_shows_a_bar(lines, columns, monkeypatch):
    """
    A terminal that nobody told its size counts as one of 80 columns and 24 lines.
    """
    near, far = os.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    with os.fdopen(far, "w") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        with make_listener(None, None) as listener:
            listener(STARTED)
            listener(received(50 * MIB))
        shown = os.read(near, 10_000).decode()
    os.close(near)

    bar = next(line for line in shown.split("\r") if "100M" in line)
    assert (bar[:5], len(bar.strip("\n"))) == ("  0%|", (columns or 80) - (1 if lines and columns else 0))


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def written():
    return []


@pytest.fixture
def lines(written, clock):
    return Lines(written.append, clock)


def test_a_download_is_announced_at_once(lines, written):
    """
    The first line says what is downloaded and how much it is.
    """
    lines(STARTED)

    assert written == [f"kserve-pvc: downloading {REF}: 3 files, 100.0 MiB"]


def test_a_line_is_written_every_ten_seconds(lines, written, clock):
    """
    However many bytes arrive, one line in ten seconds says how far, how fast and how long still.
    """
    lines(STARTED)
    for _ in range(100):
        clock.now += 0.25
        lines(received(MIB // 2))

    assert written[1:] == [
        f"kserve-pvc: downloading {REF}: 20.0 MiB of 100.0 MiB, 2.0 MiB/s, 40 s left",
        f"kserve-pvc: downloading {REF}: 40.0 MiB of 100.0 MiB, 2.0 MiB/s, 30 s left",
    ]


def test_waiting_is_announced_at_once(lines, written):
    """
    Whoever waits is told at once for whom, since when and how far that one is.
    """
    lines(WAITING)

    assert written == [f"kserve-pvc: {WAITING_LINE}"]


def test_waiting_is_repeated_every_ten_seconds(lines, written, clock):
    """
    A process that looks once a second says only every ten seconds that it still waits.
    """
    for _ in range(31):
        lines(WAITING)
        clock.now += 1

    assert written == [f"kserve-pvc: {WAITING_LINE}"] * 4


def test_turns_of_events_are_never_held_back(lines, written):
    """
    A takeover, a failure of the source and the end are told when they happen, whatever was written just before.
    """
    for event in (WAITING, TOOK_OVER, STARTED, RETRIED, finished("downloaded")):
        lines(event)

    assert written == [
        f"kserve-pvc: {WAITING_LINE}",
        f"kserve-pvc: taking over {REF} from pod server-0 on node-a: no sign of life for 30 s",
        f"kserve-pvc: downloading {REF}: 3 files, 100.0 MiB",
        "kserve-pvc: retrying in 0.2 s: answered 503",
        f"kserve-pvc: {REF}: downloaded",
    ]


def test_nothing_is_said_about_a_model_that_was_there(lines, written):
    """
    A call that found its model present leaves no line.
    """
    lines(finished("present"))

    assert written == []


def test_a_second_attempt_counts_anew(lines, written, clock):
    """
    After a new start neither the bytes nor the seconds of the first attempt count.
    """
    lines(STARTED)
    clock.now += 100
    lines(received(50 * MIB))
    lines(STARTED)
    clock.now += 10
    lines(received(10 * MIB))

    assert written[-1] == f"kserve-pvc: downloading {REF}: 10.0 MiB of 100.0 MiB, 1.0 MiB/s, 90 s left"


def test_what_a_dead_writer_left_is_no_speed(lines, written, clock):
    """
    Bytes that were taken over count as done, and only those that arrived tell how fast and how long still.
    """
    lines(STARTED)
    lines(BytesAdopted(**ABOUT, size_bytes=50 * MIB))
    clock.now += 10
    lines(received(10 * MIB))

    assert written[1:] == [f"kserve-pvc: downloading {REF}: 60.0 MiB of 100.0 MiB, 1.0 MiB/s, 40 s left"]


def test_the_clock_may_stand_still(lines, written, clock):
    """
    Bytes that arrive in no time at all, or not at all, break no line.
    """
    lines(received(0))
    clock.now += 10
    lines(STARTED)

    assert written == [
        f"kserve-pvc: downloading {REF}: 0 B of 0 B, 0 B/s, 0 s left",
        f"kserve-pvc: downloading {REF}: 3 files, 100.0 MiB",
    ]


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (STARTED, f"downloading {REF}: 3 files, 100.0 MiB"),
        (BytesAdopted(**ABOUT, size_bytes=3 * MIB), f"adopted 3.0 MiB of {REF} that were on the volume already"),
        (received(10), f"received 10 B of {REF}"),
        (WAITING, WAITING_LINE),
        (TOOK_OVER, f"taking over {REF} from pod server-0 on node-a: no sign of life for 30 s"),
        (RETRIED, "retrying in 0.2 s: answered 503"),
        (finished("waited"), f"{REF}: waited"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_every_event_can_be_described(event, line):
    """
    Each event has one line for a person.
    """
    assert describe(event) == line


HOSTILE = "\x1b[31mred\r\n\u202e"


@pytest.mark.parametrize(
    "event",
    [
        TransferStarted(**about(HOSTILE), bytes_total=1, files=1),
        BytesAdopted(**about(HOSTILE), size_bytes=1),
        BytesReceived(**about(HOSTILE), size_bytes=1),
        WaitingForDownload(
            **about(HOSTILE),
            holder=HOSTILE,
            since="now",
            waited=0,
            idle=0,
            bytes_done=0,
            bytes_total=0,
            bytes_per_second=0,
        ),
        ClaimTakenOver(**about(HOSTILE), holder=HOSTILE, reason="gone"),
        RequestRetried(**about(HOSTILE), reason=HOSTILE, delay=1),
        finished("waited", HOSTILE),
    ],
    ids=lambda event: type(event).__name__,
)
def test_a_line_steers_no_terminal(lines, written, event):
    """
    What a neighbour on the volume or a remote has written is escaped in every line.
    """
    lines(event)

    assert [(line.isprintable(), "\\x1b[31mred\\r\\n\\u202e" in line) for line in written] == [(True, True)]


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1048514, "1023.9 KiB"),
        (MIB - 1, "1.0 MiB"),
        (MIB, "1.0 MiB"),
        (2**30 - 1, "1.0 GiB"),
        (70 * 2**30, "70.0 GiB"),
        (2**40 - 1, "1.0 TiB"),
        (2**40, "1.0 TiB"),
        (5000 * 2**40, "5000.0 TiB"),
    ],
)
def test_amounts_are_for_people(size_bytes, shown):
    """
    Bytes are shown in the largest unit that leaves a number of at least one.
    """
    assert format_bytes(size_bytes) == shown


def test_a_pipe_gets_lines():
    """
    Where nobody watches a terminal, progress is a line of text for a log.
    """
    stream = io.StringIO()

    with make_listener(None, None, stream) as tell:
        tell(STARTED)
        tell(received(100 * MIB))

    assert stream.getvalue() == f"kserve-pvc: downloading {REF}: 3 files, 100.0 MiB\n"


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["pipe", "terminal"])
def test_progress_can_be_silent(stream):
    """
    With `progress=False` nothing is written, neither to a pipe nor to a terminal.
    """
    with make_listener(False, None, stream) as tell:
        for event in (WAITING, TOOK_OVER, STARTED, received(MIB), RETRIED, finished("downloaded")):
            tell(event)

    assert stream.getvalue() == ""


def test_lines_go_to_stderr(capsys):
    """
    Without a stream what a person reads goes to stderr, so stdout stays free for results.
    """
    with make_listener(None, None) as tell:
        tell(STARTED)

    assert tuple(capsys.readouterr()) == ("", f"kserve-pvc: downloading {REF}: 3 files, 100.0 MiB\n")


@pytest.mark.parametrize("progress", [None, False])
def test_a_callback_hears_of_every_byte(progress):
    """
    An fsspec callback is told the size once and each step in bytes, those of a dead writer included.
    """
    callback = Callback()

    with make_listener(progress, callback, io.StringIO()) as tell:
        for event in (
            WAITING,
            STARTED,
            BytesAdopted(**ABOUT, size_bytes=30 * MIB),
            received(60 * MIB),
            RETRIED,
            received(10 * MIB),
        ):
            tell(event)

    assert (callback.size, callback.value) == (100 * MIB, 100 * MIB)


@pytest.mark.parametrize(
    ("progress", "stream"),
    [(None, Terminal()), (True, Terminal()), (True, io.StringIO())],
    ids=["found", "asked", "insisted"],
)
def test_a_terminal_gets_a_bar(progress, stream):
    """
    On a terminal, or where a person insists, there is a bar that names the holder, and no bar is left at the end.
    """
    with make_listener(progress, None, stream) as tell:
        for event in (WAITING, TOOK_OVER, STARTED, BytesAdopted(**ABOUT, size_bytes=MIB), received(99 * MIB), RETRIED):
            tell(event)
        tell(finished("downloaded"))

    shown = stream.getvalue()
    assert "waiting for pod server-0 on node-a:  10%" in shown
    assert "taking over" in shown
    assert "retrying" in shown
    assert shown.rpartition("\r")[2] == ""
    assert "kserve-pvc: " not in shown


def test_a_bar_is_closed_when_the_call_fails():
    """
    An error leaves no bar behind, and passes.
    """
    stream = Terminal()
    kept = []

    def fail():
        with make_listener(None, None, stream) as tell:
            kept.append(tell)  # Or the end of the bar's life would end the bar.
            tell(STARTED)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()

    assert stream.getvalue().rpartition("\r")[2] == ""


def test_a_bar_steers_no_terminal():
    """
    What a neighbour on the volume has written is escaped in a bar.
    """
    stream = Terminal()

    with make_listener(None, None, stream) as tell:
        tell(
            WaitingForDownload(
                **ABOUT, holder=HOSTILE, since="now", waited=0, idle=0, bytes_done=0, bytes_total=0, bytes_per_second=0
            )
        )

    assert "waiting for \\x1b[31mred\\r\\n\\u202e" in stream.getvalue()
    assert "\x1b[31m" not in stream.getvalue()
