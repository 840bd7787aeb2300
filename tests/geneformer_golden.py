"""The recorded runs of the original Geneformer, as the tests of the wing read them."""

import json
from functools import cache

import numpy as np
import pandas as pd
from conftest import golden

from scellfm.geneformer import Geneformer, RankTokenizer, TokenizedCells

GOLDEN = golden("geneformer")
VERSIONS = ("v1", "v2")


@cache
def meta() -> dict:
    "What was recorded, with which options."
    return json.loads((GOLDEN / "meta.json").read_text())


@cache
def model(version: str) -> Geneformer:
    "The recorded random model, loaded by the public function with the dictionary of its version."
    tokenizer = RankTokenizer.from_pretrained(GOLDEN / "dicts", version=version.upper())
    return Geneformer.from_pretrained(GOLDEN / f"model_{version}", tokenizer=tokenizer, device="cpu")


@cache
def cells(version: str) -> TokenizedCells:
    "The recorded cells; the index of obs is their number."
    file = np.load(GOLDEN / "isp" / f"cells_{version}.npz")
    n = len(file["offsets"]) - 1
    obs = pd.DataFrame({"state": file["state"], **meta()["cells"][version]}, index=[str(i) for i in range(n)])
    return TokenizedCells(file["tokens"].astype(np.uint16), file["offsets"].astype(np.int64), obs, np.arange(n))


def runs(kind: str) -> list[str]:
    "The names of the runs of one kind of perturbation that the original completed."
    return [name for name, options in meta()["isp"].items() if options["ok"] and options["perturb_type"] == kind]
