"""What keeps a registry tidy: taking versions away, bringing them back, and freeing what nothing needs any more. A part
of the facade, which `Registry` inherits."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

from registry.operations.context import Context
from registry.operations.discover import locate

if TYPE_CHECKING:
    from registry.operations.gc import Collected
    from registry.operations.problems import Fsck
    from registry.operations.reindex import Reindexed
    from registry.operations.removal import Removal


class Upkeep:
    """Verbs on what is stored already; opened as `Registry`."""

    _context: Context

    def remove(self, *references: str, why: str | None = None) -> tuple[Removal, ...]:
        """Removes versions: nothing finds them any more, and their numbers are never given again.

        All of them are removed or none. `restore` brings them back until `gc` takes their bytes. Tags that point to
        one stay, and say that it was removed.

        Args:
            why: kept in the history.

        Raises:
            InUse: a version that stays has one of them as base or parent.
            TagProtected: a protected tag points to one.
            InvalidReference, NotFound, ReadOnly
        """
        from registry.operations.removal import remove

        return remove(self._context, references, why=why)

    def restore(self, *references: str, why: str | None = None) -> tuple[Removal, ...]:
        """Brings removed versions back under their numbers, all of them or none.

        Args:
            references: by number, digest or tag.

        Raises:
            VersionNotFound: there is no such version; `gc` took its bytes; or one that it came from is removed.
            InvalidReference, ArtifactNotFound, ReadOnly
        """
        from registry.operations.removal import restore

        return restore(self._context, references, why=why)

    def gc(self, *, grace: timedelta | None = None, dry_run: bool = False) -> Collected:
        """Frees the bytes of removed versions and of pushes that were killed.

        Others may use the registry meanwhile. What a purged version was (its manifest, layouts, metadata, metrics,
        tags and lineage) stays.

        Args:
            grace: what was removed or written since then stays; 7 days by default. A temporary file stays for an
                hour in any case, because a push may be writing it.
            dry_run: change nothing, and tell what would be done.

        Raises:
            InUse: another gc is at work.
            InvalidInput, ReadOnly
        """
        from registry.operations.gc import GRACE, collect

        return collect(self._context, grace=GRACE if grace is None else grace, dry_run=dry_run)

    @classmethod
    def fsck(cls, url: str | os.PathLike[str] | None = None, *, deep: bool = False) -> Fsck:
        """Looks a registry through, whatever state it is in, and changes nothing.

        The journal and the manifests are followed into a catalog beside, and the registry's own is compared with that,
        row by row. Every blob that a version needs is looked for.

        Args:
            url: as for `open`.
            deep: read every byte: all blobs, tensors and files are proven by their digests.

        Raises:
            RegistryNotFound, SchemaOutOfDate, StoreUnreachable, StorageError
        """
        from registry.operations.fsck import fsck

        return fsck(locate(url), deep=deep)

    @classmethod
    def reindex(
        cls,
        url: str | os.PathLike[str] | None = None,
        *,
        store: str | os.PathLike[str] | None = None,
        skip_damaged: bool = False,
    ) -> Reindexed:
        """Makes the catalog of a registry again from its journal and manifests: all of it, or nothing.

        Args:
            url: as for `open`.
            store: folder of the blobs, where a database server has lost the catalog that said so.
            skip_damaged: let a name end before an event that is missing, damaged, or cannot be followed. Nobody can
                add to such a name before its journal is put back.

        Raises:
            Corrupt: something is missing or damaged; it says what, and the catalog is as it was.
            RegistryNotFound, WrongStore, SchemaOutOfDate, ReadOnly, NoSpace, StorageError, InvalidInput
        """
        from registry.operations.reindex import reindex

        return reindex(locate(url), store=None if store is None else os.fspath(store), skip_damaged=skip_damaged)
