"A search for settings never touches the held-out cells, repeats itself, resumes, and says what it found."

import json
import sys

import pytest

from scellfm.core import DataError, DivergedError, ExtraError, OptionError, ScellfmWarning
from scellfm.data.cells import simulate_cells
from scellfm.data.splits import Split, folds, hold_out
from scellfm.geneformer import Geneformer, RankTokenizer
from scellfm.geneformer.finetuning import hyperparameters as module
from scellfm.geneformer.finetuning.evaluation import HELD_OUT
from scellfm.geneformer.finetuning.hyperparameters import default_space, inner_split

SPACE = {"learning_rate": (1e-4, 1e-2), "epochs": (1, 2), "freeze_layers": [0, 2]}
ASK = dict(trials=3, space=SPACE, n_boot=0, batch_size=24)


@pytest.fixture(scope="module")
def adata():
    return simulate_cells(
        96,
        50,
        cell_types=["B", "T"],
        donors=4,
        depth=100,
        regulators=1,
        targets=3,
        programme_size=10,
        programme_effect=2.5,
        seed=3,
    )


@pytest.fixture(scope="module")
def gf(adata):
    return Geneformer.from_config("tiny", RankTokenizer.fit(adata), device="cpu")


@pytest.fixture(scope="module")
def split(adata):
    return folds(adata, by="donor", k=2)


@pytest.fixture(scope="module")
def found(gf, adata, split):
    return gf.search(adata, "cell_type", split=split, **ASK)


def test_every_trial_is_in_the_table_and_the_best_is_marked(found):
    table = found.trials
    assert list(table.columns) == ["fold", "trial", *SPACE, "score", "best"] and len(table) == 6
    for k, rows in table.groupby("fold"):
        assert rows["best"].sum() == 1 and rows.loc[rows["best"], "score"].item() == rows["score"].max()
        assert found.best[k] == {name: rows.loc[rows["best"], name].item() for name in SPACE}
    assert table["learning_rate"].between(1e-4, 1e-2).all() and set(table["freeze_layers"]) <= {0, 2}


def test_the_classifier_of_a_fold_is_trained_with_its_best_settings_and_judged_on_the_held_out(found, gf, adata, split):
    for k, part in enumerate(split):
        alone = gf.finetune(
            adata,
            "cell_type",
            split=Split(part.train, part.valid, part.test, "donor", 96),
            batch_size=24,
            n_boot=0,
            **found.best[k],
        )
        recipe = found.classifier.histories[k].recipe
        assert recipe["learning_rate"] == found.best[k]["learning_rate"] and recipe["epochs"] == found.best[k]["epochs"]
        if k == 0:
            assert alone.history.step_rows == found.classifier.history.step_rows
    assert found.scores.details[HELD_OUT].n_cells == 96
    assert found.classifier.settings["searched"] == found.best


def test_no_trial_sees_a_held_out_cell(gf, adata, split, monkeypatch):
    rows = []
    train = module.train_fold
    monkeypatch.setattr(
        module,
        "train_fold",
        lambda gf, s, codes, classes, part, k, **ask: (
            rows.append((k, part)),
            train(gf, s, codes, classes, part, k, **ask),
        )[1],
    )
    gf.search(adata, "cell_type", split=split, **{**ASK, "trials": 1})
    donor = adata.obs["donor"].to_numpy()
    assert [k for k, _ in rows] == [0, 1]
    for k, part in rows:
        held_out = set(split.splits[k].test)
        assert not held_out & {*part.train, *part.test} and not set(donor[part.train]) & set(donor[part.test])
        assert {*part.train, *part.test} == set(split.splits[k].train)


def test_the_same_seed_gives_the_same_trials_and_another_gives_others(found, gf, adata, split, tmp_path):
    again = gf.search(adata, "cell_type", split=split, folder=tmp_path, **ASK)
    assert again.trials.equals(found.trials) and again.scores.table.equals(found.scores.table)
    other = gf.search(adata, "cell_type", split=split, seed=1, **{**ASK, "trials": 2})
    assert not other.trials.learning_rate.equals(found.trials.query("trial < 2").learning_rate)


def test_an_interrupted_search_goes_on(found, gf, adata, split, tmp_path, monkeypatch):
    train, count = module.train_fold, []

    def stop_at_fourth(*args, **options):
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        return train(*args, **options)

    monkeypatch.setattr(module, "train_fold", stop_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        gf.search(adata, "cell_type", split=split, folder=tmp_path, **ASK)
    assert len(json.loads((tmp_path / "trials.json").read_text())) == 3
    again = gf.search(adata, "cell_type", split=split, folder=tmp_path, **ASK)
    assert len(count) == 4 + 3 and again.trials.equals(found.trials)


def test_a_trial_that_diverges_has_no_score_and_the_others_go_on(gf, adata, split, tmp_path):
    ask = dict(
        trials=4, space={"learning_rate": [1e30, 1e-3]}, n_boot=0, batch_size=24, folder=tmp_path, learning_rate=1e30
    )
    with pytest.warns(ScellfmWarning, match=r"\d of 8 trials diverged .*first with .*1e\+30") as caught:
        found = gf.search(adata, "cell_type", split=split, **ask)
    assert caught[0].filename == __file__
    lost = found.trials["learning_rate"] == 1e30
    assert lost.iloc[0] and not lost.all() and (found.trials["score"].isna() == lost).all()
    assert [best["learning_rate"] for best in found.best] == [1e-3, 1e-3]
    again = gf.search(adata, "cell_type", split=split, **ask)  # a noted trial without a score is not tried again
    assert again.trials.equals(found.trials)


def test_a_search_in_which_every_trial_diverges_says_so(gf, adata, split):
    with pytest.raises(DivergedError, match=r"all 2 trials of a fold diverged.*1e\+30"):
        gf.search(adata, "cell_type", split=split, trials=2, space={"learning_rate": [1e30, 1e31]}, batch_size=24)


def test_the_first_trial_is_the_default(gf, adata, split):
    one = gf.search(
        adata, "cell_type", split=split, trials=1, n_boot=0, space={"learning_rate": (1e-6, 1e-3), "epochs": [2, 1]}
    )
    assert (one.trials["learning_rate"] == 5e-5).all() and (one.trials["epochs"] == 1).all()
    assert default_space(6, lora=8)["freeze_layers"] == (0, 5)


def test_a_valid_part_judges_the_trials(adata):
    part = hold_out(adata, by="donor", fractions=(0.5, 0.25, 0.25))
    inside = inner_split(adata.obs, part, 0, "cell_type", 0.25, 0)
    assert (inside.train == part.train).all() and (inside.test == part.valid).all()


def test_one_training_donor_is_too_few(gf, adata):
    two = adata[adata.obs["donor"].isin(adata.obs["donor"].unique()[:2])].copy()
    with pytest.raises(DataError, match="one donor only.*valid part"):
        gf.search(two, "cell_type", split=folds(two, by="donor", k=2), **ASK)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (dict(space={}), "nothing to search"),
        (dict(space={"epoch": [1]}), "Did you mean 'epochs'"),
        (dict(space={"epochs": (3, 1)}), "epochs"),
        (dict(space={"learning_rate": (0.0, 1e-3)}), "above 0"),
        (dict(space={"lora": []}), "lora"),
        (dict(trials=0), "trials=0"),
        (dict(inner=1.5), "inner=1.5"),
        (dict(metric="f1"), "macro_f1"),
    ],
)
def test_bad_questions_are_named(gf, adata, split, ask, words):
    with pytest.raises(OptionError, match=words):
        gf.search(adata, "cell_type", split=split, **{**ASK, **ask})


def test_a_search_is_for_one_label(gf, adata, split):
    with pytest.raises(OptionError, match="must be a text"):
        gf.search(adata, ["cell_type", "condition"], split=split, **ASK)


def test_without_optuna_the_extra_is_named(gf, adata, split, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ExtraError, match=r"scellfm\[tuning\]"):
        gf.search(adata, "cell_type", split=split, **ASK)


def test_any_kind_of_choice_may_be_searched(gf, adata, split):
    space = {"lora": [None, 2], "class_weights": ["balanced", {"B": 1.0, "T": 2.0}]}
    found = gf.search(
        adata, "cell_type", split=split, trials=2, space=space, n_boot=0, metric="calibration_error", batch_size=24
    )
    for _, rows in found.trials.groupby("fold"):
        assert rows.loc[rows["best"], "score"].item() == rows["score"].min()
    assert all(best["lora"] in (None, 2) for best in found.best) and isinstance(found._repr_html_(), str)
