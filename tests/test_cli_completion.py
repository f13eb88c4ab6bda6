"""
Completion scripts, in real shells.
"""

import argparse
import shlex
import shutil
import subprocess
import sys

import pytest

from kserve_pvc._cli.completion import make_script
from kserve_pvc._cli.main import main

pytest.importorskip("shtab", reason="`shtab` is not installed, which makes the completion scripts")

# What stands before Tab, and the word that it becomes.
TYPED = {
    "kserve-pvc ver": "verify",
    "kserve-pvc ensure --ref": "--refresh",
    "kserve-pvc verify --fu": "--full",
    "kserve-pvc --js": "--json",
    "kserve-pvc kserve pa": "patch",
    "kserve-pvc kserve patch --cl": "--claim",
    "kserve-pvc completion f": "fish",
    "kserve-pvc --store vol": "volume",
    "kserve-pvc import mod": "model.tar",
}


def complete_in_bash(script, line, directory):
    words = line.split(" ")
    return run(
        ["bash", "--norc", "-c"],
        f"""
        source {script}
        compopt() {{ :; }}  # Works only while bash itself completes.
        COMP_WORDS=({line}) COMP_CWORD={len(words) - 1} COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)}
        _shtab_kserve_pvc
        printf '%s\\n' "${{COMPREPLY[@]}}"
        """,
        directory,
    )


def complete_in_zsh(script, line, directory):
    # Only an interactive zsh completes, so it gets a terminal. Ctrl-X writes the line as it is after Tab.
    found = directory / "line"
    functions = script.parent / "functions"
    functions.mkdir()
    script.rename(functions / "_kserve-pvc")
    run(
        ["zsh", "-f", "-c"],
        f"""
        zmodload zsh/zpty
        zpty shell zsh -f -i
        zpty -w shell 'tell() {{ print -r -- $BUFFER > {found}; exit }}; zle -N tell; bindkey "^X" tell'
        zpty -w shell 'fpath=({functions} $fpath); autoload -Uz compinit && compinit -D -u; print READ""Y'
        zpty -r shell output '*READY*'
        zpty -w -n shell {shlex.quote(line)}$'\\t\\x18'
        zpty -r shell output '*never*'
        """,
        directory,
    )
    return found.read_text().split()[-1]


def complete_in_fish(script, line, directory):
    offered = run(["fish", "--no-config", "-c"], f"source {script}; complete -C {shlex.quote(line)}", directory)
    return "\n".join(entry.partition("\t")[0] for entry in offered.splitlines())


def run(command, program, directory):
    environ = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(directory), "TERM": "dumb", "LANG": "C.UTF-8"}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    return subprocess.run([*command, program], cwd=directory, env=environ, text=True, timeout=60, **streams).stdout


SHELLS = {"bash": complete_in_bash, "zsh": complete_in_zsh, "fish": complete_in_fish}


@pytest.fixture(params=SHELLS)
def shell(request):
    """
    The name of a shell that is installed.
    """
    if shutil.which(request.param) is None:
        pytest.skip(f"`{request.param}` is not installed")
    return request.param


@pytest.fixture
def directory(tmp_path):
    """
    A directory of the user with one directory and one file.
    """
    directory = tmp_path / "work"
    (directory / "volume").mkdir(parents=True)
    (directory / "model.tar").touch()
    return directory


@pytest.mark.parametrize("typed", TYPED)
def test_a_shell_completes(shell, directory, tmp_path, capsys, typed):
    """
    bash, zsh and fish complete verbs, options, directories and files.
    """
    assert main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)

    assert SHELLS[shell](script, typed, directory).rstrip("/\n") == TYPED[typed]


def test_help_texts_are_not_executed(shell, directory, tmp_path):
    """
    Substitutions in the help of an option stay text in every shell.
    """
    parser = argparse.ArgumentParser(prog="kserve-pvc")
    parser.add_argument("--full", action="store_true", help="`touch executed` $(touch executed) (touch executed)")
    script = tmp_path / "script"
    script.write_text(make_script(parser, shell))

    completed = SHELLS[shell](script, "kserve-pvc --fu", directory)

    assert completed.strip() == "--full"
    assert not list(tmp_path.glob("**/executed"))


def test_without_shtab_the_extra_is_named(monkeypatch, capsys):
    """
    Where shtab is not installed, `completion` ends as a usage error that names the extra.
    """
    monkeypatch.setitem(sys.modules, "shtab", None)

    assert main(["completion", "bash"]) == 2
    assert "kserve-pvc[completion]" in capsys.readouterr().err


def test_another_shell_is_a_usage_error(capsys):
    """
    A shell without a completion script is refused before anything is printed.
    """
    with pytest.raises(SystemExit) as stopped:
        main(["completion", "powershell"])

    output = capsys.readouterr()
    assert (stopped.value.code, output.out) == (2, "")
    assert "powershell" in output.err
