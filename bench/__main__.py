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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo"))
sys.path.insert(0, str(Path(__file__).parent))

import bars
import data
import identity
import measure
import origins
import page
import peers
import report
import scenarios

_LISTING = "w4"
# The origin makes listings and digests when they are first asked for; that is nobody's time.
_WARMED = ("w4", "w9")
_WORKLOADS = {
    "w1": "one file of 4 GiB",
    "w2": "four files of 1 GiB and twelve small ones",
    "w3": "2,000 files of 64 KiB",
    "w4": "a listing of 10,000 objects",
    "w5": "a model that is there already",
    "w6": "eight replicas at once, of w2",
    "w7": "w2, killed at half and done again",
    "w8": "memory for 1, 4 and 16 GiB",
    "w9": "two files of 1 GiB and twelve small ones, from every source",
}
_SHARED_MEMORY = Path("/dev/shm")
# What the hungriest peer takes beside the files themselves.
_ROOM_BYTES = 1 << 30


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.show and not options.out:
        parser.error("--show needs --out, where the results are")
    results = report.Results.read(options.out / "results.json") if options.out else report.Results()
    if results.quick != options.quick and not options.show:
        # Small models and large ones in one document would be compared with each other.
        results = report.Results(quick=options.quick)
    if not options.show:
        results.machine, results.versions = report.machine(), report.versions()
        services = identity.IdentityServices("testkey", "testsecret")
        with _directory(options.scratch or _SHARED_MEMORY) as scratch, services:
            options.services = services
            for part in [part for workload in options.only for part in data.parts(workload)]:
                _measure(options, part, scratch, results)
    else:
        for one in results.series.values():
            print(report.table(one, peers.ours(one.samples)), "\n")
        for one in results.facts.values():
            print(report.facts_table(one), "\n")
    print(bars.table(bars.judge(results), quick=results.quick))
    if options.page:
        page.write(options.page, results)
    return 0


def _parser() -> argparse.ArgumentParser:
    text = "; ".join(f"{name}: {what}" for name, what in _WORKLOADS.items())
    parser = argparse.ArgumentParser(
        prog="bench", description="Measure ours and everybody else, taking turns on one machine.", epilog=text
    )
    parser.add_argument(
        "--only", type=_names(_WORKLOADS), default=list(_WORKLOADS), metavar="w1,w2,…", help="of those below"
    )
    parser.add_argument(
        "--variants",
        type=_names(origins.SHAPES),
        default=["plain"],
        metavar="plain,…",
        help=f"of {', '.join(origins.SHAPES)}",
    )
    parser.add_argument(
        "--origin", choices=["files", "weed"], default="files", help="nginx and the like, or the S3 server of SeaweedFS"
    )
    parser.add_argument(
        "--peers",
        type=_words,
        metavar="NAME,…",
        help=(
            "only those whose name, without its commas, contains one of "
            "these; `then openssl` and the like are left out unless named"
        ),
    )
    parser.add_argument(
        "--credentials",
        type=_names(peers.CREDENTIALS),
        default=["plain"],
        metavar="plain,…",
        help=f"where ours have the credentials of S3 from, each a peer of its own: {', '.join(peers.CREDENTIALS)}",
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of each peer; the median counts")
    parser.add_argument("--quick", action="store_true", help="large files of a quarter of their size")
    parser.add_argument(
        "--destination", choices=["tmpfs", "disk"], help="what is downloaded to; else memory, and for w8 the disk"
    )
    parser.add_argument(
        "--scratch", type=Path, help="where the origin's files lie; in memory, unless you say otherwise"
    )
    parser.add_argument(
        "--out", type=Path, help="a directory for results.json and the plots; what earlier runs left there is kept"
    )
    parser.add_argument("--show", action="store_true", help="measure nothing, show what lies in --out")
    parser.add_argument(
        "--page", type=Path, help="a page of the documentation to write the results into, plots beside it in ../_static"
    )
    return parser


def _names(known: Sequence[str] | dict[str, object]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        return names

    return parse


def _words(text: str) -> list[str]:
    words = text.split(",")
    names = {peer.name for chosen in peers.PEERS.values() for peer in chosen}
    # A word that chooses nobody would leave a bar unmeasured after hours.
    if unknown := [word for word in words if not any(_means(word, name) for name in names)]:
        raise argparse.ArgumentTypeError(f"nobody is called {', '.join(unknown)}; there are {'; '.join(sorted(names))}")
    return words


@contextmanager
def _directory(parent: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kserve-pvc-bench-", dir=parent) as directory:
        yield Path(directory)


def _measure(options: argparse.Namespace, workload: str, scratch: Path, results: report.Results) -> None:
    """One model, under every condition that was asked for."""
    root = scratch / "origin"
    model = data.make(root, workload, quick=options.quick)
    kind = _destination(options, workload, model.size_bytes)
    try:
        for variant in ["plain"] if options.origin == "weed" else options.variants:
            with (
                _directory(_parent(kind)) as destination,
                _origin(options, root, scratch / "server", variant) as origin,
            ):
                if workload in scenarios.SCENARIOS:
                    _play(options, workload, variant, model, origin, destination, results)
                else:
                    _race(options, workload, variant, model, origin, destination, results)
            if options.out:
                _write(options.out, results)
    finally:
        shutil.rmtree(root)


def _destination(options: argparse.Namespace, workload: str, size_bytes: int) -> str:
    """Memory is the steadier place, but what is measured to 16 GiB had better go to a disk, if that has room."""
    if options.destination:
        return str(options.destination)
    wants_disk = workload.startswith("w8-") and shutil.disk_usage(_parent("disk")).free > size_bytes + _ROOM_BYTES
    return "disk" if wants_disk else "tmpfs"


def _parent(destination: str) -> Path:
    return _SHARED_MEMORY if destination == "tmpfs" else Path(tempfile.gettempdir())


def _origin(options: argparse.Namespace, root: Path, scratch: Path, variant: str) -> origins.Origin:
    return (
        origins.WeedOrigin(root)
        if options.origin == "weed"
        else origins.FileOrigin(root, scratch, origins.SHAPES[variant])
    )


def _play(
    options: argparse.Namespace,
    workload: str,
    variant: str,
    model: data.Model,
    origin: origins.Origin,
    destination: Path,
    results: report.Results,
) -> None:
    facts = report.Facts(workload=workload, variant=variant, destination=_kind(destination), origin=origin.name)
    try:
        scenarios.SCENARIOS[workload](facts, _job(model, origin, destination), model, origin, options.rounds)
    except scenarios.ScenarioError as error:
        facts.failure = str(error)
    results.facts[facts.key] = facts
    print(report.facts_table(facts), "\n", flush=True)


def _race(
    options: argparse.Namespace,
    workload: str,
    variant: str,
    model: data.Model,
    origin: origins.Origin,
    destination: Path,
    results: report.Results,
) -> None:
    series = report.Series(
        workload=workload,
        variant=variant,
        destination="nowhere" if workload == _LISTING else _kind(destination),
        origin=origin.name,
        size_bytes=0 if workload == _LISTING else model.size_bytes,
        files=len(model.sizes),
        interpreter_rss=measure.interpreter_rss(),
    )
    chosen = [
        peer
        for peer in peers.PEERS[workload]
        if options.peers is None or any(_means(word, peer.name) for word in options.peers)
    ]
    chosen += peers.with_credentials(workload, options.credentials, options.services)
    room = shutil.disk_usage(destination).free
    for peer in chosen:
        if why := _hindrance(peer, series, origin, room):
            series.skipped[peer.name] = why
        else:
            series.samples[peer.name] = []
    for number in range(-1 if workload in _WARMED else 0, options.rounds):
        for peer in chosen if number % 2 == 0 else chosen[::-1]:
            if peer.name in series.skipped:
                continue
            _say(f"{workload} {variant}, round {number + 1} of {options.rounds}: {peer.name}")
            outcome = _once(peer, series, model, origin, destination)
            if isinstance(outcome, str):
                series.skipped[peer.name] = outcome
            elif number >= 0:
                series.samples[peer.name].append(outcome)
    _say("")
    results.series[series.key] = series
    print(report.table(series, peers.ours(series.samples)), "\n", flush=True)


def _means(word: str, name: str) -> bool:
    """Whether a word, in which there are no commas, chooses a peer: those that hash afterwards have to be meant."""
    return word in name.replace(",", "") and (", then" in name) <= ("then" in word)


def _say(text: str) -> None:
    """Show to whoever sits there what is going on, in one line that the next text takes."""
    if sys.stderr.isatty():
        print(f"{text}\x1b[K", end="\r", file=sys.stderr, flush=True)


def _hindrance(peer: peers.Peer, series: report.Series, origin: origins.Origin, room_bytes: int) -> str | None:
    """Why a peer cannot take part, or None."""
    if peer.needs_hub and not origin.is_hub:
        return f"{origin.name} speaks only S3"
    if room_bytes < peer.copies * series.size_bytes:
        return f"it needs room for the model {peer.copies} times"
    return peer.missing()


def _kind(destination: Path) -> str:
    return "tmpfs" if destination.is_relative_to(_SHARED_MEMORY) else "disk"


def _job(model: data.Model, origin: origins.Origin, destination: Path) -> peers.Job:
    return peers.Job(
        uri=model.uri,
        endpoint=origin.endpoint,
        destination=measure.empty(destination / "files"),
        home=measure.empty(destination / "home"),
        ca=origin.ca,
        files=len(model.sizes),
        google=origin.google,
    )


def _once(
    peer: peers.Peer, series: report.Series, model: data.Model, origin: origins.Origin, destination: Path
) -> report.Sample | str:
    """One run; or what went wrong in it."""
    given, wanted = _given_and_wanted(peer, model)
    job = _job(given, origin, destination)
    measure.touch_memory(min(series.size_bytes + _ROOM_BYTES, measure.free_memory() * 3 // 4))
    mark, origin_cpu = origin.mark(), measure.cpu_seconds(origin.pids)
    try:
        usage = measure.run(peer.command(job), {**job.environ, **peer.extra(job)}, destination)
        origin_cpu, sent = measure.cpu_seconds(origin.pids) - origin_cpu, origin.since(mark)
        if usage.status:
            return f"it ended with {usage.status}: {usage.errors.strip().rpartition(chr(10))[2][:300]}"
        if series.size_bytes and (why := wanted.check(_arrived_in(peer, job, usage))):
            return why
    finally:
        shutil.rmtree(job.destination)
    return report.Sample(
        wall=usage.wall,
        cpu=usage.cpu,
        peak_rss=usage.peak_rss,
        requests=None if sent is None else sent.requests,
        sent_bytes=None if sent is None else sent.body_bytes,
        origin_cpu=origin_cpu,
        stolen=usage.stolen,
    )


def _given_and_wanted(peer: peers.Peer, model: data.Model) -> tuple[data.Model, data.Model]:
    """What a peer is told to fetch, and what has to arrive."""
    if not peer.wants_archive or model.archive is None:
        return model, model
    return model.archive, model if peer.unpacks else model.archive


def _arrived_in(peer: peers.Peer, job: peers.Job, usage: measure.Usage) -> Path:
    return Path(usage.output.strip().splitlines()[-1]) if peer.prints_directory else job.destination


def _write(directory: Path, results: report.Results) -> None:
    results.write(directory / "results.json", bars.document(bars.judge(results)))
    for series in results.series.values():
        (directory / f"{series.key}-wall.svg").write_text(report.plot(series))
        (directory / f"{series.key}-cpu.svg").write_text(report.plot(series, "cpu", "CPU s"))


if __name__ == "__main__":
    sys.exit(main())
