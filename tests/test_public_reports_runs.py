"""What is written: nothing of the user's is lost, a run goes on only from its own parts, damage is named."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from scipy import sparse

from scellfm import cli
from scellfm.core import OptionError, ScellfmError, StoreError
from scellfm.data import hold_out
from scellfm.geneformer import Geneformer, RankTokenizer, Screen, TokenizedCells
from scellfm.geneformer.tokenizer.corpus import Corpus
from scellfm.report import Report
from scellfm.scgpt import ReferenceMap, ScGPT
from scellfm.store import Store, atomic_write
from scellfm.store.lock import Lock

pytestmark = pytest.mark.filterwarnings("ignore")
GENES = [f"ENSG{i:011d}" for i in range(30)]


def cells(n=24, seed=0):
    obs = pd.DataFrame(
        {"cell_type": ["B", "T"] * (n // 2), "side": (["left", "right", "right", "left"] * n)[:n]},
        index=[f"c{i}" for i in range(n)],
    )
    counts = np.random.default_rng(seed).poisson(2.0, (n, 30)).astype(np.float32)
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=GENES))


def split(adata):
    return hold_out(adata, fractions=(0.5, 0, 0.5))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Everything that a folder is written of, by name: how to write it."
    adata, folder = cells(), tmp_path_factory.mktemp("made")
    adata.write_h5ad(folder / "cells.h5ad")
    tok = RankTokenizer.fit(adata)
    gf = Geneformer.from_config("tiny", tok, device="cpu")
    options = dict(split=split(adata), epochs=1, n_boot=0)
    clf = gf.finetune(adata, "cell_type", **options)
    scgpt = ScGPT.from_config("tiny", GENES, device="cpu")
    report = Report("A page")
    embedded = cells()
    embedded.obsm["X"] = np.random.default_rng(0).normal(size=(24, 4))
    return {
        "tokenizer": tok.save_pretrained,
        "tokenized cells": tok(adata).save,
        "tokenized file": lambda path: tok.tokenize_files(folder / "cells.h5ad", path),
        "Geneformer": gf.save_pretrained,
        "cell classifier": clf.save_pretrained,
        "gene classifier": gf.finetune_genes(
            adata, {"a": GENES[:10], "b": GENES[10:]}, folds=2, epochs=1, n_boot=0
        ).save_pretrained,
        "classifier of several labels": gf.finetune(adata, ["cell_type", "side"], **options).save_pretrained,
        "scGPT classifier": scgpt.finetune(adata, "cell_type", **options).save_pretrained,
        "screen": clf.perturb(adata, state="cell_type", start="B", goal="T", genes=GENES[:3]).save,
        "scGPT": scgpt.save_pretrained,
        "reference map": ReferenceMap(embedded, "X", k=3).save,
        "report": report.save,
    }


THINGS = [
    "tokenizer",
    "tokenized cells",
    "tokenized file",
    "Geneformer",
    "cell classifier",
    "gene classifier",
    "classifier of several labels",
    "scGPT classifier",
    "screen",
    "scGPT",
    "reference map",
    "report",
]


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- E25: an output folder that exists


def thesis(folder: Path) -> dict[str, bytes]:
    "A user's folder with files of every name that we write, none of them ours."
    folder.mkdir(parents=True)
    (folder / "chapter.md").write_text("It was a dark and stormy night.")
    names = ("state.json", "screen.json", "index.json", "config.json", "args.json", "vocab.json", "report.json")
    for name in (*names, "classifier.json", "tasks.json", "gene_classifier.json", "annotator.json", "vectors.json"):
        (folder / name).write_text(json.dumps({"title": "mine", "chapters": [1, 2]}))
    for name in ("token_dictionary.json", "gene_median_dictionary.json", "report.html", "model.safetensors"):
        (folder / name).write_text('{"mine": "too"}')
    return tree(folder)


@pytest.mark.parametrize("thing", THINGS)
def test_a_folder_of_the_user_is_never_replaced_nor_a_file_in_it_overwritten(made, tmp_path, thing):
    before = thesis(tmp_path / "thesis")
    with pytest.raises(StoreError, match="nothing was touched"):
        made[thing](tmp_path / "thesis")
    assert tree(tmp_path / "thesis") == before
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


@pytest.mark.parametrize("thing", THINGS)
def test_an_earlier_result_of_the_same_kind_is_replaced_and_one_of_another_kind_is_not(made, tmp_path, thing):
    made[thing](tmp_path / "out")
    whole = tree(tmp_path / "out")
    made[thing](tmp_path / "out")
    assert tree(tmp_path / "out").keys() == whole.keys()
    other = "screen" if thing != "screen" else "reference map"
    before = tree(tmp_path / "out")
    with pytest.raises(StoreError, match="nothing was touched"):
        made[other](tmp_path / "out")
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("thing", ["tokenized cells", "tokenized file", "screen", "reference map"])
def test_a_note_laid_into_an_earlier_result_keeps_it_from_being_replaced(made, tmp_path, thing):
    made[thing](tmp_path / "out")
    (tmp_path / "out" / "notes.md").write_text("mine")
    before = tree(tmp_path / "out")
    with pytest.raises(StoreError, match="notes.md"):
        made[thing](tmp_path / "out")
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("thing", [thing for thing in THINGS if thing != "report"])
def test_a_path_that_can_be_no_output_is_refused_in_words(made, tmp_path, monkeypatch, thing):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious.txt").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    for path in (".", "..", "/", "", "  ", "~nobody-of-that-name/out", "pipe", "a\0b"):
        with pytest.raises(OptionError, match="path|folder"):
            made[thing](path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pipe", "precious.txt"]


def test_a_link_to_an_earlier_result_stays_a_link(made, tmp_path):
    made["screen"](tmp_path / "disk" / "screen")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "screen")
    made["screen"](tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and Screen.load(tmp_path / "disk" / "screen") is not None


def run(*arguments) -> int:
    try:
        return cli.main(list(map(str, arguments))) or 0
    except SystemExit as done:
        return done.code


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tokenizer", "Geneformer", "scGPT"):
        made[name](tmp_path / name)
    made["cell classifier"](tmp_path / "clf")
    thesis(tmp_path / "thesis")
    adata = cells()
    adata.obsm["X"] = np.random.default_rng(0).normal(size=(24, 4))
    adata.write_h5ad(tmp_path / "thesis" / "cells.h5ad")
    return tmp_path


COMMANDS = {
    "tokenize": "tokenize thesis/cells.h5ad --tokenizer tokenizer --out {}",
    "fit": "tokenize thesis/cells.h5ad --out new --fit {}",
    "embed": "embed thesis/cells.h5ad --model Geneformer --out {}",
    "finetune": "finetune thesis/cells.h5ad --model Geneformer --label cell_type --k 2 --out {}",
    "finetune scGPT": "finetune thesis/cells.h5ad --model scGPT --label cell_type --k 2 --out {}",
    "predict": "predict thesis/cells.h5ad --model clf --out {}",
    "perturb": "perturb thesis/cells.h5ad --model clf --genes ENSG00000000001 --out {}",
    "map": "map thesis/cells.h5ad thesis/cells.h5ad --use-rep X --out {}",
    "save of a map": "map thesis/cells.h5ad thesis/cells.h5ad --use-rep X --out new --save {}",
    "integrate": "integrate thesis/cells.h5ad --reps X --batch side --label cell_type --out {}",
    "demo": "demo --out {}",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_costs_a_user_a_folder(place, command, capsys):
    files = "embed" in command or command == "predict"
    before = tree(place)
    shutil.copytree(place / "thesis", place / "thesis.csv") if files else None
    (place / "pipe.csv").unlink(missing_ok=True)
    os.mkfifo(place / "pipe.csv")
    for out in ("thesis.csv" if files else "thesis", "." if not files else "", "/", "pipe.csv", "~nobody-here/x.csv"):
        start = time.monotonic()
        assert run(*COMMANDS[command].format("\0" + out + "\0").replace("\0", "").split(" ")) == 2, out
        assert time.monotonic() - start < 20  # before the work
        told = capsys.readouterr().err
        assert "Traceback" not in told and told.strip(), out
    shutil.rmtree(place / "thesis.csv") if files else None
    assert tree(place) == before


@pytest.mark.parametrize("command", ["embed", "predict"])
def test_an_input_is_never_replaced_by_the_result(place, command, capsys):
    before = tree(place)
    words = COMMANDS[command].format("thesis/cells.h5ad").split()
    assert run(*words) == 2
    assert "is read from there" in capsys.readouterr().err and tree(place) == before


def test_a_data_set_is_not_tokenized_over_the_folder_of_its_cells(made, tmp_path):
    adata = cells()
    tok = RankTokenizer.fit(adata)
    tok(adata).save(tmp_path / "out")  # an earlier data set, into which cells were laid
    adata.write_h5ad(tmp_path / "out" / "data-cells.arrow.h5ad")
    with pytest.raises(StoreError, match="is read from there"):
        tok.tokenize_files(tmp_path / "out" / "data-cells.arrow.h5ad", tmp_path / "out")
    assert (tmp_path / "out" / "data-cells.arrow.h5ad").exists()


# ---- E28: what a killed writer leaves

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from scellfm.geneformer import RankTokenizer
from scellfm.geneformer.tokenizer import tokenized
finish = tokenized.DatasetWriter.finish
def killed(self, *arguments):
    finish(self, *arguments)
    os.kill(os.getpid(), signal.SIGKILL)
tokenized.DatasetWriter.finish = killed
import test_public_reports_runs as here
tok = RankTokenizer.fit(here.cells())
tok.tokenize_files(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("date", [0, 86400])
def test_the_finished_folder_of_a_killed_tokenizing_is_not_read_and_goes_with_the_next_run(tmp_path, date):
    adata = cells(60)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    tok = RankTokenizer.fit(cells())
    (tmp_path / "sets").mkdir()
    tok.tokenize_files(tmp_path / "cells.h5ad", tmp_path / "sets" / "first")
    code = KILLED.format(tests=str(ROOT / "tests"))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, tmp_path / "cells.h5ad", tmp_path / "sets" / "b"], env=env
    )
    assert done.returncode == -signal.SIGKILL
    left = [path for path in (tmp_path / "sets").iterdir() if path.name.startswith(".")]
    assert any((path / "state.json").exists() for path in left)
    for path in left:
        os.utime(path, (time.time() + date,) * 2)
    assert len(Corpus(tmp_path / "sets")) == 60
    for path in left:
        if path.is_dir():
            with pytest.raises(ScellfmError, match="temporary name"):
                TokenizedCells.load(path)
    tok.tokenize_files(tmp_path / "cells.h5ad", tmp_path / "sets" / "b")
    assert sorted(path.name for path in (tmp_path / "sets").iterdir()) == ["b", "first"]
    assert len(Corpus(tmp_path / "sets")) == 120


def test_what_a_living_writer_is_writing_is_left_alone(tmp_path):
    with atomic_write(tmp_path / "one.csv") as part:
        part.write_text("half")
        with atomic_write(tmp_path / "two.csv") as other:
            other.write_text("whole")
        assert part.read_text() == "half"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.csv", "two.csv"]


ASIDE = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_public_reports_runs as here
from pathlib import Path
replace, calls = os.replace, []
def second_kills(source, target):
    calls.append(target)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = second_kills
from scellfm.geneformer import RankTokenizer
RankTokenizer.fit(here.cells())(here.cells(6)).save(sys.argv[1])
"""


def test_an_old_result_that_stepped_aside_for_one_that_was_killed_comes_back(made, tmp_path):
    made["tokenized cells"](tmp_path / "out")
    whole = tree(tmp_path / "out")
    code, env = ASIDE.format(tests=str(ROOT / "tests")), {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, tmp_path / "out"], env=env)
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    with atomic_write(tmp_path / "other.csv") as part:
        part.write_text("x")
    assert tree(tmp_path / "out") == whole
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".part")] == []


def test_two_runs_do_not_write_the_same_result(made, tmp_path):
    held = Lock(tmp_path / ".lock-out")
    with pytest.raises(StoreError, match="is being written by process"):
        made["tokenized file"](tmp_path / "out")
    held.release()
    made["tokenized file"](tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("text", ["", "[1]", '{"host": 3}', '{"host": "h", "pid": "many", "started": "", "token": ""}'])
def test_a_lock_that_is_dated_tomorrow_does_not_block(tmp_path, text):
    (tmp_path / "run").mkdir()
    for name, content in (("lock", text), (".part-clearing", "")):
        (tmp_path / "run" / name).write_text(content)
        os.utime(tmp_path / "run" / name, (time.time() + 86400,) * 2)
    start = time.monotonic()
    with Store(tmp_path / "run", {"seed": 0}) as store:
        store.write("a", x=np.zeros(3))
        store.finish()
    assert time.monotonic() - start < 5
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["a.npz", "manifest.json"]
