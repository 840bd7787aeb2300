"""What cell-gears 0.0.2 itself makes of other data than the recorded ones: run by an interpreter that has it.

    PYTHON tests/original_gears.py RECORDED OUT SEED N_GENES N_SINGLES N_PAIRS CELL_TYPES

RECORDED is the folder of recorded outputs of scGenePT, whose condition lists are split again with other seeds and in
another order; OUT gets the parts `data`, `metrics` and `splits` in the same layout."""

import contextlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scanpy
import scipy.sparse as sp
from gears import PertData
from gears.inference import compute_metrics, deeper_analysis, non_dropout_analysis, non_zero_analysis

LISTS = (
    "rank_genes_groups_cov_all",
    "non_zeros_gene_idx",
    "non_dropout_gene_idx",
    "top_non_zero_de_20",
    "top_non_dropout_de_20",
)


def write(path: Path, value) -> None:
    "A value as JSON."
    path.write_text(json.dumps(value, default=lambda number: number.item()))


def labels_of(draw, genes: list[str], n_singles: int, n_pairs: int) -> list[str]:
    "Singles in both writings, one of them in both, and pairs."
    singles = [genes[1 + i] for i in draw.permutation(len(genes) - 1)[:n_singles]]  # GEARS cannot flag the first gene
    labels = [f"{gene}+ctrl" if draw.random() < 0.6 else f"ctrl+{gene}" for gene in singles]
    labels.append("+".join(labels[0].split("+")[::-1]))
    pairs: set = set()
    while len(pairs) < n_pairs:
        pairs.add(tuple(sorted(draw.choice(n_singles, 2, replace=False).tolist())))
    return [*labels, *(f"{singles[i]}+{singles[j]}" for i, j in sorted(pairs))]


def cells_of(seed: int, n_genes: int, n_singles: int, n_pairs: int, types: list[str]):
    "Log-normalised sparse cells of every label and type."
    draw = np.random.default_rng(seed)
    genes = [f"ZX{i:03d}" for i in draw.permutation(1000)[:n_genes]]
    rate, rows, obs = draw.lognormal(-0.3, 1.3, n_genes), [], []
    labels = labels_of(draw, genes, n_singles, n_pairs)
    for number, kind in enumerate(types):
        for label in [*labels, "ctrl"]:
            here = rate * (1 + 0.3 * number)
            if label != "ctrl":
                here[draw.choice(n_genes, 12, replace=False)] *= draw.lognormal(0, 0.9, 12)
            n = 80 if label == "ctrl" else int(draw.integers(9, 22))
            rows.append(draw.poisson(here, (n, n_genes)))
            obs += [(label, kind)] * n
    counts, order = np.vstack(rows), draw.permutation(len(obs))
    values = np.log1p(counts / np.maximum(counts.sum(1, keepdims=True), 1) * 2500).astype(np.float32)[order]
    frame = pd.DataFrame(obs, columns=["condition", "cell_type"]).iloc[order]
    frame.index = [f"c{i:05d}" for i in range(len(frame))]
    ids = pd.Index([f"ENSG{i:011d}" for i in draw.permutation(10**6)[:n_genes]], name="gene_id")
    return anndata.AnnData(sp.csr_matrix(values), frame, pd.DataFrame({"gene_name": genes}, index=ids))


def prepared(cells, folder: str, seed: int):
    "GEARS's data object, and the control that was drawn for each perturbed cell."
    drawn, real = [], np.random.randint

    def spy(*args, **kwargs):
        value = real(*args, **kwargs)
        drawn.append(int(np.ravel(value)[0]))
        return value

    data = PertData(folder)
    np.random.seed(seed)
    np.random.randint = spy
    try:
        data.new_data_process("mine", adata=cells.copy())
    finally:
        np.random.randint = real
    return data, drawn


def graphs_of(data, drawn: list[int]) -> dict[str, np.ndarray]:
    "The cell graphs of every condition as arrays, in GEARS's order."
    arrays, at = {}, 0
    for label, graphs in data.dataset_processed.items():
        x = np.stack([np.asarray(graph.x) for graph in graphs])
        arrays[f"{label}/x"] = x[..., 0].astype(np.float32)
        arrays[f"{label}/y"] = np.stack([np.asarray(graph.y).ravel() for graph in graphs]).astype(np.float32)
        arrays[f"{label}/pert_flags"] = x[0, :, 1].astype(np.float32)
        arrays[f"{label}/de_idx"] = np.array(graphs[0].de_idx).ravel()
        if label != "ctrl":
            arrays[f"{label}/ctrl_row"] = np.array(drawn[at : at + len(graphs)])
            at += len(graphs)
    return arrays


def de_scores(cells, types: list[str]) -> dict:
    "Names and t of scanpy's ranking of each condition name, type by type."
    found = {}
    for kind in types:
        part = cells[cells.obs["cell_type"] == kind].copy()
        part.obs["condition_name"] = part.obs["condition_name"].astype(str).astype("category")
        settings = dict(reference=f"{kind}_ctrl_1", rankby_abs=True, n_genes=cells.n_vars, use_raw=False)
        scanpy.tl.rank_genes_groups(part, "condition_name", **settings)
        result = part.uns["rank_genes_groups"]
        for name in result["names"].dtype.names:
            values = [float(score) for score in result["scores"][name]]
            found[name] = {"names": [str(gene) for gene in result["names"][name]], "scores": values}
    return found


def results_of(arrays, test: list[str], seed: int) -> dict[str, np.ndarray]:
    "Random predictions of the test cells; the first condition gets a constant."
    draw, rows = np.random.default_rng(seed), []
    for number, label in enumerate(test):
        for y in arrays[f"{label}/y"]:
            noisy = (y * draw.uniform() + draw.normal(0, 0.4, len(y))).clip(0)
            rows.append((label, (noisy if number else np.full(len(y), 0.7)).astype(np.float32), y))
    de = {label: arrays[f"{label}/de_idx"] for label in test}
    return {
        "pert_cat": np.array([label for label, _, _ in rows]),
        "pred": np.array([guess for _, guess, _ in rows]),
        "truth": np.array([y for _, _, y in rows]),
        "pred_de": np.array([guess[de[label]] for label, guess, _ in rows]),
        "truth_de": np.array([y[de[label]] for label, _, y in rows]),
    }


def write_data(out: Path, seed: int, sizes: list[int], types: list[str], folder: str) -> None:
    "The parts `data` and `metrics`."
    cells = cells_of(seed, *sizes, types)
    cells.write_h5ad(out / "data" / "input.h5ad")
    data, drawn = prepared(cells, folder, seed + 3)
    shutil.copy(f"{folder}/mine/perturb_processed.h5ad", out / "data" / "perturb_processed.h5ad")
    obs = data.adata.obs.astype(str)
    columns = ("condition", "cell_type", "dose_val", "control", "condition_name")
    write(out / "data" / "obs.json", {name: obs[name].tolist() for name in columns})
    lists = {key: {name: list(found) for name, found in data.adata.uns[key].items()} for key in LISTS}
    write(out / "data" / "de.json", lists)
    write(out / "data" / "de_scores.json", de_scores(data.adata, types))
    arrays = graphs_of(data, drawn)
    write(out / "data" / "cell_graphs_order.json", list(data.dataset_processed))
    np.savez_compressed(out / "data" / "cell_graphs.npz", **arrays)
    data.prepare_split("simulation", seed=seed + 1)
    split = {"seed": seed + 1, "set2conditions": data.set2conditions, "subgroup": data.subgroup}
    write(out / "data" / "split.json", split)
    results = results_of(arrays, data.set2conditions["test"], seed)
    np.savez_compressed(out / "metrics" / "random_results.npz", **results)
    exact = {key: part.astype(np.float64) if part.dtype.kind == "f" else part for key, part in results.items()}
    overall, single = compute_metrics(exact)
    analyses = {"deeper_analysis": deeper_analysis, "non_dropout_analysis": non_dropout_analysis}
    analyses["non_zero_analysis"] = non_zero_analysis
    found = {name: analysis(data.adata, exact) for name, analysis in analyses.items()}
    record = {"compute_metrics": overall, "compute_metrics_pert": single, **found}
    write(out / "metrics" / "random_metrics.json", record)


def jobs_of(name: str):
    "(kind of split, seed, options) for a list of conditions."
    yield from (("simulation", seed, {}) for seed in (6, 11, 42, 89))
    yield "simulation", 7, {"train_gene_set_size": 0.6, "combo_seen2_train_frac": 0.4}
    kinds = ["single"] if "adamson" in name else ["single", "no_test", *(f"combo_seen{i}" for i in range(3))]
    for kind in kinds:
        yield from ((kind, seed, {}) for seed in (3, 17))
        if kind != "no_test":
            yield kind, 4, {"combo_single_split_test_set_fraction": 0.2}


def write_splits(recorded: Path, out: Path, seed: int) -> None:
    "The part `splits`: synthetic lists in another order, real ones as they are."
    draw, records = np.random.default_rng(seed), []
    lists = json.loads((recorded / "splits" / "conditions.json").read_text())
    lists = {name: found if "real" in name else draw.permutation(found).tolist() for name, found in lists.items()}
    write(out / "splits" / "conditions.json", lists)
    for name, labels in lists.items():
        obs = pd.DataFrame({"condition": labels}, index=[f"c{i}" for i in range(len(labels))])
        for kind, number, options in jobs_of(name):
            with tempfile.TemporaryDirectory() as folder:
                data = PertData(folder)
                data.adata = anndata.AnnData(np.zeros((len(labels), 1), np.float32), obs.copy())
                data.dataset_name, data.dataset_path = "mine", folder
                data.prepare_split(kind, seed=number, **options)
            record = {"dataset": name, "split": kind, "seed": number, "options": options}
            records.append(record | {"set2conditions": data.set2conditions, "subgroup": data.subgroup})
    write(out / "splits" / "splits.json", records)


if __name__ == "__main__":
    recorded, out, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    for part in ("data", "metrics", "splits"):
        (out / part).mkdir(parents=True)
    write(out / "cfg.json", {**json.loads((recorded / "cfg.json").read_text()), "npseed": seed + 3})
    with tempfile.TemporaryDirectory() as place, open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere):
            write_data(out, seed, list(map(int, sys.argv[4:7])), sys.argv[7].split(","), place)
            write_splits(recorded, out, seed)
