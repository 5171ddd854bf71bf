"""A durable put of a large blob against what the disk and the processor need at the least.

    python benchmarks/blob_put.py [--megabytes 400] [--runs 5] [--folder FOLDER]

Every way reads the same file, warm in the page cache, and ends with the bytes and the name durable; the ways take
turns, so that a slow moment of the disk falls on all of them. `put` should come near the slower of `sha256` and
`bare`, not near their sum, which `in turn` measures.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

from registry.store import create_store

CHUNK = 1 << 20


def make_source(path: Path, megabytes: int) -> None:
    with path.open("wb") as file:
        for _ in range(megabytes):
            file.write(os.urandom(1_000_000))
        file.flush()
        os.fsync(file.fileno())


def as_bytes(source: Path) -> Iterator[bytes]:
    with source.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            yield chunk


def as_one_buffer(source: Path) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(CHUNK))
    with source.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield buffer[:count]


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write(source: Path, target: Path, *, writeback: int | None = None, hashing: bool = False) -> None:
    """Read, write, fsync; with `writeback`, the kernel is told every so many bytes to begin."""
    hasher = hashlib.sha256()
    done = told = 0
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    for chunk in as_one_buffer(source):
        if hashing:
            hasher.update(chunk)
        done += os.write(descriptor, chunk)
        if writeback and done - told >= writeback:
            os.posix_fadvise(descriptor, told, done - told, os.POSIX_FADV_DONTNEED)
            told = done
    os.fsync(descriptor)
    os.close(descriptor)
    sync(target.parent)


def copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--reflink=never", source, target], check=True)
    sync(target)
    sync(target.parent)


def digest(source: Path) -> None:
    hasher = hashlib.sha256()
    for chunk in as_one_buffer(source):
        hasher.update(chunk)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: the temporary folder)")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=options.folder, prefix="blob-put-") as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        make_source(source, options.megabytes)
        store = create_store(Path(folder) / "store", uuid4().hex)

        def put(chunks: Callable[[Path], Iterator[bytes | memoryview]]) -> None:
            with store.blobs.batch() as batch:
                assert batch.put(chunks(source)).created
                batch.commit()

        ways: dict[str, Callable[[], None]] = {
            "put, chunks of bytes": lambda: put(as_bytes),
            "put, one buffer": lambda: put(as_one_buffer),
            "bare: read, write, fsync": lambda: write(source, target),
            "bare, early write-back": lambda: write(source, target, writeback=8 << 20),
            "cp and fsync": lambda: copy(source, target),
            "read and sha256": lambda: digest(source),
            "in turn: sha256, write, fsync": lambda: write(source, target, hashing=True),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.runs + 1):  # the first warms up
            for name, way in ways.items():
                begin = time.perf_counter()
                way()
                if turn:
                    seconds[name].append(time.perf_counter() - begin)
                target.unlink(missing_ok=True)
                for blob in list(store.blobs.digests()):
                    store.blobs.delete(blob)
                os.sync()

    medians = {name: statistics.median(found) for name, found in seconds.items()}
    # The load is shown because with other work on the processors two threads gain little.
    machine = f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}"
    print(f"{options.megabytes} MB, {options.runs} runs in turn, {machine}; median (least) in ms")
    for name, median in medians.items():
        print(f"  {name:32}{median * 1e3:8.0f} ({min(seconds[name]) * 1e3:.0f})")
    best = medians["put, chunks of bytes"]
    print("ratios of `put, chunks of bytes`")
    for name, median in medians.items():
        if not name.startswith("put, chunks"):
            print(f"  to {name:29}{best / median:8.2f}")
    slower = max(medians["read and sha256"], medians["bare: read, write, fsync"])
    print(f"  to max(sha256, bare)            {best / slower:8.2f}")


if __name__ == "__main__":
    main()
