"""The merging methods, one file a family. Their names and what they do in a line stand here, where reading them imports
no torch; `find_method` imports the one that is asked for."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Literal

from registry.core.errors import InvalidInput
from registry.core.reference import shown

if TYPE_CHECKING:
    from registry.merge.method import Method

OptionName = Literal["density", "majority", "inner", "seed"]

METHODS: dict[str, tuple[str, str]] = {
    "cat": ("weighted_sum", "the weighted sum, exact, in the sum of the ranks"),
    "svd": ("weighted_sum", "the best approximation of the weighted sum in a given rank"),
    "slerp": ("slerp", "two updates, along the arc between them"),
    "knots": ("knots", "ties or dare on updates that are aligned by a common SVD"),
    "tsv": ("tsv", "singular vectors of all updates, decorrelated"),
    "ties": ("ties", "trim, elect signs, mean of those that agree; on the updates"),
    "dare_linear": ("dare", "drop at random and rescale, then add; on the updates"),
    "dare_ties": ("dare", "drop at random and rescale, then elect signs; on the updates"),
    "magnitude_prune": ("magnitude_prune", "keep the largest elements, then add; on the updates"),
    "linear": ("peft_factors", "PEFT's linear: sums of A and of B, with cross terms"),
    "ties_factors": ("peft_factors", "PEFT's ties: on A and on B, with cross terms"),
    "dare_linear_factors": ("peft_factors", "PEFT's dare_linear: on A and on B, with cross terms"),
    "dare_ties_factors": ("peft_factors", "PEFT's dare_ties: on A and on B, with cross terms"),
    "magnitude_prune_factors": ("peft_factors", "PEFT's magnitude_prune: on A and on B, with cross terms"),
}
"""name -> (module of this package, what it does)."""

OPTIONS: dict[str, tuple[OptionName, ...]] = {
    "cat": (),
    "svd": (),
    "slerp": (),
    "knots": ("density", "majority", "inner", "seed"),
    "tsv": (),
    "ties": ("density", "majority"),
    "dare_linear": ("density", "seed"),
    "dare_ties": ("density", "majority", "seed"),
    "magnitude_prune": ("density",),
    "linear": (),
    "ties_factors": ("density", "majority"),
    "dare_linear_factors": ("density", "seed"),
    "dare_ties_factors": ("density", "majority", "seed"),
    "magnitude_prune_factors": ("density",),
}
"""name -> the parameters that it reads; a test holds this against the methods."""
MAJORITIES = ("total", "frequency")
"""Values of the option `majority`."""
INNER = ("ties", "dare_ties", "dare_linear", "magnitude_prune")
"""Values of the option `inner`."""
DENSE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Methods that make dense updates, whose result becomes an adapter by an SVD."""


def find_method(name: str) -> Method:
    """The method of a name.

    Raises:
        InvalidInput: there is none; with the nearest.
    """
    if name not in METHODS:
        raise unknown(name)
    module = import_module(f"{__name__}.{METHODS[name][0]}")
    found: Method = getattr(module, name)
    return found


def unknown(name: str) -> InvalidInput:
    """What is said of a name that is no method's."""
    near = get_close_matches(name.lower(), METHODS, 1)
    hint = f"; did you mean {near[0]}?" if near else "."
    return InvalidInput(f"no merging method '{shown(name)}'{hint} There are {', '.join(METHODS)}")
