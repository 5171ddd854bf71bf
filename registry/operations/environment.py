"""What is captured by itself at a push: library versions and the state of the git checkout. Packages
are asked for their version through their metadata, so nothing heavy is imported."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

GIT_SECONDS = 10.0


@dataclass(frozen=True)
class Environment:
    """Versions are None where the package is not installed, the git fields where there is no checkout."""

    python_version: str
    torch_version: str | None
    peft_version: str | None
    transformers_version: str | None
    platform: str
    git_commit: str | None
    git_dirty: bool | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def capture() -> Environment:
    """The environment of this process and the git checkout of its working folder."""
    commit, dirty = git_state()
    return Environment(
        python_version=platform.python_version(),
        torch_version=_version("torch"),
        peft_version=_version("peft"),
        transformers_version=_version("transformers"),
        platform=f"{platform.system()} {platform.machine()}",
        git_commit=commit,
        git_dirty=dirty,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_state() -> tuple[str | None, bool | None]:
    """Commit of the checkout that holds the working folder, and whether tracked files differ from it."""
    commit = _git("rev-parse", "--verify", "HEAD")
    if commit is None:
        return None, None
    status = _git("status", "--porcelain", "--untracked-files=no")
    return commit.strip(), None if status is None else bool(status.strip())


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        # No git, or a checkout too slow to ask: the fields say "unknown", which is what they mean.
        return None
    return done.stdout if done.returncode == 0 else None
