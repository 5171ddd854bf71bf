"""`adapter_config.json` as a value: read strictly, kept verbatim, its LoRA fields typed, and PEFT's own arithmetic for
the rank and scaling of a module. Nothing is guessed: what the document does not say is None, or PEFT's meaning of a
missing flag (off), never PEFT's default number."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from registry.core.config_fields import Fields, kind_of
from registry.core.errors import InvalidConfig
from registry.core.findings import Finding, Severity
from registry.core.name_patterns import PatternTable, Undecided
from registry.core.peft_keys import COMMON_KEYS, CONFIG_KEYS, KNOWN_PEFT, RETIRED_TYPES

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 32
MAX_FINDINGS_EACH = 20
_EXACT = 2**53
_UNORDERED = {
    *("exclude_modules", "feedforward_modules", "layers_pattern", "layers_to_transform"),
    *("modules_to_save", "target_modules", "target_parameters"),
}
_OF_THE_SESSION = {"auto_mapping", "inference_mode", "peft_version", "runtime_config"}


@dataclass(frozen=True)
class AdapterConfig:
    """One adapter's configuration.

    The typed fields are LoRA's; those of another tuner are filled where it has a key of the same name and type.

    Attributes:
        document: the parsed JSON as it was, unknown keys included.
        peft_type: upper case, like `LORA`.
        peft_version: that wrote it (PEFT 0.18 and later say so), else None.
        base_model: `base_model_name_or_path` as recorded: a name, or a path on some machine.
        init_lora_weights: as text, `true` and `false` for the two flags.
        target_modules: sorted names; or one regular expression; or None.
        exclude_modules: likewise.
        rank_pattern: in the order of the document, which decides where two keys match.
        layers_to_transform: sorted.
        trainable_token_indices: in their order, which is that of the tensor's rows.
    """

    document: dict[str, Any]
    peft_type: str
    peft_version: str | None
    base_model: str | None
    revision: str | None
    task_type: str | None
    r: int | None
    lora_alpha: float | None
    lora_dropout: float | None
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    bias: str | None
    init_lora_weights: str | None
    fan_in_fan_out: bool
    target_modules: tuple[str, ...] | str | None
    exclude_modules: tuple[str, ...] | str | None
    modules_to_save: tuple[str, ...]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    layer_replication: tuple[tuple[int, int], ...]
    target_parameters: tuple[str, ...]
    trainable_token_indices: tuple[int, ...] | dict[str, tuple[int, ...]] | None

    @cached_property
    def rank_keys(self) -> PatternTable:
        return PatternTable(self.rank_pattern)

    @cached_property
    def alpha_keys(self) -> PatternTable:
        return PatternTable(self.alpha_pattern)


def read_adapter_config(raw: bytes, what: str) -> AdapterConfig:
    """Reads the bytes of an `adapter_config.json`.

    Args:
        raw: UTF-8 JSON: an object without NaN, infinities or a key that stands twice, at most 16 MiB and 32 deep.
        what: how an error names the file.

    Raises:
        InvalidConfig: it is not that, or a known key holds a value of another type.
    """
    if len(raw) > MAX_BYTES:
        raise InvalidConfig(f"{what}: {len(raw)} bytes, and an adapter's configuration has at most {MAX_BYTES}")
    try:
        document = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_number, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        # ValueError is the parent of JSONDecodeError, UnicodeDecodeError and what the three hooks raise.
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidConfig(f"{what}: not the JSON of an adapter's configuration: {reason}") from error
    return _config(document, what)


def adapter_config(document: Mapping[str, Any], what: str = "the adapter's configuration") -> AdapterConfig:
    """A configuration from a mapping, such as a live `PeftConfig.to_dict()`. The mapping is copied.

    Sets become sorted lists, tuples lists and enums their values, as in the file that PEFT would write.

    Raises:
        InvalidConfig: a value that JSON cannot hold, or one of another type than its key has.
    """
    return _config(_plain(document, what, "", MAX_DEPTH), what)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice")
        found[key] = value
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is too large for a number")
    return number


def _plain(value: object, what: str, key: str, depth: int) -> Any:
    """The value as JSON has it."""
    if depth < 0:
        raise InvalidConfig(f"{what}: {key or 'it'} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidConfig(f"{what}: key '{key}' holds {value}, which JSON cannot")
        return value
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise InvalidConfig(f"{what}: key '{key}' holds a mapping whose keys are not all text")
        return {name: _plain(item, what, key or name, depth - 1) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, what, key, depth - 1) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item, what, key, depth - 1) for item in value), key=_order)
    raise InvalidConfig(f"{what}: key '{key}' holds a {type(value).__name__}, which JSON cannot")


def _order(value: object) -> tuple[str, Any]:
    return (kind_of(value), value if isinstance(value, str | int | float) else repr(value))


def _config(document: Any, what: str) -> AdapterConfig:
    if not isinstance(document, dict):
        raise InvalidConfig(f"{what}: expected a JSON object, found {kind_of(document)}")
    _check_text(document, what)
    named = document.get("peft_type")
    if not isinstance(named, str) or not named or "\0" in named:
        raise InvalidConfig(f"{what}: key 'peft_type' must be text like LORA, found {kind_of(named)}")
    peft_type = named.upper()
    every = Fields(document, what)
    tuner = Fields(document, what, strict=peft_type in CONFIG_KEYS)  # of an unknown tuner nothing is known
    lora = Fields(document, what, strict=peft_type == "LORA")
    return AdapterConfig(
        document=document,
        peft_type=peft_type,
        peft_version=every.text("peft_version"),
        base_model=every.text("base_model_name_or_path"),
        revision=every.text("revision"),
        task_type=every.text("task_type"),
        r=lora.whole("r", least=1),
        lora_alpha=lora.number("lora_alpha"),
        lora_dropout=lora.number("lora_dropout"),
        use_rslora=lora.flag("use_rslora"),
        use_dora=lora.flag("use_dora"),
        lora_bias=lora.flag("lora_bias"),
        bias=lora.text("bias"),
        init_lora_weights=lora.text_or_flag("init_lora_weights"),
        fan_in_fan_out=lora.flag("fan_in_fan_out"),
        target_modules=tuner.names_or_text("target_modules"),
        exclude_modules=tuner.names_or_text("exclude_modules"),
        modules_to_save=tuner.names("modules_to_save"),
        rank_pattern=lora.ranks("rank_pattern"),
        alpha_pattern=lora.numbers("alpha_pattern"),
        layers_to_transform=lora.places("layers_to_transform"),
        layers_pattern=lora.names("layers_pattern", or_one=True),
        layer_replication=lora.pairs("layer_replication"),
        target_parameters=lora.names("target_parameters"),
        trainable_token_indices=lora.tokens("trainable_token_indices"),
    )


def _check_text(document: dict[str, Any], what: str) -> None:
    """Depth, and that every text can be written as UTF-8: JSON may hold half of a surrogate pair."""
    waiting: list[tuple[Any, int]] = [(document, 0)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, dict):
            waiting.extend((item, depth + 1) for item in (*value, *value.values()))
        elif isinstance(value, list):
            waiting.extend((item, depth + 1) for item in value)
        elif isinstance(value, str) and not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise InvalidConfig(f"{what}: half of a surrogate pair in the text {value[:40]!r}") from error
        if depth > MAX_DEPTH:
            raise InvalidConfig(f"{what}: nested more than {MAX_DEPTH} deep")


def rank_of(config: AdapterConfig, module_path: str) -> int | None:
    """The rank that PEFT gives a LoRA module: the first matching key of rank_pattern, else r.

    Args:
        module_path: in the base model, like `encoder.layer.0.attention.q_proj`.

    Returns:
        None where the document does not say, or a pattern cannot be evaluated (see `name_patterns`).
    """
    try:
        key = config.rank_keys.find(module_path)
    except Undecided:
        return None
    return config.r if key is None else config.rank_pattern[key]


def alpha_of(config: AdapterConfig, module_path: str) -> float | None:
    """The alpha that PEFT gives a LoRA module; as `rank_of`."""
    try:
        key = config.alpha_keys.find(module_path)
    except Undecided:
        return None
    return config.lora_alpha if key is None else config.alpha_pattern[key]


def scaling(config: AdapterConfig, module_path: str, rank: int) -> float | None:
    """What PEFT multiplies B @ A with: alpha / rank, or alpha / sqrt(rank) with rsLoRA.

    Args:
        module_path: in the base model.
        rank: of this module's tensors.

    Returns:
        None where alpha is not known, and for tuners other than LoRA.

    Source: `LoraLayer.update_layer` and `get_pattern_key` of PEFT 0.21.
    """
    alpha = alpha_of(config, module_path)
    if config.peft_type != "LORA" or alpha is None or rank <= 0:
        return None
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def canonical_config(config: AdapterConfig) -> dict[str, Any]:
    """What a manifest holds: the document in one spelling, safe for RFC 8785.

    Lists that PEFT reads as sets are sorted and hold each entry once. Left out is what belongs to the session and not
    to the adapter: `peft_version`, `inference_mode` (PEFT writes true and has false in memory), `auto_mapping` (PEFT
    adds it while saving) and `runtime_config`. Integers from 2**53 on, which RFC 8785 has not, become their text.
    Keys whose value is None stay: None is not every key's default. So two saves of one adapter by one PEFT are equal,
    and so is a save and the live configuration; another PEFT has other keys, and then only the content digest is equal.
    """
    return {
        key: _sorted(value) if key in _UNORDERED else _exact(value)
        for key, value in config.document.items()
        if key not in _OF_THE_SESSION
    }


def _sorted(value: Any) -> Any:
    if not isinstance(value, list) or any(isinstance(item, dict | list) for item in value):
        return _exact(value)
    # By kind as well, because True == 1 in Python and not in JSON.
    distinct = {(kind_of(item), item): item for item in map(_exact, value)}
    return sorted(distinct.values(), key=_order)


def _exact(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _exact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_exact(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e21:
        value = int(value)  # RFC 8785 writes such a number without a point, and it would be read as an integer
    if type(value) is int and abs(value) >= _EXACT:
        return str(value)
    return value


def unknown_keys(config: AdapterConfig) -> dict[str, Any]:
    """The keys of the document that no known PEFT has for this type, with their values; none where the type is
    unknown."""
    known = CONFIG_KEYS.get(config.peft_type)
    if known is None:
        return {}
    return {key: value for key, value in config.document.items() if key not in known and key not in COMMON_KEYS}


def is_off(value: object) -> bool:
    """Whether a value is what a switched-off option has: None, False, zero or empty."""
    return not value


def config_findings(config: AdapterConfig) -> tuple[Finding, ...]:
    """What the configuration alone tells: C01 (unknown type), C02 (unknown keys), C11 (patterns not evaluated).

    An unknown key with a value that is not off is an error: whatever it changes, PEFT would drop it and load.
    """
    found = []
    written = f"written by PEFT {config.peft_version}; " if config.peft_version else ""
    recorded = config.document["peft_type"]
    if recorded not in CONFIG_KEYS:
        successor = RETIRED_TYPES.get(recorded)
        mend = f"{written}use a PEFT that has it"
        if successor:
            mend = f"older PEFT had it; convert the adapter to {successor}"
        elif config.peft_type in CONFIG_KEYS:
            mend = f"PEFT spells it {config.peft_type}"
        message = f"PEFT {KNOWN_PEFT} knows no tuner of this type"
        found.append(Finding("C01", "error", "peft_type", message, "a known type", repr(recorded)[:80], mend))
    for key, value in sorted(unknown_keys(config).items()):
        shown = json.dumps(value)[:80]
        if is_off(value):
            message = f"no PEFT up to {KNOWN_PEFT} has this key; its value is off"
            found.append(Finding("C02", "info", key[:200], message, "", shown))
        else:
            message = f"no PEFT up to {KNOWN_PEFT} has this key, and would drop it: the adapter may compute otherwise"
            found.append(Finding("C02", "error", key[:200], message, "no such key", shown, f"{written}use that PEFT"))
    for name, table in (("rank_pattern", config.rank_keys), ("alpha_pattern", config.alpha_keys)):
        for key in table.unreadable:
            message = "this expression is not evaluated, so rank and scaling of some modules are unknown"
            found.append(Finding("C11", "warning", f"{name}[{key[:80]!r}]", message, mend="name the modules plainly"))
    return tuple(some_of_each(found))


def some_of_each(findings: Iterable[Finding]) -> Iterator[Finding]:
    """At most `MAX_FINDINGS_EACH` of one code and severity, then one that counts the rest."""
    count: Counter[tuple[str, Severity]] = Counter()
    for finding in findings:
        key = (finding.code, finding.severity)
        count[key] += 1
        if count[key] <= MAX_FINDINGS_EACH:
            yield finding
    for (code, severity), number in count.items():
        if number > MAX_FINDINGS_EACH:
            yield Finding(code, severity, "", f"{number - MAX_FINDINGS_EACH} more of these are not shown")
