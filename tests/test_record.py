"""
How records are written, and how little is believed of what is read back.
"""

import hashlib
import json
import tracemalloc
from datetime import UTC, datetime, timedelta, timezone
from pathlib import PurePosixPath

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kserve_pvc import FileEntry, StoreFormatError, UnsafePathError
from kserve_pvc._format.codec import decode, decode_proven, encode
from kserve_pvc._format.file_names import check_name
from kserve_pvc._format.log_entry import Holder, LogEntry, StoreSettings, decode_settings, encode_settings, now
from kserve_pvc._format.records import BEAT_BYTES, Beat, Claim, Manifest, PartNote, ReaderLease, encode_beat, to_file

KEY = "llama-16d8a2f35f654b21"
NONCE = "0123456789abcdef0123456789abcdef"
GENERATION = f"000000000007-{NONCE}"
SHA256 = hashlib.sha256(b"").hexdigest()
MOMENT = datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=UTC)
HOLDER = Holder(
    pod="server-0", node="node-a", uid=1000, pid=17, boot_id="b007", pid_namespace="pid:[4026531836]", started=4711
)
ENTRY = LogEntry(
    type="commit",
    seq=3,
    key=KEY,
    uri="s3://bucket/llama",
    revision=None,
    allow_patterns=("*.json",),
    ignore_patterns=(),
    generation=GENERATION,
    version="sha256:" + SHA256,
    files=2,
    size_bytes=70,
    manifest_sha256=SHA256,
    digest="sha256",
    policy="allow",
    created_at=MOMENT,
    writer=HOLDER,
)
MANIFEST = Manifest(
    key=KEY,
    generation=GENERATION,
    version="v1",
    files=(
        FileEntry(path="config.json", size_bytes=0, sha256=SHA256, token="t1"),
        FileEntry(path="w/a.bin", size_bytes=70),
    ),
)
CLAIM = Claim(epoch=7, nonce=NONCE, uri="s3://bucket/llama", holder=HOLDER, claimed_at=MOMENT)
BEAT = Beat(count=5, released=True, bytes_done=10, bytes_total=70, bytes_per_second=3)
LEASE = ReaderLease(generation=GENERATION, holder=HOLDER)
NOTE = PartNote(path="w/a.bin", token="t2", stop=70, sha256=SHA256)
RECORDS = [ENTRY, MANIFEST, CLAIM, BEAT, LEASE, NOTE]
SETTINGS = StoreSettings(store_id=NONCE, locker="lease", lease_seconds=30.0, created_at=MOMENT)


def body_of(record: attrs.AttrsInstance) -> dict:
    """
    The fields of a record as they lie on the volume, without format and checksum.
    """
    body = json.loads(encode(record))
    return {name: value for name, value in body.items() if name not in ("format", "checksum")}


def signed(body: dict, format: object = 1) -> bytes:
    """
    What somebody writes who knows the format: any fields, with a checksum that is right.
    """
    body = {"format": format, **body}
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps({**body, "checksum": checksum}).encode()


def refusal(cls: type, data: bytes) -> str:
    with pytest.raises(StoreFormatError) as caught:
        decode(cls, data, "keys/k/log/1")
    assert caught.value.path == "keys/k/log/1"
    return caught.value.reason


def is_in_names(character: str) -> bool:
    """
    Whether a character may stand inside of a name: some that are not invisible by their category are refused too.
    """
    try:
        check_name(f"a{character}b")
    except UnsafePathError:
        return False
    return True


def names(count: int) -> st.SearchStrategy[str]:
    """
    Paths that no volume confuses with each other, because each part begins with its own number.
    """
    tail = st.text(
        st.characters(exclude_categories=("Cc", "Cf", "Cs", "Zl", "Zp"), exclude_characters="/\\:").filter(is_in_names),
        max_size=20,
    )
    part = st.tuples(st.integers(100, 100 + count), tail).map(lambda pair: f"{pair[0]}{pair[1]}".rstrip(". "))
    return st.lists(part, min_size=1, max_size=4).map("/".join)


texts = st.text(max_size=30)
sizes = st.integers(0, 2**63 - 1)
signed_integers = st.integers(-(2**63), 2**63 - 1)
sha256s = st.binary(min_size=32, max_size=32).map(bytes.hex)
nonces = st.binary(min_size=16, max_size=16).map(bytes.hex)
numbers = st.integers(1, 10**12 - 1)
generations = st.builds("{:012d}-{}".format, numbers, nonces)
keys = st.builds(
    "{}-{}".format,
    st.from_regex(r"[a-z0-9._-]{1,40}", fullmatch=True),
    st.binary(min_size=8, max_size=8).map(bytes.hex),
)
zones = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
moments = st.datetimes(timezones=zones)
holders = st.builds(
    Holder,
    pod=texts,
    node=texts,
    uid=signed_integers,
    pid=signed_integers,
    boot_id=texts,
    pid_namespace=texts,
    started=signed_integers,
)
files = st.builds(FileEntry, path=names(0), size_bytes=sizes, sha256=st.none() | sha256s, token=st.none() | texts)
patterns = st.lists(texts, max_size=3).map(tuple)
records = st.one_of(
    st.builds(
        LogEntry,
        type=st.sampled_from(["commit", "restore", "tombstone"]),
        seq=numbers,
        key=keys,
        uri=texts,
        revision=st.none() | texts,
        allow_patterns=st.none() | patterns,
        ignore_patterns=patterns,
        generation=generations,
        version=texts,
        files=sizes,
        size_bytes=sizes,
        manifest_sha256=sha256s,
        digest=st.just("sha256"),
        policy=st.just("allow"),
        created_at=moments,
        writer=holders,
    ),
    st.builds(
        Manifest,
        key=keys,
        generation=generations,
        version=texts,
        files=st.lists(files, max_size=5).map(
            lambda entries: tuple(attrs.evolve(entry, path=f"{i}-{entry.path}") for i, entry in enumerate(entries))
        ),
    ),
    st.builds(Claim, epoch=numbers, nonce=nonces, uri=texts, holder=holders, claimed_at=moments),
    st.builds(Beat, count=sizes, released=st.booleans(), bytes_done=sizes, bytes_total=sizes, bytes_per_second=sizes),
    st.builds(ReaderLease, generation=generations, holder=holders),
    st.builds(PartNote, path=names(9), token=texts, stop=sizes, sha256=sha256s),
)


@given(records)
def test_a_record_is_read_back_as_it_was_written(record):
    """
    Every kind of record survives writing and reading, as one line of ASCII that ends in its only newline.
    """
    data = encode(record)

    assert decode(type(record), data, "here") == record
    assert (data.isascii(), data.index(b"\n")) == (True, len(data) - 1)


# What the first release wrote; never to be edited. A new format adds its own fixtures beside these.
FORMAT_1 = {
    LogEntry: (
        b'{"allow_patterns":["*.json"],"checksum":"264cb4c1d87814b126bef64bbc76ce16d787ce33cf0e8a5127c651430cf83aee",'
        b'"created_at":"2026-02-03T04:05:06.000789+00:00","digest":"sha256","files":2,"format":1,'
        b'"generation":"000000000007-0123456789abcdef0123456789abcdef","ignore_patterns":[],"key":"llama-16d8a2f35f654b21",'
        b'"manifest_sha256":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","policy":"allow","revision":null,'
        b'"seq":3,"size_bytes":70,"type":"commit","uri":"s3://bucket/llama",'
        b'"version":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","writer":{"boot_id":"b007",'
        b'"node":"node-a","pid":17,"pid_namespace":"pid:[4026531836]","pod":"server-0","started":4711,"uid":1000}}\n'
    ),
    Manifest: (
        b'{"checksum":"2188faa878136a5f0a87d2ea22c85a739e6d0e47a7ac87c6a78cf5a31937110b","files":[{"path":"config.json",'
        b'"sha256":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size_bytes":0,"token":"t1"},'
        b'{"path":"w/a.bin","sha256":null,"size_bytes":70,"token":null}],"format":1,'
        b'"generation":"000000000007-0123456789abcdef0123456789abcdef","key":"llama-16d8a2f35f654b21","version":"v1"}\n'
    ),
    Claim: (
        b'{"checksum":"03768359f0b137355807839730348ed8aaf6febb69bb55aaaa9cf197eb12eac7",'
        b'"claimed_at":"2026-02-03T04:05:06.000789+00:00","epoch":7,"format":1,"holder":{"boot_id":"b007","node":"node-a",'
        b'"pid":17,"pid_namespace":"pid:[4026531836]","pod":"server-0","started":4711,"uid":1000},'
        b'"nonce":"0123456789abcdef0123456789abcdef","uri":"s3://bucket/llama"}\n'
    ),
    Beat: (
        b'{"bytes_done":10,"bytes_per_second":3,"bytes_total":70,'
        b'"checksum":"41ef6b4c96d73e3155e84b134bda258e7748ff8f5a01295469a548f2164dd049","count":5,"format":1,"released":true}\n'
    ),
    ReaderLease: (
        b'{"checksum":"fcdb33694e3cc702fde6eca310fc3fd2de9d3d5aea43fd86bd20aef06554d57c","format":1,'
        b'"generation":"000000000007-0123456789abcdef0123456789abcdef","holder":{"boot_id":"b007","node":"node-a","pid":17,'
        b'"pid_namespace":"pid:[4026531836]","pod":"server-0","started":4711,"uid":1000}}\n'
    ),
    PartNote: (
        b'{"checksum":"8a6a4c539906fe541f7cf9b841d9e2086375095b4dfe6d2cbc3f9d317c61780a","format":1,"path":"w/a.bin",'
        b'"sha256":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","stop":70,"token":"t2"}\n'
    ),
}


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_of_format_1_is_readable_for_ever(record):
    """
    What the first release wrote is still read, and still written byte for byte.
    """
    data = FORMAT_1[type(record)]

    assert decode(type(record), data, "here") == record
    assert encode(record) == data


@pytest.mark.timeout(60)
def test_no_changed_byte_goes_unnoticed():
    """
    A log record of which any one byte was replaced by any other is refused.
    """
    data = encode(ENTRY).rstrip(b"\n")
    changed = (
        data[:i] + bytes([other]) + data[i + 1 :]
        for i, byte in enumerate(data)
        for other in range(256)
        if other != byte
    )

    accepted = [wrong for wrong in changed if is_accepted(wrong)]

    assert is_accepted(data)
    assert accepted == []


def test_no_missing_end_goes_unnoticed():
    """
    A log record that was cut short anywhere is refused; only the newline at its end may be missing.
    """
    data = encode(ENTRY)

    accepted = [length for length in range(len(data) + 1) if is_accepted(data[:length])]

    assert accepted == [len(data) - 1, len(data)]


def is_accepted(data: bytes) -> bool:
    try:
        decode(LogEntry, data, "here")
    except StoreFormatError:
        return False
    return True


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_of_a_newer_format_asks_for_an_upgrade(record):
    """
    A newer format is told apart from damage before anything else of it is looked at.
    """
    data = json.dumps({"format": 2, "anything": ["new"]}).encode()

    reason = refusal(type(record), data)

    assert reason == "it has format 2 and this version reads up to 1; upgrade kserve_pvc"


@pytest.mark.parametrize("format", [0, -1, None, "1", "2", [1], {}, 1.0, 1.5, 2.0, False, True])
def test_a_format_that_is_no_known_number_is_refused(format):
    """
    What has no valid format number is not a record of a store, even with a matching checksum.
    """
    reason = refusal(LogEntry, signed(body_of(ENTRY), format))

    assert reason == "it has no valid format number, so it does not belong to a store"


def test_a_missing_format_is_refused():
    """
    Plain JSON without a format number is not a record of a store.
    """
    reason = refusal(Beat, b'{"count": 1}')

    assert reason == "it has no valid format number, so it does not belong to a store"


@pytest.mark.parametrize("checksum", [SHA256, None, "", 0])
def test_a_wrong_checksum_is_refused(checksum):
    """
    A record whose checksum is another one, or of another type, is refused.
    """
    reason = refusal(Beat, json.dumps({"format": 1, **body_of(BEAT), "checksum": checksum}).encode())

    assert reason == "its checksum does not match, so it was truncated or changed"


def test_a_missing_checksum_is_refused():
    """
    A record without its checksum is refused, whatever else is right.
    """
    reason = refusal(Beat, json.dumps({"format": 1, **body_of(BEAT)}).encode())

    assert reason == "its checksum does not match, so it was truncated or changed"


JSON_OBJECTS = [b"[]", b"null", b'"text"', b"1", b"true"]
NOT_JSON = {
    "nothing": b"",
    "white space": b" \n" * 9,
    "half a record": encode(ENTRY)[:100],
    "two records": encode(ENTRY) * 2,
    "UTF-8 with a byte order mark": b"\xef\xbb\xbf" + encode(ENTRY),
    "UTF-16": encode(ENTRY).decode().encode("utf-16"),
    "not UTF-8": encode(ENTRY).replace(b"server-0", b"server\xff0"),
    "zeros": bytes(4096),
    "NaN": signed({**body_of(BEAT), "count": float("nan")}),
    "infinity": signed({**body_of(BEAT), "count": float("inf")}),
    "minus infinity": signed({**body_of(BEAT), "count": float("-inf")}),
    "a field twice": encode(ENTRY).replace(b'"seq":3', b'"seq":3,"seq":3'),
    "the format twice": encode(ENTRY).replace(b'"format":1', b'"format":2,"format":1'),
    "a nested field twice": encode(ENTRY).replace(b'"uid":1000', b'"uid":0,"uid":1000'),
    "deep lists": b'{"format":1,"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "endless opening": b"[" * 1_000_000,
    "a number of 5,000 digits": b'{"format":1,"count":' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("data", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_not_strict_json_is_refused(data):
    """
    Damaged, doubled, oddly encoded and hostile JSON is refused as such and never breaks the reader.
    """
    assert refusal(LogEntry, data).startswith("it is not JSON: ")


@pytest.mark.parametrize("data", JSON_OBJECTS)
def test_json_that_is_no_object_is_refused(data):
    """
    JSON of another type than an object is not a record.
    """
    assert refusal(LogEntry, data) == "it is not a JSON object"


def test_nesting_at_the_edge_of_what_can_be_parsed_is_refused():
    """
    Nesting that the parser can still follow ends in a refusal, not in a crash further on.
    """
    nested = [b'{"format":1,"count":' + b"[" * depth + b"]" * depth + b"}" for depth in range(1, 1100)]

    reasons = {refusal(Beat, data).partition(":")[0] for data in nested}

    assert reasons <= {"its checksum does not match, so it was truncated or changed", "it is not JSON"}


REQUIRED = [
    (record, field.name) for record in RECORDS for field in attrs.fields(type(record)) if field.default is attrs.NOTHING
]


@pytest.mark.parametrize(
    ("record", "name"), REQUIRED, ids=lambda value: value if isinstance(value, str) else type(value).__name__
)
def test_a_missing_field_makes_a_record_unusable(record, name):
    """
    A record without one of its fields is refused, although its checksum matches.
    """
    body = body_of(record)
    del body[name]

    reason = refusal(type(record), signed(body))

    assert reason.startswith(f"it is not a valid {type(record).__name__}: ")


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_an_unknown_field_makes_a_record_unusable(record):
    """
    A record with a field of no known name is refused, although its checksum matches.
    """
    reason = refusal(type(record), signed({**body_of(record), "surprise": 1}))

    assert reason.startswith(f"it is not a valid {type(record).__name__}: ")


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_what_is_refused_steers_no_terminal(record):
    """
    The message about a record escapes what a stranger has put into it.
    """
    with pytest.raises(StoreFormatError) as caught:
        decode(type(record), signed({**body_of(record), "\x1b[31m\n\u202e": 1}), "here")

    assert str(caught.value).isprintable()
    assert "\\x1b[31m\\n\\u202e" in str(caught.value)


WRONG = [
    (ENTRY, "type", ["", "Commit", "commit\n", "commitx", 1, None, ["commit"]]),
    (ENTRY, "seq", [0, -1, 1.0, "1", None, [1], True, 10**12]),
    (
        ENTRY,
        "key",
        [
            "",
            "../../etc-16d8a2f35f654b21",
            "a/b-16d8a2f35f654b21",
            "llama-16D8A2F35F654B21",
            "llama",
            KEY + "\n",
            KEY + "/..",
            1,
            None,
        ],
    ),
    (ENTRY, "uri", [None, 1, ["s3://b"], {}]),
    (ENTRY, "revision", [1, [], {}, False]),
    (ENTRY, "allow_patterns", [1, [1], ["a", None], [["a"]], True, "abc", {"x": 1}]),
    (ENTRY, "ignore_patterns", [None, 1, [1], [None], "abc", "", {}, {"x": 1}]),
    (
        ENTRY,
        "generation",
        ["", "..", "../../etc", f"7-{NONCE}", GENERATION.upper(), GENERATION + "/..", GENERATION + "\n", 7, None],
    ),
    (ENTRY, "version", [None, 1, []]),
    (ENTRY, "files", [-1, 1.5, "2", None, [], {}, True, 2**63]),
    (ENTRY, "size_bytes", [-1, 1.5, "70", None, False, 2**63, 10**4000]),
    (
        ENTRY,
        "manifest_sha256",
        ["", SHA256.upper(), SHA256[:-1], SHA256 + "0", "../" + SHA256[3:], SHA256 + "\n", None, 0],
    ),
    (ENTRY, "digest", [None, 1, "", "md5", "SHA256", "sha256\n"]),
    (ENTRY, "policy", [None, 1, ["allow"], "", "deny", "allow\n"]),
    (ENTRY, "created_at", ["", "yesterday", "2026-02-03T04:05:06", "2026-02-03T04:05:06+99:00", 0, None, []]),
    (
        ENTRY,
        "writer",
        [None, "me", [], {}, *({**attrs.asdict(HOLDER), "pid": pid} for pid in ("1", True, 2**63, -(2**63) - 1))],
    ),
    (ENTRY, "writer", [{**attrs.asdict(HOLDER), "surprise": 1}]),
    (MANIFEST, "key", ["../x-16d8a2f35f654b21", None]),
    (MANIFEST, "generation", ["../../etc", None]),
    (MANIFEST, "version", [None, 1]),
    (
        MANIFEST,
        "files",
        [
            None,
            1,
            [1],
            ["config.json"],
            [None],
            [[]],
            [{}],
            {"config.json": 1},
            {},
            "",
            [{"path": None, "size_bytes": 1}],
        ],
    ),
    (CLAIM, "epoch", [0, -1, 1.0, "1", None, True, 10**12]),
    (CLAIM, "nonce", ["", "../..", NONCE.upper(), NONCE + "0", None]),
    (CLAIM, "holder", [None, "me", {}, [HOLDER.pod]]),
    (CLAIM, "claimed_at", ["2026-02-03T04:05:06", None]),
    (BEAT, "count", [-1, 1.0, "1", None, [], True, 2**63]),
    (BEAT, "released", [0, 1, "true", None]),
    (BEAT, "bytes_done", [-1, 1.0, None]),
    (BEAT, "bytes_total", [-1, 1.0, None]),
    (BEAT, "bytes_per_second", [-1, 1.0, None]),
    (LEASE, "generation", ["..", "", None]),
    (LEASE, "holder", [None, "me", {}]),
    (NOTE, "path", ["../a", "/a", "a//b", "", "a\0", "a\\b", "a.", "a ", 5, None, ["a"], True]),
    (NOTE, "token", [None, 1]),
    (NOTE, "stop", [-1, 1.0, "70", None, True]),
    (NOTE, "sha256", ["", SHA256[:-1], 0]),
]


@pytest.mark.parametrize(
    ("record", "name", "value"),
    [
        pytest.param(record, name, value, id=f"{type(record).__name__}-{name}-{value!a:.40}")
        for record, name, values in WRONG
        for value in values
    ],
)
def test_a_field_of_a_wrong_type_or_form_makes_a_record_unusable(record, name, value):
    """
    A record is refused for one field that cannot be what it should, although its checksum matches, and the error stays
    readable.
    """
    reason = refusal(type(record), signed({**body_of(record), name: value}))

    assert reason.startswith(f"it is not a valid {type(record).__name__}: ")
    assert "Attribute(" not in reason


ESCAPES = [
    "..",
    "../../etc/passwd",
    "a/../../b",
    "/etc/passwd",
    "C:\\x",
    "\\\\host\\x",
    "a\\..\\b",
    "a//b",
    "a/",
    "",
    ".",
    "a\0",
    "a\nb",
    "\u202ea",
    "x" * 256,
]


def reason_of_proven(data: bytes) -> str:
    """
    Why a manifest is refused whose bytes have the digest of its record.
    """
    with pytest.raises(StoreFormatError) as caught:
        decode_proven(Manifest, data, "there", part=to_file)
    return caught.value.reason


@pytest.mark.parametrize("path", ESCAPES, ids=lambda path: ascii(path)[:30])
def test_a_manifest_never_names_a_file_outside_its_generation(path):
    """
    A manifest with a path that leaves its place is refused, although its checksum matches.
    """
    body = body_of(MANIFEST)
    body["files"][1]["path"] = path

    reason = refusal(Manifest, signed(body))

    assert reason.startswith("it is not a valid Manifest: ")
    assert reason_of_proven(signed(body)) == reason
    assert reason.isprintable()


@pytest.mark.parametrize(
    "paths", [("a", "a"), ("A", "a"), ("caf\u00e9", "cafe\u0301"), ("a", "a/b"), ("D/a", "d/b")], ids=ascii
)
def test_a_manifest_never_names_two_files_that_may_be_one(paths):
    """
    A manifest with colliding paths is refused, although its checksum matches.
    """
    body = body_of(MANIFEST)
    for file, path in zip(body["files"], paths, strict=True):
        file["path"] = path

    reason = refusal(Manifest, signed(body))

    assert reason.startswith("it is not a valid Manifest: ")
    assert reason_of_proven(signed(body)) == reason


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size_bytes", -1),
        ("size_bytes", 1.0),
        ("size_bytes", None),
        ("sha256", "x" * 64),
        ("sha256", "../" + SHA256[3:]),
        ("token", 1),
        ("surprise", 1),
    ],
)
def test_a_manifest_is_as_good_as_its_worst_file(name, value):
    """
    One file with a wrong field makes the whole manifest unusable.
    """
    body = body_of(MANIFEST)
    body["files"][0][name] = value

    reason = refusal(Manifest, signed(body))

    assert reason.startswith("it is not a valid Manifest: ")
    assert reason_of_proven(signed(body)) == reason


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_one_kind_of_record_is_never_taken_for_another(record):
    """
    A genuine record that lies where another kind belongs is refused.
    """
    others = [type(other) for other in RECORDS if type(other) is not type(record)]

    reasons = [refusal(other, encode(record)) for other in others]

    assert [
        reason.startswith(f"it is not a valid {other.__name__}: ")
        for reason, other in zip(reasons, others, strict=True)
    ] == [True] * 5


counters = st.integers(0, 2**50)


@given(
    st.builds(
        Beat,
        count=counters,
        released=st.booleans(),
        bytes_done=counters,
        bytes_total=counters,
        bytes_per_second=counters,
    )
)
def test_every_beat_has_the_same_size(beat):
    """
    A beat has exactly `BEAT_BYTES` bytes, so that it replaces the one before it in a single write.
    """
    data = encode_beat(beat)

    assert (len(data), data[-1:]) == (BEAT_BYTES, b"\n")
    assert decode(Beat, data, "here") == beat


def test_the_largest_beat_fits():
    """
    A beat of a petabyte download that never stops beating is no longer than any other.
    """
    beat = Beat(count=2**50, released=False, bytes_done=2**50, bytes_total=2**50, bytes_per_second=2**50)

    assert len(encode_beat(beat)) == BEAT_BYTES == 256


def test_a_torn_beat_is_refused():
    """
    A beat of which a part is older than the rest is refused wherever the tear is, unless both parts agree.
    """
    older = encode_beat(Beat(count=99, bytes_done=10, bytes_total=10**9))
    newer = encode_beat(Beat(count=100, bytes_done=10**9, bytes_total=10**9))
    torn = {newer[:i] + older[i:] for i in range(BEAT_BYTES + 1)} - {older, newer}

    refused = [refusal(Beat, data) for data in torn]

    assert len(refused) == len(torn) > 50


@given(
    st.builds(
        StoreSettings,
        store_id=nonces,
        locker=texts,
        lease_seconds=st.floats(0.1, 3600) | st.integers(1, 3600),
        created_at=moments,
    )
)
def test_settings_are_read_back_as_they_were_written(settings):
    """
    The settings of a store survive writing and reading.
    """
    assert decode_settings(encode_settings(settings), "store.json") == settings


def test_settings_are_for_people_to_read():
    """
    The settings of a store are indented JSON without a checksum, as the first release wrote them.
    """
    assert encode_settings(SETTINGS).decode() == (
        '{\n  "format": 1,\n  "store_id": "0123456789abcdef0123456789abcdef",\n  "locker": "lease",\n'
        '  "lease_seconds": 30.0,\n  "created_at": "2026-02-03T04:05:06.000789+00:00"\n}\n'
    )


@pytest.mark.parametrize("format", [2, 999])
def test_settings_of_a_newer_format_ask_for_an_upgrade(format):
    """
    A store made by a newer version is left alone, whatever its settings look like.
    """
    with pytest.raises(StoreFormatError) as caught:
        decode_settings(json.dumps({"format": format, "layout": "new"}).encode(), "store.json")

    assert caught.value.fields == {
        "path": "store.json",
        "reason": f"it has format {format} and this version reads up to 1; upgrade kserve_pvc",
    }


WRONG_SETTINGS = [
    {"format": None},
    {"format": "1"},
    {"format": True},
    {"format": 1.0},
    {"store_id": None},
    {"store_id": "../.."},
    {"store_id": NONCE.upper()},
    {"locker": None},
    {"locker": 1},
    {"lease_seconds": 0},
    {"lease_seconds": 0.01},
    {"lease_seconds": -30},
    {"lease_seconds": "30"},
    {"lease_seconds": None},
    {"lease_seconds": True},
    {"lease_seconds": 3600.5},
    {"lease_seconds": 86400},
    {"lease_seconds": 10**400},
    {"lease_seconds": float("nan")},
    {"lease_seconds": float("inf")},
    {"created_at": "2026-02-03T04:05:06"},
    {"created_at": None},
    {"surprise": 1},
]


@pytest.mark.parametrize("wrong", WRONG_SETTINGS, ids=lambda wrong: f"{wrong!s:.40}")
def test_settings_that_mean_nothing_are_refused(wrong):
    """
    One value that cannot be a setting makes the store unusable rather than differently used.
    """
    data = json.dumps({**json.loads(encode_settings(SETTINGS)), **wrong}).encode()

    with pytest.raises(StoreFormatError) as caught:
        decode_settings(data, "store.json")

    assert caught.value.path == "store.json"


@pytest.mark.parametrize("text", [b"1e999", b"-1e999"])
def test_a_lease_without_end_is_refused(text):
    """
    A number that JSON can spell and only infinity can hold is no lease.
    """
    with pytest.raises(StoreFormatError) as caught:
        decode_settings(encode_settings(SETTINGS).replace(b"30.0", text), "store.json")

    assert caught.value.reason.startswith("these are not valid store settings: ")


@pytest.mark.parametrize("name", ["store_id", "locker", "lease_seconds", "created_at", "format"])
def test_settings_with_a_missing_value_are_refused(name):
    """
    A missing setting is not guessed.
    """
    body = json.loads(encode_settings(SETTINGS))
    del body[name]

    with pytest.raises(StoreFormatError) as caught:
        decode_settings(json.dumps(body).encode(), "store.json")

    assert caught.value.path == "store.json"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"format": 1, "format": 1}', b"\xff", b"[" * 100_000])
def test_damaged_settings_are_refused(data):
    """
    Settings that are not one strict JSON object are refused.
    """
    with pytest.raises(StoreFormatError) as caught:
        decode_settings(data, "store.json")

    assert caught.value.path == "store.json"


@pytest.mark.parametrize(
    ("type", "name", "is_present"),
    [
        ("commit", "000000000003.commit", True),
        ("restore", "000000000003.restore", True),
        ("tombstone", "000000000003.tombstone", False),
    ],
)
def test_a_log_entry_says_what_it_is_called_and_whether_the_model_is_there(type, name, is_present):
    """
    A log entry's name is its number and type, and only a tombstone says that there is no model.
    """
    entry = attrs.evolve(ENTRY, type=type)

    assert (entry.name, entry.is_present) == (name, is_present)


def test_a_manifest_is_as_large_as_its_files():
    """
    The size of a manifest is the sum over its files.
    """
    assert (MANIFEST.size_bytes, Manifest(key=KEY, generation=GENERATION, version="v", files=()).size_bytes) == (70, 0)


def test_a_claim_names_a_generation_of_its_own():
    """
    The generation of a claim is made of its number and its nonce, so no two claims share one.
    """
    assert (CLAIM.generation, attrs.evolve(CLAIM, epoch=8).generation) == (GENERATION, f"000000000008-{NONCE}")


def test_a_holder_is_shown_so_that_a_person_finds_the_pod():
    """
    A holder reads as pod, node, user and process.
    """
    assert str(HOLDER) == "pod server-0 on node-a (uid 1000, pid 17)"


def test_the_clock_for_people_knows_its_zone():
    """
    Records are dated in UTC.
    """
    assert now().tzinfo is UTC


def test_paths_of_records_are_posix_paths():
    """
    Paths are turned into pure paths when a record is built, from a text as well as from a path.
    """
    assert [FileEntry(path=path, size_bytes=0).path for path in ("a/b", PurePosixPath("a/b"))] == [
        PurePosixPath("a/b")
    ] * 2


def test_a_large_manifest_is_decoded_without_its_objects():
    """
    Decoding a manifest takes a few times its bytes, as each file is made when it is read.
    """
    number = 5000
    files = tuple(
        FileEntry(path=f"dir{n % 9}/file-{n:06}.bin", size_bytes=n, sha256=f"{n:064x}", token=f"{n:032x}")
        for n in range(number)
    )
    manifest = attrs.evolve(MANIFEST, files=files)
    data = encode(manifest)
    tracemalloc.start()
    try:
        found = decode_proven(Manifest, data, "a manifest", part=to_file)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    print(most / len(data))
    assert found == manifest
    assert most / len(data) < 5
