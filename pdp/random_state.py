"""The global random generators, as tensors and plain numbers that a checkpoint can hold."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch

from registry.core.errors import InvalidInput


def seed_everything(seed: int) -> None:
    """Seeds the global generators of torch (all devices), numpy and Python."""
    torch.manual_seed(seed)
    numpy.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """States of torch's generators (CPU and every CUDA device), numpy's and Python's."""
    version, words, gauss = random.getstate()
    its = numpy.random.get_state(legacy=False)
    found: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "bit_generator": its["bit_generator"],
            "key": torch.from_numpy(its["state"]["key"].astype(numpy.int64)),
            "pos": int(its["state"]["pos"]),
            "has_gauss": int(its["has_gauss"]),
            "gauss": float(its["gauss"]),
        },
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def restore_random_state(state: Mapping[str, Any], what: str) -> None:
    """Puts the generators back to a state that `random_state` gave. Of CUDA devices, those that are there.

    Raises:
        InvalidInput: it is none.
    """
    try:
        python, its = state["python"], state["numpy"]
        words = (python["version"], tuple(python["words"].tolist()), python["gauss"])
        key = its["key"].numpy().astype(numpy.uint32)
        numpys = {
            "bit_generator": its["bit_generator"],
            "state": {"key": key, "pos": its["pos"]},
            "has_gauss": its["has_gauss"],
            "gauss": its["gauss"],
        }
        random.setstate(words)
        numpy.random.set_state(numpys)
        torch.set_rng_state(state["torch"].cpu())
        for device, one in enumerate(state.get("cuda", ())):
            if torch.cuda.is_available() and device < torch.cuda.device_count():
                torch.cuda.set_rng_state(one.cpu(), device)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InvalidInput(
            f"{what} holds no usable state of the random generators ({error}); load with exclude_keys=['rng'] to go on "
            "with other random numbers"
        ) from error
