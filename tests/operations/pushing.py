"""What a process of its own pushes beside others. Nothing here imports torch, which would take such a process longer
than all its pushes."""

from __future__ import annotations

from pathlib import Path

from registry import Registry
from tests.failures.support import floats, tensor_file


def push_some(root: Path, number: int) -> None:
    """Five versions, which share a tensor with all the others and have one of their own."""
    folder = root.with_name(f"pushed-{number}")
    folder.mkdir()
    with Registry.open(root) as registry:
        for place in range(5):
            tensors = {"same": floats(50, 50), "own": floats(40, 40, seed=1 + 10 * number + place)}
            source = tensor_file(folder / f"{place}.safetensors", tensors)
            registry.push(source, f"many/of-{number}:v{place}", base="walk/base", metrics={"place": place})
