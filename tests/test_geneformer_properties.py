"""What must hold of rank value encoding whatever the cells are, searched for counter-examples by hypothesis."""

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from scellfm.geneformer import RankTokenizer
from scellfm.geneformer.tokenizer.medians import exact_medians
from scellfm.geneformer.tokenizer.ranking import encode

pytestmark = pytest.mark.filterwarnings(
    "ignore::scellfm.core.ScellfmWarning"
)  # cells this small have unknown genes and empty rows
DTYPES = [
    *(np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)),
    np.dtype("f4"),
    np.dtype("f8"),
    np.dtype("?"),
]
FORMS = [sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, sparse.csc_array, np.asarray]
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
GENES = [f"ENSG{i:011d}" for i in range(12)]
SOME_MEDIANS = [0.5, 1.0, 1.5, 1.5, 2.0, 0.1, 1 / 3, 3.7]


@st.composite
def data(draw):
    "A small AnnData with few distinct counts (many ties), a tokenizer with few distinct medians; some genes unknown."
    n_cells, n_genes = draw(st.integers(1, 6)), draw(st.integers(2, 12))
    values = draw(
        st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 7, 5000]), min_size=n_cells * n_genes, max_size=n_cells * n_genes)
    )
    x = np.array(values, dtype=np.float32).reshape(n_cells, n_genes)
    x[:, 0] = np.maximum(x[:, 0], 1)
    order = draw(st.permutations(range(12)))
    known = [GENES[i] for i in order[: max(n_genes - 1, 2)]]
    words = ["<pad>", "<mask>"] + (["<cls>", "<eos>"] if draw(st.booleans()) else [])
    medians = {gene: draw(st.sampled_from(SOME_MEDIANS)) for gene in known}
    medians.setdefault(GENES[0], 1.0)
    tokens = {name: i for i, name in enumerate([*words, *medians])}
    tok = RankTokenizer(tokens, medians, max_length=draw(st.integers(4, 14)))
    return anndata.AnnData(sparse.csr_matrix(x), var=pd.DataFrame(index=GENES[:n_genes])), tok


def by_definition(adata, tok):
    "Rank value encoding as one would do it with paper and pencil."
    rows = []
    for row in np.asarray(adata.X.todense()):
        value = {
            tok.token_dictionary[g]: float(x) / tok.medians[g]
            for g, x in zip(adata.var_names, row)
            if x > 0 and g in tok.medians
        }
        genes = sorted(value, key=lambda t: (-value[t], t))[: tok.max_length - 2 * tok.special]
        rows.append([tok.cls, *genes, tok.eos] if tok.special else genes)
    return rows


def rows_of(cells):
    return [cells[i].tolist() for i in range(len(cells))]


@QUICK
@given(data())
def test_numba_numpy_and_the_definition_agree(given_data):
    adata, tok = given_data
    expected = by_definition(adata, tok)
    assert rows_of(tok(adata, engine="numba")) == rows_of(tok(adata, engine="numpy")) == expected


@QUICK
@given(data(), st.randoms())
def test_permuting_cells_permutes_the_output(given_data, random):
    adata, tok = given_data
    order = random.sample(range(adata.n_obs), adata.n_obs)
    assert rows_of(tok(adata[order])) == [rows_of(tok(adata))[i] for i in order]


@QUICK
@given(data(), st.randoms())
def test_permuting_genes_changes_nothing(given_data, random):
    adata, tok = given_data
    order = random.sample(range(adata.n_vars), adata.n_vars)
    assert rows_of(tok(adata[:, order])) == rows_of(tok(adata))


@QUICK
@given(data(), st.integers(1, 3000))
def test_scaling_the_counts_of_a_cell_changes_nothing(given_data, factor):
    adata, tok = given_data
    scaled = anndata.AnnData(adata.X * np.float32(factor), var=adata.var)
    assert rows_of(tok(scaled)) == rows_of(tok(adata))


@QUICK
@given(data(), st.integers(2, 3000))
def test_scaling_changes_nothing_for_fitted_medians_either(given_data, factor):
    adata, _ = given_data
    tok = RankTokenizer.fit(adata)
    assert rows_of(tok(anndata.AnnData(adata.X * np.float32(factor), var=adata.var))) == rows_of(tok(adata))


@QUICK
@given(data(), st.integers(0, 11))
def test_adding_an_unexpressed_gene_changes_nothing(given_data, gene):
    adata, tok = given_data
    empty = sparse.csr_matrix((adata.n_obs, 1), dtype=np.float32)
    more = anndata.AnnData(
        sparse.hstack([empty, adata.X], format="csr"), var=pd.DataFrame(index=[GENES[gene], *adata.var_names])
    )
    assert rows_of(tok(more)) == rows_of(tok(adata))


@QUICK
@given(data(), st.sampled_from(DTYPES), st.sampled_from(FORMS))
def test_the_storage_of_counts_changes_nothing(given_data, dtype, form):
    adata, tok = given_data
    most = {"b": 1, "i": 0, "u": 0, "f": 5000}[dtype.kind] or np.iinfo(dtype).max
    counts = np.minimum(adata.X.toarray(), most)
    stored = anndata.AnnData(form(counts.astype(dtype)), var=adata.var)
    assert rows_of(tok(stored)) == rows_of(tok(anndata.AnnData(sparse.csr_matrix(counts), var=adata.var)))


@QUICK
@given(data(), st.randoms())
def test_unsorted_duplicated_and_zero_entries_equal_their_canonical_form(given_data, random):
    adata, tok = given_data
    entries, indptr = [], [0]
    for row in adata.X.toarray():
        cell = []
        for gene, count in enumerate(row):
            part = random.randint(0, int(count))
            cell += [(gene, part), (gene, count - part)] if random.random() < 0.7 else [(gene, count)]
        random.shuffle(cell)
        entries += cell
        indptr.append(len(entries))
    genes, counts = zip(*entries)
    messy = sparse.csr_matrix((np.array(counts, np.float32), np.array(genes), np.array(indptr)), shape=adata.shape)
    assert rows_of(tok(anndata.AnnData(messy, var=adata.var))) == rows_of(tok(adata))


@QUICK
@given(data(), st.randoms())
def test_splitting_a_gene_into_columns_changes_nothing(given_data, random):
    adata, tok = given_data
    x = adata.X.toarray()
    part = np.array([[random.randint(0, int(count)) for count in row] for row in x], dtype=np.float32)
    versions = [f"{gene.lower()}.{random.randint(1, 30)}" for gene in adata.var_names]
    doubled = anndata.AnnData(
        sparse.csr_matrix(np.hstack([part, x - part])), var=pd.DataFrame({"ensembl_id": [*adata.var_names, *versions]})
    )
    assert rows_of(tok(doubled)) == rows_of(tok(adata))


@QUICK
@given(
    st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=40),
    st.lists(st.sampled_from([1.0, 1.0 + 2**-52, 1.0 + 1e-9, 3.0]), min_size=40, max_size=40),
)
def test_values_that_single_precision_cannot_tell_apart_are_ordered_exactly(counts, medians):
    for row in (np.array(counts), np.full(len(counts), counts[0])):
        tokens = np.random.default_rng(0).permutation(len(row)) + 2
        block, typical = sparse.csr_matrix(row[None]), np.array(medians[: len(row)])
        value = row / typical
        expected = sorted(range(len(row)), key=lambda i: (-value[i], tokens[i]))
        for engine in ("numba", "numpy"):
            assert encode(block, typical, tokens, 100, engine=engine).tokens.tolist() == [tokens[i] for i in expected]


@QUICK
@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(1e-6, 1e9)), min_size=1, max_size=200),
    st.integers(0, 50),
    st.integers(1, 60),
)
def test_medians_in_blocks_equal_numpys(pairs, budget, size):
    genes, values = np.array([g for g, _ in pairs]), np.array([v for _, v in pairs])
    got = exact_medians(
        lambda: [(genes[i : i + size], values[i : i + size]) for i in range(0, len(genes), size)], 5, budget
    )
    for gene in range(5):
        some = values[genes == gene]
        assert np.isnan(got[gene]) if not len(some) else got[gene] == np.median(some)
