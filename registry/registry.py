"""`Registry`: the facade that users, the command line and `pdp` import. It opens a registry and hands
each verb to its module in `operations`; no policy lives here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from registry.core.errors import RegistryNotFound
from registry.core.event import Event
from registry.core.findings import Finding
from registry.merging import Merging
from registry.operations import annotate, discover, inspect, tagging
from registry.operations.context import Context
from registry.operations.discover import Location
from registry.operations.inspect import Details, Lineage
from registry.operations.version import Version, as_version
from registry.questions import Questions
from registry.transfer import Transfer
from registry.upkeep import Upkeep

if TYPE_CHECKING:
    import torch
    from torch import nn

    from registry.compat.compatibility import Compatibility
    from registry.compat.hotswap import SwapGroup
    from registry.compat.serving import Needs
    from registry.formats.probing import Wanted
    from registry.formats.proof import Proof
    from registry.operations.difference import Difference
    from registry.operations.fitting import Fit
    from registry.operations.merging.extracted import ExtractResult
    from registry.operations.merging.report import MergeResult, Remerged
    from registry.operations.pull import PullResult
    from registry.operations.push import PushResult

__all__ = [
    "Compatibility",
    "Details",
    "Difference",
    "Event",
    "ExtractResult",
    "Finding",
    "Fit",
    "Lineage",
    "MergeResult",
    "Needs",
    "Proof",
    "PullResult",
    "PushResult",
    "Registry",
    "Remerged",
    "SwapGroup",
    "Version",
]


_HOMES = {
    "Compatibility": "registry.compat.compatibility",
    "Difference": "registry.operations.difference",
    "ExtractResult": "registry.operations.merging.extracted",
    "Fit": "registry.operations.fitting",
    "MergeResult": "registry.operations.merging.report",
    "Needs": "registry.compat.serving",
    "Proof": "registry.formats.proof",
    "PullResult": "registry.operations.pull",
    "PushResult": "registry.operations.push",
    "Remerged": "registry.operations.merging.report",
    "SwapGroup": "registry.compat.hotswap",
}


def __getattr__(name: str) -> Any:
    # Only who pushes or pulls pays for what that needs: half as much again as all of `registry list`.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Registry(Questions, Merging, Transfer, Upkeep):
    """A registry of LoRA adapters and checkpoints.

    Open it with `Registry.open`. One object may be used from several threads and in forked workers.
    It is a context manager; `close` gives its connections back.

    Example:
        >>> registry = Registry.open()
        >>> pushed = registry.push(lora_model, "walk/perturb", base="walk/base", tags=["prod"])
        >>> registry.load("walk/perturb:prod", another_model)
    """

    def __init__(self, context: Context) -> None:
        self._context = context

    @classmethod
    def open(cls, url: str | os.PathLike[str] | None = None) -> Registry:
        """Opens a registry.

        Args:
            url: a folder or a `postgresql://` URL; by default `$REGISTRY_URL`, else the nearest
                `.registry/` upward, else the user's data folder, which is made on first use.

        Raises:
            RegistryNotFound: nothing is there; `Registry.init` or `registry init` makes one.
            SchemaOutOfDate: run `registry upgrade`, or upgrade the program.
            WrongStore: catalog and store are of two registries.
            StoreUnreachable: the database does not answer.
        """
        location = discover.locate(url)
        try:
            return cls(discover.open_registry(location))
        except RegistryNotFound:
            if not location.default:
                raise
            return cls(discover.create(location)[0])

    @classmethod
    def init(
        cls, url: str | os.PathLike[str] | None = None, *, store: str | os.PathLike[str] | None = None
    ) -> Registry:
        """Makes a registry, or opens the one that is there.

        Args:
            url: a folder or a `postgresql://` URL; `.registry` in the working folder by default.
            store: folder of the blobs, only beside a database server.

        Raises:
            InvalidInput, Conflict, ReadOnly, NoSpace
        """
        location = Location(str(discover.working_folder() / discover.FOLDER)) if url is None else discover.locate(url)
        context, _ = discover.create(location, store=None if store is None else os.fspath(store))
        return cls(context)

    def close(self) -> None:
        """Closes the database connections; the object is not used after it."""
        self._context.database.close()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Registry({self._context.database.what!r})"

    @property
    def id(self) -> str:
        """The registry's own id, which catalog and store share."""
        return self._context.store.registry_id

    def push(
        self,
        source: str | os.PathLike[str] | nn.Module | Mapping[str, torch.Tensor],
        name: str,
        *,
        base: str | None = None,
        tags: Sequence[str] = (),
        metadata: Mapping[str, object] | None = None,
        metrics: Mapping[str, object] | None = None,
        step: int | None = None,
        kind: Literal["adapter", "base", "checkpoint"] | None = None,
        message: str | None = None,
        continued_from: str | None = None,
        parents: Sequence[tuple[str, str, float | None]] = (),
        adapter_name: str | None = None,
        external: bool = False,
        attachments: bool = True,
        attachment_limit: int | None = None,
        probe: Wanted = True,
        force: bool = False,
    ) -> PushResult:
        """Pushes an artifact as a new version; the very same thing again is a no-op that says so.

        Args:
            source: a PEFT folder, a folder that transformers or diffusers saved a model in, a `.safetensors` file, a
                PeftModel (or a module that holds exactly one), any other module, or a state dict. Of a live model
                that has `constructor_arguments` (a mapping), or whose base has, these are kept; see `architecture`.
            name: `namespace/name`, or `namespace/name:tag` to move a tag as well.
            base: reference of the base version that it was trained on.
            tags: tags to move to the version.
            metadata: text or numbers by key.
            metrics: numbers by key; NaN and Infinity are kept, and sorted last.
            step: training step of the metrics.
            kind: by default `adapter` where there are adapter tensors without a base, `checkpoint`
                where there are both, else `base`. `checkpoint` takes the whole of a PeftModel.
            message: one line on why.
            continued_from: the version whose training this one continues. Name it by number: `ns/name` alone is
                the latest version at the time, so the same push again would have another parent, and be another
                version.
            parents: further lineage, (relation, reference, weight or None).
            adapter_name: which adapter of a live model; its active one by default.
            external: record layout, tensor digests and where it came from, and store none of its tensors: for bases of
                many gigabytes. It can be checked against, not pulled or loaded.
            attachments: whether a folder's other files (tokenizer, README, ...) are kept with the version.
            attachment_limit: bytes of one of them; None: 256 MiB. A larger one is refused.
            probe: inputs of the behaviour probe that is kept of a live model: a tensor, a tuple of positional arguments
                (one dict as the argument is `({"obs": obs},)`), or a dict of keyword arguments. True makes some where
                it is clear what the model takes, and a note says where it is not; False keeps no probe.
            force: store an adapter that does not fit its base, with the findings that say so.

        Returns:
            What was stored, with the findings about the artifact.

        Raises:
            InvalidReference, InvalidInput, MalformedTensors, UnsupportedTensor: nothing is stored.
            ForwardFailed: the model does not take the inputs in `probe`; nothing is stored.
            Incompatible: the adapter does not fit its base; nothing is stored.
            NotFound: the source, the base or a parent is not there.
            TagProtected: nothing is stored.
            ReadOnly, NoSpace: nothing is visible.
        """
        from registry.operations import push
        from registry.operations.opening import Opening
        from registry.operations.push_request import check_request

        edges = [*parents] if continued_from is None else [("continued_from", continued_from, None), *parents]
        request = check_request(
            name,
            base=base,
            tags=tags,
            metadata=metadata,
            metrics=metrics,
            step=step,
            kind=kind,
            message=message,
            parents=edges,
            external=external,
            force=force,
        )
        how = Opening(adapter_name, attachments, attachment_limit, probe)
        return push.push(self._context, source, request, how)

    def pull(
        self, reference: str, destination: str | os.PathLike[str], *, format: str = "native", force: bool = False
    ) -> PullResult:
        """Writes a version's files, proven by their sha256, all or nothing.

        Args:
            destination: a folder for a version of several files (made where it is not there), a file
                or an existing folder for one of a single file.
            format: `native` gives the very files that were pushed; `peft` a folder that
                `PeftModel.from_pretrained` takes, with the PEFT version that a live push captured, also of an
                adapter within a checkpoint; `safetensors` one file with the configuration in its header; `pth` one
                file in pdp's forms, which `torch.load(weights_only=True)` opens. The latter two say the version's
                `architecture`, where it has one.
            force: replace files that are there. Into a folder that is there already, file by file.

        Raises:
            DestinationExists, InvalidInput: nothing is written.
            DigestMismatch, BlobNotFound, Corrupt: the store is damaged; nothing is left behind.
            ReadOnly, NoSpace
        """
        from registry.operations.pull import pull

        return pull(self._context, reference, Path(destination), format=format, force=force)

    @overload
    def load(self, reference: str, model: None = None, *, component: str | None = None) -> dict[str, torch.Tensor]: ...

    @overload
    def load(
        self,
        reference: str,
        model: nn.Module,
        *,
        component: str | None = None,
        adapter_name: str | None = None,
        strict: bool = True,
        prove: bool = False,
    ) -> nn.Module: ...

    def load(
        self,
        reference: str,
        model: nn.Module | None = None,
        *,
        component: str | None = None,
        adapter_name: str | None = None,
        strict: bool = True,
        prove: bool = False,
    ) -> Any:
        """Loads a version into a model, or gives its state dict.

        Tensors are copied into the model's own parameters, whatever their device and dtype. A model
        that differs in a name, shape, rank or scaling is refused and left as it was; afterwards every
        tensor is compared with what was loaded.

        Args:
            model: a model with an adapter of the same form, a plain base (which is wrapped as PEFT
                does it), or, for a base or checkpoint, a module with the same state dict.
            component: another state dict of the version than its main one.
            adapter_name: which adapter of the model, or the name of the one that is made.
            strict: False warns of missing, unexpected and misshapen tensors, and loads the rest.
            prove: run the version's behaviour probe on the loaded model. `Registry.prove` gives the numbers.

        Returns:
            The model, which is a new PeftModel where a plain base was wrapped; without a model,
            tensors by name, mapped from the store. A component that holds more than tensors, such as an
            optimizer, comes as the state dict that was saved.

        Raises:
            Incompatible: all differences are in its `findings`. Only where `prove` finds another function was the
                model changed.
            NotFound: there is no probe to prove it with; the model is unchanged.
            DigestMismatch, BlobNotFound: the store is damaged.
        """
        from registry.operations.load import load

        return load(
            self._context,
            reference,
            model,
            component=component,
            adapter_name=adapter_name,
            strict=strict,
            prove=prove,
        )

    def prove(self, reference: str, model: nn.Module) -> Proof:
        """Runs a version's behaviour probe on a model, which is left as it was.

        Returns:
            The differences of its outputs to the recorded ones; true where it is the same function.

        Raises:
            NotFound: the version has no probe.
            Incompatible: the model does not take the probe's inputs, or returns something of another structure.
            InvalidInput: the model cannot be called without harm.
        """
        from registry.operations.proving import prove

        return prove(self._context, reference, model)

    def tag(
        self, reference: str, tag: str, *, why: str | None = None, expected: int | None = None, protect: bool = False
    ) -> Version:
        """Points a tag at a version; the move is recorded.

        Args:
            expected: number that the tag must point to before; 0: it must not exist yet.
            protect: protect the tag there, in the same step.

        Returns:
            The version that now has the tag.

        Raises:
            TagProtected, TagMoved, InvalidReference, NotFound
        """
        key, _ = tagging.move_tag(self._context, reference, tag, why=why, expected=expected, protect=protect)
        return as_version(inspect.get_key(self._context, key))

    def protect_tag(
        self, name: str, tag: str, *, on: bool = True, why: str | None = None, expected: int | None = None
    ) -> bool:
        """Protects a tag against moves and deletion, or lifts that; True where it changed anything.

        Args:
            expected: number that the tag must point to.

        Raises:
            TagNotFound, TagMoved, ArtifactNotFound
        """
        return tagging.protect_tag(self._context, name, tag, on=on, why=why, expected=expected)

    def delete_tag(self, name: str, tag: str, *, why: str | None = None, expected: int | None = None) -> None:
        """Deletes a tag; its history stays.

        Args:
            expected: number that the tag must point to.

        Raises:
            TagNotFound, TagMoved, TagProtected, ArtifactNotFound
        """
        tagging.delete_tag(self._context, name, tag, why=why, expected=expected)

    def annotate(
        self,
        reference: str,
        *,
        metadata: Mapping[str, object] | None = None,
        metrics: Mapping[str, object] | None = None,
        step: int | None = None,
    ) -> Version:
        """Adds metadata and metrics to a version; earlier values stay in its history.

        Raises:
            InvalidInput, InvalidReference, NotFound
        """
        key = annotate.annotate(self._context, reference, metadata=metadata or {}, metrics=metrics or {}, step=step)
        return as_version(inspect.get_key(self._context, key))
