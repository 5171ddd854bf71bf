"""What an extraction is asked for, checked before anything is read, and what it says of itself: errors by module, and
every tensor that differs and is not in the adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from registry.core.errors import InvalidInput
from registry.core.findings import Finding
from registry.core.reference import shown
from registry.operations.merging.report import plain
from registry.operations.merging.request import DTYPES, check_device

FORMAT = 1


@dataclass(frozen=True)
class ExtractRequest:
    """A checked request.

    Attributes:
        rank, energy: how each difference is cut; see `merge.compress.RankChoice`.
        modules: globs over module paths, or names that paths end in; empty: all that differ.
        attention_out: how often a MultiheadAttention adds the update of its out_proj; None: it is left out.
        dtype: safetensors code of the adapter's tensors.
        precise: float64.
        force: push it even where it does not fit the base.
    """

    rank: int | None
    energy: float | None
    modules: tuple[str, ...] = ()
    attention_out: int | None = None
    dtype: str = "F32"
    precise: bool = False
    device: str = "cpu"
    force: bool = False

    def selects(self, path: str) -> bool:
        return not self.modules or any(is_selected(path, pattern) for pattern in self.modules)

    def recipe(self, base: str, checkpoint: str) -> dict[str, Any]:
        """The recipe, which stands in the manifest.

        Args:
            base, checkpoint: manifest digests.
        """
        return {
            "format": FORMAT,
            "operation": "extract",
            "base": base,
            "checkpoint": checkpoint,
            "rank": self.rank,
            "energy": self.energy,
            "modules": list(self.modules) or None,
            "attention_out": self.attention_out,
            "arithmetic": "F64" if self.precise else "F32",
            "dtype": self.dtype,
        }


def check_extract(
    *,
    rank: int | None = None,
    energy: float | None = None,
    modules: str | Sequence[str] = (),
    attention_out: int | None = None,
    dtype: str | None = None,
    precise: bool = False,
    device: str = "cpu",
    force: bool = False,
) -> ExtractRequest:
    """Checks all that can be checked before a version is looked at.

    Raises:
        InvalidInput: neither rank nor energy, or a parameter out of its range.
    """
    if rank is None and energy is None:
        raise InvalidInput("an extraction needs a rank, or the share of the energy to keep; give one of them, or both")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise InvalidInput(f"rank is {shown(repr(rank))}; expected a whole number of at least 1")
    if energy is not None and (isinstance(energy, bool) or not isinstance(energy, int | float) or not 0 < energy <= 1):
        raise InvalidInput(f"energy is {shown(repr(energy))}; expected more than 0 and at most 1")
    patterns = (modules,) if isinstance(modules, str) else tuple(modules)
    if any(not isinstance(one, str) or not one for one in patterns):
        raise InvalidInput(f"modules must be names or globs, found {shown(repr(patterns), 200)}")
    if attention_out not in (None, 1, 2):
        raise InvalidInput(f"attention_out is {attention_out!r}; expected 1, or 2 as PEFT up to 0.21 computes")
    if dtype is not None and dtype not in DTYPES:
        raise InvalidInput(f"dtype '{shown(dtype)}'; expected one of {', '.join(DTYPES)}")
    check_device(device)
    return ExtractRequest(
        rank,
        None if energy is None else float(energy),
        tuple(sorted(set(patterns))),
        attention_out,
        DTYPES[dtype or "f32"],
        precise,
        device,
        force,
    )


def is_selected(path: str, pattern: str) -> bool:
    """Whether a pattern is for a module: a glob over the whole path, or a name that the path is or ends in, as in
    `target_modules`."""
    if any(letter in pattern for letter in "*?["):
        return fnmatchcase(path, pattern)
    return path == pattern or path.endswith(f".{pattern}")


@dataclass(frozen=True)
class ModuleExtract:
    """One module of the adapter.

    Attributes:
        kind: as in `Target.kind`.
        rank: of the module in the adapter; of a grouped convolution that of one group.
        norm: Frobenius norm of what the fine-tuning changed.
        error: of the adapter's product, as it is stored, to that.
    """

    path: str
    kind: str
    rank: int
    norm: float
    error: float

    @property
    def relative_error(self) -> float:
        return self.error / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class LeftOut:
    """One tensor that differs and is not in the adapter.

    Attributes:
        name: in the live model.
        why: in words.
        norm: Frobenius norm of the difference; None where there is none (another shape, one side alone, integers).
    """

    name: str
    why: str
    norm: float | None


@dataclass(frozen=True)
class ExtractResult:
    """What an extraction did.

    Attributes:
        reference: of the version, `namespace/name@number`.
        created: False where the name had this very version already.
        found: the version that the same recipe had made before; then nothing was computed, and there are no modules.
        modules: in order of path.
        left_out: the largest first.
        findings: what the push noticed.
        seconds: without the push.
    """

    reference: str
    created: bool
    found: str | None
    checkpoint: str
    base: str
    modules: tuple[ModuleExtract, ...]
    left_out: tuple[LeftOut, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def relative_error(self) -> float | None:
        """||change - adapter|| / ||change||, over all that can be subtracted, what was left out included; None where
        nothing was computed."""
        return relative_error_of(self.modules, self.left_out) if self.modules else None

    @property
    def left_out_share(self) -> float | None:
        """Share of the squared norm of the change that is in no module of the adapter; None where nothing was
        computed."""
        return share_of(self.left_out, norm_of(self.modules, self.left_out)) if self.modules else None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        norm = norm_of(self.modules, self.left_out)
        return {
            "reference": self.reference,
            "created": self.created,
            "found": self.found,
            "checkpoint": self.checkpoint,
            "base": self.base,
            "relative_error": plain(self.relative_error),
            "left_out_share": plain(self.left_out_share),
            "seconds": self.seconds,
            "modules": [
                {
                    "module": one.path,
                    "kind": one.kind,
                    "rank": one.rank,
                    "norm": plain(one.norm),
                    "relative_error": plain(one.relative_error),
                }
                for one in self.modules
            ],
            "left_out": [
                {
                    "tensor": one.name,
                    "why": one.why,
                    "norm": plain(one.norm),
                    "share": None if one.norm is None else plain(share_of([one], norm)),
                }
                for one in self.left_out
            ],
            "findings": [asdict(one) for one in self.findings],
            "notes": list(self.notes),
        }


def norm_of(modules: Iterable[ModuleExtract], left_out: Iterable[LeftOut]) -> float:
    """Frobenius norm of all that the checkpoint changed, as far as it can be subtracted."""
    return math.hypot(*(one.norm for one in modules), *_norms(left_out))


def relative_error_of(modules: Sequence[ModuleExtract], left_out: Sequence[LeftOut]) -> float:
    """Of the adapter to that change."""
    norm = norm_of(modules, left_out)
    return math.hypot(*(one.error for one in modules), *_norms(left_out)) / norm if norm else 0.0


def share_of(left_out: Iterable[LeftOut], norm: float) -> float:
    """Of the squared norm of the change."""
    return (math.hypot(*_norms(left_out)) / norm) ** 2 if norm else 0.0


def _norms(left_out: Iterable[LeftOut]) -> list[float]:
    return [one.norm for one in left_out if one.norm is not None]
