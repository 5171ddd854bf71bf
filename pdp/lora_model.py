"""`LoraTransformerForDiffusion`: a network of a diffusion policy with a LoRA on it, and the guide's ways to save and
load one. The adapter is PEFT's own; each path is a file (`.pth`, `.safetensors`) or a `registry://` URL."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from pdp.building import architecture_differences, build_network
from pdp.checkpoints import (
    MODEL_CONFIG,
    Checkpoint,
    RegistryCheckpoint,
    model_config,
    opened,
    read_checkpoint,
)
from pdp.errors import CheckpointError, SettingsMissing
from pdp.files import (
    SAFETENSORS,
    check_path,
    check_push_options,
    is_registry_url,
    on_cpu,
    refuse_push_options,
    write_flat,
    write_tree,
)
from pdp.loading import checked_first, fit, refused_arguments
from pdp.lora_building import RegistryLike, Source, base_of, check_ranks, lora_arguments, refuse_another, settings_of
from pdp.lora_settings import make_settings
from pdp.modules_v2 import optim_groups
from pdp.state_names import adapter_part, base_part
from pdp.targets import resolve_targets
from registry.core.content_digest import PLAIN_INITS
from registry.core.errors import InvalidInput
from registry.formats.live import adapter_tensors, find_adapted, live_config
from registry.formats.module_state import ModuleState
from registry.formats.paths import CONFIG_IN_HEADER
from registry.formats.tuner_layers import refuse_merged

Path = str | os.PathLike[str]
ADAPTER = "default"


class LoraTransformerForDiffusion(nn.Module):
    """A network with a LoRA on some of its linear layers; the network is frozen, and changed in place by PEFT.

    Args:
        base_model: the network; any module with linear layers in an `encoder` or a `decoder`.
        lora_r: rank.
        lora_alpha: numerator of the scaling, lora_alpha / lora_r.
        lora_dropout: on the adapter's inputs, in training.
        target_modules: parts of names: `q_proj`, `mlp` (gives fc1 and fc2), `blocks.0`.
        apply_to: `encoder`, `decoder` or `both`: which of these words a layer's name has to contain.
        kwargs: further options of peft.LoraConfig, such as use_rslora.

    Attributes:
        lora_model: the PeftModel; its adapter is `default`.
        settings: what the LoRA was made with.
        normalizer: what `set_normalizer` was given, else None.
        base_reference: the version that the base came from, if it came from a registry; None otherwise.

    Raises:
        TargetsNotFound: a target that names no layer; the message has what there is.
        InvalidInput: a setting of another form, or a model that has adapters already.
    """

    def __init__(
        self,
        base_model: nn.Module,
        lora_r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.1,
        target_modules: Iterable[str] = ("q_proj", "k_proj", "out_proj"),
        apply_to: str = "both",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if not isinstance(base_model, nn.Module):
            raise InvalidInput(f"base_model is a {type(base_model).__name__}; expected a torch module")
        if find_adapted(base_model) is not None:
            raise InvalidInput(f"the {type(base_model).__name__} has adapters already; give a plain network")
        self.settings = make_settings(lora_r, lora_alpha, lora_dropout, target_modules, apply_to, kwargs)
        modules = resolve_targets(base_model, self.settings.target_modules, apply_to)
        config = LoraConfig(
            r=lora_r,
            lora_alpha=self.settings.alpha,  # type: ignore[arg-type]  # PEFT takes fractions, whatever it says
            lora_dropout=lora_dropout,
            target_modules=modules,
            **self.settings.options,
        )
        changes_base = self.settings.options.get("init_lora_weights", True) not in (True, *PLAIN_INITS)
        before = ModuleState(base_model, values=list(base_model.parameters()) if changes_base else ())
        try:
            self.lora_model: PeftModel = get_peft_model(base_model, config, adapter_name=ADAPTER)
        except BaseException:
            before.restore()  # PEFT stops in the middle where it does not know how to go on
            raise
        self.normalizer: Any = None
        self.base_reference: str | None = None
        self._targeted = tuple(modules)

    # ------------------------------------------------------------ what a policy and a trainer ask for

    @property
    def base_model(self) -> nn.Module:
        """The network within, with PEFT's layers in the places of those that are targeted."""
        base: nn.Module = self.lora_model.get_base_model()
        return base

    @property
    def obs_dim(self) -> int:
        return self._size("obs_dim")

    @property
    def input_dim(self) -> int:
        return self._size("input_dim")

    @property
    def output_dim(self) -> int:
        return self._size("output_dim")

    @property
    def T_obs(self) -> int:
        return self._size("T_obs")

    @property
    def T_action(self) -> int:
        return self._size("T_action")

    def _size(self, name: str) -> int:
        network: Any = self.base_model
        return int(getattr(network, name))

    @property
    def past_action_visible(self) -> bool:
        return bool(getattr(self.base_model, "past_action_visible", False))

    @property
    def lora_r(self) -> int:
        return self.settings.r

    @property
    def lora_alpha(self) -> float:
        return self.settings.alpha

    @property
    def lora_dropout(self) -> float:
        return self.settings.dropout

    @property
    def target_modules(self) -> list[str]:
        return list(self.settings.target_modules)

    @property
    def apply_to(self) -> str:
        return self.settings.apply_to

    def forward(self, sample: Tensor, timestep: Tensor | int, cond: Tensor, **kwargs: Any) -> Tensor:
        """One denoising step, as the network's own; see `QKVTransformerForDiffusion.forward`."""
        output: Tensor = self.lora_model(sample, timestep, cond, **kwargs)
        return output

    def set_normalizer(self, normalizer: Any) -> None:
        """Keeps a policy's normaliser beside the model; it is no part of its state dict."""
        object.__setattr__(self, "normalizer", normalizer)

    def get_optim_groups(self, weight_decay: float = 1e-3) -> list[dict[str, Any]]:
        """The adapter's parameters for an optimizer: [decay, no_decay]."""
        return optim_groups(self.lora_model, weight_decay)

    def get_targeted_modules(self) -> list[str]:
        """Paths, within the network, of the layers that carry the LoRA, in the order of the network."""
        return list(self._targeted)

    def print_targeted_modules(self) -> None:
        """Prints these paths with their sizes, and how much of the model trains."""
        modules = dict(self.base_model.named_modules())
        print(f"LoRA (r={self.lora_r}, alpha={self.lora_alpha:g}) on {len(self._targeted)} modules:")
        for path in self._targeted:
            layer: Any = modules[path]
            print(f"  {path}  {layer.in_features} -> {layer.out_features}")
        trainable = sum(one.numel() for one in self.parameters() if one.requires_grad)
        total = sum(one.numel() for one in self.parameters())
        print(f"  trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%})")

    # ------------------------------------------------------------ saving

    def save_lora_adapters(self, path: Path, *, registry: RegistryLike = None, **push: Any) -> str:
        """Saves the adapter alone.

        Args:
            path: a `.pth` or `.safetensors` file, written whole or not at all; or `registry://namespace/name[:tag]`,
                where a new version is pushed, and the tag moved to it.
            registry: where a URL goes; by default as the command line finds it.
            push: of a URL alone: `base`, `tags`, `metadata`, `metrics`, `step`, `message`, `continued_from`, `parents`
                as `Registry.push` takes them. `base` is by default the version that the base was loaded from.

        Returns:
            The path, or the pushed version as `registry://namespace/name@number`.

        Raises:
            InvalidInput: the adapter is merged into its base, or a path that is none.
            NoSpace, ReadOnly, StorageError: nothing has changed.
        """
        refuse_merged(self)
        if is_registry_url(path):
            return self._push(path, registry, push)
        file = _file(path, push)
        tensors = on_cpu(adapter_tensors(self.lora_model, ADAPTER))
        if file.suffix == SAFETENSORS:
            write_flat(file, tensors, self._header())
        else:
            named = {_live_name(name): tensor for name, tensor in tensors.items()}
            write_tree(file, on_cpu({**self.settings.to_payload(), "lora_state_dict": named, **self._made_of()}))
        return str(path)

    def save_full_checkpoint(self, path: Path, *, registry: RegistryLike = None, **push: Any) -> str:
        """Saves the network with its LoRA, for use without any other file; arguments and errors as for
        `save_lora_adapters`."""
        refuse_merged(self)
        if is_registry_url(path):
            return self._push(path, registry, {**push, "kind": "checkpoint"})
        file = _file(path, push)
        tensors = on_cpu(self.lora_model.state_dict())
        if file.suffix == SAFETENSORS:
            write_flat(file, tensors, self._header())
        else:
            tree = {"model_state_dict": tensors, "lora_config": self.settings.to_payload(), **self._made_of()}
            write_tree(file, on_cpu(tree))
        return str(path)

    def _push(self, path: Path, registry: RegistryLike, push: Mapping[str, Any]) -> str:
        given = {"base": self.base_reference, **push}
        check_push_options(given)
        with opened(registry) as where:
            pushed = where.push(self.lora_model, os.fspath(path), **given)
        return f"registry://{pushed.reference}"

    def _made_of(self) -> dict[str, Any]:
        config = model_config(self.base_model)
        return {} if config is None else {MODEL_CONFIG: config}

    def _header(self) -> dict[str, Any]:
        return {CONFIG_IN_HEADER: live_config(self.lora_model, ADAPTER).document, **self._made_of()}

    # ------------------------------------------------------------ loading

    def load_lora_adapters(self, path: Path, *, strict: bool | None = None, registry: RegistryLike = None) -> None:
        """Loads an adapter into this model's, from a file of any form that has one, or from a registry.

        Tensors land on the CPU first and are copied from there. A file may differ: a warning says in which settings,
        and what fits is loaded. A version of a registry is checked as `Registry.load` does.

        Args:
            strict: refuse every difference. None: True for a registry, False for a file.

        Raises:
            Incompatible: it does not fit, or nothing of it does; the model is unchanged.
            InvalidInput: a torn file, one that would run code, or one without an adapter; NotFound.
        """
        checkpoint = read_checkpoint(path, registry)
        if isinstance(checkpoint, RegistryCheckpoint) and checkpoint.kind == "adapter" and strict is not False:
            refuse_another(checkpoint, self.base_model)
            checkpoint.registry.load(checkpoint.reference, self)
            return
        self.fit_checkpoint(checkpoint, strict=_strict(strict, checkpoint), only_adapter=True)()

    def load_full_checkpoint(self, path: Path, *, strict: bool | None = None, registry: RegistryLike = None) -> None:
        """Loads network and LoRA; arguments and errors as for `load_lora_adapters`."""
        checkpoint = read_checkpoint(path, registry)
        self.fit_checkpoint(checkpoint, strict=_strict(strict, checkpoint), only_adapter=False)()

    def fit_checkpoint(self, checkpoint: Checkpoint, *, strict: bool, only_adapter: bool) -> Callable[[], None]:
        """Looks whether an opened checkpoint fits, and warns of what a lenient load lets pass.

        Returns:
            A function that loads it; until it is called, the model is unchanged.

        Raises:
            CheckpointError: it holds no adapter.
            Incompatible: it does not fit.
        """
        if not checkpoint.adapter:
            raise CheckpointError(f"{checkpoint.what} holds no adapter; it has {', '.join(sorted(checkpoint.roles))}")
        differing = self.differences(checkpoint)
        refused = refused_arguments(architecture_differences(checkpoint.architecture, self.base_model))
        if only_adapter:
            refused += checked_first(checkpoint, self, strict=strict)
        if strict:
            # Dropout is of no effect on what is loaded.
            refused += refused_arguments(one for one in differing if not one.startswith("lora_dropout:"))
        return fit(
            self,
            checkpoint.network,
            strict=strict,
            what=checkpoint.what,
            only_adapter=only_adapter,
            refused=refused,
            mismatch=differing,
        )

    def differences(self, checkpoint: Checkpoint) -> list[str]:
        """In which LoRA settings a checkpoint and this model differ: the checkpoint's value first."""
        try:
            saved = checkpoint.settings
        except SettingsMissing:
            return ["lora_alpha: unknown and " + repr(self.lora_alpha)]
        return [] if saved is None else saved.differences(self.settings, self.base_model)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint_path: Source,
        base_model_path: Source | None = None,
        *,
        classes: Iterable[type[nn.Module]] = (),
        use_ema: bool = False,
        registry: RegistryLike = None,
    ) -> LoraTransformerForDiffusion:
        """Makes network and LoRA of a checkpoint in one step.

        The network's arguments are the recorded ones; a file without any gives what its shapes show, and a warning
        names the rest. Its weights come from `base_model_path`, else from the checkpoint itself, else from the base
        that the version was pushed with.

        Args:
            classes: classes of networks beside pdp's own that the checkpoint may name; the first is taken where it
                names none.
            use_ema: take the moving average of the weights.

        Returns:
            The model in eval mode, on the CPU.

        Raises:
            CheckpointError: there is no LoRA in it, or no base to put it on, or a class that is not in the table.
            Incompatible: adapter and base do not fit.
            InvalidInput, NotFound, StorageError
        """
        checkpoint = read_checkpoint(checkpoint_path, registry)
        settings_of(checkpoint)  # before anything is built
        source, base_reference = base_of(checkpoint, base_model_path, registry)
        own = source is checkpoint
        weights = base_part(checkpoint.averaged if use_ema else checkpoint.network) if own else source.base
        base = build_network(source if own or source.architecture is not None else checkpoint, weights, classes)
        refuse_another(checkpoint, base)
        fit(base, weights, strict=True, what=source.what)()
        model = cls._put_on(base, checkpoint, use_ema=use_ema, own_base=source is checkpoint)
        model.base_reference = base_reference
        return model.eval()

    @classmethod
    def on_base(
        cls, checkpoint_path: Source, base_model: nn.Module, *, use_ema: bool = False, registry: RegistryLike = None
    ) -> LoraTransformerForDiffusion:
        """Puts the LoRA of a checkpoint on a live network, which is changed in place; its own weights stay.

        Raises:
            CheckpointError: there is no LoRA in it.
            Incompatible: adapter and base do not fit.
            InvalidInput, NotFound, StorageError
        """
        checkpoint = read_checkpoint(checkpoint_path, registry)
        settings_of(checkpoint)
        refuse_another(checkpoint, base_model)
        return cls._put_on(base_model, checkpoint, use_ema=use_ema, own_base=False).eval()

    @classmethod
    def _put_on(
        cls, base: nn.Module, checkpoint: Checkpoint, *, use_ema: bool, own_base: bool
    ) -> LoraTransformerForDiffusion:
        settings = settings_of(checkpoint)
        changing = settings.options.get("init_lora_weights", True)
        if not own_base and changing is not True and changing not in PLAIN_INITS:
            raise CheckpointError(
                f"{checkpoint.what} was made with init_lora_weights={changing!r}, which changed its base, so that it "
                "needs the base that it was saved with: use the full checkpoint"
            )
        adapter = adapter_part(checkpoint.averaged if use_ema else checkpoint.network)
        check_ranks(settings, adapter, checkpoint.what)
        before = ModuleState(base)
        try:
            model = cls(base, **lora_arguments(settings))
            fit(model, adapter, strict=True, what=checkpoint.what, only_adapter=True)()
        except BaseException:
            before.restore()
            raise
        return model


def _strict(given: bool | None, checkpoint: Checkpoint) -> bool:
    return isinstance(checkpoint, RegistryCheckpoint) if given is None else given


def _file(path: Path, push: Mapping[str, Any]) -> Any:
    refuse_push_options(push)
    return check_path(path)


def _live_name(name: str) -> str:
    """PEFT's name in a live model, as the older framework saved it."""
    for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
        name = name.replace(f".{part}.", f".{part}.{ADAPTER}.") if f".{part}." in name else name
    return name


def network_state(network: nn.Module) -> dict[str, Any]:
    """A network's state dict without the wrapper of this module: PEFT's names where it carries a LoRA."""
    inner = network.lora_model if isinstance(network, LoraTransformerForDiffusion) else network
    state: dict[str, Any] = inner.state_dict()
    return state
