"""A training step of scGenePT at its true shape against the same maths through torch.nn.TransformerEncoder, one thread.

    python benchmarks/scgenept_step.py [--pairs 5] [--genes 1536] [--batch 2] [--quick]

512 dimensions, 8 heads, 12 layers, 1,536 genes, 2 cells, dropout 0.2, forward and backward. The variants take turns,
each in a separate process, with the same weights; without dropout their outputs are equal (checked with 96 genes).
Printed: medians over the pairs of processor seconds and of their ratios, and of the growth of the peak memory above the
model and its input. The exit code is 1 if a promise is missed: 1.2 times as fast with half the memory, and twice as
fast with dropout of attention weights off, which is the user's choice."""

import json
import statistics
import sys
import time

import harness  # first: it sets the number of threads
import torch
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


class TorchEncoder(nn.Module):
    "torch's own encoder with our weights."

    def __init__(self, ours: nn.Module):
        super().__init__()
        layer = nn.TransformerEncoderLayer(512, 8, 512, 0.2, batch_first=True)
        self.whole = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
        self.whole.load_state_dict(ours.state_dict())

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.whole(x)


def network(way: str, n_genes: int):
    "scGenePT with a language table of width 1,536; for 'torch' its layers are those of torch."
    from scellfm.scgenept.model import ScGenePTConfig, ScGenePTModel
    from scellfm.scgpt.model import ScGPTConfig

    torch.manual_seed(0)
    off = 0.0 if way.endswith("no attention dropout") else None
    sizes = ScGPTConfig(60_697, 60_694, dropout=0.2, attention_dropout=off, mvc=False, n_cls=1)
    model = ScGenePTModel(ScGenePTConfig(sizes, n_genes, {"ncbi": 1536}))
    if way == "torch":
        model.transformer_encoder = TorchEncoder(model.transformer_encoder)
    else:
        model.transformer_encoder.spare(lean=True)
    return model.train()


def one(way: str, n_cells: int, n_genes: int) -> dict:
    "Seconds of one step and its peak memory (no warm-up: a second step would reuse the memory of the first)."
    tokens, values, flags, rows, targets = inputs(n_cells, n_genes)
    model = network(way, n_genes)
    before, start = harness.peak_memory(reset=True), time.process_time()
    loss = ((model(tokens, values, flags, rows) - targets) ** 2).mean()
    loss.backward()
    return {"seconds": time.process_time() - start, "megabytes": harness.peak_memory() - before}


@torch.no_grad()
def difference() -> float:
    "The largest difference between the outputs of the variants without dropout, on 96 genes."
    tokens, values, flags, rows, _ = inputs(2, 96)
    found = [network(way, 96).eval()(tokens, values, flags, rows) for way in WAYS]
    return max(float((part - found[0]).abs().max()) for part in found[1:])


def measure(n_pairs: int, n_cells: int, n_genes: int) -> dict[str, list[dict]]:
    "The variants in turns, each in a separate process."
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    for _ in range(n_pairs):
        for way in WAYS:
            found[way].append(harness.figures_of(__file__, "--way", way, "--genes", n_genes, "--batch", n_cells))
            print(way, found[way][-1], flush=True)
    return found


def ratio(found: dict[str, list[dict]], way: str, key: str) -> float:
    "The median over pairs of what torch needs, relative to what this variant needs."
    return statistics.median(base[key] / mine[key] for base, mine in zip(found["torch"], found[way]))


def main() -> int:
    "Take turns, print the table, and say whether the promises are kept."
    made = harness.parser(__doc__, quick="512 genes, one pair: no promise is made for this size")
    made.add_argument("--genes", type=int, default=1536)
    made.add_argument("--batch", type=int, default=2)
    made.add_argument("--way", choices=WAYS)
    options = made.parse_args()
    if options.way:
        print(json.dumps(one(options.way, options.batch, options.genes)))
        return 0
    n_pairs, n_genes = (1, 512) if options.quick else (options.pairs, options.genes)
    found, away = measure(n_pairs, options.batch, n_genes), difference()
    for way in WAYS:
        seconds, megabytes = (statistics.median(row[key] for row in found[way]) for key in ("seconds", "megabytes"))
        print(f"{way}: {seconds:.1f} s, peak {megabytes:,.0f} MB above the model")
    checks = [("largest difference of outputs without dropout", away, "ceiling", 1e-4)]
    if not options.quick:
        ours, without = WAYS[1:]
        checks += [
            ("times as fast", ratio(found, ours, "seconds"), "floor", 1.2),
            ("share of the peak memory", 1 / ratio(found, ours, "megabytes"), "ceiling", 0.5),
            ("times as fast without attention dropout", ratio(found, without, "seconds"), "floor", 2),
        ]
    return harness.verdict(*checks)


if __name__ == "__main__":
    sys.exit(main())
