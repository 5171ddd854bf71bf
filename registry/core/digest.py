"""Digests: sha256 for blobs, manifests and files, BLAKE3 for tensors (docs/format.md)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import sha256

from blake3 import blake3

from registry.core.errors import InvalidManifest

DIGEST_BYTES = 32
_HEX = re.compile(r"[0-9a-f]{64}")


def is_digest(text: object) -> bool:
    """Whether it is 64 lower-case hex digits."""
    return isinstance(text, str) and _HEX.fullmatch(text) is not None


def sha256_hex(data: bytes) -> str:
    return sha256(data).hexdigest()


def tensor_hasher(dtype: str, shape: Iterable[int]) -> blake3:
    """A BLAKE3 hasher that has read a tensor's head; feed it the row-major little-endian bytes.

    The head is the ASCII text `DTYPE[d0,d1,...]` and a line feed, so that equal bytes under another
    dtype or shape are another tensor.

    Args:
        dtype: safetensors dtype code.
        shape: as it stands in a safetensors header.
    """
    head = f"{dtype}[{','.join(map(str, shape))}]\n"
    return blake3(head.encode("ascii"))


def pack_digests(digests: Iterable[str]) -> bytes:
    """Hex digests as 32 bytes each, one after the other."""
    return bytes.fromhex("".join(digests))


def unpack_digests(packed: bytes) -> tuple[str, ...]:
    """Reads what `pack_digests` wrote.

    Raises:
        InvalidManifest: the length is no multiple of 32.
    """
    if len(packed) % DIGEST_BYTES:
        raise InvalidManifest(f"{len(packed)} bytes are not a whole number of {DIGEST_BYTES}-byte digests")
    text = packed.hex()
    return tuple(text[i : i + 64] for i in range(0, len(text), 64))


def index_prefix(digest: str) -> int:
    """The first 8 bytes of a digest as a signed integer, which both databases index as one word."""
    return int.from_bytes(bytes.fromhex(digest[:16]), "big", signed=True)
