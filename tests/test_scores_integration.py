"""Scores of integration: equal to scib's, and silent where there is nothing to tell."""

import importlib.util
import json
import os
import subprocess
import sys
import types

import anndata
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, golden, real_data
from scipy import sparse

from scellfm import DataError, OptionError, ScellfmWarning
from scellfm.scgpt.neighbours import nearest
from scellfm.scores import batches as b
from scellfm.scores.batches import integration
from scellfm.scores.pictures import umap, umaps

NAMES = {
    "nmi": "NMI_cluster/label",
    "ari": "ARI_cluster/label",
    "asw_label": "ASW_label",
    "asw_batch": "ASW_label/batch",
    "pcr": "PCR_batch",
    "graph_connectivity": "graph_conn",
    "avg_bio": "avg_bio",
    "avg_batch": "avg_batch",
}


@pytest.fixture(scope="module")
def original():
    folder = golden("scgpt")
    with np.load(folder / "scib.npz") as arrays:
        arrays = dict(arrays)
    cells = anndata.AnnData(
        arrays["X"].copy(),
        obs=pd.DataFrame(
            {"celltype": arrays["celltype"], "str_batch": arrays["str_batch"]},
            index=[f"cell{i}" for i in range(len(arrays["X"]))],
        ),
    )
    cells.obsm["X_scGPT"] = arrays["X_scGPT"].copy()
    return cells, arrays, json.loads((folder / "scib.json").read_text())["metrics"]


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    label, batch = np.repeat(["B", "T", "NK"], [50, 60, 40]), np.tile(["x", "y"], 75)
    means = (
        np.where(label[:, None] == np.array(["B", "T", "NK"]).repeat(12)[None], 6, 1)
        * np.where(batch == "y", 1.5, 1)[:, None]
    )
    made = anndata.AnnData(
        sparse.csr_matrix(rng.poisson(means).astype(np.float32)),
        obs=pd.DataFrame({"cell_type": label, "batch": batch}, index=[f"cell{i}" for i in range(150)]),
    )
    made.obsm["X_scGPT"] = (np.eye(3)[pd.factorize(label)[0]] * 4 + rng.normal(size=(150, 3))).astype(np.float32)
    return made


# scib


def test_every_score_is_scibs(original):
    cells, _, expected = original
    found = integration(cells, reps=["X_scGPT"], batch="str_batch", label="celltype", baselines=False).table.loc[
        "X_scGPT"
    ]
    assert {name: found[name] for name in NAMES} == pytest.approx(
        {name: expected[scib] for name, scib in NAMES.items()}, abs=2e-6
    )


def test_graph_is_scanpys(original):
    cells, arrays, _ = original
    expected = sparse.csr_matrix((arrays["conn_data"], arrays["conn_indices"], arrays["conn_indptr"]))
    assert abs(b.neighbour_graph(cells.obsm["X_scGPT"]) - expected).max() < 1e-6


def test_distances_are_scanpys(original):
    cells, arrays, _ = original
    values = cells.obsm["X_scGPT"]
    k = int(np.diff(arrays["dist_indptr"])[0])
    expected = sparse.csr_matrix(
        (arrays["dist_data"], arrays["dist_indices"], arrays["dist_indptr"]), (len(values),) * 2
    )
    distances, found = nearest(values, values, k + 1)  # itself first
    for row, (near, who) in enumerate(zip(distances, found)):
        assert who[0] == row and set(who[1:]) == set(expected[row].indices)
        np.testing.assert_allclose(np.sqrt(near[1:]), np.sort(expected[row].data), atol=1e-5)


def test_clusters_are_scibs(original):
    from sklearn.metrics import adjusted_rand_score

    cells, arrays, _ = original
    scores = integration(cells, "X_scGPT", batch="str_batch", label="celltype", baselines=False)
    assert adjusted_rand_score(scores.details["X_scGPT"]["clusters"], arrays["cluster"]) == 1


def test_parts_are_scibs_given_its_clusters_and_graph(original):
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    cells, arrays, expected = original
    graph = sparse.csr_matrix((arrays["conn_data"], arrays["conn_indices"], arrays["conn_indptr"]))
    labels = arrays["celltype"]
    assert b.graph_connectivity(graph, labels) == pytest.approx(expected["graph_conn"], abs=2e-7)
    assert normalized_mutual_info_score(labels, arrays["cluster"]) == pytest.approx(
        expected["NMI_cluster/label"], abs=2e-7
    )
    assert adjusted_rand_score(labels, arrays["cluster"]) == pytest.approx(expected["ARI_cluster/label"], abs=2e-7)
    assert b.asw_label(arrays["X_scGPT"], labels) == pytest.approx(expected["ASW_label"], abs=2e-7)
    assert b.asw_batch(arrays["X_scGPT"], labels, arrays["str_batch"]) == pytest.approx(
        expected["ASW_label/batch"], abs=2e-7
    )
    assert b.pcr(arrays["X"], arrays["X_scGPT"], arrays["str_batch"]) == pytest.approx(expected["PCR_batch"], abs=2e-6)


def test_parts_are_those_of_scib_metrics_too(original):
    theirs = pytest.importorskip(
        "scib_metrics", reason="scib-metrics is not installed: a cross-check with a second package, on JAX"
    )
    cells, arrays, _ = original
    values, labels, batches = arrays["X_scGPT"], arrays["celltype"], arrays["str_batch"]
    found = integration(cells, "X_scGPT", batch="str_batch", label="celltype", baselines=False).table.loc["X_scGPT"]
    assert found["asw_label"] == pytest.approx(theirs.silhouette_label(values, labels), abs=1e-5)
    assert found["asw_batch"] == pytest.approx(theirs.silhouette_batch(values, labels, batches), abs=1e-5)
    assert found["pcr"] == pytest.approx(
        theirs.pcr_comparison(arrays["X"], values, batches, categorical=True), abs=1e-4
    )
    from scib_metrics.nearest_neighbors import NeighborsResults

    # its graphs are directed and its clusters found by other sweeps: the same question, not the same number
    distances, positions = nearest(values, values, 16)
    near = NeighborsResults(positions, np.sqrt(distances))
    assert found["graph_connectivity"] == pytest.approx(theirs.graph_connectivity(near, labels), abs=0.05)
    clustered = theirs.nmi_ari_cluster_labels_leiden(near, labels)
    assert [found["nmi"], found["ari"]] == pytest.approx([clustered["nmi"], clustered["ari"]], abs=0.05)


# properties


def test_renaming_and_reordering_cells_change_nothing(cells):
    first = integration(cells, "X_scGPT", batch="batch", label="cell_type", baselines=False).table
    order = np.random.default_rng(1).permutation(cells.n_obs)
    other = cells[order].copy()
    other.obs["cell_type"] = other.obs["cell_type"].astype(str).map({"B": "zz", "T": "aa", "NK": "mm"})
    second = integration(other, "X_scGPT", batch="batch", label="cell_type", baselines=False).table
    stable = [
        "asw_label",
        "graph_connectivity",
        "asw_batch",
        "pcr",
        "knn_accuracy",
        "avg_batch",
    ]  # Leiden visits cells in their order
    np.testing.assert_allclose(first[stable], second[stable], atol=1e-5)


def test_running_twice_gives_the_same_bits(cells):
    one, other = (integration(cells, "X_scGPT", batch="batch", label="cell_type").table for _ in range(2))
    pd.testing.assert_frame_equal(one, other, check_exact=True)


def test_input_is_not_changed(cells):
    before = cells.copy()
    integration(cells, "X_scGPT", batch="batch", label="cell_type")
    assert cells.obs.equals(before.obs) and list(cells.obsm) == list(before.obsm) and not cells.uns and not cells.obsp
    assert abs(cells.X - before.X).max() == 0


def test_mixing_and_keeping_are_told_apart(cells):
    rng = np.random.default_rng(0)
    split = cells.obsm["X_scGPT"] + np.where(cells.obs["batch"] == "y", 8, 0)[:, None]
    cells.obsm.update({"X_split": split, "X_noise": rng.normal(size=(150, 3))})
    table = integration(
        cells, ["X_scGPT", "X_split", "X_noise"], batch="batch", label="cell_type", baselines=False
    ).table
    assert table["avg_batch"].idxmin() == "X_split" and table["avg_bio"].idxmin() == "X_noise"
    assert table.loc["X_noise", "knn_accuracy"] < 0.6 < 0.9 < table.loc["X_scGPT", "knn_accuracy"]
    assert table.min().min() >= 0 and table.max().max() <= 1


def test_explained_variance_is_that_of_a_regression():
    from sklearn.linear_model import LinearRegression

    rng = np.random.default_rng(0)
    values, batch = rng.normal(size=(60, 5)) * [5, 3, 1, 1, 1], np.repeat(["a", "b", "c"], 20)
    values[:, 1] += np.repeat([0, 2, 4], 20)
    from sklearn.decomposition import PCA

    pca, dummies = PCA(5).fit(values), pd.get_dummies(batch).to_numpy(float)
    shares = [LinearRegression().fit(dummies, part).score(dummies, part) for part in pca.transform(values).T]
    expected = (pca.explained_variance_ * shares).sum() / pca.explained_variance_.sum()
    assert b.explained_by(values, batch) == pytest.approx(expected, abs=1e-12)
    assert b.explained_by(sparse.csr_matrix(values), batch) == pytest.approx(expected, abs=1e-12)


def test_components_of_a_wide_matrix_are_found_without_densifying(monkeypatch):
    rng = np.random.default_rng(0)
    wide, batch = sparse.random(80, 400, 0.2, "csr", random_state=0), rng.choice(["a", "b"], 80)
    dense = b.explained_by(wide.toarray(), batch)
    monkeypatch.setattr(sparse.csr_matrix, "toarray", lambda *_: pytest.fail("densified"))
    assert b.explained_by(sparse.csr_matrix(wide), batch) == pytest.approx(dense, abs=1e-8)


def test_connectivity_counts_the_largest_piece():
    links = [(0, 1), (1, 2), (3, 4), (5, 6)]
    graph = sparse.coo_matrix((np.ones(4), tuple(zip(*links))), (7, 7)).tocsr()
    graph = graph + graph.T
    assert b.graph_connectivity(graph, np.array(["a"] * 5 + ["b"] * 2)) == pytest.approx((3 / 5 + 1) / 2)


def test_labels_of_one_batch_are_passed_over():
    values = np.random.default_rng(0).normal(size=(40, 2))
    label, batch = np.repeat(["a", "b"], 20), np.r_[np.tile(["x", "y"], 10), ["x"] * 20]
    assert b.asw_batch(values, label, batch) == b.asw_batch(values[:20], label[:20], batch[:20])
    assert np.isnan(b.asw_batch(values[20:], label[20:], batch[20:]))


# baselines


def test_pca_stands_beside_the_model(cells):
    found = integration(cells, reps="X_scGPT", batch="batch", label="cell_type")
    assert (
        list(found.table.index)[:2] == ["X_scGPT", "HVG + PCA"]
        and "<table" in found._repr_html_()
        and found.table.notna().all(None)
    )


@pytest.mark.parametrize("turned", [False, True])
def test_harmony_joins_where_it_is_installed(cells, monkeypatch, turned):
    moved = {}

    def run_harmony(parts, obs, key, **_):
        moved["parts"] = parts - pd.DataFrame(parts).groupby(obs[key].to_numpy()).transform("mean").to_numpy()
        return types.SimpleNamespace(Z_corr=moved["parts"].T if turned else moved["parts"])

    fake = types.ModuleType("harmonypy")
    fake.run_harmony, fake.__spec__ = run_harmony, importlib.util.spec_from_loader("harmonypy", None)
    monkeypatch.setitem(sys.modules, "harmonypy", fake)
    assert (b.baseline_embeddings(cells, cells.obs["batch"].to_numpy())["HVG + PCA + Harmony"] == moved["parts"]).all()
    assert list(b.baseline_embeddings(cells, None)) == ["HVG + PCA"]


def test_true_harmony_mixes_batches(cells):
    pytest.importorskip("harmonypy")
    counts = cells.X.toarray()
    counts[(cells.obs["batch"] == "y").to_numpy(), ::3] *= 4
    cells.X = sparse.csr_matrix(counts)
    table = integration(cells, "X_scGPT", batch="batch", label="cell_type").table
    assert table.loc["HVG + PCA + Harmony", "avg_batch"] > table.loc["HVG + PCA", "avg_batch"]


def test_scaled_values_are_no_counts(cells):
    cells.X = sparse.csr_matrix(np.log1p(cells.X.toarray()))
    with pytest.raises(DataError):
        integration(cells, "X_scGPT", batch="batch", label="cell_type")
    assert integration(cells, "X_scGPT", batch="batch", label="cell_type", baselines=False).table.shape == (1, 9)


# nothing to tell


def test_one_batch_gives_no_score_of_mixing(cells):
    cells.obs["batch"] = "x"
    with pytest.warns(ScellfmWarning, match=r"obs\['batch'\] 'x'.*how well batches mix.*NaN"):
        table = integration(cells, "X_scGPT", batch="batch", label="cell_type").table
    assert table[["avg_batch", "asw_batch", "pcr", "graph_connectivity"]].isna().all(None)
    assert table[["avg_bio", "nmi", "ari", "asw_label", "knn_accuracy"]].notna().all(None)


def test_one_label_gives_no_score_of_biology(cells):
    cells.obs["cell_type"] = "T"
    with pytest.warns(ScellfmWarning, match=r"obs\['cell_type'\] 'T'.*how well cell types are preserved.*NaN"):
        table = integration(cells, "X_scGPT", batch="batch", label="cell_type", baselines=False).table
    assert table[["avg_bio", "nmi", "ari", "asw_label", "knn_accuracy"]].isna().all(None)
    assert table[["avg_batch", "asw_batch", "pcr", "graph_connectivity"]].notna().all(None)


def test_without_labels_only_the_regression_is_left(cells):
    table = integration(cells, "X_scGPT", batch="batch", baselines=False).table
    assert table.loc["X_scGPT"].dropna().index.tolist() == ["pcr"]
    table = integration(cells, "X_scGPT", label="cell_type", baselines=False).table
    assert table["avg_bio"].notna().all() and table["avg_batch"].isna().all()


# bad inputs


def test_batches_and_labels_are_two_columns(cells):
    with pytest.raises(OptionError, match="batch='cell_type'.*must be two different columns"):
        integration(cells, ["X_scGPT"], batch="cell_type", label="cell_type")


@pytest.mark.parametrize(
    "harm, options, message",
    [
        (
            lambda c: c.obsm["X_scGPT"].__setitem__((5, 0), np.nan),
            {},
            r"NaN or infinity in 1 of 150 cells, the first is 'cell5' \(row 5\)",
        ),
        (lambda c: c.obsm["X_scGPT"].__setitem__((5, 0), np.inf), {}, "NaN or infinity"),
        (
            lambda c: c.obs.loc.__setitem__(("cell3", "batch"), None),
            {},
            "missing for 1 of 150 cells, the first is 'cell3'",
        ),
        (lambda c: None, {"reps": ["X_other"]}, "obsm has no 'X_other'"),
        (lambda c: None, {"batch": "lab"}, "no column 'lab' for batches"),
        (lambda c: None, {"label": "type"}, "no column 'type' for labels"),
        (lambda c: None, {"batch": None, "label": None}, "name at least one"),
        (lambda c: c.X.data.__setitem__(3, np.nan), {"baselines": False}, "NaN or infinite"),
    ],
)
def test_bad_inputs_are_named(cells, harm, options, message):
    harm(cells)
    with pytest.raises(DataError, match=message):
        integration(cells, **({"reps": ["X_scGPT"], "batch": "batch", "label": "cell_type"} | options))


def test_two_cells_are_too_few(cells):
    with pytest.raises(DataError, match="three cells or more"):
        integration(cells[:2].copy(), "X_scGPT", batch="batch", label="cell_type")


def test_a_handful_of_cells_is_scored(cells):
    table = integration(
        cells[[0, 1, 60, 61, 120, 121]].copy(), "X_scGPT", batch="batch", label="cell_type", baselines=False
    ).table
    assert table["graph_connectivity"].notna().all()


def test_an_empty_cell_in_the_counts_is_no_obstacle(cells):
    counts = cells.X.toarray()
    counts[7] = 0
    cells.X = sparse.csr_matrix(counts)
    assert integration(cells, "X_scGPT", batch="batch", label="cell_type").table["avg_bio"].notna().all()


# pictures


def test_umaps_stand_side_by_side_for_the_model_and_its_baselines(cells, monkeypatch):
    monkeypatch.setitem(sys.modules, "harmonypy", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    figure = umaps(cells, "X_scGPT", batch="batch", label="cell_type")
    assert [ax.get_title() for ax in figure.axes] == ["X_scGPT", "X_scGPT", "HVG + PCA", "HVG + PCA"]
    legends = [ax.get_legend().get_title().get_text() for ax in figure.axes]
    assert legends == ["batch", "cell_type"] * 2 and "X_umap" not in cells.obsm
    first, second = (ax.collections[0].get_offsets() for ax in figure.axes[:2])
    np.testing.assert_array_equal(first, second)  # the same places, in other colours


def test_a_umap_keeps_neighbours_and_repeats(cells):
    label = cells.obs["cell_type"].to_numpy()
    first, second = umap(cells.obsm["X_scGPT"]), umap(cells.obsm["X_scGPT"])
    np.testing.assert_array_equal(first, second)
    assert b.knn_accuracy(first, label) > 0.9 and not np.array_equal(first, umap(cells.obsm["X_scGPT"], seed=1))
    assert umap(cells.obsm["X_scGPT"][:5]).shape == (5, 2)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"batch": None, "label": None}, OptionError, "name at least one column"),
        ({"batch": "lab"}, DataError, "no column 'lab'"),
        ({"reps": "X_other"}, DataError, "obsm has no 'X_other'"),
        ({"baselines": True, "layer": "raw"}, DataError, "raw"),
    ],
)
def test_a_picture_of_what_is_not_there_is_refused(cells, options, error, message):
    with pytest.raises(error, match=message):
        umaps(cells, **({"reps": "X_scGPT", "batch": "batch", "label": "cell_type", "baselines": False} | options))
    with pytest.raises(OptionError, match="four cells or more"):
        umap(cells.obsm["X_scGPT"][:3])


# real cells


def test_interferon_cells_are_scored_by_condition():
    kang = anndata.read_h5ad(real_data("kang18/kang18_2000.h5ad"))
    kang = kang[::4].copy()
    kang.obsm["X_pca"] = b.baseline_embeddings(kang, None)["HVG + PCA"]
    table = integration(kang, "X_pca", batch="condition", label="cell_type_derived").table
    np.testing.assert_array_equal(table.loc["X_pca"], table.loc["HVG + PCA"])
    assert table.loc["X_pca", "knn_accuracy"] > 0.8 and 0.3 < table.loc["X_pca", "avg_bio"] < 1


def test_a_picture_leaves_torch_its_threads():
    "numba's first parallel function sets them to its own number; training after a UMAP is then not training before it."
    code = (
        "import numpy as np, torch; from scellfm.scores.batches import neighbour_graph\n"
        "from scellfm.scores.pictures import umap\n"
        "values = np.random.default_rng(0).normal(size=(60, 5)); counts = [torch.get_num_threads()]\n"
        "for make in (neighbour_graph, umap): make(values); counts.append(torch.get_num_threads())\n"
        "print(counts)"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.split("\n")[-2] == "[1, 1, 1]"
