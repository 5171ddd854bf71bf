"""Linear normalisation of observations and actions, one scale and offset a dimension, fitted on data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from registry.core.errors import InvalidInput
from registry.core.reference import shown

MODES = ("limits", "gaussian")
MAX_BLUR = 0.05
"""Of the output's units: how far float32's own rounding of the data may move a normalised value."""
STATISTICS = ("min", "max", "mean", "std")


class LinearNormalizer(nn.Module):
    """`normalized = x * scale + offset`, for each key of a dict of tensors.

    Attributes:
        params_dict: by key: `scale` (dim,), `offset` (dim,), and `input_stats` with `min`, `max`, `mean`, `std`, each
            (dim,). They do not train, and are part of the state dict. With `last_n_dims` other than 1 they have the
            form of that many last dimensions.

    Source: the formulas of Chi et al. 2023, Diffusion Policy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.params_dict = nn.ParameterDict()

    @property
    def is_fitted(self) -> bool:
        return len(self.params_dict) > 0

    def fit(
        self,
        data: Mapping[str, Any],
        mode: str = "limits",
        output_max: float = 1.0,
        output_min: float = -1.0,
        range_eps: float = 1e-4,
        fit_offset: bool = True,
        last_n_dims: int = 1,
    ) -> None:
        """Fits scale and offset of each key; what was fitted before is replaced.

        Ranges, means and deviations are taken in float64; scale, offset and all that is normalised are float32. It
        holds about 7 digits, so that a dimension from 1e9 to 1e9 + 1 is one value in it: where rounding could move a
        normalised value by more than MAX_BLUR, the dimension is refused. One that does not vary may lie anywhere.

        Args:
            data: by key (..., dim), tensors or arrays.
            mode: `limits` maps each dimension's range onto [output_min, output_max], `gaussian` to mean 0 and
                deviation 1.
            range_eps: a dimension that varies less is not scaled: `limits` maps it to the middle of the output.
            fit_offset: False scales about 0 alone.
            last_n_dims: how many of the last dimensions have a scale of their own for each place; 0 is one scale for
                all.

        Raises:
            InvalidInput: an unknown mode, a key that cannot be part of a name in a state dict, data that are empty or
                not finite, or a dimension that float32 has no scale for or cannot resolve; nothing is changed.
        """
        if mode not in MODES:
            raise InvalidInput(f"mode is {shown(repr(mode))}; expected one of {', '.join(MODES)}")
        if not output_max > output_min or not range_eps >= 0:
            raise InvalidInput(
                f"output_min {output_min}, output_max {output_max}, range_eps {range_eps}: expected min < max and eps "
                ">= 0"
            )
        if last_n_dims < 0:
            raise InvalidInput(f"last_n_dims is {last_n_dims}; expected 0 or more")
        if not isinstance(data, Mapping):
            raise InvalidInput(
                f"data is a {type(data).__name__}; expected a mapping such as {{'obs': ..., 'action': ...}}"
            )
        if not data:
            raise InvalidInput("there is nothing to fit a normaliser on; give {'obs': ..., 'action': ...}")
        for key in data:
            _check_key(str(key))
        options = (mode, output_max, output_min, range_eps, fit_offset, last_n_dims)
        fitted = {str(key): _fit(str(key), values, *options) for key, values in data.items()}
        self.params_dict = nn.ParameterDict({key: _parameters(entry) for key, entry in fitted.items()})

    def normalize(self, data: Mapping[str, Any]) -> dict[str, Tensor]:
        """Each tensor or array (..., dim) in units of the network, in float32. Arrays go to the normaliser's device.

        Raises:
            InvalidInput: a key that was not fitted, another dim, or what is no array of numbers.
        """
        found = {}
        for key, values in data.items():
            x, scale, offset = self._of(key, values)
            found[key] = x * scale + offset
        return found

    def unnormalize(self, data: Mapping[str, Any]) -> dict[str, Tensor]:
        """Each tensor or array (..., dim) in units of the data, in float32; errors as for `normalize`."""
        found = {}
        for key, values in data.items():
            x, scale, offset = self._of(key, values)
            found[key] = (x - offset) / scale
        return found

    def forward(self, data: Mapping[str, Any]) -> dict[str, Tensor]:
        return self.normalize(data)

    def _of(self, key: str, values: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The values in float32, their scale and their offset."""
        if key not in self.params_dict:
            known = ", ".join(self.params_dict.keys()) or "nothing"
            raise InvalidInput(f"the normaliser was not fitted on {shown(str(key))}; it knows {known}")
        entry: Any = self.params_dict[key]
        scale: Tensor = entry["scale"]
        form = scale.shape
        x = values if isinstance(values, Tensor) else _as_tensor(key, values).to(scale.device)
        if x.dim() < len(form) or x.shape[x.dim() - len(form) :] != form:
            expected = ", ".join(map(str, ("...", *form)))
            raise InvalidInput(
                f"{shown(key)}: expected ({expected}) as the normaliser was fitted, found {tuple(x.shape)}"
            )
        return x.to(scale.dtype), scale, entry["offset"]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Makes the entries that the state dict has: how many keys there are is known from it alone."""
        start = f"{prefix}params_dict."
        entries: dict[str, dict[str, Any]] = {}
        for name, tensor in state_dict.items():
            if not name.startswith(start):
                continue
            key, _, part = name.removeprefix(start).partition(".")
            entries.setdefault(key, {})[part] = tensor
        wanted = {"scale", "offset", *(f"input_stats.{one}" for one in STATISTICS)}
        made = {}
        for key, parts in entries.items():
            _check_key(key)
            if odd := _what_is_odd(parts, wanted):
                raise InvalidInput(f"the state of the normaliser's {shown(key)} is not one: {shown(odd, 200)}")
            stats = {one: parts[f"input_stats.{one}"] for one in STATISTICS}
            made[key] = _parameters({"scale": parts["scale"], "offset": parts["offset"], "input_stats": stats})
        if made:
            device = next((one.device for one in self.parameters()), None)
            self.params_dict = nn.ParameterDict(made)
            if device is not None:
                self.params_dict.to(device)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _check_key(key: str) -> None:
    """
    Raises:
        InvalidInput: a key that torch cannot make part of the names in a state dict.
    """
    if not key or "." in key or hasattr(nn.ParameterDict, key) or key == "training":
        raise InvalidInput(
            f"the normaliser cannot have the key {shown(repr(key))}: expected a name without a dot that is no member "
            "of torch's ParameterDict; give it another name"
        )


def _what_is_odd(parts: Mapping[str, Any], wanted: set[str]) -> str:
    """What keeps these parts from being the state of one key; empty where nothing does."""
    if parts.keys() != wanted:
        return ", ".join(sorted(parts.keys() ^ wanted))
    for name, one in sorted(parts.items()):
        if not isinstance(one, Tensor) or not one.is_floating_point():
            return f"{name} is no tensor of floating-point numbers"
    sizes = {tuple(one.shape) for one in parts.values()}
    if len(sizes) != 1:
        return f"sizes {sorted(sizes)}"
    for name in ("scale", "offset"):
        if not parts[name].is_meta and not bool(parts[name].isfinite().all()):
            return f"{name} is not finite"
    if not parts["scale"].is_meta and not bool(parts["scale"].all()):
        return "scale is 0"
    return ""


def _parameters(entry: Mapping[str, Any]) -> nn.ParameterDict:
    return nn.ParameterDict(
        {
            name: _parameters(one)
            if isinstance(one, Mapping)
            else nn.Parameter(one.detach().clone(), requires_grad=False)
            for name, one in entry.items()
        }
    )


def _as_tensor(key: str, values: Any) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{shown(key)}: expected numbers ({shown(str(error), 200)})") from error


def _fit(
    key: str,
    values: Any,
    mode: str,
    output_max: float,
    output_min: float,
    range_eps: float,
    fit_offset: bool,
    last_n_dims: int,
) -> dict[str, Any]:
    x = _as_tensor(key, values).detach()
    if x.dim() < last_n_dims + 1 or not x.numel():
        expected = ", ".join(("...", *["dim"] * last_n_dims)) if last_n_dims else "..., at least one value"
        raise InvalidInput(f"{shown(key)}: expected data of the form ({expected}), found {tuple(x.shape)}")
    form = x.shape[x.dim() - last_n_dims :]
    x = x.reshape(-1, form.numel()).to("cpu", torch.float64)
    bad = (~x.isfinite()).any(dim=1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise InvalidInput(f"{shown(key)}: row {row} has values that are not finite ({x[row].tolist()}); take them out")
    low, high = x.amin(dim=0), x.amax(dim=0)
    mean, std = x.mean(dim=0), x.std(dim=0, unbiased=False)
    stats = {"min": low, "max": high, "mean": mean, "std": std}
    if mode == "limits":
        if fit_offset:
            width = high - low
            flat = width < range_eps
            scale = (output_max - output_min) / torch.where(
                flat, torch.full_like(width, output_max - output_min), width
            )
            middle = torch.full_like(low, (output_max + output_min) / 2) - low * scale
            offset = torch.where(flat, middle, output_min - scale * low)
        else:
            reach, size = min(output_max, -output_min), torch.maximum(low.abs(), high.abs())
            if reach <= 0:
                raise InvalidInput(
                    f"output_min {output_min} and output_max {output_max} must lie around 0 without an offset"
                )
            scale = reach / torch.where(size < range_eps, torch.full_like(size, reach), size)
            offset = torch.zeros_like(scale)
    else:
        scale = 1 / torch.where(std < range_eps, torch.ones_like(std), std)
        offset = -mean * scale if fit_offset else torch.zeros_like(scale)
    scale, offset = scale.float(), offset.float()
    size = torch.maximum(low.abs(), high.abs())
    unusable = ~(scale.isfinite() & offset.isfinite() & (scale.abs() >= torch.finfo(torch.float32).tiny))
    unusable |= ~size.float().isfinite()
    if bool(unusable.any()):
        place = int(unusable.nonzero()[0])
        raise InvalidInput(
            f"{shown(key)}: dimension {place}, from {float(low[place]):g} to {float(high[place]):g}, has no scale in "
            f"float32 ({float(scale[place]):g}); scale the data, or give another range_eps, output_min or output_max"
        )
    # Where float32 cannot tell the data's own values apart, nothing normalised comes back as it was. What does not vary
    # is one value in float32 too, as long as its ends are not rounded apart.
    blurred = (scale * torch.finfo(torch.float32).eps * size) > MAX_BLUR
    blurred &= ~((high - low < range_eps) & (low.float() == high.float()))
    if bool(blurred.any()):
        place = int(blurred.nonzero()[0])
        raise InvalidInput(
            f"{shown(key)}: dimension {place} runs from {float(low[place]):.9g} to {float(high[place]):.9g}, which "
            "float32 cannot tell apart; take its mean off first"
        )
    fitted = {"scale": scale.reshape(form), "offset": offset.reshape(form)}
    return {**fitted, "input_stats": {name: one.float().reshape(form) for name, one in stats.items()}}
