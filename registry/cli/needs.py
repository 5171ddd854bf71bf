"""`registry needs`: what a server must allow to serve an adapter."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from registry.cli.opening import opened
from registry.cli.options import Command, Options, common_options
from registry.cli.output import BOLD, emit_json, emit_lines, escaped, paint

if TYPE_CHECKING:
    from registry.registry import Needs


@click.command(
    name="needs",
    cls=Command,
    short_help="Say what a server must allow to serve an adapter.",
    examples=["registry needs walk/perturb:prod"],
)
@click.argument("ref")
@common_options
@click.pass_obj
def needs_command(options: Options, ref: str) -> None:
    """Say what a server must allow to serve the adapter REF: rank, modules, dtype, PEFT; vLLM's and SGLang's flags."""
    with opened(options) as registry:
        found = registry.needs(ref)
    if options.json:
        from registry.cli.documents import needs_document

        emit_json(needs_document(found))
    else:
        emit_lines(_page(found))


def _page(found: Needs) -> Iterator[str]:
    yield paint(escaped(found.adapter), BOLD)
    for key, value in _facts(found):
        yield f"  {key:18}{escaped(value)}"
    for server in (found.vllm, found.sglang):
        yield ""
        yield paint(server.name, BOLD)
        yield f"  {escaped(shlex.join(server.flags))}"
        for sentence in server.refused:
            yield f"  not served: {escaped(sentence)}"


def _facts(found: Needs) -> Iterator[tuple[str, str]]:
    yield "tuner", found.peft_type or "unknown: it came without a configuration"
    yield "max rank", str(found.max_rank)
    yield "target modules", ", ".join(found.target_paths or found.target_modules) or "none"
    yield "dtype", ", ".join(found.dtypes) or "none"
    for key, names in (
        ("modules_to_save", found.modules_to_save),
        ("trained biases", found.base_biases),
        ("embeddings", found.embeddings),
        ("token rows", found.token_rows),
        ("experts", found.experts),
    ):
        if names:
            yield key, ", ".join(names)
    variants = [name for name, there in (("use_dora", found.dora), ("lora_bias", found.lora_bias)) if there]
    if variants:
        yield "variant", ", ".join(variants)
    least = f"{found.least_peft} or newer" if found.least_peft else "any"
    yield "peft", f"{least}; written by {found.written_by or 'an unknown version'}"
    if found.task_type:
        yield "task", found.task_type
    if found.base_model:
        yield "base model", found.base_model
