"""Geneformer at its true size: checkpoints of the published names and shapes, the real dictionaries, real cells."""

import json
import shutil

import anndata
import numpy as np
import pytest
import torch
from conftest import real_data
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM

from scellfm.core import AssetError
from scellfm.geneformer import CellClassifier, Geneformer, RankTokenizer

CONFIGS, KANG = "geneformer-configs", "kang18/kang18_2000.h5ad"
TIED = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")  # one with the embeddings; not in the files


def config(name: str) -> dict:
    "A published config.json."
    return json.loads((real_data(CONFIGS) / f"{name}_config.json").read_text())


def masked_shapes(settings: dict) -> dict:
    "Names and shapes of the tensors of a published masked-gene model."
    with torch.device("meta"):
        state = BertForMaskedLM(BertConfig(**settings)).state_dict()
    return {name: list(value.shape) for name, value in state.items() if name not in TIED}


def classifier_shapes() -> dict:
    "Names and shapes of the tensors of a V2 classifier, from the header of its file."
    header = json.loads((real_data(CONFIGS) / "V2-104M_seqcls_safetensors_header.json").read_text())
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def official(folder, settings: dict, shapes: dict, dictionaries: str):
    "A checkpoint of random weights in the official layout: its folder, the dictionaries in a folder beside it."
    folder.mkdir()
    random = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=random) * 0.02 for name, shape in shapes.items()}
    tensors |= {name: torch.ones(shape) for name, shape in shapes.items() if name.endswith("LayerNorm.weight")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings))
    shutil.copytree(
        real_data(dictionaries), folder.parent / "gene_dictionaries", ignore=shutil.ignore_patterns("*.pkl")
    )
    return folder


def cells_for(gf: Geneformer, dictionaries: str, n: int, length: int):
    "The first real cells, tokenized by the real dictionaries and cut to `length` tokens to be quick."
    tokenizer = RankTokenizer.from_pretrained(real_data(dictionaries), max_length=length)
    assert list(tokenizer.genes) == list(gf.tokenizer.genes)
    return tokenizer(anndata.read_h5ad(real_data(KANG))[:n].copy(), columns=["condition", "donor"])


@torch.inference_mode()
def plain(gf: Geneformer, tokens) -> torch.Tensor:
    "The second to last layer of one cell, every layer kept [L, H]."
    return gf.model.bert(torch.tensor([list(map(int, tokens))]), output_hidden_states=True).hidden_states[-2][0]


def check_embedding_and_deletion(gf: Geneformer, cells) -> None:
    "Embeddings of all cells and the deletion of two genes of the first equal the plain way."
    before = [plain(gf, tokens) for tokens in cells]
    embeddings = gf.embed(cells)
    assert embeddings.shape == (len(cells), gf.model.config.hidden_size)
    np.testing.assert_allclose(embeddings, [(h[0] if gf.special else h.mean(0)).numpy() for h in before], atol=1e-5)
    positions = [2 + gf.special, 3 + gf.special]
    genes = [str(gene) for gene in gf.tokenizer.genes[cells[0][positions]]]
    shifts = gf.perturb(cells[:1], genes=genes).shifts
    after = plain(gf, np.delete(cells[0], positions))
    kept = np.delete(np.arange(len(cells[0])), positions)
    cosine = torch.cosine_similarity(after, before[0][kept], dim=-1)
    assert shifts["cell"].tolist() == [cells.obs.index[0]] and shifts["gene"].tolist() == ["+".join(genes)]
    assert shifts["cosine"].item() == pytest.approx(float(cosine[0] if gf.special else cosine.mean()), abs=1e-5)


@pytest.mark.parametrize(
    "name, dictionaries, version, parameters",
    [("V1-10M", "geneformer-v1", "V1", 10e6), ("V2-104M", "geneformer-v2", "V2", 104e6)],
)
def test_a_checkpoint_of_true_size_loads_whole_embeds_and_perturbs(tmp_path, name, dictionaries, version, parameters):
    real_data(KANG)
    settings = config(name)
    shapes = masked_shapes(settings)
    gf = Geneformer.from_pretrained(official(tmp_path / name, settings, shapes, dictionaries), device="cpu")
    assert sum(np.prod(shape) for shape in shapes.values()) == pytest.approx(parameters, rel=0.08)
    assert set(gf.load_report.loaded) >= set(shapes) and not gf.load_report.unused and not gf.load_report.fresh
    assert gf.tokenizer.version == version and len(gf.tokenizer.genes) == settings["vocab_size"]
    assert gf.max_length == gf.tokenizer.max_length == settings["max_position_embeddings"]
    cells = cells_for(gf, dictionaries, n=2, length=64)
    assert len(cells) == 2 and (cells.lengths == 64).all()
    check_embedding_and_deletion(gf, cells)


def test_a_classifier_of_true_size_predicts_embeds_and_perturbs(tmp_path):
    real_data(KANG)
    settings = config("V2-104M") | {"architectures": ["BertForSequenceClassification"]}
    shapes = classifier_shapes()
    folder = official(tmp_path / "classifier", settings, shapes, "geneformer-v2")
    clf = CellClassifier.from_pretrained(folder, label="condition", device="cpu")
    gf = clf.models[0]
    assert set(gf.load_report.loaded) == set(shapes) and not gf.load_report.unused and not gf.load_report.fresh
    cells = cells_for(gf, "geneformer-v2", n=2, length=48)
    check_embedding_and_deletion(gf, cells)
    screen = clf.perturb(cells, genes=[str(gf.tokenizer.genes[int(cells[0][1])])])
    assert np.isfinite(screen.shifts["shift"]).all() and len(screen.shifts) >= 1


@pytest.mark.parametrize(
    "damage, message", [("missing", "bert.encoder.layer.0"), ("shape", "word_embeddings"), ("extra", "no_such")]
)
def test_a_tensor_that_is_missing_extra_or_of_another_shape_is_an_error_naming_it(tmp_path, damage, message):
    shapes = masked_shapes(config("V1-10M"))
    if damage == "missing":
        del shapes["bert.encoder.layer.0.output.dense.weight"]
    elif damage == "extra":
        shapes["no_such.weight"] = [2]
    else:
        shapes["bert.embeddings.word_embeddings.weight"] = [20275, 256]
    with pytest.raises(AssetError, match=message):
        Geneformer.from_pretrained(official(tmp_path / "V1", config("V1-10M"), shapes, "geneformer-v1"), device="cpu")
