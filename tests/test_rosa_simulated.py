"""A genome whose rule is known: vectors of a network that learned it tell unseen genes apart; others do not."""

import numpy as np
import pytest

from scellfm.data import GeneVectors, simulate_genome
from scellfm.rosa import (
    Enformer,
    Rosa,
    compare_vectors,
    embed_genes,
    hold_out_grid,
    kmer_vectors,
    log_normalize,
    pseudobulk,
    read_expression,
    tss_windows,
)
from scellfm.rosa.training import Settings

METRICS = ["pearson_across_genes", "pearson_across_genes_centred"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "Genome, windows, trained network, its vectors and others, profiles and the grid; one chromosome is unseen by all."
    simulation = simulate_genome(n_genes=240, n_sites=6, noise=0.2, n_cells=40, seed=0)
    paths = simulation.write(tmp_path_factory.mktemp("genome"))
    windows = tss_windows(paths["annotation"], paths["fasta"], length=256)
    train = np.flatnonzero(windows.table["chrom"] != "chr4")
    shape = {"output_heads": {"human": len(simulation.tracks)}, "num_downsamples": 5, "dim": 48, "dim_divisible_by": 6}
    shape |= {"tracks": simulation.tracks, "depth": 1, "dropout_rate": 0.0, "device": "cpu"}
    untrained, enformer = (Enformer.from_config("tiny", seed=0, **shape) for _ in range(2))
    coverage = simulation.coverage(windows, 32)
    enformer.fit(windows[train], coverage[train], epochs=10, learning_rate=4e-3, batch_size=4)
    vectors = {"Enformer": embed_genes(windows, model=enformer, rule="tss")}
    vectors |= {"untrained": embed_genes(windows, model=untrained, rule="tss"), "k-mers": kmer_vectors(windows)}
    rule = np.log1p(np.exp(simulation.log_rates))
    vectors["truth"] = GeneVectors(rule.index, rule.to_numpy(np.float32))
    bulk = pseudobulk(simulation.adata, min_cells=5)
    bulk.var = simulation.adata.var.loc[bulk.var_names]
    known, counts = (bulk.var["chrom"] != "chr4").to_numpy(), bulk.X.toarray()
    bulk.X = log_normalize(counts, size=known.sum(), totals=counts[:, known].sum(axis=1)).astype(np.float32)
    grid = hold_out_grid(bulk, genes="chromosome", held_genes=["chr4"], cells="donor", seed=0)
    return simulation, windows, enformer, vectors, bulk, grid


@pytest.mark.filterwarnings("ignore:the values are not counts")
def test_order_of_vectors_on_unseen_genes(study):
    *_, vectors, bulk, grid = study
    scores = compare_vectors(read_expression(bulk), vectors, grid, Settings(normalise="none"))
    for quadrant in ("new genes", "new genes and cells"):
        table, low = scores[quadrant].table, scores[quadrant].low
        for metric in METRICS:
            found = table[metric]
            assert found["truth"] > 0.9 and found["truth"] > found["Enformer"]
            assert found["Enformer"] > found[["untrained", "permuted"]].max() + 0.1 and low.loc["Enformer", metric] > 0
            assert found[["gene mean", "one-hot"]].abs().max() < 0.05
    new = scores["new genes"]
    for metric in METRICS:  # 95 % intervals over genes exclude each other
        assert new.low.loc["Enformer", metric] > new.high.loc["permuted", metric]
    assert new.low.loc["permuted", METRICS[1]] < 0 < new.high.loc["permuted", METRICS[1]]


@pytest.mark.filterwarnings("ignore:the values are not counts")
def test_attribution_peaks_on_planted_motifs_of_unseen_genes(study):
    simulation, windows, enformer, vectors, bulk, grid = study
    rosa = Rosa("ridge", normalise="none").fit(bulk, vectors["Enformer"], grid)
    unseen = grid.genes[grid.gene_part == "test"]
    measured = bulk[bulk.obs_names.isin(rosa.task.cells), unseen].X.mean(axis=0)
    high = unseen[np.argsort(-measured)[:8]]
    ratios = []
    for gene in high:
        weight = rosa.explain_bases(gene, windows, enformer, method="integrated_gradients", steps=16)
        weight = weight.abs().sum(axis=1).to_numpy()
        start = int(windows.table.loc[windows.table["gene"] == gene, "index"].iloc[0])
        inside = np.zeros(windows.length, bool)
        for first in [start - 36, *(start + simulation.sites.query("gene == @gene")["distance"] - 6)]:
            inside[max(first, 0) : max(first + 12, 0)] = True
        ratios.append(weight[inside].mean() / weight[~inside].mean())
    assert np.median(ratios) > 1.2
