"""Seconds and memory of one training step of rosa's networks, by the number of genes of a cell, on one thread.

    python benchmarks/rosa_step.py [--genes 1000 5000 20000] [--steps 3] [--batch 1] [--limit 12] [--quick]

rosa's README gives linear attention (performer, perceiver) as the way to long contexts. Here each network of the small
shape, with gene vectors of 3,072 numbers, reads 80 % of the genes of a cell and predicts the rest: forward, backward,
and a step of AdamW. 'transformer' is ours, which never stores a matrix of all pairs of genes; 'matrix' is the same
network with this matrix stored, as such networks were written when the original chose between them. Each row is a
separate process, which may use --limit GB. Printed: the median seconds of a step after the first, which warms up; the
memory that the steps add at their peak, weights and inputs not counted; both relative to the transformer.
"""

import json
import resource
import subprocess
import sys

from harness import parser, peak_memory, timed

KINDS = ("transformer", "matrix", "performer", "perceiver", "encoder_decoder")
WIDTH = 3072


def steps_of(kind: str, genes: int, steps: int, batch: int) -> dict:
    "Median seconds of training steps and the memory that they add (MB), in this process."
    from contextlib import nullcontext
    from statistics import median

    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from scellfm.rosa.losses import mse
    from scellfm.rosa.networks import NetworkConfig, build_network

    torch.set_num_threads(1)
    name = "transformer" if kind == "matrix" else kind
    network = build_network(name, NetworkConfig(width=WIDTH, n_out=1), seed=0).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    draw, asked = torch.Generator().manual_seed(0), genes // 5
    vectors = torch.randn(genes, WIDTH, generator=draw)
    bins = torch.randint(0, 8, (batch, genes), generator=draw)
    values = torch.randn(batch, asked, generator=draw)

    def step() -> None:
        answers = network.answer(bins[:, asked:], vectors[asked:], vectors[:asked])
        total, number = mse(answers, values)
        optimizer.zero_grad(set_to_none=True)
        (total / number).backward()
        optimizer.step()

    before = peak_memory(reset=True)
    with sdpa_kernel(SDPBackend.MATH) if kind == "matrix" else nullcontext():
        seconds = [timed(step)[0] for _ in range(steps + 1)][1:]
    return {"seconds": median(seconds), "mb": peak_memory() - before}


def measured(kind: str, genes: int, args) -> dict | None:
    "The same in a separate process; None if it needs more memory than it may use."
    command = [sys.executable, __file__, "--one", kind, "--genes", str(genes), "--limit", str(args.limit)]
    command += ["--steps", str(args.steps), "--batch", str(args.batch)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "alloc" not in done.stderr and "MemoryError" not in done.stderr:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def row_of(kind: str, genes: int, found: dict | None, base: dict | None, limit: float) -> str:
    "One line of the table."
    name = f"{genes:>6,} genes  {kind:<16}"
    if found is None:
        return f"{name} needs more than {limit:g} GB"
    figures = f"{name} {found['seconds']:8.3f} s {found['mb']:8,.0f} MB"
    if not base:
        return figures
    times, memory = found["seconds"] / base["seconds"], found["mb"] / max(base["mb"], 1e-9)
    return f"{figures}  ({times:.2f} x the time, {memory:.2f} x the memory of the transformer)"


def main() -> None:
    "Measure and print."
    reader = parser(__doc__, pairs=None, quick="300 and 600 genes, one step")
    reader.add_argument("--genes", type=int, nargs="+", default=[1000, 5000, 20000])
    reader.add_argument("--steps", type=int, default=3)
    reader.add_argument("--batch", type=int, default=1)
    reader.add_argument("--limit", type=float, default=12, help="GB that a network may use")
    reader.add_argument("--one", choices=KINDS, help="measure one kind in this process and print JSON")
    args = reader.parse_args()
    if args.one:
        resource.setrlimit(resource.RLIMIT_DATA, (int(args.limit * 2**30),) * 2)
        print(json.dumps(steps_of(args.one, args.genes[0], args.steps, args.batch)))
        return
    if args.quick:
        args.genes, args.steps = [300, 600], 1
    for genes in args.genes:
        base = None
        for kind in KINDS:
            found = measured(kind, genes, args)
            print(row_of(kind, genes, found, base, args.limit), flush=True)
            base = base or found


if __name__ == "__main__":
    main()
