"""The report of a model: a page, a document for programs, and a card for a hub.

One set of facts, three shapes. The page is one file: style and drawings are in it, it loads nothing
and runs nothing, and it follows the reader's light or dark.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from halfbyte.evals.report import figures, numbers
from halfbyte.evals.report.facts import Facts, gate_tables, mean_kl
from halfbyte.formats.atomic import write_file

SCHEMA = "halfbyte.report/1"
HERE = Path(__file__).parent
PAGE, DOCUMENT, CARD = "report.html", "report.json", "README.md"


def write_report(facts: Facts, directory: Path) -> Path:
    """Writes report.html, report.json and README.md; returns where the page is."""
    for name, content in ((PAGE, page(facts)), (DOCUMENT, document(facts)), (CARD, card(facts))):
        data = content.encode()
        write_file(directory / name, data)
    return directory / PAGE


def document(facts: Facts) -> str:
    """The facts as JSON."""
    return json.dumps({"schema": SCHEMA, **asdict(facts)}, indent=2, ensure_ascii=False) + "\n"


def page(facts: Facts) -> str:
    """The facts as HTML."""
    compared = [text for text in facts.texts if text.kl is not None]
    tokens = sum(text.tokens for text in compared)
    same = sum((text.same_top1 or 0.0) * text.tokens for text in compared)
    drawn = {
        "divergence": figures.divergence(facts.texts),
        "perplexity": figures.perplexity(facts.texts),
        "size_and_divergence": figures.size_and_divergence(facts.points, facts.name, facts.front),
        "layers": figures.layers(facts.layers) if facts.layers else "",
        "training": figures.training(facts.training.curve)
        if facts.training and facts.training.curve
        else "",
        "style": (HERE / "style.css").read_text(encoding="utf-8"),
    }
    return _rendered(
        "page.html.jinja",
        {
            "facts": facts,
            "kl": mean_kl(facts.texts),
            "same": same / tokens if tokens else 0.0,
            "tokens": tokens,
            "gate": gate_tables(facts.checks),
            **{name: Markup(drawing) for name, drawing in drawn.items()},
        },
    )


def card(facts: Facts) -> str:
    """The facts as a model card."""
    hub = facts.base if facts.base.count("/") == 1 and not facts.base.startswith(("/", ".")) else ""
    return _rendered("card.md.jinja", {"facts": facts, "hub_base": hub})


def _rendered(name: str, variables: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=name.endswith(".html.jinja"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    shapes = (
        numbers.plain,
        numbers.short,
        numbers.percent,
        numbers.change,
        numbers.size,
        numbers.count,
    )
    environment.filters |= {shape.__name__: shape for shape in shapes}
    return environment.get_template(name).render(variables)
