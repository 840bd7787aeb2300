"""Time and memory of a perturbation screen grow in proportion to cells and genes; memory not with the cells.

    python benchmarks/perturbation_scaling.py [--genes 200] [--quick]

Deletions with a model of the shape of Geneformer V1-10M, on one thread, in random cells of equal length: of all genes
in 2 to 16 cells, and of 25 to 200 named genes in 4 cells. Printed: seconds, and milliseconds per edit, which must stay
within a third of one another; and by how much the peak memory of a process grows while it screens 8 or 32 cells of 100
genes, enough for full batches, which may differ by a tenth."""

import argparse
import sys
import time

import harness  # first: it sets the number of threads
import numpy as np
from deletion import BUDGET, perturb, problem

SPREAD, MORE_MEMORY = 4 / 3, 1.1


def screen(n_cells: int, genes: int, names=None) -> tuple[float, int]:
    "Seconds and edits of one screen."
    gf, cells = problem(argparse.Namespace(cells=n_cells, genes=genes))
    asked = "all" if names is None else [str(gf.tokenizer.genes[t]) for t in cells[0][:names]]
    if names is not None:  # the same genes in every cell, in another order
        random = np.random.default_rng(1)
        for i in range(1, n_cells):
            cells.tokens[i * genes : (i + 1) * genes] = random.permutation(cells[0])
    start = time.perf_counter()
    shifts = perturb(gf, cells, genes=asked, combine=None if names is None else "each", token_budget=BUDGET).shifts
    return time.perf_counter() - start, len(shifts)


def growth(n_cells: int, genes: int) -> float:
    "MB by which the peak memory of a process grows while it screens `n_cells` cells."
    steady = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}  # freed memory is returned at once
    return harness.growth_of(__file__, "--side", n_cells, "--genes", genes, env=steady)


def series(title: str, sizes: list[int], run) -> float:
    "Print a series of sizes; returns the time per edit of the slowest size over that of the fastest."
    each = []
    for size in sizes:
        seconds, edits = run(size)
        each.append(1000 * seconds / edits)
        print(f"{size:6d} {title:6s} {edits:7,} edits {seconds:8.2f} s {each[-1]:8.2f} ms per edit")
    return max(each) / min(each)


def main() -> int | None:
    parser = harness.parser(__doc__, pairs=None, quick="100 genes, up to 8 cells")
    parser.add_argument("--genes", type=int, default=200)
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    screen(1, 20)  # warm up
    if args.side:
        return harness.print_growth(lambda: screen(args.side, args.genes))
    genes, most = (100, 8) if args.quick else (args.genes, 16)
    cells = series("cells", [n for n in (2, 4, 8, 16) if n <= most], lambda n: screen(n, genes))
    names = series("genes", [genes // 8, genes // 4, genes // 2, genes], lambda n: screen(4, genes, n))
    few, many = growth(most // 2, 100), growth(2 * most, 100)
    return harness.verdict(
        ("slowest over fastest edit, more cells:", cells, "ceiling", SPREAD),
        ("slowest over fastest edit, more genes:", names, "ceiling", SPREAD),
        (f"peak memory with {2 * most} cells over that with {most // 2}:", many / few, "ceiling", MORE_MEMORY),
        more=f"peak memory +{few:,.0f} MB with {most // 2} cells, +{many:,.0f} MB with {2 * most}",
    )


if __name__ == "__main__":
    sys.exit(main())
