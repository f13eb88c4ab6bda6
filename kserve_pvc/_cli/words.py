"""
The words of the command line: other names of verbs, what is meant by a word that is none, and examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

# Other names of verbs, which work as well.
ALIASES: Mapping[str, str] = {"list": "ls", "remove": "rm", "download": "ensure"}
# Words of other tools, and the verb that is probably meant.
_SYNONYMS: Mapping[str, str] = {
    **dict.fromkeys(("add", "fetch", "get", "install", "pull", "sync"), "ensure"),
    **dict.fromkeys(("del", "delete", "erase", "evict", "prune", "uninstall"), "rm"),
    **dict.fromkeys(("check", "fsck", "validate"), "verify"),
    **dict.fromkeys(("describe", "inspect", "show", "stat"), "info"),
    **dict.fromkeys(("preload", "prefetch"), "warm"),
    **dict.fromkeys(("where", "which"), "path"),
    **dict.fromkeys(("lock", "unlock", "claims"), "locks"),
    **dict.fromkeys(("diagnose", "test", "probe"), "doctor"),
    "dir": "ls",
    **dict.fromkeys(("df", "size", "usage"), "du"),
    **dict.fromkeys(("create", "mkfs", "new"), "init"),
    "models": "ls",
    "tag": "alias",
    "link": "alias",
    "save": "export",
    "load": "import",
    "initializer": "initialize",
    "patch": "kserve",
}
EXAMPLES: Mapping[str, Sequence[str]] = {
    "ensure": (
        "ensure s3://bucket/llama-3-8b",
        "ensure hf://org/model --revision 5c97e3b9 --allow '*.safetensors'",
    ),
    "warm": ("warm s3://bucket/a s3://bucket/b --workers 2", "warm -f models.txt"),
    "path": ("path s3://bucket/llama-3-8b",),
    "ls": ("ls", "ls --json"),
    "du": ("du", "du --json"),
    "init": ("init", "init --locker flock"),
    "info": ("info s3://bucket/llama-3-8b",),
    "plan": ("plan s3://bucket/llama-3-8b", "plan --refresh s3://bucket/llama-3-8b"),
    "verify": ("verify --all", "verify --full s3://bucket/llama-3-8b"),
    "rm": ("rm s3://bucket/llama-3-8b",),
    "alias": ("alias llama s3://bucket/llama-3-8b", "alias --drop llama", "alias"),
    "export": ("export s3://bucket/llama-3-8b llama.tar",),
    "import": ("import llama.tar", "import llama.tar --sha256 $(sha256sum < llama.tar | head -c 64)"),
    "locks": ("locks", "locks --break s3://bucket/llama-3-8b"),
    "doctor": ("doctor", "doctor /mnt/new --peer test-1"),
    "initialize": ("initialize s3://bucket/model /mnt/models",),
    "kserve": ("kserve patch -f service.yaml --claim models",),
    "webhook": ("webhook --policy policy.yaml --tls-cert tls.crt --tls-key tls.key",),
    "completion": ("completion bash > completion.bash",),
}


def format_examples(verbs: Iterable[str]) -> str:
    """
    Return what to type, one example a line, for the end of a help text.
    """
    return "\n".join(["examples:", *(f"  kserve-pvc {line}" for verb in verbs for line in EXAMPLES[verb])])


def say_unknown(kind: str, word: str, known: Iterable[str]) -> str:
    """
    Say that a word is unknown, and which one was probably meant, or which ones there are.

    Args:
        kind: What the word should name, such as `verb`.
    """
    from difflib import get_close_matches

    names = [name for name in known if name not in ALIASES]
    meant = {name: verb for name, verb in {**_SYNONYMS, **ALIASES}.items() if verb in names} | {n: n for n in names}
    near = get_close_matches(word.lower(), meant, n=1)
    if near:
        return f"unknown {kind} `{word}`; did you mean `{meant[near[0]]}`?"
    return f"unknown {kind} `{word}`; there are {', '.join(f'`{name}`' for name in names)}"
