"""Checks of what is installed: Python, packages, the compiled kernels, a compiler."""

from __future__ import annotations

from collections.abc import Iterator

from halfbyte.planner.doctor.facts import MachineFacts, Processor, numbers
from halfbyte.planner.doctor.finding import Check, Said, fault, note, ok, warning

PYTHONS = ((3, 11), (3, 13))
# What each instruction set of the kernels needs, in the words of /proc/cpuinfo; fastest first.
NEEDS: dict[str, tuple[str, ...]] = {
    "avx512-vnni": (
        "avx512_vnni",
        "avx512bw",
        "avx512vl",
        "avx512dq",
        "avx2",
        "fma",
        "f16c",
    ),
    "avx-vnni": ("avx_vnni", "avx2", "fma", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
}
# Releases with a fault that concerns who works with the same models: what, and which is right.
KNOWN_FAULTS = {
    ("transformers", "5.23.0"): ("cannot build Gemma 4's drafters", "5.22.2"),
    ("click", "8.4.0"): ("writes a broken completion script for fish", "8.4.2"),
    ("click", "8.4.1"): ("writes a broken completion script for fish", "8.4.2"),
}
APART = ("torch",)  # a GGUF runs on the native kernels without it
NO_COMPILER = "apt install g++ python3-dev"


def python_version(facts: MachineFacts) -> Iterator[Said]:
    """A Python that halfbyte does not run on: older than 3.11, or newer than 3.13."""
    low, high = PYTHONS
    if low <= numbers(facts.python)[:2] <= high:
        yield ok(f"Python {facts.python} on {facts.system}")
    else:
        wanted = f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
        yield fault(
            f"Python {facts.python}; halfbyte runs on {wanted}",
            f"make an environment with Python {wanted} and install halfbyte there",
        )


def packages(facts: MachineFacts) -> Iterator[Said]:
    """Packages that halfbyte needs and that are absent or too old."""
    sound = True
    for name, least in facts.required.items():
        found = facts.packages.get(name)
        if found is not None and numbers(found) >= numbers(least):
            continue
        sound = False
        say = fault if facts.native.runs == () or name not in APART else warning
        what = f"{name} is not installed" if found is None else f"{name} {found} is too old"
        apart = "; GGUF files run without it, nothing else does" if say is warning else ""
        yield say(f"{what}{apart}", f"pip install '{name}>={least}'")
    if sound and facts.required:
        yield ok(f"{len(facts.required)} packages, none missing or too old")


def known_faults(facts: MachineFacts) -> Iterator[Said]:
    """Releases of packages that are known to be faulty."""
    for (name, release), (what, right) in KNOWN_FAULTS.items():
        if facts.packages.get(name) == release:
            yield warning(f"{name} {release} {what}", f"pip install '{name}=={right}'")


def native_kernels(facts: MachineFacts) -> Iterator[Said]:
    """Compiled CPU kernels that are not there, do not load, or have no instruction set for this
    processor, so that plain PyTorch computes; and why not a faster instruction set."""
    runs = facts.native.runs
    if facts.native.refusal is not None:
        yield warning(
            f"the native kernels are not there: {facts.native.refusal}; the reference op set "
            "(plain PyTorch, many times slower) runs on the CPU",
            _build(facts),
        )
    elif not runs:
        yield warning(
            f"the native kernels are not for this processor: {_refusals(facts.processor, None)}; "
            "the reference op set (plain PyTorch, many times slower) runs on the CPU",
            "a processor with AVX2 and FMA, or a card",
        )
    else:
        why = _refusals(facts.processor, runs[0])
        yield ok(f"native kernels, {runs[0]}" + (f" ({why})" if why else ""))


def _build(facts: MachineFacts) -> str:
    first = "" if facts.compiler and facts.headers else f"{NO_COMPILER}; then "
    return f"{first}install halfbyte again (in a checkout: make demo)"


def _refusals(processor: Processor, chosen: str | None) -> str:
    """Why not each instruction set that is faster than the chosen one."""
    if processor.machine not in ("x86_64", "AMD64"):
        return f"they are for x86-64, this is {processor.machine}"
    faster = list(NEEDS)[: list(NEEDS).index(chosen)] if chosen else list(NEEDS)
    lacks = {name: [flag for flag in NEEDS[name] if flag not in processor.flags] for name in faster}
    return "; ".join(
        f"not {name}: the processor has no {', '.join(flags)}"
        if flags
        else f"not {name}: the processor has it, the build does not"
        for name, flags in lacks.items()
    )


def compiler(facts: MachineFacts) -> Iterator[Said]:
    """No C++ compiler or no headers of Python: kernels cannot be built here."""
    if facts.compiler is None:
        yield note("no C++ compiler; only building the kernels needs one", NO_COMPILER)
    elif not facts.headers:
        yield note("Python's headers are missing; only building needs them", NO_COMPILER)
    else:
        yield ok(facts.compiler)


CHECKS: tuple[Check[MachineFacts], ...] = (
    python_version,
    packages,
    known_faults,
    native_kernels,
    compiler,
)
