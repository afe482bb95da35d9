"""The command ``moepipe``. This file only assembles it and turns errors into text and exit codes.

Commands live in ``cli_*.py``; they import what they need inside their bodies, so that ``moepipe --help`` and shell
completion stay instant. Exit codes: 0 ok, 1 run failed, 2 usage or spec, 3 infeasible, 4 not found, 5 environment,
6 data or checkpoint, 7 busy, 8 promotion gate, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moe.errors import MoepipeError
from orchestrator import (
    cli_checkpoint,
    cli_cluster,
    cli_compare,
    cli_data,
    cli_domainbed,
    cli_promote,
    cli_read,
    cli_run,
    cli_serve,
    cli_tools,
)
from orchestrator.cli_options import JSON_KEY


class Root(TyperGroup):
    """The one place where exceptions end: people get a panel, programs an exit code, bugs a crash log."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command and translate what it raises."""
        from orchestrator import console

        try:
            return super().invoke(ctx)
        except MoepipeError as error:
            raise typer.Exit(console.show_error(error, as_json=bool(ctx.meta.get(JSON_KEY)))) from None
        except KeyboardInterrupt:
            console.note("Interrupted.")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # `moepipe runs | head` closes the pipe early; there is nobody left to tell.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(128 + signal.SIGPIPE) from None
        except Exception as error:
            if type(error).__module__.split(".")[0] in ("typer", "click"):
                raise
            raise typer.Exit(console.show_crash(error)) from None


app = typer.Typer(
    name="moepipe",
    cls=Root,
    help="Pipelines for mixture-of-experts models under domain shift: train experts, distil, evaluate, track.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Start with: moepipe doctor, then moepipe submit pipelines/demo/meta_dmoe.yaml",
)


@app.callback()
def options(
    no_color: Annotated[bool, typer.Option("--no-color", help="Plain text; NO_COLOR=1 does the same.")] = False,
) -> None:
    """Pipelines for mixture-of-experts models under domain shift: train experts, distil, evaluate, track."""
    if no_color:
        os.environ["NO_COLOR"] = "1"


PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Run": (cli_run.submit, cli_run.plan, cli_run.validate, cli_run.resume, cli_run.cancel),
    "Look": (cli_read.status, cli_read.logs, cli_read.runs, cli_read.show, cli_compare.compare, cli_compare.cite),
    "Serve": (cli_promote.promote, cli_serve.serve, cli_serve.adapt, cli_serve.predict),
    "Write a pipeline": (cli_tools.init, cli_read.ls, cli_read.explain, cli_read.schema),
    "House-keeping": (cli_tools.doctor, cli_tools.ui, cli_tools.gc, cli_tools.version),
}
for panel, commands in PANELS.items():
    for function in commands:
        app.command(rich_help_panel=panel)(function)
app.add_typer(cli_cluster.app, name="cluster", rich_help_panel="Run")
app.add_typer(cli_data.app, name="data", rich_help_panel="House-keeping")
app.add_typer(cli_domainbed.app, name="domainbed", rich_help_panel="Look")
app.add_typer(cli_checkpoint.app, name="checkpoint", rich_help_panel="House-keeping")
app.add_typer(cli_tools.track, name="track", rich_help_panel="House-keeping")


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="moepipe")


if __name__ == "__main__":
    main()
