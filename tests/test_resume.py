"""Embeddings that are killed (kill -9) go on from their folder: the same bytes, only what is missing computed."""

import shutil
import subprocess
import sys

import anndata
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from scipy import sparse

from scellfm.core import StoreError
from scellfm.geneformer import Geneformer, RankTokenizer, embedding
from scellfm.scgpt import ScGPT
from scellfm.scgpt import embedding as scgpt_embedding
from scellfm.store import Store

pytestmark = pytest.mark.filterwarnings("ignore::scellfm.core.ScellfmWarning")
GENES = [f"ENSG{i:011d}" for i in range(30)]
BLOCK = 5


def cells(n=18, seed=0):
    "Cells of which the sixth to tenth, a whole block, are empty."
    counts = np.random.default_rng(seed).poisson(2.0, (n, 30)).astype(np.float32)
    counts[5:10] = 0
    obs = pd.DataFrame(index=[f"c{i}" for i in range(n)])
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=GENES))


def geneformer(change=0.0):
    model = Geneformer.from_config("tiny", RankTokenizer.fit(cells()), device="cpu")
    model.model.bert.embeddings.word_embeddings.weight.data += change
    return model


def embed_cells(adata, folder=None, change=0.0, **options):
    geneformer(change).embed(adata, folder=folder, **options)
    return adata.obsm["X_geneformer"]


def embed_genes(adata, folder=None, change=0.0, **options):
    geneformer(change).embed_genes(adata, folder=folder, **options)
    return adata.varm["X_geneformer"]


def embed_with_scgpt(adata, folder=None, change=0.0, **options):
    model = ScGPT.from_config("tiny", GENES, device="cpu")
    model.model.encoder.embedding.weight.data += change
    model.embed(adata, folder=folder, **options)
    return adata.obsm["X_scGPT"]


RUNS = {"cells": embed_cells, "genes": embed_genes, "scgpt": embed_with_scgpt}


@pytest.fixture
def small_blocks(monkeypatch):
    set_small_blocks(monkeypatch.setattr)


def set_small_blocks(change):
    tokenize = scgpt_embedding.tokenize
    change(embedding, "CELL_BLOCK", BLOCK)
    change(embedding, "GENE_BLOCK", BLOCK)
    change(scgpt_embedding, "tokenize", lambda *args, **options: tokenize(*args, rows=BLOCK, **options))


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_resume
from scellfm.store import Store
test_resume.set_small_blocks(setattr)
write = Store.write
def killed_at_the_third(self, name, **arrays):
    if len(self.names) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, name, **arrays)
Store.write = killed_at_the_third
test_resume.geneformer(), test_resume.ScGPT.from_config("tiny", test_resume.GENES, device="cpu")  # what they import
for kind, run in test_resume.RUNS.items():  # each in a process of its own; the imports cost more than the run
    child = os.fork()
    if not child:
        run(test_resume.cells(), os.path.join(sys.argv[1], kind))
        os._exit(0)
    print(kind, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "A folder with what each run had written when it was killed at its third block."
    folder = tmp_path_factory.mktemp("killed")
    code = KILLED.format(tests=str(ROOT / "tests"))
    told = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert told.stdout.split() == [word for kind in RUNS for word in (kind, "-9")], told.stdout + told.stderr
    return folder


@pytest.mark.parametrize("kind", RUNS)
def test_a_killed_embedding_goes_on_to_the_same_bytes(kind, killed, tmp_path, small_blocks, monkeypatch):
    shutil.copytree(killed / kind, tmp_path / "run")
    assert len(list((tmp_path / "run").glob("*.npz"))) == 2
    written, write = [], Store.write
    monkeypatch.setattr(
        Store, "write", lambda self, name, **arrays: written.append(name) or write(self, name, **arrays)
    )
    resumed = RUNS[kind](cells(), tmp_path / "run")
    n_blocks = len(list((tmp_path / "run").glob("*.npz")))
    assert len(written) == n_blocks - 2
    whole = RUNS[kind](cells(), tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "run").iterdir())
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "run" / name).read_bytes() for name in names)
    for other in (whole, RUNS[kind](cells()), RUNS[kind](cells(), tmp_path / "run")):  # without a folder; finished
        np.testing.assert_array_equal(resumed, other)


@pytest.mark.parametrize("kind", RUNS)
def test_other_cells_weights_and_settings_are_refused_by_name(kind, tmp_path):
    RUNS[kind](cells(), tmp_path)
    for changed, options, named in (
        (cells(seed=1), {}, "inputs: cells"),
        (cells(), dict(change=0.1), "inputs: weights"),
        (cells(), dict(token_budget=77), "settings: token_budget"),
    ):
        with pytest.raises(StoreError, match=named):
            RUNS[kind](changed, tmp_path, **options)


@pytest.mark.parametrize("kind", RUNS)
def test_blocks_change_no_number_beyond_rounding(kind, monkeypatch):
    whole = RUNS[kind](cells())
    set_small_blocks(monkeypatch.setattr)
    np.testing.assert_allclose(RUNS[kind](cells()), whole, atol=1e-5)


def test_the_same_cells_with_new_annotation_go_on(tmp_path):
    "What was written into obs or obsm meanwhile changes no embedding, and so it does not count."
    adata = cells()
    for run in (embed_cells, embed_with_scgpt):
        first = run(adata, tmp_path / run.__name__).copy()
        adata.obs["cluster"] = "a"
        np.testing.assert_array_equal(run(adata, tmp_path / run.__name__), first)
