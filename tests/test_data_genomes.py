"""The simulated genome: read back by the readers of rosa, its truth recomputed from the files."""

import numpy as np
import pytest

from scellfm.core import OptionError
from scellfm.data import simulate_genome
from scellfm.data.genomes import CAGE_HEIGHT
from scellfm.rosa import read_variants, tss_windows


@pytest.fixture(scope="module")
def simulation():
    return simulate_genome(n_genes=40, n_chromosomes=2, n_cells=10, noise=0.1, seed=3)


@pytest.fixture(scope="module")
def windows(simulation, tmp_path_factory):
    paths = simulation.write(tmp_path_factory.mktemp("genome"))
    return tss_windows(paths["annotation"], paths["fasta"], length=400)


def test_the_files_hold_the_genes_and_letters_of_the_simulation(simulation, windows):
    table = windows.annotation.table
    assert table["gene"].tolist() == simulation.annotation["gene"].tolist()
    assert table["tss"].tolist() == simulation.annotation["tss"].tolist()
    assert set(table["strand"]) == {"+", "-"} and len(windows.annotation.protein_coding()) == 40
    for row in (0, 7, 39):
        place = windows.table.iloc[row]
        assert windows.sequence(row) == simulation.letters(
            place["chrom"], place["start"], place["end"], place["strand"]
        )


def test_the_rule_applied_to_the_windows_gives_the_rates(simulation, windows):
    for row, (gene, index) in enumerate(zip(windows.table["gene"], windows.table["index"])):
        rates = simulation.log_rates_of(windows.sequence(row), int(index))
        assert np.allclose(rates, simulation.log_rates.loc[gene])


def test_counts_follow_the_rates_and_the_ceiling_says_how_far(simulation):
    expected = np.log1p(np.exp(simulation.true_rates))
    assert np.corrcoef(expected.to_numpy().ravel(), simulation.pseudobulk().to_numpy().ravel())[0, 1] > 0.97
    ceiling = simulation.ceiling()
    assert ceiling[["across_genes", "double_centred"]].min() > 0.95 and (ceiling < 1).all()
    noisy = simulate_genome(n_genes=40, n_chromosomes=2, n_cells=10, noise=1.0, seed=3).ceiling()
    assert noisy["double_centred"] < ceiling["double_centred"]


def test_coverage_is_that_of_the_genes_mirrored_on_the_other_strand(simulation, windows):
    coverage = simulation.coverage(windows, 16)
    bins = windows.bins(bin_size=16)
    cage = coverage[np.arange(40), bins, :3]
    assert np.allclose(cage, CAGE_HEIGHT * np.exp(simulation.true_rates) + 0.1, rtol=1e-5)
    turned = windows.table.assign(strand=np.where(windows.table["strand"] == "-", "+", "-"))
    assert np.array_equal(simulation.coverage(turned, 16), coverage[:, ::-1])
    assert simulation.coverage(windows, 16).shape == (40, 25, len(simulation.tracks))


def test_effects_of_variants_are_those_of_the_changed_sequence(simulation, windows, tmp_path):
    table = simulation.variants(60, seed=1)
    read = read_variants(table, windows.genome)  # REF is compared with the genome
    assert len(read) == 60 and set(table["label"]) == {-1, 0, 1}
    rows = dict(zip(windows.table["gene"], range(40)))
    for variant in table.itertuples():
        place = windows.table.iloc[rows[variant.gene]]
        letters = list(simulation.letters(place["chrom"], place["start"], place["end"]))
        letters[variant.pos - 1 - place["start"]] = variant.alt
        changed = "".join(letters)
        if place["strand"] == "-":
            changed = "".join({"A": "T", "C": "G", "G": "C", "T": "A", "N": "N"}[base] for base in reversed(changed))
        after = simulation.log_rates_of(changed, int(place["index"]))
        assert np.isclose((after - simulation.log_rates.loc[variant.gene]).mean() / np.log(2), variant.effect)
        distance = (variant.pos - 1 - place["tss"]) * (-1 if place["strand"] == "-" else 1)
        assert distance == variant.tss_distance


def test_numbers_that_make_no_genome_are_named(simulation):
    for wrong in (dict(n_genes=3), dict(n_types=7), dict(spacing=100), dict(noise=-1), dict(decay=0), dict(seed=-1)):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            simulate_genome(**wrong)
    with pytest.raises(OptionError, match="n_chromosomes"):
        simulate_genome(n_genes=4, n_chromosomes=5)
    with pytest.raises(OptionError, match="chrX"):
        simulation.letters("chrX", 0, 5)
    with pytest.raises(OptionError, match="bins"):
        simulation.coverage(simulation.annotation.assign(start=0, end=400), 33)
