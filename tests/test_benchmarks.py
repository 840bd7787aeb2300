"Benchmarks are too long to be run here; what is checked is that each reads only options that it declares."

import ast
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parent.parent / "benchmarks").glob("*.py"))


def declared(tree: ast.AST) -> set[str]:
    "The options of a script: its own, and those that harness.parser adds."
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    own = {call.args[0].value for call in calls if ast.unparse(call.func).endswith(".add_argument")}
    for call in calls:
        if ast.unparse(call.func) in ("harness.parser", "parser"):
            without = any(word.arg == "pairs" and ast.unparse(word.value) == "None" for word in call.keywords)
            own |= {"--quick"} | (set() if without else {"--pairs"})
    return {name.lstrip("-").replace("-", "_") for name in own}


def read(tree: ast.AST) -> set[str]:
    "The options that a script reads from what parse_args gave."
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)]
    names = {ast.unparse(one.targets[0]) for one in assigned if ast.unparse(one.value.func).endswith(".parse_args")}
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    loads = [node for node in attributes if isinstance(node.ctx, ast.Load)]
    return {node.attr for node in loads if isinstance(node.value, ast.Name) and node.value.id in names}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_reads_only_options_that_it_declares(path):
    tree = ast.parse(path.read_text())
    assert read(tree) <= declared(tree)


def test_an_option_that_is_not_declared_is_found():
    tree = ast.parse("p = harness.parser(x)\np.add_argument('--a-b')\no = p.parse_args()\nprint(o.a_b, o.pairs, o.c)")
    assert read(tree) - declared(tree) == {"c"}
