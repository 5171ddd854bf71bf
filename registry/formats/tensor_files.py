"""One file of tensors within a folder, whatever its form: safetensors, or a state dict of torch.save."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from registry.formats.payloads import state_dict_file
from registry.formats.source import TensorFile, open_regular, open_tensors


def open_tensor_file(path: Path, name: str, role: str, resources: ExitStack) -> tuple[TensorFile, tuple[str, ...]]:
    """Opens a file that is a component or a part of one.

    Args:
        name: where it stands in the version; its suffix tells the form.
        resources: closes it.

    Returns:
        the file, and notes for the user.

    Raises:
        MalformedTensors, UnsafePickle, UnsupportedTensor, InvalidInput (no state dict); and what `open_regular` raises.
    """
    if name.endswith(".safetensors"):
        return open_tensors(path, name, role, resources), ()
    return state_dict_file(path, name, role, resources.enter_context(open_regular(path)))
