"Names and directions of scores: one line for each, and nothing of the higher floors is needed to know them."

import ast

import pandas as pd
import pytest
from conftest import ROOT

from scellfm import metrics
from scellfm.scores import Scores


@pytest.mark.parametrize(
    "metric",
    [
        "calibration_error",
        "mse",
        "mse_de",
        "test loss",
        "Validation-Loss",
        "MAE",
        "rmse",
        "perplexity",
        "e_distance",
        "wmse",
    ],
)
def test_errors_losses_and_distances_are_good_when_small(metric):
    assert metrics.smaller_is_better(metric) and metrics.direction(metric) == "smaller"


@pytest.mark.parametrize("metric", ["auroc", "macro_f1", "pearson_delta", "r2_w", "nir", "AvgBIO", "share", "lossless"])
def test_everything_else_is_good_when_large(metric):
    assert metrics.direction(metric) == "larger" and not metrics.smaller_is_better(metric)


def test_a_new_metric_is_one_line(monkeypatch):
    assert metrics.metric_name("my_score_v2") == "my score v2"
    monkeypatch.setitem(metrics.TERMS, "my_score_v2", ("My Score 2", "smaller"))
    assert metrics.metric_name("my_score_v2") == "My Score 2" and metrics.smaller_is_better("my_score_v2")


def test_a_number_that_is_not_to_be_won_has_no_best_value():
    table = pd.DataFrame({"variance_ratio": [0.1, 2.0], "wmse": [0.1, 2.0]}, index=["a", "b"])
    scores = Scores(table)
    assert scores.best("variance_ratio") == [] and scores.best("wmse") == ["a"]


def test_every_line_says_a_name_and_a_known_direction():
    for name, direction in metrics.TERMS.values():
        assert name and direction in ("larger", "smaller", "neither")


def test_pictures_know_nothing_of_scores():
    for name in ("metrics", "plotting", "heatmaps"):
        tree = ast.parse((ROOT / "scellfm" / f"{name}.py").read_text())
        for block in ast.walk(tree):  # what only a type checker reads is not imported
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
                block.body = [ast.Pass()]
        imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert not [module for module in imported if "scores" in module], f"{name} imports scores"
