"""Fidelity: the windows of both protocols, the numbers against naive computations, the gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import exp
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import CONFIGS, oracle, oracle_logits, source_of
from torch.nn import functional

from halfbyte.errors import IntegrityError, InvalidInputError
from halfbyte.evals import fidelity, reader, reference
from halfbyte.evals.fidelity import log_softmax, measure, score_rows, summarize
from halfbyte.evals.reference import Baseline, Reference
from halfbyte.evals.texts import Protocol, Reading, Text, Window, cut, read_text
from halfbyte.families import spec_of
from halfbyte.formats.checkpoint import read
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.models.decoder import Decoder
from halfbyte.models.load import load
from halfbyte.specs import ModelSpec
from halfbyte.text.tokenizer import Tokenizer

IDS = [int(token) for token in np.random.default_rng(3).integers(0, 128, 100)]
TEXT = Text(name="random", token_ids=IDS, bos=[1])


def decoder_of(name: str, recipe: str = "f32") -> Decoder:
    source = source_of(oracle(CONFIGS[name]), CONFIGS[name], recipe=recipe)
    return load(source, ReferenceOps(exact_rows=False))


def baseline_of(name: str, windows: Sequence[Window]) -> Baseline:
    """What the model in f32 makes of the windows."""
    source = source_of(oracle(CONFIGS[name]), CONFIGS[name])
    return Reference(source, ReferenceOps(exact_rows=False)).read([windows])[0]


def windows_of(protocol: Protocol = "llama.cpp", count: int | None = None) -> list[Window]:
    return cut(TEXT, Reading(protocol=protocol, window=32, max_windows=count))


def naive(logits: np.ndarray, targets: list[int]) -> float:
    """The mean of -log p of the targets."""
    rows = torch.from_numpy(logits).double()
    return float(functional.cross_entropy(rows, torch.tensor(targets)))


def test_windows_of_llama_cpp() -> None:
    """BOS and ten tokens make two windows of 4 and a rest; a window scores n - n / 2 - 1."""
    text = Text(name="t", token_ids=list(range(10, 20)), bos=[1])
    windows = cut(text, Reading(protocol="llama.cpp", window=4))
    assert [list(w.token_ids) for w in windows] == [[1, 10, 11, 12], [1, 14, 15, 16]]
    assert [list(w.targets) for w in windows] == [[12], [16]]


def test_windows_of_llama_cpp_without_bos() -> None:
    text = Text(name="t", token_ids=list(range(10, 22)), bos=[])
    windows = cut(text, Reading(protocol="llama.cpp", window=6))
    assert [list(w.token_ids) for w in windows] == [[*range(10, 16)], [*range(16, 22)]]
    assert [list(w.targets) for w in windows] == [[14, 15], [20, 21]]


def test_full_windows_score_every_token_of_a_text_with_bos() -> None:
    text = Text(name="t", token_ids=list(range(10, 17)), bos=[1])
    windows = cut(text, Reading(protocol="full", window=4))
    assert [list(w.token_ids) for w in windows] == [[1, 10, 11, 12], [1, 13, 14, 15]]
    assert [list(w.targets) for w in windows] == [[10, 11, 12], [13, 14, 15]]


def test_full_windows_without_bos_leave_out_their_first_token() -> None:
    text = Text(name="t", token_ids=list(range(10, 19)), bos=[])
    windows = cut(text, Reading(protocol="full", window=4))
    assert [list(w.token_ids) for w in windows] == [[10, 11, 12, 13], [14, 15, 16, 17]]
    assert [list(w.targets) for w in windows] == [[11, 12, 13], [15, 16, 17]]


@pytest.mark.parametrize(("length", "window"), [(30, 32), (0, 4), (100, 3)])
def test_a_text_or_window_that_is_too_short(length: int, window: int) -> None:
    with pytest.raises(InvalidInputError, match="window"):
        cut(Text(name="short", token_ids=[5] * length, bos=[1]), Reading(window=window))


@pytest.mark.parametrize("name", ["llama", "gemma4-unified"])
@pytest.mark.parametrize("protocol", ["llama.cpp", "full"])
def test_a_model_is_itself(name: str, protocol: Protocol) -> None:
    windows = windows_of(protocol)
    found = measure(decoder_of(name), windows, name="t", reference=baseline_of(name, windows))
    assert found.kl is not None and found.right_token is not None
    assert 0.0 <= found.kl.mean <= found.kl.max < 1e-10
    assert found.same_top1 == 1.0
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-6)
    assert found.right_token.rms < 1e-6
    assert found.tokens == (3 * 15 if protocol == "llama.cpp" else 3 * 31)


@pytest.mark.parametrize("protocol", ["llama.cpp", "full"])
def test_numbers_equal_a_naive_computation(
    protocol: Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In odd small pieces; the reference's logits come from Transformers."""
    monkeypatch.setattr(reader, "AT_ONCE", 7 * 128)
    monkeypatch.setattr(fidelity, "TILE", 3 * 128)
    monkeypatch.setattr(reference, "SLICE", 5 * 64)
    windows = windows_of(protocol)
    found = measure(
        decoder_of("gemma4-unified", "q4_0"),
        windows,
        name="t",
        reference=baseline_of("gemma4-unified", windows),
    )
    log_p, log_r, targets = [], [], []
    exact = oracle(CONFIGS["gemma4-unified"])
    quantized = decoder_of("gemma4-unified", "q4_0")
    for window in windows_of(protocol):
        ids = list(window.token_ids)
        log_r.append(oracle_logits(exact, ids)[window.first : -1])
        log_p.append(whole_logits(quantized, ids)[window.first : -1])
        targets += window.targets
    r, p = (torch.from_numpy(np.concatenate(x)).double().log_softmax(-1) for x in (log_r, log_p))
    kl = functional.kl_div(p, r, log_target=True, reduction="none").sum(-1)
    assert found.kl is not None and found.reference_perplexity is not None
    assert found.kl.mean == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found.kl.max == pytest.approx(float(kl.max()), rel=1e-4)
    assert found.kl.p90 == pytest.approx(float(kl.quantile(0.9)), rel=1e-4)
    assert found.same_top1 == float((p.argmax(-1) == r.argmax(-1)).double().mean())
    assert found.perplexity == pytest.approx(exp(naive(p.numpy(), targets)), rel=1e-5)
    assert found.reference_perplexity == pytest.approx(exp(naive(r.numpy(), targets)), rel=1e-5)


def whole_logits(decoder: Decoder, ids: list[int]) -> np.ndarray:
    """All rows of one forward."""
    window = Window(token_ids=[*ids, 0], first=0)
    return np.concatenate(list(reader.Reader(decoder, len(ids) + 1, "f32").rows(window)))


def test_scores_are_exact_in_f64() -> None:
    """KL of a hand-made pair, of nearly equal rows, and with logits far from zero."""
    uniform, skewed = np.zeros((1, 4), np.float32), np.log([[0.7, 0.1, 0.1, 0.1]])
    targets = np.array([0])
    row = score_rows(targets, skewed.astype(np.float32), uniform)[0]
    expected = [-np.log(0.7), np.log(4), 0.25 * np.log(0.25**4 / (0.7 * 0.1**3)), 1.0]
    np.testing.assert_allclose(row, expected, rtol=1e-7)
    logits = np.random.default_rng(0).normal(size=(50, 2000)).astype(np.float32)
    nudged = (logits + np.float32(1e-4) * logits[::-1]).astype(np.float32)
    near = score_rows(np.zeros(50, int), nudged, logits)[:, 2]
    assert (near > 0).all() and near.max() < 1e-7
    np.testing.assert_allclose(log_softmax(logits + 1e4), log_softmax(logits), atol=2e-3)


def test_standard_errors_follow_their_definition() -> None:
    scores = np.random.default_rng(1).gamma(2.0, size=(400, 4))
    found = summarize("t", scores)
    assert found.kl is not None
    assert found.kl.mean_error == pytest.approx(scores[:, 2].std(ddof=1) / 20)
    assert found.perplexity_error == pytest.approx(
        exp(scores[:, 0].mean()) * scores[:, 0].std(ddof=1) / 20
    )


def test_alone_limited_and_with_progress() -> None:
    seen: list[tuple[int, int]] = []
    found = measure(
        decoder_of("llama"),
        windows_of(count=2),
        name="t",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 2), (2, 2)] and found.tokens == 30
    assert found.kl is found.same_top1 is found.reference_perplexity is None


def test_models_that_do_not_suit() -> None:
    small = decoder_of("llama")
    with pytest.raises(InvalidInputError, match="beyond the context of 512"):
        measure(small, [Window(token_ids=[1] * 1024, first=0)], name="t")
    other = replace(baseline_of("llama", windows := windows_of()), spec=spec_of_vocabulary(64))
    with pytest.raises(InvalidInputError, match="vocabularies of 128 and 64"):
        measure(small, windows, name="t", reference=other)


def spec_of_vocabulary(size: int) -> ModelSpec:
    return spec_of({**CONFIGS["llama"], "vocab_size": size})


@pytest.mark.parametrize("protocol", ["llama.cpp", "full"])
def test_a_trained_model_equals_transformers(
    tiny_gemma4: Path, shared_data: Path, protocol: Protocol
) -> None:
    """Three windows of real text through our reading, tokenizer and decoder, and through theirs."""
    from transformers import AutoModelForCausalLM

    source = read(tiny_gemma4)
    assert source.assets is not None
    text = read_text(shared_data / "heldout" / "books_heldout.txt", Tokenizer(source.assets))
    decoder = load(source, ReferenceOps(exact_rows=False))
    windows = cut(text, Reading(protocol=protocol, window=256, max_windows=3))
    found = measure(decoder, windows, name="books")
    theirs = AutoModelForCausalLM.from_pretrained(tiny_gemma4, dtype=torch.float32).eval()
    losses = [
        naive(oracle_logits(theirs, list(w.token_ids))[w.first : -1], list(w.targets))
        for w in windows
    ]
    assert found.perplexity == pytest.approx(exp(np.mean(losses)), rel=1e-4)
    assert found.tokens == (3 * 127 if protocol == "llama.cpp" else 3 * 255)


def test_reading_texts(tmp_path: Path, tiny_gemma4: Path) -> None:
    assets = read(tiny_gemma4).assets
    assert assets is not None
    tokenizer = Tokenizer(assets)
    (tmp_path / "plain.txt").write_text("<bos>word", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    text = read_text(tmp_path / "plain.txt", tokenizer)
    assert tokenizer.bos_id not in text.token_ids and text.bos == [tokenizer.bos_id]
    with pytest.raises(IntegrityError, match="UTF-8"):
        read_text(tmp_path / "latin.txt", tokenizer)
    with pytest.raises(InvalidInputError, match="absent"):
        read_text(tmp_path / "absent.txt", tokenizer)
