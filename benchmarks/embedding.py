"""Embedding cells of mixed length against random batches padded to their longest cell, on one thread.

    python benchmarks/embedding.py [--cells 128] [--pairs 5] [--quick]

The shape of Geneformer V1-10M (random weights) and lengths distributed like those of PBMC (median 1,000, at most 2,048
genes). Both sides run the same encoder up to the second to last layer: scellfm in its own batches, the reference in
random batches of 16 cells with an attention mask, in turns, in one process. Printed: median seconds, the ratio, the
peak memory of each side in a separate process, and the largest difference of the embeddings.
"""

import argparse
import copy
import sys

import harness  # first: it sets the number of threads
import numpy as np
import pandas as pd
import torch

from scellfm.geneformer import Geneformer, RankTokenizer, TokenizedCells
from scellfm.geneformer.model import layer_index, pool_cells
from scellfm.inference import pad

VOCABULARY, BATCH, FLOOR = 25_426, 16, 1.5


def problem(args) -> tuple[Geneformer, TokenizedCells]:
    "A random model of the published shape and random cells of mixed length."
    torch.set_num_threads(1)
    genes = [f"ENSG{i:011d}" for i in range(VOCABULARY - 2)]
    dictionary = {name: i for i, name in enumerate(["<pad>", "<mask>", *genes])}
    gf = Geneformer.from_config("V1-10M", RankTokenizer(dictionary, dict.fromkeys(genes, 1.0)), device="cpu")
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(1000 * args.scale), 0.55, args.cells), 50, 2048).astype(int)
    tokens = np.concatenate([random.permutation(VOCABULARY - 2)[:n] + 2 for n in lengths])
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(args.cells)])
    return gf, TokenizedCells(
        tokens.astype(np.uint16), np.concatenate([[0], np.cumsum(lengths)]), obs, np.arange(args.cells)
    )


def ours(gf: Geneformer, cells: TokenizedCells) -> np.ndarray:
    "scellfm."
    return gf.embed(cells)


@torch.inference_mode()
def random_batches(gf: Geneformer, cells: TokenizedCells) -> np.ndarray:
    "The reference: the same encoder on random batches padded to their longest."
    encoder = copy.deepcopy(gf.model.bert)
    encoder.encoder.layer = encoder.encoder.layer[: layer_index(-1, gf.n_layers)]
    order, out = (
        np.random.default_rng(1).permutation(len(cells)),
        np.empty((len(cells), gf.model.config.hidden_size), np.float32),
    )
    for start in range(0, len(cells), BATCH):
        rows = order[start : start + BATCH]
        ids, mask = pad([cells[int(i)] for i in rows])
        out[rows] = pool_cells(encoder(ids, attention_mask=mask.long()).last_hidden_state, mask, special=False)
    return out


SIDES = {"scellfm": ours, "random batches": random_batches}


def main() -> int:
    parser = harness.parser(__doc__, quick="64 cells of a quarter of the length, 3 pairs")
    parser.add_argument("--cells", type=int, default=128)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the lengths")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.cells, args.scale, args.pairs = 64, 0.25, 3
    gf, cells = problem(args)
    if args.side:
        return harness.print_growth(lambda: SIDES[args.side](gf, cells))
    for side in SIDES.values():  # warm up
        side(gf, cells[:2])
    pairs = harness.Pairs({name: lambda side=side: side(gf, cells) for name, side in SIDES.items()}, args.pairs)
    for name in SIDES:
        memory = harness.growth_of(__file__, "--side", name, "--cells", args.cells, "--scale", args.scale)
        rate = len(cells) / pairs.median(name)
        print(f"{name:16s} {pairs.median(name):8.2f} s  {rate:8.1f} cells/s  peak memory +{memory:,.0f} MB")
    print(f"{args.cells} cells, mean length {cells.lengths.mean():.0f}, median of {args.pairs} pairs")
    difference = np.abs(pairs.results["scellfm"] - pairs.results["random batches"]).max()
    return harness.verdict(
        ("ratio", pairs.ratio("scellfm", "random batches"), "floor", FLOOR),
        ("largest difference of the embeddings", difference, "ceiling", 1e-5),
    )


if __name__ == "__main__":
    sys.exit(main())
