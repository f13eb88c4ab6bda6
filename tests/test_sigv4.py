"""
Signatures of our own against those of botocore.
"""

from __future__ import annotations

import datetime
import time
from urllib.parse import quote

import pytest
from botocore import auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as TheirCredentials
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kserve_pvc.backends._login.sigv4 import Credentials, encode_query, sign

MOMENT = 1_790_000_000.75
REGIONS = ["us-east-1", "eu-central-1", "us-gov-west-1", "auto", "garage"]
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=20)
KEYS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=40)
# Header values as HTTP has them: no blanks at the ends, none twice.
VALUES = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=30)
SECRETS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=60)


def theirs(
    method: str, url: str, headers: dict[str, str], credentials: Credentials, region: str, moment: float
) -> dict[str, str]:
    """
    What botocore makes of the same request.
    """
    request = AWSRequest(method=method, url=url, headers=headers)
    request.context = {"payload_signing_enabled": True}
    now = datetime.datetime.fromtimestamp(int(moment), datetime.UTC)

    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return now

        @classmethod
        def utcnow(cls):
            return now.replace(tzinfo=None)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("get_current_datetime", "datetime"):
            if hasattr(auth, name):
                patch.setattr(
                    auth, name, Frozen if name == "datetime" else lambda remove_tzinfo=True: now.replace(tzinfo=None)
                )
        auth.S3SigV4Auth(
            TheirCredentials(credentials.key, credentials.secret, credentials.session_token), "s3", region
        ).add_auth(request)
    return {name.lower(): value for name, value in request.headers.items()}


@settings(deadline=None)
@given(
    method=st.sampled_from(["GET", "HEAD"]),
    key=KEYS,
    query=st.dictionaries(
        st.sampled_from(["versionId", "prefix", "list-type", "continuation-token", "encoding-type"]), TEXT
    ),
    headers=st.dictionaries(st.sampled_from(["if-match", "x-amz-checksum-mode", "x-amz-request-payer"]), VALUES),
    secret=SECRETS,
    token=st.none() | SECRETS,
    region=st.sampled_from(REGIONS),
    host=st.sampled_from(
        ["bucket.s3.eu-central-1.amazonaws.com", "127.0.0.1:9000", "[::1]:9000", "minio.example:8443"]
    ),
    moment=st.integers(946_684_800, 4_102_444_800),
)
@example("GET", "a b/ä+~!'()*&=?#%41//.././x", {}, {}, "s", None, "us-east-1", "127.0.0.1:9000", 1_790_000_000)
@example(
    "GET",
    "\U0001f999/e\u0301",
    {"prefix": "a+b c/ä~", "list-type": "2"},
    {},
    "s",
    "t/+=",
    "eu-central-1",
    "[::1]:9000",
    0,
)
def test_signatures_are_botocores(method, key, query, headers, secret, token, region, host, moment):
    """
    Whatever is asked for, by whoever, wherever: what goes over the line is what botocore would have sent.
    """
    path, credentials = f"/{quote(key, safe='/~')}", Credentials("AKIAEXAMPLE", secret, token)
    written = f"?{encode_query(query)}" if query else ""

    ours = sign(method, host, path, query, headers, credentials, region, float(moment))

    expected = theirs(method, f"http://{host}{path}{written}", dict(headers), credentials, region, moment)
    assert {name.lower(): value for name, value in ours.items()} == expected


@settings(deadline=None)
@given(query=st.dictionaries(TEXT.filter(bool), TEXT, max_size=5))
@example({"~": "", "é": ""})
@example({"0": "", "00": ""})
def test_queries_are_ordered_as_they_are_written(query):
    """
    A signature covers a query in the order of its quoted names, which is that of botocore.
    """
    credentials = Credentials("AKIAEXAMPLE", "s")

    ours = sign("GET", "h", "/", query, {}, credentials, "us-east-1", MOMENT)

    expected = theirs("GET", f"http://h/?{encode_query(query)}", {}, credentials, "us-east-1", MOMENT)
    assert ours["Authorization"] == expected["authorization"]


def test_a_kept_key_belongs_to_its_day_region_and_secret():
    """
    Keys are derived once, and never used for another secret, day or region.
    """
    requests = [
        (Credentials("A", secret), region, MOMENT + day * 86_400)
        for _ in range(2)
        for secret in ("one", "two")
        for region in ("eu-central-1", "us-east-1")
        for day in (0, 1)
    ]

    made = [sign("GET", "h", "/k", {}, {}, who, region, moment)["Authorization"] for who, region, moment in requests]

    assert made == [
        theirs("GET", "http://h/k", {}, who, region, moment)["authorization"] for who, region, moment in requests
    ]
    assert len(set(made)) == 8


def test_a_stamp_is_that_of_its_second():
    """
    Two requests a second apart carry different dates.
    """
    stamps = [
        sign("GET", "h", "/", {}, {}, Credentials("A", "s"), "r", moment)["x-amz-date"]
        for moment in (0.0, 0.9, 1.0, 86_399.9)
    ]

    assert stamps == ["19700101T000000Z", "19700101T000000Z", "19700101T000001Z", "19700101T235959Z"]


def test_credentials_print_no_secret():
    """
    Whatever ends up in a log, secret and session token do not.
    """
    printed = f"{Credentials('AKIA', 'very-secret', 'very-token')!r} {Credentials('AKIA', 'very-secret', 'very-token')}"

    assert ("very" in printed, "AKIA" in printed) == (False, True)


def test_a_secret_goes_over_no_line():
    """
    A signed request holds the key's name and the session token, and not the secret.
    """
    signed = sign("GET", "h", "/", {}, {}, Credentials("AKIA", "very-secret", "token"), "r", time.time())

    assert "very-secret" not in str(signed)
    assert signed["x-amz-security-token"] == "token"
