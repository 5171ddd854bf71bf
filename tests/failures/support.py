"""What the failure tests share: small artifacts made by hand, a photograph of all that a registry holds, and the
running of one function in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from registry import Registry
from registry.core.errors import RegistryError

REPOSITORY = Path(__file__).resolve().parents[2]
CATALOG = {"catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm"}

Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]


def header_bytes(header: object) -> bytes:
    """The first 8 + N bytes of a safetensors file, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def safetensors_bytes(tensors: Tensors) -> bytes:
    """A safetensors file of (dtype, shape, bytes) by name, in the given order."""
    header, data = {}, b""
    for name, (dtype, shape, value) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (len(data), len(data) + len(value))}
        data += value
    return header_bytes(header) + data


def floats(*shape: int, seed: int = 0) -> tuple[str, tuple[int, ...], bytes]:
    """A tensor of small numbers that depend on the seed alone."""
    size = 1
    for one in shape:
        size *= one
    stream = hashlib.shake_256(b"%d" % seed).digest(size)
    return "F32", shape, struct.pack(f"<{size}f", *(byte / 256 for byte in stream))


def model_tensors(size: int = 16, seed: int = 0) -> Tensors:
    """A base model of two linear layers."""
    return {f"{layer}.weight": floats(size, size, seed=seed + place) for place, layer in enumerate(("q", "v"))}


def adapter_tensors(size: int = 16, rank: int = 4, seed: int = 0) -> Tensors:
    """A LoRA on the two layers of `model_tensors`."""
    tensors = {}
    for place, layer in enumerate(("q", "v")):
        prefix = f"base_model.model.{layer}"
        tensors[f"{prefix}.lora_A.weight"] = floats(rank, size, seed=seed + 10 * place)
        tensors[f"{prefix}.lora_B.weight"] = floats(size, rank, seed=seed + 10 * place + 1)
    return tensors


CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q", "v"]}


def peft_folder(folder: Path, config: object = CONFIG, tensors: bytes | Tensors | None = None) -> Path:
    """A PEFT folder; `config` may be bytes, to be wrong."""
    folder.mkdir(parents=True)
    raw = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / "adapter_config.json").write_bytes(raw)
    if not isinstance(tensors, bytes):
        tensors = safetensors_bytes(adapter_tensors() if tensors is None else tensors)
    (folder / "adapter_model.safetensors").write_bytes(tensors)
    return folder


def tensor_file(path: Path, tensors: Tensors | None = None) -> Path:
    path.write_bytes(safetensors_bytes(model_tensors() if tensors is None else tensors))
    return path


@dataclass(frozen=True)
class Photograph:
    """All that a registry in a folder holds: every file and folder but the catalog's, and every row of every table."""

    files: dict[str, str]
    rows: dict[str, list[tuple[Any, ...]]]


def photograph(root: Path) -> Photograph:
    """Equal before and after means that nothing became visible, and that nothing was left behind."""
    files = {
        str(path.relative_to(root)): "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.name not in CATALOG
    }
    with closing(sqlite3.connect(f"file:{root}/catalog.sqlite?mode=ro", uri=True)) as catalog:
        tables = [name for (name,) in catalog.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = {name: sorted(catalog.execute(f'SELECT * FROM "{name}"'), key=repr) for name in tables}
    return Photograph(files, rows)


def whole(registry: Registry, root: Path, reference: str) -> None:
    """Holds that a version is all there: its files proven by a pull, and journal and rows agreeing event by event."""
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        assert registry.pull(reference, scratch).files, "nothing was pulled"
    name = reference.partition("@")[0].partition(":")[0]
    events = registry.events(name)
    assert [event.seq for event in events] == list(range(1, len(events) + 1)), "the events have a gap"
    assert [event.version for event in events if event.kind == "pushed"] == list(
        range(1, sum(event.kind == "pushed" for event in events) + 1)
    ), "the numbers have a gap"
    for event in events:
        entry = (root / "journal" / name / f"{event.seq}.json").read_bytes()
        assert entry == event.document(registry.id), f"journal entry {event.seq} contradicts its row"
    assert len(list((root / "journal" / name).iterdir())) == len(events), "the journal has entries of no event"
    assert pending_events(root) == 0, "the outbox is not empty"


def pending_events(root: Path) -> int:
    """Events in the outbox."""
    with closing(sqlite3.connect(f"file:{root}/catalog.sqlite?mode=ro", uri=True)) as catalog:
        (count,) = catalog.execute("SELECT count(*) FROM outbox").fetchone()
    return int(count)


def own_process(
    function: Callable[..., None], *arguments: object, timeout: float = 90
) -> subprocess.CompletedProcess[str]:
    """Runs a function of a test module in a fresh process, warnings being errors; its arguments arrive as text.

    There it may fork, be killed, fill disks or give up root, whatever the threads of pytest do. It finds no git, which
    would take longer than the rest of a small push.
    """
    place = Path(function.__code__.co_filename).resolve().relative_to(REPOSITORY).with_suffix("")
    script = f"import sys; from {'.'.join(place.parts)} import {function.__name__} as f; f(*sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "error", "PATH": ""}
    environment.pop("REGISTRY_URL", None)
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def succeeds_alone(function: Callable[..., None], *arguments: object, timeout: float = 90) -> str:
    """`own_process`, which must end well; gives what it printed."""
    done = own_process(function, *arguments, timeout=timeout)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter and write, which pytest's own is not."""
    folder = Path(tempfile.mkdtemp(prefix="registry-test-"))
    folder.chmod(0o777)
    try:
        yield folder
    finally:
        for path in [folder, *folder.rglob("*")]:
            if not path.is_symlink():
                path.chmod(0o755)
        shutil.rmtree(folder)


REFUSED = 7
"""What a child of `forked` exits with that raised an error which was allowed."""


def forked(work: Callable[[], object], *allowed: type[RegistryError]) -> int:
    """Does the work in a child of this process, which must have no other threads.

    Returns:
        0, `REFUSED` for an error that is allowed and is one printable line, 1 for any other (its traceback goes to
        standard error), or the negative number of the signal that ended it.
    """
    return at_once([work], *allowed)[0]


def at_once(works: Sequence[Callable[[], object]], *allowed: type[RegistryError]) -> list[int]:
    """As `forked`, each work in a child of its own; they begin when the last child is there."""
    sys.stdout.flush()
    sys.stderr.flush()
    go, start = os.pipe()
    children = []
    for work in works:
        if child := os.fork():
            children.append(child)
            continue
        os.close(start)
        os.read(go, 1)
        _work_and_exit(work, allowed)
    os.close(start)
    os.close(go)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _work_and_exit(work: Callable[[], object], allowed: tuple[type[RegistryError], ...]) -> NoReturn:
    code = 1
    try:
        work()
        code = 0
    except allowed as error:
        if str(error).isprintable():
            code = REFUSED
        else:
            traceback.print_exc()
    except BaseException:  # noqa: BLE001  # whatever it is, this is a child, and must end here
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def as_nobody(work: Callable[[], object]) -> None:
    """Does the work in a child that has given up root, which ignores modes. All that it imports must have been imported
    (see `warm_up`): nobody may not be able to read the interpreter's own folder."""

    def unprivileged() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        work()

    assert forked(unprivileged) == 0, "the child failed"


def warm_up(folder: Path, *, torch: bool = False) -> None:
    """Imports what making a registry, pushing, pulling and bundles need, by doing it; with `torch` also what loading
    needs."""
    folder.mkdir()
    with Registry.init(folder / "registry") as registry:
        registry.push(peft_folder(folder / "adapter"), "warm/up", tags=["a"], metadata={"b": 1}, metrics={"c": 2})
        registry.pull("warm/up", folder / "out")
        registry.export("warm/up", to=folder / "bundle.tar")
        registry.import_(folder / "bundle.tar")
        if torch:
            registry.load("warm/up")
        registry.find("r >= 1")
        registry.show("warm/up")
        registry.log("warm/up")


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A folder in memory if there is room: what is killed hundreds of times need not wait for a disk."""
    memory = Path("/dev/shm")
    quick = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 256 << 20  # containers often have 64 MiB
    with tempfile.TemporaryDirectory(prefix="registry-test-", dir=memory if quick else None) as folder:
        yield Path(folder)
