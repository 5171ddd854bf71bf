"""torch's own names: storages, dtypes, and the functions that rebuild tensors. What safetensors cannot hold
(quantised, sparse, nested, meta) is refused by its name, with `UnsupportedTensor`."""

from __future__ import annotations

from functools import partial

from registry.core.layout import DTYPE_BITS
from registry.formats.pickles.context import Context, described
from registry.formats.pickles.known import Known, Rebuild, is_size, only, words
from registry.formats.pickles.tensors import StorageTensor, TensorRef
from registry.formats.pickles.values import OpaqueGlobal

Arguments = tuple[object, ...]

DTYPES: dict[str, str] = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "bool": "BOOL",
    "complex64": "C64",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}
"""torch's dtypes that are whole bytes of safetensors."""

OTHER_DTYPES = words(
    """
    complex32 complex128 qint8 qint32 quint8 quint4x2 quint2x4 bits8 bits16 bits1x8 bits2x4 bits4x2 float4_e2m1fn_x2
    int1 int2 int3 int4 int5 int6 int7 uint1 uint2 uint3 uint4 uint5 uint6 uint7
    """
)
"""torch's dtypes that safetensors does not have, or that are no whole bytes."""

STORAGES: dict[str, str] = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QInt32Storage": "qint32",
    "QUInt8Storage": "quint8",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
    "UntypedStorage": "uint8",
    "_UntypedStorage": "uint8",
    "TypedStorage": "uint8",
}
"""Classes of storages, in `torch`, `torch.cuda` or `torch.storage`, and the dtype of their elements."""

_STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")
_CONVERT = "convert it to a plain dense tensor of a common dtype and save again"


def storage_dtype(context: Context, cls: object) -> str:
    """The safetensors code of a storage class's elements.

    Raises:
        UnsafePickle: it is no storage class; UnsupportedTensor: safetensors has no such dtype.
    """
    if not isinstance(cls, OpaqueGlobal) or cls.module not in _STORAGE_MODULES or cls.name not in STORAGES:
        raise context.unsafe(described(cls), "takes for a class of storages")
    return _code(context, STORAGES[cls.name])


def _code(context: Context, dtype: str) -> str:
    if dtype not in DTYPES:
        raise context.unsupported(f"a tensor of torch.{dtype}, which safetensors cannot hold", _CONVERT)
    return DTYPES[dtype]


# ------------------------------------------------------------------------------------------- tensors


def view(
    context: Context, storage: object, offset: object, shape: object, stride: object, dtype: str | None = None
) -> TensorRef:
    """A view of a storage that is known to lie inside it."""
    if not isinstance(storage, StorageTensor):
        raise context.malformed("a storage for a tensor", described(storage))
    if not isinstance(shape, tuple | list) or not isinstance(stride, tuple | list):
        raise context.malformed("shape and stride of a tensor", f"{described(shape)} and {described(stride)}")
    if len(shape) != len(stride) or len(shape) > context.budget.limits.dimensions:
        raise context.malformed(
            f"a stride for each of at most {context.budget.limits.dimensions} dimensions",
            f"{len(shape)} dimensions and {len(stride)} strides",
        )
    if not is_size(offset) or not all(map(is_size, shape)) or not all(map(is_size, stride)):
        raise context.malformed(
            "a tensor's offset, shape and stride of whole numbers from 0 up",
            ", ".join(described(part) for part in (offset, *shape[:4], *stride[:4])),
        )
    assert isinstance(offset, int)
    dtype = dtype or storage.dtype
    made_of, item = storage.itemsize, DTYPE_BITS[dtype] // 8
    if storage.offset * made_of % item:
        raise context.malformed(f"a storage that begins at a whole element of {dtype}", "one that does not")
    capacity = storage.elements * made_of // item
    tensor = TensorRef(storage.storage, dtype, tuple(shape), tuple(stride), storage.offset * made_of // item + offset)
    if tensor.elements:
        end = offset + 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if end > capacity:
            raise context.malformed(
                f"a tensor inside its storage of {capacity} elements", f"one that needs {end} elements"
            )
    context.budget.spend_tensor(tensor.nbytes)
    return tensor


def _tensor(context: Context, arguments: Arguments) -> TensorRef:
    if len(arguments) != 4:
        raise context.malformed("four arguments of a tensor", str(len(arguments)))
    return view(context, arguments[0], arguments[1], arguments[2], arguments[3])


def _tensor_v2(context: Context, arguments: Arguments) -> TensorRef:
    if len(arguments) not in (6, 7):
        raise context.malformed("six or seven arguments of a tensor", str(len(arguments)))
    _check_bits(context, arguments[6] if len(arguments) == 7 else None)
    return view(context, arguments[0], arguments[1], arguments[2], arguments[3])


def _tensor_v3(context: Context, arguments: Arguments) -> TensorRef:
    if len(arguments) not in (7, 8):
        raise context.malformed("seven or eight arguments of a tensor", str(len(arguments)))
    _check_bits(context, arguments[7] if len(arguments) == 8 else None)
    dtype = arguments[6]
    if not isinstance(dtype, OpaqueGlobal) or dtype.module != "torch":
        raise context.malformed("a dtype of torch", described(dtype))
    code = _code(context, dtype.name)
    return view(context, arguments[0], arguments[1], arguments[2], arguments[3], code)


def _check_bits(context: Context, metadata: object) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        raise context.malformed("the metadata of a tensor as a dict", described(metadata))
    for name, value in metadata.items():
        if value is not False:
            raise context.unsupported(
                f"a tensor with the bit {described(name)}", "save what .resolve_conj().resolve_neg() gives"
            )


def _parameter(count: int, context: Context, arguments: Arguments) -> TensorRef:
    if len(arguments) != count or not isinstance(arguments[0], TensorRef):
        raise context.malformed("a tensor for a parameter", ", ".join(map(described, arguments[:4])))
    return arguments[0]


def _from_type(context: Context, arguments: Arguments) -> object:
    """A tensor of a subclass, or with attributes, which are left out."""
    if len(arguments) != 4:
        raise context.malformed("four arguments of torch._tensor._rebuild_from_type_v2", str(len(arguments)))
    function, cls, inner, _ = arguments
    if not isinstance(function, OpaqueGlobal) or (function.module, function.name) not in _TENSOR_FUNCTIONS:
        raise context.unsafe(described(function))
    if not isinstance(cls, OpaqueGlobal) or (cls.module, cls.name) not in _TENSOR_CLASSES:
        raise context.unsupported(f"a tensor of the class {described(cls)}", _CONVERT)
    if not isinstance(inner, tuple):
        raise context.malformed("the arguments of a tensor in a tuple", described(inner))
    return _TENSOR_FUNCTIONS[function.module, function.name](context, inner)


def _unsupported(name: str, context: Context, arguments: Arguments) -> object:
    raise context.unsupported(f"a tensor that {name} rebuilds, which safetensors cannot hold", _CONVERT)


def _load_from_bytes(context: Context, arguments: Arguments) -> object:
    """How a storage is pickled without torch.save: as the bytes of a torch file of its own."""
    return context.read_bytes(only(context, arguments, bytes, "torch.storage._load_from_bytes"), context)


# ------------------------------------------------------------------------------------------- plain values


def _size(context: Context, arguments: Arguments) -> tuple[object, ...]:
    if len(arguments) != 1 or not isinstance(arguments[0], tuple | list) or not all(map(is_size, arguments[0])):
        raise context.malformed("whole numbers for torch.Size", ", ".join(map(described, arguments[:4])))
    context.budget.spend_items(len(arguments[0]))
    return tuple(arguments[0])


def _device(context: Context, arguments: Arguments) -> str:
    match arguments:
        case (str(kind),):
            return kind
        case (str(kind), int(index)):
            return f"{kind}:{index}"
    raise context.invalid("a device", ", ".join(map(described, arguments[:4])))


_LAYOUTS = words("strided sparse_coo sparse_csr sparse_csc sparse_bsr sparse_bsc jagged _mkldnn")


def _layout(context: Context, arguments: Arguments) -> OpaqueGlobal:
    name = only(context, arguments, str, "torch.serialization._get_layout").removeprefix("torch.")
    if name not in _LAYOUTS:
        raise context.invalid("a layout of torch", described(name))
    return OpaqueGlobal("torch", name)


_TENSOR_FUNCTIONS: dict[tuple[str, str], Rebuild] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): partial(_parameter, 3),
    ("torch._utils", "_rebuild_parameter_with_state"): partial(_parameter, 4),
    **{
        ("torch._utils", name): partial(_unsupported, f"torch._utils.{name}")
        for name in (
            "_rebuild_sparse_tensor",
            "_rebuild_sparse_csr_tensor",
            "_rebuild_nested_tensor",
            "_rebuild_device_tensor_from_cpu_tensor",
            "_rebuild_device_tensor_from_numpy",
            "_rebuild_xla_tensor",
            "_rebuild_meta_tensor_no_storage",
            "_rebuild_wrapper_subclass",
            "_rebuild_qtensor",
        )
    },
}

_TENSOR_CLASSES = {
    ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.nn.parameter", "Buffer"),
}

_NAMES = [
    *DTYPES,
    *OTHER_DTYPES,
    *_LAYOUTS,
    *words("per_tensor_affine per_tensor_symmetric per_channel_affine per_channel_symmetric"),
    *words("per_channel_affine_float_qparams contiguous_format channels_last channels_last_3d preserve_format"),
    *(f"{kind}Tensor" for kind in words("Float Double Half BFloat16 Long Int Short Char Byte Bool")),
]

TORCH: dict[tuple[str, str], Known] = {
    **{name: Known(rebuild) for name, rebuild in _TENSOR_FUNCTIONS.items()},
    **{name: Known() for name in _TENSOR_CLASSES},
    **{("torch", name): Known() for name in _NAMES},
    **{("torch.cuda", name): Known() for name in _NAMES if name.endswith("Tensor")},
    **{(module, name): Known() for module in _STORAGE_MODULES for name in STORAGES},
    ("torch._tensor", "_rebuild_from_type_v2"): Known(_from_type),
    ("torch.storage", "_load_from_bytes"): Known(_load_from_bytes),
    ("torch.serialization", "_get_layout"): Known(_layout),
    ("torch", "Size"): Known(_size, is_class=True),
    ("torch", "device"): Known(_device, is_class=True),
}
