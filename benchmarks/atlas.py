"""Atlas runs: two processes against one, what the manifest and the shards cost, and how memory grows with the cells.

    python benchmarks/atlas.py [--pairs 2] [--cells 100000] [--quiet 0] [--quick]

Two processes: one process and two processes, each with one thread, embed the same cells in turns. The time counts from
the call to the result; the two processes must start and load the model (about 12 s of a core each), the one process has
it already. The run therefore has enough cells for some minutes of work, as a real atlas has. Pairs during which other
programs used the cores do not count, if there are any others. Overhead: the time for writing, hashing and recording
shards and for the record of the run, as a share of the whole run of one process. Memory: the peak, above the imports,
of a separate process that embeds 20,000 or 200,000 cells (the same thousand rows repeated) in stretches of 1,000, with
16 tokens of each cell."""

import os
import sys
import tempfile
import time
from pathlib import Path

import harness  # first: it sets the number of threads
import numpy as np

FLOOR, SHARE, GROWTH = 1.6, 0.03, 1.15
SHORT = 16  # tokens of a cell for measuring memory: the model's share does not grow with the cells


def write_inputs(place: Path, n_cells: int, max_length: int = 256, n_genes: int = 1000) -> None:
    "A file of synthetic counts, and a small Geneformer that reads `max_length` genes of a cell."
    import anndata
    import pandas as pd
    from scipy import sparse

    import scellfm as sf

    rng = np.random.default_rng(0)
    some = sparse.csr_matrix(rng.poisson(0.12, (1000, n_genes)).astype(np.float32))
    counts = sparse.vstack([some] * (n_cells // 1000), format="csr")
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(counts.shape[0])])
    genes = [f"ENSG{i:011d}" for i in range(n_genes)]
    cells = anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes))
    cells.write_h5ad(place / "cells.h5ad")
    tokenizer = sf.geneformer.RankTokenizer.fit(cells[:1000].copy(), max_length=max_length)
    sf.geneformer.Geneformer.from_config("tiny", tokenizer).save_pretrained(place / "model")
    os.sync()  # else the first shards wait until these files are on the disk


def embed(place: Path, out: str, workers: int, rows: int) -> None:
    "One run."
    import warnings

    import scellfm as sf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights
        where = dict(model=place / "model", out=place / out, workers=workers, rows=rows)
        sf.atlas.run("embed", place / "cells.h5ad", **where)


def run_once(place: Path, workers: int, rows: int, n_cells: int) -> None:
    "A run in a separate process, which prints its seconds and the growth of its peak memory."
    import json
    import shutil

    import torch  # noqa: F401

    import scellfm as sf

    sf.geneformer.Geneformer.from_pretrained(place / "model")  # what is loaded once counts as imports
    before, out = harness.peak_memory(reset=True), f"out{workers}"
    shutil.rmtree(place / out, ignore_errors=True)
    spent = watched()
    start, busy = time.perf_counter(), sum(os.times()[:4])
    embed(place, out, workers, rows)
    wall, busy = time.perf_counter() - start, sum(os.times()[:4]) - busy
    print(
        json.dumps(
            {
                "s": wall,
                "cpu": busy,
                "mb": harness.peak_memory() - before,
                "kept": spent[0],
                "kept_cpu": spent[1],
                "cells": n_cells,
            }
        )
    )


def watched() -> list[float]:
    "Wall and processor seconds that are spent on shards and records, added up during the run."
    from scellfm.atlas import runs, workers
    from scellfm.store.shards import Store

    spent = [0.0, 0.0]

    def timed(function):
        def call(*arguments, **named):
            start = time.perf_counter(), time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                for i, now in enumerate((time.perf_counter(), time.process_time())):
                    spent[i] += now - start[i]

        return call

    workers.keep_stretch, Store.record = timed(workers.keep_stretch), timed(Store.record)
    runs.opened_run, runs.check_unchanged, runs.write_run = map(
        timed, (runs.opened_run, runs.check_unchanged, runs.write_run)
    )
    return spent


def figures(place: Path, workers: int, rows: int, n_cells: int) -> dict:
    "What `run_once` prints in a separate process."
    return harness.figures_of(__file__, "--once", place, workers, rows, n_cells)


def gain_of_two(place: Path, rows: int, n_cells: int, pairs: int, quiet: float, runs: dict[int, list[dict]]) -> float:
    "How many times as fast two processes are: the median of the pairs in which others left two cores idle, if any."
    found = []
    for _ in range(pairs):
        harness.wait_for_quiet(quiet)
        with harness.Others() as others:
            for workers, done in runs.items():
                done.append(figures(place, workers, rows, n_cells))
        one, two = (done[-1] for done in runs.values())
        found.append((others.cores, one["s"] / two["s"]))
        print(
            f"one process {one['s']:.1f} s ({one['cpu']:.1f} s of the processor, {n_cells / one['s']:.0f} cells a "
            f"second, {one['kept'] / one['s']:.2%} of the time for shards and records, "
            f"{one['kept_cpu'] / one['cpu']:.2%} of the processor's), two {two['s']:.1f} s ({two['cpu']:.1f} s); "
            f"others used {others.cores:.2f} cores",
            flush=True,
        )
    undisturbed = [gain for cores, gain in found if cores < harness.DISTURBED]
    print(f"{len(undisturbed)} of {pairs} pairs were undisturbed")
    one, two = (sum(run["cpu"] for run in done) for done in runs.values())
    print(f"by the seconds of the processor alone, two cores without any other work would give {2 * one / two:.2f}x")
    return float(np.median(undisturbed or [gain for _, gain in found]))


def main() -> int:
    options = harness.parser(__doc__, pairs=2, quick="2,000 and 20,000 cells, one pair")
    options.add_argument("--cells", type=int, default=100_000, help="cells that one process and two embed")
    options.add_argument("--quiet", type=float, default=0, help="seconds to wait for idle cores before a pair")
    options.add_argument("--once", nargs=4, help="run one side and print its figures (used by the script itself)")
    given = options.parse_args()
    if given.once:
        place, workers, rows, n_cells = Path(given.once[0]), *map(int, given.once[1:])
        run_once(place, workers, rows, n_cells)
        return 0
    small, large, pairs = (2000, 20_000, 1) if given.quick else (20_000, 200_000, given.pairs)
    shared = small if given.quick else given.cells
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_inputs(place, shared)
        runs = {1: [], 2: []}
        ratio = gain_of_two(place, shared // 20, shared, pairs, given.quiet, runs)
        grown = {}
        for n_cells in (small, large):
            write_inputs(place, n_cells, max_length=SHORT)
            grown[n_cells] = figures(place, 1, 1000, n_cells)["mb"]
    print(
        f"peak over imports: {grown[small]:.0f} MB at {small:,} cells, {grown[large]:.0f} MB at {large:,}",
        file=sys.stderr,
    )
    return harness.verdict(
        ("two processes against one", ratio, "floor", FLOOR),
        (
            "share of manifest and shards",
            float(np.median([one["kept"] / one["s"] for one in runs[1]])),
            "ceiling",
            SHARE,
        ),
        ("peak memory, ten times the cells", grown[large] / grown[small], "ceiling", GROWTH),
    )


if __name__ == "__main__":
    sys.exit(main())
