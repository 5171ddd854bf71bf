"""The behaviour probe as a document: what a model was given, and what it returned. It is one safetensors blob: the
tensors of both, and in `__metadata__` canonical JSON under the key `probe` that says where they belong. Reading one
builds plain data only; nothing in it is run or imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from registry.core.canonical_json import canonical_json, parse_json
from registry.core.errors import InvalidInput
from registry.core.layout import DTYPE_BITS, Layout
from registry.core.reference import shown
from registry.core.safetensors_header import Header, build_header, header_length, parse_header
from registry.formats.probe_tree import DTYPES, MAX_DEPTH, Sample, from_json, leaves, to_json

if TYPE_CHECKING:
    import torch

FORMAT = 1
MAX_TENSOR_BYTES = 16 << 20
"""Of a probe's inputs and outputs together."""
MAX_VALUES = 1000
"""Tensors, numbers and texts of a probe."""
MAX_DOCUMENT_BYTES = 2 << 20
MAX_BLOB_BYTES = MAX_TENSOR_BYTES + 2 * MAX_DOCUMENT_BYTES

_KEY = "probe"
_MEMBERS = {
    *("format", "subject", "args", "kwargs", "outputs", "inputs", "seed"),
    *("training", "adapter", "dtype", "coarsest", "device", "torch"),
}
_CLEAN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_DTYPE = re.compile(r"[a-z0-9_]{1,40}")
_DEVICE = re.compile(r"[a-z]{1,20}")
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_MAX_NESTING = 4 * (MAX_DEPTH + 4)


@dataclass(frozen=True, eq=False)
class Probe:
    """A call of a model in eval mode, without gradients, and what came of it.

    Attributes:
        args: positional arguments; trees as `probe_tree` has them, tensors on the CPU.
        kwargs: keyword arguments.
        outputs: what was returned.
        subject: what was called: the `model` that was pushed, or what carries the adapter (`adapted`), whatever stood
            around it.
        adapter: whether an adapter took part.
        seed: of the inputs that were made; None where they were given.
        dtype: of most floating-point parameters and buffers, as torch names it; None where there are none.
        coarsest: the one of them with the fewest bits of precision.
        device: class of the device, `cpu` or `cuda`.
        torch_version: of the run.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(hash=False)
    outputs: Any
    subject: Literal["model", "adapted"]
    adapter: bool
    seed: int | None
    dtype: str | None
    coarsest: str | None
    device: str
    torch_version: str

    @property
    def made(self) -> bool:
        """Whether the inputs were made from the model's signature, and not given."""
        return self.seed is not None

    def to_bytes(self) -> bytes:
        """The blob; equal probes have equal bytes.

        Raises:
            InvalidInput: larger than a reader takes.
        """
        from registry.formats.live import tensor_bytes, tensor_spec

        tensors: dict[str, torch.Tensor] = {}

        def keep(path: str, tensor: torch.Tensor) -> str:
            # Two paths can be spelled alike, where a key has a dot in it.
            clean = _CLEAN_NAME.fullmatch(path) is not None and path not in tensors
            name = path if clean else f"{path.partition('.')[0]}#{len(tensors)}"
            tensors[name] = tensor
            return name

        document = canonical_json(
            {
                "format": FORMAT,
                "subject": self.subject,
                "args": [to_json(one, f"inputs.{place}", keep) for place, one in enumerate(self.args)],
                "kwargs": to_json(dict(self.kwargs), "inputs", keep),
                "outputs": to_json(self.outputs, "outputs", keep),
                "inputs": "made" if self.made else "given",
                "seed": self.seed,
                "training": False,
                "adapter": self.adapter,
                "dtype": self.dtype,
                "coarsest": self.coarsest,
                "device": self.device,
                "torch": self.torch_version,
            },
            "the probe",
        )
        if len(document) > MAX_DOCUMENT_BYTES:
            raise InvalidInput(f"the probe's document has {len(document)} bytes; {MAX_DOCUMENT_BYTES} is the most")
        rank = {dtype: place for place, dtype in enumerate(DTYPE_BITS)}
        # As safetensors orders them: by dtype, so that each begins at a multiple of its size.
        specs = sorted((tensor_spec(*one) for one in tensors.items()), key=lambda spec: (-rank[spec.dtype], spec.name))
        layout = Layout(tuple(specs))
        if layout.nbytes > MAX_TENSOR_BYTES:
            raise InvalidInput(f"the probe's tensors have {layout.nbytes} bytes; {MAX_TENSOR_BYTES} is the most")
        head = build_header(layout, {"format": "pt", _KEY: document.decode()})
        return head + b"".join(bytes(tensor_bytes(tensors[spec.name])) for spec in layout)


def read_probe(data: bytes, what: str) -> Probe:
    """Reads a probe's blob; the inverse of `Probe.to_bytes`.

    Args:
        what: names the blob in errors.

    Raises:
        InvalidInput: not a probe of this format (MalformedTensors: not even a safetensors file).
    """
    header, document = _document(data, what)
    tensors = _tensors(data, header, what)

    def take(name: str) -> torch.Tensor:
        if name not in tensors:
            raise InvalidInput(f"expected a tensor that no other place has, found {shown(name)}")
        return tensors.pop(name)

    try:
        args = from_json(document["args"], "inputs", take)
        kwargs = from_json(document["kwargs"], "inputs", take)
        outputs = from_json(document["outputs"], "outputs", take)
    except InvalidInput as error:
        raise InvalidInput(f"{what}: {error}") from error
    _expect(isinstance(args, list), what, "args", "a list", args)
    _expect(isinstance(kwargs, dict), what, "kwargs", "an object", kwargs)
    _expect(not tensors, what, "tensors", "only such as inputs and outputs name", sorted(tensors)[:1])
    count = sum(1 for _ in leaves([args, kwargs, outputs], ""))
    _expect(count <= MAX_VALUES, what, "values", f"at most {MAX_VALUES}", count)
    _expect(can_be_compared(outputs), what, "outputs", "a tensor or a number with a point", document["outputs"])
    return Probe(
        args=tuple(args),
        kwargs=kwargs,
        outputs=outputs,
        subject=document["subject"],
        adapter=document["adapter"],
        seed=document["seed"],
        dtype=document["dtype"],
        coarsest=document["coarsest"],
        device=document["device"],
        torch_version=document["torch"],
    )


def can_be_compared(outputs: Any) -> bool:
    """Whether there is anything in a tree of outputs that a proof could measure."""
    import torch

    return any(isinstance(leaf, torch.Tensor | Sample | float) for _, leaf in leaves(outputs, ""))


def _document(data: bytes, what: str) -> tuple[Header, dict[str, Any]]:
    if len(data) > MAX_BLOB_BYTES:
        raise InvalidInput(f"{what}: expected at most {MAX_BLOB_BYTES} bytes, found {len(data)}")
    size = header_length(data[:8], file_size=len(data), what=what)
    header = parse_header(data[:size], file_size=len(data), what=what)
    text = header.metadata.get(_KEY, "")
    _expect(0 < len(text) <= MAX_DOCUMENT_BYTES, what, "document", f"1 to {MAX_DOCUMENT_BYTES} characters", len(text))
    # The interpreter's stack is no guard: under a raised recursion limit json.loads dies of a deep document.
    depth = _nesting(text)
    _expect(depth <= _MAX_NESTING, what, "document", f"at most {_MAX_NESTING} levels", depth)
    try:
        document: Any = parse_json(text)
    except ValueError as error:
        raise InvalidInput(f"{what}: the document is no JSON: {shown(str(error))}") from error
    _expect(isinstance(document, dict), what, "document", "an object", document)
    _expect(document.get("format") == FORMAT, what, "format", f"{FORMAT}; upgrade the program", document.get("format"))
    _expect(document.keys() == _MEMBERS, what, "members", ", ".join(sorted(_MEMBERS)), sorted(document))
    _expect(canonical_json(document, what).decode() == text, what, "document", "canonical JSON", "another form")
    inputs, seed = document["inputs"], document["seed"]
    _expect(document["subject"] in ("model", "adapted"), what, "subject", "model or adapted", document["subject"])
    _expect(document["training"] is False, what, "training", "false", document["training"])
    _expect(type(document["adapter"]) is bool, what, "adapter", "true or false", document["adapter"])
    _expect(inputs in ("given", "made"), what, "inputs", "given or made", inputs)
    _expect((type(seed) is int) if inputs == "made" else seed is None, what, "seed", f"what fits {inputs} inputs", seed)
    for key, form in (("dtype", _DTYPE), ("coarsest", _DTYPE), ("device", _DEVICE)):
        value = document[key]
        fits = (value is None and key != "device") or (isinstance(value, str) and form.fullmatch(value) is not None)
        _expect(fits, what, key, "a name such as torch has", value)
    version = document["torch"]
    _expect(isinstance(version, str) and len(version) <= 100 and version.isprintable(), what, "torch", "text", version)
    return header, document


def _tensors(data: bytes, header: Header, what: str) -> dict[str, torch.Tensor]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    for spec in header.layout:
        _expect(
            spec.dtype in DTYPES, what, f"tensor {shown(spec.name)}", "a dtype that torch computes with", spec.dtype
        )
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise InvalidInput(f"{what}: the tensors cannot be read: {error}") from error
    for spec in header.layout:
        if spec.dtype == "BOOL" and spec.elements:
            highest = int(tensors[spec.name].view(torch.uint8).max())
            _expect(highest <= 1, what, f"tensor {shown(spec.name)}", "bytes of 0 and 1", highest)
    return tensors


def _nesting(text: str) -> int:
    deepest = depth = 0
    for sign in re.findall(r"[\[{\]}]", _STRING.sub("", text)):
        depth += 1 if sign in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _expect(holds: bool, what: str, part: str, expected: str, found: object) -> None:
    if not holds:
        raise InvalidInput(f"{what}: {part}: expected {expected}, found {shown(repr(found))}")
