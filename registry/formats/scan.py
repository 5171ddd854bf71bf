"""What lies in a tree of folders: PEFT folders, model folders and single files of tensors, told apart by names, a few
bytes of a file's head and small configurations. Nothing is opened as an artifact here, and nothing is refused: what
cannot be whole is said with it, and what is none is counted."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from registry.core.errors import InvalidInput, SourceNotFound
from registry.core.reference import shown
from registry.formats.attachments import list_folder
from registry.formats.model_folders import CONFIG, INDEX, PIPELINE, is_weights_name
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_TENSORS, PICKLE_SUFFIXES
from registry.formats.pickles import is_pickle
from registry.formats.source import source_errors

Form = Literal["peft", "model", "file"]

SAFETENSORS = ".safetensors"
TENSOR_SUFFIXES = (SAFETENSORS, *PICKLE_SUFFIXES)
SENTENCE_MODULES = "modules.json"
"""sentence-transformers lists its modules there; they lie in folders of this one."""
REGISTRY_MARKER = "registry.json"
VIRTUAL_ENVIRONMENT = "pyvenv.cfg"
TOOL_FOLDERS = frozenset({"__pycache__", "node_modules", "site-packages", "wandb"})
HEAD_BYTES = 512

_TRAINING_STATE = re.compile(
    r"(?:optimizer|scheduler|lr_scheduler|scaler|rng_state|random_states|sampler|training_args|grad_scaler)"
    r"(?:_\d+)*\.(?:pt|pth|bin)"
    r"|(?:bf16_|fp16_)?zero_pp_rank_.*\.pt|mp_rank_\d+.*\.pt|.*_optim_states\.pt"
)
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.(?:safetensors|bin)")
_KINDS: Mapping[str, str] = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".mp4", ".avi"), "images and films"),
    **dict.fromkeys((".log", ".out", ".err", ".tfevents"), "logs"),
    **dict.fromkeys((".parquet", ".arrow", ".csv", ".tsv", ".jsonl", ".npy", ".npz", ".zarr", ".h5", ".tar"), "data"),
    **dict.fromkeys((".json", ".yaml", ".yml", ".toml", ".txt", ".md", ".py", ".ipynb", ".sh", ".model"), "texts"),
    **dict.fromkeys((".gguf", ".ggml", ".onnx", ".msgpack", ".tflite", ".engine"), "models in forms that are not read"),
    **dict.fromkeys((".incomplete", ".part", ".tmp", ".crdownload", ".lock"), "unfinished downloads"),
}
_TELLING = frozenset({ADAPTER_CONFIG, CONFIG, PIPELINE, SENTENCE_MODULES, REGISTRY_MARKER, VIRTUAL_ENVIRONMENT})
_CONFIG_BYTES = 1 << 20
_MOST_HEADER = 100_000_000


@dataclass(frozen=True)
class Artifact:
    """One thing that could be pushed by its path.

    Attributes:
        path: relative to the tree, with `/`; `.` for the tree itself.
        place: the file or folder.
        without: for a folder, its subfolders, which are walked on their own and are no part of it.
        broken: why it cannot be whole, with the mend, where its names alone say so.
    """

    path: str
    place: Path
    form: Form
    without: frozenset[str] = frozenset()
    broken: str | None = None


@dataclass(frozen=True)
class Skipped:
    """A folder or link that was not entered, or could not be.

    Attributes:
        unreadable: nobody knows what is in it; else it was left out on purpose.
    """

    path: str
    why: str
    unreadable: bool = False


@dataclass(frozen=True)
class Tree:
    """What lies in a tree.

    Attributes:
        root: absolute, without links.
        artifacts: sorted by path.
        skipped: links and folders that were not entered, one by one.
        counted: how many files and folders of which kind are no artifacts.
    """

    root: Path
    artifacts: tuple[Artifact, ...]
    skipped: tuple[Skipped, ...]
    counted: Mapping[str, int]


def scan(root: Path, *, on_folder: Callable[[str], None] = lambda path: None) -> Tree:
    """Walks a tree. A link to a folder is entered once the folders themselves were, unless it leads to one of them or
    to one around the tree; no folder is entered twice.

    Args:
        on_folder: called with the path of each folder.

    Raises:
        SourceNotFound, InvalidInput (a file), StorageError: of the tree itself.
    """
    with source_errors(root):
        if not root.exists():
            raise SourceNotFound(f"no such folder: {shown(str(root), 200)}")
        if not root.is_dir():
            raise InvalidInput(f"{shown(str(root), 200)} is a file; push it: registry push FILE namespace/name")
        os.scandir(root).close()
        resolved = Path(os.path.realpath(root))
        around = {_identity(folder) for folder in resolved.parents}
    walk = _Walk(resolved, around, on_folder)
    walk.run()
    return Tree(
        resolved,
        tuple(sorted(walk.artifacts, key=lambda artifact: artifact.path)),
        tuple(sorted(walk.skipped, key=lambda one: one.path)),
        dict(sorted(walk.counted.items())),
    )


def fingerprint(artifact: Artifact) -> tuple[str, int]:
    """Names, sizes and times of change of an artifact's files as one short text, and the bytes of all of them.

    Raises:
        SourceNotFound, StorageError
    """
    with source_errors(artifact.place):
        if artifact.form == "file":
            status = os.stat(artifact.place)
            files = [("", status.st_size, status.st_mtime_ns)]
        else:
            listing = list_folder(artifact.place, artifact.without)
            files = [
                (
                    file.path,
                    *(_size_and_time(artifact.place / file.path) if file.identity is None else file.identity[2:]),
                )
                for file in listing.files
            ]
    text = "\n".join(f"{size} {time} {path}" for path, size, time in files)
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    return digest[:32], sum(size for _, size, _ in files)


def _size_and_time(path: Path) -> tuple[int, int]:
    """Of what a link leads to; nothing where it leads nowhere."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


@dataclass
class _Folder:
    """The entries of a folder.

    Attributes:
        files: names that may matter, of regular files and of links to such or to nothing.
        links: those of `files` that are links.
        folder_links: links to folders.
        others: how many files there are of which other kind.
    """

    files: set[str] = field(default_factory=set)
    links: set[str] = field(default_factory=set)
    folders: list[str] = field(default_factory=list)
    folder_links: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


class _Walk:
    def __init__(self, root: Path, around: set[tuple[int, int]], on_folder: Callable[[str], None]) -> None:
        self.artifacts: list[Artifact] = []
        self.skipped: list[Skipped] = []
        self.counted: Counter[str] = Counter()
        self._root = root
        self._around = around
        self._on_folder = on_folder
        self._entered: dict[tuple[int, int], str] = {}
        self._links: list[tuple[Path, str]] = []

    def run(self) -> None:
        self._tree(self._root, "")
        while self._links:
            self._links.sort(key=lambda link: link[1], reverse=True)
            place, path = self._links.pop()
            try:
                identity = _identity(place)
            except OSError as error:
                self.skipped.append(Skipped(path, f"a link that leads nowhere: {error.strerror}"))
                continue
            if identity in self._around:
                self.skipped.append(Skipped(path, "a link to a folder around this one"))
            elif identity in self._entered:
                self.skipped.append(Skipped(path, f"a link to {shown(self._entered[identity] or '.', 120)}"))
            else:
                self._tree(place, f"{path}/")

    def _tree(self, place: Path, path: str) -> None:
        waiting = [(place, path)]
        while waiting:
            place, path = waiting.pop()
            waiting += reversed([*self._folder(place, path)])

    def _folder(self, place: Path, path: str) -> Iterator[tuple[Path, str]]:
        """Takes in one folder; the folders in it that are still to be entered."""
        try:
            identity = _identity(place)
            if identity in self._entered:
                self.skipped.append(Skipped(path.rstrip("/"), f"the same folder as {self._entered[identity] or '.'}"))
                return
            self._entered[identity] = path.rstrip("/")
            self._on_folder(path)
            found = _entries(place)
        except OSError as error:
            self.skipped.append(Skipped(path.rstrip("/") or ".", f"cannot be read: {error.strerror}", unreadable=True))
            return
        if path and (why := _tool_folder(found)):
            self.counted[why] += 1
            return
        if self._takes_subfolders(place, path, found):
            return
        self._links += [(place / name, f"{path}{name}") for name in found.folder_links]
        self._files(place, path, found)
        for name in sorted(found.folders):
            if name.startswith(".") or name in TOOL_FOLDERS or name.startswith(("datasets--", "spaces--")):
                self.counted["folders of tools"] += 1
            elif not (name in ("blobs", "refs") and "snapshots" in found.folders):
                yield place / name, f"{path}{name}/"

    # ---- folders that are one artifact

    def _takes_subfolders(self, place: Path, path: str, found: _Folder) -> bool:
        """Whether the folder and all below it are one model."""
        is_sentence_model = SENTENCE_MODULES in found.files and CONFIG in found.files
        if PIPELINE not in found.files and not is_sentence_model:
            return False
        self._add(path, place, "model", frozenset())
        return True

    def _files(self, place: Path, path: str, found: _Folder) -> None:
        without = frozenset((*found.folders, *found.folder_links))
        if found.files & {ADAPTER_CONFIG, ADAPTER_TENSORS, ADAPTER_PICKLE}:
            self._add(path, place, "peft", without)
        elif CONFIG in found.files and any(map(is_weights_name, found.files)):
            self._add(path, place, "model", without)
        else:
            self.counted += found.others
            tensors = self._single_files(place, path, found)
            if CONFIG in found.files and not tensors and (named := _model_of(place / CONFIG)):
                if "snapshots" in path.split("/") or "snapshots" in self._root.parts:
                    self.counted["hub folders of which only the configuration was fetched"] += 1
                else:
                    broken = f"the {CONFIG} of a {named} without its weights; download or save them beside it"
                    self._add(path, place, "model", without, broken)

    def _add(self, path: str, place: Path, form: Form, without: frozenset[str], broken: str | None = None) -> None:
        self.artifacts.append(Artifact(path.rstrip("/") or ".", place, form, without, broken))

    # ---- single files

    def _single_files(self, place: Path, path: str, found: _Folder) -> int:
        shards: dict[str, list[str]] = {}
        taken = 0
        for name in sorted(found.files):
            suffix = os.path.splitext(name)[1].lower()
            if _TRAINING_STATE.fullmatch(name):
                self.counted["training state without a model"] += 1
            elif suffix not in TENSOR_SUFFIXES:
                self.counted["texts"] += 1
            elif (shard := _SHARD.fullmatch(name)) is not None:
                shards.setdefault(f"{shard['stem']}-of-{shard['count']}", []).append(name)
            elif name in found.links and self._is_seen_elsewhere(place / name):
                self.counted["links to files of this tree"] += 1
            elif suffix != SAFETENSORS and not _may_hold_tensors(place / name):
                self.counted["others"] += 1
            else:
                self.artifacts.append(Artifact(f"{path}{name}", place / name, "file"))
                taken += 1
        for names in shards.values():
            index = next((name for name in found.files if name.endswith(INDEX)), None)
            broken = (
                f"{len(names)} shards of one model without its {CONFIG}{'' if index else ' and index'}; "
                "put that beside them"
            )
            self.artifacts.append(Artifact(f"{path}{names[0]}", place / names[0], "file", broken=broken))
        return taken + len(shards)

    def _is_seen_elsewhere(self, link: Path) -> bool:
        """Whether a link leads to a file that is walked over itself, which a hub cache's blobs are not."""
        target = Path(os.path.realpath(link))
        return target.exists() and target.parent.name != "blobs" and target.is_relative_to(self._root)


def _tool_folder(found: _Folder) -> str | None:
    if VIRTUAL_ENVIRONMENT in found.files:
        return "folders of tools"
    if REGISTRY_MARKER in found.files and "blobs" in found.folders:
        return "registries"
    return None


def _entries(place: Path) -> _Folder:
    found = _Folder()
    with os.scandir(place) as entries:
        for entry in entries:
            name = entry.name
            if entry.is_dir(follow_symlinks=False):
                found.folders.append(name)
                continue
            is_link = entry.is_symlink()
            if is_link and os.path.isdir(entry.path):
                found.folder_links.append(name)
            elif not entry.is_file() and not (is_link and not os.path.exists(entry.path)):
                found.others["no regular files"] += 1
            elif (kind := _kind_of(name)) is not None:
                found.others[kind] += 1  # not remembered: there are folders with a million images
            else:
                found.files.add(name)
                if is_link:
                    found.links.add(name)
    return found


def _kind_of(name: str) -> str | None:
    """What a file is that is neither an artifact nor tells of one, by its name; None: it may be."""
    suffix = os.path.splitext(name.lower())[1]
    if (suffix in TENSOR_SUFFIXES and not name.startswith(".")) or name in _TELLING or name.endswith(INDEX):
        return None
    return "logs" if ".tfevents." in name else _KINDS.get(suffix, "others")


def _may_hold_tensors(path: Path) -> bool:
    """Whether a file by the name of a checkpoint begins like one, or like the remains of one."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return True  # opening it says why
    if is_pickle(head) or head.startswith(b"version https://git-lfs"):
        return True
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < _MOST_HEADER:
        return True  # safetensors under another name
    named = path.suffix != ".bin" or is_weights_name(path.name)  # a .bin may be anything
    return named and not head.strip(b"\0")


def _model_of(config: Path) -> str | None:
    """The class or type of the model whose configuration this is; None: it is of something else."""
    try:
        with config.open("rb") as file:
            tree = json.loads(file.read(_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(tree, dict):
        return None
    architectures = tree.get("architectures")
    named: Sequence[object] = architectures if isinstance(architectures, list) else ()
    if "_diffusers_version" in tree or "transformers_version" in tree or named:
        found = next((one for one in (*named, tree.get("_class_name"), tree.get("model_type")) if one), "model")
        return shown(str(found))
    return None
