"""
How S3 is asked: with signatures of our own where that is enough, through s3fs where only that knows how.
"""

from __future__ import annotations

import os
from functools import cache
from types import SimpleNamespace
from typing import Any

import botocore.session
import pytest
from botocore.config import Config
from trees import model_files, read_tree
from weather import Answer, StormyS3, refuse

from kserve_pvc import (
    ModelStore,
    PolicyError,
    SettingsError,
    SourceChangedError,
    SourceDeniedError,
    SourceNotFoundError,
    UnsafePathError,
)
from kserve_pvc._source.ref import parse_ref
from kserve_pvc.backends._http.client import HTTPClient
from kserve_pvc.backends._object_store import MetadataRequests, Place
from kserve_pvc.backends._options import explain, read_settings
from kserve_pvc.backends._s3_requests import SignedAccess, parse_refusal
from kserve_pvc.backends._s3_settings import Account, plain_account
from kserve_pvc.backends.s3 import S3Backend

BUCKET = "models"
FILES = model_files(seed=22)
KEYS = {"key": "AKIA", "secret": "secret"}
IN_ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "secret"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """
    A home without files of AWS, and an environment that says nothing about it.
    """
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def is_plain(options: dict, environ: dict, uri: str = "s3://bucket/model") -> bool:
    """
    Whether requests for a model are signed here.
    """
    return S3Backend(options, environ).access(parse_ref(uri)) == "direct"


@pytest.mark.parametrize(
    ("options", "environ"),
    [
        (KEYS, {}),
        ({**KEYS, "token": "session"}, {}),
        ({}, IN_ENVIRONMENT),
        ({}, {**IN_ENVIRONMENT, "AWS_SESSION_TOKEN": "session", "AWS_REGION": "eu-west-1"}),
        ({"anon": True}, {}),
        (
            {
                "client_kwargs": {
                    "aws_access_key_id": "AKIA",
                    "aws_secret_access_key": "secret",
                    "region_name": "eu-west-1",
                }
            },
            {},
        ),
        ({**KEYS, "client_kwargs": {"verify": False, "endpoint_url": "https://minio.example"}}, {}),
        ({**KEYS, "config_kwargs": {"s3": {"addressing_style": "path"}}}, {}),
        ({**KEYS, "use_listings_cache": False, "etag_is_md5": False}, {}),
        (KEYS, {"AWS_PROFILE": "", "AWS_USE_FIPS_ENDPOINT": ""}),
        ({**KEYS, "endpoint_url": "https://minio.example"}, {"AWS_REGION": "cn-north-1"}),
    ],
)
def test_what_is_simple_is_signed_here(home, options, environ):
    """
    Credentials as they are, or none, and at most an endpoint, a region and a style of addresses need no SDK.
    """
    assert is_plain(options, {"HOME": str(home), **environ})


@pytest.mark.parametrize(
    ("options", "environ"),
    [
        ({}, {}),
        ({}, {"AWS_ACCESS_KEY_ID": "AKIA"}),
        ({}, {"AWS_WEB_IDENTITY_TOKEN_FILE": "/token", "AWS_ROLE_ARN": "arn:aws:iam::1:role/r"}),
        ({"max_concurrency": 4}, IN_ENVIRONMENT),
        ({**KEYS, "requester_pays": True}, {}),
        ({**KEYS, "default_block_size": 5_000_000}, {}),
        ({**KEYS, "s3_additional_kwargs": {"SSECustomerKey": "k"}}, {}),
        ({**KEYS, "client_kwargs": {"use_ssl": False}}, {}),
        ({**KEYS, "config_kwargs": {"proxies": {"https": "http://proxy"}}}, {}),
        ({**KEYS, "config_kwargs": {"s3": {"use_accelerate_endpoint": True}}}, {}),
        ({**KEYS, "config_kwargs": {"signature_version": "s3"}}, {}),
        (KEYS, {"AWS_PROFILE": "work"}),
        (KEYS, {"AWS_DEFAULT_PROFILE": "work"}),
        (KEYS, {"AWS_USE_FIPS_ENDPOINT": "true"}),
        (KEYS, {"AWS_USE_DUALSTACK_ENDPOINT": "true"}),
        (KEYS, {"FSSPEC_S3_ENDPOINT_URL": "http://minio.example"}),
        (KEYS, {"FSSPEC_S3": '{"requester_pays": false}'}),
        (KEYS, {"AWS_REGION": "cn-north-1"}),
        (KEYS, {"AWS_DEFAULT_REGION": "us-iso-east-1"}),
        ({**KEYS, "client_kwargs": {"region_name": "eu-isoe-west-1"}}, {}),
    ],
)
def test_what_only_the_sdk_knows_is_left_to_it(home, monkeypatch, options, environ):
    """
    Roles, profiles, partitions and whatever else changes a request are read by s3fs's rules, and the reason names the
    setting.
    """
    monkeypatch.setattr("kserve_pvc.backends._s3fs.S3fsAccess", lambda options, reads: SimpleNamespace(way="s3fs"))
    environ = {"HOME": str(home), **environ}

    assert not is_plain(options, environ)
    assert explain("s3", options, environ)


@pytest.mark.parametrize("name", ["home", "AWS_CONFIG_FILE", "tilde"])
def test_a_configuration_file_is_left_to_the_sdk(home, name):
    """
    A file that may say anything about endpoints, regions and proxies is read by those who know all of it.
    """
    place = home / (".aws/config" if name == "home" else "elsewhere")
    named = {
        "home": {},
        "AWS_CONFIG_FILE": {"AWS_CONFIG_FILE": str(place)},
        "tilde": {"AWS_CONFIG_FILE": "~/elsewhere"},
    }[name]
    environ = {"HOME": str(home), **named}
    before = is_plain(KEYS, environ)
    place.parent.mkdir(exist_ok=True)
    place.write_text("[default]\nregion = eu-west-3\n")

    assert (before, is_plain(KEYS, environ)) == (True, False)


@pytest.mark.parametrize(
    "bucket",
    [
        "arn:aws:s3:us-west-2:123456789012:accesspoint:mine",
        "arn:aws:s3-outposts:us-west-2:123456789012:outpost:op-1:accesspoint:mine",
        "bucket--usw2-az1--x-s3",
        "mine-a1b2c3--s3alias",
        "mine--op-s3",
    ],
)
def test_a_bucket_with_rules_of_its_own_is_left_to_the_sdk(home, monkeypatch, bucket):
    """
    Access points, outposts and directory buckets are addressed and signed in other ways; others of the same back end
    are not.
    """
    s3fs = SimpleNamespace(way="s3fs")
    monkeypatch.setattr("kserve_pvc.backends._s3fs.S3fsAccess", lambda options, reads: s3fs)
    service = S3Backend(KEYS, {"HOME": str(home)}).service

    assert service.way(bucket) is s3fs
    assert service.way("bucket").way == "direct"


@pytest.mark.parametrize(
    ("uri", "bucket", "key"),
    [
        (
            "arn:aws:s3:us-west-2:123456789012:accesspoint/mine/m/x",
            "arn:aws:s3:us-west-2:123456789012:accesspoint:mine",
            "m/x",
        ),
        (
            "arn:aws:s3:us-west-2:123456789012:accesspoint:mine/m@1",
            "arn:aws:s3:us-west-2:123456789012:accesspoint:mine",
            "m@1",
        ),
        (
            "arn:aws-cn:s3:cn-north-1:123456789012:accesspoint/mine",
            "arn:aws-cn:s3:cn-north-1:123456789012:accesspoint:mine",
            "",
        ),
        ("arn:aws:s3::123456789012:accesspoint/m.mrap/a", "arn:aws:s3::123456789012:accesspoint:m.mrap", "a"),
        (
            "arn:aws:s3-outposts:us-west-2:123456789012:outpost/op-1/accesspoint/mine/a",
            "arn:aws:s3-outposts:us-west-2:123456789012:outpost:op-1:accesspoint:mine",
            "a",
        ),
        (
            "arn:aws:s3-object-lambda:us-west-2:123456789012:accesspoint/mine/a",
            "arn:aws:s3-object-lambda:us-west-2:123456789012:accesspoint:mine",
            "a",
        ),
    ],
)
def test_an_access_point_is_named_by_its_arn(home, uri, bucket, key):
    """
    Either spelling of the documentation names the access point and what follows it, and nothing of it is a password.
    """
    service = S3Backend(KEYS, {"HOME": str(home)}).service

    assert service.place(parse_ref(f"s3://{uri}")) == Place(bucket, key)


@pytest.mark.parametrize(
    "uri", ["arn:aws:s3:us-west-2:1:accesspoint/m", "arn:SECRET@x/m", "arn:aws:iam::123456789012:role/m"]
)
def test_another_arn_is_refused(uri):
    """
    What is not the name of an access point is taken for what may hold credentials.
    """
    with pytest.raises(PolicyError):
        parse_ref(f"s3://{uri}")


def signed_access() -> SignedAccess:
    account = plain(KEYS)
    return SignedAccess(account, MetadataRequests(HTTPClient(environ={}), parse_refusal), "direct")


def plain(options: dict, environ: dict | None = None) -> Account:
    return plain_account(read_settings("s3", options, {"HOME": "/none", **(environ or {})}))


@pytest.mark.parametrize(
    ("options", "environ", "who"),
    [
        (
            {**KEYS, "token": "t"},
            {"AWS_ACCESS_KEY_ID": "other", "AWS_SECRET_ACCESS_KEY": "x", "AWS_SESSION_TOKEN": "y"},
            ("AKIA", "secret", "t"),
        ),
        (KEYS, {"AWS_SESSION_TOKEN": "of another"}, ("AKIA", "secret", None)),
        ({}, {**IN_ENVIRONMENT, "AWS_SESSION_TOKEN": "t"}, ("AKIA", "secret", "t")),
        ({"anon": True}, IN_ENVIRONMENT, None),
    ],
)
def test_credentials_are_never_mixed(options, environ, who):
    """
    Key, secret and session token come from one place, arguments first.
    """
    found = plain(options, environ).source.get()

    assert (found and (found.key, found.secret, found.session_token)) == who


@pytest.mark.parametrize(
    ("environ", "host"),
    [
        ({}, "s3.us-east-1.amazonaws.com"),
        ({"AWS_DEFAULT_REGION": "eu-west-1"}, "s3.eu-west-1.amazonaws.com"),
        ({"AWS_ENDPOINT_URL": "http://all.example"}, "all.example"),
        ({"AWS_ENDPOINT_URL": "http://all.example", "AWS_ENDPOINT_URL_S3": "http://s3.example"}, "s3.example"),
        (
            {"AWS_ENDPOINT_URL": "http://all.example", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"},
            "s3.us-east-1.amazonaws.com",
        ),
    ],
)
def test_the_endpoint_is_that_of_the_environment(environ, host):
    """
    AWS's own variables say where the service is, as botocore reads them.
    """
    options = {**KEYS, "config_kwargs": {"s3": {"addressing_style": "path"}}}
    backend = S3Backend(options, {"HOME": "/none", **environ})

    target, _ = backend.service.read(Place("bucket", "k"), {"If-Match": "e"}, renewed=False)

    assert target.host == host


@pytest.mark.parametrize(
    "url",
    ["minio.example:9000", "ftp://minio.example", "http://", "http://host:port", "http://[::1", "http://a\u2100b"],
)
def test_an_endpoint_that_is_no_url_is_refused(home, url):
    """
    The setting is named before anything is asked.
    """
    with pytest.raises(SettingsError, match="endpoint_url"):
        S3Backend({**KEYS, "endpoint_url": url}, {"HOME": str(home)})


@cache
def botocores(region: str, endpoint: str | None, style: str) -> Any:
    """
    A client of botocore's, which is slow to make.
    """
    config = Config(signature_version="s3v4", s3={"addressing_style": style})
    names = {"aws_access_key_id": "AKIA", "aws_secret_access_key": "secret"}
    return botocore.session.Session().create_client(
        "s3", region_name=region, endpoint_url=endpoint, config=config, **names
    )


KEY = "a b/é+~!'()*&=#%41/\U0001f999.bin"


@pytest.mark.parametrize("bucket", ["bucket", "with.dots", "My_Bucket", "-bucket", "x" * 64])
@pytest.mark.parametrize("style", ["auto", "virtual", "path"])
@pytest.mark.parametrize(
    "endpoint", [None, "http://127.0.0.1:9000", "http://minio.example:9000", "https://minio.example/base/"]
)
def test_addresses_are_botocores(home, endpoint, style, bucket):
    """
    A bucket stands in the name of the host exactly where botocore puts it there.
    """
    if (endpoint, style, bucket) == ("http://127.0.0.1:9000", "virtual", "with.dots"):
        pytest.skip("botocore makes `with.dots.127.0.0.1` of it, which is no name of a host")
    # For other regions botocore writes some addresses without the region, which S3 then redirects.
    region = "us-gov-west-1"
    options = {**KEYS, "client_kwargs": {"region_name": region}, "config_kwargs": {"s3": {"addressing_style": style}}}
    backend = S3Backend({**options, **({"endpoint_url": endpoint} if endpoint else {})}, {"HOME": str(home)})

    target, _ = backend.service.read(Place(bucket, KEY), {"If-Match": '"e"'}, renewed=False)

    expected = botocores(region, endpoint, style).generate_presigned_url(
        "get_object", Params={"Bucket": bucket, "Key": KEY}
    )
    assert f"{target.scheme}://{target.authority}{target.path.partition('?')[0]}" == expected.partition("?")[0]


def test_another_region_is_asked_where_the_bucket_is(home, root):
    """
    A bucket that is said to be elsewhere is asked there, once for all of its objects, and its credentials sign for that
    region.
    """
    with StormyS3() as storm:
        storm.put(BUCKET, "model/a.bin", b"a" * 100)
        storm.put(BUCKET, "model/b.bin", b"b" * 100)
        elsewhere = refuse(400, "AuthorizationHeaderMalformed", x_amz_bucket_region="eu-west-3")
        storm.script("head", elsewhere, times=1)
        store = ModelStore(root, mode="rw", storage_options=storm.options)
        model = store.ensure(f"s3://{BUCKET}/model", progress=False)
        regions = [r.headers["authorization"].split("/")[2] for r in storm.requests]

    assert read_tree(model.path) == {"a.bin": b"a" * 100, "b.bin": b"b" * 100}
    assert (regions[0], set(regions[1:])) == ("us-east-1", {"eu-west-3"})


@pytest.mark.parametrize("region", ["us-east-1", "evil.example/", "EU", "eu-west-3"])
def test_a_region_that_leads_nowhere_is_asked_once(home, region):
    """
    A server that always points elsewhere, or nowhere, is not followed for ever; what it says is no part of a name of a
    host.
    """
    with StormyS3() as storm:
        for moment in ("head", "get"):
            storm.script(moment, refuse(400, "AuthorizationHeaderMalformed", x_amz_bucket_region=region))
        backend = S3Backend(storm.options, {"HOME": str(home)})
        with pytest.raises(Exception, match="Malformed"):
            backend.resolve(parse_ref(f"s3://{BUCKET}/model"))
        regions = [r.headers["authorization"].split("/")[2] for r in storm.requests]
        backend.close()

    # HEAD, and GET for the reason.
    expected = ["us-east-1", "eu-west-3", "eu-west-3"] if region == "eu-west-3" else ["us-east-1", "us-east-1"]
    assert regions == expected


def test_the_region_of_a_bucket_may_be_told_in_the_body(home):
    """
    A server without the header of S3 writes the region into the error, which only a response to GET has.
    """
    body = b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-3</Region></Error>"

    def insist(exchange):
        if "/eu-west-3/" not in exchange.request.headers["authorization"]:
            exchange.answer = Answer(status=400, headers={"Content-Length": str(len(body))}, body=body)
        exchange.reply()

    with StormyS3() as storm:
        storm.put(BUCKET, "m.bin", b"weights")
        for moment in ("head", "get", "list"):
            storm.script(moment, insist)
        backend = S3Backend(storm.options, {"HOME": str(home)})
        (file,) = backend.resolve(parse_ref(f"s3://{BUCKET}/m.bin")).files
        backend.close()

    assert file.entry.size_bytes == 7


# How the bytes come, and an option that makes them come so.
WAYS = {
    "keys": ("direct:s3fs", {"default_block_size": 2**20}),
    "profile": ("direct:s3fs", {}),
    "urls": ("direct:s3fs", {"config_kwargs": {"s3": {"use_arn_region": True}}}),
    "class": ("fsspec:s3fs", {"s3_additional_kwargs": {"RequestPayer": "requester"}}),
}


@pytest.fixture(params=[*WAYS])
def way(request) -> str:
    """
    Why the settings are not plain.
    """
    return request.param


@pytest.fixture
def through_s3fs(way, home, origin, proxy, monkeypatch) -> dict[str, object]:
    """
    Arguments of a store that reaches the real server in another way than with plain settings.
    """
    if way != "profile":
        return {"endpoint_url": proxy.endpoint, "key": origin.key, "secret": origin.secret, **WAYS[way][1]}
    (home / "config").write_text(f"[profile work]\nendpoint_url = {proxy.endpoint}\nregion = us-east-1\n")
    (home / "credentials").write_text(
        f"[work]\naws_access_key_id = {origin.key}\naws_secret_access_key = {origin.secret}\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(home / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(home / "credentials"))
    return {}


ODD = {**FILES, "a b/ä+~!'()&=#%41.bin": b"odd", "\U0001f999/x": b"", "q?x=1;y": b"query"}


def test_a_model_comes_each_way(root, way, through_s3fs, proxy, upload):
    """
    Odd names, empty files and parts arrive exactly, by requests that are pinned, and the record says how.
    """
    uri = upload(ODD)
    store = ModelStore(root, mode="rw", part_bytes=100_000, storage_options=through_s3fs)
    model = store.ensure(uri, progress=False)

    assert read_tree(model.path) == ODD
    assert store.verify(uri, "full").ok
    asked = sorted(r.range for r in proxy.requests if r.method == "GET" and r.path.endswith("a.bin"))
    assert asked == sorted(f"bytes={start}-{start + 99_999}" for start in range(0, 700_000, 100_000))
    signed_here = isinstance(store._sources.backend(parse_ref(uri)).service.way(BUCKET), SignedAccess)
    assert signed_here == (way in ("keys", "profile"))
    assert model.record.access == WAYS[way][0]


def test_both_ways_see_the_same(root, through_s3fs, origin, upload):
    """
    What one way lists, pins and vouches for is what the other does.
    """
    ref = parse_ref(upload(ODD))
    ours, theirs = (
        S3Backend({"endpoint_url": origin.endpoint, "key": origin.key, "secret": origin.secret}, {"HOME": "/none"}),
        S3Backend(through_s3fs),
    )

    found = [backend.resolve(ref) for backend in (ours, theirs)]

    assert found[0] == found[1]
    assert [[backend.evidence(f) for f in found[0].files] for backend in (ours, theirs)] == [
        [f.digest for f in found[0].files]
    ] * 2
    for backend in (ours, theirs):
        backend.close()


def test_a_replaced_object_is_refused_through_s3fs(through_s3fs, origin, upload):
    """
    A signed address says for which content it is; other content is an error, also where the address was kept.
    """
    uri = upload(FILES)
    backend = S3Backend(through_s3fs)
    file = next(f for f in backend.resolve(parse_ref(uri)).files if str(f.entry.path) == "weights/a.bin")
    before = read(backend, file, 10, 1000)
    origin.put(BUCKET, file.address.partition("/")[2], b"x" * 700_000)

    with pytest.raises(SourceChangedError):
        read(backend, file, 10, 1000)
    backend.close()
    assert before == FILES["weights/a.bin"][10:1000]


def read(backend: S3Backend, file, start: int, stop: int) -> bytes:
    buffer, data = memoryview(bytearray(stop - start)), b""
    with backend.open_range(file, start, stop) as reader:
        while len(data) < stop - start and (count := reader.readinto(buffer[: stop - start - len(data)])) != 0:
            data += bytes(buffer[: count or 0])
    return data


def test_versions_come_through_s3fs(root, through_s3fs, origin):
    """
    A VersionId is a revision on this way too, and one that is none is not found.
    """
    client = origin._client
    origin.make_bucket("versioned-s3fs")
    client.put_bucket_versioning(Bucket="versioned-s3fs", VersioningConfiguration={"Status": "Enabled"})
    first, second = (
        client.put_object(Bucket="versioned-s3fs", Key="m/w.bin", Body=data)["VersionId"]
        for data in (b"first", b"second!")
    )
    store, uri = ModelStore(root, mode="rw", storage_options=through_s3fs), "s3://versioned-s3fs/m/w.bin"

    models = [store.ensure(uri, revision=revision, progress=False) for revision in (first, second, None)]

    assert [read_tree(model.path) for model in models] == [
        {"w.bin": data} for data in (b"first", b"second!", b"second!")
    ]
    with pytest.raises(SourceNotFoundError):
        store.ensure(uri, revision="no-such-version", progress=False)


def test_what_is_missing_or_denied_is_told_through_s3fs(root, through_s3fs, origin, proxy, upload, monkeypatch):
    """
    The errors are those of the other way.
    """
    uri = upload(FILES)
    for missing in (f"s3://{BUCKET}/none/at/all", "s3://no-such-bucket/model"):
        with pytest.raises(SourceNotFoundError):
            ModelStore(root, mode="rw", storage_options=through_s3fs).ensure(missing, progress=False)

    denied = {"endpoint_url": proxy.endpoint, "key": "nokey", "secret": "nosecret", "default_block_size": 2**20}
    with pytest.raises(SourceDeniedError, match="check the credentials"):
        ModelStore(root, mode="rw", storage_options=denied).ensure(uri, progress=False)


def test_nobody_to_be_is_told_through_s3fs(home, root, origin, upload, monkeypatch):
    """
    Without any credentials the error says which variables name them.
    """
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    with pytest.raises(SourceDeniedError, match="AWS_ACCESS_KEY_ID"):
        ModelStore(root, mode="rw", storage_options={"endpoint_url": origin.endpoint}).ensure(
            upload(FILES), progress=False
        )


@pytest.mark.parametrize(
    "options", [{"key": "AKIA"}, {"secret": "secret"}, {"client_kwargs": {"aws_access_key_id": "A"}}]
)
def test_half_of_the_credentials_is_refused(home, options):
    """
    A key is never completed from another place.
    """
    missing = "key" if "secret" in options else "secret"

    with pytest.raises(SettingsError, match=f"`{missing}` is missing"):
        S3Backend(options, {"HOME": str(home), "AWS_SECRET_ACCESS_KEY": "of another", "AWS_ACCESS_KEY_ID": "other"})


def requested(options: dict, home) -> tuple[str, dict]:
    """
    The address and headers of a read, without what signs them.
    """
    backend = S3Backend({**KEYS, **options}, {"HOME": str(home)})
    target, headers = backend.service.read(Place("bucket", "k"), {"If-Match": '"e"'}, renewed=False)
    unsigned = ("authorization", "x-amz-date", "x-amz-content-sha256")
    return target.scheme, {name: value for name, value in headers.items() if name.lower() not in unsigned}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"default_block_size": 5}, ("https", {"if-match": '"e"'})),
        ({"requester_pays": True}, ("https", {"if-match": '"e"', "x-amz-request-payer": "requester"})),
        ({"local_expiry_check": True}, ("https", {})),
        ({"use_ssl": False}, ("http", {"if-match": '"e"'})),
        ({"use_ssl": True, "client_kwargs": {"use_ssl": False}}, ("http", {"if-match": '"e"'})),
    ],
)
def test_arguments_of_s3fs_are_obeyed_by_requests_of_our_own(home, options, expected):
    """
    Who pays, whether the server knows conditions, and whether it speaks TLS change requests that are signed here.
    """
    assert requested(options, home) == expected


@pytest.mark.parametrize(
    ("options", "way"),
    [
        ({"max_concurrency": 2}, "direct:s3fs"),
        ({"config_kwargs": {"connect_timeout": 1}}, "direct:s3fs"),
        ({"config_kwargs": {"signature_version": "s3"}}, "direct:s3fs"),
        ({"config_kwargs": {"use_fips_endpoint": True}}, "direct:s3fs"),
        ({"config_kwargs": {"proxies": {"https": "http://proxy"}}}, "fsspec:s3fs"),
        ({"config_kwargs": {"connector_args": {}}}, "fsspec:s3fs"),
        ({"client_kwargs": {"api_version": "2006-03-01"}}, "fsspec:s3fs"),
        ({"s3_additional_kwargs": {"SSECustomerKey": "k"}}, "fsspec:s3fs"),
        ({"include_builtin_handlers": True}, "fsspec:s3fs"),
    ],
)
def test_each_setting_leads_one_way(home, options, way):
    """
    What the record will say follows from the settings alone.
    """
    assert S3Backend({**KEYS, **options}, {"HOME": str(home)}).access(parse_ref("s3://bucket/m")) == way


def test_a_profile_with_unknown_settings_is_signed_for_by_the_sdk(home):
    """
    What a profile says that is not known here is left to botocore's client.
    """
    (home / ".aws").mkdir()
    (home / ".aws/config").write_text("[default]\nregion = eu-west-3\n")
    ordinary = S3Backend(KEYS, {"HOME": str(home)}).signed
    (home / ".aws/config").write_text("[default]\nregion = eu-west-3\ns3 =\n    use_accelerate_endpoint = true\n")

    assert ordinary is not None
    assert ordinary.account.region == "eu-west-3"
    assert S3Backend(KEYS, {"HOME": str(home)}).signed is None


@pytest.mark.parametrize(
    "more",
    [
        {"requester_pays": True},
        {"requester_pays": True, "config_kwargs": {"use_dualstack_endpoint": False}},
        {"s3_additional_kwargs": {"ExpectedBucketOwner": "123456789012"}},
        {
            "s3_additional_kwargs": {
                "SSECustomerAlgorithm": "AES256",
                "SSECustomerKey": "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",
                "SSECustomerKeyMD5": "tPltqPYRSu4LOz49iUoxSw==",
            }
        },
    ],
    ids=["payer", "payer-in-url", "owner", "customer-key"],
)
def test_every_header_that_a_signature_names_is_sent(more, home, root):
    """
    What is signed goes along, in the headers of the signature or beside a signed URL.
    """
    with StormyS3() as storm:
        storm.put(BUCKET, "m/w.bin", b"weights")
        model = ModelStore(root, mode="rw", storage_options={**storm.options, **more}).ensure(
            f"s3://{BUCKET}/m", progress=False
        )
        requests = [request for request in storm.requests if request.kind == "get"]

    assert read_tree(model.path) == {"w.bin": b"weights"}
    for request in requests:
        in_url = request.query.get("X-Amz-SignedHeaders")
        signed = in_url or request.headers["authorization"].partition("SignedHeaders=")[2].partition(",")[0]
        assert set(signed.split(";")) <= set(request.headers)
        if "requester_pays" in more:
            assert "x-amz-request-payer" in signed.split(";")


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (400, {"x-amz-bucket-region": "eu-west-1"}, ""),
        (400, {}, "<Code>AuthorizationHeaderMalformed</Code><Region>eu-west-1</Region>"),
        (
            400,
            {},
            "<Code>Malformed</Code><Message>the region 'x' is wrong; expecting 'eu-west-1'</Message>",
        ),
        (403, {}, "<Code>SignatureDoesNotMatch</Code><Region> eu-west-1 </Region>"),
        (301, {}, "<Code>PermanentRedirect</Code><Endpoint>b.s3.eu-west-1.amazonaws.com</Endpoint>"),
        (301, {}, "<Code>PermanentRedirect</Code><Endpoint>s3-eu-west-1.amazonaws.com</Endpoint>"),
        (307, {"location": "https://b.s3.dualstack.eu-west-1.amazonaws.com/m?list-type=2"}, ""),
        (307, {"location": "https://b.s3-fips.eu-west-1.amazonaws.com:443/"}, "<Code>TemporaryRedirect</Code>"),
    ],
)
def test_the_region_of_a_bucket_is_learnt_wherever_it_is_told(status, headers, body):
    """
    In a header, an element of the body, its message, or the host that a redirect names.
    """
    access = signed_access()
    refusal = parse_refusal(status, headers, f"<Error>{body}</Error>".encode())

    learnt = access._renew("bkt", refusal)
    target, sent = access.read("bkt", "m", {"If-Match": '"x"'}, renewed=False)

    assert learnt
    assert target.host in ("bkt.s3.eu-west-1.amazonaws.com", "s3.eu-west-1.amazonaws.com")
    assert "/eu-west-1/s3/" in str(sent)


@pytest.mark.parametrize(
    "body",
    [
        "<Endpoint>bkt.s3.eu-west-1.amazonaws.com.evil.example</Endpoint>",
        "<Endpoint>evil.example</Endpoint>",
        "<Region>evil.example/</Region>",
        "<Endpoint>//[</Endpoint>",
    ],
)
def test_a_host_that_a_response_names_is_never_used(body):
    """
    What is no region of S3 is not learnt.
    """
    access = signed_access()

    learnt = access._renew("bkt", parse_refusal(301, {}, f"<Error>{body}</Error>".encode()))

    assert not learnt
    assert access.read("bkt", "m", {"If-Match": '"x"'}, renewed=False)[0].host.endswith("s3.us-east-1.amazonaws.com")


@pytest.mark.parametrize(
    "uri",
    ["s3://public/../private", "s3://public/a/../../private/x", "s3://public/./x", "s3://../private/x", "s3://b/.."],
)
@pytest.mark.parametrize("options", [KEYS, {**KEYS, "version_aware": False}])
def test_a_path_does_not_lead_to_another_bucket(uri, options):
    """
    Servers and proxies remove `..` from a path, so it is refused before anything is requested, as on gs and az.
    """
    with pytest.raises(UnsafePathError, match="may not contain"):
        S3Backend(options, {}).resolve(parse_ref(uri))
