"""What can be asked of a registry without loading anything: versions, history and lineage, and what differs. A part
of the facade, which `Registry` inherits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from registry.catalog.journal_rows import events_of
from registry.core.event import Event
from registry.core.reference import parse_artifact
from registry.operations import inspect, tagging
from registry.operations.context import Context
from registry.operations.inspect import Details, Lineage
from registry.operations.version import Version, as_version

if TYPE_CHECKING:
    from torch import nn

    from registry.compat.compatibility import Compatibility
    from registry.compat.hotswap import SwapGroup
    from registry.compat.serving import Needs
    from registry.core.architecture import Architecture
    from registry.operations.difference import Difference
    from registry.operations.fitting import Fit
    from registry.operations.merging.similarity import Similarity


class Questions:
    """Verbs that change nothing; opened as `Registry`."""

    _context: Context

    def resolve(self, reference: str) -> str:
        """The pinned form, `namespace/name@number`, of any reference.

        Raises:
            InvalidReference, ArtifactNotFound, VersionNotFound, TagNotFound
        """
        return inspect.pinned(self._context, reference)

    def get(self, reference: str) -> Version:
        """The version that a reference names.

        Raises:
            InvalidReference, ArtifactNotFound, VersionNotFound, TagNotFound
        """
        return as_version(inspect.get(self._context, reference))

    def show(self, reference: str) -> Details:
        """All that the catalog knows of a version: tensors, files, findings and events.

        Raises:
            InvalidReference, ArtifactNotFound, VersionNotFound, TagNotFound
        """
        return inspect.details(self._context, reference)

    def architecture(self, reference: str) -> Architecture | None:
        """Class and constructor arguments of the model of a version: as the pushed module said them
        (`constructor_arguments`), or the pushed file (`model_config`), else those of the base that it was trained on,
        and of that one's base. Nothing is imported by the name of the class.

        Returns:
            None where none of them has any.

        Raises:
            InvalidReference, ArtifactNotFound, VersionNotFound, TagNotFound
            BlobNotFound, DigestMismatch, Corrupt: the store is damaged.
        """
        from registry.operations.architectures import architecture

        return architecture(self._context, reference)

    def find(
        self,
        *where: str,
        pattern: str | None = None,
        base: str | None = None,
        tag: str | None = None,
        kind: str | None = None,
        order_by: str | None = None,
        limit: int | None = None,
    ) -> list[Version]:
        """Versions that satisfy every condition.

        Args:
            where: `field op value`, joined by `and`, as `registry list --where` takes it.
            pattern: `namespace/name` with `*` and `?`.
            base: a base, `namespace/name` for any version of it.
            order_by: a field, `-field` for descending; by default by name, newest first.

        Raises:
            InvalidQuery: an unknown field lists the known ones.
        """
        found = inspect.search(
            self._context,
            pattern=pattern,
            where=where,
            base=base,
            tag=tag,
            kind=kind,
            order_by=order_by,
            limit=limit,
        )
        return [as_version(one) for one in found]

    def diff(self, a: str, b: str, *, weights: bool = True) -> Difference:
        """What is different between two versions, of one name or of two, and of any kinds.

        Tensors are compared by digest under their canonical names, from the catalog alone. Of adapters, what each adds
        to the weight of a module, `scaling * B @ A`, is compared by its low-rank factors, whatever the ranks; where a
        variant like DoRA computes something else, that is said, and the tensors are compared.

        Args:
            weights: read the tensors that differ, and measure how far they are apart. Without it neither torch is
                imported nor a weight read.

        Returns:
            All differences; `same_content` where there are none but of form (spelling of the configuration, names of
            adapters and wrappers, metadata, files).

        Raises:
            InvalidReference, ArtifactNotFound, VersionNotFound, TagNotFound
            DigestMismatch, BlobNotFound, Corrupt: the store is damaged.
        """
        from registry.operations.diff import diff

        return diff(self._context, a, b, weights=weights)

    def check(
        self,
        reference: str,
        model: str | nn.Module | None = None,
        *,
        peft: str | None = None,
        purpose: str = "load",
        prove: bool = True,
    ) -> Compatibility:
        """Whether an adapter fits a base version or a model, by the rules of docs/compatibility.md.

        Of versions only the catalog is read, and no torch is imported. Of a model its modules are looked at, and, where
        the weights are recorded that the adapter was trained on, its targeted weights are compared with these.

        Args:
            model: reference of a base version or checkpoint, or a model, which may be on the meta device; by default
                the base that the adapter was trained on.
            peft: version of PEFT that would load it; by default the installed one.
            purpose: `load` beside the weights, `merge` into them, or `hotswap` into a compiled slot.
            prove: where form leaves a question open and the adapter has a behaviour probe, run that on a copy of the
                model.

        Returns:
            The verdict with all findings; false where the adapter does not fit.

        Raises:
            InvalidReference, ArtifactNotFound, VersionNotFound, TagNotFound
            InvalidInput: the version holds no adapter, the model is none or is merged, or no such version of PEFT.
        """
        from registry.operations.checking import check

        return check(self._context, reference, model, peft=peft, purpose=purpose, prove=prove)

    def fits(
        self, model: str | nn.Module, *where: str, everything: bool = False, limit: int | None = None
    ) -> list[Fit]:
        """The adapters that fit a base version or a model, by name, newest first.

        Targets are joined with the model's modules in SQL, once for each form of adapter, however many versions have
        it; the weights that adapters were trained on are compared by digest with those of a version. A model at hand
        is asked for its modules alone: `check` compares its weights.

        Args:
            model: reference of a base version or checkpoint, or a model, which may be on the meta device.
            where: conditions as of `find`.
            everything: also those that do not fit, with the reason.

        Raises:
            InvalidQuery, InvalidReference, InvalidInput, NotFound
        """
        from registry.operations.fitting import fits

        return fits(self._context, model, where, everything=everything, limit=limit)

    def needs(self, reference: str) -> Needs:
        """What a server must allow to serve an adapter: rank, modules, dtype, PEFT; the flags of vLLM and SGLang.

        Raises:
            InvalidReference, ArtifactNotFound, VersionNotFound, TagNotFound
            InvalidInput: the version holds no adapter.
        """
        from registry.operations.checking import needs

        return needs(self._context, reference)

    def swap_groups(self, references: Sequence[str]) -> tuple[SwapGroup, ...]:
        """Sets of adapters that can be hot-swapped into one compiled slot, each with the `target_rank` that
        `prepare_model_for_compiled_hotswap` needs and the member to load first.

        Raises:
            InvalidReference, ArtifactNotFound, VersionNotFound, TagNotFound
            InvalidInput: one of the versions holds no adapter.
        """
        from registry.operations.checking import swap_groups

        return swap_groups(self._context, references)

    def similarity(self, references: Sequence[str], *, where: str | Sequence[str] = ()) -> Similarity:
        """How alike the updates of adapters are, pair by pair and module by module: which of them will interfere when
        they are merged.

        Args:
            references: two or more.
            where: more of them, in the language of `find`.

        Raises:
            InvalidInput: fewer than two, one twice, or one that is no LoRA or holds NaN.
            ShapeMismatch: two of them disagree about the sizes of a module.
            NotStored: one is recorded without its bytes.
            InvalidReference, NotFound, DigestMismatch, Corrupt
        """
        from registry.operations.merging.similarity import similarity

        asked = [where] if isinstance(where, str) else list(where)
        return similarity(self._context, references, asked)

    def log(self, reference: str) -> Lineage:
        """The versions that one came from, and those that came from it.

        Raises:
            InvalidReference, NotFound
        """
        return inspect.lineage(self._context, reference)

    def events(self, name: str) -> list[Event]:
        """The whole history of a name, oldest first.

        Raises:
            ArtifactNotFound
        """
        namespace, short = parse_artifact(name)
        with self._context.reading() as connection:
            return events_of(connection, namespace, short)

    def tag_history(self, name: str, tag: str) -> list[Event]:
        """Every move, protection and deletion of a tag, oldest first.

        Raises:
            TagNotFound, ArtifactNotFound
        """
        return tagging.tag_history(self._context, name, tag)
