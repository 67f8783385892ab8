"""Checks of cards: their driver, PyTorch's match with it, and what slows them in silence.

Sources: NVIDIA's CUDA compatibility guide (a driver runs programs of its own major release and of
older ones; code that is compiled at run time needs the minor release, too) and the NVML reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from halfbyte.planner.doctor.facts import GIB, Card, MachineFacts, Torch, numbers
from halfbyte.planner.doctor.finding import Check, Said, fault, note, ok, warning

CROWDED = GIB // 2
NEARLY_FULL = 0.9
ON_CPU = "halfbyte runs on the CPU (--device cpu)"


def nouveau(facts: MachineFacts) -> Iterator[Said]:
    """The free driver nouveau holds an NVIDIA card; CUDA needs NVIDIA's own."""
    if "nouveau" in facts.graphics.modules and not facts.graphics.cards:
        yield fault(
            f"the driver nouveau holds the NVIDIA card; {ON_CPU}",
            "install NVIDIA's driver (apt install nvidia-driver), which sets nouveau aside, and "
            "restart",
        )


def driver(facts: MachineFacts) -> Iterator[Said]:
    """An NVIDIA card without a driver that answers."""
    graphics = facts.graphics
    if graphics.driver is not None:
        major, minor = graphics.driver.cuda
        yield ok(f"NVIDIA driver {graphics.driver.version} (CUDA {major}.{minor})")
    elif graphics.refusal is not None:
        yield fault(
            f"NVIDIA's driver does not answer: {graphics.refusal}",
            "restart after an update of the driver; in a container, start it with --gpus all",
        )
    elif graphics.boards and "nouveau" not in graphics.modules:
        yield fault(
            f"an NVIDIA card and no driver for it; {ON_CPU}",
            "apt install nvidia-driver, and restart; in a container, --gpus all",
        )


def torch_cuda(facts: MachineFacts) -> Iterator[Said]:
    """A card, and a PyTorch that was built without CUDA or cannot start it."""
    torch = _torch_beside_a_card(facts)
    if torch is None:
        return
    if torch.cuda is None:
        yield warning(
            f"PyTorch {torch.version} is a CPU build: the card is not used",
            f"pip install --force-reinstall torch=={torch.version.partition('+')[0]} from the "
            "wheel index for CUDA",
        )
    elif torch.refusal is not None:
        yield fault(
            f"PyTorch {torch.version} cannot use the card: {torch.refusal}",
            "mend what the other lines say; else install PyTorch again, without "
            "LD_LIBRARY_PATH set",
        )
    else:
        yield ok(f"PyTorch {torch.version}, CUDA {torch.cuda}")


def driver_cuda(facts: MachineFacts) -> Iterator[Said]:
    """A driver that is older than the CUDA which PyTorch was built with."""
    torch, found = _torch_beside_a_card(facts), facts.graphics.driver
    if torch is None or torch.cuda is None or found is None:
        return
    built = numbers(torch.cuda)[:2]
    if built <= found.cuda:
        return
    text = f"PyTorch was built with CUDA {torch.cuda}, the driver knows {_dotted(found.cuda)}"
    update = f"update the driver, or install a PyTorch for CUDA {_dotted(found.cuda)} or older"
    if built[0] > found.cuda[0]:
        yield fault(f"{text}: nothing runs on the card", update)
    else:
        yield warning(f'{text}: compiled kernels may fail ("unsupported toolchain" PTX)', update)


def card_architecture(facts: MachineFacts) -> Iterator[Said]:
    """A card that PyTorch holds no code for: too new, or too old."""
    torch = _torch_beside_a_card(facts)
    if torch is None or torch.architectures is None or torch.cuda is None:
        return
    for card in facts.graphics.cards:
        if card.capability is None:
            continue
        if _has_code(card.capability, torch.architectures):
            yield ok(f"{_card(card)}, compute capability {_dotted(card.capability)}")
        else:
            yield fault(
                f"{_card(card)} has compute capability {_dotted(card.capability)}; PyTorch "
                f"{torch.version} was built for {', '.join(torch.architectures)}",
                "a newer PyTorch for a new card, an older one (2.11 on) for an old card",
            )


def _has_code(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Machine code runs on later minor releases of its major one; PTX on whatever came later."""
    for name in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if match is None:
            continue
        built = int(match[2]), int(match[3])
        if match[4] == "a":  # for this one card alone
            fits = built == capability
        elif match[1] == "sm":
            fits = built[0] == capability[0] and built <= capability
        else:
            fits = built <= capability
        if fits:
            return True
    return False


def cudnn(facts: MachineFacts) -> Iterator[Said]:
    """A cuDNN in LD_LIBRARY_PATH that is another than PyTorch's own and is loaded in its place."""
    torch = facts.torch
    own = facts.packages.get("nvidia-cudnn-cu12") or facts.packages.get("nvidia-cudnn-cu13")
    if torch is None or torch.cuda is None:
        return
    if own and torch.cudnn and numbers(own) != numbers(torch.cudnn):
        yield warning(
            f"cuDNN {own} is installed; PyTorch {torch.version} wants {torch.cudnn}",
            f"pip install --force-reinstall torch=={torch.version}",
        )
    wanted = numbers(own or torch.cudnn or "")[:3]
    for path, release in facts.cudnn_files.items():
        if wanted and numbers(release)[:3] != wanted:
            yield fault(
                f"LD_LIBRARY_PATH puts cuDNN {release} ({path}) before PyTorch's {_dotted(wanted)}",
                "take that folder out of LD_LIBRARY_PATH",
            )


def pcie_width(facts: MachineFacts) -> Iterator[Said]:
    """A card on fewer PCIe lanes than it has: loading and offloading are slower by as much."""
    for card in facts.graphics.cards:
        if 0 < card.lanes < card.lanes_possible:
            yield warning(
                f"{_card(card)} runs on {card.lanes} of {card.lanes_possible} PCIe lanes",
                "put it into the first slot, seat it again, or look in the firmware for shared "
                "lanes",
            )


def card_processes(facts: MachineFacts) -> Iterator[Said]:
    """Other processes that hold a good part of a card's memory."""
    for card in facts.graphics.cards:
        others = [process for process in card.processes if not process.ours]
        held = sum(process.bytes or 0 for process in others)
        names = ", ".join(f"{it.name} ({it.pid})" for it in others)
        if held > CROWDED or (others and not held and card.used > CROWDED):
            amount = f"{_gib(held)} of" if held else "an unknown part of"
            yield warning(
                f"others hold {amount} {_card(card)}: {names}",
                "stop them; a desktop can run on the processor's own graphics",
            )
        elif card.memory:
            yield ok(f"{_card(card)}: {_gib(card.memory - card.used)} of {_gib(card.memory)} free")


def gpu_scheduling(facts: MachineFacts) -> Iterator[Said]:
    """Windows' hardware-accelerated GPU scheduling, where WSL runs CUDA."""
    if facts.wsl and facts.graphics.scheduling and facts.graphics.cards:
        yield note(
            "Windows schedules the card in hardware: some drivers slow CUDA in WSL with it",
            "if it is slow, turn off Settings > System > Display > Graphics > Hardware-accelerated "
            "GPU scheduling, and restart",
        )


def memory_spill(facts: MachineFacts) -> Iterator[Said]:
    """Windows' driver spills into the machine's memory, in silence and several times slower, when
    a card is full; it never runs out."""
    if not facts.wsl:
        return
    for card in facts.graphics.cards:
        fix = (
            "NVIDIA Control Panel > Manage 3D settings > CUDA - Sysmem Fallback Policy: Prefer No "
            "Sysmem Fallback; and plan with a --budget below what is free"
        )
        if card.used > NEARLY_FULL * card.memory:
            yield warning(
                f"{_card(card)} is full ({_gib(card.used)} of {_gib(card.memory)}): what comes "
                "now is spilled into the machine's memory",
                fix,
            )
        else:
            yield note(
                f"{_card(card)}: when it is full, Windows spills instead of failing",
                fix,
            )


def _torch_beside_a_card(facts: MachineFacts) -> Torch | None:
    return facts.torch if facts.graphics.cards else None


def _card(card: Card) -> str:
    return f"card {card.index} ({card.name})"


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


CHECKS: tuple[Check[MachineFacts], ...] = (
    nouveau,
    driver,
    torch_cuda,
    driver_cuda,
    card_architecture,
    cudnn,
    pcie_width,
    card_processes,
    gpu_scheduling,
    memory_spill,
)
