"""The code of a model as data: one row a module with its kind, sizes and parameters, and what the model was built with.
An adapter fits a model by these rows, so they are kept with every base and compared before a byte of weights is read.
Where only a file of tensors is known, `form_of_layout` tells what its names and shapes do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from registry.core.canonical_json import canonical_json, parse_json
from registry.core.digest import sha256_hex
from registry.core.errors import InvalidInput
from registry.core.layout import DTYPE_BITS, NOT_IN_A_NAME, TensorSpec
from registry.core.reference import shown
from registry.core.tensor_names import base_name, is_adapter_tensor

ROLE = "modules"
"""The role of its document among what describes a version."""
LIVE_NAMES = "live_names"
"""That of the map from the names of saved tensors to those of the live model (formats/live_names.py)."""
ROUNDED = "rounded_digests"
"""That of the digests which a base's tensors have after a cast to bfloat16 (formats/rounding.py)."""
FORMAT = 1
MAX_BYTES = 64 << 20
MAX_NAME = 1000

KINDS = (
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "embedding",
    "transformers_conv1d",
    "attention",
    "experts",
    "quantised",
    "matrix",
    "other",
)
"""`transformers_conv1d` is transformers' linear with the transposed weight, `attention` torch's MultiheadAttention,
`experts` a module that holds parameters of three dimensions, one slice an expert, `matrix` a weight of two dimensions
of which no more is known (a linear, an embedding or a transformers_conv1d)."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter or persistent buffer of a module, without its bytes.

    Attributes:
        name: within the module, like `weight`.
        dtype: safetensors code; empty where it has none (packed by a quantiser).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Module:
    """One module that has parameters of its own.

    Attributes:
        path: in the model, as `named_modules` has it, without what PEFT wraps around; empty for the model itself.
        kind: one of `KINDS`.
        type_name: name of its class, only ever text; empty where it is not known.
        in_features: what a linear or attention takes, channels of a convolution (over all groups), rows of an
            embedding; None for other modules.
        out_features: what it gives; width of an embedding.
        bias: whether it has one; None where that does not apply.
        groups: of a convolution.
        tied_to: path of the first module that has the same weight in memory.
    """

    path: str
    kind: str
    type_name: str = ""
    in_features: int | None = None
    out_features: int | None = None
    bias: bool | None = None
    groups: int = 1
    tied_to: str | None = None
    parameters: tuple[Parameter, ...] = ()

    def parameter(self, name: str) -> Parameter | None:
        return next((one for one in self.parameters if one.name == name), None)


@dataclass(frozen=True)
class ModelForm:
    """A model's modules, and what else decides what it computes.

    Attributes:
        modules: those with parameters, by path.
        exact: read from the model itself; False: worked out from the names and shapes of saved tensors, whose modules
            may have other names in the live model.
        class_name: module and qualified name of its class, only ever text; None where it is not known.
        arguments: of its constructor, or its configuration, as plain JSON; None where they are not known.
        source: for each class of the model that is not torch's, by qualified name, the sha256 of its source less layout
            and comments (formats/source_code.py).
        packages: versions of the packages that these classes come from.
        prefix: by which models with a head name the body (`base_model_prefix` of transformers), like `bert`.
        has: which of the attributes exist that PEFT asks a model of some task for (`ASKED_ATTRIBUTES`).
    """

    modules: tuple[Module, ...]
    exact: bool = True
    class_name: str | None = None
    arguments: Mapping[str, Any] | None = field(default=None, hash=False)
    source: Mapping[str, str] = field(default_factory=dict, hash=False)
    packages: Mapping[str, str] = field(default_factory=dict, hash=False)
    prefix: str = ""
    has: tuple[str, ...] = ()

    @cached_property
    def by_path(self) -> dict[str, Module]:
        return {module.path: module for module in self.modules}

    @cached_property
    def paths(self) -> frozenset[str]:
        """Paths of all modules, those without parameters of their own that hold others included."""
        found: set[str] = set()
        for module in self.modules:
            path = module.path
            while path and path not in found:
                found.add(path)
                path = path.rpartition(".")[0]
        return frozenset(found)

    @cached_property
    def by_end(self) -> dict[str, tuple[str, ...]]:
        """Paths by their last two names."""
        found: dict[str, list[str]] = {}
        for module in self.modules:
            found.setdefault(".".join(module.path.split(".")[-2:]), []).append(module.path)
        return {end: tuple(paths) for end, paths in found.items()}

    @cached_property
    def ties(self) -> dict[str, tuple[str, ...]]:
        """For each module whose weight others share: the paths of all of them, itself included."""
        groups: dict[str, list[str]] = {}
        for module in self.modules:
            if module.tied_to is not None:
                groups.setdefault(module.tied_to, [module.tied_to]).append(module.path)
        return {path: tuple(group) for group in groups.values() for path in group}

    @cached_property
    def fingerprint(self) -> str | None:
        """sha256 over the sources of the model's classes, 64 hex digits; None where they are not known."""
        return sha256_hex(canonical_json(dict(self.source), "the sources")) if self.source else None

    @cached_property
    def document(self) -> bytes:
        """Canonical JSON, which `read_model_form` reads; see docs/format.md.

        Raises:
            InvalidInput: arguments that are no plain JSON, or a document of more than `MAX_BYTES`.
        """
        tree = {
            "format": FORMAT,
            "exact": self.exact,
            "class": self.class_name,
            "arguments": None if self.arguments is None else dict(self.arguments),
            "source": dict(self.source),
            "packages": dict(self.packages),
            "prefix": self.prefix,
            "has": list(self.has),
            "modules": [_row(module) for module in self.modules],
        }
        data = canonical_json(tree, "the modules of the model")
        if len(data) > MAX_BYTES:
            raise InvalidInput(f"the modules of the model take {len(data)} bytes; expected at most {MAX_BYTES}")
        return data

    @cached_property
    def digest(self) -> str:
        """sha256 of `document`, 64 hex digits."""
        return sha256_hex(self.document)


ASKED_ATTRIBUTES = ("config", "get_input_embeddings", "prepare_inputs_for_generation")


def _row(module: Module) -> list[Any]:
    return [
        module.path,
        module.kind,
        module.type_name,
        module.in_features,
        module.out_features,
        module.bias,
        module.groups,
        module.tied_to,
        [[one.name, one.dtype, list(one.shape)] for one in module.parameters],
    ]


def read_model_form(data: bytes, what: str) -> ModelForm:
    """Reads what `ModelForm.document` wrote. Members that are not known are ignored: later programs may add some.

    Args:
        what: names the document in errors.

    Raises:
        InvalidInput: it is none, one of another format, or too large.
    """
    if len(data) > MAX_BYTES:
        raise InvalidInput(f"{what} has {len(data)} bytes; expected at most {MAX_BYTES}")
    try:
        tree = parse_json(data)
        if tree["format"] != FORMAT or type(tree["format"]) is not int:
            raise InvalidInput(
                f"{what}: expected format {FORMAT}, found {shown(repr(tree['format']))}; upgrade this program"
            )
        form = ModelForm(
            modules=tuple(_module(row) for row in tree["modules"]),
            exact=_is(tree["exact"], bool),
            class_name=_is(tree["class"], str, type(None)),
            arguments=_is(tree["arguments"], dict, type(None)),
            source=_texts(tree["source"]),
            packages=_texts(tree["packages"]),
            prefix=_text(tree["prefix"]),
            has=tuple(_text(one) for one in _is(tree["has"], list)),
        )
    except InvalidInput:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InvalidInput(f"{what} is no list of modules: {shown(repr(error), 200)}") from error
    if len(form.by_path) != len(form.modules):
        raise InvalidInput(f"{what} names one module twice")
    return form


def _module(row: Any) -> Module:
    path, kind, type_name, in_features, out_features, bias, groups, tied_to, parameters = row
    if kind not in KINDS:
        kind = "other"  # of a later program
    return Module(
        path=_text(path),
        kind=kind,
        type_name=_text(type_name),
        in_features=_size(in_features),
        out_features=_size(out_features),
        bias=_is(bias, bool, type(None)),
        groups=_size(groups) or 1,
        tied_to=None if tied_to is None else _text(tied_to),
        parameters=tuple(
            Parameter(_text(name), _text(dtype), tuple(_size(size) or 0 for size in shape))
            for name, dtype, shape in parameters
        ),
    )


def _is(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise ValueError(f"expected {' or '.join(kind.__name__ for kind in kinds)}, found {type(value).__name__}")
    return value


def _text(value: Any) -> str:
    text: str = _is(value, str)
    if len(text) > MAX_NAME or NOT_IN_A_NAME.search(text):
        raise ValueError(f"a name of {len(text)} characters, or one with a control character")
    return text


def _texts(value: Any) -> dict[str, str]:
    return {_text(key): _text(one) for key, one in _is(value, dict).items()}


def _size(value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 0):
        raise ValueError(f"a size of {value!r}"[:100])
    size: int | None = value
    return size


# ---------------------------------------------------------------- from a file of tensors


def form_of_layout(tensors: Iterable[TensorSpec], names: Mapping[str, Any] | None = None) -> ModelForm:
    """The form of a model of which the saved tensors are known; adapter tensors and wrappers are left out.

    Args:
        names: the map from saved to live names of this component, as it stands in a `live_names` document; None: the
            model has the saved names, or other ones that nobody told.
    """
    specs = [
        TensorSpec(base_name(one.name), one.dtype, one.shape) for one in tensors if not is_adapter_tensor(one.name)
    ]
    tied: Mapping[str, str] = {}
    if names is not None:
        renamed, tied = names["renamed"], names["tied"]
        gone = {name for one in names["converted"] for group in one["saved"] for name in group}
        dtypes = {spec.name: spec.dtype for spec in specs}
        made = [
            TensorSpec(name, next((dtypes[saved] for group in one["saved"] for saved in group), ""), tuple(shape))
            for one in names["converted"]
            for name, shape in one["live"]
        ]
        kept = [
            TensorSpec(renamed.get(one.name, one.name), one.dtype, one.shape) for one in specs if one.name not in gone
        ]
        by_name = {spec.name: spec for spec in (*kept, *made)}
        twice = [
            TensorSpec(name, by_name[other].dtype, by_name[other].shape)
            for name, other in tied.items()
            if other in by_name and name not in by_name
        ]
        specs = [*by_name.values(), *twice]
    held: dict[str, list[Parameter]] = {}
    for spec in specs:
        path, _, leaf = spec.name.rpartition(".")
        held.setdefault(path, []).append(Parameter(leaf, spec.dtype, spec.shape))
    owners = {name.rpartition(".")[0]: other.rpartition(".")[0] for name, other in tied.items()}
    return ModelForm(tuple(_saved_module(path, held[path], owners.get(path)) for path in sorted(held)), exact=False)


def _saved_module(path: str, parameters: list[Parameter], tied_to: str | None) -> Module:
    parameters.sort(key=lambda one: one.name)
    by_name = {one.name: one for one in parameters}
    bias = "bias" in by_name
    kind = "other"
    sizes: tuple[int | None, int | None] = (None, None)
    flag: bool | None = None
    weight, fused = by_name.get("weight"), by_name.get("in_proj_weight")
    packed = {"qweight", "weight_packed", "qzeros", "SCB"} & by_name.keys()
    if packed or any(name.startswith("weight.") for name in by_name) or (weight and not _is_plain(weight.dtype)):
        kind = "quantised"
    elif fused is not None and len(fused.shape) == 2:
        kind, sizes, flag = "attention", (fused.shape[1], fused.shape[1]), "in_proj_bias" in by_name
    elif weight is not None and len(weight.shape) == 2:
        kind, sizes, flag = "matrix", (weight.shape[1], weight.shape[0]), bias
    elif weight is not None and 3 <= len(weight.shape) <= 5:
        # Channels of one group; how many groups there are stands in no file.
        kind, sizes, flag = f"conv{len(weight.shape) - 2}d", (weight.shape[1], weight.shape[0]), bias
    elif any(len(one.shape) == 3 for one in parameters):
        kind = "experts"
    return Module(path, kind, "", *sizes, bias=flag, tied_to=tied_to, parameters=tuple(parameters))


def _is_plain(dtype: str) -> bool:
    return dtype == "BF16" or (dtype.startswith("F") and DTYPE_BITS.get(dtype, 0) >= 16)
