"""How things on disk are called here: from the path of a checkpoint to the run that it is of, its place in that run,
and a `namespace/name` that is short, allowed, and the same whenever it is asked for."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from registry.core.reference import MAX_PART

_SEPARATOR = r"[-_. ]"
_STEP = re.compile(
    rf"(?:^|{_SEPARATOR})(?:checkpoint|ckpt|global[-_]?step|steps?|iter|iteration)[-_=]?(\d{{1,12}})(?=$|{_SEPARATOR})",
    re.IGNORECASE,
)
_EPOCH = re.compile(rf"(?:^|{_SEPARATOR})(?:epoch|ep)[-_=]?(\d{{1,9}})(?=$|{_SEPARATOR})", re.IGNORECASE)
_MEASURED = re.compile(rf"(?:^|{_SEPARATOR})[A-Za-z_]\w*=[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?=$|{_SEPARATOR})")
"""`val_loss=0.12`, as Lightning writes it behind an epoch."""
_END = re.compile(rf"(?:^|{_SEPARATOR})(?:final|last|latest|end)$", re.IGNORECASE)
_NO_NAME = frozenset(
    {
        *("checkpoint", "checkpoints", "ckpt", "ckpts", "lightning_logs"),
        *("adapter_model", "diffusion_pytorch_model", "model", "pytorch_model"),
    }
)
"""Folders and files that a library calls so, whatever is in them."""
_SAYS_LITTLE = re.compile(
    r"(?:adapters?|loras?|best|default|outputs?|weights|models?|results?|(?:v|version|seed|run|trial|fold|exp)?[-_]?\d+)",
    re.IGNORECASE,
)
"""What is not enough as a name: it gets the folder around it in front."""


@dataclass(frozen=True)
class RunPlace:
    """Where something stands in a run.

    Attributes:
        run: parts of the path that say which run; empty where the path says nothing but the step.
        step, epoch: as the path says.
        is_end: it is what came out at the end, by its name.
    """

    run: tuple[str, ...]
    step: int | None = None
    epoch: int | None = None
    is_end: bool = False

    @property
    def order(self) -> tuple[bool, int, int]:
        """Ascending in the course of a run; what has neither step nor epoch comes at the end."""
        unnumbered = self.step is None and self.epoch is None
        return (self.is_end or unnumbered, self.step or 0, self.epoch or 0)


def run_place(parts: Sequence[str]) -> RunPlace:
    """Reads the parts of a relative path; of a file the last part comes without its suffix.

    >>> run_place(("runs", "walk", "checkpoint-500"))
    RunPlace(run=('runs', 'walk'), step=500, epoch=None, is_end=False)
    >>> run_place(("walk", "checkpoints", "epoch=3-step=500"))
    RunPlace(run=('walk',), step=500, epoch=3, is_end=False)
    >>> run_place(("walk_final",))
    RunPlace(run=('walk',), step=None, epoch=None, is_end=True)
    """
    run: list[str] = []
    step = epoch = None
    is_end = False
    for part in parts:
        rest = part
        steps, epochs = _STEP.findall(rest), _EPOCH.findall(rest)
        if steps or epochs:
            # What is further inside is more exact: a step replaces that of a folder around it.
            step, epoch = (int(steps[-1]) if steps else None), (int(epochs[-1]) if epochs else None)
            rest = _MEASURED.sub("", _EPOCH.sub("", _STEP.sub("", rest)))
        if ended := _END.search(rest):
            is_end, rest = True, rest[: ended.start()]
        if rest.strip("-_. =") and rest.lower() not in _NO_NAME:
            run.append(rest)
    return RunPlace(tuple(run), step, epoch, is_end)


def says_something(part: str) -> bool:
    """Whether a part of a path tells its thing from others: `walk` does, `model` and `checkpoint-500` do not."""
    run = run_place((part,)).run
    return bool(run) and not _SAYS_LITTLE.fullmatch(run[0])


def slug(text: str) -> str:
    """The text as a namespace or a name may be spelled; other scripts than Latin become a short hash.

    >>> slug("My Wälk (v2)")
    'my-walk-v2'
    """
    plain = unicodedata.normalize("NFKD", text).casefold().encode("ascii", "ignore").decode("ascii")
    allowed = re.sub(r"[^a-z0-9._-]+", "-", plain)
    allowed = re.sub(r"\.{2,}", ".", re.sub(r"-{2,}", "-", allowed)).strip("._-")
    lost = sum(one.isalpha() and not unicodedata.normalize("NFKD", one).casefold()[:1].isascii() for one in text)
    if not allowed or lost:
        allowed = f"{allowed}-{_short_hash(text)}" if allowed else f"unnamed-{_short_hash(text)}"
    if len(allowed) > MAX_PART:
        allowed = f"{allowed[: MAX_PART - 9].strip('._-')}-{_short_hash(text)}"
    return allowed


def choose_names(
    runs: Iterable[tuple[str, ...]],
    *,
    default: str,
    given: Mapping[tuple[str, ...], str] | None = None,
    taken: Collection[str] = (),
) -> dict[tuple[str, ...], str]:
    """A name for each run: the last part of its path that says something, with the parts before it where two runs would
    share a name. The answer does not depend on the order of the runs.

    Args:
        default: where a path says nothing.
        given: names that runs have already; they keep them.
        taken: names that belong to something else.
    """
    names = dict(given or {})
    wanted = sorted(set(runs) - names.keys())
    blocked = {*taken, *names.values()}
    length = {run: _least(run) for run in wanted}
    while True:
        chosen: dict[str, list[tuple[str, ...]]] = {}
        for run in wanted:
            chosen.setdefault(_joined(run, length[run], default), []).append(run)
        clashes = [run for name, same in chosen.items() if len(same) > 1 or name in blocked for run in same]
        longer = [run for run in clashes if length[run] < len(run)]
        if not longer:
            break
        for run in longer:
            length[run] += 1
    for name, same in chosen.items():
        for run in same:
            unique = len(same) == 1 and name not in blocked
            names[run] = name if unique else f"{name[: MAX_PART - 9].strip('._-')}-{_short_hash('/'.join(run))}"
    return names


def _least(run: tuple[str, ...]) -> int:
    """How many of the last parts are needed at least."""
    for count in range(1, len(run) + 1):
        if not _SAYS_LITTLE.fullmatch(run[-count]):
            return count
    return len(run)


def _joined(run: tuple[str, ...], count: int, default: str) -> str:
    return slug("-".join(map(slug, run[len(run) - count :]))) if run else default


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
