"""Pushing what lives in memory: what PEFT itself would save is the truth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn

from registry import Registry
from registry.core.errors import InvalidInput, RegistryError, UnsupportedTensor
from tests.operations.models import QV, Walker, lora, train, walker


class Policy(nn.Module):
    """As pdp's wrapper: a PeftModel is one of its attributes."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.scale = nn.Parameter(torch.ones(1))


def tiny_llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": 32, "num_key_value_heads": 2} | sizes | options)).eval()


def blob_bytes(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (root / "blobs").rglob("*") if path.is_file()}


def tensor_names(registry: Registry, reference: str, role: str = "adapter") -> list[str]:
    return [spec.name for spec in registry.show(reference).contents.components[role].layout]


def file_digest(registry: Registry, reference: str, path: str = "adapter_model.safetensors") -> str:
    return next(file.sha256 for file in registry.show(reference).contents.files if file.path == path)


# ---------------------------------------------------------------- a PeftModel


def test_a_live_adapter_is_the_folder_that_peft_saves(registry: Registry, root: Path, tmp_path: Path) -> None:
    model = lora(modules_to_save=["head"], use_dora=True, bias="lora_only")
    live = registry.push(model, "walk/perturb")
    model.save_pretrained(tmp_path / "saved")
    before = blob_bytes(root)
    folder = registry.push(tmp_path / "saved", "walk/perturb")
    assert folder.created
    assert folder.same_content_as == live.version == 1
    assert registry.get("walk/perturb@1").content_digest == registry.get("walk/perturb@2").content_digest
    # The tensors are the very file: of the folder only its configuration, README and manifest are new.
    assert file_digest(registry, "walk/perturb@1") == file_digest(registry, "walk/perturb@2")
    assert len(blob_bytes(root).keys() - before.keys()) == 3
    assert folder.bytes_new == sum(blob_bytes(root).values()) - sum(before.values())


def test_its_typed_columns_are_those_of_the_folder(registry: Registry, tmp_path: Path) -> None:
    model = lora(use_rslora=True, lora_alpha=6, target_modules=["v_proj", "q_proj"])
    registry.push(model, "walk/live")
    model.save_pretrained(tmp_path / "saved")
    registry.push(tmp_path / "saved", "walk/folder")
    live, folder = registry.get("walk/live"), registry.get("walk/folder")
    for field in ("kind", "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "peft_version"):
        assert getattr(live, field) == getattr(folder, field), field
    assert (live.r, live.lora_alpha, live.target_modules) == (4, 6.0, ("q_proj", "v_proj"))


SCRIPT = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {repository!r})
from registry import Registry
from tests.operations.models import lora, zoo
targets = {{"lin", "conv1", "conv2", "conv3", "emb", "transposed", "mha"}}
model = lora(zoo(), target_modules=targets, modules_to_save={{"head", "grouped"}})
with Registry.init(sys.argv[1]) as registry:
    print(registry.push(model, "walk/perturb").digest)
"""


def test_its_digest_is_the_same_in_every_process(tmp_path: Path) -> None:
    repository = str(Path(__file__).resolve().parents[2])
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SCRIPT.format(repository=repository), str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "12345")
    ]
    digests = [process.communicate(timeout=120)[0].strip() for process in running]
    assert len(digests[0]) == 64
    assert digests[0] == digests[1]


def test_a_push_changes_nothing_in_the_model(registry: Registry) -> None:
    model = get_peft_model(walker(), LoraConfig(**QV))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.peft_config["default"].to_dict()
    generator = torch.get_rng_state()
    registry.push(model, "walk/perturb")
    assert model.training
    assert model.peft_config["default"].to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize(
    "wrap",
    [Policy, partial(torch.compile, backend="eager"), nn.DataParallel],
    ids=["attribute", "compiled", "parallel"],
)
def test_a_module_that_holds_one_peft_model_is_pushed_as_that(
    wrap: Callable[[nn.Module], nn.Module], registry: Registry
) -> None:
    model = lora()
    alone = registry.push(model, "walk/perturb")
    assert registry.push(wrap(model), "walk/perturb").digest == alone.digest


def test_a_module_that_holds_two_is_refused(registry: Registry) -> None:
    policy = Policy(lora(), lora(walker(1)))
    with pytest.raises(InvalidInput, match="Policy holds 2 models with adapters; give one of them by itself"):
        registry.push(policy, "walk/perturb")
    assert registry.find() == []


def test_of_several_adapters_the_active_one_is_pushed(registry: Registry) -> None:
    model = lora(adapter="one")
    model.add_adapter("two", LoraConfig(**(QV | {"r": 2})))
    assert registry.push(model, "walk/perturb").reference == "walk/perturb@1"
    model.set_adapter("two")
    assert registry.push(model, "walk/perturb").version == 2
    assert [registry.get(f"walk/perturb@{number}").r for number in (1, 2)] == [4, 2]
    # A name takes one whatever is active.
    assert registry.push(model, "walk/perturb", adapter_name="one").version == 1


def test_an_adapters_name_is_no_part_of_it(registry: Registry) -> None:
    digests = set()
    for adapter in ("default", "walk", "weight", "bias", "q_proj"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = lora(adapter=adapter, use_dora=True)
        digests.add(registry.push(model, "walk/perturb").digest)
    assert len(digests) == 1


def test_an_unknown_adapter_is_refused_with_the_known_ones(registry: Registry) -> None:
    model = lora(adapter="one")
    model.add_adapter("two", LoraConfig(**QV))
    with pytest.raises(InvalidInput, match="no adapter 'three'; it has one, two"):
        registry.push(model, "walk/perturb", adapter_name="three")
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(InvalidInput, match=r"2 of the adapters one, two are active .* adapter_name="):
        registry.push(model, "walk/perturb")


# ---------------------------------------------------------------- merged


@pytest.mark.parametrize("kind", [None, "adapter", "checkpoint", "base"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_merged_model_is_refused_as_every_kind(kind: Any, wrapped: bool, registry: Registry, root: Path) -> None:
    model = lora()
    model.merge_adapter()
    with pytest.raises(InvalidInput, match=r"merged into its base \(at .*q_proj\).*unmerge_adapter\(\)"):
        registry.push(Policy(model) if wrapped else model, "walk/perturb", kind=kind)
    assert registry.find() == []
    assert blob_bytes(root) == {}
    model.unmerge_adapter()
    assert registry.push(model, "walk/perturb").created


def test_what_was_merged_and_unloaded_is_a_base(registry: Registry) -> None:
    merged = lora().merge_and_unload()
    assert registry.push(merged, "walk/merged").kind == "base"
    assert tensor_names(registry, "walk/merged", "model") == sorted(walker().state_dict())


# ---------------------------------------------------------------- adapters without a PeftModel


def test_injected_layers_are_the_same_adapter(registry: Registry) -> None:
    model = lora()
    registry.push(model, "walk/perturb")
    injected = inject_adapter_in_model(LoraConfig(**QV), walker())
    train(injected)
    # LoraModel, between the PeftModel and the base, carries `peft_config` as well.
    for same in (injected, model.base_model, model.get_base_model()):
        assert not registry.push(same, "walk/perturb").created


def test_injected_layers_within_a_module_are_found(registry: Registry) -> None:
    injected = inject_adapter_in_model(LoraConfig(**QV), walker())
    registry.push(injected, "walk/perturb")
    assert registry.push(Policy(walker(3), injected), "walk/perturb").version == 1
    other = inject_adapter_in_model(LoraConfig(**QV), walker(1))
    with pytest.raises(InvalidInput, match="holds 2 models with adapters"):
        registry.push(Policy(injected, other), "walk/perturb")
    for child in injected.modules():
        if hasattr(child, "merge") and hasattr(child, "lora_A"):
            child.merge()
    for kind in (None, "checkpoint"):
        with pytest.raises(InvalidInput, match="merged into its base"):
            registry.push(Policy(walker(3), injected), "walk/perturb", kind=kind)


def test_the_active_adapter_of_injected_layers_is_pushed(registry: Registry) -> None:
    injected = inject_adapter_in_model(LoraConfig(**QV), walker(), adapter_name="one")
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        inject_adapter_in_model(LoraConfig(**(QV | {"r": 2})), injected, adapter_name="two")
    for child in injected.modules():
        if hasattr(child, "set_adapter"):
            child.set_adapter("two")
    registry.push(injected, "walk/perturb")
    assert registry.get("walk/perturb").r == 2


def test_an_adapter_of_transformers_is_the_folder_that_it_saves(registry: Registry, tmp_path: Path) -> None:
    model = tiny_llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="walk")
    train(model)
    registry.push(model, "walk/perturb")
    model.save_pretrained(tmp_path / "saved")
    assert registry.push(tmp_path / "saved", "walk/perturb").same_content_as == 1
    assert file_digest(registry, "walk/perturb@1") == file_digest(registry, "walk/perturb@2")


def test_a_mixed_model_is_a_checkpoint_alone(registry: Registry) -> None:
    mixed = get_peft_model(walker(), LoraConfig(**QV), adapter_name="one", mixed=True)
    registry.push(mixed, "walk/perturb")
    mixed.add_adapter("two", LoHaConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(InvalidInput, match=r"mixes adapters of the types LOHA, LORA.*kind='checkpoint'"):
        registry.push(mixed, "walk/perturb", adapter_name="one")
    assert registry.push(mixed, "walk/full", kind="checkpoint").created


def test_the_gate_of_x_lora_is_an_adapter_without_the_ones_that_it_weighs(registry: Registry, tmp_path: Path) -> None:
    from peft import XLoraConfig

    get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "one")
    base = tiny_llama()
    base.config.use_cache = False
    adapters = {"0": str(tmp_path / "one")}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, xlora_depth=2, adapters=adapters)
    model = get_peft_model(base, config)
    registry.push(model, "walk/gate")
    assert registry.get("walk/gate").peft_type == "XLORA"
    model.save_pretrained(tmp_path / "saved")
    assert registry.push(tmp_path / "saved", "walk/gate").same_content_as == 1


# ---------------------------------------------------------------- checkpoints, bases, state dicts


def test_a_checkpoint_of_a_peft_model_is_its_whole_state_dict(registry: Registry, tmp_path: Path) -> None:
    model = lora(modules_to_save=["head"])
    pushed = registry.push(model, "walk/full", kind="checkpoint")
    assert pushed.kind == "checkpoint"
    names = tensor_names(registry, "walk/full", "model")
    assert set(names) == set(model.state_dict())
    assert "base_model.model.q_proj.base_layer.weight" in names
    registry.pull("walk/full", tmp_path / "full.safetensors")
    pulled = load_file(tmp_path / "full.safetensors")
    assert all(torch.equal(pulled[name], value) for name, value in model.state_dict().items())


def test_a_checkpoint_of_a_wrapper_keeps_the_wrappers_own_tensors(registry: Registry) -> None:
    registry.push(Policy(lora()), "walk/full", kind="checkpoint")
    names = tensor_names(registry, "walk/full", "model")
    assert "scale" in names
    assert "models.0.base_model.model.q_proj.lora_A.default.weight" in names


def test_a_model_with_an_adapter_is_no_base(registry: Registry) -> None:
    for model in (lora(), Policy(lora()), inject_adapter_in_model(LoraConfig(**QV), walker())):
        with pytest.raises(InvalidInput, match="carries an adapter; push the base before it is wrapped"):
            registry.push(model, "walk/base", kind="base")
    assert registry.find() == []


def test_a_plain_module_is_a_base_and_no_adapter(registry: Registry) -> None:
    assert registry.push(walker(), "walk/base").kind == "base"
    assert registry.push(walker().state_dict(), "walk/base").version == 1
    assert registry.push(walker(), "walk/checkpoint", kind="checkpoint").kind == "checkpoint"
    with pytest.raises(InvalidInput, match="holds no adapter tensors, so it is no adapter"):
        registry.push(walker(), "walk/base", kind="adapter")


def test_the_kind_of_a_state_dict_is_told_by_its_names(registry: Registry) -> None:
    state = lora().state_dict()
    adapter = {name: value for name, value in state.items() if ".lora_" in name}
    found = registry.push(adapter, "walk/adapter")
    assert (found.kind, found.notes) == (
        "adapter",
        ("pushed without a configuration, so lora_alpha is unknown",),
    )
    assert registry.push(state, "walk/checkpoint").kind == "checkpoint"
    assert registry.push({"ema": torch.zeros(2)}, "walk/base").kind == "base"
    # The user's word decides what the file is called as well.
    registry.push(adapter, "walk/other", kind="checkpoint")
    assert [file.path for file in registry.show("walk/other").contents.files] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        ({}, InvalidInput, "holds no tensors"),
        ({"step": 3}, UnsupportedTensor, "step: expected a tensor, found int; leave it out"),
        ({"nested": {"w": torch.zeros(1)}}, UnsupportedTensor, "nested: expected a tensor, found dict"),
        ({"none": None}, UnsupportedTensor, "none: expected a tensor, found NoneType"),
        ({1: torch.zeros(1)}, InvalidInput, "tensor name 1 is not"),
        ({"": torch.zeros(1)}, InvalidInput, "non-empty text"),
        ({"a\0b": torch.zeros(1)}, InvalidInput, "without NUL"),
        ({"a\nb": torch.zeros(1)}, InvalidInput, "control character"),
        ({"\ud800": torch.zeros(1)}, InvalidInput, "lone surrogate"),
        ({"__metadata__": torch.zeros(1)}, InvalidInput, "__metadata__"),
    ],
)
def test_what_no_file_can_hold_is_refused_by_name(
    state: Any, error: type[RegistryError], words: str, registry: Registry, root: Path
) -> None:
    with pytest.raises(error, match=words):
        registry.push(state, "walk/base")
    assert registry.find() == []
    assert blob_bytes(root) == {}


def test_extra_state_of_a_module_is_refused_by_name(registry: Registry) -> None:
    class Counter(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"seen": 3}

        def set_extra_state(self, state: Any) -> None:
            del state

    with pytest.raises(UnsupportedTensor, match="_extra_state: expected a tensor, found dict"):
        registry.push(Counter(2, 2), "walk/base")


def test_something_else_is_refused(registry: Registry) -> None:
    for thing in (3, [torch.zeros(1)], torch.zeros(1), lora):
        with pytest.raises(InvalidInput, match=r"cannot push a .*: expected a path, a PeftModel"):
            registry.push(thing, "walk/base")


# ---------------------------------------------------------------- embeddings that PEFT saves unasked


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": r".*\.(q_proj|embed_tokens)"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 3]}},
        {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": {"embed_tokens": [1, 3]}},
    ],
    ids=str,
)
@pytest.mark.parametrize("resized", [False, True])
def test_embeddings_are_kept_where_peft_keeps_them(
    options: dict[str, Any], resized: bool, registry: Registry, tmp_path: Path
) -> None:
    tiny_llama().config.save_pretrained(tmp_path / "base")
    base = tiny_llama()
    base.name_or_path = str(tmp_path / "base")
    if resized:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base.resize_token_embeddings(40)
    model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    train(model)
    registry.push(model, "walk/perturb")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it saves them
        model.save_pretrained(tmp_path / "saved")
    assert registry.push(tmp_path / "saved", "walk/perturb").same_content_as == 1
    assert file_digest(registry, "walk/perturb@1") == file_digest(registry, "walk/perturb@2")


def test_a_base_that_no_hub_knows_is_not_asked_for(registry: Registry) -> None:
    base = tiny_llama()
    base.name_or_path = "nobody/nothing"
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    registry.push(model, "walk/perturb")  # a warning would be an error here
    assert registry.get("walk/perturb").content_digest
    assert json.loads(b"".join(_plain_files(registry, "walk/perturb")))["base_model_name_or_path"] == "nobody/nothing"


def _plain_files(registry: Registry, reference: str) -> list[bytes]:
    contents = registry.show(reference).contents
    store = registry._context.store.blobs
    return [store.local_path(file.blob).read_bytes() for file in contents.files if file.role is None]


# ---------------------------------------------------------------- again, and what it is made from


def test_the_same_again_is_no_new_version_and_adds_its_metadata(registry: Registry, root: Path) -> None:
    model = lora()
    first = registry.push(model, "walk/perturb", metadata={"robot": "a1"}, metrics={"reward": 1.0})
    before = blob_bytes(root)
    again = registry.push(model, "walk/perturb:prod", metadata={"robot": "a2", "seed": 3}, metrics={"reward": 2.0})
    assert (again.created, again.bytes_new, again.digest, again.version) == (False, 0, first.digest, 1)
    assert again.tags == ("prod",)
    assert blob_bytes(root) == before
    assert list((root / "tmp").iterdir()) == []
    found = registry.get("walk/perturb")
    assert found.metadata == {"robot": "a2", "seed": 3}
    assert found.metrics == {"reward": 2.0}


def test_base_and_parents_are_part_of_a_version(registry: Registry) -> None:
    registry.push(walker(), "walk/base:v1")
    model = lora()
    registry.push(model, "walk/perturb", base="walk/base:v1")
    train(model, seed=5)
    registry.push(model, "walk/perturb", base="walk/base:v1", continued_from="walk/perturb@1")
    registry.push(model, "walk/perturb", base="walk/base:v1")
    assert [version.base for version in registry.find(pattern="walk/perturb")] == ["walk/base@1"] * 3
    assert registry.get("walk/perturb@2").content_digest == registry.get("walk/perturb@3").content_digest
    edges = registry.log("walk/perturb@2").ancestors
    assert sorted(edge.relation for edge in edges) == ["continued_from", "trained_on", "trained_on"]


def test_bytes_new_is_what_the_store_grew_by(registry: Registry, root: Path, tmp_path: Path) -> None:
    class Tied(Walker):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Linear(16, 16)
            self.decoder.weight = self.q_proj.weight

    def grown_by(source: Any, name: str, **options: Any) -> None:
        before = sum(blob_bytes(root).values())
        pushed = registry.push(source, name, **options)
        assert pushed.created
        assert pushed.bytes_new == sum(blob_bytes(root).values()) - before > 0, name

    model = lora()
    model.save_pretrained(tmp_path / "saved")
    grown_by(walker(), "walk/base")
    grown_by(walker(), "walk/base-again", kind="checkpoint")
    grown_by(model, "walk/perturb", base="walk/base")
    grown_by(tmp_path / "saved", "walk/perturb", base="walk/base")
    grown_by(tmp_path / "saved" / "adapter_model.safetensors", "walk/bare")
    grown_by(model, "walk/full", kind="checkpoint", base="walk/base")
    train(model, seed=5)
    grown_by(model, "walk/full", kind="checkpoint")
    grown_by(Tied(), "walk/tied")
    # What another name has already costs nothing at all.
    assert registry.push(walker(), "walk/copy").bytes_new == 0


def test_a_tied_embedding_is_stored_once_and_both_names_come_back(registry: Registry, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True, vocab_size=4096)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    pushed = registry.push(model, "walk/tied", probe=False)
    size = model.lm_head.weight.numel() * 4
    assert pushed.bytes_total > 2 * size
    assert size < pushed.bytes_new < pushed.bytes_total - 0.95 * size
    registry.pull("walk/tied", tmp_path / "tied.safetensors")
    pulled = load_file(tmp_path / "tied.safetensors")
    assert pulled.keys() == model.state_dict().keys()
    assert torch.equal(pulled["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(pulled["model.embed_tokens.weight"], model.lm_head.weight)


def test_a_model_in_half_precision_is_kept_in_it(registry: Registry, tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = lora(walker().to(dtype))
        assert isinstance(model, PeftModel)
        registry.push(model, f"walk/{dtype}".replace("torch.", ""), kind="checkpoint")
        assert {
            spec.dtype
            for spec in registry.show(f"walk/{dtype}".replace("torch.", "")).contents.components["model"].layout
        } == {"F32", "BF16" if dtype is torch.bfloat16 else "F16"}
