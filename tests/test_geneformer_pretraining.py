"Masked-gene modelling: what is hidden, what the loss is, what it is compared with."

import inspect
import json
import textwrap

import numpy as np
import pytest
import torch
from two_processes import two_processes

from scellfm.core import OptionError, ScellfmWarning, StoreError, keyed_generator
from scellfm.data.cells import simulate_cells
from scellfm.data.splits import hold_out
from scellfm.geneformer import Geneformer, RankTokenizer
from scellfm.geneformer.pretraining import (
    IGNORED,
    MaskedCells,
    count_tokens,
    frequency_losses,
    mask_genes,
    masked_loss,
    pretrain,
    token_rows,
)

GENES = np.arange(4, 60)


@pytest.fixture(scope="module")
def adata():
    return simulate_cells(
        120, 60, cell_types=2, donors=3, depth=150, regulators=1, targets=4, programme_size=12, seed=2
    )


@pytest.fixture(scope="module")
def tokenizer(adata):
    return RankTokenizer.fit(adata)


def tiny(tokenizer, **settings):
    return Geneformer.from_config("tiny", tokenizer, device="cpu", **settings)


def masked(gf, cells, seed=0):
    special = [t for t in (gf.tokenizer.pad, gf.tokenizer.mask, gf.tokenizer.cls, gf.tokenizer.eos) if t is not None]
    genes = np.setdiff1d(np.arange(gf.model.config.vocab_size), special)
    return MaskedCells(gf.readable(cells), cells.obs.index, genes, gf.tokenizer.mask, gf.tokenizer.pad, 0.15, seed)


def test_hidden_genes_follow_berts_shares_and_never_touch_special_tokens():
    cell = np.r_[2, np.tile(GENES, 2000), 3]
    ids, labels = mask_genes(cell, GENES, 1, 0.15, keyed_generator(0, "test"))
    asked = labels != IGNORED
    assert asked.mean() == pytest.approx(0.15, abs=0.005) and not asked[[0, -1]].any()
    assert (ids[asked] == 1).mean() == pytest.approx(0.8, abs=0.01)
    changed = asked & (ids != 1) & (ids != cell)
    assert changed.sum() / asked.sum() == pytest.approx(0.1, abs=0.01)
    assert np.isin(ids[changed], GENES).all()
    assert (labels[asked] == cell[asked]).all() and (ids[~asked] == cell[~asked]).all()


def test_draws_belong_to_the_cell_and_not_to_its_place(adata, tokenizer):
    gf = tiny(tokenizer)
    order = np.random.default_rng(0).permutation(adata.n_obs)
    straight, shuffled = masked(gf, tokenizer(adata)), masked(gf, tokenizer(adata[order].copy()))
    for place, row in enumerate(order[:20]):
        for one, other in zip(shuffled.cell(place, 3), straight.cell(row, 3)):
            assert (one == other).all()
    assert any((straight.cell(i, 0)[1] != straight.cell(i, 1)[1]).any() for i in range(5))


@pytest.mark.filterwarnings("ignore:after pretraining")
def test_the_order_of_the_cells_changes_nothing(adata, tokenizer):
    mixed = adata[np.random.default_rng(1).permutation(adata.n_obs)].copy()
    one, two = (pretrain(tiny(tokenizer), data, epochs=1, learning_rate=5e-3).history for data in (adata, mixed))
    assert one.step_rows == two.step_rows


@pytest.mark.filterwarnings("ignore:Observation names")
def test_two_cells_of_one_name_are_drawn_apart(adata, tokenizer):
    twins = adata[[0, 0]].copy()
    gf = tiny(tokenizer)
    cells = masked(gf, tokenizer(twins))
    assert (cells.sequences[0] == cells.sequences[1]).all()
    assert (cells.cell(0, 0)[1] != cells.cell(1, 0)[1]).any()


def test_the_head_on_masked_places_gives_the_loss_of_the_whole_model(adata, tokenizer):
    gf = tiny(tokenizer)
    batch = masked(gf, tokenizer(adata)).rows(np.arange(9)).batch(np.arange(9), 0)
    with torch.no_grad():
        total, count = masked_loss(gf.model, batch)
        full = gf.model(input_ids=batch["ids"], attention_mask=batch["mask"], labels=batch["labels"])
    assert count == (batch["labels"] != IGNORED).sum() > 0
    assert (total / count).item() == pytest.approx(full.loss.item(), rel=1e-5)
    assert len(set(batch["mask"].sum(1).tolist())) > 1  # there was padding


def test_it_learns_more_than_frequencies_and_says_both(adata, tokenizer):
    gf = tiny(tokenizer)
    returned = gf.pretrain(adata, epochs=12, learning_rate=5e-3)
    history = gf.history
    assert returned is gf
    assert history.epochs.valid_loss.iloc[-1] < history.epochs.valid_loss.iloc[0]
    assert history.epochs.valid_loss.iloc[-1] < history.baselines["gene frequency"]
    assert set(history.baselines) == {"gene frequency", "gene frequency by rank"}
    assert not gf.model.training


def test_frequency_loss_is_the_cross_entropy_of_the_frequencies(adata, tokenizer):
    cells, gf = tokenizer(adata), tiny(tokenizer)
    source = masked(gf, cells)
    train, judged = np.arange(100), np.arange(100, 120)
    counts = (
        np.bincount(np.concatenate([cells[i] for i in train]), minlength=gf.model.config.vocab_size)[source.genes] + 1
    )
    chance = dict(zip(source.genes, counts / counts.sum()))
    expected = np.mean([-np.log(chance[t]) for i in judged for t in source.cell(i, 0)[1] if t != IGNORED])
    assert frequency_losses(source, count_tokens(source.sequences, train, gf.model.config.vocab_size), judged)[
        "gene frequency"
    ] == pytest.approx(expected)


def test_a_model_that_learned_nothing_is_called_so(adata, tokenizer):
    with pytest.warns(ScellfmWarning, match="which genes are common"):
        tiny(tokenizer).pretrain(adata, epochs=1, learning_rate=1e-6)


def test_two_runs_are_equal_bit_for_bit(adata, tokenizer):
    a, b = tiny(tokenizer), tiny(tokenizer)
    one, two = (pretrain(gf, adata, epochs=2, learning_rate=5e-3).history for gf in (a, b))
    assert one == two
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters()))


@pytest.mark.filterwarnings("ignore:after pretraining")
def test_an_interrupted_pretraining_goes_on_with_the_same_losses(adata, tokenizer, tmp_path, monkeypatch):
    whole = pretrain(tiny(tokenizer), adata, epochs=2).history
    draw, calls = MaskedCells.cell, []

    def dies(self, i, epoch):
        calls.append(i)
        if len(calls) > 150:
            raise KeyboardInterrupt
        return draw(self, i, epoch)

    monkeypatch.setattr(MaskedCells, "cell", dies)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny(tokenizer), adata, epochs=2, folder=tmp_path, save_every=4)
    monkeypatch.setattr(MaskedCells, "cell", draw)
    resumed = pretrain(tiny(tokenizer), adata, epochs=2, folder=tmp_path, save_every=4).history
    assert resumed.step_rows == whole.step_rows
    with pytest.raises(StoreError, match="mask_share: 0.15 then, 0.3 now"):
        pretrain(tiny(tokenizer), adata, epochs=2, folder=tmp_path, mask_share=0.3)


@pytest.mark.filterwarnings("ignore:after pretraining")
def test_the_splits_donors_are_held_out(adata, tokenizer, monkeypatch):
    split = hold_out(adata, by="donor", fractions=(0.6, 0, 0.4))
    gf, draw, seen = tiny(tokenizer), MaskedCells.cell, {True: set(), False: set()}

    def watched(self, i, epoch):
        seen[gf.model.training].add(int(i))
        return draw(self, i, epoch)

    monkeypatch.setattr(MaskedCells, "cell", watched)
    history = pretrain(gf, adata, split=split, epochs=1).history
    assert seen[True] == set(split.train) and seen[False] == set(split.test)
    assert "valid_loss" in history.epochs


def test_dropped_cells_keep_split_positions_right():
    class Cells:
        cell_index = np.array([0, 2, 3, 5])

        def __len__(self):
            return 4

    assert token_rows(Cells(), np.array([1, 2, 5]), 6).tolist() == [1, 3]
    with pytest.raises(OptionError, match="split is of 5"):
        token_rows(Cells(), np.array([0]), 5)


def test_wrong_options_are_named(adata, tokenizer):
    with pytest.raises(OptionError, match="mask_share=15"):
        pretrain(tiny(tokenizer), adata, mask_share=15)
    with pytest.raises(OptionError, match="learning_rate"):
        pretrain(tiny(tokenizer), adata, learning_rate=-1.0)
    with pytest.raises(OptionError, match="epochs"):
        pretrain(tiny(tokenizer), adata, epoch=3)


def without_dropout(gf):
    for module in gf.model.modules():
        for name in ("p", "dropout_prob"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    return gf


@pytest.mark.filterwarnings("ignore:after pretraining")
def test_two_processes_pretrain_from_disk_as_one_does_from_memory(adata, tokenizer, tmp_path):
    for name, part in (("one", adata[:70]), ("two", adata[70:])):
        tokenizer(part).save(tmp_path / "corpus" / f"{name}.dataset")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    script = tmp_path / "run.py"
    script.write_text(
        inspect.getsource(without_dropout)
        + textwrap.dedent("""
        import json, os, sys, warnings
        warnings.simplefilter("ignore")
        from scellfm.geneformer import Geneformer
        from scellfm.geneformer import RankTokenizer
        folder = sys.argv[1]
        tokenizer = RankTokenizer.from_pretrained(folder + "/tokenizer")
        gf = without_dropout(Geneformer.from_config("tiny", tokenizer, device="cpu"))
        gf.pretrain(folder + "/corpus", steps=6)
        if os.environ["RANK"] == "0":
            open(folder + "/two.json", "w").write(json.dumps(gf.history.to_dict()))
    """)
    )
    process = two_processes(script, tmp_path)
    told, _ = process.communicate(timeout=240)
    assert process.returncode == 0, told
    two = json.loads((tmp_path / "two.json").read_text())
    one = without_dropout(tiny(tokenizer)).pretrain(adata, steps=6).history
    np.testing.assert_allclose(np.array(two["step_rows"]), np.array(one.step_rows), rtol=1e-3, atol=1e-5)
    assert two["epoch_rows"][0]["valid_loss"] == pytest.approx(one.epoch_rows[0]["valid_loss"], rel=1e-4)
