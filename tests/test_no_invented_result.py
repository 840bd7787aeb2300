"""After a failure there is an error and no output: no default, no mock, no part of a result.

Each kind of task runs once as it should. Then the same task runs with one failure put into it: an import that is
refused, a tokenizer that fails, memory that runs out, a worker that dies. It may end in an error, and then nothing lies
where the result would be. Or it ends well (a second try, another way to the same numbers), and then the result is the
one of the run without a failure. Nothing else is allowed.
"""

import builtins
import importlib
import shutil
import signal
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from scipy import sparse

from scellfm import cli
from scellfm.core import ScellfmError
from scellfm.data import GeneVectors, simulate_perturbations
from scellfm.geneformer import Geneformer, RankTokenizer
from scellfm.scgenept import PerturbationData, ScGenePT
from scellfm.scgpt import ScGPT

pytestmark = pytest.mark.filterwarnings("ignore")  # models of one step; the kinds of error are tested elsewhere
GENES = [f"ENSG{i:011d}" for i in range(24)]


def cells(n: int = 24) -> anndata.AnnData:
    draws = np.random.default_rng(0)
    obs = {"cell_type": ["B", "T"] * (n // 2), "donor": [f"d{i // 2 % 3}" for i in range(n)], "batch": ["x"] * 4}
    obs["batch"] = ["x", "x", "y", "y"] * (n // 4)
    rates = 1 + 2 * (np.arange(24) % 2 == np.arange(n)[:, None] % 2)
    counts = sparse.csr_matrix(draws.poisson(rates).astype(np.float32))
    index = [f"c{i}" for i in range(n)]
    return anndata.AnnData(counts, obs=pd.DataFrame(obs, index=index), var=pd.DataFrame(index=GENES))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Cells and one small model of each kind, in files."
    folder = tmp_path_factory.mktemp("place")
    adata = cells()
    adata.write_h5ad(folder / "cells.h5ad")
    tokenizer = RankTokenizer.fit(adata)
    tokenizer.save_pretrained(folder / "tokenizer")
    Geneformer.from_config("tiny", tokenizer, device="cpu").save_pretrained(folder / "geneformer")
    ScGPT.from_config("tiny", GENES, device="cpu").save_pretrained(folder / "scgpt")
    simulated = simulate_perturbations(n_targets=8, n_pairs=2, n_genes=20, n_modules=2, n_cells=6, n_controls=12)
    simulated.adata.write_h5ad(folder / "screen.h5ad")
    data = PerturbationData(simulated.adata)
    small = dict(d_model=16, n_heads=2, d_hid=16, n_layers=1)
    scgenept = ScGenePT.from_config("tiny", data, device="cpu", **small)
    scgenept.fit(data, data.split("simulation", seed=1), epochs=1).save_pretrained(folder / "scgenept")
    draws = np.random.default_rng(0).normal(size=(24, 5)).astype(np.float32)
    GeneVectors(GENES, draws, None, {"source": "simulated"}).save(folder / "vectors")
    finetune = "finetune CELLS --model GENEFORMER --label cell_type --k 2 --n-boot 0 --epochs 1 --device cpu --out OUT"
    assert cli.main(words(finetune, folder, folder / "classifier")) == 0
    return folder


def words(line: str, folder: Path, out: Path) -> list[str]:
    "The words of a command, with the names of files in capitals."
    names = {
        "CELLS": folder / "cells.h5ad",
        "SCREEN": folder / "screen.h5ad",
        "TOKENIZER": folder / "tokenizer",
        "GENEFORMER": folder / "geneformer",
        "SCGPT": folder / "scgpt",
        "SCGENEPT": folder / "scgenept",
        "CLASSIFIER": folder / "classifier",
        "VECTORS": folder / "vectors",
    }
    given = [str(names.get(word, word)) for word in line.split()]
    return [word.replace("OUT", str(out)) if word.startswith("OUT") else word for word in given]


TASKS = {
    "tokenize": "tokenize CELLS --tokenizer TOKENIZER --columns cell_type --out OUT",
    "embed, Geneformer": "embed CELLS --model GENEFORMER --device cpu --out OUT.csv",
    "embed, scGPT": "embed CELLS --model SCGPT --device cpu --out OUT.csv",
    "finetune, Geneformer": "finetune CELLS --model GENEFORMER --label cell_type --k 2 --n-boot 0 --epochs 1"
    " --device cpu --out OUT",
    "finetune, scGPT": "finetune CELLS --model SCGPT --label cell_type --k 2 --n-boot 0 --epochs 1"
    " --device cpu --out OUT",
    "predict": "predict CELLS --model CLASSIFIER --device cpu --out OUT.csv",
    "perturb": f"perturb CELLS --model GENEFORMER --genes {GENES[0]} {GENES[1]} --combine each --device cpu --out OUT",
    "map": "map CELLS CELLS --model SCGPT --label cell_type --k 3 --device cpu --out OUT",
    "integrate": "integrate CELLS --model SCGPT --label cell_type --batch batch --device cpu --out OUT",
    "predict, scGenePT": "predict SCREEN --model SCGENEPT --perturbations G01 --device cpu --out OUT.csv",
    "fit, rosa": "sequence fit CELLS --vectors VECTORS --kind mlp --epochs 1 --device cpu --out OUT",
}
LONG = ("finetune, scGPT", "map", "integrate", "fit, rosa", "fit, scGenePT", "finetune, Geneformer")  # with --slow


def fit_scgenept(folder: Path, out: Path) -> None:
    "The one task without a command: train a scGenePT and save it."
    data = PerturbationData(anndata.read_h5ad(folder / "screen.h5ad"))
    model = ScGenePT.from_config("tiny", data, device="cpu", d_model=16, n_heads=2, d_hid=16, n_layers=1)
    model.fit(data, data.split("simulation", seed=1), epochs=1).save_pretrained(out)


def run(task: str, folder: Path, out: Path) -> None:
    "Run a task; an exit code that is not 0 is an error too."
    if task == "fit, scGenePT":
        fit_scgenept(folder, out)
        return
    code = cli.main(words(TASKS[task], folder, out))
    if code != 0:
        raise RuntimeError(f"exit code {code}")


def written(out: Path) -> dict:
    "What lies where the result should be: numbers by file; None for files that hold the time or a path."
    files = [path for path in sorted(out.parent.rglob("*")) if path.is_file() and path.name != "scellfm.lock"]
    found = {}
    for path in files:
        name = path.relative_to(out.parent).as_posix()
        if path.suffix == ".csv":
            found[name] = pd.read_csv(path, index_col=0).select_dtypes("number").to_numpy(np.float64)
        elif path.suffix == ".safetensors":
            found[name] = np.concatenate([v.double().numpy().ravel() for _, v in sorted(load_file(path).items())])
        elif path.suffix == ".parquet":
            found[name] = pd.read_parquet(path).select_dtypes("number").to_numpy(np.float64)
        elif path.suffix == ".arrow":
            found[name] = np.frombuffer(path.read_bytes(), np.uint8)
        else:
            found[name] = None
    return found


def same(first: dict, second: dict) -> bool:
    "The same files with the same numbers, up to rounding."
    return first.keys() == second.keys() and all(
        value is None
        or (value.shape == second[name].shape and np.allclose(value, second[name], atol=1e-4, equal_nan=True))
        for name, value in first.items()
    )


class Counted:
    "Counts calls, and from call number `at` on (or at that call alone) raises."

    def __init__(self, function, error, at=None, once=False):
        self.function, self.error, self.at, self.once, self.calls = function, error, at, once, 0

    def fails_now(self) -> bool:
        self.calls += 1
        return self.at is not None and (self.calls == self.at if self.once else self.calls >= self.at)


def break_imports(monkeypatch, at=None) -> Counted:
    "Imports inside functions of the package: number `at` is refused."
    counted = Counted(builtins.__import__, ImportError, at, once=True)

    def importing(name, globals=None, locals=None, fromlist=(), level=0):
        asked = (globals or {}).get("__name__", "")
        if asked.startswith("scellfm") and counted.fails_now():
            raise ImportError(f"injected: {name} cannot be imported by {asked}")
        return counted.function(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", importing)
    return counted


def break_memory(monkeypatch, at=None, once=False) -> Counted:
    "Linear layers: call number `at`, or all from it on, find no memory."
    counted = Counted(torch.nn.functional.linear, RuntimeError, at, once)

    def linear(*arguments, **more):
        if counted.fails_now():
            raise torch.OutOfMemoryError("injected: out of memory")
        return counted.function(*arguments, **more)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    return counted


TOKENIZERS = (
    "scellfm.geneformer.tokenizer.rank_tokenizer.tokenized_blocks",
    "scellfm.scgpt.embedding.tokenize",
    "scellfm.scgpt.annotation.tokenize",
    "scellfm.scgenept.prediction.tokens_and_rows",
    "scellfm.scgenept.training.rows_of",
    "scellfm.rosa.rosa.learnable",
)


def break_tokenizers(monkeypatch, at=None) -> Counted:
    "What turns cells into a model's input fails."
    counted = Counted(None, ValueError, at)
    for path in TOKENIZERS:
        module, name = path.rsplit(".", 1)
        module = importlib.import_module(module)
        if not hasattr(module, name):
            continue

        monkeypatch.setattr(module, name, failing_at(counted, getattr(module, name)))
    return counted


def failing_at(counted: Counted, function):
    "The function, which raises when its turn has come."

    def failing(*arguments, **more):
        if counted.fails_now():
            raise ValueError("injected: the tokenizer fails")
        return function(*arguments, **more)

    return failing


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    "The result of each task without a failure, and how many calls of each kind it makes; computed when asked for."
    kept = {}

    def of(task: str) -> tuple[dict, dict]:
        if task not in kept:
            out = tmp_path_factory.mktemp("whole") / "out"
            kinds = {"tokenizer": break_tokenizers, "memory": break_memory, "import": break_imports}
            with pytest.MonkeyPatch.context() as monkeypatch:
                counted = {kind: breaker(monkeypatch) for kind, breaker in kinds.items()}
                run(task, place, out)
            calls = {kind: one.calls for kind, one in counted.items()}
            kept[task] = (written(out), calls)
        return kept[task]

    return of


def judge(task: str, place: Path, out: Path, whole: dict, failed: Counted) -> str:
    "'error' or 'same'; AssertionError for a result that is another, or for parts of one after an error."
    try:
        run(task, place, out)
    except (Exception, SystemExit) as error:
        left = [name for name in written(out) if not name.endswith(".lock")]
        assert not left, f"{task}: {left} is left after {error!r}"
        return "error"
    assert failed.calls >= (failed.at or 0), "the failure was never reached"
    assert same(written(out), whole), f"{task}: another result after a failure"
    return "same"


EVERY = [*TASKS, "fit, scGenePT"]
MARKED = [pytest.param(task, marks=pytest.mark.slow) if task in LONG else task for task in EVERY]


@pytest.mark.parametrize("task", MARKED)
def test_without_memory_there_is_an_error_and_no_output(task, place, whole, tmp_path, monkeypatch, capsys):
    result, calls = whole(task)
    assert result, f"{task} writes nothing"
    if not calls["memory"]:
        return  # no layer of a network in this task: there is nothing to break
    counted = break_memory(monkeypatch, at=max(calls["memory"] // 2, 1))
    assert judge(task, place, tmp_path / "out", result, counted) == "error"


@pytest.mark.parametrize("task", MARKED)
def test_memory_that_runs_out_once_gives_an_error_or_the_same_result(task, place, whole, tmp_path, monkeypatch, capsys):
    result, calls = whole(task)
    if calls["memory"]:
        counted = break_memory(monkeypatch, at=max(calls["memory"] // 2, 1), once=True)
        judge(task, place, tmp_path / "out", result, counted)


@pytest.mark.parametrize("task", MARKED)
def test_a_tokenizer_that_fails_is_an_error_and_no_output(task, place, whole, tmp_path, monkeypatch, capsys):
    result, calls = whole(task)
    assert calls["tokenizer"], f"{task} passes none of the functions that make a model's input"
    counted = break_tokenizers(monkeypatch, at=calls["tokenizer"])  # the last time, when much is done already
    assert judge(task, place, tmp_path / "out", result, counted) == "error"


@pytest.mark.parametrize(
    "share", [0.5, *(pytest.param(i / 20, marks=pytest.mark.slow) for i in range(1, 20) if i != 10)]
)
@pytest.mark.parametrize("task", MARKED)
def test_an_import_that_fails_gives_an_error_or_the_same_result(
    task, share, place, whole, tmp_path, monkeypatch, capsys
):
    result, calls = whole(task)
    counted = break_imports(monkeypatch, at=max(int(share * calls["import"]), 1))
    judge(task, place, tmp_path / "out", result, counted)


def test_a_worker_that_dies_each_time_ends_the_run_without_a_result(place, tmp_path, monkeypatch):
    from scellfm import atlas
    from scellfm.atlas import crew

    (tmp_path / "cells").mkdir()
    for name in "ab":
        shutil.copy(place / "cells.h5ad", tmp_path / "cells" / f"{name}.h5ad")
    start = crew.subprocess.Popen

    def dying(*arguments, **more):
        process = start(*arguments, **more)
        process.send_signal(signal.SIGKILL)
        return process

    monkeypatch.setattr(crew.subprocess, "Popen", dying)
    out = tmp_path / "out"
    with pytest.raises(ScellfmError, match="3 times|worker"):
        atlas.run(
            "embed",
            tmp_path / "cells",
            model=place / "geneformer",
            out=out,
            workers=2,
            loading={"device": "cpu"},
        )
    with pytest.raises(ScellfmError):
        atlas.read(out)  # no part of it passes for a result


def test_the_tests_can_fail(place, whole, tmp_path, monkeypatch):
    "A task that answers a failure with zeros is found out."
    from scellfm.scgpt import embedding

    result, calls = whole("embed, scGPT")
    vectors = embedding.cell_vectors

    def forgiving(gpt, genes, *arguments, **more):
        try:
            return vectors(gpt, genes, *arguments, **more)
        except torch.OutOfMemoryError:
            return torch.zeros(len(genes), gpt.model.config.d_model)

    monkeypatch.setattr(embedding, "cell_vectors", forgiving)
    counted = break_memory(monkeypatch, at=max(calls["memory"] // 2, 1))
    with pytest.raises(AssertionError, match="another result after a failure"):
        judge("embed, scGPT", place, tmp_path / "out", result, counted)
    assert list(result) == ["out.csv"]
