"""On simulated data, gene vectors that know the modules help on held-out genes, and permuted ones do not.

    python benchmarks/scgenept_simulation.py [--seeds 102 103] [--folder FOLDER] [--quick]

Single perturbations of 60 genes in 3 modules; a row is the mean of 20 cells, because in single cells the counting noise
is ten times as large as the difference between modules. Each gene is held out once, in five folds; the next fold is the
validation set, and the rest is trained on, by a tiny model from random weights. Its gene vectors know the modules, or
are the same vectors under other genes' names, or there are none. The learning rate is chosen first, for each kind
separately, on ONE simulation and only by the validation loss; then scores are measured on other simulations, which were
not used for the choice. Finished parts are kept in FOLDER, and the same call continues from there.

Printed: pearson_delta on held-out genes with its interval over perturbations, and paired differences. The exit code
is 1 if, on any of these simulations, the interval of `know` does not lie above those of `permuted` and of `none`,
or the paired difference of `permuted` to `none` lies above 0 (--quick: if the mean of `know` is not above that of
`permuted`)."""

import json
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import harness  # first: it sets the number of threads
import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from scellfm.data import simulate_perturbations
from scellfm.scgenept import PerturbationData, ScGenePT, perturbation_folds
from scellfm.scores import perturbation

SHAPE = dict(d_model=32, n_heads=2, d_hid=32, n_layers=1, dropout=0.0)
FULL = dict(n_targets=60, n_pairs=0, n_genes=60, n_modules=3, n_cells=40, n_controls=200)
QUICK = dict(n_targets=24, n_pairs=0, n_genes=24, n_modules=3, n_cells=20, n_controls=100)
CELLS = 20  # cells of one row
CHOOSING, MEASURING = 0, (102, 103)  # seeds of the simulations
KINDS = ("know", "permuted", "none")
RATES = (3e-3, 1e-2)  # to choose from
COMMON = dict(epochs=150, patience=60, batch_size=8, decay=0.988)


def averaged(adata: anndata.AnnData) -> anndata.AnnData:
    "Means of CELLS cells of one perturbation as rows."
    rows, labels = [], []
    for label, names in adata.obs.groupby("condition", sort=True).groups.items():
        values = adata[names].X.toarray()
        parts = np.split(values, range(CELLS, len(values), CELLS))
        rows += [part.mean(axis=0) for part in parts]
        labels += [label] * len(parts)
    obs = pd.DataFrame({"condition": labels}, index=[f"row{i}" for i in range(len(labels))])
    return anndata.AnnData(sparse.csr_matrix(np.array(rows)), obs=obs, var=adata.var[[]].copy())


def problem(size: dict, k: int, seed: int) -> tuple:
    "Data of a simulation, its folds, each with the next one as its validation set, and its kinds of gene vectors."
    simulated = simulate_perturbations(**size, seed=seed)
    data = PerturbationData(averaged(simulated.adata))
    folds = perturbation_folds(data.labels, k, seed=0)
    valid = [folds[(number + 1) % k].test for number in range(k)]
    folds = [
        replace(fold, train=[label for label in fold.train if label not in names], valid=names)
        for fold, names in zip(folds, valid)
    ]
    know = simulated.vectors["know"]
    return data, folds, {"know": know, "permuted": know.permuted(0), "none": None}


def trained(data, split, vectors, rate: float) -> ScGenePT:
    "The tiny model after training on one split."
    options = {} if vectors is None else dict(knowledge="programmes", gene_vectors=vectors)
    model = ScGenePT.from_config("tiny", data, seed=0, device="cpu", **options, **SHAPE)
    return model.fit(data, split, seed=0, learning_rate=rate, **COMMON)


def choose(size: dict, k: int, folder: Path) -> dict[str, float]:
    "For each kind the learning rate with the lowest validation loss, over two folds of the simulation for choices."
    data, folds, kinds = problem(size, k, CHOOSING)
    path = folder / "chosen.json"
    chosen = json.loads(path.read_text()) if path.exists() else {}
    for kind in [kind for kind in kinds if kind not in chosen]:
        found = {}
        for rate in RATES:
            histories = [trained(data, fold, kinds[kind], rate).history for fold in folds[:2]]
            found[rate] = sum(history.epochs["valid_loss"].min() for history in histories) / len(histories)
            print(f"  {kind:9s} learning rate {rate}: validation loss {found[rate]:.5f}", flush=True)
        chosen[kind] = min(found, key=found.get)
        path.write_text(json.dumps(chosen))
    print(f"chosen: {chosen}", flush=True)
    return chosen


def predictions(made: tuple, kind: str, rate: float, path: Path) -> pd.DataFrame:
    "The predictions of all held-out perturbations with one kind of vectors, from the file if it exists."
    if not path.exists():
        data, folds, kinds = made
        tables = []
        for fold in folds:
            model = trained(data, fold, kinds[kind], rate)
            tables.append(model.predict(fold.perturbations("test"), n_controls=50))
        pd.concat(tables).to_csv(path)
    return pd.read_csv(path, index_col=0)


def measure(size: dict, k: int, seed: int, chosen: dict[str, float], folder: Path):
    "Scores on held-out genes of the three kinds of vectors, on one simulation."
    made = problem(size, k, seed)
    found = {kind: predictions(made, kind, chosen[kind], folder / f"{seed} {kind}.csv") for kind in KINDS}
    return perturbation(made[0], found, metrics=["pearson_delta", "mse"], train=made[1])


def kept(scores, quick: bool) -> bool:
    "Print the three kinds with their intervals; returns whether the claim holds."
    low, high, mean = (table["pearson_delta"] for table in (scores.low, scores.high, scores.table))
    for kind in KINDS:
        print(f"  {kind:9s} {mean[kind]:.3f} [{low[kind]:.3f}, {high[kind]:.3f}]", flush=True)
    if quick:
        return not harness.verdict(("  know less permuted", mean["know"] - mean["permuted"], "floor", 0))
    for kind, to in (("know", "permuted"), ("know", "none"), ("permuted", "none")):
        gain = scores.difference("pearson_delta", to=to).loc[kind]
        print(f"  {kind} less {to}, paired: {gain['difference']:.3f} [{gain['low']:.3f}, {gain['high']:.3f}]")
    return not harness.verdict(
        ("  lower end of know less upper end of permuted", low["know"] - high["permuted"], "floor", 0),
        ("  lower end of know less upper end of none", low["know"] - high["none"], "floor", 0),
        ("  lower end of the difference of permuted to none", gain["low"], "ceiling", 0),
    )


def main() -> int:
    "Choose, measure, and print the tables; 1 if the claim does not hold."
    made = harness.parser(__doc__, pairs=None, quick="24 targets in three folds, one simulation")
    made.add_argument("--seeds", type=int, nargs="+", default=MEASURING, help="seeds of the simulations to measure on")
    made.add_argument("--folder", type=Path, help="folder in which finished parts are kept")
    options = made.parse_args()
    warnings.simplefilter("ignore")
    size, k, seeds = (QUICK, 3, options.seeds[:1]) if options.quick else (FULL, 5, options.seeds)
    held, start = [], time.time()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        chosen = choose(size, k, folder)
        for seed in seeds:
            scores = measure(size, k, seed, chosen, folder)
            print(f"simulation {seed}: pearson_delta of {len(scores.values('mse'))} held-out perturbations")
            held.append(kept(scores, options.quick))
            print(f"  {'apart' if held[-1] else 'NOT APART'}; {time.time() - start:.0f} s so far", flush=True)
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
