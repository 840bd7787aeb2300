"""The gradient screen: what it estimates, what it computes exactly, and that the two are never mixed in a test."""

import numpy as np
import pandas as pd
import pytest
import torch
from geneformer_golden import VERSIONS, cells, model
from test_geneformer_perturbation import QUESTION

from scellfm import statistics
from scellfm.core import OptionError, ScellfmWarning, StoreError
from scellfm.data.demonstration import demo
from scellfm.geneformer import Geneformer, RankTokenizer, Screen
from scellfm.geneformer.perturbation import edits as edits_module
from scellfm.geneformer.perturbation import gradient as gradient_module
from scellfm.geneformer.perturbation.edits import make_edits, run_edits
from scellfm.geneformer.perturbation.gradient import estimate_block, weighted_hidden
from scellfm.geneformer.perturbation.screen import standardize


@pytest.fixture(scope="module")
def pbmc():
    "Sixty monocytes and T cells with donors, and a small model with their vocabulary."
    adata = demo()
    adata = adata[adata.obs["cell_type"].isin(["CD14+ Monocyte", "CD8+ Cytotoxic T"])][:60].copy()
    adata.obs["donor"] = np.tile(["a", "b", "c"], 20)
    return adata, Geneformer.from_config("tiny", RankTokenizer.fit(adata, max_length=120), device="cpu")


@pytest.fixture(scope="module")
def screens(pbmc):
    "The exact screen and the gradient screen of the same twelve cells."
    adata, gf = pbmc
    exact = gf.perturb(adata, max_cells=12, **QUESTION)
    return exact, gf.perturb(adata, max_cells=12, gradient={"top": 15, "check_cells": 4}, **QUESTION)


def both(gf, given, index: int, budget: int = 16384):
    "Estimated and exact shifts to two states of all deletions of some cells."
    pool, given = "cls" if gf.special else "cell", gf.readable(given)
    edits = make_edits(given, "delete", None, None, gf.special, gf.max_length)
    states = torch.randn(2, gf.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    estimates = estimate_block(gf, given, edits, index, pool, states, budget)
    return estimates, run_edits(gf, given, edits, index, pool, states), edits


# the estimate
@pytest.mark.parametrize("version", VERSIONS)
def test_with_weights_of_one_the_reading_is_the_encoders(version):
    gf, tokens = model(version), torch.from_numpy(cells(version)[0].astype(np.int64))[None]
    parts = gf.model.bert.embeddings
    inputs = (
        parts.word_embeddings(tokens)
        + parts.position_embeddings.weight[: tokens.shape[1]]
        + parts.token_type_embeddings.weight[0]
    )
    for index in range(gf.n_layers + 1):
        ours = weighted_hidden(gf.model.bert, inputs, torch.zeros(tokens.shape), index)
        torch.testing.assert_close(ours, gf.hidden(tokens, None, index), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("index", [2, 3])
def test_estimates_follow_the_exact_shifts(pbmc, index):
    adata, gf = pbmc
    estimates, exact, edits = both(gf, gf.cells(adata[:5].copy()), index)
    for state in range(2):
        for cell in range(5):
            rows = edits.cell == cell
            assert np.corrcoef(estimates[rows, state], exact[rows, state])[0, 1] > 0.9
        slope = np.polyfit(estimates[:, state], exact[:, state], 1)[0]
        assert 0.8 < slope < 1.2


def test_the_weights_derivative_is_the_effect_of_a_removal_alone(pbmc):
    """Where all positions look alike a deletion is nothing but the removal of a token, and it is nearly linear."""
    adata, gf = pbmc
    alike = Geneformer.from_config("tiny", gf.tokenizer, device="cpu")
    with torch.no_grad():
        alike.model.bert.embeddings.position_embeddings.weight.zero_()
    estimates, exact, _ = both(alike, alike.cells(adata[:3].copy()), 2)
    assert np.corrcoef(estimates[:, 0], exact[:, 0])[0, 1] > 0.99


def test_estimates_with_cls_follow_the_exact_shifts():
    gf, given = model("v2"), cells("v2")
    estimates, exact, edits = both(gf, given[np.argsort(-given.lengths)[:4]], gf.n_layers - 1)
    within = [np.corrcoef(estimates[edits.cell == i, 0], exact[edits.cell == i, 0])[0, 1] for i in range(4)]
    assert np.median(within) > 0.7


def test_estimates_depend_on_the_cell_alone(pbmc):
    adata, gf = pbmc
    many, _, edits = both(gf, gf.cells(adata[:6].copy()), 2)
    other, _, _ = both(gf, gf.cells(adata[:6].copy()), 2, budget=150)
    np.testing.assert_allclose(many, other, atol=1e-6)
    golden = model("v1")  # cells of all lengths, padded in one batch
    together, _, where = both(golden, cells("v1")[:5], 2)
    for i in range(5):
        alone, _, _ = both(golden, cells("v1")[i : i + 1], 2)
        np.testing.assert_allclose(together[where.cell == i], alone, atol=1e-6)


def test_the_models_weights_and_mode_are_left_alone(pbmc):
    adata, gf = pbmc
    gf.model.train()
    before = {name: value.clone() for name, value in gf.model.state_dict().items()}
    first, _, _ = both(gf, gf.cells(adata[:2].copy()), 2)
    assert gf.model.bert.training and all(p.grad is None for p in gf.model.parameters())
    gf.model.eval()
    second, _, _ = both(gf, gf.cells(adata[:2].copy()), 2)
    np.testing.assert_array_equal(first, second)  # dropout was off
    assert all(torch.equal(before[name], value) for name, value in gf.model.state_dict().items())


# the screen
def test_leading_genes_and_checked_cells_are_exact_and_the_rest_estimates(screens):
    exact, screen = screens
    rows = screen.shifts.merge(exact.shifts, on=["gene", "cell", "donor", "group", "rank"], suffixes=("", "_true"))
    assert len(rows) == len(exact.shifts) == len(screen.shifts)
    states = ["", "_CD8+ Cytotoxic T", "_CD14+ Monocyte"]
    for state in states:
        np.testing.assert_allclose(
            rows.loc[rows["exact"], f"shift{state}"], rows.loc[rows["exact"], f"shift{state}_true"], atol=1e-6
        )
        assert (rows.loc[~rows["exact"], f"shift{state}"] == rows.loc[~rows["exact"], f"estimate{state}"]).all()
    assert (rows["shift"] - rows["shift_true"]).abs().max() > 1e-6
    whole = rows.groupby("cell")["exact"].all()
    assert whole.sum() == 4
    enough = rows.groupby("gene").size() >= 6
    leading = rows.groupby("gene")["estimate"].mean().abs()[enough].nlargest(15).index
    assert set(rows.loc[rows["exact"] & ~rows["cell"].isin(whole.index[whole]), "gene"]) <= set(leading)
    assert rows.loc[rows["gene"].isin(leading), "exact"].all()


def test_the_agreement_is_that_of_the_checked_cells(screens):
    exact, screen = screens
    report = screen.agreement.iloc[0]
    whole = screen.shifts.groupby("cell")["exact"].all()
    rows = screen.shifts[screen.shifts["cell"].isin(whole.index[whole])]
    within = [part["estimate"].corr(part["shift"], "spearman") for _, part in rows.groupby("cell")]
    assert report["spearman_cells"] == pytest.approx(np.median(within))
    means = rows.groupby("gene")[["shift", "estimate"]].mean()[rows.groupby("gene").size() >= 2]
    best, ours = (set(means[column].abs().nlargest(15).index) for column in ("shift", "estimate"))
    assert report["recall"] == pytest.approx(len(best & ours) / 15) and report["cells"] == 4
    assert report["recall"] > 4 * report["by_chance"] and report["by_chance"] == pytest.approx(15 / len(means))


def test_tests_are_made_of_estimates_alone(screens):
    _, screen = screens
    table, scaled = screen.table(), screen.shifts.assign(shift=screen.shifts["estimate"])
    scaled["shift"] = standardize(scaled)
    alone = statistics.screen_test(scaled[["gene", "cell", "donor", "rank", "shift"]])
    assert table["gene"].tolist() == alone["gene"].tolist()
    for column in ("effect", "z", "p", "fdr"):
        np.testing.assert_array_equal(table[column], alone[column])
    assert table["status"].str.endswith("(on estimates)").all()
    original = screen.table(method="goal_state_shift").set_index("gene")
    np.testing.assert_allclose(
        original["effect"], screen.shifts.groupby("gene")["estimate"].mean()[original.index], atol=1e-7
    )


def test_the_table_marks_what_is_exact(screens):
    exact, screen = screens
    table = screen.table().set_index("gene")
    true = exact.shifts.groupby("gene")["shift"].mean()
    assert 15 <= table["exact"].sum() < len(table) and table["mean_shift"].notna().equals(table["exact"])
    chosen = table.index[table["exact"]]
    np.testing.assert_allclose(table.loc[chosen, "mean_shift"], true[chosen], atol=1e-6)
    assert (table["estimated_shift"] - true[table.index]).abs().max() > 1e-6
    assert "exact" in repr(screen) and "exact" not in repr(exact) and not len(exact.agreement)


def test_a_gradient_screen_is_saved_and_comes_back(screens, tmp_path):
    _, screen = screens
    screen.save(tmp_path / "screen")
    loaded = Screen.load(tmp_path / "screen")
    pd.testing.assert_frame_equal(loaded.shifts, screen.shifts)
    pd.testing.assert_frame_equal(loaded.agreement, screen.agreement)
    pd.testing.assert_frame_equal(loaded.table(), screen.table())


def test_groups_and_models_are_estimated_apart(pbmc):
    adata, gf = pbmc
    second = Geneformer.from_config("tiny", gf.tokenizer, seed=1, device="cpu")
    adata = adata.copy()
    adata.obs["half"] = np.tile(["left", "right"], 30)
    adata.obs["side"] = np.repeat(["one", "two"], 30)
    from scellfm.geneformer import perturb

    asked = dict(state="half", start="left", goal="right", groupby="side", donor="donor", max_cells=5)
    model_of = (adata.obs["donor"] == "a").to_numpy().astype(int)
    screen = perturb([gf, second], adata, model_of=model_of, gradient={"top": 5, "check_cells": 2}, **asked)
    exact = perturb([gf, second], adata, model_of=model_of, **asked).shifts
    rows = screen.shifts.merge(exact, on=["gene", "cell", "group", "model"], suffixes=("", "_true"))
    assert len(rows) == len(exact) and set(rows["model"]) == {0, 1}
    np.testing.assert_allclose(rows.loc[rows["exact"], "shift"], rows.loc[rows["exact"], "shift_true"], atol=1e-6)
    assert list(screen.agreement["group"]) == screen.groups and (rows.groupby("group")["exact"].sum() > 0).all()
    assert min(part["estimate"].corr(part["shift_true"]) for _, part in rows.groupby("model")) > 0.85


@pytest.mark.parametrize("stop_at", ["estimates", "exact"])
def test_a_stopped_gradient_screen_goes_on_and_gives_the_same(pbmc, tmp_path, monkeypatch, stop_at):
    adata, gf = pbmc
    asked = dict(max_cells=4, gradient={"top": 5, "check_cells": 2}, **QUESTION)
    monkeypatch.setattr(edits_module, "BLOCK_EDITED", 6000)
    monkeypatch.setattr(edits_module, "BLOCK_ORIGINAL", 130)
    expected = gf.perturb(adata, **asked).shifts
    computed = []

    def counted(whole, limit):
        def compute(*arguments, **named):
            if len(computed) == limit:
                raise KeyboardInterrupt
            computed.append(1)
            return whole(*arguments, **named)

        return compute

    from scellfm.geneformer.perturbation import runner

    exact, estimate = edits_module.block_effects, gradient_module.estimate_block
    monkeypatch.setattr(runner, "estimate_block", counted(estimate, 2 if stop_at == "estimates" else None))
    monkeypatch.setattr(edits_module, "block_effects", counted(exact, 6 if stop_at == "exact" else None))
    with pytest.raises(KeyboardInterrupt):
        gf.perturb(adata, folder=tmp_path / "run", **asked)
    stopped = len(computed)
    monkeypatch.setattr(runner, "estimate_block", counted(estimate, None))
    monkeypatch.setattr(edits_module, "block_effects", counted(exact, None))
    resumed = gf.perturb(adata, folder=tmp_path / "run", **asked).shifts
    pd.testing.assert_frame_equal(resumed, expected)
    done = len(computed)
    gf.perturb(adata, folder=tmp_path / "run", **asked)
    assert len(computed) == done > stopped >= 2
    with pytest.raises(StoreError):
        gf.perturb(adata, folder=tmp_path / "run", max_cells=4, **QUESTION)


def test_an_estimate_that_misleads_is_told_of(pbmc, monkeypatch):
    adata, gf = pbmc
    from scellfm.geneformer.perturbation import runner

    def noise(gf, cells, edits, index, pool, states, *rest, **named):
        return np.random.default_rng(0).normal(size=(len(edits), len(states))).astype(np.float32)

    monkeypatch.setattr(runner, "estimate_block", noise)
    with pytest.warns(ScellfmWarning, match="raise top in gradient="):
        screen = gf.perturb(adata, max_cells=4, gradient={"top": 10, "check_cells": 2}, **QUESTION)
    assert screen.agreement["recall"].iloc[0] < 0.5 and abs(screen.agreement["spearman_cells"].iloc[0]) < 0.3


def test_out_of_memory_is_survived_by_estimates(pbmc, monkeypatch):
    adata, gf = pbmc
    asked = dict(max_cells=4, gradient={"top": 5, "check_cells": 2}, **QUESTION)
    expected, whole = gf.perturb(adata, **asked).shifts, gradient_module.weighted_hidden

    def small_card(bert, inputs, log_weight, index):
        if len(inputs) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return whole(bert, inputs, log_weight, index)

    monkeypatch.setattr(gradient_module, "weighted_hidden", small_card)
    with pytest.warns(ScellfmWarning, match="out of memory"):
        screen = gf.perturb(adata, **asked)
    np.testing.assert_allclose(screen.shifts["estimate"], expected["estimate"], atol=1e-5)
    assert screen.params["out_of_memory"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(gradient="first-order"), "gradient='first-order'"),
        (dict(gradient=True, kind="overexpress"), "exact"),
        (dict(gradient=True, genes=["CD3D"]), "all genes"),
        (dict(gradient=True, anchor="CD3D"), "anchor"),
        (dict(gradient={"top": 0}), "top=0"),
        (dict(gradient={"check_cells": 1}), "check_cells=1"),
        (dict(gradient={"most": 50}), "'top', 'check_cells'"),
    ],
)
def test_what_a_gradient_cannot_estimate_is_refused(pbmc, wrong, message):
    adata, gf = pbmc
    with pytest.raises(OptionError, match=message):
        gf.perturb(adata, **{**QUESTION, **wrong})
    with pytest.raises(OptionError, match="goal"):
        gf.perturb(adata, gradient=True)
