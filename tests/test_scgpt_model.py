"""The model gives the original's numbers on the original's weights, in every style of keys, and loading accounts for
every tensor."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden

from scellfm.assets import read_tensors
from scellfm.core import AssetError, OptionError
from scellfm.scgpt import ScGPT, ScGPTConfig, ScGPTModel
from scellfm.scgpt.model import contrastive_loss, elastic_similarity_loss, load_model, pool_cells, published_name

FOLDER = golden("scgpt")


@pytest.fixture(scope="module")
def gpt():
    return ScGPT.from_pretrained(FOLDER / "model", device="cpu")


@pytest.fixture(scope="module")
def recorded():
    arrays = np.load(FOLDER / "encoder.npz")
    return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}


@pytest.fixture(scope="module")
def outputs(gpt, recorded):
    with torch.no_grad():
        return gpt.model(recorded["genes"], recorded["values"], ~recorded["mask"])


def near(ours, theirs, atol):
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, rtol=0, atol=atol), float((ours - theirs).abs().max())


def test_encoders_and_every_layer_are_the_originals(gpt, recorded):
    model, mask = gpt.model, ~recorded["mask"]
    with torch.no_grad():
        near(model.encoder(recorded["genes"]), recorded["gene_token_emb"], 5e-6)
        near(model.value_encoder(recorded["values"]), recorded["value_emb"], 5e-6)
        x = model.inputs(model.encoder(recorded["genes"]), recorded["values"])
        for i, layer in enumerate(model.transformer_encoder.layers):
            x = layer(x, mask)
            near(x, recorded[f"layer{i}_out"], 5e-6)
        near(model.encode(recorded["genes"], recorded["values"], mask), recorded["encode"], 5e-6)
        near(
            model.encode(recorded["genes"], recorded["values"], mask, cell_only=True)[:, 0],
            recorded["encode_batch_cls"],
            5e-6,
        )


@pytest.mark.parametrize("pool, name", [("cls", "cls"), ("mean", "avg_pool"), ("weighted", "w_pool")])
def test_pooling_over_padding_is_the_originals(recorded, pool, name):
    mask = ~recorded["mask"]
    for states, kind in ((recorded["encode"], name), (recorded["encode_fast"], f"{name}_fast")):
        cells = pool_cells(states, recorded["values"], mask, pool, original=True)
        near(cells, recorded[f"cell_{kind}"], 5e-6)
        near(F.normalize(cells, dim=1), recorded[f"cell_{kind}_l2"], 5e-6)


@pytest.mark.parametrize("pool", ["cls", "mean", "weighted"])
def test_padding_and_the_company_of_a_cell_change_nothing(gpt, recorded, pool):
    genes, values, mask = recorded["genes"], recorded["values"], ~recorded["mask"]
    short = int(mask.sum(1).argmin())
    n = int(mask[short].sum())
    assert n < genes.shape[1]
    with torch.no_grad():
        together = pool_cells(gpt.model.encode(genes, values, mask), values, mask, pool)[short]
        one = slice(short, short + 1)
        alone = pool_cells(gpt.model.encode(genes[one, :n], values[one, :n]), values[one, :n], mask[one, :n], pool)[0]
    near(together, alone, 5e-6)


def test_every_head_is_the_originals(outputs, recorded):
    near(outputs["cell"], recorded["fwd_cell_emb"], 5e-6)
    near(outputs["expression"], recorded["fwd_mlm_output"], 2e-5)
    near(outputs["from_cell"], recorded["fwd_mvc_output"], 2e-5)
    near(outputs["classes"], recorded["fwd_cls_output"], 2e-5)
    near(elastic_similarity_loss(outputs["cell"]), recorded["fwd_loss_ecs"], 1e-5)
    near(contrastive_loss(outputs["cell"], outputs["cell"]), recorded["fwd_loss_cce"], 1e-5)


def test_generation_from_a_cell_is_the_originals(gpt, recorded):
    genes, values, mask, cell = recorded["genes"], recorded["values"], ~recorded["mask"], recorded["cell_cls"]
    with torch.no_grad():
        near(gpt.model.generate(cell, genes, values, mask), recorded["generate"], 2e-5)
        near(gpt.model.generate(cell, genes), recorded["generate_novalues"], 2e-5)


def test_gene_embeddings_and_attention_are_the_originals(gpt, recorded):
    table = gpt.gene_embeddings()
    assert list(table.index) == gpt.vocabulary.tokens
    near(torch.from_numpy(table.to_numpy()), recorded["gene_embedding_matrix"], 5e-6)
    genes, values, mask = recorded["genes"], recorded["values"], ~recorded["mask"]
    with torch.no_grad():
        near(gpt.model.attention(genes, values, mask, layer=-1), recorded["last_attn"], 5e-6)


def load_options(name):
    return json.loads((FOLDER / name / "options.json").read_text())


def test_fine_tuned_heads_are_the_originals(gpt):
    options, arrays = load_options("finetune"), np.load(FOLDER / "finetune" / "forward.npz")
    recorded = {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}
    args = json.loads((FOLDER / "model" / "args.json").read_text())
    model, report = load_model(read_tensors(FOLDER / "finetune"), args, len(gpt.vocabulary), gpt.vocabulary.pad)
    assert not report.unused and not report.fresh
    assert model.config.n_cls == options["n_cls"]
    assert model.config.n_batches == (options["num_batch_labels"] if options["use_batch_labels"] else 0)
    with torch.no_grad():
        out = model(recorded["genes"], recorded["values"], ~recorded["mask"], batch=recorded["batch_labels"])
    names = {
        "cell": "cell_emb",
        "expression": "mlm_output",
        "seen": "mlm_zero_probs",
        "classes": "cls_output",
        "from_cell": "mvc_output",
        "from_cell_seen": "mvc_zero_probs",
        "adversary": "dab_output",
    }
    expected = {ours: f"fwd_{theirs}" for ours, theirs in names.items() if f"fwd_{theirs}" in recorded}
    assert set(out) == {"states", *expected}
    for ours, theirs in expected.items():
        near(out[ours], recorded[theirs], 2e-5)
    near(elastic_similarity_loss(out["cell"], options["ecs_threshold"]), recorded["fwd_loss_ecs"], 1e-5)
    if model.config.n_batches:
        with pytest.raises(OptionError, match="batch labels: pass batch="):
            model(recorded["genes"], recorded["values"], ~recorded["mask"])


def styles(tensors):
    """The same tensors in the key styles of torch, flash-attention 1, flash-attention 2 as main wraps it, and
    data-parallel training."""
    flash = {published_name(name): tensor for name, tensor in tensors.items()}
    yield "torch", tensors
    yield "flash", flash
    yield "flash, wrapped", {name.replace("self_attn.", "self_attn._impl."): tensor for name, tensor in flash.items()}
    yield "data-parallel", {f"module.{name}": tensor for name, tensor in flash.items()}


def test_every_style_of_keys_gives_the_same_model(gpt, recorded):
    args = json.loads((FOLDER / "model" / "args.json").read_text())
    tensors = read_tensors(FOLDER / "model")
    seen = set()
    for name, styled in styles(tensors):
        seen.add(tuple(styled))
        model, report = load_model(styled, args, len(gpt.vocabulary), gpt.vocabulary.pad)
        assert len(report.loaded) == len(tensors) and not report.unused and not report.fresh, name
        for ours, theirs in zip(model.state_dict().values(), gpt.model.state_dict().values()):
            assert torch.equal(ours, theirs), name
    assert len(seen) == 4


def test_both_files_of_a_checkpoint_hold_the_same(tmp_path):
    folders = sorted({path.parent for path in FOLDER.rglob("best_model.pt")})
    assert len(folders) == 4
    for folder in folders:
        (tmp_path / folder.name).mkdir()
        shutil.copy(folder / "best_model.pt", tmp_path / folder.name)
        alone, both = read_tensors(tmp_path / folder.name), read_tensors(folder)  # the latter reads model.safetensors
        assert alone.keys() == both.keys() and all(torch.equal(alone[name], both[name]) for name in both)


def test_flash_checkpoint_names_the_one_tensor_that_is_not_used(gpt):
    flash = ScGPT.from_pretrained(FOLDER / "model_flash", device="cpu")
    assert flash.load_report.unused == ["flag_encoder.weight"] and not flash.load_report.fresh
    for ours, theirs in zip(flash.model.state_dict().values(), gpt.model.state_dict().values()):
        assert torch.equal(ours, theirs)


def test_saved_model_comes_back_bit_for_bit_and_in_published_names(gpt, tmp_path):
    gpt.save_pretrained(tmp_path / "saved")
    plain = torch.load(tmp_path / "saved" / "best_model.pt", weights_only=True)
    assert any(name.endswith("self_attn.Wqkv.weight") for name in plain)
    assert not any("in_proj" in name for name in plain)
    (tmp_path / "saved" / "model.safetensors").unlink()  # what the original reads is enough for us too
    again = ScGPT.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.vocabulary.tokens == gpt.vocabulary.tokens and again.model.config == gpt.model.config
    for ours, theirs in zip(again.model.state_dict().values(), gpt.model.state_dict().values()):
        assert torch.equal(ours, theirs)


def broken(tensors, kind):
    tensors = dict(tensors)
    some = next(name for name in tensors if name.endswith("linear1.weight"))
    if kind == "missing":
        del tensors[next(name for name in tensors if name.endswith("norm2.bias"))]
    elif kind == "shape":
        tensors[some] = tensors[some][:, :-1]
    elif kind == "unknown":
        tensors["surprise.weight"] = torch.zeros(2)
    elif kind == "vocabulary":
        tensors["encoder.embedding.weight"] = tensors["encoder.embedding.weight"][:-1]
    else:
        del tensors["encoder.embedding.weight"]
    return tensors


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing", r"does not fit this ScGPTModel.* 1 .*: transformer_encoder.*norm2.bias"),
        ("shape", r"linear1.weight with the shape .*, but the weights beside it have"),
        ("unknown", r"does not fit this ScGPTModel.* 1 .*: surprise.weight"),
        ("vocabulary", r"the vocabulary has [\d,]+ tokens .* embedding [\d,]+ rows: they do not match"),
        ("no table", r"no encoder.embedding.weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(gpt, kind, message):
    args = json.loads((FOLDER / "model" / "args.json").read_text())
    with pytest.raises(AssetError, match=message):
        load_model(broken(read_tensors(FOLDER / "model"), kind), args, len(gpt.vocabulary), gpt.vocabulary.pad)


def test_a_folder_whose_parts_are_missing_is_refused(tmp_path):
    (tmp_path / "args.json").write_bytes((FOLDER / "model" / "args.json").read_bytes())
    with pytest.raises(AssetError, match="vocab.json is missing"):
        ScGPT.from_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text('{"B2M": 0}')
    with pytest.raises(AssetError, match="no weights"):
        ScGPT.from_pretrained(tmp_path)
    torch.save({"encoder.embedding.weight": torch.zeros(4, 8)}, tmp_path / "best_model.pt")
    (tmp_path / "args.json").write_text('{"embsize": 8}')
    with pytest.raises(AssetError, match="args.json lacks nheads"):
        ScGPT.from_pretrained(tmp_path)


def test_a_vocabulary_of_another_size_is_refused(tmp_path):
    shutil.copytree(FOLDER / "model", tmp_path / "model")
    file = tmp_path / "model" / "vocab.json"
    vocabulary = json.loads(file.read_text())
    file.write_text(json.dumps(vocabulary | {"ONE_MORE_GENE": max(vocabulary.values()) + 1}))
    with pytest.raises(
        AssetError, match=r"the vocabulary has [\d,]+ tokens .* embedding [\d,]+ rows: they do not match"
    ):
        ScGPT.from_pretrained(tmp_path / "model", device="cpu")


def test_sizes_that_do_not_go_together_are_refused():
    with pytest.raises(OptionError, match="d_model=10 cannot be split among n_heads=3"):
        ScGPTConfig(n_tokens=5, pad_id=4, d_model=10, n_heads=3)


def test_the_adversary_turns_the_gradient_around():
    torch.manual_seed(0)
    config = ScGPTConfig(n_tokens=8, pad_id=5, d_model=8, n_heads=2, d_hid=8, n_layers=1, adversary=2, dropout=0.0)
    model = ScGPTModel(config).train()
    genes, values = torch.tensor([[6, 1, 2], [6, 3, 5]]), torch.tensor([[-2.0, 4, 9], [-2, 7, -2]])

    def gradient(reverse):
        model.zero_grad()
        out = model(genes, values, genes != 5)
        logits = out["adversary"] if reverse else model.grad_reverse_discriminator(out["cell"])
        F.cross_entropy(logits, torch.tensor([0, 1])).backward()
        return model.encoder.embedding.weight.grad.clone()

    assert gradient(False)[1].abs().sum() > 0
    assert torch.allclose(gradient(True), -gradient(False), atol=1e-7)
    assert gradient(True)[5].abs().sum() == 0  # padding never learns
