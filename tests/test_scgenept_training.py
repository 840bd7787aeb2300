"Training through the public class has the original's losses and predictions, and survives what happens to it."

import json
import math

import numpy as np
import pytest
import torch
from conftest import golden
from scgenept_golden import (
    CONFIG,
    INFO,
    OUTPUTS,
    SETTINGS,
    VARIANTS,
    VOCABULARY,
    file_of,
    fine_tuned,
    genes,
    model_of,
    scgpt_folder,
    vectors,
)

from scellfm.core import AssetError, DataError, OptionError, ScellfmWarning, StoreError
from scellfm.data import GeneVectors, simulate_perturbations
from scellfm.scgenept import Pairs, PerturbationData, ScGenePT, predict_values, published_tables, train_pairs
from scellfm.scgenept.knowledge import inputs_of
from scellfm.scgenept.training import GeneSamples


def flags_of(variant):
    return OUTPUTS[f"{variant}/train_x"][..., 1]


TRAINED = [variant for variant in VARIANTS if f"{variant}/train_losses" in OUTPUTS.files]


@pytest.mark.parametrize("variant", TRAINED)
def test_training_has_the_originals_losses_and_predictions(tmp_path, variant):
    model = model_of(tmp_path, variant, original=True)
    x, y = OUTPUTS[f"{variant}/train_x"], OUTPUTS[f"{variant}/train_y"]
    losses = OUTPUTS[f"{variant}/train_losses"]
    size = 4
    epochs = len(losses) // math.ceil(len(x) / size)
    pairs = Pairs.from_arrays(x[..., 0], x[..., 1], y)
    options = dict(epochs=epochs, batch_size=size, learning_rate=CONFIG["lr"], decay=CONFIG["gamma"], shuffle=False)
    history = train_pairs(model, pairs, max_genes=10**6, **options)
    np.testing.assert_allclose(history.steps["loss"], losses, atol=1e-5, rtol=1e-5)
    found = predict_values(model, OUTPUTS["batch/expr"], OUTPUTS["batch/flags"])
    np.testing.assert_allclose(found, OUTPUTS[f"{variant}/forward_after_train"], atol=1e-5)


def tables_of(variant):
    "(golden key of the table, name of the table, key of its vectors) of a variant's tables."
    info, found = INFO[variant], {}
    for name in inputs_of(variant).languages:
        kind = "genept" if name.startswith("ncbi") else "go"
        suffix = "gpt" if kind == "genept" else "gpt_avg" if variant.endswith("_avg") else "gpt_concat"
        found[name] = (f"{variant}/{kind}_init", f"{name}_{suffix}")
    assert info is not None
    return found


@pytest.mark.parametrize("variant", [v for v in VARIANTS if inputs_of(v).languages])
def test_initial_tables_are_the_originals(variant):
    "Two variants' recorded tables hold trained values (see the clarifications); theirs are in the checkpoints."
    from scellfm.assets import read_tensors

    parts = tables_of(variant)
    found = published_tables(
        {name: vectors(key) for name, (_, key) in parts.items()}, genes(), VOCABULARY, SETTINGS["embseed"]
    )
    stored = read_tensors(file_of(variant))
    for name, prefix in inputs_of(variant).languages.items():
        wanted = stored[f"{prefix}.embedding.weight"].double().numpy()
        np.testing.assert_allclose(found[name], wanted, atol=1e-7)


@pytest.fixture(scope="module")
def simulated():
    return simulate_perturbations(n_targets=12, n_pairs=4, n_genes=40, n_modules=3, n_cells=12, n_controls=40)


@pytest.fixture(scope="module")
def data(simulated):
    return PerturbationData(simulated.adata)


SMALL = dict(d_model=16, n_heads=2, d_hid=16, n_layers=1, device="cpu")
FAST = dict(epochs=2, batch_size=32, learning_rate=3e-3)


def new(data, simulated, kind="know", **options):
    return ScGenePT.from_config(
        "tiny", data, knowledge="programmes", gene_vectors=simulated.vectors[kind], **SMALL, **options
    )


def same_weights(one, other):
    return all(torch.equal(value, other.model.state_dict()[name]) for name, value in one.model.state_dict().items())


def test_an_interrupted_fit_goes_on_exactly_and_other_settings_are_refused(tmp_path, data, simulated, monkeypatch):
    split = data.split("simulation", seed=1)
    whole = new(data, simulated).fit(data, split, **FAST)
    from scellfm import training

    calls, step = [], training.Run.step

    def dies(self, *rest):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(self, *rest)

    monkeypatch.setattr(training.Run, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        new(data, simulated).fit(data, split, folder=tmp_path, save_every=2, **FAST)
    monkeypatch.setattr(training.Run, "step", step)
    for change in ({"learning_rate": 1e-3}, {"max_genes": 20}, {"dropout": 0.5}, {"seed": 7}, {"patience": 3}):
        with pytest.raises(StoreError, match="another run"):
            new(data, simulated).fit(data, split, folder=tmp_path, save_every=2, **FAST | change)
    with pytest.raises(StoreError, match="another run"):
        new(data, simulated, "none").fit(data, split, folder=tmp_path, save_every=2, **FAST)
    with pytest.raises(StoreError, match="another run"):
        new(data, simulated).fit(data, data.split("simulation", seed=2), folder=tmp_path, save_every=2, **FAST)
    one, two = [name for name in split.perturbations("train") if "+" not in name][:2]
    turned = simulated.adata.copy()
    turned.obs["condition"] = turned.obs["condition"].astype(str).replace({one: two, two: one})
    turned = PerturbationData(turned)  # the same cells under other labels
    with pytest.raises(StoreError, match="another run"):
        new(turned, simulated).fit(turned, turned.split("simulation", seed=1), folder=tmp_path, save_every=2, **FAST)
    resumed = new(data, simulated).fit(data, split, folder=tmp_path, save_every=2, **FAST)
    assert resumed.history.step_rows == whole.history.step_rows and same_weights(resumed, whole)


def test_training_is_the_same_whatever_saves_memory(data, simulated):
    split = data.split("simulation", seed=1)
    plain = new(data, simulated).fit(data, split, dropout=0.0, **FAST)
    for options in ({"checkpointing": True}, {"accumulate": 3}):
        spared = new(data, simulated).fit(data, split, dropout=0.0, **options, **FAST)
        np.testing.assert_allclose(spared.history.steps["loss"], plain.history.steps["loss"], rtol=1e-4)


def test_perturbed_genes_are_always_read_and_draws_are_keyed(data):
    split = data.split("simulation", seed=1)
    pairs = Pairs.from_split(data, split, "train", 0, False)
    samples = GeneSamples(pairs, 7, 3)
    positions = np.arange(len(pairs))
    genes = samples.of_batch(positions, 0)
    assert genes.shape == (len(pairs), 7)
    for row, flags in zip(genes, pairs.flags):
        assert len(set(row)) == 7 and set(flags) <= set(row)
    np.testing.assert_array_equal(samples.of_batch(positions[::-1], 0), genes[::-1])
    assert not np.array_equal(samples.of_batch(positions, 1), genes)
    lost = GeneSamples(pairs, 7, 3, original=True).of_batch(positions, 0)
    assert (lost == lost[0]).all() and any(not set(f) <= set(row) for row, f in zip(lost, pairs.flags))


def test_validation_genes_are_the_same_in_every_epoch(data, simulated):
    model = new(data, simulated)
    history = model.fit(data, data.split("simulation", seed=1), max_genes=10, **FAST | {"learning_rate": 0}).history
    assert history.epochs["valid_loss"].nunique() == 1
    assert set(history.baselines) == {"no change", "training mean"}


def test_frozen_tables_stay_and_are_left_out_of_the_folder(tmp_path, data, simulated):
    split, table = data.split("simulation", seed=1), simulated.vectors["know"]
    for freeze in (True, False):
        model = new(data, simulated, freeze_language=freeze).fit(data, split, **FAST)
        language = model.model.languages["programmes"].embedding.weight.detach().numpy()
        kept = np.isin(data.input_genes, table.genes)
        start = table.values[table.genes.get_indexer(data.input_genes[kept])]
        assert np.allclose(language[kept], start) == freeze
        model.save_pretrained(tmp_path / str(freeze))
        again = ScGenePT.from_pretrained(tmp_path / str(freeze), gene_vectors=table if freeze else None, device="cpu")
        assert same_weights(model, again)
    with pytest.raises(OptionError, match="pass the vectors of genes"):
        ScGenePT.from_pretrained(tmp_path / "True", device="cpu")
    narrow = GeneVectors(table.genes, table.values[:, :3])
    with pytest.raises(OptionError, match="width 3 and the model was trained with 16"):
        ScGenePT.from_pretrained(tmp_path / "True", gene_vectors=narrow, device="cpu")


def test_published_weights_load_by_their_file_names_with_full_accounting(tmp_path):
    sizes = scgpt_folder(tmp_path / "scgpt")
    names = {"scgpt": "best_model_seed_42.pt"}
    for variant in VARIANTS:
        name = names.get(variant, "best_model_gpt3.5_ada_rnd_seed_42_concat.pt")
        folder = fine_tuned(tmp_path / variant / "norman", variant, name)
        model = ScGenePT.from_pretrained(folder, knowledge=variant, scgpt=sizes, genes=genes(), device="cpu")
        assert not model.load_report.unused and not model.load_report.fresh
        found = predict_values(model, OUTPUTS["batch/expr"], OUTPUTS["batch/flags"])
        np.testing.assert_allclose(found, OUTPUTS[f"{variant}/forward"], atol=1e-5)


@pytest.mark.parametrize(
    "variant", ["scgpt", "scgenept_ncbi_gpt", "scgenept_go_c_gpt_concat", "scgenept_go_all_gpt_concat"]
)
def test_what_a_checkpoint_reads_is_told_from_its_tensors(tmp_path, variant):
    folder = fine_tuned(tmp_path / variant.split("_gpt")[0] / "norman", variant)
    model = ScGenePT.from_pretrained(folder, scgpt=scgpt_folder(tmp_path / "scgpt"), device="cpu")
    assert model.inputs.languages == inputs_of(variant).languages


def test_what_is_saved_for_the_original_has_its_names_and_numbers(tmp_path):
    from scellfm.assets import read_tensors

    for variant in ("scgenept_ncbi_gpt", "scgenept_go_c_gpt_concat"):
        model, folder = model_of(tmp_path, variant), tmp_path / "saved" / variant
        model.save_pretrained(folder, original=True)
        wanted, found = read_tensors(file_of(variant)), read_tensors(folder / "best_model.pt")
        assert {name: value.dtype for name, value in found.items()} == {n: v.dtype for n, v in wanted.items()}
        for name, value in wanted.items():
            if ".embedding." in name and name.startswith(("genept", "gopt")):
                kept = model.tokens
                torch.testing.assert_close(found[name][kept], value[kept], atol=1e-7, rtol=0)
            else:
                assert torch.equal(found[name], value), name


def test_a_checkpoint_of_another_vocabulary_is_refused(tmp_path):
    sizes = scgpt_folder(tmp_path / "scgpt")
    shorter = {gene: number for gene, number in VOCABULARY.items() if number < len(VOCABULARY) - 7}
    shorter["<pad>"] = max(shorter.values()) if "<pad>" not in shorter else shorter["<pad>"]
    shorter = {gene: i for i, gene in enumerate(shorter)}
    (sizes / "vocab.json").write_text(json.dumps(shorter))
    for variant in ("scgpt", "scgenept_ncbi_gpt"):
        with pytest.raises(AssetError, match="vocabulary|does not fit"):
            ScGenePT.from_pretrained(file_of(variant), knowledge=variant, scgpt=sizes, device="cpu")


def test_starting_from_scgpt_fills_what_the_two_share(tmp_path):
    import shutil

    scgpt = golden("scgpt") / "model"
    shutil.copytree(scgpt, tmp_path / "scgpt")
    table = GeneVectors(
        list(json.loads((scgpt / "vocab.json").read_text()))[:40], np.random.default_rng(0).normal(size=(40, 5))
    )
    model = ScGenePT.from_pretrained(tmp_path / "scgpt", knowledge="ncbi", gene_vectors=table, device="cpu")
    from scellfm.assets import read_tensors

    stored = read_tensors(tmp_path / "scgpt")
    assert torch.equal(model.model.encoder.embedding.weight, stored["encoder.embedding.weight"])
    fresh = {name.split(".")[0] for name in model.load_report.fresh}
    assert fresh <= {"pert_encoder", "ln", "decoder", "cls_decoder", "languages"} and "languages" in fresh


def test_vectors_of_another_encoder_take_the_place_of_scgpts(data, simulated):
    model = ScGenePT.from_config("tiny", data, token_vectors=simulated.vectors["know"], **SMALL)
    assert model.model.encoder is None and list(model.model.languages) == ["tokens"]
    model.fit(data, data.split("simulation", seed=1), **FAST)
    assert np.isfinite(model.history.steps["loss"]).all()


def test_the_published_size_has_the_published_number_of_parameters():
    from scellfm.scgenept.checkpoint import SHAPES
    from scellfm.scgenept.model import ScGenePTConfig, ScGenePTModel
    from scellfm.scgpt.model import ScGPTConfig

    sizes = ScGPTConfig(60_697, 60_694, mvc=False, n_cls=1, **SHAPES["human"])
    with torch.device("meta"):
        plain = ScGenePTModel(ScGenePTConfig(sizes, 10))
    assert plain.n_parameters() == {"model": 51_334_658}


def test_bad_inputs_of_training_are_named(data, simulated):
    split = data.split("simulation", seed=1)
    other = simulate_perturbations(n_targets=5, n_pairs=0, n_genes=20, n_cells=4, n_controls=8, seed=3)
    other_data = PerturbationData(other.adata)
    with pytest.raises(DataError, match="to other data"):
        new(data, simulated).fit(data, other_data.split("simulation", seed=1))
    pairs = data.split("no_split")
    pairs = data.split("custom", sets={"train": [label for label in pairs.test if label != "ctrl"]})
    with pytest.raises(OptionError, match="max_genes=1 is fewer"):
        new(data, simulated).fit(data, pairs, max_genes=1)
    with pytest.raises(OptionError, match="dropout=2"):
        new(data, simulated).fit(data, split, dropout=2)
    with pytest.raises(DataError, match="fitted to"):
        train_pairs(new(data, simulated), Pairs.from_arrays(*np.zeros((3, 2, 7))))
    with pytest.raises(DataError, match="vocabulary has 0 of the 40"):
        ScGenePT.from_config("tiny", [f"X{i}" for i in range(40)], **SMALL).fit(data, split)
    with pytest.raises(OptionError, match="knowledge"):
        ScGenePT.from_config("tiny", data, knowledge="modules", gene_vectors=simulated.vectors["know"], **SMALL)
    with pytest.raises(OptionError, match="go_x"):
        ScGenePT.from_config("tiny", data, knowledge="go_x", **SMALL)
    with pytest.raises(OptionError, match="pass the vectors"):
        ScGenePT.from_config("tiny", data, knowledge="go_f", **SMALL)
    with pytest.raises(OptionError, match="the model uses none"):
        ScGenePT.from_config("tiny", data, gene_vectors=simulated.vectors["know"], **SMALL)


def test_genes_without_a_token_are_counted(data, simulated):
    model = ScGenePT.from_config("tiny", list(data.genes[4:]), **SMALL)
    with pytest.warns(ScellfmWarning, match="4 of 40 genes have no token"):
        model.fit(data, data.split("simulation", seed=1), **FAST)
