"""Adapters: every way in which a directory can be no adapter, or one for another model."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import PLAIN, tensors_of, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import CONFIGS

from halfbyte.errors import HalfbyteError, IntegrityError, InvalidInputError, UnsupportedError
from halfbyte.families import spec_of
from halfbyte.formats.lora import WEIGHTS, is_adapter, read, split_scale
from halfbyte.formats.lora_config import CONFIG, read_config

LLAMA = spec_of(CONFIGS["llama"])
GEMMA4 = spec_of(CONFIGS["gemma4-unified"])
SHAPES = {
    f"model.layers.{layer}.{module}": shape
    for layer in (0, 1)
    for module, shape in {"self_attn.q_proj": (64, 64), "mlp.down_proj": (64, 96)}.items()
}
Q0 = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


def test_a_plain_adapter(tmp_path: Path) -> None:
    adapter = read(write_adapter(tmp_path, tensors_of(SHAPES), scheme="bf16"), LLAMA, scale=0.5)
    assert {module: update.weight for module, update in adapter.updates.items()} == {
        Q0: "layers.0.attn.q.weight",
        "model.layers.0.mlp.down_proj": "layers.0.mlp.down.weight",
        "model.layers.1.self_attn.q_proj": "layers.1.attn.q.weight",
        "model.layers.1.mlp.down_proj": "layers.1.mlp.down.weight",
    }
    assert {update.scale for update in adapter.updates.values()} == {0.5 * 4 / 2}
    assert adapter.nbytes == 2 * 2 * 2 * (64 + 64 + 96 + 64)
    assert adapter.unused == ()
    assert is_adapter(tmp_path) and not is_adapter(tmp_path.parent)


@pytest.mark.parametrize("prefix", ["model.", "", "model.language_model.", "language_model.model."])
def test_any_prefix_of_the_family(prefix: str, tmp_path: Path) -> None:
    """Text models and the text part of multimodal ones, in old and new names."""
    shapes = {f"{prefix}layers.{i}.self_attn.k_proj": (32, 64) for i in range(4)}
    vision = {"model.vision_tower.layers.0.self_attn.k_proj": (8, 8)}
    config = {**PLAIN, "target_modules": r".*k_proj"}
    path = write_adapter(tmp_path, tensors_of({**shapes, **vision}), config)
    adapter = read(path, GEMMA4)
    assert [update.weight for update in adapter.updates.values()] == [
        f"layers.{i}.attn.k.weight" for i in range(4)
    ]
    assert adapter.unused == tuple(vision)
    assert adapter.nbytes == 4 * 4 * 2 * (32 + 64) < adapter.stored.nbytes


def test_updates_of_keys_that_a_layer_shares_change_nothing(tmp_path: Path) -> None:
    spec = spec_of(CONFIGS["gemma4-shared-kv"])
    last = f"model.layers.{len(spec.layers) - 1}.self_attn"
    width = spec.layers[-1].attention.query_width
    shapes = {f"{last}.q_proj": (width, 64), f"{last}.k_proj": (32, 64)}
    config = {**PLAIN, "target_modules": ".*[qk]_proj"}
    adapter = read(write_adapter(tmp_path, tensors_of(shapes), config), spec)
    assert [*adapter.updates] == [f"{last}.q_proj"] and adapter.unused == (f"{last}.k_proj",)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("layer_replication", [[0, 2]]),
        ("fan_in_fan_out", True),
        ("alora_invocation_tokens", [5]),
        ("init_lora_weights", "pissa_niter_16"),
        ("use_something_of_next_year", {"on": 1}),
        ("layers_pattern", "blocks"),
        ("rank_pattern", {".*q_proj": 4}),
        ("alpha_pattern", {"(q|k)_proj": 4}),
    ],
)
def test_more_than_plain_lora_is_refused_by_name(field: str, value: Any, tmp_path: Path) -> None:
    config = {**PLAIN, "layers_to_transform": [0], field: value}
    with pytest.raises(UnsupportedError, match=field):
        read(write_adapter(tmp_path, tensors_of(SHAPES), config), LLAMA)


@pytest.mark.parametrize("kind", ["IA3", "LOHA", "PROMPT_TUNING", None, 3])
def test_other_kinds_of_adapters_are_refused(kind: Any, tmp_path: Path) -> None:
    config = {**PLAIN, "peft_type": kind}
    with pytest.raises(UnsupportedError, match=repr(kind)):
        read(write_adapter(tmp_path, tensors_of(SHAPES), config), LLAMA)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("r", 0, "rank 'r'"),
        ("r", True, "rank 'r'"),
        ("r", "8", "rank 'r'"),
        ("r", 10**9, "rank 'r'"),
        ("lora_alpha", None, "lora_alpha"),
        ("lora_alpha", True, "lora_alpha"),
        ("lora_alpha", 10**400, "lora_alpha"),
        ("lora_alpha", float("inf"), "lora_alpha"),
        ("target_modules", None, "target_modules"),
        ("target_modules", [1], "target_modules"),
        ("target_modules", [], "target_modules"),
        ("layers_to_transform", "0", "layers_to_transform"),
        ("rank_pattern", {"q_proj": -1}, "q_proj"),
        ("rank_pattern", [4], "rank_pattern"),
        ("alpha_pattern", {"q_proj": "2"}, "q_proj"),
    ],
)
def test_absurd_values(field: str, value: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=named):
        read(write_adapter(tmp_path, tensors_of(SHAPES), {**PLAIN, field: value}), LLAMA)


def without(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[f"base_model.model.{name}.weight"]

    return change


def renamed(old: str, new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def resized(shape: tuple[int, ...], name: str = f"{Q0}.lora_A") -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"base_model.model.{name}.weight"] = torch.zeros(shape)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without(f"{Q0}.lora_A"), "q_proj has no lora_A.weight"),
        (without(f"{Q0}.lora_B"), "q_proj has no lora_B.weight"),
        (without(f"{Q0}.lora_A", f"{Q0}.lora_B"), "the targets include layers.0.attn.q.weight"),
        (renamed("0.self_attn.q_proj", "0.self_attn.qkv_proj"), "this model has no .*qkv_proj"),
        (renamed("layers.1.", "layers.7."), "this model has no model.layers.7"),
        (renamed("0.self_attn.q_proj", "0.self_attn.k_proj"), "targets include"),
        (renamed("1.mlp.down_proj", "1.mlp.up_proj"), "targets include"),
        (resized((3, 64)), "A \\[3, 64\\] and B \\[64, 2\\]; its rank is 2"),
        (resized((2, 64, 1)), "its rank is 2"),
        (resized((2, 80)), "q_proj is 64 x 80 in it, here 64 x 64"),
        (resized((80, 2), f"{Q0}.lora_B"), "q_proj is 80 x 64 in it, here 64 x 64"),
        (lambda tensors: tensors.clear(), "holds no tensors"),
    ],
)
def test_what_does_not_fit(change: Callable[[Tensors], None], said: str, tmp_path: Path) -> None:
    tensors = tensors_of(SHAPES)
    change(tensors)
    with pytest.raises(IntegrityError, match=said) as caught:
        read(write_adapter(tmp_path, tensors), LLAMA)
    if "its rank" not in said and "has no lora" not in said and "no tensors" not in said:
        assert caught.value.hint == "it was made for 'somebody/base'"


def test_an_update_that_is_not_among_the_targets(tmp_path: Path) -> None:
    tensors = tensors_of({**SHAPES, "model.layers.0.self_attn.o_proj": (64, 64)})
    with pytest.raises(IntegrityError, match="o_proj is not among the targets"):
        read(write_adapter(tmp_path, tensors), LLAMA)


def test_one_layer_under_two_names(tmp_path: Path) -> None:
    tensors = tensors_of({**SHAPES, "layers.0.self_attn.q_proj": (64, 64)})
    with pytest.raises(IntegrityError, match="two updates"):
        read(write_adapter(tmp_path, tensors), LLAMA)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (f"{Q0}.lora_A.weight", f"{Q0}.lora_magnitude_vector"),
        (f"{Q0}.lora_A", "model.embed_tokens.lora_embedding_A"),
        (f"{Q0}.lora_A", f"{Q0}.lora_A.default"),
        ("base_model.model.model.layers.0.self_attn", "model.layers.0.self_attn"),
        (Q0, "lm_head"),
    ],
)
def test_tensors_that_are_no_update_of_a_linear(old: str, new: str, tmp_path: Path) -> None:
    tensors = tensors_of(SHAPES)
    renamed(old, new)(tensors)
    with pytest.raises(UnsupportedError):
        read(write_adapter(tmp_path, tensors), LLAMA)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none(number: float, tmp_path: Path) -> None:
    path = write_adapter(tmp_path, tensors_of(SHAPES))
    data = bytearray((path / WEIGHTS).read_bytes())
    data[-4:] = struct.pack("<f", number)
    (path / WEIGHTS).write_bytes(data)
    adapter = read(path, LLAMA)
    *good, last = adapter.stored.pairs
    for module in good:
        adapter.tensors(module)
    with pytest.raises(IntegrityError, match="NaN") as caught:
        adapter.tensors(last)
    assert caught.value.where == f"base_model.model.{last}.lora_B.weight"


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=CONFIG):
        read(tmp_path, LLAMA)
    path = write_adapter(tmp_path, tensors_of(SHAPES))
    (path / WEIGHTS).rename(path / "adapter_model.bin")
    with pytest.raises(UnsupportedError, match="pickled"):
        read(path, LLAMA)
    (path / "adapter_model.bin").unlink()
    with pytest.raises(IntegrityError, match=WEIGHTS):
        read(path, LLAMA)


def test_a_scale_is_written_after_the_path(tmp_path: Path) -> None:
    assert split_scale("here") == (Path("here"), 1.0)
    assert split_scale("here@0.5") == (Path("here"), 0.5)
    assert split_scale("me@home/here") == (Path("me@home/here"), 1.0)
    odd = tmp_path / "odd@2"
    odd.mkdir()
    assert split_scale(str(odd)) == (odd, 1.0)
    assert split_scale(f"{odd}@2") == (odd, 2.0)
    with pytest.raises(InvalidInputError, match="scale"):
        read(write_adapter(tmp_path, tensors_of(SHAPES)), LLAMA, scale=float("nan"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


FIELDS = (*PLAIN, "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern")


@settings(max_examples=200, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_any_config_is_read_or_refused(
    changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write_adapter(tmp_path_factory.mktemp("any"), {}, {**PLAIN, **changes})
    try:
        config = read_config(path)
    except HalfbyteError:
        return
    assert config.rank_of(Q0) >= 1 and isinstance(config.covers(Q0), bool)
    assert config.scale_of(Q0) == config.scale_of(Q0)
