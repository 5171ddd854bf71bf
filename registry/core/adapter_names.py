"""What an adapter's tensors say: the modules that a LoRA changes, each with rank, sizes and kind, and what is wrong
with the tensors or between them and the configuration. Names and shapes only. The functions on single names come from
`tensor_names`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from registry.core.adapter_config import AdapterConfig, alpha_of, rank_of, scaling, some_of_each
from registry.core.config_fields import MAX_WHOLE
from registry.core.findings import Finding, Severity
from registry.core.layout import Layout
from registry.core.tensor_names import base_name, canonical_name, is_adapter_tensor, split_at_tuner, without_layers

__all__ = [
    "Target",
    "base_name",
    "canonical_name",
    "is_adapter_tensor",
    "pattern_paths",
    "target_scaling",
    "targets_of",
]

_EMBEDDINGS = ("embed_tokens", "lm_head")
"""What PEFT saves beside an adapter without being asked (its `EMBEDDING_LAYER_NAMES`)."""


@dataclass(frozen=True, slots=True)
class Target:
    """One module that an adapter changes.

    Attributes:
        module: its path in the base model. For `parameter` the path of the parameter, like `experts.down_proj`; where
            an adapter wraps several parameters of one module, which is which stands in no file, and the wrappers are
            told apart by PEFT's own `experts` and `experts.base_layer`.
        rank: 0 for `full`, `bias` and `token`. For `parameter` the rank of one expert.
        in_features: of the base module: what a linear takes, channels of a convolution, rows of an embedding. None
            where the tensors do not say.
        out_features: what the module gives; of a `full` copy the first dimension of its weight.
        kind: `linear` (also transformers' Conv1D), `conv1d`, `conv2d`, `conv3d`, `embedding`, `attention` (the fused
            projection of torch's MultiheadAttention) and `attention_out`, `parameter` (target_parameters), `token`
            (trainable_token_indices), `full` (a whole copy, as modules_to_save makes), `bias` (a trained bias alone);
            then `+dora`, `+kasa`, `+lora_bias`, `+grouped` (convolution), `+base_bias` and `+full` (the module's own
            bias or weight is in the adapter as well), in this order.
    """

    module: str
    rank: int
    in_features: int | None
    out_features: int | None
    kind: str


def targets_of(layout: Layout, config: AdapterConfig | None) -> tuple[tuple[Target, ...], tuple[Finding, ...]]:
    """The modules that a LoRA adapter changes, sorted by path, and what is wrong with its tensors.

    A whole model with a LoRA in it has the same targets as the LoRA alone. Of other tuners nothing is taken apart.

    Args:
        layout: of the adapter's state dict; adapter names and wrapper prefixes do not matter.
        config: where it is known; without it only the tensors are compared with each other.

    Returns:
        Targets, and findings C05 (a tensor of no known kind), C06 (a tensor is missing), C08 (sizes), C09 (ranks), C12
        (DoRA) and C23 (two names for one tensor); an incomplete or contradictory module is no target.
    """
    if config is not None and config.peft_type != "LORA":
        return (), ()
    reader = _Reader(config)
    reader.read(layout)
    targets = sorted(reader.targets(), key=lambda target: (target.module, target.kind))
    return tuple(targets), tuple(some_of_each(reader.findings))


def target_scaling(config: AdapterConfig, target: Target) -> float | None:
    """`scaling` of a target: None where alpha is unknown, and for whole copies, biases and tokens.

    PEFT looks patterns up under the name of the module that was targeted, which for the output projection of a
    MultiheadAttention is the attention, and for a parameter the parameter.
    """
    paths = pattern_paths(target.module, target.kind.partition("+")[0], config)
    if len({alpha_of(config, path) for path in paths}) != 1:
        return None
    return scaling(config, paths[0], target.rank)


def pattern_paths(module: str, kind: str, config: AdapterConfig) -> tuple[str, ...]:
    """The paths under which PEFT may have looked a module up; more than one where the tensors leave it open."""
    if kind == "attention_out":
        return (module.rpartition(".")[0],)
    if kind != "parameter" or any(f".{module}".endswith(f".{name}") for name in config.target_parameters):
        return (module,)
    owner = ".".join(without_layers(module.split(".")))
    return tuple(f"{owner}.{name}" for name in _parameters_of(owner, config)) or (owner,)


def _parameters_of(owner: str, config: AdapterConfig) -> list[str]:
    """Last names of the target_parameters that a module of this path can have."""
    found = set()
    for name in config.target_parameters:
        path, _, last = name.rpartition(".")
        if not path or f".{owner}".endswith(f".{path}"):
            found.add(last)
    return sorted(found)


@dataclass
class _Module:
    """The tensors of one wrapped module: part (`lora_A.weight`) -> (name in the state dict, shape)."""

    parts: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)

    def shape(self, *names: str) -> tuple[int, ...] | None:
        return next((self.parts[name][1] for name in names if name in self.parts), None)


class _Reader:
    def __init__(self, config: AdapterConfig | None) -> None:
        self.findings: list[Finding] = []
        self._config = config
        self._lora: dict[str, _Module] = {}
        self._tokens: dict[str, tuple[int, ...]] = {}
        self._plain: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
        self._copied: set[str] = set()

    # ---- which tensor belongs to what

    def read(self, layout: Layout) -> None:
        for spec in layout:
            name = canonical_name(spec.name)
            found = split_at_tuner(name)
            if found is None:
                self._read_plain(spec.name, name, spec.shape)
                continue
            path, container, rest = found
            part = f"{container}.{rest}" if rest else container
            if container.startswith("lora_") and path:
                self._add(self._lora.setdefault(path, _Module()).parts, part, spec.name, spec.shape)
            elif container == "trainable_tokens_delta" and path:
                self._tokens[".".join(without_layers(path.split(".")))] = spec.shape
            else:
                self._report("C05", spec.name, "a tensor of another tuner", "LoRA's", container)

    def _read_plain(self, name: str, canonical: str, shape: tuple[int, ...]) -> None:
        segments = canonical.split(".")
        if any(segment.startswith("lora_") for segment in segments[1:][-3:]):
            self._report("C05", name, "PEFT has no LoRA tensor of this name, and would drop it", mend="rename it")
            return
        path = ".".join(without_layers(segments)[:-1])
        if ".modules_to_save." in name:
            self._copied.add(path)
        if ".original_module." not in name:
            self._plain.setdefault(path, {}).setdefault(segments[-1], (name, shape))

    def _add(self, parts: dict[str, tuple[str, tuple[int, ...]]], part: str, name: str, shape: tuple[int, ...]) -> None:
        if part in parts:
            message = "two tensors are one without wrappers and adapter names; the first counts"
            self._report("C23", name, message, parts[part][0], mend="push one adapter at a time")
        else:
            parts[part] = (name, shape)

    # ---- what it amounts to

    def targets(self) -> Iterable[Target]:
        # A whole model has the weight under each LoRA; an adapter has at most the bias, and the weight of an embedding.
        whole = any(
            module.shape("lora_A.weight", "lora_A") and self._plain.get(_bare(path), {}).keys() - {"bias"}
            for path, module in self._lora.items()
        )
        found: dict[str, Target] = {}
        for path in sorted(self._lora):
            target = self._lora_target(path, self._lora[path])
            if target is not None:
                found[target.module] = target
        for path, shape in self._tokens.items():
            found[path] = Target(path, 0, None, shape[-1] if shape else None, "token")
        for path, tensors in sorted(self._plain.items()):
            if whole and path not in self._copied:
                continue
            if path in found:
                flags = "+base_bias" if tensors.keys() == {"bias"} else "+full"
                one = found[path]
                found[path] = Target(one.module, one.rank, one.in_features, one.out_features, one.kind + flags)
            else:
                found[path] = self._copy(path, tensors)
            if not whole:
                self._explain(path, tensors)
        return found.values()

    def _lora_target(self, path: str, module: _Module) -> Target | None:
        config = self._config
        embedding = module.shape("lora_embedding_A", "lora_embedding_B") is not None
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        a, b = (module.shape(name, name.removesuffix(".weight")) for name in names)
        known = {*names, *(name.removesuffix(".weight") for name in names), *_OPTIONAL_PARTS}
        for part, (name, _) in module.parts.items():
            if part not in known and not part.startswith(("lora_monteclora_sampler.", "lora_arrow.")):
                self._report("C05", name, "a tensor of no known kind in this module")
        if a is None or b is None:
            there, gone = (names[0], names[1]) if a is not None else (names[1], names[0])
            if a is None and b is None:
                there = next(iter(module.parts))
            self._report("C06", path, f"has {there} and lacks {gone}", gone, there, "push the whole adapter")
            return None
        kind, bare = self._kind(path, embedding, len(a))
        sizes = self._sizes(bare, kind, a, b)
        if sizes is None:
            return None
        rank, in_features, out_features, flags = sizes
        place = bare
        if kind == "parameter":
            owned = _parameters_of(bare, config) if config else []
            place = f"{bare}.{owned[0]}" if len(owned) == 1 else path
        wanted = {rank_of(config, one) for one in pattern_paths(place, kind, config)} if config else {None}
        expected = wanted.pop() if len(wanted) == 1 else None
        if kind == "parameter" and expected is not None and rank % expected == 0:
            rank = expected
        if expected not in (None, rank):
            what = "r or rank_pattern" if kind != "parameter" else "r or rank_pattern, once for each expert"
            self._report(
                "C09", place, f"{what} and the tensors' rank differ", str(expected), str(rank), "correct the config"
            )
        flags = self._parts_against_config(place, module, rank, out_features) + flags
        return Target(place, rank, in_features, out_features, kind + flags)

    def _kind(self, path: str, embedding: bool, dimensions: int) -> tuple[str, str]:
        """What a wrapped module is, and its path in the base."""
        bare = _bare(path)
        if embedding:
            return "embedding", bare
        if path.endswith(".base_layer.out_proj") and path.removesuffix(".base_layer.out_proj") in self._lora:
            return "attention_out", bare
        if f"{path}.base_layer.out_proj" in self._lora:
            return "attention", bare
        nested = path.endswith(".base_layer")
        if dimensions == 2 and (nested or (self._config is not None and self._is_parameter(bare, self._config))):
            return "parameter", bare
        return {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}.get(dimensions, "unknown"), bare

    def _is_parameter(self, bare: str, config: AdapterConfig) -> bool:
        if not _parameters_of(bare, config):
            return False
        # A parameter named without its module could be anywhere; then target_modules come first, as in PEFT.
        named = config.target_modules
        listed = isinstance(named, tuple) and any(f".{bare}".endswith(f".{name}") for name in named)
        return not listed

    def _sizes(
        self, path: str, kind: str, a: tuple[int, ...], b: tuple[int, ...]
    ) -> tuple[int, int | None, int | None, str] | None:
        """Rank, in and out features and flags from the two shapes, or None if they cannot be a LoRA."""
        shapes = f"A {list(a)}, B {list(b)}"
        if kind == "unknown" or len(a) != len(b) or 0 in a or 0 in b or max(*a, *b) > MAX_WHOLE:
            mend = (
                "an empty or flat tensor is a shard that was not gathered before saving" if 0 in a or len(a) < 2 else ""
            )
            self._report("C08", path, "these are no LoRA factors", "A (r, in, ...), B (out, r, ...)", shapes, mend)
            return None
        rank, columns = a[0], b[1]
        in_features: int | None = a[1]
        flags = ""
        blocks = _block_count(self._config)
        if kind.startswith("conv"):
            fits = rank % columns == 0 and all(size == 1 for size in b[2:])
            flags = "+grouped" if columns != rank else ""
        else:
            fits = columns == rank or columns * blocks == rank
        if not fits:
            mend = "A is (r, in) and B is (out, r): one of the two is of another adapter, or the wrong way round"
            self._report("C09", path, "the ranks of A and B differ", str(rank), str(columns), mend)
            return None
        if kind == "linear" and self._config is not None:
            in_features = _widened(path, a[1], blocks, self._config)
        return rank, in_features, b[0], flags

    def _parts_against_config(self, path: str, module: _Module, rank: int, out_features: int | None) -> str:
        """Flags for the parts besides A and B, each compared with the size and the option that it needs."""
        config = self._config
        flags = ""
        for part, flag, code, option, wanted in (
            ("lora_magnitude_vector", "+dora", "C12", "use_dora", config and config.use_dora),
            ("lora_diag", "+kasa", "C06", "kasa_config", config and bool(config.document.get("kasa_config"))),
            ("lora_B.bias", "+lora_bias", "C06", "lora_bias", config and config.lora_bias),
        ):
            shape = module.shape(part)
            if shape is not None:
                flags += flag
                size = rank if part == "lora_diag" else out_features
                if math.prod(shape) != size:
                    self._report("C08", path, f"{part} has another size than the module", str(size), str(list(shape)))
            if config is not None and bool(wanted) != (shape is not None):
                there = f"has a tensor {part}" if shape is not None else f"lacks {part}"
                message = f"{there}, and {option} says otherwise"
                expected, found = (part, "none") if wanted else ("none", part)
                code = code if code == "C12" or wanted else "C05"
                self._report(code, path, message, expected, found, f"correct {option}")
        return flags

    def _copy(self, path: str, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Target:
        """A whole copy of a module, or of its bias alone."""
        shape = next((tensors[name][1] for name in ("weight", *sorted(tensors)) if name in tensors), ())
        kind = "full"
        if tensors.keys() == {"bias"} and path not in self._copied and not self._is_saved(path):
            kind = "bias"
        return Target(path, 0, shape[1] if len(shape) > 1 else None, shape[0] if shape else None, kind)

    def _is_saved(self, path: str) -> bool:
        """Whether modules_to_save names the module or one around it; PEFT compares the ends of names."""
        names = self._config.modules_to_save if self._config else ()
        return any(around.endswith(names) for around in _around(path))

    def _explain(self, path: str, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        config = self._config
        if config is None or path in self._copied or self._is_saved(path):
            return
        if path.rpartition(".")[2] in _EMBEDDINGS or path in self._tokens:
            return
        for leaf, (name, _) in sorted(tensors.items()):
            if leaf == "bias" and config.bias in ("all", "lora_only"):
                continue
            message = "a tensor of the base that the configuration does not name; loading overwrites the base's own"
            self._report("C05", name, message, mend="name its module in modules_to_save", severity="warning")

    def _report(
        self,
        code: str,
        subject: str,
        message: str,
        expected: str = "",
        found: str = "",
        mend: str = "",
        *,
        severity: Severity = "error",
    ) -> None:
        self.findings.append(Finding(code, severity, subject, message, expected, found, mend))


_OPTIONAL_PARTS = ("lora_magnitude_vector", "lora_diag", "lora_B.bias", "lora_velora_embed")


def _bare(path: str) -> str:
    return ".".join(without_layers(path.split(".")))


def _around(path: str) -> Iterable[str]:
    """A module's path and those of all modules that hold it."""
    segments = path.split(".")
    return (".".join(segments[:end]) for end in range(len(segments), 0, -1))


def _block_count(config: AdapterConfig | None) -> int:
    blocks = config.document.get("use_bdlora") if config else None
    count = blocks.get("nblocks", 1) if isinstance(blocks, dict) else 1
    return count if type(count) is int and count > 0 else 1


def _widened(path: str, columns: int, blocks: int, config: AdapterConfig) -> int:
    """In-features of the base module where a variant makes A narrower than it."""
    if config.document.get("use_qalora"):
        group = config.document.get("qalora_group_size")
        return columns * (group if type(group) is int and group > 0 else 1)
    narrow = config.document.get("use_bdlora")
    names = narrow.get("target_modules_bd_a") if isinstance(narrow, dict) else None
    if isinstance(names, list) and any(isinstance(name, str) and name in path for name in names):
        return columns * blocks
    return columns
