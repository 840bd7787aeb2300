"""What users bring to the two wings: named right or refused, and every remedy that a message names is tried."""

import inspect
import re
import warnings
from functools import reduce
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sparse
import torch

import scellfm
from scellfm.core import AssetError, DataError, OptionError, ScellfmWarning
from scellfm.data import GeneVectors, folds
from scellfm.geneformer import CellClassifier, GeneClassifier, Geneformer, RankTokenizer, TaskClassifier
from scellfm.scgpt import CellClassifier as ScGPTClassifier
from scellfm.scgpt import ReferenceMap, ScGPT

pytestmark = pytest.mark.filterwarnings("ignore::scellfm.core.ScellfmWarning")
QUICK = dict(epochs=1, n_boot=5)


def cells(n=40, g=60, seed=0) -> anndata.AnnData:
    "Cells of two states by four donors, with symbols as names and Ensembl ids in a column of another name."
    counts = sparse.csr_matrix(np.random.default_rng(seed).poisson(1.0, (n, g)).astype(np.float32))
    obs = pd.DataFrame({"state": ["ill", "well"] * (n // 2), "donor": [f"d{i // 10}" for i in range(n)]})
    obs.index = [f"cell{i}" for i in range(n)]
    var = pd.DataFrame({"id": [f"ENSG{i:011d}" for i in range(g)]}, index=[f"GENE{i}" for i in range(g)])
    return anndata.AnnData(counts, obs=obs, var=var)


@pytest.fixture(scope="module")
def gf():
    return Geneformer.from_config("tiny", RankTokenizer.fit(cells()), device="cpu")


@pytest.fixture(scope="module")
def gpt():
    return ScGPT.from_config("tiny", cells(), device="cpu")


@pytest.fixture(scope="module")
def saved(gf, gpt, tmp_path_factory):
    "A folder of each kind."
    place = tmp_path_factory.mktemp("saved")
    adata = cells()
    split = folds(adata, by="donor", k=2)
    gf.save_pretrained(place / "geneformer")
    gpt.save_pretrained(place / "scgpt")
    gf.finetune(adata, label="state", split=split, **QUICK).save_pretrained(place / "cells")
    gf.finetune(adata, label=["state", "donor"], split=folds(adata, k=2), **QUICK).save_pretrained(place / "tasks")
    gpt.finetune(adata, label="state", split=split, **QUICK).save_pretrained(place / "annotator")
    gpt.embed(adata)
    ReferenceMap(adata, label="state", k=3).save(place / "map")
    gf.tokenizer(adata, columns=("state", "donor")).save(place / "cells.dataset")
    return place


OPENERS = {
    "geneformer": Geneformer.from_pretrained,
    "scgpt": ScGPT.from_pretrained,
    "cells": CellClassifier.from_pretrained,
    "tasks": TaskClassifier.from_pretrained,
    "annotator": ScGPTClassifier.from_pretrained,
}


@pytest.mark.parametrize("kind", ["geneformer", "scgpt", "cells", "tasks", "annotator", "map"])
@pytest.mark.parametrize("opener", ["geneformer", "scgpt", "cells", "tasks", "annotator"])
def test_a_folder_of_another_kind_is_named_with_what_opens_it(saved, kind, opener):
    if (opener, kind) in {(kind, kind), ("cells", "geneformer")}:  # a model without a head has a sentence of its own
        return
    with pytest.raises(AssetError) as caught:
        OPENERS[opener](saved / kind)
    named = re.search(r"open it with (scellfm[\w.]+)", str(caught.value))
    assert named, str(caught.value)
    opened = reduce(getattr, named[1].split(".")[1:], scellfm)(saved / kind)
    assert opened is not None


def test_a_model_without_a_head_is_no_classifier(saved):
    for kind in (CellClassifier, GeneClassifier):
        with pytest.raises(AssetError, match="load it with Geneformer.from_pretrained"):
            kind.from_pretrained(saved / "geneformer")
    assert Geneformer.from_pretrained(saved / "geneformer")


def test_one_of_several_files_of_weights_can_be_named(saved, tmp_path):
    from shutil import copy, copytree

    for kind, load in (("geneformer", Geneformer), ("scgpt", ScGPT)):
        folder = copytree(saved / kind, tmp_path / kind)
        (folder / "best_model.pt").unlink(missing_ok=True)
        (folder / "model.safetensors").rename(folder / "model_e1.safetensors")
        copy(folder / "model_e1.safetensors", folder / "model_e2.safetensors")
        with pytest.raises(AssetError, match="several files of weights") as caught:
            load.from_pretrained(folder)
        named = str(caught.value).rpartition("such as ")[2]
        assert repr(load.from_pretrained(named)) == repr(load.from_pretrained(saved / kind))


def test_a_lost_file_is_named_and_putting_it_back_helps(saved, tmp_path):
    from shutil import copy, copytree

    folder = copytree(saved / "scgpt", tmp_path / "scgpt")
    (folder / "args.json").unlink()
    with pytest.raises(AssetError, match=r"args.json is missing .*copy it there"):
        ScGPT.from_pretrained(folder)
    copy(saved / "scgpt" / "args.json", folder)
    assert ScGPT.from_pretrained(folder)


@pytest.mark.parametrize("wrong", [cells(), ["GENE1"], 3, None])
def test_a_tokenizer_that_is_none_is_refused_and_the_remedy_works(wrong):
    with pytest.raises(OptionError, match="needs a RankTokenizer") as caught:
        Geneformer.from_config("tiny", wrong)
    if isinstance(wrong, anndata.AnnData):
        assert "RankTokenizer.fit(adata)" in str(caught.value)
        assert Geneformer.from_config("tiny", RankTokenizer.fit(wrong))


def test_the_folder_of_a_tokenizer_does_for_the_tokenizer(gf, tmp_path):
    gf.tokenizer.save_pretrained(tmp_path)
    assert repr(Geneformer.from_config("tiny", tmp_path, device="cpu")) == repr(gf)


@pytest.mark.parametrize("wrong", ["cells.h5ad", 3, None])
def test_genes_that_are_none_are_refused_and_the_remedy_works(wrong):
    with pytest.raises(OptionError, match="give an AnnData, a list of gene names"):
        ScGPT.from_config("tiny", wrong)
    assert ScGPT.from_config("tiny", ["CD3D", "MS4A1"])


@pytest.mark.parametrize("wing", ["gf", "gpt"])
def test_a_missing_split_and_no_cells_are_said(request, wing):
    model, adata = request.getfixturevalue(wing), cells()
    with pytest.raises(OptionError, match=r"split is missing.*scellfm\.data\.folds\(adata, by='donor'\)"):
        model.finetune(adata, label="state")
    split = scellfm.data.folds(adata, by="donor")
    with pytest.raises(DataError, match="no cells.*filters"):
        model.finetune(adata[:0].copy(), label="state", split=split)
    assert model.finetune(adata, label="state", split=split, **QUICK).scores is not None


@pytest.mark.parametrize("wing", ["gf", "gpt"])
def test_cells_that_are_all_the_same_get_an_error_of_ours(request, wing):
    model, adata = request.getfixturevalue(wing), cells()
    adata.X = sparse.csr_matrix(np.tile(adata.X[0].toarray(), (adata.n_obs, 1)))
    with pytest.raises(DataError, match="no gene varies"):
        model.finetune(adata, label="state", split=folds(adata, by="donor", k=2), **QUICK)


def test_a_dictionary_of_data_sets_points_to_its_parts(gf, saved, tmp_path):
    from shutil import copytree

    copytree(saved / "cells.dataset", tmp_path / "both" / "train")
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for ask in (gf.embed, gf.pretrain, lambda path: gf.finetune(path, label="state", split=folds(cells(), k=2))):
        with pytest.raises(DataError, match="several data sets"):
            ask(tmp_path / "both")
    with pytest.raises(DataError) as caught:
        gf.embed(tmp_path / "both")
    assert gf.embed(str(caught.value).rpartition(": ")[2]).shape == (40, 64)


@pytest.mark.parametrize("wing", ["gf", "gpt"])
def test_embed_takes_the_path_of_a_file_of_cells(request, wing, tmp_path):
    model, adata = request.getfixturevalue(wing), cells()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    read = model.embed(tmp_path / "cells.h5ad")
    assert model.embed(adata) is None
    key = {"gf": "X_geneformer", "gpt": "X_scGPT"}[wing]
    assert np.array_equal(read.obsm[key], adata.obsm[key]) and read.obs_names.equals(adata.obs_names)
    assert read.uns[key]["params"]["counts"] == "X"


@pytest.mark.parametrize("part", [slice(None), slice(10, 30)], ids=["all cells", "a view"])
@pytest.mark.parametrize("wing", ["gf", "gpt"])
def test_cells_on_disk_and_views_of_them_are_embedded_as_in_memory_or_refused_before_the_work(
    request, wing, part, tmp_path, monkeypatch
):
    model, adata = request.getfixturevalue(wing), cells()
    key = {"gf": "X_geneformer", "gpt": "X_scGPT"}[wing]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed, wanted = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")[part], model.embed(adata[part], copy=True)
    found = model.embed(backed, copy=True)
    assert not found.isbacked and np.array_equal(found.obsm[key], wanted.obsm[key])
    if backed.is_view:  # nothing can be written into a view of a file
        monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: pytest.fail("computed for nothing"))
        with pytest.raises(DataError, match="copy=True"):
            model.embed(backed)
    else:
        model.embed(backed)
        assert np.array_equal(backed.obsm[key], wanted.obsm[key])
    backed.file.close()


def test_a_view_of_a_file_into_which_nothing_can_be_written_is_named_by_every_door_that_writes(gf, gpt, tmp_path):
    adata, split = cells(), folds(cells(), by="donor", k=2)
    gpt.embed(adata)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    reference = ReferenceMap(adata, label="state", k=3)
    one, two = (model.finetune(adata, label="state", split=split, **QUICK) for model in (gf, gpt))
    several = gf.finetune(adata, label=["state", "donor"], split=folds(adata, k=2), **QUICK)
    view = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")[10:30]
    doors = (gf.embed, gf.embed_genes, gpt.embed, reference.transfer, one.predict, two.predict, several.predict)
    for door in doors:
        with pytest.raises(DataError, match="view of a backed AnnData cannot be written to; pass copy=True"):
            door(view)
        assert door(view, copy=True).shape == (20, 60)
    vectors = GeneVectors(adata.var_names, np.ones((60, 3), np.float32), np.ones(60, bool), {})
    with pytest.raises(DataError, match="cannot be written to; give adata.to_memory"):
        vectors.write_varm(view)
    vectors.write_varm(view.to_memory())
    view.file.close()


def test_every_task_of_geneformer_takes_the_path_of_a_file_of_cells(gf, tmp_path):
    adata = cells()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    split = folds(adata, by="donor", k=2)
    by_path = gf.finetune(tmp_path / "cells.h5ad", label="state", split=split, **QUICK)
    in_memory = gf.finetune(adata, label="state", split=split, **QUICK)
    assert by_path.scores.table.equals(in_memory.scores.table)
    predicted = by_path.predict(tmp_path / "cells.h5ad")
    in_memory.predict(adata)
    assert predicted.obs["state_predicted"].equals(adata.obs["state_predicted"])
    assert gf.embed_genes(tmp_path / "cells.h5ad").varm["X_geneformer"].shape == (60, 64)


@pytest.mark.parametrize("wing", ["gf", "gpt"])
def test_genes_under_other_names_are_found_as_the_message_says(request, wing):
    model, adata, other = request.getfixturevalue(wing), cells(), cells()
    other.var_names = [f"ENSG{i:011d}" for i in range(60)]
    del other.var["id"]
    table = dict(zip(other.var_names, adata.var_names))
    with pytest.raises(DataError, match=r"match=\{") as caught:
        model.embed(other)
    assert "mapping" in str(caught.value)
    model.embed(adata)
    key = {"gf": "X_geneformer", "gpt": "X_scGPT"}[wing]
    model.embed(other, match={"mapping": table})
    assert np.array_equal(other.obsm[key], adata.obsm[key])
    if wing == "gpt":
        adata.var["symbol of ours"], adata.var_names = adata.var_names, [f"row{i}" for i in range(60)]
        again = model.embed(adata, gene_column="symbol of ours", copy=True)
        assert np.array_equal(again.obsm["X_scGPT"], other.obsm["X_scGPT"])


@pytest.mark.parametrize("wing", ["gf", "gpt"])
def test_cells_of_one_name_are_accepted_everywhere(request, wing):
    model, adata = request.getfixturevalue(wing), cells()
    adata.obs_names = ["twin", "twin", *adata.obs_names[2:]]
    split = folds(adata, by="donor", k=2)
    model.embed(adata)
    clf = model.finetune(adata, label="state", split=split, **QUICK)
    assert len(clf.probabilities(adata)) == 40
    train = model.pretrain if wing == "gf" else model.continue_pretraining
    assert train(adata, epochs=1) is not None


def test_integration_without_labels_says_what_it_cannot_tell(gpt):
    adata = cells()
    gpt.embed(adata)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ScellfmWarning)
        scellfm.scores.integration(adata, reps=["X_scGPT"], batch="donor")
    said = " ".join(str(w.message) for w in caught)
    assert "no label is given" in said and "label='cell_type'" in said


def test_logarithms_that_scgpt_takes_are_refused_with_the_argument_that_helps(gpt):
    adata = cells()
    gpt.embed(adata)
    adata.X = adata.X.astype(np.float32).log1p() * 1.3
    ask = {
        "integration": lambda **more: scellfm.scores.integration(adata, ["X_scGPT"], "donor", "state", **more),
        "umaps": lambda **more: scellfm.scores.umaps(adata, ["X_scGPT"], "donor", "state", **more),
        "evaluate": lambda **more: ReferenceMap(adata[:20].copy(), label="state", k=3).evaluate(
            adata[20:].copy(), **more
        ),
    }
    for name, do in ask.items():
        try:
            do()
        except DataError as error:
            assert "baselines=False" in str(error), name
        assert do(baselines=False) is not None


# ---- genes under other names, in every method of Geneformer ----


def renamed(adata: anndata.AnnData) -> tuple[anndata.AnnData, dict]:
    "The same cells under ids that no model knows, and the table that leads back."
    other = adata.copy()
    other.var_names = [f"ENSG{i:011d}" for i in range(60)]
    del other.var["id"]
    return other, {"mapping": dict(zip(other.var_names, adata.var_names))}


TAKES_MATCH = {
    Geneformer: "embed embed_genes state_embeddings perturb pretrain finetune finetune_genes search".split(),
    CellClassifier: "predict probabilities embed perturb".split(),
    TaskClassifier: "predict probabilities embed perturb".split(),
    GeneClassifier: ["predict"],
}


@pytest.mark.parametrize("owner", TAKES_MATCH, ids=lambda owner: owner.__name__)
def test_every_method_of_geneformer_that_reads_counts_takes_match(owner):
    for name in TAKES_MATCH[owner]:
        assert "match" in inspect.signature(getattr(owner, name)).parameters, name


def test_embeddings_and_screens_are_the_same_under_other_names(gf, tmp_path):
    adata = cells()
    other, match = renamed(adata)
    other.write_h5ad(tmp_path / "other.h5ad")
    ours, theirs = gf.embed_genes(adata, copy=True), gf.embed_genes(other, copy=True, match=match)
    assert np.array_equal(ours.varm["X_geneformer"], theirs.varm["X_geneformer"], equal_nan=True)
    states = gf.state_embeddings(adata, state="state"), gf.state_embeddings(other, state="state", match=match)
    assert all(np.array_equal(states[0][name], states[1][name]) for name in ("ill", "well"))
    how = dict(genes=["GENE0", "GENE1"], combine="each", state="state", start="ill", goal="well")
    screens = [gf.perturb(adata, **how)]
    screens += [gf.perturb(given, match=match, **how) for given in (other, tmp_path / "other.h5ad")]
    for screen in screens[1:]:
        pd.testing.assert_frame_equal(screens[0].shifts, screen.shifts)
        pd.testing.assert_frame_equal(screens[0].genes, screen.genes)


def test_training_is_the_same_under_other_names(gf):
    adata = cells()
    other, match = renamed(adata)
    split, more = folds(adata, by="donor", k=2), dict(match=match, **QUICK)
    ours, theirs = gf.finetune(adata, "state", split=split, **QUICK), gf.finetune(other, "state", split=split, **more)
    assert ours.scores.table.equals(theirs.scores.table)
    assert ours.probabilities(adata).equals(theirs.probabilities(other, match=match))
    assert np.array_equal(
        ours.embed(adata, copy=True).obsm["X_geneformer"],
        theirs.embed(other, copy=True, match=match).obsm["X_geneformer"],
    )
    screens = [
        clf.perturb(given, genes=["GENE0"], state="state", start="ill", goal="well", match=how)
        for clf, given, how in ((ours, adata, None), (theirs, other, match))
    ]
    pd.testing.assert_frame_equal(screens[0].shifts, screens[1].shifts)
    pd.testing.assert_frame_equal(screens[0].genes, screens[1].genes)
    two = [
        gf.finetune(given, ["state", "donor"], split=folds(adata, k=2), **how)
        for given, how in ((adata, QUICK), (other, more))
    ]
    assert all(two[0].scores[label].table.equals(two[1].scores[label].table) for label in ("state", "donor"))
    assert two[1].predict(other, copy=True, match=match).obs["state_predicted"].notna().all()
    classes = {"low": [f"GENE{i}" for i in range(10)], "high": [f"GENE{i}" for i in range(10, 20)]}
    genes = [gf.finetune_genes(given, classes, folds=2, **how) for given, how in ((adata, QUICK), (other, more))]
    assert genes[0].scores.table.equals(genes[1].scores.table)
    assert genes[0].predict(adata).equals(genes[1].predict(other, match=match))
    models = [Geneformer.from_config("tiny", gf.tokenizer, device="cpu") for _ in range(2)]
    models[0].pretrain(adata, epochs=1)
    models[1].pretrain(other, epochs=1, match=match)
    weights = [model.model.state_dict() for model in models]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_how_genes_are_named_cannot_be_said_of_tokens(gf, tmp_path):
    adata = cells()
    gf.tokenizer.tokenize_files(written(adata, tmp_path / "cells.h5ad"), tmp_path / "cells.dataset")
    for given in (gf.tokenizer(adata), tmp_path / "cells.dataset"):
        for method in (gf.embed, gf.pretrain, gf.perturb):
            with pytest.raises(OptionError, match="already tokenized"):
                method(given, match={"mapping": {"a": "b"}})
    with pytest.raises(OptionError, match="already tokenized"):
        gf.pretrain([tmp_path / "cells.dataset"], match={"mapping": {"a": "b"}})


def written(adata: anndata.AnnData, path: Path) -> Path:
    "The path of the file into which the cells were written."
    adata.write_h5ad(path)
    return path


@pytest.mark.parametrize("layer", [None, "raw", "kept"])
def test_a_screen_of_a_file_knows_the_fold_changes(gf, tmp_path, layer):
    adata = cells()
    adata.layers["kept"] = adata.X.copy()
    adata.raw = adata.copy()
    path = written(adata[:, :30].copy(), tmp_path / "cells.h5ad")
    how = dict(genes=["GENE1", "GENE2"], combine="each", state="state", start="ill", goal="well", layer=layer)
    by_path, in_memory = gf.perturb(path, donor="donor", **how), gf.perturb(adata[:, :30].copy(), donor="donor", **how)
    pd.testing.assert_frame_equal(by_path.genes, in_memory.genes)
    assert by_path.genes["log2fc"].notna().all()


def test_a_split_that_is_missing_is_called_so(gf, gpt):
    adata = cells()
    for method in (gf.finetune, gf.search, gpt.finetune):
        with pytest.raises(OptionError, match="split is missing"):
            method(adata, label="state")
    with pytest.raises(OptionError, match="split is missing"):
        gf.finetune(adata, label=["state", "donor"])


@pytest.mark.parametrize("odd", [["counts"], {"a": 1}, b"x", np.ones(2), print])
def test_several_values_in_the_place_of_one_are_named_by_every_door(gf, gpt, odd):
    adata = cells()
    for ask in (
        lambda: gf.embed(adata, layer=odd),
        lambda: gf.embed(adata, copy=odd),
        lambda: gf.tokenizer(adata, layer=odd),
        lambda: gf.perturb(adata, state=odd),
        lambda: gpt.embed(adata, layer=odd),
        lambda: scellfm.data.check_counts(adata, layer=odd),
        lambda: scellfm.data.folds(adata, by=odd),
    ):
        with pytest.raises(OptionError, match="must be"):
            ask()
