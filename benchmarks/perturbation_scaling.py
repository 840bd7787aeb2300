"""Time and memory of a perturbation screen grow in proportion to cells and genes; memory not with the cells.

    python benchmarks/perturbation_scaling.py [--genes 200] [--quick]

Deletions in the shape of Geneformer V1-10M, on one thread, of random cells of one length: of all their genes with 2
to 16 cells, and of 25 to 200 genes by name in 4 cells. Printed: seconds, and milliseconds per edit, which must stay
within a third of one another; and by how much the peak memory of a process grows while it screens 8 or 32 cells of
100 genes, enough for full batches, which may differ by a tenth."""

import json
import os
import subprocess
import sys
import time

from deletion import BUDGET, argparse, np, peak_memory, perturb, problem

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
    "MB by which the peak memory of a process grows while it screens so many cells."
    command = [sys.executable, __file__, "--side", str(n_cells), "--genes", str(genes)]
    steady = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}  # freed memory goes back at once
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=steady).stdout)["mb"]


def series(title: str, sizes: list[int], run) -> bool:
    "Print a series of sizes and whether the time per edit stays the same."
    each = []
    for size in sizes:
        seconds, edits = run(size)
        each.append(1000 * seconds / edits)
        print(f"{size:6d} {title:6s} {edits:7,} edits {seconds:8.2f} s {each[-1]:8.2f} ms per edit")
    print(f"slowest over fastest edit {max(each) / min(each):.2f} (limit {SPREAD:.2f})")
    return max(each) / min(each) <= SPREAD


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genes", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="100 genes, up to 8 cells")
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        screen(1, 20)
        before = peak_memory()
        screen(args.side, args.genes)
        print(json.dumps({"mb": peak_memory() - before}))
        return
    genes, most = (100, 8) if args.quick else (args.genes, 16)
    screen(1, 20)  # warm up
    cells = series("cells", [n for n in (2, 4, 8, 16) if n <= most], lambda n: screen(n, genes))
    names = series("genes", [genes // 8, genes // 4, genes // 2, genes], lambda n: screen(4, genes, n))
    few, many = growth(most // 2, 100), growth(2 * most, 100)
    print(
        f"peak memory +{few:,.0f} MB with {most // 2} cells, +{many:,.0f} MB with {2 * most} (limit "
        f"{MORE_MEMORY:.1f} times)"
    )
    sys.exit(0 if cells and names and many <= MORE_MEMORY * few else 1)


if __name__ == "__main__":
    main()
