"""
`python bench`: measure ours and everybody else, taking turns on one machine, and print how they compare.

Every run is a fresh process into a fresh directory; it is timed from before it starts until it has ended, and what
arrived is checked afterwards. Peers take turns within a round, in reverse order every second round. Compare the
ratios, not the seconds: those are this machine's.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import data
import measure
import origins
import peers
import report

_LISTING = "w4"
_WORKLOADS = ["w1", "w2", "w3", "w4"]
_SHARED_MEMORY = Path("/dev/shm")
# What the hungriest peer takes beside the files themselves.
_ROOM_BYTES = 1 << 30


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    results = []
    with _directory(options.scratch or _SHARED_MEMORY) as scratch, _directory(_destination_parent(options)) as destination:
        for workload in options.only:
            root = scratch / "origin"
            model = data.make(root, workload, quick=options.quick)
            for variant in options.variants:
                with origins.FileOrigin(root, scratch / "server", origins.SHAPES[variant]) as origin:
                    series = _compare(options, workload, variant, model, origin, destination)
                results.append(series)
                print(report.table(series, [peer.name for peer in _peers(workload) if peer.name.startswith(peers.OURS)]), "\n", flush=True)
                _write(options.out, results)
            shutil.rmtree(root)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description="Measure ours and everybody else, taking turns on one machine.")
    parser.add_argument("--only", type=_names(_WORKLOADS), default=_WORKLOADS, metavar="w1,w2,…", help=f"of {', '.join(_WORKLOADS)}")
    parser.add_argument(
        "--variants", type=_names(list(origins.SHAPES)), default=["plain"], metavar="plain,…", help=f"of {', '.join(origins.SHAPES)}"
    )
    parser.add_argument("--peers", type=lambda text: text.split(","), help="only those whose name contains one of these")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each peer; the median counts")
    parser.add_argument("--quick", action="store_true", help="large files of a quarter of their size")
    parser.add_argument("--destination", choices=["tmpfs", "disk"], default="tmpfs", help="what is downloaded to")
    parser.add_argument("--scratch", type=Path, help="where the origin's files lie; in memory, unless you say otherwise")
    parser.add_argument("--out", type=Path, help="a directory for results.json and the plots")
    return parser


def _names(known: list[str]):
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        return names

    return parse


def _destination_parent(options: argparse.Namespace) -> Path:
    return _SHARED_MEMORY if options.destination == "tmpfs" else Path(tempfile.gettempdir())


@contextmanager
def _directory(parent: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kserve-pvc-bench-", dir=parent) as directory:
        yield Path(directory)


def _peers(workload: str) -> list[peers.Peer]:
    return peers.LISTERS if workload == _LISTING else peers.DOWNLOADERS


def _compare(
    options: argparse.Namespace, workload: str, variant: str, model: data.Model, origin: origins.FileOrigin, destination: Path
) -> report.Series:
    series = report.Series(
        workload=workload,
        variant=variant,
        destination="nowhere" if workload == _LISTING else options.destination,
        origin=origin.name,
        size_bytes=0 if workload == _LISTING else model.size_bytes,
        files=len(model.sizes),
    )
    chosen = [peer for peer in _peers(workload) if options.peers is None or any(word in peer.name for word in options.peers)]
    for peer in chosen:
        if why := peer.missing():
            series.skipped[peer.name] = why
        else:
            series.samples[peer.name] = []
    # The origin makes its listings when they are first asked for; that is nobody's time.
    warmups = 1 if workload == _LISTING else 0
    for number in range(-warmups, options.rounds):
        for peer in chosen if number % 2 == 0 else chosen[::-1]:
            if peer.name in series.skipped:
                continue
            print(f"{workload} {variant}, round {number + 1} of {options.rounds}: {peer.name}\x1b[K", end="\r", file=sys.stderr, flush=True)
            outcome = _once(peer, series, model, origin, destination)
            if isinstance(outcome, str):
                series.skipped[peer.name] = outcome
            elif number >= 0:
                series.samples[peer.name].append(outcome)
    return series


def _once(peer: peers.Peer, series: report.Series, model: data.Model, origin: origins.FileOrigin, destination: Path) -> report.Sample | str:
    """One run; or what went wrong in it."""
    job = peers.Job(
        uri=model.uri,
        endpoint=origin.endpoint,
        destination=measure.empty(destination / "files"),
        home=measure.empty(destination / "home"),
        ca=origin.ca,
        files=len(model.sizes),
    )
    measure.touch_memory(min(series.size_bytes + _ROOM_BYTES, measure.free_memory() * 3 // 4))
    mark, origin_cpu = origin.mark(), measure.cpu_seconds(origin.pids)
    try:
        usage = measure.run(peer.command(job), {**job.environ, **peer.extra(job)}, destination)
        origin_cpu, sent = measure.cpu_seconds(origin.pids) - origin_cpu, origin.since(mark)
        if usage.status:
            return f"it ended with {usage.status}: {usage.errors.strip().rpartition(chr(10))[2][:300]}"
        if series.size_bytes and (why := model.check(_arrived_in(peer, job, usage))):
            return why
    finally:
        shutil.rmtree(job.destination)
    return report.Sample(
        wall=usage.wall,
        cpu=usage.cpu,
        peak_rss=usage.peak_rss,
        requests=sent.requests,
        sent_bytes=sent.body_bytes,
        origin_cpu=origin_cpu,
        stolen=usage.stolen,
    )


def _arrived_in(peer: peers.Peer, job: peers.Job, usage: measure.Usage) -> Path:
    return Path(usage.output.strip().splitlines()[-1]) if peer.prints_directory else job.destination


def _write(directory: Path | None, results: list[report.Series]) -> None:
    if directory is None:
        return
    report.write_json(directory / "results.json", results)
    for series in results:
        name = f"{series.workload}-{series.variant}-{series.destination}"
        (directory / f"{name}-wall.svg").write_text(report.bars(series))
        (directory / f"{name}-cpu.svg").write_text(report.bars(series, "cpu", "CPU s"))


if __name__ == "__main__":
    sys.exit(main())
