"""Asks transformers what it calls the tensors of a model folder. A program of its own (`live_names` starts it): a
request as JSON on standard input, one JSON answer on standard output. It builds the model on the meta device from the
classes that transformers itself has for a `model_type`, runs its renamings and conversions on tensors without bytes,
and lists its modules; no code, file or address that the configuration names is used, and nothing is downloaded."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

NOT_IMPORTED = ("kernels", "timm")
"""They take code and pickles from where a configuration says."""
LEFT_OUT_OF_A_CONFIG = frozenset(
    {
        "auto_map",  # code beside the weights
        "trust_remote_code",
        "fusion_config",  # changes the model only where its user asks for that
        # These may name kernels, which are code. None of them names or shapes a tensor.
        *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
        *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
    }
)
MEMORY_LIMIT = 8 << 30


class NoMap(Exception):
    """There is no map, for a reason that is nobody's fault."""


def describe(config: Mapping[str, Any], tensors: Sequence[tuple[str, Sequence[int]]]) -> dict[str, Any]:
    """The answer for one component.

    Args:
        config: `config.json`, parsed.
        tensors: name and shape of each saved tensor.

    Raises:
        NoMap; anything else, for a configuration that the library cannot build a model of.
    """
    # Heavy, and only this program pays for it.
    import torch
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.utils.generic import ContextManagers

    if config.get("quantization_config") is not None:
        raise NoMap("the model is quantised, so its live names depend on the library that quantised it")
    found = _model_class(config.get("model_type"), _architecture(config))
    plain = CONFIG_MAPPING[config["model_type"]].from_dict(plain_config(config))
    if not isinstance(plain, found.config_class):
        raise NoMap(f"a {found.__name__} is not made of a {type(plain).__name__}")
    with ContextManagers(found.get_init_context(torch.float32, False, False, False)):
        model = found(plain)
    answer = _follow(model, get_model_conversion_mapping(model), tensors)
    version = transformers.__version__
    return {"class": found.__name__, "library": "transformers", "version": version, **answer, **_form(model)}


def _form(model: Any) -> dict[str, str]:
    """The document of the model's form; where it cannot be made, why."""
    from registry.formats.live_form import live_form

    try:
        model.tie_weights()  # which was put off when it was built
        return {"form": live_form(model).document.decode("utf-8")}
    except Exception as error:  # noqa: BLE001  # code of any of its models; the map is good without it
        return {"no_form": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _architecture(config: Mapping[str, Any]) -> str | None:
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    return first if isinstance(first, str) else None


def plain_config(value: Any) -> Any:
    """A configuration without what could make the library run or fetch something."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            # transformers writes infinity so.
            return float(value["__float__"])
        return {key: plain_config(inner) for key, inner in value.items() if key not in LEFT_OUT_OF_A_CONFIG}
    return [plain_config(inner) for inner in value] if isinstance(value, list) else value


def _model_class(model_type: object, architecture: str | None) -> Any:
    """The class of this name among those that transformers itself has for the model type.

    A name of the data is only compared, never imported.
    """
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    version = f"transformers {transformers.__version__}"
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise NoMap(f"{version} has no model_type {model_type!r:.80}")
    tables = [getattr(modeling_auto, name) for name in dir(modeling_auto) if name.endswith("_MAPPING_NAMES")]
    entries = [modeling_auto.MODEL_MAPPING_NAMES.get(model_type), *(table.get(model_type) for table in tables)]
    names = [name for entry in entries if entry for name in ((entry,) if isinstance(entry, str) else entry)]
    names = [name for name in names if hasattr(transformers, name)]
    if not names:
        raise NoMap(f"{version} has no model class for the model_type {model_type!r:.80}")
    if architecture is None or architecture in names:
        # Without an architecture: what AutoModel would build.
        return getattr(transformers, architecture or names[0])
    module = sys.modules[getattr(transformers, names[0]).__module__]
    if architecture not in module.__all__:
        raise NoMap(f"{version} has no class {architecture!r:.80} for the model_type {model_type!r:.80}")
    return getattr(module, architecture)


def _follow(model: Any, transforms: Sequence[Any], tensors: Sequence[tuple[str, Sequence[int]]]) -> dict[str, Any]:
    """Where each saved tensor goes, as `convert_and_load_state_dict_in_model` of transformers 5 has it go."""
    import torch
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    live = model.state_dict()
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    renamed: dict[str, str] = {}
    shapes: dict[str, Sequence[int]] = {}
    unused: list[str] = []
    jobs: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for saved, shape in sorted(tensors, key=lambda item: dot_natural_key(item[0])):
        name, pattern = rename_source_key(saved, renamings, converters, prefix, live)
        if name not in live and saved in live:
            name, pattern = rename_source_key(saved, [], [], base_model_prefix=prefix, meta_state_dict=live)
        if name not in live or (pattern is None and (name in shapes or name in jobs)):
            unused.append(saved)
        elif pattern is None:
            renamed[saved], shapes[name] = name, shape
        else:
            job, sources = jobs.setdefault(name, (deepcopy(converter_of[pattern]), {}))
            sources.setdefault(pattern, []).append(saved)
            job.add_tensor(name, saved, pattern, _without_bytes(shape))
    converted = []
    for first, (job, sources) in jobs.items():
        # It is consumed, so the order is read before.
        patterns = list(sources)
        results = job.convert(first, model=model, config=model.config)
        for name, value in results.items():
            value = value[0] if isinstance(value, list) else value
            if name not in live or name in shapes:
                raise NoMap(f"its conversion gives {name!r:.120}, for which the model has no place")
            shapes[name] = list(value.shape)
        converted.append(
            {
                "saved": [sources[pattern] for pattern in sorted(patterns, key=job.source_patterns.index)],
                "live": [[name, shapes[name]] for name in results],
                "operations": [_operation(operation) for operation in job.operations],
            }
        )
    tied = dict(_ties(model.all_tied_weights_keys, shapes, live))
    return {
        "renamed": {saved: name for saved, name in renamed.items() if saved != name},
        "converted": converted,
        "tied": tied,
        "missing": [name for name in live if name not in shapes and name not in tied],
        "unused": unused,
        "other_shapes": [
            [name, list(shape), list(live[name].shape)]
            for name, shape in shapes.items()
            if isinstance(live[name], torch.Tensor) and list(shape) != list(live[name].shape)
        ],
    }


def _without_bytes(shape: Sequence[int]) -> Callable[[], Any]:
    import torch

    return lambda: torch.empty(tuple(shape), device="meta")


def _ties(pairs: Mapping[str, str], given: Mapping[str, Any], live: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names that get no saved tensor, with the name of one that does and is the same tensor."""
    groups: dict[str, list[str]] = {}
    for target, source in pairs.items():
        groups.setdefault(source, [source]).append(target)
    for names in groups.values():
        there = next((name for name in names if name in given), None)
        if there is not None:
            yield from ((name, there) for name in names if name in live and name not in given)


def _operation(operation: Any) -> dict[str, Any]:
    """One of transformers' `ConversionOps`, with its plain arguments."""
    plain = {key: value for key, value in vars(operation).items() if _is_plain(value)}
    return {"name": type(operation).__name__, "arguments": plain}


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, str))


def _own_package() -> None:
    """Has `registry` be the package that this file is part of. Neither the current folder nor the one around the
    package comes onto `sys.path`, and the package need not be installed."""
    package = ModuleType("registry")
    package.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules["registry"] = package


def main() -> None:
    """Reads the request and writes the answer: the map, or `{"why": ...}`."""
    _own_package()
    # What a library prints must not get between the answer's lines.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer_why(kind: type[BaseException], error: BaseException, trace: object) -> None:
        text = " ".join(str(error).split())[:500]
        json.dump({"why": text if kind is NoMap else f"{kind.__name__}: {text}"}, answers)
        answers.close()

    sys.excepthook = answer_why
    for name in NOT_IMPORTED:
        sys.modules[name] = None  # type: ignore[assignment]  # which is how Python itself is told
    if sys.platform != "win32":
        import resource

        # A configuration may ask for a billion layers.
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        least = MEMORY_LIMIT if most == resource.RLIM_INFINITY else min(MEMORY_LIMIT, most)
        resource.setrlimit(resource.RLIMIT_DATA, (least, most))
    request = json.load(sys.stdin)
    answer = describe(request["config"], request["tensors"])
    json.dump(answer, answers)
    answers.close()


if __name__ == "__main__":
    main()
