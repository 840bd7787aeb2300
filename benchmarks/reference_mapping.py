"""A reference of a million cells is searched exactly, directly from its file, with memory for one block only.

    python benchmarks/reference_mapping.py [--quick]

1,000,000 x 512 float32 vectors of length 1 (2 GB on disk; --quick: 100,000), 200 labels, 1,000 query cells, k=10, one
thread. A sample of queries is checked against all distances in float64. If faiss is installed, its IndexFlatL2 is
measured too."""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path

import harness  # first: it sets the number of threads

K, N_QUERY, DIM, N_LABELS = 10, 1_000, 512, 200
MEMORY = 600  # MB above the imports, without pages of files


def simulate(folder: Path, n: int) -> None:
    "A saved map and a query, cells scattered around one centre per label; the map is written a block at a time."
    import numpy as np

    rng = np.random.default_rng(0)
    centres, codes = rng.normal(size=(N_LABELS, DIM)), rng.integers(0, N_LABELS, n)

    def cells(labels):
        vectors = (centres[labels] + 1.5 * rng.standard_normal((len(labels), DIM), dtype=np.float32)).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    blocks = ((cells(part), part) for part in np.split(codes, range(20_000, n, 20_000)))
    harness.write_map(folder, blocks, (n, DIM), N_LABELS, K)
    truth = rng.integers(0, N_LABELS, N_QUERY)
    np.savez(folder / "query.npz", vectors=cells(truth), truth=truth)


def own_memory() -> float:
    "MB of memory that belong only to this process, without pages of files."
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


def watched(function):
    "(result, seconds, highest own memory in MB) of a call."
    import threading

    peak, stop = [own_memory()], threading.Event()

    def watch():
        while not stop.wait(0.02):
            peak.append(own_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    try:
        result = function()
    finally:
        took = time.perf_counter() - start
        stop.set()
        thread.join()
    return result, took, max(peak)


def blocks(vectors, size: int = 20_000):
    "Blocks of rows of a large table."
    return (vectors[start : start + size] for start in range(0, len(vectors), size))


def squared_distances(block, query):
    "Squared distances [query, rows of the block] in double precision, one query at a time."
    import numpy as np

    return np.stack([((block.astype(np.float64) - one) ** 2).sum(1) for one in query])


def measure(folder: Path) -> dict:
    "Open the map and transfer labels, in a separate process."
    import anndata
    import numpy as np
    import torch

    from scellfm.scgpt.mapping import ReferenceMap
    from scellfm.scgpt.neighbours import nearest, nearest_faiss

    torch.set_num_threads(1)
    with np.load(folder / "query.npz") as stored:
        vectors, truth = stored["vectors"], stored["truth"]
    query = anndata.AnnData(obsm={"X_scGPT": vectors})
    nearest(vectors, vectors[:10], K)
    base, start = own_memory(), time.perf_counter()
    reference = ReferenceMap.load(folder)
    opened = time.perf_counter() - start
    _, took, peak = watched(lambda: reference.transfer(query))
    result = {
        "opened": opened,
        "took": took,
        "memory": peak - base,
        "accuracy": float((query.obs["cell_type_transferred"].astype(str) == [f"type {i:03d}" for i in truth]).mean()),
    }
    chosen = np.arange(0, N_QUERY, N_QUERY // 10)
    distances = np.concatenate([squared_distances(block, vectors[chosen]) for block in blocks(reference.vectors)], 1)
    found = reference.neighbours(query[chosen].copy())[1]
    result["other"] = int((np.argsort(distances, axis=1, kind="stable")[:, :K] != found).any(axis=1).sum())
    if importlib.util.find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(1)
        (_, theirs), result["faiss"], peak = watched(lambda: nearest_faiss(reference.vectors, vectors, K))
        result |= {"faiss_memory": peak - base, "same": float((theirs == reference.neighbours(query)[1]).mean())}
    return result


def main() -> int:
    parser = harness.parser(__doc__, pairs=None, quick="100,000 reference cells")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Path(options.measure))))
        return 0
    n = 100_000 if options.quick else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        simulate(Path(folder), n)
        found = harness.figures_of(__file__, "--measure", folder)
    print(
        f"reference mapping: {N_QUERY:,} cells to {n:,} x {DIM} ({n * DIM * 4 / 1e9:.1f} GB), k={K}, one thread: "
        f"opened in {found['opened']:.2f} s, "
        f"mapped in {found['took']:.1f} s, accuracy {found['accuracy']:.3f}"
    )
    if "faiss" in found:
        print(
            f"faiss IndexFlatL2: {found['faiss']:.1f} s, {found['faiss_memory']:.0f} MB, "
            f"same neighbours {found['same']:.5f}; "
            f"ours takes {found['took'] / found['faiss']:.2f} of its time"
        )
    return harness.verdict(
        ("MB above the imports", found["memory"], "ceiling", MEMORY),
        ("queries with other neighbours than all distances give", found["other"], "ceiling", 0),
    )


if __name__ == "__main__":
    sys.exit(main())
