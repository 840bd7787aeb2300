"""From an h5ad file to saved tokens, against the same loop with Hugging Face's Dataset.from_generator, on one thread.

    python benchmarks/tokenize_file.py [--cells 20000] [--genes 20000] [--pairs 5] [--quick]

A synthetic file (about 9 % of the entries are not zero; CSR, not compressed, in the page cache) is written to a temporary
folder. Each run is a fresh process; its time counts from the call to the saved data set, its memory from after the imports.
The reference reads the same blocks with h5py, ranks each cell with a stable double precision argsort and yields it to
Dataset.from_generator, then save_to_disk. The last lines tokenize a file of half the length, to show that memory does not grow.
"""
import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "ARROW_NUM_THREADS"):
    os.environ[name] = "1"
os.environ["SCELLFM_PROGRESS"] = "0"

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SIDES = ("scellfm", "from_generator")


def peak() -> float:
    "Peak memory of this process so far, MB."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_file(path: Path, n_cells: int, n_genes: int) -> None:
    "An h5ad file of synthetic counts, and the dictionaries beside it."
    import anndata
    import pandas as pd
    from rank_encoding import synthetic_counts, synthetic_medians

    genes = [f"ENSG{i:011d}" for i in range(n_genes)]
    x = synthetic_counts(n_cells, n_genes)
    obs = pd.DataFrame({"n_counts": np.asarray(x.sum(axis=1)).ravel()}, index=[f"cell{i}" for i in range(n_cells)])
    anndata.AnnData(x, obs=obs, var=pd.DataFrame(index=genes)).write_h5ad(path)
    tokens = {name: i for i, name in enumerate(["<pad>", "<mask>", *genes])}
    (path.parent / "token_dictionary.json").write_text(json.dumps(tokens))
    (path.parent / "gene_median_dictionary.json").write_text(json.dumps(dict(zip(genes, synthetic_medians(n_genes)))))


def reference(path: Path, out: Path) -> None:
    "Read blocks, argsort every cell, Dataset.from_generator, save_to_disk."
    import h5py
    from anndata.io import read_elem
    from datasets import Dataset

    token_of = json.loads((path.parent / "token_dictionary.json").read_text())
    median_of = json.loads((path.parent / "gene_median_dictionary.json").read_text())

    def cells():
        with h5py.File(path) as file:
            genes = read_elem(file["var"]).index
            tokens, medians = np.array([token_of[g] for g in genes]), np.array([median_of[g] for g in genes])
            totals, indptr = file["obs/n_counts"][:], file["X/indptr"][:]
            for first in range(0, len(totals), 512):
                last = min(first + 512, len(totals))
                low = indptr[first]
                data, indices = file["X/data"][low:indptr[last]].astype(np.float64), file["X/indices"][low:indptr[last]]
                for cell in range(first, last):
                    at = slice(indptr[cell] - low, indptr[cell + 1] - low)
                    values = data[at] / medians[indices[at]]
                    ids = tokens[indices[at][np.argsort(-values, kind="stable")[:2048]]]
                    yield {"input_ids": ids, "length": len(ids)}

    Dataset.from_generator(cells, cache_dir=str(out.parent / "cache")).save_to_disk(str(out))


def ours(path: Path, out: Path) -> None:
    "scellfm."
    from scellfm.geneformer import RankTokenizer

    RankTokenizer.from_pretrained(path.parent).tokenize_files(path, out)


def child(side: str, path: Path, out: Path) -> None:
    "One run of one side; prints its seconds and memory."
    import anndata.io  # noqa: F401
    import datasets
    from scellfm.geneformer import kernels, tokenizer  # noqa: F401

    datasets.disable_progress_bars()
    before, wall, busy = peak(), time.perf_counter(), time.process_time()
    (ours if side == "scellfm" else reference)(path, out)
    print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - busy, "mb": peak() - before}))


def start(side: str, path: Path, out: Path) -> dict:
    "One run in a fresh process."
    shutil.rmtree(out, ignore_errors=True)
    done = subprocess.run([sys.executable, __file__, "--child", side, str(path), str(out)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    shutil.rmtree(out.parent / "cache", ignore_errors=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(ours: Path, theirs: Path) -> str:
    "The largest difference of the saved tokens."
    from scellfm.geneformer import TokenizedCells

    a, b = TokenizedCells.load(ours), TokenizedCells.load(theirs)
    if not np.array_equal(a.offsets, b.offsets):
        return "cells have other lengths"
    return str(np.abs(a.tokens.astype(np.int64) - b.tokens).max())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="2,000 cells, 1 pair")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child[0], Path(args.child[1]), Path(args.child[2]))
    if args.quick:
        args.cells, args.pairs = 2000, 1
    with tempfile.TemporaryDirectory() as folder:
        path, half = Path(folder) / "whole" / "cells.h5ad", Path(folder) / "half" / "cells.h5ad"
        for file, n_cells in ((path, args.cells), (half, args.cells // 2)):
            file.parent.mkdir()
            write_file(file, n_cells, args.genes)
        outs = {side: Path(folder) / f"{side}.dataset" for side in SIDES}
        start("scellfm", half, Path(folder) / "warm.dataset")  # compiles the kernels, as the first run after installation does
        runs = {side: [] for side in SIDES}
        for _ in range(args.pairs):
            for side in SIDES:
                runs[side].append(start(side, path, outs[side]))
        print(f"{args.cells:,} cells x {args.genes:,} genes, {path.stat().st_size / 2**20:,.0f} MiB (not compressed), one thread, "
              f"median of {args.pairs} pairs")
        for side in SIDES:
            wall, cpu, mb = (np.median([run[key] for run in runs[side]]) for key in ("wall", "cpu", "mb"))
            print(f"{side:15s} {wall:6.2f} s wall, {cpu:6.2f} s CPU, {args.cells / wall:8,.0f} cells/s, peak above import {mb:5.0f} MB")
        for key in ("wall", "cpu"):
            ratio = np.median([b[key] / a[key] for a, b in zip(runs["scellfm"], runs["from_generator"])])
            print(f"ratio {ratio:.1f}x {key} (floor 8x)")
        shorter = start("scellfm", half, Path(folder) / "half.dataset")
        print(f"half the file: {shorter['wall']:.2f} s, peak above import {shorter['mb']:.0f} MB (floor: below 400 MB, not growing)")
        print(f"largest difference of tokens: {compare(outs['scellfm'], outs['from_generator'])}")


if __name__ == "__main__":
    main()
