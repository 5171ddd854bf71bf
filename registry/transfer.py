"""How many versions come in or go out at once: bundles of another registry, and trees of folders. A part of the facade,
which `Registry` inherits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from registry.operations.context import Context

if TYPE_CHECKING:
    from registry.operations.adoption import Adoption, Progress
    from registry.operations.exporting import ExportResult
    from registry.operations.importing import ImportResult


class Transfer:
    """Export, import and adoption; opened as `Registry`."""

    _context: Context

    def export(
        self, *references: str, to: str | os.PathLike[str], no_base: bool = False, force: bool = False
    ) -> ExportResult:
        """Writes versions, with their bases, ancestors and events, as one bundle that another registry can import.

        The same versions give the same bytes, until something is said of them again.

        Args:
            to: a file that ends in `.tar`, else a folder, which is made or may be empty.
            no_base: leave out the tensors of bases that were not asked for; they are recorded where the bundle is
                imported, and can be pushed there later.
            force: replace a tar file that is there.

        Raises:
            NotFound, InvalidReference
            NotStored: a version that was asked for is known without its bytes, or a base cannot be left out.
            DestinationExists, InvalidInput: nothing is written.
            DigestMismatch, Corrupt, BlobNotFound: the store is damaged; nothing is left behind.
            ReadOnly, NoSpace
        """
        from registry.operations.exporting import export

        return export(self._context, references, Path(to), no_base=no_base, force=force)

    def import_(self, bundle: str | os.PathLike[str], *, name: str | None = None) -> ImportResult:
        """Takes in the versions of a bundle. All of it is proven before anything is written.

        Versions get new numbers, unless their name has the very same ones already; an import that was cut off is
        completed by the same again. Tags that are not there are set, others stay where they are.

        Args:
            bundle: a folder or a tar file that `export` wrote.
            name: `namespace/name` for the versions that were asked for, instead of the one that they had.

        Raises:
            SourceNotFound, InvalidReference
            InvalidInput, Corrupt, DigestMismatch: it is no bundle, or a damaged one; nothing is taken in.
            ReadOnly, NoSpace: versions that were taken in before are whole, and stay.
        """
        from registry.operations.importing import import_bundle

        return import_bundle(self._context, Path(bundle), name=name)

    def adopt(
        self,
        folder: str | os.PathLike[str],
        *,
        namespace: str | None = None,
        dry_run: bool = False,
        external_over: int | None = 2 << 30,
        keep_duplicates: bool = False,
        attachments: bool = True,
        attachment_limit: int | None = None,
        progress: Progress | None = None,
    ) -> Adoption:
        """Pushes all adapters and checkpoints of a tree of folders that is not in yet; see `registry adopt --help`.

        One that is broken stops no other, and one whose content is in the registry is not pushed again. Each version's
        metadata has `adopted_from`, its path in the tree. An adoption that was cut off goes on when it is repeated.

        Args:
            namespace: of all names; by default the folder's own name.
            dry_run: plan only; nothing is written.
            external_over: bases of more bytes are recorded as external; None: none is.
            keep_duplicates: push also what is there under another name or path.
            attachments, attachment_limit: as for a push, but a file over the limit is left out and noted.
            progress: called with a phase (`scan`, `look`, `push`), how many are done, of how many (0: not known), and a
                path.

        Raises:
            SourceNotFound, InvalidInput, InvalidReference: of the folder or the namespace; nothing is done.
            ReadOnly, NoSpace, StoreUnreachable, Corrupt: of the registry; what was adopted before stays.
        """
        from registry.operations.adopt import adopt

        return adopt(
            self._context,
            Path(folder),
            namespace=namespace,
            dry_run=dry_run,
            external_over=external_over,
            keep_duplicates=keep_duplicates,
            attachments=attachments,
            attachment_limit=attachment_limit,
            progress=progress,
        )
