"The recorded scGenePT models as folders that the public class opens."

import json

import numpy as np
import torch
from conftest import golden

from scellfm.assets import read_tensors
from scellfm.data import GeneVectors
from scellfm.scgenept import ScGenePT

FOLDER = golden("scgenept") / "scgenept"
CONFIG = json.loads((FOLDER / "config.json").read_text())
SETTINGS = json.loads((golden("scgenept") / "cfg.json").read_text())
INFO = json.loads((FOLDER / "info.json").read_text())
OUTPUTS = np.load(FOLDER / "outputs.npz")
VOCABULARY = json.loads((FOLDER / "vocab.json").read_text())
VARIANTS = CONFIG["variants"]
NAME_OF = {number: gene for gene, number in VOCABULARY.items()}


def genes() -> list[str]:
    "The genes of the data in their order, from the golden's own h5ad."
    import anndata

    return list(anndata.read_h5ad(golden("scgenept") / "data" / "input.h5ad").var["gene_name"])


def scgpt_folder(path):
    "A folder with the sizes and the vocabulary, as scGPT has them."
    args = {
        "embsize": CONFIG["d_model"],
        "nheads": CONFIG["nhead"],
        "d_hid": CONFIG["d_hid"],
        "nlayers": CONFIG["nlayers"],
        "n_layers_cls": CONFIG["nlayers_cls"],
        "dropout": 0.0,
        "pad_token": CONFIG["pad_token"],
        "pad_value": CONFIG["pad_value"],
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "args.json").write_text(json.dumps(args))
    (path / "vocab.json").write_text(json.dumps(VOCABULARY))
    return path


def file_of(variant: str, suffix: str = "safetensors"):
    return FOLDER / f"{variant.replace('+', '_')}.{suffix}"


def fine_tuned(folder, variant: str, name: str = "best_model_gpt3.5_ada_rnd_seed_42.pt"):
    "A fine-tuned folder with weights under a published name."
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dict(read_tensors(file_of(variant))), folder / name)
    return folder


def model_of(tmp_path, variant: str, **options) -> ScGenePT:
    sizes = scgpt_folder(tmp_path / "scgpt")
    return ScGenePT.from_pretrained(
        file_of(variant), knowledge=variant, scgpt=sizes, genes=genes(), device="cpu", **options
    )


def vectors(key: str) -> GeneVectors:
    arrays = np.load(FOLDER / "gene_embeddings.npz")
    return GeneVectors(arrays[f"{key}/genes"].tolist(), arrays[f"{key}/emb"])
