"""Files of pdp: a tree of plain values and tensors as `.pth` or `.safetensors`, written whole or not at all. What is
written to a `.pth` opens with `torch.load(weights_only=True)`."""

from __future__ import annotations

import glob
import inspect
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
from torch import Tensor

from registry import Registry
from registry.core.errors import InvalidInput
from registry.core.reference import URL_SCHEME, shown
from registry.formats.live import tensor_file
from registry.operations.pull import write_errors
from registry.store.durable import sync_folder

SAFETENSORS = ".safetensors"
STALE_SECONDS = 3600
_REFERENCE = re.compile(
    r"[a-z0-9][a-z0-9._-]*/[a-z0-9][a-z0-9._-]*(:[A-Za-z0-9_][A-Za-z0-9._-]*|@[0-9]+|@sha256:[0-9a-f]+)"
)


def is_registry_url(path: str | os.PathLike[str]) -> bool:
    """Whether it names a version of a registry, `registry://...`, and no file."""
    return isinstance(path, str) and path.startswith(URL_SCHEME)


def check_path(path: str | os.PathLike[str]) -> Path:
    """A path for a checkpoint file.

    Raises:
        InvalidInput: it is none, or another kind of URL.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise InvalidInput(f"{shown(repr(path))} is no path; give a file (.pth, .safetensors) or a registry:// URL")
    text = os.fspath(path)
    if not isinstance(text, str) or "\0" in text:
        raise InvalidInput(f"{shown(repr(text))}: a path is text without NUL")
    if "://" in text or text.startswith("registry:"):
        raise InvalidInput(
            f"{shown(text)} is neither a file nor a registry:// URL such as registry://walk/perturb:prod"
        )
    if _REFERENCE.fullmatch(text):
        raise InvalidInput(
            f"{shown(text)} looks like a version; write registry://{shown(text)}, or ./{shown(text)} for a file"
        )
    return Path(text).expanduser()


def refuse_push_options(options: Mapping[str, Any]) -> None:
    """
    Raises:
        InvalidInput: there are some, and what is saved to is a file.
    """
    if options:
        raise InvalidInput(f"{', '.join(options)} belong to a push; give a registry:// URL, or leave them out")


def check_push_options(options: Mapping[str, Any]) -> None:
    """
    Raises:
        InvalidInput: `Registry.push` has no such option; the message has the near one.
    """
    known = [name for name, one in inspect.signature(Registry.push).parameters.items() if one.kind == one.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise InvalidInput(f"a push has no option {shown(name)}; {hint}")


def on_cpu(tree: Any, what: str = "the checkpoint", *, copy: bool = False) -> Any:
    """The tree with tensors that lie on the CPU and share no memory with more than they hold; other values plain.

    Args:
        copy: copy tensors that are on the CPU already, so that training may go on while they are written.

    Raises:
        InvalidInput: a value that is neither plain nor a tensor; says where it is.
    """
    copies: dict[int, tuple[Tensor, Tensor]] = {}

    def owned(tensor: Tensor) -> Tensor:
        known = copies.get(id(tensor))
        if known is None:
            known = (tensor, _owned(tensor, copy))  # the tensor itself is kept, so that its id stays its own
            copies[id(tensor)] = known
        return known[1]

    def plain(value: Any, where: str) -> Any:
        if isinstance(value, Tensor):
            return owned(value)
        if value is None or isinstance(value, bool | int | float | str | bytes):
            return value.item() if isinstance(value, numpy.generic) else value  # numpy's doubles are floats
        if isinstance(value, Mapping):
            return {_key(key, where): plain(item, f"{where}[{key!r}]") for key, item in value.items()}
        if isinstance(value, tuple):
            return tuple(plain(item, f"{where}[{place}]") for place, item in enumerate(value))
        if isinstance(value, list):
            return [plain(item, f"{where}[{place}]") for place, item in enumerate(value)]
        if isinstance(value, set | frozenset):
            return sorted((plain(item, where) for item in value), key=repr)
        if isinstance(value, numpy.generic):
            return value.item()
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        raise InvalidInput(
            f"{where}: a {type(value).__name__} is neither a tensor nor plain data, and a checkpoint holds nothing "
            "else; save its state_dict() or its values"
        )

    return plain(tree, what)


def _owned(tensor: Tensor, copy: bool) -> Tensor:
    plain = tensor.detach()
    whole = plain.untyped_storage().nbytes() == plain.numel() * plain.itemsize and plain.is_contiguous()
    if plain.device.type != "cpu":
        return plain.cpu().contiguous()
    return plain.contiguous().clone() if copy or not whole else plain


def _key(key: Any, where: str) -> Any:
    if isinstance(key, str | int):
        return key
    raise InvalidInput(f"{where} has the key {shown(repr(key))}; expected text or a whole number")


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file under a temporary name beside it, syncs it and gives it its name: who reads it sees the old file or
    the new one. Missing folders are made.

    Raises:
        NoSpace, ReadOnly, StorageError: nothing under the final name has changed, and nothing is left behind.
    """
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def _remove_stale(path: Path) -> None:
    """Removes what a process that was killed while it wrote this file has left behind."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp"):
        with suppress(FileNotFoundError):  # somebody else was faster
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                left.unlink()


def write_tree(path: Path, tree: Mapping[str, Any]) -> None:
    """Writes a tree as `.safetensors`, or by any other name as torch.save does.

    Args:
        tree: as `on_cpu` gives it.

    Raises:
        NoSpace, ReadOnly, StorageError: nothing has changed.
    """
    if path.suffix == SAFETENSORS:
        from registry.formats.safetensors_tree import write_safetensors_tree

        write_file(path, lambda file: write_safetensors_tree(tree, file))
    else:
        write_file(path, lambda file: save_pth(tree, file))


def save_pth(tree: Mapping[str, Any], file: BinaryIO) -> None:
    """torch.save into an open file; the name of the file is no part of what is written."""
    try:
        torch.save(dict(tree), file)
    except RuntimeError as error:
        # torch still ends its zip when a write failed, and its complaint about that hides what happened.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def write_flat(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes a flat `.safetensors` file, its metadata as JSON. Tied tensors are written under each of their names.

    Args:
        tensors: on the CPU.

    Raises:
        NoSpace, ReadOnly, StorageError: nothing has changed.
    """
    text = {"format": "pt", **{key: json.dumps(value, sort_keys=True) for key, value in metadata.items()}}
    made = tensor_file(path.name, "model", tensors, text)
    write_file(path, lambda file: file.writelines(made.chunks()))
