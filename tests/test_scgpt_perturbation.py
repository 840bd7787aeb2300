"""The model for perturbations gives the original's numbers on the original's weights."""

import json

import numpy as np
import pytest
import torch
from conftest import golden

from scellfm.assets import read_tensors
from scellfm.core import AssetError, OptionError
from scellfm.scgpt import Vocabulary
from scellfm.scgpt.model import ScGPTConfig, elastic_similarity_loss, heads_of
from scellfm.scgpt.perturbation import (
    AffineDecoder,
    PerturbationConfig,
    PerturbationModel,
    load_perturbation_model,
    predict,
)

FOLDER = golden("scgpt")
POOL = {"cls": "cls", "avg-pool": "mean", "w-pool": "weighted"}


def own_config(tensors):
    options = json.loads((FOLDER / "perturb" / "options.json").read_text())
    pad = json.loads((FOLDER / "collator.json").read_text())["pad_id"]
    heads = heads_of(tensors)
    sizes = ScGPTConfig(
        options["ntoken"],
        pad,
        d_model=options["d_model"],
        n_heads=options["nhead"],
        d_hid=options["d_hid"],
        n_layers=options["nlayers"],
        n_layers_cls=options["nlayers_cls"],
        dropout=options["dropout"],
        pad_value=options["pad_value"],
        n_cls=heads["n_cls"],
        mvc=options["do_mvc"],
    )
    return PerturbationConfig(
        sizes,
        options["pert_pad_id"],
        POOL[options["cell_emb_style"]],
        options["decoder_activation"],
        options["decoder_adaptive_bias"],
    )


@pytest.fixture(scope="module")
def model():
    tensors = read_tensors(FOLDER / "perturb")
    made, report = load_perturbation_model(tensors, own_config(tensors))
    assert len(report.loaded) == len(tensors) and not report.unused and not report.fresh
    return made


@pytest.fixture(scope="module")
def recorded():
    arrays = np.load(FOLDER / "perturb" / "forward.npz")
    return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}


def near(ours, theirs, atol=2e-5):
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, rtol=0, atol=atol), float((ours - theirs).abs().max())


def test_every_output_is_the_originals(model, recorded):
    with torch.no_grad():
        out = model(recorded["src"], recorded["values"], recorded["pert_flags"], ~recorded["mask"])
        near(model.pert_encoder(recorded["pert_flags"]), recorded["pert_emb"], 1e-6)
    near(out["states"], recorded["encode"], 5e-6)
    near(out["expression"], recorded["fwd_mlm_output"])
    near(out["classes"], recorded["fwd_cls_output"])
    near(elastic_similarity_loss(out["cell"]), recorded["fwd_loss_ecs"], 1e-5)
    assert ("from_cell" in out) == ("fwd_mvc_output" in recorded)
    if "from_cell" in out:
        near(out["from_cell"], recorded["fwd_mvc_output"])


def test_genes_and_values_are_read_as_the_original_does(model, recorded):
    vocabulary = Vocabulary.from_file(FOLDER / "model" / "vocab.json")
    genes = json.loads((FOLDER / "perturb" / "genes.json").read_text())
    ids = [vocabulary[gene] if gene in vocabulary else vocabulary.pad for gene in genes]
    assert (
        ids == recorded["gene_ids"].tolist() and vocabulary.pad in ids
    )  # an unknown gene is fed as <pad> and not masked
    assert not recorded["mask"].any()
    torch.testing.assert_close(
        recorded["processed_values"], recorded["values"]
    )  # no bins: the values themselves are read


def test_predictions_are_the_originals(model, recorded):
    given = recorded["gene_ids"], recorded["values"], recorded["pert_flags"]
    near(predict(model, *given), recorded["pred_perturb_all"])
    near(predict(model, *given, genes="seen", original=True), recorded["pred_perturb_batch_wise"])


def test_an_embedding_checkpoint_starts_a_perturbation_model(model):
    tensors = read_tensors(FOLDER / "model_flash")
    made, report = load_perturbation_model(tensors, model.config)
    assert torch.equal(
        made.transformer_encoder.layers[0].self_attn.in_proj_weight,
        tensors["transformer_encoder.layers.0.self_attn.Wqkv.weight"],
    )
    assert any(name.startswith("pert_encoder.") for name in report.fresh)
    assert not any(name.startswith(("encoder.", "value_encoder.", "transformer_encoder.")) for name in report.fresh)
    cut = {name: tensor for name, tensor in tensors.items() if name != "value_encoder.norm.bias"}
    with pytest.raises(AssetError, match="value_encoder.norm.bias"):
        load_perturbation_model(cut, model.config)


def test_a_perturbation_of_an_unseen_gene_is_not_lost(model, recorded):
    values, flags = recorded["values"].clone(), torch.zeros_like(recorded["pert_flags"])
    values[:, 0] = 0
    perturbed = flags.clone()
    perturbed[:, 0] = 1
    lost, kept = (
        [predict(model, recorded["gene_ids"], values, f, genes="seen", original=original) for f in (flags, perturbed)]
        for original in (True, False)
    )
    assert torch.equal(*lost) and not torch.equal(*kept)


def test_unknown_options_are_refused(model, recorded):
    with pytest.raises(OptionError, match="activation='Relu' is not in torch.nn"):
        AffineDecoder(8, "Relu", False)
    with pytest.raises(OptionError, match="pool='avg-pool' is not known"):
        PerturbationModel(PerturbationConfig(ScGPTConfig(4, 1, d_model=8, n_heads=2), pool="avg-pool"))
    with pytest.raises(OptionError, match="genes='batch-wise' is not known"):
        predict(model, recorded["gene_ids"], recorded["values"], recorded["pert_flags"], genes="batch-wise")
