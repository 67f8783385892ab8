"""The report: one page that needs nothing else, drawings that tell the truth, the same numbers in
three shapes; and the errors of layers, against a naive computation."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from oracle import CONFIGS, MemorySource, oracle, source_of
from transformers import PreTrainedModel

from halfbyte.evals.fidelity import Change, Divergence, Fidelity
from halfbyte.evals.gate import Check
from halfbyte.evals.layers import LayerError, layer_errors
from halfbyte.evals.report import card, document, figures, page, write_report
from halfbyte.evals.report.facts import Facts, Point, Stored, gate_tables, stored_as
from halfbyte.evals.report.numbers import change, count, percent, plain, size
from halfbyte.evals.report.svg import ticks
from halfbyte.evals.tasks.outcome import Outcome, summarize
from halfbyte.evals.texts import Reading, Window
from halfbyte.families import family_of
from halfbyte.numerics.codec import decode
from halfbyte.specs import recipe_of
from halfbyte.workflows.reporting import making


def text_of(name: str, kl: float, ratio: float) -> Fidelity:
    return Fidelity(
        name=name,
        tokens=1530,
        perplexity=132.0 * ratio,
        perplexity_error=3.0,
        reference_perplexity=132.0,
        perplexity_ratio=ratio,
        perplexity_ratio_error=0.004,
        kl=Divergence(
            mean=kl, mean_error=kl / 50, median=kl / 2, p90=2 * kl, p99=4 * kl, p999=8 * kl,
            max=9 * kl
        ),
        same_top1=0.856,
        right_token=Change(
            mean=-0.0013, mean_error=0.0001, rms=0.0229, p1=-0.1, p5=-0.05, median=0.0, p95=0.04,
            p99=0.1
        ),
    )  # fmt: skip


def check(name: str, number: str, measured: float) -> Check:
    return Check(text=name, number=number, limit="max", threshold=0.07, measured=measured)


FACTS = Facts(
    name="small-q4_0",
    base="someone/small",
    version="0.1.0",
    recipe="q4_0",
    method="gptq",
    parameters=8_100_000,
    bytes=5_120_000,
    base_bytes=16_200_000,
    stored=[
        Stored(scheme="q4_0", bits=4.5, tensors=41, weights=6_000_000, bytes=3_375_000),
        Stored(scheme="q6_k", bits=6.5625, tensors=1, weights=2_100_000, bytes=1_745_000),
    ],
    layers=[LayerError(own=0.04, carried=0.045), LayerError(own=0.03, carried=0.08)],
    ops="native CPU",
    kv="bf16",
    reading=Reading(),
    texts=[text_of("books", 0.0254, 1.0233), text_of("中文 <&>", 0.0604, 0.97)],
    tasks=[
        summarize("arc", "choices", [Outcome(right=True, answer="1")] * 3,
                  [Outcome(right=False, answer="0")] + [Outcome(right=True, answer="1")] * 2)
    ],
    points=[
        Point(name="small", bytes=16_200_000, kl=0.0),
        Point(name="small-q4_0", bytes=5_120_000, kl=0.045),
    ],
    front=[],
    passed=False,
    checks=[check("books", "kl_mean", 0.0254), check("中文 <&>", "kl_mean", 0.0804)],
    causes=["the rounding of q4_0"],
    remedies=["--method gptq"],
    files={"model.gguf": "ab" * 32},
    base_files={"model.safetensors": "cd" * 32},
    commands=["halfbyte quantize small -o small-q4_0.gguf", "halfbyte eval 'a b.gguf'"],
)  # fmt: skip


class Balanced(HTMLParser):
    """Fails on a tag that is closed in the wrong place; gathers tags, attributes and text."""

    VOID = ("meta", "line", "circle", "path")

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(content)
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    content = page(FACTS)
    parsed = Balanced(content)
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"script", "link", "img", "iframe", "object"}
    assert "://" not in content and "url(" not in content and "@import" not in content
    for _, attributes in parsed.tags:
        assert not {"src", "href"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "prefers-color-scheme: dark" in content and 'name="viewport"' in content
    assert content.count("<svg") == 4
    labels = [attributes for tag, attributes in parsed.tags if tag == "svg"]
    assert all(attributes.get("aria-label") for attributes in labels)


def test_the_page_says_it_all_and_escapes_it() -> None:
    content = page(FACTS)
    told = Balanced(content).text
    assert "中文 <&>" in told and "<&>" not in content
    for said in ("5.12 MB", "16.2 MB", "5.06", "85.6%", "0.0254", "−0.13%", "Missed its gate."):
        assert said in told, said
    assert "kl_mean on 中文 <&> is 0.0804, 0.01 beyond 0.07" in told
    assert "halfbyte eval 'a b.gguf'" in told and "ab" * 32 in told and "cd" * 32 in told
    assert "the rounding of q4_0" in told and "--method gptq" in told


def test_what_was_not_asked_is_not_told() -> None:
    bare = replace(FACTS, tasks=[], checks=[], causes=[], remedies=[], passed=None, layers=[])
    told = Balanced(page(bare)).text
    assert "No gate was asked." in told
    for absent in ("What it can still do", "The gate", "Likely causes", "error behind each layer"):
        assert absent not in told
    kept = replace(FACTS, passed=True, checks=FACTS.checks[:1])
    assert "Passed its gate." in page(kept) and "Passed" not in page(bare)


def test_three_shapes_of_the_same_facts(tmp_path: Path) -> None:
    assert write_report(FACTS, tmp_path) == tmp_path / "report.html"
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert found["schema"] == "halfbyte.report/1" and found["texts"][0]["kl"]["mean"] == 0.0254
    assert json.loads(document(FACTS)) == found
    told = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert told == card(FACTS) and told.startswith("---\ntags:")
    assert "base_model: someone/small" in told
    assert "base_model" not in card(replace(FACTS, base="small"))
    rows = [line for line in told.splitlines() if line.startswith("|")]
    heads = [i for i, line in enumerate(rows) if set(line) <= set("|-:")]
    assert len(heads) == 3
    for first, last in zip(heads, [*(h - 1 for h in heads[1:]), len(rows)], strict=True):
        assert len({line.count("|") for line in rows[first - 1 : last]}) == 1
    assert "\n\n\n" not in told


def drawn(figure: str) -> ElementTree.Element:
    return ElementTree.fromstring(figure)


def texts_in(figure: str) -> dict[str, ElementTree.Element]:
    return {str(node.text): node for node in drawn(figure).iter("text")}


def test_amounts_are_drawn_from_zero_and_to_scale() -> None:
    figure = figures.divergence(FACTS.texts)
    axis = [n for n in drawn(figure).iter("line") if n.get("class") == "axis"]
    zero = float(str(axis[0].get("x1")))
    assert float(str(texts_in(figure)["0"].get("x"))) == zero
    means = [float(str(n.get("cx"))) - zero for n in drawn(figure).iter("circle")]
    assert means[1] / means[0] == pytest.approx(0.0604 / 0.0254, rel=1e-3)
    figure = figures.size_and_divergence(FACTS.points, "small-q4_0")
    model, whole = drawn(figure).iter("circle")
    assert (model.get("class"), whole.get("class")) == ("model", "other")
    marks = texts_in(figure)
    assert "0 B" in marks and "0" in marks and "small-q4_0" in marks
    left = float(str(marks["0 B"].get("x")))
    across = [float(str(n.get("cx"))) - left for n in (model, whole)]
    assert across[1] / across[0] == pytest.approx(16.2 / 5.12, rel=1e-3)


def test_a_change_of_perplexity_has_its_sign_and_its_interval() -> None:
    figure = figures.perplexity(FACTS.texts)
    axis = next(n for n in drawn(figure).iter("line") if n.get("class") == "axis")
    zero = float(str(axis.get("x1")))
    rise, fall = (float(str(n.get("cx"))) for n in drawn(figure).iter("circle"))
    assert fall < zero < rise
    ranges = [n for n in drawn(figure).iter("line") if n.get("class") == "range"]
    width = float(str(ranges[0].get("x2"))) - float(str(ranges[0].get("x1")))
    assert width / (rise - zero) == pytest.approx(4 * 0.004 / 0.0233, rel=1e-3)


def test_labels_do_not_cover_each_other() -> None:
    points = [Point(name=f"model-{i}", bytes=5_000_000 + 300_000 * i, kl=0.02) for i in range(3)]
    figure = figures.size_and_divergence(
        [*points, Point(name="whole", bytes=9_000_000, kl=0.0)], ""
    )
    labels = [n for name, n in texts_in(figure).items() if name.startswith("model-")]
    assert len(labels) == 3
    boxes = [(left_of(n), float(str(n.get("y")))) for n in labels]
    for one, other in combinations(boxes, 2):
        assert abs(one[1] - other[1]) >= 12 or abs(one[0] - other[0]) >= 6 * len("model-0")


def test_a_predicted_front_is_a_line_as_far_as_it_belongs_here() -> None:
    front = [(4_000_000, 9.0), (5_000_000, 0.08), (8_000_000, 0.01)]
    figure = figures.size_and_divergence(FACTS.points, "small-q4_0", front)
    [drawing] = drawn(figure).iter("path")
    assert str(drawing.get("d")).count("L") == 1 and "predicted" in texts_in(figure)
    assert [*drawn(figures.size_and_divergence(FACTS.points, "")).iter("path")] == []


def left_of(label: ElementTree.Element) -> float:
    """Where a label begins, of letters 6 units wide."""
    x = float(str(label.get("x")))
    return x if label.get("text-anchor") == "start" else x - 6 * len(str(label.text))


def test_a_model_of_one_layer_or_of_many() -> None:
    for layers in (1, 62):
        figure = figures.layers([LayerError(own=0.01, carried=0.02)] * layers)
        assert len([*drawn(figure).iter("circle")]) == 2 * layers
        assert {"carried", "its own"} <= set(texts_in(figure))


def test_nothing_breaks_on_a_model_that_is_equal_or_not_a_number() -> None:
    same = replace(text_of("same", 0.0, 1.0), perplexity_ratio_error=0.0)
    Balanced(page(replace(FACTS, texts=[same], layers=[LayerError(own=0.0, carried=0.0)])))
    broken = text_of("broken", float("nan"), float("nan"))
    assert "not a number" in page(replace(FACTS, texts=[broken]))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 0.4, [0, 0.1, 0.2, 0.3, 0.4]),
        (-0.06, 0.3, [-0.1, 0, 0.1, 0.2, 0.3]),
        (0, 17e6, [0, 5e6, 10e6, 15e6, 20e6]),
        (0, 0, [0, 1]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_numbers_are_short_and_true() -> None:
    assert [plain(v) for v in (0.02814, 0.4, 165.06, 1530, 0, -0.036)] == [
        "0.0281", "0.400", "165", "1,530", "0", "−0.0360"
    ]  # fmt: skip
    assert plain(2.14e-5) == "2.1×10⁻⁵" and plain(float("nan")) == "not a number"
    assert percent(0.8561) == "85.6%" and change(0.0233) == "+2.33%" and change(-0.2) == "−20.0%"
    assert size(5_433_216) == "5.43 MB" and size(812) == "812 B" and size(6.7e9) == "6.7 GB"
    assert count(12.2e9) == "12.2 B" and count(8_052_000) == "8.05 M"


def test_gate_tables_put_together_what_was_asked_alike() -> None:
    asked = [check("a", "x", 0), check("a", "y", 0), check("b", "x", 0), check("b", "y", 0)]
    tables = gate_tables([*asked, check("task", "flip_rate", 0)])
    assert [(table.numbers, [name for name, _ in table.rows]) for table in tables] == [
        (("x", "y"), ["a", "b"]),
        (("flip_rate",), ["task"]),
    ]


def test_what_is_stored_how_adds_up() -> None:
    source = source_of(oracle(CONFIGS["gemma4-unified"]), CONFIGS["gemma4-unified"], "q4_0")
    found = stored_as(source.spec, source.schemes)
    assert sum(stored.weights for stored in found) == source.spec.parameters
    whole = sum(source.schemes[t.name].bytes(t.shape) for t in source.spec.tensors())
    assert sum(stored.bytes for stored in found) == whole
    assert found[0].bytes == max(stored.bytes for stored in found)


def hidden_states(model: PreTrainedModel, ids: list[int]) -> list[torch.Tensor]:
    """Behind every layer but the last, which comes with its norm."""
    with torch.no_grad():
        found = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    return [state[0] for state in found.hidden_states[1:-1]]


def put(source: MemorySource, model: PreTrainedModel) -> None:
    """The weights of a source, as stored, into the model that they are of."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    prefix = "model." if "model.embed_tokens.weight" in state else "model.language_model."
    with torch.no_grad():
        for ours, name in family_of(source.spec).names(source.spec).items():
            stored = state.get(prefix + name.hf, state.get(name.hf))
            assert stored is not None
            stored.copy_(decode(source.tensor(ours)) - name.offset)


@pytest.mark.parametrize("name", ["llama", "gemma4-unified", "gemma4-per-layer", "gemma4-experts"])
def test_errors_of_layers_are_those_of_transformers(name: str) -> None:
    """Of every layer with its weights alone rounded, and of all together."""
    model = oracle(CONFIGS[name])
    exact = source_of(model, CONFIGS[name])
    exact = replace(exact, weights={n: w.clone() for n, w in exact.weights.items()})
    rounded = replace(exact, recipe=recipe_of("q4_0"))
    ids = list(range(3, 60))
    found = layer_errors(rounded, exact, [Window(token_ids=ids, first=0)])
    right = hidden_states(model, ids)
    put(rounded, model)
    carried = hidden_states(model, ids)
    assert len(found) == len(right) + 1
    for error, wanted, got in zip(found, right, carried, strict=False):
        assert error.carried == pytest.approx(
            float((got - wanted).norm() / wanted.norm()), rel=0.01
        )
    put(exact, model)
    index = len(right) - 1
    alone = replace(exact, weights=exact.weights | decoded(rounded, f"layers.{index}."))
    put(alone, model)
    got, wanted = hidden_states(model, ids)[index], right[index]
    assert found[index].own == pytest.approx(float((got - wanted).norm() / wanted.norm()), rel=0.01)


def decoded(source: MemorySource, beginning: str) -> dict[str, torch.Tensor]:
    return {n: decode(source.tensor(n)) for n in source.weights if n.startswith(beginning)}


def test_a_model_has_no_error_against_itself() -> None:
    source = source_of(oracle(CONFIGS["gemma4-shared-kv"]), CONFIGS["gemma4-shared-kv"])
    found = layer_errors(source, source, [Window(token_ids=list(range(3, 40)), first=0)])
    assert [(error.own, error.carried) for error in found] == [(0.0, 0.0)] * len(found)


def test_the_command_that_makes_it_again_calibrates_as_it_was() -> None:
    calibration = {
        "files": {"b.txt": "1", "a b.jsonl": "2"},
        "samples": 64,
        "window": 96,
        "seed": 3,
    }
    made = {"recipe": "q4_0", "method": "gptq", "calibration": {**calibration, "fingerprint": []}}
    [plain] = making({"recipe": "q4_0", "method": "search"}, "base", Path("out.gguf"))
    assert plain == "halfbyte quantize base -o out.gguf --recipe q4_0 --method search"
    [told] = making({**made, "allocation": {"bytes": 12345}}, "base", Path("x/out.gguf"))
    assert told == (
        "halfbyte quantize base -o out.gguf --recipe q4_0 --method gptq --size 12345 "
        "--calib b.txt --calib 'a b.jsonl' --samples 64 --window 96 --seed 3"
    )
    assert not list(making({}, "base", Path("out.gguf")))
