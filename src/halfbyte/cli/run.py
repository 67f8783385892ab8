"""`halfbyte run`: text from a prompt or from stdin, or a chat when there is neither."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from random import SystemRandom
from typing import TYPE_CHECKING, Any

import click

from halfbyte.cli import flags
from halfbyte.cli.console import colour, document, note, progress
from halfbyte.cli.values import gib

if TYPE_CHECKING:
    from halfbyte.engine import DraftStats
    from halfbyte.llm import LLM, Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How a prompt becomes ids, and how long, with what noise and adapter to go on."""

    raw: bool
    system: str | None
    think: bool | None
    ignore_eos: bool
    max_tokens: int | None
    sampling: dict[str, float | int | None]
    adapter: str | None = None


@click.command("run")
@flags.MODEL
@click.argument("prompt", required=False)
@click.option("--raw", is_flag=True, help="Continue the text itself: one BOS and the text.")
@click.option("--system", help="The system message of the chat.")
@click.option("--think/--no-think", default=None, help="Let the model think first, or not.")
@flags.TEMPLATE
@flags.LORA
@click.option("--ignore-eos", is_flag=True, help="Go on after the model has ended its answer.")
@click.option("--stats", is_flag=True, help="Speed and memory, on stderr.")
@flags.JSON
@flags.SAMPLING
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
    prompt: str | None,
    raw: bool,
    system: str | None,
    think: bool | None,
    template: Path | None,
    loras: tuple[str, ...],
    ignore_eos: bool,
    stats: bool,
    as_json: bool,
    max_tokens: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    seed: int | None,
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
    """Generate text with MODEL.

    Without a PROMPT it is read from stdin; at a terminal a chat begins. Sampling follows the
    model's own defaults; --temperature 0 is greedy.
    """
    from halfbyte.cli.adapters import named
    from halfbyte.llm import LLM
    from halfbyte.specs import LoadOptions

    plan = None if plan_file is None else flags.planned(ctx, plan_file)
    adapters = named(loras if plan is None else plan.setup.adapters)
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
        card_layers=card_layers,
    )
    manner = Manner(
        raw=raw,
        system=system,
        think=think,
        ignore_eos=ignore_eos,
        max_tokens=max_tokens,
        sampling={
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": SystemRandom().getrandbits(32) if seed is None else seed,
        },
        adapter=next(iter(adapters), None),
    )
    if prompt is None and (as_json or not _at_terminal()):
        prompt = sys.stdin.read()
    with progress("loading") as report:
        own = flags.template_of(template)
        llm = LLM(model, options, adapters=adapters, template=own, plan=plan, progress=report)
    for remark in llm.notes:
        note(remark)
    for name, adapter in llm.adapters.items():
        if adapter.unused:
            note(f"{name}: {len(adapter.unused)} updates of parts that do not run are left aside")
    _warn_if_ungated(model)
    if think is not None and not raw and not llm.turns.can_think:
        note("this model's template has no switch for thinking: --think and --no-think do nothing")
    if prompt is None:
        from halfbyte.cli.chat import converse

        converse(llm, manner, stats=stats)
    else:
        _answer(llm, prompt, manner, stats=stats, as_json=as_json)


def _warn_if_ungated(model: str) -> None:
    """Says so when MODEL is an artefact of ours that has not passed a gate."""
    from halfbyte.formats.manifest import ungated
    from halfbyte.formats.reference import DEMO, demo_path

    path = demo_path() if model == DEMO else Path(model).expanduser()
    told = ungated(path) if path.exists() else None
    if told is not None:
        note(f"{path.name}: {told}")


def _at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _answer(llm: LLM, prompt: str, manner: Manner, *, stats: bool, as_json: bool) -> None:
    if manner.raw:
        ids = llm.raw_ids(prompt)
    else:
        messages = [{"role": "user", "content": prompt}]
        if manner.system is not None:
            messages.insert(0, {"role": "system", "content": manner.system})
        ids = llm.chat_ids(messages, think=manner.think)
    reply = begin(llm, ids, manner)
    if as_json:
        reply.finish()
        document("run", facts(llm, reply, seed=manner.sampling["seed"]))
    else:
        show(reply)
        if stats:
            note(summary(llm, reply))
    warn_if_cut(llm, reply)


def begin(llm: LLM, ids: list[int], manner: Manner) -> Reply:
    """The reply to a prompt of ids, not yet run."""
    return llm.reply(
        ids,
        sampling=llm.sampling(**manner.sampling),  # pyright: ignore[reportArgumentType]
        max_tokens=manner.max_tokens,
        ignore_eos=manner.ignore_eos,
        continues_text=manner.raw,
        adapter=manner.adapter,
    )


def show(reply: Reply) -> None:
    """Writes an answer as it comes; thoughts go dimmed to stderr, and calls, and notes."""
    thinking = False
    for piece in reply:
        if thinking and piece.kind != "thought":
            note("")
        thinking = piece.kind == "thought"
        text = click.style(piece.text, dim=True) if thinking else piece.text
        click.echo(text, nl=False, err=thinking, color=colour())
        if piece.call is not None:
            arguments = json.dumps(piece.call.arguments, ensure_ascii=False)
            note(f"-> {piece.call.name} {arguments}")
    click.echo()
    for remark in reply.answer.notes:
        note(f"({remark})")


def warn_if_cut(llm: LLM, reply: Reply, hint: str = "--context gives more") -> None:
    """Says so when the context ended the answer, and not the caller's own limit."""
    done = reply.completion
    if done is not None and done.finish_reason == "length":
        used = done.prompt_tokens + len(done.token_ids)
        if used >= llm.context:
            note(f"the context of {llm.context} tokens is full; {hint}")


def facts(llm: LLM, reply: Reply, *, seed: float | int | None) -> dict[str, Any]:
    """The fields of the JSON document."""
    done = reply.completion
    assert done is not None
    memory, answer = llm.memory, reply.answer
    return {
        "text": answer.text,
        "thought": answer.thought,
        "calls": [asdict(call) for call in answer.calls],
        "token_ids": list(done.token_ids),
        "finish_reason": done.finish_reason,
        "seed": seed,
        "adapter": reply.adapter,
        "stats": {
            "prompt_tokens": done.prompt_tokens,
            "output_tokens": len(done.token_ids),
            "prefill_s": done.prefill_s,
            "decode_s": done.decode_s,
            "decode_tokens_per_s": _rate(done.decode_tokens, done.decode_s),
            "draft": None if done.draft is None else drafted(done.draft),
            "memory": asdict(memory),
        },
    }


def drafted(draft: DraftStats) -> dict[str, Any]:
    """What drafting did, as fields of a document."""
    return {
        **asdict(draft),
        "tokens_per_round": draft.tokens_per_round,
        "speedup": draft.speedup,
    }


def summary(llm: LLM, reply: Reply) -> str:
    """One line for a person."""
    done = reply.completion
    assert done is not None
    memory = llm.memory
    prefill = _rate(done.prompt_tokens, done.prefill_s) or 0.0
    decode = _rate(done.decode_tokens, done.decode_s) or 0.0
    drafter = f", drafter {gib(memory.drafter_bytes)}" if memory.drafter_bytes else ""
    adapters = f", adapters {gib(memory.adapters_bytes)}" if memory.adapters_bytes else ""
    cards = f", on cards {gib(memory.card_bytes)}" if memory.card_bytes else ""
    return (
        f"-- prompt {done.prompt_tokens} tokens, {prefill:.0f} tokens/s"
        f" | answer {len(done.token_ids)} tokens, {decode:.1f} tokens/s ({done.finish_reason})"
        f"{'' if done.draft is None else _drafts(done.draft)}"
        f" | weights {gib(memory.weights_bytes)}{adapters}{drafter}, cache {gib(memory.kv_bytes)},"
        f" peak {gib(memory.peak_bytes)}{cards} | {llm.decoder.name} ops"
    )


def _drafts(draft: DraftStats) -> str:
    """What drafting did, for a person; nothing where there was nothing to draft."""
    rounds = draft.rounds + draft.plain_rounds
    if draft.tokens_per_round is None:
        return ""
    rates = " ".join(f"{count / draft.rounds:.0%}" for count in draft.accepted_by_position)
    gain = "" if draft.speedup is None else f", {draft.speedup:.2f}x plain decoding"
    rest = f", resting in {draft.plain_rounds / rounds:.0%} of rounds" if draft.plain_rounds else ""
    return f" | drafts {draft.tokens_per_round:.2f} tokens a round ({rates}){rest}{gain}"


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if seconds > 0 else None
