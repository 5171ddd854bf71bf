"""One interface for all merging methods. A method is a pure function from a `Group` to the merged update of each of its
matrices, as factors or as dense matrices; everything around it (reading, grouping, rank, rounding, report) is shared.
A new method is one file in `methods/`, and its name in `methods/__init__.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from registry.merge.group import Group
from registry.merge.low_rank import LowRank

if TYPE_CHECKING:
    from registry.merge.methods import OptionName

Function = Callable[[Group], "LowRank | Tensor"]
Form = Literal["factors", "dense"]


@dataclass(frozen=True)
class Method:
    """A method and what a caller must know of it.

    Attributes:
        function: gives, for a group, the merged update: `LowRank` of any rank (`form` factors), or (batch, out, in).
        form: `factors`: a dense update is never made; `dense`: one is made for each source.
        options: which of `Options` it reads; `density` has to be given where it stands here.
        exact: whether the result is the weighted sum, but for what a rank cuts off.
        sources: (least, most) number of sources; most None: any.
        factor_wise: works on A and B apart, as PEFT's methods of the name do, so sources need one rank, and the
            result is not what the method of this name does to the updates.
        paper: where it is defined.
    """

    name: str
    function: Function
    form: Form
    options: tuple[OptionName, ...]
    exact: bool
    sources: tuple[int, int | None]
    factor_wise: bool
    paper: str


def method(
    name: str,
    *,
    form: Form,
    paper: str,
    options: tuple[OptionName, ...] = (),
    exact: bool = False,
    sources: tuple[int, int | None] = (1, None),
    factor_wise: bool = False,
) -> Callable[[Function], Method]:
    """Makes a method of a function, as a decorator."""

    def make(function: Function) -> Method:
        return Method(name, function, form, options, exact, sources, factor_wise, paper)

    return make
