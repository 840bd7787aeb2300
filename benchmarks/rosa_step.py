"""Seconds and memory of one training step of rosa's networks, by the number of genes of a cell, on one thread.

    python benchmarks/rosa_step.py [--genes 1000 5000 20000] [--steps 3] [--batch 1] [--quick]

rosa's README gives linear attention (performer, perceiver) as the way to long contexts. Here each network of the small
shape, with gene vectors of 3,072 numbers, reads 80 % of the genes of a cell and is asked for the rest: forward,
backward, and a step of AdamW. Each cell of the table is a process of its own; printed are the median seconds of a step,
the peak memory above that of a process that has imported everything and built the network, and both relative to the
exact transformer.
"""

import argparse
import json
import subprocess
import sys
import time

import harness  # first: it sets the number of threads
import numpy as np
import torch

from scellfm.rosa.losses import mse
from scellfm.rosa.networks import NetworkConfig, build_network

KINDS = ("transformer", "performer", "perceiver", "encoder_decoder")
WIDTH = 3072


def one(kind: str, genes: int, steps: int, batch: int) -> dict:
    "Median seconds and peak memory of training steps, in this process."
    torch.set_num_threads(1)
    network = build_network(kind, NetworkConfig(width=WIDTH, n_out=1), seed=0).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    draw, asked = torch.Generator().manual_seed(0), genes // 5
    vectors = torch.randn(genes, WIDTH, generator=draw)
    bins = torch.randint(0, 8, (batch, genes), generator=draw)
    values = torch.randn(batch, asked, generator=draw)
    before, seconds = harness.peak_memory(), []
    for _ in range(steps):
        start = time.perf_counter()
        answers = network.answer(bins[:, asked:], vectors[asked:], vectors[:asked])
        total, number = mse(answers, values)
        optimizer.zero_grad(set_to_none=True)
        (total / number).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": float(np.median(seconds)), "memory": harness.peak_memory() - before}


def measured(kind: str, genes: int, args) -> dict | None:
    "The same in a process of its own; None where it failed, for instance for want of memory."
    command = [sys.executable, __file__, "--one", kind, "--genes", str(genes)]
    command += ["--steps", str(args.steps), "--batch", str(args.batch)]
    done = subprocess.run(command, capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else None


def main() -> None:
    "Measure and print."
    parser = harness.parser(__doc__, pairs=None, quick="300 and 600 genes, two steps")
    parser.add_argument("--genes", type=int, nargs="+", default=[1000, 5000, 20000])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.genes[0], args.steps, args.batch)))
        return
    if args.quick:
        args.genes, args.steps = [300, 600], 2
    for genes in args.genes:
        base = None
        for kind in KINDS:
            found = measured(kind, genes, args)
            if found is None:
                print(f"{genes:>6,} genes  {kind:<16} failed (memory?)", flush=True)
                continue
            base = base or found
            ratio = f"{found['seconds'] / base['seconds']:.2f} x the time"
            ratio += f", {found['memory'] / max(base['memory'], 1e-9):.2f} x the memory of the transformer"
            figures = f"{found['seconds']:.3f} s  {found['memory']:,.0f} MB"
            print(f"{genes:>6,} genes  {kind:<16} {figures}  ({ratio})", flush=True)


if __name__ == "__main__":
    main()
