"""
What must not be believed: sources, names, URIs, store roots, and every small file of a store.

Each is one typed error that names the thing, the rule and the remedy. Nothing that was there is lost, and nothing is
written outside. What must not be waited for is found by the time limit of a test.
"""

import http.server
import json
import os
import shutil
import socket
import threading
from pathlib import Path

import forging
import pytest
import shell
from forging import ABSENT, DEBRIS, edited, holding, signed
from sources import FakeBackend
from trees import listing, model_files, read_tree, write_files
from users import public_directory, python_as

from kserve_pvc import (
    DamagedRecordError,
    DigestMismatchError,
    InvalidURIError,
    LockTimeoutError,
    ModelRef,
    ModelStore,
    PolicyError,
    ReadOnlyStoreError,
    SettingsError,
    SourceDeniedError,
    SourceNotFoundError,
    SourceUnavailableError,
    StoreError,
    StoreFormatError,
    StoreRootError,
    UnknownSchemeError,
    UnsafePathError,
)

BUCKET = "models"
CANARY = "canary-7d1f"
FILES = model_files(seed=31)
LEASE_SECONDS = 0.25
META = ".kserve-pvc"

pytestmark = pytest.mark.timeout(60)


class Scene:
    """
    A store with one precious model in it, and a directory outside that belongs to somebody else.
    """

    def __init__(self, root: Path, place: Path) -> None:
        self.root, self.place, self.outside = root, place, place / "outside"
        write_files(self.outside, {"secret": b"somebody else's", "below/secret": b"too"})
        self.uri = self.source("precious")
        self.model = self.writer().ensure(self.uri, progress=False)
        self.log = root / META / "keys" / self.model.key / "log"

    def source(self, name: str) -> str:
        write_files(self.place / name, FILES)
        return f"file://{self.place}/{name}"

    def writer(self, **arguments: object) -> ModelStore:
        return ModelStore(self.root, mode="rw", **arguments)

    def state(self) -> dict[str, object]:
        """
        Everything that must not change when something is refused: the models, byte for byte, and what lies outside.
        """
        store = ModelStore(self.root)
        return {
            "outside": listing(self.outside),
            "beside": sorted(os.listdir(self.place)),
            "models": listing(self.root / "models"),
            "present": [(m.uri, m.version, m.path) for m in store.list()],
            "intact": [report.ok for report in store.verify_all("full")],
        }


@pytest.fixture
def scene(root, tmp_path, monkeypatch):
    """
    A store with something to lose, whose leases are short and whose readers do not pause before they call a record
    damaged.
    """
    monkeypatch.setattr("kserve_pvc._keys.log._REREAD_PAUSE", 0)
    ModelStore(root, mode="rw", lease_seconds=LEASE_SECONDS)
    return Scene(root, tmp_path)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


SOURCE_ERRORS = {
    "missing bucket": (
        "s3://no-such-bucket-here/model",
        {},
        SourceNotFoundError,
        ["bucket does not exist", "check the URI, the revision"],
    ),
    "missing key": (
        f"s3://{BUCKET}/no/such/model",
        {},
        SourceNotFoundError,
        ["it has no files", "check the URI, the revision"],
    ),
    "missing key with a slash": (f"s3://{BUCKET}/no/such/", {}, SourceNotFoundError, ["it has no files"]),
    "no rights": (
        f"s3://{BUCKET}/m",
        {"key": "nokey", "secret": "nosecret"},
        SourceDeniedError,
        ["denied", "check the credentials"],
    ),
    "wrong secret": (f"s3://{BUCKET}/m", {"secret": CANARY}, SourceDeniedError, ["signature", "check the credentials"]),
    "unknown key": (
        f"s3://{BUCKET}/m",
        {"key": CANARY},
        SourceDeniedError,
        ["does not exist", "check the credentials"],
    ),
    "unknown token": (f"s3://{BUCKET}/m", {"token": CANARY}, SourceDeniedError, ["check the credentials"]),
    "anonymous": (
        f"s3://{BUCKET}/m",
        {"anon": True, "key": None, "secret": None},
        SourceDeniedError,
        ["check the credentials"],
    ),
}


@pytest.mark.parametrize("case", SOURCE_ERRORS)
def test_what_a_source_refuses_is_a_typed_error(scene, s3, case):
    """
    Missing and denied are told apart, with the URI and what to check, and neither the credentials nor a trace are left.
    """
    uri, options, error, words = SOURCE_ERRORS[case]
    before = scene.state()

    with pytest.raises(error) as caught:
        scene.writer(storage_options={**s3["storage_options"], **options}).ensure(uri, progress=False)

    said = str(caught.value)
    assert [word for word in [f"`{uri}`", *words] if word not in said] == []
    assert (CANARY in said, caught.value.exit_code) == (False, 7)
    assert scene.state() == before


def test_a_prefix_of_nothing_is_not_found(scene, s3, upload):
    """
    A directory that holds only directory markers is no model.
    """
    uri, before = upload({"": b"", "sub/": b""}), scene.state()

    with pytest.raises(SourceNotFoundError, match="it has no files"):
        scene.writer(**s3).ensure(uri, progress=False)

    assert scene.state() == before


def test_patterns_that_let_nothing_through_are_named(scene, s3, upload):
    """
    A model without files because of its patterns says so.
    """
    uri, before = upload(FILES), scene.state()

    with pytest.raises(SourceNotFoundError, match="the patterns exclude them all"):
        scene.writer(**s3).ensure(uri, allow_patterns="*.onnx", progress=False)

    assert scene.state() == before


def test_missing_credentials_are_asked_for(scene, s3, monkeypatch, tmp_path):
    """
    Without any credentials the error says how they are given.
    """
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    store = scene.writer(storage_options={"endpoint_url": s3["storage_options"]["endpoint_url"]})
    before = scene.state()

    with pytest.raises(SourceDeniedError, match="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        store.ensure(f"s3://{BUCKET}/model", progress=False)

    assert scene.state() == before


def test_an_endpoint_that_nobody_listens_at_is_given_up(scene):
    """
    A closed port is an error, not an endless wait, which names the endpoint and what to check.
    """
    options = {"endpoint_url": f"http://127.0.0.1:{closed_port()}", "key": CANARY, "secret": CANARY}
    before = scene.state()

    with pytest.raises(SourceUnavailableError, match="check the endpoint and the network, then retry") as caught:
        scene.writer(storage_options=options).ensure(f"s3://{BUCKET}/model", progress=False)

    assert (options["endpoint_url"] in str(caught.value), CANARY in str(caught.value)) == (True, False)
    assert scene.state() == before


class LoginPage(http.server.BaseHTTPRequestHandler):
    """
    Answers everything with 200 and a page for people, as a captive portal does.
    """

    def do_GET(self):
        page = b"<html>Please log in</html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(page)

    def do_HEAD(self):
        self.do_GET()

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize("uri", [f"s3://{BUCKET}", f"s3://{BUCKET}/model"])
def test_a_server_that_does_not_speak_s3_gives_no_model(scene, uri):
    """
    A login page instead of an object or a listing is an error of the source, and is never stored.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), LoginPage)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = {"endpoint_url": f"http://127.0.0.1:{server.server_port}", "key": "key", "secret": "secret"}
    before = scene.state()

    try:
        with pytest.raises((SourceUnavailableError, SourceNotFoundError)):
            scene.writer(storage_options=options).ensure(uri, progress=False)
    finally:
        server.shutdown()
        server.server_close()

    assert scene.state() == before


CONTROL, COLLIDES = "control, invisible", "ignores case or Unicode form"
# Each of these the server takes as it is.
NAMES_IN_A_BUCKET = {
    "new line": (["a\nb"], CONTROL),
    "escape": (["a\x1b[31mb"], CONTROL),
    "bidirectional": (["\u202egpj.exe"], CONTROL),
    "zero width": (["mo\u200bdel"], CONTROL),
    "drive": (["C:/model"], "must be relative"),
    "trailing dot": (["model."], "end in a dot or blank"),
    "trailing blank": (["sub /model"], "end in a dot or blank"),
    "case": (["Model.bin", "model.bin"], COLLIDES),
    "unicode form": (["caf\u00e9", "cafe\u0301"], COLLIDES),
    "compatibility": (["K.bin", "\u212a.bin"], COLLIDES),
    "case of a directory": (["Sub/a", "sub/b"], COLLIDES),
    "file and directory": (["a", "a/b"], "both a file and a directory"),
}
# These no server takes, or changes them on the way.
NAMES_OF_A_LIAR = {
    "climbing": (["../../outside/x"], "climb with `..`"),
    "climbing inside": (["a/../../x"], "climb with `..`"),
    "parent": ([".."], "climb with `..`"),
    "absolute": (["/etc/passwd"], "must be relative"),
    "empty part": (["a//b"], "empty or `.` part"),
    "dot part": (["a/./b"], "empty or `.` part"),
    "slash at the end": (["a/"], "empty or `.` part"),
    "dot": (["."], ""),
    "nothing": ([""], "empty or `.` part"),
    "backslash": (["a\\b"], "no backslash"),
    "share": (["\\\\host\\share"], "no backslash"),
    "nul": (["a\0b"], CONTROL),
    "surrogate": (["a\ud800b"], CONTROL),
    "256 bytes": (["n" * 256], "255 bytes a part"),
    "256 bytes of unicode": (["\u00e9" * 128], "255 bytes a part"),
    "long path": (["/".join(["d" * 200] * 6)], "1024 in all"),
    "case and form": (["CAF\u00c9", "cafe\u0301"], COLLIDES),
}


def assert_refused(scene: Scene, store: ModelStore, uri: str, rule: str) -> None:
    before = scene.state()

    for act in (store.resolve, store.plan, lambda uri: store.ensure(uri, progress=False)):
        with pytest.raises(UnsafePathError) as caught:
            act(uri)
        assert rule in str(caught.value)
        assert str(caught.value).endswith("nothing was written")
        assert (str(caught.value).isprintable(), caught.value.exit_code) == (True, 8)

    assert scene.state() == before


@pytest.mark.parametrize("case", NAMES_IN_A_BUCKET)
def test_a_hostile_name_in_a_bucket_refuses_the_model(scene, s3, upload, case):
    """
    A name that cannot be stored faithfully refuses the whole model before a byte is fetched, escaped in the message.
    """
    names, rule = NAMES_IN_A_BUCKET[case]
    uri = upload({"fine": b"x", **dict.fromkeys(names, b"x")})

    assert_refused(scene, scene.writer(**s3), uri, rule)


@pytest.mark.parametrize("case", NAMES_OF_A_LIAR)
def test_a_hostile_name_of_a_back_end_refuses_the_model(scene, case):
    """
    Whatever a back end lists, no name leaves the model's directory, is changed on the way, or merges with another.
    """
    names, rule = NAMES_OF_A_LIAR[case]
    fake = FakeBackend({"fine": b"x", **dict.fromkeys(names, b"x")})

    assert_refused(scene, scene.writer(backends={"fake": fake.factory}), "fake://anywhere/model", rule)
    assert set(fake.calls) == {"resolve"}


def test_names_that_mean_something_to_the_store_are_only_names(scene):
    """
    A model may hold files that are called like the store's own, and like those of others; they lie in its directory.
    """
    names = [
        f"{META}/store.json",
        "models/x",
        "names/x",
        "record",
        "log/000000000001.commit",
        ".nfs123",
        "CON",
        "store.json",
    ]
    fake = FakeBackend(dict.fromkeys(names, b"x"))
    before = scene.state()

    model = scene.writer(backends={"fake": fake.factory}).ensure("fake://anywhere/model", progress=False)

    assert read_tree(model.path) == dict.fromkeys(names, b"x")
    assert scene.writer().verify(scene.uri, "full").ok
    assert scene.state()["outside"] == before["outside"]


def test_a_source_that_lies_about_a_digest_publishes_nothing(scene):
    """
    Bytes that do not have the announced digest are an error that names the file and both digests.
    """
    fake = FakeBackend({"a": b"right"}, sent={"a": b"wrong"}, sha256={"a": "0" * 64})

    with pytest.raises(
        DigestMismatchError,
        match=r"`a` does not match: expected `sha256:0{64}`, got `sha256:[0-9a-f]{64}`; nothing was published",
    ):
        scene.writer(backends={"fake": fake.factory}).ensure("fake://anywhere/model", progress=False)

    assert [m.uri for m in ModelStore(scene.root).list()] == [scene.uri]


def test_a_source_that_ends_early_publishes_nothing(scene):
    """
    A response that is shorter than announced is requested again, and in the end an error.
    """
    fake = FakeBackend({"a": b"announced"}, sent={"a": b"ann"})

    with pytest.raises(SourceUnavailableError, match="ended 6 bytes early"):
        # The first pause is shorter than that, the others may be longer.
        scene.writer(backends={"fake": fake.factory}, retry_seconds=0.5).ensure("fake://anywhere/model", progress=False)

    assert (fake.calls[0], set(fake.calls[1:]), len(fake.calls) > 2) == ("resolve", {"a"}, True)
    assert [m.uri for m in ModelStore(scene.root).list()] == [scene.uri]


SECRET_URIS = [
    f"s3://key:{CANARY}@bucket/model",
    f"s3://{CANARY}@bucket/model",
    f"https://user:{CANARY}@host.example:8443/model",
    f"s3://key:{CANARY}/with-slash@bucket/model",
    f"hf://user:{CANARY}@org/model",
    f"s3://bucket/model?X-Amz-Signature={CANARY}",
    f"az://container/model?sig={CANARY}&se=2030",
    f"s3://bucket/model#{CANARY}",
    f"s3://bucket/model?versionId=1#{CANARY}",
    f"S3://key:{CANARY}@bucket/model",
]


@pytest.mark.parametrize("mode", ["r", "rw"])
@pytest.mark.parametrize("uri", SECRET_URIS)
def test_secrets_inside_a_uri_are_refused_and_not_repeated(scene, uri, mode):
    """
    Credentials and queries in a URI are refused by every call, with the remedy, and appear nowhere afterwards.
    """
    store, before = ModelStore(scene.root, mode=mode), listing(scene.root)

    for act in (store.ensure, store.get, store.resolve, store.plan, store.verify, store.__contains__):
        with pytest.raises((PolicyError, InvalidURIError)) as caught:
            act(uri)
        assert CANARY not in f"{caught.value} {caught.value!r} {caught.value.fields}"

    assert isinstance(caught.value, PolicyError)
    assert ("storage_options" in str(caught.value)) or ("revision=" in str(caught.value))
    assert listing(scene.root) == before


SPOILED_SECRETS = [
    f"key:{CANARY}@bucket/model",
    f"bucket/model?X-Amz-Signature={CANARY}",
    f"s3:/key:{CANARY}@bucket/model",
    f"s3:key:{CANARY}@bucket/model",
    f" s3://key:{CANARY}@bucket/model",
    f"s3 ://key:{CANARY}@bucket/model",
    f"s3://key:{CANARY}@bucket/mo\ndel",
    f"s3://key:{CANARY}@bucket/{'x' * 5000}",
    f"s3:///key:{CANARY}@bucket/model",
]


@pytest.mark.parametrize("uri", SPOILED_SECRETS)
def test_secrets_inside_what_is_no_uri_are_not_repeated(scene, uri):
    """
    A misspelled URI is refused without its secrets, although no rule says where they are.
    """
    with pytest.raises((PolicyError, InvalidURIError)) as caught:
        scene.writer().ensure(uri, progress=False)

    assert CANARY not in f"{caught.value} {caught.value!r} {caught.value.fields}"
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("uri", SECRET_URIS[:2] + SECRET_URIS[5:6])
@pytest.mark.parametrize("options", [[], ["--json"], ["-v"]])
def test_the_command_line_does_not_repeat_secrets(scene, uri, options):
    """
    Neither stdout, stderr, the JSON document nor the trace of `-v` show what a URI held.
    """
    result = shell.kserve_pvc(scene.root, *options, "ensure", uri)

    assert (result.returncode, CANARY in result.stdout + result.stderr) == (8, False)


@pytest.mark.parametrize("options", [[], ["--json"], ["-v"]])
def test_the_command_line_does_not_repeat_the_query_of_a_link(scene, options):
    """
    Only http and https accept a query, and what it holds is shown nowhere when the address is refused either.
    """
    link = f"https://127.0.0.1:{closed_port()}/model.bin?X-Amz-Signature={CANARY}&sig={CANARY}"

    result = shell.kserve_pvc(scene.root, *options, "ensure", link)

    assert (result.returncode, CANARY in result.stdout + result.stderr) == (8, False)


@pytest.mark.parametrize(
    ("uri", "error", "word"),
    [
        ("", InvalidURIError, "scheme://location"),
        ("bucket/model", InvalidURIError, "scheme://location"),
        ("://bucket", InvalidURIError, "scheme://location"),
        (5, InvalidURIError, "scheme://location"),
        (None, InvalidURIError, "scheme://location"),
        (b"s3://bucket/model", InvalidURIError, "scheme://location"),
        ("S3://bucket/model", InvalidURIError, "write `s3://`"),
        ("s3://bucket/new\nline", InvalidURIError, "control or unprintable"),
        ("s3://bucket/\x1b[31mred", InvalidURIError, "control or unprintable"),
        ("s3://bucket/\u202egpj", InvalidURIError, "control or unprintable"),
        ("s3://bucket/\ud800", InvalidURIError, "control or unprintable"),
        ("s3://bucket/nul\0", InvalidURIError, "control or unprintable"),
        ("s3://bucket/" + "x" * 65536, InvalidURIError, "longer than 2048 bytes"),
        ("s3://", InvalidURIError, "names no bucket"),
        ("file://relative", InvalidURIError, "file:///absolute/path"),
        ("file:///a/../../etc", UnsafePathError, "climb"),
        ("oci://registry/model", UnknownSchemeError, "installed backends serve"),
        ("modelscope://org/model", UnknownSchemeError, "kserve_pvc.backends"),
        ("nonsense+x://y", UnknownSchemeError, "installed backends serve"),
    ],
)
def test_a_uri_that_cannot_be_used_says_why(scene, uri, error, word):
    """
    A senseless URI and an unknown scheme are errors before anything is asked or written, short and on one line.
    """
    before = scene.state()

    with pytest.raises(error, match=word) as caught:
        scene.writer().ensure(uri, progress=False)

    assert (str(caught.value).isprintable(), len(str(caught.value)) < 500) == (True, True)
    assert scene.state() == before


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"revision": ""}, "revision"),
        ({"revision": 5}, "revision"),
        ({"revision": "a\x1bb"}, "revision"),
        ({"allow_patterns": [5]}, "patterns"),
        ({"ignore_patterns": [None]}, "patterns"),
    ],
)
def test_a_selection_that_means_nothing_says_so(scene, arguments, name):
    """
    A revision or pattern that is no text is an error of the call.
    """
    with pytest.raises(InvalidURIError, match=name):
        scene.writer().ensure(scene.uri, progress=False, **arguments)


def a_file(place: Path) -> Path:
    (place / "root").write_text("precious")
    return place / "root"


def below_a_file(place: Path) -> Path:
    return a_file(place) / "store"


def a_pipe(place: Path) -> Path:
    os.mkfifo(place / "root")
    return place / "root"


def a_dangling_link(place: Path) -> Path:
    (place / "root").symlink_to("not-there")
    return place / "root"


def a_loop(place: Path) -> Path:
    (place / "root").symlink_to("root")
    return place / "root"


ROOTS = {
    "missing": (lambda place: place / "not-there", "mount the volume there, or create the directory"),
    "file": (a_file, "it is not a directory"),
    "below a file": (below_a_file, "mount the volume there"),
    "pipe": (a_pipe, "it is not a directory"),
    "dangling link": (a_dangling_link, "mount the volume there"),
    "loop": (a_loop, "mount the volume there"),
    "nul": (lambda place: f"{place}/a\0b", "mount the volume there"),
    "long": (lambda place: place / ("x" * 5000), "mount the volume there"),
}


@pytest.mark.parametrize("mode", ["r", "rw"])
@pytest.mark.parametrize("case", ROOTS)
def test_a_root_that_cannot_be_a_store_is_named(tmp_path, case, mode):
    """
    What is missing, or no directory, is no store: the error names it and what to do, and nothing is created or changed.
    """
    make, word = ROOTS[case]
    root = make(tmp_path)
    before = listing(tmp_path)

    with pytest.raises(StoreRootError, match=word) as caught:
        ModelStore(root, mode=mode)

    assert (isinstance(caught.value, NotADirectoryError), str(caught.value).isprintable()) == (True, True)
    assert listing(tmp_path) == before


USE = """
try:
    store = ModelStore(sys.argv[1], mode=sys.argv[2], backends={"file": FileBackend})
    print(store.ensure(sys.argv[3], progress=False).status)
except StoreError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize(
    ("bits", "mode", "error", "words"),
    [
        (0o755, "rw", "ReadOnlyStoreError", ["uid 1001", "uid 0", "mode 0755", "fsGroup"]),
        (0o700, "r", "VolumeError", ["uid 1001", "uid 0", "mode 0700"]),
        (0o700, "rw", "VolumeError", ["uid 1001", "uid 0", "mode 0700"]),
    ],
)
def test_a_root_of_somebody_else_says_who_may_use_it(bits, mode, error, words):
    """
    A volume that another user closed is an error with both users and the permissions, and stays as it is.
    """
    with public_directory() as place:
        write_files(place / "source", FILES)
        (place / "volume").mkdir()
        (place / "volume").chmod(bits)

        said = python_as(1001, USE, str(place / "volume"), mode, f"file://{place}/source")
        left = list((place / "volume").iterdir())

    assert said.startswith(error)
    assert [word for word in words if word not in said] == []
    assert left == []


@pytest.mark.usefixtures("as_root")
def test_a_store_whose_files_are_closed_is_a_typed_error():
    """
    Another user's store that may be entered and not read is an error about the volume, not an absent model.
    """
    with public_directory() as place:
        write_files(place / "source", FILES)
        (place / "volume").mkdir()
        model = ModelStore(place / "volume", mode="rw").ensure(f"file://{place}/source", progress=False)
        (place / "volume" / META / "keys" / model.key / "log").chmod(0o000)

        said = python_as(1001, USE, str(place / "volume"), "r", f"file://{place}/source")

    assert said.startswith("VolumeError listing failed on ")


SETTINGS_FORGERIES = {
    **{name: forge for name, forge in DEBRIS.items() if name not in ("flipped", "dangling link")},
    "dangling link": forging.dangling_link,
    "newer": lambda path, good: path.write_text(json.dumps({**json.loads(good), "format": 2})),
    "no format": lambda path, good: path.write_text(json.dumps({**json.loads(good), "format": None})),
    "true format": lambda path, good: path.write_text(json.dumps({**json.loads(good), "format": True})),
    "endless lease": lambda path, good: path.write_text(
        json.dumps({**json.loads(good), "lease_seconds": 1}).replace(": 1,", ": 1e999,")
    ),
    "no lease": lambda path, good: path.write_text(json.dumps({**json.loads(good), "lease_seconds": 0})),
    "lease of text": lambda path, good: path.write_text(json.dumps({**json.loads(good), "lease_seconds": "30"})),
    "extra field": lambda path, good: path.write_text(json.dumps({**json.loads(good), "surprise": 1})),
    "climbing id": lambda path, good: path.write_text(json.dumps({**json.loads(good), "store_id": "../../outside"})),
}


@pytest.mark.parametrize("mode", ["r", "rw"])
@pytest.mark.parametrize("case", SETTINGS_FORGERIES)
def test_settings_that_cannot_be_trusted_close_the_store(scene, case, mode):
    """
    Damaged, forged and newer settings are an error that names the file, in bounded time, and nothing is overwritten.
    """
    path = scene.root / META / "store.json"
    good = path.read_bytes()
    path.unlink()
    SETTINGS_FORGERIES[case](path, good)
    before = listing(scene.place)

    with pytest.raises(StoreFormatError, match=f"cannot trust `{META}/store.json`") as caught:
        ModelStore(scene.root, mode=mode)

    assert str(caught.value).isprintable()
    assert ("upgrade kserve_pvc" in str(caught.value)) == (case == "newer")
    assert listing(scene.place) == before


def test_a_locker_of_a_newer_version_closes_the_store_to_writers(scene):
    """
    Who cannot exclude others as the store demands may not write.
    """
    path = scene.root / META / "store.json"
    path.chmod(0o600)
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "locker": "zookeeper://host"}))
    before = listing(scene.place)

    with pytest.raises(
        StoreFormatError, match="this version does not have the locker `zookeeper://host`; upgrade kserve_pvc"
    ):
        scene.writer()

    assert listing(scene.place) == before


RECORD_FORGERIES = {
    **DEBRIS,
    "newer format": edited(format=2),
    "no format": edited(format=ABSENT),
    "extra field": edited(surprise=1),
    "missing field": edited(version=ABSENT),
    "other key": edited(key="other-0123456789abcdef"),
    "other number": edited(seq=7),
    "other type": edited(type="restore"),
    "climbing generation": edited(generation="../../../outside"),
    "negative size": edited(size_bytes=-1),
    "size of text": edited(size_bytes="1"),
    "huge number": edited(files=10**400),
    "time without zone": edited(created_at="2026-01-01T00:00:00"),
    "twice": holding(lambda good: good.replace(b'{"', b'{"uri":"s3://x/y","', 1)),
    "not a number": holding(lambda good: good.replace(b'"files":4', b'"files":NaN')),
    "checksum of another": holding(lambda good: good.replace(b'"files":4', b'"files":5')),
}


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("case", RECORD_FORGERIES)
def test_a_record_that_cannot_be_trusted_makes_a_model_absent(scene, case, number):
    """
    Whatever stands as the newest record: it is never followed or waited for, named by `get` and `verify`, left out by
    `in` and `list`, and superseded by the next record of a read-write store.
    """
    other = scene.writer().ensure(scene.source("other"), progress=False)
    good, path = (scene.log / "000000000001.commit").read_bytes(), scene.log / f"{number:012d}.commit"
    path.unlink(missing_ok=True)
    RECORD_FORGERIES[case](path, signed({**json.loads(good), "seq": number}) if number == 2 else good)
    outside, name = listing(scene.outside), str(path.relative_to(scene.root))

    store = ModelStore(scene.root)
    with pytest.raises(DamagedRecordError) as caught:
        store.get(scene.uri)
    with pytest.raises(ReadOnlyStoreError):
        store.ensure(scene.uri)
    found = (scene.uri in store, [m.uri for m in store.list()])
    reports = [store.verify(scene.uri), *(report for report in store.verify_all() if not report.ok)]
    model = scene.writer().ensure(scene.uri, progress=False)

    assert (caught.value.path, caught.value.ref, f"`{name}`" in str(caught.value)) == (name, scene.uri, True)
    assert (str(caught.value).isprintable(), len(str(caught.value)) < 1000) == (True, True)
    assert found == (False, [other.uri])
    assert [[(p.path, p.kind) for p in report.problems] for report in reports] == [[(name, "record")]] * 2
    assert (model.status, read_tree(model.path), store.verify(scene.uri, "full").ok) == ("downloaded", FILES, True)
    assert (scene.log / f"{number + 1:012d}.commit").is_file()
    assert store.verify(other.uri, "full").ok
    assert listing(scene.outside) == outside


def test_a_record_of_a_newer_version_says_to_upgrade(scene):
    """
    Somebody who reads a newer format is told that.
    """
    path = scene.log / "000000000001.commit"
    edited(format=2)(path, path.read_bytes())

    with pytest.raises(StoreFormatError, match="it has format 2 and this version reads up to 1; upgrade kserve_pvc"):
        ModelStore(scene.root).get(scene.uri)


def test_a_record_moved_from_another_model_is_damage(scene):
    """
    A record that belongs to another key is refused, although it is whole.
    """
    other = scene.writer().ensure(scene.source("other"), progress=False)
    shutil.copy(scene.root / META / "keys" / other.key / "log/000000000001.commit", scene.log / "000000000002.commit")
    store = ModelStore(scene.root)

    with pytest.raises(DamagedRecordError, match="it belongs under another name, so it was moved or forged"):
        store.get(scene.uri)

    assert scene.uri not in store
    assert read_tree(scene.writer().ensure(scene.uri, progress=False).path) == FILES


def test_a_record_that_speaks_of_another_source_is_damage(scene):
    """
    A record of this key with another URI is damage like any other: absent, and superseded by the next `ensure`.
    """
    path = scene.log / "000000000001.commit"
    edited(uri="s3://bucket/other", seq=2)(scene.log / "000000000002.commit", path.read_bytes())
    store = ModelStore(scene.root)

    assert scene.uri not in store
    with pytest.raises(DamagedRecordError):
        store.get(scene.uri)
    assert read_tree(scene.writer().ensure(scene.uri, progress=False).path) == FILES


@pytest.mark.parametrize("place", ["log/999999999999.commit", "claims/999999999999"])
def test_a_number_that_no_writer_makes_is_named(scene, place):
    """
    A forged number after which there is none is a typed error with the remedy, and the model is fetched once it is
    gone.
    """
    path = scene.log.parent / place
    path.mkdir()

    with pytest.raises(StoreFormatError, match="delete that forgery") as caught:
        scene.writer().ensure(scene.uri, force_download=True, progress=False)

    assert str(path.parent.relative_to(scene.root)) in str(caught.value)
    path.rmdir()
    assert scene.writer().ensure(scene.uri, force_download=True, progress=False).status == "downloaded"


MANIFEST_FORGERIES = {
    **{name: forge for name, forge in DEBRIS.items() if name != "huge"},
    "missing": lambda path, good: None,
    "other file": edited(version="sha256:0"),
    "climbing": holding(lambda good: good.replace(b"config.json", b"../../../../outside/secret")),
}


@pytest.mark.parametrize("case", MANIFEST_FORGERIES)
def test_a_manifest_that_cannot_be_trusted_is_named(scene, case):
    """
    A damaged list of files is an error of whoever reads it, a problem of `verify`, and replaced by a forced download.
    """
    path = scene.root / META / "manifests" / f"{scene.model.path.name}.json"
    good = path.read_bytes()
    path.unlink()
    MANIFEST_FORGERIES[case](path, good)
    outside, name = listing(scene.outside), str(path.relative_to(scene.root))

    store = ModelStore(scene.root)
    with pytest.raises(StoreFormatError, match=f"cannot trust `{name}`"):
        store.get(scene.uri).record  # noqa: B018
    report = store.verify(scene.uri, "full")
    model = scene.writer().ensure(scene.uri, force_download=True, progress=False)

    assert [(p.path, p.kind) for p in report.problems] == [(name, "record")]
    assert (store.verify(scene.uri, "full").ok, read_tree(model.path)) == (True, FILES)
    assert listing(scene.outside) == outside


HUGE_MANIFEST = """
import sys
from kserve_pvc import ModelStore

(report,) = ModelStore(sys.argv[1]).verify_all("full")
print(report.problems[0].kind, peak_mib())
"""


def test_a_huge_manifest_is_not_read(scene):
    """
    A manifest beyond every limit is a problem that costs neither time nor memory.
    """
    path = scene.root / META / "manifests" / f"{scene.model.path.name}.json"
    path.chmod(0o600)
    os.truncate(path, 2**40)

    kind, peak_mib = shell.python(shell.PEAK_MIB + HUGE_MANIFEST, str(scene.root)).split()

    assert (kind, int(peak_mib) < 200) == ("record", True)


def forge_claim(scene: Scene, name: str, forge: forging.Forgery) -> Path:
    """
    Give the highest claim of the precious model a file that cannot be trusted; its other file is fine and shows no end.
    """
    claims = scene.log.parent / "claims"
    (newest,) = claims.iterdir()
    claim = claims / "000000000002"
    claim.mkdir()
    for other in ("owner", "beat"):
        good = (newest / other).read_bytes()
        if other == name:
            forge(claim / other, good)
        elif other == "owner":
            (claim / other).write_bytes(good)
    return claim


@pytest.mark.parametrize("name", ["owner", "beat"])
@pytest.mark.parametrize("case", [*DEBRIS, "foreign pod"])
def test_a_claim_that_cannot_be_trusted_is_taken_over(scene, case, name):
    """
    A claim with anything in place of its files shows no sign of life: it is shown, and superseded after one lease.
    """
    alien = {"pod": "p", "node": "n", "uid": 0, "pid": 1, "boot_id": "b", "pid_namespace": "pid:[1]", "started": 1}
    forge = DEBRIS.get(case) or (edited(holder=alien) if name == "owner" else edited(count=7, released=False))
    forge_claim(scene, name, forge)
    outside = listing(scene.outside)

    locks = ModelStore(scene.root).locks()
    model = scene.writer().ensure(scene.uri, force_download=True, progress=False)

    assert [(lock.key, lock.epoch) for lock in locks] == [(scene.model.key, 2)]
    assert (model.status, read_tree(model.path)) == ("downloaded", FILES)
    assert listing(scene.outside) == outside


@pytest.mark.parametrize("case", ["file", "link", "dangling link", "pipe"])
def test_a_claim_that_is_no_directory_is_taken_over(scene, case):
    """
    Anything else under the number of a claim counts as a claim without an owner.
    """
    path = scene.log.parent / "claims/000000000002"
    if case == "link":
        path.symlink_to(scene.outside)
    else:
        {**DEBRIS, "file": holding(b"x")}[case](path, b"")
    outside = listing(scene.outside)

    locks = ModelStore(scene.root).locks()
    model = scene.writer().ensure(scene.uri, force_download=True, progress=False)

    assert [(lock.uri, lock.holder, lock.state) for lock in locks] == [("unknown", "an unknown process", "held")]
    assert (model.status, model.path.name[:12] > path.name) == ("downloaded", True)
    assert listing(scene.outside) == outside


@pytest.mark.parametrize("case", ["file", "link", "pipe", "empty directory", "foreign owner"])
def test_a_lease_that_cannot_be_trusted_holds_nothing_up(scene, case):
    """
    Anything that looks like a reader and shows no sign of life does not keep a model from being removed.
    """
    place = scene.root / META / "leases" / scene.model.path.name / "x"
    place.parent.mkdir(parents=True)
    if case in ("empty directory", "foreign owner"):
        place.mkdir()
    if case == "foreign owner":
        DEBRIS["foreign"](place / "owner", b"")
    elif case == "link":
        place.symlink_to(scene.outside)
    elif case != "empty directory":
        {**DEBRIS, "file": holding(b"x")}[case](place, b"")
    outside = listing(scene.outside)

    scene.writer().remove(scene.uri, trash_seconds=0)

    assert (scene.uri in ModelStore(scene.root), scene.model.path.exists()) == (False, False)
    assert listing(scene.outside) == outside


def leave_unfinished(scene: Scene, uri: str) -> tuple[Path, Path]:
    """
    Leave the directory and the journal of a download that got one file and then failed.
    """
    fake = FakeBackend({"a": b"a" * 5000, "b": b"b"}, sent={"b": b""})
    with pytest.raises(SourceUnavailableError):
        scene.writer(backends={"fake": fake.factory}, part_bytes=1000).ensure(uri, progress=False, max_workers=1)
    (generation,) = (path for path in (scene.root / "models").glob("*-*/*") if (path / "a").exists())
    return generation, scene.root / META / "staging" / generation.name / "journal"


JOURNAL_FORGERIES = {
    # What begins as a journal is one as far as that.
    **{name: forge for name, forge in DEBRIS.items() if name not in ("truncated", "huge")},
    "climbing": holding(lambda good: first_note(good, path="../../../../outside/secret")),
    "too far": holding(lambda good: first_note(good, stop=5001)),
    "negative": holding(lambda good: first_note(good, stop=-1)),
    "other digest": holding(lambda good: first_note(good, sha256="0" * 64)),
    "other token": holding(lambda good: first_note(good, token="other")),
}


def first_note(journal: bytes, **changes: object) -> bytes:
    return signed({**json.loads(journal.splitlines()[0]), **changes}) + b"\n"


# A source that fails is not requested again.
IMPATIENT = {"retry_seconds": 1e-6}


@pytest.mark.parametrize("case", JOURNAL_FORGERIES)
def test_a_journal_that_cannot_be_trusted_is_not_used(scene, case):
    """
    What a journal says without proof is fetched; nothing of it is believed, followed or waited for.
    """
    uri = "fake://anywhere/model"
    _, journal = leave_unfinished(scene, uri)
    good = journal.read_bytes()
    journal.unlink()
    JOURNAL_FORGERIES[case](journal, good)
    fake, outside = FakeBackend({"a": b"a" * 5000, "b": b"b"}), listing(scene.outside)

    model = scene.writer(backends={"fake": fake.factory}, **IMPATIENT).ensure(uri, progress=False)

    assert (model.bytes_fetched, read_tree(model.path)) == (5001, fake.files)
    assert listing(scene.outside) == outside


DONOR_FORGERIES = {
    "link": forging.link,
    "dangling link": forging.dangling_link,
    "pipe": forging.pipe,
    "directory": forging.directory,
    "missing": lambda path, good: None,
    "truncated": holding(lambda good: good[:10]),
    "flipped": holding(lambda good: b"b" + good[1:]),
}


@pytest.mark.parametrize("case", DONOR_FORGERIES)
def test_the_leftovers_of_a_dead_writer_have_to_prove_themselves(scene, case):
    """
    A file that an unfinished download left is taken over only if it is a file with exactly the noted bytes.
    """
    uri = "fake://anywhere/model"
    generation, _ = leave_unfinished(scene, uri)
    good = (generation / "a").read_bytes()
    (generation / "a").unlink()
    DONOR_FORGERIES[case](generation / "a", good)
    fake, outside = FakeBackend({"a": b"a" * 5000, "b": b"b"}), listing(scene.outside)

    model = scene.writer(backends={"fake": fake.factory}, **IMPATIENT).ensure(uri, progress=False)

    assert (model.bytes_fetched, read_tree(model.path)) == (5001, fake.files)
    assert listing(scene.outside) == outside


@pytest.mark.usefixtures("as_root")
def test_leftovers_that_may_not_be_read_are_fetched():
    """
    What another user's dead writer left closed costs a fetch, and does not fail the download.
    """
    with public_directory() as place:
        write_files(place / "source", FILES)
        uri, volume = f"file://{place}/source", place / "volume"
        volume.mkdir()
        os.chown(volume, 1001, 1001)
        said = [python_as(1001, USE, str(volume), "rw", uri)]
        (record,) = volume.glob(f"{META}/keys/*/log/*.commit")
        staging = volume / META / "staging" / json.loads(record.read_bytes())["generation"]
        (generation,) = volume.glob("models/*-*/*")
        staging.mkdir(parents=True)
        (staging / "journal").write_bytes(b"".join(notes_of(volume, generation)))
        record.unlink()
        for path in [p for p in generation.rglob("*") if p.is_file()]:
            os.chown(path, 0, 0)
            path.chmod(0o000)
        said.append(python_as(1001, USE, str(volume), "rw", uri))

    assert [line.split()[0] for line in said] == ["downloaded", "downloaded"]


def notes_of(volume: Path, generation: Path) -> list[bytes]:
    """
    The notes a writer leaves of a generation of which every file is complete.
    """
    manifest = json.loads((volume / META / "manifests" / f"{generation.name}.json").read_bytes())
    return [
        signed({"format": 1, "path": f["path"], "token": f["token"], "stop": f["size_bytes"], "sha256": f["sha256"]})
        + b"\n"
        for f in manifest["files"]
    ]


PLANTED = [
    META,
    f"{META}/manifests",
    f"{META}/trash",
    f"{META}/keys/{{key}}",
    f"{META}/keys/{{key}}/log",
    f"{META}/keys/{{key}}/slots",
]


@pytest.mark.parametrize("place", PLANTED)
def test_a_link_planted_in_place_of_a_directory_leads_nowhere(root, tmp_path, source, place):
    """
    Whatever directory of an empty store is a link: nothing is written, moved or deleted behind it.
    """
    outside, uri = tmp_path / "outside", f"file://{source}"
    write_files(outside, {"000000000001-secret/x": b"x", "000000000001/x": b"x", "000000000001.commit": b"x"})
    key = ModelStore(root).plan(uri).key
    (root / place.format(key=key)).parent.mkdir(parents=True, exist_ok=True)
    (root / place.format(key=key)).symlink_to(outside)
    before = listing(outside)

    def use() -> None:
        store = ModelStore(root, mode="rw", lease_seconds=LEASE_SECONDS)
        store.ensure(uri, progress=False)
        store.remove(uri, trash_seconds=0)

    with pytest.raises(StoreError):
        use()

    assert listing(outside) == before


ESCAPES = "\x1b]0;gotcha\x07\x1b[31m\u202e"


def test_escapes_in_a_record_do_not_reach_a_terminal(scene):
    """
    A record whose texts hold terminal escapes is shown by every verb with them escaped.
    """
    good = (scene.log / "000000000001.commit").read_bytes()
    ref = ModelRef(uri=f"s3://bucket/{ESCAPES}")
    evil = scene.root / META / "keys" / ref.key / "log"
    evil.mkdir(parents=True)
    writer = {**json.loads(good)["writer"], "pod": ESCAPES}
    edited(key=ref.key, uri=ref.uri, version=ESCAPES, writer=writer)(evil / "000000000001.commit", good)

    for arguments in (["ls"], ["--json", "ls"], ["verify", "--all"], ["--json", "verify", "--all"]):
        result = shell.kserve_pvc(scene.root, *arguments)
        assert "gotcha" in result.stdout
        assert unprintable(result.stdout + result.stderr) == []


def test_escapes_in_a_file_name_do_not_reach_a_terminal(scene):
    """
    A file with a hostile name inside a model is reported, escaped.
    """
    (scene.model.path / ESCAPES).write_bytes(b"x")
    (scene.model.path / os.fsdecode(b"\xff")).write_bytes(b"x")

    for arguments in (["verify", scene.uri], ["--json", "verify", "--all"]):
        result = shell.kserve_pvc(scene.root, *arguments)
        assert (result.returncode, "gotcha" in result.stdout, "extra" in result.stdout) == (1, True, True)
        assert unprintable(result.stdout + result.stderr) == []


def test_escapes_in_a_claim_do_not_reach_a_terminal(scene):
    """
    Whoever waits for a downloader with a hostile name is shown it escaped, and so is everybody who lists claims.
    """
    alien = {"pod": ESCAPES, "node": "n", "uid": 0, "pid": 1, "boot_id": "b", "pid_namespace": "pid:[1]", "started": 1}
    forge_claim(scene, "owner", edited(holder=alien))

    with pytest.raises(LockTimeoutError, match="gotcha") as caught:
        scene.writer().ensure(scene.uri, force_download=True, timeout=0, progress=False)
    shown = shell.kserve_pvc(scene.root, "locks")
    waiting = shell.kserve_pvc(scene.root, "ensure", "--force-download", "--timeout", "0.1", scene.uri)

    assert str(caught.value).isprintable()
    assert (waiting.returncode, "gotcha" in shown.stdout, "gotcha" in waiting.stderr) == (5, True, True)
    assert unprintable(shown.stdout + shown.stderr + waiting.stderr) == []


def unprintable(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.isprintable()]


@pytest.mark.parametrize(
    "environ",
    [
        {"KSERVE_PVC_MODE": "write"},
        {"KSERVE_PVC_MODE": "RW"},
        {"KSERVE_PVC_LOCKER": "redlock"},
        {"KSERVE_PVC_LEASE_SECONDS": "soon"},
        {"KSERVE_PVC_LEASE_SECONDS": "nan"},
        {"KSERVE_PVC_ANNOTATIONS": "/"},
    ],
)
def test_an_environment_that_means_nothing_is_named(root, environ):
    """
    A variable with a senseless value is an error that names it, and nothing is guessed or created.
    """
    with pytest.raises(SettingsError):
        ModelStore.from_env(root, environ=environ)

    assert list(root.iterdir()) == []
