"""
Whatever fsspec reads: on real file systems of fsspec, and on some that misbehave in one way.
"""

import os
import threading
import time
import zipfile
from datetime import UTC, datetime
from importlib.util import find_spec
from itertools import pairwise

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry
from trees import model_files, read_tree, write_files
from webserver import SECRET, Page, WebServer

from kserve_pvc import (
    InvalidURIError,
    ModelStore,
    PolicyError,
    SourceChangedError,
    SourceDeniedError,
    SourceNotFoundError,
    SourceUnavailableError,
    UnknownSchemeError,
    UnsafePathError,
)
from kserve_pvc._source.ref import parse_ref
from kserve_pvc.backends._fsspec.identity import identity as identity_of
from kserve_pvc.backends._fsspec.reading import PIECE_BYTES
from kserve_pvc.backends.fsspec_ import FsspecBackend
from kserve_pvc.backends.http import http_backend

FILES = model_files(seed=1)
BIG = os.urandom(2 * PIECE_BYTES + 1000)


class Strange(LocalFileSystem):
    """
    The local file system, watched and without a cache, for tests to make strange.
    """

    protocol = "strange"
    cachable = False

    def __init__(self, **options):
        super().__init__(**options)
        type(self).made.append(self)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix(f"{cls.protocol}://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        self.pieces.append((start, end))
        return super().cat_file(path, start=start, end=end, **kwargs)


@pytest.fixture
def strange():
    """
    What makes a protocol `strange` whose methods are replaced by others.
    """

    def register(protocol="strange", **methods):
        kind = type("StrangeFileSystem", (Strange,), {"made": [], "pieces": [], "protocol": protocol, **methods})
        fsspec.register_implementation(protocol, kind, clobber=True)
        registered.append(protocol)
        return kind

    registered = []
    yield register
    for protocol in registered:
        _registry.pop(protocol, None)


@pytest.fixture
def big(tmp_path):
    """
    The path of a file that takes three pieces.
    """
    path = tmp_path / "big.bin"
    path.write_bytes(BIG)
    return path


def only_file(backend, uri):
    (file,) = backend.resolve(parse_ref(uri)).files
    return file


def read(backend, file, start, stop):
    buffer, data = memoryview(bytearray(65_536)), b""
    with backend.open_range(file, start, stop) as reader:
        while (count := reader.readinto(buffer)) != 0:
            data += bytes(buffer[: count or 0])
    return data


def test_a_store_fetches_through_fsspec(root, source):
    """
    A model on a file system of fsspec arrives as it is, and the record says which scheme it came by.
    """
    uri = f"fsspec+local://{source}"

    model = ModelStore(root, mode="rw").ensure(uri, progress=False)

    assert read_tree(model.path) == FILES
    assert (model.uri, model.record.uri) == (uri, uri)


def test_nothing_is_ever_written_to_the_source(root, source, strange):
    """
    Of a file system only what lists and reads is called.
    """
    forbidden = [
        "put",
        "put_file",
        "pipe",
        "pipe_file",
        "rm",
        "rm_file",
        "mkdir",
        "makedirs",
        "touch",
        "mv",
        "cp_file",
        "get",
        "get_file",
    ]

    def refuse(self, *args, **kwargs):
        raise AssertionError("it was asked to write, or to download by itself")

    def open_to_read(self, path, mode="rb", **kwargs):
        assert mode == "rb"
        return LocalFileSystem._open(self, path, mode, **kwargs)

    strange(_open=open_to_read, **dict.fromkeys(forbidden, refuse))

    assert read_tree(ModelStore(root, mode="rw").ensure(f"fsspec+strange://{source}", progress=False).path) == FILES


def test_a_directory_that_cannot_be_listed_fails_the_model(source, strange):
    """
    A part of the tree that is not readable is an error, where fsspec itself leaves it out and says nothing.
    """

    def ls(self, path, detail=False, **kwargs):
        if path.endswith("weights"):
            raise PermissionError("not for you")
        return LocalFileSystem.ls(self, path, detail=detail, **kwargs)

    kind = strange(ls=ls)
    assert [name for name in kind().find(str(source)) if "weights" in name] == []

    with pytest.raises(SourceDeniedError, match="not for you"):
        FsspecBackend({}).resolve(parse_ref(f"fsspec+strange://{source}"))


def make_a_link(path):
    path.symlink_to("config.json")


def make_a_link_to_a_directory(path):
    path.symlink_to("weights")


@pytest.mark.parametrize("make", [make_a_link, make_a_link_to_a_directory, os.mkfifo], ids=lambda make: make.__name__)
def test_what_is_no_regular_file_is_refused(source, make):
    """
    Links are not followed, and a pipe is not opened, which would wait for ever.
    """
    make(source / "odd")

    with pytest.raises(UnsafePathError, match=r"only regular files are copied|links are not followed"):
        FsspecBackend({}).resolve(parse_ref(f"fsspec+local://{source}"))


def test_a_file_is_no_directory(source):
    """
    With a slash at its end, the URI of a file names nothing.
    """
    with pytest.raises(SourceNotFoundError, match="remove the slash"):
        FsspecBackend({}).resolve(parse_ref(f"fsspec+local://{source}/config.json/"))


@pytest.mark.parametrize(
    ("uri", "error", "words"),
    [
        ("fsspec+simplecache://host/model", PolicyError, "reads through another file system"),
        ("fsspec+reference://host/model", PolicyError, "reads through another file system"),
        (
            "fsspec+nobody://host/model",
            UnknownSchemeError,
            "no backend for `nobody://`; fsspec cannot load it: Protocol not known: nobody",
        ),
        ("fsspec+://host/model", InvalidURIError, "no protocol is named"),
        ("fsspec+local://model", InvalidURIError, "an absolute path"),
        ("fsspec+zip://host/model::local/archive.zip", InvalidURIError, "a chain of URLs"),
        ("fsspec+local:///models/../etc", UnsafePathError, "may not climb"),
    ],
)
def test_what_is_not_served_is_told_with_what_to_do(uri, error, words):
    """
    Wrappers, unknown protocols, chains and paths that climb are each refused with a reason.
    """
    with pytest.raises(error, match=words):
        FsspecBackend({}).resolve(parse_ref(uri))


def test_a_revision_is_refused(source):
    """
    Nobody who asks for a version gets whatever is there.
    """
    with pytest.raises(InvalidURIError, match="a revision has no meaning here"):
        FsspecBackend({}).resolve(parse_ref(f"fsspec+local://{source}", revision="main"))


@pytest.mark.skipif(find_spec("paramiko") is not None, reason="`paramiko` is installed")
def test_a_missing_package_is_named():
    """
    A protocol that needs another package says which.
    """
    with pytest.raises(UnknownSchemeError, match=r"no backend for `sftp://`; .*paramiko"):
        FsspecBackend({}).resolve(parse_ref("fsspec+sftp://host/model"))


def test_credentials_are_for_the_host_that_is_configured():
    """
    A URI that names another host than the options do is refused before anything is sent there.
    """
    backend = FsspecBackend({"host": "ftp.example.org", "username": "reader", "password": "canary"})

    with pytest.raises(InvalidURIError, match="its `host` is `elsewhere`, but another one is configured"):
        backend.resolve(parse_ref("fsspec+ftp://elsewhere/model"))


def test_a_file_is_read_in_bounded_pieces(big, strange):
    """
    However long a range is, no piece is longer than the limit, and the pieces touch.
    """
    kind, backend = strange(), FsspecBackend({})
    file = only_file(backend, f"fsspec+strange://{big}")

    assert read(backend, file, 100, len(BIG)) == BIG[100:]

    stops = [min(100 + PIECE_BYTES * number, len(BIG)) for number in range(4)]
    assert kind.pieces == list(pairwise(stops))


def test_what_is_fetched_whole_anyway_is_asked_for_once(big, strange):
    """
    Where a file system fetches all of a file for any part, a range is one piece.
    """
    kind, backend = strange("jlab"), FsspecBackend({})
    file = only_file(backend, f"fsspec+jlab://{big}")

    assert read(backend, file, 100, len(BIG)) == BIG[100:]

    assert kind.pieces == [(100, len(BIG))]


def test_whoever_knows_no_ranges_is_not_asked_again(big, strange):
    """
    A file system that sends all of a file instead of a part fails the download at once.
    """
    strange(cat_file=lambda self, path, start=None, end=None, **kwargs: BIG)
    backend = FsspecBackend({})
    file = only_file(backend, f"fsspec+strange://{big}")

    with pytest.raises(SourceUnavailableError, match=f"10 bytes were requested and {len(BIG)} received") as caught:
        read(backend, file, 0, 10)

    assert caught.value.is_final


def test_a_call_that_hangs_holds_nobody(big, strange):
    """
    A reader whose file system is silent says so every moment, and can be left.
    """
    hanging = threading.Event()
    strange(cat_file=lambda self, path, **kwargs: hanging.wait(60) and b"")
    backend = FsspecBackend({})
    file = only_file(backend, f"fsspec+strange://{big}")
    started = time.monotonic()

    with backend.open_range(file, 0, 10) as reader:
        found = reader.readinto(memoryview(bytearray(10)))
    took = time.monotonic() - started
    hanging.set()

    assert found is None
    assert took < 10


def test_a_listing_that_hangs_ends(big, strange):
    """
    A listing waits no longer for one answer than `retry_seconds`.
    """
    hanging = threading.Event()
    strange(info=lambda self, path, **kwargs: hanging.wait(60))
    backend = FsspecBackend({})
    backend.tune(stall_seconds=1, retry_seconds=0.1)

    with pytest.raises(SourceUnavailableError, match=r"no response for 0\.1 s"):
        backend.resolve(parse_ref(f"fsspec+strange://{big}"))
    hanging.set()


def test_connections_are_used_again_and_not_shared(big, strange):
    """
    One call after the other takes one file system, and calls at the same time take one each.
    """
    together = threading.Barrier(3)

    def cat_file(self, path, start=None, end=None, **kwargs):
        if end == 99:
            together.wait(30)
        return BIG[start:end]

    kind, backend = strange(cat_file=cat_file), FsspecBackend({})
    file = only_file(backend, f"fsspec+strange://{big}")
    for _ in range(5):
        read(backend, file, 0, 10)
    one_by_one = len(kind.made)
    readers = [threading.Thread(target=read, args=(backend, file, 0, 99)) for _ in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()

    assert (one_by_one, len(kind.made)) == (1, 3)


def test_a_connection_is_not_used_after_an_error(big, strange):
    """
    After a failure nobody knows what is still under way on a connection, so the next call gets another one.
    """
    failures = [OSError("the line is dead")]

    def cat_file(self, path, start=None, end=None, **kwargs):
        if failures:
            raise failures.pop()
        return BIG[start:end]

    kind, backend = strange(cat_file=cat_file), FsspecBackend({})
    file = only_file(backend, f"fsspec+strange://{big}")
    with pytest.raises(SourceUnavailableError, match="the line is dead"):
        read(backend, file, 0, 10)
    used = kind.made[0]

    assert read(backend, file, 0, 10) == BIG[:10]
    assert used not in backend._filesystems.at(f"strange://{big}")._idle  # Nor is it kept for later.


def test_connections_are_closed(big, strange):
    """
    Closing a back end closes what is idle at once, and what is in use as soon as it is not.
    """

    class Connection:
        is_open = True

        def close(self):
            self.is_open = False

    def make(self, **options):
        Strange.__init__(self, **options)
        self.client = Connection()

    going_on = threading.Event()

    def cat_file(self, path, start=None, end=None, **kwargs):
        going_on.wait(30)
        return BIG[start:end]

    kind, backend = strange(__init__=make, cat_file=cat_file), FsspecBackend({})
    file = only_file(backend, f"fsspec+strange://{big}")
    with backend.open_range(file, 0, 10) as reader:
        backend.close()
        opened = [fs.client.is_open for fs in kind.made]
        going_on.set()
        while reader.readinto(memoryview(bytearray(10))) is None:
            pass

    assert opened == [True]
    assert [fs.client.is_open for fs in kind.made] == [False]


def test_a_failure_because_of_a_change_is_told_as_a_change(big, strange):
    """
    Whatever a server says to a range that is no longer there, it is the change that is told.
    """

    def cat_file(self, path, start=None, end=None, **kwargs):
        raise OSError("416 or 554 or whatever else")

    strange(cat_file=cat_file)
    backend = FsspecBackend({})
    file = only_file(backend, f"fsspec+strange://{big}")
    big.write_bytes(b"shorter")

    with pytest.raises(SourceChangedError):
        read(backend, file, 1000, 2000)


class AuthenticationException(Exception):  # noqa: N818
    """
    As paramiko calls it.
    """


class Answered(Exception):  # noqa: N818
    """
    An error that carries the status of an answer, as those of HTTP libraries do.
    """

    def __init__(self, status):
        super().__init__(f"it answered {status}")
        self.status = status


@pytest.mark.parametrize(
    ("error", "kind", "is_final"),
    [
        (FileNotFoundError("no"), SourceNotFoundError, None),
        (NotADirectoryError("no"), SourceNotFoundError, None),
        (Answered(404), SourceNotFoundError, None),
        (PermissionError("no"), SourceDeniedError, None),
        (AuthenticationException("no"), SourceDeniedError, None),
        (Answered(401), SourceDeniedError, None),
        (Answered(503), SourceUnavailableError, False),
        (ConnectionResetError("no"), SourceUnavailableError, False),
        (TimeoutError("no"), SourceUnavailableError, False),
        (TypeError("no"), SourceUnavailableError, True),
        (NotImplementedError("no"), SourceUnavailableError, True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_foreign_errors_are_translated(source, strange, error, kind, is_final):
    """
    Every error of a file system is one of ours, and only what may pass is tried again.
    """

    def info(self, path, **kwargs):
        raise error

    strange(info=info)

    with pytest.raises(kind) as caught:
        FsspecBackend({}).resolve(parse_ref(f"fsspec+strange://{source}"))

    assert getattr(caught.value, "is_final", None) is is_final


def test_what_an_error_gives_away_is_hidden(source, strange):
    """
    Texts of the options and what URLs may hold are taken out of a foreign error, which is not chained either.
    """

    def info(self, path, **kwargs):
        raise OSError(
            f"cannot reach http://reader:{options['password']}@host/?"
            f"sig={options['nested']['a']} with {options['password']}"
        )

    strange(info=info)
    options = {"password": "canary-1", "nested": {"a": "canary-2"}}

    with pytest.raises(SourceUnavailableError) as caught:
        FsspecBackend(options).resolve(parse_ref(f"fsspec+strange://{source}"))

    assert caught.value.reason == "OSError: cannot reach http://host/ with ***"
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


MOMENT = datetime(2026, 11, 23, tzinfo=UTC)


@pytest.mark.parametrize(
    ("info", "identity"),
    [
        ({"ETag": '"abc"', "LastModified": MOMENT}, {"ETag": "abc"}),
        ({"etag": "abc", "version_id": "7", "mtime": 1.0}, {"etag": "abc", "version_id": "7"}),
        ({"checksum": b"\x01\xff"}, {"checksum": "01ff"}),
        ({"mtime": 5.0, "ino": 7, "time": 9.0}, {"mtime": "5", "ino": "7"}),
        ({"mtime": MOMENT}, {"mtime": str(int(MOMENT.timestamp()))}),
        ({"mtime": MOMENT.timestamp()}, {"mtime": str(int(MOMENT.timestamp()))}),
        ({"modify": "20261123000000", "unique": "1g2"}, {"modify": "20261123000000", "unique": "1g2"}),
        ({"ETag": None, "etag": "", "modificationTime": 1_700_000_000_123}, {"modificationTime": "1700000000123"}),
        ({"owner": "me"}, {}),
    ],
)
def test_what_identifies_content(info, identity):
    """
    What is strong counts alone, else all that is weak; the time of reading never; types do not matter.
    """
    assert identity_of({"name": "/a", "size": 1, "type": "file", **info}) == identity


def test_a_file_that_says_nothing_about_itself_is_compared_by_size(root, source, strange):
    """
    Without anything that identifies its content a file has no token, and a change is noticed by its size only.
    """

    def info(self, path, **kwargs):
        found = LocalFileSystem.info(self, path, **kwargs)
        return {name: found[name] for name in ("name", "size", "type")}

    strange(info=info)
    backend = FsspecBackend({})
    file = only_file(backend, f"fsspec+strange://{source}/config.json")
    (source / "config.json").write_bytes(b"longer than it was before")

    assert file.entry.token is None
    with pytest.raises(SourceChangedError):
        read(backend, file, 0, file.entry.size_bytes)


@pytest.mark.parametrize("size", [None, -1, "12"])
def test_a_file_without_a_size_is_refused(source, strange, size):
    """
    What does not say how long it is cannot be checked for being whole.
    """
    strange(info=lambda self, path, **kwargs: {**LocalFileSystem.info(self, path, **kwargs), "size": size})

    with pytest.raises(SourceUnavailableError, match="gives no size for"):
        FsspecBackend({}).resolve(parse_ref(f"fsspec+strange://{source}"))


def test_what_is_listed_elsewhere_is_refused(source, strange):
    """
    A file system that lists what is not below the model is not believed.
    """
    strange(ls=lambda self, path, detail=False, **kwargs: [{"name": "/etc/passwd", "size": 1, "type": "file"}])

    with pytest.raises(SourceUnavailableError, match="contains `/etc/passwd`, which is elsewhere"):
        FsspecBackend({}).resolve(parse_ref(f"fsspec+strange://{source}"))


def test_a_directory_that_climbs_is_not_entered(source, strange):
    """
    The name of a directory is checked before it is listed, so a server cannot lead the listing around in circles.
    """
    strange(ls=lambda self, path, detail=False, **kwargs: [{"name": f"{path}/..", "size": 0, "type": "directory"}])

    with pytest.raises(UnsafePathError, match="may not climb"):
        FsspecBackend({}).resolve(parse_ref(f"fsspec+strange://{source}"))


def test_each_model_has_its_own_file_system(tmp_path, strange):
    """
    One back end serves several protocols and hosts.
    """
    strange()
    write_files(tmp_path / "a", {"x": b"a"})
    write_files(tmp_path / "b", {"x": b"b"})
    backend = FsspecBackend({})
    files = [only_file(backend, uri) for uri in (f"fsspec+local://{tmp_path}/a", f"fsspec+strange://{tmp_path}/b")]

    assert [read(backend, file, 0, 1) for file in files] == [b"a", b"b"]


def test_a_class_over_http_is_kept_from_private_addresses(root):
    """
    Through `HTTPFileSystem`, a URL leads to a private address neither by itself nor by a name nor by a redirect.
    """
    pytest.importorskip("aiohttp", reason="`aiohttp` is not installed")
    with WebServer() as server:
        server.put("m.bin", b"secret")
        server.pages["/away.bin"] = Page(status=302, location=f"http://127.0.0.1:{server.port}/m.bin")
        by_name = server.uri("m.bin").replace("127.0.0.1", "localhost")
        store = ModelStore(root, mode="rw", storage_options={"block_size": 1000})
        allowed = {"block_size": 1000, "allow_private": ["localhost"]}

        for uri in (server.uri("m.bin"), by_name):
            with pytest.raises(PolicyError, match="is not public"):
                store.ensure(uri, progress=False)
        asked = len(server.asked)
        with pytest.raises(PolicyError, match="is not public"):
            store.ensure(by_name.replace("m.bin", "away.bin"), storage_options=allowed, progress=False)

        assert (asked, {request.path for request in server.asked}) == (0, {"/away.bin"})
        assert store.ensure(by_name, storage_options=allowed, progress=False).record.access == "fsspec:fsspec"


def test_headers_of_a_host_stay_there_through_the_class(root):
    """
    Through `HTTPFileSystem`, headers of a host go to that host, and a redirect to another one is refused.
    """
    pytest.importorskip("aiohttp", reason="`aiohttp` is not installed")
    with WebServer(wants={"X-Key": SECRET}) as server, WebServer(host="127.0.0.2") as other:
        server.put("m.bin", b"bytes")
        other.put("m.bin", b"bytes")
        server.pages["/away.bin"] = Page(status=302, location=other.uri("m.bin"))
        options = {**server.storage_options, "block_size": 1000}
        store = ModelStore(root, mode="rw", storage_options=options)

        model = store.ensure(server.uri("m.bin"), progress=False)
        with pytest.raises(PolicyError, match=r"it redirects to `127\.0\.0\.2`"):
            store.ensure(server.uri("away.bin"), progress=False)

        assert (model / "m.bin").read_bytes() == b"bytes"
        assert other.asked == []


def test_a_session_of_the_callers_own_needs_permission():
    """
    What connects where it likes is refused unless private addresses are allowed.
    """
    pytest.importorskip("aiohttp", reason="`aiohttp` is not installed")
    backend = http_backend({"get_client": lambda **arguments: None})

    with pytest.raises(PolicyError, match="connects where it likes"):
        backend.resolve(parse_ref("https://models.example.org/m.bin"))


@pytest.mark.parametrize("options", [{"unpack": True}, {"unpack": False}])
def test_an_archive_means_the_same_through_the_class(tmp_path, root, options):
    """
    What a URL means does not depend on the way: an archive is unpacked, unless that is switched off.
    """
    pytest.importorskip("aiohttp", reason="`aiohttp` is not installed")
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("config.json", "{}")
    with WebServer() as server:
        server.put("m.zip", (tmp_path / "m.zip").read_bytes())
        options = {**options, "block_size": 1000, "allow_private": True}
        model = ModelStore(root, mode="rw", storage_options=options).ensure(server.uri("m.zip"), progress=False)

    assert [*read_tree(model.path)] == (["config.json"] if options["unpack"] else ["m.zip"])


def test_a_protocol_that_only_fsspec_knows_needs_no_prefix(root, source, strange):
    """
    Without a backend or plug-in for its scheme, a URI is read by the class of fsspec; a factory for the scheme wins.
    """
    strange()
    store = ModelStore(root, mode="rw", storage_options={"strange": {}})

    model = store.ensure(f"strange://{source}", progress=False)

    assert read_tree(model.path) == FILES
    assert model.record.access.startswith("fsspec:")
    with pytest.raises(ZeroDivisionError):
        ModelStore(root, backends={"strange": lambda options: 1 / 0}).resolve(f"strange://{source}")


def test_an_unknown_scheme_names_near_matches(root):
    """
    A misspelled scheme is an error that says what may be meant, of ours and of fsspec.
    """
    for scheme, near in (("sfpt", "`sftp://`"), ("htps", "`https://`")):
        with pytest.raises(UnknownSchemeError, match=f"did you mean .*{near}"):
            ModelStore(root, mode="rw").ensure(f"{scheme}://host/model", progress=False)
