"""GEARS's splits come out label by label, and our own keep related genes on one side."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest
from conftest import golden, real_data

from scellfm.core import DataError, OptionError, ScellfmWarning
from scellfm.scgenept import (
    PerturbationSplit,
    custom_split,
    family_split,
    perturbation_of,
    published_label,
    similarity_families,
    similarity_split,
    split_conditions,
)

SPLITS = golden("scgenept") / "splits"
CONDITIONS = json.loads((SPLITS / "conditions.json").read_text())
RECORDS = [record for record in json.loads((SPLITS / "splits.json").read_text()) if not record.get("error")]
SMALL = ["ctrl", "A+ctrl", "ctrl+A", "B+ctrl", "C+ctrl", "D+ctrl", "A+B", "B+C", "C+D"]


def name_of(record) -> str:
    return "-".join(map(str, (record["dataset"], record["split"], record["seed"], *record["options"].values())))


@pytest.mark.filterwarnings("ignore::scellfm.core.ScellfmWarning")
@pytest.mark.parametrize("record", RECORDS, ids=name_of)
def test_a_split_equals_the_original(record):
    options = {key: value for key, value in record["options"].items() if key != "via"}
    split = split_conditions(CONDITIONS[record["dataset"]], record["split"], seed=record["seed"], **options)
    expected = record["set2conditions"]
    assert split.train == expected.get("train", [])
    assert split.valid == expected.get("val", [])
    assert split.test == expected.get("test", [])
    if record.get("subgroup"):
        assert split.subgroups == record["subgroup"]["test_subgroup"]
        assert split.valid_subgroups == record["subgroup"]["val_subgroup"]


@pytest.mark.filterwarnings("ignore::scellfm.core.ScellfmWarning")
def test_numpys_global_stream_is_not_touched():
    np.random.seed(5)
    before = np.random.get_state()
    for kind in ("simulation", "combo_seen2", "no_test"):
        split_conditions(CONDITIONS["norman_real"], kind)
    after = np.random.get_state()
    assert before[2] == after[2] and np.array_equal(before[1], after[1])


@pytest.mark.filterwarnings("ignore::scellfm.core.ScellfmWarning")
@pytest.mark.parametrize("name, singles, pairs", [("norman", 105, 131), ("adamson", 86, 0)])
def test_the_published_subgroups_come_out_of_the_condition_list(name, singles, pairs):
    labels = CONDITIONS[f"{name}_real"]
    published = json.loads((real_data("scgenept") / f"{name}_pert_data_subgroups.json").read_text())
    split = split_conditions(labels, "simulation", seed=1)
    for part, groups in (("test_subgroup", split.subgroups), ("val_subgroup", split.valid_subgroups)):
        assert {key: sorted(found) for key, found in groups.items()} == {
            key: sorted(found) for key, found in published[part].items()
        }
    perturbations = {perturbation_of(label) for label in labels} - {"ctrl"}
    assert sum("+" not in name for name in perturbations) == singles
    assert sum("+" in name for name in perturbations) == pairs


@pytest.mark.filterwarnings("ignore::scellfm.core.ScellfmWarning")
def test_published_labels_and_perturbations_are_counted_apart():
    split = split_conditions(CONDITIONS["norman_real"], "simulation", seed=1)
    assert len(split.subgroups["unseen_single"]) == 37
    assert len(split.perturbations("test", "unseen_single")) == 27


def test_the_later_rule_is_warned_of_and_can_be_had():
    labels = CONDITIONS["norman_real"]
    with pytest.warns(ScellfmWarning, match="leaves out the 7 labels"):
        first = split_conditions(labels, "simulation", seed=1)
    known = {gene for label in labels for gene in label.split("+")} - {"RHOXF2BB", "IER5L", "KIAA1804"}
    later = split_conditions(labels, "simulation", seed=1, version="0.1.2", go_genes=known)
    assert len(later.train + later.valid + later.test) == 277 and len(later.held_out) == 7
    assert len(set(first.test) & set(later.test)) == 77
    with pytest.raises(OptionError, match="go_genes"):
        split_conditions(labels, version="0.1.2")


def test_no_test_draws_from_all_perturbations_in_the_later_rule():
    labels = CONDITIONS["adamson_like"]
    with pytest.warns(ScellfmWarning, match="all perturbations"):
        first = split_conditions(labels, "no_test")
    genes = {gene for label in labels for gene in label.split("+")}
    later = split_conditions(labels, "no_test", version="0.1.2", go_genes=genes)
    assert not first.valid and len(later.valid) > 0 and not later.test


def test_simulation_single_leaves_pairs_out_with_a_warning():
    with pytest.warns(ScellfmWarning, match="3 perturbations of several genes are in no set"):
        split = split_conditions(SMALL, "simulation_single")
    assert split.held_out == ["A+B", "B+C", "C+D"]


@pytest.mark.filterwarnings("ignore::scellfm.core.ScellfmWarning")
def test_any_way_of_writing_a_label_gives_the_same_split():
    written = ["control", "A", "ctrl + A", "B+ctrl", "C", " D+CTRL", "A + B", "B+C", "C+D"]
    assert split_conditions(written).to_dict() == split_conditions(SMALL).to_dict()


@pytest.mark.filterwarnings("ignore::scellfm.core.ScellfmWarning")
def test_three_genes_are_sorted_by_their_unseen_ones():
    labels = [*SMALL, "A+B+C", "B+C+D"]
    for seed in range(5):
        split = split_conditions(labels, "simulation", seed=seed)
        assert sorted(split.train + split.valid + split.test) == sorted(labels)


@pytest.mark.parametrize(
    "kind, options, error, message",
    [
        ("simulated", {}, OptionError, "Did you mean 'simulation'"),
        ("simulation", {"version": "0.3"}, OptionError, "version='0.3'"),
        ("simulation", {"train_gene_set_size": 75}, OptionError, "train_gene_set_size=75"),
        ("simulation", {"seed": -1}, OptionError, "seed=-1"),
        ("simulation", {"test_perts": "A_Z"}, DataError, "'Z'"),
        ("combo_seen0", {"test_pert_genes": ["Z"]}, DataError, "'Z'"),
    ],
)
def test_a_wrong_option_of_a_split_is_refused(kind, options, error, message):
    with pytest.raises(error, match=message):
        split_conditions(SMALL, kind, **options)


def test_a_split_of_nothing_is_refused_and_an_empty_set_is_warned_of():
    with pytest.raises(DataError, match="no perturbation"):
        split_conditions(["ctrl"])
    with pytest.warns(ScellfmWarning, match="leaves no perturbation for train"):
        split_conditions(["ctrl", "A+ctrl", "B+ctrl"])


def test_a_label_with_an_empty_part_is_refused():
    with pytest.raises(DataError, match="empty part"):
        published_label("A+")


def test_the_caveat_on_pairs_without_a_seen_gene_is_printed_where_it_applies():
    split = PerturbationSplit(["ctrl", "A+ctrl"], [], ["B+C"], "s", 1, subgroups={"combo_seen0": ["B+C"]})
    assert "mean of all perturbed cells" in repr(split)
    assert split_conditions([label for label in SMALL if label.count("ctrl")]).caveats() == []


def test_leakage_is_counted():
    split = custom_split(SMALL, {"train": ["A+ctrl", "B+C"], "test": ["ctrl+A", "A+B", "C+ctrl", "D"]})
    found = split.leakage({"A": ["x", "y", "z"], "D": ["x", "y"]}).loc[("train", "test"), "labels"]
    assert found.tolist() == [1, 1, 1, 1]


def test_a_split_survives_json():
    split = custom_split(SMALL, {"train": ["A+ctrl"], "val": ["B"], "test": ["C"]})
    assert PerturbationSplit(**json.loads(json.dumps(split.to_dict()))) == split
    with pytest.raises(DataError, match="twice"):
        custom_split(SMALL, {"train": ["A+ctrl"], "test": ["A"]})


FAMILIES = {gene: f"F{i // 3}" for i, gene in enumerate("ABCDEFGHIJKLMNOPQRSTUVWX")}
LETTERS = ["ctrl", *(f"{gene}+ctrl" for gene in FAMILIES), "A+B", "A+X", "D+G", "J+M"]


def test_a_family_is_never_on_two_sides_and_the_order_of_labels_does_not_matter():
    for seed in range(5):
        split = family_split(LETTERS, FAMILIES, seed=seed)
        sides = [{FAMILIES[gene] for gene in split.genes(part)} for part in ("train", "test")]
        singles = {FAMILIES[label[0]] for label in split.test if label.endswith("+ctrl")}
        assert not sides[0] & singles and len(singles) in (1, 2)
        again = family_split(LETTERS[::-1], FAMILIES, seed=seed)
        assert set(again.test) == set(split.test) and set(again.train) == set(split.train)
        assert sorted(split.train + split.valid + split.test) == sorted(LETTERS)


def test_families_come_as_dictionary_series_or_table():
    table = pd.DataFrame({"gene": list(FAMILIES), "family": list(FAMILIES.values())})
    splits = [family_split(LETTERS, given, seed=1).test for given in (FAMILIES, pd.Series(FAMILIES), table)]
    assert splits[0] == splits[1] == splits[2]
    with pytest.raises(DataError, match="'gene' and 'family'"):
        family_split(LETTERS, table.rename(columns={"family": "kind"}))
    with pytest.raises(DataError, match="none of the 24 perturbed genes"):
        family_split(LETTERS, {"ENSG1": "a"})
    with pytest.warns(ScellfmWarning, match="23 of 24 perturbed genes are in no family"):
        family_split(LETTERS, {"A": "a"})
    gene = table["gene"].iloc[0]
    twice = pd.concat([table, pd.DataFrame({"gene": [gene], "family": ["another"]})])
    with pytest.raises(DataError, match=f"{gene!r} into two"):
        family_split(LETTERS, twice)
    nameless = pd.concat([table, pd.DataFrame({"gene": [None, None], "family": ["x", "y"]})])
    assert family_split(LETTERS, nameless, seed=1).test == splits[0]


def test_genes_of_like_annotation_share_a_family_by_complete_linkage():
    draw = np.random.default_rng(0)
    terms = {gene: set(draw.choice(40, 12, replace=False).astype(str)) for gene in FAMILIES}
    families = similarity_families(FAMILIES, terms, threshold=0.2)
    for first in terms:
        for second in terms:
            if families[first] == families[second] and first != second:
                assert len(terms[first] & terms[second]) / len(terms[first] | terms[second]) >= 0.2
    assert len(set(families.values())) < len(families)
    shuffled = similarity_families(list(FAMILIES)[::-1], terms, threshold=0.2)
    assert shuffled == families
    split = similarity_split(LETTERS, terms, seed=0, threshold=0.2)
    assert not {families[g] for g in split.genes("train")} & {
        families[label[0]] for label in split.test if "ctrl" in label
    }


@pytest.mark.filterwarnings("ignore::scellfm.core.ScellfmWarning")
def test_real_go_terms_split_the_genes_of_norman():
    with gzip.open(real_data("scgenept") / "gene2go_from_GO2Symbol.json.gz", "rt") as file:
        terms = json.load(file)
    labels = CONDITIONS["norman_real"]
    split = similarity_split(labels, terms, seed=1, threshold=0.3)
    assert sorted(split.train + split.valid + split.test) == sorted(labels)
    assert not set(split.genes("train")) & {
        label.replace("ctrl", "").strip("+") for label in split.subgroups["unseen_single"]
    }
    families = similarity_families({gene for label in labels for gene in label.split("+")} - {"ctrl"}, terms, 0.3)
    for alike in (("TBX2", "TBX3"), ("MAP2K3", "MAP2K6"), ("PTPN9", "PTPN12"), ("CDKN1A", "CDKN1B")):
        assert len({families[gene] for gene in alike}) == 1
    assert split.leakage(terms).loc[("train", "test", "one perturbation, two labels"), "labels"] == 0
