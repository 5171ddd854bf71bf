"""What a push keeps beside a version for compatibility questions: the form of a live model, and digests of a base's
tensors as they are after a cast to bfloat16. torch is imported only for a push of something live."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from registry.core.model_form import ROLE, ROUNDED, read_model_form
from registry.core.reference import shown
from registry.formats.source import Described, Source, TensorFile


def add_form(opened: Source, source: Any) -> None:
    """Describes what is pushed by its modules, where it is live; notes why not where they cannot be listed.

    Args:
        source: what `opened` was read from.
    """
    if isinstance(source, Source | str | os.PathLike | Mapping):
        return
    from registry.formats.live_form import live_form

    try:
        document = live_form(source).document
        read_model_form(document, "the list of modules")
    except Exception as error:  # noqa: BLE001  # a model runs code of the user's, and a push without it is still a push
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        opened.notes += (f"no list of modules is kept: {shown(why, 300)}",)
        return
    opened.described = {**opened.described, ROLE: document}


def add_rounded(opened: Source, kind: str) -> None:
    """Has a push find out what a base's float32 tensors are called after a cast to bfloat16, once it is new.

    Args:
        kind: what it is pushed as; of adapters and checkpoints nobody asks for it.
    """
    from registry.formats.rounding import can_be_rounded

    if kind == "base" and can_be_rounded(opened.tensor_files):
        opened.described_later = {**opened.described_later, ROUNDED: partial(_rounded, opened.tensor_files)}


def _rounded(files: tuple[TensorFile, ...]) -> Described:
    from registry.formats.rounding import rounded_digests

    return Described(rounded_digests(files))
