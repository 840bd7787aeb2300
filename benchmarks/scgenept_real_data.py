"""Does language help? A small scGenePT on Papalexi and Norman, with six kinds of gene vectors, beside every baseline.

    SCELLFM_DATA=... python benchmarks/scgenept_real_data.py papalexi FOLDER [score, or the seeds to train]
    SCELLFM_DATA=... python benchmarks/scgenept_real_data.py norman FOLDER

The model is tiny (1 layer of 32), pretrained on the control cells alone; targets are left out in folds; three seeds.
What is trained is kept in FOLDER, and the same call goes on from there; `score` only scores what there is.
"""

import json
import os
import sys
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from scellfm.data import GeneVectors, read_vectors
from scellfm.scgenept import (
    PerturbationData,
    ScGenePT,
    go_annotations,
    go_texts,
    perturbation_baselines,
    perturbation_folds,
    text_vectors,
    tfidf_vectors,
)
from scellfm.scgpt import ScGPT
from scellfm.scores import perturbation

DATA = Path(os.environ["SCELLFM_DATA"])
SHAPE = dict(d_model=32, n_heads=2, d_hid=32, n_layers=1)
SEEDS = (0, 1, 2)
TRAINING = dict(
    epochs=7, batch_size=32, learning_rate=5e-3, decay=0.95, max_genes=64, dropout=0.05, attention_dropout=0.0
)
CELLS, CONTROLS = 30, 150  # of each perturbation, and unperturbed: a draw that is the same in every run


def cells_of(name: str) -> anndata.AnnData:
    "The cells of a data set with raw counts in X and obs['condition']."
    if name == "papalexi":
        adata = anndata.read_h5ad(DATA / "papalexi21" / "papalexi21_lowmoi.h5ad")
        adata.obs["condition"] = adata.obs["top_target"].astype(str).replace({"NT": "ctrl", "non-targeting": "ctrl"})
        return adata
    adata = anndata.read_h5ad(DATA / "norman19" / "norman19_3375x500.h5ad")
    adata.X = adata.layers["counts_recovered"]
    adata.obs["condition"] = adata.obs["condition"].astype(str).replace({"control": "ctrl"})
    del adata.uns["log1p"]
    return adata


def fewer(adata: anndata.AnnData) -> anndata.AnnData:
    "At most CELLS cells of each perturbation and CONTROLS controls, for speed; the same in every run."
    draw = np.random.default_rng(0)
    rows = []
    for label, part in adata.obs.groupby("condition", observed=True):
        n = min(len(part), CONTROLS if label == "ctrl" else CELLS)
        rows += draw.choice(adata.obs_names.get_indexer(part.index), n, replace=False).tolist()
    return adata[np.sort(rows)].copy()


def vectors_of(genes: list[str]) -> dict[str, GeneVectors]:
    "Six kinds of vectors of the genes; all are cut to 32 principal components, fitted on these genes."
    names = json.loads(next((DATA / "geneformer-v2").glob("*name_id*.json")).read_text())
    names = {ensembl: symbol for symbol, ensembl in names.items()}
    go = DATA / "go-texts"
    texts = go_texts(go_annotations(go / "annotations.parquet", go / "terms.parquet", names=names))
    texts = {gene: found for gene, found in texts.items() if gene in set(genes)}
    kinds = {
        "MiniLM on GO texts": text_vectors(texts, DATA / "minilm", device="cpu"),
        "TF-IDF of GO texts": tfidf_vectors(texts, n=32),
        "gene2vec": read_vectors(DATA / "gene2vec" / "gene2vec_200d.npy", genes=DATA / "gene2vec" / "genes.txt"),
    }
    kinds = {name: part.take(genes) for name, part in kinds.items()}
    kinds = {name: part.pca(32, fit_on=part.genes) if part.width > 32 else part for name, part in kinds.items()}
    language = kinds["MiniLM on GO texts"]
    return kinds | {"permuted MiniLM": language.permuted(0), "random": language.random_like(0)}


def pretrained(adata: anndata.AnnData, folder: str) -> str:
    "A tiny scGPT, pretrained on the control cells; the folder that it was saved in."
    controls = adata[adata.obs["condition"] == "ctrl"].copy()
    vocabulary = sorted(
        {*adata.var_names, *{g for c in adata.obs["condition"].unique() for g in c.split("+")} - {"ctrl"}}
    )
    model = ScGPT.from_config("tiny", vocabulary, device="cpu", **SHAPE)
    model = model.continue_pretraining(controls, epochs=3, learning_rate=1e-3, max_length=97, n_boot=2)
    model.save_pretrained(folder)
    return folder


def inputs_of(name: str, folder: Path) -> tuple:
    "Raw cells, their data, folds and vectors; the vectors are made once and kept in the folder."
    small = fewer(cells_of(name))
    data = PerturbationData(small, normalize=True)
    folds = perturbation_folds(data.labels, 5 if name == "papalexi" else 3, seed=0)
    kept = folder / "vectors"
    if not kept.exists():
        for number, (kind, part) in enumerate(vectors_of(list(data.input_genes)).items()):
            part.save(kept / f"{number} {kind}")
    kinds = {path.name[2:]: GeneVectors.load(path) for path in sorted(kept.iterdir())}
    return small, data, folds, kinds


def trained(name: str, folder: Path, seeds: tuple = SEEDS) -> None:
    "Train what is not yet trained, and keep its predictions: a run that was stopped goes on."
    small, data, folds, kinds = inputs_of(name, folder)
    if not (folder / "scgpt" / "args.json").exists():
        pretrained(small, str(folder / "scgpt"))
    for seed in seeds:
        for number, split in enumerate(folds):
            for kind in (*kinds, "none"):
                out = folder / f"{kind}, seed {seed}, fold {number}.csv"
                if out.exists():
                    continue
                start = time.time()
                options = {} if kind == "none" else dict(knowledge="text", gene_vectors=kinds[kind])
                model = ScGenePT.from_pretrained(folder / "scgpt", seed=seed, device="cpu", **options)
                model.fit(data, split, seed=seed, **TRAINING)
                model.predict(split.perturbations("test"), n_controls=40).to_csv(out)
                print(f"{out.name}: {time.time() - start:.0f} s", flush=True)


METRICS = ["mse", "mse_de", "pearson_delta", "pearson_delta_de", "wmse", "r2_w", "nir", "share"]


def scored(name: str, folder: Path) -> dict:
    "Scores of every kind of vectors (over the seeds that are trained) and of the baselines, as records."
    _, data, folds, kinds = inputs_of(name, folder)
    tables: dict[str, list[pd.DataFrame]] = {}
    for number, split in enumerate(folds):
        asked = {"train": split.train, "test": split.perturbations("test")}
        for label, table in perturbation_baselines(data, asked, vectors=kinds, baselines="all").items():
            tables.setdefault(label, []).append(table)
        for kind in (*kinds, "none"):
            for seed in SEEDS:
                path = folder / f"{kind}, seed {seed}, fold {number}.csv"
                if path.exists():
                    tables.setdefault(f"scGenePT, {kind}, seed {seed}", []).append(pd.read_csv(path, index_col=0))
    whole = {label: pd.concat(parts) for label, parts in tables.items() if len(parts) == len(folds)}
    scores = perturbation(data, whole, metrics=METRICS, train=data.labels)
    return {
        "perturbations": len(data.conditions),
        "cells": data.adata.n_obs,
        "dynamic_range": scores.dynamic_range["dynamic range"].to_dict(),
        "table": {method: row.to_dict() for method, row in scores.table.iterrows()},
        "values": {m: scores.values(m).to_dict() for m in METRICS if m != "share"},
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    work = Path(sys.argv[2])
    work.mkdir(parents=True, exist_ok=True)
    if "score" not in sys.argv:
        trained(sys.argv[1], work, tuple(map(int, sys.argv[3:])) or SEEDS)
    (work / "scores.json").write_text(json.dumps(scored(sys.argv[1], work), indent=1))
