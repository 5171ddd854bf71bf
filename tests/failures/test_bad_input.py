"""What a push refuses, and what it keeps but reports. A refusal is one line of one type and leaves the registry as it
was: no version, no name, no blob, no temporary file, no journal entry."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from registry import Registry
from registry.core.errors import (
    ArtifactNotFound,
    InvalidInput,
    InvalidManifest,
    InvalidReference,
    MalformedTensors,
    NotFound,
    RegistryError,
    SourceNotFound,
    StorageError,
    TagNotFound,
    TagProtected,
    UnsupportedTensor,
    VersionNotFound,
)
from tests.failures.support import (
    CONFIG,
    adapter_tensors,
    as_nobody,
    header_bytes,
    model_tensors,
    open_folder,
    peft_folder,
    photograph,
    safetensors_bytes,
    succeeds_alone,
    tensor_file,
    warm_up,
)

CONTROL = [*range(0x20), *range(0x7F, 0xA0)]


@contextmanager
def refused(root: Path, error: type[RegistryError], match: str | None = None) -> Iterator[None]:
    """The body raises this error, in one printable line, and the registry is as it was."""
    before = photograph(root)
    with pytest.raises(error, match=match) as caught:
        yield
    text = str(caught.value)
    assert text.isprintable(), text
    assert 10 < len(text) < 700, text
    after = photograph(root)
    assert after.files == before.files
    assert after.rows == before.rows


class TestASafetensorsFile:
    GOOD = safetensors_bytes(model_tensors())
    ENTRY: Mapping[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    BAD: Mapping[str, bytes] = {
        "empty": b"",
        "seven bytes": GOOD[:7],
        "cut in the header": GOOD[:40],
        "cut in the data": GOOD[:-1],
        "a byte too long": GOOD + b"\0",
        "header of 4 GB": struct.pack("<Q", 4 << 30) + GOOD[8:],
        "header of 2**64 - 1 bytes": b"\xff" * 8 + GOOD[8:],
        "overlapping offsets": header_bytes({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}) + bytes(12),
        "the same bytes twice": header_bytes({"a": ENTRY, "b": ENTRY}) + bytes(8),
        "a gap": header_bytes({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}) + bytes(20),
        "offsets beyond the end": header_bytes({"a": {**ENTRY, "data_offsets": [0, 1 << 60]}}) + bytes(8),
        "offsets backwards": header_bytes({"a": {**ENTRY, "data_offsets": [8, 0]}}) + bytes(8),
        "a negative size": header_bytes({"a": {**ENTRY, "shape": [-2]}}) + bytes(8),
        "an enormous shape": header_bytes({"a": {**ENTRY, "shape": [1 << 62, 1 << 62]}}) + bytes(8),
        "an unknown dtype": header_bytes({"a": {**ENTRY, "dtype": "F31"}}) + bytes(8),
        "a header of another type": header_bytes([ENTRY]) + bytes(8),
        "a header that is no JSON": header_bytes(b'{"a": ') + bytes(8),
        "a header nested 100,000 deep": header_bytes(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "a name twice": header_bytes(b'{"a":%s,"a":%s}' % ((json.dumps(ENTRY).encode(),) * 2)) + bytes(8),
        "no tensors": header_bytes({}),
        "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64,
        "a pickle": b"\x80\x02}q\x00." * 10,
    }

    @pytest.mark.parametrize("data", BAD.values(), ids=BAD)
    def test_that_is_malformed_is_refused(self, registry: Registry, root: Path, tmp_path: Path, data: bytes) -> None:
        path = tmp_path / "bad.safetensors"
        path.write_bytes(data)
        with refused(root, MalformedTensors, "bad.safetensors"):
            registry.push(path, "walk/new", tags=["prod"], metadata={"a": 1}, metrics={"b": 2})

    @pytest.mark.parametrize("data", BAD.values(), ids=BAD)
    def test_that_is_malformed_is_refused_within_a_peft_folder_too(
        self, registry: Registry, root: Path, tmp_path: Path, data: bytes
    ) -> None:
        folder = peft_folder(tmp_path / "folder\n\x1b[31m", tensors=data)
        with refused(root, MalformedTensors, "adapter_model.safetensors"):
            registry.push(folder, "walk/new", base="walk/base", force=True)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_with_a_value_that_is_not_finite_is_stored_and_flagged(
        self, registry: Registry, tmp_path: Path, value: float
    ) -> None:
        tensors = {**adapter_tensors()}
        name = "base_model.model.q.lora_B.weight"
        dtype, shape, data = tensors[name]
        tensors[name] = (dtype, shape, data[:-4] + struct.pack("<f", value))
        folder = peft_folder(tmp_path / "folder", tensors=tensors)
        pushed = registry.push(folder, "walk/new", base="walk/base", force=True)
        assert pushed.created
        flagged = [finding for finding in pushed.findings if finding.code == "C17"]
        assert [(finding.severity, finding.subject) for finding in flagged] == [("error", name)]
        assert registry.show("walk/new").findings == pushed.findings
        assert registry.get("walk/new").findings == 1
        registry.pull("walk/new", tmp_path / "out")
        there = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
        assert there == (folder / "adapter_model.safetensors").read_bytes()

    def test_that_changes_while_it_is_pushed_is_refused(
        self, registry: Registry, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from registry.operations import push

        path = tensor_file(tmp_path / "model.safetensors", model_tensors(seed=5))
        digest_files = push.digest_files

        def rewritten_in_between(*arguments: Any, **options: Any) -> Any:
            done = digest_files(*arguments, **options)
            with path.open("r+b") as file:
                file.seek(-4, os.SEEK_END)
                file.write(b"\1\2\3\4")
            return done

        monkeypatch.setattr(push, "digest_files", rewritten_in_between)
        with refused(root, InvalidInput, "changed while it was pushed"):
            registry.push(path, "walk/new")

    @pytest.mark.parametrize("size", [16, 2100], ids=["small", "streamed"])
    def test_that_gets_shorter_while_it_is_pushed_is_refused(
        self, registry: Registry, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
    ) -> None:
        from registry.formats import paths

        path = tmp_path / "model.safetensors"
        data = os.urandom(4 * size * size)
        path.write_bytes(safetensors_bytes({"q.weight": ("F32", (size, size), data)}))
        read = paths.read_safetensors_file

        def cut_in_between(path: Path) -> Any:
            source = read(path)
            os.truncate(path, path.stat().st_size - 5)
            return source

        monkeypatch.setattr(paths, "read_safetensors_file", cut_in_between)
        with refused(root, InvalidInput, "became shorter"):
            registry.push(path, "walk/new")


class TestASource:
    """What stands at the path is not what should."""

    def make(self, folder: Path, kind: str) -> Path:
        """Something of this kind, under a name that promises tensors."""
        path = folder / "source.safetensors"
        match kind:
            case "nothing":
                pass
            case "folder":
                path.mkdir()
            case "FIFO":
                os.mkfifo(path)
            case "socket":
                import socket

                with socket.socket(socket.AF_UNIX) as bound:
                    bound.bind(os.path.relpath(path))
            case "device":
                path.symlink_to("/dev/zero")
            case "loop":
                path.symlink_to(path.name)
            case "link to nothing":
                path.symlink_to("nowhere")
            case "below a file":
                (folder / "file").write_bytes(b"")
                path = folder / "file" / path.name
            case "5,000 letters":
                path = folder / ("x" * 5000)
            case "NUL":
                path = folder / "a\0b.safetensors"
            case "line break":
                path = folder / "a\nb\x1b[31m.safetensors"
            case "another content":
                path = folder / "model.bin"
                path.write_bytes(b"epoch,loss\n1,0.5\n" * 50)
        return path

    @pytest.mark.parametrize(
        ("kind", "error"),
        [
            ("nothing", SourceNotFound),
            ("folder", InvalidInput),
            ("FIFO", InvalidInput),
            ("socket", InvalidInput),
            ("device", InvalidInput),
            ("loop", InvalidInput),
            ("link to nothing", SourceNotFound),
            ("below a file", SourceNotFound),
            ("5,000 letters", InvalidInput),
            ("NUL", InvalidInput),
            ("line break", SourceNotFound),
            ("another content", InvalidInput),
        ],
    )
    def test_that_is_no_file_is_refused_at_once(
        self,
        registry: Registry,
        root: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        kind: str,
        error: type[RegistryError],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        path = self.make(tmp_path, kind)
        with refused(root, error):
            registry.push(path, "walk/new")

    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
    @pytest.mark.parametrize("kind", ["folder", "FIFO", "device", "loop", "link to nothing"])
    def test_with_something_else_in_place_of_a_file_is_refused_at_once(
        self, registry: Registry, root: Path, tmp_path: Path, name: str, kind: str
    ) -> None:
        folder = peft_folder(tmp_path / "folder")
        (folder / name).unlink()
        self.make(tmp_path, kind).rename(folder / name) if kind != "loop" else (folder / name).symlink_to(name)
        with refused(root, RegistryError, name):
            registry.push(folder, "walk/new", base="walk/base")

    def test_that_is_a_folder_of_links_is_taken(self, registry: Registry, tmp_path: Path) -> None:
        """A hub cache is made of them."""
        real = peft_folder(tmp_path / "real")
        (tmp_path / "links").mkdir()
        for file in real.iterdir():
            (tmp_path / "links" / file.name).symlink_to(file)
        first = registry.push(tmp_path / "links", "walk/new", base="walk/base")
        again = registry.push(real, "walk/new", base="walk/base")
        assert (first.created, again.created) == (True, False)

    @pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
    def test_that_is_half_a_peft_folder_is_refused(
        self, registry: Registry, root: Path, tmp_path: Path, missing: str
    ) -> None:
        folder = peft_folder(tmp_path / "folder")
        (folder / missing).unlink()
        with refused(root, InvalidInput, missing):
            registry.push(folder, "walk/new", base="walk/base")

    def test_that_is_an_empty_folder_is_refused(self, registry: Registry, root: Path, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        with refused(root, InvalidInput, "no PEFT folder"):
            registry.push(tmp_path / "folder", "walk/new")

    def test_that_is_safetensors_under_the_name_of_a_pickle_says_so(
        self, registry: Registry, root: Path, tmp_path: Path
    ) -> None:
        folder = peft_folder(tmp_path / "folder")
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        with refused(root, InvalidInput, "found what looks like safetensors; rename it to .safetensors"):
            registry.push(folder, "walk/new")

    @pytest.mark.parametrize("name", ["a\\b", "a\u202eb", "a\u2028b", "tab\tb", os.fsdecode(b"\xff")], ids=ascii)
    def test_whose_name_may_not_stand_in_a_manifest_is_refused(
        self, registry: Registry, root: Path, tmp_path: Path, name: str
    ) -> None:
        path = tensor_file(tmp_path / f"{name}.safetensors")
        with refused(root, InvalidManifest, "file path"):
            registry.push(path, "walk/new")

    @pytest.mark.parametrize("source", [None, 7, b"model.safetensors", ["a"], {}], ids=repr)
    def test_of_another_type_is_refused(self, registry: Registry, root: Path, source: Any) -> None:
        with refused(root, InvalidInput):
            registry.push(source, "walk/new")

    def test_that_cannot_be_read_is_refused(self, tmp_path: Path) -> None:
        succeeds_alone(unreadable_sources, tmp_path)


def unreadable_sources(scratch: str) -> None:
    """Alone in a process, which gives up root there: root reads everything."""
    with open_folder() as place:
        closed = {
            "file": tensor_file(place / "model.safetensors"),
            "folder": peft_folder(place / "closed"),
            "within": peft_folder(place / "within") / "adapter_config.json",
            "above": tensor_file(peft_folder(place / "above") / "model.safetensors").parent,
        }
        for path in closed.values():
            path.chmod(0)
        sources = [closed["file"], closed["folder"], place / "within", closed["above"] / "model.safetensors"]
        warm_up(Path(scratch) / "warm-up")

        def push_all() -> None:
            root = place / "registry"
            with Registry.init(root) as registry:
                for source in sources:
                    with refused(root, StorageError, str(source)):
                        registry.push(source, "walk/new")

        as_nobody(push_all)


class TestAConfiguration:
    BAD: Mapping[str, bytes] = {
        "empty": b"",
        "a list": b"[]",
        "a number": b"7",
        "null": b"null",
        "cut": b'{"peft_type": "LORA", "r"',
        "not UTF-8": b'{"peft_type": "\xff"}',
        "UTF-16": json.dumps(CONFIG).encode("utf-16"),
        "NaN": b'{"peft_type": "LORA", "r": 4, "lora_alpha": NaN}',
        "Infinity": b'{"peft_type": "LORA", "r": 4, "lora_alpha": Infinity}',
        "too large a number": b'{"peft_type": "LORA", "r": 4, "lora_alpha": 1e999}',
        "a key twice": b'{"peft_type": "LORA", "r": 4, "r": 8}',
        "no type": b'{"r": 4}',
        "type of another type": b'{"peft_type": ["LORA"], "r": 4}',
        "r of text": b'{"peft_type": "LORA", "r": "4"}',
        "r of a flag": b'{"peft_type": "LORA", "r": true}',
        "r of 0": b'{"peft_type": "LORA", "r": 0}',
        "alpha of a list": b'{"peft_type": "LORA", "r": 4, "lora_alpha": [8]}',
        "targets of numbers": b'{"peft_type": "LORA", "r": 4, "target_modules": [1]}',
        "patterns of a list": b'{"peft_type": "LORA", "r": 4, "rank_pattern": ["q"]}',
        "nested 100,000 deep": b'{"peft_type": "LORA", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "nested 100 deep": b'{"peft_type": "LORA", "x": ' + b"[" * 100 + b"]" * 100 + b"}",
        "half of a surrogate pair": b'{"peft_type": "LORA", "x": "\\ud800"}',
        "17 MiB": b'{"peft_type": "LORA", "x": "' + b"x" * (17 << 20) + b'"}',
        "a number of 5,000 digits": b'{"peft_type": "LORA", "x": ' + b"9" * 5000 + b"}",
    }

    @pytest.mark.parametrize("raw", BAD.values(), ids=BAD)
    def test_that_is_none_is_refused(self, registry: Registry, root: Path, tmp_path: Path, raw: bytes) -> None:
        folder = peft_folder(tmp_path / "folder\n\x1b[31m", raw)
        with refused(root, InvalidInput, "adapter_config.json"):
            registry.push(folder, "walk/new", base="walk/base")

    @pytest.mark.parametrize(
        ("extra", "code", "subject"),
        [
            ({"peft_type": "FROBNICATE"}, "C01", "peft_type"),
            ({"use_frobnication": True}, "C02", "use_frobnication"),
            ({"später\u202e": [1, {"a": None}]}, "C02", "später\u202e"),
            ({"x": 2**70, "y": 1.5e300}, "C02", "x"),
        ],
        ids=["type", "key", "key of strange letters", "numbers beyond a double"],
    )
    def test_with_an_unknown_type_or_key_is_kept_and_reported(
        self, registry: Registry, tmp_path: Path, extra: dict[str, Any], code: str, subject: str
    ) -> None:
        folder = peft_folder(tmp_path / "folder", {**CONFIG, **extra})
        pushed = registry.push(folder, "walk/new", base="walk/base", force=True)
        assert (code, subject) in [(finding.code, finding.subject) for finding in pushed.findings]
        registry.pull("walk/new", tmp_path / "out")
        kept = (tmp_path / "out" / "adapter_config.json").read_bytes()
        assert kept == (folder / "adapter_config.json").read_bytes()

    def test_of_just_under_16_mib_is_kept(self, registry: Registry, tmp_path: Path) -> None:
        folder = peft_folder(tmp_path / "folder", {**CONFIG, "x": "x" * ((16 << 20) - 200)})
        assert registry.push(folder, "walk/new", base="walk/base", force=True).created
        registry.pull("walk/new", tmp_path / "out")


class TestAName:
    BAD: Mapping[str, str] = {
        "empty": "",
        "no slash": "perturb",
        "two slashes": "walk/left/perturb",
        "nothing before the slash": "/perturb",
        "nothing after the slash": "walk/",
        "two dots": "walk/..",
        "two dots before": "../perturb",
        "two dots within": "walk/a..b",
        "one dot": "walk/.",
        "a folder above": "walk/../../etc",
        "300 letters": "walk/" + "x" * 300,
        "300 letters before": "x" * 300 + "/perturb",
        "129 letters": "walk/" + "x" * 129,
        "upper case": "walk/Perturb",
        "upper case before": "Walk/perturb",
        "a space": "walk/per turb",
        "a backslash": "walk\\perturb",
        "not ASCII": "walk/perturbé",
        "a look-alike digit": "walk/perturb\u0663",
        "an absolute path": "/etc/passwd",
        "a percent": "walk/%2e%2e",
        "another scheme": "https://walk/perturb",
        "a surrogate": "walk/\udcff",
        **{f"control character {code:#x}": f"walk/per{chr(code)}turb" for code in CONTROL},
        **{f"control character {code:#x} at the end": f"walk/perturb{chr(code)}" for code in (0, 0x0A, 0x0D)},
    }

    @pytest.mark.parametrize("name", BAD.values(), ids=BAD)
    def test_that_is_none_is_refused(self, registry: Registry, root: Path, tmp_path: Path, name: str) -> None:
        with refused(root, InvalidReference):
            registry.push(tensor_file(tmp_path / "model.safetensors"), name)

    @pytest.mark.parametrize("target", ["walk/new@1", "walk/new@sha256:abcd", "walk/new:prod@{2026-01-01}"])
    def test_that_is_pinned_cannot_be_pushed_to(
        self, registry: Registry, root: Path, tmp_path: Path, target: str
    ) -> None:
        with refused(root, InvalidReference):
            registry.push(tensor_file(tmp_path / "model.safetensors"), target)

    @pytest.mark.parametrize(
        "tag",
        [
            "",
            "7",
            "007",
            "latest",
            "a/b",
            "..",
            ".a",
            "a..b",
            "a b",
            "-a",
            "x" * 129,
            "a\n",
            "é",
            "\u0663",
            "a:b",
            "@1",
        ],
        ids=ascii,
    )
    def test_of_a_tag_that_is_none_is_refused(self, registry: Registry, root: Path, tmp_path: Path, tag: str) -> None:
        path = tensor_file(tmp_path / "model.safetensors")
        with refused(root, InvalidReference):
            registry.push(path, "walk/new", tags=["good", tag])
        if tag and tag != "@1":
            with refused(root, InvalidReference):
                registry.push(path, f"walk/new:{tag}")
        with refused(root, InvalidReference):
            registry.tag("walk/base@1", tag)

    def test_of_a_protected_tag_is_refused_before_anything_is_stored(
        self, registry: Registry, root: Path, tmp_path: Path
    ) -> None:
        registry.protect_tag("walk/base", "v1")
        path = tensor_file(tmp_path / "model.safetensors", model_tensors(seed=7))
        with refused(root, TagProtected, "v1"):
            registry.push(path, "walk/base:v1")


class TestABaseOrParent:
    MISSING: Mapping[str, type[NotFound]] = {
        "walk/none": ArtifactNotFound,
        "walk/base@2": VersionNotFound,
        "walk/base:none": TagNotFound,
        "walk/base@sha256:0000": VersionNotFound,
        "walk/base:v1@{2001-01-01}": NotFound,
    }

    @pytest.mark.parametrize(("reference", "error"), MISSING.items(), ids=MISSING)
    def test_that_is_missing_is_refused(
        self, registry: Registry, root: Path, tmp_path: Path, reference: str, error: type[NotFound]
    ) -> None:
        folder = peft_folder(tmp_path / "folder")
        with refused(root, error, "base.* is not in this registry"):
            registry.push(folder, "walk/new", base=reference)
        with refused(root, error, "continued_from.* is not in this registry"):
            registry.push(folder, "walk/new", continued_from=reference)

    def test_that_is_the_version_itself_is_missing_too(self, registry: Registry, root: Path, tmp_path: Path) -> None:
        with refused(root, ArtifactNotFound):
            registry.push(peft_folder(tmp_path / "folder"), "walk/new", continued_from="walk/new")

    @pytest.mark.parametrize(
        "parents",
        [
            [("born_of", "walk/base", None)],
            [("merged_from", "walk/base", float("nan"))],
            [("continued_from", "walk/base", 0.5)],
            [("merged_from", "walk/base", 0.5), ("merged_from", "walk/base:v1", 0.25)],
            [("merged_from", "..", 0.5)],
        ],
        ids=["relation", "weight", "weight of another relation", "two weights", "reference"],
    )
    def test_that_makes_no_sense_is_refused(
        self, registry: Registry, root: Path, tmp_path: Path, parents: list[tuple[str, str, float | None]]
    ) -> None:
        with refused(root, InvalidInput):
            registry.push(peft_folder(tmp_path / "folder"), "walk/new", parents=parents)


class TestWhatIsSaid:
    """Metadata, metrics, messages: refused before a byte is stored."""

    BAD: Mapping[str, dict[str, Any]] = {
        "metadata key": {"metadata": {"a b": 1}},
        "metadata value": {"metadata": {"a": [1]}},
        "metadata of NaN": {"metadata": {"a": float("nan")}},
        "metadata of a NUL": {"metadata": {"a": "x\0"}},
        "metadata of half a pair": {"metadata": {"a": "\ud800"}},
        "long metadata": {"metadata": {"a": "x" * 501}},
        "metric of text": {"metrics": {"a": "7"}},
        "metric key": {"metrics": {"": 7}},
        "metric beyond a double": {"metrics": {"a": 10**400}},
        "step": {"metrics": {"a": 7}, "step": 1.5},
        "step beyond 64 bits": {"metrics": {"a": 7}, "step": 2**80},
        "message of a NUL": {"message": "x\0"},
        "message of half a pair": {"message": "\udcff"},
        "long message": {"message": "x" * 10_001},
        "kind": {"kind": "lora"},
        "tags as one text": {"tags": "prod"},
    }

    @pytest.mark.parametrize("options", BAD.values(), ids=BAD)
    def test_that_cannot_be_kept_is_refused(
        self, registry: Registry, root: Path, tmp_path: Path, options: dict[str, Any]
    ) -> None:
        with refused(root, InvalidInput):
            registry.push(tensor_file(tmp_path / "model.safetensors", model_tensors(seed=3)), "walk/new", **options)

    def test_by_an_actor_of_strange_bytes_is_kept_as_text(
        self, registry: Registry, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("REGISTRY_ACTOR", os.fsdecode(b"ann\xff"))
        registry.push(tensor_file(tmp_path / "model.safetensors", model_tensors(seed=3)), "walk/new")
        assert registry.events("walk/new")[0].actor.startswith("ann")

    def test_of_a_kind_that_the_tensors_are_not_is_refused(
        self, registry: Registry, root: Path, tmp_path: Path
    ) -> None:
        with refused(root, InvalidInput, "no adapter tensors"):
            registry.push(tensor_file(tmp_path / "model.safetensors"), "walk/new", kind="adapter")
        with refused(root, InvalidInput, "is an adapter"):
            registry.push(peft_folder(tmp_path / "folder"), "walk/new", kind="checkpoint")


class TestALiveModel:
    def model(self) -> Any:
        from peft import LoraConfig, get_peft_model
        from torch import nn

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q = nn.Linear(8, 8)

        return get_peft_model(Model(), LoraConfig(r=2, target_modules=["q"]))

    @pytest.mark.parametrize("kind", [None, "adapter", "checkpoint"])
    def test_whose_adapter_is_merged_is_refused(self, registry: Registry, root: Path, kind: Any) -> None:
        model = self.model()
        model.merge_adapter()
        with refused(root, InvalidInput, "unmerge_adapter"):
            registry.push(model, "walk/new", kind=kind)
        model.unmerge_adapter()
        assert registry.push(model, "walk/new", kind=kind).created

    def test_with_an_unknown_adapter_is_refused(self, registry: Registry, root: Path) -> None:
        with refused(root, InvalidInput, "no adapter 'other'"):
            registry.push(self.model(), "walk/new", adapter_name="other")

    BAD: Mapping[str, Callable[[], Any]] = {
        "meta": lambda: __import__("torch").empty(2, device="meta"),
        "sparse": lambda: __import__("torch").eye(2).to_sparse(),
        "complex of 128 bits": lambda: __import__("torch").zeros(2, dtype=__import__("torch").complex128),
        "a list": lambda: [1.0, 2.0],
    }

    @pytest.mark.parametrize("make", BAD.values(), ids=BAD)
    def test_with_a_tensor_that_safetensors_cannot_hold_is_refused(
        self, registry: Registry, root: Path, make: Callable[[], Any]
    ) -> None:
        import torch

        with refused(root, UnsupportedTensor, r"^b: "):
            registry.push({"a": torch.zeros(2), "b": make()}, "walk/new")


def test_sixteen_refusals_leave_room_for_a_push(registry: Registry, root: Path, tmp_path: Path) -> None:
    """A refusal leaves no lock, no open batch and no number used up."""
    for number in range(16):
        with pytest.raises(RegistryError):
            registry.push(tmp_path / "nothing", f"walk/new{number}")
    path = tensor_file(tmp_path / "model.safetensors", model_tensors(seed=9))
    assert registry.push(path, "walk/new").version == 1
    assert registry.push(path, "walk/base").version == 2
    assert not any((root / "tmp").iterdir())
