"""Screens, scores and reports as users met them: missing labels, absent genes, numbers and sentences that mislead."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy.sparse import csr_matrix

from scellfm.baselines import GroupMeans, LogNormalize, count_classifiers, holds_logs, is_logged
from scellfm.commands.inputs import write_table
from scellfm.commands.reports import add_map, add_screen, beside
from scellfm.core import DataError, ScellfmWarning, keyed_seed, tell
from scellfm.crossfit.baselines import baseline_predictions
from scellfm.crossfit.check import OverfitCheck
from scellfm.crossfit.evidence import Evidence
from scellfm.crossfit.membership import NEW, TrainedOn, count_contents
from scellfm.data.demonstration import demo
from scellfm.data.shifts import simulate_shifts
from scellfm.data.splits import check_leakage, folds, hold_out
from scellfm.geneformer import CellClassifier, Geneformer, RankTokenizer, Screen
from scellfm.geneformer.perturbation.combinations import ROUNDING
from scellfm.geneformer.tokenizer.tokenized import TokenizedCells
from scellfm.report import Report, scores_section
from scellfm.scgpt import ReferenceMap, ScGPT
from scellfm.scores.batches import integration
from scellfm.scores.labels import classification
from scellfm.scores.table import Scores
from scellfm.statistics import log2_fold_change, recovery, screen_test
from scellfm.statistics.screen import MIN_GENES
from scellfm.training import History

START, GOAL = "CD14+ Monocyte", "CD8+ Cytotoxic T"
QUESTION = dict(state="cell_type", start=START, goal=GOAL, donor="donor")


@pytest.fixture(scope="module")
def pbmc():
    "Ninety monocytes and T cells with three donors, and a tiny model with their vocabulary."
    adata = demo()
    adata = adata[adata.obs["cell_type"].isin([START, GOAL])][:90].copy()
    adata.obs["donor"] = np.tile(["a", "b", "c"], 30)
    adata.obs["tissue"] = np.tile(["blood", "marrow"], 45)
    return adata, Geneformer.from_config("tiny", RankTokenizer.fit(adata, max_length=48), device="cpu")


def with_gaps(adata, column: str, gone: np.ndarray, values=None):
    "A copy in which the cells `gone` have no value in a column."
    changed = adata.copy()
    values = changed.obs[column].astype(object).to_numpy() if values is None else values
    changed.obs[column] = pd.Series(np.where(gone, None, values), index=changed.obs_names, dtype=object)
    return changed


def warned(call) -> tuple:
    "(what a call returns, the texts of our warnings)."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(one.message) for one in caught if issubclass(one.category, ScellfmWarning)]


def common(adata, gf, n: int) -> list[str]:
    "The genes that most monocytes have."
    cells = gf.cells(adata[adata.obs["cell_type"] == START].copy())
    number = np.bincount(np.concatenate([cells[i] for i in range(len(cells))]))
    return [str(gf.tokenizer.genes[token]) for token in np.argsort(-number, kind="stable")[:n]]


# a missing label is no label
@pytest.mark.parametrize("column", ["donor", "tissue", "cell_type"])
def test_a_screen_of_cells_without_a_label_is_that_of_the_others(pbmc, column):
    adata, gf = pbmc
    gone = np.arange(90) % 3 == 0
    broken = with_gaps(adata, column, gone)
    ask = QUESTION | {"groupby": "tissue"}
    screen, said = warned(lambda: gf.perturb(broken, **ask))
    assert any("30 of 90 cells have no value of" in text and repr(column) in text for text in said)
    expected = gf.perturb(adata[~gone].copy(), **ask)
    pd.testing.assert_frame_equal(screen.shifts, expected.shifts)
    pd.testing.assert_frame_equal(screen.genes, expected.genes)


def test_cells_without_a_donor_are_no_donor(pbmc):
    adata, gf = pbmc
    gone = (adata.obs["donor"] == "c").to_numpy()
    screen = gf.perturb(with_gaps(adata, "donor", gone), **QUESTION)
    assert set(screen.shifts["donor"]) == {"a", "b"} and "2 donors" in repr(screen)
    table = screen.table()
    assert table["p"].isna().all() and table.loc[0, "status"].startswith("exploratory: 2 donors, 3 are needed")


def test_missing_values_are_not_chosen_by_their_text(pbmc):
    adata, gf = pbmc
    broken = with_gaps(adata, "tissue", np.arange(90) < 30)
    for wanted in ("nan", "None", np.nan):
        with pytest.raises(DataError, match="no cell has these values"):
            gf.perturb(broken, where={"tissue": wanted})
    with pytest.raises(DataError, match="no cell has cell_type='nan'"):
        gf.perturb(with_gaps(adata, "cell_type", np.arange(90) < 30), state="cell_type", start="nan", goal=GOAL)


def test_a_column_without_any_value_is_refused(pbmc):
    adata, gf = pbmc
    with pytest.raises(DataError, match="all 90 cells lack a value"):
        gf.perturb(with_gaps(adata, "donor", np.ones(90, dtype=bool)), **QUESTION)


def test_missing_made_text_is_warned_of(pbmc):
    adata, gf = pbmc
    broken = with_gaps(adata, "donor", np.arange(90) % 3 == 0)
    broken.obs["donor"] = broken.obs["donor"].astype(str).replace("None", "nan")
    _, said = warned(lambda: gf.perturb(broken, max_cells=2, **QUESTION))
    assert any("text 'nan' in 30 of 90 cells" in text for text in said)


def test_a_group_without_cells_to_perturb_is_named(pbmc):
    adata, gf = pbmc
    only = adata[(adata.obs["cell_type"] == GOAL) | (adata.obs["tissue"] == "blood")].copy()
    screen, said = warned(lambda: gf.perturb(only, groupby="tissue", max_cells=2, **QUESTION))
    assert screen.groups == ["blood"] and any("group 'marrow' has no cell" in text for text in said)


def test_fold_changes_leave_out_cells_without_a_donor_or_state(pbmc):
    adata, _ = pbmc
    gone = np.arange(90) % 3 == 0
    expected = log2_fold_change(adata[~gone].copy(), "cell_type", START, GOAL, donor="donor")
    found, said = warned(
        lambda: log2_fold_change(with_gaps(adata, "donor", gone), "cell_type", START, GOAL, donor="donor")
    )
    np.testing.assert_allclose(found, expected)
    assert any("30 of 90 cells" in text and "donor" in text for text in said)
    with pytest.raises(DataError, match="no cell has"):
        log2_fold_change(with_gaps(adata, "cell_type", gone), "cell_type", "None", GOAL)


def test_splits_refuse_missing_groups_and_strata():
    obs = pd.DataFrame(
        {"donor": ["a", "b", None, "c"] * 5, "type": ["T", None, "B", "B"] * 5}, index=list(map(str, range(20)))
    )
    for call in (
        lambda: hold_out(obs, by="donor"),
        lambda: folds(obs, by="donor"),
        lambda: hold_out(obs, stratify="type"),
        lambda: check_leakage(hold_out(obs), obs["donor"]),
    ):
        with pytest.raises(DataError, match="missing"):
            call()


# what was asked for and could not be done has a row
@pytest.mark.parametrize("method", ["matched", "goal_state_shift"])
def test_each_gene_that_was_asked_for_has_a_row_with_a_status(pbmc, method):
    adata, gf = pbmc
    genes = common(adata, gf, 3)
    without = adata.copy()
    counts = without.X.toarray()
    counts[:, without.var_names.get_loc(genes[1])] = 0
    without.X = csr_matrix(counts)
    ask = dict(genes=[*genes, "NOSUCHGENE"], combine="each", max_cells=20, **QUESTION)
    screen, said = warned(lambda: gf.perturb(without, **ask))
    table = screen.table(method=method).set_index("gene")
    assert set(table.index) == {*genes, "NOSUCHGENE"}
    assert table.loc[genes[1], "status"].startswith("in none of the ") and table.loc[genes[1], "n_cells"] == 0
    assert table.loc["NOSUCHGENE", "status"] == "not in the model's vocabulary"
    assert any(genes[1] in text and "NOSUCHGENE" in text for text in said)
    assert screen.table(method=method)["gene"].tolist()[-2:] == [genes[1], "NOSUCHGENE"]


def test_absent_genes_stay_after_saving_and_in_a_group_that_has_none_of_them(pbmc, tmp_path):
    adata, gf = pbmc
    gene = common(adata, gf, 1)[0]
    counts = adata.X.toarray()
    counts[(adata.obs["tissue"] == "marrow").to_numpy(), adata.var_names.get_loc(gene)] = 0
    changed = adata.copy()
    changed.X = csr_matrix(counts)
    screen = gf.perturb(changed, genes=[gene], combine="each", groupby="tissue", **QUESTION)
    screen.save(tmp_path / "screen")
    for one in (screen, Screen.load(tmp_path / "screen")):
        table = one.table()
        assert table["group"].tolist() == ["blood", "marrow"]
        assert table["status"].iloc[1].startswith("in none of the ") and np.isnan(table["mean_shift"].iloc[1])


def test_absent_targets_follow_the_tested_ones_and_come_before_their_controls(pbmc):
    adata, gf = pbmc
    genes = common(adata, gf, 2)
    screen = gf.perturb(adata, genes=[*genes, "NOSUCHGENE"], matched=20, **QUESTION)
    table = screen.table()
    assert set(table["gene"].iloc[:2]) == set(genes) and table["gene"].iloc[2] == "NOSUCHGENE"
    assert table["target"].tolist() == [True] * 3 + [False] * (len(table) - 3)


def test_each_pair_that_was_asked_for_has_a_row(pbmc):
    adata, gf = pbmc
    first, second = common(adata, gf, 2)
    counts = adata.X.toarray()
    places = [adata.var_names.get_loc(gene) for gene in (first, second)]
    counts[::2, places[0]] = 0
    counts[1::2, places[1]] = 0
    changed = adata.copy()
    changed.X = csr_matrix(counts)
    screen = gf.perturb(changed, genes=[first, second, common(adata, gf, 3)[2]], combine="pairs", **QUESTION)
    pair = f"{first}+{second}"
    for table in (screen.table(), screen.combinations()):
        assert table.set_index("gene").loc[pair, "status"].startswith("in none of the ")


def test_genes_perturbed_together_that_no_cell_has_are_named_with_the_way_out(pbmc):
    adata, gf = pbmc
    genes = common(adata, gf, 2)
    without = adata.copy()
    counts = without.X.toarray()
    counts[:, without.var_names.get_loc(genes[0])] = 0
    without.X = csr_matrix(counts)
    with pytest.raises(DataError, match=f"{genes[0]} in none.*combine='each'"):
        gf.perturb(without, genes=genes, **QUESTION)


# a short list has nothing to be compared with
def test_effects_of_a_short_list_are_empty_and_the_status_says_what_to_add(pbmc):
    adata, gf = pbmc
    genes = common(adata, gf, 3)
    whole = gf.perturb(adata, **QUESTION)
    for combine, more in (("each", "matched=50"), ("pairs", "matched=50"), ("joint", "combine='each', matched=50")):
        table = gf.perturb(adata, genes=genes, combine=combine, **QUESTION).table()
        assert table[["effect", "expected", "z", "percentile", "p"]].isna().all().all()
        assert table["mean_shift"].notna().all()
        shown = table[~table["gene"].str.contains("+", regex=False) | (combine == "joint")]
        shown = shown[shown["status"] != "too few cells"]
        assert (
            shown["status"].str.contains(f"{MIN_GENES} are needed").all() and shown["status"].str.contains(more).all()
        )
    expected = whole.shifts.groupby("gene")["shift"].mean()
    table = gf.perturb(adata, genes=genes, combine="each", **QUESTION).table()
    np.testing.assert_allclose(table["mean_shift"], expected[table["gene"]], atol=1e-6)
    matched = gf.perturb(adata, genes=genes, matched=50, **QUESTION).table()
    assert matched.loc[matched["target"], "effect"].notna().all()


# rounding is no movement
def simulated(**changes) -> Screen:
    "A screen of simulated shifts of 200 genes with one driver in twenty."
    shifts = simulate_shifts(n_genes=200, n_donors=4, cells_per_donor=30, drivers=0.05, seed=1, **changes)
    shifts = shifts.astype({"gene": str, "cell": str, "donor": str}).assign(group="all")
    genes = shifts[["group", "gene"]].drop_duplicates().assign(log2fc=np.nan)
    return Screen(shifts, genes.assign(symbol=genes["gene"]), {"kind": "delete"})


def test_a_mean_shift_within_rounding_has_no_effect_and_no_p():
    screen = simulated()
    before = screen.table().set_index("gene")
    still = before.index[0]
    rows = screen.shifts["gene"] == still
    sign = np.where(np.arange(rows.sum()) % 2, 1.0, -1.0)
    screen.shifts.loc[rows, "shift"] = 0.9 * ROUNDING * sign
    table = screen.table().set_index("gene")
    assert table.loc[still, ["effect", "expected", "z", "p", "fdr", "percentile"]].isna().all()
    assert table.loc[still, "status"].startswith("rounding")
    assert not table.loc[still:, "status"].str.startswith("tested").any()
    assert table["p"].notna().sum() == before["p"].notna().sum() - 1


def test_an_untrained_model_read_at_cls_moves_nothing_and_says_so(pbmc):
    adata, _ = pbmc
    gf = Geneformer.from_config("V1-10M", RankTokenizer.fit(adata, max_length=48, special=True), device="cpu")
    small = adata[:8].copy()
    screen, said = warned(lambda: gf.perturb(small, state="cell_type", start=START, goal=GOAL))
    mean = screen.shifts.groupby("gene")["shift"].mean().abs()
    table = screen.table().set_index("gene")
    within = table.index[mean[table.index] < ROUNDING]
    assert len(within) and table.loc[within, ["effect", "z", "p"]].isna().all().all()
    assert table.loc[within, "status"].str.startswith("rounding").all()
    assert any("is rounding" in text for text in said) == ((mean < ROUNDING).mean() > 0.5)


# evidence first
@pytest.mark.parametrize("donors", [True, False])
def test_genes_that_cannot_be_tested_follow_those_that_are(donors):
    screen = simulated()
    rare = screen.shifts["gene"].isin(sorted(screen.shifts["gene"].unique())[:20])
    first = screen.shifts.groupby("gene").cumcount() == 0
    screen.shifts = screen.shifts[~rare | first].copy()
    screen.shifts.loc[rare & first, "shift"] = -12.0
    if not donors:
        screen.shifts["donor"] = np.nan
    for table in (screen.table(), screen_test(screen.shifts)):
        few = (table["status"] == "too few cells").to_numpy()
        assert few.sum() >= 20 and few[-few.sum() :].all() and not few[0]
    original = screen.table(method="goal_state_shift")
    assert (
        "status" not in original
        and original["effect"].iloc[np.flatnonzero(original["fdr"] >= 0.05)].is_monotonic_decreasing
    )


# scores
def constant_and_good() -> Scores:
    "A classifier that is good, and one that says the same of every cell and happens to be calibrated."
    truth = np.tile([0, 0, 0, 1], 60)
    good = np.where(np.eye(2)[np.where(np.arange(240) % 10 == 0, 1 - truth, truth)] > 0, 0.7, 0.3)
    donors = np.repeat(list("abcd"), 60)
    results = {
        name: classification(truth, values, [0, 1], groups=donors)
        for name, values in (("model (held out)", good), ("prior", np.tile([0.75, 0.25], (240, 1))))
    }
    parts = [pd.DataFrame({n: getattr(r, part) for n, r in results.items()}).T for part in ("metrics", "low", "high")]
    return Scores(parts[0], low=parts[1], high=parts[2], details=results)


def test_a_constant_prediction_is_never_best_calibrated():
    scores = constant_and_good()
    assert scores.table.loc["prior", "calibration_error"] == 0
    again = Scores.from_dict(json.loads(json.dumps(scores.to_dict())))
    for one in (scores, again):
        assert one.best("calibration_error") == ["model (held out)"] and "**0.000**" not in one.to_markdown()


def test_every_interval_holds_its_estimate_or_is_empty():
    table = pd.DataFrame({"auroc": [0.5, 0.9], "calibration_error": [0.0, 0.2]}, index=["a", "b"])
    low = pd.DataFrame({"auroc": [0.4, 0.91], "calibration_error": [0.003, 0.1]}, index=["a", "b"])
    scores = Scores(table, low=low, high=low + 0.2)
    assert scores.low.notna().to_numpy().tolist() == [[True, False], [False, True]]
    assert scores.high.notna().equals(scores.low.notna())
    generator = np.random.default_rng(0)
    for n in (20, 60):
        truth = generator.integers(0, 3, n)
        values = generator.dirichlet([1, 1, 1], n)
        result = classification(np.array(list("abc"))[truth], values, list("abc"), n_boot=50)
        for name, value in result.metrics.items():
            low, high = result.low[name], result.high[name]
            assert (np.isnan(low) and np.isnan(high)) or low <= value <= high


def test_intervals_of_recovery_hold_their_estimates():
    table = simulated().table()
    found = recovery(table, list(table["gene"].head(6)), n_boot=50)
    for metric in ("auroc", "average_precision"):
        inside = (found[f"{metric}_low"] <= found[metric]) & (found[metric] <= found[f"{metric}_high"])
        assert (inside | found[f"{metric}_low"].isna()).all()


# reports say what happened
def page_of(screen: Screen, **more) -> str:
    "The report of a screen."
    report = Report("Screen")
    add_screen(report, screen, screen.table(**more))
    return report.to_html()


def test_a_report_gives_the_reason_that_the_test_gave(pbmc):
    adata, gf = pbmc
    few = gf.perturb(adata, genes=common(adata, gf, 3), combine="each", **QUESTION)
    assert "too few donors" not in page_of(few) and "no donors" not in page_of(few)
    assert "3 genes screened, 100 are needed" in page_of(few)
    alone = simulated()
    alone.shifts["donor"] = np.nan
    assert "Exploratory, without p-values: no donors" in page_of(alone)
    assert "Exploratory" not in page_of(simulated())


def test_a_report_shows_a_gene_that_is_not_there_however_long_the_table(pbmc):
    adata, gf = pbmc
    genes = [*common(adata, gf, 60), "NOSUCHGENE"]
    page = page_of(gf.perturb(adata, genes=genes, combine="each", max_cells=3, **QUESTION))
    assert "NOSUCHGENE" in page and "not in the model&#x27;s vocabulary" in page


def test_a_report_speaks_of_intervals_only_where_there_are_some():
    table = pd.DataFrame({"auroc": [0.5]}, index=["a"])
    assert "interval" not in scores_section(Scores(table))
    assert "with 95 % intervals" in scores_section(Scores(table, low=table - 0.1, high=table + 0.1))
    assert beside(Scores(table)) == "" and beside(constant_and_good()) == ", beside simple methods"
    lonely = classification([0, 1] * 10, np.tile([0.5, 0.5], (20, 1)), [0, 1], n_boot=0)
    assert "no intervals" in lonely._repr_html_()


def test_the_picture_of_a_map_counts_the_cells_that_it_does_not_name():
    generator = np.random.default_rng(0)
    obs = pd.DataFrame({"cell_type": np.tile(["B", "T"], 50)}, index=[f"c{i}" for i in range(100)])
    cells = AnnData(np.zeros((100, 1), np.float32), obs=obs, obsm={"X": generator.normal(size=(100, 3))})
    reference = ReferenceMap(cells, "X", k=5, min_confidence=1.0)
    scores = reference.evaluate(cells, baselines=False)
    reference.transfer(cells)
    unknown = int((cells.obs["cell_type_transferred"] == "unknown").sum())
    confusion = scores.details["X"]["transferred"]
    assert 0 < unknown == confusion["unknown"].sum() and confusion.to_numpy().sum() == 100
    report = Report("Map")
    add_map(report, reference, cells.obs[["cell_type_transferred", "cell_type_confidence"]], scores)
    page = report.to_html()
    assert f"{unknown} of 100 cells are unknown" in page and "beside simple methods" not in page


def test_calibration_refuses_cells_without_a_group():
    obs = pd.DataFrame({"cell_type": ["B", "T"] * 20, "donor": ["a", "b", "c", None] * 10})
    cells = AnnData(np.zeros((40, 1), np.float32), obs=obs.set_axis([f"c{i}" for i in range(40)]))
    cells.obsm["X"] = np.random.default_rng(0).normal(size=(40, 2))
    with pytest.raises(DataError, match="missing"):
        ReferenceMap(cells, "X", k=3).calibrate(by="donor")


# foreign text
HOSTILE = "<img src=x onerror=alert(1)>"


def test_html_of_records_is_escaped():
    table = pd.DataFrame({HOSTILE: [0.5]}, index=[HOSTILE])
    evidence = Evidence(scores=Scores(table, title=HOSTILE), overfit_check=OverfitCheck(True, 0.0, HOSTILE, [HOSTILE]))
    split = hold_out(pd.DataFrame({HOSTILE: list("abcd") * 3}, index=list(map(str, range(12)))), by=HOSTILE)
    result = classification([HOSTILE, "b"] * 5, np.tile([0.6, 0.4], (10, 1)), [HOSTILE, "b"], n_boot=2)
    report = Report(HOSTILE, HOSTILE)
    report.add_table(table, HOSTILE, HOSTILE)
    report.add_warnings(HOSTILE)
    report.add_settings({HOSTILE: HOSTILE})
    for page in (evidence._repr_html_(), split._repr_html_(), result._repr_html_(), report.to_html()):
        assert "<img src=x" not in page


def test_a_csv_holds_no_formulas_and_takes_any_text(tmp_path):
    names = ["=cmd|' /C calc'!A0", "+1+cmd", "@SUM(A1)", "-2+3", "-1.5", "cell \ud800", "plain"]
    table = pd.DataFrame({"label": names, "shift": -1.0}, index=pd.Index(names, name="cell"))
    write_table(table, tmp_path / "labels.csv")
    text = (tmp_path / "labels.csv").read_text(encoding="utf8")
    found = pd.read_csv(tmp_path / "labels.csv")
    assert not found["label"].str.match(r"[=+@\t\r]").any() and found["shift"].eq(-1).all()
    assert "'-2+3" in text and "\n-1.5,-1.5,-1.0" in text and "\\ud800" in text
    assert list(table["label"]) == names


def test_messages_and_keys_take_any_text(capsys):
    tell("\x1b[31mred\ud800")
    assert "\x1b" not in capsys.readouterr().err
    assert keyed_seed(0, "cell \ud800") != keyed_seed(0, "cell \ud801") and keyed_seed(0, "é") == keyed_seed(0, "é")


# a model that was never trained
def test_an_untrained_geneformer_says_so_until_it_is_trained(pbmc, tmp_path):
    adata, _ = pbmc
    gf = Geneformer.from_config("tiny", RankTokenizer.fit(adata, max_length=24), device="cpu")
    gf.save_pretrained(tmp_path / "random")
    again = Geneformer.from_pretrained(tmp_path / "random", device="cpu")
    for one in (gf, again):
        assert one.untrained and "never trained" in repr(one)
        screen, said = warned(lambda one=one: one.perturb(adata[:4].copy()))
        assert sum("never trained" in text for text in said) == 1
        assert "never trained" in page_of(screen)
        assert not any("never trained" in text for text in warned(lambda one=one: one.embed(adata[:4].copy()))[1])
    classifier = again.finetune(adata, "cell_type", split=hold_out(adata, stratify="cell_type"), n_boot=0)
    assert not classifier.models[0].untrained and again.untrained
    again.pretrain(adata, epochs=1)
    again.save_pretrained(tmp_path / "trained")
    trained = Geneformer.from_pretrained(tmp_path / "trained", device="cpu")
    assert not again.untrained and not trained.untrained and "never trained" not in repr(trained)
    assert not any("never trained" in text for text in warned(lambda: trained.embed(adata[:4].copy()))[1])


def test_an_untrained_scgpt_says_so_until_it_is_trained(pbmc, tmp_path):
    adata, _ = pbmc
    gpt = ScGPT.from_config("tiny", adata, device="cpu")
    gpt.save_pretrained(tmp_path / "random")
    again = ScGPT.from_pretrained(tmp_path / "random", device="cpu")
    for one in (gpt, again):
        assert "never trained" in repr(one)
        assert sum("never trained" in text for text in warned(lambda one=one: one.embed(adata[:4].copy()))[1]) == 1
        assert not any("never trained" in text for text in warned(lambda one=one: one.embed(adata[:4].copy()))[1])
    trained = again.continue_pretraining(adata, epochs=1, max_length=64)
    assert not trained.untrained and "never trained" not in repr(trained) and again.untrained


# one logarithm
def test_baselines_take_one_logarithm_and_say_so_once():
    adata = demo()
    counts = csr_matrix(adata.X)
    logs = LogNormalize().fit_transform(counts)
    codes = np.unique(adata.obs["cell_type"], return_inverse=True)[1]
    parts = folds(adata, k=3).folds()

    def run(matrix):
        estimators = count_classifiers(0, logged=is_logged(matrix))
        return baseline_predictions(estimators, matrix, codes, parts, n_classes=codes.max() + 1)

    by_counts, said = warned(lambda: run(counts))
    assert not said
    by_logs, said = warned(lambda: run(logs))
    assert len(said) == 1 and "used unchanged" in said[0]
    for name, expected in by_counts.items():
        np.testing.assert_allclose(by_logs[name].held_out()[1], expected.held_out()[1], atol=1e-5)
    alone = baseline_predictions(count_classifiers(0), logs, codes, parts, n_classes=codes.max() + 1)
    for name, expected in by_logs.items():
        np.testing.assert_array_equal(alone[name].held_out()[1], expected.held_out()[1])


def test_what_is_scaled_and_not_logged_is_logged_once():
    counts = csr_matrix(np.random.default_rng(0).poisson(3, (30, 40)).astype(float))
    scaled = csr_matrix(1e6 * counts.toarray() / counts.toarray().sum(1, keepdims=True))
    assert not holds_logs(scaled) and not holds_logs(counts) and holds_logs(np.log1p(scaled))
    a, b = (LogNormalize().fit_transform(matrix).toarray() for matrix in (counts, scaled))
    np.testing.assert_allclose(a, b)


def test_a_missing_group_has_no_mean_of_its_own():
    groups = np.array(["a", None, "a", None, "b"], dtype=object)
    means = GroupMeans().fit(groups, np.array([1.0, 50.0, 3.0, 70.0, 9.0]))
    assert means.predict(np.array(["a", "b", None, "c"], dtype=object)).tolist() == [2.0, 9.0, 26.6, 26.6]


def test_what_integration_cannot_do_without_counts_names_the_way_out(pbmc):
    adata = pbmc[0].copy()
    adata.X = csr_matrix(np.log1p(adata.X.toarray()))
    adata.obsm["X"] = np.random.default_rng(0).normal(size=(90, 4))
    with pytest.raises(DataError, match="baselines=False"):
        integration(adata, "X", label="cell_type")


# the same name is not the same cell
def test_the_content_of_a_cell_is_its_counts_by_gene_name():
    counts = np.random.default_rng(0).poisson(0.7, (12, 9))
    names = [f"ENSG{i:011d}" for i in range(9)]
    one = AnnData(csr_matrix(counts.astype(np.float32)), var=pd.DataFrame(index=names))
    order = np.random.default_rng(1).permutation(9)
    others = [
        AnnData(counts[:, order].astype(np.int64), var=pd.DataFrame(index=[f"{names[i]}.3" for i in order])),
        AnnData(np.c_[counts, np.zeros(12)], var=pd.DataFrame(index=[*names, "ENSG00000099999"])),
        AnnData(counts.astype(float), var=pd.DataFrame({"ensembl_id": names}, index=[f"g{i}" for i in range(9)])),
    ]
    split = counts.copy()
    split[:, 0] //= 2
    halves = AnnData(np.c_[split, counts[:, 0] - split[:, 0]].astype(float), var=pd.DataFrame(index=[*names, names[0]]))
    content = count_contents(one)
    for other in (*others, halves):
        np.testing.assert_array_equal(count_contents(other), content)
    full = counts.sum(1) > 0
    assert (count_contents(AnnData(2.0 * counts, var=one.var)) != content)[full].all()
    assert len(set(content[full])) == len(np.unique(counts[full], axis=0))


def test_a_known_name_with_another_content_is_new_and_counted():
    names, content = [str(i) for i in range(6)], np.arange(10, 16, dtype=np.uint64)
    parts = folds(pd.DataFrame(index=names), k=2).folds()
    record = TrainedOn.of(names, parts, contents={"counts": content})
    changed = content.copy()
    changed[:4] += np.uint64(100)
    fold, said = warned(lambda: record.fold_of(names, {"counts": changed}))
    assert (fold[:4] == NEW).all() and (fold[4:] >= 0).all()
    assert len(said) == 1 and "4 of 6 cells have the name" in said[0]
    fold, said = warned(lambda: record.fold_of(names, {"counts": content}))
    assert (fold >= 0).all() and not said


def test_a_record_without_contents_matches_by_name_and_says_so(tmp_path):
    names = [str(i) for i in range(6)]
    parts = folds(pd.DataFrame(index=names), k=2).folds()
    TrainedOn.of(names, parts).save(tmp_path)
    fold, said = warned(lambda: TrainedOn.load(tmp_path).fold_of(names, {"counts": np.zeros(6, np.uint64)}))
    assert (fold >= 0).all() and "by their names alone" in said[0]


def test_other_cells_of_the_same_names_are_never_called_held_out(pbmc, tmp_path):
    adata, gf = pbmc
    cells = adata.copy()
    cells.obs_names = [str(i) for i in range(90)]
    split = folds(cells, k=2, stratify="cell_type")
    trained = gf.finetune(cells, "cell_type", split=split, n_boot=0)
    trained.save_pretrained(tmp_path / "classifier")
    others = demo()[400:450].copy()
    others.obs_names = [str(i) for i in range(50)]
    own = cells[:20].copy()
    for classifier in (trained, CellClassifier.from_pretrained(tmp_path / "classifier", device="cpu")):
        for data in (others, classifier.models[0].cells(others)):
            _, said = warned(lambda classifier=classifier, data=data: classifier.probabilities(data))
            assert any("50 of 50 cells have the name" in text for text in said)
        for ask in (classifier.probabilities, classifier.model_of):
            _, said = warned(lambda ask=ask: ask(own))
            assert not any("have the name" in text or "names alone" in text for text in said)
        doubled = own.copy()
        doubled.X = doubled.X * 2
        result, said = warned(lambda classifier=classifier, data=doubled: classifier.predict(data, copy=True))
        assert any("20 of 20 cells have the name" in text for text in said) and result.n_obs == 20
    old = TrainedOn.load(tmp_path / "classifier")
    TrainedOn(old.keys, old.fold).save(tmp_path / "classifier")
    again = CellClassifier.from_pretrained(tmp_path / "classifier", device="cpu")
    fold, said = warned(lambda: again.model_of(own))
    assert (fold == trained.model_of(own)).all() and any("by their names alone" in text for text in said)


def test_html_of_cells_and_curves_is_escaped():
    cells = TokenizedCells(
        np.arange(3, dtype=np.uint16), np.arange(4), pd.DataFrame({HOSTILE: list("abc")}), np.arange(3)
    )
    history = History.from_dict(json.loads(json.dumps(History().to_dict())))
    history.baselines = {HOSTILE: 1.0}
    for page in (cells._repr_html_(), history._repr_html_()):
        assert "<img src=x" not in page and "&lt;img" in page
