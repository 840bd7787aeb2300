"""The original's raw perturbation pickles: read without being executed, and the same tables come out of them."""

import json
import os
import pickle
from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
from geneformer_golden import GOLDEN, meta, model
from test_geneformer_original_modes import PAIRS, pair_table, run_of, same_order, screen_of, tables, upstream

from scellfm.assets import read_dictionary
from scellfm.core import AssetError, OptionError
from scellfm.geneformer import Screen, original_effects

RUNS = [name for name, options in meta()["isp"].items() if options["ok"]]


def key_of(value: str):
    "A token, a tuple of tokens, or 'cell_emb', as the original's keys have them."
    if value == "cell_emb":
        return value
    found = json.loads(value)
    return tuple(found) if isinstance(found, list) else found


def write_raw(run: str, folder) -> None:
    "The raw files of a recorded run, as the original writes them."
    rows = pd.read_parquet(GOLDEN / "isp" / f"{run}.parquet")
    kind = meta()["isp"][run]["perturb_type"]
    folder.mkdir()
    for (what, cell, batch), part in rows.groupby(["kind", "cell_pos", "batch"]):
        results = {state: defaultdict(list) for state in part["state"].unique()}
        for row in part.sort_values("occurrence", kind="stable").itertuples():
            results[row.state][key_of(row.perturbed), key_of(row.affected)].append(float(row.value))
        numbered = f"_dict_{what}_embs_{cell}batch{batch}" if cell >= 0 else f"_{what}"
        name = f"in_silico_{kind}_{run}{numbered}_raw.pickle"
        (folder / name).write_bytes(pickle.dumps(results[""] if list(results) == [""] else results))


def loaded(run: str, folder) -> Screen:
    "The screen of a recorded run by way of its raw files."
    options = meta()["isp"][run]
    write_raw(run, folder / run)
    states = options["cell_states_to_model"]
    return Screen.from_original(
        folder / run, model(options["version"]).tokenizer, goal=states["goal_state"] if states else None
    )


@pytest.mark.parametrize("run", RUNS)
def test_raw_results_come_back_value_by_value(run, tmp_path):
    options, ours = meta()["isp"][run], loaded(run, tmp_path).shifts
    rows = pd.read_parquet(GOLDEN / "isp" / f"{run}.parquet").query("kind == 'cell'")
    vocabulary = model(options["version"]).tokenizer.genes
    place = rows["cell_pos"].where(rows["cell_pos"] >= 0, rows["occurrence"])
    name = ["+".join(str(vocabulary[t]) for t in np.atleast_1d(json.loads(token))) for token in rows["perturbed"]]
    theirs = rows.assign(gene=name, cell="cell" + place.astype(str))
    ours = ours.set_index(["gene", "cell"])
    assert ours.index.is_unique and len(ours) * max(1, theirs["state"].nunique()) == len(theirs)
    for state, part in theirs.groupby("state"):
        values = ours.loc[list(zip(part["gene"], part["cell"])), f"shift_{state}" if state else "cosine"]
        np.testing.assert_array_equal(values, part["value"])


@pytest.mark.parametrize("name", tables("goal_state_shift") + tables("mixture_model") + tables("aggregate_data"))
def test_tables_of_raw_results_are_the_originals(name, tmp_path):
    method = meta()["stats"][name]["options"]["mode"]
    if method == "goal_state_shift":  # one row per gene, each alternative state beside the goal
        same = screen_of(run_of(name)).table(method=method)
    ours, theirs = loaded(run_of(name), tmp_path), upstream(name)
    table = ours.table(method=method)
    assert len(table) == len(theirs)
    if method == "goal_state_shift":
        alts = meta()["stats"][name]["options"]["cell_states_to_model"]["alt_states"]
        columns = [column for column in same if not column.startswith("symbol")]
        assert set(alts) <= set(ours.params["alt"])
        pd.testing.assert_frame_equal(table[columns].reset_index(drop=True), same[columns].reset_index(drop=True))
    elif method == "mixture_model":
        table = table.set_index("gene").loc[theirs["Ensembl_ID"]]
        np.testing.assert_allclose(table["cosine"], theirs["Test_avg_shift"], atol=1e-12)
        np.testing.assert_array_equal(table["n_cells"], theirs["N_Detections"])
    else:
        np.testing.assert_allclose(np.sort(table["cosine"]), np.sort(theirs["Cosine_sim"]), atol=1e-12)


@pytest.mark.parametrize("name", tables("vs_null"))
def test_vs_null_of_raw_results_is_the_originals(name, tmp_path):
    theirs = upstream(name)
    ours = loaded(run_of(name), tmp_path).table(method="vs_null", null=loaded(meta()["stats"][name]["null"], tmp_path))
    same_order(ours, theirs)
    np.testing.assert_allclose(ours["p"], theirs["Test_vs_null_pval"], rtol=1e-9)


@pytest.mark.parametrize("name", tables("aggregate_gene_shifts"))
def test_gene_shifts_of_raw_results_are_the_originals(name, tmp_path):
    run = run_of(name)
    screen, theirs = loaded(run, tmp_path), pair_table(name)
    effects = original_effects(tmp_path / run, model(meta()["isp"][run]["version"]).tokenizer)
    ours = screen.table(method="aggregate_gene_shifts", effects=effects).set_index(["gene", "affected"])
    assert ours.index.is_unique and len(ours) == len(theirs)
    for mine, original in PAIRS.items():
        np.testing.assert_allclose(ours.loc[theirs.index, mine], theirs[original], atol=1e-7)
    assert ours["affected_symbol"].dropna().tolist() == theirs.loc[ours.index, "Affected_gene_name"].dropna().tolist()


def test_numpy_numbers_and_every_protocol_are_read(tmp_path):
    results = defaultdict(list, {((np.int64(5), np.int64(7)), "cell_emb"): [np.float32(0.5), np.float64(0.25)]})
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = tmp_path / f"p{protocol}_raw.pickle"
        path.write_bytes(pickle.dumps(results, protocol=protocol))
        assert read_dictionary(path, lists=True) == {((5, 7), "cell_emb"): [0.5, 0.25]}
        with pytest.raises(AssetError, match="asks for"):
            read_dictionary(path)


class Run:
    "Unpickled by the usual means, it calls os.system."

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


class Filled(defaultdict):
    "A dictionary of a class of its own, filled by a function of its own."


def hostile(canary) -> dict:
    "Files that would run a program, by name."
    loop = []
    loop.append(loop)
    return {
        "value": {(5, "cell_emb"): [Run(canary)]},
        "list": {(5, "cell_emb"): Run(canary)},
        "key": {(Run(canary), "cell_emb"): [1.0]},
        "factory": defaultdict(list, {("x", "y"): Run(canary)}),
        "whole": Run(canary),
        "class": Filled(list, {(5, "cell_emb"): [1.0]}),
        "loop": {(5, "cell_emb"): loop},
        "texts": {(5, "cell_emb"): ["1.0"]},
        "factory of another kind": defaultdict(dict, {5: {}}),
        "nested": {(5, "cell_emb"): [[1.0, 2.0]]},
    }


@pytest.mark.parametrize("kind", list(hostile("")))
def test_a_hostile_or_foreign_pickle_is_refused_and_nothing_runs(kind, tmp_path):
    canary = tmp_path / "canary"
    tokenizer = model("v1").tokenizer
    for protocol in (0, 2, 4, 5):
        (tmp_path / "in_silico_delete_x_dict_cell_embs_0batch0_raw.pickle").write_bytes(
            pickle.dumps(hostile(canary)[kind], protocol=protocol)
        )
        for ask in (Screen.from_original, original_effects):
            with pytest.raises(AssetError):
                ask(tmp_path, tokenizer)
    assert not canary.exists()


def test_what_is_no_result_is_named(tmp_path):
    tokenizer, path = model("v1").tokenizer, tmp_path / "in_silico_delete_x_raw.pickle"
    with pytest.raises(AssetError, match="output_directory"):
        Screen.from_original(tmp_path, tokenizer)
    for content, message in (
        ({"ENSG1": 5}, "by gene are expected"),
        ({5: 0.5}, "a different file"),
        ({(5, "cell_emb", 1): [0.5]}, "a different file"),
        ({(10**6, "cell_emb"): [0.5]}, "tokenizer of the model"),
        ({("TP53", "cell_emb"): [0.5]}, "token 'TP53'"),
        ({(5, 7): [0.5]}, "original_effects"),
    ):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(AssetError, match=message):
            Screen.from_original(tmp_path, tokenizer)
    good = pickle.dumps({(5, "cell_emb"): [0.5, 0.6]})
    path.write_bytes(good[:-9])
    with pytest.raises(AssetError):
        Screen.from_original(tmp_path, tokenizer)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(AssetError, match="git-lfs pointer"):
        Screen.from_original(tmp_path, tokenizer)
    path.write_bytes(good)
    assert len(Screen.from_original(tmp_path, tokenizer).shifts) == 2
    with pytest.raises(AssetError, match="emb_mode"):
        original_effects(tmp_path, tokenizer)


def test_the_goal_must_be_named_and_the_matched_test_says_what_it_lacks(tmp_path):
    tokenizer = model("v1").tokenizer
    write_raw("v1_delete_all_goal", tmp_path / "goal")
    write_raw("v1_delete_all", tmp_path / "plain")
    for folder, goal in (("goal", None), ("goal", "nowhere"), ("plain", "healthy")):
        with pytest.raises(OptionError, match="goal="):
            Screen.from_original(tmp_path / folder, tokenizer, goal=goal)
    screen = Screen.from_original(tmp_path / "plain", tokenizer)
    with pytest.raises(OptionError, match="rank"):
        screen.table()
    screen.save(tmp_path / "saved")
    pd.testing.assert_frame_equal(Screen.load(tmp_path / "saved").shifts, screen.shifts)
