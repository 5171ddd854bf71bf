"""Making a probe: what is called and with what, what is refused, and that a model is left as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from registry.core.errors import ForwardFailed, Incompatible, InvalidInput, ModelChanged
from registry.formats.probe import MAX_TENSOR_BYTES, Probe, read_probe
from registry.formats.probe_tree import MAX_ELEMENTS, LeftOut
from registry.formats.probing import NoProbe, make_probe
from registry.formats.proof import prove
from tests.operations.models import QV, assert_unchanged, lora, state_of, steps, walker, zoo


def made(model: nn.Module, wanted: object = True, *, adapter: str | None = None) -> Probe:
    """The probe, after its blob was written and read, and proven on the same model."""
    found = make_probe(model, wanted, adapter=adapter)
    assert isinstance(found, Probe), found
    read = read_probe(found.to_bytes(), "blob")
    proof = prove(model, read)
    assert proof
    assert proof.difference == 0.0
    return read


def note(model: nn.Module, *, adapter: str | None = None) -> str:
    """Why no probe was made by itself."""
    found = make_probe(model, "auto", adapter=adapter)
    assert isinstance(found, NoProbe)
    assert found.note is not None
    assert "probe=" in found.note  # the mend
    return found.note


class Calls(nn.Module):
    """A linear layer in a forward of the test's own."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.own = forward

    def forward(self, x: Tensor) -> Any:
        return self.own(self, self.layer(x))


# ---------------------------------------------------------------- inputs that are given


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)

    def forward(self, batch: dict[str, Tensor], scale: float = 1.0, *, mode: str = "mean") -> dict[str, Tensor]:
        assert mode in ("mean", "max")
        return {"action": self.net(torch.cat(list(batch.values()))) * scale}


def test_a_tensor_is_the_one_argument() -> None:
    probe = made(walker(), steps())
    assert not probe.made
    assert torch.equal(probe.args[0], steps())
    with torch.no_grad():
        assert torch.equal(probe.outputs, walker()(steps()))


def test_a_tuple_holds_positional_arguments_and_a_dict_in_it_is_one_of_them() -> None:
    torch.manual_seed(0)
    probe = made(Policy(), ({"obs": torch.ones(2, 3), "goal": torch.zeros(1, 3)}, 2.0))
    assert list(probe.args[0]) == ["obs", "goal"]
    assert probe.args[1] == 2.0
    assert probe.outputs["action"].shape == (3, 2)


def test_a_dict_holds_keyword_arguments() -> None:
    probe = made(Policy(), {"batch": {"obs": torch.ones(2, 3)}, "mode": "max"})
    assert (probe.args, sorted(probe.kwargs)) == ((), ["batch", "mode"])


def test_what_a_tokenizer_gives_holds_keyword_arguments() -> None:
    from transformers import BatchEncoding

    tokens = BatchEncoding({"batch": {"obs": torch.ones(2, 3)}})
    assert sorted(made(Policy(), tokens).kwargs) == ["batch"]


def test_given_inputs_are_kept_as_they_were_when_they_were_given() -> None:
    x = steps()
    probe = make_probe(walker(), x)
    assert isinstance(probe, Probe)
    x.zero_()
    assert torch.equal(probe.args[0], steps())
    assert not probe.args[0].requires_grad


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ([torch.zeros(3)], "tuple"),
        (None, "None"),
        ("yes", "yes"),
        (3, "3"),
        ((np.zeros(3),), "probe.0: a probe cannot keep a ndarray"),
        ((torch.float32,), "probe.0: a probe cannot keep a dtype"),
        ({"x": {"y": object()}}, "probe.x.y"),
        ({1: torch.zeros(3)}, "key"),
        ({"x\x1b": torch.zeros(3)}, "key"),
        (("x" * 300,), "probe.0"),
        ((2**60,), "probe.0"),
        ((torch.zeros(3, device="meta"),), "meta"),
        ((torch.zeros(2, 2).to_sparse(),), "sparse"),
        ((torch.zeros(2, dtype=torch.complex128),), "complex128"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_kept_is_refused_by_name(wanted: object, named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        make_probe(walker(), wanted)


def test_given_inputs_that_do_not_fit_are_an_error_with_the_models_own_words() -> None:
    with pytest.raises(ForwardFailed, match="Walker raised RuntimeError: mat1 and mat2 shapes cannot be multiplied"):
        make_probe(walker(), torch.zeros(2, 5))
    with pytest.raises(ForwardFailed, match="TypeError"):
        make_probe(walker(), {"wrong": torch.zeros(2, 16)})


def test_no_probe_is_made_where_none_is_wanted() -> None:
    assert make_probe(Calls(None), False) == NoProbe()


# ---------------------------------------------------------------- inputs that are made


def test_a_module_of_one_tensor_gets_one_of_its_first_layers_size() -> None:
    probe = made(walker())
    assert probe.made
    assert probe.args[0].shape == (2, 16)
    assert torch.equal(probe.args[0], made(walker(seed=3)).args[0])
    assert made(zoo()).args[0].shape == (2, 8)
    assert made(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))).args[0].shape == (2, 3, 32, 32)
    assert made(nn.Sequential(nn.Conv1d(3, 4, 99), nn.BatchNorm1d(4))).args[0].shape == (2, 3, 1024)
    assert made(nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 2, 1))).args[0].shape == (2, 4, 4)
    assert made(walker().to(torch.bfloat16)).args[0].dtype == torch.bfloat16


def tiny(kind: str, **options: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bart = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16}
    bart |= dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    bart |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32)
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    image = {"image_size": 16, "patch_size": 8}
    models: dict[str, tuple[str, dict[str, Any]]] = {
        "BertModel": ("BertConfig", sizes),
        "RobertaModel": ("RobertaConfig", sizes | {"max_position_embeddings": 8}),
        "LlamaForCausalLM": ("LlamaConfig", sizes),
        "LlamaForSequenceClassification": ("LlamaConfig", sizes),
        "T5ForConditionalGeneration": ("T5Config", t5),
        "BartForSequenceClassification": ("BartConfig", bart),
        "ViTModel": ("ViTConfig", sizes | image),
        "CLIPModel": ("CLIPConfig", {}),
    }
    config, arguments = models[kind]
    if kind == "CLIPModel":
        inner = {"text_config": {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1} | sizes}
        arguments = inner | {"vision_config": sizes | image, "projection_dim": 8}
    elif kind != "ViTModel":
        arguments = {"vocab_size": 32} | arguments
    return getattr(transformers, kind)(getattr(transformers, config)(**(arguments | options))).eval()


@pytest.mark.parametrize(
    ("kind", "inputs", "output"),
    [
        ("BertModel", {"input_ids", "attention_mask", "use_cache"}, "pooler_output"),
        ("RobertaModel", {"input_ids", "attention_mask", "use_cache"}, "last_hidden_state"),
        ("LlamaForCausalLM", {"input_ids", "attention_mask", "use_cache"}, "logits"),
        ("LlamaForSequenceClassification", {"input_ids", "attention_mask", "use_cache"}, "logits"),
        ("T5ForConditionalGeneration", {"input_ids", "attention_mask", "decoder_input_ids", "use_cache"}, "logits"),
        ("BartForSequenceClassification", {"input_ids", "attention_mask", "decoder_input_ids", "use_cache"}, "logits"),
        ("ViTModel", {"pixel_values"}, "pooler_output"),
        ("CLIPModel", {"input_ids", "attention_mask", "pixel_values"}, "logits_per_image"),
    ],
)
def test_a_transformers_model_gets_what_its_configuration_says(kind: str, inputs: set[str], output: str) -> None:
    probe = made(tiny(kind))
    assert set(probe.kwargs) == inputs
    assert output in probe.outputs
    assert not any(isinstance(one, LeftOut) for one in probe.outputs.values())
    for name in ("input_ids", "decoder_input_ids"):
        if name in probe.kwargs:
            assert int(probe.kwargs[name].max()) < 32
    assert len(probe.to_bytes()) < 100_000


class Denoiser(nn.Module):
    """As pdp's diffusion transformer takes its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.input_dim, self.T_action, self.obs_dim, self.T_obs = 6, 4, 17, 2
        self.input_emb, self.cond_obs_emb = nn.Linear(6, 8), nn.Linear(17, 8)
        self.head = nn.Linear(8, 6)

    def forward(self, sample: Tensor, timestep: Tensor, cond: Tensor, **kwargs: Any) -> Tensor:
        time = timestep[:, None, None].to(sample.dtype).sin()
        return self.head(torch.relu(self.input_emb(sample) + self.cond_obs_emb(cond).sum(1, keepdim=True) + time))


def test_a_diffusion_policys_denoiser_gets_sample_timestep_and_condition() -> None:
    probe = made(Denoiser())
    assert [list(one.shape) for one in probe.args] == [[2, 4, 6], [2], [2, 2, 17]]
    adapted = get_peft_model(Denoiser(), LoraConfig(target_modules=["input_emb"]))
    assert [list(one.shape) for one in made(adapted, adapter="default").args] == [[2, 4, 6], [2], [2, 2, 17]]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer(x + y)


class OfADict(nn.Linear):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return super().forward(batch["x"])


class OfAnything(nn.Linear):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args)


@pytest.mark.parametrize(
    "model",
    [Two(), OfADict(2, 2), OfAnything(2, 2), nn.LSTM(2, 2), nn.ReLU(), nn.Sequential(nn.LayerNorm(3)), nn.ModuleList()],
    ids=lambda model: type(model).__name__,
)
def test_where_it_is_not_clear_what_a_model_takes_nothing_is_guessed(model: nn.Module) -> None:
    assert "it is not clear what the forward of" in note(model)


def test_a_forward_that_fails_on_made_inputs_is_a_note_with_its_words() -> None:
    def fail(model: nn.Module, x: Tensor) -> None:
        raise KeyError("goal\x1b")

    assert "the forward of Calls raised KeyError: 'goal" in note(Calls(fail))
    assert "\x1b" not in note(Calls(fail))


def test_a_configuration_that_fails_is_a_note() -> None:
    model = tiny("ViTModel")
    model.config.image_size = [16]
    assert "no inputs for ViTModel could be made" in note(model)


# ---------------------------------------------------------------- adapters


def test_a_fresh_adapter_has_a_probe() -> None:
    probe = made(get_peft_model(walker(), LoraConfig(**QV)), adapter="default")
    assert probe.adapter
    assert torch.equal(probe.outputs, made(walker()).outputs)


def test_the_model_that_carries_the_adapter_is_called_whatever_stands_around_it() -> None:
    adapted = lora()
    inner = made(adapted, adapter="default")
    outer = made(OfADictAround(adapted), adapter="default")
    assert outer.subject == "adapted"
    assert torch.equal(outer.outputs, inner.outputs)
    given = made(OfADictAround(adapted), {"batch": {"x": steps()}}, adapter="default")
    assert given.subject == "model"
    assert prove(adapted, outer)


class OfADictAround(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: dict[str, Tensor]) -> Any:
        return self.inner(batch["x"])


def test_only_an_adapter_that_is_active_alone_has_a_probe() -> None:
    model = lora()
    model.add_adapter("other", LoraConfig(**QV))
    assert "the active adapters are default, not other alone" in note(model, adapter="other")
    model.base_model.set_adapter(["default", "other"])
    assert "default, other" in note(model, adapter="default")
    model = lora()
    model.base_model.disable_adapter_layers()
    assert "disabled" in note(model, adapter="default")
    with pytest.raises(InvalidInput, match="disabled"):
        make_probe(model, steps(), adapter="default")


@pytest.mark.parametrize("kind", ["BertModel", "LlamaForCausalLM", "LlamaForSequenceClassification"])
def test_an_adapter_of_a_transformers_model_has_a_probe(kind: str) -> None:
    task = {"LlamaForCausalLM": "CAUSAL_LM", "LlamaForSequenceClassification": "SEQ_CLS"}.get(kind)
    model = tiny(kind)
    targets = ["query"] if kind == "BertModel" else ["q_proj"]
    probe = made(get_peft_model(model, LoraConfig(task_type=task, target_modules=targets)), adapter="default")
    assert (probe.subject, probe.adapter) == ("adapted", True)


def test_an_adapter_that_transformers_put_in_and_a_prompt_have_a_probe() -> None:
    model = tiny("BertModel")
    model.add_adapter(LoraConfig(target_modules=["query"]))
    assert made(model, adapter="default").adapter
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert made(get_peft_model(tiny("LlamaForCausalLM"), prompt), adapter="default").outputs["logits"].shape[1] == 11


# ---------------------------------------------------------------- outputs


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Output:
    loss: Tensor | None
    cache: object
    values: list[Tensor]


def test_outputs_are_kept_as_plain_trees() -> None:
    assert isinstance(made(Calls(lambda _, x: Pair(x, x + 1))).outputs, tuple)
    probe = made(Calls(lambda _, x: Output(None, object(), [x, x.sum()])))
    assert (probe.outputs["loss"], probe.outputs["cache"]) == (None, LeftOut("object"))
    assert [list(one.shape) for one in probe.outputs["values"]] == [[2, 3], []]


def test_a_dict_with_keys_that_are_no_text_is_left_out() -> None:
    probe = made(Calls(lambda _, x: (x, {1: x}, {"sparse": x.to_sparse(), "n": 3, "mean": 0.5})))
    assert probe.outputs[1] == LeftOut("dict")
    assert probe.outputs[2] == {"sparse": LeftOut("Tensor of torch.float32"), "n": 3, "mean": 0.5}


@pytest.mark.parametrize("size", [MAX_ELEMENTS, MAX_ELEMENTS + 1, 10 * MAX_ELEMENTS + 7])
def test_of_a_large_output_evenly_spaced_values_are_kept(size: int) -> None:
    probe = made(Calls(lambda _, x: {"y": torch.arange(size) + x.sum()}))
    assert len(probe.to_bytes()) < 5 * MAX_ELEMENTS
    if size == MAX_ELEMENTS:
        assert isinstance(probe.outputs["y"], Tensor)
        return
    sample = probe.outputs["y"]
    assert sample.shape == (size,)
    apart = sample.values.diff()
    assert size / MAX_ELEMENTS - 1 <= float(apart.min()) <= float(apart.max()) <= size / MAX_ELEMENTS + 1
    assert not prove(Calls(lambda _, x: {"y": 1.01 * torch.arange(size) + x.sum()}), probe)
    with pytest.raises(Incompatible, match="another form"):
        prove(Calls(lambda _, x: {"y": torch.arange(size + 1) + x.sum()}), probe)


def test_nan_and_infinity_are_kept() -> None:
    probe = made(Calls(lambda _, x: torch.stack([x * torch.nan, x / 0.0, x])))
    assert probe.outputs.isnan().any()
    assert probe.outputs.isinf().any()


def test_an_output_that_is_a_part_of_the_model_is_a_copy() -> None:
    model = Calls(lambda model, _: model.layer.weight)
    probe = make_probe(model, True)
    assert isinstance(probe, Probe)
    with torch.no_grad():
        model.layer.weight.add_(1)
    assert torch.equal(probe.outputs + 1, model.layer.weight)


@pytest.mark.parametrize(
    ("forward", "named"),
    [
        (lambda _, x: [x.repeat(10_000, 1)] * 300, str(MAX_TENSOR_BYTES)),
        (lambda _, x: [x] * 2000, "1000 values"),
        (lambda _, x: None, "no tensor"),
        (lambda _, x: object(), "no tensor"),
        (lambda _, x: [1, "two"], "no tensor"),
    ],
)
def test_outputs_that_cannot_be_kept_are_named(forward: Callable[..., Any], named: str) -> None:
    assert named in note(Calls(forward))
    with pytest.raises(InvalidInput, match=named):
        make_probe(Calls(forward), torch.ones(2, 3))


@pytest.mark.parametrize(
    "forward",
    [
        lambda _, x: x + torch.randn_like(x),
        lambda _, x: nn.functional.dropout(x, 0.5, training=True),
        lambda _, x: x * random.random(),
        lambda _, x: x * np.random.rand(),
        lambda model, x: x * next(COUNTER),
    ],
    ids=["torch", "dropout", "random", "numpy", "counter"],
)
def test_a_model_that_gives_other_outputs_each_time_has_no_probe(forward: Callable[..., Any]) -> None:
    assert "gives other outputs when it is called again" in note(Calls(forward))
    with pytest.raises(InvalidInput, match="other outputs"):
        make_probe(Calls(forward), torch.ones(2, 3))


COUNTER = iter(range(1, 1_000_000))


# ---------------------------------------------------------------- what is left as it was


def meddle(model: Any, x: Tensor) -> Tensor:
    """Does to a model what a forward may do: draws, caches, and writes to buffers."""
    torch.rand(1), random.random(), np.random.rand()
    model.seen.add_(1)
    model.cache = x
    model.register_buffer("late", torch.zeros(1))
    model.history.append(x)
    model.layer.weight.requires_grad_(False)
    return x


def meddling() -> Calls:
    model = Calls(meddle)
    model.register_buffer("seen", torch.zeros(3))
    model.history = []
    return model


def test_a_model_and_all_generators_are_left_as_they_were() -> None:
    model = meddling()
    model.train()
    model.layer.eval()
    before, version = state_of(model), model.seen._version
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    assert isinstance(make_probe(model, True), Probe)
    after = (torch.rand(1).item(), random.random(), np.random.rand())
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    assert after == (torch.rand(1).item(), random.random(), np.random.rand())
    assert_unchanged(model, before)
    assert (model.training, model.layer.training) == (True, False)
    assert model.history == []
    assert model.layer.weight.requires_grad
    assert model.seen._version > version  # it was written to, and put back


def test_a_failing_forward_leaves_a_model_as_it_was() -> None:
    def fail(model: Any, x: Tensor) -> None:
        meddle(model, x)
        raise ValueError("no")

    model = meddling()
    model.own = fail
    model.train()
    before = state_of(model)
    assert "ValueError" in note(model)
    assert_unchanged(model, before)


def test_a_graph_that_still_needs_a_buffer_can_go_backward_after_a_probe() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    loss = model(torch.ones(2, 4)).sum()
    made(model)
    loss.backward()


def test_a_forward_that_writes_to_a_weight_is_an_error_even_for_made_inputs() -> None:
    def write(model: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            model.layer.weight.mul_(1.0)
        return x

    with pytest.raises(ModelChanged, match=r"wrote to layer\.weight .*probe=False"):
        make_probe(Calls(write), True)


def test_a_model_in_training_is_called_in_eval_mode_without_gradients_and_autocast() -> None:
    def record(model: Any, x: Tensor) -> Tensor:
        modes.append((model.training, model.layer.training, torch.is_grad_enabled(), x.dtype, x.requires_grad))
        return x

    modes: list[Any] = []
    model = Calls(record)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made(model)
    assert set(modes) == {(False, False, False, torch.float32, False)}
    assert torch.is_grad_enabled()


def test_a_model_that_overrides_train_is_not_asked() -> None:
    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> Any:
            raise AssertionError("must not be called")

    made(Merging(2, 2))


def test_a_compiled_model_is_not_compiled_for_it() -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    compiled: list[Any] = []
    probe = made(torch.compile(walker(), backend=backend), steps())
    assert compiled == []
    assert prove(walker(), probe)


# ---------------------------------------------------------------- models that are not called


def test_hooks_of_the_user_are_never_run() -> None:
    ran: list[Any] = []
    for register in (nn.Module.register_forward_hook, nn.Module.register_forward_pre_hook):
        model = walker()
        register(model.norm, lambda *_: ran.append(1))
        assert "LayerNorm norm has a forward hook" in note(model)
        with pytest.raises(InvalidInput, match="remove it first"):
            make_probe(model, steps())
    model = walker()
    model.register_forward_hook(partial(ran.append))
    assert "hook" in note(model)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: ran.append(1))
    try:
        assert "global forward hooks" in note(walker())
    finally:
        handle.remove()
    assert ran == []


def test_hooks_that_are_a_part_of_how_a_library_computes_are_run() -> None:
    made(nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 3))).eval())
    model = tiny("BertModel")
    model.enable_input_require_grads()
    made(model)
    made(get_peft_model(model, LoraConfig(target_modules=["query"])), adapter="default")


def test_a_model_without_weights_in_place_is_not_called() -> None:
    with torch.device("meta"):
        assert "meta tensor" in note(nn.Linear(2, 2))
    assert "no shape yet" in note(nn.Sequential(nn.LazyLinear(3)))
    from accelerate import cpu_offload

    assert "offloaded" in note(cpu_offload(walker(), execution_device=torch.device("cpu")))


def test_a_model_of_several_processes_or_of_torchscript_is_not_called() -> None:
    assert "every process" in note(nn.DataParallel(walker()))
    assert "TorchScript" in note(nn.Sequential(torch.jit.ScriptModule()))


def test_a_model_that_accelerate_dispatched_is_called() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = walker()
    add_hook_to_module(model, AlignDevicesHook(io_same_device=True))
    assert torch.equal(made(model).outputs, made(walker()).outputs)


def test_buffers_too_large_to_copy_are_watched_as_parameters_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.formats.quiet_run.MAX_BUFFER_BYTES", 4)
    with pytest.raises(ModelChanged, match="wrote to seen"):
        make_probe(meddling(), True)
    made(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval())
