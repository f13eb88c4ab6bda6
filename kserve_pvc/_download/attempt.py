"""
One attempt to fetch a model into a generation of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from hashlib import sha256
from itertools import chain
from pathlib import PurePosixPath
from typing import Literal

from kserve_pvc import _defaults as defaults
from kserve_pvc._download.destination import Destination
from kserve_pvc._download.journal import Journal
from kserve_pvc._download.keeping import kept_bytes
from kserve_pvc._download.publication import NothingNewerError, Written
from kserve_pvc._download.reuse import Found, find_donors, shared_bytes
from kserve_pvc._download.tally import Tally
from kserve_pvc._download.transfer import Transfer
from kserve_pvc._download.tuning import Tuning
from kserve_pvc._format import layout
from kserve_pvc._format.records import UNVERIFIED, FileEntry, Manifest, encode
from kserve_pvc._show.events import TransferStarted
from kserve_pvc._source.contract import (
    Backend,
    Listing,
    RemoteFile,
    Resolved,
    SupportsAccess,
    SupportsCertificates,
    SupportsClose,
    SupportsPages,
)
from kserve_pvc._source.ref import ModelRef
from kserve_pvc._volume.calls import copy_range, write_all
from kserve_pvc._volume.profile import check_names
from kserve_pvc._volume.sweeping import sweep_staging
from kserve_pvc._volume.tree import Tree, writing_tree
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import InsufficientSpaceError, VolumeError

Activity = Literal["downloading", "importing"]
_Donors = Mapping[PurePosixPath, Sequence[Found]]


class Attempt:
    """
    Lists the source, transfers, unpacks, and writes the manifest. Make one for each claim; `run` is called once.

    Args:
        current: The version that is present, if nothing is to be downloaded while the source holds that.
        resolved: The listing, if it was requested already.
        reuses_complete: Whether complete models of the same source may be reused.
        spoiled: Generations of this call on which the volume failed.
    """

    def __init__(
        self,
        writer: VolumeWriter,
        ref: ModelRef,
        backend: Backend,
        *,
        generation: str,
        current: str | None,
        resolved: Resolved | None,
        activity: Activity,
        reuses_complete: bool,
        spoiled: Collection[str],
        tuning: Tuning,
        tally: Tally,
    ) -> None:
        self._writer = writer
        self._ref = ref
        self._backend = backend
        self._generation = generation
        self._current = current
        self._place = layout.generation_dir(ref.key, generation)
        self._activity = activity
        self._reuses_complete = reuses_complete
        self._spoiled = spoiled
        self._tuning = tuning
        self._tally = tally
        self._journal: Journal | None = None
        self._transfer: Transfer | None = None
        self.resolved = resolved
        self.is_unpacking = False
        self._archive_sha256: str | None = None

    def run(self) -> Written:
        """
        Write the generation.

        Raises:
            LeaseLostError, StoppedError: The claim was lost, or the call is over.
            NothingNewerError: The source holds what is present already.
            StoreError: The source or the volume failed.
        """
        try:
            if self._current is not None and self.resolved is None:
                self.resolved = self._backend.resolve(self._ref)
            if self._current is not None and self._current == (self.resolved and self.resolved.version):
                raise NothingNewerError
            files = self._write_files()
            return self._write_manifest(files)
        except (VolumeError, InsufficientSpaceError):
            if self._journal is not None:
                self._journal.spoil()
            raise
        finally:
            if isinstance(self._backend, SupportsClose):
                self._backend.close()

    def flush(self) -> None:
        """
        Write down what was fetched, and give back what was reserved for the rest, while something still hangs.
        """
        if self._transfer is not None:
            self._transfer.keep()
        if self._journal is not None:
            self._journal.flush()

    def kept(self) -> tuple[int, int] | None:
        """
        Return how many bytes of the model the next call need not fetch, and of how many, if the listing is complete.
        """
        if self.resolved is None:
            return None
        kept = kept_bytes(self._writer, self._ref, self.resolved, with_complete=self._reuses_complete)
        return kept, self.resolved.size_bytes

    def _write_files(self) -> Sequence[FileEntry]:
        donors = find_donors(
            self._writer,
            self._ref,
            own=self._generation,
            with_complete=self._reuses_complete,
            spoiled=self._spoiled,
        )
        self._tally.begin()
        pages = self._pages(donors)
        # Nothing is made for a source that holds nothing.
        first = next((page for page in pages if page), ())
        self._writer.empty_trash(defaults.TRASH_SECONDS)
        sweep_staging(self._writer)
        with ExitStack() as opened:
            tree = opened.enter_context(writing_tree(self._writer, self._place))
            journal = opened.enter_context(Journal(self._writer, self._generation, self._tuning.part_bytes))
            self._journal = journal
            self._transfer = Transfer(
                backend=self._backend,
                destination=self._destination(tree, journal),
                donors={path: [f.donor(tree) for f in found] for path, found in donors.items()},
                observer=self._tally,
                tuning=self._tuning,
                uri=str(self._ref),
            )
            done = self._transfer.run(chain([first], pages))
            assert self.resolved is not None  # All pages were listed.
            if any(f.unpack is not None for f in self.resolved.files):
                return self._unpack(tree, self.resolved, done)
            return [done[f.entry.path] for f in self.resolved.files]

    def _destination(self, tree: Tree, journal: Journal) -> Destination:
        return Destination(
            create=tree.create,
            allocate=tree.allocate,
            write=write_all,
            copy=copy_range,
            finish=tree.finish,
            trim=tree.trim,
            note=journal.note,
            failure=lambda operation, path, error: self._writer.failure(operation, self._place / path, error),
        )

    def _unpack(self, tree: Tree, resolved: Resolved, done: Mapping[PurePosixPath, FileEntry]) -> Sequence[FileEntry]:
        from kserve_pvc._download.unpacking import Unpacking

        self.is_unpacking = True
        unpacking = Unpacking(
            writer=self._writer,
            tree=tree,
            place=self._place,
            ref=self._ref,
            digest=self._tuning.digest,
            make_room=self._make_room,
            check=self._tally.check,
        )
        archives = [done[file.entry.path] for file in resolved.files if file.unpack is not None]
        if len(archives) == len(resolved.files) == 1:
            self._archive_sha256 = archives[0].sha256
        return unpacking.run(resolved.files, done)

    def _write_manifest(self, files: Sequence[FileEntry]) -> Written:
        assert self.resolved is not None  # Its files were written.
        access = self._backend.access(self._ref) if isinstance(self._backend, SupportsAccess) else None
        is_checked = not isinstance(self._backend, SupportsCertificates) or self._backend.checks_certificates(self._ref)
        manifest = Manifest(
            key=self._ref.key,
            generation=self._generation,
            version=self.resolved.version,
            files=tuple(files),
            access=access,
            tls=None if is_checked else UNVERIFIED,
            archive_sha256=self._archive_sha256 or self.resolved.archive_sha256,
        )
        data = encode(manifest)
        self._writer.write_private(layout.manifest_file(self._generation), data)
        return Written(manifest=manifest, manifest_sha256=sha256(data).hexdigest(), digest=self._tuning.digest)

    def _pages(self, donors: _Donors) -> Iterator[Sequence[RemoteFile]]:
        """What the source holds, page by page if it is listed only now."""
        if self.resolved is None and isinstance(self._backend, SupportsPages):
            listing, before = Listing(self._ref), None
            for page in filter(None, self._backend.pages(self._ref)):
                # One page behind, so that a model of one page is known whole before anything of it is written.
                if before is not None:
                    yield before
                before = listing.add(page)
            self.resolved = listing.resolved()
            self._announce(self.resolved, donors)
            yield before or ()
            return
        if self.resolved is None:
            self.resolved = self._backend.resolve(self._ref)
        self._announce(self.resolved, donors)
        yield self.resolved.files

    def _announce(self, resolved: Resolved, donors: _Donors) -> None:
        check_names(self._writer, (file.entry.path for file in resolved.files))
        shared = 0
        if self._tuning.digest != "none":  # Without digests nothing can prove itself, so nothing is shared.
            shared = shared_bytes(donors, resolved)
        # What was written while the rest was listed no longer has to fit.
        self._make_room(resolved.size_bytes - shared - self._tally.progress()[0])
        started = TransferStarted(
            **self._tally.subject,
            bytes_total=resolved.size_bytes,
            files=len(resolved.files),
            activity=self._activity,
        )
        self._tally.tell(started)
        self._tally.announce(resolved.size_bytes)

    def _make_room(self, needed_bytes: int) -> None:
        if self._writer.free_bytes() < needed_bytes:
            self._writer.empty_trash(0)
        if (free := self._writer.free_bytes()) < needed_bytes:
            raise InsufficientSpaceError(str(self._writer.root), needed_bytes, free)
