"""The original's five tables: equal to its own on its own raw values, and made by our screens end to end."""

import numpy as np
import pandas as pd
import pytest
from geneformer_golden import GOLDEN, meta, model
from sklearn.mixture import GaussianMixture
from test_geneformer_perturbation import asked, recorded

from scellfm.core import DataError, OptionError
from scellfm.geneformer import Screen, gene_effects, perturb


def tables(mode: str) -> list[str]:
    "The recorded tables of one mode."
    return [name for name, record in meta()["stats"].items() if record["ok"] and record["options"]["mode"] == mode]


def run_of(name: str) -> str:
    "The run that a recorded table was made from."
    return name.rsplit("__", 1)[0]


def upstream(name: str) -> pd.DataFrame:
    "A recorded table."
    return pd.read_parquet(GOLDEN / "stats" / f"{name}.parquet")


def screen_of(run: str) -> Screen:
    "A Screen of the raw values that the original recorded in a run."
    options = meta()["isp"][run]
    tokenizer, rows = model(options["version"]).tokenizer, recorded(run, "cell")
    token = dict(zip(rows["gene"], rows["perturbed"]))
    values = rows.pivot(index=["gene", "cell"], columns="state", values="value")
    states = options["cell_states_to_model"]
    if states:
        shifts = values.add_prefix("shift_").assign(shift=values[states["goal_state"]]).reset_index()
    else:
        shifts = values.rename(columns={"": "cosine"}).reset_index().assign(shift=lambda t: 1 - t["cosine"])
    joint = options["genes_to_perturb"] != "all"
    genes = list(token) if joint else sorted(token, key=lambda gene: int(token[gene]))
    facts = pd.DataFrame(
        {
            "group": "all",
            "gene": genes,
            "log2fc": np.nan,
            "symbol": ["+".join(tokenizer.symbol(part) for part in gene.split("+")) for gene in genes],
        }
    )
    return Screen(
        shifts.assign(group="all", donor=np.nan, rank=0), facts, {"alt": states["alt_states"] if states else []}
    )


def computed(run: str) -> Screen:
    "Our own screen for a recorded run."
    gf, given, arguments = asked(meta()["isp"][run])
    return perturb(gf, given, **arguments)


def same_order(ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    "The same genes in the same order, with their symbols and numbers of cells."
    assert ours["gene"].tolist() == theirs["Ensembl_ID"].tolist()
    assert ours["symbol"].tolist() == theirs["Gene_name"].tolist()


@pytest.mark.parametrize(
    "mode", ["goal_state_shift", "vs_null", "mixture_model", "aggregate_data", "aggregate_gene_shifts"]
)
def test_there_are_recorded_tables_of_every_mode(mode):
    assert tables(mode)


# goal_state_shift
@pytest.mark.parametrize("name", tables("goal_state_shift"))
@pytest.mark.parametrize("source", [screen_of, computed])
def test_goal_state_shift_is_the_originals(name, source):
    states, theirs = meta()["stats"][name]["options"]["cell_states_to_model"], upstream(name)
    ours = source(run_of(name)).table(method="goal_state_shift")
    exact = source is screen_of
    assert len(ours) == len(theirs)
    if len(theirs) > 1 and exact:
        same_order(ours, theirs)
    order = slice(None) if len(theirs) == 1 else ours.set_index("gene").index.get_indexer(theirs["Ensembl_ID"])
    ours = ours.iloc[order]
    tolerance = 1e-12 if exact else 1e-5
    ends = [("", "Shift_to_goal_end", "Goal_end_vs_random_pval", "Goal_end_FDR")]
    ends += [
        (f"_{alt}", f"Shift_to_alt_end_{alt}", f"Alt_end_vs_random_pval_{alt}", f"Alt_end_FDR_{alt}")
        for alt in states["alt_states"]
    ]
    for suffix, shift, p, fdr in ends:
        np.testing.assert_allclose(ours[f"effect{suffix}"], theirs[shift], atol=tolerance)
        if len(theirs) == 1:
            assert (
                ours[[f"p{suffix}", f"fdr{suffix}"]].isna().all(axis=None)
                and np.isfinite(ours[f"effect{suffix}"]).all()
            )
        elif exact:
            np.testing.assert_allclose(ours[f"p{suffix}"], theirs[p], rtol=1e-9)
            np.testing.assert_allclose(ours[f"fdr{suffix}"], theirs[fdr], rtol=1e-9)
    if len(theirs) > 1:
        np.testing.assert_array_equal(ours["n_cells"], theirs["N_Detections"])


# vs_null
VS_NULL = {
    "cosine": "Test_avg_shift",
    "null_cosine": "Null_avg_shift",
    "difference": "Test_vs_null_avg_shift",
    "p": "Test_vs_null_pval",
    "fdr": "Test_vs_null_FDR",
    "n_cells": "N_Detections_test",
    "n_null": "N_Detections_null",
}


@pytest.mark.parametrize("name", tables("vs_null"))
def test_vs_null_is_the_originals(name):
    theirs = upstream(name)
    ours = screen_of(run_of(name)).table(method="vs_null", null=screen_of(meta()["stats"][name]["null"]))
    same_order(ours, theirs)
    for mine, original in VS_NULL.items():
        np.testing.assert_allclose(ours[mine], theirs[original], rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(ours["fdr"] < 0.05, theirs["Sig"] == 1)


@pytest.mark.parametrize("name", tables("vs_null"))
def test_vs_null_of_our_screens_has_the_originals_means(name):
    theirs = upstream(name).set_index("Ensembl_ID")
    ours = (
        computed(run_of(name)).table(method="vs_null", null=computed(meta()["stats"][name]["null"])).set_index("gene")
    )
    assert set(ours.index) == set(theirs.index)
    for mine in ("cosine", "null_cosine", "difference", "n_cells", "n_null"):
        np.testing.assert_allclose(ours[mine], theirs.loc[ours.index, VS_NULL[mine]], atol=1e-5)


def test_a_gene_that_the_null_lacks_is_last_and_counts_in_the_correction():
    screen, null = screen_of("v1_delete_all"), screen_of("v1_delete_all_null")
    common = sorted(set(screen.shifts["gene"]) & set(null.shifts["gene"]))[0]
    null.shifts = null.shifts[null.shifts["gene"] != common]
    last = screen.table(method="vs_null", null=null).set_index("gene").loc[common]
    assert last["p"] == last["fdr"] == 1 and last["n_null"] == 0 and np.isnan(last["difference"])
    table = screen.table(method="vs_null", null=null)
    assert table["difference"].isna().is_monotonic_increasing and len(table) == screen.shifts["gene"].nunique()


# mixture_model
def fitted(theirs: pd.DataFrame) -> GaussianMixture:
    "The original's fit: the mean cosines with genes in ascending token order."
    return GaussianMixture(n_components=2, random_state=0).fit(
        theirs.sort_values("orig_index")[["Test_avg_shift"]].to_numpy()
    )


def frozen_impact(mixture: GaussianMixture, values) -> np.ndarray:
    "The original's rule: component 0 is the impact, whichever mean it has."
    (m0, m1), values = mixture.means_[:, 0], np.asarray(values)
    inside = mixture.predict(values[:, None]) == 0
    return np.where(values > m1, 0, np.where(values < m0, 1, inside)).astype(int)


@pytest.mark.parametrize("name", tables("mixture_model"))
def test_mixture_model_is_the_originals_where_its_components_are_in_order(name):
    theirs, screen = upstream(name), screen_of(run_of(name))
    ours, mixture = screen.table(method="mixture_model"), fitted(theirs)
    per_cell = screen.shifts.groupby("gene")["cosine"]
    by_rule = per_cell.apply(lambda v: 100 * frozen_impact(mixture, v).mean()).loc[theirs["Ensembl_ID"]]
    np.testing.assert_array_equal(frozen_impact(mixture, theirs["Test_avg_shift"]), theirs["Impact_component"])
    np.testing.assert_allclose(by_rule, theirs["Impact_component_percent"])
    if mixture.means_[0, 0] < mixture.means_[1, 0]:
        same_order(ours, theirs)
        np.testing.assert_array_equal(ours["impact"], theirs["Impact_component"])
        np.testing.assert_allclose(ours["impact_percent"], theirs["Impact_component_percent"])
    ours = ours.set_index("gene").loc[theirs["Ensembl_ID"]]
    np.testing.assert_allclose(ours["cosine"], theirs["Test_avg_shift"], atol=1e-12)
    np.testing.assert_array_equal(ours["n_cells"], theirs["N_Detections"])


@pytest.mark.parametrize("name", tables("mixture_model"))
def test_the_component_with_the_lower_mean_is_the_impact(name):
    theirs = upstream(name)
    mixture = fitted(theirs)
    low, high = np.argsort(mixture.means_[:, 0])
    ours = screen_of(run_of(name)).table(method="mixture_model")
    assert (ours.loc[ours["cosine"] < mixture.means_[low, 0], "impact"] == 1).all()
    assert (ours.loc[ours["cosine"] > mixture.means_[high, 0], "impact"] == 0).all()
    between = ours[ours["cosine"].between(mixture.means_[low, 0], mixture.means_[high, 0])]
    likelier = mixture.predict(between[["cosine"]].to_numpy()) == low
    np.testing.assert_array_equal(between["impact"], likelier.astype(int))
    assert ours["impact"].is_monotonic_decreasing and 0 < ours["impact"].mean() < 1


@pytest.mark.parametrize("name", tables("mixture_model"))
def test_mixture_model_of_our_screens_is_that_of_the_recorded_values(name):
    ours, theirs = (
        source(run_of(name)).table(method="mixture_model").set_index("gene") for source in (computed, screen_of)
    )
    theirs = theirs.loc[ours.index]
    np.testing.assert_allclose(ours["cosine"], theirs["cosine"], atol=1e-5)
    assert (ours["impact"] != theirs["impact"]).sum() <= 1  # a gene on the border may fall to either side


def test_one_gene_cannot_be_divided_in_two():
    name = next(run for run in map(run_of, tables("aggregate_data")))
    with pytest.raises(DataError, match="genes='all'"):
        screen_of(name).table(method="mixture_model")


# aggregate_data
@pytest.mark.parametrize("name", tables("aggregate_data"))
@pytest.mark.parametrize("source, tolerance", [(screen_of, 1e-12), (computed, 1e-5)])
def test_aggregate_data_lists_the_originals_values(name, source, tolerance):
    theirs, order = upstream(name), meta()["isp"][run_of(name)]["cell_order"]
    ours = source(run_of(name)).table(method="aggregate_data").set_index("cell")
    assert len(ours) == len(theirs) == len(order) and set(ours["symbol"]) == set(theirs["Gene"])
    np.testing.assert_allclose(
        ours.loc[list(map(str, order)), "cosine"], theirs.sort_values("orig_index")["Cosine_sim"], atol=tolerance
    )


def test_aggregate_data_lists_joint_perturbations_too():
    run = next(
        run
        for run, options in meta()["isp"].items()
        if options["ok"]
        and options["genes_to_perturb"] != "all"
        and len(options["genes_to_perturb"]) > 1
        and not options["cell_states_to_model"]
    )
    ours = computed(run).table(method="aggregate_data")
    assert len(ours) == len(recorded(run, "cell")) and ours["gene"].str.contains("+", regex=False).all()
    assert ours["symbol"].str.contains("+", regex=False).all()


# aggregate_gene_shifts
PAIRS = {"cosine": "Cosine_sim_mean", "std": "Cosine_sim_stdev", "n_cells": "N_Detections"}


def pair_table(name: str) -> pd.DataFrame:
    "A recorded table of pairs by (gene, affected) as ids."
    theirs = upstream(name)
    return theirs.assign(affected=theirs["Affected_Ensembl_ID"].fillna("cell_emb")).set_index(
        ["Ensembl_ID", "affected"]
    )


def effects_of(run: str) -> tuple[Screen, pd.DataFrame]:
    "Our screen and our effects on genes for a recorded run."
    gf, given, arguments = asked(meta()["isp"][run])
    return perturb(gf, given, **arguments), gene_effects(
        gf, given, **{k: arguments[k] for k in ("kind", "genes", "emb_layer")}
    )


@pytest.mark.parametrize("name", tables("aggregate_gene_shifts"))
def test_aggregate_gene_shifts_is_the_originals(name):
    options = meta()["isp"][run_of(name)]
    screen, effects = effects_of(run_of(name))
    if options["perturb_type"] == "overexpress" and options["genes_to_perturb"] == "all":
        # the original gives each value the name of the next gene of the cell, and loses the last
        right = [
            rows.assign(affected=rows["affected"].shift(-1)).iloc[:-1]
            for _, rows in effects.groupby(["gene", "cell"], sort=False)
        ]
        effects = pd.concat(right)
    ours, theirs = screen.table(method="aggregate_gene_shifts", effects=effects), pair_table(name)
    whole = (ours["affected"] == "cell_emb").to_numpy()
    assert whole[: whole.sum()].all() and ours.loc[whole, "cosine"].is_monotonic_increasing
    assert ours.loc[~whole, "cosine"].is_monotonic_increasing
    ours = ours.set_index(["gene", "affected"])
    assert ours.index.is_unique and len(ours) == len(theirs)
    ours = ours.loc[theirs.index]
    for mine, original in PAIRS.items():
        np.testing.assert_allclose(ours[mine], theirs[original], atol=1e-5)
    assert ours["symbol"].tolist() == theirs["Gene_name"].tolist()


@pytest.mark.parametrize(
    "name", [n for n in tables("aggregate_gene_shifts") if meta()["isp"][run_of(n)]["perturb_type"] == "delete"]
)
def test_affected_genes_have_their_symbols(name):
    screen, effects = effects_of(run_of(name))
    ours = screen.table(method="aggregate_gene_shifts", effects=effects).set_index(["gene", "affected"])
    theirs = pair_table(name)["Affected_gene_name"].loc[ours.index]
    assert ours["affected_symbol"].isna().equals(theirs.isna())
    assert ours["affected_symbol"].dropna().tolist() == theirs.dropna().tolist()


# what cannot be asked
def test_what_a_method_needs_is_said():
    plain, goal = screen_of("v1_delete_all"), screen_of("v1_delete_all_goal")
    for wrong, message in (
        (dict(method="vs_null"), "null="),
        (dict(method="matched", null=plain), "no other"),
        (dict(method="aggregate_gene_shifts"), "gene_effects"),
        (dict(method="mixture", null=None), "mixture_model"),
    ):
        with pytest.raises(OptionError, match=message):
            plain.table(**wrong)
    with pytest.raises(OptionError, match="columns gene"):
        plain.table(method="aggregate_gene_shifts", effects=pd.DataFrame({"gene": ["A"]}))
    for asked_ in (dict(method="mixture_model"), dict(method="vs_null", null=plain)):
        with pytest.raises(OptionError, match="goal"):
            goal.table(**asked_)
    other = pd.DataFrame({"gene": ["A"], "affected": ["B"], "cell": ["x"], "cosine": [1.0]})
    with pytest.raises(DataError, match="same data"):
        plain.table(method="aggregate_gene_shifts", effects=other)


def test_a_null_of_other_groups_is_refused():
    plain, null = screen_of("v1_delete_all"), screen_of("v1_delete_all_null")
    null.shifts, null.genes = null.shifts.assign(group="T cell"), null.genes.assign(group="T cell")
    with pytest.raises(OptionError, match="T cell"):
        plain.table(method="vs_null", null=null)


def test_genes_stand_in_the_order_of_their_tokens():
    screen, dictionary = computed("v1_delete_all"), model("v1").tokenizer.token_dictionary
    assert screen.genes["gene"].map(dictionary).is_monotonic_increasing
