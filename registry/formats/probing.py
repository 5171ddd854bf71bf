"""Making a behaviour probe of a live model when it is pushed: from inputs that the user gave, or from inputs that are
made for it. Given inputs that do not work are an error; made ones that do not work are a note, and the push goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from registry.core.errors import ForwardFailed, InvalidInput, ModelChanged
from registry.core.reference import shown
from registry.formats.live import find_adapted
from registry.formats.probe import MAX_TENSOR_BYTES, MAX_VALUES, Probe, can_be_compared
from registry.formats.probe_inputs import SEED, Call, made_calls
from registry.formats.probe_tree import Sample, leaves, plain_inputs
from registry.formats.proof import compare
from registry.formats.quiet_run import device_of, dtypes_of, refuse_unrunnable, run
from registry.formats.tuner_layers import refuse_inactive, tuner_layers

Wanted = bool | Literal["auto"] | torch.Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What a push takes as `probe=`: True or `auto` makes inputs, False makes no probe, a tensor is the one argument, a
tuple holds the positional arguments, and a mapping the keyword arguments. One dict as the only positional argument is
`({"obs": obs},)`."""
REPEATED = 1e-6
"""The largest relative difference of two calls; a GPU may add up in another order each time."""
_GIVE = "give inputs with probe= (a tensor, a tuple of arguments or a dict of keyword arguments)"


@dataclass(frozen=True, slots=True)
class NoProbe:
    """Why there is no probe; None where none was wanted."""

    note: str | None = None


def make_probe(model: nn.Module, wanted: object, *, adapter: str | None = None) -> Probe | NoProbe:
    """Calls a model, which is left as it was, and keeps what it was given and what it returned.

    Args:
        wanted: see `Wanted`.
        adapter: the adapter that is pushed alone; None where the whole of the model is.

    Raises:
        InvalidInput: given inputs that the model does not take (ForwardFailed), that give random outputs, or that
            cannot be kept.
        ModelChanged: the call wrote to the model's weights, also with inputs that were made.
    """
    if wanted is False:
        return NoProbe()
    if wanted is not True and not (isinstance(wanted, str) and wanted == "auto"):
        return _probe(model, given_call(wanted), adapter)
    try:
        return _probe(model, None, adapter)
    except ModelChanged:
        raise
    except InvalidInput as error:
        return NoProbe(f"no behaviour probe: {error}; {_GIVE}")


def given_call(wanted: object) -> Call:
    """The call that `probe=` means.

    Raises:
        InvalidInput: none of the forms, or a value that cannot be kept.
    """
    if isinstance(wanted, torch.Tensor):
        return Call((plain_inputs(wanted, "probe"),))
    if isinstance(wanted, tuple):
        return Call(tuple(plain_inputs(one, f"probe.{place}") for place, one in enumerate(wanted)))
    if isinstance(wanted, Mapping):
        return Call((), plain_inputs(wanted, "probe"))
    hint = "; a list as the one argument is ([...],)" if isinstance(wanted, list) else ""
    raise InvalidInput(
        f"probe={shown(repr(wanted))}: expected True, False, a tensor, a tuple of positional arguments or a dict of "
        f"keyword arguments, found a {type(wanted).__name__}{hint}"
    )


def _probe(model: nn.Module, given: Call | None, adapter: str | None) -> Probe:
    called, subject = _subject(model, adapter, made=given is None)
    refuse_unrunnable(called)
    if adapter is not None:
        refuse_inactive(called if subject == "adapted" else model, adapter)
    call, outputs = _first_that_runs(called, made_calls(called) if given is None else iter([given]))
    _refuse_large(call, outputs)
    if not can_be_compared(outputs):
        raise InvalidInput(f"the {type(called).__name__} returns no tensor that could be compared")
    again = compare(outputs, run(called, call.args, call.kwargs, seed=1))
    if again.findings or any(one.relative > REPEATED for one in again.differences):
        raise InvalidInput(
            f"the {type(called).__name__} gives other outputs when it is called again with the same inputs, so they "
            "prove nothing; does it draw random numbers?"
        )
    main, coarsest = dtypes_of(called)
    return Probe(
        args=call.args,
        kwargs=call.kwargs,
        outputs=outputs,
        subject=subject,
        adapter=adapter is not None or any(not layer.disable_adapters for layer in tuner_layers(called)),
        seed=SEED if given is None else None,
        dtype=_name(main),
        coarsest=_name(coarsest),
        device=device_of(called).type,
        torch_version=str(torch.__version__),
    )


def _subject(model: nn.Module, adapter: str | None, *, made: bool) -> tuple[nn.Module, Literal["model", "adapted"]]:
    """What is called. An adapter is loaded into whatever holds it, so our inputs go to the model that carries it."""
    holder = None if adapter is None else find_adapted(model)
    if holder is not None and (made or holder is model):
        return holder, "adapted"
    return model, "model"


def _first_that_runs(model: nn.Module, calls: Iterator[Call]) -> tuple[Call, Any]:
    failed: ForwardFailed | None = None
    while True:
        try:
            call = next(calls)
        except InvalidInput:
            raise
        except Exception as error:  # StopIteration, or code of the model: its configuration, its `dummy_inputs`
            name = type(model).__name__
            raise failed or ForwardFailed(f"no inputs for {name} could be made: {shown(repr(error), 300)}") from error
        try:
            return call, run(model, call.args, call.kwargs)
        except ForwardFailed as error:
            failed = failed or error


def _refuse_large(call: Call, outputs: Any) -> None:
    values = [leaf for _, leaf in leaves([call.args, call.kwargs, outputs], "")]
    if len(values) > MAX_VALUES:
        raise InvalidInput(f"a probe keeps at most {MAX_VALUES} values, found {len(values)}")
    tensors = [leaf.values if isinstance(leaf, Sample) else leaf for leaf in values]
    size = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
    if size > MAX_TENSOR_BYTES:
        raise InvalidInput(
            f"a probe keeps at most {MAX_TENSOR_BYTES} bytes of inputs and outputs, found {size}; take a smaller batch"
        )


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
