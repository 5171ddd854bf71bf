"""What `diff` answers, as values: facts that differ, tensors by name, and modules by what their adapters add to a
weight. `a` and `b` are always the first and the second version."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from registry.catalog.contents import StoredFile
from registry.core.layout import TensorSpec
from registry.operations.version import Version

Change = Literal["added", "removed", "changed"]
"""`added`: only the second version has it; `removed`: only the first."""


@dataclass(frozen=True)
class Norms:
    """Two tensors or updates against each other, computed in float64.

    Attributes:
        a, b: Frobenius norms.
        distance: Frobenius norm of the difference.
        cosine: of the angle between the two, -1 to 1; None where one of them is zero.
    """

    a: float
    b: float
    distance: float
    cosine: float | None

    @property
    def relative(self) -> float | None:
        """The distance over the larger norm, 0 to 2; None where both are zero."""
        if not math.isfinite(self.distance):
            return math.nan
        larger = max(self.a, self.b)
        return self.distance / larger if larger else None


@dataclass(frozen=True)
class ValueDifference:
    """One fact that differs: a key of the configuration, a metadata value, a metric, ...; `a` is None where the first
    version has no such key (`added`), `b` where the second has none."""

    key: str
    change: Change
    a: object
    b: object


@dataclass(frozen=True)
class FileDifference:
    """One file that differs in a byte, or that only one version has."""

    path: str
    change: Change
    a: StoredFile | None
    b: StoredFile | None


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that differs.

    Attributes:
        name: without wrapper prefix and adapter name.
        a, b: name, dtype and shape in each version; None where it has no such tensor.
        module: the module whose `ModuleDifference` measures it, as a factor of that module's update; else empty.
        norms: of floats and complex numbers of one shape, if the weights were read and `module` is empty.
        elements: how many elements differ, of other dtypes.
        note: why it could not be measured.
    """

    name: str
    change: Change
    a: TensorSpec | None
    b: TensorSpec | None
    module: str = ""
    norms: Norms | None = None
    elements: int | None = None
    note: str = ""

    @property
    def relative(self) -> float | None:
        """The relative distance, or the share of elements that differ; None where neither is known."""
        if self.norms is not None:
            return self.norms.relative
        return None if self.elements is None or self.a is None else self.elements / max(1, self.a.elements)


@dataclass(frozen=True)
class ModuleSide:
    """One adapter's part in a module.

    Attributes:
        kind, rank: as `Target` has them.
        scaling: of the product of the factors; None where alpha is unknown.
    """

    kind: str
    rank: int
    scaling: float | None


@dataclass(frozen=True)
class ModuleDifference:
    """One module that the two adapters change differently.

    Attributes:
        module: its path in the base model.
        a, b: None where that adapter leaves the module alone, so that its update is zero.
        norms: of the updates `scaling * B @ A`, if the weights were read.
        note: why they could not be measured so; the tensors themselves are then compared.
    """

    module: str
    change: Change
    a: ModuleSide | None
    b: ModuleSide | None
    norms: Norms | None = None
    note: str = ""

    @property
    def relative(self) -> float | None:
        return None if self.norms is None else self.norms.relative


@dataclass(frozen=True)
class ComponentDifference:
    """One state dict of the two versions.

    Attributes:
        change: `added` and `removed` for one that only one version has; its tensors are then only counted. None where
            the tensors are the same.
        count_a, count_b: how many tensors it has.
        same: how many tensors are the same in both.
        tensors: those that are not, the largest relative change first.
        modules: of an adapter's component, likewise.
        same_modules: how many modules with factors do not differ.
        values: what differs in its state document: values beside tensors, by the path where they stand.
    """

    role: str
    change: Change | None
    count_a: int
    count_b: int
    same: int
    tensors: tuple[TensorDifference, ...] = ()
    modules: tuple[ModuleDifference, ...] = ()
    same_modules: int = 0
    values: tuple[ValueDifference, ...] = ()


@dataclass(frozen=True)
class Difference:
    """What is different between two versions.

    Equal content, that is what they compute with, may still come in another form, which the facts, files and
    configuration then show.

    Attributes:
        facts: of the versions: kind, base, peft_version, message.
        config: keys of the adapters' configurations, each value in one spelling.
        weights: whether the weights were read.
        notes: what could not be compared, and why.
    """

    a: Version
    b: Version
    facts: tuple[ValueDifference, ...]
    config: tuple[ValueDifference, ...]
    metadata: tuple[ValueDifference, ...]
    metrics: tuple[ValueDifference, ...]
    files: tuple[FileDifference, ...]
    components: tuple[ComponentDifference, ...]
    weights: bool
    notes: tuple[str, ...]

    @property
    def same_content(self) -> bool:
        """Whether the two compute with the same, by their content digests."""
        return self.a.content_digest == self.b.content_digest
