"""The end of a blob: its row is locked and deleted, and its file goes before that is committed. `gc` does this with
what it has marked, and a push that meets such a blob does it too, so that nobody has to wait for a `gc` that was killed
in between."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from registry.catalog import garbage
from registry.catalog.rows import batches
from registry.operations.context import Context, until_done

TURN = 50
"""Blobs in one transaction: on SQLite the other writers wait for their files to be removed."""


def finish_deleting(context: Context) -> None:
    """Ends every deletion that has begun, also one that another process is just at: for that it waits."""
    with context.reading() as connection:
        marked = garbage.deleting_digests(connection)
    delete_marked(context, marked)


def delete_marked(context: Context, digests: Sequence[str]) -> dict[str, int]:
    """Deletes those of these blobs that are still marked, a few in each transaction.

    Returns:
        Bytes that were freed, by digest.
    """
    freed: dict[str, int] = {}
    for batch in batches(digests, TURN):
        freed.update(until_done(partial(_delete_batch, context, batch)))
    return freed


def _delete_batch(context: Context, digests: Sequence[str]) -> dict[str, int]:
    freed: dict[str, int] = {}
    with context.writing() as connection:
        # A `gc` that was held up here until its lease ran out still has the locks, or finds nothing any more.
        rows = garbage.lock_deleting(connection, digests)
        # Files go within the transaction that lets go of their rows, and after: what anything still refers to the
        # database refuses to give away.
        garbage.forget_blobs(connection, [row.id for row in rows])
        for row in rows:
            freed[row.digest] = row.size if context.store.blobs.contains(row.digest) else 0
            context.store.blobs.delete(row.digest)
    return freed
