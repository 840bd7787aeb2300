"""What one cell costs: seconds of one core for each part of an atlas run, and bytes of the saved files.

    python benchmarks/costs.py [--cells 4000] [--json FILE] [--quick]

Synthetic counts (20,000 genes, about 2,190 detected in a cell) are written as h5ad, plain and with gzip. One
thread; the time is that of the processor, so that a busy machine changes little. Embedding is measured on cells
with as many tokens as each model reads, with random weights of the published shapes. The page "What an atlas costs"
has the figures."""

import json
import platform
import sys
import tempfile
from pathlib import Path

import harness  # first: it sets the number of threads
import numpy as np
import pandas as pd

GENES, VOCABULARY = 20_000, 25_426
SHAPES = {"Geneformer V1-10M": ("V1-10M", 2048), "Geneformer V2-104M": ("V2-104M", 2048), "scGPT": ("human", 1200)}


def processor() -> str:
    "The name of the processor."
    told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def per_cell(function, n: int) -> float:
    "Processor seconds of a call, divided by the number of cells."
    return harness.timed(function)[1] / n


def of_files(folder: Path, n: int) -> tuple[dict, dict]:
    "Seconds to read, tokenize and write a cell; bytes of a cell on disk."
    import anndata
    from tokenize_file import write_file

    from scellfm.data.reading import count_blocks
    from scellfm.geneformer import RankTokenizer

    plain, packed, out = folder / "cells.h5ad", folder / "gzip.h5ad", folder / "tokens.dataset"
    write_file(plain, n, GENES)
    anndata.read_h5ad(plain).write_h5ad(packed, compression="gzip")
    tok = RankTokenizer.from_pretrained(folder)
    tok(anndata.read_h5ad(plain)[:10].copy())  # compiles
    seconds = {
        "read h5ad": per_cell(lambda: sum(block.nnz for _, block in count_blocks(plain)), n),
        "read h5ad, gzip": per_cell(lambda: sum(block.nnz for _, block in count_blocks(packed)), n),
        "read h5ad, rank and save tokens": per_cell(lambda: tok.tokenize_files(plain, out), n),
    }
    tokens = sum(file.stat().st_size for file in out.iterdir())
    sizes = {"h5ad": plain.stat().st_size / n, "h5ad, gzip": packed.stat().st_size / n, "tokens": tokens / n}
    return seconds, sizes


def of_geneformer(name: str, length: int, n: int) -> float:
    "Seconds to embed a cell of `length` tokens."
    from scellfm.geneformer import Geneformer, RankTokenizer, TokenizedCells

    genes = [f"ENSG{i:011d}" for i in range(VOCABULARY - 2)]
    words = {word: i for i, word in enumerate(["<pad>", "<mask>", *genes])}
    gf = Geneformer.from_config(name, RankTokenizer(words, dict.fromkeys(genes, 1.0), max_length=length), device="cpu")
    random = np.random.default_rng(0)
    tokens = np.concatenate([random.permutation(VOCABULARY - 2)[:length] + 2 for _ in range(n)]).astype(np.uint16)
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(n)])
    cells = TokenizedCells(tokens, np.arange(n + 1) * length, obs, np.arange(n))
    return per_cell(lambda: gf.embed(cells), n)


def of_scgpt(name: str, length: int, n: int) -> float:
    "Seconds to embed a cell of `length` tokens, <cls> among them; binning included."
    import anndata
    from scipy import sparse

    from scellfm.scgpt import ScGPT

    genes = [f"G{i}" for i in range(3000)]
    gpt = ScGPT.from_config(name, genes, device="cpu")
    counts = np.random.default_rng(0).poisson(3.0, (n, 3000)) + 1
    cells = anndata.AnnData(sparse.csr_matrix(counts.astype(np.float32)), var=pd.DataFrame(index=genes))
    return per_cell(lambda: gpt.embed(cells, max_length=length), n)


def main() -> int:
    parser = harness.parser(__doc__, pairs=None, quick="1,000 cells; V1-10M alone")
    parser.add_argument("--cells", type=int, default=4000)
    parser.add_argument("--json", help="a file for the figures")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    n = 1000 if options.quick else options.cells
    with tempfile.TemporaryDirectory() as folder:
        seconds, sizes = of_files(Path(folder), n)
    for model, (name, length) in SHAPES.items():
        if options.quick and name != "V1-10M":
            continue
        embed = of_scgpt if model == "scGPT" else of_geneformer
        seconds[f"{model}, {length:,} tokens"] = embed(name, length, 1 if "104M" in name else 3)
    found = {"processor": processor(), "genes per cell": 2190, "seconds": seconds, "bytes": sizes}
    for name, value in seconds.items():
        print(f"{name:40s} {value * 1e6:14,.1f} us of a core per cell, {1 / value:12,.1f} cells/s")
    for name, value in sizes.items():
        print(f"{name:40s} {value:14,.0f} bytes per cell")
    print(found["processor"])
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
