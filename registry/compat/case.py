"""What a compatibility rule sees: an adapter, the model that it is held against, the PEFT that would load it, and what
for. All of it is data; operations/checking.py fills it from the catalog, formats/live_form.py from a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from registry.compat.placing import Placing, place
from registry.compat.target_modules import Targeting
from registry.core.adapter_config import AdapterConfig
from registry.core.adapter_names import Target
from registry.core.findings import Finding
from registry.core.layout import Layout
from registry.core.model_form import ModelForm
from registry.core.peft_keys import KNOWN_PEFT

Purpose = Literal["load", "merge", "hotswap"]
PURPOSES: tuple[Purpose, ...] = ("load", "merge", "hotswap")


@dataclass(frozen=True)
class Weights:
    """What is known of a model's weights without reading them, by the names of its live tensors.

    Attributes:
        reference: `namespace/name@number`, or what else names it in messages.
        digests: live name -> tensor digest. A tensor that is made of several saved ones has their digests, joined.
        dtypes: live name -> safetensors code.
        rounded: live name -> digest of the tensor rounded to bfloat16, where that is known. That of a bfloat16
            tensor is its own.
        cast_of: references of the versions that it was converted from or to, as their lineage says.
    """

    reference: str
    digests: Mapping[str, str]
    dtypes: Mapping[str, str] = field(default_factory=dict)
    rounded: Mapping[str, str] = field(default_factory=dict)
    cast_of: frozenset[str] = frozenset()


@dataclass(frozen=True)
class AdapterSide:
    """The adapter.

    Attributes:
        reference: `namespace/name@number`, or what else names it in messages.
        layout: of its state dict.
        config: None: it came without one.
        targets: `targets_of(layout, config)`.
        read: the findings of `targets_of`.
        nonfinite: names of tensors that hold NaN or Inf.
        zeros: names of tensors that are all zero.
        weights: of the base that it was trained on, where that is a version here; None: not recorded.
        form: of the model that it was trained on, where that is known.
        written_by: PEFT version that wrote it; None: unknown.
        files: sha256 of the files that came with it, by path.
        twins: earlier versions with the same tensors and another scaling, each as `namespace/name@number (which)`.
        has_probe: whether a behaviour probe is kept of it.
    """

    reference: str
    layout: Layout
    config: AdapterConfig | None
    targets: tuple[Target, ...]
    read: tuple[Finding, ...] = ()
    nonfinite: frozenset[str] = frozenset()
    zeros: frozenset[str] = frozenset()
    weights: Weights | None = None
    form: ModelForm | None = None
    written_by: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    twins: tuple[str, ...] = ()
    has_probe: bool = False

    @property
    def is_lora(self) -> bool:
        return self.config is None or self.config.peft_type == "LORA"


@dataclass(frozen=True)
class ModelSide:
    """The model that an adapter is held against.

    Attributes:
        reference: of a version, or the name of a class.
        form: its modules.
        weights: None: there are none to compare (a model on the meta device).
        is_version: a version of the registry; else a model at hand, whose modules are those that PEFT will see.
        files: sha256 of the files that came with it, by path.
        adapters: names of adapters that it carries already.
    """

    reference: str
    form: ModelForm
    weights: Weights | None = None
    is_version: bool = True
    files: Mapping[str, str] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One question.

    Attributes:
        model: None: the adapter is looked at by itself.
        peft: version that would load it, like `0.21.0`.
        proof: what the behaviour probe gave, in words; None: it was not run.
        proven: whether these are the recorded outputs.
        purpose: `load` as a wrapper around the model; `merge` into the weights, or with other adapters; `hotswap`
            into a slot of a compiled model.
    """

    adapter: AdapterSide
    model: ModelSide | None = None
    peft: str = KNOWN_PEFT
    purpose: Purpose = "load"
    proof: str | None = None
    proven: bool = False

    @cached_property
    def targeting(self) -> Targeting | None:
        """What the adapter's configuration targets; None where it has none."""
        return None if self.adapter.config is None else Targeting(self.adapter.config)

    @cached_property
    def placing(self) -> Placing:
        """Where the adapter's targets are in the model; nothing is placed without one."""
        form = None if self.model is None else self.model.form
        is_version = self.model is not None and self.model.is_version
        config = self.adapter.config
        replication = () if config is None else config.layer_replication
        return place(self.adapter.targets, form, is_version=is_version, replication=replication)
