"""Does language help? A small scGenePT on Papalexi and Norman, with six kinds of gene vectors, beside every baseline.

    SCELLFM_DATA=... python benchmarks/scgenept_real_data.py papalexi FOLDER [choose | train [SEED ...] | score]
    SCELLFM_DATA=... python benchmarks/scgenept_real_data.py norman FOLDER [--quick]

If no step is named, all are run. Finished parts are kept in FOLDER, and the same call continues from there. `score`
writes FOLDER/tables, which nbs/scgenept/language_experiment.ipynb shows.

The model is tiny (1 layer of 32) and pretrained on control cells alone. It is trained on means of ten cells, for the
genes that vary most. The recipe is chosen on a part of the training perturbations of the first fold (`choose`), by the
summed losses of the models with MiniLM vectors and without vectors; no test perturbation is used before `score`.
"""

import json
import os
import time
import warnings
from dataclasses import replace
from pathlib import Path

import harness  # first: it sets the number of threads
import anndata
import numpy as np
import pandas as pd
from scipy import sparse

import scellfm as sf
from scellfm.core import keyed_generator
from scellfm.data import GeneVectors, read_vectors
from scellfm.scgenept import (
    PerturbationData,
    ScGenePT,
    go_annotations,
    go_texts,
    perturbation_baselines,
    text_vectors,
    tfidf_vectors,
)
from scellfm.scgpt import ScGPT
from scellfm.scores.perturbations import DUPLICATE, TRAINING_MEAN, bounds, resamples, share_means, weighted_means

DATA = Path(os.environ.get("SCELLFM_DATA", "../shared/data"))
SHAPE = dict(d_model=32, n_heads=2, d_hid=32, n_layers=1)
SEEDS = (0, 1, 2)
GENES = 64  # the most variable measured genes; unmeasured targets are added as inputs
CELLS, GROUPS = 10, 12  # cells of one mean, and means of one perturbation at most; twice as many of the controls
TRAINING = dict(batch_size=32, decay=0.97, dropout=0.0, attention_dropout=0.0)
RATES, FROZEN = (3e-3, 1e-2), (False, True)  # the recipes to choose from, with any number of epochs up to
EPOCHS = {"papalexi": 40, "norman": 12}  # this, so that all fits of a screen run in half an hour of one core
NONE, MINILM = "none", "MiniLM on GO texts"


def measured(name: str) -> tuple[anndata.AnnData, PerturbationData, list[str]]:
    "Raw control cells, for pretraining; all cells, log-normalised, of the genes that vary most; all genes by name."
    if name == "papalexi":
        raw = sf.data.read(DATA / "papalexi21" / "papalexi21_lowmoi.h5ad")
        data = PerturbationData(raw, condition="top_target", control="non-targeting", normalize=True)
    else:
        raw = sf.data.read(DATA / "norman19" / "norman19_3375x500.h5ad")
        data = PerturbationData(raw)
        raw.X = raw.layers["counts_recovered"]
    controls = raw[data.controls].copy()
    values = data.adata.X
    variance = np.asarray(values.multiply(values).mean(0) - np.square(values.mean(0))).ravel()
    kept = np.sort(np.argsort(-variance, kind="stable")[:GENES])
    return controls, PerturbationData(data.adata[:, kept].copy()), list(data.input_genes)


def averaged(data: PerturbationData) -> PerturbationData:
    "Means of CELLS cells of one perturbation as rows: the same draw in every run."
    rows, labels, names = [], [], []
    for condition in ("ctrl", *data.conditions):
        cells = data.rows(condition)
        order = cells[keyed_generator(0, "cells", condition).permutation(len(cells))]
        n = max(1, min(len(order) // CELLS, GROUPS * (1 + (condition == "ctrl"))))
        for number, part in enumerate(np.split(order[: n * CELLS], n)):
            rows.append(np.asarray(data.adata.X[part].mean(0)).ravel())
            labels.append(condition)
            names.append(f"{condition} {number}")
    obs = pd.DataFrame({"condition": labels}, index=names)
    matrix = sparse.csr_matrix(np.array(rows, dtype=np.float32))
    return PerturbationData(anndata.AnnData(matrix, obs=obs, var=data.adata.var[[]].copy()))


def vectors_of(genes: list[str]) -> dict[str, GeneVectors]:
    "Six kinds of vectors of the genes; all are cut to 32 principal components, fitted on these genes."
    names = json.loads(next((DATA / "geneformer-v2").glob("*name_id*.json")).read_text())
    names = {ensembl: symbol for symbol, ensembl in names.items()}
    go = DATA / "go-texts"
    texts = go_texts(go_annotations(go / "annotations.parquet", go / "terms.parquet", names=names))
    texts = {gene: found for gene, found in texts.items() if gene in set(genes)}
    kinds = {
        MINILM: text_vectors(texts, DATA / "minilm", device="cpu"),
        "TF-IDF of GO texts": tfidf_vectors(texts, n=32),
        "gene2vec": read_vectors(DATA / "gene2vec" / "gene2vec_200d.npy", genes=DATA / "gene2vec" / "genes.txt"),
    }
    kinds = {name: part.take(genes) for name, part in kinds.items()}
    kinds = {name: part.pca(32, fit_on=part.genes) if part.width > 32 else part for name, part in kinds.items()}
    language = kinds[MINILM]
    return kinds | {"permuted MiniLM": language.permuted(0), "random": language.random_like(0)}


class Experiment:
    "Cells, folds, vectors and a pretrained scGPT of one data set; slow parts are made once and kept in the folder."

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        folder.mkdir(parents=True, exist_ok=True)
        controls, self.cells, genes = measured(name)
        self.data = averaged(self.cells)
        self.folds = self.data.folds(5)
        kept = folder / "vectors"
        if not kept.exists():
            for number, (kind, part) in enumerate(vectors_of(genes).items()):
                part.save(kept / f"{number} {kind}")
        self.kinds = {path.name[2:]: GeneVectors.load(path) for path in sorted(kept.iterdir())} | {NONE: None}
        self.scgpt = folder / "scgpt"
        if not (self.scgpt / "args.json").exists():
            vocabulary = sorted({*controls.var_names, *genes})
            model = ScGPT.from_config("tiny", vocabulary, device="cpu", **SHAPE)
            model = model.continue_pretraining(controls, epochs=3, learning_rate=1e-3, max_length=97, n_boot=2)
            model.save_pretrained(self.scgpt)

    def fitted(self, kind: str, split, seed: int, rate: float, frozen: bool, epochs: int) -> ScGenePT:
        "A model with one kind of vectors, trained on the training part of a split."
        vectors = self.kinds[kind]
        options = {} if vectors is None else dict(knowledge="text", gene_vectors=vectors, freeze_language=frozen)
        model = ScGenePT.from_pretrained(self.scgpt, seed=seed, device="cpu", **options)
        return model.fit(
            self.data,
            split,
            seed=seed,
            learning_rate=rate,
            epochs=epochs,
            max_genes=10_000,
            patience=epochs,
            **TRAINING,
        )


def choose(task: Experiment) -> dict:
    "Learning rate, frozen tables and epochs with the smallest loss on a quarter of the first fold's training part."
    path = task.folder / "chosen.json"
    if path.exists():
        return json.loads(path.read_text())
    split = task.folds[0]
    names = [label for label in split.train if label != "ctrl"]
    order = keyed_generator(0, "validation").permutation(len(names))
    valid = [names[i] for i in order[: len(names) // 4]]
    train = [label for label in split.train if label not in set(valid)]
    split = replace(split, train=train, valid=valid)
    rows = []
    for rate in RATES:
        for kind in (NONE, MINILM):
            for frozen in FROZEN if kind == MINILM else (False,):
                history = task.fitted(kind, split, 0, rate, frozen, EPOCHS[task.name]).history
                losses = history.epochs["valid_loss"].tolist()
                rows.append({"rate": rate, "kind": kind, "frozen": frozen, "losses": losses} | history.baselines)
    found = []
    for rate in RATES:
        plain = next(r for r in rows if r["rate"] == rate and r["kind"] == NONE)
        for row in (r for r in rows if r["rate"] == rate and r["kind"] == MINILM):
            together = (np.array(row["losses"]) + np.array(plain["losses"])) / 2
            best = int(together.argmin())
            chosen = {"rate": rate, "frozen": row["frozen"], "epochs": best + 1}
            found.append((float(together[best]), chosen))
    loss, chosen = min(found, key=lambda pair: pair[0])
    record = chosen | {"loss": loss, "valid": valid, "tried": rows}
    path.write_text(json.dumps(record, indent=1))
    return record


def train(task: Experiment, seeds: tuple = SEEDS) -> None:
    "Train what is not yet trained, and keep its predictions."
    recipe = choose(task)
    for seed in seeds:
        for number, split in enumerate(task.folds):
            for kind in task.kinds:
                out = task.folder / f"{kind}, seed {seed}, fold {number}.csv"
                if out.exists():
                    continue
                start = time.time()
                model = task.fitted(kind, split, seed, recipe["rate"], recipe["frozen"], recipe["epochs"])
                model.predict(split.perturbations("test"), n_controls=None).to_csv(out)
                print(f"{out.name}: {time.time() - start:.0f} s", flush=True)


METRICS = ["wmse", "mse", "pearson_delta", "nir"]
OWN_GENE = "training mean, own gene as in training"
PERMUTED, RANDOM, MEAN_OF_ALL = "permuted MiniLM", "random", "training mean of all cells"


def predictions(task: Experiment) -> dict[str, pd.DataFrame]:
    "The predictions of every baseline, then of every kind of vectors and seed that is trained in all folds."
    real = {kind: part for kind, part in task.kinds.items() if kind not in (NONE, PERMUTED, RANDOM)}
    found = dict(perturbation_baselines(task.data, task.folds, vectors=real, baselines="all"))
    found[OWN_GENE] = own_gene_changed(task, found["training mean"])
    found[MEAN_OF_ALL] = perturbation_baselines(task.cells, task.folds, baselines=["training mean"])["training mean"]
    for kind in task.kinds:
        for seed in SEEDS:
            paths = [task.folder / f"{kind}, seed {seed}, fold {number}.csv" for number in range(len(task.folds))]
            if all(path.exists() for path in paths):
                tables = [pd.read_csv(path, index_col=0) for path in paths]
                found[model_name(kind, seed)] = pd.concat(tables)
    return found


def own_gene_changed(task: Experiment, table: pd.DataFrame) -> pd.DataFrame:
    "The training mean, with a measured target's own expression changed by the mean ratio of other targets."
    table, means = table.copy(), task.data.means()
    control = means.loc["ctrl"]
    for split in task.folds:
        known = [name for name in split.perturbations("train") if name in means.columns and control[name] > 0]
        if known:
            kept = np.mean([means.loc[name, name] / control[name] for name in known])
            for name in split.perturbations("test"):
                own = [gene for gene in name.split("+") if gene in means.columns]
                table.loc[name, own] = kept * control[own]
    return table


def model_name(kind: str, seed: int | None = None) -> str:
    "The name of a model in the tables; without a seed, that of the mean over seeds."
    return f"scGenePT, {kind}" + ("" if seed is None else f", seed {seed}")


def over_seeds(table: pd.DataFrame, kinds: list[str]) -> pd.DataFrame:
    "Perturbations x methods with the mean of each perturbation's scores over seeds in place of the seeds' columns."
    seeds = {kind: [name for seed in SEEDS if (name := model_name(kind, seed)) in table] for kind in kinds}
    means = {model_name(kind): table[names].mean(axis=1) for kind, names in seeds.items() if names}
    return table.drop(columns=sum(seeds.values(), [])).assign(**means)


def score_table(scores, kinds: list[str]) -> pd.DataFrame:
    "Methods x (metric, its interval over perturbations), the share, the spread over seeds and the number of both."
    draws = resamples(len(scores.values("wmse")), 0)
    rows: dict[str, dict] = {}
    for metric in METRICS:
        whole = scores.values(metric)
        for method, values in over_seeds(whole, kinds).items():
            row = rows.setdefault(method, {})
            row[metric], row[f"{metric} low"], row[f"{metric} high"] = bounds(weighted_means(values.to_numpy(), draws))
    half = over_seeds(scores.values("wmse", half=True), kinds)
    floor, ceiling = half[TRAINING_MEAN].to_numpy(), half[DUPLICATE].to_numpy()
    for method, values in half.items():
        found = bounds(share_means(values.to_numpy(), floor, ceiling, draws))
        rows[method] |= dict(zip(("share", "share low", "share high"), found))
        rows[method]["n"] = int(values.notna().sum())
    for kind in kinds:
        names = [name for seed in SEEDS if (name := model_name(kind, seed)) in scores.table.index]
        if names:
            rows[model_name(kind)] |= {"seeds": len(names), "wmse sd of seeds": scores.table.loc[names, "wmse"].std()}
    return pd.DataFrame(rows).T.rename_axis("method")


def difference_table(scores, kinds: list[str]) -> pd.DataFrame:
    "Paired differences, with intervals over perturbations: of every model to the training mean, of texts to controls."
    texts = [kind for kind in kinds if kind not in (NONE, PERMUTED, RANDOM)]
    pairs = [(model_name(kind), TRAINING_MEAN) for kind in kinds]
    pairs += [(model_name(kind), OWN_GENE) for kind in kinds]
    pairs += [(model_name(kind), model_name(to)) for kind in texts for to in (NONE, PERMUTED, RANDOM)]
    draws, rows = resamples(len(scores.values("wmse")), 0), []
    for metric in ("wmse", "pearson_delta"):
        values = over_seeds(scores.values(metric), kinds)
        for method, to in pairs:
            if method in values and to in values:
                gap = values[method] - values[to]
                found = dict(zip(("difference", "low", "high"), bounds(weighted_means(gap.to_numpy(), draws))))
                rows.append({"metric": metric, "method": method, "to": to, **found, "n": int(gap.notna().sum())})
    return pd.DataFrame(rows).set_index(["metric", "method", "to"])


def group_table(scores, kinds: list[str]) -> pd.DataFrame:
    "The weighted error of each method in each subgroup of perturbations."
    values = over_seeds(scores.values("wmse"), kinds)
    groups = {name: members for name, members in scores.origin["subgroups"].items() if len(members)}
    found = {f"{name} ({len(members)})": values.reindex(members).mean() for name, members in groups.items()}
    return pd.DataFrame(found).rename_axis("method")


def score(task: Experiment) -> None:
    "Score all trained models on all cells of each perturbation, and write the tables."
    singles = [name for name in task.data.conditions if "+" not in name]
    pairs = [name for name in task.data.conditions if "+" in name]
    groups = {"singles": singles, "pairs": pairs} if pairs else {}
    found = predictions(task)
    scores = sf.scores.perturbation(task.cells, found, metrics=METRICS, train=task.folds, subgroups=groups)
    kinds, out = list(task.kinds), task.folder / "tables"
    out.mkdir(exist_ok=True)
    score_table(scores, kinds).to_csv(out / f"{task.name}_scores.csv", float_format="%.4g")
    difference_table(scores, kinds).to_csv(out / f"{task.name}_differences.csv", float_format="%.4g")
    group_table(scores, kinds).to_csv(out / f"{task.name}_groups.csv", float_format="%.4g")
    recipe = choose(task)
    tried = [{**row, "losses": min(row["losses"])} for row in recipe["tried"]]
    record = {
        "perturbations": len(scores.values("wmse")),
        "cells": int(task.cells.adata.n_obs),
        "rows trained on": int(task.data.adata.n_obs),
        "genes": len(task.data.genes),
        "fits": sum(name.startswith("scGenePT") for name in found) * len(task.folds),
        "dynamic range": scores.dynamic_range["dynamic range"].round(3).reindex(METRICS).to_dict(),
        "recipe": {key: recipe[key] for key in ("rate", "frozen", "epochs", "loss", "valid")},
        "tried": tried,
    }
    (out / f"{task.name}.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    "Run the requested steps."
    made = harness.parser(__doc__, pairs=None, quick="one seed, two epochs and no choice: for a try, no result")
    made.add_argument("name", choices=EPOCHS, help="the data set")
    made.add_argument("folder", type=Path, help="folder in which finished parts are kept")
    made.add_argument("step", nargs="?", default="all", choices=("choose", "train", "score", "all"))
    made.add_argument("seeds", nargs="*", type=int, help="seeds to train; all of them if none is named")
    options = made.parse_args()
    warnings.simplefilter("ignore")
    start = time.time()
    task = Experiment(options.name, options.folder)
    print(f"inputs {time.time() - start:.0f} s, {task.data}, {len(task.data.input_genes)} genes read", flush=True)
    if options.quick and not (task.folder / "chosen.json").exists():
        recipe = {"rate": RATES[0], "frozen": False, "epochs": 2, "loss": None, "valid": [], "tried": []}
        (task.folder / "chosen.json").write_text(json.dumps(recipe))
    if options.step != "score":
        recipe = choose(task)
        told = {key: recipe[key] for key in ("rate", "frozen", "epochs", "loss", "valid")}
        print(told, f"{time.time() - start:.0f} s", flush=True)
    if options.step in ("train", "all"):
        train(task, tuple(options.seeds) or SEEDS[: 1 if options.quick else None])
    if options.step in ("score", "all"):
        score(task)


if __name__ == "__main__":
    main()
