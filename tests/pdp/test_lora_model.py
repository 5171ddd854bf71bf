"""LoRA models: which modules are targeted, the guide's ways to save and load, and what is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pdp.errors import CheckpointError, CheckpointWarning, TargetsNotFound
from pdp.lora_model import LoraTransformerForDiffusion
from pdp.modules_v2 import QKVTransformerForDiffusion
from registry.core.errors import Incompatible, InvalidInput, SourceNotFound
from tests.pdp.models import EXPECTED, LEGACY, SIZES, TARGETS, close, lora, network, output, same_tensors, train

SUFFIXES = [".pth", ".safetensors"]
Loader = Callable[[LoraTransformerForDiffusion, Path], None]


class FusedTransformer(nn.Module):
    """Attention as the older TransformerForDiffusion has it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1, enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, batch_first=True), 1)

    def forward(self, sample: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        found: Tensor = self.decoder(sample, self.encoder(cond))
        return found


# ---------------------------------------------------------------- targets


def test_targets_are_parts_of_names_within_the_encoder_and_the_decoder() -> None:
    model = lora(target_modules=["mlp", "q_proj"])
    found = model.get_targeted_modules()
    assert len(found) == 2 * 2 + 2 * 2 + 2 + 4  # fc1 and fc2 in four blocks, q_proj in two and four attentions
    assert "encoder.blocks.0.mlp.fc1" in found
    assert not any(path.startswith(("cond_obs_emb", "input_emb", "head")) for path in found)


@pytest.mark.parametrize(("apply_to", "count"), [("encoder", 2), ("decoder", 4), ("both", 6)])
def test_apply_to_chooses_the_stack(apply_to: str, count: int) -> None:
    found = lora(target_modules=["v_proj"], apply_to=apply_to).get_targeted_modules()
    assert len(found) == count
    assert all(apply_to in ("both", path.split(".")[0]) for path in found)


def test_the_targets_of_existing_checkpoints_are_found_again() -> None:
    modules = {name.split("base_model.model.")[1].split(".lora_")[0] for name in EXPECTED["adapter_tensors"]}
    assert set(lora().get_targeted_modules()) == modules


def test_the_base_is_frozen_and_registered_once() -> None:
    model = lora()
    trainable = [name for name, one in model.named_parameters() if one.requires_grad]
    assert trainable
    assert all(".lora_" in name for name in trainable)
    assert len(model.state_dict()) == 74 + 36
    assert isinstance(model.base_model, QKVTransformerForDiffusion)
    assert (model.obs_dim, model.input_dim, model.output_dim, model.T_obs, model.T_action) == (11, 3, 3, 4, 2)
    decay, no_decay = model.get_optim_groups(0.1)
    assert (len(decay["params"]), len(no_decay["params"])) == (36, 0)


def test_a_new_lora_changes_nothing_and_a_trained_one_does() -> None:
    base = network()
    before = output(base)
    model = LoraTransformerForDiffusion(base, lora_dropout=0.0).eval()
    assert torch.equal(output(model), before)
    train(model)
    assert not close(output(model), before)


def test_an_unknown_apply_to_names_the_near_word() -> None:
    with pytest.raises(
        InvalidInput, match="apply_to is 'encodr'; expected one of encoder, decoder, both; did you mean"
    ):
        lora(apply_to="encodr")


def test_targets_that_match_nothing_are_answered_with_what_there_is() -> None:
    with pytest.raises(TargetsNotFound, match=r"'q_prj'.*did you mean 'q_proj'.*there are fc1, fc2, k_proj") as error:
        lora(target_modules=["k_proj", "q_prj"])
    assert "k_proj' match" not in str(error.value)


def test_fused_attention_is_explained_and_its_output_layer_is_no_target() -> None:
    with pytest.raises(TargetsNotFound, match=r"in_proj_weight.*QKVTransformerForDiffusion.*linear1, linear2"):
        LoraTransformerForDiffusion(FusedTransformer(), target_modules=TARGETS)
    with pytest.raises(TargetsNotFound, match="MultiheadAttention"):
        LoraTransformerForDiffusion(FusedTransformer(), target_modules=["out_proj"])
    other = LoraTransformerForDiffusion(FusedTransformer(), target_modules=["linear1"])
    assert other.get_targeted_modules() == ["encoder.layers.0.linear1", "decoder.layers.0.linear1"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lora_r": 0}, "lora_r is 0"),
        ({"lora_r": 4.0}, "lora_r is 4.0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": [1]}, "target_modules has 1 in it"),
        ({"use_rs_lora": True}, "did you mean use_rslora"),
        ({"megatron_config": {"a": 1}}, "unknown option megatron_config"),
        ({"modules_to_save": ["head"]}, "unknown option modules_to_save"),
    ],
)
def test_settings_of_another_form_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        lora(**settings)


def test_a_network_with_adapters_is_not_wrapped_again() -> None:
    model = lora()
    with pytest.raises(InvalidInput, match="has adapters already"):
        LoraTransformerForDiffusion(model.base_model)
    with pytest.raises(InvalidInput, match="expected a torch module"):
        LoraTransformerForDiffusion({"a": 1})  # type: ignore[arg-type]


# ---------------------------------------------------------------- the ways to save and load


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_adapters_are_saved_and_loaded(suffix: str, tmp_path: Path) -> None:
    model, other = lora(), lora(seed=2)
    assert model.save_lora_adapters(str(tmp_path / f"a{suffix}")) == str(tmp_path / f"a{suffix}")
    other.load_lora_adapters(tmp_path / f"a{suffix}")
    assert same_tensors(model, other)
    assert (tmp_path / f"a{suffix}").stat().st_size < 60_000


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_checkpoint_brings_its_base_along(suffix: str, tmp_path: Path) -> None:
    model, other = lora(), lora(network(seed=5), seed=2)
    model.save_full_checkpoint(tmp_path / f"f{suffix}")
    other.load_full_checkpoint(tmp_path / f"f{suffix}")
    assert same_tensors(model, other)
    made = LoraTransformerForDiffusion.from_checkpoint(tmp_path / f"f{suffix}")
    assert torch.equal(output(made), output(model))
    assert not made.training


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_adapter_is_put_on_its_base_in_one_step(suffix: str, tmp_path: Path) -> None:
    base = network()
    torch.save({"model_state_dict": base.state_dict()}, tmp_path / "base.pth")
    model = lora(base, use_rslora=True, rank_pattern={"encoder.blocks.0.attn.q_proj": 2})
    model.save_lora_adapters(tmp_path / f"a{suffix}")
    made = LoraTransformerForDiffusion.from_checkpoint(tmp_path / f"a{suffix}", tmp_path / "base.pth")
    assert torch.equal(output(made), output(model))
    assert made.settings.options == model.settings.options
    with pytest.raises(CheckpointError, match=r"holds an adapter alone; give the network .* as base_model_path"):
        LoraTransformerForDiffusion.from_checkpoint(tmp_path / f"a{suffix}")


def test_what_is_written_opens_with_torchs_safe_loader_and_has_the_keys_of_existing_files(tmp_path: Path) -> None:
    model = lora()
    model.save_lora_adapters(tmp_path / "a.pth")
    model.save_full_checkpoint(tmp_path / "f.pth")
    adapters = torch.load(tmp_path / "a.pth", weights_only=True)
    full = torch.load(tmp_path / "f.pth", weights_only=True)
    saved = torch.load(LEGACY / "lora_adapters.pth", weights_only=True)
    assert adapters.keys() - saved.keys() == {"model_config"}
    assert adapters["lora_state_dict"].keys() == saved["lora_state_dict"].keys()
    assert (adapters["lora_r"], adapters["lora_alpha"], adapters["apply_to"]) == (4, 8, "both")
    older = torch.load(LEGACY / "lora_full.pth", weights_only=True)
    assert full["model_state_dict"].keys() == older["model_state_dict"].keys()
    assert full["lora_config"].keys() == older["lora_config"].keys()
    assert full["model_config"]["arguments"] == network().constructor_arguments


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "another.name"):
        lora().save_lora_adapters(tmp_path / f"{name}.pth")
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "another.name.pth").read_bytes()


def test_a_path_without_a_folder_works_and_missing_folders_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = lora()
    model.save_lora_adapters("lora_adapters.pth")
    model.save_lora_adapters("some/where/else.pth")
    model.load_lora_adapters("lora_adapters.pth")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["else.pth", "lora_adapters.pth", "some", "where"]


def test_dora_is_kept_as_it_is(tmp_path: Path) -> None:
    base = network()
    model = lora(copy.deepcopy(base), use_dora=True)
    model.save_lora_adapters(tmp_path / "a.pth")
    made = LoraTransformerForDiffusion.on_base(tmp_path / "a.pth", base)
    assert close(output(made), output(model))


def test_an_adapter_whose_start_changed_its_base_needs_that_base(tmp_path: Path) -> None:
    base = network()
    torch.save(base.state_dict(), tmp_path / "base.pth")
    model = lora(base, init_lora_weights="pissa")
    model.save_lora_adapters(tmp_path / "a.pth")
    model.save_full_checkpoint(tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match="init_lora_weights='pissa', which changed its base"):
        LoraTransformerForDiffusion.from_checkpoint(tmp_path / "a.pth", tmp_path / "base.pth")
    made = LoraTransformerForDiffusion.from_checkpoint(tmp_path / "f.pth")
    assert torch.equal(output(made), output(model))


# ---------------------------------------------------------------- what differs, in the guide's words


def test_a_configuration_that_differs_is_warned_of_and_what_fits_is_loaded(tmp_path: Path) -> None:
    lora(lora_alpha=16, lora_dropout=0.3).save_lora_adapters(tmp_path / "a.pth")
    other = lora(seed=2)
    with pytest.warns(
        CheckpointWarning, match="LoRA configuration mismatch! .*lora_alpha: 16 and 8; lora_dropout: 0.3"
    ):
        other.load_lora_adapters(tmp_path / "a.pth")
    assert torch.equal(output(other), output(lora()))
    assert other.lora_alpha == 8


def test_the_same_targets_in_other_words_are_no_mismatch(tmp_path: Path) -> None:
    lora(target_modules=["mlp"]).save_lora_adapters(tmp_path / "a.pth")
    lora(target_modules={"fc2", "fc1"}).load_lora_adapters(tmp_path / "a.pth")


def test_missing_and_unexpected_keys_are_named_and_the_rest_is_loaded(tmp_path: Path) -> None:
    lora(target_modules=["q_proj", "fc1"]).save_lora_adapters(tmp_path / "a.pth")
    other = lora(target_modules=["q_proj", "k_proj"], seed=2)
    with pytest.warns(CheckpointWarning) as caught:
        other.load_lora_adapters(tmp_path / "a.pth")
    said = [str(one.message) for one in caught]
    assert any(re.match(r"Missing keys: \['decoder.blocks.0.cross_attn.k_proj.lora_A.weight', ", one) for one in said)
    assert any(re.match(r"Unexpected keys: \['decoder.blocks.0.mlp.fc1.lora_A.weight', ", one) for one in said)
    assert any("targets only in the first" in one and "fc1" in one for one in said)
    assert all(Path(one.filename).name == "test_lora_model.py" for one in caught)
    name = "lora_model.base_model.model.encoder.blocks.0.attn.q_proj.lora_A.default.weight"
    assert torch.equal(other.state_dict()[name], lora(target_modules=["q_proj", "fc1"]).state_dict()[name])


def test_a_full_checkpoint_gives_its_adapter_and_its_base_is_unexpected(tmp_path: Path) -> None:
    lora().save_full_checkpoint(tmp_path / "f.pth")
    other = lora(network(seed=5), seed=2)
    before = other.base_model.state_dict()["head.weight"].clone()
    with pytest.warns(CheckpointWarning, match=r"Unexpected keys: \['cond_obs_emb.bias', "):
        other.load_lora_adapters(tmp_path / "f.pth", strict=False)
    assert torch.equal(other.base_model.state_dict()["head.weight"], before)
    with pytest.raises(Incompatible, match=r"head.weight"):
        other.load_lora_adapters(tmp_path / "f.pth", strict=True)


@pytest.mark.parametrize(
    "settings", [{"lora_alpha": 16}, {"target_modules": ["q_proj"]}, {"use_rslora": True}, {"lora_r": 2}]
)
def test_strict_refuses_every_difference_and_changes_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    lora(**settings).save_lora_adapters(tmp_path / "a.pth")
    other = lora(seed=2)
    before = copy.deepcopy(other)
    with pytest.raises(Incompatible):
        other.load_lora_adapters(tmp_path / "a.pth", strict=True)
    assert same_tensors(other, before)


@pytest.mark.parametrize("strict", [False, True])
def test_a_load_of_which_nothing_would_land_is_refused(strict: bool, tmp_path: Path) -> None:
    lora(lora_r=2).save_lora_adapters(tmp_path / "rank.pth")
    lora(target_modules=["v_proj"]).save_lora_adapters(tmp_path / "targets.pth")
    other = lora(seed=2)
    before = copy.deepcopy(other)
    for name in ("rank.pth", "targets.pth"):
        with pytest.raises(Incompatible):
            other.load_lora_adapters(tmp_path / name, strict=strict)
    assert same_tensors(other, before)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"emb_dim": 64}, "emb_dim: .*64.*32"),
        ({"n_head": 2}, "n_head: .*2.*4"),
        ({"causal_cross_attn": True}, "causal_cross_attn: .*True.*False"),
        ({"obs_dim": 12}, "obs_dim: .*12.*11"),
        ({"T_action": 4}, "T_action: .*4.*2"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused_by_the_argument(
    arguments: dict[str, Any], named: str, full: bool, tmp_path: Path
) -> None:
    model = lora(network(**arguments))
    (model.save_full_checkpoint if full else model.save_lora_adapters)(tmp_path / "a.pth")
    other = lora(seed=2)
    before = copy.deepcopy(other)
    with pytest.raises(Incompatible, match=named):
        (other.load_full_checkpoint if full else other.load_lora_adapters)(tmp_path / "a.pth")
    assert same_tensors(other, before)


def test_an_obs_dim_that_differs_is_refused_by_the_shapes_where_nothing_was_recorded(tmp_path: Path) -> None:
    saved = torch.load(LEGACY / "lora_full.pth", weights_only=True)
    other = lora(network(obs_dim=12))
    before = copy.deepcopy(other)
    torch.save(saved, tmp_path / "f.pth")
    with pytest.raises(
        Incompatible, match=r"cond_obs_emb.weight: the shapes differ \(expected \(32, 12\), found \(32, 11\)"
    ):
        other.load_full_checkpoint(tmp_path / "f.pth")
    assert same_tensors(other, before)


def test_dropouts_of_the_network_do_not_matter_to_a_load(tmp_path: Path) -> None:
    lora(network(p_drop_emb=0.5, p_drop_attn=0.0)).save_lora_adapters(tmp_path / "a.pth")
    lora(seed=2).load_lora_adapters(tmp_path / "a.pth", strict=True)


# ---------------------------------------------------------------- classes, arguments and bad files


class OtherTransformer(QKVTransformerForDiffusion):
    """A user's own class."""


def test_a_class_is_looked_up_and_never_imported(tmp_path: Path) -> None:
    base = OtherTransformer(**SIZES)
    lora(base).save_full_checkpoint(tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match=r"OtherTransformer, and classes are looked up, never imported"):
        LoraTransformerForDiffusion.from_checkpoint(tmp_path / "f.pth")
    made = LoraTransformerForDiffusion.from_checkpoint(tmp_path / "f.pth", classes=[OtherTransformer])
    assert type(made.base_model) is OtherTransformer


class TiedTransformer(QKVTransformerForDiffusion):
    """With a constructor that hands on whatever it is given, and two layers that are one."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        first, second = (block.mlp.fc1 for block in self.encoder.blocks)  # type: ignore[union-attr]
        second.weight = first.weight


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_users_class_with_tied_weights_is_saved_and_made_again(suffix: str, tmp_path: Path) -> None:
    model = lora(TiedTransformer(**SIZES))
    model.save_full_checkpoint(tmp_path / f"f{suffix}")
    made = LoraTransformerForDiffusion.from_checkpoint(tmp_path / f"f{suffix}", classes=[TiedTransformer])
    assert torch.equal(output(made), output(model))


def test_arguments_that_nothing_says_are_read_off_shapes_and_a_warning_names_the_rest() -> None:
    with pytest.warns(
        CheckpointWarning, match=r"taken as the default, as no shape shows it: n_head=4, causal_cross_attn"
    ):
        made = LoraTransformerForDiffusion.from_checkpoint(LEGACY / "lora_full.pth")
    assert made.base_model.constructor_arguments == {**network().constructor_arguments}


@pytest.mark.parametrize(
    "load", [LoraTransformerForDiffusion.load_lora_adapters, LoraTransformerForDiffusion.load_full_checkpoint]
)
def test_files_that_are_torn_missing_or_hold_something_else_are_named(load: Loader, tmp_path: Path) -> None:
    model = lora()
    model.save_full_checkpoint(tmp_path / "f.pth")
    (tmp_path / "torn.pth").write_bytes((tmp_path / "f.pth").read_bytes()[:-1000])
    (tmp_path / "text.pth").write_text("no checkpoint")
    torch.save({"model_state_dict": network().state_dict()}, tmp_path / "base.pth")
    before = copy.deepcopy(model)
    for name in ("torn.pth", "text.pth"):
        with pytest.raises(InvalidInput, match=name):
            load(model, tmp_path / name)
    with pytest.raises(SourceNotFound, match=r"missing\.pth"):
        load(model, tmp_path / "missing.pth")
    with pytest.raises(CheckpointError, match="holds no adapter"):
        load(model, tmp_path / "base.pth")
    with pytest.raises(InvalidInput, match="neither a file nor a registry:// URL"):
        load(model, "https://some.where/a.pth")  # type: ignore[arg-type]
    assert same_tensors(model, before)


def test_adapter_tensors_without_settings_say_that_alpha_is_unknown(tmp_path: Path) -> None:
    model = lora()
    adapters = {name: one for name, one in model.lora_model.state_dict().items() if ".lora_" in name}
    torch.save(adapters, tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="without its settings, so its lora_alpha is unknown"):
        LoraTransformerForDiffusion.from_checkpoint(tmp_path / "bare.pth", LEGACY / "workspace.ckpt")


def test_a_network_that_an_adapter_does_not_fit_is_left_as_it_was(tmp_path: Path) -> None:
    lora().save_lora_adapters(tmp_path / "a.pth")
    saved = torch.load(tmp_path / "a.pth", weights_only=True)
    saved["lora_state_dict"].popitem()
    torch.save(saved, tmp_path / "a.pth")
    base = network()
    names, before = list(base.state_dict()), output(base)
    with pytest.raises(Incompatible):
        LoraTransformerForDiffusion.on_base(tmp_path / "a.pth", base)
    assert list(base.state_dict()) == names
    assert torch.equal(output(base), before)
    assert lora(base).get_targeted_modules()


def test_the_dtype_of_the_weights_is_kept(tmp_path: Path) -> None:
    model = lora().to(torch.bfloat16)
    model.save_full_checkpoint(tmp_path / "f.pth")
    made = LoraTransformerForDiffusion.from_checkpoint(tmp_path / "f.pth")
    assert next(made.base_model.parameters()).dtype == torch.bfloat16


def test_what_is_no_path_for_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths: list[Any] = ["walk/perturb:prod", "walk/perturb@3", Path("registry://walk/perturb"), "a\0.pth", "", None, 3]
    for path in paths:
        with pytest.raises(InvalidInput):
            lora().save_lora_adapters(path)
    assert not list(tmp_path.iterdir())


def test_options_of_a_push_are_refused_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="base belong to a push"):
        lora().save_lora_adapters(tmp_path / "a.pth", base="walk/base")


def test_a_merged_adapter_is_not_saved(tmp_path: Path) -> None:
    model = lora()
    model.lora_model.merge_adapter()
    for save in (model.save_lora_adapters, model.save_full_checkpoint):
        with pytest.raises(InvalidInput, match="merged into its base"):
            save(tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())


def test_the_debug_tips_print_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    model = lora()
    model.print_targeted_modules()
    shown = capsys.readouterr().out
    assert "18 modules" in shown
    assert "encoder.blocks.0.attn.q_proj  32 -> 32" in shown
    assert "trainable parameters: 4,608 of" in shown
    assert model.lora_model.peft_config["default"].r == 4
