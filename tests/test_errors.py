"""
What every deliberate error promises to whoever catches it.
"""

import copy
import errno
import pickle
from pathlib import PurePosixPath

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kserve_pvc
from kserve_pvc import errors
from kserve_pvc._volume.reading import Volume
from kserve_pvc.errors import StoreError, printable

# For each error the builtin that a Python caller expects, and what the command line exits with.
CONTRACT = {
    errors.InvalidURIError: (ValueError, 2),
    errors.UnknownSchemeError: (ValueError, 2),
    errors.SettingsError: (ValueError, 2),
    errors.UnknownOptionError: (ValueError, 2),
    errors.InvalidFileError: (ValueError, 2),
    errors.MissingDependencyError: (ImportError, 2),
    errors.LockerMismatchError: (ValueError, 2),
    errors.StoreRootError: (NotADirectoryError, 1),
    errors.StoreFormatError: (ValueError, 1),
    errors.ModelNotFoundError: (FileNotFoundError, 3),
    errors.NoStoreError: (FileNotFoundError, 3),
    errors.OfflineError: (FileNotFoundError, 3),
    errors.DamagedRecordError: (FileNotFoundError, 3),
    errors.ModelInUseError: (BlockingIOError, 1),
    errors.ReadOnlyStoreError: (PermissionError, 4),
    errors.LockServiceError: (ConnectionError, 1),
    errors.LockTimeoutError: (TimeoutError, 5),
    errors.DownloadCancelledError: (InterruptedError, 1),
    errors.InsufficientSpaceError: (OSError, 6),
    errors.VolumeError: (OSError, 1),
    errors.SourceNotFoundError: (FileNotFoundError, 7),
    errors.SourceDeniedError: (PermissionError, 7),
    errors.SourceUnavailableError: (ConnectionError, 7),
    errors.SourceChangedError: (RuntimeError, 7),
    errors.DigestMismatchError: (ValueError, 7),
    errors.DamagedArchiveError: (ValueError, 7),
    errors.UnsafePathError: (ValueError, 8),
    errors.PolicyError: (PermissionError, 8),
}
# Facts that the message leaves out.
UNSAID = {(errors.DamagedRecordError, "root"), (errors.DamagedArchiveError, "expected")}
SAMPLES = {
    "str": "sample",
    "int": 70,
    "float": 1.5,
    "float | None": 2.5,
    "bool": True,
    "tuple[str, ...]": ("first", "second"),
}


def walk(cls: type[StoreError]) -> set[type[StoreError]]:
    return {
        found
        for child in cls.__subclasses__()
        if child.__module__ == errors.__name__
        for found in {child, *walk(child)}
    }


ERRORS = sorted(walk(StoreError), key=lambda cls: cls.__name__)


def sample(cls: type[StoreError], **wanted: object) -> StoreError:
    """
    An error with something in every field.
    """
    facts = {field.name: SAMPLES[field.type] for field in attrs.fields(cls)}
    return cls(**{**facts, **wanted})


every_error = pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)


def test_every_error_has_its_contract():
    """
    No error is without a line in the table above.
    """
    assert set(ERRORS) == set(CONTRACT)


@every_error
def test_an_error_is_the_builtin_a_caller_expects(cls):
    """
    Each error is a `StoreError` and also the builtin that code which knows nothing of stores would catch.
    """
    builtin, _ = CONTRACT[cls]

    assert issubclass(cls, StoreError)
    assert issubclass(cls, builtin)
    assert issubclass(cls, RuntimeError)  # As programs for KServe's storage library catch it.


@every_error
def test_an_error_has_its_exit_code(cls):
    """
    The exit code says what a script can do about it.
    """
    _, code = CONTRACT[cls]

    assert sample(cls).exit_code == code


def test_a_damaged_record_is_absence_and_damage_at_once():
    """
    Who asks whether a model is there and who looks after the volume both catch a damaged record.
    """
    assert {errors.ModelNotFoundError, errors.StoreFormatError} < set(errors.DamagedRecordError.__mro__)


@every_error
def test_an_error_crosses_processes(cls):
    """
    A pickled or copied error comes back with its type, its facts and its message.
    """
    error = sample(cls)

    copies = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)] + [
        copy.copy(error)
    ]

    assert [(type(c), c.fields, str(c), c.args) for c in copies] == [(cls, error.fields, str(error), error.args)] * len(
        copies
    )


@every_error
def test_an_error_offers_its_facts_by_name(cls):
    """
    Every field is an attribute and stands in `fields`, ready for a log or JSON.
    """
    error = sample(cls)

    assert error.fields == {field.name: SAMPLES[field.type] for field in attrs.fields(cls)}
    assert error.fields == {name: getattr(error, name) for name in error.fields}


@every_error
def test_a_message_is_one_line_without_loose_ends(cls):
    """
    The message is one line that repeats every text it was given and ends without punctuation.
    """
    texts = {field.name: f"<{field.name}>" for field in attrs.fields(cls) if field.type == "str"}

    message = str(sample(cls, **texts))

    assert message.isprintable()
    assert [name for name, text in texts.items() if text not in message and (cls, name) not in UNSAID] == []
    assert message[-1] not in ".;, "


# Every field that can hold text may hold what a remote or another tenant of the volume wrote.
UNTRUSTED = [
    (cls, field.name) for cls in ERRORS for field in attrs.fields(cls) if field.type in ("str", "tuple[str, ...]")
]


@pytest.mark.parametrize(
    ("cls", "name"), UNTRUSTED, ids=lambda value: value if isinstance(value, str) else value.__name__
)
def test_a_message_steers_no_terminal(cls, name):
    """
    Control and bidirectional characters in any text are escaped in the message, and kept as they are in the facts.
    """
    hostile = "\x1b[31m\r\nred\u202e"
    is_text = next(field.type for field in attrs.fields(cls) if field.name == name) == "str"

    value = hostile if is_text else (hostile,)

    error = sample(cls, **{name: value})

    assert str(error).isprintable()
    assert ("\\x1b[31m\\r\\nred\\u202e" in str(error)) == ((cls, name) not in UNSAID)
    assert error.fields[name] == value


def test_a_plain_store_error_steers_no_terminal():
    """
    The base of all errors escapes its message too.
    """
    assert str(StoreError("\x1b[31m\nred")) == "\\x1b[31m\\nred"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, ünïcode, 日本語", "plain text, ünïcode, 日本語"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\nb\tc\0", "a\\nb\\tc\\x00"),
        ("\u202e\u200b\u2028", "\\u202e\\u200b\\u2028"),
        ("\x9b", "\\x9b"),
        ("\ud800", "\\ud800"),
        ("\U000e0001", "\\U000e0001"),
        (5, "5"),
    ],
    ids=ascii,
)
def test_untrusted_text_is_shown_on_one_line(text, shown):
    """
    What a terminal could obey is escaped; what a person can read stays.
    """
    assert printable(text) == shown


@given(st.text(st.characters(), max_size=40))
def test_whatever_is_shown_is_printable(text):
    """
    No text at all, lone surrogates included, leaves a control character in what is shown.
    """
    assert printable(text).isprintable()


def test_an_insufficient_space_error_tells_a_quota_from_a_plan():
    """
    The message names the bytes that are needed, or says that a write did not fit if nobody knows how many.
    """
    planned, stopped = errors.InsufficientSpaceError("/mnt", 10, 7), errors.InsufficientSpaceError("/mnt", 0, 7)

    assert "has 7 B free and 10 B are needed; " in str(planned)
    assert "has 7 B free and the last write did not fit; " in str(stopped)


@pytest.mark.parametrize(("code", "is_quota"), [(errno.ENOSPC, False), (errno.EDQUOT, True)])
def test_what_is_used_up_is_called_by_its_name(tmp_path, code, is_quota):
    """
    Free bytes of the volume are no contradiction then, and enlarging the volume is not recommended.
    """
    error = Volume(tmp_path).failure("writing", PurePosixPath("x"), OSError(code, ""))

    assert ("a quota is used up" in str(error), "enlarge the volume" in str(error)) == (is_quota, not is_quota)


def test_an_error_shows_its_facts_to_a_developer():
    """
    The repr of an error names its class and every field.
    """
    assert repr(errors.ModelNotFoundError("s3://b/m", "/mnt")) == "ModelNotFoundError(ref='s3://b/m', root='/mnt')"
    assert repr(StoreError("why")) == "StoreError('why')"


@pytest.mark.parametrize("cls", [StoreError, *ERRORS], ids=lambda cls: cls.__name__)
def test_an_error_can_be_imported_from_the_package(cls):
    """
    Every error that may reach a caller has a public name.
    """
    assert getattr(kserve_pvc, cls.__name__) is cls
    assert cls.__name__ in kserve_pvc.__all__


def test_public_names_are_sorted_and_exist():
    """
    `__all__` is in order, holds no name twice, and each name is there.
    """
    names = kserve_pvc.__all__

    assert names == sorted(set(names))
    assert [name for name in names if not hasattr(kserve_pvc, name)] == []
