"""`halfbyte serve`: an API and a page, until it is told to stop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halfbyte import env
from halfbyte.cli import flags
from halfbyte.cli.console import note
from halfbyte.cli.values import size
from halfbyte.errors import InvalidInputError, UnsupportedError

if TYPE_CHECKING:
    from halfbyte.formats.progress import Progress
    from halfbyte.llm import LLM


@click.command("serve")
@flags.MODEL
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8470, show_default=True, help="And on which."
)
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Keys that clients must show one of, a line each; so does HALFBYTE_API_KEY.",
)
@click.option("--insecure-no-key", is_flag=True, help="Be open to whoever reaches --host.")
@click.option("--allow-host", "hosts", multiple=True, help="A further name of this server.")
@click.option("--cors-origin", "origins", multiple=True, help="A page that may call it.")
@click.option("--name", help="What clients call the model (default: from MODEL).")
@click.option("--strict-model", is_flag=True, help="Refuse other names of the model.")
@click.option(
    "--parallel",
    type=click.IntRange(1, 256),
    default=4,
    show_default=True,
    help="Sequences at once; each has --context positions.",
)
@click.option(
    "--queue", type=click.IntRange(0, 4096), default=64, show_default=True, help="May wait."
)
@click.option(
    "--drain", type=click.FloatRange(0), default=30.0, show_default=True, help="Seconds to finish."
)
@click.option("--body-limit", type=size, default="1MiB", show_default=True, help="Of a request.")
@click.option("--page/--no-page", default=True, help="Serve the page, or only the API.")
@flags.TEMPLATE
@flags.LORA
@click.option("--recipe", help="Quantize an unquantized model while loading it.")
@flags.METHOD
@flags.DRAFT
@flags.CACHE
@flags.PLAN
@flags.DEVICE
@flags.CARD_LAYERS
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    host: str,
    port: int,
    api_key_file: Path | None,
    insecure_no_key: bool,
    hosts: tuple[str, ...],
    origins: tuple[str, ...],
    name: str | None,
    strict_model: bool,
    parallel: int,
    queue: int,
    drain: float,
    body_limit: int,
    page: bool,
    template: Path | None,
    loras: tuple[str, ...],
    recipe: str | None,
    method: Any,
    draft: Any,
    drafter: str,
    context: int | None,
    kv: Any,
    plan_file: Path | None,
    device: str,
    dtype: Any,
    threads: int | None,
    card_layers: int | None,
) -> None:
    """Serve MODEL to clients that speak OpenAI's or Anthropic's API, and a page to people.

    It listens on this machine only, unless --host says otherwise; then it wants keys. Ctrl-C or
    SIGTERM lets running requests finish, a second one does not.
    """
    from halfbyte.cli.adapters import named
    from halfbyte.specs import LoadOptions

    running, service, settings = _rooms()
    options = LoadOptions(
        recipe=recipe,
        method=method,
        device=device,
        dtype=dtype,
        kv=kv,
        context=context,
        threads=threads,
        draft=draft,
        drafter=drafter,
        parallel=parallel,
        spare=1,
        card_layers=card_layers,
    )
    chosen = settings.Settings(
        host=host,
        port=port,
        keys=(*_keys(api_key_file), *env.api_keys()),
        hosts=hosts,
        origins=origins,
        strict_model=strict_model,
        page=page,
        waiting=queue,
        drain_s=drain,
        body_bytes=body_limit,
    )
    settings.require_a_key(chosen, insecure=insecure_no_key)
    plan = None if plan_file is None else flags.planned(ctx, plan_file)
    adapters = named(loras if plan is None else plan.setup.adapters)
    own = flags.template_of(template)

    def make(progress: Progress) -> LLM:
        from halfbyte.llm import LLM

        return LLM(model, options, adapters=adapters, template=own, plan=plan, progress=progress)

    at_once = parallel if plan is None else plan.setup.sequences
    served = service.Service(name or _name(model), chosen, parallel=at_once)
    note(f"loading {model}")
    running.run(served, make, note)


def _rooms() -> Any:
    """The server's rooms, whose libraries are an extra."""
    try:
        from halfbyte.serve import running, service, settings
    except ImportError as error:
        raise UnsupportedError(
            f"the server needs the library {error.name}", hint="pip install 'halfbyte[serve]'"
        ) from error
    return running, service, settings


def _keys(file: Path | None) -> list[str]:
    if file is None:
        return []
    keys = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    found = [key for key in keys if key and not key.startswith("#")]
    if not found:
        raise InvalidInputError("no key in it", where=file, hint="write one per line")
    return found


def _name(model: str) -> str:
    """The name of the file or folder; of a hub's model the whole of it."""
    path = Path(model).expanduser()
    return (path.stem if path.is_file() else path.resolve().name) if path.exists() else model
