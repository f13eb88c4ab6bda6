"""
The arguments of the storage initializer: pairs as KServe passes them, and a few options that KServe does not pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from kserve_pvc.errors import SettingsError, printable, unknown_option

USAGE = "usage: kserve-pvc-initializer SRC DEST [SRC DEST ...]"
HELP = f"""{USAGE}

Put models into directories, as KServe's storage initializer does: complete, verified, and through a shared store if
there is one.

arguments:
  SRC          source of a model, such as s3://bucket/model, hf://org/model or pvc://claim/path
  DEST         directory to fill

options:
  --store DIR  store to download into, so that others find the model there (default: KSERVE_PVC_STORE, else the store
               that holds DEST, else none)
  -q, --quiet  print errors only
  -h, --help   print this help and exit
  --version    print the version and exit

environment:
  KSERVE_PVC_STORE              as --store
  KSERVE_PVC_DESTINATION        what DEST is: auto, private or store (default: auto)
  KSERVE_PVC_MATERIALIZE        how files get from a store into DEST: auto, reflink, link, copy, symlink (default: auto)
  KSERVE_PVC_TIMEOUT            seconds to wait for another downloader (default: 3600)
  KSERVE_PVC_OFFLINE            1 uses no network (default: 0)
  STORAGE_ALLOW_PATTERNS, STORAGE_IGNORE_PATTERNS, STORAGE_CONFIG, AWS_*, HF_* and others are those of KServe.

The exit code is 0 if every directory is complete, and 1 otherwise.

example:
  kserve-pvc-initializer --store /mnt/store hf://org/model /mnt/models
"""


@attrs.frozen(kw_only=True)
class Arguments:
    """
    What one run of the initializer was given.

    Args:
        pairs: Sources and directories.
        text: What is to be printed instead of running.
    """

    pairs: tuple[tuple[str, str], ...] = ()
    store: str | None = None
    is_quiet: bool = False
    text: str = ""


def read_arguments(argv: Sequence[str], version: str) -> Arguments:
    """
    Tell options from pairs. Options are accepted before, between and after the pairs, and `--` ends them.

    Raises:
        SettingsError: An option is unknown, its value is missing, or the rest are not pairs. What begins with a dash is
            an option: no source begins so, and a directory can be written `./-x`.
    """
    words, store, is_quiet = list[str](), None, False
    waiting = list(reversed(argv))
    while waiting:
        word = waiting.pop()
        name, equals, value = word.partition("=")
        if word == "--":
            words += reversed(waiting)
            break
        if name == "--store":
            store = value if equals else waiting.pop() if waiting else ""
            if not store or store.startswith("-"):
                raise SettingsError("--store", "", "name the directory of a store")
        elif word in ("-h", "--help"):
            return Arguments(text=HELP)
        elif word == "--version":
            return Arguments(text=f"kserve-pvc-initializer {version}\n")
        elif word in ("-q", "--quiet"):
            is_quiet = True
        elif word.startswith("-"):
            raise unknown_option("option", printable(name), ("--store", "--quiet", "--help", "--version"), USAGE)
        else:
            words.append(word)
    if len(words) < 2 or len(words) % 2:
        raise SettingsError("SRC DEST", "", f"expected pairs of a source and a directory, got {len(words)}; {USAGE}")
    pairs = tuple(zip(words[::2], words[1::2], strict=True))
    return Arguments(pairs=pairs, store=store, is_quiet=is_quiet)
