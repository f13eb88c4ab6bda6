"""
The services that the conformance suite tests against, and the files that it puts there.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Mapping
from typing import Any, Protocol

PART_BYTES = 100_000

LEASE_SECONDS = 2.0

FILES = {
    "config.json": b'{"layers": 2}',
    "weights/a.bin": random.Random(1).randbytes(350_003),
    "weights/deep/er/b.bin": random.Random(2).randbytes(1000),
}

WEIGHTS = random.Random(3).randbytes(700_003)

REPLACEMENT = random.Random(4).randbytes(len(WEIGHTS))

# Unusual but harmless names: each must be kept unchanged, unless the service cannot store it.
ODD_NAMES = {
    "blank": "a b",
    "plus": "a+b",
    "percent": "100%25",
    "encoded-slash": "a%2Fb",
    "hash": "a#b",
    "question-mark": "what?.txt",
    "quotes": 'it\'s "quoted"',
    "ampersand": "a&b=c;d,e",
    "brackets": "(1) [2] {3}",
    "star": "a*b",
    "tilde": "~x",
    "colon": "layer:0",
    "exclamation": "a!/b$@",
    "leading-dot": ".hidden/.x",
    "dash": "-dash",
    "composed": unicodedata.normalize("NFC", "café"),
    "decomposed": unicodedata.normalize("NFD", "café"),
    "other-scripts": "日本語/模型🦄.bin",
    "long": "n" * 255,
    "deep": "/".join("d" * 30 for _ in range(20)),
}

# Names that would leave the model, mislead a reader, or not be stored faithfully on every volume.
HOSTILE_NAMES = {
    "climbs": ("../escape",),
    "climbs-inside": ("a/../../escape",),
    "dot-part": ("a/./b",),
    "newline": ("a\nb",),
    "bell": ("a\x07b",),
    "escape-sequence": ("a\x1b[31mb",),
    "nul": ("a\x00b",),
    "backslash": ("..\\escape",),
    "bidirectional": ("a\u202eb",),
    "trailing-dot": ("a.",),
    "trailing-blank": ("a ",),
    "drive": ("C:/escape",),
    "twins-by-case": ("Twin", "twin"),
    "twins-by-unicode": (unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")),
}


class Remote(Protocol):
    """
    A real service, accessed without the backend under test.

    Paths are relative, with slashes. The first two components of every path are unique to a test, so that a service
    whose models have two names, such as an organisation and a repository, can use them.
    """

    @property
    def storage_options(self) -> Mapping[str, Any]:
        """The options with which a store reaches the service."""

    @property
    def denied_options(self) -> Mapping[str, Any] | None:
        """Options with credentials that the service refuses; None if it refuses none."""

    @property
    def unreachable_options(self) -> Mapping[str, Any] | None:
        """Options with an address where no server listens; None if the options cannot set one."""

    def uri(self, path: str) -> str:
        """Return the URI of the model below a path, or of the one object there."""

    def put(self, path: str, data: bytes) -> None:
        """Create or replace one object. Called from several threads at once."""

    def delete(self, path: str) -> None:
        """Delete one object."""
