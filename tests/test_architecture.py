"""The house stands: imports go down, light rooms stay light, and each rule catches its breach."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from architecture import (
    Tree,
    climbing,
    cycle,
    environment_reads,
    foreign,
    global_statements,
    imports,
    meetings,
    missing_paths,
    nameless,
    parse,
    undocumented,
    unplaced,
    words_in,
)

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "halfbyte"

FLOORS = {
    "errors": 0,
    "env": 0,
    "specs": 1,
    "families": 2,
    "numerics": 3,
    "text": 3,
    "_cpu": 3,
    "kernels": 4,
    "formats": 5,
    "models": 6,
    "engine": 7,
    "quantizer": 7,
    "planner": 7,
    "evals": 8,
    "training": 9,
    "llm": 10,
    "workflows": 10,
    "serve": 11,
    "cli": 12,
}
# Control is integers, compute is tensors, text is text: lower rooms that these never open.
STRANGERS = (("engine", "text"), ("models", "text"), ("kernels", "text"))
# Rooms that name their libraries beside the standard one.
ALLOWED = {
    "errors": frozenset[str](),
    "env": frozenset[str](),
    "specs": frozenset[str](),
    "families": frozenset[str](),
    "engine": frozenset({"numpy"}),
}
# Oracles of the tests, never needed at run time.
NEVER = frozenset({"transformers", "gguf", "llama_cpp", "pytest", "hypothesis"})
NAMELESS = frozenset({"utils", "util", "common", "helpers", "helper", "manager", "base", "misc"})
LIGHT = (
    "halfbyte",
    "halfbyte.specs",
    "halfbyte.families",
    "halfbyte.text.assets",
    "halfbyte.numerics.qtensor",
    "halfbyte.formats.gguf",
    "halfbyte.formats.safetensors",
    "halfbyte.formats.checkpoint",
    "halfbyte.formats.manifest",
    "halfbyte.engine",
    "halfbyte.cli",
    "halfbyte.cli.inspect",
    "halfbyte.cli.run",
    "halfbyte.cli.doctor",
    "halfbyte.planner.doctor.reading",
    "halfbyte.planner.monitor",
)
# Put together here, so that this file does not contain them.
REGISTRIES = tuple(".".join(parts) for parts in (("pypi", "org"), ("files", "pythonhosted", "org")))
REGISTRIES += (".".join(("registry", "npmjs", "org")),)
SHARED = "/".join(("..", "shared"))
NOTES = tuple(f"{name}.md" for name in ("DESIGN", "CONTRACT", "facts/gemma", "facts/style"))
NOTES += tuple(f"facts/{name}.md" for name in ("algorithms", "peers", "serving"))
NOTES += tuple("/".join(("", "work", name)) for name in ("main", "shared", "venv"))


@pytest.fixture(scope="module")
def house() -> Tree:
    source = parse(PACKAGE)
    # What csrc/ is built into: a room of one module, without Python source.
    built = {"halfbyte._cpu": ast.parse('"""The native kernels."""')}
    return replace(source, modules={**source.modules, **built})


def test_every_room_has_a_floor(house: Tree):
    assert unplaced(house, FLOORS) == []


def test_imports_go_down(house: Tree):
    assert climbing(house, FLOORS) == []


def test_strangers_do_not_meet(house: Tree):
    assert meetings(house, STRANGERS) == []


def test_libraries_stay_where_they_belong(house: Tree):
    assert foreign(house, ALLOWED, NEVER, sys.stdlib_module_names) == []


def test_no_import_cycles(house: Tree):
    assert cycle(house) == []


def test_no_hidden_state(house: Tree):
    assert global_statements(house) == []
    assert environment_reads(house, "halfbyte.env") == []


def test_modules_are_named_and_documented(house: Tree):
    assert nameless(house, NAMELESS) == []
    assert undocumented(house) == []


def test_the_house_was_really_read(house: Tree):
    assert len(house.modules) > 40
    assert {"numpy", "torch", "halfbyte.errors"} <= {item.target for item in imports(house)}


@pytest.mark.parametrize(
    "page",
    [
        "ARCHITECTURE.md",
        "README.md",
        *(
            f"docs/{name}.md"
            for name in ("doctor", "evaluation", "formats", "gate", "hubs", "troubleshooting")
        ),
    ],
)
def test_pages_name_files_that_exist(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert missing_paths(text, [ROOT, PACKAGE, (ROOT / page).parent]) == []


@pytest.mark.parametrize("module", LIGHT)
def test_light_rooms_import_no_torch(module: str):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr or f"{module} imports torch"


def test_the_check_for_torch_can_fail():
    code = "import sys, halfbyte.numerics.codec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 1


def test_project_text_names_no_registry_and_no_workplace():
    files = _project_files()
    assert ROOT / "pyproject.toml" in files
    assert words_in(ROOT, files, REGISTRIES + NOTES) == []
    elsewhere = [path for path in files if ROOT / "tests" not in path.parents]
    assert words_in(ROOT, elsewhere, [SHARED]) == []


def _project_files() -> list[Path]:
    """The project's own small files; what a user keeps beside them is not ours."""
    kinds = {".md", ".toml", ".txt", ".py", ".sh", ".json", ".jinja", ".cpp", ".h", ".hpp", ""}
    inside = ("src", "tests", "docs", "bench", "csrc", "scripts", ".ci")
    paths = [*ROOT.glob("*"), *(path for name in inside for path in (ROOT / name).rglob("*"))]
    own = [path for path in paths if path.is_file() and path.suffix in kinds]
    return [path for path in own if path.name != ".git"]  # a file in a worktree


# Each rule catches its breach, on small trees.

GOOD = {
    "__init__.py": '"""Root."""\ndef __getattr__(name):\n    from house.top import roof\n',
    "low.py": '"""Low."""\nimport json\n',
    "mid/__init__.py": '"""Mid."""\nfrom house.mid.one import x\n',
    "mid/one.py": '"""One."""\nfrom house import __version__, low\nx = 1\n',
    "side.py": '"""Side."""\n',
    "env.py": '"""Env."""\nimport os\nos.environ.get("A")\n',
    "top/__init__.py": '"""Top."""\n',
    "top/roof.py": '"""Roof."""\nfrom house.mid import x\nimport numpy\n',
}
SMALL_FLOORS = {"low": 0, "env": 0, "mid": 1, "side": 1, "top": 2}


def _house(tmp_path: Path, **changed: str) -> Tree:
    files = GOOD | {name.replace("__", "/") + ".py": text for name, text in changed.items()}
    for name, text in files.items():
        path = tmp_path / "house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return parse(tmp_path / "house")


def _findings(tree: Tree) -> dict[str, list[str]]:
    """What each rule finds, without the rules that find nothing."""
    found = {
        "unplaced": unplaced(tree, SMALL_FLOORS),
        "climbing": climbing(tree, SMALL_FLOORS),
        "meetings": meetings(tree, [("top", "low")]),
        "foreign": foreign(
            tree,
            {"low": frozenset(), "top": frozenset({"numpy"})},
            frozenset({"gguf"}),
            sys.stdlib_module_names,
        ),
        "cycle": cycle(tree),
        "globals": global_statements(tree),
        "environment": environment_reads(tree, "house.env"),
        "nameless": nameless(tree, frozenset({"utils"})),
        "undocumented": undocumented(tree),
    }
    return {rule: items for rule, items in found.items() if items}


def test_a_good_house_passes(tmp_path: Path):
    assert _findings(_house(tmp_path)) == {}


@pytest.mark.parametrize(
    "statement",
    [
        "from house.top import roof",
        "import house.top.roof",
        "from house.top.roof import anything",
        "from ..top import roof",
        "def f():\n    from house.top import roof",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import house.top.roof",
        "import importlib\ndef f():\n    importlib.import_module('house.top.roof')",
        "from house import side",
        "from house import Surface",
        "import house",
    ],
)
def test_an_import_that_goes_up_or_sideways_is_found(tmp_path: Path, statement: str):
    tree = _house(tmp_path, mid__two=f'"""Two."""\n{statement}\n')
    assert set(_findings(tree)) == {"climbing"}
    assert "house.mid.two:" in _findings(tree)["climbing"][0]


@pytest.mark.parametrize(
    ("rule", "place", "text"),
    [
        ("unplaced", "attic", '"""Attic."""\n'),
        ("meetings", "top__cellar", '"""Cellar."""\nfrom house import low\n'),
        ("foreign", "low", '"""Low."""\ndef f():\n    import numpy.random\n'),
        ("foreign", "side", '"""Side."""\nimport gguf\n'),
        ("globals", "side", '"""Side."""\ndef f():\n    global x\n    x = 1\n'),
        ("environment", "side", '"""Side."""\nimport os\nos.getenv("A")\n'),
        ("environment", "side", '"""Side."""\nfrom os import environ\n'),
        ("nameless", "mid__utils", '"""Utils."""\n'),
        ("undocumented", "side", "x = 1\n"),
    ],
)
def test_each_breach_is_found_by_its_own_rule(tmp_path: Path, rule: str, place: str, text: str):
    assert set(_findings(_house(tmp_path, **{place: text}))) == {rule}


def test_a_cycle_is_found_and_printed(tmp_path: Path):
    tree = _house(
        tmp_path,
        mid__two='"""Two."""\nfrom house.mid import three\n',
        mid__three='"""Three."""\nfrom .four import y\n',
        mid__four='"""Four."""\nimport house.mid.two\n',
    )
    assert set(_findings(tree)) == {"cycle"}
    found = cycle(tree)
    assert found[0] == found[-1] and len(set(found)) == 3


def test_a_cycle_through_the_door_of_a_room_is_found(tmp_path: Path):
    tree = _house(tmp_path, mid__one='"""One."""\nfrom house.mid import x\n')
    assert set(_findings(tree)) == {"cycle"}


def test_a_deferred_import_makes_no_cycle(tmp_path: Path):
    deferred = '"""Two."""\ndef f():\n    from house.mid import three\n'
    tree = _house(tmp_path, mid__two=deferred, mid__three='"""Three."""\nimport house.mid.two\n')
    assert _findings(tree) == {}


def test_forbidden_words_are_found(tmp_path: Path):
    text, binary = tmp_path / "a.md", tmp_path / "b.bin"
    text.write_text("fine\nsee secret.example here\n", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe secret.example")
    assert words_in(tmp_path, [text, binary], ["secret.example"]) == ["a.md:2: secret.example"]


def test_a_path_that_is_gone_is_found(tmp_path: Path):
    (tmp_path / "here.py").write_text("", encoding="utf-8")
    text = "`here.py`, `gone.py`, `away/`, `room/NAME.py`, [page](docs/gone.md), [a](https://a.example)"
    assert missing_paths(text, [tmp_path]) == ["gone.py", "away/", "docs/gone.md"]
