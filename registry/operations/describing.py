"""What a version is, worked out from its source and digests before anything of it is stored: components, manifest,
targets, findings and content digest. Nothing is read or written here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from registry.compat.case import AdapterSide, Case, ModelSide
from registry.compat.compatibility import in_order
from registry.compat.rules import run
from registry.core.adapter_config import AdapterConfig, canonical_config
from registry.core.adapter_names import Target, targets_of
from registry.core.content_digest import content_digest
from registry.core.digest import sha256_hex
from registry.core.errors import MalformedTensors
from registry.core.findings import Finding
from registry.core.layout import Layout, TensorSpec
from registry.core.manifest import Component, File, Manifest, Parent
from registry.core.reference import shown
from registry.core.tensor_names import is_adapter_tensor
from registry.core.zeros import zero_tensors
from registry.formats.source import Source
from registry.operations.writing import WrittenFile, WrittenPlainFile

MAX_NONFINITE = 20


@dataclass(frozen=True)
class ComponentContent:
    """One component, put together from the files that carry it.

    Attributes:
        tensors: digests in layout order.
        places: for each tensor of the layout (number of the file, ordinal in that file's layout).
        nonfinite: positions of tensors that hold NaN or Inf.
    """

    layout: Layout
    tensors: tuple[str, ...]
    places: tuple[tuple[int, int], ...]
    nonfinite: tuple[int, ...]


@dataclass(frozen=True)
class Description:
    """All that a version is.

    Attributes:
        components: by role; those without a tensor as well.
        nonfinite: positions of tensors with NaN or Inf, for the components that have such.
        adapter: as the rules of `registry.compat` see it, where it is or holds one.
    """

    manifest: Manifest
    components: Mapping[str, ComponentContent]
    targets: tuple[Target, ...]
    findings: tuple[Finding, ...]
    content_digest: str
    nonfinite: Mapping[str, tuple[int, ...]]
    adapter: AdapterSide | None = None

    @property
    def layouts(self) -> dict[str, Layout]:
        return {role: content.layout for role, content in self.components.items()}


def describe(
    source: Source,
    kind: str,
    files: Sequence[WrittenFile],
    plain_files: Sequence[WrittenPlainFile],
    *,
    base: str | None,
    parents: Iterable[Parent],
    model: ModelSide | None = None,
) -> Description:
    """Works out what a version is.

    Args:
        base: manifest digest of the base version.
        model: that base, against which an adapter is held.

    Raises:
        MalformedTensors: two files hold one tensor of a component.
        InvalidManifest, InvalidInput: a path, role or configuration that a manifest cannot hold.
    """
    components = component_contents(files, source.data)
    config = None if source.config is None else canonical_config(source.config)
    layouts = {role: content.layout for role, content in components.items()}
    nonfinite = {role: content.nonfinite for role, content in components.items() if content.nonfinite}
    manifest = Manifest(
        kind=kind,
        components=tuple(
            Component(
                role,
                content.layout.digest,
                content.tensors,
                sha256_hex(source.data[role]) if role in source.data else None,
            )
            for role, content in sorted(components.items())
        ),
        files=tuple(
            sorted(
                (
                    *(
                        File(w.file.path, w.digests.sha256, w.file.size, _carried(number, w, components))
                        for number, w in enumerate(files)
                    ),
                    *(File(p.path, p.stored.digest, p.stored.size) for p in plain_files),
                ),
                key=lambda file: file.path,
            )
        ),
        config=config,
        base=base,
        parents=tuple(parents),
        recipe=source.recipe,
    )
    manifest.check()
    adapter = adapter_of(manifest, source.config, layouts, peft_version=source.peft_version, model=model)
    targets = () if adapter is None else adapter.targets
    findings = version_findings(adapter, layouts, nonfinite, model=model)
    content = content_digest(
        {role: (one.layout, one.tensors) for role, one in components.items() if one.tensors}, source.config, targets
    )
    return Description(manifest, components, targets, findings, content, nonfinite, adapter)


def component_contents(files: Sequence[WrittenFile], data: Iterable[str]) -> dict[str, ComponentContent]:
    """The components that these files carry, and those of `data` that no file has a tensor of.

    Raises:
        MalformedTensors: two files hold one tensor of a component.
    """
    specs: dict[str, dict[str, TensorSpec]] = {role: {} for role in data}
    digests: dict[str, list[str]] = {role: [] for role in data}
    places: dict[str, list[tuple[int, int]]] = {role: [] for role in data}
    nonfinite: dict[str, list[int]] = {role: [] for role in data}
    for number, written in enumerate(files):
        bad = set(written.digests.nonfinite)
        for role, entries in written.file.entries.items():
            known = specs.setdefault(role, {})
            for name, ordinal in entries:
                if name in known:
                    what = f"{shown(written.file.path, 200)} and another file of the {role}"
                    raise MalformedTensors(f"the tensor {shown(name)} is in {what}; one of the two has to go")
                spec = written.file.layout.tensors[ordinal]
                if ordinal in bad:
                    nonfinite.setdefault(role, []).append(len(known))
                known[name] = TensorSpec(name, spec.dtype, spec.shape)
                digests.setdefault(role, []).append(written.digests.tensors[ordinal])
                places.setdefault(role, []).append((number, ordinal))
    return {
        role: ComponentContent(
            Layout(tuple(known.values())),
            tuple(digests.get(role, ())),
            tuple(places.get(role, ())),
            tuple(nonfinite.get(role, ())),
        )
        for role, known in specs.items()
    }


def _carried(number: int, written: WrittenFile, components: Mapping[str, ComponentContent]) -> str | None:
    """The component that a file is: a safetensors file with all of its tensors under its names, and nothing else."""
    roles = [role for role, named in written.file.entries.items() if named] or list(written.file.entries)
    if written.file.safetensors_head is None or len(roles) != 1:
        return None
    whole = tuple((number, ordinal) for ordinal in range(len(written.file.layout)))
    content = components[roles[0]]
    return roles[0] if content.places == whole and content.layout == written.file.layout else None


def adapter_of(
    manifest: Manifest,
    config: AdapterConfig | None,
    layouts: Mapping[str, Layout],
    *,
    peft_version: str | None,
    model: ModelSide | None = None,
) -> AdapterSide | None:
    """The adapter that a version is or holds, as the rules of `registry.compat` see it: a function of what manifest and
    journal hold.

    Args:
        config: of its adapter, where it is known.
        model: the base that it was trained on.
    """
    role = "adapter" if "adapter" in layouts else "model"
    if role not in layouts or (manifest.kind != "adapter" and config is None):
        return None
    targets, read = targets_of(layouts[role], config)
    digests = next(part.tensors for part in manifest.components if part.role == role)
    own = [pair for pair in zip(layouts[role], digests, strict=True) if is_adapter_tensor(pair[0].name)]
    return AdapterSide(
        reference="",
        layout=layouts[role],
        config=config,
        targets=targets,
        read=read,
        zeros=zero_tensors(own),
        weights=None if model is None else model.weights,
        written_by=peft_version,
        files={file.path: file.sha256 for file in manifest.files},
    )


def version_findings(
    adapter: AdapterSide | None,
    layouts: Mapping[str, Layout],
    nonfinite: Mapping[str, Sequence[int]],
    *,
    model: ModelSide | None = None,
) -> tuple[Finding, ...]:
    """What there is to say about a version, errors first.

    Args:
        adapter: `adapter_of` it.
        model: the base that it was trained on.
    """
    findings: list[Finding] = []
    if adapter is not None:
        findings += (one for one in run(Case(adapter, model)) if one.severity != "undecided")
    for role, positions in sorted(nonfinite.items()):
        findings += nonfinite_findings(layouts[role], positions)
    return in_order(findings)


def nonfinite_findings(layout: Layout, positions: Sequence[int]) -> list[Finding]:
    """C17 for every tensor with NaN or Inf; after the first twenty only their number."""
    names = [layout.tensors[position].name for position in positions]
    mend = "train again from the last finite checkpoint"
    found = [
        Finding("C17", "error", name, "the tensor holds NaN or Inf", "finite values", "NaN or Inf", mend)
        for name in names[:MAX_NONFINITE]
    ]
    if len(names) > MAX_NONFINITE:
        more = f"{len(names) - MAX_NONFINITE} more tensors hold NaN or Inf"
        found.append(Finding("C17", "error", "", more, "finite values", "NaN or Inf", mend))
    return found
