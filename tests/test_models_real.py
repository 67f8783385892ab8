"""Real checkpoints: our greedy tokens are Transformers', from the directory and from its GGUF."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from halfbyte.engine import Engine
from halfbyte.formats.checkpoint import Source, read, write_gguf
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.models.load import load
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.specs import Request, SamplingParams, recipe_of
from halfbyte.text.tokenizer import Tokenizer

TOKENS = 200
PROMPTS = {
    "stories260K": "Once upon a time",
    "tiny-gemma4": "<|turn>user\nTell me about the history of the sea.<turn|>\n<|turn>model\n",
}


def checkpoint(name: str) -> Path:
    path = Path(__file__).resolve().parents[2] / "shared" / "models" / name
    if not path.exists():
        pytest.skip(f"needs the shared test data: {path} is absent")
    return path


def prompt_of(source: Source, name: str) -> list[int]:
    assert source.assets is not None
    return Tokenizer(source.assets).encode_raw(PROMPTS[name])


def greedy(source: Source, ids: list[int], *, kv: str = "f32", chunk: int = 512) -> list[int]:
    decoder = load(source, ReferenceOps())
    engine = Engine(decoder, context=512, kv=kv, prefill_chunk=chunk)  # type: ignore[arg-type]
    request = Request(
        prompt_ids=tuple(ids), max_tokens=TOKENS, sampling=SamplingParams(temperature=0)
    )
    return list(engine.generate([request])[0].token_ids)


def transformers_greedy(path: Path, ids: list[int]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    plain = GenerationConfig(do_sample=False, max_new_tokens=TOKENS, eos_token_id=-1)
    with torch.no_grad():
        output = model.generate(torch.tensor([ids]), generation_config=plain)
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_tokens_equal_transformers(name: str) -> None:
    """200 tokens in f32; for tiny-gemma4 that is beyond its sliding window of 128."""
    path = checkpoint(name)
    source = read(path)
    ids = prompt_of(source, name)
    theirs = transformers_greedy(path, ids)
    assert len(theirs) == TOKENS
    assert greedy(source, ids) == theirs
    assert greedy(source, ids, chunk=7) == theirs


@pytest.mark.parametrize("recipe", ["f32", "bf16", "q8_0", "q4_0", "q4_0-pure"])
@pytest.mark.parametrize("name", PROMPTS)
def test_a_gguf_gives_the_tokens_of_its_directory(name: str, recipe: str, tmp_path: Path) -> None:
    directory = Quantized(read(checkpoint(name)), recipe_of(recipe))
    write_gguf(directory, tmp_path / "model.gguf")
    file = read(tmp_path / "model.gguf")
    ids = prompt_of(file, name)
    assert ids == prompt_of(directory, name)
    assert greedy(file, ids, kv="bf16") == greedy(directory, ids, kv="bf16")


@pytest.mark.gpu
@pytest.mark.parametrize("name", PROMPTS)
def test_the_reference_runs_on_cuda(name: str) -> None:
    path = checkpoint(name)
    source = read(path)
    ids = prompt_of(source, name)
    torch.backends.cuda.matmul.allow_tf32 = False
    engine = Engine(load(source, ReferenceOps("cuda")), context=512, kv="f32")
    request = Request(
        prompt_ids=tuple(ids), max_tokens=TOKENS, sampling=SamplingParams(temperature=0)
    )
    assert list(engine.generate([request])[0].token_ids) == transformers_greedy(path, ids)
