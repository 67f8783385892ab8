"""Checkpoints on a Q4_0 lattice, through quantize: the same weights, and nothing else touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from oracle import LLAMA, oracle
from packed_files import LAYOUTS, packed_checkpoint
from safetensors.torch import load_file, save_file

from halfbyte.cli.inspect import command as inspect_command
from halfbyte.cli.quantize import command
from halfbyte.errors import InvalidInputError
from halfbyte.formats.checkpoint import read
from halfbyte.numerics.codec import decode, encode
from halfbyte.numerics.lattice import Counts
from halfbyte.quantizer.opening import open_source
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.quantizer.recovered import Recovered
from halfbyte.specs import SCHEMES, Recipe, recipe_of
from halfbyte.workflows import quantize

LAYERS = 7 * LLAMA["num_hidden_layers"]


def on_lattice(tensor: torch.Tensor) -> torch.Tensor:
    return decode(encode(tensor, SCHEMES["q4_0"], method="search")).bfloat16()


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A bf16 checkpoint whose layers lie on a lattice; its embedding and its head do not."""
    path = tmp_path / "trained"
    oracle({**LLAMA, "hidden_size": 256, "intermediate_size": 256}).bfloat16().save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj" in name:
            tensors[name] = on_lattice(tensor)
    save_file(tensors, path / "model.safetensors")
    return path


def test_layers_come_back_and_the_rest_is_quantized(trained: Path) -> None:
    source = read(trained)
    found = Recovered(source, recipe_of("q4_0"))
    quantized = Quantized(found, found.recipe)
    for name, tensor in quantized.tensors():
        original = decode(source.tensor(name))
        if ".attn." in name or ".mlp." in name:
            assert tensor.scheme == SCHEMES["q4_0"]
            assert torch.equal(decode(tensor).bfloat16().float(), original), name
        elif len(tensor.shape) > 1:
            assert tensor.scheme == SCHEMES["q6_k"]
            assert not torch.equal(decode(tensor), original)
    blocks = sum(decode(source.tensor(n)).numel() // 32 for n in source.schemes if "layers" in n)
    vectors = 2 * LLAMA["num_hidden_layers"] * 256 // 32
    assert found.matrices == LAYERS and found.counts == Counts(exact=blocks - vectors)


def test_quantizing_anew_would_move_blocks(trained: Path) -> None:
    source = read(trained)
    anew = Quantized(source, recipe_of("q4_0"), method="rtn").tensor("layers.0.mlp.up.weight")
    original = decode(source.tensor("layers.0.mlp.up.weight"))
    same = (decode(anew).bfloat16() == original.bfloat16()).view(-1, 32).all(dim=1)
    assert same.float().mean() < 0.9


@pytest.mark.parametrize(
    ("recipe", "scheme"),
    [("q8_0", "q8_0"), ("int4-g32-f16", "int4-g32-f16"), ("q6_k", "q4_0"), ("bf16", "bf16")],
)
def test_what_the_recipe_asks_for(trained: Path, recipe: str, scheme: str) -> None:
    """A scheme that holds q4_0 is taken; floats are left alone."""
    source = read(trained)
    found = Recovered(source, Recipe(name="all", rules=(("*", recipe),)))
    stored = Quantized(found, found.recipe).tensor("layers.1.attn.o.weight")
    assert stored.scheme.name == scheme
    original = decode(source.tensor("layers.1.attn.o.weight"))
    assert torch.equal(decode(stored).bfloat16().float(), original)


def test_other_checkpoints_are_not_touched(stories260k: Path) -> None:
    source = read(stories260k)
    found = Recovered(source, recipe_of("q4_0"))
    assert found.matrices == 0 and found.schemes == source.schemes
    assert found.recipe.rules == recipe_of("q4_0").rules


def test_the_command_says_so_and_the_manifest_keeps_it(trained: Path, tmp_path: Path) -> None:
    target = tmp_path / "q.gguf"
    said = CliRunner().invoke(command, [str(trained), "-o", str(target)])
    assert said.exit_code == 0, said.output
    assert f"{LAYERS} matrices lie on a Q4_0 lattice" in said.stderr
    kept = json.loads((tmp_path / "q.gguf.manifest.json").read_text())["lattice"]
    assert kept["matrices"] == LAYERS and kept["near"] == kept["searched"] == 0 < kept["exact"]
    stored = read(target).tensor("layers.0.attn.k.weight")
    original = decode(read(trained).tensor("layers.0.attn.k.weight"))
    assert torch.equal(decode(stored).bfloat16().float(), original)
    page = CliRunner().invoke(inspect_command, [str(target)]).stdout
    assert f"{LAYERS} matrices lay on a Q4_0 lattice; {kept['exact']:,} of" in page


def test_it_can_be_switched_off(trained: Path, tmp_path: Path) -> None:
    target = tmp_path / "q.gguf"
    arguments = [str(trained), "-o", str(target), "--no-lattice", "--method", "rtn"]
    said = CliRunner().invoke(command, arguments)
    assert said.exit_code == 0 and "lattice" not in said.stderr
    assert "lattice" not in json.loads((tmp_path / "q.gguf.manifest.json").read_text())
    stored = read(target).tensor("layers.0.attn.k.weight")
    original = decode(read(trained).tensor("layers.0.attn.k.weight"))
    assert not torch.equal(decode(stored).bfloat16().float(), original)


def test_what_its_makers_quantized_is_not_rounded_again(tmp_path: Path) -> None:
    """Though it is in f32 here, for want of a scheme that holds it."""
    packed_checkpoint(tmp_path / "packed", LAYOUTS["gptq-sorted"])
    with pytest.raises(InvalidInputError, match=r"attn.q.weight: was quantized by its makers"):
        quantize(str(tmp_path / "packed"), tmp_path / "q.gguf")
    assert not (tmp_path / "q.gguf").exists()
    made = quantize(str(tmp_path / "packed"), tmp_path / "f.gguf", recipe="f32")
    assert read(made.path).schemes["layers.0.attn.q.weight"].name == "f32"


@pytest.mark.parametrize("layout", ["int8", "nf4", "awq-32"])
def test_nor_is_what_is_in_another_packages_scheme(layout: str, tmp_path: Path) -> None:
    packed_checkpoint(tmp_path / "packed", LAYOUTS[layout])
    with pytest.raises(InvalidInputError, match="rounding it again to q4_0 would damage it"):
        quantize(str(tmp_path / "packed"), tmp_path / "q.gguf")


def test_what_q4_0_holds_becomes_q4_0(tmp_path: Path) -> None:
    packed_checkpoint(tmp_path / "packed", LAYOUTS["gptq-128"])
    made = quantize(str(tmp_path / "packed"), tmp_path / "q.gguf")
    stored = read(made.path).tensor("layers.0.attn.q.weight")
    assert stored.scheme.name == "q4_0"
    original = read(tmp_path / "packed").tensor("layers.0.attn.q.weight")
    assert torch.equal(decode(stored), decode(original))


@pytest.mark.parametrize("recipe", ["nf4", "int4-g32"])
def test_a_recipe_that_no_gguf_holds_runs_without_being_kept(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    oracle({**LLAMA, "hidden_size": 128, "intermediate_size": 128}).save_pretrained(tmp_path / "m")
    found = open_source(str(tmp_path / "m"), recipe=recipe)
    assert found.tensor("layers.0.attn.q.weight").scheme.name == recipe
    assert not (tmp_path / "cache").exists()
