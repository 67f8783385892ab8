"""An adapter beside a quantized model: what is trained is what runs, and the model stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import relative_error

from halfbyte.formats import lora
from halfbyte.formats.checkpoint import read, write_gguf
from halfbyte.formats.lora_writing import updates_for, write_adapter
from halfbyte.kernels.contract import Linear, LowRank, OpSet
from halfbyte.kernels.cpu import CPUOps, instruction_set
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.kernels.reference.ops import Weight
from halfbyte.models.cache import CacheShape, Slot
from halfbyte.models.decoder import Chunk
from halfbyte.models.load import load
from halfbyte.numerics.codec import encode
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.specs import SCHEMES, recipe_of
from halfbyte.training.heads import StoredHead
from halfbyte.training.low_rank import Adapted
from halfbyte.training.modes import Trainer
from halfbyte.training.ops import TrainingOps
from halfbyte.training.student import Student

LENGTH = 160  # longer than a sliding window of the test model


@pytest.fixture(scope="module")
def body(tiny_gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("body") / "body.gguf"
    write_gguf(Quantized(read(tiny_gemma4), recipe_of("q4_0"), method="rtn"), path)
    return path


@pytest.fixture(scope="module")
def adapted(body: Path) -> Adapted:
    """As it may be after some steps."""
    source = read(body)
    trainer = Trainer(mode="adapter", adapter=updates_for(source.spec, rank=4, alpha=6), seed=3)
    tensors = trainer.tensors(source.tensor, dict(source.tensors()))
    assert isinstance(tensors, Adapted)
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, leaf in tensors.parameters.items():
            if name.endswith("lora_b"):
                leaf.copy_(0.05 * torch.randn(leaf.shape, generator=chance))
    return tensors


@pytest.fixture(scope="module")
def written(body: Path, adapted: Adapted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, spec = tmp_path_factory.mktemp("adapter"), read(body).spec
    updates = updates_for(spec, rank=4, alpha=6)
    write_adapter(path, spec, updates, dict(adapted.pairs()), base="tiny")
    return path


def logits(body: Path, adapter: Path | None, ops: OpSet, ids: list[int]) -> np.ndarray:
    source = read(body)
    adapters = {} if adapter is None else {"it": lora.read(adapter, source.spec)}
    decoder = load(source, ops, adapters=adapters)
    pages = list(range(4))
    shape = CacheShape(pages=4, page_len=64, ring_slack=LENGTH, kind="f32")
    chunk = Chunk(
        slot=Slot(pages=pages),
        token_ids=ids,
        wanted="all",
        adapter=None if adapter is None else "it",
    )
    return decoder.forward([chunk], decoder.new_cache(shape)).copy()


def test_what_learns_is_what_runs(body: Path, adapted: Adapted, written: Path) -> None:
    """In f32 to a hundred thousandth; where activations are rounded to 8 bits, the adapter adds no
    error of its own to that of the model."""
    spec = read(body).spec
    ids = np.random.default_rng(0).integers(0, spec.vocab, LENGTH).tolist()
    with torch.no_grad():
        states, head = Student(spec, adapted, TrainingOps(), again=False).states([ids])
    assert isinstance(head, StoredHead)
    z = head.product(states).numpy()
    cap = spec.logit_softcap
    trained = z if cap is None else cap * np.tanh(z / cap)
    exact = ReferenceOps(exact_rows=False)
    plain = logits(body, None, exact, ids)
    assert relative_error(logits(body, written, exact, ids), trained) < 1e-5
    assert relative_error(plain, trained) > 0.05
    if instruction_set() is not None:
        runs = [logits(body, it, CPUOps(threads=1), ids) for it in (None, written)]
        own = relative_error(runs[0], plain)
        assert relative_error(runs[1], trained) < 1.5 * own


def test_the_gradients_are_those_of_the_sum() -> None:
    chance = torch.Generator().manual_seed(0)
    x, w, a, b = (
        torch.randn(shape, generator=chance) for shape in ((7, 32), (12, 32), (3, 32), (12, 3))
    )
    leaves = x.requires_grad_(), a.requires_grad_(), b.requires_grad_()
    stored = encode(w, SCHEMES["f32"])
    linear = Linear(weight=Weight(stored, w), updates=(LowRank(a=a, b=b, scale=0.7),))
    ours = TrainingOps().linear(x, linear)
    theirs = x @ (w + 0.7 * b @ a).T
    assert torch.allclose(ours, theirs, atol=1e-5)
    found = torch.autograd.grad(ours.square().sum(), leaves)
    for mine, its in zip(found, torch.autograd.grad(theirs.square().sum(), leaves), strict=True):
        assert torch.allclose(mine, its, rtol=1e-4, atol=1e-4)


def test_it_begins_as_nothing(body: Path) -> None:
    source = read(body)
    trainer = Trainer(mode="adapter", adapter=updates_for(source.spec, rank=2, alpha=2))
    ids = np.random.default_rng(0).integers(0, source.spec.vocab, (2, 32)).tolist()
    stored = dict(source.tensors())
    with torch.no_grad():
        first, second = (
            Student(source.spec, tensors, TrainingOps(), again=False).states(ids)[0]
            for tensors in (
                trainer.tensors(source.tensor, stored),
                Adapted(stored, (), "cpu", seed=0),
            )
        )
    assert torch.equal(first, second)
