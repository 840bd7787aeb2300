"""Simulated cells with planted regulators, from counts to the table of the screen."""

import pytest

from scellfm.data import folds, simulate_cells
from scellfm.geneformer import Geneformer, RankTokenizer

CELLS = dict(n_cells=600, n_genes=160, cell_types=1, donors=6, depth=200, programme_size=10)


@pytest.fixture(scope="module")
def journey():
    "(cells, pretrained model, classifier, table of the screen)."
    adata = simulate_cells(**CELLS, seed=1)
    model = Geneformer.from_config("tiny", RankTokenizer.fit(adata, special=True), device="cpu")
    model.pretrain(adata, epochs=6, learning_rate=2e-3)
    split = folds(adata, by="donor", k=3, stratify="condition")
    classifier = model.finetune(adata, label="condition", split=split, epochs=5, learning_rate=1e-3, n_boot=50)
    asked = dict(kind="delete", genes="all", state="condition", start="case", goal="control", max_cells=144)
    screen = classifier.perturb(adata, **asked)
    return adata, model, classifier, screen.table()


def called(table) -> set:
    "The genes below a false-discovery rate of 5 %."
    return set(table.loc[table["fdr"] < 0.05, "gene"])


def test_pretraining_learns_more_than_which_genes_are_common(journey):
    history = journey[1].history
    assert history.epoch_rows[-1]["valid_loss"] < min(history.baselines.values())


def test_the_classifier_is_far_above_chance_and_below_the_ceiling(journey):
    adata, _, classifier, _ = journey
    ceiling, auroc = adata.uns["truth"]["ceiling"]["auroc"], classifier.scores.table["auroc"]
    assert 0.8 < auroc["Geneformer (held out)"] < ceiling + 0.02
    assert auroc["majority class"] < 0.6


def test_every_donor_is_judged_and_screened_by_a_model_that_has_not_seen_it(journey):
    adata, _, classifier, table = journey
    readers = adata.obs.assign(model=classifier.model_of(adata)).groupby("donor", observed=True)["model"]
    assert (readers.nunique() == 1).all() and adata.obs["donor"].nunique() == 6
    assert table["n_donors"].max() == 6 and not table.attrs["exploratory"]


def test_planted_regulators_are_called(journey):
    adata, _, _, table = journey
    regulators = set(adata.uns["truth"]["regulators"])
    assert len(regulators & called(table)) >= 4
    top = table.sort_values("z", ascending=False)["gene"].head(10)
    assert len(regulators & set(top)) >= 4
    assert (table.set_index("gene").loc[sorted(regulators & called(table)), "effect"] > 0).all()  # towards control


def test_null_genes_are_not_called(journey):
    adata, _, _, table = journey
    null = set(adata.var_names[adata.var["programme"] != "case"])
    tested = table.loc[table["p"].notna(), "gene"]
    assert len(null & set(tested)) >= 60
    assert len(null & called(table)) <= 1
