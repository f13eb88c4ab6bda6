"""
The rule for options that all schemes share: fsspec's configuration, tables of reasons, and misspelled names.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from typing import Any

import fsspec
import pytest

from kserve_pvc import SettingsError
from kserve_pvc.backends._options import (
    Reason,
    Rule,
    check_options,
    configured_options,
    explain,
    find_reasons,
    fsspec_configuration,
    log_access,
    options_beyond,
    read_settings,
    variables,
)

READ_BY_FSSPEC = """
import json, fsspec.config
class FS: protocol = ("s3", "s3a")
print(json.dumps(fsspec.config.apply_config(FS, {})))
"""


@pytest.mark.parametrize(
    ("files", "environ"),
    [
        ({"conf.json": '{"s3": {"endpoint_url": "http://a", "anon": true}, "gs": {"token": "t"}}'}, {}),
        ({"conf.ini": "[s3]\nendpoint_url = http://a\nanon = true\n"}, {}),
        (
            {"a.json": '{"s3": {"key": "1"}}', "b.json": '{"s3": {"key": "2"}, "s3a": {"secret": "x"}}'},
            {},
        ),
        ({}, {"FSSPEC_S3_ENDPOINT_URL": "http://b", "FSSPEC_S3": '{"anon": true, "endpoint_url": "http://c"}'}),
        ({"conf.json": '{"s3": {"key": "1", "secret": "x"}}'}, {"FSSPEC_S3_KEY": "2", "FSSPEC_S3A_KEY": "3"}),
        ({}, {"FSSPEC_S3": "[1]", "FSSPEC__S3": "{}", "FSSPEC_": "x", "FSSPEC": "y"}),
        ({}, {}),
    ],
)
@pytest.mark.parametrize("is_named", [True, False])
def test_the_configuration_is_what_fsspec_would_apply(tmp_path, files, environ, is_named):
    """
    Files and variables amount to the arguments that fsspec gives to a class in a process of its own.
    """
    place = tmp_path / ("elsewhere" if is_named else ".config/fsspec")
    place.mkdir(parents=True)
    for name, text in files.items():
        (place / name).write_text(text)
    environ = {"HOME": str(tmp_path), **environ, **({"FSSPEC_CONFIG_DIR": str(place)} if is_named else {})}
    fsspecs = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ_BY_FSSPEC], env=environ, capture_output=True, check=True
    )

    assert fsspec_configuration("s3", environ) == json.loads(fsspecs.stdout)


def test_nothing_is_imported_to_find_nothing(tmp_path):
    """
    Without files and variables fsspec is not loaded, which takes longer than a small request.
    """
    script = (
        "import sys; from kserve_pvc.backends._options import fsspec_configuration as f; "
        "print(f('s3'), 'fsspec' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], env={"HOME": str(tmp_path)}, capture_output=True, text=True, check=True
    )

    assert done.stdout == "{} False\n"


def test_what_a_program_configures_counts(monkeypatch, tmp_path):
    """
    Arguments that a program put into `fsspec.config.conf` are applied, below variables, as fsspec applies them.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FSSPEC_S3_KEY", "of the environment")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"key": "of the program", "anon": True})

    assert fsspec_configuration("s3") == {"key": "of the environment", "anon": True}


@pytest.mark.parametrize(("name", "text"), [("a.json", "{"), ("a.json", '{"s3": 1}'), ("a.ini", "no section")])
def test_a_malformed_file_is_named(tmp_path, name, text):
    """
    A configuration that fsspec would fail to import with is an error that says where it lies.
    """
    (tmp_path / name).write_text(text)

    with pytest.raises(SettingsError, match=str(tmp_path)):
        fsspec_configuration("s3", {"FSSPEC_CONFIG_DIR": str(tmp_path)})


RULES = (
    Rule(configured_options, "is set in fsspec's configuration"),
    Rule(options_beyond({"key", "client_kwargs"}), "is known to the class only"),
    Rule(options_beyond({"verify"}, "client_kwargs"), "is known to the SDK only"),
    Rule(variables("AWS_PROFILE"), "names a profile"),
)


@pytest.mark.parametrize(
    ("options", "environ", "expected"),
    [
        ({"key": "k", "client_kwargs": {"verify": False}, "use_listings_cache": True}, {"AWS_PROFILE": ""}, []),
        ({"kez": 1, "abc": 2}, {}, ["`abc` is known to the class only", "`kez` is known to the class only"]),
        ({"client_kwargs": {"use_ssl": 1}}, {}, ["`client_kwargs.use_ssl` is known to the SDK only"]),
        ({"client_kwargs": "text"}, {}, ["`client_kwargs` is known to the SDK only"]),
        ({"client_kwargs": None}, {}, []),
        ({}, {"AWS_PROFILE": "work"}, ["`AWS_PROFILE` names a profile"]),
        ({}, {"FSSPEC_S3_KEY": "k"}, ["`key` is set in fsspec's configuration"]),
        ({"key": "k"}, {"FSSPEC_S3_KEY": "other"}, []),
    ],
)
def test_reasons_name_settings(options, environ, expected):
    """
    Each row of a table names the settings it finds, and an option that overrides the configuration is plain.
    """
    settings = read_settings("s3", options, {"HOME": "/none", **environ})

    assert [*map(str, find_reasons(RULES, settings))] == expected


def test_a_scheme_without_a_table_has_no_reasons():
    """
    What no fsspec class serves is never explained by one.
    """
    assert explain("pvc", {"claims": {}}, {}) == ()


def test_the_way_is_logged_without_values(caplog):
    """
    The log says which way a scheme takes and names the settings, and has them as fields.
    """
    with caplog.at_level(logging.DEBUG, "kserve_pvc"):
        log_access("s3", "direct:s3fs", [Reason("AWS_PROFILE", "names a profile")])

    (record,) = caplog.records
    assert record.getMessage() == "s3:// is read by direct:s3fs: `AWS_PROFILE` names a profile"
    assert (record.access, record.reasons) == ("direct:s3fs", ["`AWS_PROFILE` names a profile"])


class Base:
    def __init__(self, *args: Any, base: int = 0, **more: Any) -> None: ...


class Open(Base):
    def __init__(self, own: int = 0, **kwargs: Any) -> None: ...


class Closed(Base):
    def __init__(self, own: int = 0) -> None: ...


def passed_on(*, sink: int = 0) -> None: ...


@pytest.mark.parametrize(
    ("name", "targets", "near"),
    [
        ("tokn", [Open], "token"),
        ("bse", [Open], "base"),
        ("base", [Closed], None),
        ("sinc", [Open, passed_on], "sink"),
        ("self", [Open], None),
        ("kwargs", [Open], None),
    ],
)
def test_a_misspelled_option_names_the_near_match(name, targets, near):
    """
    An option that neither we nor the class know is an error, whatever the class would do with it.
    """
    with pytest.raises(SettingsError) as caught:
        check_options("gs", {name: 1, "token": None, "loop": None}, {"token"}, lambda: targets)

    assert name in str(caught.value)
    assert (f"did you mean `{near}`?" in str(caught.value)) == (near is not None)
    assert "`token`" in str(caught.value)


@pytest.mark.parametrize("name", ["own", "base", "sink", "max_paths"])
def test_what_the_class_accepts_is_allowed(name):
    """
    Parameters of the class, of its bases, and of what its keyword arguments go to are options.
    """
    check_options("gs", {name: 1}, (), lambda: [Open, passed_on])


def test_the_class_is_not_loaded_for_known_options():
    """
    The import is only paid for by an option that is not plain; without the package it is an unknown one.
    """
    loaded = []
    check_options("gs", {"token": 1, "loop": None}, {"token"}, lambda: loaded.append(1) or ())

    def missing() -> list[Any]:
        raise ImportError

    with pytest.raises(SettingsError, match="did you mean `token`"):
        check_options("gs", {"tokn": 1}, {"token"}, missing)
    assert loaded == []
