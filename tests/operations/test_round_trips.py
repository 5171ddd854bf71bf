"""Whatever goes in comes out: adapters of every kind as PEFT loads them, files byte for byte, numbers bit for bit."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from registry import Registry
from registry.core.errors import UnsupportedTensor
from tests.compat.test_names_against_peft import TUNERS, tuned
from tests.compat.test_names_against_peft import VARIANTS as MORE_VARIANTS
from tests.operations.models import assert_same_bits, lora, named_tensors, output, train, walker, zoo

WRAPPED = ["emb", "lin", "conv1", "conv2", "conv3", "transposed"]
VARIANTS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["lin"]},
    "conv1d": {"target_modules": ["conv1"]},
    "conv2d": {"target_modules": ["conv2"]},
    "grouped convolution": {"target_modules": ["grouped"]},
    "conv3d": {"target_modules": ["conv3"]},
    "embedding": {"target_modules": ["emb"]},
    "Conv1D of transformers": {"target_modules": ["transposed"], "fan_in_fan_out": True},
    "MultiheadAttention": {"target_modules": ["mha"]},
    "everything": {"target_modules": [*WRAPPED, "grouped", "mha"]},
    "DoRA": {"target_modules": WRAPPED, "use_dora": True},
    "rsLoRA": {"target_modules": ["lin", "conv2"], "use_rslora": True},
    "rsLoRA and DoRA": {"target_modules": ["lin"], "use_rslora": True, "use_dora": True},
    "lora_bias": {"target_modules": ["lin", "conv2"], "lora_bias": True},
    "patterns": {
        "target_modules": ["lin", "conv2", "mha", "emb"],
        "rank_pattern": {"^lin": 2, "mha": 6, "out_proj": 5, r"conv\d": 3},
        "alpha_pattern": {"l.n": 10, "^(mha|emb)$": 7},
    },
    "modules_to_save": {"target_modules": ["lin"], "modules_to_save": ["head", "conv2"]},
    "an embedding saved": {"target_modules": ["lin"], "modules_to_save": ["emb"]},
    "all biases": {"target_modules": ["lin"], "bias": "all"},
    "own biases": {"target_modules": ["lin", "conv2"], "bias": "lora_only"},
    "tokens": {"target_modules": ["lin"], "trainable_token_indices": {"emb": [1, 3]}},
    "one parameter": {"target_modules": ["lin"], "target_parameters": ["experts.down_proj"]},
    "two parameters": {"target_modules": [], "target_parameters": ["experts.up_proj", "experts.down_proj"]},
    "an expression": {"target_modules": r"lin|conv\d", "exclude_modules": ["conv3"]},
    "all linear layers": {"target_modules": "all-linear"},
    "PiSSA": {"target_modules": ["lin"], "init_lora_weights": "pissa"},
    "OLoRA": {"target_modules": ["lin"], "init_lora_weights": "olora"},
    "gaussian": {"target_modules": ["lin", "emb"], "init_lora_weights": "gaussian"},
}
SURPRISES = ("missing", "unexpected", "not found", "newly initialized")


def without_warnings(make: Callable[[], Any]) -> Any:
    """PEFT warns of much that these models do on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def from_pretrained(base: nn.Module, folder: Path) -> PeftModel:
    """As a user of PEFT alone would, who is told of every key that is missing."""
    with warnings.catch_warnings(record=True) as noticed:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, folder)
    said = [str(one.message) for one in noticed]
    assert not [text for text in said if any(word in text.lower() for word in SURPRISES)]
    return model


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_lora_of_each_form_computes_the_same_afterwards(variant: str, registry: Registry, tmp_path: Path) -> None:
    options = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.1} | VARIANTS[variant]
    if "mha" in str(options["target_modules"]) or "target_parameters" in options or options.get("lora_bias"):
        options["lora_dropout"] = 0.0
    model = without_warnings(lambda: get_peft_model(zoo(), LoraConfig(**options)))
    train(model)
    expected = output(model.eval())
    assert not torch.equal(expected, output(zoo()))

    live = registry.push(model, "walk/perturb")
    without_warnings(lambda: model.save_pretrained(tmp_path / "saved"))
    folder = registry.push(tmp_path / "saved", "walk/perturb")
    assert [one.code for one in (*live.findings, *folder.findings)] == []
    assert folder.same_content_as == 1

    registry.pull("walk/perturb@1", tmp_path / "live", format="peft")
    assert torch.equal(output(from_pretrained(zoo(), tmp_path / "live")), expected)
    registry.pull("walk/perturb@2", tmp_path / "folder", format="peft")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "folder" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()

    assert torch.equal(output(without_warnings(lambda: registry.load("walk/perturb@1", zoo()))), expected)
    if "init_lora_weights" not in options:  # which would have changed this base in another way
        other = without_warnings(lambda: get_peft_model(zoo(), LoraConfig(**options)))
        train(other, seed=7)
        loaded = registry.load("walk/perturb@2", other.eval())
        assert loaded is other
        assert torch.equal(output(loaded), expected)


CASES: list[tuple[str, str, Callable[[], nn.Module], dict[str, Any]]] = [
    *(
        (f"{kind}-{i}", kind, make, options)
        for kind, cases in TUNERS.items()
        for i, (make, options) in enumerate(cases)
    ),
    *((f"LORA {name}", "LORA", make, options) for name, (make, options, _) in MORE_VARIANTS.items()),
]
COMPUTED = {"CPT-0", "PREFIX_TUNING-1", "P_TUNING-0", "P_TUNING-1", "VBLORA-1"}
"""PEFT saves what these compute, and not the parameters that they compute it from."""


def fresh(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[1, 2, 3]])).logits


@pytest.mark.parametrize(("case", "kind", "make", "options"), CASES, ids=[case[0] for case in CASES])
def test_an_adapter_of_each_tuner_comes_back(
    case: str, kind: str, make: Callable[[], nn.Module], options: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    model = without_warnings(lambda: tuned(kind, lambda: fresh(make), options, "default"))
    train(model)
    model.eval()
    live = registry.push(model, "walk/perturb")
    without_warnings(lambda: model.save_pretrained(tmp_path / "saved"))
    folder = registry.push(tmp_path / "saved", "walk/perturb")
    assert (live.kind, live.findings, folder.findings, folder.same_content_as) == ("adapter", (), (), 1)
    version = registry.get("walk/perturb@1")
    assert version.peft_type == kind
    sizes = [file.sha256 for file in registry.show("walk/perturb@1").contents.files if file.role]
    assert sizes == [file.sha256 for file in registry.show("walk/perturb@2").contents.files if file.role]

    registry.pull("walk/perturb@1", tmp_path / "pulled", format="peft")
    pulled = from_pretrained(fresh(make), tmp_path / "pulled")
    loaded = None
    if case != "VBLORA-1":  # PEFT itself does not set the very values that it saved
        loaded = without_warnings(lambda: registry.load("walk/perturb@1", fresh(make)))
        assert_same_state(loaded, pulled)
    if case not in COMPUTED:
        assert_same_state(pulled, model)
        again = without_warnings(lambda: tuned(kind, lambda: fresh(make), options, "default"))
        assert_same_state(registry.load("walk/perturb@2", again), model)
    if make.__name__ == "llama" and kind != "MULTITASK_PROMPT_TUNING":
        assert torch.equal(outputs(loaded), outputs(pulled))


def assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    ours, theirs = (dict(named_tensors(one)) for one in (actual, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert_same_bits(tensor, ours[name], name)


def test_what_a_newer_peft_wrote_stays_as_it_was(registry: Registry, tmp_path: Path) -> None:
    lora().save_pretrained(tmp_path / "saved")
    config = tmp_path / "saved" / "adapter_config.json"
    document = json.loads(config.read_bytes()) | {"use_hyperlora": {"gates": [1, 2]}, "peft_version": "0.99.0"}
    document["target_modules"] = document["target_modules"][::-1]
    config.write_text(json.dumps(document, indent=7))
    pushed = registry.push(tmp_path / "saved", "walk/perturb")
    assert [(one.code, one.severity, one.subject) for one in pushed.findings] == [("C02", "error", "use_hyperlora")]
    for form in ("native", "peft"):
        registry.pull("walk/perturb", tmp_path / form, format=form)
        assert (tmp_path / form / "adapter_config.json").read_bytes() == config.read_bytes()
    assert registry.get("walk/perturb").peft_version == "0.99.0"


def test_a_tuner_that_nobody_knows_is_kept_and_reported(registry: Registry, tmp_path: Path) -> None:
    lora().save_pretrained(tmp_path / "saved")
    config = tmp_path / "saved" / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "HYPERTUNE", "r": "many", "peft_version": "0.99.0"}))
    pushed = registry.push(tmp_path / "saved", "walk/perturb")
    assert [(one.code, one.severity) for one in pushed.findings] == [("C01", "error")]
    version = registry.get("walk/perturb")
    assert (version.peft_type, version.r, version.findings) == ("HYPERTUNE", None, 1)
    registry.pull("walk/perturb", tmp_path / "pulled")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "pulled" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


def test_the_version_of_an_old_peft_stays_unknown(registry: Registry, tmp_path: Path) -> None:
    model = lora()
    model.save_pretrained(tmp_path / "saved")
    config = tmp_path / "saved" / "adapter_config.json"
    document = json.loads(config.read_bytes())
    del document["peft_version"]
    config.write_text(json.dumps(document))
    registry.push(tmp_path / "saved", "walk/perturb")
    assert registry.get("walk/perturb").peft_version is None
    registry.pull("walk/perturb", tmp_path / "pulled", format="peft")
    assert (tmp_path / "pulled" / "adapter_config.json").read_bytes() == config.read_bytes()
    # It is the adapter that it was before, though.
    assert registry.push(model, "walk/perturb").same_content_as == 1


def test_a_live_push_remembers_its_peft_beside_the_content(registry: Registry, tmp_path: Path) -> None:
    import peft

    registry.push(lora(), "walk/perturb")
    registry.pull("walk/perturb", tmp_path / "native")
    registry.pull("walk/perturb", tmp_path / "peft", format="peft")
    native, with_version = (
        json.loads((tmp_path / form / "adapter_config.json").read_bytes()) for form in ("native", "peft")
    )
    assert "peft_version" not in native
    assert with_version == native | {"peft_version": peft.__version__}


def test_other_files_of_a_folder_come_back(registry: Registry, tmp_path: Path) -> None:
    lora().save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "training_args.bin").write_bytes(b"pickle")
    (tmp_path / "saved" / "adapter_model.bin").write_bytes(b"pickle")
    pushed = registry.push(tmp_path / "saved", "walk/perturb")
    assert pushed.notes == ("left out (the same weights in another form): adapter_model.bin",)
    registry.pull("walk/perturb", tmp_path / "again")
    (tmp_path / "saved" / "adapter_model.bin").unlink()
    for path in (tmp_path / "saved").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    without = registry.push(tmp_path / "saved", "walk/bare", attachments=False)
    assert without.notes == ("left out (no attachments): README.md, training_args.bin",)
    assert [file.path for file in registry.show("walk/bare").contents.files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


# ---------------------------------------------------------------- numbers that are none

WORST: dict[str, tuple[int, list[int], list[int]]] = {
    # dtype -> bytes a value, patterns that are NaN or Inf, and finite ones beside them (the largest, the smallest, -0)
    "F64": (8, [0x7FF0 << 48, 0xFFF0 << 48, 0x7FF0_0000_0000_0001, (1 << 64) - 1], [0x7FEF_FFFF_FFFF_FFFF, 1, 1 << 63]),
    "F32": (4, [0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF], [0x7F7FFFFF, 0xFF7FFFFF, 1, 1 << 31]),
    "F16": (2, [0x7C00, 0xFC00, 0x7C01, 0xFFFF], [0x7BFF, 0xFBFF, 1, 0x8000]),
    "BF16": (2, [0x7F80, 0xFF80, 0x7F81, 0xFFFF], [0x7F7F, 0xFF7F, 1, 0x8000]),
    "F8_E5M2": (1, [0x7C, 0xFC, 0x7D, 0x7E, 0x7F, 0xFF], [0x7B, 0xFB, 1, 0x80]),
    "F8_E4M3": (1, [0x7F, 0xFF], [0x7E, 0xFE, 1, 0x80]),
    "F8_E4M3FNUZ": (1, [0x80], [0x7F, 0xFF, 0, 1]),
    "F8_E5M2FNUZ": (1, [0x80], [0x7F, 0xFF, 0, 1]),
    "F8_E8M0": (1, [0xFF], [0xFE, 0, 1]),
    "C64": (4, [0x7F800000, 0x7FC00000], [0x7F7FFFFF, 1 << 31]),
    "F4": (1, [], [0x7F, 0xFF, 0x80, 0]),
    "F6_E2M3": (1, [], [0x7F, 0xFF, 0x80]),
    "I8": (1, [], [0x7F, 0xFF, 0x80]),
    "U64": (8, [], [0x7FF0 << 48, (1 << 64) - 1]),
    "I32": (4, [], [0x7F800000, 0xFFFFFFFF]),
}


FLOATS = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
"""Those that torch can be asked about."""


def one_tensor(path: Path, dtype: str, data: bytes, shape: list[int]) -> Path:
    header = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


@pytest.mark.parametrize("dtype", WORST)
def test_nan_and_infinity_are_found_in_each_dtype_and_nothing_else_is(
    dtype: str, registry: Registry, tmp_path: Path
) -> None:
    size, worst, finite = WORST[dtype]
    elements = {"C64": 6, "F4": 24, "F6_E2M3": 16}.get(dtype, 12)
    zeros = [0] * 12
    for number, (pattern, place) in enumerate(
        [*((bad, place) for bad in worst for place in (0, 11)), *((fine, 5) for fine in finite)]
    ):
        values = [*zeros[:place], pattern, *zeros[place + 1 :]]
        data = b"".join(value.to_bytes(size, "little") for value in values)
        if dtype in FLOATS:
            seen = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(FLOATS[dtype]).float()
            assert bool(seen.isfinite().all()) == (pattern in finite), hex(pattern)
        path = one_tensor(tmp_path / f"{number}.safetensors", dtype, data, [elements])
        pushed = registry.push(path, f"walk/n{number}")
        found = [(one.code, one.severity, one.subject) for one in pushed.findings]
        assert found == ([("C17", "error", "w")] if pattern in worst else []), hex(pattern)
        registry.pull(f"walk/n{number}", tmp_path / "out.safetensors", force=True)
        assert (tmp_path / "out.safetensors").read_bytes() == path.read_bytes()


def test_nan_at_the_end_of_a_large_tensor_is_found_live_and_from_disk(registry: Registry, tmp_path: Path) -> None:
    state = {name: torch.zeros(3_000_000) for name in ("fine", "late", "early")}
    state["late"][-1] = float("nan")
    state["early"][0] = float("inf")
    assert sum(value.nbytes for value in state.values()) > 16 << 20  # so it is read in one pass, in chunks
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for source in (state, tmp_path / "model.safetensors"):
        pushed = registry.push(source, "walk/base")
        assert {one.subject for one in pushed.findings} == {"late", "early"}
    assert pushed.version == 1
    loaded = registry.load("walk/base")
    assert loaded["late"].isnan().sum() == 1
    assert loaded["early"].isinf().sum() == 1


def test_of_many_tensors_with_nan_the_first_are_named_and_the_rest_counted(registry: Registry) -> None:
    state = {f"w{place:02}": torch.tensor([float("nan")]) for place in range(25)}
    found = registry.push(state, "walk/base").findings
    assert [one.subject for one in found] == [*(f"w{place:02}" for place in range(20)), ""]
    assert found[-1].message == "5 more tensors hold NaN or Inf"
    assert registry.get("walk/base").findings == 21


# ---------------------------------------------------------------- dtypes, as tensors and as files


def test_every_dtype_comes_back_as_tensors_and_as_a_file(registry: Registry, tmp_path: Path) -> None:
    from tests.formats.test_live import DTYPES, filled

    state = {code: filled(dtype, 4, 6) for code, dtype in DTYPES.items()}
    state |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "strided": torch.arange(6.0).reshape(2, 3).t()}
    registry.push(state, "walk/base")
    for loaded in (registry.load("walk/base"), _opened(registry, tmp_path)):
        assert loaded.keys() == state.keys()
        for name, tensor in state.items():
            assert_same_bits(tensor, loaded[name], name)


def _opened(registry: Registry, tmp_path: Path) -> dict[str, torch.Tensor]:
    registry.pull("walk/base", tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping


@pytest.mark.parametrize(("dtype", "shape"), [("F6_E2M3", [16]), ("F6_E3M2", [4, 4]), ("F4", [8, 3]), ("F4", [24, 1])])
def test_what_torch_has_no_dtype_for_is_kept_as_a_file(
    dtype: str, shape: list[int], registry: Registry, tmp_path: Path
) -> None:
    path = one_tensor(tmp_path / "model.safetensors", dtype, bytes(range(12)), shape)
    registry.push(path, "walk/base")
    registry.pull("walk/base", tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == path.read_bytes()
    with pytest.raises(UnsupportedTensor, match=rf"w: torch has no {dtype}.*pull the file"):
        registry.load("walk/base")


def test_a_name_in_any_language_comes_back(registry: Registry) -> None:
    state = {
        name: torch.tensor([float(place)]) for place, name in enumerate(["größe", "層.重み", "🙂", "a b", "'\"\\"])
    }
    registry.push(state, "walk/base")
    assert {name: value.item() for name, value in registry.load("walk/base").items()} == {
        name: value.item() for name, value in state.items()
    }


def test_numbers_of_numpy_agree_with_what_is_stored(registry: Registry) -> None:
    state = walker().state_dict()
    registry.push(state, "walk/base")
    digests = registry.show("walk/base").contents.components["model"]
    from blake3 import blake3

    for spec, digest in zip(digests.layout, digests.tensors, strict=True):
        head = f"{spec.dtype}[{','.join(map(str, spec.shape))}]\n".encode()
        array = numpy.ascontiguousarray(state[spec.name].numpy())
        assert blake3(head + array.tobytes()).hexdigest() == digest
