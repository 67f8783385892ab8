"""Checkpoints: names, shapes and row orders, a directory and its GGUF, damage, and memory."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.errors import HalfbyteError, IntegrityError, InvalidInputError, UnsupportedError
from halfbyte.formats.checkpoint import Checkpoint, read, write_gguf
from halfbyte.formats.finite import check_finite
from halfbyte.formats.paired import to_halves, to_pairs
from halfbyte.kernels.cpu import CPUOps, instruction_set
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.models.load import load
from halfbyte.numerics.codec import decode, encode
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import SCHEMES


@pytest.fixture(params=["tiny_gemma4", "stories260k"])
def directory(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def weights_of(source: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: decode(tensor) for name, tensor in source.tensors()}


def copied(directory: Path, to: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The checkpoint with its tensors changed."""
    to.mkdir()
    for file in directory.glob("*.json"):
        shutil.copy(file, to)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors")
    return to


def test_a_directory_gives_its_tensors_under_our_names(directory: Path) -> None:
    source = read(directory)
    stored = load_file(directory / "model.safetensors")
    assert list(source.schemes) == [tensor.name for tensor in source.spec.tensors()]
    assert len(source.schemes) + len(source.unused) == len(stored)
    embedding = next(stored[name] for name in stored if name.endswith("embed_tokens.weight"))
    assert torch.equal(decode(source.tensor("embed.weight")), embedding.float())
    for tensor in source.spec.tensors():
        assert source.tensor(tensor.name).shape == tensor.shape


def test_a_directory_and_its_gguf_are_the_same_model(directory: Path, tmp_path: Path) -> None:
    source = read(directory)
    path = tmp_path / "model.gguf"
    seen: list[tuple[int, int]] = []
    write_gguf(source, path, progress=lambda *done: seen.append(done))
    found = read(path)
    assert found.spec == source.spec
    assert found.assets == source.assets and found.assets is not None
    assert found.unused == ()
    ours, theirs = weights_of(source), weights_of(found)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert seen[-1][0] == seen[-1][1] > 0
    reader = gguf.GGUFReader(path)
    assert {t.name for t in reader.tensors if t.tensor_type != 0 and len(t.shape) == 1} == set()
    again = tmp_path / "again"
    again.mkdir()
    write_gguf(found, again / "model.gguf")
    assert (again / "model.gguf").read_bytes() == path.read_bytes(), "writing is a fixed point"


def test_paired_rows_are_those_of_the_converter(stories260k: Path, tmp_path: Path) -> None:
    """The reordering of convert_hf_to_gguf: reshape to (heads, 2, d/2, ...), swap, flatten."""
    write_gguf(read(stories260k), tmp_path / "x.gguf")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    stored = load_file(stories260k / "model.safetensors")
    written = {tensor.name: tensor.data for tensor in reader.tensors}
    for part, heads in (("q", 8), ("k", 4)):
        weight = stored[f"model.layers.1.self_attn.{part}_proj.weight"]
        expected = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape_as(weight)
        assert torch.equal(torch.tensor(written[f"blk.1.attn_{part}.weight"]), expected)
    value = stored["model.layers.1.self_attn.v_proj.weight"]
    assert torch.equal(torch.tensor(written["blk.1.attn_v.weight"]), value)


@pytest.mark.parametrize("name", ["f32", "bf16", "q4_0", "q8_0", "q6_k"])
def test_both_row_orders_are_exact(name: str) -> None:
    scheme = SCHEMES[name]
    data = np.random.default_rng(0).integers(0, 256, (24, scheme.row_bytes(256)), dtype=np.uint8)
    tensor = QTensor(scheme, (24, 256), data)
    paired = to_pairs(tensor, 3)
    assert paired.data[:4].tobytes() == data[[0, 4, 1, 5]].tobytes()
    assert paired.data.tobytes() != data.tobytes()
    assert to_halves(paired, 3).data.tobytes() == data.tobytes()


def test_a_bias_moves_number_by_number() -> None:
    values = np.arange(8, dtype="<f4")[None]
    bias = QTensor(SCHEMES["f32"], (8,), values.view(np.uint8))
    paired = to_pairs(bias, 2)
    assert decode(paired).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert decode(to_halves(paired, 2)).tolist() == values[0].tolist()


def test_schemes_survive_the_gguf(stories260k: Path, tmp_path: Path) -> None:
    """A source of mixed schemes, as the quantizer makes one."""
    source = read(stories260k)
    mixed = Mixed(source)
    write_gguf(mixed, tmp_path / "q.gguf", extra_metadata={"general.name": "stories"})
    found = read(tmp_path / "q.gguf")
    assert found.schemes == mixed.schemes
    for name, tensor in mixed.tensors():
        assert found.tensor(name).data.tobytes() == tensor.data.tobytes(), name
    metadata = gguf.GGUFReader(tmp_path / "q.gguf").fields
    assert metadata["general.name"].contents() == "stories"
    assert metadata["general.file_type"].contents() == 2
    assert metadata["general.quantization_version"].contents() == 2


class Mixed:
    """A source in Q4_0 where the width allows it, else F16; vectors as they are."""

    def __init__(self, source: Checkpoint) -> None:
        self.source, self.spec, self.assets = source, source.spec, source.assets
        self.schemes = {
            tensor.name: SCHEMES["f32"]
            if len(tensor.shape) == 1
            else SCHEMES["f16" if tensor.shape[-1] % 32 else "q4_0"]
            for tensor in source.spec.tensors()
        }

    def tensors(self) -> Any:
        return ((name, self.tensor(name)) for name in self.schemes)

    def tensor(self, name: str) -> QTensor:
        from halfbyte.numerics.codec import convert

        return convert(self.source.tensor(name), self.schemes[name])


LAYER = "model.layers.2.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(LAYER), "1 tensors are missing: layers.2.self_attn.q_proj.weight"),
        (lambda t: t.clear(), "47 tensors are missing: .*, .* and 42 more"),
        (lambda t: t.update(extra=torch.zeros(2)), "1 tensors are not part of this model: extra"),
        (
            lambda t: t.update({LAYER: torch.zeros(63, 64)}),
            r"'layers.2.attn.q.weight' .*\(63, 64\) .* \(64, 64\)",
        ),
    ],
)
def test_a_wrong_set_of_tensors(
    stories260k: Path, tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises(IntegrityError, match=message):
        read(copied(stories260k, tmp_path / "c", change))


def test_a_stored_copy_of_a_tied_head_is_left_out(stories260k: Path, tmp_path: Path) -> None:
    changed = copied(
        stories260k,
        tmp_path / "c",
        lambda t: t.update({"lm_head.weight": torch.zeros(512, 64)}),
    )
    source = read(changed)
    assert source.unused == ("lm_head.weight",) and "head.weight" not in source.schemes


def test_an_untied_head_stands_outside_the_prefix(stories260k: Path, tmp_path: Path) -> None:
    head = torch.arange(512 * 64, dtype=torch.float32).reshape(512, 64)
    changed = copied(stories260k, tmp_path / "c", lambda t: t.update({"lm_head.weight": head}))
    config = json.loads((changed / "config.json").read_text()) | {"tie_word_embeddings": False}
    (changed / "config.json").write_text(json.dumps(config))
    source = read(changed)
    assert torch.equal(decode(source.tensor("head.weight")), head)
    write_gguf(source, tmp_path / "x.gguf")
    found = read(tmp_path / "x.gguf")
    assert found.spec == source.spec
    assert torch.equal(decode(found.tensor("head.weight")), head)


def test_unprefixed_names(stories260k: Path, tmp_path: Path) -> None:
    def strip(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    assert len(read(copied(stories260k, tmp_path / "c", strip)).schemes) == 47


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(stories260k: Path, tmp_path: Path, bad: float) -> None:
    changed = copied(stories260k, tmp_path / "c", lambda t: t[LAYER][5].fill_(bad))
    with pytest.raises(IntegrityError, match=r"layers.2.attn.q.weight: .*NaN or infinite"):
        list(read(changed).tensors())


@pytest.mark.parametrize("native", [False, True])
def test_such_weights_are_not_loaded(stories260k: Path, tmp_path: Path, native: bool) -> None:
    if native and instruction_set() is None:
        pytest.skip("the native kernels are not built")
    changed = copied(stories260k, tmp_path / "c", lambda t: t[LAYER][5].fill_(float("nan")))
    ops = CPUOps(threads=1) if native else ReferenceOps()
    with pytest.raises(IntegrityError, match=r"layers.2.attn.q.weight: .*NaN or infinite"):
        load(read(changed), ops)


def scales_of(name: str) -> list[int]:
    """Where the floats of one block (or of a row) begin, from its layout."""
    elsewhere = {"q6_k": [208], "q3_k": [108], "q2_k": [80, 82], "nf4": [0, 8], "int8": [0, 50]}
    return elsewhere.get(name, [0, 2] if name in ("q4_1", "q5_1", "q4_k", "q5_k") else [0])


def infinity(name: str, offset: int) -> bytes:
    """The bytes of an infinite float there."""
    if name in ("f32", "nf4", "int8") and offset < 50:
        return 0x7F800000.to_bytes(4, "little")
    halves = name == "bf16" or ("int4" in name and not name.endswith("-f16"))
    return (0x7F80 if halves else 0x7C00).to_bytes(2, "little")


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_is_checked_to_be_finite(name: str) -> None:
    scheme = SCHEMES[name]
    width = 3 * scheme.block
    good = QTensor(scheme, (4, width), np.full((4, scheme.row_bytes(width)), 0x11, np.uint8))
    if name == "int8":  # a column that is kept is named in the row
        width = 16
        good = encode(torch.ones(4, 16), scheme, method="search", importance=torch.ones(16))
    check_finite(good, name="w")
    for offset in scales_of(name):
        infinite = infinity(name, offset)
        data = good.data.copy()
        at = offset + (0 if scheme.row_header else 2 * scheme.block_bytes)
        data[3, at : at + len(infinite)] = np.frombuffer(infinite, np.uint8)
        spoiled = QTensor(scheme, (4, width), data)
        assert not torch.isfinite(decode(spoiled)).all()
        with pytest.raises(IntegrityError):
            check_finite(spoiled, name="w")


def test_what_read_refuses(stories260k: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="does not exist"):
        read(tmp_path / "nothing")
    with pytest.raises(IntegrityError, match=r"no config.json, and 0 \.gguf models"):
        read(tmp_path)
    changed = copied(stories260k, tmp_path / "c", lambda t: None)
    config = json.loads((changed / "config.json").read_text())
    packed = config | {"quantization_config": {"quant_method": "hqq"}}
    (changed / "config.json").write_text(json.dumps(packed))
    with pytest.raises(UnsupportedError, match="quant_method is 'hqq'"):
        read(changed)
    (changed / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(UnsupportedError, match="unknown model type 'mamba'") as caught:
        read(changed)
    assert caught.value.where == str(changed)
    (changed / "config.json").write_text("[]")
    with pytest.raises(IntegrityError, match="not a JSON object"):
        read(changed)


def test_a_directory_of_one_gguf(stories260k: Path, tmp_path: Path) -> None:
    write_gguf(read(stories260k), tmp_path / "model.gguf")
    assert read(tmp_path).spec == read(stories260k).spec


def test_a_damaged_gguf_is_only_ever_a_halfbyte_error(stories260k: Path, tmp_path: Path) -> None:
    """Through the families, too: a flipped bit in a count or a width must not run away."""
    source = read(stories260k)
    write_gguf(source, tmp_path / "good.gguf")
    good = (tmp_path / "good.gguf").read_bytes()
    head = len(good) - sum(tensor.nbytes for _, tensor in source.tensors())
    facts = good.index(b"tokenizer.ggml.model")
    path, rng = tmp_path / "bad.gguf", random.Random(3)
    for trial in range(600):
        data = bytearray(good)
        data[rng.randrange(facts if trial % 2 else head)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with suppress(HalfbyteError):
            read(path)


def test_reading_needs_no_torch(directory: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from halfbyte.formats.checkpoint import read;"
        "s = read(Path(sys.argv[1])); [name for name, _ in s.tensors()];"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code, str(directory)], check=True, env=environment())


def environment() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}


MEASURE = """
import resource, sys
from pathlib import Path
from halfbyte.formats.checkpoint import read
source = read(Path(sys.argv[1]))
def resident():
    status = Path("/proc/self/status").read_text().splitlines()
    return sum(int(l.split()[1]) for l in status if l.startswith(("RssAnon", "RssFile"))) * 1024
before, peak, largest, total = resident(), 0, 0, 0
for name, tensor in source.tensors():
    assert int(tensor.data[:, ::512].max()) >= 0
    peak = max(peak, resident())
    largest, total = max(largest, tensor.nbytes), total + tensor.nbytes
print(peak - before, largest, total)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_streaming_holds_about_one_tensor(stories260k: Path, tmp_path: Path) -> None:
    """A checkpoint of 300 MB in 40 tensors of some megabytes passes through 30 MB."""
    config = json.loads((stories260k / "config.json").read_text())
    config |= {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16}
    config |= {"intermediate_size": 2816, "num_hidden_layers": 12, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = {"embed_tokens.weight": (512, 1024), "norm.weight": (1024,)}
    for index in range(12):
        layer = f"layers.{index}."
        for part in "qkvo":
            shapes[f"{layer}self_attn.{part}_proj.weight"] = (1024, 1024)
        shapes[f"{layer}mlp.gate_proj.weight"] = shapes[f"{layer}mlp.up_proj.weight"] = (2816, 1024)
        shapes[f"{layer}mlp.down_proj.weight"] = (1024, 2816)
        for part in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{part}.weight"] = (1024,)
    tensors = {f"model.{n}": torch.ones(s, dtype=torch.bfloat16) for n, s in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        env=environment(),
    )
    grown, largest, total = map(int, measured.stdout.split())
    assert total > 300e6
    assert grown < largest + 24e6, f"{grown} bytes resident above the start; largest {largest}"


@pytest.mark.peers
def test_llama_cpp_runs_our_file(stories260k: Path, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    write_gguf(read(stories260k), tmp_path / "x.gguf")
    model = llama_cpp.Llama(str(tmp_path / "x.gguf"), verbose=False, n_ctx=128, n_threads=2)
    answer = model("Once upon a time", max_tokens=30, temperature=0.0)["choices"][0]["text"]
    assert answer.startswith(", there was a little girl named Lily. She loved to play outside")
