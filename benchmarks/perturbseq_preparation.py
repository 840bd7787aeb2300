"""Preparing Perturb-seq data against `PertData.new_data_process` of cell-gears 0.0.2, on one thread.

    python benchmarks/perturbseq_preparation.py --gears PYTHON [--cells 5000] [--genes 2000] [--conditions 50] [--quick]

PYTHON is the interpreter of an environment with cell-gears==0.0.2, torch, torch_geometric and scanpy, separate from the
environment of this package; it can also be named by the variable SCELLFM_GEARS_PYTHON. Without it, only our side is
timed. Both sides start from the same AnnData in memory and end with ranked genes, sets of genes and a control for each
cell, written to a folder; each run is a separate process. Printed: median seconds of the pairs, the ratio (floor 8x),
the growth of the peak memory, the size of the sparse matrix, and in how many conditions the 20 most changed genes
agree.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings

import harness  # first: it sets the number of threads
import numpy as np

TOP = 20


def simulated(n_cells: int, n_genes: int, n_conditions: int, seed: int = 0):
    "Log-normalised sparse cells: a tenth controls, the rest singles and pairs with 30 changed genes each."
    import anndata
    import pandas as pd
    from scipy import sparse

    draw = np.random.default_rng(seed)
    genes = np.array([f"G{i:04d}" for i in range(n_genes)])
    labels = [f"{genes[i]}+ctrl" for i in range(n_conditions * 7 // 10)]
    labels += [f"{genes[i]}+{genes[i + 1]}" for i in range(n_conditions - 1 - len(labels))]
    condition = np.append(draw.choice(labels, n_cells - n_cells // 10), np.full(n_cells // 10, "ctrl"))
    draw.shuffle(condition)
    rate = draw.lognormal(-1.5, 1.2, n_genes)
    rates = {label: rate.copy() for label in [*labels, "ctrl"]}
    for label in labels:
        rates[label][draw.choice(n_genes, 30, replace=False)] *= draw.lognormal(0, 0.8, 30)
    blocks = [sparse.csr_matrix(draw.poisson(rates[label]).astype(np.float32)) for label in condition]
    counts = sparse.vstack(blocks, format="csr")
    totals = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)
    counts.data = np.log1p(counts.data * np.repeat(np.median(totals) / totals, np.diff(counts.indptr))).astype(
        np.float32
    )
    obs = pd.DataFrame({"condition": condition, "cell_type": "K562"}, index=[f"cell{i}" for i in range(n_cells)])
    return anndata.AnnData(counts, obs, pd.DataFrame({"gene_name": genes}, index=genes))


def ours(cells, folder: str) -> dict[str, list[str]]:
    "scellfm: everything that GEARS prepares, in its layout."
    from scellfm.scgenept import PerturbationData

    data = PerturbationData(cells)
    data.save(f"{folder}/simulated")
    data.pairs(seed=0)
    genes = np.asarray(data.genes)
    return {
        label: genes[data.de_genes(label, published=True)[:TOP]].tolist() for label in data.labels if label != "ctrl"
    }


def theirs(cells, folder: str) -> dict[str, list[str]]:
    "cell-gears."
    from gears import PertData

    prepared = PertData(folder)
    prepared.new_data_process("simulated", adata=cells)
    ranked = prepared.adata.uns["rank_genes_groups_cov_all"]
    return {name.split("_")[1]: [str(gene) for gene in found[:TOP]] for name, found in ranked.items()}


SIDES = {"scellfm": ours, "cell-gears": theirs}


def run_side(side: str, path: str) -> None:
    "Time one side in this process, after its imports; the last line of the output is the result."
    import anndata

    warnings.simplefilter("ignore")
    if side == "cell-gears":
        import gears  # noqa: F401
    else:
        import scellfm.scgenept.perturbseq  # noqa: F401
    cells = anndata.read_h5ad(path)
    with tempfile.TemporaryDirectory() as folder:
        before, wall, busy = harness.peak_memory(reset=True), time.perf_counter(), time.process_time()
        top = SIDES[side](cells, folder)
        times = time.perf_counter() - wall, time.process_time() - busy
    print(json.dumps({"wall": times[0], "cpu": times[1], "mb": harness.peak_memory() - before, "top": top}))


def measure(python: str, side: str, path: str) -> dict:
    "One run of one side in a separate process."
    command = [python, __file__, "--side", side, "--input", path]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tempfile.gettempdir())
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(runs: dict[str, list[dict]], nnz: int) -> bool:
    "Print the table; returns whether the promise is kept."
    for side, found in runs.items():
        wall, cpu, memory = (np.median([run[key] for run in found]) for key in ("wall", "cpu", "mb"))
        print(f"{side:11s} {wall:7.2f} s wall, {cpu:7.2f} s CPU, peak memory above its input {memory:6.0f} MB")
    print(f"the sparse matrix holds {nnz:,} values: {nnz * 8 / 2**20:.0f} MB")
    if "cell-gears" not in runs:
        print("cell-gears was not found: name its interpreter with --gears or SCELLFM_GEARS_PYTHON; no ratio")
        return True
    pairs = list(zip(runs["cell-gears"], runs["scellfm"]))
    ratio = np.median([first["wall"] / second["wall"] for first, second in pairs])
    cpu = np.median([first["cpu"] / second["cpu"] for first, second in pairs])
    first, second = pairs[0][0]["top"], pairs[0][1]["top"]
    same = sum(first[label] == second[label] for label in first)
    print(
        f"ratio {ratio:.1f}x wall, {cpu:.1f}x CPU (floor 8x); the same {TOP} genes in {same} of {len(first)} conditions"
    )
    return ratio >= 8 and same == len(first) == len(second)


def main() -> int:
    parser = harness.parser(__doc__, quick="1,000 cells x 500 genes x 20 conditions, one pair")
    parser.add_argument("--gears", default=os.environ.get("SCELLFM_GEARS_PYTHON"), help="interpreter with cell-gears")
    parser.add_argument("--cells", type=int, default=5000)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--conditions", type=int, default=50)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--input", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_side(options.side, options.input)
        return 0
    if options.quick:
        options.cells, options.genes, options.conditions, options.pairs = 1000, 500, 20, 1
    cells = simulated(options.cells, options.genes, options.conditions)
    size = f"{options.cells:,} cells x {options.genes:,} genes x {options.conditions} conditions"
    print(f"{size}, median of {options.pairs} pairs")
    pythons = {"scellfm": sys.executable} | ({"cell-gears": options.gears} if options.gears else {})
    runs: dict[str, list[dict]] = {side: [] for side in pythons}
    with tempfile.TemporaryDirectory() as folder:
        cells.write_h5ad(f"{folder}/cells.h5ad")
        for _ in range(options.pairs):
            for side, python in pythons.items():
                runs[side].append(measure(python, side, f"{folder}/cells.h5ad"))
    return int(not report(runs, cells.X.nnz))


if __name__ == "__main__":
    sys.exit(main())
