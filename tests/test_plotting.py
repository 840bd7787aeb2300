"""Figures: they say what the table says, return the axes, and leave the session as it was."""

import io
import warnings

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.collections import PathCollection

import scellfm as sf
from scellfm import plotting
from scellfm.core import DataError, ScellfmWarning
from scellfm.scores.labels import classification
from scellfm.scores.table import Scores
from scellfm.statistics import screen_test


@pytest.fixture(autouse=True)
def nothing_left_behind():
    before = {key: matplotlib.rcParams[key] for key in plotting.STYLE}
    yield
    plt.close("all")
    assert {key: matplotlib.rcParams[key] for key in plotting.STYLE} == before


@pytest.fixture(scope="module")
def tables():
    shifts = sf.data.simulate_shifts(n_genes=200, n_donors=4, cells_per_donor=60, drivers=0.05, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScellfmWarning)  # drivers make heavy tails
        tested = screen_test(shifts)
    alone = screen_test(shifts.drop(columns="donor"))
    for table in (tested, alone):
        table["symbol"] = "S" + table["gene"].str[-3:]
    return tested, alone


@pytest.fixture(scope="module")
def results():
    generator = np.random.default_rng(0)
    classes, found = np.array(["a", "b", "c"]), {}
    truth = generator.integers(0, 3, 200)
    for name, skill in (("model", 2.0), ("simple", 1.0)):
        values = np.exp(generator.normal(size=(200, 3)) + skill * np.eye(3)[truth])
        found[name] = classification(classes[truth], values / values.sum(1, keepdims=True), classes, n_boot=20)
    return found


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_screen_names_the_hits_and_counts_them(tables):
    table, _ = tables
    hits = table[table["fdr"] < 0.05]
    ax = plotting.screen(table)
    assert f"{len(hits)} outliers" in ax.get_title(loc="left")
    assert set(texts(ax)) <= set(hits["symbol"]) and len(texts(ax)) >= min(len(hits), 15) // 2
    assert hits.iloc[0]["symbol"] in texts(ax)
    dots = np.vstack(
        [c.get_offsets() for c in ax.collections if len(c.get_offsets()) and c.get_label().startswith("hits")]
    )
    assert sorted(dots[:, 1].round(9)) == sorted(hits["effect"].round(9))


def test_screen_without_donors_has_no_hits(tables):
    ax = plotting.screen(tables[1], n_labels=6)
    assert "exploratory" in ax.get_title(loc="left") and len(texts(ax)) <= 6
    assert not any("hits" in text.get_text() for text in ax.get_legend().get_texts())


def test_labels_do_not_overlap(tables):
    ax = plotting.screen(tables[0])
    ax.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) > 3
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_top_genes_are_ordered_by_evidence_with_fold_changes(tables):
    table = tables[0].assign(log2fc=1.5)
    ax = plotting.top_genes(table, n=5)
    order = table.loc[table["z"].abs().sort_values(ascending=False).index, "symbol"].head(5).tolist()
    assert [label.get_text() for label in ax.get_yticklabels()] == order
    assert texts(ax).count("+1.50") == 5 and {"FDR", "log2FC", "donors", "cells"} <= set(texts(ax))
    assert "percentile" in texts(plotting.top_genes(tables[1]))


def test_a_screen_of_the_originals_statistics_is_refused():
    with pytest.raises(DataError, match="expected"):
        plotting.screen(pd.DataFrame({"gene": ["a"], "effect": [1.0]}))
    assert not plt.get_fignums()


def test_confusion_writes_cells_and_numbers_long_names(results):
    frame = results["model"].confusion
    ax = plotting.confusion(frame)
    assert sorted(texts(ax)) == sorted(str(v) for v in frame.to_numpy().ravel() if v)
    long = frame.rename(index=lambda c: c * 15, columns=lambda c: c * 15)
    assert [label.get_text() for label in plotting.confusion(long).get_xticklabels()] == ["1", "2", "3"]


def test_roc_has_the_area_it_claims(results):
    wrong, right = plotting.roc_points(results["model"], 1)
    assert np.trapezoid(right, wrong) == pytest.approx(results["model"].per_class["auroc"]["b"])
    ax = plotting.roc(results)
    for line, result in zip(ax.get_lines()[1:], results.values()):
        assert np.trapezoid(line.get_ydata(), line.get_xdata()) == pytest.approx(result.metrics["auroc"], abs=2e-3)
        assert f"{result.metrics['auroc']:.3f}" in line.get_label()
    assert len(plotting.roc(results["model"]).get_lines()) == 4  # one class each, and chance


def test_calibration_shows_the_bins(results):
    ax = plotting.calibration(results)
    shown = ax.get_lines()[1].get_xydata()
    assert np.allclose(shown, results["model"].calibration[["confidence", "accuracy"]])


def test_results_without_cells_are_refused():
    with pytest.raises(DataError, match="nothing to draw"):
        plotting.roc({"model": {"metrics": {}}})


def test_scores_dots_lie_where_the_table_says():
    table = pd.DataFrame({"auroc": [0.8, 0.99], "mse": [20.0, 10.0]}, index=["model", "model (training cells)"])
    ax = Scores(table, low=table * 0.9, high=table * 1.1, title="t").plot()
    dots = [c.get_offsets()[:, 0] for c in ax.collections if isinstance(c, PathCollection)]
    assert np.allclose(dots[0], [0.8 / 1, 20 / 22]) and "÷ 22" in ax.get_yticklabels()[1].get_text()


def test_a_long_title_does_not_stretch_the_picture():
    table = pd.DataFrame({"auroc": [0.8]}, index=["model"])
    short, long = (
        plotting.png(Scores(table, title=title).plot().figure)
        for title in ("cell_type", "cell_type: " + ", ".join(f"type {i}" for i in range(99)))
    )
    widths = [int.from_bytes(picture[16:20], "big") for picture in (short, long)]
    assert widths[1] < 1.2 * widths[0]


def test_training_curves_take_a_history_and_a_table():
    from scellfm.training import History

    history = History(
        [(i + 1, i // 5, 2.0 - i / 10, 1e-3, 1.0) for i in range(10)],
        [{"epoch": e, "train_loss": 1.8 - e, "valid_loss": 1.9 - e} for e in range(2)],
        best=1,
        baselines={"mean": 2.5},
    )
    lines = {line.get_label(): line for line in plotting.training_curves(history).get_lines()}
    assert list(lines) == ["train, each step", "train", "valid", "kept", "mean"]
    assert lines["valid"].get_xdata().tolist() == [5, 10] and lines["kept"].get_xdata()[0] == 10
    tidy = pd.DataFrame(
        {"epoch": [0, 1, 0, 1], "split": ["train", "train", "valid", "valid"], "loss": [3.0, 2, 3, 2.5]}
    )
    assert len(plotting.training_curves(tidy).get_lines()) == 2
    assert len(plotting.training_curves(History()).get_lines()) == 0
    with pytest.raises(DataError, match="split"):
        plotting.training_curves(tidy.drop(columns="split"))


def cells(n=120, dims=2):
    import anndata

    generator = np.random.default_rng(0)
    adata = anndata.AnnData(np.zeros((n, 1), np.float32))
    adata.obsm["X_model"] = generator.normal(size=(n, dims))
    adata.obs["type"] = pd.Categorical([f"t{i % 12}" for i in range(n)])
    adata.obs["score"] = generator.normal(size=n)
    return adata


def test_embedding_shows_every_cell_once_and_every_class():
    adata = cells()
    adata.obs["type"] = adata.obs["type"].where(np.arange(120) != 0)
    ax = plotting.embedding(adata, "model", "type")
    drawn = np.vstack([c.get_offsets() for c in ax.collections if len(c.get_offsets()) > 0])
    drawn = drawn[np.isfinite(drawn).all(1)]
    assert {tuple(p) for p in drawn.round(9)} == {tuple(p) for p in adata.obsm["X_model"].round(9)} and len(
        drawn
    ) == 120
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [*adata.obs["type"].cat.categories, "none"]


def test_embedding_of_many_dimensions_shows_components_and_numbers():
    adata = cells(dims=5)
    ax = plotting.embedding(adata, "X_model", "score")
    assert "component 1 of X_model" in ax.get_xlabel() and len(ax.figure.axes) == 2
    adata.obsm["X_model"][3] = np.nan  # a cell without an embedding
    plotting.embedding(adata, "X_model")


def test_embedding_names_what_is_missing():
    for basis, color, message in (("X_umap", None, "X_model"), ("model", "donor", "'type'")):
        with pytest.raises(DataError, match=message):
            plotting.embedding(cells(), basis, color)
    assert not plt.get_fignums()


def test_given_axes_are_used_and_returned(tables, results):
    figure, axes = plt.subplots(2, 2)
    assert (
        plotting.screen(tables[0], ax=axes[0, 0]) is axes[0, 0] and plotting.roc(results, ax=axes[0, 1]) is axes[0, 1]
    )
    assert (
        plotting.top_genes(tables[0], ax=axes[1, 0]) is axes[1, 0]
        and plotting.embedding(cells(), "model", ax=axes[1, 1]) is axes[1, 1]
    )
    assert plt.get_fignums() == [figure.number]


def test_small_pictures_keep_their_colours():
    ax = plotting.embedding(cells(), "model", "type")
    raw = io.BytesIO()
    ax.figure.savefig(raw, format="png", dpi=80, bbox_inches="tight", facecolor="white")
    from PIL import Image

    small = Image.open(io.BytesIO(plotting.png(ax.figure))).convert("RGB")
    full = Image.open(raw).convert("RGB")
    assert (
        np.abs(np.asarray(small, int) - np.asarray(full, int)).max() < 40
        and len(plotting.png(ax.figure)) < len(raw.getvalue()) / 2
    )
