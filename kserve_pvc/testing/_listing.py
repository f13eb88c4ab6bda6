"""
Conformance tests of listings.
"""

from __future__ import annotations

import hashlib
from difflib import get_close_matches

import pytest

from kserve_pvc._source.contract import (
    ABILITIES,
    Backend,
    SupportsPages,
)
from kserve_pvc._source.ref import parse_ref
from kserve_pvc.errors import (
    SourceNotFoundError,
)
from kserve_pvc.testing._backends import (
    is_digest_of,
)
from kserve_pvc.testing._base import ConformanceBase
from kserve_pvc.testing._remote import (
    FILES,
    REPLACEMENT,
    WEIGHTS,
    Remote,
)


class ListingConformance(ConformanceBase):
    """
    What a backend lists.
    """

    def test_a_listing_names_every_file_and_its_size(self, remote: Remote, subject: Backend, place: str) -> None:
        """
        Each file is listed once, in order, with its path below the model and its size.
        """
        uri = self._put_tree(remote, place, FILES)

        found = subject.resolve(parse_ref(uri))

        assert [(str(f.entry.path), f.entry.size_bytes) for f in found.files] == [
            (name, len(data)) for name, data in sorted(FILES.items())
        ]
        assert found.size_bytes == sum(map(len, FILES.values()))
        assert all(is_digest_of(subject, f.digest, FILES[str(f.entry.path)]) for f in found.files)
        assert all(f.entry.sha256 in (None, hashlib.sha256(FILES[str(f.entry.path)]).hexdigest()) for f in found.files)

    def test_a_listing_is_the_same_each_time(self, remote: Remote, subject: Backend, place: str) -> None:
        """
        While nothing changes, version, order and tokens stay the same, also in another instance of the backend.
        """
        uri = self._put_tree(remote, place, FILES)

        found = [
            backend.resolve(parse_ref(uri))
            for backend in (subject, subject, self._make_backend(remote.storage_options))
        ]

        assert len({f.version for f in found}) == 1
        assert found[0].files == found[1].files == found[2].files

    def test_a_change_makes_another_version(self, remote: Remote, subject: Backend, place: str) -> None:
        """
        Replacing a file by other bytes of the same length changes the version of the model.
        """
        self._require("can_pin")
        uri, path = self._put_file(remote, place, WEIGHTS)
        before = subject.resolve(parse_ref(uri)).version
        remote.put(path, REPLACEMENT)

        assert subject.resolve(parse_ref(uri)).version != before

    def test_no_ability_is_misspelled(self, subject: Backend) -> None:
        """
        No public method has nearly the name of an optional ability, which a store would then never call.
        """
        methods = {name for name in dir(subject) if not name.startswith("_") and callable(getattr(subject, name))}
        misspelled = {
            name: near for name in methods - {*ABILITIES} if (near := get_close_matches(name, ABILITIES, 1, 0.8))
        }

        assert misspelled == {}

    def test_pages_are_the_listing(self, remote: Remote, subject: Backend, place: str) -> None:
        """
        The pages together are what `resolve` returns.
        """
        if not isinstance(subject, SupportsPages):
            pytest.skip("the backend has no `pages`")
        uri = self._put_tree(remote, place, FILES)

        found = [file for page in subject.pages(parse_ref(uri)) for file in page]

        assert sorted(found, key=lambda f: f.entry.path) == sorted(
            subject.resolve(parse_ref(uri)).files, key=lambda f: f.entry.path
        )

    def test_the_beginning_of_a_name_is_no_model(self, remote: Remote, subject: Backend, place: str) -> None:
        """
        A URI that is a prefix of a model without its last letter is not found.
        """
        self._put_tree(remote, place, FILES)

        with pytest.raises(SourceNotFoundError):
            subject.resolve(parse_ref(remote.uri(place[:-1])))

    def test_patterns_choose_files(self, remote: Remote, subject: Backend, place: str) -> None:
        """
        Allow and ignore patterns select files of the listing.
        """
        uri = self._put_tree(remote, place, FILES)

        part = subject.resolve(parse_ref(uri, allow_patterns=["weights/*"], ignore_patterns=["*/er/*"]))

        assert [str(f.entry.path) for f in part.files] == ["weights/a.bin"]
