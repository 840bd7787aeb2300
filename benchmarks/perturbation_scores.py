"""Scores of 200 predicted perturbations from 100,000 sparse cells x 5,000 genes, on one thread.

    python benchmarks/perturbation_scores.py [--cells 100000] [--genes 5000] [--perturbations 200] [--quick]

Makes the cells (a tenth of the values is stored), then scores two predictions with the four metrics of scGenePT's model
card, R2_w, WMSE and NIR, floors, ceilings, intervals and dynamic ranges included. Printed: seconds, growth of the peak
memory above the cells, and its total. Limits: 30 s and 2 GB above the cells. The scores of three perturbations are
computed again with plain numpy in float64 from dense cells; exit code 1 if a number differs by 1e-6 or a limit is
exceeded."""

import sys
import time

import harness  # first: it sets the number of threads
import numpy as np

SECONDS, MEGABYTES = 30, 2048
METRICS = ["mse", "mse_de", "pearson_delta", "pearson_delta_de", "r2_w", "wmse", "nir"]
BLOCK = 2000  # cells simulated at a time


def cells_of(n_cells: int, n_genes: int, n_perturbations: int):
    "Log-normalised sparse cells, a tenth of them controls, and 40 changed genes for each perturbation."
    import anndata
    import pandas as pd
    from scipy import sparse

    draw = np.random.default_rng(0)
    names = np.array([f"P{i}" for i in range(n_perturbations)])
    rates = draw.lognormal(-2.8, 1.0, (1, n_genes)) * np.ones((n_perturbations + 1, 1))
    for row in rates[:-1]:
        row[draw.choice(n_genes, 40, replace=False)] *= draw.lognormal(0.5, 0.8, 40)
    codes = np.where(draw.random(n_cells) < 0.1, n_perturbations, draw.integers(0, n_perturbations, n_cells))
    blocks = []
    for start in range(0, n_cells, BLOCK):
        counts = draw.poisson(rates[codes[start : start + BLOCK]].astype(np.float32))
        blocks.append(sparse.csr_matrix(np.log1p(counts / 1.5).astype(np.float32)))
    obs = pd.DataFrame({"condition": np.append(names, "ctrl")[codes]}, index=[f"cell{i}" for i in range(n_cells)])
    genes = pd.DataFrame(index=[f"G{i}" for i in range(n_genes)])
    return anndata.AnnData(sparse.vstack(blocks, format="csr"), obs, genes)


def predictions_of(cells, names) -> dict:
    "One prediction near the truth of each perturbation, one far from it."
    import pandas as pd

    labels, draw = cells.obs["condition"].to_numpy(), np.random.default_rng(1)
    rest = np.asarray(cells.X[labels == "ctrl"].mean(0)).ravel()
    truth = np.array([np.asarray(cells.X[labels == name].mean(0)).ravel() for name in names])
    near = rest + 0.6 * (truth - rest)
    far = rest + 0.05 * draw.standard_normal(truth.shape)
    return {key: pd.DataFrame(rows, names, cells.var_names) for key, rows in (("near", near), ("far", far))}


def by_hand(cells, table, names, name: str) -> dict:
    "The metrics of one perturbation in plain numpy."
    labels = cells.obs["condition"].to_numpy()
    dense = {key: cells.X[labels == key].toarray().astype(np.float64) for key in (name, "ctrl")}
    y, m, x = dense[name].mean(0), dense["ctrl"].mean(0), table.loc[name].to_numpy()
    spread = sum(d.var(0, ddof=1) / len(d) for d in dense.values())
    top = np.argsort(-np.abs((y - m) / np.sqrt(np.maximum(spread, 1e-300))), kind="stable")[:20]
    truth = np.array([np.asarray(cells.X[labels == key].astype(np.float64).mean(0)).ravel() for key in names])
    distance = ((truth - x) ** 2).sum(1)
    return {
        "mse": ((x - y) ** 2).mean(),
        "mse_de": ((x - y)[top] ** 2).mean(),
        "pearson_delta": np.corrcoef(x - m, y - m)[0, 1],
        "pearson_delta_de": np.corrcoef((x - m)[top], (y - m)[top])[0, 1],
        "nir": (distance > distance[list(names).index(name)]).sum() / (len(names) - 1),
    }


def main() -> int:
    parser = harness.parser(__doc__, pairs=None, quick="10,000 cells x 1,000 genes, 40 perturbations")
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=5000)
    parser.add_argument("--perturbations", type=int, default=200)
    options = parser.parse_args()
    if options.quick:
        options.cells, options.genes, options.perturbations = 10_000, 1000, 40
    from scellfm.scores import perturbation

    cells = cells_of(options.cells, options.genes, options.perturbations)
    names = [f"P{i}" for i in range(options.perturbations)]
    predictions = predictions_of(cells, names)
    stored = cells.X.nnz * 8 / 2**20
    print(
        f"{cells.n_obs:,} cells x {cells.n_vars:,} genes, {len(names)} perturbations, {stored:,.0f} MB of stored values"
    )
    before = harness.peak_memory(reset=True)
    start, busy = time.perf_counter(), time.process_time()
    scores = perturbation(cells, predictions, train=names, metrics=METRICS)
    seconds, cpu = time.perf_counter() - start, time.process_time() - busy
    grown, total = harness.peak_memory() - before, harness.peak_memory()
    print(f"{seconds:.1f} s wall, {cpu:.1f} s CPU; peak memory +{grown:,.0f} MB, {total:,.0f} MB in all")
    print(scores.table.round(4).to_string())
    values = scores.details["near"]["by_condition"]
    off = 0.0
    for name in names[:3]:
        for metric, expected in by_hand(cells, predictions["near"], names, name).items():
            off = max(off, abs(values.loc[name, metric] - expected))
    kept = cpu < SECONDS and grown < MEGABYTES and off < 1e-6
    print(f"largest difference from plain numpy {off:.1e}")
    print("kept" if kept else f"broken: the limits are {SECONDS} s of CPU, {MEGABYTES} MB and 1e-6")
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
