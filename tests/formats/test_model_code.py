"""Models built on the meta device from a name that the user typed, and what is said where that does not work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from registry.core.errors import InvalidInput, SourceNotFound
from registry.formats.live_form import live_form
from registry.formats.model_code import build_on_meta, read_kwargs

NETS = """
import torch
from torch import nn
from neighbour import WIDTH

class Net(nn.Module):
    class Inner(nn.Linear):
        pass

    def __init__(self, width, n_head=4, *, causal=False):
        super().__init__()
        self.layer = nn.Linear(width, WIDTH)
        nn.init.orthogonal_(self.layer.weight)
        with torch.no_grad():
            self.layer.bias.fill_(1.0)

class Anything(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layer = nn.Linear(options["width"], 1)

class Large(nn.Module):
    def __init__(self, elements):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(elements, device="cpu"))

class LargeBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        try:
            self.register_buffer("table", torch.ones(1 << 14, 1 << 14, device="cpu"))
        except Exception as error:
            raise KeyError("hidden") from error

class OldStyle(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.Tensor(1 << 16, 1 << 10))

class ManySmall(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2048, 2048, bias=False, device="cpu") for _ in range(layers))

class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("positions", torch.arange(1 << 18, device="cpu"))
        self.layer = nn.Linear(2, 2)

class Item(nn.Module):
    def __init__(self):
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]

class Values(nn.Module):
    def __init__(self):
        super().__init__()
        self.values = nn.Linear(2, 2).weight.detach().numpy()

class File(nn.Module):
    def __init__(self, path):
        super().__init__()
        self.weights = torch.load(path)

class Fails(nn.Module):
    def __init__(self):
        raise ValueError("first line\\nsecond line")

class Ends(nn.Module):
    def __init__(self):
        raise SystemExit("usage: none")

def function():
    pass

class Plain:
    pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with modules in it."""
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "neighbour.py").write_text("WIDTH = 3\n")
    (tmp_path / "lost.py").write_text("import nothing_such\n")
    (tmp_path / "ends.py").write_text("import sys\nsys.exit('bye')\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('hides the library')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])
    for name in ("nets", "neighbour", "lost", "ends", "broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_a_class_of_the_working_folder_is_built_without_weights(folder: Path) -> None:
    before = list(sys.path)
    model = build_on_meta("nets:Net", {"width": 5})
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert (live_form(model).by_path["layer"].in_features, live_form(model).by_path["layer"].out_features) == (5, 3)
    assert sys.path == before
    assert torch.get_default_device().type == "cpu"


def test_a_dotted_attribute_names_a_class_within_another(folder: Path) -> None:
    model = build_on_meta("nets:Net.Inner", {"in_features": 2, "out_features": 1})
    assert type(model).__qualname__ == "Net.Inner"


def test_a_constructor_may_take_any_name(folder: Path) -> None:
    assert isinstance(build_on_meta("nets:Anything", {"width": 2, "else": 1}), nn.Module)


def test_a_module_of_the_working_folder_hides_no_library(folder: Path) -> None:
    with pytest.raises(InvalidInput, match=r"^json \(.*json/__init__\.py\) has no Net"):
        build_on_meta("json:Net", {})


@pytest.mark.parametrize(
    ("path", "kwargs", "message"),
    [
        ("nets", {}, "the model 'nets' is not of the form module:Class"),
        ("nets.Net", {}, "is not of the form module:Class"),
        ("nets:", {}, "is not of the form module:Class"),
        ("./nets.py:Net", {}, "is not of the form module:Class"),
        ("nets:Net()", {}, "is not of the form module:Class"),
        ("nets:Net\n", {}, "is not of the form module:Class"),
        ("nowhere.at:Net", {}, "cannot import nowhere.at: ModuleNotFoundError: No module named 'nowhere'"),
        ("lost:Net", {}, "cannot import lost: ModuleNotFoundError: No module named 'nothing_such'"),
        ("ends:Net", {}, "cannot import ends: SystemExit: bye"),
        ("broken:Net", {}, "cannot import broken: SyntaxError: "),
        ("nets:Nett", {}, "has no Nett; did you mean Net?"),
        ("nets:Net.Other", {}, "nets.Net ("),
        ("nets:function", {}, "nets:function is a function; expected a class"),
        ("nets:Plain", {}, "nets:Plain is no torch.nn.Module"),
        ("nets:Net", {}, "the arguments do not fit nets:Net: width is missing (its constructor takes width, n_head, "),
        ("nets:Net", {"width": 1, "n_heads": 2}, "it takes no n_heads; did you mean n_head?"),
        ("nets:Net", {"n_heads": 2, "depth": 1}, "it takes no n_heads, depth; did you mean n_head?; width is missing"),
        ("nets:Net", {"width": "wide"}, "nets:Net cannot be built without weights: TypeError: "),
        ("nets:File", {"path": "nowhere.pt"}, "No such file or directory: 'nowhere.pt'; its constructor needs a file"),
        ("nets:Fails", {}, "ValueError: first line second line; correct the arguments"),
        ("nets:Ends", {}, "SystemExit: usage: none"),
        ("nets:Item", {}, "its constructor needs values of weights, which a model on the meta device has not"),
        ("nets:Values", {}, "give the live one to Registry.check"),
        ("nets:Large", {"elements": 1 << 44}, "nets:Large allocates 67108864.0 MiB on cpu; expected at most 64.0 MiB"),
        ("nets:LargeBuffer", {}, "nets:LargeBuffer allocates 1024.0 MiB on cpu"),
        ("nets:OldStyle", {}, "nets:OldStyle allocates 256.0 MiB on cpu"),
        ("nets:ManySmall", {"layers": 6}, "6 tensors with 96.0 MiB on cpu, layers.0.weight first; expected at most"),
        ("nets:ManySmall", {"layers": 1000}, "nets:ManySmall allocates weight of a Linear on cpu; expected at most"),
    ],
)
def test_what_cannot_be_built_is_told_in_one_line(
    path: str, kwargs: dict[str, Any], message: str, folder: Path
) -> None:
    with pytest.raises(InvalidInput) as caught:
        build_on_meta(path, kwargs)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_small_tables_with_bytes_are_noted(folder: Path) -> None:
    notes: list[str] = []
    build_on_meta("nets:Table", {}, notes=notes)
    assert notes == [
        "nets:Table allocates 1 tensors with 2.0 MiB on cpu, positions first, though it is built on the meta device"
    ]


# ---------------------------------------------------------------- transformers and diffusers

LLAMA = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_fields_of_a_configuration_are_the_arguments_of_transformers() -> None:
    form = live_form(build_on_meta("transformers:LlamaForCausalLM", LLAMA))
    assert form == live_form(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)))


def test_a_whole_config_json_will_do(tmp_path: Path) -> None:
    transformers.LlamaConfig(**LLAMA, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    kwargs = read_kwargs(str(tmp_path / "config.json"))
    kwargs |= {
        "of_a_later_version": 1,
        "auto_map": {"AutoModel": "evil.Model"},
        "attn_implementation": "someone/kernels",
    }
    assert live_form(build_on_meta("transformers:LlamaModel", kwargs)).by_path["embed_tokens"].in_features == 32


def test_ties_are_those_of_the_configuration() -> None:
    form = live_form(build_on_meta("transformers:LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}))
    assert form.by_path["lm_head"].tied_to == "model.embed_tokens"


def test_the_dtype_of_a_configuration_counts() -> None:
    form = live_form(build_on_meta("transformers:LlamaForCausalLM", {**LLAMA, "dtype": "bfloat16"}))
    assert {one.dtype for row in form.modules for one in row.parameters} == {"BF16"}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_layers": 2}, "LlamaConfig has no num_layers; did you mean num_hidden_layers?"),
        ({"model_type": "bert"}, "is of the model_type 'llama', the configuration of 'bert'"),
        ({"hidden_size": "many"}, "cannot be built without weights: "),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        build_on_meta("transformers:LlamaForCausalLM", kwargs)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_of_diffusers_is_built_from_its_configuration() -> None:
    pytest.importorskip("diffusers")
    config = {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.30.0",
        "block_out_channels": [32, 64],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
    }
    form = live_form(build_on_meta("diffusers:UNet2DModel", config))
    assert form.by_path["conv_in"].out_features == 32
    with pytest.raises(InvalidInput, match="it takes no block_channels; did you mean block_out_channels"):
        build_on_meta("diffusers:UNet2DModel", {"block_channels": [32]})


PROGRAM = """
import math, resource, re, sys
from pathlib import Path
from registry.formats.live_form import live_form
from registry.formats.model_code import build_on_meta
form = live_form(build_on_meta("transformers:LlamaForCausalLM", {}))
parameters = sum(math.prod(one.shape) for row in form.modules for one in row.parameters)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
status = Path("/proc/self/status")
if status.exists():  # across exec Linux keeps ru_maxrss, here that of pytest
    peak = int(re.search(r"VmHWM:\\s*(\\d+) kB", status.read_text())[1])
print(parameters, len(form.modules), peak)
"""


def test_seven_billion_parameters_take_less_than_a_gigabyte() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    parameters, modules, kilobytes = map(int, run.stdout.split())
    assert (parameters, modules) == (6_738_415_616, 291)
    assert kilobytes < 1_000_000


# ---------------------------------------------------------------- the arguments


def test_arguments_are_json_or_a_file_with_it(tmp_path: Path) -> None:
    assert read_kwargs(' {"n_head": 4, "limit": Infinity}') == {"n_head": 4, "limit": float("inf")}
    (tmp_path / "arguments.json").write_text(json.dumps({"n_head": 4}), encoding="utf-8-sig")
    assert read_kwargs(str(tmp_path / "arguments.json")) == {"n_head": 4}


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1]", "expected a JSON object, found a list"), ("{", "expected a JSON object like"), ("", "expected a JSON")],
)
def test_other_files_are_no_arguments(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "it").write_text(content)
    with pytest.raises(InvalidInput, match=message) as caught:
        read_kwargs(str(tmp_path / "it"))
    assert str(tmp_path / "it") in str(caught.value)


def test_bytes_that_are_no_text_are_no_arguments(tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInput, match="UTF-8"):
        read_kwargs(str(tmp_path / "it"))


def test_half_an_object_is_no_arguments() -> None:
    with pytest.raises(InvalidInput, match="the arguments: expected a JSON object like"):
        read_kwargs('{"n_head": ')
    with pytest.raises(SourceNotFound):
        read_kwargs("nowhere.json")
