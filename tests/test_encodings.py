"""The same cells as several versions of anndata and pandas write them: the same tokens and labels, whoever reads them.

`encodings/` holds twelve cells as anndata 0.7 wrote them (codes beside names), as anndata 0.12 with pandas 2 does (text
as string-array) and as anndata 0.13 with pandas 3 does (nullable-string-array, one column lacks texts), and in
`expected.json` what they are. Each environment of the tests reads all three.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scellfm.data import folds, read
from scellfm.geneformer import Corpus, Geneformer, RankTokenizer, TokenizedCells
from scellfm.scgpt import ScGPT

pytestmark = pytest.mark.filterwarnings("ignore")
FOLDER = Path(__file__).parent / "encodings"
FILES = sorted(FOLDER.glob("*.h5ad"))
EXPECTED = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))


def in_texts(column) -> list[str | None]:
    values = column.to_numpy() if isinstance(column.dtype, np.dtype) else list(column)
    return [None if pd.isna(value) else str(value) for value in values]


def labels_of(obs: pd.DataFrame, columns) -> dict[str, list]:
    return {name: in_texts(obs[name]) for name in columns}


def columns_of(path: Path) -> list[str]:
    "The columns that a file has, of those that are expected."
    return [name for name in EXPECTED["labels"] if name in read(path).obs]


def tokens_of(cells) -> list[list[int]]:
    return [np.asarray(cells[i]).tolist() for i in range(len(cells))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_tokens_and_labels_are_the_same_in_memory_by_path_and_from_a_saved_data_set(tmp_path, path):
    columns = columns_of(path)
    wanted = {name: EXPECTED["labels"][name] for name in columns}
    assert {"cell_type", "donor", "site", "dose"} <= set(columns)
    tok = RankTokenizer.fit(path)
    assert {gene: int(tok.token_dictionary[gene]) for gene in EXPECTED["vocabulary"]} == EXPECTED["vocabulary"]
    np.testing.assert_array_equal([tok.medians[gene] for gene in EXPECTED["medians"]], [*EXPECTED["medians"].values()])
    tok(read(path), columns=columns).save(tmp_path / "memory")
    tok.tokenize_files(path, tmp_path / "path", columns=columns)
    found = [tok(read(path), columns=columns), tok(path, columns=columns)]
    found += [door(tmp_path / name) for name in ("memory", "path") for door in (TokenizedCells.load, Corpus)]
    for cells in found:
        assert tokens_of(cells) == EXPECTED["tokens"]
        assert list(cells.obs.index) == EXPECTED["cells"]
        assert labels_of(cells.obs, columns) == wanted


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_folds_and_classes_are_the_same(path):
    adata = read(path)
    parts = [np.asarray(fold.test).tolist() for fold in folds(adata, by="donor", k=3, seed=0).folds()]
    assert parts == EXPECTED["folds"]
    gf = Geneformer.from_config("tiny", RankTokenizer.fit(path), device="cpu")
    cells = gf.tokenizer(path, columns=["cell_type", "donor", "dose"])
    for label in ("cell_type", "dose"):
        wanted = sorted({*EXPECTED["labels"][label]})
        for given in (adata, path, cells):
            split = folds(adata, by=None, k=2, seed=0)
            found = gf.finetune(given, label, split=split, epochs=1, n_boot=0)
            assert [str(name) for name in found.classes] == wanted


def test_both_wings_read_the_same_numbers_from_each_file():
    genes = [f"ENSG{i:011d}" for i in range(30)]
    gpt = ScGPT.from_config("tiny", genes, device="cpu")
    for path in FILES[1:]:
        one, two = gpt.embed(FILES[0]), gpt.embed(path)
        np.testing.assert_array_equal(one.obsm["X_scGPT"], two.obsm["X_scGPT"])
        assert list(one.obs_names) == list(two.obs_names) == EXPECTED["cells"]
