"What Geneformer's public functions do with a bad input: the error's type, the value it names, and the fix."

import os
import subprocess
import sys
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from scellfm.core import AssetError, DataError, DivergedError, OptionError, ScellfmError, ScellfmWarning, StoreError
from scellfm.data import Split, folds, hold_out
from scellfm.geneformer import CellClassifier, Geneformer, RankTokenizer
from scellfm.geneformer.pretraining import pretrain
from scellfm.geneformer.tokenizer.corpus import Corpus
from scellfm.geneformer.tokenizer.tokenized import TokenizedCells
from scellfm.store import fingerprint

GENES = [f"ENSG{i:011d}" for i in range(40)]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"


def cells(change=None, genes=None, **obs):
    "24 cells of 4 donors and 2 types, 40 genes; `change(dense)` spoils X, `obs` replaces columns."
    dense = np.random.default_rng(0).poisson(1.5, (24, 40)).astype(np.float64)
    dense[:, 0] += 1
    table = {"donor": [f"d{i % 4}" for i in range(24)], "type": ["B", "T", "T", "B"] * 6} | obs
    x = sparse.csr_matrix(dense if change is None else change(dense))
    return anndata.AnnData(
        x, obs=pd.DataFrame(table, index=[f"cell{i}" for i in range(24)]), var=pd.DataFrame(index=genes or GENES)
    )


def put(value):
    def change(dense):
        dense[20, 7] = value
        return dense

    return change


@pytest.fixture(scope="module")
def gf():
    return Geneformer.from_config("tiny", RankTokenizer.fit(cells()), device="cpu")


@pytest.fixture(scope="module")
def clf(gf):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gf.finetune(cells(), "type", split=folds(cells(), by="donor", k=2, stratify="type"), n_boot=0)


@pytest.fixture(scope="module")
def saved(gf, clf, tmp_path_factory):
    "A folder with a model, a classifier and a data set."
    folder = tmp_path_factory.mktemp("saved")
    gf.save_pretrained(folder / "model")
    clf.save_pretrained(folder / "classifier")
    gf.tokenizer(cells(), columns=["donor", "type"]).save(folder / "cells.dataset")
    return folder


def tuned(gf, adata, label="type", **settings):
    settings.setdefault("split", folds(cells(), by="donor", k=2, stratify="type"))
    return gf.finetune(adata, label, n_boot=0, **settings)


def spoilt(saved, folder, name, content):
    "A copy of what was saved, in which one file holds something else."
    import shutil

    shutil.copytree(saved, folder / "copy")
    path = next((folder / "copy").glob(name))
    path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    return folder / "copy"


def leaky():
    split = hold_out(cells(), by="donor", fractions=(0.5, 0, 0.5))
    return Split(split.train, split.valid, np.append(split.test, split.train[:1]), "donor", 24)


STATES = dict(state="type", start="B", goal="T", donor="donor")


# what is wrong: (what is done with (model, classifier, saved things, an empty folder), the type, words of the message)
def touch(folder):
    "The files that tell a dictionary of data sets."
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (folder / "train" / "state.json").write_text("{}")


ERRORS = {
    "logarithms are tokenized": (
        lambda g, c, s, d: g.tokenizer(cells(np.log1p)),
        DataError,
        ["1.09861", "log-normalised", "layer="],
    ),
    "logarithms are embedded": (
        lambda g, c, s, d: g.embed(cells(np.log1p)),
        DataError,
        ["1.09861", "log-normalised", "layer="],
    ),
    "negative counts train a model": (
        lambda g, c, s, d: g.pretrain(cells(put(-3))),
        DataError,
        ["'cell20'", GENES[7], "-3", "layer="],
    ),
    "NaN is perturbed": (
        lambda g, c, s, d: c.perturb(cells(put(np.nan)), **STATES),
        DataError,
        ["'cell20'", GENES[7], "nan", "layer="],
    ),
    "an infinite count is classified": (
        lambda g, c, s, d: c.predict(cells(put(np.inf))),
        DataError,
        ["'cell20'", "inf", "layer="],
    ),
    "no such layer": (lambda g, c, s, d: g.embed(cells(), layer="raw_counts"), DataError, ["'raw_counts'"]),
    "no cells": (lambda g, c, s, d: g.embed(cells()[:0]), DataError, ["no cells", "filters"]),
    "a table for cells": (
        lambda g, c, s, d: g.embed(pd.DataFrame({"G1": [1, 2]})),
        DataError,
        ["a DataFrame holds no cells", "give an AnnData"],
    ),
    "nothing for cells": (
        lambda g, c, s, d: c.perturb(None),
        DataError,
        ["a NoneType holds no cells", "give an AnnData"],
    ),
    "several data sets for one": (
        lambda g, c, s, d: ((d / "dict" / "train").mkdir(parents=True), touch(d / "dict"), g.embed(d / "dict")),
        DataError,
        ["several data sets (train)", "dict/train"],
    ),
    "no cells to train on": (lambda g, c, s, d: g.pretrain(cells()[:0]), DataError, ["no cells", "filters"]),
    "no genes": (lambda g, c, s, d: g.tokenizer(cells()[:, :0]), DataError, ["0 genes"]),
    "nothing but empty cells": (
        lambda g, c, s, d: g.embed(cells(lambda x: x * 0)),
        DataError,
        ["no cell is left of 24"],
    ),
    "no genes to fit to": (
        lambda g, c, s, d: RankTokenizer.fit(cells(lambda x: x * 0)),
        DataError,
        ["no gene has any count"],
    ),
    "symbols": (
        lambda g, c, s, d: g.embed(cells(genes=[f"SYM{i}" for i in range(40)])),
        DataError,
        ["0 of 40", "'SYM0'", "match={'symbols':"],
    ),
    "mouse": (
        lambda g, c, s, d: g.pretrain(cells(genes=[f"ENSMUSG{i:011d}" for i in range(40)])),
        DataError,
        ["mouse (40)", "match={'orthologs':"],
    ),
    "two species": (
        lambda g, c, s, d: c.predict(cells(genes=[*GENES[:30], *[f"ENSMUSG{i:011d}" for i in range(10)]])),
        DataError,
        ["two species", "mouse (10)", "Keep one species"],
    ),
    "numbers for genes": (
        lambda g, c, s, d: g.tokenizer(cells(genes=list(map(str, range(40))))),
        DataError,
        ["integers", "ensembl_id"],
    ),
    "no such column of genes": (lambda g, c, s, d: g.tokenizer(cells(), gene_column="symbol"), DataError, ["'symbol'"]),
    "no such label": (lambda g, c, s, d: tuned(g, cells(), "typ"), DataError, ["'typ'", "Did you mean 'type'?"]),
    "missing labels": (
        lambda g, c, s, d: tuned(g, cells(type=[None, *["B", "T"] * 11, "B"])),
        DataError,
        ["1 of 24", "'cell0'", "notna()"],
    ),
    "one class": (
        lambda g, c, s, d: tuned(g, cells(type="B")),
        DataError,
        ["single class, 'B'", "choose another column"],
    ),
    "a class of one cell": (
        lambda g, c, s, d: tuned(g, cells(type=["NK", *["B", "T"] * 11, "B"])),
        DataError,
        ["'NK'", "1 cell"],
    ),
    "a cell in training and test": (
        lambda g, c, s, d: tuned(g, cells(), split=leaky()),
        DataError,
        ["both train and test", "split the cells again"],
    ),
    "a number for a split": (
        lambda g, c, s, d: tuned(g, cells(), split=5),
        OptionError,
        ["type int", "scellfm.data.folds(adata"],
    ),
    "folds to pretrain by": (
        lambda g, c, s, d: g.pretrain(cells(), split=folds(cells(), k=2)),
        OptionError,
        ["type Folds", "one Split"],
    ),
    "half an epoch": (
        lambda g, c, s, d: tuned(g, cells(), epochs=1.5),
        OptionError,
        ["epochs=1.5", "whole number of at least 1"],
    ),
    "a word for a rate": (
        lambda g, c, s, d: tuned(g, cells(), learning_rate="5e-5"),
        OptionError,
        ["learning_rate='5e-5'", "number of at least 0"],
    ),
    "a rate beyond reason": (
        lambda g, c, s, d: Geneformer.from_config("tiny", g.tokenizer, device="cpu").pretrain(
            cells(), learning_rate=1e30
        ),
        DivergedError,
        ["lower learning_rate", "make it, again"],
    ),
    "no length": (
        lambda g, c, s, d: RankTokenizer.fit(cells(), max_length=0),
        OptionError,
        ["max_length=0", "at least 1"],
    ),
    "no space for a gene": (
        lambda g, c, s, d: RankTokenizer.fit(cells(), special=True, max_length=2),
        OptionError,
        ["max_length=2", "at least 3"],
    ),
    "nobody to hold out": (
        lambda g, c, s, d: g.finetune(cells(), label="type"),
        OptionError,
        ["split is missing", "scellfm.data.folds(adata, by='donor')"],
    ),
    "cells in the place of a tokenizer": (
        lambda g, c, s, d: Geneformer.from_config("tiny", cells()),
        OptionError,
        ["RankTokenizer.fit(adata)"],
    ),
    "no such state": (
        lambda g, c, s, d: c.perturb(cells(), **STATES | {"goal": "NK"}),
        DataError,
        ["type='NK'", "B, T"],
    ),
    "all cells but one": (
        lambda g, c, s, d: c.perturb(cells(), max_cells=-1, **STATES),
        OptionError,
        ["max_cells=-1", "at least 1"],
    ),
    "half a cell": (
        lambda g, c, s, d: c.perturb(cells(), max_cells=1.5, **STATES),
        OptionError,
        ["max_cells=1.5", "whole number"],
    ),
    "two columns of groups": (
        lambda g, c, s, d: c.perturb(cells(), groupby=["type", "donor"], **STATES),
        OptionError,
        ["groupby=['type', 'donor']", "must be a text"],
    ),
    "a goal that is the start": (
        lambda g, c, s, d: c.perturb(cells(), **STATES | {"goal": "B"}),
        OptionError,
        ["goal='B'", "must differ"],
    ),
    "no such column of states": (
        lambda g, c, s, d: c.perturb(cells(), **STATES | {"state": "illness"}),
        DataError,
        ["'illness'", "'type'"],
    ),
    "a gene that nobody knows": (
        lambda g, c, s, d: g.perturb(cells(), genes=[GENES[3] + "9"]),
        DataError,
        [GENES[3] + "9", "40 genes", "give an id or symbol"],
    ),
    "no genes are asked for": (lambda g, c, s, d: g.perturb(cells(), genes=[]), OptionError, ["genes=[]", "'all'"]),
    "a layer that there is not": (
        lambda g, c, s, d: g.embed(cells(), emb_layer=-9),
        OptionError,
        ["-9", "'second_to_last'"],
    ),
    "too many frozen layers": (
        lambda g, c, s, d: tuned(g, cells(), freeze_layers=4),
        OptionError,
        ["freeze_layers=4", "3"],
    ),
    "an unknown shape": (
        lambda g, c, s, d: Geneformer.from_config("V2-104", g.tokenizer),
        OptionError,
        ["'V2-104'", "Did you mean 'V2-104M'?"],
    ),
    "a classifier guesses genes": (
        lambda g, c, s, d: pretrain(c.models[0], cells()),
        OptionError,
        ["classifier", "pretrained model"],
    ),
    "cells of another dictionary": (
        lambda g, c, s, d: g.embed(
            TokenizedCells(np.array([99, 5], np.uint16), np.array([0, 2]), cells().obs[:1], np.arange(1))
        ),
        DataError,
        ["token 99", "tokenizer"],
    ),
    "a pointer for weights": (
        lambda g, c, s, d: Geneformer.from_pretrained(spoilt(s, d, "model/*.safetensors", LFS) / "model"),
        AssetError,
        ["model.safetensors", "git-lfs pointer", "git lfs pull"],
    ),
    "a pointer for a dictionary": (
        lambda g, c, s, d: RankTokenizer.from_pretrained(spoilt(s, d, "model/token_dictionary*", LFS) / "model"),
        AssetError,
        ["token_dictionary", "git-lfs pointer", "git lfs pull"],
    ),
    "a pointer for cells": (
        lambda g, c, s, d: g.embed(spoilt(s, d, "cells.dataset/data-*", LFS) / "cells.dataset"),
        DataError,
        ["data-00000-of-00001.arrow", "tokenize again"],
    ),
    "a page for weights": (
        lambda g, c, s, d: CellClassifier.from_pretrained(
            spoilt(s, d, "classifier/fold0/*.safetensors", b"<html>Sign in") / "classifier"
        ),
        AssetError,
        ["web page", "fetch it again"],
    ),
    "cut weights": (
        lambda g, c, s, d: Geneformer.from_pretrained(
            spoilt(s, d, "model/*.safetensors", lambda b: b[:5000]) / "model"
        ),
        AssetError,
        ["model.safetensors"],
    ),
    "a cut data set": (
        lambda g, c, s, d: g.pretrain(spoilt(s, d, "cells.dataset/data-*", lambda b: b[:900]) / "cells.dataset"),
        DataError,
        ["data-00000-of-00001.arrow", "truncated", "tokenize again"],
    ),
    "a cut record": (
        lambda g, c, s, d: CellClassifier.from_pretrained(
            spoilt(s, d, "classifier/classifier.json", lambda b: b[:50]) / "classifier"
        ),
        AssetError,
        ["classifier.json"],
    ),
    "no such folder": (lambda g, c, s, d: Geneformer.from_pretrained(d / "none"), AssetError, ["none"]),
    "a file where the checkpoint should go": (
        lambda g, c, s, d: ((d / "run").write_text("mine"), g.pretrain(cells(), steps=1, folder=d / "run")),
        StoreError,
        ["run"],
    ),
    "a finished screen of other cells": (
        lambda g, c, s, d: (g.perturb(cells(), folder=d / "screen"), g.perturb(cells()[3:], folder=d / "screen")),
        StoreError,
        ["cells"],
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ERRORS)
def test_what_is_wrong_is_named_with_its_value_and_the_fix(gf, clf, saved, tmp_path, what):
    do, error, words = ERRORS[what]
    with pytest.raises(error) as caught:
        do(gf, clf, saved, tmp_path)
    assert isinstance(caught.value, ScellfmError)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


# odd, and yet possible: it goes on, and says what and how many
WARNINGS = {
    "cells without a known gene": (
        lambda g: g.embed(cells(lambda x: np.where(np.arange(24)[:, None] < 2, 0, x))),
        ["2 of 24 cells"],
    ),
    "under half of the genes known": (
        lambda g: g.tokenizer(cells(genes=[*GENES[:15], *[f"X{i}" for i in range(25)]])),
        ["15 of 40", "'X0'"],
    ),
    "genes in lower case": (lambda g: g.tokenizer(cells(genes=[gene.lower() for gene in GENES])), ["lower case"]),
    "fractions on a linear scale": (lambda g: g.tokenizer(cells(lambda x: x * 7.3)), ["not whole numbers", "linear"]),
    "more tokens than the model reads": (
        lambda g: g.embed(
            TokenizedCells(
                np.tile(np.arange(4, 40, dtype=np.uint16), 100), np.array([0, 3600]), cells().obs[:1], np.arange(1)
            )
        ),
        ["1 of 1 cells", "2,048"],
    ),
    "a model that learned nothing": (
        lambda g: Geneformer.from_config("tiny", g.tokenizer, device="cpu").pretrain(cells(), steps=1),
        ["which genes are common"],
    ),
}


@pytest.mark.parametrize("what", WARNINGS)
def test_what_is_odd_is_warned_of_and_goes_on(gf, what):
    do, words = WARNINGS[what]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        do(gf)
    ours = [str(warning.message) for warning in seen if issubclass(warning.category, ScellfmWarning)]
    assert any(all(word in message for word in words) for message in ours), ours


# handled: no error, no warning, and the same answer


def tokens(gf, adata):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ScellfmWarning)
        return [cell.tolist() for cell in map(gf.tokenizer(adata).__getitem__, range(adata.n_obs))]


def test_states_that_are_numbers_may_be_given_as_numbers_or_words(gf):
    "A classifier shows its classes, and the command line takes all values, as text."
    ask = dict(genes=GENES[:3], combine="each", state="ill", donor="donor")
    adata = cells(ill=[0, 1, 1, 0] * 6)
    number, word = gf.perturb(adata, start=1, goal=0, **ask), gf.perturb(adata, start="1", goal="0", **ask)
    pd.testing.assert_frame_equal(number.shifts, word.shifts)
    assert number.genes["log2fc"].notna().all() and number.genes.equals(word.genes) and number.groups == ["all"]


def test_a_cell_of_one_gene_is_a_cell_like_others(gf):
    alone = cells(lambda dense: np.where(np.arange(24)[:, None] == 9, np.eye(40)[7] * 500, dense))
    assert tokens(gf, alone)[9] == [gf.tokenizer.token(GENES[7])] and tokens(gf, alone)[8] == tokens(gf, cells())[8]
    gf.embed(alone)
    assert np.isfinite(alone.obsm["X_geneformer"]).all()


def test_a_huge_count_is_ranked_as_any_other(gf):
    huge = cells(put(2.0**24 + 2))
    assert tokens(gf, huge)[20][0] == gf.tokenizer.token(GENES[7]) and tokens(gf, huge)[:20] == tokens(gf, cells())[:20]


def test_versions_of_ids_make_no_difference(gf):
    assert tokens(gf, cells(genes=[f"{gene}.12" for gene in GENES])) == tokens(gf, cells())


def test_an_empty_cell_keeps_its_row_and_the_others_their_vectors(gf):
    hole, whole = cells(lambda x: np.where(np.arange(24)[:, None] == 5, 0, x)), cells()
    with pytest.warns(ScellfmWarning, match="1 of 24"):
        gf.embed(hole)
    gf.embed(whole)
    assert np.isnan(hole.obsm["X_geneformer"][5]).all()
    np.testing.assert_allclose(
        np.delete(hole.obsm["X_geneformer"], 5, 0), np.delete(whole.obsm["X_geneformer"], 5, 0), atol=1e-5
    )


@pytest.mark.filterwarnings("ignore")
def test_reading_and_learning_change_neither_a_view_nor_its_parent(gf, clf):
    parent = cells()
    view, before = parent[4:], fingerprint(parent)
    Geneformer.from_config("tiny", gf.tokenizer, device="cpu").pretrain(view, steps=1)
    gf.embed(view, copy=True), gf.embed_genes(view, copy=True), gf.state_embeddings(view, state="type")
    tuned(gf, view, split=hold_out(view, by="donor", fractions=(0.5, 0, 0.5)), epochs=1)
    clf.predict(view, copy=True), clf.perturb(view, genes=[GENES[0]], **STATES)
    assert view.is_view and fingerprint(parent) == before


@pytest.mark.filterwarnings("ignore")
def test_cells_left_on_disk_are_read_and_copied_into_memory(gf, clf, tmp_path):
    cells().write_h5ad(tmp_path / "cells.h5ad")
    backed, whole = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r"), cells()
    embedded = gf.embed(backed, copy=True)
    assert not embedded.isbacked and (embedded.X != whole.X).nnz == 0 and "X_geneformer" not in backed.obsm
    gf.embed(backed), gf.embed(whole), clf.predict(backed), clf.predict(whole)
    assert (backed.obsm["X_geneformer"] == whole.obsm["X_geneformer"]).all() and (
        embedded.obsm["X_geneformer"] == whole.obsm["X_geneformer"]
    ).all()
    assert backed.obs["type_predicted"].tolist() == whole.obs["type_predicted"].tolist()
    assert gf.embed_genes(backed, copy=True).varm["X_geneformer"].shape == (40, 64)
    backed.file.close()


def test_the_number_of_threads_changes_no_embedding(gf):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(gf.embed(cells(), copy=True).obsm["X_geneformer"])
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(*found, atol=1e-5)


def test_paths_with_spaces_and_letters_of_any_script(gf, tmp_path):
    folder = tmp_path / "größe 長さ" / ("x" * 100)
    gf.save_pretrained(folder / "modell 1")
    gf.tokenizer(cells()).save(folder / "zellen 1.dataset")
    again = Geneformer.from_pretrained(folder / "modell 1", device="cpu")
    expected = gf.embed(gf.tokenizer(cells()))
    assert (again.embed(folder / "zellen 1.dataset") == expected).all() and len(Corpus(folder)) == 24


def test_locale_and_time_zone_change_no_token(gf, saved):
    "Whatever the decimal comma, the letters and the clock of the machine."
    code = (
        "import sys, hashlib, locale; from scellfm.geneformer import RankTokenizer\n"
        "try: locale.setlocale(locale.LC_ALL, '')\nexcept locale.Error: pass\n"
        "tok = RankTokenizer.from_pretrained(sys.argv[1] + '/model'); cells = tok(sys.argv[1] + '/cells.h5ad')\n"
        "print(hashlib.sha256(cells.tokens).hexdigest())"
    )
    cells().write_h5ad(saved / "cells.h5ad")
    seen = set()
    for language, zone in (("C", "UTC"), ("de_DE.UTF-8", "Asia/Kathmandu")):
        env = os.environ | {"LANG": language, "LC_ALL": language, "TZ": zone}
        seen.add(
            subprocess.run(
                [sys.executable, "-W", "ignore", "-c", code, str(saved)],
                capture_output=True,
                text=True,
                env=env,
                check=True,
            ).stdout
        )
    assert len(seen) == 1
