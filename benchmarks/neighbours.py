"""A reference of 10 million cells is searched in at most 4 GB of memory, and nearly all nearest cells are found.

    python benchmarks/neighbours.py [--cells 10000000] [--threads 1] [--folder FOLDER] [--quick]

10,000,000 x 512 float32 vectors of length 1 (20 GB on disk; --quick: 200,000), 500 queries, k=10. The cells belong to
200 types of unequal size; within a type they differ along 32 directions of decreasing importance, half of them shared
by all types, with a little noise in all 512 numbers. Neighbourhoods then have few dimensions, as in real embeddings.
Three separate processes: one builds the index beside the vectors (search="approximate"), one maps the query with this
index, and one maps it by the exact search. Memory is the peak of all memory of each process, imports and mapped pages
included. Recall@10 is the share of the exact ten nearest cells that the index finds. On one core of an idle machine all
of it takes about a quarter of an hour. With --folder, what the folder holds (vectors, index, figures) is not made
again, so an interrupted measurement goes on."""

import argparse
import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import harness  # first: it sets the number of threads

K, N_QUERY, DIM, N_TYPES, INSIDE = 10, 500, 512, 200, 32
MEMORY, RECALL = 4000, 0.95  # MB of a whole process; share of the ten nearest


class Simulated:
    "Simulated embeddings of cells: types, and directions within a type."

    def __init__(self):
        import numpy as np

        rng = np.random.default_rng(0)
        self.centres = rng.normal(size=(N_TYPES, DIM)).astype(np.float32)
        scale = (3 / np.sqrt(1 + np.arange(INSIDE))).astype(np.float32)[:, None]
        shared = rng.normal(size=(INSIDE // 2, DIM))
        self.directions = np.stack(
            [
                np.concatenate([shared, rng.normal(size=(INSIDE // 2, DIM))]).astype(np.float32) * scale
                for _ in self.centres
            ]
        )
        self.weights = 1 / np.arange(1, N_TYPES + 1) ** 0.8
        self.weights /= self.weights.sum()

    def cells(self, n: int, seed: int):
        "(float32 [n, 512] of length 1, type of each)."
        import numpy as np

        rng = np.random.default_rng(seed)
        types = rng.choice(N_TYPES, n, p=self.weights)
        values = 0.1 * rng.standard_normal((n, DIM), dtype=np.float32) + self.centres[types]
        for one in range(N_TYPES):
            here = np.flatnonzero(types == one)
            values[here] += rng.standard_normal((len(here), INSIDE), dtype=np.float32) @ self.directions[one]
        return values / np.linalg.norm(values, axis=1, keepdims=True), types


def simulate(folder: Path, n: int) -> None:
    "A query, and a saved map, written a block at a time."
    import numpy as np

    made = Simulated()
    vectors, truth = made.cells(N_QUERY, 0)
    np.savez(folder / "query.npz", vectors=vectors, truth=truth)
    blocks = (made.cells(min(50_000, n - start), 1 + start) for start in range(0, n, 50_000))
    harness.write_map(folder, blocks, (n, DIM), N_TYPES, K)


def search(folder: Path, how: str, threads: int) -> dict:
    "Open the map and search: seconds to open and to search, peak memory in MB, accuracy; the neighbours are kept."
    import anndata
    import faiss  # noqa: F401
    import numpy as np
    import torch

    from scellfm import core
    from scellfm.scgpt.mapping import ReferenceMap

    core.settings.threads = threads
    torch.set_num_threads(threads)
    with np.load(folder / "query.npz") as stored:
        vectors, truth = stored["vectors"], stored["truth"]
    if how == "build":
        vectors, truth = vectors[:1], truth[:1]
    query = anndata.AnnData(obsm={"X_scGPT": vectors})
    opened, _, reference = harness.timed(
        lambda: ReferenceMap.load(folder, search="exact" if how == "exact" else "approximate")
    )
    took, cpu, (_, positions, _) = harness.timed(lambda: reference.neighbours(query))
    np.save(folder / f"{how}.npy", positions)
    called = (reference.codes[positions][:, 0] == truth).mean()
    found = {"opened": opened, "took": took, "cpu": cpu, "mb": harness.peak_memory(), "accuracy": float(called)}
    if reference.index is not None:
        index = reference.index
        found |= {"probes": index.probes, "lists": len(index.centres), "candidates": index.candidates}
        found |= {"told": index.recall}
    return found


def main() -> int:
    parser = harness.parser(__doc__, pairs=None, quick="200,000 reference cells")
    parser.add_argument("--cells", type=int, default=10_000_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--folder", help="folder in which vectors, index and figures are kept and used again; temporary by default"
    )
    parser.add_argument("--search", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.search:
        print(json.dumps(search(Path(options.search[0]), options.search[1], options.threads)))
        return 0
    n = 200_000 if options.quick else options.cells
    with nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory() as folder:
        if not (Path(folder) / "index.json").exists():
            made, cpu, _ = harness.timed(lambda: simulate(Path(folder), n))
            print(f"vectors written in {made:.0f} s wall, {cpu:.0f} s CPU", flush=True)
        print(f"{n:,} x {DIM} ({n * DIM * 4 / 1e9:.1f} GB), {N_QUERY:,} queries, k={K}, {options.threads} thread(s)")
        found = {}
        for how in ("build", "approximate", "exact"):
            one = found[how] = measured(Path(folder), how, options.threads)
            print(
                f"{how:12s} opened in {one['opened']:.2f} s, {one['took']:8.1f} s wall, {one['cpu']:8.1f} s CPU, peak "
                f"memory {one['mb']:,.0f} MB",
                flush=True,
            )
        recall = overlap(Path(folder))
        size = (Path(folder) / "approximate.safetensors").stat().st_size / 1e6
    index = found["approximate"]
    print(
        f"index: {size:,.0f} MB, {index['probes']} of {index['lists']} lists, {index['candidates']} candidates; "
        f"recall@{K} measured when it was built {index['told']:.3f}, on the query {recall:.3f}; "
        f"{found['exact']['took'] / index['took']:.1f}x as fast as the exact search"
    )
    return harness.verdict(
        ("peak memory in MB, building", found["build"]["mb"], "ceiling", MEMORY),
        ("peak memory in MB, mapping", index["mb"], "ceiling", MEMORY),
        (f"recall@{K}", recall, "floor", RECALL),
    )


def measured(folder: Path, how: str, threads: int) -> dict:
    "The figures of one search in a process of its own, kept in the folder and read from there."
    kept = folder / f"{how}.json"
    if not kept.exists():
        figures = harness.figures_of(__file__, "--search", folder, how, "--threads", threads)
        kept.write_text(json.dumps(figures))
    return json.loads(kept.read_text())


def overlap(folder: Path) -> float:
    "The share of the exact neighbours that the index found."
    import numpy as np

    exact, near = np.load(folder / "exact.npy"), np.load(folder / "approximate.npy")
    return float(np.mean([np.isin(a, b).mean() for a, b in zip(exact, near)]))


if __name__ == "__main__":
    sys.exit(main())
