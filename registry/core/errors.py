"""The one error tree. Every refusal of this package is a `RegistryError`; anything else that
escapes is a bug. Each branch owns an exit code; attributes carry the values, the message names
the thing, what was expected and found, and the mend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from registry.core.findings import Finding


class RegistryError(Exception):
    """Base of all errors of this package.

    Attributes:
        exit_code: what the command line exits with; one number for each branch of the tree.
    """

    exit_code: ClassVar[int] = 3


class InvalidInput(RegistryError, ValueError):
    """Something that the caller gave cannot be used as it is."""

    exit_code = 3


class InvalidReference(InvalidInput):
    """A name, tag, number or digest prefix that is not well formed."""


class InvalidManifest(InvalidInput):
    """A manifest that does not follow docs/format.md."""


class InvalidConfig(InvalidInput):
    """An adapter configuration that cannot be read as one."""


class InvalidQuery(InvalidInput):
    """A `--where` or `--sort` expression that is not well formed or names an unknown field."""


class UnsafePickle(InvalidInput):
    """A pickle that would call something outside the short list of known functions."""


class MalformedTensors(InvalidInput):
    """A safetensors file or header that breaks the format's rules."""


class UnsupportedTensor(InvalidInput):
    """A tensor that safetensors cannot hold: quantised, sparse, meta, or of an unknown dtype."""


class ShapeMismatch(InvalidInput):
    """Two tensors whose shapes had to agree and do not."""


class ForwardFailed(InvalidInput):
    """A model's own code raised when it was called with a probe's inputs."""


class ModelChanged(InvalidInput):
    """Calling a model changed its weights, so that it is not what it was."""


class NotFound(RegistryError, LookupError):
    """Something that was asked for by name is not there."""

    exit_code = 4


class RegistryNotFound(NotFound):
    """No registry at the given place."""


class SourceNotFound(NotFound):
    """The file or folder to push does not exist."""


class ArtifactNotFound(NotFound):
    """No such `namespace/name`."""


class VersionNotFound(NotFound):
    """The name is known, this version of it is not."""


class TagNotFound(NotFound):
    """The name is known, this tag of it is not."""


class BlobNotFound(NotFound):
    """The store holds no blob of this digest."""


class NotStored(NotFound):
    """A version that is recorded without its bytes: it can be checked against, not pulled or loaded."""


class Conflict(RegistryError):
    """What was asked for clashes with what is there."""

    exit_code = 5


class TagMoved(Conflict):
    """The tag no longer points where the caller expected."""


class TagProtected(Conflict):
    """The tag is protected: lift the protection before moving or deleting it."""


class LineageCycle(Conflict):
    """An edge that would make a version its own ancestor."""


class InUse(Conflict):
    """Something that others still need cannot be removed."""


class DestinationExists(Conflict):
    """A pull would overwrite files; `--force` allows it."""


class Corrupt(RegistryError):
    """Stored bytes are not what they must be."""

    exit_code = 6


class DigestMismatch(Corrupt):
    """Bytes whose digest is not the recorded one.

    Attributes:
        expected: the recorded digest.
        actual: the digest of the bytes that were found.
    """

    def __init__(self, what: str, *, expected: str, actual: str) -> None:
        self.expected = expected
        self.actual = actual
        super().__init__(f"{what}: expected digest {expected}, found {actual}")


class Incompatible(RegistryError):
    """An adapter or checkpoint does not fit the model.

    Attributes:
        findings: all differences, each naming the tensor or module, expected and found.
    """

    exit_code = 7

    def __init__(self, message: str, findings: Sequence[Finding] = ()) -> None:
        self.findings = tuple(findings)
        lines = [message, *(f"  {finding}" for finding in self.findings)]
        super().__init__("\n".join(lines))


class Denied(RegistryError, PermissionError):
    """The caller may not do this."""

    exit_code = 8


class Unauthorized(Denied):
    """Who is calling is not known."""


class Forbidden(Denied):
    """Who is calling is known, and may not."""


class StorageError(RegistryError, OSError):
    """The store or the database cannot do what was asked."""

    exit_code = 9


class Contended(StorageError):
    """The database ended a transaction for another writer's sake; the same again succeeds."""


class ReadOnly(StorageError):
    """The registry can be read, not written."""


class NoSpace(StorageError):
    """The disk or the quota is full."""


class SchemaOutOfDate(StorageError):
    """Database and program are of different schema revisions."""


class StoreUnreachable(StorageError):
    """The database or the store does not answer."""


class WrongStore(StorageError):
    """Catalog and store belong to two different registries."""
