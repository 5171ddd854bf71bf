"""Making new versions of old ones: merges, and adapters out of checkpoints. A part of the facade, which `Registry`
inherits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from registry.operations.context import Context

if TYPE_CHECKING:
    from registry.operations.merging.extracted import ExtractResult
    from registry.operations.merging.report import MergeResult, Remerged


class Merging:
    """Verbs that compute a version of others; opened as `Registry`."""

    _context: Context

    def merge(
        self,
        sources: Mapping[str, float] | Sequence[str] = (),
        name: str = "",
        *,
        where: str | Sequence[str] = (),
        weights: Sequence[float] | None = None,
        method: str = "cat",
        rank: int | None = None,
        energy: float | None = None,
        density: float | None = None,
        majority: str | None = None,
        inner: str | None = None,
        seed: int | None = None,
        module_weights: Mapping[str, Sequence[float]] | None = None,
        base: str | None = None,
        into_base: bool = False,
        saved: str | None = None,
        attention_out: int | None = None,
        dtype: str | None = None,
        precise: bool = False,
        device: str = "cpu",
        tags: Sequence[str] = (),
        metadata: Mapping[str, object] | None = None,
        message: str | None = None,
        force: bool = False,
    ) -> MergeResult:
        """Merges adapters into one adapter, or into a base, without building a model.

        The recipe stands in the new version's manifest, its lineage has a `merged_from` edge for each source. The same
        recipe on the same sources is found, in whatever order they are given, and not computed again.

        Args:
            sources: weight by reference, or references.
            name: of the result, `namespace/name` or `namespace/name:tag`; a new version where the name is there.
            where: a query instead, or more sources, in the language of `find`.
            weights: of each source, in their order; may be negative. 1 each by default: the sum.
            method: `cat` (the weighted sum, exact), `svd` (its best approximation in a rank), `slerp`, `knots`, `tsv`,
                `ties`, `dare_linear`, `dare_ties`, `magnitude_prune` (on the updates, module by module), or PEFT's own
                forms on A and B apart: `linear`, `ties_factors`, `dare_linear_factors`, `dare_ties_factors`,
                `magnitude_prune_factors`.
            rank: the most that the result has in a module; a module whose dimensions are smaller has theirs.
            energy: the share of the squared norm that the result keeps in each module, in the smallest rank.
            density: share of elements that ties, dare and pruning keep.
            majority: how ties elects signs: `total` or `frequency`.
            inner: what knots does with the aligned updates: `ties`, `dare_ties`, `dare_linear`, `magnitude_prune`.
            seed: of what is dropped at random; 0 by default.
            module_weights: other weights for the modules whose path matches a glob.
            base: the base of the result; by default that of the sources. They are refused where they were trained on
                other weights than its own.
            into_base: the result is that base with the merged update in its weights.
            saved: what the result has of whole copies (modules_to_save) and trained tokens on which the sources do not
                agree: `drop`, `mean`, or the reference of the source to take them from.
            attention_out: 1, or 2: how often the update of the out_proj of torch's MultiheadAttention counts in a base.
                PEFT up to 0.21 adds it twice.
            dtype: of an adapter's tensors, `f32`, `bf16` or `f16`; by default the sources' own.
            precise: compute in float64 instead of float32. Either is rounded once, at the end.
            device: `cpu`, `cuda` or `cuda:N`.
            force: merge what does not fit, or what the base contains already, and keep the findings.

        Returns:
            The version with errors by module against the true weighted sum; of a base also the share of the weights
            that rounding left as they were.

        Raises:
            InvalidInput, ShapeMismatch, Incompatible: nothing is stored.
            NotStored: a version that has to be read is recorded without its bytes.
            NotFound, DigestMismatch, Corrupt, ReadOnly, NoSpace
        """
        from registry.core.errors import InvalidInput
        from registry.operations.merging.merge import merge
        from registry.operations.merging.request import check_merge

        if isinstance(sources, Mapping):
            if weights is not None:
                raise InvalidInput("weights were given twice: in the sources, and by themselves")
            given: list[str] = list(sources)
            numbers: list[float] | None = list(sources.values())
        else:
            if isinstance(sources, str):
                raise InvalidInput("sources must be a list of references, or weights by reference; found one text")
            given, numbers = list(sources), None if weights is None else list(weights)
        if not name:
            raise InvalidInput("a merge needs the name of its result, namespace/name")
        asked = [where] if isinstance(where, str) else list(where)
        if isinstance(sources, Mapping) and asked:
            raise InvalidInput("weights by reference and a query cannot be mixed; give weights, in order, or none")
        request = check_merge(
            method=method,
            rank=rank,
            energy=energy,
            density=density,
            majority=majority,
            inner=inner,
            seed=seed,
            module_weights=module_weights,
            saved=saved,
            dtype=dtype,
            precise=precise,
            device=device,
            attention_out=attention_out,
            force=force,
            into_base=into_base,
        )
        return merge(
            self._context,
            name,
            request,
            sources=given,
            where=asked,
            weights=numbers,
            base=base,
            into_base=into_base,
            tags=tags,
            metadata=metadata,
            message=message,
        )

    def remerge(self, reference: str, *, device: str = "cpu") -> Remerged:
        """Computes the recipe of a merged version again, stores nothing, and says whether it is bit-equal or how far
        off. True where it is bit-equal.

        Raises:
            InvalidInput: the version was not made by a merge.
            NotFound: a source is not here any more.
            DigestMismatch, BlobNotFound, Corrupt: the store is damaged.
        """
        from registry.operations.merging.remerge import remerge

        return remerge(self._context, reference, device=device)

    def extract(
        self,
        checkpoint: str,
        name: str,
        *,
        base: str | None = None,
        rank: int | None = None,
        energy: float | None = None,
        modules: str | Sequence[str] = (),
        attention_out: int | None = None,
        dtype: str | None = None,
        precise: bool = False,
        device: str = "cpu",
        tags: Sequence[str] = (),
        metadata: Mapping[str, object] | None = None,
        message: str | None = None,
        force: bool = False,
    ) -> ExtractResult:
        """Makes an adapter of what a fine-tuned checkpoint changed in the weights of its base. Tensors that are equal
        by digest are not read.

        Args:
            checkpoint: reference of the model after training.
            name: of the adapter, `namespace/name` or `namespace/name:tag`.
            base: the model before training; by default the one that the checkpoint recorded.
            rank: the most in each module; one whose dimensions are smaller has theirs.
            energy: the share of the squared norm to keep in each module, in the smallest rank. One of the two, or both.
            modules: globs over module paths, or what they end in; by default all that differ.
            attention_out: 1 or 2: how often a MultiheadAttention adds the update of its out_proj (PEFT up to 0.21:
                twice); None leaves it out.
            dtype: `f32`, `bf16` or `f16`; float32 by default.
            precise: compute in float64.
            device: `cpu`, `cuda` or `cuda:N`.
            force: push it even where it does not fit the base.

        Returns:
            The version, its error by module, and every tensor that differs and is not in it.

        Raises:
            InvalidInput: no rank and no energy, nothing that differs, NaN in a weight; nothing is stored.
            NotStored: one of the two is recorded without its bytes.
            NotFound, DigestMismatch, Corrupt, ReadOnly, NoSpace
        """
        from registry.operations.merging.extracted import check_extract
        from registry.operations.merging.extracting import extract

        request = check_extract(
            rank=rank,
            energy=energy,
            modules=modules,
            attention_out=attention_out,
            dtype=dtype,
            precise=precise,
            device=device,
            force=force,
        )
        return extract(
            self._context, checkpoint, name, request, base=base, tags=tags, metadata=metadata, message=message
        )
