"""Continual pretraining: the published losses, nothing of the held-out cells, the same run however it is cut."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden

import scellfm.scgpt.training as training
from scellfm.assets import read_tensors
from scellfm.core import DataError, OptionError, ScellfmWarning
from scellfm.data import folds, hold_out
from scellfm.data.cells import simulate_cells
from scellfm.data.splits import Split
from scellfm.scgpt import ScGPT
from scellfm.scgpt.tokenizer import BinnedCells
from scellfm.scgpt.training import MaskedGenes, baseline_losses, learner, pretraining_loss
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
    return hold_out(adata, by="donor", fractions=(0.75, 0, 0.25))


@pytest.fixture(scope="module")
def trained(gpt, adata, split):
    return gpt.continue_pretraining(adata, label="cell_type", split=split, **FAST)


def weights(gpt):
    return {name: value.clone() for name, value in model_tensors(gpt.model).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_losses_are_the_originals_on_its_own_outputs():
    model, arrays = (
        ScGPT.from_pretrained(golden("scgpt") / "model", device="cpu").model,
        np.load(golden("scgpt") / "encoder.npz"),
    )
    genes, values, real = (torch.from_numpy(arrays[name]) for name in ("genes", "values", "mask"))
    real = ~real
    hidden = real & (torch.rand(real.shape, generator=torch.Generator().manual_seed(1)) < 0.5)
    hidden[:, 0] = False
    targets = torch.randint(1, 51, real.shape, generator=torch.Generator().manual_seed(2)).float()
    with torch.no_grad():
        sums, counts = pretraining_loss(
            model, {"genes": genes, "values": values, "mask": real, "hidden": hidden, "targets": targets[hidden]}
        )
    for loss, head in zip(sums / counts, ("fwd_mlm_output", "fwd_mvc_output")):
        theirs = torch.from_numpy(arrays[head])
        masked_mse = (((theirs - targets) ** 2) * hidden).sum() / hidden.sum()  # the original's masked_mse_loss
        assert loss.item() == pytest.approx(masked_mse.item(), rel=1e-5)


def test_the_loss_is_the_sum_of_three_means_and_padding_has_no_part(gpt):
    cells = BinnedCells.of(
        [
            (np.array([40, 1, 2, 3, 5]), np.array([-2, 9, 4, 50, 1], "float32")),
            (np.array([40, 7, 8]), np.array([-2, 30, 20], "float32")),
        ]
    )
    model = learner(gpt, ["B", "T"], 0)
    hiding = MaskedGenes(model, cells, ["one", "two"], shares=(0.5,), max_length=9, seed=3, codes=np.array([1, 0]))
    rows = hiding.rows(np.array([0, 1]))
    both = pretraining_loss(model.model.eval(), rows.batch(np.array([0, 1]), 0))
    alone = [pretraining_loss(model.model, rows.batch(np.array([i]), 0)) for i in (0, 1)]
    assert torch.allclose(both[0], alone[0][0] + alone[1][0], rtol=1e-5) and torch.equal(
        both[1], alone[0][1] + alone[1][1]
    )
    batch = rows.batch(np.array([0]), 0)
    out = model.model(batch["genes"], batch["values"], batch["mask"])
    expected = [F.mse_loss(out[head][batch["hidden"]], batch["targets"]) for head in ("expression", "from_cell")]
    expected.append(F.cross_entropy(out["classes"], torch.tensor([1])))
    assert torch.allclose(alone[0][0] / alone[0][1], torch.stack(expected), rtol=1e-5)


def test_what_is_hidden_depends_on_cell_and_epoch_alone(gpt):
    generator = np.random.default_rng(0)
    made = [
        (np.append(40, generator.permutation(40)[:30]), np.append(-2, generator.integers(1, 51, 30)).astype("float32"))
        for _ in range(40)
    ]
    names = [f"c{i}" for i in range(40)]
    hiding = MaskedGenes(gpt, BinnedCells.of(made), names, shares=(0.25, 0.5, 0.75), max_length=20, seed=0)
    turned = MaskedGenes(gpt, BinnedCells.of(made[::-1]), names[::-1], shares=(0.25, 0.5, 0.75), max_length=20, seed=0)
    for i in range(40):
        assert all(np.array_equal(a, b) for a, b in zip(hiding.cell(i, 1), turned.cell(39 - i, 1)))
        genes, values, hidden = hiding.cell(i, 1)
        whole = dict(zip(*made[i]))
        assert len(genes) == 20 == len(set(genes)) and genes[0] == 40 and not hidden[0]
        assert all(whole[gene] == value for gene, value in zip(genes, values))
    assert any((hiding.cell(i, 1)[0] != hiding.cell(i, 2)[0]).any() for i in range(40))  # sampled anew
    shares = np.array([[hiding.cell(i, epoch)[2][1:].mean() for i in range(40)] for epoch in range(30)])
    assert abs(shares.mean() - 0.5) < 0.02 and shares.std() > 0.2  # one of three shares, and chance


@QUIET
def test_resumed_is_uninterrupted(gpt, adata, split, trained, tmp_path, monkeypatch):
    calls = []

    def dying(model, batch):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return pretraining_loss(model, batch)

    options = dict(label="cell_type", split=split, folder=tmp_path, save_every=2, **FAST)
    monkeypatch.setattr(training, "pretraining_loss", dying)
    with pytest.raises(KeyboardInterrupt):
        gpt.continue_pretraining(adata, **options)
    resumed = gpt.continue_pretraining(adata, **options)
    assert len(calls) > 9 and resumed.history.step_rows == trained.history.step_rows
    assert same(weights(resumed), weights(trained))
    with pytest.raises(OSError, match="learning_rate"):
        gpt.continue_pretraining(adata, **options | {"learning_rate": 5e-4})
    other = adata.copy()
    other.X[3] = other.X[4]
    with pytest.raises(OSError, match="cells"):
        gpt.continue_pretraining(other, **options)


@QUIET
def test_order_of_cells_and_genes_does_not_matter_and_the_model_begun_with_stays(gpt, adata, trained):
    before = weights(gpt)
    turned = adata[::-1, ::-1].copy()
    again = gpt.continue_pretraining(
        turned, label="cell_type", split=hold_out(turned, by="donor", fractions=(0.75, 0, 0.25)), **FAST
    )
    assert again.history.step_rows == trained.history.step_rows and same(weights(again), weights(trained))
    assert same(before, weights(gpt)) and not same(before, {name: weights(trained)[name] for name in before})


@QUIET
def test_held_out_labels_and_counts_do_not_reach_the_model(gpt, adata, split, trained):
    other = adata.copy()
    kinds = other.obs["cell_type"].astype(str).to_numpy()
    kinds[split.test] = np.roll(kinds[split.test], 1)
    other.obs["cell_type"] = kinds
    other.X[split.test] = other.X[split.test[::-1]]
    again = gpt.continue_pretraining(other, label="cell_type", split=split, **FAST)
    assert [row[2] for row in again.history.step_rows] == [row[2] for row in trained.history.step_rows]
    assert same(weights(again), weights(trained))
    assert not again.losses.table.equals(trained.losses.table)


@QUIET
def test_the_head_is_saved_in_the_originals_layout_and_goes_on_learning(adata, split, trained, tmp_path):
    trained.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "args.json",
        "vocab.json",
        "best_model.pt",
        "model.safetensors",
    }
    stored = torch.load(tmp_path / "best_model.pt", weights_only=True)
    heads = {
        "cls_decoder._decoder.0.weight",
        "cls_decoder._decoder.2.weight",
        "cls_decoder.out_layer.weight",
        "decoder.fc.4.bias",
        "mvc_decoder.gene2query.weight",
        "mvc_decoder.W.weight",
    }
    assert heads <= set(stored) and stored["cls_decoder.out_layer.weight"].shape == (2, 16)
    assert "transformer_encoder.layers.0.self_attn.Wqkv.weight" in stored
    assert json.loads((tmp_path / "args.json").read_text())["cell_types"] == ["B", "T"]
    again = ScGPT.from_pretrained(tmp_path, device="cpu")
    assert again.cell_types == ["B", "T"] and same(weights(again), weights(trained))
    assert learner(again, ["B", "T"], 0).load_report.fresh == []
    assert not learner(again, [], 0).model.config.n_cls
    assert all(name.startswith("cls_decoder.") for name in learner(again, ["A", "B", "T"], 0).load_report.fresh)


@QUIET
def test_a_published_checkpoint_gets_a_new_head_and_keeps_the_rest():
    folder = golden("scgpt") / "model"
    gpt, stored = ScGPT.from_pretrained(folder, device="cpu"), read_tensors(folder)
    made = learner(gpt, ["B", "NK", "T"], 0)
    assert made.model.cls_decoder.out_layer.weight.shape[0] == 3
    assert torch.equal(made.model.mvc_decoder.W.weight, stored["mvc_decoder.W.weight"].float())
    assert learner(gpt, [], 0).model.cls_decoder is None
    genes = [gene for gene in gpt.vocabulary.tokens if not gene.startswith("<")][:40]
    adata = simulate_cells(40, 40, cell_types=2, donors=2, regulators=1, targets=3, programme_size=10, depth=200)
    adata.var_names = genes
    assert gpt.continue_pretraining(adata, held_out=0, **FAST).history.epochs.train_loss.notna().all()


@QUIET
def test_guessers_by_hand(gpt):
    cells = BinnedCells.of(
        [
            (np.array([40, 1, 2]), np.array([-2, 10, 20], "float32")),
            (np.array([40, 1]), np.array([-2, 30], "float32")),
            (np.array([40, 1, 2, 3]), np.array([-2, 5, 25, 40], "float32")),
        ]
    )
    hiding = MaskedGenes(gpt, cells, list("abc"), shares=(0.999999,), max_length=9, seed=0, codes=np.array([0, 1, 0]))
    found = baseline_losses(hiding, np.array([0, 1]), np.array([2]), 2)
    assert np.allclose(found["one mean"], [(15**2 + 5**2 + 20**2) / 3] * 2 + [np.log(2)])
    assert np.allclose(
        found["gene means"], [(15**2 + 5**2 + 20**2) / 3] * 2 + [np.log(2)]
    )  # 20, 20; unseen: the mean, 20
    assert np.allclose(baseline_losses(hiding, np.array([0, 2]), np.array([1]), 0)["gene means"], [(30 - 7.5) ** 2] * 2)


def test_the_table_has_model_and_guessers_and_a_useless_model_is_told(gpt, adata, split):
    with pytest.warns(ScellfmWarning, match="each gene's mean"):
        made = gpt.continue_pretraining(adata, split=split, **FAST | {"learning_rate": 1e-7})
    assert list(made.losses.table.index) == ["scGPT (held out)", "scGPT (training cells)", "one mean", "gene means"]
    assert list(made.losses.table) == ["hidden_gene_mse", "from_cell_mse"] and made.scores is None
    assert made.history.epochs.valid_loss.iloc[-1] == pytest.approx(
        made.losses.table.loc["scGPT (held out)"].sum(), rel=1e-5
    )
    assert made.history.baselines["gene means"] == pytest.approx(made.losses.table.loc["gene means"].sum())


def test_cells_without_a_known_gene_are_left_out(gpt, adata, split):
    few = adata.copy()
    few.X[[split.train[0], split.test[0]]] = 0
    few.X.eliminate_zeros()
    with pytest.warns(ScellfmWarning, match="2 of 60 cells have no gene"):
        made = gpt.continue_pretraining(few, label="cell_type", split=split, **FAST)
    assert made.scores.details["scGPT (held out)"].n_cells == len(split.test) - 1
    assert np.isfinite(made.losses.table.to_numpy()).all()


@QUIET
@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(label="cell_typ"), DataError, "cell_type"),
        (dict(mask_share=0.0), OptionError, "between 0 and 1"),
        (dict(mask_share="half"), OptionError, "mask_share"),
        (dict(mask_share=(0.2, 1.5)), OptionError, "mask_share"),
        (dict(epoch=3), OptionError, "epochs"),
        (dict(learning_rate=-1), OptionError, "learning_rate=-1"),
        (dict(layer="nowhere"), DataError, "nowhere"),
    ],
)
def test_a_wrong_option_is_named(gpt, adata, split, change, error, words):
    with pytest.raises(error, match=words):
        gpt.continue_pretraining(adata, **dict(split=split) | FAST | change)


@QUIET
def test_data_that_cannot_be_learned_from(gpt, adata, split):
    one, leaky = adata.copy(), Split(split.train, split.valid, split.train[:2], "donor", 60)
    one.obs["cell_type"] = "B"
    with pytest.raises(DataError, match="single class"):
        gpt.continue_pretraining(one, label="cell_type", **FAST)
    with pytest.raises(DataError, match="both train and test"):
        gpt.continue_pretraining(adata, split=leaky, **FAST)
    with pytest.raises(OptionError, match="one Split"):
        gpt.continue_pretraining(adata, split=folds(adata, by="donor", k=2), **FAST)
    with pytest.raises(DataError, match="60 cells.*50"):
        gpt.continue_pretraining(adata[:50].copy(), split=split, **FAST)
    integrated = ScGPT.from_config("tiny", adata, n_batches=2, device="cpu")
    with pytest.raises(OptionError, match="batch labels"):
        integrated.continue_pretraining(adata, **FAST)
    scaled = adata.copy()
    scaled.X = scaled.X.toarray() - 1
    with pytest.raises(DataError, match="negative"):
        gpt.continue_pretraining(scaled, **FAST)
