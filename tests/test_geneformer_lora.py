"LoRA: few parameters learn, nothing else moves, and what remains is a plain model that answers the same."

import sys

import numpy as np
import peft
import pytest
import torch

from scellfm.core import ExtraError, OptionError, StoreError
from scellfm.data.cells import simulate_cells
from scellfm.data.splits import folds
from scellfm.geneformer import Geneformer, RankTokenizer
from scellfm.geneformer.finetuning.classifier import CellClassifier
from scellfm.geneformer.finetuning.evaluation import HELD_OUT
from scellfm.geneformer.finetuning.heads import choose_learners, new_classifier
from scellfm.geneformer.finetuning.lora import lora_config, merge_adapters

QUICK = dict(epochs=4, learning_rate=1e-2, n_boot=0)


@pytest.fixture(scope="module")
def adata():
    return simulate_cells(
        120,
        60,
        cell_types=["B", "T"],
        donors=2,
        depth=200,
        regulators=1,
        targets=4,
        programme_size=15,
        programme_effect=2.5,
        seed=3,
    )


@pytest.fixture(scope="module")
def gf(adata):
    return Geneformer.from_config("tiny", RankTokenizer.fit(adata), device="cpu")


@pytest.fixture(scope="module")
def clf(gf, adata):
    return gf.finetune(adata, "cell_type", split=folds(adata, by="donor", k=2), lora=4, freeze_layers=1, **QUICK)


def adapted_model(gf, lora, freeze_layers=0):
    model, _ = new_classifier(gf, np.array(["a", "b", "c"]), 0)
    return choose_learners(model, freeze_layers, lora, 0)[0].eval()


@pytest.mark.parametrize("lora", [1, 8, "all linear layers"])
def test_the_merged_model_equals_the_adapted_one(gf, adata, lora):
    if isinstance(lora, str):
        from peft import LoraConfig

        lora = LoraConfig(r=3, lora_alpha=5, target_modules=["query", "key", "value", "dense"], use_rslora=True)
    adapted = adapted_model(gf, lora)
    torch.manual_seed(1)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.2)
    cells = gf.tokenizer(adata)
    ids = torch.as_tensor(np.stack([cells[i][:12].astype(np.int64) for i in range(8)]))
    with torch.no_grad():
        expected, hidden = adapted(ids).logits, adapted.bert(ids).last_hidden_state
        with adapted.disable_adapter():
            plain = adapted.bert(ids).last_hidden_state
        merged = merge_adapters(adapted)
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(merged.bert(ids).last_hidden_state, hidden, atol=1e-5, rtol=0)
    assert (hidden - plain).abs().max() > 0.1  # the adapters said something


def test_at_first_adapters_change_nothing(gf, adata):
    ids = torch.as_tensor(gf.tokenizer(adata)[0].astype(np.int64))[None]
    with torch.no_grad():
        adapted = adapted_model(gf, 8).bert(ids).last_hidden_state
        torch.testing.assert_close(adapted, gf.model.bert(ids).last_hidden_state, atol=0, rtol=0)


def test_only_queries_values_pooler_and_head_learn(clf, gf):
    start = gf.model.bert.state_dict()
    for model in clf.models:
        moved = {
            name
            for name, value in model.model.bert.state_dict().items()
            if name in start and not torch.equal(value, start[name])
        }
        assert moved == {
            f"encoder.layer.{i}.attention.self.{part}.weight" for i in (1, 2) for part in ("query", "value")
        }
        assert not any("lora" in name for name in model.model.state_dict())
        assert type(model.model).__name__ == "BertForSequenceClassification"
        assert all(p.requires_grad for p in model.model.parameters())


def test_the_number_of_learned_parameters_is_told(clf, gf, adata):
    hidden, rank = 64, 4
    expected = 2 * 2 * 2 * rank * hidden + hidden * (hidden + 1) + 2 * (hidden + 1)
    assert clf.history.learned == expected
    assert f"{expected:,} parameters learned" in repr(clf) and f"{expected:,} parameters" in clf.history._repr_html_()


def test_adapters_learn_as_a_classifier_should(clf):
    assert clf.scores.table.loc[HELD_OUT, "balanced_accuracy"] > 0.85
    assert clf.settings["lora"] == 4


def test_no_step_after_training_needs_peft(clf, adata, tmp_path, monkeypatch):
    before = clf.probabilities(adata)
    clf.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    loaded = CellClassifier.from_pretrained(tmp_path, device="cpu")
    np.testing.assert_allclose(loaded.probabilities(adata), before, atol=1e-6)
    loaded.embed(adata[:5].copy())
    screen = loaded.perturb(adata, kind="delete", genes="all", state="cell_type", start="B", goal="T", max_cells=2)
    assert len(screen.shifts)
    assert not list(tmp_path.rglob("adapter*"))
    assert loaded.history.learned == clf.history.learned


def test_without_peft_the_extra_is_named(gf, adata, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ExtraError, match=r"scellfm\[lora\]"):
        gf.finetune(adata, "cell_type", split=folds(adata, by="donor", k=2), lora=8, **QUICK)


@pytest.mark.parametrize("lora", [0, -1, True, 2.5, "8"])
def test_a_rank_that_is_none_is_refused(lora):
    with pytest.raises(OptionError, match="lora="):
        lora_config(lora, 0, 3)


def test_nothing_to_adapt_is_said():
    with pytest.raises(OptionError, match="freeze_layers=3.*all layers"):
        lora_config(8, 3, 3)


@pytest.mark.parametrize("asked, left", [([0, 2], [2]), (1, [1]), ([0], None)])
def test_a_frozen_layer_gets_no_adapter_even_if_it_is_asked_for(asked, left):
    given = peft.LoraConfig(r=4, target_modules=["query"], layers_to_transform=asked)
    if left:
        assert lora_config(given, 1, 3).layers_to_transform == left
    else:
        with pytest.raises(OptionError, match="freeze_layers=1.*all layers"):
            lora_config(given, 1, 3)
    assert given.layers_to_transform == asked


def test_other_adapters_do_not_go_on_from_a_checkpoint(gf, adata, tmp_path):
    ask = dict(split=folds(adata, by="donor", k=2), folder=tmp_path, **{**QUICK, "epochs": 1})
    one = gf.finetune(adata, "cell_type", lora=lora_config(4, 0, 3), **ask)
    two = gf.finetune(adata, "cell_type", lora=4, **ask)  # the same adapters by their rank
    assert two.probabilities(adata).equals(one.probabilities(adata))
    other = lora_config(4, 0, 3)
    other.lora_alpha = 1
    with pytest.raises(StoreError, match="adapters"):
        gf.finetune(adata, "cell_type", lora=other, **ask)


def test_gene_classes_learn_through_adapters_too(gf, adata):
    classes = {name: list(adata.var_names[adata.var["programme"] == name]) for name in ("B", "T")}
    clf = gf.finetune_genes(adata, classes, folds=2, lora=4, **{**QUICK, "epochs": 1})
    model = clf.models[0].model
    assert type(model).__name__ == "BertForTokenClassification"
    start = gf.model.bert
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, start.embeddings.word_embeddings.weight)
    assert not torch.equal(
        model.bert.encoder.layer[0].attention.self.query.weight, start.encoder.layer[0].attention.self.query.weight
    )
    assert clf.history.learned == 3 * 2 * 2 * 4 * 64 + 2 * 65
