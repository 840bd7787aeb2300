"""Ten variants of one window against eleven forward passes, on one thread: processor seconds, ratio, difference.

    python benchmarks/variant_effects.py [--variants 10] [--pairs 5] [--true-size] [--quick]

Ours reads the window once and computes, for each single-base change, the convolutions of the few bins that it changes
and all attention layers. The reference runs enformer-pytorch's forward pass once for the window and once for each
variant. Both give the human tracks of the bins around the start. Random weights; the model is a quarter as wide as the
published one, with windows of the published length; the sides take turns. `--true-size` runs the published size once;
its reference is eleven times one forward pass of our own code, which is faster and needs less memory than
enformer-pytorch's.
"""

import sys

import harness  # first: it sets the number of threads
import numpy as np
import torch
from enformer import model_of, theirs, window

from scellfm.rosa.substitution import WindowReader

FLOOR, NEAR = 3.0, 1e-4
BINS = [446, 447, 448, 449]


def ours(enformer, codes, changes) -> np.ndarray:
    "The window and its variants [1 + variants, bins, tracks]."
    reader = WindowReader(enformer, codes, tracks=slice(None), strands="forward")
    return np.concatenate([reader.reference(BINS)[None], reader.substituted(changes, BINS)])


def forwards(enformer, codes, changes) -> np.ndarray:
    "The same with whole forward passes of enformer-pytorch."
    results = [theirs(enformer, codes)[0, BINS]]
    for place, code in changes:
        changed = codes.clone()
        changed[0, place] = code
        results.append(theirs(enformer, changed)[0, BINS])
    return np.stack(results)


def main() -> int:
    parser = harness.parser(__doc__, quick="1 pair")
    parser.add_argument("--variants", type=int, default=10)
    parser.add_argument("--true-size", action="store_true")
    args = parser.parse_args()
    args.length = 196_608
    torch.set_num_threads(1)
    enformer, codes = model_of(args), window(196_608)
    places = np.random.default_rng(1).integers(96_000, 100_000, args.variants)
    changes = [(int(place), int(codes[0, place] + 1) % 4) for place in places]
    ratios, pairs = [], 1 if args.true_size or args.quick else args.pairs
    for _ in range(pairs):
        _, took, found = harness.timed(lambda: ours(enformer, codes, changes))
        if args.true_size:
            _, once, one = harness.timed(lambda: enformer.predict(codes, bins=BINS))
            reference, (place, code) = once * (1 + args.variants), changes[0]
            changed = codes.clone()
            changed[0, place] = code
            expected = np.concatenate([one, enformer.predict(changed, bins=BINS)])
        else:
            _, reference, expected = harness.timed(lambda: forwards(enformer, codes, changes))
        ratios.append(reference / took)
        print(f"scellfm {took:.1f} s, {1 + args.variants} forward passes {reference:.1f} s", flush=True)
    difference = float(np.abs(found[: len(expected)] - expected).max() / np.abs(expected).max())
    moved = float(np.abs(found[1:] - found[0]).max() / np.abs(found[0]).max())
    ratio = float(np.median(ratios))
    print(f"median of {pairs} pairs; variants change predictions by up to {moved:.1e}")
    return harness.verdict(("ratio", ratio, "floor", FLOOR), ("difference", difference, "ceiling", NEAR))


if __name__ == "__main__":
    sys.exit(main())
