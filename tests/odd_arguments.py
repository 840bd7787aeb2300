"""Every task that users call, with its arguments as they should be, and each in turn replaced by something odd."""

import inspect
import os
import signal
import tempfile
import traceback
import warnings
from functools import cached_property
from pathlib import Path

import kill_runs
import numpy as np
import pandas as pd
from kill_runs import GENES, cells, deal
from test_public_reports_resumed import LENGTH, TINY, described, expressed, genome_of, starts

ODD = {
    "None": lambda: None,
    "-1": lambda: -1,
    "0": lambda: 0,
    "2.5": lambda: 2.5,
    "nan": lambda: float("nan"),
    "10**12": lambda: 10**12,
    "True": lambda: True,
    "empty text": lambda: "",
    "another text": lambda: "nonsense",
    "bytes": lambda: b"x",
    "no list": lambda: [],
    "a list of None": lambda: [None],
    "a list of texts": lambda: ["nonsense", "nonsense"],
    "a list of numbers": lambda: [1, 2.5],
    "no dictionary": dict,
    "a dictionary": lambda: {"a": 1},
    "an object": object,
    "an array": lambda: np.array([[1.0, np.nan]]),
    "a table": lambda: pd.DataFrame({"a": [1]}),
    "a function": lambda: print,
    "no cells": lambda: cells()[:0].copy(),
    "a path": lambda: Path("nowhere"),
}


class Hang(BaseException):
    "A call that did not end."


def small_cells():
    adata = cells()
    adata.obs["grade"] = pd.array([1, 2] * 12, dtype="Int64")
    rng = np.random.default_rng(0)
    for name in ("X_one", "X_two"):
        adata.obsm[name] = rng.normal(size=(24, 4)).astype(np.float32)
    return adata


class World:
    "What the doors need, each made when it is first used; cells are made anew for every call."

    def __init__(self, place: Path):
        self.place = place
        small_cells().write_h5ad(place / "cells.h5ad")

    @cached_property
    def tok(self):
        from scellfm.geneformer import RankTokenizer

        return RankTokenizer.fit(cells())

    @cached_property
    def gf(self):
        from scellfm.geneformer import Geneformer

        return Geneformer.from_config("tiny", self.tok, device="cpu")

    @cached_property
    def gpt(self):
        from scellfm.scgpt import ScGPT

        return ScGPT.from_config("tiny", GENES, device="cpu")

    def learned(self, model, label):
        adata = small_cells()
        return model.finetune(adata, label, split=deal(adata), epochs=1, n_boot=0)

    @cached_property
    def clf(self):
        return self.learned(self.gf, "kind")

    @cached_property
    def tasks(self):
        return self.learned(self.gf, ["kind", "side"])

    @cached_property
    def annotator(self):
        return self.learned(self.gpt, "kind")

    @cached_property
    def genes(self):
        classes = {"a": GENES[:10], "b": GENES[10:]}
        return self.gf.finetune_genes(cells(), classes, folds=2, epochs=1, n_boot=0)

    @cached_property
    def map(self):
        from scellfm.scgpt import ReferenceMap

        return ReferenceMap(small_cells(), "X_one", label="kind", k=3)

    @cached_property
    def screen(self):
        return self.gf.perturb(cells(), genes=GENES[:4], combine="each", state="kind", start="B", goal="T")

    @cached_property
    def simulated(self):
        return kill_runs.perturbed()

    @cached_property
    def know(self):
        return self.simulated.vectors["know"]

    @cached_property
    def perturbed(self):
        from scellfm.scgenept import PerturbationData

        return PerturbationData(self.simulated.adata)

    @cached_property
    def genept(self):
        from scellfm.scgenept import ScGenePT

        how = dict(knowledge="ncbi", gene_vectors=self.know, **kill_runs.SMALL)
        return ScGenePT.from_config("tiny", self.perturbed, **how)

    @property
    def tiny(self):
        return dict(device="cpu", size=TINY, asked=12, read=30, loss="mse")

    @cached_property
    def grid(self):
        from scellfm.rosa import hold_out_grid

        return hold_out_grid(expressed(), cells="donor", seed=1)

    @cached_property
    def rosa(self):
        from scellfm.rosa import Rosa

        return Rosa("mlp", **self.tiny).fit(expressed(), described(), self.grid, epochs=1, batch_size=8)

    @cached_property
    def ridge(self):
        from scellfm.rosa import Rosa

        return Rosa("ridge", device="cpu").fit(expressed(), described(), self.grid)

    @cached_property
    def genome(self):
        return genome_of(self.place, 0)

    @cached_property
    def windows(self):
        from scellfm.rosa import tss_windows

        return tss_windows(starts(), self.genome[0], length=LENGTH)

    @cached_property
    def enformer(self):
        from scellfm.rosa import Enformer

        return Enformer.from_config("tiny", device="cpu", seed=0, target_length=8)

    @cached_property
    def variants(self):
        base = self.genome[1][2509]
        return pd.DataFrame({"chrom": "chr1", "pos": [2510], "ref": [base], "alt": ["CA"[base == "C"]]})

    @cached_property
    def vectors(self):
        from scellfm.data import GeneVectors

        return GeneVectors(GENES, np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32), None, {})

    def saved_vectors(self):
        if not (self.place / "vectors").exists():
            self.vectors.save(self.place / "vectors")
        return self.place / "vectors"


def doors(w: World) -> dict:
    "{name: a function that gives what is called and its arguments as they should be, made anew for every trial}."
    from scellfm import data, scores, statistics
    from scellfm.data import GeneVectors, read_vectors
    from scellfm.geneformer import Geneformer, RankTokenizer
    from scellfm.rosa import Rosa, embed_bins, embed_genes, hold_out_grid, tss_windows, variant_effect
    from scellfm.scgenept import PerturbationData, ScGenePT
    from scellfm.scgpt import ReferenceMap, ScGPT

    adata = small_cells()
    short = dict(epochs=1, n_boot=0)
    goal = dict(state="kind", start="B", goal="T")
    return {
        "read": lambda: (data.read, dict(path=w.place / "cells.h5ad")),
        "check_counts": lambda: (data.check_counts, dict(adata=adata)),
        "hold_out": lambda: (data.hold_out, dict(adata=adata, by="donor")),
        "folds": lambda: (data.folds, dict(adata=adata, by="donor", k=2)),
        "match_genes": lambda: (data.match_genes, dict(ids_or_adata=list(GENES), vocabulary=list(GENES))),
        "read_vectors": lambda: (read_vectors, dict(path=w.saved_vectors())),
        "GeneVectors": lambda: (GeneVectors, dict(genes=["a", "b"], values=np.ones((2, 3)), covered=None, manifest={})),
        "take": lambda: (w.vectors.take, dict(genes=GENES[:3])),
        "RankTokenizer.fit": lambda: (RankTokenizer.fit, dict(adata=adata)),
        "RankTokenizer": lambda: (w.tok, dict(adata=adata)),
        "tokenize_files": lambda: (w.tok.tokenize_files, dict(path_or_folder=w.place / "cells.h5ad", out="out")),
        "Geneformer.from_config": lambda: (Geneformer.from_config, dict(name="tiny", tokenizer=w.tok, device="cpu")),
        "embed": lambda: (w.gf.embed, dict(data=adata)),
        "embed_genes": lambda: (w.gf.embed_genes, dict(data=adata)),
        "state_embeddings": lambda: (w.gf.state_embeddings, dict(data=adata, state="kind")),
        "finetune": lambda: (w.gf.finetune, dict(data=adata, label="kind", split=deal(adata), **short)),
        "finetune tasks": lambda: (w.gf.finetune, dict(data=adata, label=["kind", "side"], split=deal(adata), **short)),
        "finetune_genes": lambda: (
            w.gf.finetune_genes,
            dict(data=adata, classes={"a": GENES[:10], "b": GENES[10:]}, folds=2, **short),
        ),
        "pretrain": lambda: (Geneformer.from_config("tiny", w.tok, device="cpu").pretrain, dict(data=adata, epochs=1)),
        "search": lambda: (
            w.gf.search,
            dict(data=adata, label="kind", split=deal(adata), trials=1, space={"epochs": [1]}, n_boot=0),
        ),
        "perturb": lambda: (w.gf.perturb, dict(data=adata, genes=GENES[:2], combine="each", **goal)),
        "perturb by gradient": lambda: (w.gf.perturb, dict(data=adata, gradient={"top": 3, "check_cells": 2}, **goal)),
        "predict": lambda: (w.clf.predict, dict(data=adata)),
        "predict tasks": lambda: (w.tasks.predict, dict(data=adata)),
        "predict genes": lambda: (w.genes.predict, dict(data=adata)),
        "screen of a classifier": lambda: (w.clf.perturb, dict(data=adata, genes=GENES[:2], combine="each", **goal)),
        "table": lambda: (w.screen.table, {}),
        "recover": lambda: (w.screen.recover, dict(known=GENES[:2])),
        "screen_test": lambda: (statistics.screen_test, dict(shifts=w.screen.shifts.copy())),
        "log2_fold_change": lambda: (statistics.log2_fold_change, dict(adata=adata, **goal)),
        "ScGPT.from_config": lambda: (ScGPT.from_config, dict(name="tiny", genes=GENES, device="cpu")),
        "scGPT embed": lambda: (w.gpt.embed, dict(adata=adata)),
        "scGPT finetune": lambda: (w.gpt.finetune, dict(adata=adata, label="kind", split=deal(adata), **short)),
        "scGPT predict": lambda: (w.annotator.predict, dict(data=adata)),
        "continue_pretraining": lambda: (
            ScGPT.from_config("tiny", GENES, device="cpu").continue_pretraining,
            dict(adata=adata, epochs=1),
        ),
        "ReferenceMap": lambda: (ReferenceMap, dict(ref=adata, use_rep="X_one", label="kind", k=3)),
        "transfer": lambda: (w.map.transfer, dict(query=adata)),
        "integration": lambda: (
            scores.integration,
            dict(adata=adata, reps=["X_one", "X_two"], batch="side", label="kind", baselines=False),
        ),
        "classification": lambda: (
            scores.classification,
            dict(truth=np.array(list("abab")), probabilities=np.eye(2)[[0, 1, 0, 1]], classes=["a", "b"], n_boot=0),
        ),
        "PerturbationData": lambda: (PerturbationData, dict(adata=w.perturbed.adata.copy())),
        "split": lambda: (w.perturbed.split, dict(kind="simulation", seed=1)),
        "ScGenePT.from_config": lambda: (
            ScGenePT.from_config,
            dict(name="tiny", genes=w.perturbed, knowledge="ncbi", gene_vectors=w.know, **kill_runs.SMALL),
        ),
        "ScGenePT.fit": lambda: (
            w.genept.fit,
            dict(data=w.perturbed, split=w.perturbed.split("simulation", seed=1), epochs=1, batch_size=64),
        ),
        "ScGenePT.predict": lambda: (w.genept.predict, dict(perturbations=["G00"], controls=w.perturbed)),
        "ScGenePT.evaluate": lambda: (
            w.genept.evaluate,
            dict(data=w.perturbed, split=w.perturbed.split("simulation", seed=1)),
        ),
        "tss_windows": lambda: (tss_windows, dict(annotation=starts(), fasta=w.genome[0], length=LENGTH)),
        "rosa embed_genes": lambda: (embed_genes, dict(windows=w.windows, model=w.enformer)),
        "embed_bins": lambda: (embed_bins, dict(windows=w.windows, model=w.enformer, folder="bins")),
        "hold_out_grid": lambda: (hold_out_grid, dict(adata=expressed(), cells="donor")),
        "Rosa": lambda: (Rosa, dict(kind="mlp", **w.tiny)),
        "Rosa.fit": lambda: (
            Rosa("mlp", **w.tiny).fit,
            dict(adata=expressed(), genes=described(), grid=w.grid, epochs=1, batch_size=8),
        ),
        "Rosa.predict": lambda: (w.rosa.predict, dict(genes=["G01", "G02"])),
        "ridge predict": lambda: (w.ridge.predict, dict(genes=["G01", "G02"])),
        "Rosa.score": lambda: (w.ridge.score, dict(baselines="none")),
        "variant_effect": lambda: (variant_effect, dict(variants=w.variants, windows=w.windows, model=w.enformer)),
    }


def parameters_of(function, arguments: dict) -> list[str]:
    "The names of the arguments that may be replaced."
    found = [
        name
        for name, one in inspect.signature(function).parameters.items()
        if name not in ("self", "cls", "tokenizer") and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
    ]
    return list(dict.fromkeys([*found, *arguments]))


def outcome(world: World, door: str, name: str | None, odd: str | None, seconds: float = 30) -> str:
    "'content', 'ours: ...', 'foreign: ...' or 'hang' of one call, in a folder of its own."
    from scellfm.core import ScellfmError

    function, arguments = doors(world)[door]()
    if name is not None:
        arguments = arguments | {name: ODD[odd]()}

    def stop(*_):
        raise Hang

    before, here = signal.signal(signal.SIGALRM, stop), os.getcwd()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as place:
            warnings.simplefilter("ignore")
            os.chdir(place)
            try:
                repr(function(**arguments))
                return "content"
            finally:
                os.chdir(here)
    except ScellfmError as error:
        return f"ours: {type(error).__name__}: {error}"
    except Hang:
        return "hang"
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/scellfm/" in f.filename]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[:-4:-1]) or "the call"
        return f"foreign: {type(error).__name__} in {where}: {str(error)[:150]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def is_fine(said: str) -> bool:
    return said == "content" or said.startswith("ours")


def trials(world: World, door: str) -> list[tuple[str, str, str]]:
    "(door, argument, what stands in its place) of every trial."
    return [(door, name, odd) for name in parameters_of(*doors(world)[door]()) for odd in ODD]


OTHERS = ["read", "check_counts", "folds", "read_vectors", "GeneVectors", "take", "RankTokenizer", "embed_genes"]
OTHERS += ["state_embeddings", "pretrain", "screen of a classifier", "table", "scGPT finetune"]
OTHERS += ["scGPT predict", "continue_pretraining", "transfer", "ScGenePT.fit", "ScGenePT.predict", "tss_windows"]
OTHERS += ["Rosa", "Rosa.score"]  # doors where nothing was found
