"""`Registry.similarity` on real adapters."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from registry import InvalidInput, NotFound, Registry
from registry.core.errors import DigestMismatch, NotStored, ShapeMismatch
from tests.merge.test_lora_modules import layers
from tests.operations.models import lora, train, walker, zoo

QV = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def filled_team(empty_registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed registry of three adapters, only to be copied."""
    folder = Path(shutil.copytree(empty_registry, tmp_path_factory.mktemp("team") / "registry"))
    with Registry.open(folder) as made:
        made.push(walker(), "walk/base", probe=False)
        made.push(lora(seed=1, target_modules=QV), "walk/a", base="walk/base", probe=False)
        made.push(lora(seed=2, r=2, use_rslora=True, target_modules=QV), "walk/b", base="walk/base", probe=False)
        made.push(lora(seed=3, target_modules=["head"]), "walk/c", base="walk/base", probe=False)
    return folder


@pytest.fixture
def team(filled_team: Path, tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(shutil.copytree(filled_team, tmp_path / "registry")) as opened:
        yield opened


def delta(model: PeftModel, path: str) -> Tensor:
    layer: Any = layers(model)[path]
    return layer.get_delta_weight("default").detach().double().flatten()


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one, other, dim=0))


def test_each_pair_is_compared_as_peft_computes_the_updates(team: Registry) -> None:
    found = team.similarity(["walk/a", "walk/b", "walk/c"])
    assert found.adapters == ("walk/a@1", "walk/b@1", "walk/c@1")
    assert [(one.a, one.b) for one in found.pairs] == [
        ("walk/a@1", "walk/b@1"),
        ("walk/a@1", "walk/c@1"),
        ("walk/b@1", "walk/c@1"),
    ]
    pair = found.pairs[0]
    models = [team.load(one, walker()) for one in ("walk/a", "walk/b")]
    one, other = (torch.cat([delta(model, path) for path in QV]) for model in models)
    assert pair.overall.cosine == pytest.approx(cosine(one, other), abs=1e-6)
    assert pair.overall.norms == pytest.approx((float(one.norm()), float(other.norm())), rel=1e-6)
    assert [module.path for module in pair.modules] == QV
    for module in pair.modules:
        one, other = (delta(model, module.path) for model in models)
        assert module.cosine == pytest.approx(cosine(one, other), abs=1e-6)
        assert module.conflict == pytest.approx(float((one * other < 0).double().mean()), abs=1e-12)
        assert module.by_chance == (4 / 16, 4 / 16)  # ranks 4 and 2


def test_adapters_that_share_no_module_are_said_to(team: Registry) -> None:
    (pair,) = team.similarity(["walk/a", "walk/c"]).pairs
    assert (pair.modules, pair.alone, pair.overall.cosine, pair.overall.writes) == ((), (2, 1), 0, None)
    assert pair.verdict == "they change no module together: a plain sum keeps both"


def test_a_module_that_one_adapter_alone_changes_counts_in_its_norm(team: Registry) -> None:
    team.push(lora(seed=6, target_modules=[*QV, "head"]), "walk/wide", base="walk/base", probe=False)
    (pair,) = team.similarity(["walk/a", "walk/wide"]).pairs
    models = [team.load(one, walker()) for one in ("walk/a", "walk/wide")]
    one = torch.cat([*(delta(models[0], path) for path in QV), torch.zeros(4 * 16)])
    other = torch.cat([delta(models[1], path) for path in [*QV, "head"]])
    assert pair.alone == (0, 1)
    assert pair.overall.cosine == pytest.approx(cosine(one, other), abs=1e-6)


def test_layers_of_every_kind_are_compared(registry: Registry) -> None:
    options: dict[str, Any] = {
        "target_modules": ["emb", "lin", "conv1", "conv2", "conv3", "mha"],
        "target_parameters": ["experts.down_proj"],
    }
    models = []
    for seed, r in ((1, 4), (2, 6)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            models.append(get_peft_model(zoo(), LoraConfig(r=r, lora_alpha=6, **options)))
        train(models[-1], seed)
        registry.push(models[-1], "walk/zoo", probe=False)
    (pair,) = registry.similarity(["walk/zoo@1", "walk/zoo@2"]).pairs
    assert (len(pair.modules), pair.alone, pair.left_out) == (8, (0, 0), {})
    for module in pair.modules:
        one, other = (delta(model, module.path) for model in models)
        assert module.cosine == pytest.approx(cosine(one, other), abs=1e-6)
        # A transposed and a stacked update have the elements of the weight in another order.
        assert module.conflict == pytest.approx(float((one * other < 0).double().mean()), abs=1e-12)


def test_the_verdict_follows_the_numbers(team: Registry) -> None:
    for name, factor in (("same", 1.0), ("opposed", -0.5), ("small", 1e-3)):
        model = lora(seed=9 if name == "small" else 1, target_modules=QV)
        with torch.no_grad():
            for path in QV:
                model.base_model.model.get_submodule(path).lora_B.default.weight.mul_(factor)
        team.push(model, f"walk/{name}", base="walk/base", probe=False, force=True)
    verdicts = {one.b: one.verdict for one in team.similarity(["walk/a", "walk/opposed", "walk/small"]).pairs[:2]}
    assert verdicts["walk/opposed@1"] == (
        "opposed: along its own direction a plain sum has 0.50 of the first and -1.00 of the second"
    )
    assert verdicts["walk/small@1"].startswith("nearly orthogonal, of unequal size: along its own direction")
    (pair,) = team.similarity(["walk/a", "walk/same"]).pairs
    assert pair.verdict == (
        "same direction: along its own direction a plain sum has 2.00 of the first and 2.00 of the second"
    )
    (pair,) = team.similarity(["walk/a", "walk/b"]).pairs
    assert pair.verdict.startswith("nearly orthogonal: a plain sum keeps both (")


def test_an_adapter_that_was_never_trained_has_no_direction(team: Registry) -> None:
    model = get_peft_model(walker(), LoraConfig(r=4, target_modules=QV))
    team.push(model, "walk/new", base="walk/base", probe=False, force=True)
    (pair,) = team.similarity(["walk/a", "walk/new"]).pairs
    assert (pair.overall.cosine, pair.overall.conflict, pair.verdict) == (None, None, "one of them changes nothing")


def test_what_is_no_product_is_left_out_with_the_reason(team: Registry) -> None:
    team.push(lora(seed=4, use_dora=True, target_modules=QV), "walk/dora", base="walk/base", probe=False)
    (pair,) = team.similarity(["walk/a", "walk/dora"]).pairs
    assert pair.modules == ()
    assert set(pair.left_out) == set(QV)
    assert pair.left_out["q_proj"].startswith("walk/dora@1: DoRA")
    assert pair.verdict == "they share no module that could be compared"


def test_an_unknown_alpha_is_not_guessed(team: Registry) -> None:
    team.push(team.load("walk/b"), "walk/bare")
    (pair,) = team.similarity(["walk/a", "walk/bare"]).pairs
    assert set(pair.left_out.values()) == {
        "walk/bare@1: lora_alpha is unknown: the adapter came without a configuration"
    }


def test_a_module_that_one_adapter_replaces_is_not_taken_for_untouched(team: Registry) -> None:
    team.push(lora(seed=5, target_modules=QV, modules_to_save=["head"]), "walk/saved", base="walk/base", probe=False)
    found = team.similarity(["walk/a", "walk/c", "walk/saved"])
    assert found.pairs[0].left_out == {}
    assert found.pairs[1].left_out == {"head": "walk/saved@1: a whole copy is no update"}
    assert found.pairs[1].verdict.endswith("; 1 module was not compared")
    assert (found.pairs[2].alone, found.pairs[2].modules) == ((0, 2), ())


def test_biases_beside_the_updates_are_said_not_to_be_compared(team: Registry) -> None:
    team.push(lora(seed=5, target_modules=QV, bias="all"), "walk/biased", base="walk/base", probe=False)
    found = team.similarity(["walk/c", "walk/biased"])
    assert any("walk/biased@1 has biases" in note and "head" in note for note in found.notes)
    assert found.pairs[0].left_out == {}
    assert found.pairs[0].alone == (1, 2)


def test_an_incomplete_module_is_said_to_be_left_out(team: Registry, tmp_path: Path) -> None:
    lora(seed=5, target_modules=QV).save_pretrained(tmp_path / "half")
    file = tmp_path / "half" / "adapter_model.safetensors"
    kept = {name: one for name, one in team.load("walk/a").items() if "v_proj.lora_B" not in name}
    save_file(kept, file)
    team.push(tmp_path / "half", "walk/half", base="walk/base", force=True)
    found = team.similarity(["walk/a", "walk/half"])
    assert [one.path for one in found.pairs[0].modules] == ["q_proj"]
    assert any(note.startswith("walk/half@1: C06 error: ") and "v_proj" in note for note in found.notes)


def test_all_of_it_is_plain_data(team: Registry) -> None:
    found = team.similarity(["walk/a", "walk/b", "walk/c"])
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["adapters"] == ["walk/a@1", "walk/b@1", "walk/c@1"]
    first, second, _ = document["pairs"]
    assert (first["shared"], first["alone"], first["left_out"]) == (2, [0, 0], {})
    assert first["cosine"] == found.pairs[0].overall.cosine
    assert (first["elements"], first["of_elements"]) == (512, 512)
    assert [(one["module"], one["sampled"]) for one in first["modules"]] == [("q_proj", False), ("v_proj", False)]
    assert (second["cosine"], second["writes"], second["by_chance"]) == (0, None, None)


def test_adapters_of_other_bases_are_refused_naming_module_and_both_sizes(registry: Registry) -> None:
    for out in (16, 12):
        torch.manual_seed(0)
        registry.push(lora(nn.Sequential(nn.Linear(16, out)), target_modules=["0"]), "walk/sizes", probe=False)
    with pytest.raises(
        ShapeMismatch, match="0: the update of walk/sizes@1 is of size 16 x 16, that of walk/sizes@2 of size 12 x 16"
    ):
        registry.similarity(["walk/sizes@1", "walk/sizes@2"])


def test_a_version_without_its_bytes_is_not_compared(team: Registry, tmp_path: Path) -> None:
    state = lora(seed=7, target_modules=QV).state_dict()
    save_file({name: one.contiguous() for name, one in state.items()}, tmp_path / "run.safetensors")
    team.push(tmp_path / "run.safetensors", "walk/run", kind="checkpoint", external=True)
    with pytest.raises(NotStored, match="walk/run@1 is recorded without its bytes, which a comparison reads"):
        team.similarity(["walk/a", "walk/run"])


def test_damaged_weights_are_not_compared(team: Registry, tmp_path: Path) -> None:
    (file,) = [file for file in team.show("walk/b").contents.files if file.role]
    path = tmp_path / "registry" / "blobs" / "sha256" / file.blob[:2] / file.blob
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(DigestMismatch):
        team.similarity(["walk/a", "walk/b"])


def test_each_update_is_read_and_decomposed_once_for_all_pairs(team: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    from registry.operations.merging import similarity

    calls = []
    true = similarity.measured
    monkeypatch.setattr(similarity, "measured", lambda update: calls.append(1) or true(update))
    team.push(lora(seed=8, target_modules=QV), "walk/d", base="walk/base", probe=False)
    assert len(team.similarity(["walk/a", "walk/b", "walk/d"]).pairs) == 3
    assert len(calls) == 3 * 2


def test_bad_input_is_refused(team: Registry) -> None:
    model = lora(seed=5, target_modules=QV)
    with torch.no_grad():
        nn.init.constant_(model.base_model.model.q_proj.lora_A.default.weight, float("nan"))
    team.push(model, "walk/nan", base="walk/base", probe=False, force=True)
    other_tuner = get_peft_model(walker(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    team.push(other_tuner, "walk/ia3", base="walk/base", probe=False, force=True)
    for references, reason in (
        (["walk/a"], "give two or more"),
        ([], "no source"),
        (["walk/a", "walk/a@1"], "are one version"),
        (["walk/a", "walk/base"], "is a base"),
        (["walk/a", "walk/nan"], "NaN"),
        (["walk/a", "walk/ia3"], "no module with LoRA factors"),
    ):
        with pytest.raises(InvalidInput, match=reason):
            team.similarity(references)
    with pytest.raises(NotFound):
        team.similarity(["walk/a", "walk/nobody"])
