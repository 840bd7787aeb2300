"""Every model that can be trained, trained for a few steps without dropout: its losses, by name.

Run as a script by each of two processes that share each batch; the first writes the losses into a file. Names of wings
after that file: these alone."""

import json
import os
import sys
import warnings

import numpy as np

STEPS = dict(steps=4, batch_size=7, seed=0)  # 7 rows: the processes have parts of unequal size
SETTLED = dict(n_boot=0, **STEPS)
ALONE = dict(n_boot=0, **STEPS | {"batch_size": 1})  # the second process has no row of its own


def without_dropout(gf):
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(gf.model.config, name, 0.0)
    for module in gf.model.modules():
        for name in ("p", "dropout_prob"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    return gf


def some_cells():
    from scellfm.data.cells import simulate_cells

    cells = simulate_cells(
        60, 40, cell_types=["B", "T"], donors=4, regulators=1, targets=3, programme_size=10, depth=200, seed=3
    )
    cells.obs["state"] = cells.obs["condition"].astype(object).where(np.arange(60) % 3 > 0)  # a label with gaps
    return cells


def geneformer():
    from scellfm.data import hold_out
    from scellfm.geneformer import Geneformer, RankTokenizer

    cells = some_cells()
    split = hold_out(cells, by="donor", fractions=(0.5, 0.25, 0.25))
    gf = without_dropout(Geneformer.from_config("tiny", RankTokenizer.fit(cells), device="cpu"))
    classes = {name: list(cells.var_names[cells.var["programme"] == name]) for name in ("B", "T")}
    return {
        "Geneformer, cells": gf.finetune(cells, "cell_type", split=split, freeze_layers=1, **SETTLED).history,
        "Geneformer, one cell a step": gf.finetune(cells, "cell_type", split=split, **ALONE).history,
        "Geneformer, adapters": gf.finetune(cells, "cell_type", split=split, lora=2, **SETTLED).history,
        "Geneformer, several labels": gf.finetune(cells, ["cell_type", "state"], split=split, **SETTLED).history,
        "Geneformer, genes": gf.finetune_genes(cells, classes, folds=2, **SETTLED).history,
        "Geneformer, pretraining": gf.pretrain(cells, **STEPS).history,
    }


def scgpt():
    from scellfm.data import hold_out
    from scellfm.scgpt import ScGPT

    cells = some_cells()
    split = hold_out(cells, by="donor", fractions=(0.5, 0.25, 0.25))
    size = dict(d_model=16, d_hid=16, n_heads=2, n_layers=2, dropout=0.0, device="cpu")
    gpt = ScGPT.from_config("tiny", cells, **size)
    normed = ScGPT.from_config("tiny", cells, batch_norm=True, **size)  # over a batch, the ends of short cells included
    learned = gpt.continue_pretraining(cells, label="cell_type", split=split, **SETTLED)
    return {
        "scGPT, pretraining": gpt.continue_pretraining(cells, split=split, **SETTLED).history,
        "scGPT, continual pretraining": learned.history,
        "scGPT, cells": gpt.finetune(cells, "cell_type", split=split, **SETTLED).history,
        "scGPT, normalised": normed.finetune(cells, "cell_type", split=split, **SETTLED).history,
        "scGPT, normalised, one cell a step": normed.finetune(cells, "cell_type", split=split, **ALONE).history,
    }


def scgenept():
    from scellfm.data import simulate_perturbations
    from scellfm.scgenept import PerturbationData, ScGenePT

    made = simulate_perturbations(n_targets=12, n_pairs=4, n_genes=40, n_modules=3, n_cells=6, n_controls=20)
    data, found = PerturbationData(made.adata), {}
    for original in (False, True):
        model = ScGenePT.from_config(
            "tiny",
            data,
            knowledge="programmes",
            gene_vectors=made.vectors["know"],
            original=original,
            d_model=16,
            n_heads=2,
            d_hid=16,
            n_layers=1,
            device="cpu",
        )
        model.fit(data, data.split("simulation", seed=1), dropout=0.0, max_genes=20, **STEPS)
        found[f"scGenePT, original={original}"] = model.history
    return found


def rosa():
    import anndata
    from scipy import sparse

    from scellfm.data import GeneVectors
    from scellfm.rosa import Rosa, hold_out_grid
    from scellfm.rosa.training import KINDS

    draws = np.random.default_rng(0)
    vectors = draws.normal(size=(90, 6))
    kind = np.arange(72) % 3
    rate = 3 * np.exp((vectors @ draws.normal(0, 0.6, (6, 3))).T[kind] - 0.5)
    cells = anndata.AnnData(sparse.csr_matrix(draws.poisson(rate).astype(np.float32)))
    cells.obs["donor"] = [f"d{i // 3 % 4}" for i in range(72)]
    cells.var_names = [f"G{i:03d}" for i in range(90)]
    vectors = GeneVectors(cells.var_names, vectors.astype(np.float32), None, {"source": "simulated"})
    grid = hold_out_grid(cells, cells="donor", seed=1)
    size = {"dim": 16, "heads": 2, "dim_head": 8, "depth": 1, "latents": 4, "latent_dim": 8, "dropout": 0.0}

    def trained(kind):
        model = Rosa(kind, loss="mse", device="cpu", size=size, asked=16, read=40)
        return model.fit(cells, vectors, grid, **{key: STEPS[key] for key in ("steps", "batch_size")}).history

    return {f"rosa, {kind}": trained(kind) for kind in KINDS if kind != "ridge"}


def enformer():
    from scellfm.rosa import Enformer

    draws = np.random.default_rng(0)  # 70 bins, more than a piece of the convolutions has; of 9 rows two remain
    codes, targets = draws.integers(0, 4, (12, 560)).astype(np.uint8), draws.random((12, 40, 1)).astype(np.float32)
    shape = dict(output_heads={"human": 1}, num_downsamples=3, dim=24, dim_divisible_by=6, depth=1, attn_dim_key=4)
    shape["target_length"] = 40
    without = dict.fromkeys(("dropout_rate", "attn_dropout", "pos_dropout"), 0.0)
    model = Enformer.from_config("tiny", device="cpu", **shape, **without)
    for name, value in model.module.named_parameters():
        # a bias before a normalisation has no gradient but rounding, which Adam would turn into steps of full size
        value.requires_grad_(not name.endswith(("stem.0.bias", ".0.2.bias", ".fn.2.bias", ".fn.4.bias")))
    return {"Enformer": model.fit(codes[:9], targets[:9], valid=(codes[9:], targets[9:]), **STEPS)}


WINGS = ("geneformer", "scgpt", "scgenept", "rosa", "enformer")


def histories(*wings: str) -> dict:
    "{model: [loss and gradient norm of each step, then the losses of each epoch]}; by default of every wing."
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for wing in wings or WINGS:
            found |= globals()[wing]()
    return {name: [values_of(row) for row in history.epoch_rows] + steps_of(history) for name, history in found.items()}


def values_of(row: dict) -> list:
    "The losses of one epoch."
    return [float(value) for name, value in row.items() if name.endswith("loss")]


def steps_of(history) -> list:
    "Loss and gradient norm of each step."
    return [[float(row[2]), float(row[4])] for row in history.step_rows]


if __name__ == "__main__":
    found = histories(*sys.argv[2:])
    if os.environ["RANK"] == "0":
        with open(sys.argv[1], "w") as file:
            json.dump(found, file)
