"""Several processes at one registry at the same moment."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import pytest

from registry import Registry
from registry.core.errors import NotFound
from registry.operations import writing
from registry.store import open_store
from tests.failures.support import (
    CONFIG,
    adapter_tensors,
    at_once,
    peft_folder,
    quick_folder,
    succeeds_alone,
    tensor_file,
    warm_up,
    whole,
)

VERSIONS = 12


def the_same_big_file(template: str, names: str) -> None:
    with quick_folder() as folder:
        warm_up(folder / "warm-up")
        size = writing.STREAM_MIN_BYTES + (1 << 20)
        source = tensor_file(folder / "model.safetensors", {"w": ("U8", (size,), os.urandom(size))})
        root = Path(shutil.copytree(template, folder / "registry"))

        def push(number: int, name: str) -> None:
            with Registry.open(root) as registry:
                pushed = registry.push(source, name, metadata={f"writer{number}": 1})
                (folder / f"result{number}").write_text(f"{pushed.version} {pushed.created} {pushed.digest}")

        wanted = names.split(",")
        assert at_once([partial(push, number, name) for number, name in enumerate(wanted)]) == [0] * len(wanted)
        results = [(folder / f"result{number}").read_text().split() for number in range(len(wanted))]
        assert {(version, digest) for version, _, digest in results} == {("1", results[0][2])}
        assert sum(created == "True" for _, created, _ in results) == len(set(wanted))
        with Registry.open(root) as registry:
            said: dict[str, object] = {}
            for name in set(wanted):
                whole(registry, root, name)
                said |= registry.get(name).metadata
            assert said == {f"writer{number}": 1 for number in range(len(wanted))}
        big = [digest for digest in open_store(root).blobs.digests() if open_store(root).blobs.size(digest) > size]
        assert len(big) == 1
        assert not any((root / "tmp").iterdir())


@pytest.mark.parametrize("names", ["walk/new,walk/new,walk/new", "walk/one,walk/other"], ids=["one name", "two names"])
def test_two_pushes_of_the_same_big_file_store_it_once_and_both_land(template: Path, names: str) -> None:
    succeeds_alone(the_same_big_file, template, names)


def a_puller_and_a_pusher(template: str) -> None:
    with quick_folder() as folder:
        warm_up(folder / "warm-up")
        root = Path(shutil.copytree(template, folder / "registry"))
        sources = [
            peft_folder(folder / f"a{number}", {**CONFIG, "lora_alpha": number + 1}, adapter_tensors(seed=100 * number))
            for number in range(VERSIONS)
        ]

        def push() -> None:
            with Registry.open(root) as registry:
                for source in sources:
                    registry.push(source, "walk/new:prod", base="walk/base")

        def pull(out: Path) -> None:
            out.mkdir()
            with Registry.open(root) as registry:
                seen = pulls = 0
                while seen < VERSIONS:
                    try:
                        pulled = registry.pull("walk/new:prod", out / str(pulls))
                    except NotFound:
                        assert not seen, "the tag was there before"
                        continue
                    number = int(pulled.reference.partition("@")[2])
                    assert number >= seen, "the tag went back"
                    for file in pulled.files:
                        assert file.read_bytes() == (sources[number - 1] / file.name).read_bytes()
                    seen, pulls = number, pulls + 1

        assert at_once([push, partial(pull, folder / "out1"), partial(pull, folder / "out2")]) == [0, 0, 0]
        with Registry.open(root) as registry:
            whole(registry, root, "walk/new")
            assert registry.get("walk/new").version == VERSIONS


def test_a_puller_beside_a_pusher_gets_whole_versions_only(template: Path) -> None:
    succeeds_alone(a_puller_and_a_pusher, template)
