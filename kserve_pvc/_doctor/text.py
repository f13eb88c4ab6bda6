"""
A diagnosis as plain text.
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
_ANSWERS: Mapping[object, str] = {None: "not tested", True: "yes", False: "no"}
_EXCLUSION: Mapping[object, str] = {
    None: "not tested",
    "refuses": "exclusive",
    "replaces": "NOT exclusive",
}
_READING: Mapping[object, str] = {
    None: "",
    "direct": "bypassing this node's page cache",
    "dropped": "after dropping this node's page cache",
}


def format_diagnosis(diagnosis: Diagnosis) -> Iterator[str]:
    """
    Yield the lines of a report. All of them are safe to print.
    """
    rows = [*_describe(diagnosis), *_measurements(diagnosis)]
    if diagnosis.peer is not None:
        rows += [("", ""), *_peer_results(diagnosis.peer)]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        yield f"{name.ljust(width)}  {printable(value)}".rstrip()
    yield ""
    for finding in diagnosis.findings:
        yield f"{finding.level.upper()}  {finding.what}: {printable(finding.measured)}"
        for text in (finding.rule, f"-> {finding.hint}"):
            yield from textwrap.wrap(printable(text), _WIDTH, initial_indent="    ", subsequent_indent="    ")
    yield "no changes needed" if diagnosis.ok else "changes recommended, see above"


def _describe(diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    profile = diagnosis.profile
    yield "directory", f"{diagnosis.root}, {'a store' if diagnosis.is_store else 'no store yet'}"
    yield "volume", f"{profile.type} ({', '.join(profile.options)})"
    yield "profile", f"{profile.kind}; a removal waits {profile.visibility_delay:g} s until every node sees it"
    yield "locker", f"{diagnosis.locker}, lease {diagnosis.lease_seconds:g} s"
    owner = f"uid {diagnosis.owner_uid} gid {diagnosis.owner_gid} mode {diagnosis.mode:04o}"
    yield "access", f"uid {diagnosis.uid} gid {diagnosis.gid} on a directory of {owner}"
    for scheme, reasons in diagnosis.sources.items():
        yield f"source {scheme}", f"settings are not plain: {'; '.join(reasons)}"
    for scheme, claims in diagnosis.plugins.items():
        yield f"plug-in {scheme}", "; ".join(claims)
    yield "space", f"{format_bytes(diagnosis.free_bytes)} of {format_bytes(diagnosis.total_bytes)} reported free"


def _measurements(diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    profile, speed = diagnosis.profile, diagnosis.speed
    for name, exclusion in (
        ("mkdir", profile.mkdir),
        ("exclusive create", profile.create),
        ("hard link", profile.link),
        ("rename without replacing", profile.rename),
    ):
        yield name, _EXCLUSION.get(exclusion, str(exclusion))
    yield "listing shows new names", _ANSWERS[profile.lists]
    yield "write at an offset", _ANSWERS[profile.writes_at_offset]
    yield "fsync", f"file {_ANSWERS[profile.syncs_files]}, directory {_ANSWERS[profile.syncs_directories]}"
    locks = f"flock {profile.flock or 'not tested'}, range lock {profile.range_lock or 'not tested'}"
    yield "locks on this node", locks
    folded = f"folds case {_ANSWERS[profile.folds_case]}, folds Unicode forms {_ANSWERS[profile.folds_unicode]}"
    kept = f"keeps special characters {_ANSWERS[profile.keeps_names]}, up to {profile.name_bytes or '?'} bytes"
    yield "names", f"{folded}, {kept}"
    if diagnosis.clock_ahead is not None:
        yield "clock of the volume", f"{diagnosis.clock_ahead:+.1f} s"
    if speed is not None:
        sample = f"{format_bytes(speed.sample_bytes)}, one stream, with fsync"
        yield "write", f"{_rate(speed.write_bytes_per_second)} ({sample})"
        rate = speed.read_bytes_per_second
        yield "read", f"{_rate(rate)} ({_READING[speed.reading]})" if rate else "failed"


def _peer_results(peer: PeerReport) -> Iterator[tuple[str, str]]:
    yield "other node", f"{peer.name}{'' if peer.is_done else f', LOST during the step {peer.step}'}"
    if peer.clock_ahead is not None:
        yield "its clock", f"{peer.clock_ahead:+.3f} s, plus or minus {peer.clock_error or 0:.3f} s"
    for name, race in peer.races.items():
        result = f"{race.both_won} of {race.rounds} had two winners, {race.contested} overlapped in time"
        yield f"race by {name}", result if race.supported else "not supported"
    for name, tests in peer.locks.items():
        yield f"{name} between nodes", ", ".join(dict.fromkeys(test.verdict for test in tests))
    if peer.has_compared_names:
        for name, seconds in (
            ("new name listed after", peer.listed_after),
            ("early lookup finds after", peer.found_after),
            ("replaced file seen after", peer.replaced_after),
            ("deleted file gone after", peer.deleted_after),
            ("deleted file stat after", peer.gone_after),
        ):
            yield name, "NOT SEEN" if seconds is None else f"{seconds:.2f} s"
    if peer.is_done:
        longest = peer.heartbeat_after
        yield "0.5 s heartbeat seen after", "NOT SEEN" if longest is None else f"{longest:.2f} s at most"


def _rate(bytes_per_second: float) -> str:
    return f"{format_bytes(bytes_per_second)}/s"
