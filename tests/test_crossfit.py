"Cross-fitting: who was trained on what, held-out predictions, baselines in the same folds, evidence and its record."

import ast
import json

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from sklearn.base import BaseEstimator

from scellfm.assets import save_tensors
from scellfm.core import AssetError, DataError
from scellfm.crossfit import (
    Evidence,
    FoldPredictions,
    OverfitCheck,
    TrainedOn,
    baseline_predictions,
    check_overfit,
    class_score_table,
    cross_fit,
    predict_held_out,
    score_table,
)
from scellfm.crossfit.evidence import evidence_of
from scellfm.crossfit.membership import NEW, TRAINED, keys_of, resolve_folds
from scellfm.crossfit.tables import row_names
from scellfm.data.splits import Split, folds, hold_out
from scellfm.scores import Scores
from scellfm.scores.labels import classification

NOTHING = np.empty(0, dtype=np.int64)


def obs(n: int, donors: int = 6) -> pd.DataFrame:
    "A table of cells of a few donors, two states in each."
    return pd.DataFrame(
        {"donor": [f"d{i % donors}" for i in range(n)], "state": [("ctrl", "stim")[i // donors % 2] for i in range(n)]},
        index=[f"cell {i}" for i in range(n)],
    )


@pytest.mark.parametrize("outputs", [(), (1,), (3,), (2, 4)])
def test_each_row_gets_the_prediction_of_the_model_that_did_not_see_it(outputs):
    parts = folds(obs(24), by="donor", k=3).folds()
    truth = np.random.default_rng(0).normal(size=(24, *outputs))

    def predict(k, part):
        return truth[part.test] + 10 * k, truth[part.train] - 10 * k

    models, found = cross_fit(parts, lambda part, k: k, predict, n_rows=24)
    rows, values = found.held_out()
    fold = np.full(24, -9)
    for k, part in enumerate(parts):
        fold[part.test] = k
    assert models == [0, 1, 2] and rows.tolist() == list(range(24)) and values.shape == truth.shape
    np.testing.assert_allclose(values - truth, np.broadcast_to(10 * fold.reshape(-1, *[1] * len(outputs)), truth.shape))
    rows, values = found.training()
    others = np.array([[0 + 1 + 2 - k] for k in fold]) / 2  # the mean number of the two models trained on the row
    np.testing.assert_allclose((values - truth).reshape(24, -1), np.broadcast_to(-10 * others, (24, values[0].size)))


def test_one_task_of_several_is_the_same_as_that_task_alone():
    parts = folds(obs(24), k=3).folds()
    values = np.random.default_rng(0).normal(size=(24, 5))
    known = np.arange(24) % 3 != 0
    whole, alone = FoldPredictions(24), FoldPredictions(24)
    for part in parts:
        whole.add(part.test, values[part.test])
        rows = part.test[known[part.test]]
        alone.add(rows, values[rows, 2:4])
    for one, other in zip(whole.part(slice(2, 4), known).held_out(), alone.held_out()):
        np.testing.assert_array_equal(one, other)


def test_names_find_their_fold_in_any_order_and_after_saving(tmp_path):
    cells = obs(30)
    split = folds(cells, by="donor", k=3)
    trained_on = TrainedOn.of(cells.index, split.folds())
    trained_on.save(tmp_path)
    again = TrainedOn.load(tmp_path)
    order = np.random.default_rng(0).permutation(30)
    expected = np.full(30, -9)
    for k, part in enumerate(split.folds()):
        expected[part.test] = k
    assert again.fold_of(cells.index[order]).tolist() == expected[order].tolist()
    assert again.fold_of(["unheard of"]).tolist() == [NEW]
    one = hold_out(cells, by="donor", fractions=(0.5, 0.25, 0.25))
    fold = TrainedOn.of(cells.index, one.folds()).fold_of(cells.index)
    assert (fold[one.train] == TRAINED).all() and (fold[one.valid] == TRAINED).all() and (fold[one.test] == 0).all()
    genes = TrainedOn.of(["a", "b"], [Split(np.array([0]), NOTHING, np.array([1]), None, 2)], kind="gene")
    genes.save(tmp_path)  # beside the cells, and not in their place
    assert TrainedOn.load(tmp_path, "gene").fold_of(["b", "a"]).tolist() == [0, TRAINED]
    assert len(TrainedOn.load(tmp_path).keys) == 30 and TrainedOn.nothing().fold_of(["a"]).tolist() == [NEW]


def test_a_damaged_record_of_cells_is_refused(tmp_path):
    import torch

    keys = torch.as_tensor(np.sort(keys_of(["a", "b", "c"])))
    descending = torch.as_tensor(keys.numpy()[::-1].copy())
    fold = torch.tensor([0, 1, 0])
    for tensors in (
        {"keys": keys},
        {"keys": descending, "fold": fold},
        {"keys": keys, "fold": fold[:2]},
        {"keys": keys, "fold": fold.float()},
        {"keys": keys, "fold": fold - 5},
    ):
        save_tensors(tmp_path / "cells.safetensors", tensors)
        with pytest.raises(AssetError, match=r"cells\.safetensors"):
            TrainedOn.load(tmp_path)


class Recorder(BaseEstimator):
    "An estimator that notes what it is fitted on, and predicts 0."

    fitted_on = []

    def fit(self, X, y):
        assert not hasattr(self, "done_"), "fitted twice"
        self.done_ = True
        Recorder.fitted_on.append((np.asarray(X).ravel().tolist(), y.tolist()))
        return self

    def predict(self, X):
        return np.zeros(len(X))


@pytest.mark.parametrize("kind", ["array", "names", "table"])
def test_baselines_learn_from_the_training_rows_of_each_fold_alone(kind):
    parts = folds(obs(12), by="donor", k=2).folds()
    features = {
        "array": np.arange(12)[:, None],
        "names": np.array([f"p{i}" for i in range(12)]),
        "table": pd.DataFrame({"x": range(12)}),
    }[kind]
    Recorder.fitted_on = []
    targets = np.arange(12) * 1.0
    found = baseline_predictions({"recorder": Recorder()}, features, targets, parts)["recorder"]
    assert [y for _, y in Recorder.fitted_on] == [targets[part.train].tolist() for part in parts]
    assert found.held_out()[0].tolist() == list(range(12)) and not len(found.training()[0])


def test_the_table_of_classes_is_that_of_each_method_judged_alone():
    random, cells = np.random.default_rng(1), obs(60)
    classes, codes = np.unique(cells["state"], return_inverse=True)
    own, simple = FoldPredictions(60), FoldPredictions(60)
    values = {name: random.dirichlet([1, 1], 60) for name in ("own", "training", "simple")}
    rows = np.arange(10, 60)
    own.add(rows, values["own"][rows])
    own.add(np.arange(40), values["training"][:40], trained=True)
    simple.add(rows, values["simple"][rows])
    groups = cells["donor"].to_numpy()
    table = class_score_table(
        own, {"simple": simple}, codes, classes, groups, model="M", n_boot=20, seed=3, origin={"label": "state"}
    )
    for name, which, predicted in (
        ("M (held out)", rows, "own"),
        ("M (training cells)", np.arange(40), "training"),
        ("simple", rows, "simple"),
    ):
        alone = classification(
            classes[codes[which]], values[predicted][which], classes, groups=groups[which], n_boot=20, seed=3
        )
        assert table.table.loc[name].to_dict() == alone.metrics and table.low.loc[name].to_dict() == alone.low
    assert table.title == "state: ctrl, stim"


def test_a_score_of_real_values_needs_no_intervals():
    own, mean = FoldPredictions(4), FoldPredictions(4)
    truth = np.random.default_rng(0).normal(size=(4, 6))
    own.add(np.arange(4), truth)
    own.add(np.arange(4), truth, trained=True)
    mean.add(np.arange(4), np.zeros((4, 6)))

    def score(rows, values):
        return {"mse": float(((values - truth[rows]) ** 2).mean())}

    scores = score_table(own, {"training mean": mean}, score, model="M", unit="perturbations")
    assert scores.table["mse"].tolist()[:2] == [0, 0] and scores.low.isna().all().all()
    assert scores.best("mse") == ["M (held out)"]  # not the row on training perturbations, which has the same error


@pytest.mark.parametrize("metric,held,trained,expected", [("auroc", 0.7, 0.9, True), ("mse", 0.9, 0.7, True)])
@pytest.mark.parametrize("unit", ["cells", "genes", "perturbations"])
def test_overfitting_is_told_by_gap_and_interval_in_both_directions(metric, held, trained, expected, unit):
    index = [*row_names("M", unit), "simple", "worse"]
    table = pd.DataFrame({metric: [held, trained, 0.8, 0.8]}, index=index)
    near = Scores(table, low=table - 0.05, high=table + 0.05)
    assert check_overfit(near, [], unit=unit, metric=metric).overfitted is expected
    assert check_overfit(near, [], unit=unit, metric=metric).gap == pytest.approx(0.2)
    assert not check_overfit(Scores(table, low=table - 0.3, high=table + 0.3), [], unit=unit, metric=metric).overfitted
    assert not check_overfit(near, [], unit=unit, metric=metric, tolerance=0.25).overfitted
    swapped = table.assign(**{metric: [trained, held, 0.8, 0.8]})
    assert not check_overfit(Scores(swapped), [], unit=unit, metric=metric).overfitted
    with pytest.raises(DataError, match="baseline"):
        check_overfit(Scores(table.iloc[:2]), [], unit=unit, metric=metric)


def test_evidence_comes_back_and_a_damaged_record_names_its_part():
    table = pd.DataFrame({"accuracy": [0.5, 1.0]}, index=["a", "b"])
    evidence = Evidence(scores=Scores(table), overfit_check=OverfitCheck(True, 0.4, "text", ["x"]), settings={"a": 1})
    record = json.loads(json.dumps(evidence.evidence_record()))
    assert list(record) == ["scores", "verdict", "histories", "settings"]  # the parts of the files of 0.1
    again = Evidence(**evidence_of(record))
    assert again.overfit_check == evidence.overfit_check == again.verdict
    pd.testing.assert_frame_equal(again.scores.table, table)
    for part, value in (("scores", {"table": 3}), ("verdict", [1]), ("histories", None), ("settings", 3)):
        with pytest.raises(AssetError, match=part):
            evidence_of({**record, part: value})
        with pytest.raises(AssetError, match=part):
            evidence_of({key: value for key, value in record.items() if key != part})


def test_folds_follow_the_rows_that_a_model_can_read():
    cells = obs(20)
    split = folds(cells, by="donor", k=3)
    kept = np.setdiff1d(np.arange(20), [3, 11])
    row = np.full(20, -1)
    row[kept] = np.arange(len(kept))
    parts, groups = resolve_folds(split, cells.iloc[kept], n=20, rows_of=lambda rows: row[rows][row[rows] >= 0])
    for part, one in zip(parts, split.folds()):
        for which in ("train", "valid", "test"):
            names = cells.index[kept][getattr(part, which)]
            assert sorted(names) == list(names)
            assert set(names) == set(cells.index[getattr(one, which)]) - {"cell 3", "cell 11"}
    assert list(groups) == list(cells["donor"].iloc[kept])
    with pytest.raises(DataError, match="split is of 20 cells"):
        resolve_folds(split, cells.iloc[kept])


def test_rows_that_are_new_are_predicted_by_all_models():
    fold = np.array([1, NEW, TRAINED, 0])
    rows, values = predict_held_out([2.0, 4.0], fold, lambda model, rows: np.full((len(rows), 1), model)).held_out()
    assert rows.tolist() == [0, 1, 2, 3] and values.ravel().tolist() == [4, 3, 3, 2]


def test_cross_fitting_knows_no_wing():
    for path in (ROOT / "scellfm" / "crossfit").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not {"geneformer", "scgpt", "scgenept", "rosa"} & set((node.module or "").split(".")), path
