"Predictions through the public class: the original's numbers, genes by name, and every doubt in words."

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import golden
from scgenept_golden import OUTPUTS, SETTINGS, VARIANTS, genes, model_of

from scellfm.core import DataError, OptionError, ScellfmWarning
from scellfm.data import read, simulate_perturbations
from scellfm.scgenept import PerturbationData, ScGenePT, evaluate_published, evaluate_which, predict_values
from scellfm.scgpt.perturbation import predict as predict_scgpt

BATCH = OUTPUTS["batch/expr"], OUTPUTS["batch/flags"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_predictions_are_the_originals(tmp_path, variant):
    model = model_of(tmp_path, variant)
    np.testing.assert_allclose(predict_values(model, *BATCH), OUTPUTS[f"{variant}/pred_perturb_all"], atol=1e-5)
    seen = predict_values(model, *BATCH, genes="seen", original=True)
    np.testing.assert_allclose(seen, OUTPUTS[f"{variant}/pred_perturb_batch-wise"], atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_predictions_from_control_cells_are_the_originals(tmp_path, variant):
    data = PerturbationData(read(golden("scgenept") / "data" / "input.h5ad"))
    model = model_of(tmp_path, variant)
    controls = data.controls
    drawn = np.random.RandomState(SETTINGS["npseed"] + 1).randint(0, len(controls), 5)
    rows = OUTPUTS["pred_from_ctrl/rows"]
    np.testing.assert_array_equal(drawn, rows)
    cells = data.adata[controls[rows]].copy()
    cells.obs_names = [f"c{i}" for i in range(len(rows))]
    name = str(OUTPUTS["pred_from_ctrl/pert"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScellfmWarning)
        found = model.predict_cells([name], controls=cells, n_controls=None)
        mean = model.predict([name], controls=cells, n_controls=None)
    np.testing.assert_allclose(found.X.toarray(), OUTPUTS[f"{variant}/pred_from_ctrl_pool5"], atol=1e-5)
    np.testing.assert_allclose(mean.loc[name], OUTPUTS[f"{variant}/pred_from_ctrl_pool5_mean"], atol=1e-5)
    assert list(mean.columns) == genes()


SMALL = dict(d_model=16, n_heads=2, d_hid=16, n_layers=1, device="cpu")


@pytest.fixture(scope="module")
def simulated():
    return simulate_perturbations(n_targets=12, n_pairs=4, n_genes=40, n_modules=3, n_cells=12, n_controls=40)


@pytest.fixture(scope="module")
def data(simulated):
    return PerturbationData(simulated.adata)


@pytest.fixture(scope="module")
def model(data, simulated):
    made = ScGenePT.from_config("tiny", data, knowledge="programmes", gene_vectors=simulated.vectors["know"], **SMALL)
    return made.fit(data, data.split("simulation", seed=1), epochs=2, batch_size=32, learning_rate=3e-3)


def test_the_order_of_genes_is_no_matter(model, data):
    cells = data.adata[data.controls].copy()
    wanted = model.predict(["G01+ctrl"], controls=cells)
    shuffled = cells[:, np.random.default_rng(0).permutation(cells.n_vars)].copy()
    found = model.predict(["G01+ctrl"], controls=shuffled)
    pd.testing.assert_frame_equal(found[wanted.columns], wanted, atol=1e-5, rtol=1e-5)
    pd.testing.assert_frame_equal(model.predict(["G01+ctrl"]), wanted, atol=1e-5, rtol=1e-5)


def test_data_with_genes_in_another_order_are_scored_and_learnt_from_by_name(tmp_path, model, simulated, data):
    order = np.random.default_rng(1).permutation(data.adata.n_vars)
    turned = PerturbationData(simulated.adata[:, order].copy())
    model.save_pretrained(tmp_path)
    again, split = ScGenePT.from_pretrained(tmp_path, device="cpu"), data.split("simulation", seed=1)
    found, wanted = again.evaluate(turned, split).values("mse"), model.evaluate(data, split).values("mse")
    pd.testing.assert_series_equal(found["scGenePT"], wanted["scGenePT"], rtol=1e-4)
    with pytest.raises(DataError, match="other genes"):
        evaluate_published(ScGenePT.from_pretrained(tmp_path, device="cpu"), turned, split)
    again.fit(turned, split, epochs=1, batch_size=32)
    assert list(again.genes) == list(turned.input_genes)


def test_a_perturbation_is_one_however_it_is_written(model):
    table = model.predict(["G01", "G01+ctrl", "ctrl+G01", "G02+G05", "G05+G02"], n_controls=9)
    np.testing.assert_allclose(table.loc["G01"], table.loc["ctrl+G01"])
    np.testing.assert_allclose(table.loc["G02+G05"], table.loc["G05+G02"])


def test_predictions_do_not_depend_on_what_else_is_asked(model):
    alone, among = model.predict(["G02"]), model.predict(["G07", "G02", "G01+G03"])
    np.testing.assert_allclose(alone.loc["G02"], among.loc["G02"], atol=1e-5)


def test_doubts_are_said(model, data, simulated):
    with pytest.warns(ScellfmWarning, match="three and more genes"):
        model.predict(["G01+G02+G03"], n_controls=3)
    singles = ScGenePT.from_config("tiny", data, **SMALL)
    singles.trained, singles.data = ["G01", "G02"], data
    with pytest.warns(ScellfmWarning, match="single genes alone"):
        singles.predict(["G01+G02"], n_controls=3)
    with pytest.warns(ScellfmWarning, match="not measured"):
        model.predict(["G01"], controls=data.adata[data.controls][:, 5:].copy(), n_controls=3)


def test_what_cannot_be_predicted_is_refused_in_words(model, data):
    with pytest.raises(DataError, match="'NOTHERE' has no row"):
        model.predict(["NOTHERE"])
    cells = data.adata[data.controls].copy()
    cells.var_names = [f"ENSG{i}" for i in range(cells.n_vars)]
    cells.var = cells.var[[]]
    with pytest.raises(DataError, match="knows 0 of the 40 genes"):
        model.predict(["G01"], controls=cells)
    with pytest.raises(DataError, match="log|counts"):
        model.predict(["G01"], controls=data.adata[data.controls], layer="counts")
    with pytest.raises(OptionError, match="list of names"):
        model.predict("G01")
    loaded = ScGenePT.from_config("tiny", data, **SMALL)
    with pytest.raises(OptionError, match="pass control cells"):
        loaded.predict(["G01"])


def test_counts_are_whole_numbers_and_marked(model):
    cells = model.predict_cells(["G01"], n_controls=5, counts=True, depth=500)
    again = model.predict_cells(["G01"], n_controls=5, counts=True, depth=500)
    assert cells.n_obs == 5 and (cells.X.data % 1 == 0).all() and "simulated" in cells.uns
    assert (cells.X != again.X).nnz == 0


def test_a_saved_model_predicts_the_same(tmp_path, model, data):
    model.save_pretrained(tmp_path)
    again = ScGenePT.from_pretrained(tmp_path, device="cpu")
    pd.testing.assert_frame_equal(again.predict(["G03"], controls=data), model.predict(["G03"]))
    assert again.trained == model.trained


def test_evaluation_has_every_baseline_in_the_same_table(model, data):
    scores = model.evaluate(data, data.split("simulation", seed=1))
    methods = set(scores.table.index) if hasattr(scores, "table") else set(scores.values("mse"))
    for name in ("scGenePT", "no change", "training mean", "ridge on programmes", "ridge on permuted programmes"):
        assert name in methods
    with pytest.warns(ScellfmWarning, match="trained on"):
        trained = data.split(
            "custom", sets={"train": ["G11+ctrl"], "test": [f"{n}+ctrl" for n in model.trained if "+" not in n][:3]}
        )
        model.evaluate(data, trained)


def test_a_profile_is_explained_by_the_perturbation_that_has_it(model, data):
    truth = model.predict(["G04"]).loc["G04"]
    assert model.which(truth, data.conditions)["rank"].idxmin() == "G04"
    scores = evaluate_which(model, data, data.split("simulation", seed=1))
    ranks = pd.DataFrame({name: detail["by_condition"]["rank"] for name, detail in scores.details.items()})
    assert set(ranks) == {"scGenePT", "change of its own gene", "chance"}
    np.testing.assert_allclose(scores.table["mean_reciprocal_rank"], (1 / ranks).mean()[scores.table.index])
    low, mean, high = (t["mean_reciprocal_rank"].dropna() for t in (scores.low, scores.table, scores.high))
    assert len(low) and (low <= mean[low.index]).all() and (mean[high.index] <= high).all()
    written = [f"ctrl+{name}" if "+" not in name else name for name in data.conditions] + ["G01+ctrl", "G01"]
    other = evaluate_which(model, data, data.split("simulation", seed=1), candidates=written)
    pd.testing.assert_frame_equal(other.table, scores.table)
    with pytest.raises(DataError, match="both symbols"):
        model.which(pd.Series([1.0, 2.0, 3.0], index=["a", "b", "c"]), data.conditions)


def test_scgpts_own_predictor_keeps_genes_whose_flag_is_one():
    from scellfm.scgpt.model import ScGPTConfig
    from scellfm.scgpt.perturbation import PerturbationConfig, PerturbationModel

    sizes = ScGPTConfig(6, 5, d_model=8, n_heads=2, d_hid=8, n_layers=1, dropout=0.0)
    torch.manual_seed(0)
    made = PerturbationModel(PerturbationConfig(sizes, flag_pad_id=2)).eval()
    values, flags = torch.tensor([[0.0, 0.0, 1.0, 2.0]]), torch.tensor([[1, 0, 0, 0]])
    found = predict_scgpt(made, torch.arange(4), values, flags, genes="seen")
    assert found[0, 1] == 0 and found[0, 0] != 0  # gene 1 is not seen and not perturbed
