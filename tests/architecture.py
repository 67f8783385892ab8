"""The rules of the house as pure functions over a package's source tree.

Each function takes a `Tree` (parsed, never imported) and returns what breaks its rule, one line per
finding, so that a test asserts an empty list and its failure is the explanation. Deferred imports
and imports under TYPE_CHECKING count: they are coupling as well. What is not seen: modules named by
strings that are put together at run time.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# A path in a page: `room/file.py`, `room/` (capitals are placeholders), or where a link leads.
PATH = re.compile(r"`([a-z][a-z0-9_./-]*(?:/|\.py))`|\]\(([\w./-]+)\)")
ENVIRONMENT = frozenset({"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """`importer` (a module) imports `target` (a module, or a foreign top-level name)."""

    importer: str
    target: str
    line: int
    at_import_time: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} -> {self.target}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """A package's modules by dotted name; `packages` are those that are an `__init__`."""

    name: str
    modules: Mapping[str, ast.Module]
    packages: frozenset[str]

    @property
    def roots(self) -> frozenset[str]:
        """The modules that stand outside the floors: the public surface and `python -m`."""
        return frozenset({self.name, f"{self.name}.__main__"})

    def room(self, module: str) -> str:
        """The room of one of our modules: the first name after the package's."""
        return module.split(".")[1]


def parse(root: Path) -> Tree:
    """The tree of the package in folder `root`."""
    modules: dict[str, ast.Module] = {}
    packages: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        parts = [root.name, *path.relative_to(root).with_suffix("").parts]
        if parts[-1] == "__init__":
            parts.pop()
            packages.add(".".join(parts))
        modules[".".join(parts)] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return Tree(name=root.name, modules=modules, packages=frozenset(packages))


def imports(tree: Tree) -> list[Import]:
    """Every import of every module: ours in full, a foreign one by its top-level name."""
    return [
        Import(importer=module, target=target, line=node.lineno, at_import_time=now)
        for module, body in tree.modules.items()
        for node, now in _statements(body, at_import_time=True)
        for target in _targets(tree, module, node)
    ]


def unplaced(tree: Tree, floors: Mapping[str, int]) -> list[str]:
    """Rooms without a floor."""
    rooms = {tree.room(module) for module in tree.modules if module not in tree.roots}
    return sorted(rooms - set(floors))


def climbing(tree: Tree, floors: Mapping[str, int]) -> list[str]:
    """Imports of another room on the same or a higher floor, and of the public surface."""
    found: list[str] = []
    for item in _ours(tree):
        if item.target in tree.roots:
            found.append(f"{item} (the public surface)")
            continue
        here, there = tree.room(item.importer), tree.room(item.target)
        if here != there and floors.get(there, 0) >= floors.get(here, 0):
            found.append(f"{item} (floor {floors.get(here)} -> {floors.get(there)})")
    return found


def meetings(tree: Tree, strangers: Sequence[tuple[str, str]]) -> list[str]:
    """Imports of one of our rooms by a room that must not know it."""
    return [
        str(item)
        for item in _ours(tree)
        if item.target not in tree.roots
        and (tree.room(item.importer), tree.room(item.target)) in strangers
    ]


def foreign(
    tree: Tree, allowed: Mapping[str, frozenset[str]], never: frozenset[str], stdlib: frozenset[str]
) -> list[str]:
    """Foreign packages where they do not belong.

    `allowed`: for the rooms that name their libraries, which; the standard library always is.
    `never`: packages that no module may import.
    """
    found: list[str] = []
    for item in imports(tree):
        if item.target.split(".")[0] == tree.name or item.target in stdlib:
            continue
        room = None if item.importer in tree.roots else tree.room(item.importer)
        if item.target in never or item.target not in allowed.get(room or "", {item.target}):
            found.append(str(item))
    return found


def cycle(tree: Tree) -> list[str]:
    """One cycle of imports that run at import time, as modules in order; empty if there is none."""
    edges: dict[str, list[str]] = {module: [] for module in tree.modules}
    for item in imports(tree):
        if item.at_import_time and item.target in edges and item.target != item.importer:
            edges[item.importer].append(item.target)
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in edges[module]:
            if found := walk(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in edges if (found := walk(module, []))), [])


def global_statements(tree: Tree) -> list[str]:
    """`global` statements."""
    return [
        f"{module}:{node.lineno} global {', '.join(node.names)}"
        for module, node in _nodes(tree)
        if isinstance(node, ast.Global)
    ]


def environment_reads(tree: Tree, reader: str) -> list[str]:
    """Uses of the environment outside the module `reader`."""
    return [
        f"{module}:{node.lineno}"
        for module, node in _nodes(tree)
        if module != reader and _touches_environment(node)
    ]


def nameless(tree: Tree, names: frozenset[str]) -> list[str]:
    """Modules whose name says nothing about what is in them."""
    return [module for module in tree.modules if module.rpartition(".")[2] in names]


def undocumented(tree: Tree) -> list[str]:
    """Modules without a docstring."""
    return [module for module, body in tree.modules.items() if not ast.get_docstring(body)]


def words_in(root: Path, files: Sequence[Path], words: Sequence[str]) -> list[str]:
    """Lines of these files (below `root`) that contain one of the words; binary files have none."""
    found: list[str] = []
    for path in files:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(root)}:{number}: {word}"
            for number, line in enumerate(lines, 1)
            for word in words
            if word in line
        ]
    return found


def missing_paths(text: str, roots: Sequence[Path]) -> list[str]:
    """Paths that a page names and that lie below none of the roots."""
    named = [match[1] or match[2] for match in PATH.finditer(text)]
    return [path for path in named if not any((root / path).exists() for root in roots)]


def _ours(tree: Tree) -> Iterator[Import]:
    """Imports of our own modules by modules that stand on a floor."""
    for item in imports(tree):
        if item.importer not in tree.roots and item.target.split(".")[0] == tree.name:
            yield item


def _nodes(tree: Tree) -> Iterator[tuple[str, ast.AST]]:
    for module, body in tree.modules.items():
        for node in ast.walk(body):
            yield module, node


def _statements(node: ast.AST, *, at_import_time: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Nodes that may import, each with whether it runs when its module is imported."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Call):
        yield node, at_import_time
    if isinstance(node, ast.If) and _asks_type_checking(node.test):
        for child in node.body:
            yield from _statements(child, at_import_time=False)
        for child in node.orelse:
            yield from _statements(child, at_import_time=at_import_time)
        return
    deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from _statements(child, at_import_time=at_import_time and not deferred)


def _asks_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def _targets(tree: Tree, module: str, node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [_known(tree, alias.name) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        source = _source(tree, module, node)
        if source.split(".")[0] != tree.name:
            return [source.split(".")[0]]
        return [
            _known(tree, f"{source}.{alias.name}")
            for alias in node.names
            if (source, alias.name) != (tree.name, "__version__")
        ]
    if isinstance(node, ast.Call) and node.args and _imports_by_name(node.func):
        name = node.args[0]
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            return [_known(tree, name.value)]
    return []


def _imports_by_name(function: ast.expr) -> bool:
    return ast.unparse(function) in {"import_module", "importlib.import_module", "__import__"}


def _source(tree: Tree, module: str, node: ast.ImportFrom) -> str:
    """The absolute name of what stands after `from`."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + (module in tree.packages)]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _known(tree: Tree, name: str) -> str:
    """Our module that `name` is or lies in; the top-level name of a foreign one."""
    if name.split(".")[0] != tree.name:
        return name.split(".")[0]
    while name not in tree.modules and "." in name:
        name = name.rpartition(".")[0]
    return name


def _touches_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr in ENVIRONMENT and ast.unparse(node.value) == "os"
    if isinstance(node, ast.ImportFrom):
        return node.module == "os" and any(alias.name in ENVIRONMENT for alias in node.names)
    return False
