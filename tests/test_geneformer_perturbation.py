"""Perturbation in silico: parity with every run of the original, and what a screen must hold by itself."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from geneformer_golden import GOLDEN, VERSIONS, cells, meta, model, runs

from scellfm.core import AssetError, DataError, OptionError, ScellfmWarning, StoreError
from scellfm.data.demonstration import demo
from scellfm.geneformer import Geneformer, RankTokenizer, Screen, gene_effects, perturb

DELETIONS, OVEREXPRESSIONS = runs("delete"), runs("overexpress")


# parity with the original
def asked(options: dict) -> tuple:
    "The model, the cells and the arguments of `perturb` for a recorded run."
    version, states, genes = options["version"], options["cell_states_to_model"], options["genes_to_perturb"]
    arguments = {"kind": options["perturb_type"], "genes": genes, "emb_layer": options["emb_layer"]}
    if states:  # the states are made of all cells; the original drops an anchor where there are states
        arguments |= {
            "state": states["state_key"],
            "start": states["start_state"],
            "goal": states["goal_state"],
            "alt": states["alt_states"],
        }
        return model(version), cells(version), arguments
    return (
        model(version),
        cells(version)[np.sort(options["cell_order"])],
        arguments | {"anchor": options.get("anchor_gene")},
    )


def over_cut(options: dict) -> set:
    "Cells (names) whose original the old software cuts by more than they overflow when genes are put in."
    if options["perturb_type"] == "delete" or options["genes_to_perturb"] == "all":
        return set()
    gf, given = model(options["version"]), cells(options["version"])
    wanted = [gf.tokenizer.token(gene) for gene in options["genes_to_perturb"]]
    missing = np.array([np.setdiff1d(wanted, given[i]).size for i in range(len(given))])
    grown = given.lengths + missing
    theirs = np.maximum(0, np.minimum(grown, gf.max_length) + missing - gf.max_length)
    return set(given.obs.index[theirs != np.maximum(0, grown - gf.max_length)]) & set(map(str, options["cell_order"]))


def recorded(name: str, kind: str) -> pd.DataFrame:
    "Rows of a recorded run: gene (or joint genes), cell (name), state, value; for kind 'gene' also the affected gene."
    options = meta()["isp"][name]
    rows = pd.read_parquet(GOLDEN / "isp" / f"{name}.parquet").query("kind == @kind")
    genes, order = model(options["version"]).tokenizer.genes, np.asarray(options["cell_order"])
    joint = options["genes_to_perturb"] != "all"
    position = rows["occurrence"] if joint and kind == "cell" else rows["cell_pos"]
    gene = "+".join(options["genes_to_perturb"]) if joint else genes[rows["perturbed"].astype(int)]
    rows = rows.assign(gene=gene, cell=order[position].astype(str))
    return rows.assign(affected=genes[rows["affected"].astype(int)]) if kind == "gene" else rows


@pytest.mark.parametrize("name", DELETIONS + OVEREXPRESSIONS)
def test_every_run_of_the_original_is_reproduced(name):
    options = meta()["isp"][name]
    gf, given, arguments = asked(options)
    screen = perturb(gf, given, **arguments)
    theirs = recorded(name, "cell")
    theirs = theirs[~theirs["cell"].isin(over_cut(options))]
    ours = screen.shifts.set_index(["gene", "cell"])
    assert ours.index.is_unique and set(theirs["cell"]) <= set(screen.shifts["cell"])
    if not over_cut(options):
        assert len(theirs) == len(ours) * max(1, theirs["state"].nunique())
    for state, rows in theirs.groupby("state"):
        values = ours.loc[list(zip(rows["gene"], rows["cell"])), f"shift_{state}" if state else "cosine"]
        np.testing.assert_allclose(values, rows["value"], atol=1e-5)


def test_the_runs_cover_what_the_original_can_do():
    kinds = {
        (o["version"], o["perturb_type"], o["genes_to_perturb"] == "all", bool(o["cell_states_to_model"]))
        for o in map(meta()["isp"].get, DELETIONS + OVEREXPRESSIONS)
    }
    assert len(kinds) >= 14  # of 2 x 2 x 2 x 2; the original crashes on V1, overexpression of a list, without states


GENE_LEVEL = [name for name in DELETIONS + OVEREXPRESSIONS if meta()["isp"][name]["emb_mode"].endswith("_and_gene")]


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in GENE_LEVEL
        if meta()["isp"][n]["genes_to_perturb"] == "all" and meta()["isp"][n]["perturb_type"] == "delete"
    ],
)
def test_effects_of_all_deletions_on_genes_are_the_originals(name):
    gf, given, arguments = asked(meta()["isp"][name])
    ours = gene_effects(gf, given, genes="all", emb_layer=arguments["emb_layer"]).set_index(
        ["gene", "affected", "cell"]
    )["cosine"]
    theirs = recorded(name, "gene").set_index(["gene", "affected", "cell"])["value"]
    assert ours.index.is_unique and len(ours) == len(theirs)
    np.testing.assert_allclose(ours.loc[theirs.index], theirs, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in GENE_LEVEL if meta()["isp"][n]["genes_to_perturb"] != "all"])
def test_effects_of_joint_perturbations_on_genes_are_the_originals(name):
    options = meta()["isp"][name]
    if over_cut(options):
        pytest.skip(
            "some cells of this run are over-cut by the original, and its gene rows do not say which cell they are of"
        )
    gf, given, arguments = asked(options)
    ours = gene_effects(gf, given, kind=arguments["kind"], genes=arguments["genes"], emb_layer=arguments["emb_layer"])
    theirs = recorded(name, "gene")
    assert set(ours["affected"]) == set(theirs["affected"])
    order = {str(cell): place for place, cell in enumerate(options["cell_order"])}
    ours = ours.assign(place=ours["cell"].map(order)).sort_values("place", kind="stable")
    for gene, rows in theirs.groupby("affected"):  # the original numbers the cells that have the affected gene
        np.testing.assert_allclose(
            ours.loc[ours["affected"] == gene, "cosine"], rows.sort_values("occurrence")["value"], atol=1e-5
        )


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in GENE_LEVEL
        if meta()["isp"][n]["genes_to_perturb"] == "all" and meta()["isp"][n]["perturb_type"] == "overexpress"
    ],
)
def test_effects_of_overexpression_on_genes_are_the_originals_with_their_labels_put_right(name):
    gf, given, arguments = asked(meta()["isp"][name])
    ours = gene_effects(gf, given, kind="overexpress", emb_layer=arguments["emb_layer"])
    theirs = recorded(name, "gene").set_index(["gene", "affected", "cell"])["value"]
    shifted = []  # the original calls each value by the next gene's name, and loses the last value
    for _, rows in ours.groupby(["gene", "cell"], sort=False):
        shifted.append(rows.assign(affected=rows["affected"].shift(-1)).iloc[:-1])
    ours = pd.concat(shifted).set_index(["gene", "affected", "cell"])["cosine"]
    assert len(ours) == len(theirs)
    np.testing.assert_allclose(ours.loc[theirs.index], theirs, atol=1e-5)


# what a screen must hold
@pytest.fixture(scope="module")
def pbmc():
    "Sixty monocytes and T cells with donors, and a tiny model with their vocabulary."
    adata = demo()
    adata = adata[adata.obs["cell_type"].isin(["CD14+ Monocyte", "CD8+ Cytotoxic T"])][:60].copy()
    adata.obs["donor"] = np.tile(["a", "b", "c"], 20)
    adata.obs["half"] = np.repeat(["left", "right"], 30)
    return adata, Geneformer.from_config("tiny", RankTokenizer.fit(adata, max_length=48), device="cpu")


QUESTION = dict(state="cell_type", start="CD14+ Monocyte", goal="CD8+ Cytotoxic T", donor="donor")


def plain_shifts(gf, tokens, goal):
    "The shifts of all deletions of one V1 cell, by way of the whole BertForMaskedLM, one at a time."

    def embed(ids):
        with torch.inference_mode():
            return gf.model(torch.from_numpy(ids)[None], output_hidden_states=True).hidden_states[-2][0].mean(0)

    def cosine(a):
        return float(torch.cosine_similarity(a, torch.from_numpy(goal), dim=0))

    return [cosine(embed(np.delete(tokens, i))) - cosine(embed(tokens)) for i in range(len(tokens))]


def test_a_screen_from_anndata_equals_the_plain_way(pbmc):
    adata, gf = pbmc
    screen = gf.perturb(adata, max_cells=4, **QUESTION)
    goal = gf.state_embeddings(adata, state="cell_type")["CD8+ Cytotoxic T"]
    tokens = gf.cells(adata)
    assert screen.shifts["cell"].nunique() == 4
    for name, rows in screen.shifts.groupby("cell"):
        cell = tokens[adata.obs_names.get_loc(name)]
        assert list(rows["gene"]) == list(gf.tokenizer.genes[cell]) and list(rows["rank"]) == list(range(len(cell)))
        assert set(rows["donor"]) == {adata.obs.loc[name, "donor"]}
        np.testing.assert_allclose(rows["shift"], plain_shifts(gf, cell, goal), atol=1e-6)


def test_the_order_of_cells_and_the_budget_change_nothing(pbmc):
    adata, gf = pbmc
    one = gf.perturb(adata, max_cells=6, **QUESTION).shifts
    other = gf.perturb(adata[::-1].copy(), max_cells=6, token_budget=300, **QUESTION).shifts
    merged = one.merge(other, on=["gene", "cell", "donor", "group", "rank"])
    assert len(merged) == len(one) == len(other)
    np.testing.assert_allclose(merged["shift_x"], merged["shift_y"], atol=1e-5)


def test_groups_are_screened_apart(pbmc):
    adata, gf = pbmc
    question = dict(state="half", start="left", goal="right", donor="donor")
    together = gf.perturb(adata, groupby="cell_type", max_cells=3, **question).shifts
    for group in adata.obs["cell_type"].unique():
        alone = gf.perturb(adata[adata.obs["cell_type"] == group].copy(), max_cells=3, **question).shifts
        rows = together[together["group"] == group].drop(columns="group").reset_index(drop=True)
        pd.testing.assert_frame_equal(rows, alone.drop(columns="group"), atol=1e-5, rtol=0)


def test_each_cell_is_read_by_the_model_that_has_not_seen_it(pbmc):
    adata, gf = pbmc
    second = Geneformer.from_config("tiny", gf.tokenizer, seed=1, device="cpu")
    model_of = (adata.obs["donor"] == "a").to_numpy().astype(int)
    mixed = perturb([gf, second], adata, model_of=model_of, max_cells=9, **QUESTION).shifts
    assert set(mixed["model"]) == {0, 1} and set(mixed.loc[mixed["model"] == 1, "donor"]) == {"a"}
    part = adata[model_of == 1].copy()
    alone = perturb(second, part, **QUESTION).shifts
    merged = mixed[mixed["model"] == 1].merge(alone, on=["gene", "cell"])
    assert len(merged) == (mixed["model"] == 1).sum()
    np.testing.assert_allclose(merged["shift_x"], merged["shift_y"], atol=1e-5)


def test_cells_seen_by_every_model_are_left_out(pbmc):
    adata, gf = pbmc
    model_of = np.where(adata.obs["donor"] == "a", -1, 0)
    with pytest.warns(ScellfmWarning, match="20 cells were used to train every model"):
        shifts = perturb([gf], adata, model_of=model_of, max_cells=4, **QUESTION).shifts
    assert set(shifts["donor"]) <= {"b", "c"}
    for wrong in (model_of[:-1], np.full(60, 1)):
        with pytest.raises(OptionError, match="model_of"):
            perturb([gf], adata, model_of=wrong, **QUESTION)
    with pytest.raises(OptionError, match="model_of"):
        perturb([gf, gf], adata, **QUESTION)


def test_a_list_is_one_joint_perturbation_of_the_cells_that_have_all(pbmc):
    adata, gf = pbmc
    tokens = gf.cells(adata)
    pair = [str(gf.tokenizer.genes[t]) for t in tokens[0][[3, 10]]]
    ids = [gf.tokenizer.token(gene) for gene in pair]
    have = [adata.obs_names[i] for i in range(60) if set(ids) <= set(tokens[i])]
    shifts = gf.perturb(adata, genes=pair).shifts
    assert set(shifts["cell"]) == set(have) and set(shifts["gene"]) == {"+".join(pair)}
    assert shifts.loc[shifts["cell"] == adata.obs_names[0], "rank"].item() == 6.5


def test_without_a_goal_shift_is_one_minus_cosine(pbmc):
    adata, gf = pbmc
    shifts = gf.perturb(adata[:2].copy()).shifts
    np.testing.assert_allclose(shifts["shift"], 1 - shifts["cosine"])
    assert (shifts["shift"] >= -1e-6).all() and shifts["donor"].isna().all() and set(shifts["group"]) == {"all"}


def test_a_stopped_screen_goes_on_and_gives_the_same(pbmc, tmp_path, monkeypatch):
    from scellfm.geneformer.perturbation import edits

    adata, gf = pbmc
    monkeypatch.setattr(edits, "BLOCK_EDITED", 4000)
    expected = gf.perturb(adata, max_cells=5, **QUESTION).shifts
    computed, whole = [], edits.block_effects

    def stops(*arguments, **named):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(1)
        return whole(*arguments, **named)

    monkeypatch.setattr(edits, "block_effects", stops)
    with pytest.raises(KeyboardInterrupt):
        gf.perturb(adata, max_cells=5, folder=tmp_path / "run", **QUESTION)
    monkeypatch.setattr(edits, "block_effects", lambda *a, **k: computed.append(1) or whole(*a, **k))
    resumed = gf.perturb(adata, max_cells=5, folder=tmp_path / "run", **QUESTION).shifts
    pd.testing.assert_frame_equal(resumed, expected)
    done = len(computed)
    gf.perturb(adata, max_cells=5, folder=tmp_path / "run", **QUESTION)
    assert len(computed) == done > 3  # everything was read, nothing computed again


@pytest.mark.parametrize("change", ["weights", "cells", "setting"])
def test_a_folder_of_another_run_is_refused(pbmc, tmp_path, change):
    adata, gf = pbmc
    gf.perturb(adata, max_cells=1, folder=tmp_path / "run", **QUESTION)
    other = Geneformer.from_config("tiny", gf.tokenizer, seed=9, device="cpu") if change == "weights" else gf
    data = adata[5:].copy() if change == "cells" else adata
    with pytest.raises(StoreError):
        other.perturb(
            data, max_cells=1, folder=tmp_path / "run", emb_layer=0 if change == "setting" else -1, **QUESTION
        )


def test_out_of_memory_is_survived_and_recorded(pbmc, monkeypatch):
    adata, gf = pbmc
    expected = gf.perturb(adata, max_cells=2, **QUESTION).shifts
    whole = Geneformer.hidden

    def small_card(self, ids, mask, layer):
        if ids.numel() > 1000:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return whole(self, ids, mask, layer)

    monkeypatch.setattr(Geneformer, "hidden", small_card)
    with pytest.warns(ScellfmWarning, match="out of memory"):
        screen = gf.perturb(adata, max_cells=2, **QUESTION)
    np.testing.assert_allclose(screen.shifts["shift"], expected["shift"], atol=1e-5)
    assert screen.params["out_of_memory"]


def test_the_draw_of_cells_depends_on_names_and_seed_alone(pbmc):
    adata, gf = pbmc
    drawn = [
        set(gf.perturb(data, genes="all", max_cells=3, seed=seed).shifts["cell"])
        for data, seed in ((adata, 0), (adata[::-1].copy(), 0), (adata, 1))
    ]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 3


def test_cells_of_one_name_stay_apart(pbmc):
    adata, gf = pbmc
    twins = adata[:2].copy()
    twins.obs.index = ["twin", "twin"]
    assert set(gf.perturb(twins).shifts["cell"]) == {"twin", "twin#1"}


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (dict(kind="erase"), OptionError, "delete"),
        (dict(goal="CD8+ Cytotoxic T"), OptionError, "state="),
        (dict(state="cell_type", goal="CD8+ Cytotoxic T"), OptionError, "start"),
        (dict(state="cell_type", start="CD14+ Monocyte", alt="CD8+ Cytotoxic T"), OptionError, "goal"),
        (dict(state="cell_type", start="CD14+ Monocyte", goal="CD14+ Monocyte"), OptionError, "differ"),
        (dict(state="cell_type", start="CD14+ Monocyte", goal="B cell"), DataError, "B cell"),
        (dict(state="no_such", start="a", goal="b"), DataError, "no_such"),
        (dict(genes=["NOSUCHGENE"]), DataError, "NOSUCHGENE"),
        (dict(genes=[]), OptionError, "at least one"),
        (dict(kind="overexpress", anchor="CD3D"), OptionError, "anchor"),
        (dict(emb_layer=1), OptionError, "emb_layer"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_the_fix(pbmc, wrong, error, message):
    adata, gf = pbmc
    with pytest.raises(error, match=message):
        gf.perturb(adata, **wrong)


def test_genes_that_no_cell_has_together_are_an_error(pbmc):
    adata, gf = pbmc
    tokens = gf.cells(adata)
    counts = np.bincount(np.concatenate([tokens[i] for i in range(60)]), minlength=len(gf.tokenizer.genes))
    rare = [str(gf.tokenizer.genes[t]) for t in np.argsort(counts[2:], kind="stable")[:4] + 2]
    with pytest.raises(DataError, match="has all of the genes"):
        gf.perturb(adata, genes=rare)


# the result
def test_the_table_names_genes_and_their_fold_change(pbmc):
    adata, gf = pbmc
    screen = gf.perturb(adata, max_cells=8, **QUESTION)
    table = screen.table()
    assert {"gene", "symbol", "mean_shift", "effect", "p", "fdr", "rank", "detection", "log2fc", "status"} <= set(table)
    counts = pd.DataFrame(adata.X.toarray(), columns=adata.var_names)
    rates = counts.div(counts.sum(axis=1), axis=0) * 1e4
    monocyte = (adata.obs["cell_type"] == "CD14+ Monocyte").to_numpy()
    for gene in table["gene"].head(3):
        by_donor = rates[gene].groupby([monocyte, adata.obs["donor"].to_numpy()]).mean()
        fold = np.log2((by_donor[False].mean() + 0.1) / (by_donor[True].mean() + 0.1))
        assert table.set_index("gene").loc[gene, "log2fc"] == pytest.approx(fold, abs=1e-4)
    shifts = screen.shifts.groupby("gene")["shift"].mean()
    np.testing.assert_allclose(table["mean_shift"], shifts.loc[table["gene"]], atol=1e-7)


def test_the_originals_table_stands_beside(pbmc):
    adata, gf = pbmc
    screen = gf.perturb(adata, max_cells=8, **QUESTION)
    original = screen.table(method="goal_state_shift")
    assert set(original["gene"]) == set(screen.shifts["gene"]) and original["fdr"].between(0, 1).all()
    with pytest.raises(OptionError, match="matched"):
        screen.table(method="match")


def test_scaling_one_donors_shifts_changes_no_p(pbmc):
    adata, gf = pbmc
    screen = gf.perturb(adata, max_cells=20, **QUESTION)
    scaled = screen.shifts.copy()
    scaled["shift"] = scaled["shift"] * scaled["donor"].map({"a": 1.0, "b": 50.0, "c": 0.02}).to_numpy()
    one, other = (
        Screen(shifts, screen.genes, screen.params).table().set_index("gene") for shifts in (screen.shifts, scaled)
    )
    np.testing.assert_allclose(other.loc[one.index, "z"], one["z"], atol=1e-4)


def test_groups_must_be_named_where_there_are_several(pbmc):
    adata, gf = pbmc
    screen = gf.perturb(adata, state="half", start="left", goal="right", groupby="cell_type", max_cells=2)
    assert len(screen.groups) == 2 and set(screen.table()["group"]) == set(screen.groups)
    assert "group" not in screen.table(group=screen.groups[0]) or set(
        screen.table(group=screen.groups[0])["group"]
    ) == {screen.groups[0]}
    for ask in (screen.plot, lambda: screen.recover(["CD3D"])):
        with pytest.raises(OptionError, match="name one"):
            ask()
    with pytest.raises(OptionError, match="group"):
        screen.table(group="B cell")


def test_recovery_takes_symbols_and_ids(pbmc):
    adata, gf = pbmc
    screen = gf.perturb(adata, max_cells=10, **QUESTION)
    known = list(screen.table()["gene"].head(8))
    table = screen.recover(known)
    assert {"auroc", "average_precision"} <= set(table) and any("log2FC" in str(row) for row in table.index)
    pd.testing.assert_frame_equal(screen.recover(known[0]), screen.recover(known[:1]))


def test_a_screen_is_saved_and_comes_back(pbmc, tmp_path):
    adata, gf = pbmc
    screen = gf.perturb(adata, max_cells=3, **QUESTION)
    screen.save(tmp_path / "screen")
    loaded = Screen.load(tmp_path / "screen")
    pd.testing.assert_frame_equal(loaded.shifts, screen.shifts)
    pd.testing.assert_frame_equal(loaded.genes, screen.genes)
    assert loaded.params == json.loads(json.dumps(screen.params)) and repr(loaded) == repr(screen)
    with pytest.raises(AssetError, match="not a saved screen"):
        Screen.load(tmp_path)


@pytest.mark.parametrize("version", VERSIONS)
def test_special_tokens_are_never_perturbed(version):
    gf, given = model(version), cells(version)[:3]
    shifts = perturb(gf, given).shifts
    assert not shifts["gene"].str.startswith("<").any()
    assert len(shifts) == (given.lengths - 2 * gf.special).sum() and shifts["rank"].min() == 0
