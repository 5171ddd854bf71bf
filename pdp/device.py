"""The device that a user names."""

from __future__ import annotations

import torch

from pdp.errors import ConfigError
from registry.core.reference import shown


def check_device(name: str, key: str) -> torch.device:
    """
    Args:
        key: what the user calls it, for the message.

    Raises:
        ConfigError: no device of torch's, or one that is not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{key} is {shown(repr(name))}; expected cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{key} is {name!r}; expected cpu or cuda")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ConfigError(f"{key} is {name!r}, and torch finds no CUDA device here; set {key}=cpu")
        if device.index is not None and device.index >= count:
            raise ConfigError(f"{key} is {name!r}, and there are {count} CUDA devices, from cuda:0 on")
    return device
