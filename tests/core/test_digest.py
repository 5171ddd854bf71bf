from __future__ import annotations

import hashlib

import pytest
from blake3 import blake3

from registry.core.digest import index_prefix, is_digest, pack_digests, sha256_hex, tensor_hasher, unpack_digests
from registry.core.errors import InvalidManifest


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0" * 63,
        "0" * 65,
        "0" * 63 + "g",
        "A" * 64,
        "0" * 64 + "\n",
        " " + "0" * 63,
        "\u0660" * 64,
        None,
        0,
        b"0" * 64,
    ],
)
def test_what_is_not_64_lower_case_hex_digits_is_no_digest(text: object) -> None:
    assert not is_digest(text)


def test_sha256_is_that_of_sha256sum() -> None:
    assert sha256_hex(b"abc") == hashlib.sha256(b"abc").hexdigest()
    assert is_digest(sha256_hex(b""))


def digest(dtype: str, shape: tuple[int, ...], data: bytes) -> str:
    hasher = tensor_hasher(dtype, shape)
    hasher.update(data)
    return str(hasher.hexdigest())


def test_a_tensor_digest_is_blake3_of_head_and_bytes() -> None:
    assert digest("BF16", (2, 1), b"\x80\x3f\x00\x40") == blake3(b"BF16[2,1]\n\x80\x3f\x00\x40").hexdigest()
    assert digest("F32", (), b"\0\0\0\0") == blake3(b"F32[]\n\0\0\0\0").hexdigest()


def test_equal_bytes_of_another_dtype_or_shape_are_another_tensor() -> None:
    data = bytes(8)
    kinds = [("F32", (2,)), ("I32", (2,)), ("F32", (1, 2)), ("F32", (2, 1)), ("F16", (4,)), ("F64", ()), ("F64", (1,))]
    assert len({digest(dtype, shape, data) for dtype, shape in kinds}) == len(kinds)


def test_it_does_not_matter_in_which_pieces_the_bytes_come() -> None:
    data = bytes(range(256)) * 20
    pieces = tensor_hasher("U8", (5120,))
    for start in range(0, len(data), 777):
        pieces.update(memoryview(data)[start : start + 777])
    assert pieces.hexdigest() == digest("U8", (5120,), data)


def test_packed_digests_are_32_bytes_each_in_their_order() -> None:
    digests = tuple(sha256_hex(bytes([n])) for n in range(5))
    packed = pack_digests(digests)
    assert packed == b"".join(bytes.fromhex(one) for one in digests)
    assert unpack_digests(packed) == digests
    assert unpack_digests(b"") == ()


@pytest.mark.parametrize("length", [1, 31, 33, 63])
def test_packed_digests_of_another_length_are_refused(length: int) -> None:
    with pytest.raises(InvalidManifest, match=f"{length} bytes"):
        unpack_digests(bytes(length))


def test_an_index_prefix_is_a_signed_word_of_64_bits() -> None:
    assert index_prefix("00" * 7 + "01" + "ff" * 24) == 1
    assert index_prefix("ff" * 32) == -1
    assert index_prefix("80" + "00" * 31) == -(2**63)
    assert index_prefix("7f" + "ff" * 31) == 2**63 - 1
