"""On simulated data language that knows the modules helps held-out genes, and permuted language does not.

    python benchmarks/scgenept_simulation.py [--quick] [--seeds 1]

Singles of 40 genes in 3 modules, held out by gene in folds (each once); a tiny model from random weights; gene vectors
that know the modules, the same permuted, and none. Printed: pearson_delta on held-out genes with its interval over
perturbations. Exit code 1 where the interval of `know` does not lie above that of `permuted` (--quick: its mean)."""

import argparse
import sys
import time
import warnings

import numpy as np
import pandas as pd

from scellfm.data import simulate_perturbations
from scellfm.scgenept import PerturbationData, ScGenePT, perturbation_folds
from scellfm.scores import perturbation

SHAPE = dict(d_model=32, n_heads=2, d_hid=32, n_layers=1, dropout=0.0)
FULL = dict(n_targets=40, n_pairs=0, n_genes=44, n_modules=3, n_cells=12, n_controls=40)
QUICK = dict(n_targets=24, n_pairs=0, n_genes=30, n_modules=3, n_cells=8, n_controls=20)


def predictions(data, folds, vectors, seed: int, **training) -> pd.DataFrame:
    "The predicted mean of every perturbation by the model that did not see its gene."
    tables = []
    for split in folds:
        options = {} if vectors is None else dict(knowledge="programmes", gene_vectors=vectors)
        model = ScGenePT.from_config("tiny", data, seed=seed, device="cpu", **options, **SHAPE)
        model.fit(data, split, seed=seed, **training)
        tables.append(model.predict(split.perturbations("test"), n_controls=50))
    return pd.concat(tables)


def compare(size: dict, k: int, seeds: int, **training):
    "Scores of the three kinds of vectors, each the mean prediction of several seeds."
    simulated = simulate_perturbations(**size)
    data = PerturbationData(simulated.adata)
    folds = perturbation_folds(data.labels, k, seed=0)
    know = simulated.vectors["know"]
    kinds = {"know": know, "permuted": know.permuted(0), "none": None}
    found = {}
    for name, vectors in kinds.items():
        parts = [predictions(data, folds, vectors, seed, **training) for seed in range(seeds)]
        found[name] = sum(part.loc[parts[0].index] for part in parts) / len(parts)
    return perturbation(data, found, metrics=["pearson_delta", "mse"], train=data.labels)


def main() -> int:
    "Print the table; 1 where the claim does not hold."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    start = time.time()
    training = dict(epochs=60, batch_size=32, learning_rate=1e-2, decay=0.98)
    size, k = (QUICK, 3) if options.quick else (FULL, 4)
    scores = compare(size, k, options.seeds, **training)
    print(scores)
    low, high, mean = (table["pearson_delta"] for table in (scores.low, scores.high, scores.table))
    apart = mean["know"] > mean["permuted"] if options.quick else low["know"] > high["permuted"]
    print(
        f"know {mean['know']:.3f} [{low['know']:.3f}, {high['know']:.3f}], permuted {mean['permuted']:.3f}"
        f" [{low['permuted']:.3f}, {high['permuted']:.3f}], none {mean['none']:.3f}; {time.time() - start:.0f} s"
    )
    return 0 if np.all(apart) else 1


if __name__ == "__main__":
    sys.exit(main())
