"""`python -m pdp.train --config-name base`: trains a policy, or a LoRA on one, from a configuration in pdp/config or
in the folder of `--config-dir`. Any key can be set behind it, as hydra does: `training.num_epochs=10`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import hydra

from pdp.configuration import check_override
from registry.core.errors import RegistryError

CONFIG_FOLDER = Path(__file__).parent / "config"


def train(cfg: Any) -> dict[str, float]:
    """Trains as a configuration says; see `DiffusionPolicyWorkspace`.

    Returns:
        The newest value of each metric.
    """
    from pdp.workspace import DiffusionPolicyWorkspace  # with torch: not for --help or a misspelt key

    return DiffusionPolicyWorkspace(cfg).run()


@hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name="base")
def _run(cfg: Any) -> None:
    try:
        metrics = train(cfg)
    except RegistryError as error:
        _end(error)
    print("  ".join(f"{name} {value:.6g}" for name, value in sorted(metrics.items())))


def _end(error: RegistryError) -> Any:
    print(f"pdp.train: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def main() -> None:
    """The command. Exit codes are those of the registry's error tree; 1 and 2 are hydra's."""
    try:
        for argument in sys.argv[1:]:
            if not argument.startswith("-"):
                check_override(argument)
    except RegistryError as error:
        _end(error)
    _run()


if __name__ == "__main__":
    main()
