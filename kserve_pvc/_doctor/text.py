"""
A diagnosis as lines for people.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from kserve_pvc._show.units import format_bytes
from kserve_pvc.errors import printable

if TYPE_CHECKING:
    from kserve_pvc._doctor.diagnosis import Diagnosis
    from kserve_pvc._doctor.reports import PeerReport

_WIDTH = 100
_SAID: Mapping[object, str] = {None: "not tried", True: "yes", False: "no"}


def tell(diagnosis: Diagnosis) -> Iterator[str]:
    """
    Show what a volume is, what was measured, and what follows. All of it is safe to print.
    """
    rows = [*_facts(diagnosis), *_measured(diagnosis)]
    if diagnosis.peer is not None:
        rows += [("", ""), *_mutual(diagnosis.peer)]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        yield f"{name.ljust(width)}  {printable(value)}".rstrip()
    yield ""
    for finding in diagnosis.findings:
        yield f"{finding.level.upper()}  {finding.what}: {printable(finding.measured)}"
        for text in (finding.rule, f"-> {finding.remedy}"):
            yield from textwrap.wrap(printable(text), _WIDTH, initial_indent="    ", subsequent_indent="    ")
    yield "nothing has to be changed" if diagnosis.ok else "something should be changed, see above"


def _facts(diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    profile = diagnosis.profile
    yield "directory", f"{diagnosis.root}, {'a store' if diagnosis.is_store else 'no store yet'}"
    yield "volume", f"{profile.type} ({', '.join(profile.options)})"
    yield "profile", f"{profile.kind}; a removal waits {profile.visibility_delay:g} s until every node sees it"
    yield "locker", f"{diagnosis.locker}, lease {diagnosis.lease_seconds:g} s"
    owner = f"uid {diagnosis.owner_uid} gid {diagnosis.owner_gid} mode {diagnosis.mode:04o}"
    yield "access", f"uid {diagnosis.uid} gid {diagnosis.gid} on a directory of {owner}"
    yield "space", f"{format_bytes(diagnosis.free_bytes)} of {format_bytes(diagnosis.total_bytes)} are said to be free"


def _measured(diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    profile, speed = diagnosis.profile, diagnosis.speed
    for name, answer in (
        ("mkdir", profile.mkdir),
        ("exclusive create", profile.create),
        ("hard link", profile.link),
        ("rename without replacing", profile.rename),
    ):
        yield (
            name,
            {"refuses": "the second is refused", "replaces": "the second is NOT refused", None: "not tried"}.get(
                answer, str(answer)
            ),
        )
    yield "listing shows new names", _SAID[profile.lists]
    yield "write at an offset", _SAID[profile.writes_at_offset]
    yield "fsync", f"file {_SAID[profile.syncs_files]}, directory {_SAID[profile.syncs_directories]}"
    yield "locks on this node", f"flock {profile.flock or 'not tried'}, range lock {profile.range_lock or 'not tried'}"
    folded = f"case {_SAID[profile.folds_case]}, Unicode forms {_SAID[profile.folds_unicode]}"
    yield (
        "names",
        f"folds {folded}; keeps letters {_SAID[profile.keeps_names]}; up to {profile.name_bytes or '?'} bytes",
    )
    if diagnosis.clock_ahead is not None:
        yield "clock of the volume", f"{diagnosis.clock_ahead:+.1f} s"
    if speed is not None:
        yield (
            "write",
            f"{_rate(speed.write_bytes_per_second)} ({format_bytes(speed.sample_bytes)}, one stream, with fsync)",
        )
        how = {"direct": "around this node's page cache", "dropped": "after asking this node to forget it", None: ""}[
            speed.reading
        ]
        yield "read", f"{_rate(speed.read_bytes_per_second)} ({how})" if speed.read_bytes_per_second else "failed"


def _mutual(peer: PeerReport) -> Iterator[tuple[str, str]]:
    yield "other node", f"{peer.name}{'' if peer.is_done else f', LOST while testing {peer.step}'}"
    if peer.clock_ahead is not None:
        yield "its clock", f"{peer.clock_ahead:+.3f} s, give or take {peer.clock_error or 0:.3f}"
    for name, race in peer.races.items():
        result = f"{race.both_won} of {race.rounds} had two winners, {race.contested} overlapped in time"
        yield f"race by {name}", result if race.supported else "not supported"
    for name, tests in peer.locks.items():
        yield f"{name} between nodes", ", ".join(dict.fromkeys(test.verdict for test in tests))
    if peer.is_done or peer.step not in ("hello", "clocks", "names"):
        for name, seconds in (
            ("new name listed after", peer.listed_after),
            ("found, if asked too early", peer.found_after),
            ("replaced file seen after", peer.replaced_after),
            ("deleted file gone after", peer.deleted_after),
            ("the same by stat", peer.gone_after),
        ):
            yield name, "NOT SEEN" if seconds is None else f"{seconds:.2f} s"
    if peer.is_done:
        yield "beats of 0.5 s seen after", "NOT SEEN" if peer.beat_after is None else f"{peer.beat_after:.2f} s at most"


def _rate(bytes_per_second: float) -> str:
    return f"{format_bytes(bytes_per_second)}/s"
