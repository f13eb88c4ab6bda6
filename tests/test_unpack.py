"""
Archives, honest and hostile, member by member.
"""

from __future__ import annotations

import gzip
import io
import lzma
import random
import stat
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Mapping

import pytest

from kserve_pvc import DigestMismatchError, PolicyError, StoreError, UnsafePathError
from kserve_pvc._archive.members import _HARMLESS_BYTES
from kserve_pvc._archive.unpack import _load_zstd, check_readable, is_archive, unpack
from kserve_pvc._source.contract import UnpackLimits

FILES = {
    "config.json": b'{"layers": 2}',
    "empty": b"",
    "weights/a b.bin": random.Random(5).randbytes(700_001),
    "weights/é.txt": b"x" * 513,
}


def zst(data: bytes) -> bytes:
    try:
        return bytes(_load_zstd().compress(data))
    except ImportError:
        pytest.skip("`backports.zstd` is not installed")


CODINGS: Mapping[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "xz": lzma.compress, "zst": zst}


def tar(*members: tuple[str, bytes] | tarfile.TarInfo, form: int = tarfile.PAX_FORMAT) -> bytes:
    """
    A tar of regular files, or of headers as they are given.
    """
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member, io.BytesIO(b"x" * member.size))
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return file.getvalue()


def header(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def raw(kind: bytes, name: str = "x", size: int | None = None, data: bytes = b"") -> bytes:
    """
    One header as it is in a tar, with its data filled up to whole blocks.
    """
    info = header(name, kind, size=len(data) if size is None else size)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def zipped(*members: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data, compress_type=method)
    return file.getvalue()


def zip_info(name: str, **fields: object) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def read(
    data: bytes, name: str, selects: Callable[[object], bool] = lambda path: True, **limits: object
) -> dict[str, bytes]:
    """
    Everything an archive yields.
    """
    members = unpack(io.BytesIO(data), name, UnpackLimits(**limits), selects=selects, make_room=lambda size: None)
    return {str(member.path): b"".join(member.pieces) for member in members}


def refused(data: bytes, name: str, kind: type[Exception], **limits: object) -> str:
    """
    The message with which an archive is refused.
    """
    with pytest.raises(kind) as caught:
        read(data, name, **limits)
    return str(caught.value)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("coding", ["", "gz", "xz", "zst"])
def test_a_tar_yields_its_files(form, coding):
    """
    Every regular file comes with its path and bytes, whatever the tar's format and compression.
    """
    data = CODINGS.get(coding, bytes)(tar(*FILES.items(), form=form))

    assert read(data, f"model.tar.{coding}".rstrip(".")) == FILES


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_yields_its_files(method):
    """
    Every regular file comes with its path, its bytes, and the CRC32 it was compared with.
    """
    data = zipped(*FILES.items(), ("weights/", b""), method=method)

    found = unpack(io.BytesIO(data), "m.zip", UnpackLimits(), selects=lambda path: True, make_room=lambda size: None)

    assert [(str(m.path), b"".join(m.pieces), m.evidence) for m in found] == [
        (name, data, f"crc32:{zlib.crc32(data):08x}") for name, data in FILES.items()
    ]


@pytest.mark.parametrize("coding", CODINGS)
def test_one_compressed_file_yields_itself(coding):
    """
    What is no tar loses the end of its name, and several streams one after the other are one file.
    """
    data = FILES["weights/a b.bin"]

    found = read(CODINGS[coding](data[:1000]) + CODINGS[coding](data[1000:]), f"weights.bin.{coding}")

    assert found == {"weights.bin": data}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(
            (f"m{ending}", True)
            for ending in (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.zst", ".gz", ".xz", ".zst", ".TAR.GZ")
        ),
        *((name, False) for name in (".zip", ".tar.gz", "m.bin", "m.zip.bin", "gz", "m.bin.bz2", "m.pt")),
    ],
)
def test_a_name_says_what_is_an_archive(name, expected):
    """
    Only the end of a name counts, in either case, and a name that is nothing but an end is no archive.
    """
    assert is_archive(name) is expected


def test_long_names_come_whole():
    """
    Names beyond 100 bytes, which stand in headers of their own, come as they are in each format that has them.
    """
    name = f"{'d' * 90}/{'é' * 60}/{'f' * 80}"

    assert [read(tar((name, b"1"), form=form), "m.tar") for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)] == [
        {name: b"1"}
    ] * 2


def test_the_prefix_of_a_tar_of_the_working_directory_says_nothing():
    """
    `./config.json` is `config.json`, and `./` is the model's directory.
    """
    assert read(tar(header(".", tarfile.DIRTYPE), header("./", tarfile.DIRTYPE), ("./a/b", b"1")), "m.tar") == {
        "a/b": b"1"
    }


def test_only_what_is_wanted_is_yielded():
    """
    Members that are not selected are passed over, whatever they are called and whatever they are.
    """
    members = list(FILES.items())

    wanted = [
        read(data, name, lambda path: str(path) == "empty")
        for data, name in ((tar(*members), "m.tar"), (zipped(*members), "m.zip"))
    ]

    assert wanted == [{"empty": b""}] * 2
    odd = [header("../x", tarfile.SYMTYPE), ("a\\b", b"1" * 700), header("p", tarfile.FIFOTYPE), header("..", b"5")]
    assert read(tar(*odd, ("empty", b"")), "m.tar", lambda path: str(path) == "empty") == {"empty": b""}
    link = zip_info("ln", external_attr=(stat.S_IFLNK | 0o644) << 16)
    packed = zipped((link, b"x"), ("../x", b""), ("empty", b""))
    assert read(packed, "m.zip", lambda path: str(path) == "empty") == {"empty": b""}


HOSTILE_NAMES = [
    "../x",
    "a/../../x",
    "/etc/x",
    "a\\..\\x",
    "C:/x",
    "a\nb",
    "a\u202eb",
    "a.",
    "n" * 256,
    "d/" * 600 + "x",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
@pytest.mark.parametrize("kind", ["zip", "tar", "directory"])
def test_a_name_that_leaves_its_place_is_refused(kind, name):
    """
    The error names archive and member, escaped; also for directories.
    """
    if kind == "zip":
        data = zipped(("fine", b"1"), (name, b"2"))
    else:
        data = tar(("fine", b"1"), (name, b"2") if kind == "tar" else header(name, tarfile.DIRTYPE))

    message = refused(data, "m.zip" if kind == "zip" else "m.tar", UnsafePathError)

    assert message.startswith(f"`m.{'zip' if kind == 'zip' else 'tar'}: {name[:1]}")
    assert message.isprintable()


def test_a_nul_hides_nothing():
    """
    A name with a NUL is refused, and not cut there.
    """
    data = zipped(("fineXhidden", b"1")).replace(b"fineXhidden", b"fine\0hidden")

    assert "no NUL" in refused(data, "m.zip", UnsafePathError)


@pytest.mark.parametrize(
    "names",
    [
        ("a", "a"),
        ("Model.bin", "model.bin"),
        ("café", "cafe\u0301"),
        ("a", "a/b"),
        ("a/b", "a"),
        ("A/x", "a/y"),
        ("m.tar", "b"),
        ("M.TAR/b",),
    ],
)
def test_names_that_collide_are_refused(names):
    """
    The same name twice, twins by case or Unicode, a file that is a directory, and the archive's own name.
    """
    assert "it collides with" in refused(tar(*((name, b"1") for name in names)), "m.tar", UnsafePathError)


def test_a_name_twice_in_a_zip_is_refused():
    """
    The same name twice in a zip is refused too.
    """
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = zipped(("a", b"1"), ("a", b"2"))

    assert "it collides with `a`" in refused(data, "m.zip", UnsafePathError)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a named pipe"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
        (b"Z", "of an unknown kind"),
    ],
)
def test_only_regular_files_come_out_of_a_tar(kind, what):
    """
    Links, devices, pipes, sparse files and what nobody knows are refused by name.
    """
    data = tar(("fine", b"1"))[:1024] + raw(kind, "planted") + bytes(1024)

    message = refused(data, "m.tar", UnsafePathError)

    assert "`m.tar: planted`" in message
    assert f": it is {what}" in message


def test_a_link_with_a_long_target_is_refused():
    """
    Where a link leads does not matter, however it is spelled.
    """
    link = header("planted", tarfile.SYMTYPE, linkname="../" * 80 + "etc/passwd")

    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        assert "`m.tar: planted`" in refused(tar(link, form=form), "m.tar", UnsafePathError)


@pytest.mark.parametrize(
    ("kind", "what"),
    [(stat.S_IFLNK, "a link"), (stat.S_IFCHR, "not a regular file"), (stat.S_IFIFO, "not a regular file")],
)
def test_only_regular_files_come_out_of_a_zip(kind, what):
    """
    Links, devices and pipes, which a zip marks by their mode, are refused by name.
    """
    data = zipped((zip_info("planted", external_attr=(kind | 0o644) << 16), b"/etc/passwd"))

    message = refused(data, "m.zip", UnsafePathError)

    assert "`m.zip: planted`" in message
    assert f": it is {what}" in message


def patched(data: bytes, offset: int, value: bytes, *, local: int | None = None) -> bytes:
    """
    A zip of one member with something replaced in its directory, and in the header before its data if that has it.
    """
    changed = bytearray(data)
    directory = data.index(b"PK\x01\x02")
    changed[directory + offset : directory + offset + len(value)] = value
    if local is not None:
        changed[local : local + len(value)] = value
    return bytes(changed)


@pytest.mark.parametrize(
    ("data", "kind", "says"),
    [
        (patched(zipped(("a", b"1")), 8, b"\x01\x00", local=6), PolicyError, "it is encrypted"),
        (zipped(("a", b"1"), method=zipfile.ZIP_LZMA), PolicyError, "its compression is not supported"),
        (zipped(("a", b"1"), method=zipfile.ZIP_BZIP2), PolicyError, "its compression is not supported"),
        (patched(zipped(("a", b"x" * 99)), 24, struct.pack("<I", 100), local=22), PolicyError, "but has 99"),
        (patched(zipped(("a", b"x" * 99)), 24, struct.pack("<I", 98), local=22), DigestMismatchError, "Bad CRC-32"),
        (patched(zipped(("a", b"x" * 99)), 16, b"abcd", local=14), DigestMismatchError, "Bad CRC-32"),
        (patched(zipped(("a", b"x")), 46, b"b"), UnsafePathError, "disagrees with the central directory"),
        (zipped(("a", b"x"))[:-8], DigestMismatchError, "not a zip file"),
        (b"PK", DigestMismatchError, "not a zip file"),
        (b"", DigestMismatchError, "the file is empty"),
    ],
    ids=["encrypted", "lzma", "bzip2", "longer", "shorter", "crc", "two-names", "truncated", "nothing-much", "empty"],
)
def test_a_zip_that_lies_is_refused(data, kind, says):
    """
    What is encrypted, of another size or CRC than it says, named twice, cut short or no zip at all ends in an error.
    """
    assert says in refused(data, "m.zip", kind)


def with_comment(comment: bytes, behind: bytes = b"") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", b"x" * 99)
        archive.comment = comment
    return file.getvalue() + behind


def hiding() -> bytes:
    """
    A zip of two members whose directory leaves out the first: a reader that goes from header to header finds it.
    """
    data = zipped(("a", b"1"), ("b", b"2"))
    first = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", first + 1)
    end = bytearray(data[data.index(b"PK\x05\x06") :])
    end[8:12] = struct.pack("<HH", 1, 1)
    end[12:16] = struct.pack("<I", len(data) - len(end) - second)
    return data[:first] + data[second : len(data) - len(end)] + bytes(end)


END = zipped()
LIES = {
    "prefix": (b"#!/bin/sh\n" + zipped(("a", b"1")), "10 bytes before it are in no entry"),
    "zip-before": (zipped(("evil", b"1")) + zipped(("a", b"1")), "bytes before it are in no entry"),
    "hidden-entry": (hiding(), "bytes before it are in no entry"),
    "local-name": (patched(zipped(("a", b"x" * 99)), 46, b"a", local=None).replace(b"a", b"b", 1), "disagrees"),
    "local-size": (patched(zipped(("a", b"x" * 99)), 24, struct.pack("<I", 99), local=None), None),
    "local-crc": (zipped(("a", b"x" * 99))[:14] + b"abcd" + zipped(("a", b"x" * 99))[18:], "disagrees"),
    "local-method": (zipped(("a", b"x"))[:8] + b"\x00\x00" + zipped(("a", b"x"))[10:], "disagrees"),
    "local-encrypted": (zipped(("a", b"x"))[:6] + b"\x01\x00" + zipped(("a", b"x"))[8:], "disagrees"),
    "behind-the-end": (with_comment(b"", b"more"), "does not end with its comment"),
    "end-in-comment": (with_comment(END), "are in no entry"),
    "zip-in-comment": (with_comment(zipped(("evil", b"1"))), "are in no entry"),
    "comment": (with_comment(b"made by hand"), None),
    "count": (with_comment(b"").replace(struct.pack("<HH", 1, 1), struct.pack("<HH", 2, 2)), "disagree"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_zip_that_others_read_otherwise_is_refused(lie):
    """
    Some readers go by the central directory and others from header to header, or take the first end for the last: where
    they would find different files, none is unpacked.
    """
    data, says = LIES[lie]
    if says is None:
        assert read(data, "m.zip") == {"a": b"x" * 99}
        return
    assert says in refused(data, "m.zip", StoreError)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_zips_of_every_kind_of_writer_are_read(streamed, large):
    """
    Lengths that follow the data, and those of large files in their own field, are where such a writer puts them.
    """

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return not streamed

        def tell(self) -> int:
            if streamed:
                raise io.UnsupportedOperation
            return super().tell()

    file = Pipe()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a", "sub/é"):
            with archive.open(zip_info(name, compress_type=zipfile.ZIP_DEFLATED), "w", force_zip64=large) as member:
                member.write(name.encode() * 99)
        archive.mkdir("empty")

    assert read(file.getvalue(), "m.zip") == {"a": b"a" * 99, "sub/é": "sub/é".encode() * 99}


def test_members_that_share_bytes_are_refused():
    """
    Two entries of a zip's directory that lead to the same bytes are refused before any of them is read.
    """
    data = zipped(("a", b"1" * 1000), ("b", b"1" * 1000))
    at = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", at + 1)
    twice = data[: second + 42] + struct.pack("<I", 0) + data[second + 46 :]

    assert "overlap with" in refused(twice, "m.zip", UnsafePathError)


def test_an_unmarked_name_of_a_zip_is_not_guessed():
    """
    A name that is no ASCII, in a zip that does not say that it is UTF-8, is refused.
    """
    data = zipped(("n\u00e9", b"1"))
    flagless = data.replace(struct.pack("<HH", 0x800, 8), struct.pack("<HH", 0, 8))

    assert "not marked as UTF-8" in refused(flagless, "m.zip", UnsafePathError)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("shape", ["m.tar.{}", "m.{}"])
def test_what_is_cut_short_is_damaged(coding, shape):
    """
    An archive that ends before its end, at whatever byte, is never taken for a whole one.
    """
    content = random.Random(6).randbytes(3000)
    data = CODINGS[coding](tar(("a", content), ("b", content)) if "tar" in shape else content)

    for end in (0, 1, 10, len(data) // 2, len(data) - 9, len(data) - 1):
        assert "` is damaged: " in refused(data[:end], shape.format(coding), DigestMismatchError), end


@pytest.mark.parametrize("end", [0, 100, 512, 600, 1024 + 100, 1024 + 512])
def test_a_tar_that_ends_inside_of_a_member_is_damaged(end):
    """
    A tar that ends in a header, or before the data that it announces, is not a smaller one.
    """
    data = tar(("a", b"1"), ("b", b"2"))[:end]

    assert "damaged" in refused(data, "m.tar", DigestMismatchError)


@pytest.mark.parametrize("blocks", [0, 1])
@pytest.mark.parametrize("coding", ["", *CODINGS])
def test_the_empty_blocks_at_the_end_are_not_needed(caplog, coding, blocks):
    """
    A reader must not expect the end mark. A compressed stream proves that it is whole, otherwise there is a warning.
    """
    data = CODINGS.get(coding, bytes)(tar(("a", b"1"), ("b", b"2"))[: 2048 + 512 * blocks])

    assert read(data, f"m.tar.{coding}".rstrip(".")) == {"a": b"1", "b": b"2"}
    assert [record.levelname for record in caplog.records] == ["WARNING"] * (not coding and not blocks)


@pytest.mark.parametrize("coding", ["", *CODINGS])
@pytest.mark.parametrize("name", ["m.tar", "m.tar.gz", "m.tgz", "m.tar.xz", "m.tar.zst"])
def test_how_a_tar_is_compressed_is_seen_in_its_bytes(coding, name):
    """
    A compression that the name does not say, or says and is not there, does not matter.
    """
    assert read(CODINGS.get(coding, bytes)(tar(("a", b"1"))), name) == {"a": b"1"}


@pytest.mark.parametrize("name", [".//m/w", "m//w", "m/./w", "././m/w", "./m///./w"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_parts_of_a_name_that_lead_nowhere_go(kind, name):
    """
    `tar cf x.tar .//m` writes such names. Two of them that mean one file still collide.
    """
    pack = {"tar": tar, "zip": zipped}[kind]

    assert read(pack((name, b"w")), f"x.{kind}") == {"m/w": b"w"}
    assert "collides" in refused(pack((name, b"w"), ("m/w", b"v")), f"x.{kind}", UnsafePathError)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("first", ["m/w", "m/" + "long" * 50])
def test_a_hard_link_is_the_earlier_member_once_more(form, first):
    """
    A link to a member that was unpacked before names that file, also through another link.
    """
    links = [header(f"m/{n}", tarfile.LNKTYPE, linkname=f"./{target}") for n, target in (("2", first), ("3", "m/2"))]
    data = tar((first, b"w" * 5), *links, form=form)

    found = unpack(io.BytesIO(data), "m.tar", UnpackLimits(), selects=lambda path: True, make_room=lambda size: None)

    assert [(str(m.path), b"".join(m.pieces), m.copy_of and str(m.copy_of)) for m in found] == [
        (first, b"w" * 5, None),
        ("m/2", b"", first),
        ("m/3", b"", "m/2"),
    ]


@pytest.mark.parametrize("target", ["/etc/passwd", "../w", "later", "self", "left out", ""])
def test_a_hard_link_to_anything_else_is_refused(target):
    """
    Only what came out of the same archive before it can be meant.
    """
    data = tar(("left out", b""), header("self", tarfile.LNKTYPE, linkname=target), ("later", b""))

    with pytest.raises(UnsafePathError, match="hard link to"):
        read(data, "m.tar", lambda path: str(path) != "left out")


def test_hard_links_count_against_the_limits():
    """
    Copies are written, so a thousand links to one file are as large as a thousand files.
    """
    links = [header(f"l{n}", tarfile.LNKTYPE, linkname="w") for n in range(1000)]

    assert "unpacks to more than" in refused(tar(("w", b"w" * 100_000), *links), "m.tar", PolicyError, ratio=10)


@pytest.mark.parametrize("coding", CODINGS)
def test_a_flipped_bit_is_noticed(coding):
    """
    A wrong checksum of what came out is damage, also behind the last member.
    """
    data = bytearray(CODINGS[coding](tar(("a", random.Random(7).randbytes(20_000)))))
    data[len(data) // 2] ^= 1

    if coding == "zst":  # It has no checksum by default, and incompressible bytes come as they are.
        return
    assert "damaged" in refused(bytes(data), f"m.tar.{coding}", DigestMismatchError)


@pytest.mark.parametrize("name", ["m.zip", "m.tar", "m.tgz", "m.tar.xz", "m.xz", "m.gz"])
def test_noise_is_damaged(name):
    """
    What is no archive at all is told so.
    """
    assert "damaged" in refused(random.Random(8).randbytes(5000), name, DigestMismatchError)


def test_what_follows_the_end_is_refused():
    """
    A second tar behind the first, which others would read, is not passed over in silence.
    """
    assert "data follows the end" in refused(tar(("a", b"1")) + tar(("b", b"2")), "m.tar", PolicyError)


@pytest.mark.parametrize(
    ("data", "kind", "says"),
    [
        (raw(b"L", data=b"a" * 70_000) + tar(("x", b"")), PolicyError, "is longer than"),
        (raw(b"x", size=2**40), PolicyError, "is longer than"),
        (raw(b"x", data=b"30 path=../../etc/passwd-here\n") + tar(("x", b"")), UnsafePathError, ".."),
        (raw(b"x", data=b"11 size=-1\n") + tar(("x", b"")), DigestMismatchError, "not a number"),
        (raw(b"x", data=b"12 size=9999\n"[:12] + b"\n") + tar(("x", b"")), DigestMismatchError, "malformed"),
        (raw(b"x", data=b"9" * 50_000) + tar(("x", b"")), DigestMismatchError, "malformed"),
        (raw(b"x", data=b"0 a=b\n") + tar(("x", b"")), DigestMismatchError, "malformed"),
        (raw(b"x", data=b"22 GNU.sparse.major=1\n") + tar(("x", b"")), PolicyError, "sparse"),
        (raw(b"g", data=b"13 path=a/b/\n") + tar(("x", b"")), PolicyError, "one path"),
        (raw(b"x", data=b"18 size=999999999\n") + tar(("x", b"1")), DigestMismatchError, "unexpected end of data"),
        (raw(b"0", size=-512) + bytes(1024), DigestMismatchError, "negative"),
        (raw(b"0", size=2**62) + bytes(1024), DigestMismatchError, "unexpected end of data"),
    ],
    ids=[
        "name-bomb",
        "pax-bomb",
        "pax-path",
        "pax-size",
        "pax-torn",
        "digits",
        "no-length",
        "sparse",
        "global",
        "too-long",
        "negative",
        "huge",
    ],
)
def test_a_tar_that_lies_in_its_headers_is_refused(data, kind, says):
    """
    Headers about headers are short, well formed, and change nothing but the path and size of one member.
    """
    assert says in refused(data, "m.tar", kind)


@pytest.mark.parametrize("name", ["bomb.gz", "bomb.xz", "bomb.zst", "bomb.tar.gz", "bomb.zip"])
def test_a_bomb_stops_at_the_limit(name):
    """
    What grows beyond its ratio ends there. No more memory is used than the window that the format asks for, 8 MiB for
    xz.
    """
    zeros = bytes(40_000_000)
    content = tar(("zeros", zeros)) if ".tar" in name else zeros
    data = zipped(("zeros", zeros)) if name.endswith("zip") else CODINGS[name.rpartition(".")[2]](content)
    assert len(data) * 100 < _HARMLESS_BYTES
    del zeros, content
    came = []

    def unpack_all() -> None:
        for member in unpack(
            io.BytesIO(data), name, UnpackLimits(), selects=lambda path: True, make_room=lambda size: None
        ):
            came.extend(len(piece) for piece in member.pieces)

    tracemalloc.start()
    with pytest.raises(PolicyError, match=f"it unpacks to more than {_HARMLESS_BYTES} bytes"):
        unpack_all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert sum(came) <= _HARMLESS_BYTES
    assert peak < 12_000_000


@pytest.mark.parametrize("name", ["m.gz", "m.xz", "m.zst", "m.tar.gz", "m.tar.zst"])
def test_streams_that_hold_nothing_come_to_an_end(name, monkeypatch):
    """
    A file of very many compressed streams is refused, although none of them brings a byte that a limit would count.
    """
    monkeypatch.setattr("kserve_pvc._archive.decompressed.MAX_STREAMS", 200)
    data = CODINGS[name.rpartition(".")[2]](b"") * 400

    assert "more than" in refused(data, name, PolicyError)


@pytest.mark.parametrize("coding", sorted(CODINGS))
def test_streams_may_follow_each_other(coding):
    """
    Concatenated streams are one file: small and large ones, some empty, with padding where the format has it, also
    where they end at the end of what is read at once.
    """
    compress = CODINGS[coding]
    random.seed(7)
    pieces = [b"", *(random.randbytes(random.choice([0, 1, 1000, 300_000])) for _ in range(40)), b"end"]
    padding = bytes(8) if coding == "xz" else b""

    data = b"".join(compress(piece) + padding for piece in pieces)

    assert read(data, f"m.{coding}") == {"m": b"".join(pieces)}


@pytest.mark.parametrize("coding", sorted(CODINGS))
def test_garbage_after_a_stream_is_damage(coding):
    """
    What follows a compressed stream and is none is an error, not left out.
    """
    refused(CODINGS[coding](b"x" * 10) + b"garbage", f"m.{coding}", DigestMismatchError)


def test_limits_can_be_moved():
    """
    A trusted archive may grow further with a higher ratio, and no further than the size in all.
    """
    data = gzip.compress(bytes(40_000_000))

    assert len(read(data, "m.gz", ratio=2000)["m"]) == 40_000_000
    assert "it unpacks to more than 1000 bytes" in refused(data, "m.gz", PolicyError, ratio=2000, size_bytes=1000)


@pytest.mark.parametrize("name", ["m.tar", "m.zip"])
def test_entries_and_names_are_limited(name):
    """
    More entries than allowed, directories included, and names that are too long, are refused.
    """
    make = tar if name == "m.tar" else zipped
    data = make(*((f"directory/{number}", b"") for number in range(11)))

    assert len(read(data, name, entries=11)) == 11
    assert "more than 10 entries" in refused(data, name, PolicyError, entries=10)
    assert "longer than 10 bytes" in refused(data, name, PolicyError, path_bytes=10)


def test_a_huge_directory_is_not_even_read():
    """
    A zip whose directory is longer than any sensible one is refused before it is in memory.
    """
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, 17 * 1024 * 1024, 0, 0)

    assert "its central directory is longer" in refused(bytes(17 * 1024 * 1024) + end, "m.zip", PolicyError)


def test_room_is_asked_for():
    """
    A zip tells all that is wanted of it at once, a tar each file before it comes.
    """
    members, rooms = [("a", b"x" * 10), ("b", b"y" * 20), ("c", b"z" * 30)], []
    for data, name in ((zipped(*members), "m.zip"), (tar(*members), "m.tar")):
        for member in unpack(
            io.BytesIO(data), name, UnpackLimits(), selects=lambda path: path != "b", make_room=rooms.append
        ):
            b"".join(member.pieces)

    assert rooms == [40, 10, 30]


def test_a_member_that_is_not_read_is_passed_over():
    """
    Whoever leaves a member half read gets the next one at its beginning.
    """
    data = tar(("a", bytes(1_000_000)), ("b", b"2"))

    members = unpack(io.BytesIO(data), "m.tar", UnpackLimits(), selects=lambda path: True, make_room=lambda size: None)

    assert [len(next(member.pieces)) for member in members] == [262_144, 1]


def test_a_missing_package_is_named(monkeypatch):
    """
    Without a package for zstd the error says which to install, before anything is fetched.
    """

    def missing() -> None:
        raise ImportError("No module named 'backports.zstd'")

    monkeypatch.setattr("kserve_pvc._archive.unpack._load_zstd", missing)

    with pytest.raises(PolicyError, match=r"pip install 'kserve-pvc\[http\]'"):
        check_readable("m.tar.zst")
    check_readable("m.tar.gz")
