"""Exports: what each form holds, what it refuses before a byte is written, and the manifests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from commandline import Halfbyte
from oracle import LLAMA, oracle
from packed_files import CONFIG, LAYOUTS, packed_checkpoint

from halfbyte.errors import DoesNotFitError, HalfbyteError, InvalidInputError, UnsupportedError
from halfbyte.formats.checkpoint import read
from halfbyte.formats.manifest import described, record, ungated, verify
from halfbyte.numerics.codec import decode
from halfbyte.specs import SCHEMES, lossless_target
from halfbyte.workflows import Form, export, quantize
from halfbyte.workflows.exporting import IN_GGUF


def same_weights(path: Path, source: Path) -> None:
    ours, theirs = read(path), read(source)
    assert ours.spec == theirs.spec
    for name, q in theirs.tensors():
        assert torch.equal(decode(ours.tensor(name)), decode(q)), name


def recipe(tmp_path: Path, *rules: str) -> str:
    path = tmp_path / "recipe.toml"
    path.write_text("[rules]\n" + "\n".join(rules))
    return str(path)


@pytest.fixture(scope="module")
def quantized(tiny_gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Q4_0 with an embedding that every form can hold."""
    folder = tmp_path_factory.mktemp("quantized")
    path = folder / "tiny.gguf"
    rules = recipe(folder, '"embed.weight" = "bf16"', '"*" = "q4_0"')
    quantize(str(tiny_gemma4), path, recipe=rules, method="rtn")
    return path


@pytest.mark.parametrize(
    ("form", "model"),
    [("gguf", "model.gguf"), ("compressed-tensors", ""), ("ollama", "model.gguf")],
)
def test_every_form_has_the_same_weights(
    form: Form, model: str, quantized: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    made = export(str(quantized), target, form)
    assert made.path == target / model
    same_weights(made.path, quantized)
    assert verify(target) == len(
        [file for file in target.iterdir() if file.name != "manifest.json"]
    )
    document = described(target)
    assert document["method"] == "export" and document["form"] == form
    assert document["source"]["files"]["tiny.gguf"]["sha256"]
    assert document["source_manifest"]["method"] == "rtn"
    assert document["source_manifest"]["rules"] == [["embed.weight", "bf16"], ["*", "q4_0"]]
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def test_an_export_is_as_gated_as_its_source(quantized: Path, tmp_path: Path) -> None:
    made = export(str(quantized), tmp_path / "once.gguf", "gguf")
    again = export(str(made.path), tmp_path / "again.gguf", "gguf")
    assert "never measured" in str(ungated(again.path))
    record(again.path, {"gate": {"passed": True}})
    assert ungated(again.path) is None, "measured itself"
    oracle(LLAMA).save_pretrained(tmp_path / "plain")
    assert ungated(export(str(tmp_path / "plain"), tmp_path / "p.gguf", "gguf").path) is None


def test_lm_studio_finds_it_by_publisher_and_model(quantized: Path, tmp_path: Path) -> None:
    made = export(str(quantized), tmp_path / "models", "lmstudio")
    assert made.path == tmp_path / "models" / "halfbyte" / "tiny" / "tiny-Q4_0.gguf"
    same_weights(made.path, quantized)
    assert verify(made.path) == 1
    export(str(quantized), tmp_path / "models", "lmstudio")  # again, over itself


def test_an_ollama_folder_is_whole(quantized: Path, tmp_path: Path) -> None:
    made = export(str(quantized), tmp_path / "o", "ollama")
    assert {file.name for file in (tmp_path / "o").iterdir()} == {
        "Modelfile",
        "manifest.json",
        "model.gguf",
    }
    assert (tmp_path / "o" / "Modelfile").read_text().startswith("FROM ./model.gguf\nTEMPLATE")
    assert made.notes[-1] == f"next: ollama create tiny -f {tmp_path / 'o' / 'Modelfile'}"
    fields = gguf.GGUFReader(made.path).fields
    assert fields["general.name"].contents() == "tiny"


@pytest.mark.parametrize(
    ("layout", "scheme"),
    [
        ("gptq-128", "q4_0"),
        ("compressed-32", "q4_0"),
        ("awq-128", "q8_0"),
        ("nf4", "f32"),
        ("int8", "f32"),
    ],
)
def test_what_others_quantized_becomes_a_gguf_of_the_same_weights(
    layout: str, scheme: str, tmp_path: Path
) -> None:
    packed_checkpoint(tmp_path / "packed", LAYOUTS[layout])
    made = export(str(tmp_path / "packed"), tmp_path / "m.gguf", "gguf")
    same_weights(made.path, tmp_path / "packed")
    assert read(made.path).schemes["layers.0.mlp.down.weight"].name == scheme


def test_what_others_quantized_goes_on_as_compressed_tensors(tmp_path: Path) -> None:
    packed_checkpoint(tmp_path / "packed", LAYOUTS["gptq-zeros"])
    made = export(str(tmp_path / "packed"), tmp_path / "w4", "compressed-tensors")
    same_weights(made.path, tmp_path / "packed")
    assert read(made.path).schemes["layers.0.attn.q.weight"].name == "uint4-g128-f16"


@pytest.mark.parametrize("name", ["int4-g32", "int4-g128", "uint4-g32"])
def test_quantize_to_what_no_gguf_has(name: str, tmp_path: Path) -> None:
    oracle(CONFIG).bfloat16().save_pretrained(tmp_path / "plain")
    made = quantize(str(tmp_path / "plain"), tmp_path / "w4", recipe=name)
    assert made.path == tmp_path / "w4"
    found = read(made.path)
    assert found.schemes["layers.0.mlp.up.weight"].name == name
    assert described(made.path)["recipe"] == name and verify(made.path) == 3


def test_a_mixed_recipe_goes_to_what_holds_it(tmp_path: Path) -> None:
    oracle(CONFIG).bfloat16().save_pretrained(tmp_path / "plain")
    rules = ('"embed.weight" = "bf16"', '"*.down.weight" = "int4-g128"', '"*" = "q4_0"')
    made = quantize(str(tmp_path / "plain"), tmp_path / "w4", recipe=recipe(tmp_path, *rules))
    found = read(made.path)
    assert found.schemes["layers.0.mlp.up.weight"].name == "int4-g32-f16"
    assert found.schemes["layers.0.mlp.down.weight"].name == "int4-g128"


@pytest.mark.parametrize(
    ("target", "name", "message"),
    [
        ("w4", "nf4", r"layers.0.attn.q.weight: is nf4; compressed-tensors holds"),
        ("w4.gguf", "int4-g32", r"w4.gguf: a GGUF has no type for int4-g32"),
        ("w4.gguf", "int8", r"a GGUF has no type for int8"),
    ],
)
def test_quantize_refuses_before_it_works(
    target: str, name: str, message: str, tmp_path: Path
) -> None:
    oracle(CONFIG).save_pretrained(tmp_path / "plain")
    with pytest.raises(UnsupportedError, match=message):
        quantize(str(tmp_path / "plain"), tmp_path / target, recipe=name)
    assert not (tmp_path / target).exists()


def test_what_compressed_tensors_cannot_hold(tiny_gemma4: Path, tmp_path: Path) -> None:
    """The usual recipe keeps the embedding in q6_k; the pure one has it in blocks."""
    for name, message in (("q4_0", "is q6_k"), ("q4_0-pure", "a table of embeddings")):
        path = tmp_path / f"{name}.gguf"
        quantize(str(tiny_gemma4), path, recipe=name, method="rtn")
        with pytest.raises(UnsupportedError, match=rf"embed.weight: {message}|{message}"):
            export(str(path), tmp_path / "w4", "compressed-tensors")
        assert not (tmp_path / "w4").exists()


def test_a_model_without_a_tokenizer_is_nothing_for_ollama(tmp_path: Path) -> None:
    oracle(LLAMA).save_pretrained(tmp_path / "plain")
    with pytest.raises(UnsupportedError, match="without a tokenizer"):
        export(str(tmp_path / "plain"), tmp_path / "o", "ollama")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("form", ["compressed-tensors", "ollama"])
def test_a_directory_that_is_there_stays_as_it_is(
    form: Form, quantized: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("x")
    with pytest.raises(InvalidInputError, match="is there already"):
        export(str(quantized), target, form)
    assert [file.name for file in target.iterdir()] == ["mine"]


@pytest.mark.parametrize("form", ["gguf", "compressed-tensors", "ollama", "lmstudio"])
def test_a_full_disk_leaves_nothing(
    form: Form, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DoesNotFitError, match="are free"):
        export(str(quantized), tmp_path / "out", form)
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert left == []


def test_an_error_half_way_leaves_nothing(tmp_path: Path) -> None:
    packed_checkpoint(tmp_path / "packed", LAYOUTS["compressed-32"])
    weights = tmp_path / "packed" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4:] = b"\xff\x7f\xff\x7f"  # a norm or a scale at the end: not a number
    weights.write_bytes(data)
    for form in ("gguf", "compressed-tensors"):
        with pytest.raises(HalfbyteError):
            export(str(tmp_path / "packed"), tmp_path / f"out-{form}", form)
        assert not [path for path in (tmp_path / f"out-{form}").rglob("*") if path.is_file()]


def test_the_command(halfbyte: Halfbyte, quantized: Path, tmp_path: Path) -> None:
    said = halfbyte("export", quantized, "--to", "ollama", "-o", tmp_path / "o")
    assert said.code == 0 and said.out.strip() == str(tmp_path / "o" / "model.gguf")
    assert "next: ollama create tiny" in said.err
    document = halfbyte(
        "export", quantized, "--to", "compressed-tensors", "-o", tmp_path / "w4", "--json"
    ).document
    assert document["schema"] == "halfbyte.export/1" and document["to"] == "compressed-tensors"
    assert json.loads(Path(document["manifest"]).read_text())["form"] == "compressed-tensors"
    assert halfbyte("inspect", tmp_path / "w4").code == 0
    again = halfbyte("export", quantized, "--to", "ollama", "-o", tmp_path / "o")
    assert again.code == 2 and "is there already" in again.err


def test_every_scheme_is_held_by_some_gguf_type() -> None:
    assert all(lossless_target(scheme, IN_GGUF) for scheme in SCHEMES.values())
