"""Where an artifact on disk came from, as far as its path tells: it is all that is kept of an external base's bytes."""

from __future__ import annotations

import re
from pathlib import Path

_SNAPSHOT = re.compile(r"models--(?P<id>[\w.-]+(?:--[\w.-]+)?)")


def origin_of(path: Path) -> dict[str, str]:
    """`path`, absolute, and where it lies in a Hugging Face hub cache (`models--ORG--NAME/snapshots/REVISION/...`) also
    `hub_id` and `revision`. Text that is not UTF-8 is replaced."""
    absolute = path.absolute()
    origin = {"path": str(absolute).encode("utf-8", "replace").decode("utf-8")}
    parts = absolute.parts
    for place, part in enumerate(parts[:-2]):
        found = _SNAPSHOT.fullmatch(part)
        if found and parts[place + 1] == "snapshots":
            origin["hub_id"] = found["id"].replace("--", "/", 1)
            origin["revision"] = parts[place + 2]
    return origin
