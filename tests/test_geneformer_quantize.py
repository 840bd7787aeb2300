"Quantized loading: what is asked of transformers, and what is said where it cannot be had (no card is needed here)."

import importlib.metadata
import importlib.util

import numpy as np
import pytest
import torch

from scellfm.core import AssetError, ExtraError, OptionError
from scellfm.data.cells import simulate_cells
from scellfm.data.splits import folds
from scellfm.geneformer import Geneformer, RankTokenizer
from scellfm.geneformer import quantize as module
from scellfm.geneformer.quantize import check_quantize, load_quantized, quantization_settings

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def adata():
    return simulate_cells(40, 40, cell_types=["B", "T"], donors=2, depth=80, regulators=1, targets=3, programme_size=8)


@pytest.fixture
def package(monkeypatch):
    "As if bitsandbytes were installed."
    find, version = importlib.util.find_spec, importlib.metadata.version
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: object() if name == "bitsandbytes" else find(name, *a)
    )
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.45.0" if name == "bitsandbytes" else version(name)
    )


@pytest.fixture
def no_package(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )


def test_what_is_missing_is_named(no_package, adata, tmp_path):
    with pytest.raises(ExtraError, match=r"a CUDA GPU \(the device is 'cpu'\) and the package .*scellfm\[quantize\]"):
        check_quantize("8bit", CPU)
    with pytest.raises(ExtraError, match=r"needs the package bitsandbytes"):
        check_quantize("4bit", CARD)
    gf = Geneformer.from_config("tiny", RankTokenizer.fit(adata), device="cpu")
    gf.save_pretrained(tmp_path)
    with pytest.raises(ExtraError, match="bfloat16"):
        Geneformer.from_pretrained(tmp_path, device="cpu", quantize="8bit")


def test_without_a_card_an_option_is_wrong(package):
    with pytest.raises(OptionError, match="needs a CUDA GPU .*'cpu'.*; without"):
        check_quantize("4bit", CPU)
    assert check_quantize("8bit", CARD) == {"load_in_8bit": True}


@pytest.mark.parametrize("value", ["8", 8, "16bit", True])
def test_other_widths_are_refused(value):
    with pytest.raises(OptionError, match="'8bit', '4bit'"):
        quantization_settings(value)


@pytest.mark.parametrize("width", ["8bit", "4bit"])
def test_transformers_gets_the_original_settings(package, width, monkeypatch, adata, tmp_path):
    import transformers

    gf = Geneformer.from_config("tiny", RankTokenizer.fit(adata), device="cpu")
    gf.save_pretrained(tmp_path)
    asked, load = {}, transformers.AutoModelForMaskedLM.from_pretrained

    def on_the_card(folder, *, quantization_config, device_map, **rest):
        asked.update(config=quantization_config, device_map=device_map)
        model, found = load(folder, **rest)
        model.is_quantized = True
        return model, found

    monkeypatch.setattr(transformers.AutoModelForMaskedLM, "from_pretrained", on_the_card)
    model = load_quantized(tmp_path, quantization_settings(width), CARD)
    config = asked["config"]
    assert isinstance(config, transformers.BitsAndBytesConfig) and asked["device_map"] == {"": CARD}
    assert (config.load_in_8bit, config.load_in_4bit) == (width == "8bit", width == "4bit")
    if width == "4bit":
        assert config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
        assert config.bnb_4bit_compute_dtype == torch.bfloat16
    quantized = Geneformer(model, gf.tokenizer, device="cpu", dtype="bfloat16")
    assert next(quantized.model.parameters()).dtype == torch.float32  # left as it was loaded
    np.testing.assert_allclose(
        quantized.embed(adata, copy=True).obsm["X_geneformer"],
        gf.embed(adata, copy=True).obsm["X_geneformer"],
        atol=1e-6,
    )
    for train in (
        lambda: quantized.finetune(adata, "cell_type", split=folds(adata, by="donor", k=2)),
        lambda: quantized.pretrain(adata),
        lambda: quantized.finetune_genes(adata, {"a": adata.var_names[:8], "b": adata.var_names[8:16]}, folds=2),
    ):
        with pytest.raises(OptionError, match="cannot be trained.*lora=8"):
            train()


def test_a_tensor_that_transformers_did_not_find_is_named(package, monkeypatch, adata, tmp_path):
    import transformers

    model = Geneformer.from_config("tiny", RankTokenizer.fit(adata), device="cpu").model
    missing = ["cls.predictions.bias", "bert.embeddings.word_embeddings.weight"]
    monkeypatch.setattr(
        transformers.AutoModelForMaskedLM, "from_pretrained", lambda *a, **k: (model, {"missing_keys": missing})
    )
    with pytest.raises(AssetError, match="1 tensors.*word_embeddings"):
        load_quantized(tmp_path, module.quantization_settings("8bit"), CARD)
