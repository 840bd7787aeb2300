"""Every run of the package that goes on from a folder, small, and a process that kills one of them again and again.

As a program: `python tests/kill_runs.py PLACE KILLS RUN...` makes the inputs of each run below PLACE, lets it end once,
then kills copies of this process that run it anew, half of them at a moment of its course and half before one of its
changes to a file, until so many were killed; what it leaves in the end is compared with what the run left alone wrote.
"""

import gc
import json
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

GENES = [f"ENSG{i:011d}" for i in range(30)]
RUNS = {}


def run_of(prepare=None):
    "Note a run by the name of its function: f(place, out) writes everything it writes below `out`."

    def noted(function):
        RUNS[function.__name__.replace("_", " ")] = (prepare, function)
        return function

    return noted


def cells(n=24, n_genes=30, seed=0):
    obs = pd.DataFrame({"kind": ["B", "T"] * (n // 2), "side": ["left", "right", "right", "left"] * (n // 4)})
    obs["donor"] = [f"d{i * 4 // n}" for i in range(n)]
    obs.index = [f"c{i}" for i in range(n)]
    counts = np.random.default_rng(seed).poisson(2.0, (n, n_genes)).astype(np.float32)
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=GENES[:n_genes]))


def deal(adata):
    from scellfm.data import hold_out

    return hold_out(adata, fractions=(0.5, 0, 0.5))


# ---- Geneformer


def save_geneformer(place):
    from scellfm.geneformer import Geneformer, RankTokenizer

    Geneformer.from_config("tiny", RankTokenizer.fit(cells())).save_pretrained(place / "model")


def geneformer(place):
    from scellfm.geneformer import Geneformer, embedding
    from scellfm.geneformer.perturbation import edits

    embedding.CELL_BLOCK = embedding.GENE_BLOCK = 2
    edits.BLOCK = 8
    return Geneformer.from_pretrained(place / "model", device="cpu")


TRAINING = dict(epochs=3, save_every=1, batch_size=6)


@run_of(save_geneformer)
def embed(place, out):
    geneformer(place).embed(cells(), folder=out / "run")


@run_of(save_geneformer)
def embed_genes(place, out):
    geneformer(place).embed_genes(cells(), folder=out / "run")


@run_of(save_geneformer)
def perturb(place, out):
    screen = geneformer(place).perturb(
        cells(), genes="all", state="kind", start="B", goal="T", groupby="side", donor="donor", folder=out / "run"
    )
    screen.save(out / "screen")


@run_of(save_geneformer)
def perturb_each_with_controls(place, out):
    how = dict(genes=GENES[:4], kind="overexpress", combine="each", matched=2)
    geneformer(place).perturb(cells(), folder=out / "run", **how).save(out / "screen")


@run_of(save_geneformer)
def perturb_pairs(place, out):
    geneformer(place).perturb(cells(), genes=GENES[:4], combine="pairs", folder=out / "run").save(out / "screen")


@run_of(save_geneformer)
def perturb_by_gradient(place, out):
    how = dict(state="kind", start="B", goal="T", gradient={"top": 5, "check_cells": 4})
    geneformer(place).perturb(cells(), genes="all", folder=out / "run", **how).save(out / "screen")


@run_of(save_geneformer)
def finetune(place, out):
    adata = cells()
    clf = geneformer(place).finetune(adata, "kind", split=deal(adata), n_boot=0, folder=out / "run", **TRAINING)
    clf.save_pretrained(out / "saved")


@run_of(save_geneformer)
def finetune_several_labels(place, out):
    adata = cells()
    geneformer(place).finetune(
        adata, ["kind", "side"], split=deal(adata), n_boot=0, folder=out / "run", **TRAINING
    ).save_pretrained(out / "saved")


@run_of(save_geneformer)
def finetune_genes(place, out):
    classes = {"a": GENES[:10], "b": GENES[10:]}
    geneformer(place).finetune_genes(
        cells(), classes, folds=2, n_boot=0, folder=out / "run", **TRAINING
    ).save_pretrained(out / "saved")


@run_of(save_geneformer)
def pretrain(place, out):
    geneformer(place).pretrain(cells(), folder=out / "run", **TRAINING)


@run_of(save_geneformer)
def search(place, out):
    from scellfm.data import folds

    adata = cells(40)
    how = dict(split=folds(adata, by="donor", k=2), trials=3, space={"learning_rate": (1e-4, 1e-2)}, n_boot=0)
    geneformer(place).search(adata, "kind", folder=out / "run", **how)


def save_cells(place):
    from scellfm.geneformer import RankTokenizer

    (place / "cells").mkdir()
    for name in ("one", "two"):
        cells(60).write_h5ad(place / "cells" / f"{name}.h5ad")
    RankTokenizer.fit(cells()).save_pretrained(place / "tokenizer")


@run_of(save_cells)
def tokenize(place, out):
    from scellfm.geneformer import RankTokenizer

    tokenizer = RankTokenizer.from_pretrained(place / "tokenizer")
    tokenizer.tokenize_files(place / "cells", out / "set", columns=["kind"])


# ---- scGPT


def save_scgpt(place):
    from scellfm.scgpt import ScGPT

    ScGPT.from_config("tiny", GENES, dropout=0.1).save_pretrained(place / "model")


def scgpt(place):
    from scellfm.scgpt import ScGPT, embedding

    if not hasattr(embedding.tokenize, "in_twos"):
        tokenize = embedding.tokenize
        embedding.tokenize = lambda *args, **options: tokenize(*args, rows=2, **options)
        embedding.tokenize.in_twos = True
    return ScGPT.from_pretrained(place / "model", device="cpu")


@run_of(save_scgpt)
def scgpt_embed(place, out):
    scgpt(place).embed(cells(), folder=out / "run")


@run_of(save_scgpt)
def scgpt_finetune(place, out):
    adata = cells()
    scgpt(place).finetune(adata, "kind", split=deal(adata), n_boot=0, folder=out / "run", **TRAINING).save_pretrained(
        out / "saved"
    )


@run_of(save_scgpt)
def continue_pretraining(place, out):
    scgpt(place).continue_pretraining(cells(), folder=out / "run", **TRAINING)


# ---- scGenePT

SMALL = dict(d_model=16, n_heads=2, d_hid=16, n_layers=1, device="cpu")


def perturbed():
    from scellfm.data import simulate_perturbations

    return simulate_perturbations(n_targets=10, n_pairs=4, n_genes=30, n_modules=2, n_cells=6, n_controls=12)


@run_of()
def scgenept_fit(place, out):
    from scellfm.scgenept import PerturbationData, ScGenePT

    made = perturbed()
    data = PerturbationData(made.adata)
    model = ScGenePT.from_config("tiny", data, knowledge="ncbi", gene_vectors=made.vectors["know"], **SMALL)
    model.fit(data, data.split("simulation", seed=1), folder=out / "run", save_every=1, epochs=2, batch_size=32)
    model.save_pretrained(out / "saved")


def save_start(place):
    from scellfm.assets.tensors import save_tensors
    from scellfm.scgenept import PerturbationData, ScGenePT
    from scellfm.scgpt.model import ScGPTModel

    start = ScGenePT.from_config("tiny", PerturbationData(perturbed().adata), **SMALL)
    start.save_pretrained(place / "scgpt")
    (place / "scgpt" / "scgenept.json").unlink()
    save_tensors(place / "scgpt" / "model.safetensors", ScGPTModel(start.model.config.encoder).state_dict())


@run_of(save_start)
def reproduce(place, out):
    from scellfm.scgenept import PerturbationData, reproduce

    made = perturbed()
    vectors, how = {"ncbi": made.vectors["know"]}, dict(seeds=(42,), epochs=1, batch_size=32)
    reproduce(PerturbationData(made.adata), place / "scgpt", vectors, out / "runs", **how)


def save_sentence_model(place):
    from test_scgenept_language import WORDS
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    kwargs = dict(pad_token="[PAD]", unk_token="[UNK]", model_max_length=8)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kwargs).save_pretrained(place / "sentences")
    BertModel(BertConfig(len(names), 16, 2, 2, 32, max_position_embeddings=8)).save_pretrained(place / "sentences")


@run_of(save_sentence_model)
def vectors_from_texts(place, out):
    from test_scgenept_language import TEXTS

    from scellfm.scgenept import language

    language.BLOCK = 2
    language.text_vectors(TEXTS, place / "sentences", folder=out / "run", device="cpu").save(out / "saved")


@run_of()
def vectors_converted(place, out):
    from scellfm.data import read_vectors

    table = pd.DataFrame(np.random.default_rng(0).normal(size=(30, 4)), index=GENES)
    table.to_csv(place / "vectors.csv")
    read_vectors(place / "vectors.csv", folder=out / "run")


# ---- rosa


def fitted(kind):
    def fit(place, out):
        from test_public_reports_resumed import fit_rosa

        fit_rosa(out / "run", kind=kind, recipe=dict(epochs=2, save_every=1)).save_pretrained(out / "saved")

    fit.__name__ = f"rosa_{kind}"
    return fit


for kind in ("mlp", "transformer", "perceiver"):
    run_of()(fitted(kind))


def save_genome(place):
    from rosa_models import lively
    from test_public_reports_resumed import genome_of

    genome_of(place, 0)
    lively(1, target_length=8).save_pretrained(place / "enformer")


def windows_of(place):
    from test_public_reports_resumed import LENGTH, starts

    from scellfm.rosa import tss_windows

    return tss_windows(starts(), place / "genome0.fa", length=LENGTH)


def enformer(place):
    from scellfm.rosa import Enformer

    return Enformer.from_pretrained(place / "enformer", device="cpu")


@run_of(save_genome)
def sequence_vectors(place, out):
    from scellfm.rosa import embed_genes

    embed_genes(windows_of(place), model=enformer(place), block=1, folder=out / "run").save(out / "saved")


@run_of(save_genome)
def sequence_bins(place, out):
    from scellfm.rosa import embed_bins

    embed_bins(windows_of(place), model=enformer(place), folder=out / "run")


@run_of(save_genome)
def kmer_vectors(place, out):
    from scellfm.rosa import kmer_vectors

    kmer_vectors(windows_of(place), folder=out / "run").save(out / "saved")


@run_of(save_genome)
def variants(place, out):
    from scellfm.rosa import variant_effect

    letters = (place / "genome0.fa").read_text().split()[1]
    table = pd.DataFrame(
        {"chrom": "chr1", "pos": [2510, 2600, 5950], "ref": [letters[i - 1] for i in (2510, 2600, 5950)]}
    )
    table["alt"] = ["CA"[base == "C"] for base in table["ref"]]
    variant_effect(table, windows=windows_of(place), model=enformer(place), tracks=0, folder=out / "run")


@run_of()
def tracks(place, out):
    from scellfm.rosa import Enformer

    rng = np.random.default_rng(0)
    model = Enformer.from_config("tiny", device="cpu", seed=0, target_length=4)
    codes, values = rng.integers(0, 4, (4, 1024)), rng.poisson(2.0, (4, 4, model.heads["human"])).astype(np.float32)
    how = dict(valid=(codes[:2], values[:2]), epochs=2, batch_size=2, save_every=1)
    model.fit(codes, values, folder=out / "run", **how)


def save_proteins(place):
    from test_rosa_vectors import SEQUENCES

    from scellfm.rosa import ESM2

    ESM2.from_config("tiny", device="cpu").model.save_pretrained(place / "esm")
    (place / "proteins.fa").write_text(
        "".join(f">{i} gene:G{i}\n{text}\n" for i, text in enumerate(SEQUENCES.values()))
    )


@run_of(save_proteins)
def protein_vectors(place, out):
    from scellfm.rosa import ESM2, embed_proteins

    esm = ESM2.from_pretrained(place / "esm", device="cpu")
    embed_proteins(place / "proteins.fa", model=esm, folder=out / "run", block=1).save(out / "saved")


# ---- what is fetched


def serve(place):
    from hub_server import Hub

    content = np.random.default_rng(0).bytes(3_000_000)
    files = {"config.json": b"{}", "model.safetensors": content, "file.bin": content}
    serve.hub = Hub({"org/data": files}).__enter__()


@run_of(serve)
def download(place, out):
    from scellfm.assets import download

    os.environ["SCELLFM_CACHE"] = str(out / "cache")
    download.PIECE = 2**14
    download.download_file(f"{serve.hub.url}/org/data/resolve/main/file.bin", out / "file.bin")


# ---- to be killed


def tree(folder: Path) -> dict[str, bytes | None]:
    "The bytes of every file below a folder, and None for every folder, by its path from there."
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")


def watch(out: Path, act) -> None:
    "Call act() before every change that this process makes to a file below `out`."

    def hook(event, arguments):
        if event == "open" and (isinstance(arguments[1], str) and set("wax+") & set(arguments[1]) or arguments[2] & 3):
            changed = arguments[:1]
        elif event in CHANGES:
            changed = [value for value in arguments if isinstance(value, (str, bytes, os.PathLike))]
        else:
            return
        if any(
            isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(str(out)) for path in changed
        ):
            act()

    sys.addaudithook(hook)


def child(run, place: Path, out: Path, at: int | None = None) -> int:
    "A copy of this process that runs; it kills itself before its change number `at`."
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    count = [0]

    def act():
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        if at is not None:
            watch(out, act)
        out.mkdir(exist_ok=True)
        run(place, out)
        if at == -1:
            (place / "changes").write_text(str(count[0]))
        os._exit(0)
    except BaseException as error:
        traceback.print_exception(error)
        os._exit(1)


def ended(pid: int) -> bool:
    "Did it end by itself? False: it was killed; RuntimeError: it failed."
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) != signal.SIGKILL:
            raise RuntimeError(f"a resumed run crashed with signal {os.WTERMSIG(status)}")
        return False
    if os.WEXITSTATUS(status):
        raise RuntimeError("a resumed run failed")
    return True


def timed(run, place: Path) -> tuple[float, int]:
    "Seconds and number of changes of a whole run in a copy of this process, whose bytes are those of the first."
    seconds = []
    for out, at in ((place / "again", None), (place / "watched", -1)):
        began = time.monotonic()
        ended(child(run, place, out, at))
        seconds.append(time.monotonic() - began)
        compare(out, place / "whole")
        shutil.rmtree(out)
    return min(seconds), int((place / "changes").read_text())


def copies_took() -> float:
    "Seconds of processor that the copies of this process have taken so far."
    return os.times().children_user + os.times().children_system


def compare(found: Path, whole: Path) -> None:
    "AssertionError unless both folders hold the same bytes."
    here, there = tree(found), tree(whole)
    if here != there:
        odd = sorted(here.keys() ^ there.keys())
        raise AssertionError(f"only in one: {odd}; other bytes: {[k for k in here if here[k] != there.get(k)]}")


def kill_again_and_again(name: str, place: Path, kills: int) -> dict:
    "How often a run was killed, and how often it came to its end meanwhile; AssertionError: other bytes, leftovers."
    prepare, run = RUNS[name]
    place.mkdir(parents=True, exist_ok=True)
    if prepare:
        prepare(place)
    (place / "whole").mkdir()
    run(place, place / "whole")  # imports and compiles, too: what copies of this process need not do again
    gc.collect()
    gc.freeze()  # else the first collection of every copy would copy the memory of this process
    before = copies_took()
    seconds, changes = timed(run, place)
    out, rng, killed, finished = place / "out", np.random.default_rng(0), 0, 0
    while killed < kills and finished < 6 * kills:
        if killed % 2:
            pid = child(run, place, out, int(rng.integers(1, changes + 1)))
        else:
            pid = child(run, place, out)
            time.sleep(rng.uniform(0, 1.1) * seconds)
            os.kill(pid, signal.SIGKILL)
        if ended(pid):
            compare(out, place / "whole")
            shutil.rmtree(out)
            finished += 1
        else:
            killed += 1
    if not ended(child(run, place, out)):
        raise RuntimeError("the last run did not end")
    compare(out, place / "whole")
    figures = {"seconds": round(seconds, 3), "changes": changes, "processor": round(copies_took() - before, 1)}
    return {"run": name, "killed": killed, "finished": finished, **figures}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    failed = []
    for name in sys.argv[3:]:
        try:
            found = kill_again_and_again(name, Path(sys.argv[1]) / name.replace(" ", "-"), int(sys.argv[2]))
        except Exception:
            failed.append(name)
            traceback.print_exc()
            continue
        print(json.dumps(found), flush=True)
    sys.exit(f"{', '.join(failed)}: see above" if failed else 0)
