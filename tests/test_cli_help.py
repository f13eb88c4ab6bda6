"""
What the command line says about itself, and about words that it does not know.
"""

from __future__ import annotations

import argparse
import os
import re
import signal

import pytest
from trees import write_files

from kserve_pvc import ModelStore
from kserve_pvc._cli.main import main
from kserve_pvc._cli.parser import VERBS, make_parser
from kserve_pvc._cli.words import ALIASES, EXAMPLES


@pytest.fixture
def run(root, monkeypatch, capsys):
    """
    Run a command in this process, and return its exit code, its output and its errors.
    """
    for name in [name for name in os.environ if name.startswith("KSERVE_PVC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "80")
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        try:
            code = main([*arguments])
        except SystemExit as leaving:
            code = leaving.code
        return code, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, handler)


def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """
    The parsers of all verbs and actions.
    """
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                found += [below, *parsers(below)]
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_examples(run, verb):
    """
    The help of a verb ends with commands that can be typed, within eighty columns.
    """
    code, out, _ = run(verb, "--help")

    examples = out.partition("examples:\n")[2].splitlines()
    assert (code, [line.strip() for line in examples]) == (0, [f"kserve-pvc {line}" for line in EXAMPLES[verb]])
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("verb", VERBS)
def test_the_examples_are_understood(verb):
    """
    What a help text shows can be parsed.
    """
    for example in EXAMPLES[verb]:
        words = re.split(r" [>|]", example.replace("$(sha256sum < llama.tar | head -c 64)", "0" * 64))[0].split()

        assert make_parser().parse_args(words).verb == verb


def test_each_option_with_a_value_says_what_holds_without_it():
    """
    The help of an option names its default, or that there is none.
    """
    silent = {
        (parser.prog, option.option_strings[-1])
        for parser in parsers(make_parser())
        for option in parser._actions
        if option.option_strings and option.nargs != 0 and not re.search(r"default: |required", option.help or "")
    }

    assert silent == set()


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("lst", "ls"),
        ("LS", "ls"),
        ("enusre", "ensure"),
        ("removee", "rm"),
        ("delete", "rm"),
        ("show", "info"),
        ("pull", "ensure"),
        ("check", "verify"),
        ("load", "import"),
    ],
)
def test_an_unknown_verb_is_answered_with_the_one_that_was_meant(run, word, meant):
    """
    Misspelled verbs and those of other tools are a usage error with one suggestion.
    """
    code, out, err = run(word, "s3://bucket/model")

    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == (
        f"kserve-pvc: unknown verb `{word}`; did you mean `{meant}`? see `kserve-pvc --help`"
    )


def test_a_word_like_no_verb_is_answered_with_all_of_them(run):
    """
    Where nothing is similar, the verbs are listed, without their other names.
    """
    last = run("xyzzy")[2].splitlines()[-1]

    assert [verb for verb in VERBS if f"`{verb}`" not in last] == []
    assert [alias for alias in ALIASES if f"`{alias}`" in last] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["ensure", "--refesh", "s3://b/m"],
            "unknown option `--refesh`; did you mean `--refresh`? see `kserve-pvc ensure",
        ),
        (["ensure", "--max-worker=3", "--timeot=3", "s3://b/m"], "`--timeot`; did you mean `--timeout`?"),
        (["kserve", "patch", "--subpath", "x"], "`--subpath`; did you mean `--sub-path`? see `kserve-pvc kserve patch"),
        (["kserve", "pach"], "unknown action `pach`; did you mean `patch`?"),
        (["completion", "zhs"], "unknown shell `zhs`; did you mean `zsh`?"),
        (["ls", "--xyzzy"], "unknown option `--xyzzy`; there are `-h`, `--help`, `--store`,"),
        (["rm", "s3://b/m", "s3://key:canary@b/n"], "unexpected argument `s3://"),
    ],
)
def test_an_unknown_argument_is_answered_where_it_is(run, words, said):
    """
    Options and other words of a verb have suggestions of that verb, and secrets in them are not repeated.
    """
    code, _, err = run(*words)

    assert (code, said in err.splitlines()[-1], "canary" in err) == (2, True, False)


def test_other_names_of_verbs_do_the_same(run, root, tmp_path):
    """
    `download`, `list` and `remove` are `ensure`, `ls` and `rm`, and may write as these.
    """
    write_files(tmp_path / "origin", {"a.bin": b"a"})
    uri, store = f"file://{tmp_path}/origin", ["--store", str(root)]

    downloaded = run("download", uri, *store)
    listed = run(*store, "list"), run(*store, "ls")
    removed = run("remove", uri, *store)

    assert (downloaded[0], removed[0], listed[0]) == (0, 0, listed[1])
    assert uri in listed[0][1]
    assert uri not in ModelStore(root)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "kserve-pvc: removed URI; its files are kept in the trash for 5 minutes, `--now` deletes them\n"),
        (["--now"], "kserve-pvc: removed URI\n"),
        (["-q"], ""),
        (["--json"], ""),
    ],
)
def test_a_removal_says_so(run, root, tmp_path, options, said):
    """
    `rm` names what it removed and what becomes of the files, on stderr.
    """
    write_files(tmp_path / "origin", {"a.bin": b"a"})
    uri = f"file://{tmp_path}/origin"
    ModelStore(root, mode="rw").ensure(uri, progress=False)

    code, _, err = run("--store", str(root), "rm", uri, *options)

    assert (code, err) == (0, said.replace("URI", uri))
