"""Fine-tuned annotation: each cell is predicted by the model that has not seen its donor, and learned nothing of it."""

import numpy as np
import pytest
import torch

import scellfm.scgpt.annotation as annotation
from scellfm.core import DataError, OptionError, ScellfmWarning
from scellfm.data import folds, hold_out
from scellfm.data.cells import simulate_cells
from scellfm.scgpt import CellClassifier, ScGPT
from scellfm.training import model_tensors

QUIET = pytest.mark.filterwarnings("ignore::scellfm.core.ScellfmWarning")
FAST = dict(epochs=2, batch_size=8, learning_rate=1e-3, n_boot=0)


@pytest.fixture(scope="module")
def adata():
    return simulate_cells(
        60, 40, cell_types=["B", "T"], donors=4, regulators=1, targets=3, programme_size=10, depth=200
    )


@pytest.fixture(scope="module")
def gpt(adata):
    return ScGPT.from_config("tiny", adata, d_model=16, d_hid=16, n_heads=2, n_layers=2, device="cpu")


@pytest.fixture(scope="module")
def split(adata):
    return folds(adata, by="donor", k=2, stratify="cell_type")


@pytest.fixture(scope="module")
def fitted(gpt, adata, split):
    return gpt.finetune(adata, "cell_type", split=split, **FAST)


def same(one, two):
    a, b = model_tensors(one.model), model_tensors(two.model)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@QUIET
def test_labels_and_counts_of_a_held_out_donor_do_not_reach_its_model(gpt, adata, split, fitted):
    other, held = adata.copy(), split.splits[0].test
    kinds = other.obs["cell_type"].astype(str).to_numpy()
    kinds[held] = np.roll(kinds[held], 1)
    other.obs["cell_type"], other.X = kinds, other.X.toarray()
    other.X[held] = other.X[held[::-1]]
    again = gpt.finetune(other, "cell_type", split=split, **FAST)
    assert same(again.models[0], fitted.models[0]) and not same(again.models[1], fitted.models[1])


@QUIET
def test_predictions_come_from_the_model_that_has_not_seen_the_cell_also_after_saving(adata, split, fitted, tmp_path):
    table = fitted.probabilities(adata).to_numpy()
    truth = np.unique(adata.obs["cell_type"].astype(str), return_inverse=True)[1]
    accuracy = (table.argmax(1) == truth).mean()
    assert accuracy == pytest.approx(fitted.scores.table.loc["scGPT (held out)", "accuracy"])
    few = adata[[40, 3, 17]].copy()
    assert np.allclose(fitted.probabilities(few), table[[40, 3, 17]], atol=1e-6)
    fitted.save_pretrained(tmp_path)
    again = CellClassifier.from_pretrained(tmp_path, device="cpu")
    assert np.array_equal(again.probabilities(adata), table) and again.scores.table.equals(fitted.scores.table)
    assert again.predict(few) is None and list(few.obs["cell_type_predicted"].cat.categories) == ["B", "T"]
    assert few.obs["cell_type_confidence"].between(0.5, 1).all() and "cell_type_predicted" in few.uns
    assert ScGPT.from_pretrained(tmp_path / "fold1", device="cpu").cell_types == ["B", "T"]
    new = adata[:4].copy()
    new.obs_names = [f"new{i}" for i in range(4)]
    both = [annotation.class_probabilities(model, new, model.match(new).index) for model in fitted.models]
    assert np.allclose(fitted.probabilities(new), np.mean(both, axis=0), atol=1e-6)


@QUIET
def test_resumed_is_uninterrupted_and_order_does_not_matter(gpt, adata, split, fitted, tmp_path, monkeypatch):
    calls, loss = [], annotation.class_loss

    def dying(model, batch):
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return loss(model, batch)

    monkeypatch.setattr(annotation, "class_loss", dying)
    options = dict(split=split, folder=tmp_path, save_every=1, **FAST)
    with pytest.raises(KeyboardInterrupt):
        gpt.finetune(adata, "cell_type", **options)
    resumed = gpt.finetune(adata, "cell_type", **options)
    assert len(calls) > 11 and all(map(same, resumed.models, fitted.models))
    assert [h.step_rows for h in resumed.histories] == [h.step_rows for h in fitted.histories]
    turned = adata[::-1].copy()
    again = gpt.finetune(turned, "cell_type", split=folds(turned, by="donor", k=2, stratify="cell_type"), **FAST)
    assert all(map(same, again.models, fitted.models))


@QUIET
def test_frozen_layers_stay_and_cells_without_genes_get_no_name(gpt, adata):
    few = adata.copy()
    few.X[2] = 0
    few.X.eliminate_zeros()
    split = hold_out(few, by="donor", fractions=(0.5, 0.25, 0.25))
    made = gpt.finetune(few, "cell_type", split=split, freeze_layers=1, stop="valid_loss", **FAST)
    before, after = (model.model.transformer_encoder.layers for model in (gpt, made.models[0]))
    assert torch.equal(before[0].linear1.weight, after[0].linear1.weight)
    assert not torch.equal(before[1].linear1.weight, after[1].linear1.weight)
    assert torch.equal(gpt.model.decoder.fc[0].weight, made.models[0].model.decoder.fc[0].weight)
    made.predict(few)
    assert few.obs["cell_type_predicted"].isna().tolist() == [i == 2 for i in range(60)]
    assert np.isnan(few.obs["cell_type_confidence"].iloc[2])
    with pytest.warns(ScellfmWarning, match="their predictions are not held out"):
        made.probabilities(few)


@QUIET
def test_what_cannot_be_learned_is_named(gpt, adata, split):
    one = adata.copy()
    one.obs["cell_type"] = "B"
    for error, words, call in [
        (DataError, "single class", dict(adata=one, label="cell_type")),
        (DataError, "cell_type", dict(adata=adata, label="cell_typ")),
        (OptionError, "0 to 2", dict(adata=adata, label="cell_type", freeze_layers=3)),
        (DataError, "60 cells.*50", dict(adata=adata[:50].copy(), label="cell_type")),
        (OptionError, "epochs", dict(adata=adata, label="cell_type", epoch=1)),
    ]:
        with pytest.raises(error, match=words):
            gpt.finetune(**{**FAST, "split": split, **call})
