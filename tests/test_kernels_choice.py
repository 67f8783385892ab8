"""Which op sets a machine has, and what the others lack."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from halfbyte.kernels import choice
from halfbyte.kernels.choice import Offer, offers
from halfbyte.kernels.cpu import INSTRUCTION_SETS, instruction_set
from halfbyte.kernels.cpu.ops import native


def test_the_first_native_offer_that_lacks_nothing_is_the_one_that_runs() -> None:
    ready = [offer.name for offer in offers() if offer.device == "cpu" and offer.lacks is None]
    found = instruction_set()
    assert ready[-1] == "reference"
    assert ready[0] == ("reference" if found is None else f"native CPU ({found})")


def test_an_instruction_set_that_the_processor_lacks_is_told_by_its_features() -> None:
    if native() is None:
        pytest.skip("the native kernels are not built")
    features = Path("/proc/cpuinfo").read_text().split()
    told = {"avx512vnni": "avx512_vnni"}  # names of /proc/cpuinfo, where they differ
    for name, offer in zip(INSTRUCTION_SETS, natives(), strict=True):
        missing = native().lacking(name)
        assert (offer.lacks is None) == (not missing) == native().supports(name)
        assert all(told.get(feature, feature) not in features for feature in missing)
        assert all(feature in str(offer.lacks) for feature in missing)
    assert native().lacking("neon") == ["neon"]


@pytest.mark.parametrize(
    ("error", "said"),
    [(ModuleNotFoundError("_cpu"), "compiler"), (ImportError("wrong ELF class"), "wrong ELF")],
)
def test_kernels_that_are_not_there_say_why(
    monkeypatch: pytest.MonkeyPatch, error: ImportError, said: str
) -> None:
    def fails(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", fails)
    assert all(said in str(offer.lacks) for offer in natives())
    assert instruction_set() is None


def test_without_a_driver_torch_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(choice, "DRIVERS", (str(tmp_path / "none"),))
    lacking = "there is no NVIDIA driver"
    assert offers()[0] == Offer("Triton", "cuda", lacking)
    assert offers()[1] == Offer("reference", "cuda", lacking)


def natives() -> list[Offer]:
    return [offer for offer in offers() if offer.name.startswith("native")]
