"""GGUFs as people have them: in parts, by older converters, aligned otherwise."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest

from halfbyte.cli import main
from halfbyte.errors import IntegrityError
from halfbyte.formats.checkpoint import Checkpoint, read, write_gguf
from halfbyte.formats.gguf import GGUFFile
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.specs import recipe_of


@pytest.fixture(scope="module")
def whole(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of ours, in several schemes."""
    path = tmp_path_factory.mktemp("whole") / "stories.gguf"
    write_gguf(Quantized(read(stories260k), recipe_of("q4_0"), method="rtn"), path)
    return path


@pytest.fixture
def parts(whole: Path, tmp_path: Path) -> list[Path]:
    """The same in parts of 20 tensors, made by the gguf package."""
    rewrite(whole, tmp_path / "s.gguf", split_max_tensors=20)
    return sorted(tmp_path.glob("*.gguf"))


def rewrite(
    path: Path,
    to: Path,
    *,
    without: tuple[str, ...] = (),
    extra: dict[str, int] | None = None,
    **options: Any,
) -> None:
    """The same tensors, written by the gguf package; its own keys are those of `path`."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(to, "llama", **options)
    for key, value in (extra or {}).items():
        writer.add_uint32(key, value)
    if extra and "general.alignment" in extra:
        writer.data_alignment = extra["general.alignment"]
    for name, field in reader.fields.items():
        if name.startswith(("GGUF.", "general.architecture", *without)):
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_same(found: Checkpoint, wanted: Checkpoint) -> None:
    assert found.spec == wanted.spec and found.assets == wanted.assets is not None
    assert dict(found.schemes) == dict(wanted.schemes)
    for (name, ours), (_, theirs) in zip(found.tensors(), wanted.tensors(), strict=True):
        assert ours.data.tobytes() == theirs.data.tobytes(), name


def test_any_part_is_the_whole(whole: Path, parts: list[Path]) -> None:
    assert len(parts) == 3 and parts[1].name == "s-00002-of-00003.gguf"
    assert "tokenizer.ggml.tokens" not in GGUFFile(parts[1]).metadata
    for path in (*parts, parts[0].parent):
        assert_same(read(path), read(whole))


def test_inspect_shows_all_parts(
    whole: Path,
    parts: list[Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pages: list[list[str]] = []
    for path in (whole, parts[1]):
        monkeypatch.setattr("sys.argv", ["halfbyte", "inspect", "--tensors", str(path)])
        with pytest.raises(SystemExit):
            main()
        pages.append(capsys.readouterr().out.splitlines()[1:])
    assert pages[0] == pages[1] and len(pages[0]) > 47


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    for path in (parts[0], parts[2], parts[0].parent):
        with pytest.raises(IntegrityError, match=r"missing of 3 parts: s-00002-of-00003\.gguf"):
            read(path)


def test_two_split_models_in_a_directory_are_not_one(parts: list[Path]) -> None:
    shutil.copy(parts[0], parts[0].with_name("other-00001-of-00001.gguf"))
    with pytest.raises(IntegrityError, match=r"2 \.gguf models"):
        read(parts[0].parent)


def test_parts_that_do_not_belong_together(parts: list[Path]) -> None:
    renamed = shutil.copy(parts[0], parts[0].with_name("alone.gguf"))
    with pytest.raises(IntegrityError, match="is number 0 of 3 parts") as caught:
        read(renamed)
    assert caught.value.where == str(renamed)
    kept = parts[1].read_bytes()
    shutil.copy(parts[2], parts[1])
    with pytest.raises(IntegrityError, match=r"is number 2 of 3 parts") as caught:
        read(parts[0])
    assert caught.value.where == str(parts[1])
    number = kept.index(b"split.no") + len("split.no") + 4
    twice = parts[2].read_bytes()
    assert kept[number : number + 2] == struct.pack("<H", 1)
    parts[1].write_bytes(twice[:number] + struct.pack("<H", 1) + twice[number + 2 :])
    with pytest.raises(IntegrityError, match=r"tensors, .* by name, of 47"):
        read(parts[0])


OLD = (
    "tokenizer.ggml.pre",
    "tokenizer.ggml.add_",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.unknown_token_id",
    "llama.vocab_size",
    "llama.rope.dimension_count",
    "llama.rope.freq_base",
    "llama.attention.key_length",
    "llama.attention.value_length",
    "general.file_type",
    "general.quantization_version",
    "halfbyte.",
)


def test_what_older_converters_left_out_is_known(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "old.gguf"
    rewrite(whole, path, without=OLD)
    assert not {key for key in GGUFFile(path).metadata if key.startswith(OLD)}
    assert_same(read(path), read(whole))
    data = bytearray(path.read_bytes())
    data[4] = 2  # version 2 differs from 3 in that it is never big-endian
    path.write_bytes(data)
    assert_same(read(path), read(whole))


def test_heads_without_groups_state_no_key_value_heads(whole: Path, tmp_path: Path) -> None:
    """Then there are as many of them, which is not this model: its k would have other rows."""
    path = tmp_path / "x.gguf"
    rewrite(whole, path, without=("llama.attention.head_count_kv",))
    with pytest.raises(IntegrityError, match=r"k\.weight.* has the shape"):
        read(path)


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_rope_factor_without_a_type_is_linear(whole: Path, tmp_path: Path, key: str) -> None:
    path = tmp_path / "x.gguf"
    rewrite(whole, path, extra={f"llama.{key}": 4})
    assert {layer.attention.rope.linear_factor for layer in read(path).spec.layers} == {4.0}


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_any_alignment(whole: Path, tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "x.gguf"
    rewrite(whole, path, extra={"general.alignment": alignment})
    file = GGUFFile(path)
    assert file.metadata["general.alignment"] == alignment
    assert {info.start % alignment for info in file.infos.values()} == {0}
    assert_same(read(path), read(whole))


def test_byte_level_vocabularies_need_neither_types_nor_scores(shared_data: Path) -> None:
    from halfbyte.text.assets import assets_from_metadata
    from halfbyte.text.tokenizer import Tokenizer

    path = shared_data / "tokenizers" / "ggml_vocab" / "ggml-vocab-gpt-2.gguf"
    metadata = GGUFFile(path).metadata
    kept = ("model", "tokens", "merges")
    bare = {f"tokenizer.ggml.{key}": metadata[f"tokenizer.ggml.{key}"] for key in kept}
    found, wanted = assets_from_metadata(bare), assets_from_metadata(metadata)
    assert found is not None and wanted is not None
    assert found.vocabulary.pre == "default"
    assert Tokenizer(found).encode("plain words", special=True) == Tokenizer(wanted).encode(
        "plain words", special=True
    )
