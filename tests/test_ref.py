"""
What a caller may ask for, what it is called in a store, and which files it selects.
"""

import hashlib
import re
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kserve_pvc import InvalidURIError, ModelRef, PolicyError, StoreError
from kserve_pvc._format.codec import KEY
from kserve_pvc._source.redaction import hide, redact
from kserve_pvc._source.ref import parse_ref, show_source
from kserve_pvc.errors import printable

URI = "s3://bucket/llama-3-8b"


def test_parsing_keeps_the_spelling():
    """
    A ref repeats the URI and revision exactly, and puts patterns in order.
    """
    ref = parse_ref(
        "hf://org/Name:main",
        revision="v1",
        allow_patterns=["*.safetensors", "*.json", "*.json"],
        ignore_patterns="onnx/",
    )

    assert ref == ModelRef(
        uri="hf://org/Name:main", revision="v1", allow_patterns=("*.json", "*.safetensors"), ignore_patterns=("onnx/*",)
    )
    assert (ref.scheme, ref.location, str(ref)) == ("hf", "org/Name:main", "hf://org/Name:main at v1")


def test_a_plain_ref_has_neither_revision_nor_patterns():
    """
    Without options a ref is its URI and nothing else.
    """
    ref = parse_ref(URI)

    assert ref == ModelRef(uri=URI, revision=None, allow_patterns=None, ignore_patterns=())
    assert str(ref) == URI


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({}, "llama-3-8b-16d8a2f35f654b21"),
        ({"revision": "v1", "allow_patterns": "*.json", "ignore_patterns": ["b", "a"]}, "llama-3-8b-ba71f548c47ba68b"),
    ],
)
def test_the_key_of_a_known_ref_never_changes(options, key):
    """
    The key is part of the format on the volume: another one would make every model absent.
    """
    assert parse_ref("s3://bucket/llama-3-8b", **options).key == key


@pytest.mark.parametrize(
    "uri", [URI, URI + "/", "hf://org/name:rev", "gs://b/Ünïcode/m", "file:///", "https://h:8080/a//b", "s3://b/a@b"]
)
def test_the_key_ends_in_the_storage_key_of_kserve(uri):
    """
    For a plain URI the digits of the key are the first 16 of the SHA-256 of the URI exactly as it is spelled.
    """
    key = parse_ref(uri).key

    assert key.rpartition("-")[2] == hashlib.sha256(uri.encode()).hexdigest()[:16]


def test_everything_that_makes_another_tree_makes_another_key():
    """
    A trailing slash, a revision and each kind of pattern all lead to keys of their own.
    """
    refs = [
        parse_ref(URI),
        parse_ref(URI + "/"),
        parse_ref(URI, revision="a"),
        parse_ref(URI, revision="b"),
        parse_ref(URI, allow_patterns="a"),
        parse_ref(URI, ignore_patterns="a"),
        parse_ref(URI, allow_patterns=["a", "b"]),
        parse_ref(URI, allow_patterns=[]),
        parse_ref(URI, revision="a", allow_patterns="a"),
    ]

    keys = {ref.key for ref in refs}

    assert len(keys) == len(refs)


@pytest.mark.parametrize("option", ["allow_patterns", "ignore_patterns"])
def test_patterns_are_a_set(option):
    """
    The order, the repetition and the container of patterns make no difference.
    """
    spellings = [["a", "b"], ["b", "a"], ("a", "b", "a"), {"a", "b"}, iter(["b", "a"])]

    refs = [parse_ref(URI, **{option: spelling}) for spelling in spellings]

    assert refs == [refs[0]] * 5
    assert len({ref.key for ref in refs}) == 1


def test_one_pattern_needs_no_list():
    """
    A single pattern given as a text means the same as a list of one.
    """
    assert parse_ref(URI, allow_patterns="*.json", ignore_patterns="a*") == parse_ref(
        URI, allow_patterns=["*.json"], ignore_patterns=["a*"]
    )


def test_no_ignored_pattern_is_the_same_as_none():
    """
    An empty list of ignored patterns leaves the plain key, since it leaves the same tree.
    """
    assert parse_ref(URI, ignore_patterns=[]).key == parse_ref(URI).key


@pytest.mark.parametrize(
    ("uri", "slug"),
    [
        ("s3://bucket/llama-3-8b", "llama-3-8b"),
        ("s3://bucket/llama-3-8b/", "llama-3-8b"),
        ("s3://bucket/a/b//", "b"),
        ("s3://bucket", "bucket"),
        ("hf://org/Meta-Llama_3:main", "meta-llama_3-main"),
        ("s3://b/model v1.0 (final)", "model-v1.0-final"),
        ("s3://b/...hidden...", "hidden"),
        ("s3://b/日本語", "model"),
        ("s3://b/---", "model"),
        ("file:///", "model"),
        ("s3://b/" + "x" * 60, "x" * 40),
        ("s3://b/" + "x" * 39 + "-tail", "x" * 39),
    ],
)
def test_the_slug_shows_a_person_which_model_it_is(uri, slug):
    """
    The slug is the last part of the location, in lower case, without what is awkward in a file name.
    """
    key = parse_ref(uri).key

    assert key.rpartition("-")[0] == slug


@given(
    st.text(min_size=1, max_size=60),
    st.none() | st.text(min_size=1, max_size=8),
    st.none() | st.lists(st.text(max_size=5), max_size=3),
)
def test_every_key_is_a_safe_directory_name(location, revision, patterns):
    """
    Whatever is accepted has a key that records accept, and the same request has the same key.
    """
    options = {"revision": revision, "allow_patterns": patterns, "ignore_patterns": patterns}
    try:
        ref = parse_ref(f"s3://{location}", **options)
    except (InvalidURIError, PolicyError):
        return

    assert KEY.fullmatch(ref.key)
    assert parse_ref(f"s3://{location}", **options).key == ref.key


@pytest.mark.parametrize(
    ("allow", "ignore", "chosen"),
    [
        (None, None, ["Config.json", "a.bin", "onnx/a.bin", "onnx/deep/b.json", "onnxx/c"]),
        ("*.bin", None, ["a.bin", "onnx/a.bin"]),
        ("*.json", None, ["Config.json", "onnx/deep/b.json"]),
        ("config.json", None, []),
        ("a.bin", None, ["a.bin"]),
        ("onnx", None, []),
        ("onnx/", None, ["onnx/a.bin", "onnx/deep/b.json"]),
        (["onnx/", "?.bin"], None, ["a.bin", "onnx/a.bin", "onnx/deep/b.json"]),
        ("[ab].bin", None, ["a.bin"]),
        (None, "onnx/", ["Config.json", "a.bin", "onnxx/c"]),
        (None, ["*.bin", "*.json"], ["onnxx/c"]),
        ("onnx/", "*.json", ["onnx/a.bin"]),
        ("*", "*", []),
        ([], None, []),
        (None, [], ["Config.json", "a.bin", "onnx/a.bin", "onnx/deep/b.json", "onnxx/c"]),
        ("", None, []),
    ],
)
def test_patterns_choose_as_hugging_face_does(allow, ignore, chosen):
    """
    A file is taken if some allowed pattern matches its whole path and no ignored one does; `*` crosses directories,
    case counts, and a trailing slash means everything below.
    """
    files = ["Config.json", "a.bin", "onnx/a.bin", "onnx/deep/b.json", "onnxx/c"]
    ref = parse_ref(URI, allow_patterns=allow, ignore_patterns=ignore)

    selected = [name for name in files if ref.selects(PurePosixPath(name))]

    assert selected == chosen


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://user:SECRET@host/model", "https://host/model"),
        ("https://SECRET@host/model", "https://host/model"),
        ("https://user:p@SECRET@host/model", "https://host/model"),
        ("s3://SECRET:SECRET@bucket", "s3://bucket"),
        ("HTTPS://user:SECRET@host/model", "HTTPS://host/model"),
        ("https://us\x1b[31mer:SECRET@host/model", "https://host/model"),
        ("https://us er:SECRET@host/model", "https://host/model"),
        ("https://user:p'SECRET@host/model", "https://host/model"),
        ('https://user:"SECRET@host/model', "https://host/model"),
        ("https://user:a<SECRET@host/model", "https://host/model"),
        ("s3://AKIA:se/SECRET@bucket/model", "s3://bucket/model"),
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri, shown):
    """
    User information in a URI is refused, and the error holds nothing of it.
    """
    with pytest.raises(PolicyError) as caught:
        parse_ref(uri)

    assert caught.value.fields == {
        "subject": shown,
        "rule": "credentials do not belong in a URI; use the provider's environment or `storage_options`",
    }
    assert "SECRET" not in f"{caught.value} {caught.value!r} {caught.value.args}"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://host/model#SECRET", "https://host/model"),
        ("https://host/model?#SECRET", "https://host/model"),
        ("https://host/model?a=b&X-Amz-Signature=SECRET#SECRET", "https://host/model"),
        ("https://host/model?a b=SECRET", "https://host/model"),
    ],
)
def test_a_query_or_fragment_is_refused_and_not_repeated(uri, shown):
    """
    What follows `?` or `#` may be a signature and would be stored, so it is refused, and the error holds nothing of it.
    """
    with pytest.raises(PolicyError) as caught:
        parse_ref(uri)

    assert caught.value.fields == {
        "subject": shown,
        "rule": "a query or fragment may carry a signature and would be stored; use `revision=` for a version",
    }
    assert "SECRET" not in f"{caught.value} {caught.value!r} {caught.value.args}"


def test_an_at_sign_in_a_path_is_no_credential():
    """
    Only what stands before the host is user information.
    """
    assert parse_ref("s3://bucket/a@b/c").uri == "s3://bucket/a@b/c"


def test_an_absolute_path_is_a_file():
    """
    A path means what its `file://` URI means, and is the same model.
    """
    assert parse_ref("/mnt/models/a b") == parse_ref("file:///mnt/models/a b")
    assert parse_ref("/mnt/models/a b").service == "file"


DIGEST = "sha256=" + "0a" * 32


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_digest_belongs_to_what_is_asked_for(scheme):
    """
    The fragment that names the expected digest is no secret: it stays in the URI, makes another key, and is not in the
    slug.
    """
    ref = parse_ref(f"{scheme}://host/model.tar#{DIGEST}")

    assert (ref.uri, ref.query) == (f"{scheme}://host/model.tar#{DIGEST}", None)
    assert ref.key != parse_ref(f"{scheme}://host/model.tar").key
    assert ref.key.startswith("model.tar-")


@pytest.mark.parametrize("uri", [f"s3://b/m#{DIGEST}", f"https://h/m#{DIGEST}0", "https://h/m#sha256=zz"])
def test_any_other_fragment_is_refused(uri):
    """
    Only a whole digest, in lower case, at an http address is known to be no secret.
    """
    with pytest.raises(PolicyError, match="a query or fragment"):
        parse_ref(uri)


SIGNED = "https://account.blob.core.windows.net/models/llama"


@pytest.mark.parametrize("uri", [SIGNED, "https://account.z01.blob.storage.azure.net/models/llama"])
def test_the_signature_of_an_azure_address_is_kept_aside(uri):
    """
    A shared access signature opens the model and is no part of it: it is neither shown nor stored, and makes no other
    key.
    """
    ref = parse_ref(f"{uri}?sv=2024&sig=SECRET%3D&se=2026")

    assert (ref.uri, ref.query, ref.service) == (uri, "sv=2024&sig=SECRET%3D&se=2026", "az")
    assert (ref, ref.key, hash(ref)) == (parse_ref(uri), parse_ref(uri).key, hash(parse_ref(uri)))
    assert "SECRET" not in f"{ref} {ref!r}"


@pytest.mark.parametrize(
    "uri",
    [
        f"{SIGNED}?sv=2024&se=SECRET",
        f"{SIGNED}?sig=",
        f"{SIGNED}?sig=SECRET#a",
        f"{SIGNED}?sig=SECRET\n",
        "http://account.blob.core.windows.net/m?sig=SECRET",
        "s3://account.blob.core.windows.net/m?sig=SECRET",
    ],
    ids=ascii,
)
def test_what_is_no_signature_of_azure_is_refused(uri):
    """
    Anything else behind a `?` is refused as everywhere, and not repeated.
    """
    with pytest.raises(PolicyError) as caught:
        parse_ref(uri)

    assert "SECRET" not in f"{caught.value} {caught.value!r}"


@pytest.mark.parametrize("scheme", ["abfs", "abfss"])
def test_a_container_before_the_account_is_no_credential(scheme):
    """
    Azure's own form has the container where others have a user.
    """
    uri = f"{scheme}://models@account.dfs.core.windows.net/a@b/llama"

    assert parse_ref(uri).uri == uri


@pytest.mark.parametrize(
    "uri",
    [
        "abfs://user:SECRET@account.dfs.core.windows.net/m",
        "abfs://SECRET@host/m",
        "https://models@account.dfs.core.windows.net/m",
        "abfs://a@SECRET@account.dfs.core.windows.net/m",
    ],
)
def test_user_information_is_no_container(uri):
    """
    Only a container's name before the host of an account is let through, and only for Azure's scheme.
    """
    with pytest.raises(PolicyError, match="credentials do not belong in a URI"):
        parse_ref(uri)


@pytest.mark.parametrize(
    ("uri", "service"),
    [
        ("s3://b/m", "s3"),
        ("https://host/m", "https"),
        ("http://account.blob.core.windows.net/m", "http"),
        ("fsspec+sftp://host/m", "fsspec"),
        ("abfs://c/m", "abfs"),
    ],
)
def test_the_service_says_which_back_end_is_asked(uri, service):
    """
    That is the scheme, except where one back end serves what a scheme does not tell.
    """
    assert parse_ref(uri).service == service


LOOKS = "it must look like `scheme://location`, for example `s3://bucket/model`"
UNPRINTABLE = "it holds control or unprintable characters"


@pytest.mark.parametrize(
    ("uri", "shown", "reason"),
    [
        ("", "", LOOKS),
        ("model", "model", LOOKS),
        ("./model", "./model", LOOKS),
        ("s3:/bucket", "s3:/bucket", LOOKS),
        ("://bucket", "://bucket", LOOKS),
        ("3s://bucket", "3s://bucket", LOOKS),
        ("s 3://bucket", "s 3://bucket", LOOKS),
        (" s3://bucket", " s3://bucket", LOOKS),
        ("s3:/user:SECRET@host", "host", LOOKS),
        ("https:user:SECRET@host", "host", LOOKS),
        ("host/model?sig=SECRET", "host/model", LOOKS),
        (None, "None", LOOKS),
        (b"s3://bucket/model", "b's3://bucket/model'", LOOKS),
        ("S3://bucket/model", "S3://bucket/model", "schemes are lower case; write `s3://`"),
        ("s3://bucket/a\nb", "s3://bucket/a\nb", UNPRINTABLE),
        ("s3://bucket/a\tb", "s3://bucket/a\tb", UNPRINTABLE),
        ("s3://bucket/a\0", "s3://bucket/a\0", UNPRINTABLE),
        ("s3://bucket/\x1b[31m", "s3://bucket/\x1b[31m", UNPRINTABLE),
        ("s3://bucket/\u202egnp", "s3://bucket/\u202egnp", UNPRINTABLE),
        ("s3://bucket/\u200b", "s3://bucket/\u200b", UNPRINTABLE),
        ("s3://bucket/\ud800", "s3://bucket/\ud800", UNPRINTABLE),
        ("s3://" + "x" * 2049, "s3://" + "x" * 75 + "...", "it is longer than 2048 bytes"),
        ("s3://" + "é" * 1025, "s3://" + "é" * 75 + "...", "it is longer than 2048 bytes"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_what_is_no_uri_is_refused(uri, shown, reason):
    """
    What cannot be a source URI is refused with the reason, and shown without secrets and without anything that steers a
    terminal.
    """
    with pytest.raises(InvalidURIError) as caught:
        parse_ref(uri)

    assert caught.value.fields == {"uri": shown, "reason": reason}
    assert str(caught.value) == f"invalid source URI `{printable(shown)}`: {reason}"


@pytest.mark.parametrize(
    "source",
    [
        *("s3:/AKIA:SECRET@b/m", "s3//AKIA:SECRET@b/m", "s3//AKIA:SECRET", "AKIA:SECRET", "s3://AKIA:SECRET/m"),
        *("https:/h/m?sig=SECRET", "h/m?X-Amz-Signature=SECRET", "https//user:SECRET@h/m", "https://u:pa SECRET@h"),
        *("redis:/u:SECRET@h", " s3://k:SECRET@b", "s3://b/m&sig=SECRET", "https://h/m%3Fsig=SECRET"),
        *(
            "https:user:SECRET@h",
            "//user:SECRET@h/m",
            "s3:\\\\k:SECRET@b",
            "https://h/a;token=SECRET",
            "s3 ://k:SECRET@b",
        ),
        *("user:SECRET@h:80/m", "hf://SECRET@o/m", "s3:////k:SECRET@b", "s3:/k:SE/SECRET@b", "s3:/k:SECRET/b"),
        *("\u200bs3://k:SECRET@b/m", "s3://k:SECRET@b\n/m", "s3://k/SECRET@b", "git+https://u:SECRET@h/r.git"),
    ],
    ids=ascii,
)
def test_a_source_that_is_mistyped_is_shown_without_its_secrets(source):
    """
    Whatever is wrong with a URI, neither the error nor the log of the initializer shows what may be a secret in it.
    """
    assert "SECRET" not in show_source(source)
    try:
        parse_ref(source)
    except StoreError as error:
        assert "SECRET" not in f"{error} {error!r}"  # noqa: PT017 - Some are accepted: a key may hold anything.


@pytest.mark.parametrize(
    "source", ["s3:/bucket/model", "hf:org/model", "s3://bucket/model", "models/llama", "hf://o/m@r"]
)
def test_a_source_without_secrets_is_shown_as_it_is(source):
    """
    A typing error is seen in the log, which needs the source as it was given.
    """
    assert show_source(source) == source


@pytest.mark.parametrize(
    "text",
    [
        "authorization: AWS4-HMAC-SHA256 Credential=AK/x, SignedHeaders=h, Signature=SECRET x-amz-date: 1",
        *("x-amz-security-token:SECRET+/=", "Bearer SECRET1.x is bad", '"Authorization": "Basic SECRET0="'),
        *("AWS_SESSION_TOKEN=SECRET", "redis:/u:SECRET@h", "proxy http:/u:SECRET@h failed", "cookie: id=SECRET"),
        *(
            "AccountName=a;AccountKey=SECRET==;Endpoint=x",
            "X-Api-Key: SECRET",
            "x-amz-server-side-encryption-key=SECRET",
        ),
    ],
    ids=ascii,
)
def test_redaction_knows_headers_and_parameters_that_hold_secrets(text):
    """
    What a service repeats of a request holds its headers and parameters, which are known by their names.
    """
    assert "SECRET" not in redact(text)


@pytest.mark.parametrize(
    "text", ["The token is invalid: expired", "Basic authentication is required", "the key is off"]
)
def test_redaction_leaves_prose_alone(text):
    """
    A message that only speaks of secrets is kept.
    """
    assert redact(text) == text


@pytest.mark.parametrize("spelled", ["a+b/c=", "a%2Bb%2Fc%3D", "a%2bb%2fc%3d", "A+B/C=", "a+b\\/c="])
def test_a_given_secret_is_hidden_in_every_spelling(spelled):
    """
    URLs, XML and JSON write the same characters in other ways.
    """
    assert hide(f"got {spelled} here", ["a+b/c="]) == "got … here"


def test_the_longest_uri_is_accepted():
    """
    A location of exactly 2,048 bytes is still a URI.
    """
    uri = "s3://" + "é" * 1024

    assert parse_ref(uri).uri == uri


@pytest.mark.parametrize("revision", ["", 5, b"main", False, "a\nb", "\x1b[31m", "\u202emain", "\ud800"], ids=ascii)
def test_a_revision_that_means_nothing_is_refused(revision):
    """
    A revision that is empty, no text or not printable means nothing, and nothing is guessed from it.
    """
    with pytest.raises(InvalidURIError) as caught:
        parse_ref(URI, revision=revision)

    assert caught.value.fields == {
        "uri": URI,
        "reason": "the revision must be a printable string; omit it for the newest",
    }


@pytest.mark.parametrize("option", ["allow_patterns", "ignore_patterns"])
@pytest.mark.parametrize(
    ("patterns", "shown"), [([1], "[1]"), (["*.json", None], "['*.json', None]"), (b"a", "[97]")], ids=str
)
def test_patterns_that_are_no_texts_are_refused(option, patterns, shown):
    """
    A pattern of another type is refused when it is given, not when a file is compared with it.
    """
    with pytest.raises(InvalidURIError) as caught:
        parse_ref(URI, **{option: patterns})

    assert caught.value.fields == {"uri": shown, "reason": "patterns are strings such as `*.safetensors`"}


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("no URL here: a@b?c#d", "no URL here: a@b?c#d"),
        ("s3://bucket/model", "s3://bucket/model"),
        ("https://user:SECRET@host/a", "https://host/a"),
        ("https://host/a?sig=SECRET", "https://host/a"),
        ("https://host/a#SECRET", "https://host/a"),
        ("https://host?sig=SECRET", "https://host"),
        ("https://a@b@host/c@d", "https://host/c@d"),
        ("hf://org/name@v1.0", "hf://org/name@v1.0"),
        ("hf://org/name@refs/pr/1: not found", "hf://org/name@refs/pr/1: not found"),
        ("hf://org/name/a@b/c@main", "hf://org/name/a@b/c@main"),
        ("hf://org/name@main?t=SECRET", "hf://org/name@main"),
        ("hf://SECRET@org/name@v1.0", "hf://org/name@v1.0"),
        ("hf://user:SECRET@org/name@v1.0", "hf://v1.0"),
        ("https://user:SE/CRET@host/a", "https://host/a"),
        ("https://user:SE?CRET/@host/a", "https://host/a"),
        ("s3:///SECRET@bucket/model", "s3:///bucket/model"),
        ("s3:///user:SECRET@bucket/model", "s3:///bucket/model"),
        ("s3://bucket/user:SECRET@other", "s3://bucket/other"),
        ("https://user:12/SECRET@host", "https://user:12/host"),
        (
            "GET https://u:SECRET@h/a?t=SECRET failed, see https://h/b?x=SECRET.",
            "GET https://h/a failed, see https://h/b",
        ),
        # A secret may hold a quote, so the one that follows it goes too.
        ("'https://h/a?SECRET' and <https://h/b?SECRET>", "'https://h/a and <https://h/b>"),
        ("https://u:p'SECRET@h/a", "https://h/a"),
        ("https://h/a?sig=a'SECRET", "https://h/a"),
        ("HTTPS://u:SECRET@h/a", "HTTPS://h/a"),
        ("line one\nhttps://h/a?SECRET\x1b[2J", "line one\\nhttps://h/a"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_redaction_takes_secrets_out_of_every_url_in_a_text(text, cleaned):
    """
    User information, query and fragment go from each URL; the rest of the text stays, with control characters escaped.
    """
    assert redact(text) == cleaned


SIGNATURES = [
    "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AK%2F1&X-Amz-Expires=60&X-Amz-Signature=SECRET",
    "AWSAccessKeyId=AK&Expires=17&Signature=SECRET",
    "X-Goog-Algorithm=GOOG4&X-Goog-Signature=SECRET",
    "GoogleAccessId=a&Expires=1&Signature=SECRET%2F",
    "Policy=p&Key-Pair-Id=k&Signature=SECRET~",
    "sv=2024&sr=b&sp=r&se=2026&skoid=1&rscd=a&sig=SECRET",
    "OSSAccessKeyId=a&Expires=1&Signature=SECRET&security-token=t",
    "q-sign-algorithm=sha1&q-ak=a&q-sign-time=1&q-key-time=1&q-header-list=&q-url-param-list=&q-signature=SECRET",
    "token=SECRET",
    "response-content-disposition=attachment&X-Amz-Signature=a'SECRET",
]


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("query", SIGNATURES)
def test_a_signed_link_is_the_model_of_its_address(scheme, query):
    """
    What signs a link is kept apart, is in no string of the ref, and makes no other key; signed anew it is equal.
    """
    plain = parse_ref(f"{scheme}://host/m.tar.gz")
    ref = parse_ref(f"{scheme}://host/m.tar.gz?{query}")

    assert (ref, ref.key, ref.uri) == (plain, plain.key, plain.uri)
    assert "SECRET" not in f"{ref!r} {ref} {ref.key}"
    assert ref.signed_uri == f"{scheme}://host/m.tar.gz?{query}"
    assert parse_ref(ref) == ref
    assert parse_ref(ref).query == query
    assert parse_ref(f"{scheme}://host/m.tar.gz?{query}#{DIGEST}").uri == f"{plain.uri}#{DIGEST}"


def test_other_parameters_make_another_model_and_are_not_shown():
    """
    They may select what is read, so they count, by a digest: they may be secret too.
    """

    def link(number: int, sign: str) -> ModelRef:
        return parse_ref(f"https://host/get?id={number}&X-Amz-Signature={sign}")

    one, again, other = link(1, "a"), link(1, "b"), link(2, "a")

    assert one == again != other
    assert len({one.key, other.key, parse_ref("https://host/get").key}) == 2 + 1
    assert re.fullmatch(r"https://host/get#query=[0-9a-f]{16}", one.uri)
    assert parse_ref(one.uri) == one
    assert parse_ref(one).query == one.query
    assert parse_ref(f"https://host/get?id=1#{DIGEST}").uri == f"{one.uri}&{DIGEST}"


@pytest.mark.parametrize(
    "uri",
    [
        "https://user:pa?SECRET@host/x",
        "https://tok?SECRET@host/x",
        "https://host?sig=SECRET",
        "https://host/m?a=SECRET\n",
    ]
    + ["https://host/m?sig=SECRET#other", "https://host/m#a?sig=SECRET", f"https://host/m?sig={'SECRET' * 3000}"],
)
def test_what_may_be_more_than_a_query_is_refused(uri):
    """
    User information behind a question mark, other fragments and queries without an end are not repeated.
    """
    with pytest.raises(PolicyError) as caught:
        parse_ref(uri)

    assert "SECRET" not in str(caught.value)
