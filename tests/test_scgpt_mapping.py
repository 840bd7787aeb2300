"""Reference mapping: equal to the original's neighbours and votes, exact in any block, honest about unknown cells."""

import json
import sys
from contextlib import nullcontext

import anndata
import numpy as np
import pandas as pd
import pytest
from conftest import golden, real_data
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scellfm import AssetError, DataError, ExtraError, OptionError, ScellfmWarning
from scellfm.scgpt import neighbours as neighbours_module
from scellfm.scgpt.mapping import ReferenceMap, naming_scores, pca_pair
from scellfm.scgpt.neighbours import nearest, vote_shares, winners


def cells_of(vectors, labels=None, prefix="cell", **obs):
    frame = pd.DataFrame(obs, index=[f"{prefix}{i}" for i in range(len(vectors))])
    if labels is not None:
        frame["cell_type"] = pd.Categorical(labels)
    return anndata.AnnData(obs=frame, obsm={"X_scGPT": np.asarray(vectors, dtype=np.float32)})


@pytest.fixture
def clouds():
    rng = np.random.default_rng(1)
    labels = np.repeat(["B", "NK", "T"], [60, 30, 90])
    centres = {"B": (0, 0, 5), "NK": (0, 5, 0), "T": (5, 0, 0)}
    vectors = np.array([centres[label] for label in labels]) + rng.normal(size=(180, 3))
    donor = np.tile(["d1", "d2", "d3"], 60)
    return cells_of(vectors[::2], labels[::2], donor=donor[::2]), cells_of(
        vectors[1::2], labels[1::2], prefix="query", donor=donor[1::2]
    )


@pytest.fixture
def original():
    folder = golden("scgpt")
    with np.load(folder / "mapping.npz") as arrays:
        arrays = dict(arrays)
    record = json.loads((folder / "mapping.json").read_text())
    ref, query = (
        cells_of(arrays["ref"], arrays["ref_labels"]),
        cells_of(arrays["query"], record["truth"], prefix="query"),
    )
    return arrays, record, ref, query


def every_distance(rows, queries):
    return ((queries[:, None].astype(np.float64) - rows[None].astype(np.float64)) ** 2).sum(-1)


# the original


def test_neighbours_are_the_originals(original):
    arrays, record, ref, query = original
    distances, positions, finite = ReferenceMap(ref, k=record["k"]).neighbours(query)
    assert (positions == arrays["idx"]).all() and finite.all()
    np.testing.assert_allclose(distances, arrays["distances"], atol=2e-6)


def test_labels_by_default_are_the_notebooks(original):
    _, record, ref, query = original
    ReferenceMap(ref, k=record["k"]).transfer(query)
    assert list(query.obs["cell_type_transferred"]) == record["pred_value_counts"]
    top = [max(shares) for shares in record["vote_prob"]]
    np.testing.assert_allclose(query.obs["cell_type_confidence"], top, atol=1e-12)


@pytest.mark.parametrize("vote, name", [("majority", "vote"), ("balanced", "weighted_vote")])
def test_shares_of_every_label_are_the_originals(original, vote, name):
    _, record, ref, query = original
    reference = ReferenceMap(ref, k=record["k"], vote=vote)
    shares = reference.votes(query).shares
    for row, labels, expected in zip(shares, record[name], record[f"{name}_prob"]):
        found = {label: share for label, share in zip(reference.classes, row) if share > 0}
        assert found.keys() == set(labels)
        np.testing.assert_allclose([found[label] for label in labels], expected, atol=1e-9)


def test_balanced_labels_are_the_originals_weighted_vote(original):
    _, record, ref, query = original
    ReferenceMap(ref, k=record["k"], vote="balanced").transfer(query)
    assert list(query.obs["cell_type_transferred"]) == [labels[0] for labels in record["weighted_vote"]]


def test_proportions_and_scores_are_the_originals(original):
    _, record, ref, query = original
    reference = ReferenceMap(ref, k=record["k"])
    assert dict(zip(reference.classes, reference.proportions)) == pytest.approx(record["category_proportion"])
    found = reference.evaluate(query, baselines=False).table.loc["X_scGPT"]
    assert found.to_list() == pytest.approx(
        [record["metrics"][name] for name in ("accuracy", "precision", "recall", "macro_f1")], abs=1e-12
    )


# the search


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 90), st.integers(1, 9), st.integers(1, 30), st.integers(1, 40), st.booleans(), st.integers(0, 10**6)
)
def test_search_equals_sorting_all_distances(n, d, k, block, tied, seed):
    rng = np.random.default_rng(seed)
    rows, queries = rng.normal(size=(n, d)), rng.normal(size=(7, d))
    if tied:
        rows, queries = rows.round(), queries.round()
    rows, queries = rows.astype(np.float32), queries.astype(np.float32)
    k = min(k, n)
    distances, positions = nearest(rows, queries, k, block=block)
    expected = every_distance(rows, queries)
    order = np.argsort(expected, axis=1, kind="stable")[:, :k]
    assert (positions == order).all()
    np.testing.assert_allclose(distances, np.take_along_axis(expected, order, 1), rtol=1e-6)


def test_search_is_exact_where_float32_products_are_not():
    rng = np.random.default_rng(0)
    rows = (100 + rng.normal(scale=1e-3, size=(3000, 64))).astype(
        np.float32
    )  # differences below the rounding of the norms
    queries = (100 + rng.normal(scale=1e-3, size=(5, 64))).astype(np.float32)
    assert (
        nearest(rows, queries, 10, block=500)[1]
        == np.argsort(every_distance(rows, queries), axis=1, kind="stable")[:, :10]
    ).all()


def test_identical_reference_cells_come_in_their_order():
    rows = np.ones((500, 4), dtype=np.float32)
    assert (nearest(rows, rows[:3], 10, block=64)[1] == np.arange(10)).all()


def test_search_needs_no_copy_of_the_reference(tmp_path):
    import tracemalloc

    rows = np.memmap(tmp_path / "rows", np.float32, "w+", shape=(60_000, 128))
    rows[:] = np.random.default_rng(0).normal(size=rows.shape)
    tracemalloc.start()
    nearest(rows, np.array(rows[:20]), 5, block=4096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < rows.nbytes / 4


def test_more_neighbours_than_cells_are_refused(clouds):
    with pytest.raises(DataError, match="the reference has 90 cells"):
        ReferenceMap(clouds[0], k=91)
    with pytest.raises(DataError, match="between 1 and"):
        nearest(np.zeros((3, 2), np.float32), np.zeros((1, 2), np.float32), 4)


def test_faiss_is_asked_for_by_its_extra(clouds, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ExtraError, match=r"scellfm\[search\]"):
        ReferenceMap(clouds[0], search="faiss").transfer(clouds[1])


def test_faiss_finds_the_same_cells(clouds):
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    rows, queries = rng.normal(size=(2000, 16)).astype(np.float32), rng.normal(size=(50, 16)).astype(np.float32)
    for found, expected in zip(neighbours_module.nearest_faiss(rows, queries, 10), nearest(rows, queries, 10)):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    exact, fast = (
        ReferenceMap(clouds[0], search=search).transfer(clouds[1], copy=True).obs for search in ("exact", "faiss")
    )
    assert exact["cell_type_transferred"].equals(fast["cell_type_transferred"])


# votes and ties


def test_ties_go_to_the_first_label_or_to_the_nearer_voters():
    codes, distances = np.array([[1, 0, 0, 1], [2, 0, 0, 1]]), np.array([[0.1, 0.5, 0.6, 0.7], [0.1, 0.2, 0.3, 0.4]])
    shares = vote_shares(codes, np.full(3, 1 / 3))
    assert winners(shares, codes, distances, "first").tolist() == [0, 0]
    assert winners(shares, codes, distances, "nearest").tolist() == [1, 0]


def test_first_in_order_means_the_order_of_the_categories():
    ref = cells_of([[0.0], [2.0]], ["a", "b"])
    ref.obs["cell_type"] = ref.obs["cell_type"].cat.reorder_categories(["b", "a"])
    assert ReferenceMap(ref, k=2).transfer(cells_of([[1.0]]), copy=True).obs["cell_type_transferred"].iloc[0] == "b"
    ref.obs["cell_type"] = ref.obs["cell_type"].astype(str)
    assert ReferenceMap(ref, k=2).transfer(cells_of([[1.0]]), copy=True).obs["cell_type_transferred"].iloc[0] == "a"


# what is written


def test_transfer_writes_three_keys_and_nothing_else(clouds):
    ref, query = clouds
    before = query.copy()
    assert ReferenceMap(ref).transfer(query) is None
    assert set(query.obs) - set(before.obs) == {"cell_type_transferred", "cell_type_confidence"}
    assert set(query.uns) == {"cell_type_transferred"} and query.uns["cell_type_transferred"]["params"]["k"] == 10
    assert query.obs[list(before.obs)].equals(before.obs) and (query.obsm["X_scGPT"] == before.obsm["X_scGPT"]).all()
    assert (query.obs["cell_type_transferred"].astype(str) == query.obs["cell_type"].astype(str)).mean() > 0.95


def test_result_can_be_written_to_a_file(clouds, tmp_path):
    ref, query = clouds
    ReferenceMap(ref).transfer(query)
    query.write_h5ad(tmp_path / "query.h5ad")
    again = anndata.read_h5ad(tmp_path / "query.h5ad")
    assert (again.obs["cell_type_transferred"] == query.obs["cell_type_transferred"]).all()


def test_copy_leaves_the_query_alone(clouds):
    ref, query = clouds
    result = ReferenceMap(ref).transfer(query, copy=True)
    assert "cell_type_transferred" in result.obs and "cell_type_transferred" not in query.obs and not query.uns


def test_order_of_query_cells_changes_nothing(clouds):
    ref, query = clouds
    order = np.random.default_rng(0).permutation(query.n_obs)
    one, other = (ReferenceMap(ref).transfer(cells, copy=True).obs for cells in (query, query[order].copy()))
    assert one.iloc[order].equals(other)


# unknown cells


def test_cells_without_embedding_are_unknown_and_stay_in_place(clouds):
    ref, query = clouds
    query.obsm["X_scGPT"][[0, 7]] = np.nan
    with pytest.warns(ScellfmWarning, match="2 of 90 cells have no embedding"):
        ReferenceMap(ref).transfer(query)
    unknown = (query.obs["cell_type_transferred"] == "unknown").to_numpy()
    assert np.flatnonzero(unknown).tolist() == [0, 7] and query.obs["cell_type_confidence"].isna().equals(
        pd.Series(unknown, query.obs_names)
    )


def test_reference_cells_without_embedding_or_label_do_not_vote(clouds):
    ref, query = clouds
    killers = np.flatnonzero(ref.obs["cell_type"] == "NK")
    ref.obsm["X_scGPT"][[0, killers[0]]] = np.nan  # one of the two lacks its label too and is counted once
    ref.obs.loc[ref.obs["cell_type"] == "NK", "cell_type"] = np.nan
    with pytest.warns(
        ScellfmWarning,
        match="16 of 90 reference cells are left out: 2 have no embedding, 14 of the others no 'cell_type'",
    ):
        reference = ReferenceMap(ref)
    assert list(reference.classes) == ["B", "T"] and len(reference.vectors) == 74
    reference.transfer(query)
    assert "NK" not in set(query.obs["cell_type_transferred"])


def test_a_type_that_the_reference_lacks_is_unknown_after_calibration(clouds):
    ref, query = clouds
    reference = ReferenceMap(ref[ref.obs["cell_type"] != "NK"].copy())
    reference.calibrate(accuracy=0.95, far=0.05)
    reference.transfer(query)
    novel = (query.obs["cell_type"] == "NK").to_numpy()
    unknown = (query.obs["cell_type_transferred"] == "unknown").to_numpy()
    assert unknown[novel].mean() > 0.8 and unknown[~novel].mean() < 0.2


def overlapping(seed, n=600):
    rng = np.random.default_rng(seed)
    labels = rng.choice(["a", "b"], n)
    return cells_of(
        (labels == "b")[:, None] * 1.5 + rng.normal(size=(n, 2)),
        labels,
        prefix=f"s{seed}_",
        donor=rng.choice(["d1", "d2", "d3"], n),
    )


def test_calibrated_accuracy_holds_on_new_cells():
    reference, query = ReferenceMap(overlapping(0)), overlapping(1)
    table = reference.calibrate(accuracy=0.9, far=0)
    assert 0.5 < reference.min_confidence < 1 and reference.max_distance == np.inf
    assert table["called"].is_monotonic_decreasing and table["called"].iloc[0] == 1
    found = reference.evaluate(query, baselines=False).table.loc["X_scGPT"]
    assert found["accuracy"] < 0.86 < found["accuracy_called"] and 0.2 < found["called"] < 0.95


def test_calibration_by_donor_uses_no_cell_of_the_same_donor():
    cells = overlapping(0)
    places = {"d1": 0.0, "d2": 50.0, "d3": 100.0}  # donors far apart: every neighbour of the same donor is nearer
    cells.obsm["X_scGPT"][:, 0] += cells.obs["donor"].map(places).to_numpy(np.float32)
    one, other = ReferenceMap(cells), ReferenceMap(cells)
    one.calibrate(0.6)
    with pytest.warns(ScellfmWarning, match="no threshold reaches"):
        other.calibrate(0.6, by="donor")
    assert other.max_distance > 1000 > 10 > one.max_distance


def test_calibration_can_be_repeated_and_says_what_it_cannot_reach():
    rng = np.random.default_rng(0)
    noise = cells_of(rng.normal(size=(300, 2)), rng.choice(["a", "b"], 300))
    one, other = ReferenceMap(noise), ReferenceMap(noise)
    with pytest.warns(ScellfmWarning, match="no threshold reaches an accuracy of 100%"):
        tables = [reference.calibrate(accuracy=1.0, n_cells=100) for reference in (one, other)]
    assert tables[0].equals(tables[1]) and one.max_distance == other.max_distance


# scores


def test_labels_that_the_reference_lacks_count_as_wrong(clouds):
    ref, query = clouds
    with pytest.warns(ScellfmWarning, match=r"15 of 90 query cells have types that are not in the reference \(NK\)"):
        found = ReferenceMap(ref[ref.obs["cell_type"] != "NK"].copy()).evaluate(query, baselines=False)
    assert (
        found.table.loc["X_scGPT", "accuracy"] <= 75 / 90
        and found.details["X_scGPT"]["per_class"].loc["NK", "recall"] == 0
    )


def test_scores_are_scikit_learns():
    from sklearn import metrics as m

    rng = np.random.default_rng(0)
    truth, called = rng.choice(list("abcd"), 80), rng.choice(list("bcde"), 80)
    found, tables = naming_scores(truth, called)
    macro = {"average": "macro", "zero_division": 0}
    assert found == pytest.approx(
        {
            "accuracy": m.accuracy_score(truth, called),
            "macro_precision": m.precision_score(truth, called, **macro),
            "macro_recall": m.recall_score(truth, called, **macro),
            "macro_f1": m.f1_score(truth, called, **macro),
        }
    )
    assert tables["confusion"].to_numpy().sum() == 80 and tables["per_class"]["support"].sum() == 80


def test_baselines_stand_beside_the_model_and_learn_from_the_reference_alone(clouds):
    rng = np.random.default_rng(0)
    for cells in clouds:
        means = np.where(
            cells.obs["cell_type"].to_numpy()[:, None] == np.array(["B", "NK", "T"]).repeat(10)[None], 8, 1
        )
        cells_counts = anndata.AnnData(
            sparse.csr_matrix(rng.poisson(means).astype(np.float32)),
            obs=cells.obs,
            obsm={"X_scGPT": cells.obsm["X_scGPT"]},
        )
        cells_counts.var_names = [f"gene{i}" for i in range(30)]
        cells.uns["counts"] = cells_counts
    ref, query = (cells.uns["counts"] for cells in clouds)
    found = ReferenceMap(ref).evaluate(query)
    assert list(found.table.index) == ["X_scGPT", "HVG + PCA", "majority class"]
    assert found.table.loc["HVG + PCA", "accuracy"] > 0.9 > 0.6 > found.table.loc["majority class", "accuracy"]
    whole, few = pca_pair(ref, query, None, 0)[1], pca_pair(ref, query[:40].copy(), None, 0)[1]
    np.testing.assert_array_equal(whole[:40], few)  # the other query cells have no say in it
    with pytest.raises(DataError, match="share 0 gene names"):
        query.var_names = [f"other{i}" for i in range(30)]
        ReferenceMap(ref).evaluate(query)


def test_mapping_the_reference_on_itself_is_told(clouds):
    with pytest.warns(ScellfmWarning, match="are they in the reference"):
        ReferenceMap(clouds[0]).evaluate(clouds[0].copy(), baselines=False)


# saved maps


def test_saved_map_gives_the_same_answer_and_stays_in_its_file(clouds, tmp_path):
    ref, query = clouds
    reference = ReferenceMap(ref, k=7, vote="balanced", ties="nearest")
    reference.calibrate(0.9)
    reference.save(tmp_path / "map")
    assert sorted(p.name for p in (tmp_path / "map").iterdir()) == ["index.json", "index.safetensors"]
    again = ReferenceMap.load(tmp_path / "map")
    assert (
        isinstance(again.vectors, np.memmap)
        and again.settings() == reference.settings()
        and list(again.classes) == list(reference.classes)
    )
    assert again.transfer(query, copy=True).obs.equals(reference.transfer(query, copy=True).obs)
    reference.save(tmp_path / "map")  # over the old one
    assert again.transfer(query, copy=True).obs.equals(reference.transfer(query, copy=True).obs)


def test_uncalibrated_map_is_plain_json(clouds, tmp_path):
    ReferenceMap(clouds[0]).save(tmp_path / "map")
    record = json.loads((tmp_path / "map" / "index.json").read_text(), parse_constant=pytest.fail)
    assert record["max_distance"] is None and ReferenceMap.load(tmp_path / "map").max_distance == np.inf


@pytest.mark.parametrize("name", ["index.safetensors", "index.json"])
@pytest.mark.parametrize("harm", ["remove", "cut", "garbage", "empty"])
def test_damaged_maps_are_refused(clouds, tmp_path, name, harm):
    ReferenceMap(clouds[0]).save(tmp_path / "map")
    file = tmp_path / "map" / name
    content = file.read_bytes()
    file.unlink() if harm == "remove" else file.write_bytes(
        {"cut": content[:-20], "garbage": b"\xff" * 200, "empty": b""}[harm]
    )
    with pytest.raises(AssetError, match="missing|damaged"):
        ReferenceMap.load(tmp_path / "map")


def test_a_map_of_two_halves_is_refused(clouds, tmp_path):
    ReferenceMap(clouds[0]).save(tmp_path / "map")
    file = tmp_path / "map" / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"classes": ["B"]}))
    with pytest.raises(AssetError, match="does not match"):
        ReferenceMap.load(tmp_path / "map")


def test_a_loaded_map_says_what_it_lacks(clouds, tmp_path):
    ReferenceMap(clouds[0]).save(tmp_path / "map")
    again = ReferenceMap.load(tmp_path / "map")
    with pytest.raises(DataError, match="no counts for the HVG"):
        again.evaluate(clouds[1])
    with pytest.raises(DataError, match="calibrate before saving"):
        again.calibrate(by="donor")


# bad inputs


@pytest.mark.parametrize(
    "harm, error, message",
    [
        (lambda r, q: r.obsm.pop("X_scGPT"), DataError, "reference has no obsm"),
        (lambda r, q: q.obsm.pop("X_scGPT"), DataError, "query has no obsm"),
        (lambda r, q: r.obs.drop(columns="cell_type", inplace=True), DataError, "no column 'cell_type'"),
        (
            lambda r, q: q.obsm.__setitem__("X_scGPT", q.obsm["X_scGPT"][:, :2]),
            DataError,
            "2 dimensions in the query and 3",
        ),
        (
            lambda r, q: q.obsm["X_scGPT"].__setitem__((4, 1), np.nan),
            DataError,
            "query has NaN or infinity in 1 cells, the first is 'query4'",
        ),
        (
            lambda r, q: r.obsm["X_scGPT"].__setitem__((4, 1), np.inf),
            DataError,
            "reference has NaN or infinity in 1 cells",
        ),
        (lambda r, q: r.obs.__setitem__("cell_type", "T"), DataError, r"holds 1 label\(s\) \(T\)"),
        (lambda r, q: r.obs.__setitem__("cell_type", np.nan), DataError, "holds 0 label"),
    ],
)
def test_bad_cells_are_named(clouds, harm, error, message):
    harm(*clouds)
    with pytest.warns(ScellfmWarning) if "0 label" in message else nullcontext(), pytest.raises(error, match=message):
        ReferenceMap(clouds[0]).transfer(clouds[1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"k": 0}, "k=0"),
        ({"k": 2.5}, "k=2.5"),
        ({"vote": "majorty"}, "Did you mean 'majority'"),
        ({"ties": "random"}, "ties='random'"),
        ({"search": "annoy"}, "search='annoy'"),
        ({"min_confidence": 2}, "min_confidence=2 is a share"),
        ({"max_distance": -1}, "max_distance=-1"),
    ],
)
def test_bad_options_are_named(clouds, options, message):
    with pytest.raises(OptionError, match=message):
        ReferenceMap(clouds[0], **options)


@pytest.mark.parametrize("options", [{"accuracy": 0}, {"accuracy": 95}, {"far": 1}, {"far": -0.1}])
def test_bad_targets_of_calibration_are_named(clouds, options):
    with pytest.raises(OptionError, match="shares of the held-out cells"):
        ReferenceMap(clouds[0]).calibrate(**options)


def test_what_holds_no_cells_is_named(clouds):
    with pytest.raises(DataError, match="the query is a NoneType; give an AnnData"):
        ReferenceMap(clouds[0]).transfer(None)
    with pytest.raises(OptionError, match="n_cells=-1"):
        ReferenceMap(clouds[0]).calibrate(n_cells=-1)


def test_one_donor_cannot_calibrate_by_donor(clouds):
    ref = clouds[0]
    ref.obs["donor"] = "d1"
    with pytest.raises(DataError, match="without group 'd1' 0 reference cells remain"):
        ReferenceMap(ref).calibrate(by="donor")


def test_query_without_any_truth_is_refused(clouds):
    ref, query = clouds
    query.obs["cell_type"] = np.nan
    with pytest.warns(ScellfmWarning), pytest.raises(DataError, match="no query cell"):
        ReferenceMap(ref).evaluate(query, baselines=False)


# real cells


def test_interferon_cells_are_mapped_across_donors():
    from scellfm.baselines import count_features

    cells = anndata.read_h5ad(real_data("kang18/kang18_2000.h5ad"))
    is_ref = cells.obs["donor"].astype(str).isin(["1015", "1488", "1256", "1244"]).to_numpy()
    features = count_features().fit(cells.X[is_ref])
    cells.obsm["X_pca"] = features.transform(cells.X).astype(np.float32)
    ref, query = cells[is_ref].copy(), cells[~is_ref].copy()
    reference = ReferenceMap(ref, "X_pca", "cell_type_derived")
    reference.calibrate(0.95, by="donor")
    found = reference.evaluate(query).table
    np.testing.assert_allclose(found.loc["X_pca", "accuracy"], found.loc["HVG + PCA", "accuracy"], atol=0.01)
    assert found.loc["X_pca", "accuracy"] > 0.8 > found.loc["majority class", "accuracy"]
    assert found.loc["X_pca", "accuracy_called"] > found.loc["X_pca", "accuracy"]
