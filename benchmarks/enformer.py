"""A window of Enformer against enformer-pytorch's own forward pass, on one thread: seconds, peak memory, difference.

    python benchmarks/enformer.py [--length 196608] [--pairs 5] [--true-size] [--quick] [--gpu]

Random weights (also in the output layers of attention, which are 0 in a new model), the same positional features on
both sides. By default the model is a quarter as wide as the published one, with windows of the published length; both
sides run in turns, `--pairs` times. `--true-size` runs the published size once: ours in float32 and bfloat16, and
enformer-pytorch, which needs 4 GB. Peak memory is that of a separate process, everything included; seconds are
processor seconds, which other programs do not lengthen. `--gpu` measures windows per second in float32, TF32 and
bfloat16 on a CUDA GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import harness  # first: it sets the number of threads
import numpy as np
import torch

from scellfm.rosa import Enformer

PUBLISHED = dict(dim=1536, depth=11, heads=8, dim_divisible_by=128)
NARROW = dict(dim=384, depth=4, heads=2, dim_divisible_by=32, output_heads={"human": 5313})
MEMORY, NEAR = 2200, 1e-4  # MB, relative


def model_of(args, dtype="float32", device="cpu") -> Enformer:
    "The random model of this run."
    shape = PUBLISHED if args.true_size else NARROW
    published = args.length == 196_608  # enformer-pytorch has the published positions at this length only
    enformer = Enformer.from_config("published", device=device, use_tf_gamma=published, **shape)
    with torch.no_grad():
        torch.manual_seed(0)
        for layer in enformer.module.transformer:
            torch.nn.init.normal_(layer[0].fn[1].to_out.weight, std=0.02)
        liven(enformer)
    return Enformer(enformer.module, gammas=enformer.gammas, device=device, dtype=dtype)


def liven(enformer: Enformer) -> None:
    "Set the statistics of normalisation from random sequence, so that the output depends on the sequence."
    enformer.module.train()
    for norm in enformer.module.modules():
        if isinstance(norm, torch.nn.BatchNorm1d):
            norm.momentum = 1.0
    enformer.forward(window(16 * 128).to(enformer.device))
    enformer.module.eval()


def window(length: int) -> torch.Tensor:
    "Random bases [1, length]."
    return torch.from_numpy(np.random.default_rng(0).integers(0, 4, (1, length)).astype(np.uint8))


def ours(enformer: Enformer, codes) -> np.ndarray:
    "scellfm: the human head of all bins."
    return enformer.predict(codes)


@torch.inference_mode()
def theirs(enformer: Enformer, codes) -> np.ndarray:
    "enformer-pytorch's forward pass of the same module."
    enformer.module.crop_final.target_length = enformer.module.config.target_length
    return enformer.module(torch.nn.functional.one_hot(codes.long(), 4).float(), head="human").numpy()


SIDES = {"scellfm": ours, "enformer-pytorch": theirs}


def one_side(args) -> None:
    "One run of one side in this process: seconds, peak memory, and its output in a file."
    torch.set_num_threads(1)
    enformer = model_of(args, args.dtype)
    if args.length < 196_608:
        enformer.module.config.target_length = -1
    codes = window(args.length)
    start = time.process_time()
    output = SIDES[args.side](enformer, codes)
    seconds = time.process_time() - start
    np.save(args.out, output)
    print(json.dumps({"seconds": seconds, "mb": harness.peak_memory()}))


def run(args, side: str, length: int, dtype: str = "float32") -> tuple[dict, np.ndarray]:
    "One side in a separate process."
    out = Path(args.folder) / f"{side}-{length}-{dtype}.npy"
    command = [sys.executable, __file__, "--side", side, "--length", str(length), "--dtype", dtype, "--out", str(out)]
    command += ["--true-size"] if args.true_size else []
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found, np.load(out)


def report(name: str, found: dict) -> None:
    print(f"{name:42s} {found['seconds']:8.1f} s   peak memory {found['mb']:,.0f} MB", flush=True)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    "Largest difference, relative to the largest value."
    return float(np.abs(a - b).max() / np.abs(b).max())


def gpu(args) -> None:
    "Windows per second of the published size on a CUDA GPU."
    args.true_size = True
    codes = window(196_608).repeat(4, 1)
    reference = None
    for name, dtype, precision in (
        ("float32", "float32", "highest"),
        ("TF32", "float32", "high"),
        ("bfloat16",) * 2 + ("high",),
    ):
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = precision == "high"
        enformer = model_of(args, dtype, "cuda")
        embed = lambda: enformer.embed(codes, bins=[447, 448], batch_size=4)
        embed()
        torch.cuda.synchronize()
        start, runs = time.perf_counter(), 0
        while time.perf_counter() - start < 8:
            values, runs = embed(), runs + 1
        rate = 4 * runs / (time.perf_counter() - start)
        reference = values if reference is None else reference
        memory = torch.cuda.max_memory_allocated() / 2**30
        print(
            f"{name:10s} {rate:7.2f} windows/s; 20,000 genes in {20_000 / rate / 60:.0f} min; difference"
            f" {apart(values, reference):.1e}; {memory:.1f} GiB",
            flush=True,
        )


def main():
    parser = harness.parser(__doc__, quick="a quarter of the window, 3 pairs")
    parser.add_argument("--length", type=int, default=196_608)
    parser.add_argument("--true-size", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--folder", default=os.environ.get("TMPDIR", "."))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return one_side(args)
    if args.gpu:
        return gpu(args)
    if args.quick:
        args.length, args.pairs = args.length // 4, 3
    length = args.length
    ratios, seconds = [], {}
    for _ in range(1 if args.true_size else args.pairs):
        pair = {side: run(args, side, length) for side in SIDES}
        for side, (found, _) in pair.items():
            seconds.setdefault(side, []).append(found)
        ratios.append(pair["enformer-pytorch"][0]["seconds"] / pair["scellfm"][0]["seconds"])
    for side, found in seconds.items():
        middle = sorted(found, key=lambda one: one["seconds"])[len(found) // 2]
        report(f"{side}, {length:,} bases", middle)
    difference = apart(pair["scellfm"][1], pair["enformer-pytorch"][1])
    memory = max(found["mb"] for found in seconds["scellfm"])
    if args.true_size:
        full, output = pair["scellfm"]
        half, rounded = run(args, "scellfm", args.length, "bfloat16")
        report(f"scellfm, {args.length:,} bases, bfloat16", half)
        correlation = np.corrcoef(output.ravel(), rounded.ravel())[0, 1]
        print(f"bfloat16 against float32: correlation {correlation:.5f}, difference {apart(rounded, output):.1e}")
        memory = max(full["mb"], half["mb"])
    ratio = np.median(ratios)
    return harness.verdict(
        (f"ratio over {len(ratios)} pairs", ratio, "floor", 1),
        ("difference", difference, "ceiling", NEAR),
        ("peak memory in MB", memory, "ceiling", MEMORY),
    )


if __name__ == "__main__":
    sys.exit(main())
