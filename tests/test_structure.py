"""The house as a whole: which module may import which, and what a user finds behind the public names."""

import ast
import importlib
import inspect
import json
import re
from functools import cache, reduce
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

PACKAGE = ROOT / "scellfm"

# floors from the ground up: a module imports its own floor and those below; rooms of one floor must not form a circle
FLOORS = (
    ("core", "metrics"),
    ("assets", "store", "data"),
    (
        "inference",
        "batch_norm",
        "training",
        "scores",
        "baselines",
        "crossfit",
        "statistics",
        "plotting",
        "heatmaps",
        "report",
    ),
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
TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}


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


# ---- what a user meets: names, signatures, docstrings ----

# (class, method, the function that it is), by dotted names below scellfm
BOUND = (
    ("geneformer.Geneformer", "embed", "geneformer.embedding.embed"),
    ("geneformer.Geneformer", "embed_genes", "geneformer.embedding.embed_genes"),
    ("geneformer.Geneformer", "state_embeddings", "geneformer.embedding.state_embeddings"),
    ("geneformer.Geneformer", "perturb", "geneformer.perturbation.runner.perturb"),
    ("geneformer.Geneformer", "pretrain", "geneformer.pretraining.pretrain"),
    ("geneformer.Geneformer", "finetune", "geneformer.finetuning.multitask.finetune"),
    ("geneformer.Geneformer", "finetune_genes", "geneformer.finetuning.genes.finetune_genes"),
    ("geneformer.Geneformer", "search", "geneformer.finetuning.hyperparameters.search"),
    ("geneformer.CellClassifier", "perturb", "geneformer.perturbation.runner.perturb"),
    ("geneformer.TaskClassifier", "perturb", "geneformer.perturbation.runner.perturb"),
    ("scgpt.ScGPT", "embed", "scgpt.embedding.embed"),
    ("scgpt.ScGPT", "gene_embeddings", "scgpt.embedding.gene_embeddings"),
    ("scgpt.ScGPT", "attention", "scgpt.embedding.attention"),
    ("scgpt.ScGPT", "continue_pretraining", "scgpt.training.continue_pretraining"),
    ("scgpt.ScGPT", "finetune", "scgpt.annotation.finetune"),
    ("scgpt.CellClassifier", "predict", "scgpt.annotation.predict_cells"),
    ("scgpt.CellClassifier", "probabilities", "scgpt.annotation.cell_probabilities"),
    ("scgpt.CellClassifier", "from_pretrained", "scgpt.annotation.classifier_from_pretrained"),
    ("scgpt.ReferenceMap", "transfer", "scgpt.mapping.transfer"),
    ("scgpt.ReferenceMap", "calibrate", "scgpt.mapping.calibrate"),
)
DELEGATED = (  # methods with a docstring of their own that hand their options on
    ("geneformer.CellClassifier", "embed", "geneformer.embedding.embed"),
    ("geneformer.TaskClassifier", "embed", "geneformer.embedding.embed"),
)


def found(path: str):
    "What a dotted path below scellfm names."
    import scellfm

    return reduce(getattr, path.split("."), scellfm)


def imported(path: str):
    "The function of a module by its full path, whatever the package exports."
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"scellfm.{module}"), name)


def options_of(function) -> dict:
    "The parameters of a function but for its first: {name: (default, kind, annotation)}."
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return {p.name: (p.default, p.kind, str(p.annotation)) for p in parameters}


@pytest.mark.parametrize("owner, method, function", BOUND, ids=lambda part: part.rpartition(".")[2])
def test_a_bound_method_is_its_function(owner, method, function):
    bound, free = getattr(found(owner), method), imported(function)
    bound = getattr(bound, "__func__", bound)  # of a class method, with its first argument
    assert inspect.signature(bound) == inspect.signature(free)
    assert bound.__doc__ == free.__doc__ and bound.__doc__
    assert bound.__annotations__ == free.__annotations__


@pytest.mark.parametrize("owner, method, function", DELEGATED, ids=lambda part: part.rpartition(".")[2])
def test_a_delegating_method_names_every_option(owner, method, function):
    own, free = options_of(getattr(found(owner), method)), options_of(imported(function))
    assert getattr(found(owner), method).__doc__
    assert {name: own[name][0] for name in list(free)[1:]} == {name: free[name][0] for name in list(free)[1:]}


HANDED_ON = {"recipe", "fixed", "changes"}  # fields of a training or of a shape, checked where they arrive


def methods_by_binding() -> list[tuple[str, str, str]]:
    "(module, class, method) of every `method = function` and `method = classmethod(function)` of a class of ours."
    listed = []
    for module, tree in TREES.items():
        free = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        free |= {a.asname or a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
        for owner in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            for node in owner.body:
                named = isinstance(node, ast.Assign) and re.fullmatch(
                    r"(?:classmethod\()?(\w+)\)?", ast.unparse(node.value)
                )
                if named and named[1] in free:
                    listed.append((module, owner.name, node.targets[0].id))
    return listed


@pytest.mark.parametrize("module, owner, method", methods_by_binding())
def test_every_bound_method_is_documented_and_names_its_arguments(module, owner, method):
    bound = getattr(getattr(importlib.import_module(module), owner), method)
    open_ended = {
        p.name for p in inspect.signature(bound).parameters.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    assert bound.__doc__ and open_ended <= HANDED_ON


def test_every_argument_of_perturb_is_named():
    parameters = inspect.signature(found("geneformer.Geneformer.perturb")).parameters.values()
    assert {"kind", "genes", "state", "start", "goal", "groupby", "emb_layer"} <= {p.name for p in parameters}
    assert not [p for p in parameters if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


PUBLIC_FACE = """
data.demo data.read data.check_counts data.hold_out data.folds statistics.screen_test scores.integration
geneformer.Geneformer geneformer.Geneformer.from_pretrained geneformer.Geneformer.from_config
geneformer.Geneformer.save_pretrained geneformer.Geneformer.pretrain geneformer.Geneformer.embed
geneformer.Geneformer.embed_genes geneformer.Geneformer.state_embeddings geneformer.Geneformer.finetune
geneformer.Geneformer.finetune_genes geneformer.Geneformer.perturb geneformer.RankTokenizer
geneformer.RankTokenizer.from_pretrained geneformer.RankTokenizer.fit geneformer.CellClassifier.predict
geneformer.CellClassifier.perturb geneformer.Screen.table geneformer.Screen.recover
scgpt.ScGPT scgpt.ScGPT.from_pretrained scgpt.ScGPT.embed scgpt.ReferenceMap scgpt.ReferenceMap.transfer
scgenept.PerturbationData scgenept.PerturbationData.split scgenept.PerturbationData.load
rosa.tss_windows rosa.embed_genes rosa.Enformer rosa.Enformer.from_pretrained rosa.Enformer.from_config
""".split()


def test_the_public_face_is_callable_after_every_module_was_imported():
    for module in sorted(MODULES):
        if not module.endswith("__main__"):
            importlib.import_module(module)
    for name in PUBLIC_FACE:
        assert callable(found(name)), name


@pytest.mark.parametrize("package", sorted(name for name in MODULES if MODULES[name].name == "__init__.py"))
def test_no_module_has_the_name_of_what_its_package_exports(package):
    below = {name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] == package}
    exported = {name for name, module in lazy_names(package).items() if not module.endswith(f".{name}")}
    assert not below & exported


# ---- the size of things ----


def functions_of(tree: ast.Module):
    "Every function of a module, methods and inner ones too."
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def public_names(tree: ast.Module) -> set[str]:
    "The names in __all__."
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def bound_functions(owner: ast.ClassDef, tree: ast.Module):
    "(method, function) of the functions of a module that a class binds as methods: `embed = embed`, `classmethod(f)`."
    own = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in owner.body:
        if isinstance(node, ast.Assign):
            call = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in ("classmethod", "staticmethod")
            name = ast.unparse(node.value.args[0] if call else node.value)
            if name in own:
                yield node.targets[0].id, own[name]


def public_functions(tree: ast.Module):
    "(name, function, its parameters without self) of public functions, and of the public methods of public classes."
    public = public_names(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in public:
            yield node.name, node, parameters(node)
        if isinstance(node, ast.ClassDef) and node.name in public:
            methods = [(method.name, method) for method in node.body if isinstance(method, ast.FunctionDef)]
            bound = [(name, method) for name, method in bound_functions(node, tree) if method.name not in public]
            for name, method in [*methods, *bound]:
                if name[0] != "_" or name == "__init__":
                    yield f"{node.name}.{name}", method, parameters(method)[1:]


def parameters(node: ast.FunctionDef) -> list[ast.arg]:
    "The parameters of a function, *args and **kwargs aside."
    return [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]


def gaps(tree: ast.Module) -> list[str]:
    "What public functions lack: types of parameters, the type of what is returned, a docstring."
    found = []
    for name, node, arguments in public_functions(tree):
        untyped = any(argument.annotation is None for argument in arguments)
        unreturned = node.returns is None and node.name != "__init__"
        if untyped or unreturned or (ast.get_docstring(node) is None and node.name != "__init__"):
            found.append(name)
    return found


UNTYPED = 0  # public functions that lack a type or a docstring
SHORT_CELLS = 0.9  # share of exported cells with at most 25 lines


def test_functions_are_short():
    lengths = [node.end_lineno - node.lineno + 1 for tree in TREES.values() for node in functions_of(tree)]
    assert max(lengths) <= 60 and np.median(lengths) <= 10


def test_no_line_is_longer_than_120_characters():
    "But for the lists of names that nbdev writes, which nobody reads as code."
    lines = [(name, line) for name, path in MODULES.items() for line in path.read_text("utf8").splitlines()]
    assert [(name, line) for name, line in lines if len(line) > 120 and not line.startswith("__all__")] == []


def test_public_functions_are_typed_and_documented():
    found = [f"{module}.{name}" for module, tree in TREES.items() for name in gaps(tree)]
    assert len(found) <= UNTYPED, found[-20:]


def exported_cells() -> list[int]:
    "The number of lines of every exported cell of every notebook."
    lengths = []
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            lines = "".join(cell["source"]).splitlines()
            if cell["cell_type"] == "code" and any(re.match(r"#\| *exporti?\b", line) for line in lines):
                lengths.append(sum(not line.startswith("#|") for line in lines))
    return lengths


def test_exported_cells_are_short():
    lengths = np.array(exported_cells())
    assert (lengths <= 25).mean() >= SHORT_CELLS


MOST_PARAMETERS = 12
TRAINING = "a training is described by its numbers, and users type them by name: epochs=1, freeze_layers=4"
SCREEN = "one screen is one question: which genes, in which cells, from where to where; each answer has a name"
MANY = {  # public functions with more parameters than that, and why
    "geneformer.perturbation.runner.perturb": SCREEN,
    "geneformer.finetuning.multitask.finetune": TRAINING,
    "geneformer.finetuning.genes.finetune_genes": TRAINING,
    "geneformer.finetuning.hyperparameters.search": "a search is described by its space, its metric and its numbers",
    "scgpt.annotation.finetune": TRAINING,
    "scgpt.training.continue_pretraining": TRAINING,
    "scgpt.embedding.embed": "how cells are read, pooled, cut and kept, in one call as in scanpy; all have defaults",
    "data.cells.simulate_cells": "what is true of simulated cells is said here, each truth by its name",
    "geneformer.tokenizer.kernels.rank_rows": "a compiled loop takes arrays and no objects",
}


def test_public_functions_take_few_arguments_or_say_why_not():
    many = {
        f"{module.partition('.')[2]}.{name}"
        for module, tree in TREES.items()
        for name, _, arguments in public_functions(tree)
        if len(arguments) > MOST_PARAMETERS
    }
    assert not many - MANY.keys(), "group what belongs together, or give a reason here"


# ---- the benchmarks, which no test runs: what they import is there, and the number of threads is set first ----

SCRIPTS = {path.stem: ast.parse(path.read_text()) for path in sorted((ROOT / "benchmarks").glob("*.py"))}


def top_level_names(tree: ast.Module) -> set[str]:
    "What a script defines or imports at its top level."
    names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {part.id for part in ast.walk(node.targets[0]) if isinstance(part, ast.Name)}
    return names


def is_there(module: str, name: str) -> bool:
    "Can this name be imported from a benchmark or from the package?"
    if module in SCRIPTS:
        return name in top_level_names(SCRIPTS[module])
    return f"{module}.{name}" in MODULES or hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_imports_what_there_is(script):
    steps = [node for node in ast.walk(SCRIPTS[script]) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in steps if node.module in SCRIPTS or node.module.split(".")[0] == "scellfm"]
    lacking = [
        (node.module, alias.name) for node in ours for alias in node.names if not is_there(node.module, alias.name)
    ]
    assert lacking == []


OTHERWISE = {"harness", "overexpression"}  # the second is deletion under another name


@pytest.mark.parametrize("script", sorted(SCRIPTS.keys() - OTHERWISE))
def test_a_benchmark_imports_the_harness_before_numerical_libraries(script):
    imported = [node for node in SCRIPTS[script].body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0] for node in imported
    ]
    heavy = {"numpy", "torch", "anndata", "scipy", "pandas", "scellfm"}
    assert "harness" in names and not heavy & set(names[: names.index("harness")])
