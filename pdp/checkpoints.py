"""A checkpoint as one value, whatever it is: a file of any form, or a version in a registry. Loaders ask it for state
dicts by role, for the settings of a LoRA and for the arguments of the network, and know nothing of where these
stood."""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from pdp.errors import CheckpointError, SettingsMissing
from pdp.files import check_path, is_registry_url, on_cpu, write_tree
from pdp.lora_settings import LoraSettings, read_settings, settings_of_peft
from pdp.saving import wait_for_all
from pdp.state_names import adapter_part, base_part, by_network_name, modules_of, normalizer_of
from registry import Registry
from registry.core.adapter_config import read_adapter_config
from registry.core.architecture import Architecture
from registry.core.reference import shown
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_TENSORS, CONFIG_IN_HEADER
from registry.formats.source import read_small

MODEL_CONFIG = "model_config"
"""Key of the network's class and constructor arguments in our files."""
RECORDED = ("cfg", "policy", "model")
"""Where a workspace's configuration has the network's constructor arguments."""


class Checkpoint(ABC):
    """What a file or a version holds.

    Attributes:
        what: names it in messages.
        roles: names of its state dicts, such as `model`, `adapter`, `ema`, `optimizer`.
        training: what it says beside them: `cfg`, `epoch`, `global_step`, `metadata`, ...
    """

    what: str
    roles: frozenset[str]
    training: Mapping[str, Any]

    @abstractmethod
    def state(self, role: str) -> Any:
        """The state dict of a role, tensors on the CPU.

        Raises:
            CheckpointError: it has none.
        """

    @property
    @abstractmethod
    def payload(self) -> dict[str, Any]:
        """All of it as one tree, in the form of the file."""

    @property
    @abstractmethod
    def peft_config(self) -> Mapping[str, Any] | None:
        """PEFT's configuration of its LoRA, where it is kept in that form."""

    @property
    def saved_settings(self) -> object | None:
        """The LoRA settings in pdp's form, as they were saved."""
        return None

    @property
    def architecture(self) -> Architecture | None:
        """Class and constructor arguments of the network without LoRA; None where nothing says them."""
        return _architecture(self.training, self.what)

    @cached_property
    def network(self) -> dict[str, Tensor]:
        """Tensors of the network, under the names of the bare network; with an adapter's, if it has one. Of a version
        that is an adapter, the adapter's alone."""
        role = next((one for one in ("model", "adapter") if one in self.roles), None)
        if role is None:
            raise CheckpointError(f"{self.what} holds no network, only {', '.join(sorted(self.roles)) or 'nothing'}")
        return by_network_name(_tensors(self.state(role), self.what), self.what)

    @cached_property
    def averaged(self) -> dict[str, Tensor]:
        """The same of the moving average of the weights.

        Raises:
            CheckpointError: it has none.
        """
        return by_network_name(_tensors(self.state("ema"), self.what), self.what)

    @property
    def adapter(self) -> dict[str, Tensor]:
        return adapter_part(self.network)

    @property
    def base(self) -> dict[str, Tensor]:
        return base_part(self.network)

    @cached_property
    def normalizer(self) -> dict[str, Tensor]:
        """Tensors of the policy's normaliser under its own names; empty where there are none."""
        if "normalizer" in self.roles:
            return _tensors(self.state("normalizer"), self.what)
        return normalizer_of(_tensors(self.state("model"), self.what)) if "model" in self.roles else {}

    @cached_property
    def settings(self) -> LoraSettings | None:
        """Of its LoRA; None where it has no adapter.

        Raises:
            ConfigError: settings that cannot be read.
            CheckpointError: an adapter without any.
        """
        if self.saved_settings is not None:
            return read_settings(self.saved_settings, f"{self.what}, lora_config")
        adapter = self.adapter
        if self.peft_config is not None:
            return settings_of_peft(self.peft_config, modules_of(adapter), what=self.what)
        if adapter:
            raise SettingsMissing(
                f"{self.what} holds an adapter without its settings, so its lora_alpha is unknown; save it with "
                "save_lora_adapters, or load it into a LoRA model that you made with the right ones, with strict=False"
            )
        return None


class FileCheckpoint(Checkpoint):
    """A checkpoint read from a file; nothing in it is run."""

    def __init__(self, path: Path) -> None:
        from registry.formats.loaded_payload import load_payload

        wait_for_all()
        self.path = _tensors_in(path)
        self.what = shown(str(path), 200)
        self._loaded = load_payload(self.path)
        self.roles = frozenset(self._loaded.state_dicts)
        self.training = {**_from_header(self._loaded.header, self.what), **self._loaded.training}

    def state(self, role: str) -> Any:
        if role not in self.roles:
            raise _no_such(self, role)
        return self._loaded.state_dicts[role]

    @property
    def payload(self) -> dict[str, Any]:
        tree = self._loaded.tree
        return {**tree, **_counts(self.training)} if isinstance(tree, dict) else {"model": tree}

    @property
    def saved_settings(self) -> object | None:
        return self._loaded.settings

    @cached_property
    def peft_config(self) -> Mapping[str, Any] | None:
        text = self._loaded.header.get(CONFIG_IN_HEADER)
        if text is not None:
            return _object(text, f"{self.what}, {CONFIG_IN_HEADER}")
        beside = self.path.with_name(ADAPTER_CONFIG)
        if self.path.name not in (ADAPTER_TENSORS, ADAPTER_PICKLE) or not beside.is_file():
            return None
        return read_adapter_config(read_small(beside), shown(str(beside), 200)).document


class RegistryCheckpoint(Checkpoint):
    """A version of a registry; components are read when they are asked for.

    Attributes:
        reference: `namespace/name@number`.
        kind: `adapter`, `base` or `checkpoint`.
        base_reference: the base that it was trained on, pinned; None: none was declared.
    """

    def __init__(self, registry: Registry, url: str) -> None:
        details = registry.show(url)
        record = details.found.record
        self.registry = registry
        self.reference: str = record.reference
        self.kind: str = record.kind
        self.base_reference: str | None = record.base
        self.what = f"registry://{self.reference}"
        self.roles = frozenset(details.contents.components)
        self._config = details.contents.config
        self._states: dict[str, Any] = {}

    def state(self, role: str) -> Any:
        if role not in self.roles:
            raise _no_such(self, role)
        if role not in self._states:
            self._states[role] = self.registry.load(self.reference, component=role)
        return self._states[role]

    @cached_property
    def training(self) -> Mapping[str, Any]:  # type: ignore[override]  # read when it is asked for
        return self.state("training") if "training" in self.roles else {}

    @property
    def payload(self) -> dict[str, Any]:
        states = {_SAVED_AS.get(role, role): self.state(role) for role in sorted(self.roles - {"training"})}
        pickles = {key: value for key, value in self.training.items() if key != "cfg"}
        if self.settings is not None:
            pickles["lora_config"] = self.settings.to_payload()
        return {"cfg": self.training.get("cfg"), "state_dicts": states, "pickles": pickles, **_counts(self.training)}

    @cached_property
    def peft_config(self) -> Mapping[str, Any] | None:
        return None if self._config is None else _object(self._config, f"the configuration of {self.what}")

    @cached_property
    def architecture(self) -> Architecture | None:
        return self.registry.architecture(self.reference) or _architecture(self.training, self.what)


@contextmanager
def opened(registry: Registry | str | os.PathLike[str] | None) -> Iterator[Registry]:
    """The registry that was given; or the one that `Registry.open` finds for an address or for nothing, closed at the
    end."""
    if isinstance(registry, Registry):
        yield registry
        return
    with Registry.open(registry) as found:
        yield found


def read_checkpoint(
    path: str | os.PathLike[str] | Checkpoint, registry: Registry | str | os.PathLike[str] | None = None
) -> FileCheckpoint | RegistryCheckpoint:
    """Opens a file, a folder of PEFT's, or a `registry://` URL. Saves of this process that are under way end first.

    Args:
        path: an opened checkpoint is given back as it is.
        registry: where URLs are looked up; by default as the command line does (`$REGISTRY_URL`, `.registry/`, ...).

    Raises:
        InvalidInput: neither of the two, a torn file, or one that would run code; NotFound, StorageError
    """
    if isinstance(path, FileCheckpoint | RegistryCheckpoint):
        return path
    if isinstance(path, Checkpoint):
        raise TypeError(f"a {type(path).__name__} is no checkpoint of this module")
    if is_registry_url(path):
        wait_for_all()
        if isinstance(registry, Registry):
            return RegistryCheckpoint(registry, os.fspath(path))
        found = Registry.open(registry)
        try:
            checkpoint = RegistryCheckpoint(found, os.fspath(path))
        except BaseException:
            found.close()
            raise
        weakref.finalize(checkpoint, found.close)
        return checkpoint
    return FileCheckpoint(check_path(path))


def checkpoint_of(payload: Mapping[str, Any]) -> FileCheckpoint:
    """A checkpoint of what a file would hold: it is written to a temporary one and read from there.

    Raises:
        InvalidInput: values that are no plain data.
    """
    with tempfile.TemporaryDirectory(prefix="pdp-payload-") as folder:
        path = Path(folder) / "the payload"
        write_tree(path, on_cpu(payload))
        found = FileCheckpoint(path)
    found.what = "the payload"
    return found


def model_config(model: Any) -> dict[str, Any] | None:
    """What our files say of the network: its class and constructor arguments; None where it does not tell them."""
    arguments = getattr(model, "constructor_arguments", None)
    if not isinstance(arguments, Mapping):
        return None
    return {"class": f"{type(model).__module__}.{type(model).__qualname__}", "arguments": dict(arguments)}


_SAVED_AS = {"ema": "ema_model"}


def _counts(training: Mapping[str, Any]) -> dict[str, Any]:
    """How far a run was, which forms keep in different places."""
    return {key: training[key] for key in ("epoch", "global_step", "metadata") if key in training}


def _tensors_in(path: Path) -> Path:
    """The file itself, or that of the tensors in a folder of `save_pretrained`."""
    if not path.is_dir():
        return path
    found = next((path / name for name in (ADAPTER_TENSORS, ADAPTER_PICKLE) if (path / name).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{shown(str(path), 200)} is a folder without {ADAPTER_TENSORS}; give a checkpoint file, or a folder of "
            "PEFT's"
        )
    return found


def _architecture(training: Mapping[str, Any], what: str) -> Architecture | None:
    given = training.get(MODEL_CONFIG)
    if isinstance(given, Mapping) and isinstance(given.get("arguments"), Mapping):
        return Architecture(str(given.get("class", "")), dict(given["arguments"]))
    if isinstance(given, Mapping) and given:
        return Architecture("", dict(given))  # the older framework: arguments alone
    node: Any = training
    for key in RECORDED:
        node = node.get(key) if isinstance(node, Mapping) else None
    if isinstance(node, Mapping) and node:
        arguments = {str(key): value for key, value in node.items() if key != "_target_"}
        return Architecture(str(node.get("_target_", "")), arguments)
    return None


def _from_header(header: Mapping[str, str], what: str) -> dict[str, Any]:
    return {MODEL_CONFIG: _object(header[MODEL_CONFIG], f"{what}, {MODEL_CONFIG}")} if MODEL_CONFIG in header else {}


def _object(text: str, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is no JSON: {shown(str(error))}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{what}: expected an object, found a {type(found).__name__}")
    return found


def _tensors(state: Any, what: str) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{what}: expected a state dict of tensors, found a {type(state).__name__}")
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _no_such(checkpoint: Checkpoint, role: str) -> CheckpointError:
    known = ", ".join(sorted(checkpoint.roles)) or "nothing"
    return CheckpointError(f"{checkpoint.what} has no {role}; it has {known}")
