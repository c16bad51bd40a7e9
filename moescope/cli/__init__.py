"""The command line: a face without logic of its own. Heavy imports happen inside the commands that need them."""

from __future__ import annotations

import sys

import typer

from moescope.cli import (
    captures,
    editing,
    exploring,
    importance,
    models,
    rerouting,
    steering,
    stores,
    tracing,
    unlearning,
)
from moescope.cli.screen import fail
from moescope.errors import MoescopeError

app = typer.Typer(
    name="moescope",
    help="Look inside Mixture-of-Experts language models: capture their routing, analyse it, say what was found.",
    epilog="Start with `moescope demo`. Every command has --help with examples; --json prints for machines.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich's help costs 0.1 s at every start; tables and progress bars still use rich
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=captures.DEMO_EXAMPLES)(captures.demo)
app.command(epilog=captures.CAPTURE_EXAMPLES)(captures.capture)
app.command("models")(models.list_models)
app.command(epilog=models.INSPECT_EXAMPLES)(models.inspect)
app.command(epilog=models.DOCTOR_EXAMPLES)(models.doctor)
app.command(epilog=stores.INFO_EXAMPLES)(stores.info)
app.command(epilog=stores.CHECK_EXAMPLES)(stores.check)
app.command(epilog=stores.PREPARE_EXAMPLES)(stores.prepare)
app.command(
    epilog=stores.ANALYZE_EXAMPLES,
    # --help belongs to the analysis that is named; see moescope.cli.analyze
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)(stores.analyze)
app.command(epilog=stores.REPORT_EXAMPLES)(stores.report)
app.command(epilog=stores.ATLAS_EXAMPLES)(stores.atlas)
app.command(epilog=stores.EXPERT_EXAMPLES)(stores.expert)
app.command("app", epilog=exploring.APP_EXAMPLES)(exploring.app)
app.command(epilog=editing.GENERATE_EXAMPLES)(editing.generate)
app.command(epilog=rerouting.REROUTE_EXAMPLES)(rerouting.reroute)
app.command(epilog=steering.STEER_EXAMPLES)(steering.steer)
app.command(epilog=tracing.TRACE_EXAMPLES)(tracing.trace)
app.command(epilog=importance.IMPORTANCE_EXAMPLES)(importance.importance)
app.command("super-experts", epilog=importance.SUPER_EXAMPLES)(importance.super_experts)
app.command(epilog=unlearning.UNLEARN_EXAMPLES)(unlearning.unlearn)
app.command(epilog=editing.APPLY_EXAMPLES)(editing.apply)


def main() -> None:
    """Entry point: a person's mistake ends in one sentence and exit code 2, never in a stack trace."""
    try:
        app()
    except MoescopeError as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as in `moescope … | head`
        sys.stderr.close()
        sys.exit(1)
