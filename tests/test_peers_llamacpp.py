"""Our GGUF files in llama.cpp: the same tokens, stops, logits and perplexity as ours.

A model whose linears round their input to int8 amplifies any difference: a sum in another order
moves a value over a rounding edge, which is a step of 1/127, and so on through the layers. After
five layers two honest implementations differ by as much as rounding does at all. The yardstick for
block schemes is therefore llama.cpp itself: its default settings against its plain ones.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path

import gguf
import numpy as np
import pytest

from halfbyte.errors import GateMissedError
from halfbyte.evals.fidelity import Fidelity, score_rows, summarize
from halfbyte.evals.reader import Reader
from halfbyte.evals.texts import Reading, Text, Window, cut, read_text
from halfbyte.formats.checkpoint import read, write_gguf
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.kernels.reference.ops import Activations
from halfbyte.models.load import load
from halfbyte.numerics.codec import decode
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.specs import recipe_of
from halfbyte.text.chat import Chat
from halfbyte.text.tokenizer import Tokenizer
from halfbyte.training.samples import Mix
from halfbyte.workflows import Distilling, distill

pytestmark = pytest.mark.peers
llamacpp = pytest.importorskip("llamacpp", reason="needs the extra 'peers'")

WINDOWS = 20
Logits = Callable[[Window], np.ndarray]


@pytest.fixture(scope="module", params=["tiny_gemma4", "stories260k"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Path]:
    """A checkpoint in a recipe as a GGUF, rounded to nearest; written once."""
    folder = tmp_path_factory.mktemp("peers")

    def write(model: Path, recipe: str) -> Path:
        path = folder / f"{model.name}-{recipe}.gguf"
        if not path.exists():
            write_gguf(Quantized(read(model), recipe_of(recipe), method="rtn"), path)
        return path

    return write


@pytest.fixture(scope="module")
def books(shared_data: Path) -> Path:
    return shared_data / "heldout" / "books_heldout.txt"


@pytest.fixture
def peer_of() -> Iterator[Callable[..., object]]:
    """llama.cpp on a file; closed after the test."""
    opened: list[llamacpp.LlamaCpp] = []

    def open_(path: Path, *, plain: bool = True) -> llamacpp.LlamaCpp:
        opened.append(llamacpp.LlamaCpp(path, plain=plain))
        return opened[-1]

    yield open_
    for peer in opened:
        peer.close()


def tokenizer_of(path: Path) -> Tokenizer:
    assets = read(path).assets
    assert assets is not None
    return Tokenizer(assets)


def ours(path: Path, activations: Activations = "f32") -> Logits:
    """The logits of the scored rows of a window, by our decoder."""
    decoder = load(read(path), ReferenceOps(activations=activations, exact_rows=False))
    reader = Reader(decoder, 512, "f32")
    return lambda window: np.concatenate(list(reader.rows(window)))


def theirs(peer: llamacpp.LlamaCpp) -> Logits:
    return lambda window: peer.logits(window.token_ids, window.first)[:-1]


def compare(windows: Sequence[Window], model: Logits, reference: Logits) -> Fidelity:
    scores = [score_rows(np.array(w.targets), model(w), reference(w)) for w in windows]
    return summarize("books", np.concatenate(scores))


def increase(found: Fidelity) -> float:
    """The perplexity's, as a fraction of the reference's."""
    assert found.reference_perplexity is not None
    return found.perplexity / found.reference_perplexity - 1


def test_an_f32_export_runs_there_as_here(model: Path, books: Path, export, peer_of) -> None:
    path = export(model, "f32")
    windows = cut(read_text(books, tokenizer_of(path)), Reading(max_windows=WINDOWS))
    found = compare(windows, theirs(peer_of(path)), ours(path))
    print(model.name, "f32", found)
    assert found.kl is not None and found.same_top1 is not None
    assert found.same_top1 >= 0.999
    assert abs(increase(found)) <= 1e-3
    assert found.kl.mean <= 1e-6


@pytest.mark.parametrize("recipe", ["q4_0", "q4_0-pure"])
def test_a_q4_0_export_runs_there_as_here(
    model: Path, books: Path, export, peer_of, recipe: str
) -> None:
    """As near to llama.cpp as that is to itself with a fused attention and an f16 cache."""
    path = export(model, recipe)
    windows = cut(read_text(books, tokenizer_of(path)), Reading(max_windows=WINDOWS))
    plain = theirs(peer_of(path))
    spread = compare(windows, theirs(peer_of(path, plain=False)), plain)
    found = compare(windows, plain, ours(path, "q8_0"))
    print(model.name, recipe, found, "\n llama.cpp with itself", spread)
    assert found.kl is not None and found.same_top1 is not None
    assert spread.kl is not None and spread.same_top1 is not None
    assert found.kl.mean <= max(2e-4, 1.25 * spread.kl.mean)
    assert found.same_top1 >= min(0.985, spread.same_top1 - 0.01)
    assert abs(increase(found)) <= 5e-3


@pytest.fixture(scope="module")
def distilled(tiny_gemma4: Path, shared_data: Path, export, tmp_path_factory) -> Path:
    """What a very short training leaves, better or not."""
    out = tmp_path_factory.mktemp("distilled") / "out.gguf"
    asked = Distilling(
        data=[shared_data / "books" / "bronte.txt"],
        mix=Mix(count=40, length=64),
        mode="full",
        steps=6,
        batch=4,
        at_once=4,
        start=export(tiny_gemma4, "q4_0"),
        threads=1,
    )
    try:
        distill(str(tiny_gemma4), out, asked, tell=lambda *_: lambda _: None)
    except GateMissedError:
        return out.with_name("out.gguf.work") / "new" / out.name
    return out


def test_a_distilled_file_runs_there_as_here(
    tiny_gemma4: Path, distilled: Path, books: Path, export, peer_of
) -> None:
    """What was trained is what llama.cpp decodes, to the bit; it runs as every file does, and is as
    far from the original there as here."""
    theirs_ = {it.name: it for it in gguf.GGUFReader(str(distilled)).tensors}
    source, start = read(distilled), read(export(tiny_gemma4, "q4_0"))
    moved = 0
    for name, entry in source.entries.items():
        stored = theirs_[entry.name]
        decoded = gguf.dequantize(stored.data, stored.tensor_type)
        ours_ = decode(entry.file.tensor(entry.name)).numpy()
        assert np.array_equal(decoded.reshape(-1), ours_.reshape(-1)), name
        moved += source.tensor(name).data.tobytes() != start.tensor(name).data.tobytes()
    assert moved > 0.9 * len(source.entries)
    windows = cut(read_text(books, tokenizer_of(distilled)), Reading(max_windows=WINDOWS))
    plain = theirs(peer_of(distilled))
    spread = compare(windows, theirs(peer_of(distilled, plain=False)), plain)
    found = compare(windows, plain, ours(distilled, "q8_0"))
    exact = ours(export(tiny_gemma4, "f32"))
    there, here = (compare(windows, run, exact) for run in (plain, ours(distilled, "q8_0")))
    assert there.kl is not None and here.kl is not None
    print("distilled", found, "\n llama.cpp with itself", spread)
    print("from the original there", there.kl.mean, "and here", here.kl.mean)
    assert there.kl.mean == pytest.approx(here.kl.mean, rel=0.02)
    assert found.kl is not None and spread.kl is not None
    assert found.kl.mean <= max(2e-4, 1.25 * spread.kl.mean)
    assert abs(increase(found)) <= 5e-3


def test_numbers_equal_published_ones_of_llama_perplexity(
    tiny_gemma4: Path, books: Path, export, peer_of
) -> None:
    """The figures in the model's README: its 60 first windows, cut from llama.cpp's own tokens."""
    path = export(tiny_gemma4, "f32")
    peer = peer_of(path)
    ids = peer.encode(books.read_text(encoding="utf-8"), special=False)
    windows = cut(Text(name="books", token_ids=ids, bos=peer.leading), Reading(max_windows=60))
    exact = ours(path)
    for recipe, divergence, growth in (("q4_0-pure", 0.0544, 0.065), ("q4_0", 0.0312, 0.039)):
        found = compare(windows, ours(export(tiny_gemma4, recipe), "q8_0"), exact)
        print(recipe, found)
        assert found.kl is not None
        assert found.reference_perplexity == pytest.approx(163.76, rel=1e-4)
        assert found.kl.mean == pytest.approx(divergence, rel=0.03)
        assert increase(found) == pytest.approx(growth, abs=0.003)


@pytest.mark.parametrize("text", ["heldout/books_heldout.txt", "calibration/multilingual.utf8"])
def test_tokens_are_the_same(model: Path, shared_data: Path, export, peer_of, text: str) -> None:
    """For gemma4, llama.cpp cuts at line breaks before it merges, as Gemma's vocabulary allows.

    That of tiny-gemma4 has pieces across line breaks; it is compared between them.
    """
    path = export(model, "f32")
    tokenizer, peer = tokenizer_of(path), peer_of(path)
    content = (shared_data / text).read_text(encoding="utf-8")
    gemma = read(path).spec.family == "gemma4"
    parts = re.findall(r"[^\n]+|\n+", content) if gemma else [content]
    expected = [token_id for part in parts for token_id in tokenizer.encode(part, special=False)]
    assert peer.encode(content, special=False) == expected
    assert peer.leading == tokenizer.with_bos([])


def test_answers_stop_there_where_they_stop_here(model: Path, export, peer_of) -> None:
    path = export(model, "f32")
    assets = read(path).assets
    assert assets is not None
    peer = peer_of(path)
    stops = Chat(Tokenizer(assets), assets).stop_ids
    print(model.name, "stops", sorted(stops), "llama.cpp's", sorted(peer.stop_ids))
    assert stops and stops <= peer.stop_ids


PRINTED = {
    "perplexity": r"Mean PPL\(Q\) +: +(\S+)",
    "reference_perplexity": r"Mean PPL\(base\) +: +(\S+)",
    "perplexity_ratio": r"Mean PPL\(Q\)/PPL\(base\) +: +(\S+)",
    "perplexity_ratio_error": r"Mean PPL\(Q\)/PPL\(base\) +: +\S+ ± +(\S+)",
    "kl.mean": r"Mean +KLD: +(\S+)",
    "kl.mean_error": r"Mean +KLD: +\S+ ± +(\S+)",
    "kl.median": r"Median +KLD: +(\S+)",
    "kl.p90": r"90.0% +KLD: +(\S+)",
    "kl.p99": r"99.0% +KLD: +(\S+)",
    "kl.p999": r"99.9% +KLD: +(\S+)",
    "kl.max": r"Maximum KLD: +(\S+)",
    "right_token.mean": r"Mean +Δp: +(\S+)",
    "right_token.rms": r"RMS Δp +: +(\S+)",
    "right_token.p1": r" 1.0% +Δp: +(\S+)%",
    "right_token.p5": r" 5.0% +Δp: +(\S+)%",
    "right_token.p95": r"95.0% +Δp: +(\S+)%",
    "right_token.p99": r"99.0% +Δp: +(\S+)%",
    "same_top1": r"Same top p: +(\S+)",
}


def test_statistics_equal_those_that_llama_perplexity_prints(
    tiny_gemma4: Path, books: Path, export, peer_of, tmp_path: Path
) -> None:
    """On llama.cpp's own logits and the text's first 20 windows. Needs the program itself."""
    program = shutil.which("llama-perplexity")
    if program is None:
        pytest.skip("llama-perplexity is not on the PATH")
    base, model = export(tiny_gemma4, "f32"), export(tiny_gemma4, "q4_0")
    kept = ("-c", "512", "-b", "512", "-t", "1", "--kl-divergence-base", tmp_path / "base")
    read_base = ("-m", base, "-f", books, "--chunks", str(WINDOWS))
    subprocess.run([program, *read_base, *kept], check=True, capture_output=True)
    told = subprocess.run(
        [program, "-m", model, *kept, "--kl-divergence"], check=True, capture_output=True, text=True
    )
    peer = peer_of(base, plain=False)
    ids = peer.encode(books.read_text(encoding="utf-8"), special=False)
    text = Text(name="books", token_ids=ids, bos=peer.leading)
    windows = cut(text, Reading(max_windows=WINDOWS))
    found = compare(windows, theirs(peer_of(model, plain=False)), theirs(peer))
    for name, pattern in PRINTED.items():
        match = re.search(pattern, told.stdout)
        assert match is not None, (name, told.stdout)
        scale = 100 if "right_token" in name or name == "same_top1" else 1
        last_digit = 1e-5 if scale == 100 else 1e-6
        value = attrgetter(name)(found)
        assert value == pytest.approx(float(match[1]) / scale, rel=0.01, abs=last_digit), name
