"""On simulated data language that knows the modules helps held-out genes, and permuted language does not.

    python benchmarks/scgenept_simulation.py [--seeds 101 102 103] [--quick]

Singles of 40 genes in 3 modules. Each gene is held out once, in five folds; the next fold is the validation set, and
the rest is trained on, by a tiny model from random weights. Its gene vectors know the modules, or are the same vectors
under other genes' names, or there are none. Learning rate and decay are chosen first, for each kind by itself, on ONE
simulation and by the validation loss alone; then they are measured on other simulations, which had no part in the
choice. Printed: pearson_delta on held-out genes with its interval over perturbations. The exit code is 1 where, on any
of these simulations, the interval of `know` does not lie above that of `permuted`, or `permuted` lies above `none`
(--quick: where the mean of `know` is not above that of `permuted`)."""

import itertools
import sys
import time
import warnings
from dataclasses import replace

import harness  # first: it sets the number of threads
import pandas as pd

from scellfm.data import simulate_perturbations
from scellfm.scgenept import PerturbationData, ScGenePT, perturbation_folds
from scellfm.scores import perturbation

SHAPE = dict(d_model=32, n_heads=2, d_hid=32, n_layers=1, dropout=0.0)
FULL = dict(n_targets=40, n_pairs=0, n_genes=60, n_modules=3, n_cells=15, n_controls=60)
QUICK = dict(n_targets=24, n_pairs=0, n_genes=30, n_modules=3, n_cells=8, n_controls=20)
CHOOSING, MEASURING = 0, (101, 102, 103)  # seeds of the simulations
KINDS = ("know", "permuted", "none")
GRID = {"learning_rate": (3e-3, 1e-2, 2e-2), "decay": (0.95, 0.98)}
COMMON = dict(epochs=60, patience=15, batch_size=32)


def problem(size: dict, k: int, seed: int) -> tuple:
    "Data of a simulation, its folds, each with the next one as its validation set, and its kinds of gene vectors."
    simulated = simulate_perturbations(**size, seed=seed)
    data = PerturbationData(simulated.adata)
    folds = perturbation_folds(data.labels, k, seed=0)
    valid = [folds[(number + 1) % k].test for number in range(k)]
    folds = [
        replace(fold, train=[label for label in fold.train if label not in names], valid=names)
        for fold, names in zip(folds, valid)
    ]
    know = simulated.vectors["know"]
    return data, folds, {"know": know, "permuted": know.permuted(0), "none": None}


def trained(data, split, vectors, settings: dict) -> ScGenePT:
    "The tiny model after training on one split."
    options = {} if vectors is None else dict(knowledge="programmes", gene_vectors=vectors)
    model = ScGenePT.from_config("tiny", data, seed=0, device="cpu", **options, **SHAPE)
    return model.fit(data, split, seed=0, **COMMON, **settings)


def choose(size: dict, k: int) -> dict[str, dict]:
    "For each kind the setting with the lowest validation loss, over two folds of the simulation for choices."
    data, folds, kinds = problem(size, k, CHOOSING)
    chosen = {}
    for kind, vectors in kinds.items():
        found = {}
        for values in itertools.product(*GRID.values()):
            settings = dict(zip(GRID, values))
            losses = [trained(data, fold, vectors, settings).history.epochs["valid_loss"].min() for fold in folds[:2]]
            found[values] = sum(losses) / len(losses)
            print(f"  {kind:9s} {settings}: validation loss {found[values]:.5f}", flush=True)
        chosen[kind] = dict(zip(GRID, min(found, key=found.get)))
    print(f"chosen: {chosen}", flush=True)
    return chosen


def measure(size: dict, k: int, seed: int, chosen: dict[str, dict]):
    "Scores on held-out genes of the three kinds of vectors, on one simulation."
    data, folds, kinds = problem(size, k, seed)
    found = {
        kind: pd.concat(
            trained(data, fold, vectors, chosen[kind]).predict(fold.perturbations("test"), n_controls=50)
            for fold in folds
        )
        for kind, vectors in kinds.items()
    }
    return perturbation(data, found, metrics=["pearson_delta", "mse"], train=folds)


def kept(scores, quick: bool) -> bool:
    "Print the three kinds with their intervals; do they lie apart?"
    low, high, mean = (table["pearson_delta"] for table in (scores.low, scores.high, scores.table))
    for kind in KINDS:
        print(f"  {kind:9s} {mean[kind]:.3f} [{low[kind]:.3f}, {high[kind]:.3f}]", flush=True)
    if quick:
        return bool(mean["know"] > mean["permuted"])
    return bool(low["know"] > high["permuted"] and low["permuted"] < high["none"])


def main() -> int:
    "Choose, measure, and print the tables; 1 where the claim does not hold."
    made = harness.parser(__doc__, pairs=None, quick="24 targets in three folds, one simulation")
    made.add_argument("--seeds", type=int, nargs="+", default=MEASURING, help="seeds of the simulations to measure on")
    options = made.parse_args()
    warnings.simplefilter("ignore")
    size, k, seeds = (QUICK, 3, options.seeds[:1]) if options.quick else (FULL, 5, options.seeds)
    held, start = [], time.time()
    chosen = choose(size, k)
    for seed in seeds:
        scores = measure(size, k, seed, chosen)
        print(f"simulation {seed}: pearson_delta of {len(scores.values('mse'))} held-out perturbations")
        held.append(kept(scores, options.quick))
        print(f"  {'apart' if held[-1] else 'NOT APART'}; {time.time() - start:.0f} s so far", flush=True)
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
