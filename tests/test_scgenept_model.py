"scGenePT's network gives the numbers of the original on the same weights."

import json

import numpy as np
import pytest
import torch
from conftest import golden

from scellfm.assets import read_tensors
from scellfm.core import AssetError, OptionError
from scellfm.scgenept.model import (
    ScGenePTConfig,
    ScGenePTModel,
    load_published,
    published_inputs,
)
from scellfm.scgpt.model import ScGPTConfig

FOLDER = golden("scgenept") / "scgenept"
CONFIG = json.loads((FOLDER / "config.json").read_text())
INFO = json.loads((FOLDER / "info.json").read_text())
OUTPUTS = np.load(FOLDER / "outputs.npz")
VOCABULARY = json.loads((FOLDER / "vocab.json").read_text())


def sizes() -> ScGPTConfig:
    return ScGPTConfig(
        n_tokens=len(VOCABULARY),
        pad_id=VOCABULARY[CONFIG["pad_token"]],
        d_model=CONFIG["d_model"],
        n_heads=CONFIG["nhead"],
        d_hid=CONFIG["d_hid"],
        n_layers=CONFIG["nlayers"],
        n_layers_cls=CONFIG["nlayers_cls"],
        n_cls=CONFIG["n_cls"],
        dropout=0.0,
        mvc=False,
    )


def file_of(variant: str, suffix: str = "safetensors"):
    return FOLDER / f"{variant.replace('+', '_')}.{suffix}"


def model_of(variant: str, tensors=None):
    inputs, gene_ids = published_inputs(variant), torch.tensor(INFO[variant]["gene_ids"])
    widths = dict.fromkeys(inputs.languages, CONFIG["lang_dim"])
    model = ScGenePTModel(ScGenePTConfig(sizes(), len(gene_ids), widths, tokens=inputs.tokens, counts=inputs.counts))
    report = load_published(model, tensors or read_tensors(file_of(variant)), inputs, gene_ids)
    return model.eval(), gene_ids, report


def batch(gene_ids, values, flags):
    n = len(values)
    rows = torch.arange(len(gene_ids)).expand(n, -1)
    return gene_ids.expand(n, -1), torch.as_tensor(values), torch.as_tensor(flags).long(), rows


@pytest.mark.parametrize("variant", CONFIG["variants"])
def test_forward_has_the_originals_numbers(variant):
    model, gene_ids, report = model_of(variant)
    with torch.no_grad():
        found = model(*batch(gene_ids, OUTPUTS["batch/expr"], OUTPUTS["batch/flags"])).numpy()
    np.testing.assert_allclose(found, OUTPUTS[f"{variant}/forward_nofastpath"], atol=1e-5)
    np.testing.assert_allclose(found, OUTPUTS[f"{variant}/forward"], atol=1e-5)
    assert not report.fresh and not report.unused


@pytest.mark.parametrize("variant", CONFIG["variants"])
def test_masked_genes_are_ignored(variant):
    model, gene_ids, _ = model_of(variant)
    mask = torch.ones(OUTPUTS["batch/expr"].shape, dtype=torch.bool)
    mask[:, -9:] = False
    with torch.no_grad():
        found = model(*batch(gene_ids, OUTPUTS["batch/expr"], OUTPUTS["batch/flags"]), mask=mask).numpy()
    expected = OUTPUTS[f"{variant}/forward_masked_last9"]
    np.testing.assert_allclose(found[:, :-9], expected[:, :-9], atol=1e-5)


@pytest.mark.parametrize("variant", [v for v in CONFIG["variants"] if file_of(v, "flashnames.pt").exists()])
def test_both_styles_of_attention_names_load(variant):
    model, *_ = model_of(variant)
    other, *_ = model_of(variant, read_tensors(file_of(variant, "flashnames.pt")))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("variant", CONFIG["variants"])
def test_parameters_are_counted_as_the_original_counts_them(variant):
    model, *_ = model_of(variant)
    kept = sum(
        int(np.prod(shape[:-1]))
        for name, shape in INFO[variant]["shapes"].items()
        if not (name.endswith(".embedding.weight") and name.startswith(("genept_", "gopt_")))
    )
    assert model.n_parameters()["model"] == kept


def test_a_checkpoint_of_another_vocabulary_is_refused():
    variant = next(v for v in CONFIG["variants"] if published_inputs(v).languages)
    tensors = dict(read_tensors(file_of(variant)))
    name = next(n for n in tensors if n.endswith(".embedding.weight") and n.startswith(("genept_", "gopt_")))
    tensors[name] = tensors[name][:5]
    with pytest.raises(AssetError, match="another vocabulary"):
        model_of(variant, tensors)


def test_unknown_names_of_models_are_refused():
    with pytest.raises(OptionError, match="not a model of the original"):
        published_inputs("scgenept_go_c_gpt")
