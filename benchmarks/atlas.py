"""Atlas runs: two processes against one, what the manifest and the shards cost, and how memory grows with the cells.

    python benchmarks/atlas.py [--pairs 5] [--quick]

Two processes: the embeddings of the same cells by one process and by two, each of one thread, the sides in turns, from
the call to the result; the two have to start and to load the model, the one has it. Overhead: the time that is spent
in writing, hashing and recording shards and in the record of the run, as a share of the whole run of one process.
Memory: the peak, over the imports, of a process of its own that embeds 20,000 and then 200,000 cells (a thousand rows
that repeat, so that the cells are alike)."""

import sys
import tempfile
import time
from pathlib import Path

import harness  # first: it sets the number of threads
import numpy as np

FLOOR, SHARE, GROWTH = 1.6, 0.03, 1.15


def write_inputs(place: Path, n_cells: int, n_genes: int = 1000) -> None:
    "A file of synthetic counts, and a small Geneformer."
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
    tokenizer = sf.geneformer.RankTokenizer.fit(cells[:1000].copy(), max_length=256)
    sf.geneformer.Geneformer.from_config("tiny", tokenizer).save_pretrained(place / "model")


def embed(place: Path, out: str, workers: int, rows: int) -> None:
    "One run."
    import warnings

    import scellfm as sf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights
        where = dict(model=place / "model", out=place / out, workers=workers, rows=rows)
        sf.atlas.run("embed", place / "cells.h5ad", **where)


def run_once(place: Path, workers: int, rows: int, n_cells: int) -> None:
    "A run in a process of its own, which prints its seconds and the growth of its peak memory."
    import json
    import shutil

    import torch  # noqa: F401

    import scellfm as sf

    sf.geneformer.Geneformer.from_pretrained(place / "model")  # what is loaded once counts as imports
    before, out = harness.peak_memory(reset=True), f"out{workers}"
    shutil.rmtree(place / out, ignore_errors=True)
    spent = watched()
    start = time.perf_counter()
    embed(place, out, workers, rows)
    wall = time.perf_counter() - start
    print(json.dumps({"s": wall, "mb": harness.peak_memory() - before, "kept": spent[0], "cells": n_cells}))


def watched() -> list[float]:
    "Seconds spent in keeping shards and records, added up while the run goes on."
    from scellfm.atlas import runs, workers
    from scellfm.store.shards import Store

    spent = [0.0]

    def timed(function):
        def call(*arguments, **named):
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                spent[0] += time.perf_counter() - start

        return call

    workers.keep_stretch, Store.record = timed(workers.keep_stretch), timed(Store.record)
    runs.opened_run, runs.check_unchanged, runs.write_run = map(
        timed, (runs.opened_run, runs.check_unchanged, runs.write_run)
    )
    return spent


def figures(place: Path, workers: int, rows: int, n_cells: int) -> dict:
    "What `run_once` prints in a process of its own."
    return harness.figures_of(__file__, "--once", place, workers, rows, n_cells)


def main() -> int:
    options = harness.parser(__doc__, quick="2,000 cells, one pair")
    options.add_argument("--once", nargs=4, help="run one side and print its figures (used by the script itself)")
    given = options.parse_args()
    if given.once:
        place, workers, rows, n_cells = Path(given.once[0]), *map(int, given.once[1:])
        run_once(place, workers, rows, n_cells)
        return 0
    small, large, pairs = (2000, 4000, 1) if given.quick else (20_000, 200_000, given.pairs)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_inputs(place, small)
        rows = small // 20
        seconds, first = {1: [], 2: []}, {}
        for _ in range(pairs):
            for workers in seconds:
                found = figures(place, workers, rows, small)
                seconds[workers].append(found["s"])
                first = found if workers == 1 else first
        ratio = float(np.median(np.divide(seconds[1], seconds[2])))
        print(f"one process: {small / seconds[1][-1]:.0f} cells a second; seconds {seconds}")
        write_inputs(place, large)
        second = figures(place, 1, rows, large)
    print(
        f"peak over imports: {first['mb']:.0f} MB at {small:,} cells, {second['mb']:.0f} MB at {large:,}",
        file=sys.stderr,
    )
    return harness.verdict(
        ("two processes against one", ratio, "floor", FLOOR),
        ("share of manifest and shards", first["kept"] / first["s"], "ceiling", SHARE),
        ("peak memory, ten times the cells", second["mb"] / first["mb"], "ceiling", GROWTH),
    )


if __name__ == "__main__":
    sys.exit(main())
