"""Opening what was given to a push: a path, something live, or a source that is open already. What a push may be told
about it stands here as one value."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.formats.source import Source


@dataclass(frozen=True)
class Opening:
    """How a source is opened.

    Attributes:
        adapter_name: which adapter of a live model; its active one by default.
        attachments: whether a folder's other files are kept.
        attachment_limit: bytes of one of them; None: the default.
        probe: whether and with what a live model is probed; see `Registry.push`.
    """

    adapter_name: str | None = None
    attachments: bool = True
    attachment_limit: int | None = None
    probe: Any = True


def open_source(source: object, *, kind: str | None, how: Opening) -> Source:
    """Opens whatever was given to a push; a source that is open already is taken as it is."""
    if isinstance(source, Source):
        return source
    if isinstance(source, str | os.PathLike):
        from registry.formats.attachments import ATTACHMENT_LIMIT
        from registry.formats.paths import read_path

        limit = ATTACHMENT_LIMIT if how.attachment_limit is None else how.attachment_limit
        return read_path(Path(source), attachment_limit=limit if how.attachments else None)
    from registry.formats.live import read_live

    return read_live(source, kind=kind, adapter_name=how.adapter_name)
