"""What keeps a registry tidy: taking versions away, bringing them back, and freeing what nothing needs any more. A part
of the facade, which `Registry` inherits."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from registry.operations.context import Context

if TYPE_CHECKING:
    from registry.operations.gc import Collected
    from registry.operations.removal import Removal


class Upkeep:
    """Verbs on what is stored already; opened as `Registry`."""

    def __init__(self, context: Context) -> None:
        self._context = context

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
