"""Adapters out of checkpoints, on real models: what PEFT makes of them is the checkpoint, and what they leave out is
said."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from registry import Registry
from registry.cli.app import app
from registry.core.errors import InvalidInput, InvalidReference, NotStored, VersionNotFound
from registry.operations.merging.extracted import ExtractResult, LeftOut
from registry.operations.merging.recipe import read_recipe
from registry.operations.merging.sources import SourceTensors
from tests.operations.models import Walker, output, steps, walker, zoo


def extract(registry: Registry, checkpoint: str, name: str = "walk/extracted", **options: Any) -> ExtractResult:
    return registry.extract(checkpoint, name, **options)


def change(tensor: Tensor, rank: int | None = None, *, seed: int = 3, size: float = 0.1) -> Tensor:
    """Changes a weight, by something of this rank, and gives the difference as it is in the weight."""
    generator = torch.Generator().manual_seed(seed)
    before = tensor.detach().clone()
    delta = torch.randn(tensor.shape, generator=generator)
    if rank is not None:
        delta = torch.randn(tensor.shape[0], rank, generator=generator) @ torch.randn(
            rank, tensor.shape[1], generator=generator
        )
    with torch.no_grad():
        tensor += size * delta
    return tensor.detach() - before


def tuned_walker() -> tuple[Walker, Tensor, Tensor]:
    """A Walker whose q_proj and v_proj have changed by rank 2 and 3, and the two differences."""
    model = walker()
    return model, change(model.q_proj.weight, 2), change(model.v_proj.weight, 3, seed=4)


def push_pair(registry: Registry, base: object, tuned: object) -> None:
    registry.push(base, "walk/base")
    registry.push(tuned, "walk/tuned", kind="checkpoint", base="walk/base")


def left(result: ExtractResult) -> dict[str, LeftOut]:
    return {one.name: one for one in result.left_out}


def with_adapter(registry: Registry, base: nn.Module, reference: str, folder: Path) -> PeftModel:
    """The base with the adapter, as PEFT loads its files."""
    registry.pull(reference, folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LoRA adapter added to ConvNd layer with groups > 1")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to (True|False) but the target module is")
        return PeftModel.from_pretrained(base, folder).eval()


def test_a_full_rank_adapter_of_every_kind_of_layer_is_the_checkpoint(registry: Registry, tmp_path: Path) -> None:
    model = zoo()
    weights = [model.emb, model.lin, model.conv1, model.conv2, model.grouped, model.conv3, model.transposed]
    for seed, one in enumerate([*weights, model.head[0], model.mha.out_proj]):
        change(one.weight, seed=seed)
    change(model.mha.in_proj_weight)
    push_pair(registry, zoo(), model)
    result = extract(registry, "walk/tuned", rank=12, attention_out=2)
    assert len(result.modules) == 10
    assert (result.left_out, result.notes) == ((), ())
    assert result.relative_error == pytest.approx(0, abs=1e-5)
    wrapped = with_adapter(registry, zoo(), result.reference, tmp_path / "adapter")
    torch.testing.assert_close(output(wrapped), output(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(output(zoo()), output(model), atol=1e-2)


def test_the_rank_that_the_training_had_is_recovered(registry: Registry, tmp_path: Path) -> None:
    model, _, _ = tuned_walker()
    push_pair(registry, walker(), model)
    by_rank = extract(registry, "walk/tuned", rank=3)
    assert by_rank.relative_error == pytest.approx(0, abs=1e-5)
    by_energy = extract(registry, "walk/tuned", "walk/energy", energy=0.99999)
    assert {one.path: one.rank for one in by_energy.modules} == {"q_proj": 2, "v_proj": 3}
    wrapped = with_adapter(registry, walker(), by_energy.reference, tmp_path / "adapter")
    torch.testing.assert_close(wrapped(steps()), model(steps()), rtol=1e-4, atol=1e-4)
    loaded = registry.load(by_energy.reference, walker())
    torch.testing.assert_close(loaded(steps()), model(steps()), rtol=1e-4, atol=1e-4)


def test_a_smaller_rank_is_off_by_what_the_svd_cuts(registry: Registry) -> None:
    model, q, v = tuned_walker()
    push_pair(registry, walker(), model)
    result = extract(registry, "walk/tuned", rank=1, precise=True)
    cut = [torch.linalg.svdvals(one.double())[1:].norm() for one in (q, v)]
    for one, expected, delta in zip(result.modules, cut, (q, v), strict=True):
        assert one.error == pytest.approx(float(expected), rel=1e-5)
        assert one.norm == pytest.approx(float(delta.double().norm()), rel=1e-6)
    whole = math.hypot(*map(float, cut)) / math.hypot(float(q.double().norm()), float(v.double().norm()))
    assert result.relative_error == pytest.approx(whole, rel=1e-5)
    assert registry.get(result.reference).metrics["extract_relative_error"] == result.relative_error


def test_what_no_adapter_can_hold_is_listed_with_its_share_and_counts_as_error(registry: Registry) -> None:
    model, q, v = tuned_walker()
    norm = change(model.norm.weight)
    bias = change(model.q_proj.bias, size=0.01)
    push_pair(registry, walker(), model)
    result = extract(registry, "walk/tuned", rank=8)
    assert [one.name for one in result.left_out] == ["norm.weight", "q_proj.bias"]
    assert left(result)["norm.weight"].norm == pytest.approx(float(norm.norm()), rel=1e-5)
    assert "no weight of a linear" in left(result)["norm.weight"].why
    out = math.hypot(float(norm.norm()), float(bias.norm()))
    whole = math.hypot(out, float(q.norm()), float(v.norm()))
    assert result.relative_error == pytest.approx(out / whole, rel=1e-4)
    assert result.left_out_share == pytest.approx((out / whole) ** 2, rel=1e-4)
    shares = [one["share"] for one in result.to_json()["left_out"]]
    assert sum(shares) == pytest.approx(result.left_out_share)


def test_other_shapes_other_dtypes_and_tensors_of_one_side_are_listed(registry: Registry) -> None:
    base, tuned = walker().state_dict(), tuned_walker()[0].state_dict()
    base |= {"steps": torch.tensor([1, 2]), "gone": torch.ones(2), "head.weight": torch.ones(3, 16)}
    tuned |= {"steps": torch.tensor([1, 3]), "new": torch.ones(2)}
    push_pair(registry, base, tuned)
    result = extract(registry, "walk/tuned", rank=8)
    found = left(result)
    assert {one.path for one in result.modules} == {"q_proj", "v_proj"}
    assert found["steps"].why == "its dtype is I64"
    assert found["gone"].why == "only walk/base@1 has it"
    assert found["new"].why == "only walk/tuned@1 has it"
    assert found["head.weight"].why == "its shape is [3, 16] in the base and [4, 16] in the checkpoint"
    assert {one.norm for one in found.values()} == {None}
    assert "known from names and shapes alone" in result.notes[0]


def test_tensors_that_are_equal_are_not_read(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    push_pair(registry, walker(), tuned_walker()[0])
    read: set[str] = set()
    original = SourceTensors.read

    def spy(self: SourceTensors, component: Any, names: Any) -> dict[str, Tensor]:
        read.update(names)
        return original(self, component, names)

    monkeypatch.setattr(SourceTensors, "read", spy)
    extract(registry, "walk/tuned", rank=2)
    assert read == {"q_proj.weight", "v_proj.weight"}


def test_the_version_names_its_base_its_checkpoint_and_its_recipe(registry: Registry) -> None:
    push_pair(registry, walker(), tuned_walker()[0])
    result = extract(registry, "walk/tuned", "walk/extracted:new", rank=2, dtype="bf16", message="why", tags=["one"])
    version = registry.get(result.reference)
    assert (version.base, version.r, version.lora_alpha) == ("walk/base@1", 2, 2)
    assert (set(version.tags), version.message) == ({"new", "one"}, "why")
    lineage = registry.log(result.reference)
    parents = {(one.relation, lineage.names[one.parent_id]) for one in lineage.ancestors if one.child_id == lineage.id}
    assert parents == {("trained_on", "walk/base@1"), ("extracted_from", "walk/tuned@1")}
    recipe = read_recipe(registry._context.store.blobs, version.digest)
    assert recipe is not None
    assert (recipe["operation"], recipe["rank"], recipe["energy"], recipe["dtype"]) == ("extract", 2, None, "BF16")
    tensors = registry.load(result.reference)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert registry.check(result.reference).verdict == "fits"


def test_the_same_extraction_again_is_found(registry: Registry) -> None:
    push_pair(registry, walker(), tuned_walker()[0])
    first = extract(registry, "walk/tuned", rank=2, modules=["v_proj", "q_proj"])
    again = extract(registry, "walk/tuned", rank=2, modules=["q_proj", "v_proj"])
    assert (again.reference, again.created, again.found) == (first.reference, False, first.reference)
    assert (again.modules, again.relative_error) == ((), None)
    other = extract(registry, "walk/tuned", "walk/other", rank=2, modules=["q_proj", "v_proj"])
    assert (other.created, other.found) == (True, first.reference)
    assert extract(registry, "walk/tuned", rank=1).found is None


@pytest.mark.parametrize("pattern", ["q_proj", "q*", "*q_proj"])
def test_modules_are_chosen_by_name_or_glob(registry: Registry, pattern: str) -> None:
    push_pair(registry, walker(), tuned_walker()[0])
    result = extract(registry, "walk/tuned", rank=2, modules=pattern)
    assert [one.path for one in result.modules] == ["q_proj"]
    assert left(result)["v_proj.weight"].why == "not among the modules that were asked for"
    assert left(result)["v_proj.weight"].norm
    assert registry.get(result.reference).target_modules == ("q_proj",)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 4)
        self.lin = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 10, bias=False)
        self.lm_head.weight = self.emb.weight


def test_a_tied_weight_is_left_out_once(registry: Registry) -> None:
    torch.manual_seed(0)
    base, tuned = Tied(), Tied()
    tuned.load_state_dict(base.state_dict())
    delta = change(tuned.emb.weight)
    change(tuned.lin.weight)
    push_pair(registry, base, tuned)
    result = extract(registry, "walk/tuned", rank=4)
    assert [one.path for one in result.modules] == ["lin"]
    (one,) = result.left_out
    assert one.name == "emb.weight"
    assert one.why.startswith("tied: it is the weight of lm_head as well")
    assert one.norm == pytest.approx(float(delta.norm()), rel=1e-5)


def test_the_output_of_an_attention_is_left_out_until_it_is_said_how_often_it_counts(registry: Registry) -> None:
    model = zoo()
    change(model.mha.in_proj_weight)
    change(model.mha.out_proj.weight)
    push_pair(registry, zoo(), model)
    result = extract(registry, "walk/tuned", rank=4)
    assert [one.path for one in result.modules] == ["mha"]
    assert "say attention_out=2" in left(result)["mha.out_proj.weight"].why


def test_a_mere_cast_to_bfloat16_is_no_difference(registry: Registry) -> None:
    model = walker().bfloat16()
    change(model.q_proj.weight, 2)
    push_pair(registry, walker(), model)
    result = extract(registry, "walk/tuned", rank=2)
    assert [one.path for one in result.modules] == ["q_proj"]
    assert result.left_out == ()
    assert result.notes == ("7 tensors differ by the cast to bfloat16 alone, and count as equal",)


def test_saved_names_are_looked_up_by_their_live_ones(registry: Registry, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    base = GPT2LMHeadModel(config).eval()
    base.transformer.save_pretrained(tmp_path / "body")  # names without `transformer.`
    folder = tmp_path / "body"
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"GPT2Model"', '"GPT2LMHeadModel"')
    )
    registry.push(folder, "walk/base")
    tuned = GPT2LMHeadModel(config).eval()
    tuned.load_state_dict(base.state_dict())
    change(tuned.transformer.h[0].attn.c_attn.weight)
    change(tuned.transformer.h[1].mlp.c_proj.weight)
    change(tuned.transformer.wte.weight)
    registry.push(tuned, "walk/tuned", kind="checkpoint", base="walk/base")
    result = extract(registry, "walk/tuned", rank=8)
    assert {one.path for one in result.modules} == {"transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"}
    assert [one.why.partition(":")[0] for one in result.left_out] == ["tied"]
    assert registry.check(result.reference).verdict == "fits"
    wrapped = with_adapter(registry, base, result.reference, tmp_path / "adapter")
    layer = wrapped.base_model.model.transformer.h[0].attn.c_attn
    expected = tuned.transformer.h[0].attn.c_attn.weight - layer.get_base_layer().weight
    torch.testing.assert_close(layer.get_delta_weight("default"), expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a rank, or the share of the energy"),
        ({"rank": 0}, "rank is 0; expected a whole number of at least 1"),
        ({"rank": True}, "rank is True"),
        ({"energy": 0}, "energy is 0; expected more than 0 and at most 1"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"energy": math.nan}, "energy is nan"),
        ({"rank": 2, "dtype": "f8"}, "dtype 'f8'; expected one of f32"),
        ({"rank": 2, "attention_out": 3}, "attention_out is 3"),
        ({"rank": 2, "modules": [""]}, "modules must be names or globs"),
        ({"rank": 2, "device": "cuda:99"}, "device cuda:99"),
        (
            {"rank": 17},
            "rank 17 is above the dimensions of every module that differs: q_proj, the largest, has 16 x 16",
        ),
        ({"rank": 2, "modules": "q_porj"}, "no module of walk/base@1 is called 'q_porj'; near it: q_proj"),
        ({"rank": 2, "modules": "head"}, "in nothing that an adapter can hold: 2 tensors were left out"),
        ({"rank": 2, "base": "walk/tuned"}, "have the same content"),
        ({"rank": 2, "base": "walk/copy"}, "have the same content"),
        ({"rank": 2, "base": "walk/adapter"}, "walk/adapter@1 is an adapter already"),
    ],
)
def test_bad_requests_are_refused_by_name(registry: Registry, options: dict[str, Any], message: str) -> None:
    model = tuned_walker()[0]
    push_pair(registry, walker(), model)
    registry.push(model, "walk/copy", kind="base")
    extract(registry, "walk/tuned", "walk/adapter", rank=1)
    with pytest.raises(InvalidInput, match=message.replace("(", r"\(")):
        extract(registry, "walk/tuned", "walk/new", **options)
    assert [one.name for one in registry.find()].count("walk/new") == 0


def test_an_adapter_is_no_checkpoint(registry: Registry) -> None:
    push_pair(registry, walker(), tuned_walker()[0])
    extract(registry, "walk/tuned", "walk/adapter", rank=1)
    with pytest.raises(InvalidInput, match="walk/adapter@1 is an adapter already; an extraction takes two models"):
        extract(registry, "walk/adapter", rank=1)
    with pytest.raises(VersionNotFound):
        extract(registry, "walk/tuned@7", rank=1)
    with pytest.raises(InvalidReference):
        extract(registry, "walk/tuned", "no name", rank=1)


def test_a_checkpoint_without_a_recorded_base_needs_one(registry: Registry) -> None:
    registry.push(walker(), "walk/base")
    registry.push(tuned_walker()[0], "walk/tuned", kind="checkpoint")
    with pytest.raises(InvalidInput, match="does not say which base it was trained on"):
        extract(registry, "walk/tuned", rank=1)
    assert extract(registry, "walk/tuned", rank=1, base="walk/base").base == "walk/base@1"


def test_a_base_without_its_bytes_cannot_be_subtracted(registry: Registry, tmp_path: Path) -> None:
    save_file(walker().state_dict(), tmp_path / "base.safetensors")
    registry.push(tmp_path / "base.safetensors", "walk/base", external=True)
    registry.push(tuned_walker()[0], "walk/tuned", kind="checkpoint", base="walk/base")
    with pytest.raises(NotStored, match="walk/base@1 is recorded without its bytes, which an extraction reads"):
        extract(registry, "walk/tuned", rank=1)


@pytest.mark.parametrize("side", ["base", "checkpoint"])
def test_nan_is_refused_in_what_is_extracted_and_named_in_what_is_not(registry: Registry, side: str) -> None:
    base, tuned = walker(), tuned_walker()[0]
    with torch.no_grad():
        (base if side == "base" else tuned).q_proj.weight[0, 0] = math.nan
    push_pair(registry, base, tuned)
    with pytest.raises(InvalidInput, match=rf"q_proj\.weight holds NaN or Inf in the {side}"):
        extract(registry, "walk/tuned", rank=1)
    result = extract(registry, "walk/tuned", rank=1, modules="v_proj")
    assert left(result)["q_proj.weight"].norm is None


# ---------------------------------------------------------------- the command


@pytest.fixture
def pair(root: Path) -> Path:
    with Registry.open(root) as registry:
        model = tuned_walker()[0]
        change(model.norm.weight)
        push_pair(registry, walker(), model)
    return root


def run(root: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["extract", *words, "--registry", str(root)])


def test_the_command_says_how_far_off_the_adapter_is_and_what_it_left_out(pair: Path) -> None:
    ran = run(pair, "walk/tuned", "--rank", "3", "-o", "walk/extracted:new")
    assert (ran.exit_code, ran.stderr) == (0, "")
    assert ran.stdout.startswith("extracted walk/extracted@1  (2 modules, ")
    assert "walk/tuned@1 less walk/base@1" in ran.stdout
    assert "not in the adapter: 1 tensors" in ran.stdout
    assert "norm.weight" in ran.stdout
    again = run(pair, "walk/tuned", "--rank", "3", "-o", "walk/extracted")
    assert again.stdout.startswith("already there: walk/extracted@1  (the same recipe made walk/extracted@1")


def test_the_command_prints_one_document(pair: Path) -> None:
    ran = run(pair, "walk/tuned", "--energy", "0.9", "--modules", "q_proj", "-o", "walk/extracted", "--json")
    found = json.loads(ran.stdout)
    assert (found["reference"], found["checkpoint"], found["base"]) == (
        "walk/extracted@1",
        "walk/tuned@1",
        "walk/base@1",
    )
    assert [one["module"] for one in found["modules"]] == ["q_proj"]
    assert {one["tensor"] for one in found["left_out"]} == {"v_proj.weight", "norm.weight"}
    assert 0 < found["left_out_share"] < found["relative_error"] < 1


def test_the_command_refuses_in_one_line(pair: Path) -> None:
    ran = run(pair, "walk/tuned", "-o", "walk/extracted")
    assert (ran.exit_code, ran.stdout) == (3, "")
    assert ran.stderr.startswith("registry: an extraction needs a rank")


def test_a_head_that_the_checkpoint_untied_is_not_lost(registry: Registry) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=True, **sizes))
    tuned = LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=False, **sizes))
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        tuned.lm_head.weight += 1
        tuned.model.layers[0].self_attn.q_proj.weight += 0.1
    registry.push(base, "t/base", probe=False)
    registry.push(tuned, "t/tuned", kind="base", probe=False)
    result = registry.extract("t/tuned", "t/adapter", base="t/base", rank=4)
    told = {one.path for one in result.modules} | {one.name.removesuffix(".weight") for one in result.left_out}
    assert {"lm_head", "model.layers.0.self_attn.q_proj"} <= told
