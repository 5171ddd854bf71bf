"""`python -m pdp.train --config-name base`: trains a policy, or a LoRA on one, from a configuration in pdp/config or
in the folder of `--config-dir`. Any key can be set behind it, as hydra does: `training.num_epochs=10`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.config_store import ConfigStore

from pdp.configuration import Config, check_override
from registry.core.errors import RegistryError

if TYPE_CHECKING:
    from pdp.workspace import DiffusionPolicyWorkspace

CONFIG_FOLDER = Path(__file__).parent / "config"
# Configurations begin with every key that there is, so that each can be set on the command line.
ConfigStore.instance().store(name="every_key", node=Config)


def train(cfg: Any) -> DiffusionPolicyWorkspace:
    """Trains as a configuration says.

    Returns:
        The run, at its end.
    """
    from pdp.workspace import DiffusionPolicyWorkspace  # with torch: not for --help or a misspelt key

    workspace = DiffusionPolicyWorkspace(cfg)
    workspace.run()
    return workspace


@hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name="base")
def _run(cfg: Any) -> None:
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        workspace = train(cfg)
    except RegistryError as error:
        _end(error)
    print("  ".join(f"{name} {value:.6g}" for name, value in sorted(workspace.metrics.items())))
    print(f"saved {workspace.get_checkpoint_path()}")
    for reference in workspace.pushed:
        print(f"pushed {reference}")


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
