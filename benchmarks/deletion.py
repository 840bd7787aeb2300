"""Deletion of every gene of a cell, against BertForMaskedLM with all hidden states on the same batches, on one thread.

    python benchmarks/deletion.py [--kind delete] [--cells 1] [--genes 300] [--pairs 5] [--quick]

The shape of Geneformer V1-10M (6 layers, hidden size 256, 25,426 tokens, random weights), the second to last layer.
Both sides make the same edits in batches of the same size, in turns, in one process. Printed: median seconds, the
ratio, the peak memory of each side in a separate process, and the largest difference of the shifts.
overexpression.py is the same with --kind overexpress."""

import argparse
import sys

import harness  # first: it sets the number of threads
import numpy as np
import pandas as pd
import torch

from scellfm.geneformer import Geneformer, RankTokenizer, TokenizedCells
from scellfm.geneformer.perturbation.runner import perturb
from scellfm.inference import plan_batches

VOCABULARY, BUDGET, FLOOR = 25_426, 16_384, 4.0


def problem(args) -> tuple[Geneformer, TokenizedCells]:
    "A random model of the published shape and random cells."
    torch.set_num_threads(1)
    genes = [f"ENSG{i:011d}" for i in range(VOCABULARY - 2)]
    dictionary = {name: i for i, name in enumerate(["<pad>", "<mask>", *genes])}
    gf = Geneformer.from_config("V1-10M", RankTokenizer(dictionary, dict.fromkeys(genes, 1.0)), device="cpu")
    random = np.random.default_rng(0)
    tokens = [random.permutation(VOCABULARY - 2)[: args.genes] + 2 for _ in range(args.cells)]
    offsets = np.arange(args.cells + 1) * args.genes
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(args.cells)])
    return gf, TokenizedCells(np.concatenate(tokens).astype(np.uint16), offsets, obs, np.arange(args.cells))


def ours(gf: Geneformer, cells: TokenizedCells, kind: str) -> np.ndarray:
    "scellfm: 1 - mean cosine of the genes that were not edited, per edit."
    return perturb(gf, cells, kind=kind, token_budget=BUDGET).shifts["shift"].to_numpy()


@torch.inference_mode()
def masked_lm(gf: Geneformer, cells: TokenizedCells, kind: str) -> np.ndarray:
    "The reference: the whole BertForMaskedLM with all hidden states."
    shifts, moved = [], int(kind == "overexpress")
    for i in range(len(cells)):
        ids = torch.from_numpy(cells[i])
        before = gf.model(ids[None], output_hidden_states=True).hidden_states[-2][0]
        genes = torch.arange(moved, len(ids))  # the top gene cannot be moved further up
        others = (
            torch.arange(len(ids)).expand(len(genes), -1)[torch.arange(len(ids)) != genes[:, None]].view(len(genes), -1)
        )
        edited = torch.cat([genes[:, None], others], 1) if moved else others
        for batch in plan_batches(np.full(len(genes), edited.shape[1]), BUDGET, spread=0):
            after = gf.model(ids[edited[batch]], output_hidden_states=True).hidden_states[-2][:, moved:]
            shifts.append(1 - torch.cosine_similarity(after, before[others[batch]], dim=-1).mean(1).numpy())
    return np.concatenate(shifts)


SIDES = {"scellfm": ours, "BertForMaskedLM": masked_lm}


def main(kind: str = "delete") -> int:
    parser = harness.parser(__doc__, quick="100 genes, 3 pairs")
    parser.add_argument("--kind", choices=("delete", "overexpress"), default=kind)
    parser.add_argument("--cells", type=int, default=1)
    parser.add_argument("--genes", type=int, default=300)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.genes, args.pairs = 100, 3
    gf, cells = problem(args)
    if args.side:
        return harness.print_growth(lambda: SIDES[args.side](gf, cells, args.kind))
    small = cells[:1]
    for side in SIDES.values():  # warm up
        side(gf, TokenizedCells(small.tokens[:20], np.array([0, 20]), small.obs, small.cell_index), args.kind)
    sides = {name: lambda side=side: side(gf, cells, args.kind) for name, side in SIDES.items()}
    pairs, size = harness.Pairs(sides, args.pairs), ("--cells", args.cells, "--genes", args.genes)
    for name, found in pairs.results.items():
        memory = harness.growth_of(__file__, "--side", name, "--kind", args.kind, *size)
        rate = len(found) / pairs.median(name)
        print(f"{name:16s} {pairs.median(name):8.2f} s  {rate:8.1f} edits/s  peak memory +{memory:,.0f} MB")
    ours, theirs = (pairs.results[name] for name in SIDES)
    print(
        f"{args.kind}, {args.cells} cells of {args.genes} genes, median of {args.pairs} pairs; "
        f"shifts up to {np.abs(ours).max():.1e}"
    )
    return harness.verdict(
        ("ratio", pairs.ratio("scellfm", "BertForMaskedLM"), "floor", FLOOR),
        ("largest difference of the shifts", np.abs(ours - theirs).max(), "ceiling", 1e-5),
    )


if __name__ == "__main__":
    sys.exit(main())
