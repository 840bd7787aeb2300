"""Genes under the names that users bring: numbers, mouse genes, missing ids, genes in two columns, raw beside X."""

import json
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from conftest import real_data
from scipy import sparse

from scellfm.core import DataError, OptionError, ScellfmWarning
from scellfm.data.genes import MatchOptions, match_genes

HUMAN = [f"ENSG{i:011d}" for i in range(40)]
SYMBOLS = [f"GENE{i}" for i in range(40)]
MOUSE = [f"Gene{i}" for i in range(40)]
OFFICIAL = {symbol: gene for symbol, gene in zip(SYMBOLS, HUMAN)}  # like the official V2 mapping: capitals


def test_mouse_genes_are_refused_where_the_mapping_knows_their_capitals():
    with pytest.raises(DataError, match=r"another species: mouse or rat symbol.*match=\{'orthologs'"):
        match_genes(MOUSE, HUMAN, mapping=OFFICIAL)
    with pytest.raises(DataError, match="upper"):
        match_genes(MOUSE, HUMAN, mapping=OFFICIAL, symbols=OFFICIAL)


def test_mouse_genes_are_refused_by_the_official_dictionaries():
    folder = real_data("geneformer-v2")
    tokens = json.loads((folder / "token_dictionary_gc104M.json").read_text())
    mapping = json.loads((folder / "ensembl_mapping_dict_gc104M.json").read_text())
    names = json.loads((folder / "gene_name_id_dict_gc104M.json").read_text())
    mouse = [name.capitalize() for name in list(names)[:9000] if name.isalnum()]
    with pytest.raises(DataError, match="mouse"):
        match_genes(mouse, tokens, mapping=mapping, symbols=names)
    with pytest.warns(ScellfmWarning, match="lower case"):
        lower = match_genes([name.lower() for name in mouse], tokens, mapping=mapping, symbols=names)
    assert lower.report["n_matched"] > 0.5 * len(mouse)


TABLES = {
    "a dictionary": lambda folder: dict(zip(MOUSE, SYMBOLS)),
    "ids for symbols": lambda folder: dict(zip(MOUSE, HUMAN)),
    "lists": lambda folder: {mouse: [human] for mouse, human in zip(MOUSE, HUMAN)},
    "pairs": lambda folder: list(zip(MOUSE, HUMAN)),
    "a table": lambda folder: pd.DataFrame({"human": HUMAN, "id": [f"ENSMUSG{i:011d}" for i in range(40)], "m": MOUSE}),
    "a file": lambda folder: written(folder / "mouse.tsv", "\t"),
    "a file with commas": lambda folder: written(folder / "mouse.csv", ","),
}


def written(path, sep):
    pd.DataFrame({"human": HUMAN, "mouse": MOUSE}).to_csv(path, sep=sep, index=False)
    return path


@pytest.mark.parametrize("form", TABLES)
def test_a_table_of_orthologs_in_any_form_lets_mouse_genes_in(tmp_path, form):
    table = TABLES[form](tmp_path)
    for given in ({"orthologs": table}, MatchOptions(orthologs=table)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = match_genes(MOUSE, HUMAN, mapping=OFFICIAL, match=given)
        assert found.index.tolist() == list(range(40)) and found.report["routes"]["through an ortholog"] == 40
    if not isinstance(table, dict):
        assert match_genes(MOUSE, HUMAN, mapping=OFFICIAL, match=table).index.tolist() == list(range(40))


def test_genes_without_or_with_several_orthologs_are_left_out_and_counted():
    table = {mouse: human for mouse, human in zip(MOUSE[2:], HUMAN[2:])} | {MOUSE[1]: [HUMAN[1], HUMAN[5]]}
    with pytest.warns(ScellfmWarning, match="38 of 40.*1 have none.*'Gene0'.*1 have several.*'Gene1'"):
        found = match_genes(MOUSE, HUMAN, mapping=OFFICIAL, match={"orthologs": table}, counts=np.arange(40))
    assert found.index[:3].tolist() == [-1, -1, 2], "GENE0 is known to the model and is not the gene Gene0"
    assert found.report["orthologs"] | {"without": 0, "several": 0} == {
        "n_without": 1,
        "without": 0,
        "n_several": 1,
        "several": 0,
    }
    assert "1" in found._repr_html_() and "ortholog" in found._repr_html_()


def test_two_mouse_genes_of_one_human_gene_are_one_gene():
    table = dict(zip(MOUSE, HUMAN)) | {MOUSE[7]: HUMAN[6]}
    found = match_genes(MOUSE, HUMAN, match={"orthologs": table})
    assert found.index[6] == found.index[7] == 6 and found.report["n_duplicated"] == 1


def test_a_mapping_of_orthologs_leaves_out_the_mouse_genes_that_it_lacks():
    found = match_genes(MOUSE, HUMAN, symbols=OFFICIAL, match=dict(zip(MOUSE[:30], HUMAN)))
    assert found.index.tolist() == [*range(30), *[-1] * 10]


def test_a_table_of_other_genes_is_refused_with_what_it_holds():
    with pytest.raises(DataError, match="none of these genes.*'a'.*'Gene0'"):
        match_genes(MOUSE, HUMAN, match={"orthologs": {"a": "b"}})
    with pytest.raises(OptionError, match="'ortholog'.*Did you mean 'orthologs'"):
        match_genes(MOUSE, HUMAN, match={"ortholog": {}})


def described(ids, names):
    var = pd.DataFrame({"ensembl_id": ids}, index=names)
    return anndata.AnnData(np.ones((2, len(names)), np.float32), var=var)


def test_a_gene_without_an_id_is_found_by_its_symbol_and_counted():
    ids = [*HUMAN[:20], *[None] * 20]
    found = match_genes(described(ids, SYMBOLS), HUMAN, symbols=OFFICIAL)
    assert found.index.tolist() == list(range(40)) and found.report["n_by_symbol"] == 20
    assert "by the name of the column" in found._repr_html_()
    assert (match_genes(described(ids, [str(i) for i in range(40)]), HUMAN, symbols=OFFICIAL).index[20:] == -1).all()


def test_a_number_is_no_name_unless_the_user_names_the_column():
    adata = described(HUMAN, [str(i) for i in range(40)])
    adata.var["number"] = [f"{i}" for i in range(40)]
    numbers = {str(i): gene for i, gene in enumerate(HUMAN[::-1])}
    del adata.var["ensembl_id"]
    with pytest.raises(DataError, match="integers"):
        match_genes(adata, HUMAN, symbols=numbers)
    found = match_genes(adata, HUMAN, match={"column": "number", "symbols": numbers})
    assert found.index.tolist() == list(range(40))[::-1]


# ---- counts and the names of their columns


def with_raw(seed=0, n=60, shuffled=False):
    "The usual object: all genes in raw, the variable ones in X; or the same genes in another order."
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {
            "condition": np.tile(["stim", "ctrl"], n // 2),
            "donor": np.repeat([f"d{i}" for i in range(6)], n // 6),
            "cell_type": np.tile(["T", "T", "B", "B"], n // 4),
        },
        index=[f"c{i}" for i in range(n)],
    )
    counts = rng.poisson(2.0, (n, 40)).astype(np.float32)
    counts[obs["condition"] == "ctrl", 3] *= 4
    whole = anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=HUMAN))
    order = rng.permutation(40) if shuffled else np.arange(3, 25)
    adata = whole[:, order].copy()
    adata.raw = whole
    return whole, adata


@pytest.fixture(scope="module")
def geneformer():
    from scellfm.geneformer import Geneformer, RankTokenizer

    return Geneformer.from_config("tiny", RankTokenizer.fit(with_raw()[0]), device="cpu")


@pytest.mark.parametrize("shuffled", [False, True])
def test_fold_changes_of_raw_are_those_of_the_genes_of_raw(geneformer, shuffled):
    whole, adata = with_raw(shuffled=shuffled)
    how = dict(genes=HUMAN[:6], combine="each", state="condition", start="stim", goal="ctrl")
    tables = []
    for cells, layer in ((whole, None), (adata, "raw")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tables.append(geneformer.perturb(cells, layer=layer, **how).genes.set_index("gene")["log2fc"])
    assert tables[0].notna().all() and tables[0][HUMAN[3]] > 1
    pd.testing.assert_series_equal(*tables)


def test_fold_changes_take_the_sum_of_the_columns_of_a_gene(geneformer):
    from scellfm.statistics import log2_fold_change

    whole, _ = with_raw()
    halves = whole.X.toarray()
    first = np.floor(halves / 3)
    var = pd.DataFrame({"ensembl_id": [*HUMAN, *HUMAN]}, index=[f"column{i}" for i in range(80)])
    twice = anndata.AnnData(np.hstack([first, halves - first]), obs=whole.obs, var=var)
    expected = log2_fold_change(whole, "condition", "stim", "ctrl")
    np.testing.assert_allclose(log2_fold_change(twice, "condition", "stim", "ctrl")[HUMAN], expected, rtol=1e-5)
    how = dict(genes=HUMAN[:6], combine="each", state="condition", start="stim", goal="ctrl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, two = (geneformer.perturb(cells, **how).genes["log2fc"] for cells in (whole, twice))
    np.testing.assert_allclose(one, two, rtol=1e-5)


@pytest.mark.parametrize("shuffled", [False, True])
def test_scgpt_learns_from_raw_under_the_names_of_raw(shuffled):
    from scellfm.data import hold_out
    from scellfm.scgpt import ScGPT

    whole, adata = with_raw(shuffled=shuffled)
    gpt = ScGPT.from_config("tiny", HUMAN, device="cpu")
    split = hold_out(whole, by="donor", fractions=(0.5, 0.0, 0.5))
    results = []
    for cells, layer in ((whole, None), (adata, "raw")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = gpt.finetune(cells, "cell_type", split=split, epochs=1, layer=layer, n_boot=2)
            further = gpt.continue_pretraining(cells, epochs=1, layer=layer)
        results.append(
            (made.probabilities(cells, layer=layer).to_numpy(), further.embed(cells, layer=layer, copy=True))
        )
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1].obsm["X_scGPT"], results[1][1].obsm["X_scGPT"])


def test_genes_of_one_matrix_are_the_same_in_memory_and_on_disk(tmp_path):
    from scellfm.data.reading import genes_of

    _, adata = with_raw(shuffled=True)
    adata.layers["counts"] = adata.X.copy()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    for layer, names in ((None, adata.var_names), ("counts", adata.var_names), ("raw", adata.raw.var_names)):
        for given in (adata, tmp_path / "cells.h5ad"):
            assert list(genes_of(given, layer).var_names) == list(names)
    for given in (adata, tmp_path / "cells.h5ad"):
        with pytest.raises(DataError, match="there (is|are): .*counts.*raw"):
            genes_of(given, "absent")


# ---- a tokenizer remembers which column named its genes


def census(ids, seed=0):
    "An object as the CELLxGENE census gives it: the index of var is 0, 1, 2, ..."
    counts = np.random.default_rng(seed).poisson(2.0, (6, len(ids))).astype(np.float32)
    var = pd.DataFrame({"feature_id": ids, "feature_name": [f"S{gene[-3:]}" for gene in ids]})
    var.index = var.index.astype(str)
    return anndata.AnnData(counts, obs=pd.DataFrame(index=[f"c{i}" for i in range(6)]), var=var)


def test_a_tokenizer_reads_the_column_that_it_was_fitted_to(tmp_path):
    from scellfm.geneformer import RankTokenizer

    tok = RankTokenizer.fit(census(HUMAN), gene_column="feature_id")
    other = census(HUMAN[::-1], seed=1)
    expected = [tok.token_dictionary[gene] for gene in HUMAN[::-1]]
    tok.save_pretrained(tmp_path / "tok")
    for one in (tok, RankTokenizer.from_pretrained(tmp_path / "tok")):
        assert one.match(other).index.tolist() == expected and "through its symbol" not in {
            route for route, n in one.match(other).report["routes"].items() if n
        }
        assert one.symbol(HUMAN[7]) == "S007", "the index is no name, the column of symbols is one"
        named = other[:, ::-1].copy()
        named.var_names = named.var.pop("feature_id").astype(str)
        assert one.match(named).index.tolist() == expected[::-1]
    del other.var["feature_id"]
    with pytest.raises(DataError, match="integers"):
        tok(other)


def test_a_vocabulary_is_not_fitted_to_numbers():
    from scellfm.geneformer import RankTokenizer

    with pytest.raises(DataError, match="gene_column="):
        RankTokenizer.fit(census(HUMAN))


def test_a_mouse_vocabulary_is_fitted_to_mouse_cells_and_takes_them():
    from scellfm.geneformer import RankTokenizer

    adata = census(HUMAN)
    adata.var_names = MOUSE
    tok = RankTokenizer.fit(adata)
    assert set(tok.medians) == set(MOUSE) and (tok.match(adata).index >= 0).all()


def test_orthologs_reach_the_tokens_and_the_report(tmp_path):
    from scellfm.geneformer import RankTokenizer

    human = census(HUMAN)
    human.var_names = HUMAN
    mouse = human.copy()
    mouse.var_names = MOUSE
    mouse.write_h5ad(tmp_path / "mouse.h5ad")
    tok = RankTokenizer.fit(human)
    with pytest.raises(DataError, match="mouse"):
        tok(mouse)
    expected = tok(human).tokens
    for given in (mouse, tmp_path / "mouse.h5ad"):
        found = tok(given, match={"orthologs": dict(zip(MOUSE, HUMAN))})
        assert (found.tokens == expected).all() and found.report["genes"]["routes"]["through an ortholog"] == 40


# ---- the width of tokens


def test_the_width_of_tokens_follows_the_vocabulary_and_not_the_cells(tmp_path):
    from scellfm.geneformer import RankTokenizer, TokenizedCells

    genes = [f"ENSG{i:011d}" for i in range(66_000)]
    words = {"<pad>": 0, "<mask>": 1} | {gene: i + 2 for i, gene in enumerate(genes)}
    tok = RankTokenizer(words, dict.fromkeys(genes, 1.0))
    for name, chosen in (("a", genes[:40]), ("b", genes[-40:])):
        adata = census(chosen)
        adata.var_names = chosen
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
        assert tok(adata).tokens.dtype == tok(tmp_path / f"{name}.h5ad").tokens.dtype == np.uint32
    (tmp_path / "both").mkdir()
    for name in "ab":
        (tmp_path / f"{name}.h5ad").rename(tmp_path / "both" / f"{name}.h5ad")
    tok.tokenize_files(tmp_path / "both", tmp_path / "out")
    assert TokenizedCells.load(tmp_path / "out").tokens.max() == 66_001
    tok.tokenize_files(tmp_path / "both" / "a.h5ad", tmp_path / "small")
    assert TokenizedCells.load(tmp_path / "small").tokens.dtype == np.uint32


MISSING = {"S3": np.nan, "S4": None, "S5": pd.NA, np.nan: "ENSG00000000001"}


@pytest.mark.parametrize("key", ["mapping", "symbols"])
def test_an_entry_of_a_table_of_names_in_which_one_is_missing_names_nothing(key):
    names = [f"ENSG{i:011d}" for i in range(30)]
    table = {f"S{i}": gene for i, gene in enumerate(names)} | MISSING
    for given in (table, pd.Series(table)):
        found = match_genes([f"S{i}" for i in range(30)], names, match={key: given})
        assert list(np.flatnonzero(found.index < 0)) == [3, 4, 5] and found.report["n_dropped"] == 3
    found = match_genes([f"S{i}" for i in range(30)], names, match={"orthologs": table})
    assert list(np.flatnonzero(found.index < 0)) == [3, 4, 5]


@pytest.mark.parametrize(
    "match, named",
    [
        ({"mapping": [("a", "b")]}, "mapping.*list"),
        ({"symbols": "table.csv"}, "symbols.*str"),
        ({"mapping": {"a": 5}}, "'a': 5"),
        ({"mapping": {"a": ["b", "c"]}}, "must be names"),
        ({"symbols": pd.DataFrame({"a": [1], "b": [2]})}, "several columns"),
        ({"mapping": pd.Series(["b", "c"], index=["a", "a"])}, "repeated names"),
        ({"orthologs": 3}, "orthologs=3"),
        ({"column": ["a"]}, "one column"),
        ({"colum": "feature_name"}, "Did you mean 'column'"),
    ],
)
def test_what_is_no_table_of_names_is_named(match, named):
    with pytest.raises((OptionError, DataError), match=named):
        match_genes(["A", "B"], ["A", "B"], match=match)


def test_of_several_symbols_of_an_id_the_one_that_the_model_knows_is_taken():
    from scellfm.scgpt import ScGPT

    names = [f"ENSG{i:011d}" for i in range(30)]
    adata = anndata.AnnData(np.ones((2, 30), np.float32), var=pd.DataFrame(index=names))
    model = ScGPT.from_config("tiny", [f"S{i}" for i in range(len(names))], device="cpu")
    table = {f"S{i}": name for i, name in enumerate(names)} | {f"old{i}": name for i, name in enumerate(names)}
    assert (model.match(adata, match={"symbols": table}).index >= 0).all()
