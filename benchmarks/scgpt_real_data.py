"""Reference mapping and integration with scGPT on three real data sets, beside PCA and Harmony.

    SCELLFM_DATA=<folder> python benchmarks/scgpt_real_data.py [--quick]

kang18 (PBMC of 8 donors, interferon or not), scp1884 (68 intestinal types) and pbmc-2batch (two runs, types assigned by
markers). The published weights are not part of the data, so a small model is used: with random weights, then trained on
the reference cells without and with their labels (`continue_pretraining`). Cells to be labelled, or to be scored for
integration, are never trained on. This is not a benchmark of the published model: it shows that all steps run on real
cells, and what a small model cannot do."""

import os
import sys
import time
import warnings
from pathlib import Path

import harness  # first: it sets the number of threads
import anndata
import numpy as np
import pandas as pd

import scellfm as sf
from scellfm.baselines import LogNormalize, VariableGenes
from scellfm.core import ScellfmWarning
from scellfm.scgpt import ReferenceMap, ScGPT
from scellfm.scgpt.mapping import pca_pair
from scellfm.scgpt.training import continue_pretraining
from scellfm.scores import Scores, integration

DATA = Path(os.environ.get("SCELLFM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
MODELS = ("random weights", "trained", "trained with labels")
MARKERS = {
    "T cell": ["CD3D", "CD3E", "IL7R", "TRAC"],
    "B cell": ["CD79A", "MS4A1", "CD79B"],
    "monocyte": ["LYZ", "S100A8", "CST3", "CD14"],
    "NK cell": ["GNLY", "NKG7", "PRF1", "KLRD1"],
}
MAPPING = ["accuracy", "macro_precision", "macro_recall", "macro_f1"]


def models(ref, label: str, epochs: int, seed: int = 0) -> tuple[dict[str, ScGPT], np.ndarray]:
    "Small models for the 1,200 most variable genes of the reference, and these genes."
    genes = VariableGenes(1200).fit(LogNormalize().fit_transform(ref.X)).genes_
    cells = ref[:, genes].copy()
    start = ScGPT.from_config("tiny", cells, seed=seed, device="cpu")
    ask = dict(epochs=epochs, learning_rate=2e-3, held_out=0.1, n_boot=0, seed=seed)
    made = (start, continue_pretraining(start, cells, **ask), continue_pretraining(start, cells, label=label, **ask))
    print(
        f"hidden values of held-out reference cells, squared error in bins:\n\n{made[1].losses.to_markdown()}\n",
        flush=True,
    )
    return dict(zip(MODELS, made)), ref.var_names[genes]


def embed(found: dict[str, ScGPT], genes, adata) -> list[str]:
    "Write obsm['scGPT, <model>'] for every model; genes that the data lack are left out."
    cells = adata[:, adata.var_names.intersection(genes, sort=False)].copy()
    for name, gpt in found.items():
        gpt.embed(cells, key_added=f"scGPT, {name}")
        adata.obsm[f"scGPT, {name}"] = cells.obsm[f"scGPT, {name}"]
    return [f"scGPT, {name}" for name in found]


def with_harmony(ref, query, label: str) -> pd.Series:
    "The mapping's scores on HVG + PCA after Harmony has joined reference and query."
    import harmonypy

    parts = pca_pair(ref, query, None, 0)
    side = pd.DataFrame({"side": np.repeat(["reference", "query"], [len(part) for part in parts])})
    moved = np.asarray(harmonypy.run_harmony(np.concatenate(parts), side, "side", random_state=0, verbose=False).Z_corr)
    moved = moved if len(moved) == len(side) else moved.T
    ref, query = (
        anndata.AnnData(obs=cells.obs, obsm={"X": rows})
        for cells, rows in zip((ref, query), np.split(moved, [ref.n_obs]))
    )
    return ReferenceMap(ref, "X", label).evaluate(query, baselines=False).table.loc["X"]


def mapping(title: str, ref, query, reps: list[str], label: str, by: str | None) -> Scores:
    "One table of all models and baselines; thresholds of the last model are calibrated on held-out reference cells."
    rows = {}
    for rep in reps:
        scores = ReferenceMap(ref, rep, label).evaluate(query, baselines=rep == reps[-1])
        rows.update(scores.table.T)
    rows = {method: rows[method] for method in [*reps, "HVG + PCA"]} | {
        "HVG + PCA + Harmony": with_harmony(ref, query, label),
        **rows,
    }
    table = Scores(pd.DataFrame(rows).T[MAPPING], title=f"{title}: {query.n_obs:,} cells named by {ref.n_obs:,}")
    print(f"**{table.title}**\n\n{table.to_markdown()}\n", flush=True)
    reference = ReferenceMap(ref, reps[-1], label)
    levels = reference.calibrate(accuracy=0.9, by=by).set_index("min_confidence")["accuracy"]
    told = reference.evaluate(query, baselines=False).table.iloc[0]
    print(
        f"calibrated for 90 % ({'each cell' if by is None else by + 's'} held out in turn), "
        f"{levels[reference.min_confidence]:.0%} reached on the "
        f"reference: {told['called']:.0%} of the cells are named, {told['accuracy_called']:.0%} of them rightly\n",
        flush=True,
    )
    return table


def integrated(title: str, cells, reps: list[str], batch: str | None, label: str | None) -> None:
    "The table of integration."
    scores = integration(cells, reps, batch=batch, label=label)
    print(f"**{title}** ({scores.title})\n\n{scores.to_markdown()}\n", flush=True)


def kang18(epochs: int) -> None:
    "Four donors label the cells of four others; mixing of conditions and of donors among the latter."
    adata = anndata.read_h5ad(DATA / "kang18" / "kang18_2000.h5ad")
    adata.obs["cell_type"], donors = (
        adata.obs["cell_type_derived"].astype(str),
        sorted(adata.obs["donor"].astype(str).unique()),
    )
    known = adata.obs["donor"].astype(str).isin(donors[:4]).to_numpy()
    ref, query = adata[known].copy(), adata[~known].copy()
    found, genes = models(ref, "cell_type", epochs)
    reps = [embed(found, genes, cells) for cells in (ref, query)][0]
    mapping("kang18, new donors", ref, query, reps, "cell_type", "donor")
    quiet, roused = (
        cells[(cells.obs["condition"] == name).to_numpy()].copy() for cells, name in ((ref, "ctrl"), (query, "stim"))
    )
    mapping("kang18, new donors, stimulated cells by unstimulated", quiet, roused, reps, "cell_type", "donor")
    integrated("kang18, by condition", query, reps, "condition", "cell_type")
    integrated("kang18, by donor", query, reps, "donor", "cell_type")


def scp1884(epochs: int) -> None:
    """Half of the cells of each of 68 types label the other half. Only Celltype:
    the other columns are shuffled in the source."""
    adata = anndata.read_h5ad(DATA / "scp1884" / "scp1884.h5ad")
    adata.obs = adata.obs[["Celltype"]].astype(str)
    split = sf.data.hold_out(adata, fractions=(0.5, 0, 0.5), stratify="Celltype", seed=0)
    ref, query = adata[split.train].copy(), adata[split.test].copy()
    found, genes = models(ref, "Celltype", epochs)
    reps = [embed(found, genes, cells) for cells in (ref, query)][0]
    mapping("scp1884, 68 types", ref, query, reps, "Celltype", None)
    integrated("scp1884, labels alone", query, reps, None, "Celltype")


def lineages(adata) -> np.ndarray:
    "The lineage with the highest markers in each cell: a substitute for labels, which these data lack."
    logged = LogNormalize().fit_transform(adata.X)
    means = np.stack(
        [np.asarray(logged[:, adata.var_names.get_indexer(markers)].mean(1)).ravel() for markers in MARKERS.values()], 1
    )
    return np.array(list(MARKERS))[((means - means.mean(0)) / means.std(0)).argmax(1)]


def pbmc_2batch(epochs: int) -> None:
    "One run labels the cells of the other; mixing of the runs (all cells: the first run was trained on)."
    runs = {name: anndata.read_h5ad(DATA / "pbmc-2batch" / f"pbmc_{name}_protein_v3.h5ad") for name in ("10k", "5k")}
    for name, cells in runs.items():
        cells.obs = pd.DataFrame(
            {"run": name, "lineage": lineages(cells)}, index=[f"{name}-{cell}" for cell in cells.obs_names]
        )
    ref, query = runs.values()
    found, genes = models(ref, "lineage", epochs)
    reps = [embed(found, genes, cells) for cells in runs.values()][0]
    mapping("pbmc-2batch, one run by the other, lineages by markers", ref, query, reps, "lineage", None)
    both = anndata.concat([ref, query])
    integrated("pbmc-2batch, by run, lineages by markers", both, reps, "run", "lineage")
    integrated("pbmc-2batch, by run, without labels", both, reps, "run", None)


def main() -> int:
    options = harness.parser(__doc__, pairs=None, quick="one epoch instead of twenty").parse_args()
    epochs = 1 if options.quick else 20
    warnings.filterwarnings("ignore", category=ScellfmWarning)
    if not DATA.exists():
        print(f"real data are not here (SCELLFM_DATA={DATA}): nothing to do")
        return 0
    for run in (pbmc_2batch, scp1884, kang18):
        start = time.time()
        print(f"## {run.__name__.replace('_', '-')}\n")
        run(epochs)
        print(f"({time.time() - start:.0f} s)\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
