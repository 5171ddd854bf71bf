"""The entry point. It imports next to nothing, so that Ctrl-C is answered with one line also while the rest is still
being imported."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line of this process and exits with its code."""
    try:
        from registry.cli.app import app
    except KeyboardInterrupt:
        sys.stderr.write("registry: interrupted\n")
        sys.exit(130)
    app.main(prog_name="registry")
