"""
Listings that come page by page, each naming the next one, and their end.
"""

from __future__ import annotations

import hashlib

from kserve_pvc.errors import PolicyError, SourceUnavailableError

# A service lists at least a thousand objects in a page. It may send empty ones, as while it passes over many that were
# deleted.
MAX_PAGES = 10_000
MAX_EMPTY_PAGES = 1_000
# A token may hold a name of 1,024 bytes, encoded twice.
MAX_TOKEN_BYTES = 16 * 1024


class PageCount:
    """
    Counts the pages of one listing, and ends one that would never end by itself.

    Args:
        uri: What is listed, for errors.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._seen: set[bytes] = set()
        self._empty = 0

    def follow(self, token: str, *, is_empty: bool) -> None:
        """
        Count a page that names a next one.

        Args:
            token: What names the next page.
            is_empty: Whether the page lists nothing.

        Raises:
            SourceUnavailableError: The next page is one that was requested before, or has a name that is too long.
            PolicyError: There are too many pages, or too many empty ones in a row.
        """
        seen = hashlib.sha256(token.encode(errors="surrogatepass")).digest()
        if seen in self._seen:
            raise SourceUnavailableError(self._uri, "the listing loops: continuation token repeated", is_final=True)
        if len(token) > MAX_TOKEN_BYTES:
            reason = f"the listing has a continuation token of more than {MAX_TOKEN_BYTES} bytes"
            raise SourceUnavailableError(self._uri, reason, is_final=True)
        self._seen.add(seen)
        self._empty = self._empty + 1 if is_empty else 0
        if self._empty >= MAX_EMPTY_PAGES:
            raise PolicyError(self._uri, f"its listing has {MAX_EMPTY_PAGES} empty pages in a row")
        if len(self._seen) >= MAX_PAGES:
            raise PolicyError(self._uri, f"its listing has more than {MAX_PAGES} pages; name a smaller part of it")
