"""The small complete store of the vectors: what is pushed into it, in which order, and when.

Time, the registry's id, the actor and the captured environment are fixed in `fixed_surroundings`: all four enter the
journal. The clock ticks once before each call of the registry, so it does not matter how often a call asks for it."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

from registry import Registry
from registry.formats.paths import read_path
from registry.operations.environment import Environment
from tests.conformance.catalog_state import catalog_state
from tests.vectors.sample_files import checkpoint_file, write_shards
from tests.vectors.tensor_bytes import Tensor, floats, nan, safetensors_file, stream

REGISTRY_ID = "0123456789abcdef0123456789abcdef"
START = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)


def base_tensors() -> list[Tensor]:
    return [
        ("q_proj.weight", "F32", [16, 16], floats("base q", 256)),
        ("v_proj.weight", "F32", [16, 16], floats("base v", 256)),
        ("embed.weight", "BF16", [32, 16], b"".join(b"\x80" + bytes([60 + n % 4]) for n in range(512))),
        ("step", "I64", [], (1000).to_bytes(8, "little")),
        ("nothing", "F32", [0, 3], b""),
        ("codes", "F4", [4, 4], stream("codes", 8)),
        ("scale", "F8_E8M0", [4], bytes([127, 128, 126, 127])),
        ("mask", "BOOL", [3], bytes([1, 0, 1])),
    ]


def lora_tensors(seed: str, prefix: str = "base_model.model.", adapter: str = "") -> list[Tensor]:
    found: list[Tensor] = []
    for module in ("q_proj", "v_proj"):
        found.append((f"{prefix}{module}.lora_A.{adapter}weight", "F32", [4, 16], floats(f"{seed} {module} A", 64)))
        found.append((f"{prefix}{module}.lora_B.{adapter}weight", "F32", [16, 4], floats(f"{seed} {module} B", 64)))
    return found


def checkpoint_tensors(seed: str) -> list[Tensor]:
    """A whole model: the base's tensors, wrapped, one of them twice, and the adapter's."""
    base = {name: rest for name, *rest in base_tensors()}
    wrapped = [
        ("base_model.model.q_proj.base_layer.weight", *base["q_proj.weight"]),
        *lora_tensors(seed, adapter="default.")[:2],
        ("base_model.model.v_proj.base_layer.weight", *base["v_proj.weight"]),
        *lora_tensors(seed, adapter="default.")[2:],
        ("base_model.model.embed.weight", *base["embed.weight"]),
        ("base_model.model.lm_head.weight", *base["embed.weight"]),
        ("base_model.model.nothing", *base["nothing"]),
        ("base_model.model.codes", *base["codes"]),
        ("base_model.model.mask", *base["mask"]),
    ]
    return wrapped


PEFT_CONFIG = """{
  "alpha_pattern": {},
  "auto_mapping": null,
  "base_model_name_or_path": "someone/walker",
  "bias": "none",
  "inference_mode": true,
  "init_lora_weights": true,
  "lora_alpha": 8,
  "lora_dropout": 0.0,
  "modules_to_save": null,
  "peft_type": "LORA",
  "peft_version": "0.18.0",
  "r": 4,
  "rank_pattern": {},
  "target_modules": [
    "v_proj",
    "q_proj"
  ],
  "task_type": null,
  "use_dora": false,
  "use_rslora": false
}"""


class Clock:
    """Stands for `datetime` in `registry.operations.context`; stands still until it is told to tick."""

    def __init__(self) -> None:
        self.moment = START

    def now(self, zone: Any) -> datetime:
        return self.moment

    def tick(self, seconds: float = 1) -> None:
        self.moment += timedelta(seconds=seconds)


class Ticking:
    """A registry whose every call comes one second after the last, however often it asks for the time."""

    def __init__(self, registry: Registry, clock: Clock) -> None:
        self._registry = registry
        self._clock = clock

    def __getattr__(self, verb: str) -> Any:
        self._clock.tick()
        return getattr(self._registry, verb)


@contextmanager
def fixed_surroundings() -> Iterator[Clock]:
    """Where time, ids, the actor and the environment come from, while a store is made."""
    clock = Clock()
    environment = Environment(
        python_version="3.11.7",
        torch_version="2.6.0",
        peft_version="0.18.0",
        transformers_version=None,
        platform="Linux x86_64",
        git_commit="4b6225141b1e6c3ad1d2a3c8e7c6a2b3c4d5e6f7",
        git_dirty=False,
    )
    with ExitStack() as stack:
        stack.enter_context(mock.patch("registry.operations.context.datetime", clock))
        stack.enter_context(mock.patch("registry.operations.push.capture", return_value=environment))
        stack.enter_context(mock.patch("uuid.uuid4", return_value=uuid.UUID(REGISTRY_ID)))
        stack.enter_context(mock.patch.dict("os.environ", {"REGISTRY_ACTOR": "ada"}))
        yield clock


def write_folder(folder: Path, config: str, tensors: Sequence[Tensor]) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(config, encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(safetensors_file(tensors, {"format": "pt"}))
    return folder


def fill(registry: Ticking, work: Path, clock: Clock) -> None:
    """Everything that a store can hold, in few versions."""

    def file(name: str, tensors: Sequence[Tensor], **options: Any) -> Path:
        path = work / f"{name}.safetensors"
        path.write_bytes(safetensors_file(tensors, **options))
        return path

    base = file("walker", base_tensors(), metadata={"format": "pt"})
    registry.push(base, "walk/base:v1", message="as downloaded")
    # The same tensors in another file: only the header is new.
    registry.push(file("turned", base_tensors()[::-1], reverse=True), "walk/base")
    # The same manifest under another name: the digest alone does not say which of the two is meant.
    registry.push(base, "team/walker")

    first = write_folder(work / "first", PEFT_CONFIG, lora_tensors("first"))
    registry.push(
        first,
        "walk/perturb:prod",
        base="walk/base:v1",
        metadata={"robot": "a1", "seed": 3, "ratio": 0.1, "sim": True, "hash": 2**60, "note": 'tab\t"😀"'},
        metrics={"reward": float("nan"), "loss": float("inf"), "low": -float("inf"), "steps": 1e20, "x": 1.5},
        step=100,
    )
    # The very same again: no version, but what was said with it.
    registry.push(first, "walk/perturb", base="walk/base:v1", metadata={"robot": "a2", "seed": 3}, message="again")
    # Written by an older PEFT: another file, the same content.
    older = PEFT_CONFIG.replace('  "peft_version": "0.18.0",\n', "").replace('"lora_alpha": 8', '"lora_alpha": 8.0')
    registry.push(write_folder(work / "older", older, lora_tensors("first")), "walk/perturb", base="walk/base:v1")
    third = write_folder(work / "third", PEFT_CONFIG, lora_tensors("third"))
    registry.push(third, "walk/perturb", base="walk/base:v1", continued_from="walk/perturb@1", tags=["best"])

    registry.annotate("walk/perturb@3", metrics={"reward": 900.5, "loss": 0.25}, step=10)
    registry.annotate("walk/perturb@3", metrics={"reward": 901}, step=20)
    registry.tag("walk/perturb@3", "prod", why="walks better", expected=1)
    registry.protect_tag("walk/perturb", "prod", why="in use")
    # A clock that is set back: the events of a name still never go back in time.
    clock.tick(-3600)
    registry.annotate("walk/perturb@3", metrics={"reward": 902}, metadata={"robot": "b7"})
    registry.tag("walk/perturb@1", "old")
    registry.delete_tag("walk/perturb", "best", why="there is only prod")
    registry.protect_tag("walk/perturb", "old")
    registry.protect_tag("walk/perturb", "old", on=False)
    registry.tag("walk/perturb@2", "old")

    # Most of it lies in the base's blob, one tensor stands twice, and the header names them in another order.
    full = file("full", checkpoint_tensors("third"), metadata={"epoch": "7"}, reverse=True)
    registry.push(
        full, "walk/full", base="walk/base@1", kind="checkpoint", parents=[("converted_from", "walk/perturb@3", None)]
    )
    registry.push(
        file("later", checkpoint_tensors("later")), "walk/full", continued_from="walk/full", kind="checkpoint"
    )
    # Nothing of this one is stored yet, but a third of it stands in it twice.
    tied = [("embed.weight", "F16", [64], stream("tied", 128)), ("head.weight", "F16", [64], stream("tied", 128))]
    registry.push(file("tied", [*tied, ("mid.weight", "I16", [64], stream("mid", 128))]), "walk/tied")
    # An adapter without a configuration, with a tensor that is not finite.
    broken = [(n, d, s, nan(b) if "B" in n else b) for n, d, s, b in lora_tensors("x")]
    registry.push(file("bare", broken), "walk/bare", kind="adapter")
    registry.push(
        write_folder(work / "merged", PEFT_CONFIG, lora_tensors("merged")),
        "walk/merged",
        base="walk/base@1",
        parents=[("merged_from", "walk/perturb@3", 0.7), ("merged_from", "walk/perturb@1", 0.3)],
    )
    # A checkpoint that carries an adapter, and its configuration with it.
    registry.push(
        file("adapted", checkpoint_tensors("third"), metadata={"adapter_config": PEFT_CONFIG}),
        "walk/full",
        tags=["lora"],
    )
    push_other_forms(registry, work)
    take_away(registry, work)


def push_other_forms(registry: Ticking, work: Path) -> None:
    """Files of several components, several files of one, and bases whose bytes stay where they are."""
    known = next((dtype, list(shape), data) for name, dtype, shape, data in base_tensors() if name == "q_proj.weight")
    run = work / "run.pth"
    run.write_bytes(checkpoint_file(known))
    registry.push(run, "walk/run", base="walk/base@1")
    # One component in two files; a map to the live names comes with it, as a blob that an event names.
    registry.push(write_shards(work / "shards", "shards"), "walk/shards")

    def external(path: Path, name: str) -> None:
        source = read_path(path)
        source.origin = {"path": f"/models/{path.name}", "hub_id": "someone/far", "revision": "main"}
        registry.push(source, name, external=True)

    far = work / "far.safetensors"
    far.write_bytes(safetensors_file([("far.weight", "F32", [40, 16], floats("far", 640))], {"format": "pt"}))
    external(far, "walk/far")
    external(write_shards(work / "apart", "apart"), "walk/far")
    registry.push(
        write_folder(work / "onfar", PEFT_CONFIG, lora_tensors("onfar")), "walk/onfar", base="walk/far@1", force=True
    )
    # Known without its bytes first, and pushed with them later.
    near = work / "near.safetensors"
    near.write_bytes(safetensors_file([("near.weight", "F32", [4], nan(floats("near", 4)))]))
    external(near, "walk/near")
    registry.push(near, "walk/near")


def take_away(registry: Ticking, work: Path) -> None:
    """Versions that are removed, restored, purged, and pushed again after that."""
    for seed in ("kept", "purged", "again", "removed"):
        path = work / f"{seed}.safetensors"
        path.write_bytes(safetensors_file([("weight", "F32", [4, 4], floats(seed, 16))]))
        registry.push(path, "walk/gone", tags=[seed])
    registry.remove("walk/gone@1", "walk/gone@2", "walk/gone@3", why="by mistake")
    registry.restore("walk/gone@1", why="it was none")
    registry.gc(grace=timedelta(0))
    registry.push(work / "again.safetensors", "walk/gone")
    registry.remove("walk/gone@4")


def make_store(folder: Path) -> dict[str, Any]:
    """Makes the store, without its database.

    Returns:
        What the database answered.
    """
    with tempfile.TemporaryDirectory() as temporary, fixed_surroundings() as clock:
        work = Path(temporary)
        with Registry.init(work / "registry") as registry:
            fill(Ticking(registry, clock), work, clock)
            state = catalog_state(registry)
        folder.mkdir()
        for entry in ("registry.json", "blobs", "journal"):
            (work / "registry" / entry).rename(folder / entry)
    return state
