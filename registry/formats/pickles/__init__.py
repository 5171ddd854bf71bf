"""Files of torch.save, pickle and dill as plain data, without running a line of them. A machine of our own
walks their instructions; neither torch nor dill nor omegaconf is imported, and no name in a file ever is."""

from registry.formats.pickles.limits import LIMITS, Budget, Limits
from registry.formats.pickles.reading import PickleFile, is_pickle, read_pickle_bytes, read_pickle_file
from registry.formats.pickles.tensors import StorageRef, StorageTensor, TensorRef
from registry.formats.pickles.values import Opaque, OpaqueGlobal, Ordered
from registry.formats.pickles.walk import walk

__all__ = [
    "LIMITS",
    "Budget",
    "Limits",
    "Opaque",
    "OpaqueGlobal",
    "Ordered",
    "PickleFile",
    "StorageRef",
    "StorageTensor",
    "TensorRef",
    "is_pickle",
    "read_pickle_bytes",
    "read_pickle_file",
    "walk",
]
