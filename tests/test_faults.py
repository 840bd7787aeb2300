"""Whatever is saved: a full disk names the file and leaves nothing half done; what a killed run leaves is not read."""

import os
import signal
import subprocess
import sys

import anndata
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from scipy import sparse

from scellfm.core import StoreError
from scellfm.data import hold_out
from scellfm.geneformer import (
    CellClassifier,
    GeneClassifier,
    Geneformer,
    RankTokenizer,
    Screen,
    TaskClassifier,
    TokenizedCells,
)
from scellfm.scgpt import ReferenceMap, ScGPT

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.filterwarnings("ignore::scellfm.core.ScellfmWarning")  # models of one step
GENES = [f"ENSG{i:011d}" for i in range(30)]


def cells(n=24):
    obs = pd.DataFrame({"cell_type": ["B", "T"] * (n // 2)}, index=[f"c{i}" for i in range(n)])
    counts = np.random.default_rng(0).poisson(2.0, (n, 30)).astype(np.float32)
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=GENES))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "One of each thing that can be saved: (how to save it, how to read it back)."
    adata, folder = cells(), tmp_path_factory.mktemp("made")
    tok = RankTokenizer.fit(adata)
    gf = Geneformer.from_config("tiny", tok, device="cpu")
    clf = gf.finetune(adata, "cell_type", split=hold_out(adata, fractions=(0.5, 0, 0.5)), epochs=1, n_boot=0)
    of_genes = gf.finetune_genes(adata, {"a": GENES[:10], "b": GENES[10:]}, folds=2, epochs=1, n_boot=0)
    adata.obs["side"] = ["left", "right", "right", "left"] * 6
    of_tasks = gf.finetune(
        adata, ["cell_type", "side"], split=hold_out(adata, fractions=(0.5, 0, 0.5)), epochs=1, n_boot=0
    )
    screen = clf.perturb(adata, state="cell_type", start="B", goal="T", genes=GENES[:3])
    scgpt = ScGPT.from_config("tiny", GENES, device="cpu")
    adata.obsm["X"] = np.random.default_rng(0).normal(size=(24, 4))
    adata.write_h5ad(folder / "cells.h5ad")
    tokens = tok(adata)
    return {
        "tokenizer": (tok.save_pretrained, RankTokenizer.from_pretrained),
        "tokenized cells": (tokens.save, TokenizedCells.load),
        "tokenized file": (lambda path: tok.tokenize_files(folder / "cells.h5ad", path), TokenizedCells.load),
        "Geneformer": (gf.save_pretrained, lambda path: Geneformer.from_pretrained(path, device="cpu")),
        "cell classifier": (clf.save_pretrained, lambda path: CellClassifier.from_pretrained(path, device="cpu")),
        "gene classifier": (of_genes.save_pretrained, lambda path: GeneClassifier.from_pretrained(path, device="cpu")),
        "classifier of several labels": (
            of_tasks.save_pretrained,
            lambda path: TaskClassifier.from_pretrained(path, device="cpu"),
        ),
        "screen": (screen.save, Screen.load),
        "scGPT": (scgpt.save_pretrained, lambda path: ScGPT.from_pretrained(path, device="cpu")),
        "reference map": (ReferenceMap(adata, "X", k=3).save, ReferenceMap.load),
    }


@pytest.fixture
def full_disk():
    "No file may grow over 100 bytes; the write fails as on a full disk."
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, old[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, old)
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


THINGS = [
    "tokenizer",
    "tokenized cells",
    "tokenized file",
    "Geneformer",
    "cell classifier",
    "gene classifier",
    "classifier of several labels",
    "screen",
    "scGPT",
    "reference map",
]


@pytest.mark.parametrize("thing", THINGS)
def test_a_full_disk_is_told_and_the_same_call_works_once_there_is_room(made, full_disk, tmp_path, thing):
    save, load = made[thing]
    with pytest.raises(StoreError, match="could not be written.*free some disk space"):
        save(tmp_path / "out")
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(path.name.startswith(".part-") for path in tmp_path.rglob("*")), left
    assert all(path.stat().st_size < 100 for path in left), left
    full_disk()
    save(tmp_path / "out")
    assert load(tmp_path / "out") is not None


@pytest.mark.parametrize("thing", THINGS)
def test_a_file_in_the_way_is_left_alone(made, tmp_path, thing):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(StoreError, match="could not be written"):
        made[thing][0](tmp_path / "taken" / "out")
    assert (tmp_path / "taken").read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["taken"]


TOKENIZE = """
import sys, time
from scellfm.geneformer import RankTokenizer
from scellfm.geneformer.tokenizer import tokenized
tok = RankTokenizer.fit(sys.argv[1])
write = tokenized.DatasetWriter.write
def slowly(self, *arguments):
    write(self, *arguments)
    print("half", flush=True)
    time.sleep(float(sys.argv[3]))
tokenized.DatasetWriter.write = slowly
tok.tokenize_files(sys.argv[1], sys.argv[2])
"""


def test_killed_while_tokenizing_a_file_nothing_is_there_and_the_next_run_has_the_same_bytes(tmp_path):
    cells(400).write_h5ad(tmp_path / "cells.h5ad")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(out, slow):
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", TOKENIZE, tmp_path / "cells.h5ad", out, str(slow)],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )

    killed, whole = start(tmp_path / "out", 60), start(tmp_path / "whole", 0)
    assert killed.stdout.readline().strip() == "half"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "out").exists()
    whole.communicate(timeout=120)
    again = start(tmp_path / "out", 0)
    again.communicate(timeout=120)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert again.returncode == 0 and names == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)
