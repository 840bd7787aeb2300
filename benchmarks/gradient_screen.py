"""A gradient screen against the exact one: how much faster, and how well it agrees.

    python benchmarks/gradient_screen.py [--cells 6] [--genes 300] [--pairs 3] [--quick]

The shape of Geneformer V1-10M with random weights, on one thread. Cells of the start and of the goal state draw their
genes from two pools, half of whose genes are shared. In turns: all deletions exactly; all deletions estimated; the
whole gradient screen, which computes 20 genes in every cell and all genes of two cells. Printed: median seconds, the
ratios, and the correlation of the estimates with the exact shifts (median over cells). Random weights are the hardest
case, because neighbouring positions have nothing in common."""

import sys

import harness  # first: it sets the number of threads
import numpy as np
import torch
from deletion import perturb, problem

from scellfm.geneformer.embedding import embed_cells
from scellfm.geneformer.perturbation.edits import make_edits
from scellfm.geneformer.perturbation.gradient import estimate_block

FLOOR = (
    1 / 30
)  # for the estimate alone: 10 times with 300 genes, because it needs three forward passes for any number of genes
ASKED = dict(state="state", start="ill", goal="well")


def main() -> int:
    parser = harness.parser(__doc__, pairs=3, quick="4 cells of 100 genes, 1 pair")
    parser.add_argument("--cells", type=int, default=6)
    parser.add_argument("--genes", type=int, default=300)
    args = parser.parse_args()
    if args.quick:
        args.cells, args.genes, args.pairs = 4, 100, 1
    args.cells *= 2
    gf, cells = problem(args)
    random, floor = np.random.default_rng(1), FLOOR * args.genes
    for i in range(args.cells):
        pool = np.arange(args.genes * 3 // 2) + 2 + (i % 2) * args.genes * 3 // 4
        cells.tokens[i * args.genes : (i + 1) * args.genes] = random.permutation(pool)[: args.genes]
    cells.obs["state"] = ["ill", "well"] * (args.cells // 2)
    sides = {
        "exact": lambda: perturb(gf, cells, **ASKED),
        "gradient screen": lambda: perturb(gf, cells, **ASKED, gradient={"top": 20, "check_cells": 2}),
        "estimates": lambda: estimate_alone(gf, cells),
    }
    pairs = harness.Pairs(sides, args.pairs)
    results = pairs.results
    exact, estimated = results["exact"].shifts, results["gradient screen"].shifts
    within = [
        np.corrcoef(exact["shift"][rows], estimated["estimate"][rows])[0, 1]
        for rows in exact.groupby("cell").indices.values()
    ]
    for name in sides:
        print(f"{name:16s} {pairs.median(name):8.2f} s  {pairs.ratio(name, 'exact'):6.1f} times as fast as exact")
    print(
        f"{len(exact):,} deletions in {args.cells // 2} cells of {args.genes} genes; correlation of estimate and exact "
        f"{np.median(within):.3f}"
    )
    return harness.verdict(("ratio of the estimates alone", pairs.ratio("estimates", "exact"), "floor", floor))


def estimate_alone(gf, cells) -> None:
    "Estimate all deletions of the cells of the start state."
    ill = gf.readable(cells[np.arange(0, len(cells), 2)])
    goal = torch.from_numpy(embed_cells(gf, cells[np.arange(1, len(cells), 2)], gf.n_layers - 1, "cell").mean(0))[None]
    edits = make_edits(ill, "delete", None, None, False, gf.max_length)
    estimate_block(gf, ill, edits, gf.n_layers - 1, "cell", goal, 16384)


if __name__ == "__main__":
    sys.exit(main())
