"Fine-tuned classifiers: who judges whom, what is frozen, what is compared, what is saved."

import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from scellfm.core import AssetError, DataError, OptionError, ScellfmWarning, StoreError
from scellfm.crossfit import check_overfit, membership
from scellfm.crossfit.membership import NEW, TrainedOn
from scellfm.data.cells import simulate_cells
from scellfm.data.splits import Folds, Split, folds, hold_out
from scellfm.geneformer import Geneformer, RankTokenizer
from scellfm.geneformer.finetuning import CellClassifier, finetune
from scellfm.geneformer.finetuning.evaluation import HELD_OUT, TRAINED, advice_for
from scellfm.geneformer.finetuning.heads import probabilities, weights_of
from scellfm.scores.table import Scores

QUICK = dict(epochs=2, learning_rate=2e-3, n_boot=20)


@pytest.fixture(scope="module")
def adata():
    return simulate_cells(
        150,
        70,
        cell_types=["B", "T"],
        donors=3,
        depth=200,
        regulators=1,
        targets=4,
        programme_size=15,
        programme_effect=2.5,
        seed=3,
    )


@pytest.fixture(scope="module")
def gf(adata):
    return Geneformer.from_config("tiny", RankTokenizer.fit(adata), device="cpu")


@pytest.fixture(scope="module")
def split(adata):
    return folds(adata, by="donor", k=3)


@pytest.fixture(scope="module")
def clf(gf, adata, split):
    return finetune(gf, adata, "cell_type", split=split, freeze_layers=1, **QUICK)


def own(clf, adata, k, rows):
    "Probabilities of some rows by the model of fold k alone."
    model = clf.models[k]
    return probabilities(model, model.readable(model.tokenizer(adata)).take(rows))


def test_it_beats_chance_on_donors_it_has_not_seen(clf):
    table = clf.scores.table
    assert table.loc[HELD_OUT, "balanced_accuracy"] > 0.85 > table.loc["majority class", "balanced_accuracy"]
    assert clf.scores.low.loc[HELD_OUT, "auroc"] > 0.7
    assert list(table.index[:2]) == [HELD_OUT, TRAINED]
    assert {"PCA + logistic regression", "PCA + kNN", "majority class"} <= set(table.index)
    assert list(table.columns) == ["accuracy", "balanced_accuracy", "macro_f1", "auroc", "calibration_error"]


def test_held_out_scores_come_from_the_models_that_did_not_see_the_donor(clf, adata, split):
    right = [
        (
            clf.classes[own(clf, adata, k, part.test).argmax(1)]
            == adata.obs["cell_type"].astype(str).to_numpy()[part.test]
        )
        for k, part in enumerate(split)
    ]
    assert clf.scores.table.loc[HELD_OUT, "accuracy"] == pytest.approx(np.concatenate(right).mean())


def test_predictions_use_the_model_that_has_not_seen_the_cell(clf, adata, split):
    order = np.random.default_rng(0).permutation(adata.n_obs)[:60]
    some = adata[order].copy()
    before = some.X.copy()
    clf.predict(some)
    fold = clf.model_of(some)
    for place, row in enumerate(order):
        k = next(k for k, part in enumerate(split) if row in part.test)
        assert fold[place] == k
        values = own(clf, adata, k, [row])[0]
        assert some.obs["cell_type_predicted"].iloc[place] == clf.classes[values.argmax()]
        assert some.obs["cell_type_confidence"].iloc[place] == pytest.approx(values.max(), abs=1e-6)
    assert (before != some.X).nnz == 0 and not some.obs["cell_type_predicted"].isna().any()


def test_new_cells_get_the_mean_of_all_models(clf, adata):
    new = adata[:7].copy()
    new.obs_names = [f"elsewhere{i}" for i in range(7)]
    mean = np.mean([own(clf, adata, k, np.arange(7)) for k in range(3)], axis=0)
    np.testing.assert_allclose(clf.probabilities(new).to_numpy(), mean, atol=1e-6)
    assert (clf.model_of(new) == 0).all()


def test_cells_that_every_model_has_seen_are_warned_of(gf, adata):
    split = hold_out(adata, by="donor", fractions=(0.6, 0, 0.4))
    one = finetune(gf, adata, "cell_type", split=split, **QUICK)
    with pytest.warns(ScellfmWarning, match=f"{len(split.train)} of 150 cells were used to train every model"):
        one.predict(adata, copy=True)
    assert (one.trained_on.fold_of(adata.obs_names)[split.test] == 0).all()
    assert (one.trained_on.fold_of(adata.obs_names)[split.train] == membership.TRAINED).all()


def test_one_cell_alone_is_predicted(clf, adata):
    one = adata[[3]].copy()
    clf.predict(one)
    assert one.obs["cell_type_predicted"].notna().all()


def test_a_cell_without_known_genes_keeps_its_row(clf, adata):
    some = adata[:4].copy()
    some.X[2] = 0
    with pytest.warns(ScellfmWarning, match="no prediction"):
        clf.predict(some)
    assert some.obs["cell_type_predicted"].isna().tolist() == [False, False, True, False]
    assert np.isnan(some.obs["cell_type_confidence"].iloc[2])


def test_frozen_layers_stay_and_the_others_learn(clf, gf):
    start = gf.model.bert
    for model in clf.models:
        for name, value in model.model.bert.encoder.layer[0].named_parameters():
            assert torch.equal(value, start.encoder.layer[0].get_parameter(name)), name
        for layer in (1, 2):
            moved = model.model.bert.encoder.layer[layer].output.dense.weight
            assert not torch.equal(moved, start.encoder.layer[layer].output.dense.weight)
        assert not torch.equal(
            model.model.bert.embeddings.word_embeddings.weight, start.embeddings.word_embeddings.weight
        )


def test_the_pretrained_model_is_left_as_it_was(gf, adata, split):
    before = {name: value.clone() for name, value in gf.model.state_dict().items()}
    finetune(gf, adata, "cell_type", split=split, **{**QUICK, "epochs": 1})
    assert all(torch.equal(value, before[name]) for name, value in gf.model.state_dict().items())
    assert all(p.requires_grad for p in gf.model.parameters())


def test_only_pooler_and_head_are_fresh(clf):
    for model in clf.models:
        assert sorted(model.load_report.fresh) == [
            "bert.pooler.dense.bias",
            "bert.pooler.dense.weight",
            "classifier.bias",
            "classifier.weight",
        ]


def test_two_runs_are_equal_bit_for_bit(clf, gf, adata, split):
    again = finetune(gf, adata, "cell_type", split=split, freeze_layers=1, **QUICK)
    assert again.scores.table.equals(clf.scores.table)
    assert [h.step_rows for h in again.histories] == [h.step_rows for h in clf.histories]
    assert again.probabilities(adata).equals(clf.probabilities(adata))


def test_a_finished_run_is_taken_from_its_folder(clf, gf, adata, split, tmp_path):
    for _ in range(2):
        found = finetune(gf, adata, "cell_type", split=split, freeze_layers=1, folder=tmp_path, **QUICK)
        assert found.probabilities(adata).equals(clf.probabilities(adata))
    with pytest.raises(StoreError, match="frozen"):
        finetune(gf, adata, "cell_type", split=split, freeze_layers=2, folder=tmp_path, **QUICK)


def test_the_order_of_the_cells_changes_nothing(clf, gf, adata):
    mixed = adata[np.random.default_rng(1).permutation(adata.n_obs)].copy()
    other = finetune(gf, mixed, "cell_type", split=folds(mixed, by="donor", k=3), freeze_layers=1, **QUICK)
    for one, two in zip(clf.models, other.models):
        assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), two.model.parameters()))
    table = other.probabilities(mixed).loc[adata.obs_names]
    np.testing.assert_allclose(table, clf.probabilities(adata), atol=1e-6)


def test_saved_and_loaded_it_answers_the_same(clf, adata, tmp_path):
    clf.save_pretrained(tmp_path / "clf")
    loaded = CellClassifier.from_pretrained(tmp_path / "clf", device="cpu")
    assert loaded.probabilities(adata).equals(clf.probabilities(adata))
    assert (loaded.model_of(adata) == clf.model_of(adata)).all()
    assert loaded.scores.table.equals(clf.scores.table) and loaded.scores.low.equals(clf.scores.low)
    assert loaded.histories == clf.histories and str(loaded.overfit_check) == str(clf.overfit_check)
    assert list(loaded.classes) == list(clf.classes) and loaded.label == "cell_type"


def test_each_fold_opens_in_transformers(clf, adata, tmp_path):
    from transformers import BertForSequenceClassification

    clf.save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path / "fold1").eval()
    assert model.config.id2label == {0: "B", 1: "T"}
    ids = torch.as_tensor(clf.models[1].tokenizer(adata)[5])[None]
    with torch.no_grad():
        theirs = model(input_ids=ids).logits.softmax(1).numpy()
    np.testing.assert_allclose(theirs, own(clf, adata, 1, [5]), atol=1e-6)


@pytest.mark.parametrize("dictionary", ["pickle", "config"])
def test_a_model_fine_tuned_by_the_original_loads(clf, adata, tmp_path, dictionary):
    folder = tmp_path / "ksplit1"
    clf.models[0].model.save_pretrained(folder)
    clf.models[0].tokenizer.save_pretrained(tmp_path)
    if dictionary == "pickle":
        (tmp_path / "run_id_class_dict.pkl").write_bytes(pickle.dumps({0: "dcm", 1: "nf"}))
    loaded = CellClassifier.from_pretrained(folder, label="disease", device="cpu")
    assert list(loaded.classes) == (["dcm", "nf"] if dictionary == "pickle" else ["B", "T"])
    some = adata[:5].copy()
    loaded.predict(some)
    np.testing.assert_allclose(some.obs["disease_confidence"], own(clf, adata, 0, np.arange(5)).max(1), atol=1e-6)
    assert loaded.scores is None


def test_a_pretrained_model_is_no_classifier(gf, tmp_path):
    gf.save_pretrained(tmp_path)
    with pytest.raises(AssetError, match="classifier.weight is not among"):
        CellClassifier.from_pretrained(tmp_path, device="cpu")


def test_class_names_of_another_model_are_refused(clf, tmp_path):
    clf.models[0].model.save_pretrained(tmp_path)
    clf.models[0].tokenizer.save_pretrained(tmp_path)
    (tmp_path / "id_class_dict.json").write_text(json.dumps({"0": "a", "1": "b", "2": "c"}))
    with pytest.raises(AssetError, match="another model"):
        CellClassifier.from_pretrained(tmp_path, device="cpu")


def test_of_several_class_names_those_of_the_run_are_taken(clf, adata, tmp_path):
    for prefix in ("a", "run_b"):
        clf.models[0].model.save_pretrained(tmp_path / f"250101_geneformer_cellClassifier_{prefix}" / "ksplit1")
        (tmp_path / f"{prefix}_id_class_dict.pkl").write_bytes(pickle.dumps({0: f"B of {prefix}", 1: f"T of {prefix}"}))
        clf.models[0].tokenizer.save_pretrained(tmp_path / f"250101_geneformer_cellClassifier_{prefix}")
    for prefix in ("a", "run_b"):
        loaded = CellClassifier.from_pretrained(
            tmp_path / f"250101_geneformer_cellClassifier_{prefix}" / "ksplit1", device="cpu"
        )
        assert list(loaded.classes) == [f"B of {prefix}", f"T of {prefix}"]
    (tmp_path / "run_b_id_class_dict.pkl").rename(tmp_path / "c_id_class_dict.pkl")
    model = tmp_path / "250101_geneformer_cellClassifier_run_b" / "ksplit1"
    none = CellClassifier.from_pretrained(model, device="cpu").classes  # two folders up lie other projects
    assert not {"B of a", "B of run_b"} & set(none)
    for prefix in "ac":
        (tmp_path / f"{prefix}_id_class_dict.pkl").rename(model.parent / f"{prefix}_id_class_dict.pkl")
    with pytest.raises(AssetError, match="a_id_class_dict.pkl, c_id_class_dict.pkl.*beside the model's config.json"):
        CellClassifier.from_pretrained(model, device="cpu")


def test_tokenized_cells_do_as_well_as_anndata(clf, gf, adata, split, tmp_path):
    cells = gf.tokenizer(adata, columns=("cell_type", "donor"))
    cells.save(tmp_path / "cells.dataset")
    other = finetune(gf, str(tmp_path / "cells.dataset"), "cell_type", split=split, freeze_layers=1, **QUICK)
    assert other.scores.table.loc[HELD_OUT].equals(clf.scores.table.loc[HELD_OUT])
    table = other.predict(cells)
    assert list(table.columns) == ["cell_type_predicted", "cell_type_confidence"] and list(table.index) == list(
        adata.obs_names
    )


def test_it_screens_with_the_models_that_have_not_seen_the_cell(clf, adata):
    screen = clf.perturb(adata, kind="delete", genes="all", state="cell_type", start="B", goal="T", max_cells=6)
    shifts = screen.shifts
    fold = dict(zip(adata.obs_names, clf.model_of(adata)))
    assert (shifts["model"] == shifts["cell"].map(fold)).all()
    assert set(shifts["donor"]) <= set(adata.obs["donor"])


def test_embeddings_come_from_one_fold(clf, adata):
    some = adata[:4].copy()
    clf.embed(some, fold=2)
    direct = clf.models[2].embed(adata[:4].copy(), copy=True).obsm["X_geneformer"]
    np.testing.assert_array_equal(some.obsm["X_geneformer"], direct)
    with pytest.raises(OptionError, match="fold=3"):
        clf.embed(some, fold=3)


@pytest.mark.parametrize("kind", ["scores", "roc", "calibration", "confusion"])
def test_the_scores_draw_themselves(clf, kind):
    ax = clf.scores.plot(kind=kind)
    if kind == "confusion":
        found = clf.scores.details[HELD_OUT].confusion
        assert sorted(int(text.get_text()) for text in ax.texts) == sorted(found.to_numpy()[found.to_numpy() > 0])
    else:
        assert any(HELD_OUT in text.get_text() for text in ax.figure.findobj(lambda a: hasattr(a, "get_text")))


def test_saved_scores_draw_what_they_kept(clf):
    saved = Scores.from_dict(json.loads(json.dumps(clf.scores.to_dict())))
    drawn, again = (scores.plot(kind="confusion", method="PCA + kNN") for scores in (clf.scores, saved))
    assert [t.get_text() for t in drawn.texts] == [t.get_text() for t in again.texts]
    with pytest.raises(DataError, match="nothing to draw"):
        saved.plot(kind="roc")
    for wrong, name in ((dict(kind="rok"), "roc"), (dict(method="kNN"), "PCA")):
        with pytest.raises(OptionError, match=name):
            clf.scores.plot(**wrong)


def test_the_scores_are_whole(clf):
    held = clf.scores.details[HELD_OUT]
    assert held.confusion.to_numpy().sum() == 150 and list(held.per_class.columns) == [
        "precision",
        "recall",
        "f1",
        "support",
        "auroc",
    ]
    assert held.calibration["n"].sum() == 150
    assert clf.scores.table.loc[HELD_OUT, "macro_f1"] == pytest.approx(held.per_class["f1"].mean())


@pytest.mark.parametrize("n", [1, 13, 25])
def test_a_last_batch_of_one_cell_is_predicted_too(clf, adata, n):
    whole, part = clf.probabilities(adata), clf.probabilities(adata[:n].copy())
    assert len(part) == n
    np.testing.assert_allclose(part, whole.iloc[:n], atol=1e-6)
    np.testing.assert_allclose(clf.probabilities(adata[:n].copy(), token_budget=1), part, atol=1e-6)  # each alone


def test_class_weights_count_rare_classes_alike():
    codes = np.array([0] * 9 + [1])
    weights = weights_of("balanced", np.array(["a", "b"]), codes)
    assert (weights.numpy() * [9, 1]).tolist() == pytest.approx([5, 5])
    assert weights_of({"b": 3, "a": 1}, np.array(["a", "b"]), codes).tolist() == [1, 3]
    with pytest.raises(OptionError, match="'a', 'c'"):
        weights_of({"a": 1, "c": 2}, np.array(["a", "b"]), codes)
    with pytest.raises(OptionError, match="balanced"):
        weights_of("balance", np.array(["a", "b"]), codes)


def test_memorised_noise_is_called_overfitted(gf, adata):
    noisy = adata[:60].copy()
    noisy.obs["coin"] = np.random.default_rng(0).choice(["heads", "tails"], 60)
    with pytest.warns(
        ScellfmWarning, match="memorised.*split=folds.*epochs=1 .*freeze_layers=1.*genes='all'.*emb_layer=-1"
    ):
        clf = finetune(gf, noisy, "coin", split=folds(noisy, k=2), epochs=30, learning_rate=3e-3, n_boot=20)
    assert clf.overfit_check.overfitted and clf.overfit_check.gap > 0.3


@pytest.mark.parametrize("by", [None, "patient"])
@pytest.mark.parametrize("epochs", [1, 10])
@pytest.mark.parametrize("frozen", [0, 4, 6])
def test_the_advice_is_whole_and_tells_what_was_followed(by, epochs, frozen):
    advice = advice_for(by, epochs, frozen, 6)
    for argument in ("split=", "epochs=1", f"freeze_layers={min(6, frozen + 2)}", "genes='all'", "emb_layer=-1"):
        assert sum(argument in text for text in advice) == 1, argument
    followed = advice[-1] if advice[-1].startswith("already followed") else ""
    assert ("split= by='patient'" in followed) == (by == "patient") and ("epochs=1" in followed) == (epochs == 1)
    assert ("freeze_layers=6" in followed) == (frozen == 6)
    if epochs == 10:
        assert "epochs=1 instead of 10" in " ".join(advice)


def test_overfitting_goes_by_the_gap_and_the_interval():
    table = pd.DataFrame({"balanced_accuracy": [0.8, 0.85, 0.9]}, index=[HELD_OUT, TRAINED, "PCA + kNN"])
    assert not check_overfit(Scores(table, low=table - 0.1, high=table + 0.1), []).overfitted
    table.iloc[1] = 0.95
    assert not check_overfit(
        Scores(table, low=table - 0.2, high=table + 0.2), []
    ).overfitted  # inside the held-out interval
    assert check_overfit(Scores(table, low=table - 0.1, high=table + 0.1), []).overfitted


def test_known_cells_survive_order_and_strangers():
    empty = np.array([], dtype=int)
    parts = [Split(np.array([0]), np.array([1]), np.array([2]), None, 4)]
    known = TrainedOn.of(["a", "b", "c", "d"], parts)
    assert known.fold_of(["c", "a", "b", "d", "x"]).tolist() == [0, membership.TRAINED, membership.TRAINED, NEW, NEW]
    assert TrainedOn.of(["a"], [Split(empty, empty, empty, None, 1)]).fold_of(["a"]).tolist() == [NEW]


def changed(adata, **obs):
    other = adata.copy()
    for name, value in obs.items():
        other.obs[name] = value
    return other


def test_bad_labels_are_named(gf, adata, split):
    missing = adata.obs["cell_type"].astype(object).where(np.arange(150) != 5, np.nan)
    rare = np.array(["rare"] + ["common"] * 149)
    cases = [
        (adata, "cell_typ", "cell_type"),
        (changed(adata, mine=missing), "mine", "NaN"),
        (changed(adata, mine="T"), "mine", "single class, 'T'"),
        (changed(adata, mine=rare), "mine", "'rare'.*1 cell"),
        (changed(adata, mine=adata.obs["donor"].astype(str)), "mine", "none of the .* training cells of fold 0"),
    ]
    for data, label, words in cases:
        with pytest.raises(DataError, match=words):
            finetune(gf, data, label, split=split, **QUICK)


def test_bad_splits_are_named(gf, adata, split):
    leaky = Split(split.splits[0].train, np.array([], int), split.splits[0].train[:5], "donor", 150)
    with pytest.raises(DataError, match="both train and test"):
        finetune(gf, adata, "cell_type", split=Folds([leaky], "donor"), **QUICK)
    with pytest.raises(DataError, match="150 cells and the data have 149"):
        finetune(gf, adata[:149].copy(), "cell_type", split=split, **QUICK)
    with pytest.raises(DataError, match="no test cells"):
        finetune(gf, adata, "cell_type", split=hold_out(adata, by="donor", fractions=(0.7, 0.3, 0)), **QUICK)


def test_cells_of_one_name_are_told_apart_by_their_occurrence(gf, adata, split):
    twins = adata.copy()
    twins.obs_names = ["same"] * 150
    with pytest.warns(ScellfmWarning, match="obs_names repeat"):
        clf = finetune(gf, twins, "cell_type", split=split, **QUICK)
    unique = finetune(gf, adata, "cell_type", split=split, **QUICK)
    assert (clf.model_of(twins) == unique.model_of(adata)).all()


@pytest.mark.parametrize("layers", [4, -1, 1.5])
def test_more_frozen_layers_than_there_are_is_an_error(gf, adata, split, layers):
    with pytest.raises(OptionError, match="freeze_layers"):
        finetune(gf, adata, "cell_type", split=split, freeze_layers=layers, **QUICK)


def test_training_can_stop_on_the_valid_donor(gf, adata):
    split = hold_out(adata, by="donor", fractions=(0.34, 0.33, 0.33))
    clf = finetune(
        gf, adata, "cell_type", split=split, stop="valid_loss", patience=1, epochs=6, learning_rate=2e-2, n_boot=20
    )
    losses = clf.history.epochs.valid_loss
    assert clf.history.best == losses.idxmin()
