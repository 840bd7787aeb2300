"""Geneformer at its true size: load, embed and perturb real cells with checkpoints of the published names and shapes.

    SCELLFM_DATA=<folder> python benchmarks/true_size.py [--cells 8] [--genes 300] [--quick] [--full]

The folder holds geneformer-configs (config.json of each published model), geneformer-v1 and -v2 (the official
dictionaries) and kang18/kang18_2000.h5ad (blood cells). The weights are random, saved in the official layout, and every
tensor is accounted for at loading. Each model runs in a separate process, on one thread: the seconds to load, cells
embedded per second, deletions per second (the first genes of one cell, one at a time, at the second to last layer), and
the peak memory, in all and above the imports. `--quick` runs only V1-10M; `--full` adds V2-316M, whose weights are 1.3
GB."""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import harness  # first: it sets the number of threads

DATA = Path(os.environ.get("SCELLFM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
MODELS = {
    "V1-10M": "geneformer-v1",
    "V2-104M": "geneformer-v2",
    "V2-104M classifier": "geneformer-v2",
    "V2-316M": "geneformer-v2",
}
TIED = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")  # one with the embeddings; not in the files


def checkpoint(name: str, folder: Path) -> Path:
    "A random checkpoint in the official layout: its folder, with the dictionaries in a folder beside it."
    import torch
    from safetensors.torch import save_file
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    base, classifier = name.split()[0], name.endswith("classifier")
    config = json.loads((DATA / "geneformer-configs" / f"{base}_config.json").read_text())
    kind = BertForSequenceClassification if classifier else BertForMaskedLM
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in kind(BertConfig(**config)).state_dict().items() if key not in TIED}
    random = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(shape, generator=random) * 0.02 for key, shape in shapes.items()}
    tensors |= {key: torch.ones(shape) for key, shape in shapes.items() if key.endswith("LayerNorm.weight")}
    place = folder / name.replace(" ", "-")
    place.mkdir(parents=True)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    (place / "config.json").write_text(json.dumps(config | {"architectures": [kind.__name__]}))
    shutil.copytree(DATA / MODELS[name], folder / "gene_dictionaries")
    return place


def measure(place: Path, n_cells: int, n_genes: int) -> dict:
    "Measure one model; runs in a separate process."
    import anndata
    import torch
    import transformers.models.bert.modeling_bert  # noqa: F401 (imports are not counted)

    from scellfm.geneformer import CellClassifier, Geneformer  # noqa: F401

    torch.set_num_threads(1)
    adata, before, start = (
        anndata.read_h5ad(DATA / "kang18" / "kang18_2000.h5ad")[:n_cells].copy(),
        harness.peak_memory(),
        time.perf_counter(),
    )
    classifier = place.name.endswith("classifier")
    model = (CellClassifier if classifier else Geneformer).from_pretrained(place, device="cpu")
    gf = model.models[0] if classifier else model
    figures = {
        "load, s": time.perf_counter() - start,
        "tensors": len(gf.load_report.loaded),
        "unused": len(gf.load_report.unused),
        "fresh": len(gf.load_report.fresh),
        "memory to load, MB": harness.peak_memory() - before,
    }
    cells = gf.cells(adata)
    start = time.perf_counter()
    model.embed(cells)
    figures |= {
        "mean tokens": float(cells.lengths.mean()),
        "cells embedded/s": len(cells) / (time.perf_counter() - start),
    }
    one = cells[:1]
    one.tokens, one.offsets = one.tokens[: n_genes + 2], one.offsets.clip(max=n_genes + 2)
    if gf.special:
        one.tokens[-1] = gf.tokenizer.eos
    start = time.perf_counter()
    screen = model.perturb(one, genes="all")
    figures |= {
        "deletions/s": len(screen.shifts) / (time.perf_counter() - start),
        "cell perturbed, tokens": int(one.lengths[0]),
    }
    peak = harness.peak_memory()
    return figures | {"memory, MB": peak, "of it beyond the imports": peak - before}


def main() -> None:
    "Print one table."
    import pandas as pd

    parser = harness.parser(__doc__, pairs=None, quick="V1-10M alone")
    parser.add_argument("--cells", type=int, default=8)
    parser.add_argument("--genes", type=int, default=300)
    parser.add_argument("--full", action="store_true", help="V2-316M too, whose weights are 1.3 GB")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    ask = parser.parse_args()
    if ask.measure:
        print(json.dumps(measure(ask.measure, ask.cells, ask.genes)))
        return
    if not DATA.exists():
        print(f"real data are not here (SCELLFM_DATA={DATA}): nothing to do")
        return
    rows = {}
    for name in list(MODELS)[: 1 if ask.quick else 4 if ask.full else 3]:
        with tempfile.TemporaryDirectory() as folder:
            place = checkpoint(name, Path(folder))
            size = (place / "model.safetensors").stat().st_size / 2**20
            options = ("--cells", ask.cells, "--genes", ask.genes, "--measure", place)
            rows[name] = {"file, MB": size, **harness.figures_of(__file__, *options)}
    print(pd.DataFrame(rows).round(1).to_string())


if __name__ == "__main__":
    main()
