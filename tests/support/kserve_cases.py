"""
What KServe's own storage initializer and ours are given in `test_differential.py` at the edges: names, settings,
archives, patterns, destinations and servers of which there is a public report, or whose treatment is easily different.
"""

from __future__ import annotations

import io
import os
import random
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trees import write_files
from webserver import page

CONFIG, WEIGHTS, NOTES = b'{"layers": 2}', random.Random(6).randbytes(9 << 20), b"read me\n"
PACKED = {"config.json": CONFIG, "1/model.bin": NOTES}
ALLOW, IGNORE = "STORAGE_ALLOW_PATTERNS", "STORAGE_IGNORE_PATTERNS"
PRIVATE = "KSERVE_PVC_ALLOW_PRIVATE_ADDRESSES"


@dataclass(frozen=True, kw_only=True)
class Case:
    """
    Sources, each with the number of its directory, what the environment says besides, and what happens before.

    `prepares` is called with the directory of the first source, and may return the spelling by which it is given.
    """

    sources: Sequence[str]
    places: Sequence[int]
    env: Mapping[str, str] = field(default_factory=dict)
    prepares: Callable[[Path], str | None] | None = None


def case(
    *sources: str,
    places: Sequence[int] | None = None,
    prepares: Callable[[Path], str | None] | None = None,
    **env: str,
) -> Case:
    return Case(sources=sources, places=places or range(len(sources)), env=env, prepares=prepares)


def tar(files: Mapping[str, bytes], mode: str, *more: tarfile.TarInfo) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for member in more:
            archive.addfile(member)
    return packed.getvalue()


def entry(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """
    A member of a tar without bytes: a link, a directory, a device.
    """
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def zipped(files: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return packed.getvalue()


def zipped_twice() -> bytes:
    """
    A zip that names one file twice.
    """
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("config.json", NOTES)
        archive.NameToInfo.clear()
        archive.writestr("config.json", CONFIG)
    return packed.getvalue()


def zipped_link() -> bytes:
    """
    A zip with a symbolic link.
    """
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        link = zipfile.ZipInfo("link.json")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "config.json")
        archive.writestr("config.json", CONFIG)
    return packed.getvalue()


TAR_GZ, ZIP = tar(PACKED, "w:gz"), zipped(PACKED)
# Objects of every service, by the directory that a case names.
OBJECTS = {
    "double//w.bin": NOTES,
    "double/sub//x.bin": CONFIG,
    "twins//w.bin": NOTES,
    "twins/w.bin": CONFIG,
    "colon/a:b.bin": NOTES,
    "colon/sub/c:d.bin": CONFIG,
    "backslash/a\\b.bin": NOTES,
    "dot-end/a.": NOTES,
    "blank-end/a ": NOTES,
    "blank-start/ a": NOTES,
    "newline/a\n.bin": NOTES,
    "newline-end/a.bin\n": NOTES,
    "tab/a\tb.bin": NOTES,
    "invisible/a\u200bb.bin": NOTES,
    "letter-case/A.bin": NOTES,
    "letter-case/a.bin": CONFIG,
    "composed/\u00e9.bin": NOTES,
    "composed/e\u0301.bin": CONFIG,
    "device/CON": NOTES,
    "device/aux.txt": CONFIG,
    "shell/$(id).bin": NOTES,
    "shell/-rf": CONFIG,
    "shell/*.bin": CONFIG,
    "shell/[a].bin": CONFIG,
    "long/" + "n" * 200 + ".bin": NOTES,
    "deep/" + "d/" * 40 + "w.bin": NOTES,
    "own-name/.kserve-pvc-initialize/x.bin": NOTES,
    "own-name/config.json": CONFIG,
    "store-name/.kserve-pvc/x.bin": NOTES,
    "store-name/config.json": CONFIG,
    "bytes-marker/": NOTES,
    "bytes-marker/model.bin": CONFIG,
    "inner-marker/sub/": NOTES,
    "inner-marker/sub/w.bin": CONFIG,
    "only-marker/": b"",
    "both": NOTES,
    "both/inner.bin": CONFIG,
    "one object.bin": NOTES,
    "100%25.bin": NOTES,
    "\u00fc.bin": NOTES,
    "plus+.bin": NOTES,
    "empty-tar/model.tar.gz": tar({}, "w:gz"),
    "empty-zip/model.zip": zipped({}),
    "no-bytes/model.tar.gz": b"",
    "directories/model.tar": tar({}, "w", entry("a", tarfile.DIRTYPE), entry("a/b", tarfile.DIRTYPE)),
    "success/model.tar.gz": TAR_GZ,
    "success/_SUCCESS": b"",
    "inner-link/model.tar": tar(PACKED, "w", entry("link.json", tarfile.SYMTYPE, "config.json")),
    "hard-link/model.tar": tar(PACKED, "w", entry("link.json", tarfile.LNKTYPE, "config.json")),
    "fifo/model.tar": tar(PACKED, "w", entry("pipe", tarfile.FIFOTYPE)),
    "absolute-tar/model.tar": tar({"/abs/config.json": CONFIG}, "w"),
    "absolute-zip/model.zip": zipped({"/abs/config.json": CONFIG}),
    "dotted-tar/model.tar": tar({"./config.json": CONFIG, "./1/./model.bin": NOTES}, "w"),
    "twice-tar/model.tar": tar({"config.json": NOTES}, "w")[:1024] + tar({"config.json": CONFIG}, "w"),
    "twice-zip/model.zip": zipped_twice(),
    "link-zip/model.zip": zipped_link(),
    "upper/MODEL.ZIP": ZIP,
    "capitals/model.Zip": ZIP,
    "bomb/model.zip": zipped({"zeros.bin": bytes(64 << 20)}),
    "inner-archive/sub/model.zip": ZIP,
    "inner-archive/config.json": CONFIG,
    "packed-and-config/model.tar.gz": TAR_GZ,
    "packed-and-config/config.json": CONFIG,
}


def on_buckets(scheme: str, root: str) -> dict[str, Case]:
    """
    What every service of objects is given.

    Args:
        root: The URI of the bucket.
    """

    def at(path: str, **env: str) -> Case:
        return case(f"{root}/{path}", **env)

    whole = (
        *("double", "twins", "colon", "backslash", "dot-end", "blank-end", "blank-start", "newline", "newline-end"),
        *("tab", "invisible", "letter-case", "composed", "device", "shell", "long", "deep", "own-name"),
        *("store-name", "bytes-marker", "inner-marker", "only-marker", "both", "one object.bin", "100%25.bin"),
        *("\u00fc.bin", "plus+.bin", "empty-tar", "empty-zip", "no-bytes", "directories", "success", "inner-link"),
        *("hard-link", "fifo", "absolute-tar", "absolute-zip", "dotted-tar", "twice-tar", "twice-zip", "link-zip"),
        *("upper", "capitals", "bomb", "inner-archive", "packed-and-config"),
    )
    cases = {path: at(path) for path in whole} | {
        "slash twice at the end": at("tree//"),
        "slash twice inside": at("tree//sub"),
        "slash twice at the start": at("/tree"),
        "part of a name": at("tre"),
        "name of an object with a slash": at("single/model.joblib/"),
        "object left out by its pattern": at("single/model.joblib", **{ALLOW: '["*.onnx"]'}),
        "object ignored": at("single/model.joblib", **{IGNORE: '["*.joblib"]'}),
        "archive left out by its pattern": at("tar-gz", **{ALLOW: '["*.json"]'}),
        "named archive left out by its pattern": at("tar-gz/model.tar.gz", **{ALLOW: '["*.json"]'}),
        "archive allowed by its pattern": at("two", **{ALLOW: '["*.zip"]'}),
        "pattern of a directory": at("tree", **{ALLOW: '["sub/*"]'}),
        "pattern that ends in a slash": at("tree", **{ALLOW: '["sub/"]'}),
        "pattern with a slash first": at("tree", **{ALLOW: '["/config.json"]'}),
        "pattern of another case": at("tree", **{ALLOW: '["*.JSON"]'}),
        "pattern of several letters": at("tree", **{ALLOW: "config.[jx]son, sub/weights.?in"}),
        "line break after the URI": at("tree\n"),
        "blank after the URI": at("tree "),
        "line break inside the URI": at("tr\nee"),
        "query": at("tree?download=true"),
        "fragment": at("tree#main"),
        "dot in the URI": at("./tree"),
        "climbing inside the URI": at("tree/sub/../sub"),
        "capitals": at("TREE"),
    }
    return {f"{scheme}: {name}": found for name, found in cases.items()}


PATTERNS = {
    "empty list": "[]",
    "empty text": '""',
    "null": "null",
    "number": "5",
    "object": '{"a": 1}',
    "broken list": '["*.json"',
    "list with blanks": '[" *.json ", ""]',
    "mixed list": '["*.json", null, 5]',
    "line break": '["*.json"]\n',
    "commas only": ", ,",
    "one name": "config.json",
}
WORDS = ("true", "True", " true", "1", "yes", "on", "false", "0", "no", "maybe", "")


def of_settings(s3: str) -> dict[str, Case]:
    """
    Variables in every spelling.
    """
    denied = {"AWS_ACCESS_KEY_ID": "nokey", "AWS_SECRET_ACCESS_KEY": "nosecret"}
    good = '"access_key_id": "testkey", "secret_access_key": "testsecret"'
    uri = f"{s3}/single"
    secrets = {
        "unknown field": f'{{"type": "s3", "color": "blue", {good}}}',
        "no type": f"{{{good}}}",
        "type gs": f'{{"type": "gs", {good}}}',
        "null": "null",
        "list": "[]",
        "text": '"s3"',
        "nothing": "",
        "boolean": f'{{"type": "s3", "anonymous": false, {good}}}',
        "number": f'{{"type": "s3", "region": 5, {good}}}',
        "null field": f'{{"type": "s3", "region": null, {good}}}',
        "wrong region": f'{{"type": "s3", "region": "eu-central-1", {good}}}',
        "bucket": f'{{"type": "s3", "bucket": "other", "default_bucket": "x", {good}}}',
        "unknown type": '{"type": "floppy"}',
    }
    numbers = {
        f"{name} `{value}`": case(uri, **{name: value})
        for name in ("S3_CONNECT_TIMEOUT", "S3_READ_TIMEOUT", "S3_MAX_ATTEMPTS")
        for value in ("20", "0", "-1", "abc", "", " 20 ", "1.5")
    }
    elsewhere = {
        f"{name} of s3 for hf": case("hf://team/model", **{name: "abc"})
        for name in ("S3_CONNECT_TIMEOUT", "S3_READ_TIMEOUT", "S3_MAX_ATTEMPTS", "awsAnonymousCredential")
    }
    return {
        **{f"patterns: allow {name}": case(f"{s3}/tree", **{ALLOW: value}) for name, value in PATTERNS.items()},
        **{f"patterns: ignore {name}": case(f"{s3}/tree", **{IGNORE: value}) for name, value in PATTERNS.items()},
        **{f"words: anonymous `{word}`": case(uri, awsAnonymousCredential=word) for word in WORDS},
        **{f"words: verify `{word}`": case(uri, S3_VERIFY_SSL=word) for word in WORDS},
        **{f"words: accelerate for hf `{word}`": case("hf://team/model", S3_USE_ACCELERATE=word) for word in WORDS},
        **{f"words: offline hub `{word}`": case("hf://team/model", HF_HUB_OFFLINE=word) for word in WORDS},
        **{
            f"words: confidential `{word}`": case(uri, CONFIDENTIAL_ENABLED=word)
            for word in ("no", "False", "off", "yes")
        },
        **{f"secret: {name}": case(uri, STORAGE_CONFIG=value, **denied) for name, value in secrets.items()},
        "secret: override": case(
            uri,
            STORAGE_CONFIG='{"type": "s3", "access_key_id": "x", "secret_access_key": "y"}',
            STORAGE_OVERRIDE_CONFIG=f"{{{good}}}",
            **denied,
        ),
        **{f"numbers: {name}": found for name, found in numbers.items()},
        **{f"numbers: {name}": found for name, found in elsewhere.items()},
        "keys: line break": case(uri, AWS_ACCESS_KEY_ID="testkey\n"),
        "keys: blank": case(uri, AWS_SECRET_ACCESS_KEY="testsecret "),
        "keys: none": case(uri, AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY=""),
        "digest: of another file": case(uri, VERIFICATION_DIGEST="sha256:" + "0" * 64),
        "signature: a setting of later versions": case(uri, VERIFICATION_SIGNATURE="x"),
    }


def of_hub(commit: str) -> dict[str, Case]:
    """
    Spellings of a model on the hub.
    """
    spelled = {
        "nothing after the colon": "hf://team/model:",
        "slash at the end": "hf://team/model/",
        "revision by at": "hf://team/model@old",
        "colon twice": "hf://team/model:old:",
        "short commit": f"hf://team/model:{commit[:8]}",
        "branch main": "hf://team/model:main",
        "reference": "hf://team/model:refs/heads/old",
        "capitals": "hf://TEAM/model",
        "no owner": "hf:///model",
        "no name": "hf://team/",
        "only a colon": "hf://team/:old",
        "nothing": "hf://",
        "query": "hf://team/model?x=1",
        "line break": "hf://team/model\n",
        "blank": "hf://team/model ",
        "slash twice": "hf://team//model",
        "climbing": "hf://team/../model",
        "directory": "hf://team/model/sub",
        "kind before it": "hf://models/team/model",
        "odd names": "hf://team/odd",
        "empty repository": "hf://team/empty",
        "archive": "hf://team/archive",
        "empty files": "hf://team/zero",
    }
    cases = {name: case(uri) for name, uri in spelled.items()} | {
        "all filtered": case("hf://team/model", **{ALLOW: '["*.onnx"]'}),
        "pattern that ends in a slash": case("hf://team/model", **{ALLOW: '["sub/"]'}),
        "wrong token": case("hf://team/model", HF_TOKEN="hf_neverIssued"),
    }
    return {f"hf: {name}": found for name, found in cases.items()}


def pages() -> dict[str, Any]:
    """
    Files of servers that are peculiar, at `/odd/`.
    """

    def octets(data: bytes, **how: Any) -> Any:
        headers = {"Content-Type": "application/octet-stream", **how.pop("headers", {})}
        return page(data, headers=headers, **how)

    def turn_down(status: int) -> Callable[[str, str | None], int | None]:
        return lambda method, wanted: status if method == "HEAD" or wanted is not None else None

    found = {
        **{f"no-ranges-{status}.bin": octets(NOTES, refuses=turn_down(status)) for status in REFUSALS},
        **{f"no-ranges-{status}-large.bin": octets(WEIGHTS, refuses=turn_down(status)) for status in (400, 403)},
        "head-only.bin": octets(NOTES, refuses=lambda method, _: 400 if method == "HEAD" else None),
        "ignores-ranges.bin": octets(WEIGHTS, in_ranges=False),
        "no-length.bin": octets(NOTES, tells_length=False, in_ranges=False, takes_head=False),
        "zero.bin": octets(b""),
        "no-etag.bin": octets(NOTES, etag=None, modified=None),
        "encoded.bin": octets(TAR_GZ, headers={"Content-Encoding": "gzip"}),
        "encoded.tar.gz": page(TAR_GZ, headers={"Content-Type": "application/gzip", "Content-Encoding": "gzip"}),
        "moved.bin": page(b"", status=302, location="/files/model.joblib"),
        "moved-away.bin": page(b"", status=302, location="ftp://127.0.0.1/x"),
        "round.bin": page(b"", status=302, location="/odd/round.bin"),
        "html.bin": page(b"<html>", headers={"Content-Type": "text/html"}),
        "gone.bin": page(b"", status=410),
        "teapot.bin": page(b"", status=418),
        "made.bin": page(NOTES, status=201, headers={"Content-Type": "application/octet-stream"}),
        "part.bin": page(NOTES, status=206, headers={"Content-Type": "application/octet-stream"}),
        "empty.zip": page(zipped({}), headers={"Content-Type": "application/zip"}),
        "empty.tar": page(tar({}, "w"), headers={"Content-Type": "application/x-tar"}),
        "a:b.bin": octets(NOTES),
        "\u00fc.bin": octets(NOTES),
        "semi.bin;v=1": octets(NOTES),
        "plus+.bin": octets(NOTES),
        "100%.bin": octets(NOTES),
        "secret.bin": octets(NOTES, wants={"X-Key": "let me in"}),
    }
    return {f"/odd/{name}": data for name, data in found.items()}


REFUSALS = (400, 403, 405, 406, 416, 417, 501)


def of_web(web: str) -> dict[str, Case]:
    """
    Peculiar servers and spellings.
    """
    names = [
        *(f"no-ranges-{status}.bin" for status in REFUSALS),
        *(f"no-ranges-{status}-large.bin" for status in (400, 403)),
        *("head-only.bin", "ignores-ranges.bin", "no-length.bin", "zero.bin", "no-etag.bin", "encoded.bin"),
        *("encoded.tar.gz", "moved.bin", "moved-away.bin", "round.bin", "html.bin", "gone.bin", "teapot.bin"),
        *("made.bin", "part.bin", "empty.zip", "empty.tar", "a:b.bin", "\u00fc.bin", "semi.bin;v=1", "plus+.bin"),
        *("100%25.bin", "secret.bin"),
    ]
    file, packed = f"{web}/files/model.joblib", f"{web}/files/model.tar.gz"
    host = web.partition("://")[2]
    header = "127.0.0.1-headers"
    cases = {name: case(f"{web}/odd/{name}") for name in names} | {
        "file left out by its pattern": case(file, **{ALLOW: '["*.onnx"]'}),
        "file ignored": case(file, **{IGNORE: "*"}),
        "members left out by a pattern": case(packed, **{ALLOW: '["*.json"]'}),
        "members ignored": case(packed, **{IGNORE: '["*.json"]'}),
        "all members left out": case(packed, **{ALLOW: '["*.onnx"]'}),
        "line break": case(f"{file}\n"),
        "blank": case(f"{file} "),
        "line break inside": case(f"{web}/files/mo\ndel.joblib"),
        "fragment": case(f"{file}#part"),
        "empty query": case(f"{file}?"),
        "slash twice": case(f"{web}//files/model.joblib"),
        "slash at the end": case(f"{file}/"),
        "climbing": case(f"{web}/odd/../files/model.joblib"),
        "dot": case(f"{web}/./files/model.joblib"),
        "capitals": case(file.replace("http", "HTTP", 1)),
        "credentials": case(f"http://user:secret@{host}/files/model.joblib"),
        "only a host": case(web),
        "host that does not exist": case("http://no-such-host.invalid/model.bin"),
        "address in the cluster": case(file, **{PRIVATE: ""}),
        "header that is no JSON": case(f"{web}/odd/secret.bin", **{header: "X-Key: let me in"}),
        "header that is no object": case(f"{web}/odd/secret.bin", **{header: '["X-Key"]'}),
        "header that is a number": case(f"{web}/odd/secret.bin", **{header: '{"X-Key": 5}'}),
        "header with a blank": case(f"{web}/odd/secret.bin", **{header: '{"X-Key": " let me in"}'}),
        "header of another host": case(f"{web}/odd/secret.bin", **{"localhost-headers": '{"X-Key": "let me in"}'}),
    }
    return {f"http: {name}": found for name, found in cases.items()}


def fill_local(place: Path) -> None:
    """
    Directories of this machine.
    """
    write_files(place / "names", {"a:b.bin": NOTES, "c\\d.bin": NOTES, "e f.bin": NOTES})
    write_files(place / "plain", {"a:b.bin": NOTES, "e f.bin": NOTES, "[x].bin": NOTES, "*.bin": NOTES})
    write_files(place / "zero", {"__init__.py": b"", "model.py": NOTES})
    write_files(place / "only-hidden", {".hidden": NOTES})
    write_files(place / "hidden-below", {"sub/.hidden": NOTES, "sub/model.bin": NOTES})
    write_files(place / "links", {"config.json": CONFIG, "sub/model.bin": NOTES})
    (place / "links" / "link.json").symlink_to("config.json")
    (place / "links" / "link-to-directory").symlink_to("sub")
    write_files(place / "outside", {"config.json": CONFIG})
    (place / "outside" / "link.bin").symlink_to(place / "tree" / "model.joblib")
    write_files(place / "dangling", {"config.json": CONFIG})
    (place / "dangling" / "link.bin").symlink_to("nothing")
    (place / "root-link").symlink_to(place / "tree")
    write_files(place / "empty-archive", {"model.zip": zipped({})})
    write_files(place / "archive-below", {"sub/model.zip": ZIP})
    write_files(place / "archive-and-hidden", {"model.zip": ZIP, ".note": NOTES})
    write_files(place / "archive-and-empty", {"model.zip": ZIP, "_SUCCESS": b""})
    write_files(place / "modes", {"run.sh": NOTES, "plain.bin": NOTES, "closed.bin": NOTES})
    for name, mode in (("run.sh", 0o755), ("plain.bin", 0o644), ("closed.bin", 0o600)):
        (place / "modes" / name).chmod(mode)


def of_directories(local: Path) -> dict[str, Case]:
    """
    Local sources.
    """
    paths = (
        *("names", "plain", "zero", "only-hidden", "hidden-below", "links", "outside", "dangling", "root-link"),
        *(
            "empty-archive",
            "archive-below",
            "archive-and-hidden",
            "archive-and-empty",
            "modes",
            "plain/[x].bin",
            "plain/*.bin",
            "plain/a:b.bin",
        ),
    )
    cases = {path: case(f"file://{local}/{path}") for path in paths} | {
        "path of a link": case(f"{local}/root-link"),
        "file left out by its pattern": case(f"{local}/tree/model.joblib", **{ALLOW: '["*.onnx"]'}),
        "relative URI": case("file://relative/path"),
        "host in the URI": case(f"file://localhost{local}/tree"),
        "climbing": case(f"file://{local}/empty/../tree"),
        "dot": case(f"file://{local}/./tree"),
        "slash at the end": case(f"file://{local}/tree/"),
        "slash twice": case(f"file://{local}//tree"),
        "line break": case(f"file://{local}/tree\n"),
        "pattern of shells": case(f"file://{local}/tree/*"),
        "query": case(f"file://{local}/tree?x=1"),
        "encoded": case(f"file://{local}/plain/e%20f.bin"),
        "root of multi-model servers": case("/mnt/models-of-nobody"),
        "claim": case("/mnt/pvc/no-such-model"),
    }
    return {f"local: {name}": found for name, found in cases.items()}


def _with_files(**files: bytes) -> Callable[[Path], None]:
    def prepare(place: Path) -> None:
        write_files(place, {name.replace("__", "/").replace("_json", ".json"): data for name, data in files.items()})

    return prepare


def _link_of_a_file(place: Path) -> None:
    write_files(place.with_name("elsewhere"), {"x.json": b"not ours"})
    place.mkdir(parents=True)
    (place / "config.json").symlink_to("../elsewhere/x.json")


def _link_of_a_directory(place: Path) -> None:
    place.with_name("elsewhere").mkdir(parents=True)
    place.mkdir(parents=True)
    (place / "sub").symlink_to("../elsewhere")


def _place_is_a_link(place: Path) -> None:
    place.with_name("elsewhere").mkdir(parents=True)
    place.symlink_to("elsewhere")


def _place_is_below_a_link(place: Path) -> str:
    place.with_name("elsewhere").mkdir(parents=True)
    place.with_name("link").symlink_to("elsewhere")
    place.symlink_to("elsewhere/models-0")  # So that what arrives is found.
    return str(place.with_name("link") / "models-0")


def _place_is_a_file(place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(b"")


def of_destinations(s3: str, local: Path) -> dict[str, Case]:
    """
    What is in the destination before, and how it is spelled.
    """
    tree = f"{s3}/tree"
    cases = {
        "foreign file": case(tree, prepares=_with_files(foreign_json=b"{}")),
        "foreign file of the same name": case(tree, prepares=_with_files(config_json=b"{}")),
        "foreign file of the same name, local": case(f"{local}/tree", prepares=_with_files(config_json=b"{}")),
        "file where a directory belongs": case(tree, prepares=_with_files(sub=b"{}")),
        "directory where a file belongs": case(tree, prepares=_with_files(config_json__x=b"{}")),
        "link of a file": case(tree, prepares=_link_of_a_file),
        "link of a directory": case(tree, prepares=_link_of_a_directory),
        "a link": case(tree, prepares=_place_is_a_link),
        "below a link": case(tree, prepares=_place_is_below_a_link),
        "a file": case(tree, prepares=_place_is_a_file),
        "climbing": case(tree, prepares=lambda place: f"{place.parent}/x/../{place.name}"),
        "slash at the end": case(tree, prepares=lambda place: f"{place}/"),
        "slash twice": case(tree, prepares=lambda place: f"{place.parent}//{place.name}"),
        "relative": case(tree, prepares=os.path.relpath),
        "two local sources with one name": case(f"{local}/tree", f"{local}/nested", places=[0, 0]),
        "two sources with one name": case(tree, f"{s3}/named", f"{s3}/tar-gz", places=[0, 0, 0]),
    }
    return {f"destination: {name}": found for name, found in cases.items()}
