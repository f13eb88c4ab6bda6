"""
Models on a Hugging Face endpoint: as the real client sees them, pinned, and with the token for the hub alone.
"""

import json
import logging
import random
import time
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec

import actors
import pytest
import shell
from hub import OWNER, STORAGE_HOST, STRANGER, WRONG, Answer, Hub, HuggingFace, StoredFile, busy, git_blob
from sources import Interfering
from trees import model_files, read_tree

from kserve_pvc import (
    DigestMismatchError,
    InvalidURIError,
    ModelStore,
    PolicyError,
    SettingsError,
    SourceChangedError,
    SourceDeniedError,
    SourceNotFoundError,
    SourceUnavailableError,
    StoreError,
    UnsafePathError,
)
from kserve_pvc._source.ref import parse_ref
from kserve_pvc.backends._hf_addresses import Addresses, lifetime
from kserve_pvc.backends._http.target import target_of
from kserve_pvc.backends._ranges import follow
from kserve_pvc.backends.hf import HFBackend

PART_BYTES = 100_000
NAME = "org/model"
URI = f"hf://{NAME}"
BIG = "weights/a.bin"
FILES = {
    **model_files(seed=31),
    ".gitattributes": b"*.bin filter=lfs diff=lfs merge=lfs -text\n",
    "tokenizer/vocab é+1%.json": b"{}",
    "tokenizer/deep/er/x": b"x",
}
LARGE_BYTES = 10_000


@pytest.fixture
def hub():
    """
    A hub with one public model.
    """
    with Hub(large_bytes=LARGE_BYTES) as hub:
        hub.push(NAME, FILES)
        yield hub


def options(hub: Hub, **others: object) -> dict[str, object]:
    return {"endpoint": hub.endpoint, "token": OWNER, "allow_private": [STORAGE_HOST], **others}


def backend(hub: Hub, **others: object) -> HFBackend:
    return HFBackend(options(hub, **others), {})


def store(root, hub: Hub, *, token: object = OWNER, **arguments: object) -> ModelStore:
    """
    A store that reaches the hub.
    """
    arguments = {"part_bytes": PART_BYTES, "backends": {"hf": HFBackend}, **arguments}
    return ModelStore(root, mode="rw", storage_options=options(hub, token=token), **arguments)


def read(source: HFBackend, file, start: int, stop: int) -> bytes:
    """
    Read a range to its end.
    """
    buffer, data = memoryview(bytearray(65_536)), b""
    with source.open_range(file, start, stop) as reader:
        while len(data) < stop - start and (count := reader.readinto(buffer[: stop - start - len(data)])) != 0:
            data += bytes(buffer[: count or 0])
    return data


def big_file(source: HFBackend):
    return next(f for f in source.resolve(parse_ref(URI)).files if str(f.entry.path) == BIG)


def meddle_with(path: str, change, host: str = "hub"):
    """
    Change the answers for some paths of one host.
    """
    return lambda request, answer: change(answer) if request.host == host and path in request.path else None


def test_a_listing_pins_every_file(hub):
    """
    Each file is there with path, size, the digest that the hub announces, and the commit; the version is the commit.
    """
    commit = hub.push(NAME, {})

    found = backend(hub).resolve(parse_ref(URI))

    assert found.version == commit
    assert {dict(f.pin)["commit"] for f in found.files} == {commit}
    assert [
        (str(f.entry.path), f.entry.size_bytes, f.entry.sha256, f.entry.token, f.digest, f.address) for f in found.files
    ] == [
        (
            name,
            len(data),
            stored.sha256 if stored.is_large else None,
            stored.sha256 if stored.is_large else stored.blob,
            None if stored.is_large else f"gitblob{len(data)}:{git_blob(data)}",
            f"{NAME}/{name}",
        )
        for name, data in sorted(FILES.items(), key=lambda item: item[0].split("/"))
        for stored in [StoredFile.of(data, is_large=len(data) >= LARGE_BYTES)]
    ]


CLIENT = """
import json, sys
from huggingface_hub import HfApi, snapshot_download
name, revision = sys.argv[1:]
place = snapshot_download(name, revision=revision)
files = HfApi().list_repo_tree(name, revision=revision, recursive=True)
blobs = [f for f in files if hasattr(f, "blob_id")]
print(json.dumps([place, {f.path: [f.size, f.lfs.sha256 if f.lfs else f.blob_id] for f in blobs}]))
"""
WHAT_IT_RAISES = """
import json, sys
from huggingface_hub import hf_hub_download
raised = []
for name, revision, path in json.loads(sys.argv[1]):
    try:
        hf_hub_download(name, path, revision=revision)
        raised.append("nothing")
    except Exception as error:
        raised.append(type(error).__name__)
print(json.dumps(raised))
"""


def client(hub: Hub, home, script: str, *arguments: str, token: str = OWNER):
    """
    What the real client makes of the hub, in a process of its own because it reads its settings at import.
    """
    if find_spec("huggingface_hub") is None:
        pytest.skip("`huggingface_hub` is not installed")
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,127.0.0.2"}
    environ = {**quiet, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_TOKEN": token}
    return json.loads(shell.python(script, *arguments, env=environ).splitlines()[-1])


@pytest.mark.parametrize("is_direct", [False, True], ids=["after redirects", "directly"])
def test_a_model_is_what_the_real_client_downloads(root, tmp_path, is_direct):
    """
    Tree, digests and commit are those that `snapshot_download` of huggingface_hub gives for the same repository, over
    several pages.
    """
    with Hub(large_bytes=LARGE_BYTES, page=3, is_direct=is_direct) as hub:
        commit = hub.push(NAME, FILES, branch="v1")
        hub.push(NAME, {"config.json": b"newer"})
        snapshot, listed = client(hub, tmp_path / "home", CLIENT, NAME, "v1")
        model = store(root, hub).ensure(f"{URI}:v1", progress=False)

    assert read_tree(model.path) == read_tree(type(model.path)(snapshot)) == FILES
    assert {str(f.path): [f.size_bytes, f.token] for f in model.record.files} == listed
    assert (model.record.version, snapshot.endswith(commit)) == (commit, True)


def test_the_endpoint_refuses_as_the_real_client_expects(hub, tmp_path):
    """
    The endpoint of these tests is understood by huggingface_hub when it refuses: gated, missing and private models,
    revisions, files.
    """
    hub.push("org/gated", FILES)
    hub.push("org/private", FILES)
    hub.repository("org/gated").is_gated, hub.repository("org/private").readers = True, {OWNER}
    cases = [
        ["org/gated", "main", BIG],
        ["org/none", "main", BIG],
        ["org/private", "main", BIG],
        [NAME, "none", BIG],
        [NAME, "main", "none"],
    ]

    raised = client(hub, tmp_path / "home", WHAT_IT_RAISES, json.dumps([*cases, [NAME, "main", BIG]]), token=STRANGER)

    missing = [
        "RepositoryNotFoundError",
        "RepositoryNotFoundError",
        "RevisionNotFoundError",
        "RemoteEntryNotFoundError",
        "nothing",
    ]
    assert raised == ["GatedRepoError", *missing]


def test_every_byte_is_compared_with_what_the_hub_announces(root, hub):
    """
    The record says for each file what it was compared with: the SHA-256 of a large file, the git blob of a small one.
    """
    record = store(root, hub).ensure(URI, progress=False).record

    assert {str(f.path): f.evidence for f in record.files} == {
        name: f"sha256:{StoredFile.of(data, is_large=True).sha256}"
        if len(data) >= LARGE_BYTES
        else f"gitblob{len(data)}:{git_blob(data)}"
        for name, data in FILES.items()
    }


@pytest.mark.parametrize(("path", "host"), [(BIG, "storage"), ("config.json", "hub")])
def test_other_bytes_than_announced_are_refused(root, hub, path, host):
    """
    Bytes of the right length that do not have the announced digest end the download, and nothing is published.
    """
    hub.meddle = lambda request, answer: (
        replace(answer, body=bytes(len(answer.body)))
        if answer.status == 200
        and answer.body in FILES.values()
        and (request.host == host and len(answer.body) == len(FILES[path]))
        else None
    )

    with pytest.raises(DigestMismatchError) as caught:
        store(root, hub).ensure(URI, progress=False)

    assert caught.value.path == path
    assert URI not in store(root, hub)


@pytest.mark.parametrize(
    ("uri", "revision"),
    [(f"{URI}:v1", None), (f"{URI}@v1", None), (URI, "v1"), (f"{URI}:v1", "v1"), (f"{URI}@v1/", None), (URI, "commit")],
)
def test_a_revision_is_a_branch_a_tag_or_a_commit(root, hub, uri, revision):
    """
    It stands behind a colon, as in KServe, behind an at sign, or in the argument, and gives the files of that commit.
    """
    commit = hub.push(NAME, {"config.json": b"first"}, branch="v1")
    hub.push(NAME, {"config.json": b"second"})

    model = store(root, hub).ensure(uri, revision=commit if revision == "commit" else revision, progress=False)

    assert (model.record.version, read_tree(model.path)) == (commit, {"config.json": b"first"})


@pytest.mark.parametrize("uri", [f"{URI}:", f"{URI}:/"])
def test_nothing_after_the_colon_is_the_main_branch(root, hub, uri):
    """
    As in KServe, a colon with nothing behind it names no revision.
    """
    commit = hub.push(NAME, {"config.json": b"main"})

    model = store(root, hub).ensure(uri, progress=False)

    assert (model.record.version, (model.path / "config.json").read_bytes()) == (commit, b"main")


@pytest.mark.parametrize("branch", ["refs/pr/1", "refs/convert/fp8", "feature/x"])
def test_a_revision_may_hold_slashes(root, hub, branch):
    """
    Pull requests and conversions are understood in a URI, any other name with slashes in the argument.
    """
    hub.push(NAME, {"a/b": b"b"}, branch=branch)
    uri, revision = (f"{URI}/a", branch) if branch == "feature/x" else (f"{URI}@{branch}/a", None)

    model = store(root, hub).ensure(uri, revision=revision, progress=False)

    assert read_tree(model.path) == {"b": b"b"}


@pytest.mark.parametrize(
    ("uri", "revision", "word"),
    [
        ("hf://", None, "no model is named"),
        ("hf://gpt2", None, "no model is named"),
        ("hf://org/", None, "no model is named"),
        ("hf://org//name", None, "no model is named"),
        ("hf://../name", None, "no model is named"),
        (f"{URI}@", None, "no model is named"),
        (f"{URI}:v1", "v2", "omit one"),
        (f"{URI}:../x", None, "two in a row"),
        (URI, ".hidden", "cannot begin with a dot"),
        ("hf://datasets/org/name", None, "only models"),
    ],
)
def test_a_uri_that_names_no_model_is_refused(hub, uri, revision, word):
    """
    The error says what a URI looks like, and nobody is asked.
    """
    with pytest.raises(InvalidURIError, match=word):
        backend(hub).resolve(parse_ref(uri, revision=revision))

    assert hub.requests == []


@pytest.mark.parametrize("uri", ["hf://user:pass@org/name", f"hf://{OWNER}@org/name", f"{URI}?token={OWNER}"])
def test_a_uri_carries_no_token(uri):
    """
    What may be a secret is refused and not repeated.
    """
    with pytest.raises(PolicyError) as caught:
        parse_ref(uri)

    assert not any(secret in str(caught.value) for secret in ("pass", OWNER))


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        ("/weights", {"a.bin": FILES[BIG], "b.bin": FILES["weights/b.bin"]}),
        ("/weights/", {"a.bin": FILES[BIG], "b.bin": FILES["weights/b.bin"]}),
        (":main/weights/a.bin", {"a.bin": FILES[BIG]}),
        ("@main/config.json", {"config.json": FILES["config.json"]}),
        ("/tokenizer/vocab é+1%.json", {"vocab é+1%.json": b"{}"}),
        ("/tokenizer/deep", {"er/x": b"x"}),
        ("/", FILES),
    ],
)
def test_a_path_names_a_directory_or_a_file(root, hub, inside, expected):
    """
    A path inside a model gives what lies below it, never its siblings, or one file under its own name.
    """
    hub.push(NAME, {"weights-v2/c.bin": b"sibling", "weights.json": b"sibling"} if inside != "/" else {})

    model = store(root, hub).ensure(URI + inside, progress=False)

    assert read_tree(model.path) == expected


@pytest.mark.parametrize("inside", ["/none", "/weights/none", "/none/x", "/none/", "/config.json/", "/weights/a.bin/x"])
def test_a_path_that_is_not_there_is_not_found(root, hub, inside):
    """
    The error is told before anything is written.
    """
    with pytest.raises(SourceNotFoundError, match=r"the model has no"):
        store(root, hub).ensure(URI + inside, progress=False)

    assert not (root / "models").exists()


@pytest.mark.parametrize("inside", ["/../x", "//x", "/a/./b"])
def test_a_path_that_climbs_is_refused(hub, inside):
    """
    A path inside a model obeys the rules for names, and nobody is asked.
    """
    with pytest.raises(UnsafePathError):
        backend(hub).resolve(parse_ref(URI + inside))

    assert hub.requests == []


def test_patterns_choose_files(root, hub):
    """
    Allowed files are fetched, and of the others not one byte.
    """
    hub.push(NAME, {"model.safetensors": b"s" * 20_000, "original/model.safetensors": b"o" * 20_000})

    model = store(root, hub).ensure(
        URI, allow_patterns=["*.safetensors", "*.json"], ignore_patterns="original/", progress=False
    )

    assert sorted(read_tree(model.path)) == ["config.json", "model.safetensors", "tokenizer/vocab é+1%.json"]
    assert len(hub.asked("storage")) == 1


def test_a_branch_that_moves_is_not_followed(root, hub):
    """
    Once a revision was resolved every request names the commit, so what is pushed meanwhile changes nothing.
    """
    commit = backend(hub).resolve(parse_ref(URI)).version
    moving = Interfering(
        backend(hub),
        after_resolve=lambda: hub.push(NAME, {BIG: bytes(700_000), "config.json": b"newer"}),
        before_range=lambda number, file: hub.put(NAME, BIG, b"%d" % number) if number == 3 else None,
    )
    hub.requests.clear()
    fixed = ModelStore(root, mode="rw", backends={"hf": moving.factory}, part_bytes=PART_BYTES)

    model = fixed.ensure(URI, progress=False)

    assert (read_tree(model.path), model.record.version) == (FILES, commit)
    assert [r.path for r in hub.asked("hub") if commit not in r.path] == [f"/api/models/{NAME}/revision/main"]


def test_a_newer_commit_fetches_what_is_new(root, hub):
    """
    Asked for a newer version, only the files that changed are fetched.
    """
    store(root, hub).ensure(URI, progress=False)
    hub.push(NAME, {"config.json": b"newer"})

    model = store(root, hub).ensure(URI, refresh=True, progress=False)

    assert read_tree(model.path) == {**FILES, "config.json": b"newer"}
    assert model.bytes_fetched == len(b"newer")


def test_a_commit_that_is_lost_ends_the_download(root, hub):
    """
    If the hub loses the commit during a download, the call fails, and nothing is present.
    """
    commit = backend(hub).resolve(parse_ref(URI)).version
    losing = Interfering(backend(hub), after_resolve=lambda: hub.repository(NAME).forget(commit))

    with pytest.raises(SourceChangedError):
        ModelStore(root, mode="rw", backends={"hf": losing.factory}).ensure(URI, progress=False)

    assert URI not in store(root, hub)


def test_three_hundred_files_come_over_several_pages(root):
    """
    A model of more files than one page of the tree is complete.
    """
    files = {f"part-{number % 7}/{number:03d}.txt": b"%d" % number for number in range(300)}
    with Hub(page=50) as hub:
        hub.push(NAME, files)
        model = store(root, hub).ensure(URI, progress=False)
        pages = len(hub.asked("hub", containing="/tree/"))

    assert read_tree(model.path) == files
    assert pages == -(-(300 + 7) // 50)


def test_a_mirror_that_repeats_links_of_the_hub_is_asked_itself(root, hub):
    """
    Of the link to the next page only the query counts, so that neither question nor token goes to another host.
    """
    for number in range(20):
        hub.put(NAME, f"many/{number}", b"%d" % number)
    hub._page = 4
    elsewhere = hub.endpoint.replace("127.0.0.1", "127.0.0.2")
    hub.meddle = lambda request, answer: replace(
        answer, headers={n: v.replace(hub.endpoint, elsewhere) if n == "Link" else v for n, v in answer.headers.items()}
    )

    found = backend(hub).resolve(parse_ref(f"{URI}/many"))

    assert len(found.files) == 20
    assert hub.asked("storage") == []


def test_a_listing_that_does_not_end_is_given_up(hub):
    """
    A page that names itself as the next one is asked for once.
    """
    link = f'<{hub.endpoint}/api/models/{NAME}/tree/x?recursive=true&expand=false&cursor=MA%3D%3D>; rel="next"'
    hub.meddle = meddle_with("/tree/", lambda answer: replace(answer, headers={**answer.headers, "Link": link}))

    with pytest.raises(SourceUnavailableError, match="the listing loops") as caught:
        backend(hub).resolve(parse_ref(URI))

    assert caught.value.is_final
    assert len(hub.asked("hub", containing="/tree/")) == 2


def test_the_token_goes_to_the_hub_alone(root, hub):
    """
    Every request to the hub carries the token, and none to the storage that it points to.
    """
    store(root, hub).ensure(URI, progress=False)

    assert {r.token for r in hub.asked("hub")} == {OWNER}
    assert {r.token for r in hub.asked("storage")} == {None}
    assert len(hub.asked("storage")) == 7


@pytest.mark.parametrize("path", ["/revision/", "/tree/"])
def test_the_token_does_not_follow_the_hub_elsewhere(hub, path):
    """
    A question about a model that is answered with the address of another host is not repeated there.
    """
    elsewhere = hub.endpoint.replace("127.0.0.1", "127.0.0.2")
    hub.meddle = meddle_with(path, lambda answer: Answer(status=307, headers={"Location": f"{elsewhere}/x"}))

    with pytest.raises(SourceUnavailableError, match="credentials are never sent elsewhere") as caught:
        backend(hub).resolve(parse_ref(URI))

    assert caught.value.is_final
    assert hub.asked("storage") == []


@pytest.mark.parametrize("host", ["127.0.0.3", "localhost", "10.0.0.1", "127.0.0.3."])
def test_the_hub_leads_to_no_private_address(root, hub, host):
    """
    Where the bytes are is chosen by whoever uploaded them: a private address is connected to only if it is allowed, or
    is that of the hub itself, and nothing is published.
    """
    moved = Answer(status=302, headers={"Location": f"http://{host}:9/latest/x"}, body=b"")
    hub.meddle = meddle_with("/resolve/", lambda answer: moved)

    with pytest.raises(PolicyError, match="is not public"):
        store(root, hub).ensure(URI, progress=False)

    assert list(ModelStore(root).list()) == []


@pytest.mark.parametrize("host", ["169.254.169.254", "169.254.169.254.", "[fd00:ec2::254]", "0xA9FEA9FE"])
@pytest.mark.parametrize("allowed", [True, ["169.254.169.254"]])
def test_the_hub_never_leads_to_metadata(root, hub, host, allowed):
    """
    What gives secrets to every process of a machine is never read, whatever is allowed.
    """
    moved = Answer(status=302, headers={"Location": f"http://{host}/latest/meta-data"}, body=b"")
    hub.meddle = meddle_with("/resolve/", lambda answer: moved)

    with pytest.raises(PolicyError, match="never connected to"):
        ModelStore(root, mode="rw", storage_options=options(hub, allow_private=allowed)).ensure(URI, progress=False)


def test_a_private_hub_is_reached_and_its_storage_if_allowed(root, hub):
    """
    The address of the hub was configured by the user; that of its storage needs the option or the variable.
    """
    given = {name: value for name, value in options(hub).items() if name != "allow_private"}
    with pytest.raises(PolicyError, match=f"`{STORAGE_HOST}` is refused"):
        ModelStore(root, mode="rw", storage_options=given).ensure(URI, progress=False)
    assert ModelStore(root, storage_options=given).plan(URI).files == len(FILES)

    source = HFBackend(given, {"KSERVE_PVC_ALLOW_PRIVATE_ADDRESSES": "1"})
    assert read(source, big_file(source), 0, 10) == FILES[BIG][:10]


def test_no_secret_is_told(root, hub, caplog):
    """
    Neither the token nor a signature is in a record, a file of the store, a log, or the error of a failure.
    """
    caplog.set_level(logging.DEBUG)
    told = []
    model = store(root, hub).ensure(URI, progress=False)
    for status, code in [(401, ""), (403, "GatedRepo"), (403, ""), (404, "EntryNotFound"), (418, ""), (302, "")]:
        headers = {"X-Error-Code": code, "X-Error-Message": f"{OWNER} no", "Location": f"ftp://x/?Signature={OWNER}"}
        hub.meddle = meddle_with(
            "", lambda answer, s=status, h=headers: Answer(status=s, headers=h, body=OWNER.encode())
        )
        with pytest.raises(StoreError) as caught:
            store(root, hub, retry_seconds=0.1).resolve(URI)
        told.append(f"{caught.value!s} {caught.value!r} {caught.value.fields} {caught.value.__cause__!r}")
    echo = f"Signature={OWNER}".encode()
    hub.meddle = meddle_with("", lambda answer: Answer(status=500, body=echo), host="storage")
    with pytest.raises(SourceUnavailableError) as caught:
        store(root, hub, retry_seconds=0.1).ensure(URI, force_download=True, progress=False)
    told += [f"{caught.value!s} {caught.value!r}", repr(model.record), repr(backend(hub)), caplog.text]

    written = [path.read_bytes() for path in root.rglob("*") if path.is_file()]
    everything = b"".join(written) + "".join(told).replace("Signature=…", "").encode()
    assert [word for word in (OWNER, "Signature=", "Bearer") if word.encode() in everything] == []


@pytest.mark.parametrize(("max_workers", "asked"), [(1, 1), (8, 1)])
def test_the_hub_is_asked_once_where_a_file_is(root, hub, max_workers, asked):
    """
    Whoever reads a large file first learns its address for all streams, so that the hub gets one request for it.
    """
    store(root, hub, part_bytes=20_000).ensure(f"{URI}/{BIG}", max_workers=max_workers, progress=False)

    assert len(hub.asked("hub", containing="/resolve/")) == asked
    assert len(hub.asked("storage")) == 35


def test_streams_of_one_file_wait_for_the_first(hub):
    """
    A range that is opened while another one asks where the file is sends nothing before that is known.
    """
    source = backend(hub)
    file = big_file(source)
    hub.requests.clear()
    buffer = memoryview(bytearray(1000))
    with source.open_range(file, 0, 1000) as first, source.open_range(file, 1000, 2000) as second:
        waited = second.readinto(buffer)
        sent_meanwhile = Counter(r.host for r in hub.requests)
        counts = [first.readinto(buffer), second.readinto(buffer)]

    assert (waited, dict(sent_meanwhile), counts) == (None, {"hub": 1}, [1000, 1000])
    assert bytes(buffer) == FILES[BIG][1000:2000]


def test_a_stream_that_gives_up_lets_another_one_ask(hub):
    """
    If who asked is gone before the answer came, the next stream asks itself.
    """
    source = backend(hub)
    file = big_file(source)
    with source.open_range(file, 0, 1000):
        pass

    assert read(source, file, 1000, 2000) == FILES[BIG][1000:2000]


def test_a_signature_that_expires_is_renewed(root, hub):
    """
    When storage refuses an address that was good before, the hub is asked for another, and all bytes arrive.
    """
    before = lambda number, file: hub.revoke_addresses() if number == 4 else None  # noqa: E731
    revoking = Interfering(backend(hub), before_range=before)
    fixed = ModelStore(root, mode="rw", backends={"hf": revoking.factory}, part_bytes=PART_BYTES)

    model = fixed.ensure(f"{URI}/{BIG}", max_workers=1, progress=False)

    assert read_tree(model.path) == {"a.bin": FILES[BIG]}
    assert len(hub.asked("hub", containing="/resolve/")) == 2
    assert len(hub.asked("storage")) == 7 + 1


def test_an_address_that_is_nearly_over_is_not_used_again(root, hub):
    """
    An address whose signature is at its end when it is given serves one range, and the hub is asked again for the next.
    """
    hub.meddle = meddle_with(
        "/resolve/", lambda answer: replace(answer, headers={**answer.headers, "Date": "Fri, 01 Jan 2100 00:00:00 GMT"})
    )

    model = store(root, hub).ensure(f"{URI}/{BIG}", max_workers=1, progress=False)

    assert read_tree(model.path) == {"a.bin": FILES[BIG]}
    assert len(hub.asked("hub", containing="/resolve/")) == len(hub.asked("storage")) == 7


@pytest.mark.parametrize(
    ("query", "date", "seconds"),
    [
        ("Expires=1001000&Signature=x", "Mon, 12 Jan 1970 13:46:40 GMT", 800.0),
        ("X-Amz-Date=19700112T134640Z&X-Amz-Expires=500&X-Amz-Signature=x", "Mon, 12 Jan 1970 13:48:20 GMT", 320.0),
        ("Expires=999000", "Mon, 12 Jan 1970 13:46:40 GMT", 0.0),
        ("Expires=9999999999", "Mon, 12 Jan 1970 13:46:40 GMT", 3600.0),
        ("Expires=nan", "", 600.0),
        ("Expires=soon", "", 600.0),
        ("X-Amz-Expires=3600", "", 600.0),
        ("", "", 600.0),
    ],
)
def test_an_address_is_used_for_four_fifths_of_its_time(query, date, seconds):
    """
    What is left is told by the signature and the clock of who signed it; without either it is ten minutes.
    """
    assert lifetime(target_of(f"https://storage.example.org/x?{query}"), {"date": date}) == pytest.approx(seconds)


def test_addresses_are_not_kept_without_bound():
    """
    However many files a model has, a bounded number of addresses is remembered.
    """
    addresses = Addresses()
    for number in range(5000):
        addresses.found(str(number), target_of("https://x/"), 60.0)

    assert len(addresses._known) == 1024
    assert addresses.take("4999") == (target_of("https://x/"), False)
    assert addresses.take("0") == (None, True)


@pytest.mark.parametrize("header", ["X-Repo-Commit", "X-Linked-Etag", "X-Linked-Size"])
def test_an_address_for_other_content_is_not_followed(hub, header):
    """
    If the hub points to another commit, digest or size than was listed, storage is not asked.
    """
    source = backend(hub)
    file = big_file(source)
    hub.meddle = meddle_with(
        "/resolve/", lambda answer: replace(answer, headers={**answer.headers, header: f'"{"0" * 40}"'})
    )

    with pytest.raises(SourceChangedError) as caught:
        read(source, file, 0, 1000)

    assert caught.value.path == BIG
    assert hub.asked("storage") == []


def test_an_answer_of_another_length_is_refused(hub):
    """
    Storage that speaks of another size than was listed is believed nothing.
    """
    source = backend(hub)
    file = big_file(source)
    hub.meddle = meddle_with("", lambda answer: replace(answer, body=answer.body + b"more"), host="storage")

    with pytest.raises(SourceUnavailableError, match="requested `bytes 0-999/700000`, received `bytes 0-999/700004`"):
        read(source, file, 0, 1000)


def test_a_model_that_was_renamed_is_found(root, hub):
    """
    The old name leads to the new one, and files are asked for by the new one, without another redirect.
    """
    hub.rename(NAME, "neworg/newname")

    model = store(root, hub).ensure(URI, progress=False)

    assert read_tree(model.path) == FILES
    assert {r.path.split("/")[1:3] == ["neworg", "newname"] for r in hub.asked("hub", containing="/resolve/")} == {True}


def test_a_file_of_a_renamed_model_is_found_by_its_old_name(root, hub):
    """
    A commit under an old name needs no question for the revision; then each redirect is followed.
    """
    commit = hub.push(NAME, {})
    hub.rename(NAME, "neworg/newname")

    model = store(root, hub).ensure(f"{URI}@{commit}", progress=False)

    assert read_tree(model.path) == FILES
    assert {r.token for r in hub.asked("hub")} == {OWNER}


@pytest.mark.parametrize("path", ["/revision/", "/resolve/"])
def test_redirects_in_a_circle_are_given_up(hub, path):
    """
    After five redirects the call ends, and is not tried again.
    """
    source = backend(hub)
    file = big_file(source)
    hub.requests.clear()
    hub.meddle = lambda request, answer: (
        Answer(status=302, headers={"Location": f"{request.path}x"}) if path in request.path else None
    )

    with pytest.raises(SourceUnavailableError, match="more than 5 redirects") as caught:
        read(source, file, 0, 1000) if path == "/resolve/" else source.resolve(parse_ref(URI))

    assert caught.value.is_final
    assert len(hub.requests) == 6


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/api/x?y=%20z", "https://hub.example.org/api/x?y=%20z"),
        ("/a b/caf\u00c3\u00a9", "https://hub.example.org/a%20b/caf%C3%A9"),
        ("https://storage.example.org/x", "https://storage.example.org/x"),
        ("//storage.example.org/x", "https://storage.example.org/x"),
    ],
)
def test_a_redirect_may_be_relative_or_not(location, expected):
    """
    Whatever is odd in the address is encoded, so that it stays one line.
    """
    assert follow("hf://x", target_of("https://hub.example.org/a/b"), location) == target_of(expected)


@pytest.mark.parametrize("location", ["ftp://x/y", "file:///etc/passwd", "https://[::1", "https://x:0/"])
def test_a_redirect_leads_to_a_url_of_the_web(location):
    """
    Nothing leads to what is neither http nor https, and another try would end the same.
    """
    with pytest.raises(SourceUnavailableError, match="other than an http or https URL") as caught:
        follow("hf://x", target_of("https://hub.example.org/a"), location)

    assert caught.value.is_final


def test_a_redirect_never_leaves_https():
    """
    From https nothing leads to http.
    """
    with pytest.raises(PolicyError, match=r"from https to http \(host `hub.example.org`\)"):
        follow("hf://x", target_of("https://hub.example.org/a"), "http://hub.example.org/x")


def prepared(hub: Hub) -> Hub:
    """
    The hub with a gated and a private model.
    """
    for name in ("org/gated", "org/private"):
        hub.push(name, FILES)
    hub.repository("org/gated").is_gated, hub.repository("org/private").readers = True, {OWNER}
    return hub


@pytest.mark.parametrize(
    ("uri", "token", "error", "words"),
    [
        (
            "hf://org/gated",
            False,
            SourceDeniedError,
            "the model is gated and no token was given; request access on the model's page",
        ),
        (
            "hf://org/gated",
            STRANGER,
            SourceDeniedError,
            "gated and the account of the token has no access; request access",
        ),
        (
            "hf://org/none",
            False,
            SourceNotFoundError,
            "no such model, or it is private and no token was given; set HF_TOKEN",
        ),
        ("hf://org/none", OWNER, SourceNotFoundError, "no such model, or it is private and the token may not see it"),
        (
            "hf://org/private",
            False,
            SourceNotFoundError,
            "no such model, or it is private and no token was given; set HF_TOKEN",
        ),
        (
            "hf://org/private",
            STRANGER,
            SourceNotFoundError,
            "no such model, or it is private and the token may not see it",
        ),
        (URI, WRONG, SourceDeniedError, "the token is wrong or has expired; set HF_TOKEN"),
        ("hf://org/private", WRONG, SourceDeniedError, "the token is wrong or has expired; set HF_TOKEN"),
        (f"{URI}:none", OWNER, SourceNotFoundError, "no such revision"),
        (f"{URI}@{'0' * 40}", OWNER, SourceNotFoundError, "no such revision"),
        (f"{URI}/none/", OWNER, SourceNotFoundError, "no such file or directory"),
    ],
)
def test_each_refusal_says_what_to_do(root, hub, uri, token, error, words):
    """
    Gated, missing, private, no token, a wrong one: each has its own words, and nothing is present afterwards.
    """
    with pytest.raises(error) as caught:
        store(root, prepared(hub), token=token).ensure(uri, progress=False)

    assert words in str(caught.value)
    assert uri not in store(root, hub)


@pytest.mark.parametrize("uri", ["hf://org/gated", "hf://org/private"])
def test_a_token_with_access_opens_the_model(root, hub, uri):
    """
    Who has access gets the same bytes as anybody gets of a public model.
    """
    assert read_tree(store(root, prepared(hub)).ensure(uri, progress=False).path) == FILES


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (
            Answer(status=403, headers={"X-Error-Message": "Access to this resource is disabled."}),
            SourceDeniedError,
            "has disabled it",
        ),
        (Answer(status=403), SourceDeniedError, "HTTP 403"),
        (Answer(status=404, body=b"<html>"), SourceNotFoundError, "check HF_ENDPOINT too"),
        (Answer(status=200, body=b"<html>"), SourceUnavailableError, "not JSON, so it is not a Hugging Face Hub"),
        (Answer(status=200, body=b"[" * 100_000), SourceUnavailableError, "not JSON"),
        (Answer(status=200, body=b"{}"), SourceUnavailableError, "names no commit"),
        (Answer(status=200, body=b'{"sha": "main"}'), SourceUnavailableError, "names no commit"),
        (Answer(status=200, body=b'"sha"'), SourceUnavailableError, "names no commit"),
    ],
)
def test_what_is_no_hub_is_told_apart(hub, answer, error, words):
    """
    An endpoint that does not answer as a hub does is named as such, at once.
    """
    hub.meddle = lambda request, honest: answer

    with pytest.raises(error, match=words):
        backend(hub).resolve(parse_ref(URI))

    assert len(hub.requests) == 1


SMALL = {"type": "file", "path": "x", "size": 1, "oid": "0" * 40}


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ({**SMALL, "path": "../x"}, UnsafePathError),
        ({**SMALL, "path": "/etc/passwd"}, UnsafePathError),
        ({**SMALL, "path": "a\\b"}, UnsafePathError),
        ({**SMALL, "path": "a\0b"}, UnsafePathError),
        ({**SMALL, "path": 1}, SourceUnavailableError),
        ({**SMALL, "type": "submodule"}, SourceUnavailableError),
        ({**SMALL, "size": -1}, SourceUnavailableError),
        ({**SMALL, "size": True}, SourceUnavailableError),
        ({**SMALL, "size": 1.5}, SourceUnavailableError),
        ({**SMALL, "size": 10**18}, SourceUnavailableError),
        ({**SMALL, "oid": "0" * 39}, SourceUnavailableError),
        ({**SMALL, "lfs": {"oid": "0" * 40, "size": 1}}, SourceUnavailableError),
        ({**SMALL, "lfs": {"oid": "0" * 64}}, SourceUnavailableError),
        ("x", SourceUnavailableError),
    ],
)
def test_a_listing_is_not_trusted(root, hub, entry, error):
    """
    Names that would leave the model, and entries that say nothing certain, refuse the model as a whole.
    """
    hub.meddle = meddle_with("/tree/", lambda answer: replace(answer, body=json.dumps([entry]).encode()))

    with pytest.raises(error):
        store(root, hub).ensure(URI, progress=False)

    assert not (root / "models").exists()


def test_entries_outside_the_directory_are_refused(hub):
    """
    A listing that answers another directory than was asked for brings no file under a foreign name.
    """
    hub.meddle = meddle_with("/tree/", lambda answer: replace(answer, body=json.dumps([SMALL]).encode()))

    with pytest.raises(SourceUnavailableError, match="the listing of `weights/` contains `x`"):
        backend(hub).resolve(parse_ref(f"{URI}/weights/"))


@pytest.mark.parametrize("where", ["/revision/", "/tree/", "/resolve/", "/xet-bridge/"])
@pytest.mark.parametrize(
    "headers", [{"Retry_After": "1"}, {"RateLimit": '"resolvers";r=0;t=0'}], ids=["Retry-After", "RateLimit"]
)
def test_a_busy_hub_is_left_alone_for_as_long_as_it_says(root, hub, where, headers):
    """
    A question or a range that is answered with 429 is asked again after the time that the answer names, in either of
    its spellings.
    """
    hub.meddle = busy(1, containing=where, **headers)
    began = time.monotonic()

    model = store(root, hub).ensure(f"{URI}/{BIG}", max_workers=1, progress=False)

    assert read_tree(model.path) == {"a.bin": FILES[BIG]}
    is_patient = where != "/xet-bridge/" or "Retry_After" in headers
    assert time.monotonic() - began >= (1.0 if is_patient else 0.0)


def test_a_hub_that_stays_busy_is_given_up(hub):
    """
    If the time it names is longer than is left, the call ends at once and says how long that is.
    """
    hub.meddle = busy(1000, Retry_After="4000")

    with pytest.raises(SourceUnavailableError) as caught:
        backend(hub).resolve(parse_ref(URI))

    assert (caught.value.retry_after, caught.value.is_final, len(hub.requests)) == (4000.0, False, 1)


def test_a_hub_that_fails_for_a_moment_is_asked_again(hub):
    """
    A question that ends with 500 is asked once more.
    """
    left = [1]
    hub.meddle = lambda request, answer: Answer(status=500) if left and left.pop() else None

    assert len(backend(hub).resolve(parse_ref(URI)).files) == len(FILES)


def test_storage_that_never_accepts_is_given_up(root, hub):
    """
    Addresses that storage refuses however often they are signed end the call as unavailable, after some tries.
    """
    hub.meddle = meddle_with("", lambda answer: Answer(status=403), host="storage")

    with pytest.raises(SourceUnavailableError, match="HTTP 403"):
        store(root, hub, retry_seconds=0.5).ensure(f"{URI}/{BIG}", progress=False)


def test_an_endpoint_where_nobody_is(root):
    """
    An endpoint that nobody listens at is unavailable.
    """
    with HuggingFace() as raw, pytest.raises(SourceUnavailableError, match="check the endpoint and the network"):
        ModelStore(root, mode="rw", backends={"hf": HFBackend}, storage_options=raw.unreachable_options).ensure(
            URI, progress=False
        )


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_asks_nobody(hub, name):
    """
    With the variable of huggingface_hub set no request is made, neither for a listing nor for bytes, and the error says
    why.
    """
    file = big_file(backend(hub))
    hub.requests.clear()
    offline = HFBackend(options(hub), {name: "1"})

    for ask in (lambda: offline.resolve(parse_ref(URI)), lambda: offline.open_range(file, 0, 1)):
        with pytest.raises(SourceUnavailableError, match="HF_HUB_OFFLINE is set") as caught:
            ask()
        assert caught.value.is_final

    assert hub.requests == []


@pytest.mark.parametrize(
    ("given", "environ", "expected"),
    [
        ({}, {"HF_TOKEN": OWNER, "HUGGING_FACE_HUB_TOKEN": WRONG}, OWNER),
        ({}, {"HUGGING_FACE_HUB_TOKEN": f" {OWNER}\n"}, OWNER),
        ({}, {"HF_TOKEN": "", "HF_TOKEN_PATH": "{home}/elsewhere"}, STRANGER),
        ({}, {"HF_HOME": "{home}"}, OWNER),
        ({}, {"XDG_CACHE_HOME": "{home}/cache"}, STRANGER),
        ({}, {"HF_HOME": "{home}/none"}, None),
        ({}, {"HF_TOKEN": OWNER, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "yes"}, None),
        ({"token": True}, {"HF_TOKEN": OWNER, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}, OWNER),
        ({"token": STRANGER}, {"HF_TOKEN": OWNER}, STRANGER),
        ({"token": False}, {"HF_TOKEN": OWNER}, None),
        ({"token": ""}, {"HF_TOKEN": OWNER}, None),
    ],
)
def test_the_token_is_found_where_the_client_finds_it(hub, tmp_path, given, environ, expected):
    """
    An argument wins over HF_TOKEN, HUGGING_FACE_HUB_TOKEN and the file of a login; any of it can be switched off.
    """
    for place, token in (("token", OWNER), ("elsewhere", STRANGER), ("cache/huggingface/token", STRANGER)):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(f"{token}\n")
    environ = {"HF_HOME": "{home}/none", **environ} if "XDG_CACHE_HOME" not in environ else environ
    environ = {name: value.format(home=tmp_path) for name, value in environ.items()}

    HFBackend({**given, "endpoint": hub.endpoint}, environ).resolve(parse_ref(URI))

    assert {r.token for r in hub.requests} == {expected}


@pytest.mark.parametrize("token", ["hf_a b", "hf_\x00", "hf_\u00e9", 7, b"hf_bytes"])
def test_a_token_that_can_be_none_is_refused_unseen(token):
    """
    What would break a request is refused without being shown.
    """
    with pytest.raises(SettingsError) as caught:
        HFBackend({"token": token}, {})

    assert str(token) not in str(caught.value)


def test_the_endpoint_of_the_environment_counts(hub):
    """
    HF_ENDPOINT says whom to ask, with a path in front if it has one, and an argument wins over it.
    """
    by_environ = HFBackend({"token": False}, {"HF_ENDPOINT": f"{hub.endpoint}/"})
    by_argument = HFBackend({"token": False, "endpoint": hub.endpoint}, {"HF_ENDPOINT": "https://nobody.example.org"})

    assert by_environ.resolve(parse_ref(URI)) == by_argument.resolve(parse_ref(URI))
    below = HFBackend({"token": False}, {"HF_ENDPOINT": "https://mirror.example.org/api/hub/"})
    assert below.place("/api/models/x") == target_of("https://mirror.example.org/api/hub/api/models/x")


@pytest.mark.parametrize(
    "endpoint",
    [
        "huggingface.co",
        "ftp://x",
        "https://",
        "https://user:secret@x",
        "user:secret@x",
        "https://x/?secret",
        "https://x#secret",
    ],
)
def test_an_endpoint_that_is_no_address_is_refused(endpoint):
    """
    The error names the setting, and shows nothing that may be a secret.
    """
    with pytest.raises(SettingsError, match="HF_ENDPOINT") as caught:
        HFBackend({}, {"HF_ENDPOINT": endpoint})

    assert "secret" not in f"{caught.value} {caught.value!r}"


def test_a_dead_writers_parts_are_taken_over(root, hub):
    """
    What a killed process had of a large file is adopted by the next store, which fetches only the rest.
    """
    data = random.Random(7).randbytes(4_000_000)
    hub.push(NAME, {BIG: data})
    uri, served = f"{URI}/{BIG}", []

    def slow(request, answer):
        if request.host == "storage":
            served.append(request.range)
            time.sleep(0.05)

    hub.meddle = slow
    arguments = {"backends": {"hf": HFBackend}, "storage_options": options(hub), "part_bytes": PART_BYTES}
    child = actors.start(actors.ensure, str(root), uri, arguments, {"max_workers": 2})
    while len(served) < 20:
        assert child.is_alive()
        time.sleep(0.01)
    child.kill()
    child.join()
    hub.meddle = lambda request, answer: None

    model = store(root, hub).ensure(uri, progress=False)

    assert read_tree(model.path) == {"a.bin": data}
    assert model.status == "downloaded"
    assert len(data) - 20 * PART_BYTES <= model.bytes_fetched <= len(data) - 15 * PART_BYTES
    assert store(root, hub).verify(uri, "full").ok


def test_no_sdk_is_loaded(hub, root):
    """
    A download imports neither huggingface_hub nor any other client.
    """
    script = """
import sys
from kserve_pvc import ModelStore
from kserve_pvc.backends.hf import HFBackend
ModelStore(sys.argv[1], mode="rw", backends={"hf": HFBackend}).ensure(sys.argv[2], progress=False)
heavy = {"huggingface_hub", "fsspec", "httpx2", "requests", "http", "ssl"}
print(sorted({name.partition(".")[0] for name in sys.modules} & heavy))
"""

    environ = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": OWNER, "KSERVE_PVC_ALLOW_PRIVATE_ADDRESSES": "1"}
    assert shell.python(script, str(root), URI, env=environ).strip() == "[]"


def test_raw_access_reaches_what_a_store_reads(root):
    """
    The endpoint for tests that know no hub puts, replaces and deletes files that a store then finds.
    """
    with HuggingFace() as raw:
        for path, data in (("a", b"1"), ("sub/b", bytes(20_000)), ("c", b"3")):
            raw.put(f"{NAME}/{path}", data)
        first = store_of(root, raw).ensure(raw.uri(NAME), progress=False)
        raw.put(f"{NAME}/a", b"newer")
        raw.delete(f"{NAME}/c")
        second = store_of(root, raw).ensure(raw.uri(NAME), refresh=True, progress=False)
        with pytest.raises(SourceDeniedError):
            ModelStore(root, mode="rw", backends={"hf": HFBackend}, storage_options=raw.denied_options).resolve(
                raw.uri(NAME)
            )

    assert read_tree(first.path) == {"a": b"1", "sub/b": bytes(20_000), "c": b"3"}
    assert read_tree(second.path) == {"a": b"newer", "sub/b": bytes(20_000)}


def store_of(root, raw: HuggingFace) -> ModelStore:
    return ModelStore(root, mode="rw", backends={"hf": HFBackend}, storage_options=raw.storage_options)
