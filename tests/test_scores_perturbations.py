"""Scores of perturbations: right by definition, beside mean and duplicate, and not fooled by known attacks."""

import sys

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse
from scipy.stats import false_discovery_control, pearsonr, ttest_ind
from sklearn.metrics import r2_score

from scellfm import DataError, ExtraError, OptionError, ScellfmWarning
from scellfm.scores import PerturbationScores, perturbation
from scellfm.scores.effects import adjusted, measure_effects, specific_weights

N, CELLS, GENES = 24, 40, 70
NAMES = [f"P{i:02d}" for i in range(N)]
TRAIN, TEST = NAMES[:14], NAMES[14:]
COLUMNS = [f"G{i}" for i in range(GENES)]
COMMON = np.where(np.arange(GENES) < 8, 1.0, 0.0)  # every perturbation moves these genes
LEVEL = np.random.default_rng(5).uniform(1, 3, GENES)


def effects(seed=0):
    draw = np.random.default_rng(seed)
    out = np.zeros((N, GENES))
    for row in out:
        row[draw.choice(np.arange(8, GENES), 5, replace=False)] = draw.choice([-0.9, 0.9], 5)
    return out + COMMON


def cells_of(effect, labels, noise=0.6, seed=1, controls=CELLS):
    draw = np.random.default_rng(seed)
    rows, n = np.vstack([effect, np.zeros(GENES)]), [CELLS] * len(labels) + [controls]
    values = np.vstack([draw.normal(LEVEL + row, noise, (size, GENES)) for row, size in zip(rows, n)]).clip(0)
    obs = pd.DataFrame({"condition": np.repeat([*labels, "ctrl"], n)}, index=[f"c{i}" for i in range(len(values))])
    return AnnData(sparse.csr_matrix(values), obs=obs, var=pd.DataFrame(index=COLUMNS))


@pytest.fixture(scope="module")
def world():
    return cells_of(effects(), NAMES)


def means(adata, names):
    return pd.DataFrame(
        [np.asarray(adata.X[(adata.obs.condition == n).to_numpy()].mean(0)).ravel() for n in names], names, COLUMNS
    )


def partly_right(share=0.6):
    return pd.DataFrame(LEVEL + COMMON + share * (effects() - COMMON), NAMES, COLUMNS).loc[TEST]


def score(adata, prediction, **options):
    return perturbation(adata, prediction, train=TRAIN, **{"metrics": "all"} | options)


def test_each_metric_is_what_its_definition_says(world):
    guess = partly_right()
    table = score(world, guess).details["model"]["by_condition"]
    dense, labels = world.X.toarray(), world.obs.condition.to_numpy()
    m, truth = dense[labels == "ctrl"].mean(0), means(world, NAMES)
    u = truth.loc[TRAIN].mean().to_numpy()
    for name in TEST[:4]:
        here, x, y = dense[labels == name], guess.loc[name].to_numpy(), truth.loc[name].to_numpy()
        t = ttest_ind(here, dense[labels == "ctrl"], equal_var=False).statistic
        top = np.argsort(-np.abs(t), kind="stable")[:20]
        rest = dense[(labels != "ctrl") & (labels != name)]
        s = (y - rest.mean(0)) / np.sqrt(here.var(0, ddof=1) / CELLS + rest.var(0, ddof=1) / CELLS)
        w = ((np.abs(s) - np.abs(s).min()) / np.ptp(np.abs(s))) ** 2
        w /= w.sum()
        distance = ((truth.loc[TEST].to_numpy() - x) ** 2).sum(1)
        expected = {
            "mse": ((x - y) ** 2).mean(),
            "mse_de": ((x - y)[top] ** 2).mean(),
            "pearson": pearsonr(x, y).statistic,
            "pearson_delta": pearsonr(x - m, y - m).statistic,
            "pearson_delta_de": pearsonr((x - m)[top], (y - m)[top]).statistic,
            "wmse": (w * (x - y) ** 2).sum(),
            "r2_w": r2_score(y - u, x - u, sample_weight=w),
            "nir": (distance > distance[TEST.index(name)]).sum() / (len(TEST) - 1),
            "de_recall": len(set(np.argsort(-np.abs(x - m), kind="stable")[:20]) & set(top)) / 20,
            "de_direction": (np.sign(x - m)[top] == np.sign(y - m)[top]).mean(),
        }
        assert table.loc[name, list(expected)].to_dict() == pytest.approx(expected, abs=1e-9)


def test_statistics_are_those_of_scanpy_and_scipy(world):
    sc = pytest.importorskip("scanpy")
    perturbed = world[world.obs.condition != "ctrl"].copy()
    sc.tl.rank_genes_groups(perturbed, "condition", method="t-test_overestim_var", groups=[TEST[0]])
    found = sc.get.rank_genes_groups_df(perturbed, TEST[0]).set_index("names").loc[COLUMNS]
    t, q = measure_effects(world).specific()
    row = NAMES.index(TEST[0])
    np.testing.assert_allclose(t[row], found.scores, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(q[row], found.pvals_adj, rtol=1e-3, atol=1e-9)
    p = np.random.default_rng(0).random((3, 40)) ** 3
    np.testing.assert_allclose(adjusted(p), [false_discovery_control(row) for row in p])
    np.testing.assert_allclose(specific_weights(t).sum(1), 1)


def test_the_mean_is_zero_and_the_duplicate_one_on_the_scale_of_shares(world):
    found = score(world, {"half": partly_right(0.5), "most": partly_right(0.9)})
    share = found.table["share"]
    assert share["training mean"] == pytest.approx(0) and share["technical duplicate (ceiling)"] == pytest.approx(1)
    assert 0 < share["half"] < share["most"]
    assert found.shares(["wmse"])["wmse"].to_dict() == pytest.approx(share.to_dict())
    dense, labels = world.X.toarray(), world.obs.condition.to_numpy()
    m = dense[labels == "ctrl"].mean(0)
    assert found.details["no change"]["by_condition"]["mse"][TEST[0]] == pytest.approx(
        ((means(world, TEST[:1]).to_numpy()[0] - m) ** 2).mean()
    )


def test_the_order_of_cells_genes_and_perturbations_changes_nothing(world):
    draw = np.random.default_rng(3)
    shuffled = world[draw.permutation(world.n_obs), draw.permutation(GENES)].copy()
    guess = partly_right()
    first = score(world, guess, metrics="all")
    second = score(shuffled, guess.sample(frac=1, random_state=0)[list(draw.permutation(COLUMNS))], metrics="all")
    np.testing.assert_allclose(first.table, second.table.loc[first.table.index], atol=1e-9)


def test_an_attack_predicting_absolute_effects_does_not_help(world):
    m = means(world, ["ctrl"]).to_numpy()
    honest, attack = partly_right(), m + (partly_right() - m).abs()
    found = score(world, {"honest": honest, "attack": attack}).table
    for name in ("pearson_delta", "pearson_delta_de", "r2_w", "nir", "de_direction", "share"):
        assert found.loc["attack", name] < found.loc["honest", name], name  # a score of |delta| would find them equal
    for name in ("mse", "mse_de", "wmse"):
        assert found.loc["attack", name] > found.loc["honest", name], name
    assert found.loc["attack", "de_recall"] == found.loc["honest", "de_recall"]  # which genes change, not how


def test_an_attack_with_shifted_controls_changes_nothing(world):
    cells = cells_of(0.5 * effects(), NAMES, seed=9)
    kept = cells[cells.obs.condition.isin([*TEST, "ctrl"])].copy()
    shifted = kept.copy()
    rows = (shifted.obs.condition == "ctrl").to_numpy()
    values = shifted.X.toarray()
    values[rows] = values[rows] * 0 + 7.3
    shifted.X = sparse.csr_matrix(values)
    first, second = score(world, kept).table, score(world, shifted).table
    pd.testing.assert_frame_equal(first, second)


def test_an_attack_with_the_training_mean_is_seen(world):
    u = means(world, TRAIN).mean()
    attack = pd.DataFrame([u] * len(TEST), TEST, COLUMNS)
    found = score(world, {"attack": attack, "honest": partly_right()})
    assert found.table.loc["attack", "pearson_delta"] > 0.4  # the usual score is fooled
    assert found.table.loc["attack", "share"] == pytest.approx(0, abs=1e-9)
    assert found.table.loc["attack", "nir"] == pytest.approx(0.5, abs=1e-9)
    assert found.table.loc["attack", "r2_w"] < found.table.loc["honest", "r2_w"]
    assert found.table.loc["attack", "variance_ratio"] < 1e-9 < 0.1 < found.table.loc["honest", "variance_ratio"]
    assert "one prediction for all perturbations: attack" in found.title and "honest" not in found.title
    ties = found.better_than("training mean").loc["attack"]
    assert ties["share"].tolist() == [0.5, 0.5]


def test_an_attack_that_chooses_genes_on_the_cells_that_judge_them_is_seen():
    nothing = cells_of(np.zeros((N, GENES)), NAMES, noise=1.0, seed=4, controls=2000)  # no perturbation does anything
    noise = measure_effects(nothing).first.mean[[NAMES.index(name) for name in TEST]]  # half of the cells that judge
    found = score(nothing, pd.DataFrame(noise, TEST, COLUMNS)).table.loc["model"]
    assert found["pearson_delta_de"] > 0.7
    assert abs(found["pearson_delta_de_ab"]) < 0.2


def test_an_attack_that_counts_a_perturbation_twice_is_merged(world):
    twice = world.copy()
    labels = twice.obs.condition.astype(str).to_numpy()
    second = (labels == TEST[0]) & (np.arange(len(labels)) % 2 == 0)
    twice.obs["condition"] = np.where(second, f"{TEST[0]}+ctrl", np.where(labels == TEST[0], f"ctrl+{TEST[0]}", labels))
    guess = partly_right()
    doubled = pd.concat([guess, guess.iloc[[0]].set_axis([f"ctrl+{TEST[0]}"])])
    first, second = score(world, guess), score(twice, doubled)
    assert len(second.values("mse")) == len(TEST)
    np.testing.assert_allclose(first.table["mse"][:3], second.table["mse"][:3], atol=1e-9)
    published = doubled.rename(index={TEST[0]: f"{TEST[0]}+ctrl"})
    assert len(score(twice, published, original=True).values("mse")) == len(TEST) + 1


def test_labels_are_read_as_perturbation_data_reads_them(world):
    from scellfm.scgenept import perturbation_of
    from scellfm.scores.effects import perturbation_name

    for label in (
        "A",
        "A+ctrl",
        "ctrl+A",
        " A + CTRL ",
        "Control+A",
        "B+A",
        "A+A",
        "ctrl",
        "Control",
        "ctrl+ctrl",
        "A+B+C",
    ):
        assert perturbation_name(label) == perturbation_of(label), label
    written = world.copy()
    written.obs["condition"] = [f"{n} + CTRL" if n != "ctrl" else n for n in world.obs.condition.astype(str)]
    pd.testing.assert_frame_equal(score(written, partly_right()).table, score(world, partly_right()).table)
    written.obs["condition"] = written.obs["condition"].astype(str).replace({f"{TEST[0]} + CTRL": f"{TEST[0]}+"})
    with pytest.raises(DataError, match="empty part"):
        score(written, partly_right())


def test_subgroups_strata_and_dashes(world):
    groups = {"first": TEST[:3], "second": TEST[3:], "empty": [], "elsewhere": ["NEW"]}
    found = score(world, partly_right(), subgroups=groups)
    table, values = found.by_subgroup("pearson_delta"), found.values("pearson_delta", "model")
    assert table.loc["model", "first"] == pytest.approx(values[TEST[:3]].mean())
    assert table[["empty", "elsewhere"]].isna().all(axis=None)
    assert found.table.loc["model", "pearson_delta_by_subgroup"] == pytest.approx(
        (values[TEST[:3]].mean() + values[TEST[3:]].mean()) / 2
    )
    assert {"weak effect", "medium effect", "strong effect"} < set(table)
    assert "–" in repr(score(world, partly_right(), metrics=["interaction_auprc"]))


def test_intervals_and_differences_are_over_perturbations(world):
    found = score(world, partly_right())
    values = found.values("wmse")
    difference = found.difference("wmse").loc["model"]
    assert difference["difference"] == pytest.approx((values["model"] - values["training mean"]).mean())
    assert difference["low"] < difference["difference"] < difference["high"] < 0 and difference["n"] == len(TEST)
    low, high = found.low.loc["model", "wmse"], found.high.loc["model", "wmse"]
    assert low < found.table.loc["model", "wmse"] < high
    error = values["model"].std() / np.sqrt(len(TEST))
    assert (high - low) == pytest.approx(3.92 * error, rel=0.25)
    again = score(world, partly_right())
    pd.testing.assert_frame_equal(found.low, again.low)
    wins = found.better_than("training mean").loc[("model", "wmse")]
    assert wins["share"] == ((values["model"] < values["training mean"]).mean()) and wins["low"] < wins["share"]


def test_a_metric_that_sees_nothing_says_so(world):
    nothing = cells_of(np.zeros((N, GENES)), NAMES, noise=1.0, seed=4)
    blind, seeing = score(nothing, partly_right()), score(world, partly_right())
    assert blind.dynamic_range.loc["wmse", "verdict"] == "cannot judge" and "cannot judge" in blind.title
    assert seeing.dynamic_range.loc["wmse", "verdict"] == "can judge" and "wmse" not in seeing.title
    assert np.isnan(blind.table.loc["model", "share"]) and np.isfinite(seeing.table.loc["model", "share"])
    assert seeing.dynamic_range["dynamic range"].between(-1, 1).sum() >= 10


def test_pairs_interact_or_add_up():
    draw = np.random.default_rng(0)
    single = np.zeros((6, GENES))
    for row in single:
        row[draw.choice(GENES, 6, replace=False)] = draw.choice([-1, 1], 6)
    pairs = [(0, 1), (2, 3), (4, 5)]
    extra = np.zeros((3, GENES))
    extra[:, :5] = 1.5
    labels = [f"S{i}" for i in range(6)] + [f"S{i}+S{j}" for i, j in pairs]
    together = np.array([single[i] + single[j] for i, j in pairs]) + extra
    adata = cells_of(np.vstack([single, together]), labels, noise=0.3)
    right = pd.DataFrame(LEVEL + together, labels[6:], COLUMNS)
    additive = pd.DataFrame(
        [means(adata, [f"S{i}", f"S{j}"]).sum().to_numpy() - means(adata, ["ctrl"]).to_numpy()[0] for i, j in pairs],
        labels[6:],
        COLUMNS,
    )
    found = perturbation(adata, {"right": right, "additive": additive}, train=labels[:6], metrics="all")
    assert found.table.loc["right", "interaction_pearson"] > 0.8 and found.table.loc["right", "interaction_auprc"] > 0.8
    assert found.values("interaction_pearson", "additive").isna().all()
    assert found.values("interaction_auprc", "additive").isna().all()


def test_cells_have_an_energy_distance_and_means_have_none(world):
    cells = cells_of(effects(), NAMES, seed=11)
    near = cells[cells.obs.condition.isin(TEST)].copy()
    cells = cells_of(effects() + 1.0, NAMES, seed=12)
    far = cells[cells.obs.condition.isin(TEST)].copy()
    found = score(world, {"near": near, "far": far, "means": partly_right()}).table["e_distance"]
    assert found["near"] < 0.3 < found["far"] and np.isnan(found["means"])


def test_a_condition_of_one_cell_is_scored_where_it_can_be(world):
    lone = (world.obs.condition == TEST[0]).to_numpy()
    keep = ~lone | (np.cumsum(lone) == 1)
    found = score(world[keep].copy(), partly_right())
    counts = found.counts().loc["model"]
    assert counts["mse"] == len(TEST) and counts["wmse"] == counts["mse_de_ab"] == len(TEST) - 1
    assert np.isfinite(found.table.loc["model", ["mse", "wmse", "share"]].astype(float)).all()


def test_a_constant_prediction_has_no_correlation_and_is_counted(world):
    flat = pd.DataFrame(1.0, TEST, COLUMNS)
    rest = pd.DataFrame(np.tile(means(world, ["ctrl"]).to_numpy(), (len(TEST), 1)), TEST, COLUMNS)
    for guess, metric in ((flat, "pearson"), (rest, "pearson_delta"), (rest.astype(np.float32), "pearson_delta")):
        found, original = score(world, guess), score(world, guess, original=True)
        assert found.values(metric, "model").isna().all() and np.isnan(found.table.loc["model", metric])
        assert found.counts().loc["model", metric] == 0 and found.counts().loc["model", "mse"] == len(TEST)
        assert (original.values(metric, "model") == 0).all() and original.table.loc["model", metric] == 0


def test_a_missing_prediction_is_counted_and_no_zero(world):
    guess = partly_right()
    guess.iloc[0] = np.nan
    found = score(world, guess)
    assert found.counts().loc["model", "mse"] == len(TEST) - 1
    assert found.table.loc["model", "mse"] == pytest.approx(found.values("mse", "model").iloc[1:].mean())
    with pytest.warns(ScellfmWarning, match="1 of 11 predicted perturbations were not measured"):
        score(world, pd.concat([partly_right(), partly_right().iloc[[0]].set_axis(["NEW"])]))


def test_a_record_brings_the_scores_back(world):
    found = score(world, partly_right(), subgroups={"first": TEST[:3]})
    back = PerturbationScores.from_dict(found.to_dict())
    pd.testing.assert_frame_equal(back.by_subgroup("mse"), found.by_subgroup("mse"), check_names=False)
    pd.testing.assert_frame_equal(back.better_than(), found.better_than())
    pd.testing.assert_series_equal(back.dynamic_range["dynamic range"], found.dynamic_range["dynamic range"])


def test_the_default_table(world):
    found = perturbation(world, partly_right(), train=TRAIN)
    assert list(found.table) == ["mse", "pearson_delta", "wmse", "share"]
    assert set(found.table.index) == {
        "model",
        "training mean",
        "no change",
        "technical duplicate (ceiling)",
        "interpolated duplicate (ceiling)",
    }


def test_truth_may_be_anything_with_cells(world):
    holder = type("Data", (), {"adata": world})()
    split = type("Split", (), {"train": TRAIN, "test": TEST, "subgroups": {"first": TEST[:3]}})()
    found = perturbation(holder, partly_right(), train=split, metrics="all")
    assert "first" in found.by_subgroup("mse")
    pd.testing.assert_frame_equal(found.table[["mse"]], score(world, partly_right()).table[["mse"]])


def test_nothing_is_changed_in_the_cells(world):
    before = world.X.copy()
    score(world, partly_right())
    assert (before != world.X).nnz == 0


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda a, g: (a[a.obs.condition != "ctrl"], g), "no cell is a control"),
        (lambda a, g: (a[a.obs.condition == "ctrl"], g), "are controls"),
        (lambda a, g: (AnnData(sparse.csr_matrix(np.round(a.X.toarray() * 9)), a.obs, a.var), g), "these are counts"),
        (lambda a, g: (a, (g * 10).round()), "these are counts"),
        (lambda a, g: (a, g.rename(index=lambda n: f"Q{n}")), "Are these predictions for other data"),
        (lambda a, g: (a, g.rename(columns=lambda n: f"ENSG{n}")), "lacks 70 of the truth's 70 genes"),
        (lambda a, g: (a, g.iloc[:, :50]), "lacks 20 of the truth's 70 genes"),
        (lambda a, g: (a, g.to_numpy()), "model is a ndarray"),
        (lambda a, g: (a[:, [0, *range(70)]], g), "more than once"),
        (lambda a, g: (a, pd.concat([g, g.iloc[[0]] + 1])), "they differ"),
    ],
)
def test_bad_inputs_are_named(world, harm, message):
    with pytest.raises(DataError, match=message):
        score(*harm(world, partly_right()))


def test_bad_options_are_named(world):
    with pytest.raises(OptionError, match="Did you mean 'pearson_delta'"):
        score(world, partly_right(), metrics=["pearson_dleta"])
    with pytest.raises(DataError, match="the split is from other data"):
        perturbation(world, partly_right(), train=["A", "B"])
    with pytest.raises(DataError, match="'NEW', which is not among the genes"):
        score(world, partly_right(), de_genes={TEST[0]: ["NEW"]})
    with pytest.raises(DataError, match="no column 'gene'"):
        score(world, partly_right(), condition="gene")
    with pytest.raises(OptionError, match="without AnnData"):
        perturbation(partly_right())


def test_the_challenge_needs_its_library_and_counts(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "cell_eval2", None)
    with pytest.raises(ExtraError, match=r"scellfm\[vcc\]"):
        perturbation(world, world, metrics="vcc2026")
    library = type("L", (), {"__version__": "0"})
    monkeypatch.setitem(sys.modules, "cell_eval2", library)
    with pytest.raises(DataError, match="not counts"):
        perturbation(world, world, metrics="vcc2026")
    with pytest.raises(DataError, match="needs predicted cells as AnnData"):
        counts = AnnData(sparse.csr_matrix(np.ones((2, 2))), pd.DataFrame({"condition": ["ctrl", "A"]}, ["a", "b"]))
        perturbation(counts, partly_right(), metrics="vcc2026")


def test_shares_are_drawn_for_the_metrics_that_can_judge(world):
    from matplotlib import pyplot as plt

    found = score(world, {"half": partly_right(0.5), "most": partly_right(0.9)})
    ax = found.plot()
    shown = {label.get_text() for label in ax.get_yticklabels()}
    assert shown == set(found.table.index)
    order = [label.get_text() for label in ax.get_yticklabels()]
    assert order.index("training mean") < order.index("half") < order.index("most")
    assert not ax.texts
    silent = partly_right() * np.nan
    drawn = score(world, {"most": partly_right(0.9), "silent": silent}).plot()
    assert [text.get_text() for text in drawn.texts] == ["no prediction"]
    assert found.plot(kind="scores") is not ax
    with pytest.raises(OptionError, match="kind='roc'"):
        found.plot(kind="roc")
    found.origin["dynamic_range"]["mse"] = -0.1
    assert "cannot judge here: MSE" in found.plot().get_title(loc="left")
    with pytest.raises(DataError, match="none of the metrics"):
        found.plot(metrics=["mse"])
    plt.close("all")


def counts_of(effect, seed):
    draw, names = np.random.default_rng(seed), [f"G{i}" for i in range(5)]
    labels = np.repeat([*names, "ctrl"], [30] * 5 + [60])
    base = np.random.default_rng(0).lognormal(0.5, 0.7, 80)
    changed = [np.random.default_rng(7 + i).choice(80, 12, replace=False) for i in range(5)]
    rates = {n: base * np.where(np.isin(np.arange(80), g), np.exp(effect), 1) for n, g in zip(names, changed)}
    counts = draw.poisson([(rates | {"ctrl": base})[label] for label in labels]).astype(np.float32)
    obs = pd.DataFrame({"condition": pd.Categorical(labels)}, index=[f"c{i}" for i in range(len(labels))])
    return AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(80)]))


@pytest.mark.filterwarnings("ignore")
def test_the_challenge_is_scored_by_its_own_library():
    library = pytest.importorskip("cell_eval2")
    truth, good, none = counts_of(1.0, 1), counts_of(1.0, 2), counts_of(0.0, 3)
    found = perturbation(truth, {"good": good, "none": none}, metrics="vcc2026")
    table = found.table
    assert table.loc["good", "pds_cosine"] > table.loc["none", "pds_cosine"]
    assert found.best("de_wilcoxon_lfc_nmae") == found.best("expr_mse_unbiased_capped_norm") == ["good"]
    from dataclasses import replace

    settings = replace(library.EvalConfig.from_preset("vcc2026"), pert_col="condition", control="ctrl")
    theirs = library.aggregate_metrics(library.compute_metrics(good, truth, config=settings)).to_dict(as_series=False)
    assert table.loc["good"].to_dict() == pytest.approx(dict(zip(theirs["metric"], theirs["mean"])), nan_ok=True)
