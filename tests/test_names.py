"""
Which names of a remote are taken as they are, and which refuse the whole model.
"""

import os
from pathlib import PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kserve_pvc import UnsafePathError
from kserve_pvc._format.file_names import check_collisions, check_name, fold

CLIMBS = "a name may not climb with `..`"
ABSOLUTE = "a name must be relative"
BACKSLASH = "a name may hold no backslash, which some volumes read as a directory separator"
EMPTY = "a name may have no empty or `.` part"
INVISIBLE = "a name may hold no NUL, control, invisible or unpaired surrogate character"
LOST = "a name may hold no U+FFFD, which stands for bytes that are not UTF-8 and are lost"
TOO_DEEP = "a name may have 32 levels"
TRAILING = "a name may not end in a dot or blank, which some volumes drop"
TOO_LONG = "a name may have 255 bytes a part and 1024 in all"

REFUSED = [
    ("..", CLIMBS),
    ("../etc/passwd", CLIMBS),
    ("../../etc/passwd", CLIMBS),
    ("a/../b", CLIMBS),
    ("a/..", CLIMBS),
    ("a/../../b", CLIMBS),
    ("/", ABSOLUTE),
    ("/etc/passwd", ABSOLUTE),
    ("//host/share", ABSOLUTE),
    ("/../a", ABSOLUTE),
    ("C:/Windows/x", ABSOLUTE),
    ("C:\\Windows\\x", BACKSLASH),
    ("C:", ABSOLUTE),
    ("c:/", ABSOLUTE),
    ("\\\\host\\share\\x", BACKSLASH),
    ("..\\x", BACKSLASH),
    ("a\\b", BACKSLASH),
    ("", EMPTY),
    (".", EMPTY),
    ("./a", EMPTY),
    ("a/./b", EMPTY),
    ("a/.", EMPTY),
    ("a//b", EMPTY),
    ("a/", EMPTY),
    ("\0", INVISIBLE),
    ("model.bin\0.txt", INVISIBLE),
    ("\x01", INVISIBLE),
    ("a\nb", INVISIBLE),
    ("a\r", INVISIBLE),
    ("a\tb", INVISIBLE),
    ("a\x7fb", INVISIBLE),
    ("a\x85b", INVISIBLE),
    ("\x1b[31mred", INVISIBLE),
    ("a\xadb", INVISIBLE),
    ("a\u200bb", INVISIBLE),
    ("a\u200db", INVISIBLE),
    ("\u202egnp.exe", INVISIBLE),
    ("\u2066a\u2069", INVISIBLE),
    ("a\u2028b", INVISIBLE),
    ("a\u2029b", INVISIBLE),
    ("\ufeffa", INVISIBLE),
    ("\ud800", INVISIBLE),
    *((f"a{c}b", INVISIBLE) for c in "\u034f\u115f\u1160\u17b4\u180b\u180f\u2065\u2800\u3164\ufe00\ufe0f\uffa0\ufff0"),
    ("a\U000e0100b", INVISIBLE),
    ("\u3164", INVISIBLE),
    ("a\ufffdb", LOST),
    ("...", TRAILING),
    ("a.", TRAILING),
    ("a ", TRAILING),
    (" ", TRAILING),
    ("a. .", TRAILING),
    ("d./x", TRAILING),
    ("d/ /x", TRAILING),
    ("x" * 256, TOO_LONG),
    ("a/" + "x" * 256, TOO_LONG),
    ("é" * 128, TOO_LONG),
    ("/".join(["x" * 255] * 4) + "/y", TOO_LONG),
    ("/".join(["x"] * 513), TOO_LONG),
    ("/".join(["x"] * 33), TOO_DEEP),
    ("/".join(["é"] * 33), TOO_DEEP),
    ("a/" * 500 + "a", TOO_DEEP),
]
ACCEPTED = [
    "model.safetensors",
    "a/b/c.bin",
    ".hidden",
    ".git/config",
    "..a",
    "...a",
    " a",
    "a..b/c",
    "-rf",
    "~",
    "$(true)",
    "*",
    "with space",
    "ab:c",
    "a:b.bin",
    "d:x/y",
    "x/C:",
    "café/日本語.txt",
    "x" * 255,
    "é" * 127,
    "/".join(["x" * 255] * 4),
    "/".join(["x"] * 32),
    "日本語/é",
    "😀.bin",
]


@pytest.mark.parametrize(("name", "rule"), REFUSED, ids=lambda value: ascii(value)[:40])
def test_a_name_that_breaks_a_rule_is_refused(name, rule):
    """
    A name that would leave its place or cannot be stored faithfully is refused, and the error says why.
    """
    with pytest.raises(UnsafePathError) as caught:
        check_name(name)

    assert caught.value.fields == {"name": name, "rule": rule}


@pytest.mark.parametrize("name", ACCEPTED, ids=lambda value: ascii(value)[:40])
def test_an_ordinary_name_is_kept_as_it_is(name):
    """
    A name that breaks no rule becomes a path of the same spelling, however odd it looks.
    """
    path = check_name(name)

    assert (path, str(path)) == (PurePosixPath(name), name)


@pytest.mark.parametrize(
    ("name", "shown"),
    [("\x1b[31mred", "\\x1b[31mred"), ("a\nb", "a\\nb"), ("\u202egnp", "\\u202egnp"), ("\ud800", "\\ud800")],
)
def test_a_refused_name_is_shown_escaped(name, shown):
    """
    The message about a refused name holds no character that could steer a terminal or forge a log line.
    """
    with pytest.raises(UnsafePathError) as caught:
        check_name(name)

    assert str(caught.value) == f"`{shown}` is refused: {INVISIBLE}; nothing was written"


_PARTS = st.sampled_from(["..", ".", "", "a", "b.bin", "C:", "\\", "\0", "...", "é", "x" * 255, "x" * 256]) | st.text(
    max_size=6
)


@given(st.lists(_PARTS, max_size=6).map("/".join))
def test_an_accepted_name_stays_inside_its_directory(name):
    """
    A name that is accepted and joined to a directory stays inside it, keeps its spelling, and is no absolute path on
    Windows either.
    """
    try:
        path = check_name(name)
    except UnsafePathError:
        return

    assert str(path) == name
    assert os.path.normpath(f"/store/model/{path}") == f"/store/model/{name}"
    assert PureWindowsPath(name).root == ""
    assert PureWindowsPath(name).drive or PureWindowsPath(name).parts == path.parts
    assert max(len(part.encode()) for part in path.parts) <= 255


TWINS = {
    "case": ("Model.bin", "model.bin"),
    "NFC and NFD": ("caf\u00e9", "cafe\u0301"),
    "Kelvin sign": ("\u212a", "K"),
    "Kelvin sign and lower case": ("\u212a", "k"),
    "sharp s": ("stra\u00dfe", "STRASSE"),
    "ligature": ("\ufb01le", "file"),
    "full width": ("\uff41", "a"),
    "case and form at once": ("CAF\u00c9", "cafe\u0301"),
    "below one directory": ("d/A", "d/a"),
    "the same name twice": ("a/b", "a/b"),
}


@pytest.mark.parametrize(
    ("first", "second"), [pair for twins in TWINS.values() for pair in (twins, twins[::-1])], ids=ascii
)
def test_names_that_some_volume_stores_as_one_collide(first, second):
    """
    Two names that differ only in case or Unicode form are refused in either order, and the error names both.
    """
    with pytest.raises(UnsafePathError) as caught:
        check_collisions([PurePosixPath("other"), PurePosixPath(first), PurePosixPath(second)])

    assert caught.value.fields == {
        "name": second,
        "rule": f"it collides with `{first}` on a volume that ignores case or Unicode form",
    }


def test_a_path_that_is_given_twice_collides():
    """
    One and the same path object is two files as much as two equal ones are.
    """
    path = PurePosixPath("a")

    with pytest.raises(UnsafePathError) as caught:
        check_collisions([path, path])

    assert caught.value.fields == {
        "name": "a",
        "rule": "it collides with `a` on a volume that ignores case or Unicode form",
    }


@pytest.mark.parametrize(
    ("first", "second", "twin"),
    [("D/a", "d/b", "D"), ("x/caf\u00e9/a", "x/cafe\u0301/b", "x/caf\u00e9"), ("\u212a/a", "k/a/b", "\u212a")],
)
def test_directories_that_some_volume_stores_as_one_collide(first, second, twin):
    """
    Files whose directories differ only in case or Unicode form are refused, although the files themselves differ.
    """
    with pytest.raises(UnsafePathError) as caught:
        check_collisions([PurePosixPath(first), PurePosixPath(second)])

    assert caught.value.fields == {
        "name": second,
        "rule": f"its directory collides with `{twin}` on a volume that ignores case or Unicode form",
    }


@pytest.mark.parametrize(
    "names", [("a", "a/b"), ("a/b", "a"), ("a/b/c/d", "a/b"), ("A", "a/b"), ("a/b", "A")], ids=" ".join
)
def test_a_file_that_is_also_a_directory_collides(names):
    """
    A name that is a file and the directory of another file is refused, whatever the order and case.
    """
    with pytest.raises(UnsafePathError) as caught:
        check_collisions(map(PurePosixPath, names))

    assert caught.value.fields == {
        "name": min(names, key=len),
        "rule": "it is both a file and a directory in the source",
    }


def test_a_model_may_not_have_more_directories_than_the_bound(monkeypatch):
    """
    The directories of all names together are counted once each, and too many of them are refused.
    """
    monkeypatch.setattr("kserve_pvc._format.file_names.MAX_DIRECTORIES", 9)
    names = ["a/b/c/1", "a/b/c/2", "a/b/d/1", "a/b-/c/1", "a/1", "b/1", "c/d/1"]

    check_collisions(map(PurePosixPath, names))  # a, a/b, a/b/c, a/b/d, a/b-, a/b-/c, b, c, c/d
    with pytest.raises(UnsafePathError, match="a model may have 9 directories"):
        check_collisions(map(PurePosixPath, [*names, "c/e/1"]))


_TINY = st.lists(st.sampled_from("aAbk\u212a"), min_size=1, max_size=4).map("/".join)


@given(st.lists(_TINY, max_size=6))
def test_collisions_are_those_that_a_comparison_of_all_pairs_finds(names):
    """
    Names are refused exactly if two of them are one path, or a file and a directory, where case is ignored, or if two
    directories above them are spelled in two ways.
    """
    directories = {str(above) for name in names for above in PurePosixPath(name).parents[:-1]}
    folded = [fold(name) for name in names]
    is_bad = (
        len(set(folded)) < len(names)
        or len({fold(name) for name in directories}) < len(directories)
        or bool({fold(name) for name in directories} & set(folded))
    )

    try:
        check_collisions(map(PurePosixPath, names))
        is_refused = False
    except UnsafePathError:
        is_refused = True

    assert is_refused == is_bad


@given(st.permutations(["a/b", "a/c", "b/a", "a.b", "ab", "b/b/b", "c/a/b"]))
def test_names_that_merely_resemble_each_other_live_together(names):
    """
    Names that every volume keeps apart do not collide, in any order.
    """
    assert check_collisions(map(PurePosixPath, names)) is None
