"""Perturb-seq data: GEARS's preparation on its goldens, one name per perturbation, and what is refused."""

import json
import pickle
import tracemalloc

import anndata
import numpy as np
import pandas as pd
import pytest
from conftest import golden, real_data
from scipy import sparse, stats

from scellfm.core import AssetError, DataError, OptionError, ScellfmWarning
from scellfm.data import read
from scellfm.scgenept import PerturbationData

DATA = golden("scgenept") / "data"
SETTINGS = json.loads((golden("scgenept") / "cfg.json").read_text())
UNS = {
    "non_zeros_gene_idx": "non_zero",
    "non_dropout_gene_idx": "non_dropout",
    "top_non_zero_de_20": "top20_non_zero",
    "top_non_dropout_de_20": "top20_non_dropout",
}


@pytest.fixture(scope="module")
def original():
    return PerturbationData(read(DATA / "input.h5ad"))


@pytest.fixture(scope="module")
def names():
    "{GEARS's name of a condition: its label and cell type}."
    obs = json.loads((DATA / "obs.json").read_text())
    rows = zip(obs["condition_name"], obs["condition"], obs["cell_type"])
    return {name: {"condition": label, "cell_type": kind} for name, label, kind in rows if label != "ctrl"}


def small(labels, n_genes=6, seed=0, **kwargs):
    "Cells of the given labels with random log values."
    draw = np.random.default_rng(seed)
    values = sparse.csr_matrix(np.log1p(draw.poisson(1.5, (len(labels), n_genes)) * 0.7).astype(np.float32))
    obs = pd.DataFrame({"condition": labels}, index=[f"c{i}" for i in range(len(labels))])
    return anndata.AnnData(values, obs, pd.DataFrame(index=list("ABCDEFGHIJ")[:n_genes]), **kwargs)


LABELS = ["ctrl"] * 6 + ["A+ctrl"] * 4 + ["ctrl+A"] * 3 + ["A+B"] * 4 + ["B+ctrl"] * 4


def test_scores_of_genes_equal_the_original(original, names):
    "The original rounds inside (float32); where that shows, ours is the number of float64."
    tables, obs = json.loads((DATA / "de_scores.json").read_text()), original.adata.obs
    labels, types = obs["label"].astype(str).to_numpy(), original.cell_types
    for name, which in names.items():
        wanted = pd.Series(tables[name]["scores"], index=tables[name]["names"])
        found = pd.Series(original.scores(**which, published=True), index=original.adata.var["gene_id"])[wanted.index]
        assert np.allclose(found, wanted, rtol=1e-4, atol=1e-6)
        rounded = ~np.isclose(found, wanted, rtol=1e-5, atol=1e-6)
        if rounded.any():
            here = np.ones(len(obs), bool) if types is None else types == which["cell_type"]
            rows = [np.flatnonzero(here & (labels == label)) for label in (which["condition"], "ctrl")]
            columns = pd.Index(original.adata.var["gene_id"]).get_indexer(wanted.index[rounded])
            first, second = (original.adata.X[part][:, columns].toarray().astype(np.float64) for part in rows)
            exact = stats.ttest_ind(first, second, equal_var=False).statistic
            assert np.allclose(found[rounded], exact, rtol=1e-9)


def test_ranked_genes_and_their_sets_equal_the_original(original, names):
    tables = json.loads((DATA / "de.json").read_text())
    ids = original.adata.var["gene_id"].to_numpy()
    for name, which in names.items():
        score = np.abs(original.scores(**which, published=True))
        ranking, expected = original.de_genes(**which, published=True), tables["rank_genes_groups_cov_all"][name]
        positions = pd.Index(ids).get_indexer(expected)
        assert sorted(positions) == sorted(ranking)
        moved = ids[ranking] != np.array(expected)  # only genes of equal |score| may stand in another order
        assert np.allclose(score[ranking[moved]], score[positions[moved]], rtol=1e-6)
        sets = original.gene_sets(**which, published=True)
        assert ids[sets["top20"]].tolist() == expected[:20]
        for key, wanted in UNS.items():
            found = ids[sets[wanted]].tolist() if key.startswith("top") else sets[wanted].tolist()
            assert found == list(tables[key][name])


def test_controls_are_paired_as_the_original_draws_them(original):
    graphs = np.load(DATA / "cell_graphs.npz")
    partner, controls = original.pairs(SETTINGS["npseed"], original=True), original.controls
    for label in json.loads((DATA / "cell_graphs_order.json").read_text()):
        if label == "ctrl":
            continue
        rows = original.rows(label, published=True)
        assert np.array_equal(partner[rows], controls[graphs[f"{label}/ctrl_row"]])
        assert np.array_equal(original.adata.X[partner[rows]].toarray(), graphs[f"{label}/x"].reshape(len(rows), -1))
        flagged = np.flatnonzero(graphs[f"{label}/pert_flags"].reshape(-1)[: original.adata.n_vars])
        assert np.array_equal(flagged, original.flags(label))
        assert (
            sorted(original.de_genes(label, published=True)[:20]) == graphs[f"{label}/de_idx"].reshape(-1)[:20].tolist()
        )


def test_the_split_of_the_data_equals_the_original(original):
    expected = json.loads((DATA / "split.json").read_text())
    split = original.split("simulation", seed=expected["seed"])
    assert split.train == expected["set2conditions"]["train"] and split.test == expected["set2conditions"]["test"]
    assert split.subgroups == expected["subgroup"]["test_subgroup"]
    rows = original.split_rows(split, "test")
    assert original.adata.obs["label"].iloc[rows].unique().tolist() == split.test


def test_the_folder_of_gears_is_written_and_read(original, tmp_path):
    original.save(tmp_path / "golden")
    written = read(tmp_path / "golden" / "perturb_processed.h5ad")
    obs = json.loads((DATA / "obs.json").read_text())
    for column in ("condition", "dose_val", "condition_name"):
        assert written.obs[column].astype(str).tolist() == obs[column]
    assert written.obs["control"].astype(str).tolist() == list(map(str, obs["control"]))
    tables = json.loads((DATA / "de.json").read_text())
    for key in UNS:
        assert {name: list(found) for name, found in written.uns[key].items()} == {
            k: list(v) for k, v in tables[key].items()
        }
    again = PerturbationData.load("golden", root=tmp_path)
    assert again.labels == original.labels and (again.adata.X != original.adata.X).nnz == 0
    assert list(again.genes) == list(original.genes)


def test_the_pickle_beside_the_cells_is_never_opened(original, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    original.save(tmp_path / "golden")
    (tmp_path / "golden" / "data_pyg").mkdir()
    (tmp_path / "golden" / "data_pyg" / "cell_graphs.pkl").write_bytes(pickle.dumps(Trap()))
    PerturbationData.load(tmp_path / "golden")
    assert not (tmp_path / "opened").exists()


def test_one_perturbation_however_it_is_written():
    written = ["control"] * 6 + ["A"] * 4 + ["ctrl + A"] * 3 + ["B+A"] * 4 + ["B"] * 4
    data, other = PerturbationData(small(LABELS)), PerturbationData(small(written))
    assert data.conditions == other.conditions == ["A", "A+B", "B"]
    pd.testing.assert_frame_equal(data.means(), other.means())
    for name in ("A", "A+ctrl", "ctrl+A", "B+A"):
        assert np.array_equal(data.rows(name), other.rows(name))
        assert np.array_equal(data.de_genes(name), other.de_genes(name))
    assert len(data.rows("ctrl+A", published=True)) == 3 and len(data.rows("A")) == 7
    assert data.summary()["perturbations under two or more labels"] == 1


def test_a_pooled_perturbation_is_that_of_its_cells():
    adata = small(LABELS)
    pooled = PerturbationData(adata)
    adata.obs["condition"] = ["A+ctrl" if label == "ctrl+A" else label for label in LABELS]
    assert np.allclose(PerturbationData(adata).scores("A"), pooled.scores("A"))


def test_the_order_of_cells_changes_nothing():
    adata, order = small(LABELS), np.random.default_rng(1).permutation(len(LABELS))
    first, second = PerturbationData(adata), PerturbationData(adata[order])
    for name in first.conditions:
        assert np.allclose(first.scores(name), second.scores(name))
    assert np.array_equal(adata.obs_names[first.pairs(3)][order], adata[order].obs_names[second.pairs(3)])


def test_what_is_handed_in_is_not_changed_and_not_copied():
    adata = small(LABELS)
    before = adata.copy()
    data = PerturbationData(adata)
    data.means(), data.gene_sets("A"), data.pairs()
    assert np.shares_memory(data.adata.X.data, adata.X.data)
    assert (adata.X != before.X).nnz == 0 and adata.obs.equals(before.obs) and adata.var.equals(before.var)


@pytest.mark.parametrize("make", [sparse.csc_matrix, sparse.coo_matrix, lambda m: m.toarray()])
def test_every_storage_gives_the_same(make):
    adata = small(LABELS)
    other = anndata.AnnData(make(adata.X) if make is not sparse.coo_matrix else adata.X.tocsc(), adata.obs, adata.var)
    assert np.allclose(PerturbationData(adata).scores("A"), PerturbationData(other).scores("A"))
    assert sparse.isspmatrix_csr(PerturbationData(other).adata.X) or PerturbationData(other).adata.X.format == "csr"


def test_cell_types_are_compared_with_their_own_controls():
    adata = small(LABELS * 2)
    adata.obs["cell_type"] = ["x"] * len(LABELS) + ["y"] * len(LABELS)
    data = PerturbationData(adata)
    alone = PerturbationData(adata[adata.obs["cell_type"] == "y"])
    assert np.allclose(data.scores("A", cell_type="y"), alone.scores("A"))
    first = PerturbationData(adata[adata.obs["cell_type"] == "x"])
    assert np.allclose(data.scores("A"), first.scores("A"))


def test_a_column_of_cell_types_that_is_named_must_be_there():
    with pytest.raises(DataError, match="celltype"):
        PerturbationData(small(LABELS), cell_type="celltype")


def test_perturbed_genes_of_raw_are_kept_among_the_variable_ones():
    draw = np.random.default_rng(0)
    genes = [f"g{i}" for i in range(60)]
    values = sparse.csr_matrix(draw.poisson(np.r_[np.full(59, 3.0), 0.05], (50, 60)).astype(np.float32))
    obs = pd.DataFrame({"condition": ["ctrl"] * 30 + ["g59+ctrl"] * 20}, index=[f"c{i}" for i in range(50)])
    adata = anndata.AnnData(values, obs, pd.DataFrame(index=genes))
    adata.raw = adata.copy()
    data = PerturbationData(adata[:, :40].copy(), layer="raw", normalize=True, n_variable=10)
    assert "g59" in data.genes and not data.unmeasured


@pytest.mark.filterwarnings("ignore::scellfm.core.ScellfmWarning")
def test_an_unmeasured_perturbed_gene_has_an_input_position_and_is_counted():
    adata = small([*LABELS, "Z+ctrl", "Z+ctrl", "A+Z", "A+Z"])
    data = PerturbationData(adata)
    assert data.unmeasured == ["Z"] and "Z" not in data.genes and data.input_genes[-1] == "Z"
    assert data.flags("Z").tolist() == [6] and data.flags("Z+A").tolist() == [0, 6]
    assert data.summary()["perturbed genes not measured"] == 1
    with pytest.raises(DataError, match="cannot represent"):
        PerturbationData(adata, original=True)


def test_an_unmeasured_gene_is_told_with_what_it_may_be():
    with pytest.warns(ScellfmWarning, match="'a' may be 'A'"):
        PerturbationData(small([*LABELS, "a", "a"]))


def test_no_control_cell_is_refused():
    with pytest.raises(DataError, match="no cell is a control"):
        PerturbationData(small(["A", "A", "B", "B"]))
    with pytest.raises(DataError, match="Perhaps control='non-targeting'"):
        PerturbationData(small(["A", "A", "non-targeting", "B"]))


def test_a_second_word_for_the_control_is_refused():
    with pytest.raises(DataError, match="second control"):
        PerturbationData(small(["A", "A", "NT", "NT", "control"]), control="NT")
    assert len(PerturbationData(small(["A", "A", "NT", "control"]), control=["NT", "control"]).controls) == 2


def test_a_condition_of_one_cell_is_named_and_has_no_ranking():
    with pytest.warns(ScellfmWarning, match="'C' have one cell each"):
        data = PerturbationData(small([*LABELS, "C+ctrl"]))
    assert data.de_genes("C").size == 0 and data.gene_sets("C")["top20"].size == 0
    assert np.isfinite(data.means().loc["C"]).all() and data.summary()["perturbations of one cell"] == 1


def test_a_missing_label_is_refused():
    with pytest.raises(DataError, match="missing"):
        PerturbationData(small([*LABELS[:-1], None]))


def test_a_missing_column_is_refused():
    with pytest.raises(DataError, match="Did you mean 'condition'"):
        PerturbationData(small(LABELS), condition="conditions")


def test_an_unknown_gene_is_refused_with_the_nearest_name():
    data = PerturbationData(small(LABELS))
    for ask in (data.rows, data.flags, data.de_genes):
        with pytest.raises(DataError, match="Q"):
            ask("Q+ctrl")
    with pytest.raises(DataError, match="empty part"):
        PerturbationData(small([*LABELS, "A+", "A+"]))


def test_repeated_genes_are_refused_as_logs_and_summed_as_counts():
    adata = small(LABELS)
    adata.var_names = list("ABBDEF")
    with pytest.raises(DataError, match="'B' occurs twice"):
        PerturbationData(adata)
    adata.layers["counts"] = adata.X.copy()
    adata.layers["counts"].data = np.ceil(adata.layers["counts"].data)
    with pytest.warns(ScellfmWarning, match="summed"):
        data = PerturbationData(adata, layer="counts", normalize=True)
    assert list(data.genes) == list("ABDEF")


def test_counts_for_logs_and_logs_for_counts_are_refused():
    adata = small(LABELS)
    with pytest.raises(DataError, match="not integers"):
        PerturbationData(adata, normalize=True)
    adata.X.data = np.ceil(adata.X.data) * 2
    with pytest.raises(DataError, match="normalize=True"):
        PerturbationData(adata)


@pytest.mark.parametrize(
    "change, message",
    [(lambda x: -x, "negative"), (lambda x: x * 100, "too large for a logarithm"), (lambda x: x * np.nan, "NaN")],
)
def test_values_that_are_no_logs_are_refused(change, message):
    adata = small(LABELS)
    adata.X.data = change(adata.X.data)
    with pytest.raises(DataError, match=message):
        PerturbationData(adata)


def test_counts_are_normalised_as_scanpy_does():
    import scanpy

    adata = small(LABELS)
    adata.X.data = np.ceil(adata.X.data) * 2
    data = PerturbationData(adata, normalize=True)
    scanpy.pp.normalize_total(adata)
    scanpy.pp.log1p(adata)
    assert np.allclose(data.adata.X.toarray(), adata.X.toarray(), rtol=1e-6)


def test_variable_genes_are_kept_with_the_perturbed_ones():
    draw = np.random.default_rng(0)
    labels = ["ctrl"] * 30 + ["g0+ctrl"] * 10 + ["g1+ctrl"] * 10
    counts = sparse.csr_matrix(draw.poisson(np.linspace(0.1, 5, 100), (50, 100)).astype(np.float32))
    obs = pd.DataFrame({"condition": labels}, index=[f"c{i}" for i in range(50)])
    adata = anndata.AnnData(counts, obs, pd.DataFrame(index=[f"g{i}" for i in range(100)]))
    data = PerturbationData(adata, normalize=True, n_variable=30)
    assert {"g0", "g1"} <= set(data.genes) and 30 <= len(data.genes) < 60 and not data.unmeasured


def test_a_split_of_other_data_is_refused():
    data = PerturbationData(small(LABELS))
    other = PerturbationData(small([*LABELS, "C+ctrl", "C+ctrl"]))
    split = other.split("no_split")
    with pytest.raises(DataError, match="other data"):
        data.split_rows(split, "test")
    with pytest.raises(OptionError, match="data.split"):
        data.check_split(["A"])


def test_own_splits_need_their_table():
    data = PerturbationData(small(LABELS))
    for kind, needed in (("gene_family", "families"), ("go_similarity", "annotations"), ("custom", "sets")):
        with pytest.raises(OptionError, match=needed):
            data.split(kind)
    with pytest.raises(OptionError, match="Did you mean 'simulation'"):
        data.split("simulaton")


def test_an_unknown_data_set_is_answered_with_the_published_names(tmp_path):
    with pytest.raises(AssetError, match="Published sets are 'norman'"):
        PerturbationData.load("normann", root=tmp_path)


def test_papalexi_from_counts():
    adata = read(real_data("papalexi21") / "papalexi21_lowmoi.h5ad")
    with pytest.warns(ScellfmWarning, match="16 of 25 perturbed genes are not measured"):
        data = PerturbationData(adata, condition="top_target", control="non-targeting", normalize=True)
    summary = data.summary()
    assert summary["cells"] == 20729 and summary["perturbations"] == 25 and summary["control cells"] == 2386
    partner = data.pairs(by="bio_rep")
    replicate = data.adata.obs["bio_rep"].astype(str).to_numpy()
    assert (replicate == replicate[partner]).all()


def test_norman_as_it_is_given():
    adata = read(real_data("norman19") / "norman19_3375x500.h5ad")
    with pytest.warns(ScellfmWarning, match="30 of 31 perturbed genes are not measured"):
        data = PerturbationData(adata)
    assert data.summary()["of one gene"] == 18 and data.summary()["of two genes"] == 15
    split = data.split("simulation", seed=1)
    assert sorted(split.train + split.valid + split.test) == sorted(data.labels)


def test_memory_follows_the_stored_values_and_not_cells_by_genes():
    n_cells, n_genes, share = 3000, 8000, 0.004
    draw = np.random.default_rng(0)
    values = sparse.random(n_cells, n_genes, share, format="csr", dtype=np.float32, random_state=0)
    labels = draw.choice(["ctrl", "A+ctrl", "B+ctrl", "A+B"], n_cells)
    obs = pd.DataFrame({"condition": labels}, index=[f"c{i}" for i in range(n_cells)])
    adata = anndata.AnnData(values, obs, pd.DataFrame(index=["A", "B", *(f"g{i}" for i in range(n_genes - 2))]))
    tracemalloc.start()
    data = PerturbationData(adata)
    for name in data.conditions:
        data.gene_sets(name)
    data.pairs()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    dense = 4 * n_cells * n_genes
    assert peak < dense / 6 and peak < 100 * values.nnz


def test_data_without_a_perturbation_are_refused():
    with pytest.raises(DataError, match="no cell is perturbed"):
        PerturbationData(small(["ctrl"] * 4))


def test_the_users_word_for_the_control_is_understood():
    data = PerturbationData(small(["NT"] * 4 + ["A"] * 3), control="NT")
    assert np.array_equal(data.rows("NT"), data.controls) and data.rows("A+NT").size == 3
    assert data.flags("NT").size == 0 and data.perturbed_genes("NT") == []


def test_columns_of_the_user_stay():
    adata = small(LABELS)
    adata.obs["label"] = ["T cell"] * len(LABELS)
    data = PerturbationData(adata, cell_type="label")
    assert set(data.cell_types) == {"T cell"} and set(adata.obs["label"]) == {"T cell"}


def test_lists_that_a_file_holds_are_compared_with_the_computed_ones(original, names, tmp_path):
    assert original.stored_agreement().empty
    original.save(tmp_path / "golden")
    again = PerturbationData.load("golden", root=tmp_path)
    found = again.stored_agreement()
    assert len(found) == len(names) and (found["stored"] == 20).all() and (found["computed too"] == 20).all()
    first = next(iter(again.stored))
    again.stored[first] = again.stored[first][:-2] + ["unknown", "other"]
    assert again.stored_agreement().loc[first, "computed too"] == 18


def test_a_file_that_stays_on_the_disk_gives_the_same(tmp_path):
    adata = small(LABELS)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    assert np.allclose(PerturbationData(backed).scores("A"), PerturbationData(adata).scores("A"))
    backed.file.close()
