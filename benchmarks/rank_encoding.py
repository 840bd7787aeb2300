"""Rank value encoding from a CSR matrix against a loop of stable double precision argsorts, on one thread.

    python benchmarks/rank_encoding.py [--cells 4000] [--genes 20000] [--pairs 5] [--quick]

Both sides encode the same synthetic counts (about 9 % of the genes of a cell are detected) with the same medians, in
turns, in one process. Printed: median seconds, the ratio, the peak memory of each side in a separate process, and the
largest difference of the tokens (0 = identical)."""

import argparse
import sys

import harness  # first: it sets the number of threads
import numpy as np
from scipy import sparse


def synthetic_counts(n_cells: int, n_genes: int, seed: int = 0) -> sparse.csr_matrix:
    "Counts of cells whose genes are detected with unequal chances, 9 % on average."
    draw = np.random.default_rng(seed)
    chance = draw.beta(0.5, 0.5 / 0.09 - 0.5, n_genes)
    blocks = []
    for start in range(0, n_cells, 1000):
        hit = draw.random((min(1000, n_cells - start), n_genes), dtype=np.float32) < chance
        block = sparse.csr_matrix(hit, dtype=np.float32)
        block.data = draw.geometric(0.4, block.nnz).astype(np.float32)
        blocks.append(block)
    return sparse.vstack(blocks, format="csr")


def synthetic_medians(n_genes: int, seed: int = 1) -> np.ndarray:
    "Medians of genes; the smallest 2 % are equal, so that ties occur in every cell."
    return np.maximum(np.random.default_rng(seed).lognormal(0, 0.6, n_genes), 0.3)


def argsort_loop(x: sparse.csr_matrix, medians: np.ndarray, tokens: np.ndarray, max_length: int) -> np.ndarray:
    "The reference: for each cell a stable argsort of double precision values."
    ranked = []
    for start, stop in zip(x.indptr[:-1], x.indptr[1:]):
        genes = x.indices[start:stop]
        values = x.data[start:stop].astype(np.float64) / medians[genes]
        ranked.append(tokens[genes[np.argsort(-values, kind="stable")[:max_length]]])
    return np.concatenate(ranked)


def ours(x, medians, tokens, max_length) -> np.ndarray:
    "scellfm."
    from scellfm.geneformer.tokenizer.ranking import encode

    return encode(x, medians, tokens, max_length).tokens


SIDES = {"scellfm": ours, "argsort loop": argsort_loop}


def problem(args) -> tuple:
    "The inputs of both sides."
    return synthetic_counts(args.cells, args.genes), synthetic_medians(args.genes), np.arange(args.genes) + 2, 2048


def main() -> int:
    parser = harness.parser(__doc__, quick="500 cells, 3 pairs")
    parser.add_argument("--cells", type=int, default=4000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.cells, args.pairs = 500, 3
    x, *rest = problem(args)
    for side in SIDES if args.side is None else [args.side]:  # loads the compiled loops
        SIDES[side](x[:10], *rest)
    if args.side:
        return harness.print_growth(lambda: SIDES[args.side](x, *rest))
    pairs = harness.Pairs({name: lambda side=side: side(x, *rest) for name, side in SIDES.items()}, args.pairs)
    print(
        f"{x.shape[0]:,} cells x {x.shape[1]:,} genes, {x.nnz / x.shape[0]:,.0f} genes per cell, one thread, "
        f"median of {args.pairs} pairs"
    )
    for side in SIDES:
        wall, busy = pairs.median(side), pairs.median(side, "cpu")
        memory = harness.growth_of(__file__, "--side", side, "--cells", args.cells, "--genes", args.genes)
        print(
            f"{side:14s} {wall:7.3f} s wall, {busy:7.3f} s CPU, {x.shape[0] / busy:8,.0f} cells per CPU s, "
            f"peak memory above its input {memory:5.0f} MB"
        )
    a, b = (pairs.results[side].astype(np.int64) for side in SIDES)
    return harness.verdict(
        ("ratio on the wall", pairs.ratio("scellfm", "argsort loop"), "floor", 5),
        ("ratio of CPU", pairs.ratio("scellfm", "argsort loop", "cpu"), "floor", 5),
        ("largest difference of tokens", np.abs(a - b).max() if a.shape == b.shape else np.inf, "ceiling", 0),
    )


if __name__ == "__main__":
    sys.exit(main())
