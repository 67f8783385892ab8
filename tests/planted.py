"""A healthy machine and a healthy model, and a fault planted for every check of the doctor.

    PYTHONPATH=src:tests python -m planted

writes the tables of docs/doctor.md anew: what each check looks for is its docstring, what it says
and what to do is what it says of the fault planted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from published import PUBLISHED

from halfbyte.families import spec_of
from halfbyte.planner.doctor import machine, model
from halfbyte.planner.doctor.facts import (
    GIB,
    Card,
    CardProcess,
    Disk,
    Driver,
    Graphics,
    Hub,
    MachineFacts,
    Memory,
    Native,
    Processor,
    Torch,
)
from halfbyte.planner.doctor.finding import Finding, Severity, examine, name_of
from halfbyte.planner.doctor.model_facts import Drafter, ModelFacts, Refusal, Text
from halfbyte.specs import ModelSpec, RopeSpec

PAGE = Path(__file__).resolve().parents[1] / "docs" / "doctor.md"
ZEN4 = "avx2 fma f16c avx512_vnni avx512bw avx512vl avx512dq"
CARD = Card(
    index=0,
    name="NVIDIA GeForce RTX 3060",
    memory=12 * GIB,
    used=GIB // 4,
    capability=(8, 6),
    lanes=16,
    lanes_possible=16,
)
DRIVER = Driver(version="570.133.07", cuda=(12, 8))
TORCH = Torch(
    version="2.13.0+cu128",
    cuda="12.8",
    cudnn="9.10.2.21",
    architectures=("sm_75", "sm_80", "sm_86", "sm_90", "sm_120"),
)
# A desktop with a card, nothing wrong with it.
MACHINE = MachineFacts(
    python="3.12.4",
    system="Linux 6.8.0 x86_64",
    processor=Processor(
        name="AMD Ryzen 7 7700X", flags=frozenset(ZEN4.split()), present=16, usable=16
    ),
    memory=Memory(total=32 * GIB, available=24 * GIB, swap_total=8 * GIB, swap_free=8 * GIB),
    native=Native(refusal=None, runs=("avx512-vnni", "avx2")),
    packages={
        "torch": "2.13.0+cu128",
        "numpy": "2.4.6",
        "transformers": "5.22.2",
        "nvidia-cudnn-cu12": "9.10.2.21",
    },
    required={"torch": "2.11", "numpy": "1.26"},
    torch=TORCH,
    compiler="g++ 13.2.0",
    disks=(Disk(role="downloads", path="/home/jane/.cache/huggingface/hub", free=200 * GIB),),
    bandwidth=55e9,
    graphics=Graphics(
        boards=1, modules=frozenset({"nvidia"}), driver=DRIVER, cards=(CARD,), refusal=None
    ),
    hub=Hub(path="/home/jane/.cache/huggingface/hub", files=12),
)


def spec(name: str) -> ModelSpec:
    return spec_of(PUBLISHED[name][0])


# Gemma 4 12B as it was published, with a manifest and its own drafter.
MODEL = ModelFacts(
    name="gemma-4-12b-it",
    spec=spec("gemma4-12b"),
    integrity="whole",
    integrity_text="5 files as the manifest says",
    config={"model_type": "gemma4_unified", "dtype": "bfloat16"},
    tokenizer_config={"model_max_length": 262144},
    files=("config.json", "model.safetensors", "tokenizer.json"),
    stored={"bf16": 400},
    text=Text(
        kind="gemma4",
        bos="<bos>",
        says_bos=None,
        adds_bos=True,
        needs_bos=True,
        template_bos=True,
        stated_stops={1: "<eos>", 50: "<|tool_response>", 106: "<turn|>"},
        closing="<turn|>",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A fault: the facts that have it, how grave it is, and a part of what must be said."""

    facts: Any
    severity: Severity
    says: str


def _machine(severity: Severity, says: str, **changed: Any) -> Planted:
    return Planted(facts=replace(MACHINE, **changed), severity=severity, says=says)


def _graphics(severity: Severity, says: str, **changed: Any) -> Planted:
    return _machine(severity, says, graphics=replace(MACHINE.graphics, **changed))


def _card(severity: Severity, says: str, *, wsl: bool = False, **changed: Any) -> Planted:
    graphics = replace(MACHINE.graphics, cards=(replace(CARD, **changed),), scheduling=wsl)
    return _machine(severity, says, graphics=graphics, wsl=wsl)


def _torch(severity: Severity, says: str, **changed: Any) -> Planted:
    return _machine(severity, says, torch=replace(TORCH, **changed))


def _memory(severity: Severity, says: str, **changed: Any) -> Planted:
    return _machine(severity, says, memory=replace(MACHINE.memory, **changed))


def _disk(severity: Severity, says: str, **changed: Any) -> Planted:
    return _machine(severity, says, disks=(replace(MACHINE.disks[0], **changed),))


def _hub(severity: Severity, says: str, **changed: Any) -> Planted:
    return _machine(severity, says, hub=replace(MACHINE.hub, **changed))


def _processor(severity: Severity, says: str, *, runs: tuple[str, ...], **changed: Any) -> Planted:
    processor = replace(MACHINE.processor, **changed)
    return _machine(severity, says, processor=processor, native=Native(refusal=None, runs=runs))


def _packages(severity: Severity, says: str, **changed: str | None) -> Planted:
    return _machine(severity, says, packages={**MACHINE.packages, **changed})


NO_CARD: dict[str, Any] = {"cards": (), "driver": None}
DESKTOP = CardProcess(pid=1123, name="Xorg", bytes=GIB)
MACHINE_FAULTS: dict[str, list[Planted]] = {
    "python-version": [
        _machine("fault", "Python 3.10.12", python="3.10.12"),
        _machine("fault", "3.11 to 3.13", python="3.14.0rc1"),
    ],
    "packages": [
        _packages("fault", "numpy is not installed", numpy=None),
        _packages("warning", "torch is not installed; GGUF files run", torch=None),
        _packages("warning", "torch 2.9.1 is too old", torch="2.9.1"),
        _machine(
            "fault",
            "torch is not installed",
            packages={**MACHINE.packages, "torch": None},
            native=Native(refusal="they were not built"),
        ),
    ],
    "known-faults": [
        _packages("warning", "cannot build Gemma 4's drafters", transformers="5.23.0"),
        _packages("warning", "fish", click="8.4.1"),
    ],
    "native-kernels": [
        _machine(
            "warning",
            "they were not built; the reference op set",
            native=Native(refusal="they were not built"),
        ),
        _processor(
            "warning",
            "not avx2: the processor has no avx2, fma, f16c",
            runs=(),
            flags=frozenset({"sse2"}),
        ),
        _processor("warning", "x86-64, this is aarch64", runs=(), machine="aarch64"),
        _processor(
            "ok",
            "not avx512-vnni: the processor has no avx512_vnni",
            runs=("avx2",),
            flags=frozenset({"avx2", "fma", "f16c"}),
        ),
        _processor("ok", "the processor has it, the build does not", runs=("avx2",)),
    ],
    "compiler": [
        _machine("note", "no C++ compiler", compiler=None),
        _machine("note", "headers are missing", headers=False),
    ],
    "processors": [
        _processor("note", "4 of 16 processors", runs=("avx512-vnni",), usable=4),
    ],
    "memory-speed": [_machine("warning", "memory reads 6.0 GB/s", bandwidth=6e9)],
    "free-memory": [_memory("warning", "0.5 GiB of 32.0 GiB", available=GIB // 2)],
    "swap": [_memory("warning", "6.0 GiB are swapped out", swap_free=2 * GIB)],
    "container": [_memory("note", "the container allows 8.0 GiB of 32.0", limit=8 * GIB)],
    "disks": [
        _disk("fault", "is full: 0.1 GiB", free=GIB // 10),
        _disk("warning", "cannot be written", writable=False),
        _disk("warning", "has 2.0 GiB free", free=2 * GIB),
        _disk("warning", "lies on 9p", filesystem="9p"),
    ],
    "hub-cache": [
        _hub("note", "6.0 GiB of unfinished downloads", unfinished=6 * GIB),
        _hub("note", "HF_HUB_OFFLINE is set", offline=True),
    ],
    "nouveau": [_graphics("fault", "nouveau holds", modules=frozenset({"nouveau"}), **NO_CARD)],
    "driver": [
        _graphics("fault", "no driver for it", modules=frozenset(), **NO_CARD),
        _graphics(
            "fault", "Driver/library version", refusal="Driver/library version mismatch", **NO_CARD
        ),
    ],
    "torch-cuda": [
        _torch("warning", "CPU build", version="2.13.0+cpu", cuda=None),
        _torch("fault", "CUDA error", refusal="CUDA error: unknown error"),
    ],
    "driver-cuda": [
        _torch("fault", "nothing runs on the card", cuda="13.0"),
        _graphics("warning", "unsupported toolchain", driver=replace(DRIVER, cuda=(12, 4))),
    ],
    "card-architecture": [
        _card("fault", "compute capability 6.1", capability=(6, 1)),
        _torch("fault", "built for sm_90a", architectures=("sm_90a",)),
    ],
    "cudnn": [
        _machine(
            "fault",
            "puts cuDNN 8.9.7 (/opt/cuda/lib64/libcudnn.so) before PyTorch's 9.10.2",
            cudnn_files={"/opt/cuda/lib64/libcudnn.so": "8.9.7"},
        ),
        _packages("warning", "wants 9.10.2.21", **{"nvidia-cudnn-cu12": "9.1.0.70"}),
    ],
    "pcie-width": [_card("warning", "4 of 16 PCIe lanes", lanes=4)],
    "card-processes": [
        _card("warning", "1.0 GiB of card 0", processes=(DESKTOP,)),
        _card(
            "warning",
            "an unknown part of",
            used=3 * GIB,
            processes=(replace(DESKTOP, bytes=None),),
        ),
    ],
    "gpu-scheduling": [_card("note", "schedules the card in hardware", wsl=True)],
    "memory-spill": [
        _card("warning", "is full (11.5 GiB of 12.0", wsl=True, used=23 * GIB // 2),
        _card("note", "spills instead of failing", wsl=True),
    ],
}


def _model(severity: Severity, says: str, **changed: Any) -> Planted:
    return Planted(facts=replace(MODEL, **changed), severity=severity, says=says)


def _text(severity: Severity, says: str, **changed: Any) -> Planted:
    return _model(severity, says, text=replace(MODEL.text, **changed))


def with_rope(model: ModelSpec, *, sliding: bool, rope: RopeSpec) -> ModelSpec:
    """The model with another rope on the sliding layers, or on the others."""
    layers = tuple(
        replace(layer, attention=replace(layer.attention, rope=rope))
        if (layer.attention.window is not None) == sliding
        else layer
        for layer in model.layers
    )
    return replace(model, layers=layers)


def _drafter(severity: Severity, says: str, **changed: Any) -> Planted:
    return _model(severity, says, drafter=Drafter(name="drafter.gguf", **changed))


LLAMA = spec("llama-3.2-1b")
ONE_SCALE = RopeSpec(theta=10000.0, divisors=(8.0,) * 128, scaling="linear, factor 8")
MODEL_FAULTS: dict[str, list[Planted]] = {
    "readable": [
        _model(
            "fault",
            "2 tensors are missing",
            spec=None,
            refusal=Refusal(what="2 tensors are missing: a, b"),
        ),
    ],
    "hashes": [
        _model(
            "fault",
            "model.safetensors: sha256",
            integrity="altered",
            integrity_text="model.safetensors: sha256: the manifest says 1f, found 2e",
        ),
        _model("note", "no manifest", integrity="unknown", integrity_text=""),
    ],
    "quantization": [
        _model("warning", "quantized by gptq; no tensor is packed", packing="gptq"),
        _model("fault", "no quantization_config", packed=224),
        _model(
            "warning",
            "the header says q4_0",
            metadata={"general.file_type": 2},
            stored={"q8_0": 300, "q6_k": 1},
        ),
    ],
    "native-model": [
        _model("warning", "cannot run experts of 100 rows", lacks="experts of 100 rows"),
    ],
    "rope": [
        _model(
            "warning",
            "all sliding layers: rope base is 1e+06; published ones have 10000",
            spec=with_rope(spec("gemma4-12b"), sliding=True, rope=RopeSpec(theta=1e6)),
        ),
        _model(
            "warning",
            "all full layers: rope base is 10000; published ones have 1e+06",
            spec=with_rope(spec("gemma3-1b"), sliding=False, rope=RopeSpec(theta=1e4)),
        ),
        _model(
            "warning",
            "all sliding layers: rope scaling is linear, factor 8; published ones have none",
            spec=with_rope(spec("gemma3-4b"), sliding=True, rope=ONE_SCALE),
        ),
        _model(
            "warning",
            "all full layers: rope scaling is none; published ones have linear, factor 8",
            spec=with_rope(spec("gemma3-27b"), sliding=False, rope=RopeSpec(theta=1e6)),
        ),
        _model(
            "warning",
            "all full layers: rope scaling is none; published ones have llama3, factor 32",
            spec=with_rope(LLAMA, sliding=False, rope=RopeSpec(theta=500000.0)),
        ),
    ],
    "context": [
        _model("fault", "beyond the model's 262144", context=524288),
        _model("note", "and 7 drafts reach beyond", context=262144, draft=7),
        _model("note", "8192 tokens at most", tokenizer_config={"model_max_length": 8192}),
    ],
    "text-assets": [
        _model("fault", "there is no tokenizer", text=None),
        _model(
            "fault",
            "tokenizer.json: not valid JSON",
            text=None,
            text_refusal=Refusal(what="tokenizer.json: not valid JSON"),
        ),
    ],
    "stops": [
        _text(
            "warning",
            "ends answers with 106 '<turn|>'",
            stated_stops={1: "<eos>"},
            template_stops={106: "<turn|>"},
        ),
        _text("warning", "no token ends an answer", stated_stops={}),
    ],
    "bos": [
        _text("warning", "neither tokenizer nor template", adds_bos=False, template_bos=False),
        _text("warning", "none is named", bos=None),
        _text("note", "both write '<bos>'", says_bos=True),
        _text("note", "say that no '<bos>' is put", says_bos=False),
    ],
    "special-tokens": [
        _text("note", "decoding with skip_special_tokens loses", marks=("<|channel>", '<|"|>')),
        _text("warning", "no control token", closing="<end_of_turn>", closing_is_token=False),
    ],
    "dtype": [
        _model("warning", "config.json asks for float16", config={"torch_dtype": "float16"}),
        _model("warning", "asks for float16", config={"text_config": {"dtype": "float16"}}),
        _model("warning", "matrices are f16", stored={"f16": 300, "bf16": 1}),
    ],
    "drafter": [
        _drafter(
            "warning",
            "was trained for 0123abcd; this model is 4567cdef",
            spec=None,
            made_for="0123abcd" * 4,
            target="4567cdef" * 4,
        ),
        _drafter("warning", "the model is no drafter", spec=LLAMA),
        _drafter("warning", "is damaged", spec=None, refusal=Refusal(what="is damaged")),
    ],
    "remote-code": [
        _model("note", "auto_map in config.json", config={"auto_map": {"AutoModel": "x.Y"}}),
        _model("note", "modeling_x.py", files=("modeling_x.py", "model.safetensors")),
        _model("note", "pickles (pytorch_model.bin)", files=("pytorch_model.bin",)),
    ],
}


def said_by(name: str, facts: Any, checks: Sequence[Any]) -> list[Finding]:
    """What one check says."""
    return [it for it in examine(facts, checks) if it.name == name]


def table(checks: Sequence[Any], faults: dict[str, list[Planted]]) -> str:
    """A table of the page: a row for each thing that a check may say."""
    rows = ["| check | looks for | for example | what to do |", "|---|---|---|---|"]
    for check in checks:
        looks_for = " ".join((check.__doc__ or "").split())
        for index, (finding, fix) in enumerate(_examples(check, faults[name_of(check)], checks)):
            first = (f"`{name_of(check)}`", looks_for) if index == 0 else ("", "")
            rows.append("| " + " | ".join((*first, finding, fix)) + " |")
    return "\n".join(rows)


def _examples(check: Any, planted: list[Planted], checks: Sequence[Any]) -> list[tuple[str, str]]:
    """What the check says of each fault, once, and what to do."""
    said = (
        (f"{finding.severity}: {finding.finding}", finding.fix)
        for it in planted
        for finding in said_by(name_of(check), it.facts, checks)
        if it.says in finding.finding and finding.fix
    )
    return [(_cell(finding), _cell(fix)) for finding, fix in dict.fromkeys(said)]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def page(text: str) -> str:
    """The page with its two tables as they are now."""
    for name, checks, faults in (
        ("machine", machine.CHECKS, MACHINE_FAULTS),
        ("model", model.CHECKS, MODEL_FAULTS),
    ):
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = before + begin + table(checks, faults) + "\n" + end + after
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
