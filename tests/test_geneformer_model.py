"""The model: parity of its embeddings with the original, checkpoints in and out, and what it refuses."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from geneformer_golden import GOLDEN, VERSIONS, cells, model
from safetensors.torch import load_file, save_file

from scellfm import inference
from scellfm.core import AssetError, DataError, OptionError, ScellfmWarning
from scellfm.data.demonstration import demo
from scellfm.geneformer import Geneformer, RankTokenizer, TokenizedCells, embedding, gene_vectors
from scellfm.geneformer.model import SHAPES, build_model, layer_index, pool_cells, shape_config

LAYERS = {0: "layer0", -1: "layerm1"}


@pytest.fixture(scope="module")
def pbmc():
    "Sixty real cells and a tiny model with their vocabulary."
    adata = demo()[:60].copy()
    tokenizer = RankTokenizer.fit(adata)
    return adata, Geneformer.from_config("tiny", tokenizer, device="cpu")


# parity with the original
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("emb_layer", LAYERS)
def test_cell_embeddings_are_the_originals(version, emb_layer):
    expected = np.load(GOLDEN / "embeddings" / f"{version}.npz")
    for pool in ("cell", "cls")[: 1 + (version == "v2")]:
        ours = model(version).embed(cells(version), emb_layer=emb_layer, pool=pool)
        np.testing.assert_allclose(ours[expected["cell_order"]], expected[f"{pool}_{LAYERS[emb_layer]}"], atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("emb_layer", LAYERS)
def test_gene_embeddings_are_the_originals(version, emb_layer):
    expected = np.load(GOLDEN / "embeddings" / f"{version}.npz")
    ours = model(version).embed_genes(cells(version), emb_layer=emb_layer)
    names = expected[f"gene_{LAYERS[emb_layer]}_gene"]
    assert set(ours.index) == set(names)
    np.testing.assert_allclose(ours.loc[names], expected[f"gene_{LAYERS[emb_layer]}_mean"], atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_each_genes_vector_in_each_cell_is_the_originals(version):
    expected, gf, given = np.load(GOLDEN / "embeddings" / f"{version}.npz"), model(version), cells(version)
    vectors = {name: (genes, values) for name, genes, values in gene_vectors(gf, given)}
    assert list(vectors) == list(given.obs.index)
    for row, cell in enumerate(expected["cell_order"]):
        genes, values = vectors[str(cell)]
        assert genes.tolist() == list(gf.tokenizer.genes[given[int(cell)]])
        np.testing.assert_allclose(values, expected["gene_layerm1_raw"][row, : len(values)], atol=1e-5)


def test_gene_vectors_do_not_depend_on_blocks_and_batches(monkeypatch):
    gf, given = model("v1"), cells("v1")
    one = [vectors for *_, vectors in gene_vectors(gf, given, emb_layer=0)]
    monkeypatch.setattr(embedding, "VECTOR_BLOCK", 7)
    for ours, theirs in zip(gene_vectors(gf, given, emb_layer=0, token_budget=100), one, strict=True):
        np.testing.assert_allclose(ours[2], theirs, atol=1e-5)


def test_the_originals_approximate_summaries_are_the_mean_and_the_interpolated_median():
    """The t-digest, which the original offers beside exact summaries, over all cells."""
    ours = model("v1").embed(cells("v1"), emb_layer=-1, pool="cell")
    for statistic in ("mean", "median"):
        theirs = np.load(GOLDEN / "embeddings" / f"v1_tdigest_{statistic}.npz")["emb"][0]
        np.testing.assert_allclose(getattr(np, statistic)(ours, axis=0), theirs, atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("emb_layer", LAYERS)
@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_state_embeddings_are_the_originals(version, emb_layer, statistic):
    expected = np.load(GOLDEN / "embeddings" / f"{version}_states.npz")
    ours = model(version).state_embeddings(cells(version), state="state", statistic=statistic, emb_layer=emb_layer)
    names = [key for key in expected if key.startswith(f"exact_{statistic}_{LAYERS[emb_layer]}_")]
    assert len(names) == len(ours) > 1
    for name in names:
        np.testing.assert_allclose(ours[name.rsplit("_", 1)[1]], expected[name], atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_saved_dataset_gives_the_same_as_its_cells(version, tmp_path):
    cells(version).save(tmp_path / "cells.dataset")
    gf = model(version)
    np.testing.assert_array_equal(gf.embed(tmp_path / "cells.dataset"), gf.embed(cells(version)))
    one, other = (gf.state_embeddings(data, state="state") for data in (tmp_path / "cells.dataset", cells(version)))
    assert all(np.array_equal(one[name], other[name]) for name in other)


# what is computed, and what is not
def test_hidden_states_are_those_of_transformers_at_every_layer():
    gf, some = model("v2"), cells("v2")[:6]
    ids, mask = inference.pad([some[i] for i in range(6)])
    with torch.inference_mode():
        expected = gf.model(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    for layer in range(gf.n_layers + 1):
        torch.testing.assert_close(gf.hidden(ids, mask, layer)[mask], expected[layer][mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_neither_layers_above_the_one_read_nor_the_head_are_run(layer):
    gf, ran = model("v1"), []
    hooks = [
        block.output.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(gf.model.bert.encoder.layer)
    ]
    hooks.append(gf.model.cls.register_forward_hook(lambda *_: ran.append("head")))
    gf.hidden(torch.tensor([[5, 6, 7]]), None, layer)
    for hook in hooks:
        hook.remove()
    assert ran == list(range(layer))


def test_equal_lengths_need_no_mask_and_dropout_is_off_even_while_training():
    gf = Geneformer.from_config("tiny", model("v1").tokenizer, device="cpu")
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    gf.model.train()
    first, second = gf.hidden(ids, torch.ones_like(ids, dtype=torch.bool), 2), gf.hidden(ids, None, 2)
    assert torch.equal(first, second) and gf.model.training and gf.model.bert.encoder.layer[0].training


def test_a_view_follows_the_weights_as_they_are_trained():
    gf = Geneformer.from_config("tiny", model("v1").tokenizer, device="cpu")
    ids = torch.tensor([[5, 6, 7]])
    before = gf.hidden(ids, None, 2)
    with torch.no_grad():
        gf.model.bert.encoder.layer[0].output.dense.weight.add_(torch.eye(64, 128))
    assert not torch.allclose(before, gf.hidden(ids, None, 2), atol=1e-3)


@pytest.mark.parametrize("budget", [1, 70, 10_000])
def test_batches_change_nothing(budget):
    for version in VERSIONS:
        np.testing.assert_allclose(
            model(version).embed(cells(version), token_budget=budget), model(version).embed(cells(version)), atol=1e-5
        )


def test_the_order_of_cells_changes_nothing():
    order = np.random.default_rng(0).permutation(len(cells("v1")))
    np.testing.assert_allclose(model("v1").embed(cells("v1")[order]), model("v1").embed(cells("v1"))[order], atol=1e-6)


def test_padding_and_special_tokens_are_not_in_the_mean():
    hidden, mask = torch.randn(3, 6, 4), torch.arange(6) < torch.tensor([6, 4, 3])[:, None]
    pooled = pool_cells(hidden, mask, special=True)
    expected = torch.stack([hidden[0, 1:5].mean(0), hidden[1, 1:3].mean(0), hidden[2, 1:2].mean(0)])
    torch.testing.assert_close(pooled, expected)
    assert torch.equal(pool_cells(hidden, mask, True, "cls"), hidden[:, 0])


def test_bfloat16_is_near_float32():
    ours = Geneformer(
        build_model(shape_config("tiny", len(model("v1").tokenizer.genes), 72)), model("v1").tokenizer, device="cpu"
    )
    exact = ours.embed(cells("v1"))
    rough = Geneformer(ours.model, ours.tokenizer, device="cpu", dtype="bfloat16").embed(cells("v1"))
    assert rough.dtype == np.float32 and 0 < np.abs(rough - exact).max() < 0.1


def test_layers_keep_the_originals_meaning():
    assert layer_index(0, 12) == layer_index("last", 12) == 12
    assert layer_index(-1, 12) == layer_index("second_to_last", 12) == 11
    assert layer_index(np.int64(-12), 12) == 0
    for wrong in (1, -13, "first", True, 0.5):
        with pytest.raises(OptionError, match="emb_layer"):
            layer_index(wrong, 12)


# AnnData in, AnnData out
def test_embedding_writes_its_keys_and_nothing_else(pbmc):
    adata, gf = pbmc
    before = adata.copy()
    assert gf.embed(adata) is None
    assert adata.obsm["X_geneformer"].shape == (60, 64) and adata.obsm["X_geneformer"].dtype == np.float32
    params = adata.uns["X_geneformer"]["params"]
    assert params["emb_layer"] == -1 and params["hidden_state"] == 2 and params["pool"] == "cell"
    del adata.obsm["X_geneformer"], adata.uns["X_geneformer"]
    assert set(adata.obsm) == set(before.obsm) and set(adata.uns) == set(before.uns)
    assert list(adata.obs) == list(before.obs) and (adata.X != before.X).nnz == 0


def test_a_copy_leaves_the_original_alone_and_can_be_saved(pbmc, tmp_path):
    adata, gf = pbmc
    embedded = gf.embed(adata, copy=True, key_added="X_tiny", emb_layer="last")
    gf.embed_genes(embedded, key_added="X_tiny")
    assert "X_tiny" not in adata.obsm
    embedded.write_h5ad(tmp_path / "embedded.h5ad")
    assert embedded.uns["X_tiny"]["params"]["hidden_state"] == 3 and "gene_params" in embedded.uns["X_tiny"]


def test_cells_without_known_genes_keep_their_row_as_nan(pbmc):
    adata, gf = pbmc
    emptied = adata.copy()
    emptied.X = emptied.X.multiply(~np.isin(np.arange(60), [0, 7])[:, None]).tocsr()
    with pytest.warns(ScellfmWarning, match="2 of 60 cells"):
        gf.embed(emptied)
    full = gf.embed(adata, copy=True).obsm["X_geneformer"]
    missing = np.isnan(emptied.obsm["X_geneformer"]).all(1)
    assert list(np.flatnonzero(missing)) == [0, 7]
    np.testing.assert_allclose(emptied.obsm["X_geneformer"][~missing], full[~missing], atol=1e-6)


def test_gene_embeddings_stand_beside_their_genes(pbmc):
    adata, gf = pbmc
    data = gf.embed_genes(adata, copy=True)
    table = gf.embed_genes(gf.cells(adata))
    ids = np.asarray(gf.tokenizer.genes)[gf.tokenizer.match(adata).index]
    expressed = np.asarray((adata.X > 0).sum(0)).ravel() > 0
    np.testing.assert_array_equal(data.varm["X_geneformer"][expressed], table.loc[ids[expressed]])


def test_states_within_groups(pbmc):
    adata, gf = pbmc
    data = adata.copy()
    data.obs["half"] = np.where(np.arange(60) < 30, "a", "b")
    within = gf.state_embeddings(data, state="half", groupby="cell_type")
    embeddings = gf.embed(data, copy=True).obsm["X_geneformer"]
    for group, states in within.items():
        for state, vector in states.items():
            rows = ((data.obs["cell_type"] == group) & (data.obs["half"] == state)).to_numpy()
            np.testing.assert_allclose(vector, embeddings[rows].mean(0), atol=1e-5)
    with pytest.raises(DataError, match="no_such"):
        gf.state_embeddings(gf.cells(data), state="no_such")


# checkpoints
@pytest.mark.parametrize("version", VERSIONS)
def test_a_saved_model_opens_here_and_in_transformers(version, tmp_path):
    from transformers import BertForMaskedLM

    gf = model(version)
    gf.save_pretrained(tmp_path / "model")
    again = Geneformer.from_pretrained(tmp_path / "model", device="cpu")
    theirs = BertForMaskedLM.from_pretrained(tmp_path / "model").eval()
    assert again.tokenizer.version == gf.tokenizer.version and again.special == gf.special
    np.testing.assert_array_equal(again.embed(cells(version)), gf.embed(cells(version)))
    ids = torch.from_numpy(cells(version)[0])[None]
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, gf.model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_tokenizer_that_fits_is_found_beside_the_model(version, tmp_path):
    for name in ("dicts", f"model_{version}"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
    gf = Geneformer.from_pretrained(tmp_path / f"model_{version}", device="cpu")
    assert gf.special == (version == "v2") and gf.tokenizer.max_length == gf.max_length


def test_a_model_without_its_dictionary_says_so(tmp_path):
    shutil.copytree(GOLDEN / "model_v1", tmp_path / "model")
    with pytest.raises(AssetError, match="no token dictionary was found"):
        Geneformer.from_pretrained(tmp_path / "model")


def test_a_tokenizer_of_another_model_is_refused_and_both_are_named():
    with pytest.raises(AssetError) as error:
        Geneformer.from_pretrained(GOLDEN / "model_v1", tokenizer=model("v2").tokenizer)
    sizes = [len(model(version).tokenizer.genes) for version in VERSIONS]
    assert all(f"{size:,}" in str(error.value) for size in sizes)


def classifier_folder(path):
    "A fine-tuned classifier in the official layout: the encoder of the golden model, a pooler and a head."
    shutil.copytree(GOLDEN / "model_v1", path)
    tensors = {k: v for k, v in load_file(path / "model.safetensors").items() if not k.startswith("cls.")}
    hidden = tensors["bert.embeddings.word_embeddings.weight"].shape[1]
    tensors |= {
        "bert.pooler.dense.weight": torch.zeros(hidden, hidden),
        "bert.pooler.dense.bias": torch.zeros(hidden),
        "classifier.weight": torch.zeros(3, hidden),
        "classifier.bias": torch.zeros(3),
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text()) | {"architectures": ["BertForSequenceClassification"]}
    (path / "config.json").write_text(json.dumps(config))
    return tensors


def test_a_fine_tuned_classifier_gives_its_encoder(tmp_path):
    classifier_folder(tmp_path / "model")
    gf = Geneformer.from_pretrained(tmp_path / "model", tokenizer=model("v1").tokenizer, device="cpu")
    np.testing.assert_array_equal(gf.embed(cells("v1")), model("v1").embed(cells("v1")))
    assert set(gf.load_report.unused) == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }
    assert gf.load_report.fresh and all(name.startswith("cls.") for name in gf.load_report.fresh)


def test_a_bare_encoder_is_loaded_too(tmp_path):
    tensors = classifier_folder(tmp_path / "model")
    bare = {name.removeprefix("bert."): value for name, value in tensors.items() if name.startswith("bert.")}
    save_file(bare, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    gf = Geneformer.from_pretrained(tmp_path / "model", tokenizer=model("v1").tokenizer, device="cpu")
    np.testing.assert_array_equal(gf.embed(cells("v1")), model("v1").embed(cells("v1")))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("bert.encoder.layer.1.attention.self.query.weight"), "layer.1.attention.self.query.weight"),
        (lambda t: t.update({"bert.encoder.layer.9.output.dense.bias": torch.zeros(3)}), "3 layers, .* have 4"),
        (lambda t: t.update({"bert.encoder.layer.1.spare.bias": torch.zeros(3)}), "layer.1.spare.bias"),
        (lambda t: t.update({"bert.embeddings.LayerNorm.bias": torch.zeros(3)}), "LayerNorm.bias"),
    ],
)
def test_a_tensor_missing_left_over_or_of_another_shape_is_an_error(tmp_path, change, message):
    shutil.copytree(GOLDEN / "model_v1", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssetError, match=message):
        Geneformer.from_pretrained(tmp_path / "model", tokenizer=model("v1").tokenizer)


@pytest.mark.parametrize("content, message", [(None, "config.json"), ("{", "JSON"), ('{"model_type": "gpt2"}', "gpt2")])
def test_a_folder_that_is_no_geneformer_is_an_error(tmp_path, content, message):
    shutil.copytree(GOLDEN / "model_v1", tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    if content is not None:
        (tmp_path / "model" / "config.json").write_text(content)
    with pytest.raises(AssetError, match=message):
        Geneformer.from_pretrained(tmp_path / "model", tokenizer=model("v1").tokenizer)


@pytest.mark.parametrize("name", ["V1-10M", "V2-104M", "V2-316M"])
def test_the_published_shapes(name):
    expected = {
        "V1-10M": (6, 256, 4, 512, 2048),
        "V2-104M": (12, 768, 12, 3072, 4096),
        "V2-316M": (18, 1152, 18, 4608, 4096),
    }[name]
    config = shape_config(name, 20275, 4096)
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    assert tuple(config[key] for key in keys) == expected and config["hidden_act"] == "relu" and set(SHAPES) > {name}


def test_a_new_model_depends_on_its_seed_alone():
    tokenizer = model("v1").tokenizer
    torch.manual_seed(5)
    one = Geneformer.from_config("tiny", tokenizer, seed=3, device="cpu").embed(cells("v1"))
    state = torch.get_rng_state()
    two = Geneformer.from_config("tiny", tokenizer, seed=3, device="cpu").embed(cells("v1"))
    other = Geneformer.from_config("tiny", tokenizer, seed=4, device="cpu").embed(cells("v1"))
    assert np.array_equal(one, two) and not np.allclose(one, other) and torch.equal(state, torch.get_rng_state())
    with pytest.raises(OptionError, match="V1-10M"):
        Geneformer.from_config("V1-10", tokenizer)


# cells that do not fit
def one_cell(*tokens) -> TokenizedCells:
    "Tokenized cells with the one cell given."
    return TokenizedCells(
        np.array(tokens, dtype=np.uint16), np.array([0, len(tokens)]), pd.DataFrame(index=["a"]), np.array([0])
    )


def test_tokens_of_another_dictionary_are_refused():
    with pytest.raises(DataError, match="another dictionary"):
        model("v1").embed(one_cell(5, 60_000))


def test_cells_without_special_tokens_are_refused_where_the_dictionary_has_them():
    with pytest.raises(DataError, match="<cls>"):
        model("v2").embed(cells("v1"))
    with pytest.raises(DataError, match="<cls>"):
        model("v1").embed(cells("v2"))


@pytest.mark.parametrize("version", VERSIONS)
def test_over_long_cells_are_cut_counted_and_reported(version):
    gf = model(version)
    special = gf.special
    genes = np.arange(4, 4 + gf.max_length + 9)
    long = np.r_[[2], genes, [3]] if special else genes
    cut = np.r_[[2], genes[: gf.max_length - 2], [3]] if special else genes[: gf.max_length]
    with pytest.warns(ScellfmWarning, match="1 of 1 cells have more than"):
        embedded = gf.embed(one_cell(*long))
    np.testing.assert_allclose(embedded, gf.embed(one_cell(*cut)), atol=1e-6)


def test_cls_needs_a_dictionary_with_cls():
    with pytest.raises(OptionError, match="cls"):
        model("v1").embed(cells("v1"), pool="cls")
