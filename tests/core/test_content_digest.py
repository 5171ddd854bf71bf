from __future__ import annotations

from hashlib import sha256
from typing import Any

import pytest

from registry.core.adapter_config import AdapterConfig, adapter_config
from registry.core.adapter_names import targets_of
from registry.core.content_digest import content_digest
from registry.core.errors import InvalidInput
from registry.core.layout import Layout, TensorSpec

FILE = {
    "base_model.model.b.q.lora_A.weight": ((4, 6), "a1"),
    "base_model.model.b.q.lora_B.weight": ((8, 4), "b1"),
    "base_model.model.head.weight": ((2, 8), "c1"),
}
LIVE = {
    "module.base_model.model.head.modules_to_save.walk.weight": ((2, 8), "c1"),
    "module.base_model.model.b.q.lora_B.walk.weight": ((8, 4), "b1"),
    "module.base_model.model.b.q.lora_A.walk.weight": ((4, 6), "a1"),
}


def config(**keys: Any) -> AdapterConfig:
    return adapter_config(
        {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q"],
            "modules_to_save": ["head"],
            "peft_version": "0.21.2",
            **keys,
        }
    )


def digest(tensors: dict[str, tuple[tuple[int, ...], str]], about: AdapterConfig | None, role: str = "adapter") -> str:
    layout = Layout(tuple(TensorSpec(name, "F32", shape) for name, (shape, _) in tensors.items()))
    digests = [one for _, one in tensors.values()]
    return content_digest({role: (layout, digests)}, about, targets_of(layout, about)[0])


PLAIN = digest(FILE, config())


def test_it_is_the_hash_of_the_document_that_the_text_describes() -> None:
    document = (
        '{"components":{"adapter":[["b.q.lora_A.weight","a1"],["b.q.lora_B.weight","b1"],["head.weight","c1"]]},'
        '"config":{"modules":[["b.q",false,4,2],["head",true,0,null]],"options":{},"tuner":"LORA"},"format":1}'
    )
    assert sha256(document.encode()).hexdigest() == PLAIN


def test_it_is_the_hash_of_the_document_with_options() -> None:
    about = config(
        use_dora=True, use_rslora=True, lora_alpha=3, use_qalora=True, qalora_group_size=2, init_lora_weights="pissa"
    )
    document = (
        '{"components":{"adapter":[["b.q.lora_A.weight","a1"],["b.q.lora_B.weight","b1"]]},"config":{"modules":'
        '[["b.q",false,4,1.5]],"options":{"init_lora_weights":"pissa","qalora_group_size":2,"use_dora":true,'
        '"use_qalora":true},"tuner":"LORA"},"format":1}'
    )
    assert sha256(document.encode()).hexdigest() == digest(dict(list(FILE.items())[:2]), about)


def test_a_live_adapter_and_its_file_are_one() -> None:
    assert digest(LIVE, config()) == PLAIN


@pytest.mark.parametrize(
    "change",
    [
        {"lora_dropout": 0.1},
        {"target_modules": ["b.q", "nothing"]},
        {"target_modules": r".*\.q"},
        {"exclude_modules": ["v"]},
        {"peft_version": None},
        {"base_model_name_or_path": "elsewhere", "revision": "main"},
        {"inference_mode": True, "auto_mapping": {"x": "y"}},
        {"task_type": "CAUSAL_LM"},
        {"init_lora_weights": "gaussian"},
        {"rank_pattern": {"q": 4}, "r": 64},
        {"alpha_pattern": {"q": 8}, "lora_alpha": 1},
        {"lora_alpha": 4, "use_rslora": True},
        {"fan_in_fan_out": True},
        {"a_new_key": None, "another": False},
        {"corda_config": None, "use_dora": False, "layer_replication": None},
        {"velora_config": {"num_groups": 4}},
    ],
    ids=str,
)
def test_what_does_not_change_the_function_does_not_change_it(change: dict[str, Any]) -> None:
    assert digest(FILE, config(**change)) == PLAIN


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": 9},
        {"lora_alpha": None},
        {"use_rslora": True},
        {"alpha_pattern": {"q": 9}},
        {"use_dora": True},
        {"trainable_token_indices": [1, 2]},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"alora_invocation_tokens": [3]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"a_new_key": 1},
        {"target_parameters": ["experts.up"]},
    ],
    ids=str,
)
def test_what_changes_the_function_changes_it(change: dict[str, Any]) -> None:
    assert digest(FILE, config(**change)) != PLAIN


def test_every_change_of_a_tensor_changes_it() -> None:
    name = "base_model.model.b.q.lora_A.weight"
    others = {
        digest(FILE | {name: ((4, 6), "a2")}, config()),
        digest({other: FILE[other] for other in FILE if "head" not in other}, config()),
        digest(FILE | {"base_model.model.ln.bias": ((8,), "d1")}, config()),
        digest({other.replace(".b.", ".c."): value for other, value in FILE.items()}, config()),
        digest(FILE, config(), role="model"),
        digest(FILE, None),
    }
    assert len(others | {PLAIN}) == 7


def test_a_tensor_that_stands_twice_counts_once() -> None:
    """PEFT writes the biases of modules_to_save under two names where bias is `all`."""
    twice = FILE | {"base_model.model.head.modules_to_save.default.weight": ((2, 8), "c1")}
    assert digest(twice, config()) == PLAIN
    other = FILE | {"base_model.model.head.modules_to_save.default.weight": ((2, 8), "c2")}
    assert digest(other, config()) != PLAIN


def test_tokens_keep_their_order() -> None:
    assert digest(FILE, config(trainable_token_indices=[1, 2])) != digest(FILE, config(trainable_token_indices=[2, 1]))


IA3 = {"base_model.model.q.ia3_l": ((1, 6), "e1")}


def ia3(**keys: Any) -> AdapterConfig:
    return adapter_config({"peft_type": "IA3", "target_modules": ["q", "v"], "fan_in_fan_out": False, **keys})


def test_another_tuner_counts_with_its_whole_configuration() -> None:
    document = (
        '{"components":{"adapter":[["q.ia3_l","e1"]]},"config":{"config":{"fan_in_fan_out":false,'
        '"target_modules":["q","v"]},"tuner":"IA3"},"format":1}'
    )
    assert sha256(document.encode()).hexdigest() == digest(IA3, ia3())


def test_of_another_tuner_the_same_keys_are_outside() -> None:
    same = ia3(
        target_modules=["v", "q"],
        peft_version="0.21.2",
        inference_mode=True,
        task_type="CAUSAL_LM",
        base_model_name_or_path="x",
        revision="main",
        some_dropout=0.1,
        feedforward_modules=None,
    )
    assert digest(IA3, same) == digest(IA3, ia3())
    assert digest(IA3, ia3(feedforward_modules=["q"])) != digest(IA3, ia3())
    assert digest(IA3, ia3(peft_type="VERA")) != digest(IA3, ia3())


def test_without_a_configuration_only_names_and_tensors_count() -> None:
    base = {"x.weight": ((2, 2), "f1")}
    document = '{"components":{"model":[["x.weight","f1"]]},"config":null,"format":1}'
    assert digest(base, None, role="model") == sha256(document.encode()).hexdigest()


def test_components_are_told_apart_and_their_order_is_not() -> None:
    layout = Layout((TensorSpec("x", "F32", (1,)),))
    one, other = (layout, ["a"]), (layout, ["b"])
    assert content_digest({"model": one, "ema": other}, None, ()) == content_digest(
        {"ema": other, "model": one}, None, ()
    )
    assert content_digest({"model": one, "ema": other}, None, ()) != content_digest(
        {"model": other, "ema": one}, None, ()
    )


def test_digests_of_another_number_are_refused() -> None:
    with pytest.raises(InvalidInput, match="component adapter: 1 tensors and 2 digests"):
        content_digest({"adapter": (Layout((TensorSpec("x", "F32", (1,)),)), ["a", "b"])}, None, ())
