"""Checks of a model's files: what is wrong with them, here or in other programs that read them.

Some of it halfbyte mends by itself (a stop that only the template shows, a BOS too many); it is
told all the same, as a note, because the next program may not.
"""

from __future__ import annotations

from collections.abc import Iterator

from halfbyte.errors import InvalidInputError
from halfbyte.families import family_of
from halfbyte.formats.checkpoint import FILE_TYPES
from halfbyte.planner.doctor.finding import Check, Said, fault, note, ok, warning
from halfbyte.planner.doctor.model_facts import ModelFacts
from halfbyte.specs import paired_layers
from halfbyte.specs.differences import spec_differences

AGAIN = "fetch it again, or make it from the original again"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Families whose activations pass the largest number of fp16 (65504).
OVERFLOW = ("gemma3", "gemma4")


def readable(facts: ModelFacts) -> Iterator[Said]:
    """A checkpoint that cannot be read: damaged, incomplete, of an unknown kind."""
    spec = facts.spec
    if facts.refusal is not None:
        yield fault(facts.refusal.what, facts.refusal.hint or AGAIN)
    elif spec is not None:
        stored = ", ".join(f"{count} {scheme}" for scheme, count in facts.stored.items())
        yield ok(f"{spec.architecture}, {spec.parameters:,} parameters, matrices: {stored}")


def hashes(facts: ModelFacts) -> Iterator[Said]:
    """Bytes that differ from the manifest beside a model, or from the hub's hash of them."""
    if facts.integrity == "altered":
        yield fault(facts.integrity_text, AGAIN)
    elif facts.integrity == "whole":
        yield ok(facts.integrity_text)
    elif facts.integrity == "unknown":
        yield note(
            "no manifest and no hub's hash says what the bytes should be",
            "halfbyte verify ORG/NAME asks the hub; what halfbyte writes has a manifest",
        )


def quantization(facts: ModelFacts) -> Iterator[Said]:
    """A quantization that the config or the metadata names and the tensors do not have, or the
    other way round."""
    fix = "take config.json and weights from one place; " + AGAIN
    if facts.packing is not None and not facts.packed and facts.stored:
        yield warning(
            f"config.json says quantized by {facts.packing}; no tensor is packed: they are read as "
            f"they are stored ({', '.join(facts.stored)})",
            fix,
        )
    if facts.packed and facts.packing is None:
        yield fault(
            f"{facts.packed} tensors are parts of packed matrices, and config.json has no "
            "quantization_config to say how",
            fix,
        )
    stated = facts.metadata.get("general.file_type")
    said = next((name for name, number in FILE_TYPES.items() if number == stated), None)
    common = max(facts.stored, key=facts.stored.__getitem__, default=None)
    if said is not None and common is not None and said not in facts.stored:
        yield warning(
            f"the header says {said} and no matrix is stored so; most are {common}",
            "rename it, or set general.file_type; readers that trust it plan too much or too "
            "little",
        )


def native_model(facts: ModelFacts) -> Iterator[Said]:
    """A model that the native kernels cannot run, so that plain PyTorch computes on a CPU."""
    if facts.lacks is not None:
        yield warning(
            f"the native kernels cannot run {facts.lacks}; the reference op set (plain PyTorch, "
            "many times slower) runs it on a CPU",
            "a card (--device cuda)",
        )


def rope(facts: ModelFacts) -> Iterator[Said]:
    """Rope bases (of sliding and of full layers) or a scaling that are not those with which models
    of this family were published."""
    if facts.spec is None:
        return
    published = family_of(facts.spec).published(facts.spec)
    different = spec_differences(facts.spec, published, "published ones have")
    for difference in different:
        yield warning(
            difference,
            "unless it was trained so: mend rope_parameters in config.json, or " + AGAIN,
        )
    if not different:
        kinds = dict.fromkeys(
            f"{layer.attention.rope.theta:g} ({layer.attention.rope.scaling})"
            for layer in facts.spec.layers
        )
        yield ok(f"rope {', '.join(kinds)}")


def context(facts: ModelFacts) -> Iterator[Said]:
    """A context beyond the model's positions, by itself or with the drafted tokens behind it; a
    tokenizer that cuts texts before."""
    if facts.spec is None:
        return
    limit, asked = facts.spec.context, facts.context or 0
    if asked > limit:
        yield fault(
            f"a context of {asked} is beyond the model's {limit} positions",
            f"--context {limit} or less",
        )
    elif asked + facts.draft > limit:
        yield note(
            f"a context of {asked} and {facts.draft} drafts reach beyond the model's {limit} "
            "positions: here fewer are drafted at the end, elsewhere positions run out",
            f"--context {limit - facts.draft}",
        )
    else:
        yield ok(f"{limit} positions")
    longest = facts.tokenizer_config.get("model_max_length")
    if isinstance(longest, int) and longest < limit:
        yield note(
            f"the tokenizer says {longest} tokens at most, the model has {limit} positions; "
            "programs that trust the tokenizer cut texts",
            f"model_max_length {limit} in tokenizer_config.json",
        )


def stops(facts: ModelFacts) -> Iterator[Said]:
    """Tokens that end an answer in the template and that the files do not list as stops: other
    programs go on and on."""
    text = facts.text
    if text is None:
        return
    lost = {i: token for i, token in text.template_stops.items() if i not in text.stated_stops}
    if lost:
        named = ", ".join(f"{i} {token!r}" for i, token in lost.items())
        ids = sorted({*text.stated_stops, *lost})
        yield warning(
            f"the template ends answers with {named}; the files do not list it. halfbyte stops "
            "there, others may not",
            f'"eos_token_id": {ids} in generation_config.json',
        )
    elif not text.stated_stops:
        yield warning(
            "no token ends an answer: it goes on to the end of the context",
            "eos_token_id in generation_config.json",
        )
    else:
        yield ok("stops " + ", ".join(f"{i} {t!r}" for i, t in text.stated_stops.items()))


def bos(facts: ModelFacts) -> Iterator[Said]:
    """A beginning of text that is missing, or that both tokenizer and template write."""
    text = facts.text
    if text is None:
        return
    if text.needs_bos and text.bos is None:
        yield warning("this kind of model needs a BOS and none is named", "bos_token_id")
    elif text.needs_bos and not text.adds_bos and not text.template_bos:
        yield warning(
            "neither tokenizer nor template begin a text with BOS: answers are degraded",
            "add_bos_token in tokenizer_config.json, or tokenizer.ggml.add_bos_token in a GGUF",
        )
    elif text.adds_bos and text.says_bos is False:
        yield note(
            f"the files say that no {text.bos!r} is put before a text; without it this model "
            "degrades. halfbyte puts one"
            + (", and so does the template" if text.template_bos else ""),
            "elsewhere: put it before texts that do not go through the template",
        )
    elif text.says_bos and text.template_bos:
        yield note(
            f"tokenizer and template both write {text.bos!r}. halfbyte keeps one, others may put "
            "two",
            "elsewhere, encode the rendered template without special tokens being added",
        )
    else:
        yield ok(f"BOS {text.bos!r}, once" if text.bos else "no BOS, and none is needed")


def special_tokens(facts: ModelFacts) -> Iterator[Said]:
    """Tokens that divide an answer (thoughts, tool calls, quotes) and that programs lose which
    decode with skip_special_tokens; and an end of turn that is no control token."""
    text = facts.text
    if text is None:
        return
    if text.closing and not text.closing_is_token:
        yield warning(
            f"the template ends an answer with {text.closing!r}, which is no control token of this "
            "vocabulary: it is shown as text, and answers go on",
            'make it one ("special": true in tokenizer.json), or take the template of this model',
        )
    if text.marks:
        yield note(
            f"{', '.join(text.marks)} are control tokens: decoding with skip_special_tokens loses "
            "them, and with them thoughts and tool calls. halfbyte reads ids",
            "elsewhere: skip_special_tokens=False, or a parser of ids",
        )


def dtype(facts: ModelFacts) -> Iterator[Said]:
    """fp16 where activations pass 65504, its largest number (Gemma): NaN, or the same token
    without end."""
    if facts.spec is None or facts.spec.family not in OVERFLOW:
        return
    text = facts.config.get("text_config") or {}
    stated = [t.get(key) for t in (facts.config, text) for key in ("dtype", "torch_dtype")]
    halves = facts.stored.get("f16", 0) > sum(facts.stored.values()) / 2
    if "float16" in stated or halves:
        where = "config.json asks for float16" if "float16" in stated else "matrices are f16"
        yield warning(
            f"{where}: programs that compute in it overflow on {facts.spec.family}. halfbyte "
            "computes in f32, bf16 or int8",
            '"dtype": "bfloat16" in config.json, or weights in bf16; --dtype bf16 elsewhere',
        )
    else:
        yield ok("no fp16, in which Gemma overflows")


def drafter(facts: ModelFacts) -> Iterator[Said]:
    """A drafter beside the model that was made for another, or cannot be read."""
    found = facts.drafter
    if found is None:
        return
    fix = "take the drafter that was made for this model, or --draft off"
    if found.refusal is not None:
        yield warning(f"{found.name}: {found.refusal.what}", found.refusal.hint or fix)
    elif found.made_for is not None and found.made_for != found.target:
        yield warning(
            f"{found.name} was trained for {found.made_for[:8]}; this model is "
            f"{(found.target or 'unknown')[:8]}",
            fix,
        )
    elif found.spec is not None and facts.spec is not None:
        try:
            paired_layers(found.spec, facts.spec)
        except InvalidInputError as error:
            yield warning(f"{found.name}: {error.what}", error.hint or fix)
        else:
            yield ok(f"drafter {found.name}")


def remote_code(facts: ModelFacts) -> Iterator[Said]:
    """Files that ask to be run: auto_map, Python beside the weights, pickles. halfbyte runs none
    of them."""
    mapped = [
        name
        for name, table in (
            ("config.json", facts.config),
            ("tokenizer_config.json", facts.tokenizer_config),
        )
        if table.get("auto_map")
    ]
    code = [name for name in facts.files if name.endswith(".py")]
    pickles = [name for name in facts.files if name.endswith(PICKLES)]
    if mapped or code:
        what = ", ".join([*(f"auto_map in {name}" for name in mapped), *code])
        yield note(
            f"asks for code of its own to be run ({what}); halfbyte runs none",
            "elsewhere: leave trust_remote_code off unless you have read it",
        )
    if pickles:
        yield note(
            f"pickles ({', '.join(pickles)}) can run code when they are opened; halfbyte opens "
            "none",
            "elsewhere: load the .safetensors files",
        )


def text_assets(facts: ModelFacts) -> Iterator[Said]:
    """A tokenizer or a template that is missing or cannot be read."""
    if facts.text_refusal is not None:
        yield fault(facts.text_refusal.what, facts.text_refusal.hint or AGAIN)
    elif facts.text is None and facts.spec is not None and facts.spec.drafter is None:
        yield fault("there is no tokenizer", "put tokenizer.json beside the weights")


CHECKS: tuple[Check[ModelFacts], ...] = (
    readable,
    hashes,
    quantization,
    native_model,
    rope,
    context,
    text_assets,
    stops,
    bos,
    special_tokens,
    dtype,
    drafter,
    remote_code,
)
