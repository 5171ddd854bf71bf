"""The group of all commands. Each is imported when it is asked for; every way to end has its exit code here."""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from registry import __version__
from registry.cli.options import CONTEXT_SETTINGS, common_options, write_examples
from registry.cli.output import escaped, is_terminal, message, silence
from registry.core.errors import Incompatible, RegistryError

EXIT_BUG = 70
EXIT_INTERRUPTED = 130
EXIT_CLOSED_PIPE = 141
"""As of a process that SIGPIPE ended: whoever sets pipefail expects this number of `registry list | head`."""

COMMANDS = {
    "init": "registry.cli.places",
    "push": "registry.cli.push",
    "adopt": "registry.cli.adopt",
    "pull": "registry.cli.pull",
    "list": "registry.cli.list",
    "show": "registry.cli.show",
    "tag": "registry.cli.tag",
    "log": "registry.cli.log",
    "check": "registry.cli.check",
    "fits": "registry.cli.fits",
    "needs": "registry.cli.needs",
    "diff": "registry.cli.diff",
    "merge": "registry.cli.merge",
    "remerge": "registry.cli.merge",
    "extract": "registry.cli.extract",
    "similarity": "registry.cli.similarity",
    "annotate": "registry.cli.annotate",
    "rm": "registry.cli.removal",
    "restore": "registry.cli.removal",
    "gc": "registry.cli.gc",
    "fsck": "registry.cli.fsck",
    "reindex": "registry.cli.reindex",
    "export": "registry.cli.export",
    "import": "registry.cli.import_",
    "upgrade": "registry.cli.places",
}
"""Module by command; in it, the command's name with `_command` behind it."""


class App(click.Group):
    """The command `registry`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(COMMANDS[cmd_name]), f"{cmd_name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            ctx.fail(f"no command {escaped(args[0])!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(
            formatter,
            ["registry init", "registry push out/ walk/perturb --tag prod", "registry pull walk/perturb:prod back/"],
        )

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs a command line and exits."""
        words = sys.argv[1:] if args is None else list(args)
        sys.exit(self._run(words, prog_name or "registry", complete_var, extra))

    def _run(self, words: list[str], prog_name: str, complete_var: str | None, extra: dict[str, Any]) -> int:
        try:
            self._main_shell_completion(extra, prog_name, complete_var)
            with self.make_context(prog_name, words, **extra) as ctx:
                self.invoke(ctx)
        except click.exceptions.Exit as end:
            return end.exit_code
        except click.ClickException as error:
            error.show()
            return error.exit_code
        except (KeyboardInterrupt, click.Abort):
            if is_terminal(sys.stderr):
                sys.stderr.write("\n")  # behind the ^C that the terminal shows
            message("registry: interrupted")
            return EXIT_INTERRUPTED
        except RegistryError as error:
            report(error)
            return error.exit_code
        except BrokenPipeError:
            silence(sys.stdout)
            return EXIT_CLOSED_PIPE
        except Exception:  # noqa: BLE001  # whatever is left is a bug, and is shown as one
            traceback.print_exc()
            message("registry: this is a bug in lora-registry; please report the lines above")
            return EXIT_BUG
        return 0


def report(error: RegistryError) -> None:
    """Writes an error to standard error: one line, and one more for each finding."""
    # An OSError would put its number before the words.
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = text.splitlines() if isinstance(error, Incompatible) else [text]
    message(f"registry: {lines[0]}" if lines else f"registry: {type(error).__name__}")
    for line in lines[1:]:
        message(line)


@click.group(name="registry", cls=App, context_settings=CONTEXT_SETTINGS)
@click.version_option(__version__, prog_name="registry", message="%(prog)s %(version)s")
@common_options
def app() -> None:
    """Keep LoRA adapters and checkpoints as immutable versions, and find them again.

    A REF is namespace/name (its latest version), namespace/name:tag, namespace/name@3, namespace/name@sha256:ab12, or
    namespace/name:tag@{2026-11-01}, the tag as it was then.

    The registry is the one that --registry names, else $REGISTRY_URL, else the nearest .registry/ from here upward,
    else the one in your data folder. Exit codes: 0 done, 1 the answer is no, 2 wrong usage, from 3 on a refusal
    (3 input, 4 not found, 5 conflict, 6 damage, 7 does not fit, 8 not allowed, 9 storage), 70 a bug.
    """
