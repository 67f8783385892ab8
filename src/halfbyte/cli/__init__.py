"""The command line: flags in, one call, one document out.

A verb is a file; it is imported when it is chosen, so that `halfbyte --help` stays instant and
torch is loaded only by verbs that compute. stdout carries data (with `--json` exactly one
document), stderr talks. Errors are one or two lines; a traceback only with `--debug`.
"""

from __future__ import annotations

import importlib
import sys
import traceback

import click

from halfbyte import __version__
from halfbyte.cli.console import complain
from halfbyte.errors import HalfbyteError, OutOfMemoryError

# verb -> (module, what it does in one line)
VERBS: dict[str, tuple[str, str]] = {
    "plan": ("plan", "What a model takes, what fits, and what to type next."),
    "fill": ("fill", "Prove a plan: fill the context and measure."),
    "doctor": ("doctor", "What is wrong with this machine or a model, and what to do."),
    "top": ("top", "Live memory of what runs, beside its plan."),
    "inspect": ("inspect", "What a model is: spec, tensors, schemes, template, stop ids."),
    "run": ("run", "Generate text: one shot, from stdin, or a chat."),
    "serve": ("serve", "An API that clients know, and a page to look at."),
    "quantize": ("quantize", "Make a smaller model on the grid that ships."),
    "distill": ("distill", "Train a quantized model to predict as its original does."),
    "draft": ("drafter", "Train a drafter for a model; measure what drafting gains."),
    "eval": ("evaluate", "Measure perplexity, and KL and top-1 against a reference."),
    "compare": ("compare", "Before and after in one table: memory, speed, fidelity."),
    "bench": ("bench", "Time a model: prompts, tokens, memory."),
    "export": ("export", "Write a model in another format."),
    "pull": ("pull", "Fetch a model from a hub, checked by hash."),
    "verify": ("verify", "Hash a model against its manifest or the hub."),
}


class Verbs(click.Group):
    """Lists every verb without importing one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"halfbyte.cli.{VERBS[cmd_name][0]}")
        return module.command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(verb, text) for verb, (_, text) in VERBS.items()])


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="halfbyte")
def cli() -> None:
    """A language model in half a byte per weight, proved to behave like the original.

    MODEL is a directory, a .gguf file, a hub id (org/name, or org/name:Q4_0 for one file), or
    "demo", the small model that comes with the package.

    \b
    Exit codes: 0 ok, 1 failed, 2 usage, 3 does not fit, 4 integrity, 5 network or access,
    6 out of memory, 7 gate missed, 130 interrupted.
    """


def main() -> None:
    """The entry point: runs a verb and turns errors into text and an exit code."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        code = cli.main(args=arguments, prog_name="halfbyte", standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(_interrupted())
    except KeyboardInterrupt:
        sys.exit(_interrupted())
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        if debug:
            traceback.print_exc()
        sys.exit(_report(error, debug=debug))
    sys.exit(code if isinstance(code, int) else 0)  # what a verb gave to its context's `exit`


def _interrupted() -> int:
    click.echo("interrupted", err=True)
    return 130


def _report(error: Exception, *, debug: bool) -> int:
    known = _translated(error)
    if known is not None:
        complain(known)
        return known.exit_code
    if not debug:
        click.echo(f"internal error: {type(error).__name__}: {error}", err=True)
        click.echo("  hint: run it again with --debug for the traceback", err=True)
    return 1


def _translated(error: Exception) -> HalfbyteError | None:
    if isinstance(error, HalfbyteError):
        return error
    # torch reports a failed allocation as a RuntimeError of its own kind, by name or by text.
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return OutOfMemoryError(str(error) or "an allocation failed", hint="a smaller --context")
    if isinstance(error, OSError):
        name = None if error.filename is None else str(error.filename)
        return HalfbyteError(error.strerror or str(error), where=name)
    return None
