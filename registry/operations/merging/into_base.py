"""Adapters merged into a base: the base's tensors stream from store to store, one at a time. An untouched tensor stays
where it lies, a touched one is read, proven, changed, and handed to the push, which hashes and writes it in that same
pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from registry.catalog.contents import Contents, StoredComponent
from registry.compat.placing import Placed
from registry.core.adapter_config import AdapterConfig
from registry.core.digest import tensor_hasher
from registry.core.errors import DigestMismatch, InvalidInput, NotStored
from registry.core.layout import Layout
from registry.core.model_form import LIVE_NAMES
from registry.core.model_form import ROLE as MODULES
from registry.core.reference import shown
from registry.core.tensor_names import base_name, is_adapter_tensor
from registry.core.zeros import zero_tensors
from registry.formats.live import MODEL_TENSORS, tensor_bytes
from registry.formats.paths import ADAPTER_CONFIG
from registry.formats.source import CHUNK_BYTES, MadeFile, PlainFileInMemory, Source, Stored
from registry.merge.combine import combine
from registry.merge.compress import RankChoice
from registry.merge.group import Options
from registry.merge.lora_modules import LoraModule
from registry.merge.methods import find_method
from registry.merge.model_weights import MergedTensor, WeightUpdate, added_update, merged_bias, merged_weight
from registry.operations.base_fit import live_names_by_component
from registry.operations.context import Context
from registry.operations.merging.adapters import TORCH_DTYPES, arithmetic_of, method_weights, one_module
from registry.operations.merging.copies import CopiedTensor, copied_tensor
from registry.operations.merging.plan import SUMS, MergePlan
from registry.operations.merging.report import ModuleReport
from registry.operations.merging.request import check_device
from registry.operations.merging.sources import SourceTensors
from registry.operations.reading import BlobReader, blob_bytes

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURE = "architecture"


@dataclass(frozen=True)
class _Touched:
    """What happens to one saved tensor of the base.

    Attributes:
        module: path of the target; empty for a whole copy.
        placed: by number of the source: where the target is in the base.
        is_bias: it is the bias of the module.
        copied: a tensor that takes its place.
    """

    module: str
    placed: Mapping[int, Placed]
    is_bias: bool = False
    copied: CopiedTensor | None = None


def merge_into_base(
    context: Context, plan: MergePlan, contents: Contents, described: Mapping[str, str], note: Callable[[str], None]
) -> tuple[Source, list[ModuleReport]]:
    """The merged base as a source: its tensors are made while it is pushed, and the reports are complete after that.

    Args:
        contents: of the base.
        described: digests of what describes the base, by role.

    Raises:
        NotStored: the base is recorded without its bytes.
        InvalidInput: a target that is no tensor of the base by itself, a policy that is not given.
    """
    base = plan.base
    if base is None:
        raise AssertionError("a merge into a base has one")
    if contents.external:
        raise NotStored(
            f"{base.reference} is recorded without its bytes, and merging into it reads and writes them all; push it "
            "again "
            "without --external, or merge the adapters alone"
        )
    component = contents.components["model"]
    inner = next((spec.name for spec in component.layout if is_adapter_tensor(spec.name)), None)
    if inner is not None:
        raise InvalidInput(
            f"{base.reference} holds an adapter beside its weights ({shown(inner, 200)}): merged into it, that would "
            "count "
            "as well; push the base by itself, and merge into that"
        )
    check_device(plan.request.device)
    kept = [role for role in (LIVE_NAMES, MODULES, ARCHITECTURE) if role in described]
    documents = {role: blob_bytes(context.store.blobs, described[role]) for role in kept}
    saved = saved_names(component.layout, documents.get(LIVE_NAMES))
    touched = _touched(plan, component, saved)
    reports: list[ModuleReport] = []
    resources = ExitStack()
    making = resources.enter_context(_Making(context, plan, component, touched, reports, note))
    blobs = context.store.blobs
    stored = {
        ordinal: Stored(digest, blob, place, blobs.size(blob))
        for ordinal, (digest, (blob, place)) in enumerate(zip(component.tensors, component.places, strict=True))
        if ordinal not in touched
    }
    carried = [one.path for one in contents.files if one.role == "model" and one.path.endswith(".safetensors")]
    path = carried[0] if len(carried) == 1 else MODEL_TENSORS
    file = MadeFile(path, "model", component.layout, stored=stored, read=making.read, metadata={"format": "pt"})
    source = Source(
        form="merged model",
        kind="base",
        tensor_files=(file,),
        plain_files=tuple(_plain_files(context, contents)),
        described=documents,
        recipe=plan.recipe,
        resources=resources,
    )
    return source, reports


def saved_names(layout: Layout, live_names: bytes | None) -> dict[str, str]:
    """Live name -> name in the state dict, of tensors that are one tensor there."""
    own = {base_name(spec.name): spec.name for spec in layout}
    if live_names is None:
        return own
    try:
        names = live_names_by_component(live_names)["model"]
        gone = {name for one in names["converted"] for group in one["saved"] for name in group}
        renamed = names["renamed"]
        found = {renamed.get(name, name): saved for name, saved in own.items() if name not in gone}
        return found | {name: found[other] for name, other in names["tied"].items() if other in found}
    except (ValueError, KeyError, TypeError, AttributeError):
        return own  # a map of another program


def _plain_files(context: Context, contents: Contents) -> Iterator[PlainFileInMemory]:
    """Configuration, tokenizer and the like go with the model; the index of its shards and adapters do not."""
    files = {digest for digest, role in contents.blobs if role == "file"}
    for file in contents.files:
        name = PurePosixPath(file.path).name
        if file.whole and file.blob in files and not name.endswith(".index.json") and name != ADAPTER_CONFIG:
            yield PlainFileInMemory(file.path, blob_bytes(context.store.blobs, file.blob))


def _touched(plan: MergePlan, component: StoredComponent, saved: Mapping[str, str]) -> dict[int, _Touched]:
    """Ordinal of each tensor that is changed -> what changes it."""
    layout = component.layout
    ordinals = {spec.name: ordinal for ordinal, spec in enumerate(layout)}
    base = "" if plan.base is None else plan.base.reference

    def ordinal_of(live: str, *, copied: bool) -> int:
        if live not in saved:
            raise InvalidInput(
                f"{shown(live, 200)} is no tensor of {base} by itself (it may be made of several when it is loaded), "
                "so "
                "nothing can be merged into it"
            )
        spec = layout.tensors[ordinals[saved[live]]]
        if not copied and spec.dtype not in TORCH_DTYPES:
            raise InvalidInput(
                f"{shown(live, 200)} of {base} is {spec.dtype}: quantised weights are not merged into; use the base in "
                "full precision"
            )
        return ordinals[saved[live]]

    found: dict[int, _Touched] = {}
    twins = {} if plan.base is not None and plan.base.side.form.exact else _twins(component)

    def touch(live: str, what: _Touched) -> None:
        ordinal = ordinal_of(live, copied=what.copied is not None)
        if not plan.request.force and ordinal in twins:
            raise InvalidInput(
                f"{shown(live, 200)} of {base} is the same tensor as {shown(twins[ordinal], 200)}: if they are tied, "
                "a merge "
                "would change one of the two alone; untie them first, or --force where they only happen to be equal"
            )
        if ordinal in found:
            raise InvalidInput(
                f"{shown(live, 200)} of {base} is one tensor with another target's (tied weights): a merge would "
                "change "
                "both; untie them first, or leave one of the adapters out"
            )
        found[ordinal] = what

    places: dict[str, dict[int, Placed]] = {}
    for number, placing in enumerate(plan.placings):
        for placed in placing.placed:
            if placed.target.module in plan.sources[number].modules:
                places.setdefault(placed.target.module, {})[number] = placed
    for path, having in plan.modules().items():
        placed = next(iter(places[path].values()))
        kind = having[0][1].target.kind.partition("+")[0]
        weight = {"attention": ".in_proj_weight", "parameter": ""}.get(kind, ".weight")
        if kind == "parameter" and placed.path not in saved:
            raise InvalidInput(
                f"{shown(path, 200)}: which of several parameters of this module the factors are for stands in no "
                "file of "
                "PEFT, so they cannot be merged into a base; merge adapters with each other, or with one of "
                "target_parameters a module"
            )
        touch(placed.path + weight, _Touched(path, places[path]))
        if any("lora_bias" in module.target.kind.split("+") for _, module in having):
            bias = ".in_proj_bias" if kind == "attention" else ".bias"
            touch(placed.path + bias, _Touched(path, places[path], is_bias=True))
    for copied in plan.copies.tensors:
        if copied.name.endswith("trainable_tokens_delta"):
            raise InvalidInput(
                f"{shown(copied.name, 200)}: trained tokens are not merged into a base; --saved drop leaves them out"
            )
        name = copied.name
        if name not in saved:
            raise InvalidInput(f"{shown(name, 200)}: {base} has no such tensor, so the whole copy has no place in it")
        touch(name, _Touched("", {}, copied=copied))
    return found


def _twins(component: StoredComponent) -> dict[int, str]:
    """Ordinal of each matrix that stands under another name as well, in the same bytes -> that name. Zeros apart."""
    zeros = zero_tensors(zip(component.layout, component.tensors, strict=True))
    first: dict[str, int] = {}
    found: dict[int, str] = {}
    for ordinal, (spec, digest) in enumerate(zip(component.layout, component.tensors, strict=True)):
        if len(spec.shape) < 2 or spec.name in zeros:
            continue
        other = first.setdefault(digest, ordinal)
        if other != ordinal:
            found[ordinal] = component.layout.tensors[other].name
            found[other] = spec.name
    return found


class _Making:
    """Makes the touched tensors, in order, the next one while the last is written; close it after use."""

    def __init__(
        self,
        context: Context,
        plan: MergePlan,
        component: StoredComponent,
        touched: Mapping[int, _Touched],
        reports: list[ModuleReport],
        note: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._component = component
        self._touched = touched
        self._reports = reports
        self._note = note
        self._order = sorted(touched)
        self._stack = ExitStack()
        blobs = context.store.blobs
        self._untouched = self._stack.enter_context(BlobReader(blobs))
        self._base = self._stack.enter_context(BlobReader(blobs))
        self._tensors = self._stack.enter_context(SourceTensors(blobs))
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="registry-merge")
        self._pending: dict[int, Future[Tensor]] = {}
        self._modules = plan.modules()

    def __enter__(self) -> _Making:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._stack.close()

    def read(self, ordinal: int) -> Iterator[memoryview]:
        """Bytes of one tensor, made or as it lies in the base."""
        if ordinal not in self._touched:
            blob, place = self._component.places[ordinal]
            for chunk in self._untouched.tensor(blob, place):
                yield memoryview(chunk)
            return
        made = self._result(ordinal)
        view = tensor_bytes(made)
        for start in range(0, len(view), CHUNK_BYTES):
            yield view[start : start + CHUNK_BYTES]

    def _result(self, ordinal: int) -> Tensor:
        mine = self._pending.pop(ordinal, None) or self._pool.submit(self._make, ordinal)
        following = next((one for one in self._order if one > ordinal), None)
        if following is not None and following not in self._pending:
            self._pending[following] = self._pool.submit(self._make, following)
        return mine.result()

    def _make(self, ordinal: int) -> Tensor:
        touched = self._touched[ordinal]
        if touched.copied is not None:
            spec = self._component.layout.tensors[ordinal]
            copied = copied_tensor(touched.copied, self._plan.sources, self._tensors)
            if tuple(copied.shape) != spec.shape:
                raise InvalidInput(
                    f"{shown(spec.name, 200)} has the shape {list(spec.shape)} in the base, and {list(copied.shape)} "
                    "in "
                    "the adapter's copy"
                )
            # A counter of a BatchNorm, say, is whole, and stays so.
            return copied.to(TORCH_DTYPES[spec.dtype]) if spec.dtype in TORCH_DTYPES else copied
        weight = self._weight(ordinal)
        having = self._modules[touched.module]
        names = [set(module.tensors) for _, module in having]
        tensors = [
            self._tensors.read(self._plan.sources[number].component, wanted)
            for (number, _), wanted in zip(having, names, strict=True)
        ]
        return self._changed(weight, touched, having, tensors)

    def _weight(self, ordinal: int) -> Tensor:
        """The base's own tensor, proven."""
        import torch

        spec = self._component.layout.tensors[ordinal]
        blob, place = self._component.places[ordinal]
        hasher = tensor_hasher(spec.dtype, spec.shape)
        data = bytearray(spec.nbytes)
        view = memoryview(data)
        done = 0
        for chunk in self._base.tensor(blob, place):
            view[done : done + len(chunk)] = chunk
            done += len(chunk)
        hasher.update(view)
        if hasher.hexdigest() != self._component.tensors[ordinal]:
            what = f"tensor {spec.name} in blob {blob}"
            raise DigestMismatch(what, expected=self._component.tensors[ordinal], actual=hasher.hexdigest())
        flat = torch.frombuffer(data, dtype=TORCH_DTYPES[spec.dtype]) if data else torch.empty(0)
        return flat.reshape(spec.shape)

    def _changed(
        self,
        weight: Tensor,
        touched: _Touched,
        having: Sequence[tuple[int, LoraModule]],
        tensors: Sequence[Mapping[str, Tensor]],
    ) -> Tensor:
        """The new tensor of one module, and its report."""
        plan, path = self._plan, touched.module
        arithmetic = arithmetic_of(plan)
        weights = method_weights(plan, path)
        updates = [
            WeightUpdate(module, read, weights[number], self._config(number))
            for (number, module), read in zip(having, tensors, strict=True)
        ]
        if touched.is_bias:
            merged = merged_bias(weight, updates, dtype=arithmetic.dtype)
            self._report(f"{path} (bias)", having, merged, merged.norm, merged.error)
            return merged.tensor.cpu()
        kind = next(iter(touched.placed.values())).module
        turned = None if kind is None else {"transformers_conv1d": True, "linear": False}.get(kind.kind)
        times = plan.request.attention_out or 1
        if plan.request.method in SUMS:
            merged = self._on_device(
                lambda device: merged_weight(
                    weight,
                    updates,
                    turned=turned,
                    attention_out_times=times,
                    dtype=arithmetic.dtype,
                    device=device,
                ),
                path,
            )
            self._report(path, having, merged, merged.norm, merged.error)
            return merged.tensor.cpu()
        (update,) = combine(
            [one_module(plan, path, having, tensors)],
            find_method(plan.request.method),
            Options(**plan.request.options),
            RankChoice(),
            arithmetic=arithmetic,
            dense=True,
            note=self._note,
        )
        result = update.factors if update.dense is None else update.dense
        if result is None:
            raise AssertionError("a merged update has a form")
        merged = self._on_device(
            lambda device: added_update(
                weight,
                result,
                module=having[0][1],
                config=self._config(having[0][0]),
                turned=turned,
                attention_out_times=times,
                dtype=arithmetic.dtype,
                device=device,
            ),
            path,
        )
        # Of the method against the sum, and of the rounding against the method's result.
        self._report(path, having, merged, update.norm, (update.error**2 + merged.error**2) ** 0.5)
        return merged.tensor.cpu()

    def _on_device(self, make: Callable[[str], MergedTensor], path: str) -> MergedTensor:
        """On the device that was asked for; where that has not the memory, on the CPU."""
        import torch

        device = self._plan.request.device
        try:
            return make(device)
        except torch.OutOfMemoryError:
            if device == "cpu":
                raise
        torch.cuda.empty_cache()
        self._note(f"{device} has not the memory for {path}: computed on the CPU")
        return make("cpu")

    def _config(self, number: int) -> AdapterConfig:
        side = self._plan.sources[number].side
        if side.config is None:
            raise AssertionError("without a configuration no scaling is known")
        return replace(side.config, peft_version=side.written_by)

    def _report(
        self, path: str, having: Sequence[tuple[int, LoraModule]], merged: MergedTensor, norm: float, error: float
    ) -> None:
        ranks = sum(module.target.rank for _, module in having)
        share = merged.unmoved_share if merged.moving else None
        report = ModuleReport(path, len(having), ranks, None, norm, error, share, merged.moving)
        self._reports[:] = [*(one for one in self._reports if one.path != path), report]
