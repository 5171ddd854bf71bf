"""The global random generators, as tensors and plain numbers that a checkpoint can hold."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import torch

from pdp.training_state import is_number, told
from registry.core.errors import InvalidInput
from registry.core.reference import shown

KEY_SIZE = 624
"""Words of a Mersenne Twister."""


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


def restore_random_state(state: Any, what: str) -> None:
    """Puts the generators back to a state that `random_state` gave. Of CUDA devices, those that are there.

    Args:
        what: names the checkpoint.

    Raises:
        InvalidInput: it is none.
    """
    try:
        python, its = state["python"], state["numpy"]
        words = (python["version"], tuple(python["words"].tolist()), python["gauss"])
        numpys = {
            "bit_generator": its["bit_generator"],
            "state": {"key": _key(its["key"]), "pos": _within(its["pos"], "pos", KEY_SIZE)},
            "has_gauss": _within(its["has_gauss"], "has_gauss", 1),
            "gauss": _gauss(its["gauss"]),
        }
        if python["gauss"] is not None:
            _gauss(python["gauss"])
        random.setstate(words)
        numpy.random.set_state(numpys)
        torch.set_rng_state(state["torch"].cpu())
        for device, one in enumerate(state.get("cuda", ())):
            if torch.cuda.is_available() and device < torch.cuda.device_count():
                torch.cuda.set_rng_state(one.cpu(), device)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise InvalidInput(
            f"{what} holds no usable state of the random generators ({shown(str(error), 200)}); load with "
            "exclude_keys=['rng'] to go on with other random numbers"
        ) from error


def fit_random_state(state: Any, what: str) -> Callable[[], None]:
    """Tries a state of the generators, and puts the present one back.

    Args:
        what: names the checkpoint.

    Returns:
        A function that puts the generators to a copy of it.

    Raises:
        InvalidInput: it is none; the generators are as they were.
    """
    present = random_state()
    try:
        restore_random_state(state, what)
        found = random_state()
    finally:
        restore_random_state(present, "the present")
    if "cuda" in found:  # devices of which the state says nothing are left as they will be
        found["cuda"] = found["cuda"][: len(list(state.get("cuda", ())))]
    return lambda: restore_random_state(found, what)


def _key(words: Any) -> Any:
    """The words of numpy's generator, which takes any as they are."""
    key = words.numpy()
    if key.shape != (KEY_SIZE,) or key.dtype.kind not in "iu" or key.min() < 0 or key.max() >= 2**32:
        raise ValueError(f"key of numpy: expected {KEY_SIZE} words of 32 bits")
    return key.astype(numpy.uint32)


def _within(value: Any, name: str, most: int) -> int:
    # numpy reads beyond its words where pos is too large.
    if not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{name} of numpy: expected 0 to {most}, found {told(value)}")
    return int(value)


def _gauss(value: Any) -> float:
    if not is_number(value):
        raise ValueError(f"gauss: expected a finite number, found {told(value)}")
    return float(value)
