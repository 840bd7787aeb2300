"""Rank value encoding from a CSR matrix against a loop of stable double precision argsorts, on one thread.

    python benchmarks/rank_encoding.py [--cells 4000] [--genes 20000] [--pairs 5] [--quick]

Both sides encode the same synthetic counts (about 9 % of the genes of a cell are detected) with the same medians, in
turns, in one process. Printed: median seconds, the ratio, the peak memory of each side in a process of its own, and
the largest difference of the tokens (0 = identical)."""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[name] = "1"

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

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
    "Typical levels; the smallest 2 % are equal, so that ties occur in every cell."
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
    "What both sides are given."
    return synthetic_counts(args.cells, args.genes), synthetic_medians(args.genes), np.arange(args.genes) + 2, 2048


def peak(reset: bool = False) -> float:
    "Peak memory of this process so far, MB (Linux); `reset` starts a new count."
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def memory(side: str, args) -> float:
    "MB by which the peak memory of one side grows while it runs, in a process of its own."
    command = [sys.executable, __file__, "--side", side, "--cells", str(args.cells), "--genes", str(args.genes)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["mb"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=4000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="500 cells, 3 pairs")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.cells, args.pairs = 500, 3
    given = problem(args)
    if args.side:
        SIDES[args.side](given[0][:10], *given[1:])
        before = peak(reset=True)
        SIDES[args.side](*given)
        print(json.dumps({"mb": peak() - before}))
        return
    seconds, cpu, results = {side: [] for side in SIDES}, {side: [] for side in SIDES}, {}
    for side in SIDES:
        SIDES[side](given[0][:10], *given[1:])
    for _ in range(args.pairs):
        for side, run in SIDES.items():
            wall, busy = time.perf_counter(), time.process_time()
            results[side] = run(*given)
            seconds[side].append(time.perf_counter() - wall)
            cpu[side].append(time.process_time() - busy)
    x = given[0]
    print(
        f"{x.shape[0]:,} cells x {x.shape[1]:,} genes, {x.nnz / x.shape[0]:,.0f} genes per cell, one thread, "
        f"median of {args.pairs} pairs"
    )
    for side in SIDES:
        wall, busy = np.median(seconds[side]), np.median(cpu[side])
        print(
            f"{side:14s} {wall:7.3f} s wall, {busy:7.3f} s CPU, {x.shape[0] / busy:8,.0f} cells per CPU s, "
            f"peak memory above its input {memory(side, args):5.0f} MB"
        )
    print(
        f"ratio {np.median(np.array(seconds['argsort loop']) / seconds['scellfm']):.1f}x wall, "
        f"{np.median(np.array(cpu['argsort loop']) / cpu['scellfm']):.1f}x CPU (floor 5x)"
    )
    a, b = (results[side].astype(np.int64) for side in SIDES)
    print(f"largest difference of tokens: {np.abs(a - b).max() if a.shape == b.shape else 'another number of tokens'}")


if __name__ == "__main__":
    main()
