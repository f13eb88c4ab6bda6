"""
No secret is seen anywhere: credentials that are easy to find are planted, and everything that can be read is searched
for them.
"""

from __future__ import annotations

import base64
import json
import logging
import pickle
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, quote_plus

import azurite
import gcs
import hub
import pytest
import shell
from azurite import Azurite
from gcs import GuardedGCS
from hub import HuggingFace
from origin import SeaweedS3
from remotes import S3Remote
from webserver import HERE, SECRET, WebServer

from kserve_pvc import ModelStore, StoreError, _store

CANARY = "canary-0c4f/of+a=secret"
DATA = bytes(range(256)) * 400
OUTCOMES = {
    "good": "",
    "denied": "SourceDeniedError",
    "unreachable": "SourceUnavailableError",
    "missing": "SourceNotFoundError",
    "user-information": "PolicyError",
    "query": "PolicyError",
}


def expected(outcome: str, uri: str) -> str:
    """
    The name of the error; the query of a link is sent, and the server has no such page.
    """
    return "SourceNotFoundError" if outcome == "query" and uri.startswith("http://") else OUTCOMES[outcome]


# The command line with all that anybody logs, and less patience.
COMMAND = """
import logging, sys
from functools import partial
from kserve_pvc._cli import main, opening

logging.basicConfig(level=logging.DEBUG)
opening.ModelStore = partial(opening.ModelStore, retry_seconds=0.5, stall_seconds=1)
sys.exit(main.main(sys.argv[1:]))
"""


@dataclass(frozen=True, kw_only=True)
class Planted:
    """
    A source with one model, and what is secret about it: options and environment for each outcome.
    """

    uri: str
    options: Mapping[str, Mapping[str, Any]]
    environ: Mapping[str, Mapping[str, str]]
    secrets: tuple[str, ...]
    unreachable_uri: str | None = None

    def uri_for(self, outcome: str) -> str:
        scheme, _, rest = self.uri.partition("://")
        return {
            "unreachable": self.unreachable_uri or self.uri,
            "missing": f"{self.uri}-that-is-missing",
            "user-information": f"{scheme}://user:{CANARY}@{rest}",
            "query": f"{self.uri}?sv=1&sig={quote(CANARY, safe='')}",
        }.get(outcome, self.uri)


def plant(uri: str, remote: Any, environ_of: Any, *secrets: str, **more: Any) -> Planted:
    chosen = {"denied": remote.denied_options, "unreachable": remote.unreachable_options or remote.storage_options}
    options = {outcome: chosen.get(outcome, remote.storage_options) for outcome in OUTCOMES}
    return Planted(
        uri=uri,
        options=options,
        environ={o: environ_of(given) for o, given in options.items()},
        secrets=secrets,
        **more,
    )


@contextmanager
def s3(origin: SeaweedS3) -> Iterator[Planted]:
    pytest.importorskip("s3fs", reason="`s3fs` is not installed")
    origin.make_bucket("canaries")
    remote = S3Remote(origin, "canaries")
    refused = {"key": "canary-key", "secret": CANARY, "token": "canary-session-token"}
    remote.denied_options = {**remote.storage_options, **refused}
    remote.put("planted/model/weights.bin", DATA)
    names = {
        "key": "AWS_ACCESS_KEY_ID",
        "secret": "AWS_SECRET_ACCESS_KEY",
        "token": "AWS_SESSION_TOKEN",
        "endpoint_url": "AWS_ENDPOINT_URL",
    }
    yield plant(
        remote.uri("planted/model"),
        remote,
        lambda given: {names[name]: value for name, value in given.items()},
        *refused.values(),
        origin.key,
        origin.secret,
    )


@contextmanager
def gs(_: SeaweedS3) -> Iterator[Planted]:
    pytest.importorskip("google.auth", reason="`google-auth` is not installed")
    with GuardedGCS() as remote:
        remote.put("planted/model/weights.bin", DATA)
        secrets = [options["token"] for options in (remote.storage_options, remote.denied_options)]
        yield plant(
            remote.uri("planted/model"),
            remote,
            lambda given: {"FSSPEC_GS_TOKEN": given["token"], "FSSPEC_GS_ENDPOINT_URL": given["endpoint_url"]},
            *secrets,
        )


@contextmanager
def azure(_: SeaweedS3) -> Iterator[Planted]:
    pytest.importorskip("azure.storage.blob", reason="`azure-storage-blob` is not installed")
    with Azurite() as remote:
        remote.put("planted/model/weights.bin", DATA)
        yield plant(remote.uri("planted/model"), remote, _connection, azurite.KEY, azurite.OTHER_KEY)


@contextmanager
def azure_signed(_: SeaweedS3) -> Iterator[Planted]:
    pytest.importorskip("azure.storage.blob", reason="`azure-storage-blob` is not installed")
    with Azurite() as remote:
        remote.put("planted/model/weights.bin", DATA)
        signed = _Signed(remote)
        yield plant(remote.uri("planted/model"), signed, _connection, *signed.secrets)


class _Signed:
    """
    The account for who has a shared access signature and no key.
    """

    def __init__(self, service: Azurite) -> None:
        good = service.signature()
        (secret,) = parse_qs(good)["sig"]
        wrong = base64.b64encode(b"canary of a wrong signature 1234").decode()
        self.secrets = (secret, wrong)
        self.storage_options = self._options(service.endpoint, good)
        self.denied_options = self._options(service.endpoint, re.sub("(?<=sig=)[^&]+", quote(wrong, safe=""), good))
        nowhere = service.unreachable_options["connection_string"].partition("BlobEndpoint=")[2].rpartition("/")[0]
        self.unreachable_options = self._options(nowhere, good)

    def _options(self, endpoint: str, signature: str) -> dict[str, str]:
        return {"connection_string": f"BlobEndpoint={endpoint}/{azurite.ACCOUNT};SharedAccessSignature={signature}"}


def _connection(given: Mapping[str, Any]) -> dict[str, str]:
    return {"AZURE_STORAGE_CONNECTION_STRING": given["connection_string"]}


@contextmanager
def hf(_: SeaweedS3) -> Iterator[Planted]:
    with HuggingFace() as remote:
        remote.put("planted/model/weights.bin", DATA)
        allowed = {"KSERVE_PVC_ALLOW_PRIVATE_ADDRESSES": "1"}
        environ_of = lambda given: {"HF_TOKEN": given["token"], "HF_ENDPOINT": given["endpoint"], **allowed}  # noqa: E731
        yield plant(remote.uri("planted/model"), remote, environ_of, hub.OWNER, hub.WRONG)


@contextmanager
def http(_: SeaweedS3) -> Iterator[Planted]:
    with WebServer(wants={"X-Key": SECRET}) as remote:
        remote.put("weights.bin", DATA)
        refused = {"allow_private": True, "headers": {HERE: {"X-Key": CANARY}}}
        allowed = {"KSERVE_PVC_ALLOW_PRIVATE_ADDRESSES": "1"}
        options = {outcome: refused if outcome == "denied" else remote.storage_options for outcome in OUTCOMES}
        yield Planted(
            uri=remote.uri("weights.bin"),
            options=options,
            environ={
                o: {**allowed, f"{HERE}-headers": json.dumps(given["headers"][HERE])} for o, given in options.items()
            },
            secrets=(SECRET,),
            unreachable_uri=remote.unreachable_uri("weights.bin"),
        )


SOURCES = {"s3": s3, "gs": gs, "azure": azure, "azure-signed": azure_signed, "hf": hf, "http": http}


@pytest.fixture(scope="module", params=SOURCES)
def planted(request: pytest.FixtureRequest) -> Iterator[Planted]:
    """
    Each source in turn, with secrets that are easy to find.
    """
    origin = request.getfixturevalue("origin") if request.param == "s3" else None
    try:
        with SOURCES[request.param](origin) as source:
            yield source
    except (gcs.MissingError, azurite.MissingError) as missing:
        pytest.skip(str(missing))


def forms(secret: str) -> set[str]:
    """
    How a secret may be spelled: as it is, for a URL, and in base64 wherever in a longer text it began.
    """
    raw = secret.encode()
    spelled = {
        secret,
        quote(secret),
        quote(secret, safe=""),
        quote_plus(secret),
        repr(secret)[1:-1],
        json.dumps(secret)[1:-1],
    }
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + raw).decode()
        # Its first and last letters depend on what stands beside the secret.
        inside = encoded[(0, 2, 3)[before] : (len(raw) + before) * 8 // 6]
        spelled |= {inside, inside.replace("+", "-").replace("/", "_")}
    return spelled


def leaks(shown: Mapping[str, str], secrets: tuple[str, ...]) -> list[tuple[str, str]]:
    return [
        (where, form)
        for secret in (*secrets, CANARY)
        for form in forms(secret)
        for where, text in shown.items()
        if form in text
    ]


def on_volume(root: Path) -> dict[str, str]:
    """
    Names and bytes of every file.
    """
    return {
        str(path): f"{path.name}\n{path.read_bytes().decode('latin-1') if path.is_file() else ''}"
        for path in root.rglob("*")
    }


def listened_to(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """
    The events of all calls to come, which whoever shows them goes on getting.
    """
    events: list[object] = []
    listen = _store._listen

    @contextmanager
    def listening(*arguments: Any) -> Iterator[Any]:
        with listen(*arguments) as inner:
            yield lambda event: (events.append(event), inner(event))

    monkeypatch.setattr(_store, "_listen", listening)
    return events


def told(error: BaseException) -> dict[str, str]:
    """
    What a program may show of an error and of those it came from.
    """
    trace = "".join(traceback.TracebackException.from_exception(error).format())
    fields = json.dumps(getattr(error, "fields", None), default=repr)
    return {
        "str": str(error),
        "repr": repr(error),
        "trace": trace,
        "fields": fields,
        "pickle": repr(pickle.dumps(error)),
    }


def test_a_planted_secret_is_found_however_it_is_spelled():
    """
    The search finds what it looks for in a plain text, in a URL, and in base64 at any place of a longer text.
    """
    texts = [
        CANARY,
        quote(CANARY, safe=""),
        *(base64.b64encode(b"x" * n + CANARY.encode() + b"yz").decode() for n in range(4)),
    ]

    assert all(leaks({"text": text}, ()) for text in texts)
    assert leaks({"text": "nothing"}, ()) == []


@pytest.mark.parametrize("by", ["options", "environment"])
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_nothing_secret_is_seen_by_a_program(root, planted, monkeypatch, caplog, capfd, outcome, by):
    """
    Whether a fetch ends well or not, no secret is in logs, output, events, errors, values or on the volume.
    """
    caplog.set_level(logging.DEBUG)
    if by == "environment":
        for name, value in planted.environ[outcome].items():
            monkeypatch.setenv(name, value)
    options = planted.options[outcome] if by == "options" else None
    store = ModelStore(root, mode="rw", storage_options=options, retry_seconds=0.5, stall_seconds=1)
    uri, shown, failure = planted.uri_for(outcome), {"store": repr(store)}, ""
    events = listened_to(monkeypatch)

    try:
        shown["plan"] = repr(store.plan(uri))
        model = store.ensure(uri, progress=True)
        shown |= {
            "model": repr(model),
            "record": repr(model.record),
            "list": repr(store.list()),
            "verify": repr(store.verify(uri, "full")),
        }
    except StoreError as error:
        failure, shown = type(error).__name__, shown | told(error)
    if failure:
        with pytest.raises(StoreError) as caught:
            store.ensure(uri, progress=True)
        shown |= {f"ensure {name}": text for name, text in told(caught.value).items()}
    shown |= {"events": repr(events), "logs": caplog.text, "streams": "".join(capfd.readouterr()), **on_volume(root)}

    assert failure == expected(outcome, uri)
    assert events or failure
    assert leaks(shown, planted.secrets) == []


@pytest.mark.parametrize("how", [["--json"], ["--verbose"]], ids=["json", "plain"])
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_nothing_secret_is_seen_in_a_shell(root, planted, outcome, how):
    """
    What the command prints and logs, and what it leaves on the volume, has no secret of the environment and of the URI.
    """
    command = [sys.executable, "-I", "-c", COMMAND, "--store", str(root), "ensure", planted.uri_for(outcome), *how]

    result = shell.run(command, env=planted.environ[outcome])

    shown = {"stdout": result.stdout, "stderr": result.stderr, **on_volume(root)}
    failure = expected(outcome, planted.uri_for(outcome))
    assert ("error" if failure else "good") == ("good" if result.returncode == 0 else "error")
    assert failure in result.stdout + result.stderr
    assert leaks(shown, planted.secrets) == []
