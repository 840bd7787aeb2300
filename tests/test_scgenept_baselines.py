"""Simple predictors of perturbations: right by hand and on simulated data, honest about what they cannot answer."""

import numpy as np
import pandas as pd
import pytest

from scellfm import DataError, OptionError, ScellfmWarning
from scellfm.data import GeneVectors, simulate_perturbations
from scellfm.scgenept import perturbation_baselines
from scellfm.scores import perturbation

ALL = {
    "no change",
    "training mean",
    "additive",
    "cell-weighted mean",
    "random training perturbation",
    "matching mean",
    "additive, mean for the unseen",
    "majority direction",
    "ridge on vectors",
    "ridge on permuted vectors",
    "ridge on random vectors",
    "kNN on vectors",
    "kernel ridge on vectors",
}


def splits(simulation, every=4):
    held = simulation.singles[::every]
    return {"train": [name for name in simulation.singles if name not in held], "test": held}


@pytest.fixture(scope="module")
def additive():
    return simulate_perturbations(n_targets=40, n_pairs=20, n_genes=120, interaction=0.0, seed=3)


@pytest.fixture(scope="module")
def interacting():
    return simulate_perturbations(n_targets=40, n_pairs=20, n_genes=120, interaction=0.8, seed=3)


def cell_means(adata):
    frame = pd.DataFrame(adata.X.toarray(), columns=adata.var_names)
    return frame.groupby(adata.obs["condition"].to_numpy()).mean()


def test_each_baseline_is_what_its_name_says(additive):
    split = splits(additive)
    split["test"] = [*split["test"], *additive.pairs]
    found = perturbation_baselines(additive.adata, split, vectors=additive.vectors["know"], baselines="all")
    assert set(found) == ALL
    y = cell_means(additive.adata)
    m, train = y.loc["ctrl"], y.loc[split["train"]]
    u = train.mean()
    for name in split["test"]:
        np.testing.assert_allclose(found["no change"].loc[name], m, atol=1e-6)
        np.testing.assert_allclose(found["training mean"].loc[name], u, atol=1e-6)
        genes = name.split("+")
        effect = [y.loc[g] - m if g in split["train"] else u - m for g in genes]
        np.testing.assert_allclose(found["additive, mean for the unseen"].loc[name], m + sum(effect), atol=1e-5)
        known = len(genes) == 2 and all(g in split["train"] for g in genes)
        assert found["additive"].loc[name].notna().all() == known
        if known:
            np.testing.assert_allclose(found["additive"].loc[name], y.loc[genes].sum() - m, atol=1e-5)
        matching = sum(y.loc[g] if g in split["train"] else u for g in genes) / len(genes)
        np.testing.assert_allclose(found["matching mean"].loc[name], matching, atol=1e-5)
        assert (np.abs(train - found["random training perturbation"].loc[name]).max(axis=1) < 1e-5).sum() == 1
    vote = m + np.sign(np.sign(train - m).sum()) * (train - m).abs().mean()
    np.testing.assert_allclose(found["majority direction"].iloc[0], vote, atol=1e-5)
    assert found.counts()["ridge on vectors"] == len(split["test"]) > found.counts()["additive"] > 0


def test_additive_data_is_predicted_by_addition_and_interactions_are_not(additive, interacting):
    shares = {}
    for name, simulation in (("additive", additive), ("interacting", interacting)):
        split = {"train": simulation.singles, "test": simulation.pairs}
        found = perturbation_baselines(simulation.adata, split, baselines=["additive", "training mean"])
        scores = perturbation(
            simulation.adata,
            {**found, "truth": simulation.means.loc[simulation.pairs]},
            train=split["train"],
            metrics="all",
        )
        shares[name] = [frame.loc["additive", "share"] for frame in (scores.low, scores.table, scores.high)]
        assert scores.table.loc["truth", "wmse"] <= scores.table.loc["additive", "wmse"]
        assert scores.table.loc["truth", "share"] > 0.95
    assert shares["additive"][1] > 0.95
    assert shares["interacting"][2] < shares["additive"][0]  # the intervals exclude each other


def test_vectors_that_know_the_modules_beat_permuted_ones_on_held_out_genes(additive):
    split = splits(additive, every=3)
    found = perturbation_baselines(additive.adata, split, vectors=additive.vectors, baselines="all")
    scores = perturbation(additive.adata, found, train=split["train"], metrics=["wmse", "pearson_delta", "share"])
    low, table, high = scores.low, scores.table, scores.high
    assert high.loc["ridge on know", "wmse"] < low.loc["ridge on permuted know", "wmse"]
    assert low.loc["ridge on know", "pearson_delta"] > high.loc["ridge on permuted know", "pearson_delta"]
    assert high.loc["ridge on know", "wmse"] < low.loc["ridge on none", "wmse"]
    assert table.loc["ridge on know", "share"] > table.loc["ridge on half", "share"]
    assert table.loc["ridge on half", "share"] > table.loc["ridge on none", "share"] - 0.02
    wins = scores.better_than("training mean").loc[("ridge on know", "wmse")]
    assert wins["low"] > 0.5


def test_the_test_perturbations_are_never_looked_at(additive):
    split = splits(additive)
    changed = additive.adata.copy()
    values = changed.X.toarray()
    values[changed.obs["condition"].isin(split["test"]).to_numpy()] += 1.5
    changed.X = values
    first, second = (
        perturbation_baselines(adata, split, vectors=additive.vectors["know"], baselines="all")
        for adata in (additive.adata, changed)
    )
    for name in first:
        np.testing.assert_allclose(first[name], second[name], atol=1e-6, err_msg=name)


def test_the_order_of_cells_and_of_the_split_changes_nothing(additive):
    split = splits(additive)
    draw = np.random.default_rng(0)
    shuffled = additive.adata[draw.permutation(additive.adata.n_obs)].copy()
    other = {part: list(draw.permutation(names)) for part, names in split.items()}
    vectors = additive.vectors["know"]
    order = draw.permutation(len(vectors))
    turned = GeneVectors(vectors.genes[order], vectors.values[order])
    first = perturbation_baselines(additive.adata, split, vectors=vectors, baselines="all")
    second = perturbation_baselines(shuffled, other, vectors=turned, baselines="all")
    for name in first:
        np.testing.assert_allclose(first[name], second[name].loc[first[name].index], atol=1e-4, err_msg=name)


def test_a_gene_without_a_vector_is_a_dash_and_counted(additive):
    split = splits(additive)
    vectors = additive.vectors["know"]
    keep = vectors.genes != split["test"][0]
    with pytest.warns(ScellfmWarning, match="39 of 40 perturbed genes have a vector"):
        found = perturbation_baselines(
            additive.adata, split, vectors=GeneVectors(vectors.genes[keep], vectors.values[keep])
        )
    assert found["ridge on vectors"].loc[split["test"][0]].isna().all()
    assert found.counts()["ridge on vectors"] == len(split["test"]) - 1
    scores = perturbation(additive.adata, found, train=split["train"])
    assert f"ridge on vectors ({len(split['test']) - 1} of {len(split['test'])})" in scores.title


@pytest.mark.parametrize(
    "harm, error, message",
    [
        ({"split": {"train": ["A"], "test": ["B"]}}, DataError, "a split of other data"),
        ({"split": {"train": ["G000"], "test": []}}, DataError, "0 test perturbations"),
        ({"split": {"train": ["G000"], "test": ["ctrl+G000"]}}, DataError, "are in training and test"),
        ({"vectors": GeneVectors(["ENSG1", "ENSG2"], np.eye(2))}, DataError, "are both symbols"),
        ({"vectors": np.eye(2)}, OptionError, "give GeneVectors"),
        ({"baselines": ["mean"]}, OptionError, "baselines='mean'"),
        ({"baselines": ["ridge on vectors"]}, OptionError, "baselines='ridge on vectors'"),
        ({"condition": "gene"}, DataError, "no column 'gene'"),
    ],
)
def test_bad_inputs_are_named(additive, harm, error, message):
    options = {"split": splits(additive)} | harm
    split = options.pop("split")
    with pytest.raises(error, match=message):
        perturbation_baselines(additive.adata, split, **options)


def test_the_simulation_is_what_it_says(additive, interacting):
    means, adata = additive.means, additive.adata
    for name in additive.pairs:
        a, b = name.split("+")
        np.testing.assert_allclose(means.loc[name], means.loc[a] + means.loc[b] - means.loc["ctrl"], atol=0.2)
    exact = [
        np.abs(means.loc[n] - means.loc[n.split("+")].sum() + means.loc["ctrl"]).max() < 1e-9 for n in additive.pairs
    ]
    assert np.mean(exact) > 0.8  # the others were cut off at 0.02
    off = [np.abs(interacting.means.loc[n] - means.loc[n]).max() for n in additive.pairs]
    assert min(off) > 0.2
    found = cell_means(adata)
    error = (found - means.loc[found.index]).to_numpy()
    assert abs(error.mean()) < 0.005 and error.std() < 0.12
    assert np.array_equal(np.log1p(adata.layers["counts"].toarray()), adata.X.toarray())


def test_simulated_cells_do_not_depend_on_what_else_is_simulated():
    small, large = (simulate_perturbations(n_targets=10, n_pairs=2, n_genes=60, n_controls=n, seed=5) for n in (20, 50))
    first = small.adata[small.adata.obs["condition"] == small.singles[0]].X.toarray()
    second = large.adata[large.adata.obs["condition"] == small.singles[0]].X.toarray()
    assert np.array_equal(first, second)
    with pytest.raises(OptionError, match="n_pairs=50 is more"):
        simulate_perturbations(n_targets=10, n_pairs=50)
    with pytest.raises(OptionError, match="n_targets=300 is more than n_genes=200"):
        simulate_perturbations(n_targets=300)
