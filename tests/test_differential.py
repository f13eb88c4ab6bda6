"""
KServe's own storage initializer and ours, over the same sources: the same files, the same bytes, the same exit code.

Where they differ is a table, `data/differential/differences.toml`: each entry has its reason, what ours does, and the
cases that show it. An entry that shows no difference fails, and so does a case that differs and is in no entry.
"""

from __future__ import annotations

import gzip
import os
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import azurite
import gcs
import kserve_cases
import pytest
from hub import Hub
from initializers import PHRASES, STOCK, files_of, run_all
from kserve_cases import ALLOW, CONFIG, IGNORE, NOTES, PACKED, TAR_GZ, WEIGHTS, ZIP, Case, case, entry, tar, zipped
from trees import write_files
from tunnel import Tunnel
from webserver import WebServer, page

trustme = pytest.importorskip("trustme", reason="`trustme` is not installed, which makes the certificates")
botocore = pytest.importorskip("botocore.exceptions", reason="`botocore` is not installed")
pytest.importorskip("azure.storage.blob", reason="`azure-storage-blob` is not installed")

# The first test runs all cases with both initializers.
pytestmark = pytest.mark.timeout(3600)
HERE = Path(__file__).parent
TABLE = tomllib.loads((HERE / "data" / "differential" / "differences.toml").read_text(encoding="utf-8"))["difference"]
PAGE = HERE.parent / "docs" / "reference" / "kserve-differences.md"
DIFFERING = {name for entry in TABLE for name in entry["cases"]}

MODEL = {"config.json": CONFIG, "sub/weights.bin": WEIGHTS, "sub/deep/notes.txt": NOTES}
ODD = {
    "a blank.bin": b"1",
    "ü ö.bin": b"2",
    "100%.bin": b"3",
    "a+b.bin": b"4",
    "x%20y.bin": b"5",
    "a=1&b=2,c;d.bin": b"6",
    "~'(e)!.bin": b"7",
}


TAR = tar(PACKED, "w")
GOOD = {
    **{f"model/{name}": data for name, data in PACKED.items()},
    **{f"tree/{name}": data for name, data in MODEL.items()},
    **{f"odd/{name}": data for name, data in ODD.items()},
    "tree/more/config.json": CONFIG,
    "model-v2/other.bin": b"of the second version",
    "model.bak": b"an old copy",
    "single/model.joblib": NOTES,
    "bare/LICENSE": NOTES,
    "named/named.bin": NOTES,
    "named/named/inner.bin": CONFIG,
    "hidden/.config": CONFIG,
    "hidden/.cache/x.bin": NOTES,
    "zero/__init__.py": b"",
    "zero/model.py": NOTES,
    "only-zero/__init__.py": b"",
    "tgz/model.tgz": TAR_GZ,
    "tar-gz/model.tar.gz": TAR_GZ,
    "plain/model.tar": TAR,
    "xz/model.tar.xz": tar(PACKED, "w:xz"),
    "bz2/model.tar.bz2": tar(PACKED, "w:bz2"),
    "txz/model.txz": tar(PACKED, "w:xz"),
    "taz/model.taz": TAR_GZ,
    "wrong/model.tar.gz": tar(PACKED, "w:bz2"),
    "tbz/model.tbz": tar(PACKED, "w:bz2"),
    "7z/model.7z": NOTES,
    "compress/model.tar.Z": NOTES,
    "zip/model.zip": ZIP,
    "inside/deeper/model.zip": ZIP,
    "two/a.tar.gz": TAR_GZ,
    "two/b.zip": ZIP,
    "nested/model.tar.gz": tar({"inner.zip": ZIP, "config.json": CONFIG}, "w:gz"),
    "broken/model.tar.gz": b"this is no archive",
    "climbing-zip/model.zip": zipped({"../up.bin": NOTES, "config.json": CONFIG}),
    "climbing-tar/model.tar": tar({"../up.bin": NOTES, "config.json": CONFIG}, "w"),
    "linked/model.tar": tar({}, "w", entry("outside", tarfile.SYMTYPE, "../../outside")),
    "gz/model.bin.gz": gzip.compress(NOTES),
    **kserve_cases.OBJECTS,
}


def on_buckets(scheme: str, root: str) -> dict[str, Case]:
    """What every service of objects is asked."""

    def at(path: str, **env: str) -> Case:
        return case(f"{root}/{path}", **env)

    cases = {
        "prefix": at("tree"),
        "prefix with a slash": at("tree/"),
        "prefix of two levels": at("tree/sub"),
        "one object": at("single/model.joblib"),
        "one object under its prefix": at("single"),
        "one object without a suffix": at("bare/LICENSE"),
        "sibling prefixes": at("model"),
        "names that repeat the prefix": at("named"),
        "hidden names": at("hidden"),
        "empty objects": at("zero"),
        "only an empty object": at("only-zero"),
        "odd names": at("odd"),
        "tar.gz": at("tar-gz"),
        "zip by its name": at("zip/model.zip"),
        "two archives": at("two"),
        "archive that is broken": at("broken"),
        "compressed file": at("gz"),
        "allowed": at("tree", **{ALLOW: '["*.json"]'}),
        "ignored": at("tree", **{IGNORE: "*.bin,*.txt"}),
        "all filtered": at("tree", **{ALLOW: '["*.onnx"]'}),
        "missing": at("absent/model"),
    }
    return {f"{scheme}: {name}": found for name, found in cases.items()}


def cases(endpoint: Mapping[str, str], local: Path) -> dict[str, Case]:
    """
    Every case by its name.

    Args:
        endpoint: Where the services are.
    """
    s3, gs, az, web = (
        "s3://differential",
        "gs://models",
        "https://kservepvc.blob.core.windows.net/models",
        endpoint["web"],
    )
    denied = {"AWS_ACCESS_KEY_ID": "nokey", "AWS_SECRET_ACCESS_KEY": "nosecret"}
    return {
        **on_buckets("s3", s3),
        **on_buckets("gs", gs),
        **on_buckets("azure", az),
        **kserve_cases.on_buckets("s3", s3),
        **kserve_cases.on_buckets("gs", gs),
        **kserve_cases.on_buckets("azure", az),
        **kserve_cases.of_settings(s3),
        **kserve_cases.of_hub(endpoint["commit"]),
        **kserve_cases.of_web(web),
        **kserve_cases.of_directories(local),
        **kserve_cases.of_destinations(s3, local),
        "gs: whole bucket": case("gs://whole-bucket"),
        "gs: whole bucket with a slash": case("gs://whole-bucket/"),
        "gs: encoded object": case(f"{gs}/encoded"),
        "azure: whole container": case("https://kservepvc.blob.core.windows.net/whole"),
        "azure: whole container with a slash": case("https://kservepvc.blob.core.windows.net/whole/"),
        "azure: other spelling": case("az://models/tree"),
        "s3: allowed and ignored": case(f"{s3}/tree", **{ALLOW: '["*.json", "*.txt"]', IGNORE: '["*/deep/*"]'}),
        "s3: allowed by one JSON text": case(f"{s3}/tree", **{ALLOW: '"*.json"'}),
        "s3: one object past the patterns": case(f"{s3}/single/model.joblib", **{ALLOW: "*.json"}),
        "s3: marker of a directory": case(f"{s3}/marked"),
        "s3: whole bucket": case("s3://whole-bucket"),
        "s3: whole bucket with a slash": case("s3://whole-bucket/"),
        "s3: missing bucket": case("s3://no-such-bucket/model"),
        "s3: denied": case(f"{s3}/tree", **denied),
        "s3: wrong credentials in a secret": case(
            f"{s3}/tree", STORAGE_CONFIG='{"type": "s3", "access_key_id": "nokey"}'
        ),
        "s3: good credentials in a secret": case(
            f"{s3}/tree",
            STORAGE_CONFIG='{"type": "s3", "access_key_id": "testkey", "secret_access_key": "testsecret"}',
            **denied,
        ),
        "s3: a secret that is no JSON": case(f"{s3}/tree", STORAGE_CONFIG="{"),
        "s3: tgz": case(f"{s3}/tgz"),
        "s3: tar": case(f"{s3}/plain"),
        "s3: tar.xz": case(f"{s3}/xz"),
        "s3: tar.bz2": case(f"{s3}/bz2"),
        "s3: txz": case(f"{s3}/txz"),
        "s3: taz": case(f"{s3}/taz"),
        "s3: tbz": case(f"{s3}/tbz"),
        "s3: 7z": case(f"{s3}/7z"),
        "s3: tar.Z": case(f"{s3}/compress"),
        "s3: tar.gz of bzip2": case(f"{s3}/wrong"),
        "s3: one archive by a pattern": case(f"{s3}/two", **{ALLOW: "*.tar.gz"}),
        "s3: one archive without another": case(f"{s3}/two", **{IGNORE: "*.zip"}),
        "s3: single archive by a pattern": case(f"{s3}/tgz", **{ALLOW: "*.tgz"}),
        "s3: zip in a deeper directory": case(f"{s3}/inside"),
        "s3: archive in an archive": case(f"{s3}/nested"),
        "s3: zip that climbs": case(f"{s3}/climbing-zip"),
        "s3: tar that climbs": case(f"{s3}/climbing-tar"),
        "s3: tar with a link that leads out": case(f"{s3}/linked"),
        "hf: repository": case("hf://team/model"),
        "hf: revision": case("hf://team/model:old"),
        "hf: commit": case(f"hf://team/model:{endpoint['commit']}"),
        "hf: allowed": case("hf://team/model", **{ALLOW: '["*.json"]'}),
        "hf: ignored": case("hf://team/model", **{IGNORE: "*.bin"}),
        "hf: missing repository": case("hf://team/absent"),
        "hf: missing revision": case("hf://team/model:absent"),
        "hf: only an organization": case("hf://team"),
        "hf: file of a repository": case("hf://team/model/config.json"),
        "http: file": case(f"{web}/files/model.joblib"),
        "http: file with a query": case(f"{web}/files/model.joblib?download=true"),
        "http: no type": case(f"{web}/files/untyped.bin"),
        "http: json": case(f"{web}/files/config.json"),
        "http: tar.gz": case(f"{web}/files/model.tar.gz"),
        "http: tar.gz as bytes": case(f"{web}/files/bytes.tar.gz"),
        "http: tar": case(f"{web}/files/model.tar"),
        "http: zip": case(f"{web}/files/model.zip"),
        "http: zip that says it is a page": case(f"{web}/files/page.zip"),
        "http: compressed file": case(f"{web}/files/model.bin.gz"),
        "http: missing": case(f"{web}/files/absent.bin"),
        "http: wants a header": case(f"{web}/files/guarded.bin"),
        "http: gives a header": case(f"{web}/files/guarded.bin", **{"127.0.0.1-headers": '{"X-Key": "let me in"}'}),
        "http: cut off": case(f"{web}/files/cut.bin"),
        "http: no file name": case(f"{web}/"),
        "http: odd name": case(f"{web}/files/a%20b%2Bc.bin"),
        "local: directory": case(f"file://{local}/tree"),
        "local: path": case(f"{local}/tree"),
        "local: file": case(f"file://{local}/tree/model.joblib"),
        "local: nested directories": case(f"file://{local}/nested"),
        "local: hidden names": case(f"file://{local}/hidden"),
        "local: archive": case(f"file://{local}/packed"),
        "local: empty directory": case(f"file://{local}/empty"),
        "local: missing": case(f"file://{local}/absent"),
        "local: allowed": case(f"file://{local}/tree", **{ALLOW: '["*.json"]'}),
        "local: ignored": case(f"file://{local}/tree", **{IGNORE: '["*.json"]'}),
        "local: directory by a pattern of files": case(f"file://{local}/nested", **{ALLOW: '["*.bin"]'}),
        "several: two sources": case(f"{s3}/tree", "hf://team/model"),
        "several: three in one directory": case(f"{s3}/tree", f"{s3}/single", f"{gs}/bare", places=[0, 0, 0]),
        "several: the second fails": case(f"{s3}/tree", f"{s3}/absent", f"{gs}/single"),
        "several: the same twice": case(f"{s3}/single", f"{s3}/single"),
        "several: allowed": case(f"{s3}/tree", f"{gs}/tree", **{ALLOW: "*.json"}),
        "error: scheme in capitals": case("S3://differential/tree"),
        "error: unknown scheme": case("nothing://differential/tree"),
        "error: ftp": case("ftp://127.0.0.1/model.bin"),
        "error: claim": case("pvc://claim/model"),
        "error: no scheme": case("differential/tree"),
    }


NAMES = list(cases({"web": "http://nowhere", "commit": "0"}, Path("/nowhere")))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """
    Exit code, files by directory, and how often each line that people look for was written. After an error only the
    directories of the sources before it count; if nothing shows which one failed, none.
    """

    code: int
    places: Sequence[Mapping[str, tuple[bytes, str]]]
    said: Sequence[int]
    log: str = field(compare=False, repr=False)


Outcomes = Mapping[str, tuple[Outcome, Outcome]]


def services(stack: ExitStack, origin: Any) -> tuple[dict[str, str], dict[str, str]]:
    """
    Start and fill everything, and return where it is, and the environment that leads there.
    """
    for name in ("differential", "whole-bucket"):
        origin.make_bucket(name)
    google, web, hub = (stack.enter_context(part()) for part in (gcs.FakeGCS, WebServer, Hub))
    certificate = stack.enter_context(_certificate())
    azure = stack.enter_context(azurite.Azurite(certificate=certificate))
    for name, data in GOOD.items():
        google.put(name, data)
        azure.put(name, data)
        with suppress(botocore.ClientError):  # What a server of files cannot hold.
            origin.put("differential", name, data)
    origin.put("differential", "marked/", b"")
    origin.put("differential", "marked/model.bin", NOTES)
    google.make_bucket("whole-bucket")
    azure.make_container("whole")
    google.put("encoded/model.bin", NOTES, encoding="gzip")
    for name, data in PACKED.items():
        origin.put("whole-bucket", name, data)
        google.put(name, data, bucket="whole-bucket")
        azure.put(name, data, container="whole")
    commit = hub.push("team/model", {"config.json": b"{}", "old.bin": NOTES}, "old")
    hub.push("team/model", MODEL)
    hub.push("team/odd", ODD)
    hub.push("team/archive", {"model.tar.gz": TAR_GZ})
    hub.push("team/zero", {"__init__.py": b"", "model.py": NOTES})
    web.pages |= pages() | kserve_cases.pages()
    tunnel = stack.enter_context(Tunnel(azure.port))
    environ = {
        **origin.environ,
        "STORAGE_EMULATOR_HOST": google.endpoint,
        "HF_ENDPOINT": hub.endpoint,
        "AZURE_STORAGE_ACCESS_KEY": azurite.KEY,
        "HTTPS_PROXY": tunnel.url,
        "SSL_CERT_FILE": str(certificate[0]),
        "KSERVE_PVC_ALLOW_PRIVATE_ADDRESSES": "1",
    }
    return {"web": web.endpoint, "commit": commit}, environ


def pages() -> dict[str, Any]:
    """
    Files of the web, each with the type that its server says.
    """

    def typed(data: bytes, kind: str, **how: Any) -> Any:
        return page(data, headers={"Content-Type": kind}, **how)

    octets = "application/octet-stream"
    found = {
        "model.joblib": typed(NOTES, octets),
        "model.joblib?download=true": typed(NOTES, octets),
        "untyped.bin": page(NOTES),
        "config.json": typed(CONFIG, "application/json"),
        "model.tar.gz": typed(TAR_GZ, "application/gzip"),
        "bytes.tar.gz": typed(TAR_GZ, octets),
        "model.tar": typed(TAR, "application/x-tar"),
        "model.zip": typed(ZIP, "application/zip"),
        "page.zip": typed(b"<html>log in first</html>", "text/html"),
        "model.bin.gz": typed(gzip.compress(NOTES), octets),
        "guarded.bin": typed(NOTES, octets, wants={"X-Key": "let me in"}),
        "cut.bin": typed(WEIGHTS, octets, cuts=[1 << 20] * 100),
        "a b+c.bin": typed(NOTES, octets),
    }
    return {f"/files/{name}": data for name, data in found.items()}


def fill_local(place: Path) -> None:
    """Directories of this machine."""
    write_files(place / "tree", {"model.joblib": NOTES, "config.json": CONFIG})
    write_files(place / "nested", {"config.json": CONFIG, "sub/deep/weights.bin": NOTES})
    write_files(place / "hidden", {"config.json": CONFIG, ".hidden": NOTES})
    write_files(place / "packed", {"model.tar.gz": TAR_GZ})
    (place / "empty").mkdir(parents=True)
    kserve_cases.fill_local(place)


@contextmanager
def _certificate() -> Iterator[tuple[Path, Path]]:
    """Of the one host that is Azure's, by an authority of its own."""
    authority = trustme.CA()
    made = authority.issue_cert("kservepvc.blob.core.windows.net", "127.0.0.1")
    with tempfile.TemporaryDirectory() as place:
        certificate, key = Path(place) / "certificate.pem", Path(place) / "key.pem"
        authority.cert_pem.write_to_path(certificate)
        made.private_key_pem.write_to_path(key)
        chain = Path(place) / "chain.pem"
        for part in (*made.cert_chain_pems, authority.cert_pem):
            part.write_to_path(chain, append=True)
        yield chain, key


@pytest.fixture(scope="session")
def outcomes(origin: Any, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """
    What came of every case, with KServe's own and with ours. Both are asked once for all of them.
    """
    python = os.environ.get(STOCK)
    if not python:
        pytest.skip(
            "`kserve-storage` is not installed beside; `nox -s "
            f"differential` does it, or {STOCK} names the Python that has it"
        )
    place = tmp_path_factory.mktemp("differential")
    fill_local(place / "local")
    with ExitStack() as stack:
        endpoint, environ = services(stack, origin)
        wanted = cases(endpoint, place / "local")
        with ThreadPoolExecutor(2) as pool:
            stock, ours = pool.map(
                lambda side: run_side(*side, wanted, environ, place), (("stock", python), ("ours", sys.executable))
            )
    return {name: (stock[name], ours[name]) for name in wanted}


def run_side(
    which: str, python: str, wanted: Mapping[str, Case], environ: Mapping[str, str], place: Path
) -> dict[str, Outcome]:
    """One initializer through all cases, in directories of its own."""
    given = {}
    for number, (name, one) in enumerate(wanted.items()):
        directory = place / which / str(number)
        (directory / "home").mkdir(parents=True)
        pairs = [(source, str(directory / f"models-{n}")) for source, n in zip(one.sources, one.places, strict=True)]
        if one.prepares is not None and (spelled := one.prepares(Path(pairs[0][1]))) is not None:
            pairs[0] = (pairs[0][0], spelled)
        given[name] = {
            "pairs": pairs,
            "env": {"HOME": str(directory / "home"), **one.env},
            "log": str(directory / "log"),
        }
    clean = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.environ.get("PYTHONPATH", "") if which == "ours" else "",
        "LANG": "C.UTF-8",
    }
    found = run_all(python, which, given, {**clean, **environ})
    return {name: _outcome(wanted[name], given[name]["pairs"], found[name]) for name in wanted}


def _outcome(one: Case, pairs: Sequence[tuple[str, str]], found: Mapping[str, Any]) -> Outcome:
    code, log = found["code"], found["log"]
    said = [log.count(phrase) for phrase in PHRASES]
    # Sources of one directory are put there together, so their time is one.
    said[2] = min(said[2], 1)
    done = (
        [Path(directory) for _, directory in pairs]
        if code == 0
        else [Path(directory) for _, directory in pairs[: said[1]]]
    )
    places = [files_of(directory) for directory in dict.fromkeys(done)]
    # A source that fails is announced or refused before; only what became of the others is compared.
    return Outcome(code=code, places=places, said=said if code == 0 else said[1:2], log=log)


def told(outcome: Outcome) -> str:
    """An outcome as the table spells it: `refused`, or the names of all files."""
    return "refused" if outcome.code else ", ".join(sorted(name for place in outcome.places for name in place))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DIFFERING])
def test_both_do_the_same(outcomes, name):
    """
    Exit codes, files, bytes and the lines that people look for are equal.
    """
    stock, ours = outcomes[name]

    assert ours == stock, f"KServe: {stock.log[-2000:]}\n\nOurs: {ours.log[-2000:]}"
    assert ours.code in (0, 1)
    assert ours.code == 1 or any(ours.places)


@pytest.mark.parametrize(
    ("name", "expected"), [(name, expected) for entry in TABLE for name, expected in entry["cases"].items()]
)
def test_a_deliberate_difference_is_what_the_table_says(outcomes, name, expected):
    """
    Ours does what the entry says, and KServe's own something else; else the entry is out of date.
    """
    stock, ours = outcomes[name]

    assert told(ours) == expected, ours.log[-2000:]
    assert ours.code in (0, 1)
    assert ours != stock, "it does not differ any more: take it out of the table"


def test_the_table_is_about_cases_that_exist():
    """
    Every case of the table is one of the suite, in one entry only, and there are enough cases besides.
    """
    named = [name for entry in TABLE for name in entry["cases"]]

    assert sorted(set(named) - set(NAMES)) == []
    assert len(named) == len(set(named))
    assert len(NAMES) - len(named) >= 350


def test_an_entry_that_no_case_shows_says_why():
    """
    Every entry has cases, or the reason why there are none.
    """
    assert [entry["ours"] for entry in TABLE if bool(entry["cases"]) is bool(entry.get("untried"))] == []


def test_the_page_lists_the_differences():
    """
    The page of the documentation has one row for each entry, with its rule and its reason, and no row more.
    """
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]

    assert rows[1:] == [f"| {entry['ours']} | {entry['reason']} |" for entry in TABLE]
