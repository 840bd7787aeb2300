"Gene classes: a gene is never on both sides, every gene counts once, what is left out is said, the official layout."

import numpy as np
import pandas as pd
import pytest
import torch

from scellfm.core import AssetError, DataError, OptionError, ScellfmWarning, StoreError
from scellfm.data.cells import simulate_cells
from scellfm.geneformer import Geneformer, RankTokenizer
from scellfm.geneformer.finetuning.classifier import CellClassifier
from scellfm.geneformer.finetuning.evaluation import HELD_OUT
from scellfm.geneformer.finetuning.genes import (
    TRAINED_GENES,
    GeneClassifier,
    finetune_genes,
    gene_probabilities,
    has_any,
)
from scellfm.geneformer.finetuning.genesets import LEVELS, MAJORITY, UNTUNED, gene_levels
from scellfm.geneformer.tokenizer.tokenized import TokenizedCells

pytestmark = pytest.mark.filterwarnings("ignore:Balanced accuracy")  # models this small memorise; one test looks at it
QUICK = dict(folds=3, learning_rate=2e-3, n_boot=20)


@pytest.fixture(scope="module")
def adata():
    return simulate_cells(
        60,
        50,
        cell_types=["B", "T"],
        donors=3,
        depth=150,
        regulators=1,
        targets=4,
        programme_size=15,
        programme_effect=3.0,
        seed=3,
    )


@pytest.fixture(scope="module")
def gf(adata):
    return Geneformer.from_config("tiny", RankTokenizer.fit(adata), device="cpu")


@pytest.fixture(scope="module")
def classes(adata):
    return {name: list(adata.var_names[adata.var["programme"] == name]) for name in ("B", "T")}


@pytest.fixture(scope="module")
def clf(gf, adata, classes):
    return finetune_genes(gf, adata, classes, freeze_layers=1, **QUICK)


def by_hand(gf, adata):
    "Mean class probabilities of each gene over its occurrences, cell by cell through the Hugging Face model."
    cells, sums, times = gf.tokenizer(adata), {}, {}
    for i in range(len(cells)):
        with torch.no_grad():
            values = gf.model(input_ids=torch.as_tensor(cells[i])[None]).logits[0].double().softmax(1).numpy()
        for token, value in zip(cells[i], values):
            sums[token], times[token] = sums.get(token, 0) + value, times.get(token, 0) + 1
    return {gf.tokenizer.genes[token]: sums[token] / times[token] for token in sums}


def test_each_gene_is_held_out_once_and_classes_are_spread(clf, classes):
    assert set(clf.genes.index) <= {gene for genes in classes.values() for gene in genes}
    assert set(clf.genes["fold"]) == {0, 1, 2} and clf.genes.index.is_unique
    sizes = clf.genes.groupby(["class", "fold"]).size().unstack()
    assert (sizes.max(axis=1) - sizes.min(axis=1) <= 1).all()


def test_a_held_out_gene_is_never_labelled_in_training(gf, adata, classes, monkeypatch):
    import scellfm.geneformer.finetuning.genes as room

    told = []
    original = room.gene_rows

    def spy(sequences, which, label_of, pad_id):
        rows = original(sequences, which, label_of, pad_id)
        batch = rows.batch(np.arange(rows.n), 0)
        labelled = batch["labels"] != room.IGNORED
        told.append(set(np.unique(batch["ids"][labelled].numpy())))
        assert not labelled[~batch["mask"]].any()
        assert set(batch["ids"][labelled].tolist()) == set(np.flatnonzero(label_of >= 0)) & set(
            batch["ids"].flatten().tolist()
        )
        return rows

    monkeypatch.setattr(room, "gene_rows", spy)
    found = finetune_genes(gf, adata, classes, **QUICK)
    tokens = np.array([gf.tokenizer.token_dictionary[gene] for gene in found.genes.index])
    for fold in range(3):
        held_out = set(tokens[found.genes["fold"] == fold])
        assert held_out and not told[fold] & held_out and told[fold] | held_out == set(tokens)


def test_a_prediction_is_the_mean_over_occurrences_of_the_model_not_told(clf, adata):
    table = clf.predict(adata)
    hands = [by_hand(model, adata) for model in clf.models]
    for gene, row in table.iterrows():
        folds = [int(clf.genes.loc[gene, "fold"])] if gene in clf.genes.index else [0, 1, 2]
        wanted = np.mean([hands[fold][gene] for fold in folds], axis=0)
        np.testing.assert_allclose(row[["B", "T"]].to_numpy(float), wanted, atol=1e-5)
        assert row["predicted"] == clf.classes[wanted.argmax()] and row["confidence"] == pytest.approx(
            wanted.max(), abs=1e-5
        )
    seen = np.asarray((adata[:, table.index].X > 0).sum(0)).ravel()
    assert (table["n_cells"] == seen).all() and len(table) == int((np.asarray(adata.X.sum(0)) > 0).sum())
    assert table["class"].dropna().to_dict() == clf.genes["class"].to_dict()


def test_held_out_scores_count_every_gene_once(clf, adata):
    table = clf.predict(adata, genes=list(clf.genes.index))
    right = table["predicted"].astype(str) == table["class"]
    assert clf.scores.table.loc[HELD_OUT, "accuracy"] == pytest.approx(right.mean())
    assert clf.scores.details[HELD_OUT].n_cells == len(clf.genes)
    assert list(clf.scores.table.index) == [HELD_OUT, TRAINED_GENES, LEVELS, UNTUNED, MAJORITY]
    assert set(clf.scores.details) == set(clf.scores.table.index)
    assert clf.scores.low.index.equals(clf.scores.table.index)


def test_chance_labels_are_no_better_than_chance_and_called_memorised(gf, adata):
    genes = np.random.default_rng(0).permutation(adata.var_names[np.asarray((adata.X > 0).sum(0)).ravel() > 5])
    with pytest.warns(ScellfmWarning, match="memorised its training genes.*epochs=1.*freeze_layers.*more genes"):
        found = finetune_genes(gf, adata, {"heads": genes[::2], "tails": genes[1::2]}, epochs=12, **QUICK)
    table = found.scores.table["balanced_accuracy"]
    assert table[TRAINED_GENES] > 0.95 and table[HELD_OUT] < 0.75 and found.overfit_check.overfitted


@pytest.mark.slow
def test_pretrained_company_beats_levels():
    adata = simulate_cells(
        300,
        60,
        cell_types=["B", "T"],
        donors=3,
        depth=100,
        regulators=1,
        targets=3,
        programme_size=25,
        programme_effect=3.0,
        seed=1,
    )
    gf = Geneformer.from_config("tiny", RankTokenizer.fit(adata), device="cpu").pretrain(
        adata, epochs=20, learning_rate=6e-3
    )
    classes = {name: list(adata.var_names[adata.var["programme"] == name]) for name in ("B", "T")}
    table = gf.finetune_genes(adata, classes, learning_rate=5e-4, n_boot=10).scores.table["auroc"]
    assert table[HELD_OUT] > 0.9 > table[LEVELS] and table[UNTUNED] > 0.9


def test_the_pretrained_model_is_left_as_it_was_and_frozen_layers_stay(clf, gf, adata, classes):
    before = {name: value.clone() for name, value in gf.model.state_dict().items()}
    finetune_genes(gf, adata, classes, **QUICK)
    assert all(torch.equal(value, before[name]) for name, value in gf.model.state_dict().items())
    for model in clf.models:
        assert sorted(model.load_report.fresh) == ["classifier.bias", "classifier.weight"]
        for name, value in model.model.bert.encoder.layer[0].named_parameters():
            assert torch.equal(value, gf.model.bert.encoder.layer[0].get_parameter(name))
        moved = model.model.bert.encoder.layer[1].output.dense.weight
        assert not torch.equal(moved, gf.model.bert.encoder.layer[1].output.dense.weight)


def test_two_runs_and_other_orders_of_cells_and_genes_are_equal(clf, gf, adata, classes):
    mixed = adata[np.random.default_rng(1).permutation(adata.n_obs)].copy()
    turned = {name: classes[name][::-1] for name in ("T", "B")}
    for data, named in ((adata, classes), (mixed, turned)):
        again = finetune_genes(gf, data, named, freeze_layers=1, **QUICK)
        assert again.genes.equals(clf.genes)
        assert [h.step_rows for h in again.histories] == [h.step_rows for h in clf.histories]
        pd.testing.assert_frame_equal(again.scores.table, clf.scores.table, atol=1e-6)


def test_a_finished_run_is_taken_from_its_folder(clf, gf, adata, classes, tmp_path):
    for _ in range(2):
        found = finetune_genes(gf, adata, classes, freeze_layers=1, folder=tmp_path, **QUICK)
        assert found.scores.table.equals(clf.scores.table)
    fewer = {"B": classes["B"][:-1], "T": classes["T"]}
    with pytest.raises(StoreError, match="genes|weights"):
        finetune_genes(gf, adata, fewer, freeze_layers=1, folder=tmp_path, **QUICK)


def test_symbols_ids_and_versions_name_the_same_gene(gf, adata, classes, clf):
    tokenizer = gf.tokenizer
    names = {f"SYM{i}": gene for i, gene in enumerate(tokenizer.medians)}
    named = RankTokenizer(
        tokenizer.token_dictionary, tokenizer.medians, gene_names=names, max_length=tokenizer.max_length
    )
    other = Geneformer(gf.model, named, device="cpu")
    symbols = {gene: symbol for symbol, gene in names.items()}
    by_symbol = {name: [symbols[gene] for gene in genes] for name, genes in classes.items()}
    found = finetune_genes(other, adata, by_symbol, freeze_layers=1, **QUICK)
    assert found.genes.equals(clf.genes)
    first = symbols[classes["B"][0]]
    assert found.predict(adata, genes=first).index.tolist() == [classes["B"][0]]
    assert found.predict(adata, genes=[first])["symbol"].tolist() == [first]
    with pytest.raises(DataError, match="classes 'B' and 'T'.*one class"):
        finetune_genes(other, adata, {"B": classes["B"], "T": [*classes["T"], first]}, **QUICK)


def test_genes_that_are_unknown_or_silent_are_reported(gf, adata, classes):
    quiet = adata.copy()
    quiet.X[:, [quiet.var_names.get_loc(gene) for gene in classes["B"][:2]]] = 0
    given = {"B": [*classes["B"], "NOSUCH1", "NOSUCH2"], "T": classes["T"]}
    with pytest.warns(
        ScellfmWarning, match="2 genes of the classes are not in the vocabulary .NOSUCH1, NOSUCH2.*2 are in no cell"
    ):
        found = finetune_genes(gf, quiet, given, **QUICK)
    assert found.settings["left_out"] == {
        "not in the vocabulary": ["NOSUCH1", "NOSUCH2"],
        "in no cell": sorted(classes["B"][:2]),
    }
    assert len(found.genes) == sum(map(len, classes.values())) - 2


def test_bad_classes_are_named(gf, adata, classes):
    few = {"B": classes["B"], "T": classes["T"][:4]}
    lost = {"B": classes["B"], "T": [*classes["T"][:4], "NOSUCH"]}
    for given, words in (
        ({"B": classes["B"]}, "1 class"),
        ({}, "0 class"),
        (few, "'T' has 4 genes.*at least 5"),
        (lost, "'T' has 4 genes.*NOSUCH"),
        ({"B": classes["B"], "T": classes["B"]}, "'B' and 'T'"),
    ):
        with pytest.raises(DataError, match=words):
            finetune_genes(gf, adata, given, **QUICK)
    with pytest.raises(DataError, match="8 genes|at least 10 for 10 folds"):
        finetune_genes(gf, adata, {"B": classes["B"], "T": classes["T"][:8]}, **{**QUICK, "folds": 10})
    for given, words in ((list(classes), "a class: gene ids"), ({"B": "CD19", "T": classes["T"]}, "dict of lists")):
        with pytest.raises(OptionError, match=words):
            finetune_genes(gf, adata, given, **QUICK)
    for options, words in (
        ({"folds": 1}, "folds=1"),
        ({"freeze_layers": 9}, "freeze_layers=9"),
        ({"epoch": 2}, "epoch"),
        ({"class_weights": "even"}, "even"),
        ({"stop": "valid_loss"}, "valid_loss"),
    ):
        with pytest.raises(OptionError, match=words):
            finetune_genes(gf, adata, classes, **{**QUICK, **options})
    with pytest.raises(DataError, match="NOSUCH"):
        finetune_genes(gf, adata, classes, **QUICK).predict(adata, genes=["NOSUCH"])


def test_genes_that_no_cell_has_cannot_be_predicted(clf, adata, classes):
    quiet = adata[:5].copy()
    quiet.X[:, quiet.var_names.get_loc(classes["B"][0])] = 0
    with pytest.raises(DataError, match="none of the 5 cells"):
        clf.predict(quiet, genes=classes["B"][:1])


def test_saved_and_loaded_it_answers_the_same(clf, adata, tmp_path):
    clf.save_pretrained(tmp_path / "clf")
    loaded = GeneClassifier.from_pretrained(tmp_path / "clf", device="cpu")
    pd.testing.assert_frame_equal(loaded.predict(adata), clf.predict(adata), check_exact=True)
    assert loaded.genes.equals(clf.genes) and loaded.scores.table.equals(clf.scores.table)
    assert (
        loaded.histories == clf.histories
        and str(loaded.overfit_check) == str(clf.overfit_check)
        and repr(loaded) == repr(clf)
    )


def test_each_fold_opens_in_transformers_and_the_originals_folders_open_here(clf, adata, tmp_path):
    from transformers import BertForTokenClassification

    clf.save_pretrained(tmp_path)
    model = BertForTokenClassification.from_pretrained(tmp_path / "fold1").eval()
    assert model.config.id2label == {0: "B", 1: "T"}
    (tmp_path / "gene_classifier.json").unlink()
    loaded = GeneClassifier.from_pretrained(tmp_path / "fold1", device="cpu")
    assert list(loaded.classes) == ["B", "T"] and loaded.scores is None and len(loaded.genes) == 0
    table = loaded.predict(adata)
    model = Geneformer(model, clf.models[1].tokenizer, device="cpu")
    hand = by_hand(model, adata)
    np.testing.assert_allclose(table[["B", "T"]], np.stack([hand[gene] for gene in table.index]), atol=1e-5)


def test_the_two_kinds_of_classifier_are_told_apart(clf, gf, adata, tmp_path):
    from scellfm.data.splits import folds

    clf.save_pretrained(tmp_path / "genes")
    with pytest.raises(AssetError):
        CellClassifier.from_pretrained(tmp_path / "genes" / "fold0", device="cpu")
    cells = gf.finetune(adata, "cell_type", split=folds(adata, k=2, stratify="cell_type"), n_boot=5)
    cells.save_pretrained(tmp_path / "cells")
    with pytest.raises(AssetError, match="CellClassifier"):
        GeneClassifier.from_pretrained(tmp_path / "cells" / "fold0", device="cpu")
    gf.save_pretrained(tmp_path / "plain")
    with pytest.raises(AssetError, match="Geneformer.from_pretrained"):
        GeneClassifier.from_pretrained(tmp_path / "plain", device="cpu")


def test_tokenized_cells_do_as_well_and_max_cells_are_drawn_by_name(gf, adata, classes, clf, tmp_path):
    cells = gf.tokenizer(adata, keep_counts=True)
    cells.save(tmp_path / "cells.dataset")
    other = finetune_genes(gf, str(tmp_path / "cells.dataset"), classes, freeze_layers=1, **QUICK)
    assert other.scores.table.equals(clf.scores.table)
    pd.testing.assert_frame_equal(other.predict(cells), clf.predict(adata))
    few = finetune_genes(gf, adata, classes, max_cells=30, **QUICK)
    mixed = finetune_genes(gf, adata[::-1].copy(), classes, max_cells=30, **QUICK)
    assert len(few.history.steps) == 3 and few.history.step_rows == mixed.history.step_rows


def test_special_tokens_get_no_class(adata, classes):
    gf = Geneformer.from_config("tiny", RankTokenizer.fit(adata, special=True), device="cpu")
    table = finetune_genes(gf, adata, classes, **QUICK).predict(adata)
    assert not {"<cls>", "<eos>", "<pad>", "<mask>"} & set(table.index) and len(table) > 40


def test_levels_of_genes_by_hand():
    cells = TokenizedCells(
        np.array([4, 2, 3, 2, 4], np.uint16),
        np.array([0, 3, 3, 5]),
        pd.DataFrame(index=list("abc")),
        np.arange(3),
        np.array([np.e - 1, 1, 1, 3, 0], np.float32),
    )
    levels = gene_levels(cells, 6)
    assert levels[4] == pytest.approx([2 / 3, 0.25, 1 / 3]) and levels[2] == pytest.approx(
        [2 / 3, 1 / 6, (np.log(2) + np.log(4)) / 3]
    )
    assert levels[5].tolist() == [0, 1, 0]
    assert has_any(cells, np.arange(6) == 3).tolist() == [True, False, False]


def test_batches_change_nothing(clf, adata):
    model = clf.models[0]
    sequences = model.readable(model.tokenizer(adata))
    wanted = np.ones(len(model.tokenizer.genes), bool)
    one, n_one = gene_probabilities(model, sequences, wanted)
    other, n_other = gene_probabilities(model, sequences, wanted, token_budget=40)
    np.testing.assert_allclose(one, other, atol=1e-5)
    assert (n_one == n_other).all()


@pytest.mark.slow
def test_real_cells_tell_ribosomal_genes_from_others():
    import scellfm as sf

    adata = sf.data.demo()
    gf = Geneformer.from_config("tiny", RankTokenizer.fit(adata), device="cpu").pretrain(
        adata, epochs=3, learning_rate=3e-3
    )
    ribosome = [gene for gene in adata.var_names if gene.startswith(("RPL", "RPS"))]
    others = [gene for gene in adata.var_names if gene not in ribosome][::10]
    found = gf.finetune_genes(adata, {"ribosome": ribosome, "other": others}, learning_rate=1e-3)
    assert found.scores.table.loc[HELD_OUT, "auroc"] > 0.8
