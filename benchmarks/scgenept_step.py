"""A training step of scGenePT at its true shape against the same maths through torch.nn.TransformerEncoder, one thread.

    python benchmarks/scgenept_step.py [--repeats 3] [--genes 1536] [--batch 2]

512 dimensions, 8 heads, 12 layers, 1,536 genes, 2 cells, dropout 0.2, forward and backward. The ways take turns in
processes of their own; printed are medians of processor seconds, their ratios, and the peak of memory above import.
Promises: 1.2 times as fast with half the peak, and twice as fast with dropout of attention weights off, which is the
user's choice."""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
from harness import peak_memory
from torch import nn

WAYS = ("torch", "scellfm", "scellfm, no attention dropout")


def inputs(n_cells: int, n_genes: int):
    "Tokens, values, flags, rows, targets of a step."
    torch.manual_seed(0)
    tokens = torch.randint(0, 60_000, (n_cells, n_genes))
    flags = torch.zeros(n_cells, n_genes, dtype=torch.long)
    flags[:, 0] = 1
    rows = torch.arange(n_genes).expand(n_cells, -1)
    return tokens, torch.rand(n_cells, n_genes) * 3, flags, rows, torch.rand(n_cells, n_genes)


def network(way: str, n_genes: int):
    "scGenePT with a language table of width 1,536; for 'torch' its layers are those of torch."
    from scellfm.scgenept.model import ScGenePTConfig, ScGenePTModel
    from scellfm.scgpt.model import ScGPTConfig

    off = 0.0 if way.endswith("no attention dropout") else None
    sizes = ScGPTConfig(60_697, 60_694, dropout=0.2, attention_dropout=off, mvc=False, n_cls=1)
    model = ScGenePTModel(ScGenePTConfig(sizes, n_genes, {"ncbi": 1536})).train()
    if way == "torch":
        layer = nn.TransformerEncoderLayer(512, 8, 512, 0.2, batch_first=True)
        whole = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False).train()
        model.transformer_encoder.forward = lambda x, mask=None: whole(x)
        model.torch_layers = whole
    else:
        model.transformer_encoder.spare(lean=True)
    return model


def one(way: str, n_cells: int, n_genes: int) -> dict:
    "Seconds of one step (after none to warm up: the second would profit from the memory of the first), and its peak."
    torch.set_num_threads(1)
    tokens, values, flags, rows, targets = inputs(n_cells, n_genes)
    model = network(way, n_genes)
    before, start = peak_memory(), time.process_time()
    loss = ((model(tokens, values, flags, rows) - targets) ** 2).mean()
    loss.backward()
    return {"seconds": time.process_time() - start, "megabytes": peak_memory() - before}


def main() -> None:
    "Take turns, and print the table."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--genes", type=int, default=1536)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--way", choices=WAYS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(one(options.way, options.batch, options.genes)))
        return
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way in WAYS:
            sizes = ["--genes", str(options.genes), "--batch", str(options.batch)]
            run = [sys.executable, __file__, "--way", way, *sizes]
            found[way].append(json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout))
            print(way, found[way][-1], flush=True)
    for way in WAYS:
        ratios = [base["seconds"] / mine["seconds"] for base, mine in zip(found["torch"], found[way])]
        peaks = [mine["megabytes"] / base["megabytes"] for base, mine in zip(found["torch"], found[way])]
        seconds = statistics.median(row["seconds"] for row in found[way])
        megabytes = statistics.median(row["megabytes"] for row in found[way])
        print(
            f"{way}: {seconds:.1f} s, peak {megabytes:,.0f} MB; {statistics.median(ratios):.2f} times as fast,"
            f" {statistics.median(peaks):.2f} of the memory"
        )


if __name__ == "__main__":
    main()
