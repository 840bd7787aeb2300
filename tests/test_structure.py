"""The house as a whole: which module may import which, and what a user finds behind the public names."""

import ast
from functools import cache
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "scellfm"

# floors from the ground up: a module imports its own floor and those below; rooms of one floor must not form a circle
FLOORS = (
    ("core", "metrics"),
    ("assets", "store", "data"),
    ("inference", "training", "scores", "baselines", "crossfit", "statistics", "plotting", "heatmaps", "report"),
    ("geneformer", "scgpt", "rosa"),
    ("scgenept",),
    ("commands", "cli", "demo", "atlas", "__main__"),
)
WINGS = ("geneformer", "scgpt", "scgenept", "rosa")
SIDEWAYS = {("scgenept", "scgpt.model")}  # the only step from one wing into another


def module_name(path: Path) -> str:
    "The dotted name of a file of the package."
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py") if path.name != "_modidx.py"}


@cache
def lazy_names(package: str) -> dict[str, str]:
    "The public names of a package and the modules that they come from, read from its `_lazy` table."
    names = {}
    for node in ast.walk(ast.parse(MODULES[package].read_text())):
        if isinstance(node, ast.Dict):
            pairs = [(key, value) for key, value in zip(node.keys, node.values) if isinstance(key, ast.Constant)]
            names |= {key.value: f"{package}.{value.value}" for key, value in pairs if isinstance(value, ast.Constant)}
    return names


def typing_only(tree: ast.Module) -> set[int]:
    "The numbers of the lines that only a type checker reads."
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    return {line for block in blocks for line in range(block.lineno, block.end_lineno + 1)}


def absolute(module: str, node: ast.ImportFrom) -> str:
    "The module that an import names, relative ones resolved."
    if not node.level:
        return node.module or ""
    above = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
    above = above[: len(above) - node.level + 1]
    return ".".join([*above, *([node.module] if node.module else [])])


def target(source: str, name: str) -> str | None:
    "The module of this package that `from source import name` runs; None for other packages."
    if f"{source}.{name}" in MODULES:
        return f"{source}.{name}"
    if source in MODULES and MODULES[source].name == "__init__.py":
        return lazy_names(source).get(name, source)
    return source if source in MODULES else None


def imports_of(module: str) -> set[str]:
    "The modules of this package that a module imports, inside functions too."
    tree = ast.parse(MODULES[module].read_text())
    skipped, found = typing_only(tree), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.lineno not in skipped:
            found |= {target(absolute(module, node), alias.name) for alias in node.names}
        elif isinstance(node, ast.Import) and node.lineno not in skipped:
            found |= {alias.name for alias in node.names if alias.name in MODULES}
    return {name for name in found if name not in (None, module, "scellfm")}


GRAPH = {module: imports_of(module) for module in MODULES if MODULES[module].name != "__init__.py"}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    "The groups of nodes that reach each other (Tarjan's strongly connected components of more than one)."
    index, low, stack, found = {}, {}, [], []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def room(module: str) -> str:
    "The room of a module: the part after the package's name."
    return module.split(".")[1]


def floor(module: str) -> int:
    "The floor of a module, counted from the ground."
    return next(number for number, rooms in enumerate(FLOORS) if room(module) in rooms)


def test_a_circle_would_be_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"]]


def test_every_room_has_a_floor():
    rooms = {room(module) for module in MODULES if module != "scellfm"}
    assert rooms <= {name for rooms in FLOORS for name in rooms}


def test_no_import_goes_round_in_a_circle():
    assert circles(GRAPH) == []


def test_no_module_imports_a_higher_floor():
    upward = [(module, other) for module, found in GRAPH.items() for other in found if floor(other) > floor(module)]
    assert upward == []


def test_no_wing_imports_another():
    def allowed(module: str, other: str) -> bool:
        return room(other) == room(module) or (room(module), ".".join(other.split(".")[1:])) in SIDEWAYS

    wings = {module: found for module, found in GRAPH.items() if room(module) in WINGS}
    sideways = [(m, o) for m, found in wings.items() for o in found if room(o) in WINGS and not allowed(m, o)]
    assert sideways == []
