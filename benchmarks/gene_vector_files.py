"""Reading a published dictionary of gene vectors: 20,000 lists of 1,536 floats in a pickle, which is never executed.

    python benchmarks/gene_vector_files.py [--genes 20000] [--width 1536] [--quick]

Printed: seconds of `read_vectors` in a separate process, growth of its peak memory above the imports, and the same for
pickle itself. Limits: 10 s of the processor and 1 GB. Exit code 1 if a limit is exceeded or a number differs."""

import argparse
import json
import pickle
import sys
import tempfile
import time
from pathlib import Path

import harness  # first: it sets the number of threads
import numpy as np

SECONDS, MEGABYTES = 10, 1024


def table(genes: int, width: int) -> np.ndarray:
    "The numbers, the same in every process."
    return np.random.default_rng(0).standard_normal((genes, width))


def run_side(side: str, path: str) -> dict:
    "Read the file once, after the imports."
    import scellfm.assets.dictionaries  # noqa: F401
    from scellfm.data import read_vectors

    before, start, busy = harness.peak_memory(reset=True), time.perf_counter(), time.process_time()
    if side == "pickle":
        with open(path, "rb") as file:
            found = pickle.load(file)
        values = np.array([found["G0"], found["G1"]])
    else:
        values = read_vectors(path).values[:2]
    found = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - busy}
    return found | {"mb": harness.peak_memory() - before, "rows": np.asarray(values, dtype=float).tolist()}


def main() -> int:
    parser = harness.parser(__doc__, pairs=None, quick="2,000 genes")
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--side", choices=("scellfm", "pickle"), help=argparse.SUPPRESS)
    parser.add_argument("--input", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run_side(options.side, options.input)))
        return 0
    genes = 2000 if options.quick else options.genes
    kept = True
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.pickle"
        values = table(genes, options.width)
        path.write_bytes(pickle.dumps({f"G{i}": row.tolist() for i, row in enumerate(values)}))
        print(f"{genes:,} lists of {options.width:,} floats, {path.stat().st_size / 2**20:.0f} MB")
        for side in ("scellfm", "pickle"):
            found = harness.figures_of(__file__, "--side", side, "--input", path)
            print(f"{side:8s} {found['seconds']:6.2f} s, {found['cpu']:5.2f} s CPU, peak memory +{found['mb']:,.0f} MB")
            same = np.allclose(found["rows"], values[:2], rtol=1e-6)
            if side == "scellfm":
                kept = same and found["cpu"] < SECONDS and found["mb"] < MEGABYTES
    print("kept" if kept else f"broken: the limits are {SECONDS} s CPU and {MEGABYTES} MB, with equal numbers")
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
