"Several labels at once: one encoder, a head and a score for each, gaps allowed."

import numpy as np
import pytest
import torch

from scellfm.core import AssetError, DataError, OptionError
from scellfm.data.cells import simulate_cells
from scellfm.data.splits import folds
from scellfm.geneformer import CellClassifier, Geneformer, RankTokenizer, TaskClassifier
from scellfm.geneformer.finetuning.evaluation import HELD_OUT, TRAINED
from scellfm.geneformer.finetuning.multitask import task_loss, tasks_of

QUICK = dict(epochs=3, learning_rate=4e-3, n_boot=0)
LABELS = ["cell_type", "condition"]


@pytest.fixture(scope="module")
def adata():
    adata = simulate_cells(
        120,
        60,
        cell_types=["B", "T"],
        donors=2,
        depth=150,
        regulators=1,
        targets=10,
        target_effect=2.0,
        penetrance=1.0,
        programme_size=12,
        programme_effect=2.5,
        seed=3,
    )
    adata.obs["condition"] = adata.obs["condition"].astype(object).where(np.arange(120) % 3 > 0)
    adata.obs.loc[adata.obs_names[7], "cell_type"] = np.nan
    return adata


@pytest.fixture(scope="module")
def gf(adata):
    return Geneformer.from_config("tiny", RankTokenizer.fit(adata), device="cpu")


@pytest.fixture(scope="module")
def split(adata):
    return folds(adata, by="donor", k=2)


@pytest.fixture(scope="module")
def clf(gf, adata, split):
    return gf.finetune(adata, LABELS, split=split, task_weights={"condition": 2}, **QUICK)


def test_each_label_has_its_scores_and_baselines(clf):
    assert list(clf.scores) == LABELS
    assert f"{clf.history.learned:,} parameters learned" in repr(clf)
    for label, n in (("cell_type", 119), ("condition", 80)):
        scores = clf.scores[label]
        assert {HELD_OUT, TRAINED, "PCA + kNN", "majority class"} <= set(scores.table.index)
        assert scores.details[HELD_OUT].n_cells == scores.details["PCA + kNN"].n_cells == n
        assert clf[label].settings["cells_with_label"] == n and clf[label].overfit_check is not None
    assert clf.scores["cell_type"].table.loc[HELD_OUT, "balanced_accuracy"] > 0.85


def test_every_cell_is_predicted_for_every_label_also_without_one(clf, adata):
    copy = clf.predict(adata, copy=True)
    for label in LABELS:
        assert copy.obs[f"{label}_predicted"].notna().all() and f"{label}_predicted" in copy.uns
    assert "cell_type_predicted" not in adata.obs


def test_a_view_answers_what_the_whole_answers(clf, adata):
    whole = clf.probabilities(adata)
    for label in LABELS:
        np.testing.assert_allclose(clf[label].probabilities(adata), whole[label], atol=1e-6)
        np.testing.assert_allclose(whole[label].sum(1), 1, atol=1e-9)
        for k, model in enumerate(clf[label].models):
            assert model.model.bert is clf.models[k].model.bert
    with pytest.raises(OptionError, match="'cell_type', 'condition'"):
        clf["donor"]


def test_held_out_scores_are_of_the_fold_that_has_not_seen_the_donor(clf, adata):
    table = clf.probabilities(adata)["condition"]
    has = adata.obs["condition"].notna().to_numpy()
    right = table.columns[table.to_numpy().argmax(1)].to_numpy()[has] == adata.obs["condition"].to_numpy()[has]
    assert clf.scores["condition"].table.loc[HELD_OUT, "accuracy"] == pytest.approx(right.mean())


def test_it_screens_through_the_shared_encoder(clf, adata):
    ask = dict(kind="delete", genes="all", state="cell_type", start="B", goal="T", max_cells=4)
    cells = adata[adata.obs["cell_type"].notna()].copy()
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(str)
    one, other = clf.perturb(cells, **ask).shifts, clf["condition"].perturb(cells, **ask).shifts
    assert len(one) and one.equals(other)
    fold = dict(zip(cells.obs_names, clf["cell_type"].model_of(cells)))
    assert (one["model"] == one["cell"].map(fold)).all()


def test_saved_and_loaded_it_answers_the_same(clf, adata, tmp_path):
    clf.save_pretrained(tmp_path / "both")
    loaded = TaskClassifier.from_pretrained(tmp_path / "both", device="cpu")
    for label, table in clf.probabilities(adata).items():
        assert loaded.probabilities(adata)[label].equals(table)
        assert loaded.scores[label].table.equals(clf.scores[label].table)
        assert str(loaded[label].overfit_check) == str(clf[label].overfit_check)
    assert loaded.histories == clf.histories and (loaded.first.model_of(adata) == clf.first.model_of(adata)).all()
    clf["condition"].save_pretrained(tmp_path / "one")  # an ordinary classifier
    alone = CellClassifier.from_pretrained(tmp_path / "one", device="cpu")
    np.testing.assert_allclose(alone.probabilities(adata), clf.probabilities(adata)["condition"], atol=1e-6)
    with pytest.raises(AssetError, match="CellClassifier.from_pretrained"):
        TaskClassifier.from_pretrained(tmp_path / "one", device="cpu")


def test_the_model_of_a_fold_opens_in_transformers(clf, tmp_path):
    from transformers import BertForSequenceClassification

    clf.save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path / "fold0")
    assert list(model.config.id2label.values()) == [
        "cell_type: B",
        "cell_type: T",
        "condition: case",
        "condition: control",
    ]


def test_one_label_in_a_list_is_that_label_alone(gf, adata, split):
    cells = adata[adata.obs["cell_type"].notna()].copy()
    parts = folds(cells, by="donor", k=2)
    many, one = (
        gf.finetune(cells, ["cell_type"], split=parts, **QUICK),
        gf.finetune(cells, "cell_type", split=parts, **QUICK),
    )
    assert many["cell_type"].scores.table.equals(one.scores.table)
    assert [h.step_rows for h in many.histories] == [h.step_rows for h in one.histories]


def test_a_missing_label_adds_nothing_and_weights_multiply(gf, adata):
    tasks = tasks_of(adata.obs, LABELS)
    torch.manual_seed(0)
    logits = torch.randn(120, 4, requires_grad=True)

    class Model:
        def __call__(self, **_):
            return type("Output", (), {"logits": logits})

    codes = torch.as_tensor(np.stack([task.codes for task in tasks], 1))
    loss = task_loss(tasks, [torch.ones(2), torch.tensor([1.0, 3.0])], torch.tensor([1.0, 2.0]))
    totals, counts = loss(Model(), {"ids": None, "mask": None, "codes": codes})
    known = codes[:, 1] >= 0
    expected = torch.nn.functional.cross_entropy(logits[known, 2:], codes[known, 1], weight=torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(totals[1] / counts[1], 2 * expected)
    totals[1].backward()
    assert not logits.grad[~known].any() and not logits.grad[:, :2].any() and logits.grad[known, 2:].any()


def test_cells_without_any_label_teach_nothing(gf, adata, split):
    gap = adata.obs[LABELS].copy()
    gap.iloc[::4] = np.nan
    with_gaps = adata.copy()
    with_gaps.obs[LABELS] = gap
    ask = dict(split=split, class_weights={"condition": "balanced"}, lora=2, **QUICK)
    clf = gf.finetune(with_gaps, LABELS, **ask)
    n = [gap.iloc[part.train].notna().any(axis=1).sum() for part in split]
    assert [history.steps["step"].max() + 1 for history in clf.histories] == [3 * -(-size // 12) for size in n]
    assert clf.histories[0].learned < 20_000


def test_bad_labels_and_weights_are_named(gf, adata, split):
    empty = adata.copy()
    empty.obs["nothing"] = np.nan
    empty.obs["same"] = "x"
    rare = np.full(120, None, dtype=object)
    rare[split.splits[0].test[:2]], rare[split.splits[0].test[2:4]] = "a", "b"
    empty.obs["rare"] = rare
    for labels, error, words in (
        (["cell_type", "cell_typ"], DataError, "Did you mean 'cell_type'"),
        (["cell_type", "nothing"], DataError, "missing .* all 120 cells"),
        (["cell_type", "same"], DataError, "single class"),
        (["cell_type", "rare"], DataError, "'rare'|no test cells"),
        ([], OptionError, "label="),
        (["condition", "condition"], OptionError, "different names"),
    ):
        with pytest.raises(error, match=words):
            gf.finetune(empty, labels, split=split, **QUICK)
    for weights in ({"condition": 0}, {"conditions": 1.0}):
        with pytest.raises(OptionError, match="task_weights.*'cell_type', 'condition'"):
            gf.finetune(adata, LABELS, split=split, task_weights=weights, **QUICK)
    with pytest.raises(OptionError, match="class_weights of label='conditions'.*Did you mean 'condition'"):
        gf.finetune(adata, LABELS, split=split, class_weights={"conditions": "balanced"}, **QUICK)
