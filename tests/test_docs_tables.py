"""
Tables and numbers of the documentation, compared with the code.
"""

from __future__ import annotations

import argparse
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pages
import pytest
import shell

import kserve_pvc
from kserve_pvc import ModelStore, _defaults
from kserve_pvc._archive import members, unpack
from kserve_pvc._cli.parser import VERBS, make_parser
from kserve_pvc._cli.words import ALIASES
from kserve_pvc._download.tuning import Tuning
from kserve_pvc._format import log_entry, records
from kserve_pvc._source.contract import MAX_FILES, UnpackLimits
from kserve_pvc._source.retry import ATTEMPTS
from kserve_pvc.backends import _hf_settings, _ranges, hf, http
from kserve_pvc.backends._fsspec import filesystems, reading
from kserve_pvc.backends._http import wire

MIB = 2**20
COMMANDED = sorted(str(page.relative_to(pages.DOCS)) for page in pages.DOCS.rglob("*.md"))


def read(name: str) -> str:
    """
    Read a page with every run of white space as one blank, so that lines may break anywhere.
    """
    return " ".join((pages.DOCS / name).read_text().split())


def missing(name: str, *sentences: str) -> list[str]:
    """
    Find the sentences that a page does not have.
    """
    page = read(name)
    return [sentence for sentence in sentences if sentence not in page]


def test_limits_are_those_of_the_code():
    """
    The page of all limits has the numbers that the code has.
    """
    from kserve_pvc._archive import decompressed
    from kserve_pvc._format import file_names, json_size
    from kserve_pvc._model import _MOST_REREAD
    from kserve_pvc._source.ref import MAX_URI_BYTES
    from kserve_pvc.backends import _directories, _object_store, _pages, _xml, hf
    from kserve_pvc.kserve import _admission, _yaml

    assert (
        missing(
            "reference/limits.md",
            f"| files of a model | {MAX_FILES:,} |",
            f"| directories of a model | {file_names.MAX_DIRECTORIES:,} |",
            f"| levels of a name, the file included | {file_names.MAX_LEVELS} |",
            f"| {file_names.MAX_NAME_BYTES:,}, of one part {file_names.MAX_PART_BYTES} |",
            f"| a source URI | {MAX_URI_BYTES:,} bytes |",
            f"| {_pages.MAX_PAGES:,}; {_pages.MAX_EMPTY_PAGES:,} empty ones in a row |",
            f"| {_pages.MAX_TOKEN_BYTES // 1024} KiB, and none comes twice |",
            f"| {_object_store.MAX_PAGE_BYTES // MIB} MiB, within 60 s |",
            f"| one page of hf | {hf._MAX_ANSWER_BYTES // MIB} MiB, within 60 s |",
            f"| {_directories.MAX_LISTED_DIRECTORIES:,} |",
            f"in {json_size.BYTES_PER_MARK} bytes |",
            f"one tag in {_xml.BYTES_PER_TAG} bytes |",
            f"less than {Tuning().least_bytes_per_second // 1024} KiB a second for {Tuning().slow_seconds:.0f} s",
            f"| less than {Tuning().trickle_bytes // 1024} KiB in {_defaults.STALL_SECONDS:.0f} s",
            f"| entries | {UnpackLimits().entries:,},",
            f"| {decompressed.MAX_STREAMS:,}, and one for each KiB |",
            f"half written | {_MOST_REREAD} |",
            f"| 3 MiB, {_admission.MAX_VALUES:,} values, {_admission.MAX_DEPTH} levels |",
            f"| {_yaml._MAX_BYTES // MIB} MiB, and {_yaml.MAX_VALUES:,} values",
        )
        == []
    )
    assert _admission.MAX_BODY_BYTES == 3 * MIB


def test_limits_of_the_webhook_are_those_of_the_code():
    """
    The page of all limits has the seconds of the webhook's server.
    """
    pytest.importorskip("uvicorn", reason="the extra `webhook` is not installed")
    from kserve_pvc.kserve import _connections, _webhook

    assert _connections.HANDSHAKE_SECONDS == _connections.HEAD_SECONDS
    assert (
        missing(
            "reference/limits.md",
            f"| {_connections.HEAD_SECONDS:.0f} s each |",
            f"| the body of a request | {_webhook.BODY_SECONDS:.0f} s |",
            f"| {_connections.REQUEST_SECONDS:.0f} s |",
            f"| {_connections.KEEP_ALIVE_SECONDS} s |",
            f"| connections | {_connections.MAX_CONNECTIONS} |",
        )
        == []
    )


def test_limits_of_s3_are_those_of_the_code():
    """
    The page about S3 names the timeouts, attempts and limits that the code has.
    """
    pytest.importorskip("s3fs", reason="the extra `s3` is not installed")
    from kserve_pvc.backends import _object_store, _s3_settings, _s3fs

    stall, retry = f"{_defaults.STALL_SECONDS:.0f} s", f"{_defaults.RETRY_SECONDS:.0f} s"
    patience = _s3fs._PATIENCE
    attempts = patience["retries"]["total_max_attempts"]
    page = "how-to/s3.md"

    assert (
        missing(
            page,
            f"More than {MAX_FILES:,} files",
            f"| connecting, including the TLS handshake | {wire.CONNECT_SECONDS:.0f} s |",
            f"until the response begins | {stall} | {_ranges._ATTEMPTS}, within {retry} |",
            f"| {patience['connect_timeout']} s to connect, {patience['read_timeout']} s without data | {attempts} |",
            f"without {Tuning().trickle_bytes >> 10} KiB of progress | {stall} |",
            f"| {ATTEMPTS} without progress, within {retry} |",
            f"| up to {_object_store.MAX_MD5_BYTES // MIB} MiB, one part |",
            f"| over {Tuning().evidence_bytes // MIB} MiB, uploaded with",
        )
        == []
    )
    plain = _s3_settings.PLAIN_OPTIONS | {"endpoint_url", "region_name", "verify"}
    assert missing(page, *(f"`{name}`" for name in plain if name != "config_kwargs"), "`config_kwargs={") == []
    assert {name for name in _s3_settings.PLAIN_CLIENT if not name.startswith("aws_")} == {
        "endpoint_url",
        "region_name",
        "verify",
    }


def test_limits_of_gs_are_those_of_the_code():
    """
    The page about Google Cloud Storage names the attempts, limits and options that the code has.
    """
    pytest.importorskip("google.auth", reason="the extra `gs` is not installed")
    from kserve_pvc.backends import _object_store, gs
    from kserve_pvc.backends._login import google

    page = "how-to/gs.md"

    assert (
        missing(
            page,
            f"begins to arrive, {_ranges._ATTEMPTS} attempts within {_defaults.RETRY_SECONDS:.0f} s",
            f"MD5 of objects up to {_object_store.MAX_MD5_BYTES // MIB} MiB",
            f"Token services have a timeout of {google._TOKEN_SERVICE_SECONDS:.0f} s",
            f"scope `{google._SCOPE.rpartition('/')[2]}`",
        )
        == []
    )
    options = set(re.findall(r"^\| (`[a-z_]+.*?) \|", (pages.DOCS / page).read_text(), re.MULTILINE))
    assert {name for cell in options for name in re.findall(r"`([a-z_]+)[=`]", cell)} == {
        *gs._OPTIONS,
        gs._SESSION,
    }


def test_limits_of_azure_are_those_of_the_code():
    """
    The page about Azure names the attempts, limits, lifetimes and options that the code has.
    """
    pytest.importorskip("azure.identity", reason="the extra `azure` is not installed")
    from kserve_pvc.backends import _object_store
    from kserve_pvc.backends._login import azure as login

    page = "how-to/azure.md"
    seconds = (login._SIGNED_SECONDS, login._RENEW_SECONDS, login._TOKEN_SPARE_SECONDS)

    assert seconds == (3600, 1800, 300)
    assert missing(page, "for an hour", "After half an hour", "renewed five minutes before they expire") == []
    assert (
        missing(
            page,
            f"{_ranges._ATTEMPTS} attempts within {_defaults.RETRY_SECONDS:.0f} s",
            f"Up to {_object_store.MAX_MD5_BYTES // MIB} MiB",
            *(f"`{name}`" for name in login.OPTIONS),
        )
        == []
    )


def test_limits_of_http_and_archives_are_those_of_the_code():
    """
    The page about web servers names the endings, limits and redirects that the code has.
    """
    limits, harmless = UnpackLimits(), members._HARMLESS_BYTES // MIB
    page = "how-to/http.md"

    assert (limits.size_bytes, http._MAX_HOPS) == (2**40, 5)
    assert (
        missing(
            page,
            *(f"`{ending}`" for ending in unpack._EXTENSIONS),
            f"| `entries` | {limits.entries:,}, including directories |",
            "| `size_bytes` | 1 TiB in total |",
            f"| `ratio` | {limits.ratio:.0f} times the size of the archive; not checked up to {harmless} MiB |",
            f"| `path_bytes` | {limits.path_bytes:,} for one name |",
            f"window of more than {2**unpack._WINDOW_LOG // MIB} MiB",
            "Redirects are followed, at most five",
        )
        == []
    )


def test_numbers_of_the_hub_and_of_fsspec_are_those_of_the_code():
    """
    The pages about the Hub and fsspec name the endpoint, redirects, pieces and protocols that the code has.
    """
    protocols = filesystems.WHOLE - {"jlab"}

    assert hf._MAX_HOPS == 5
    assert (
        missing("how-to/huggingface.md", f"else `{_hf_settings._HUB}`", "at most five in a row", f"`{hf._BLOB}554:…`")
        == []
    )
    assert (
        missing(
            "how-to/fsspec.md",
            f"pieces of {reading.PIECE_BYTES // MIB} MiB",
            *(f"`{protocol}`" for protocol in protocols),
        )
        == []
    )
    assert {"simplecache", "filecache", "reference", "dir"} <= filesystems.WRAPPERS


def test_defaults_of_the_api_are_those_of_the_code():
    """
    The table of download parameters has the defaults of the signatures.
    """
    calls = {"ensure": ModelStore.ensure, "ModelStore": ModelStore}
    rows = re.findall(
        r"^\| `(\w+)` \| `(\w+)` \| `?(\w+)`? \|", (pages.DOCS / "reference/api.md").read_text(), re.MULTILINE
    )

    defaults = [(name, call, inspect.signature(calls[call]).parameters[name].default) for name, call, _ in rows]

    assert [(name, call, value if isinstance(value, str) else f"{value:.0f}") for name, call, value in defaults] == rows
    assert len(rows) == 5


def options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """
    Find the options of a parser and of the verbs below it.
    """
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from options(verb)
        elif action.option_strings:
            yield action


def test_options_of_the_command_line_are_those_of_the_parser():
    """
    The page about the command line names every option, no other, and the defaults of the numbers.
    """
    page = (pages.DOCS / "reference/cli.md").read_text()
    known = {name for action in options(make_parser()) for name in action.option_strings}
    verbs = next(action.choices for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction))
    numbers = {
        action.option_strings[0]: f"{action.default:g}"
        for action in options(verbs["ensure"])
        if isinstance(action.default, (int, float)) and action.type
    }

    assert {name for name in known if name not in page} == set()
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", page)) - known == set()
    assert dict(re.findall(r"^\| `ensure (--[a-z-]+) [A-Z]+` \|.*\| (\d+) \|$", page, re.MULTILINE)) == numbers


def test_verbs_in_the_how_to_are_those_of_the_parser():
    """
    The table of verbs on the page about the shell has every verb.
    """
    page = read("how-to/shell.md")

    assert [verb for verb in VERBS if f"| `{verb}" not in page] == []
    assert [alias for alias, verb in ALIASES.items() if f"`{alias}` for `{verb}`" not in page] == []


def commands() -> Iterator[tuple[str, str]]:
    """
    Find the commands of this package in consoles, without variables before them and redirections behind them.
    """
    for page in [pages.ROOT / "README.md", *sorted(pages.DOCS.rglob("*.md"))]:
        for block in pages.read_blocks(page):
            for line in re.findall(r"^\$ (.*)$", block.text, re.MULTILINE) if block.kind == "console" else []:
                for command in re.findall(
                    r"(?:^|[ (])kserve-pvc (?!.*kserve-pvc )([^|)>]*)", re.sub(r"pip install .*", "", line)
                ):
                    yield str(page.relative_to(pages.ROOT)), command


@pytest.mark.parametrize(("name", "command"), sorted(set(commands())))
def test_commands_on_pages_are_understood(name, command):
    """
    The command line understands each command that a page shows.
    """
    arguments = shlex.split(command.partition(" && ")[0], comments=True)

    assert make_parser().parse_args(arguments) is not None


def test_options_in_sentences_are_those_of_the_parser():
    """
    Commands of this package inside of sentences have no options that the command line does not know.
    """
    known = {name for action in options(make_parser()) for name in action.option_strings}
    spans = [(name, span) for name in COMMANDED for span in re.findall(r"`kserve-pvc ([^`]+)`", read(name))]

    unknown = [(name, span) for name, span in spans if set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", span)) - known]

    assert (len(spans) > 20, unknown) == (True, [])


def test_errors_are_those_of_the_code():
    """
    The table of errors has every error with its built-in bases and its exit code.
    """
    page = {}
    for line in (pages.DOCS / "reference/errors.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 4 and cells[0].strip("`") in kserve_pvc.__all__:
            page[cells[0].strip("`")] = ({base.strip(" `") for base in cells[1].split(",")}, int(cells[2]))
    errors = {
        name: getattr(kserve_pvc, name)
        for name in kserve_pvc.__all__
        if name.endswith("Error") and name != "StoreError"
    }

    assert page == {
        name: ({base.__name__ for base in error.__bases__} - {"StoreError"}, error.exit_code)
        for name, error in errors.items()
    }


@pytest.mark.parametrize(
    ("record", "heading"),
    {
        "LogEntry": "### Log record",
        "Manifest": "### Manifest",
        "Claim": "### Claim",
        "ReaderLease": "### Reader",
        "Beat": "### Beat",
        "PartNote": "### Journal",
        "Holder": "### Holder",
        "StoreSettings": "## Settings",
    }.items(),
)
def test_fields_on_the_volume_are_those_of_the_code(record, heading):
    """
    The page about the format names the fields of each record, and no others.
    """
    section = (pages.DOCS / "reference/format.md").read_text().split(f"\n{heading}", 1)[1].split("\n#", 1)[0]

    fields = {
        field for cell in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for field in re.findall(r"`(\w+)`", cell)
    }

    kind = getattr(log_entry, record, None) or getattr(records, record)
    assert fields - {"format"} == {field.name for field in kind.__attrs_attrs__}


@pytest.fixture
def documents(tmp_path: Path, root: Path) -> dict[str, object]:
    """
    What each verb prints with `--json`, for a store with one model.
    """
    model, bundle, catalogue = tmp_path / "model", tmp_path / "model.tar", tmp_path / "catalogue.txt"
    model.mkdir()
    (model / "config.json").write_text("{}")
    uri = f"file://{model}"
    catalogue.write_text(f'# all\n\n{uri}\n{{"uri": "file:///not/there"}}\ns3://key:secret@bucket/m\n')
    ModelStore(root, mode="rw", lease_seconds=1)
    calls = {
        "ensure": ["ensure", uri],
        "path": ["path", uri],
        "ls": ["ls"],
        "info": ["info", uri],
        "plan": ["plan", uri],
        "verify": ["verify", uri, "--full"],
        "export": ["export", uri, str(bundle)],
        "import": ["import", str(bundle)],
        "warm": ["warm", "-f", str(catalogue), "--workers", "2"],
        "doctor": ["doctor"],
        "rm": ["rm", uri],
        "any error": ["rm", uri],
    }
    return {verb: shell.document(shell.kserve_pvc(root, "--json", *arguments)) for verb, arguments in calls.items()}


def test_json_documents_are_those_of_the_page(documents):
    """
    The table of JSON documents has the fields of each verb in their order, and those inside of lists.
    """
    table = dict(
        re.findall(r"^\| (.*?) \| (.*\{.*\}.*) \|$", (pages.DOCS / "how-to/shell.md").read_text(), re.MULTILINE)
    )
    told = {name: cell for cells, cell in table.items() for name in re.sub("`", "", cells).split(", ")}

    def shape(document):
        first = document[0] if isinstance(document, list) else document
        return f"{{{', '.join(first)}}}"

    found = {verb: shape(document) for verb, document in documents.items()}
    verify, info, error = documents["verify"], documents["info"], documents["any error"]
    found["verify"] = f"{{ok, models: [{shape(verify['models'])[:-1]}: [{{path, kind, detail}}]}}]}}"
    found["any error"] = "{error: {type, message, …}}"

    assert [(verb, fields) for verb, fields in found.items() if f"`{fields}`" not in told[verb]] == []
    assert shape(info["files"]) in told["info"]
    assert list(error["error"])[:2] == ["type", "message"]


def test_results_of_warm_are_those_of_the_page(documents):
    """
    Each line of a file has one result: present, failed, or without a key because it is no request.
    """
    results = [
        (one["ok"], one["status"], one["key"] is None, (one["error"] or {}).get("type")) for one in documents["warm"]
    ]

    assert results == [
        (True, "present", False, None),
        (False, None, False, "SourceNotFoundError"),
        (False, None, True, "PolicyError"),
    ]
