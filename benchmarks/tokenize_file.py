"""From an h5ad file to saved tokens, on one thread and on two, against the same loop with Hugging Face's
Dataset.from_generator.

    python benchmarks/tokenize_file.py [--cells 20000] [--genes 20000] [--pairs 5] [--thread-pairs 5] [--quiet 0]
                                       [--original CLONE]

A synthetic file (about 9 % of the entries are not zero; CSR, not compressed, in the page cache) is written to a
temporary folder. The sides take turns in one process, after each has processed a small file (which loads the compiled
loops). The time counts from the call to the saved data set. The reference reads blocks with h5py, ranks each cell with
a stable double precision argsort and yields it to Dataset.from_generator, then save_to_disk; it yields Python lists
("lists", the usual form) or numpy arrays ("arrays", which datasets accepts twice as fast). With --original, the
TranscriptomeTokenizer in a clone of Geneformer's repository is one more side (model_input_size=2048, no special
tokens); its code is run, and it needs loompy. Memory is the growth of the peak above the imports in a separate process,
for the whole file and for half of it. Then one thread and two threads take turns. Only turns in which other processes
left two cores idle count, if there are any; both must save the same bytes. The ratio of two threads to another side is
the ratio of one thread, in processor seconds, times the gain of the second thread."""

import argparse
import contextlib
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import harness  # first: it sets the number of threads
import numpy as np

FLOOR, CEILING = 8.0, 400  # times as fast as the usual form; MB
ON_TWO, GAIN = 20.0, 1.6  # two threads: times as fast as the original's tokenizer, as one thread
SIDES = ("scellfm", "scellfm, 2 threads", "from_generator, lists", "from_generator, arrays")
ORIGINAL = "original"


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
    medians = dict(zip(genes, synthetic_medians(n_genes).tolist()))
    for name, dictionary in {"token_dictionary": tokens, "gene_median_dictionary": medians}.items():
        (path.parent / f"{name}.json").write_text(json.dumps(dictionary))
        (path.parent / f"{name}.pkl").write_bytes(pickle.dumps(dictionary))  # the original's form


def reference(path: Path, out: Path, lists: bool) -> None:
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
                data, indices = (
                    file["X/data"][low : indptr[last]].astype(np.float64),
                    file["X/indices"][low : indptr[last]],
                )
                for cell in range(first, last):
                    at = slice(indptr[cell] - low, indptr[cell + 1] - low)
                    values = data[at] / medians[indices[at]]
                    ids = tokens[indices[at][np.argsort(-values, kind="stable")[:2048]]]
                    yield {"input_ids": ids.tolist() if lists else ids, "length": len(ids)}

    with tempfile.TemporaryDirectory(dir=out.parent) as cache:
        Dataset.from_generator(cells, cache_dir=cache).save_to_disk(str(out))


def ours(path: Path, out: Path, threads: int) -> None:
    "scellfm."
    from scellfm import core
    from scellfm.geneformer import RankTokenizer

    core.settings.threads = threads
    RankTokenizer.from_pretrained(path.parent).tokenize_files(path, out)


def import_original(clone: Path) -> None:
    "Geneformer's tokenizer.py from a clone; not the package around it, which imports all that it trains with."
    package = types.ModuleType("geneformer")
    package.__path__ = [str(clone / "geneformer")]
    package.ENSEMBL_MAPPING_FILE = package.GENE_MEDIAN_FILE = package.TOKEN_DICTIONARY_FILE = None
    sys.modules["geneformer"] = package
    importlib.import_module("geneformer.tokenizer")


def original(path: Path, out: Path) -> None:
    "The original's own tokenizer, as its documentation calls it."
    make = sys.modules["geneformer.tokenizer"].TranscriptomeTokenizer
    with contextlib.redirect_stdout(None):
        tokenizer = make(
            model_input_size=2048,
            special_token=False,
            use_h5ad_index=True,
            gene_median_file=path.parent / "gene_median_dictionary.pkl",
            token_dictionary_file=path.parent / "token_dictionary.pkl",
            gene_mapping_file=None,
        )
        tokenizer.tokenize_data(path.parent, out.parent, out.stem, file_format="h5ad")


def same_bytes(one: Path, other: Path) -> bool:
    "Whether two saved data sets hold the same files."
    names = sorted(file.name for file in one.iterdir())
    return names == sorted(file.name for file in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def run(side: str, path: Path, out: Path) -> tuple[float, float]:
    "One run of one side: wall and CPU seconds, those of processes that it started included."
    shutil.rmtree(out, ignore_errors=True)
    wall, busy = time.perf_counter(), sum(os.times()[:4])
    if side.startswith("scellfm"):
        ours(path, out, 2 if side == SIDES[1] else 1)
    elif side == ORIGINAL:
        original(path, out)
    else:
        reference(path, out, side.endswith("lists"))
    return time.perf_counter() - wall, sum(os.times()[:4]) - busy


def load_all() -> None:
    "Import what the sides need."
    import anndata.io  # noqa: F401
    import datasets

    from scellfm.geneformer.tokenizer import kernels, rank_tokenizer  # noqa: F401

    datasets.disable_progress_bars()


def child(task: str, path: Path, out: str) -> None:
    "Write a file of `out` cells x genes, or run one side and print the growth of the peak memory in MB."
    if task == "write":
        return write_file(path, *map(int, out.split("x")))
    load_all()
    before = harness.peak_memory(reset=True)
    run(task, path, Path(out))
    print(harness.peak_memory() - before)


def start(task: str, path: Path, out, clone: Path | None = None) -> str:
    "Run `child` in a new process; its last printed line."
    of_clone = [] if clone is None else ["--original", str(clone)]
    done = subprocess.run(
        [sys.executable, __file__, "--child", task, str(path), str(out), *of_clone], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    return (done.stdout.splitlines() or [""])[-1]


def compare(ours: Path, theirs: Path) -> str:
    "The largest difference of the saved tokens."
    from scellfm.geneformer import TokenizedCells

    a, b = TokenizedCells.load(ours), TokenizedCells.load(theirs)
    if not np.array_equal(a.offsets, b.offsets):
        return "cells have other lengths"
    return str(np.abs(a.tokens.astype(np.int64) - b.tokens).max())


def gain_of_two(path: Path, outs: dict[str, Path], pairs: int, quiet: float) -> float:
    "How many times as fast two threads are, on the wall: the median of the pairs in which others left two cores idle."
    found = []
    for _ in range(pairs):
        harness.wait_for_quiet(quiet)
        with harness.Others() as others:
            walls = [run(side, path, outs[side])[0] for side in SIDES[:2]]
        found.append((others.cores, walls[0] / walls[1]))
        print(
            f"{walls[0]:.2f} s on one thread, {walls[1]:.2f} s on two; others used {others.cores:.2f} cores", flush=True
        )
    undisturbed = [gain for cores, gain in found if cores < harness.DISTURBED]
    print(f"{len(undisturbed)} of {pairs} pairs were undisturbed")
    return float(np.median(undisturbed or [gain for _, gain in found]))


def report(side: str, cells: int, seconds: list, memory: float) -> None:
    "Print the line of one side."
    wall, cpu = np.median(seconds, axis=0)
    print(
        f"{side:23s} {wall:6.2f} s wall, {cpu:6.2f} s CPU, {cells / wall:8,.0f} cells/s, "
        f"peak above import {memory:5.0f} MB"
    )


def arguments() -> argparse.Namespace:
    "What the command line asks for."
    parser = harness.parser(__doc__, quick="4,000 cells, 1 pair")
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--thread-pairs", type=int, default=5, help="how often one thread and two take turns")
    parser.add_argument(
        "--quiet", type=float, default=0, help="seconds to wait for idle cores before a pair of threads"
    )
    parser.add_argument("--original", type=Path, help="a clone of Geneformer's repository; its code runs")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.cells, args.pairs, args.thread_pairs = 4000, 1, 1
    return args


def main():
    args = arguments()
    sides = SIDES if args.original is None else (*SIDES, ORIGINAL)
    if args.original is not None:
        import_original(args.original.resolve())
    if args.child:
        return child(args.child[0], Path(args.child[1]), args.child[2])
    load_all()
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / name / "cells.h5ad" for name in ("whole", "half", "small")}
        for file, n_cells in zip(files.values(), (args.cells, args.cells // 2, 100)):
            file.parent.mkdir()
            start("write", file, f"{n_cells}x{args.genes}")
        outs = {side: Path(folder) / f"{side}.dataset" for side in sides}
        seconds = {side: [] for side in sides}
        for side in sides:
            run(side, files["small"], outs[side])
        for _ in range(args.pairs):
            for side in sides:
                seconds[side].append(run(side, files["whole"], outs[side]))
        gain = gain_of_two(files["whole"], outs, args.thread_pairs, args.quiet)
        print(
            f"{args.cells:,} cells x {args.genes:,} genes, {files['whole'].stat().st_size / 2**20:,.0f} MiB (not "
            f"compressed), median of {args.pairs} pairs"
        )
        memory = {side: start(side, files["whole"], Path(folder) / "memory.dataset", args.original) for side in sides}
        memory = {side: float(text) for side, text in memory.items()}
        for side in sides:
            report(side, args.cells, seconds[side], memory[side])
        ratios = {side: np.median(np.array(seconds[side]) / np.array(seconds["scellfm"]), axis=0) for side in sides[1:]}
        for side, (wall, cpu) in ratios.items():
            print(f"one thread against {side}: {wall:.2f}x wall, {cpu:.2f}x CPU")
        half = float(start("scellfm", files["half"], Path(folder) / "memory.dataset"))
        print(f"half the file: peak above import {half:.0f} MB (ceiling {CEILING} MB)")
        difference = compare(outs["scellfm"], outs[SIDES[2]])
        equal = same_bytes(outs["scellfm"], outs[SIDES[1]])
        print(f"largest difference of tokens: {difference}")
    bounds = [
        (f"one thread, times as fast as {SIDES[2]}", ratios[SIDES[2]][0], "floor", FLOOR),
        ("two threads, times as fast as one", gain, "floor", GAIN),
        ("peak above import in MB", max(memory["scellfm"], memory[SIDES[1]], half), "ceiling", CEILING),
        ("files of two threads that are not those of one", float(not equal), "ceiling", 0),
        ("largest difference of tokens", float(difference) if difference.isdigit() else np.inf, "ceiling", 0),
    ]
    if args.original is not None:
        label = "two threads, times as fast as the original's tokenizer (processor's ratio of one, times the gain)"
        bounds.append((label, float(ratios[ORIGINAL][1] * gain), "floor", ON_TWO))
    return harness.verdict(*bounds)


if __name__ == "__main__":
    sys.exit(main())
