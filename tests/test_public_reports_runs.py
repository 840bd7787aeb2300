"""What is written: nothing of the user's is lost, a run goes on only from its own parts, damage is named."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, tree
from fuzz_readers import mutate_saved
from scipy import sparse

from scellfm import cli
from scellfm.assets import hub, read_dictionary
from scellfm.core import AssetError, OptionError, ScellfmError, StoreError
from scellfm.data import hold_out
from scellfm.geneformer import (
    CellClassifier,
    GeneClassifier,
    Geneformer,
    RankTokenizer,
    Screen,
    TaskClassifier,
    TokenizedCells,
)
from scellfm.geneformer.tokenizer.corpus import Corpus
from scellfm.report import Report
from scellfm.scgpt import CellClassifier as ScGPTClassifier
from scellfm.scgpt import ReferenceMap, ScGPT
from scellfm.store import Store, atomic_write
from scellfm.store.lock import Lock

pytestmark = pytest.mark.filterwarnings("ignore")
GENES = [f"ENSG{i:011d}" for i in range(30)]


def cells(n=24, seed=0):
    obs = pd.DataFrame(
        {"cell_type": ["B", "T"] * (n // 2), "side": (["left", "right", "right", "left"] * n)[:n]},
        index=[f"c{i}" for i in range(n)],
    )
    counts = np.random.default_rng(seed).poisson(2.0, (n, 30)).astype(np.float32)
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=GENES))


def split(adata):
    return hold_out(adata, fractions=(0.5, 0, 0.5))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Everything that a folder is written of, by name: how to write it."
    adata, folder = cells(), tmp_path_factory.mktemp("made")
    adata.write_h5ad(folder / "cells.h5ad")
    tok = RankTokenizer.fit(adata)
    gf = Geneformer.from_config("tiny", tok, device="cpu")
    options = dict(split=split(adata), epochs=1, n_boot=0)
    clf = gf.finetune(adata, "cell_type", **options)
    scgpt = ScGPT.from_config("tiny", GENES, device="cpu")
    report = Report("A page")
    embedded = cells()
    embedded.obsm["X"] = np.random.default_rng(0).normal(size=(24, 4))
    return {
        "tokenizer": tok.save_pretrained,
        "tokenized cells": tok(adata).save,
        "tokenized file": lambda path: tok.tokenize_files(folder / "cells.h5ad", path),
        "Geneformer": gf.save_pretrained,
        "cell classifier": clf.save_pretrained,
        "gene classifier": gf.finetune_genes(
            adata, {"a": GENES[:10], "b": GENES[10:]}, folds=2, epochs=1, n_boot=0
        ).save_pretrained,
        "classifier of several labels": gf.finetune(adata, ["cell_type", "side"], **options).save_pretrained,
        "scGPT classifier": scgpt.finetune(adata, "cell_type", **options).save_pretrained,
        "screen": clf.perturb(adata, state="cell_type", start="B", goal="T", genes=GENES[:3]).save,
        "scGPT": scgpt.save_pretrained,
        "reference map": ReferenceMap(embedded, "X", k=3).save,
        "report": report.save,
    }


THINGS = [
    "tokenizer",
    "tokenized cells",
    "tokenized file",
    "Geneformer",
    "cell classifier",
    "gene classifier",
    "classifier of several labels",
    "scGPT classifier",
    "screen",
    "scGPT",
    "reference map",
    "report",
]


# ---- E25: an output folder that exists


def thesis(folder: Path) -> dict[str, bytes]:
    "A user's folder with files of every name that we write, none of them ours."
    folder.mkdir(parents=True)
    (folder / "chapter.md").write_text("It was a dark and stormy night.")
    names = ("state.json", "screen.json", "index.json", "config.json", "args.json", "vocab.json", "report.json")
    for name in (*names, "classifier.json", "tasks.json", "gene_classifier.json", "annotator.json", "vectors.json"):
        (folder / name).write_text(json.dumps({"title": "mine", "chapters": [1, 2]}))
    for name in ("token_dictionary.json", "gene_median_dictionary.json", "report.html", "model.safetensors"):
        (folder / name).write_text('{"mine": "too"}')
    return tree(folder)


@pytest.mark.parametrize("thing", THINGS)
def test_a_folder_of_the_user_is_never_replaced_nor_a_file_in_it_overwritten(made, tmp_path, thing):
    before = thesis(tmp_path / "thesis")
    with pytest.raises(StoreError, match="nothing was touched"):
        made[thing](tmp_path / "thesis")
    assert tree(tmp_path / "thesis") == before
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


@pytest.mark.parametrize("thing", THINGS)
def test_an_earlier_result_of_the_same_kind_is_replaced_and_one_of_another_kind_is_not(made, tmp_path, thing):
    made[thing](tmp_path / "out")
    whole = tree(tmp_path / "out")
    made[thing](tmp_path / "out")
    assert tree(tmp_path / "out").keys() == whole.keys()
    other = "screen" if thing != "screen" else "reference map"
    before = tree(tmp_path / "out")
    with pytest.raises(StoreError, match="nothing was touched"):
        made[other](tmp_path / "out")
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("thing", ["tokenized cells", "tokenized file", "screen", "reference map"])
def test_a_note_laid_into_an_earlier_result_keeps_it_from_being_replaced(made, tmp_path, thing):
    made[thing](tmp_path / "out")
    (tmp_path / "out" / "notes.md").write_text("mine")
    before = tree(tmp_path / "out")
    with pytest.raises(StoreError, match="notes.md"):
        made[thing](tmp_path / "out")
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("thing", [thing for thing in THINGS if thing != "report"])
def test_a_path_that_can_be_no_output_is_refused_in_words(made, tmp_path, monkeypatch, thing):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious.txt").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    for path in (".", "..", "/", "", "  ", "~nobody-of-that-name/out", "pipe", "a\0b"):
        with pytest.raises(OptionError, match="path|folder"):
            made[thing](path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pipe", "precious.txt"]


def test_a_link_to_an_earlier_result_stays_a_link(made, tmp_path):
    made["screen"](tmp_path / "disk" / "screen")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "screen")
    made["screen"](tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and Screen.load(tmp_path / "disk" / "screen") is not None


def run(*arguments) -> int:
    try:
        return cli.main(list(map(str, arguments))) or 0
    except SystemExit as done:
        return done.code


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tokenizer", "Geneformer", "scGPT"):
        made[name](tmp_path / name)
    made["cell classifier"](tmp_path / "clf")
    thesis(tmp_path / "thesis")
    adata = cells()
    adata.obsm["X"] = np.random.default_rng(0).normal(size=(24, 4))
    adata.write_h5ad(tmp_path / "thesis" / "cells.h5ad")
    return tmp_path


COMMANDS = {
    "tokenize": "tokenize thesis/cells.h5ad --tokenizer tokenizer --out {}",
    "fit": "tokenize thesis/cells.h5ad --out new --fit {}",
    "embed": "embed thesis/cells.h5ad --model Geneformer --out {}",
    "finetune": "finetune thesis/cells.h5ad --model Geneformer --label cell_type --k 2 --out {}",
    "finetune scGPT": "finetune thesis/cells.h5ad --model scGPT --label cell_type --k 2 --out {}",
    "predict": "predict thesis/cells.h5ad --model clf --out {}",
    "perturb": "perturb thesis/cells.h5ad --model clf --genes ENSG00000000001 --out {}",
    "map": "map thesis/cells.h5ad thesis/cells.h5ad --use-rep X --out {}",
    "save of a map": "map thesis/cells.h5ad thesis/cells.h5ad --use-rep X --out new --save {}",
    "integrate": "integrate thesis/cells.h5ad --reps X --batch side --label cell_type --out {}",
    "demo": "demo --out {}",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_costs_a_user_a_folder(place, command, capsys):
    files = "embed" in command or command == "predict"
    before = tree(place)
    shutil.copytree(place / "thesis", place / "thesis.csv") if files else None
    (place / "pipe.csv").unlink(missing_ok=True)
    os.mkfifo(place / "pipe.csv")
    for out in ("thesis.csv" if files else "thesis", "." if not files else "", "/", "pipe.csv", "~nobody-here/x.csv"):
        start = time.monotonic()
        assert run(*COMMANDS[command].format("\0" + out + "\0").replace("\0", "").split(" ")) == 2, out
        assert time.monotonic() - start < 20  # before the work
        told = capsys.readouterr().err
        assert "Traceback" not in told and told.strip(), out
    shutil.rmtree(place / "thesis.csv") if files else None
    assert tree(place) == before


@pytest.mark.parametrize("command", ["embed", "predict"])
def test_an_input_is_never_replaced_by_the_result(place, command, capsys):
    before = tree(place)
    words = COMMANDS[command].format("thesis/cells.h5ad").split()
    assert run(*words) == 2
    assert "is read from there" in capsys.readouterr().err and tree(place) == before


def test_a_data_set_is_not_tokenized_over_the_folder_of_its_cells(made, tmp_path):
    adata = cells()
    tok = RankTokenizer.fit(adata)
    tok(adata).save(tmp_path / "out")  # an earlier data set, into which cells were laid
    adata.write_h5ad(tmp_path / "out" / "data-cells.arrow.h5ad")
    with pytest.raises(StoreError, match="is read from there"):
        tok.tokenize_files(tmp_path / "out" / "data-cells.arrow.h5ad", tmp_path / "out")
    assert (tmp_path / "out" / "data-cells.arrow.h5ad").exists()


# ---- E34: what can be known before the work is said before it

NOWHERE = {
    "embed": "embed nowhere.h5ad --model nowhere --out {}",
    "finetune": "finetune nowhere.h5ad --model nowhere --label cell_type --k 2 --out {}",
    "perturb": "perturb nowhere.h5ad --model nowhere --genes A --out {}",
    "map": "map nowhere.h5ad nowhere.h5ad --use-rep X --out {}",
    "integrate": "integrate nowhere.h5ad --reps X --batch side --label cell_type --out {}",
    "predict": "predict nowhere.h5ad --model nowhere --out {}",
    "evaluate": "evaluate nowhere.h5ad --model nowhere --out {}",
    "tokenize": "tokenize nowhere.h5ad --fit new --out {}",
    "windows": "sequence windows nowhere.gtf --out {}",
    "vectors": "sequence embed nowhere.gtf --fasta nowhere.fa --model kmer-3 --out {}",
    "variants": "sequence variants nowhere.vcf nowhere.gtf --fasta nowhere.fa --model nowhere --out {}",
    "reproduce": "reproduce simulated --out {}",
}
FILES = {"embed", "predict", "evaluate", "windows", "variants"}


@pytest.mark.parametrize("command", NOWHERE)
def test_an_output_that_cannot_be_written_is_said_before_anything_is_read(tmp_path, monkeypatch, command, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    for out in ("/proc/nothing", "file"):
        name = f"{out}/new.csv" if command in FILES else f"{out}/new"
        assert run(*NOWHERE[command].format(name).split()) == 2
        told = capsys.readouterr().err
        assert "cannot be written" in told or "is a file" in told, told
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "words, named",
    [
        (f"{NOWHERE[command]} {option}", option.split()[0].strip("-").replace("-", "_"))
        for command, option in [
            *[(command, f"--seed {n}") for command in ("finetune", "perturb", "integrate") for n in (-1, 2**32)],
            *[("tokenize", f"--max-length {n}") for n in (0, -1, 10**12)],
            *[("embed", f"--max-length {n}") for n in (0, 10**12)],
            *[("finetune", f"--{name} {n}") for name in ("epochs", "batch-size") for n in (0, -1, 10**12)],
            *[("perturb", f"--max-cells {n}") for n in (0, -3)],
            ("embed", "--token-budget 0"),
            ("reproduce", "--epochs 0"),
            ("finetune", "--n-boot -1"),
        ]
    ],
)
def test_a_setting_that_no_run_has_is_said_before_anything_is_read(tmp_path, monkeypatch, words, named, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*words.format("new.csv" if words.startswith("embed") else "new").split()) == 2
    told = capsys.readouterr().err
    assert f"{named}=" in told and "must be a whole number" in told, told
    assert not any(tmp_path.iterdir())


def test_a_seed_that_no_library_takes_is_refused_by_every_task_in_python(tmp_path):
    gf, gpt, adata = geneformer(tmp_path / "gf"), scgpt(tmp_path / "gpt"), cells()
    deal = split(adata)
    for seed in (-1, 2**32, 1.5):
        for ask in (
            lambda: hold_out(adata, seed=seed),
            lambda: gf.pretrain(adata, seed=seed),
            lambda: gf.finetune(adata, "cell_type", split=deal, seed=seed),
            lambda: gf.finetune_genes(adata, {"a": GENES[:10], "b": GENES[10:]}, folds=2, seed=seed),
            lambda: gf.perturb(adata, seed=seed),
            lambda: gpt.finetune(adata, "cell_type", split=deal, seed=seed),
            lambda: gpt.continue_pretraining(adata, seed=seed),
            lambda: gpt.embed(adata, seed=seed),
        ):
            with pytest.raises(OptionError, match="seed"):
                ask()


# ---- E28: what a killed writer leaves

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from scellfm.geneformer import RankTokenizer
from scellfm.geneformer.tokenizer import tokenized
finish = tokenized.DatasetWriter.finish
def killed(self, *arguments):
    finish(self, *arguments)
    os.kill(os.getpid(), signal.SIGKILL)
tokenized.DatasetWriter.finish = killed
import test_public_reports_runs as here
tok = RankTokenizer.fit(here.cells())
tok.tokenize_files(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("date", [0, 86400])
def test_the_finished_folder_of_a_killed_tokenizing_is_not_read_and_goes_with_the_next_run(tmp_path, date):
    adata = cells(60)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    tok = RankTokenizer.fit(cells())
    (tmp_path / "sets").mkdir()
    tok.tokenize_files(tmp_path / "cells.h5ad", tmp_path / "sets" / "first")
    code = KILLED.format(tests=str(ROOT / "tests"))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, tmp_path / "cells.h5ad", tmp_path / "sets" / "b"], env=env
    )
    assert done.returncode == -signal.SIGKILL
    left = [path for path in (tmp_path / "sets").iterdir() if path.name.startswith(".")]
    assert any((path / "state.json").exists() for path in left)
    for path in left:
        os.utime(path, (time.time() + date,) * 2)
    assert len(Corpus(tmp_path / "sets")) == 60
    for path in left:
        if path.is_dir():
            with pytest.raises(ScellfmError, match="temporary folder"):
                TokenizedCells.load(path)
    tok.tokenize_files(tmp_path / "cells.h5ad", tmp_path / "sets" / "b")
    assert sorted(path.name for path in (tmp_path / "sets").iterdir()) == ["b", "first"]
    assert len(Corpus(tmp_path / "sets")) == 120


def writes_of_safetensors():
    "Every function that writes a file through safetensors: f(path)."
    import torch

    from scellfm.assets.tensors import save_tensors
    from scellfm.scgpt.approximate import ARRAYS, SETTLED, write_index
    from scellfm.training import Checkpoint, History

    index = SimpleNamespace(**{name: np.ones(3) for name in ARRAYS}, **dict.fromkeys(SETTLED, 1))

    def save_checkpoint(path):
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        Checkpoint(path.parent, {}).save(model, optimizer, {}, History(), {"step": 0, "waited": 0})

    return {
        "tensors": lambda path: save_tensors(path, {"a": torch.ones(3)}),
        "training": save_checkpoint,
        "search index": lambda path: write_index(index, path),
    }


@pytest.mark.parametrize("kind", ["tensors", "training", "search index"])
def test_what_safetensors_leaves_in_a_killed_process_goes_with_the_next_write(tmp_path, monkeypatch, kind):
    write, path = writes_of_safetensors()[kind], tmp_path / "training.safetensors"

    def killed(tensors, path, *args, **kwargs):
        (Path(path).parent / ".tmpAb12cd").write_bytes(b"half")  # as it does, and renames it in the end
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr("safetensors.torch.save_file", killed)
        monkeypatch.setattr("safetensors.numpy.save_file", killed)
        try:
            write(path)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert [left.name[:6] for left in tmp_path.iterdir()] == [".part-"]
    write(path)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode, "others may read what is written"


def test_what_a_living_writer_is_writing_is_left_alone(tmp_path):
    with atomic_write(tmp_path / "one.csv") as part:
        part.write_text("half")
        with atomic_write(tmp_path / "two.csv") as other:
            other.write_text("whole")
        assert part.read_text() == "half"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.csv", "two.csv"]


ASIDE = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_public_reports_runs as here
from pathlib import Path
replace, calls = os.replace, []
def second_kills(source, target):
    calls.append(target)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = second_kills
from scellfm.geneformer import RankTokenizer
RankTokenizer.fit(here.cells())(here.cells(6)).save(sys.argv[1])
"""


def test_an_old_result_that_stepped_aside_for_one_that_was_killed_comes_back(made, tmp_path):
    made["tokenized cells"](tmp_path / "out")
    whole = tree(tmp_path / "out")
    code, env = ASIDE.format(tests=str(ROOT / "tests")), {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, tmp_path / "out"], env=env)
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    with atomic_write(tmp_path / "other.csv") as part:
        part.write_text("x")
    assert tree(tmp_path / "out") == whole
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".part")] == []


def test_two_runs_do_not_write_the_same_result(made, tmp_path):
    held = Lock(tmp_path / ".lock-out")
    with pytest.raises(StoreError, match="is being written by process"):
        made["tokenized file"](tmp_path / "out")
    held.release()
    made["tokenized file"](tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("text", ["", "[1]", '{"host": 3}', '{"host": "h", "pid": "many", "started": "", "token": ""}'])
def test_a_lock_that_is_dated_tomorrow_does_not_block(tmp_path, text):
    (tmp_path / "run").mkdir()
    for name, content in (("lock", text), (".part-clearing", "")):
        (tmp_path / "run" / name).write_text(content)
        os.utime(tmp_path / "run" / name, (time.time() + 86400,) * 2)
    start = time.monotonic()
    with Store(tmp_path / "run", {"seed": 0}) as store:
        store.write("a", x=np.zeros(3))
        store.finish()
    assert time.monotonic() - start < 5
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["a.npz", "manifest.json"]


# ---- E27: a run goes on only from its own parts


def other_counts(adata):
    "Other counts with the same zeros."
    adata.X.data = np.random.default_rng(9).permutation(adata.X.data)
    return adata


def with_layer(adata):
    adata.layers["other"] = other_counts(adata.copy()).X
    return adata


def geneformer(folder, medians=1.0, **config):
    "A tiny Geneformer, with other medians of half the genes, or other settings in its config.json."
    tok = RankTokenizer.fit(cells())
    changed = {gene: m * (medians if i % 2 else 1) for i, (gene, m) in enumerate(tok.medians.items())}
    tok = RankTokenizer(tok.token_dictionary, changed, max_length=tok.max_length)
    Geneformer.from_config("tiny", tok).save_pretrained(folder)
    told = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(told))
    return Geneformer.from_pretrained(folder, device="cpu")


def scgpt(folder, **args):
    ScGPT.from_config("tiny", GENES, dropout=0.0).save_pretrained(folder)
    told = json.loads((folder / "args.json").read_text()) | args
    (folder / "args.json").write_text(json.dumps(told))
    return ScGPT.from_pretrained(folder, device="cpu")


def heavier(model, by=0.01):
    weight = next(model.model.parameters())
    weight.data += by
    return model


LEARNING = dict(
    epochs=2,
    learning_rate=2e-3,
    batch_size=5,
    weight_decay=0.1,
    seed=5,
    warmup=0.3,
    schedule="constant",
    clip=0.5,
    decay=0.5,
    shuffle=False,
    accumulate=2,
    steps=1,
    patience=1,
)
GENEFORMER = dict(medians=3.0, hidden_act="gelu", num_attention_heads=2, hidden_dropout_prob=0.3)
RUNS = {  # run: (model, how it is called, options that change a number, changes of the model's files)
    "finetune": (
        geneformer,
        lambda gf, adata, **how: gf.finetune(adata, how.pop("label", "cell_type"), split=split(adata), n_boot=0, **how),
        LEARNING | dict(label="side", freeze_layers=1, class_weights="balanced", layer="other"),
        GENEFORMER,
    ),
    "several labels": (
        geneformer,
        lambda gf, adata, **how: gf.finetune(
            adata, how.pop("label", ["cell_type", "side"]), split=split(adata), n_boot=0, **how
        ),
        LEARNING
        | dict(label=["side", "cell_type"], freeze_layers=1, class_weights="balanced", layer="other")
        | dict(task_weights={"side": 2.0}, accumulate=None, batch_size=7),
        GENEFORMER,
    ),
    "gene classes": (
        geneformer,
        lambda gf, adata, **how: gf.finetune_genes(
            adata, how.pop("classes", {"a": GENES[:10], "b": GENES[10:]}), folds=2, n_boot=0, **how
        ),
        LEARNING
        | dict(classes={"a": GENES[:15], "b": GENES[15:]}, freeze_layers=1, class_weights="balanced", layer="other")
        | dict(max_cells=10),
        GENEFORMER,
    ),
    "pretrain": (
        geneformer,
        lambda gf, adata, **how: gf.pretrain(adata, **({"epochs": 1} | how)),
        LEARNING | dict(mask_share=0.3, held_out=0.3, layer="other"),
        GENEFORMER,
    ),
    "embed": (
        geneformer,
        lambda gf, adata, **how: gf.embed(adata, **how),
        dict(emb_layer=0, token_budget=99, layer="other"),
        GENEFORMER,
    ),
    "embed genes": (
        geneformer,
        lambda gf, adata, **how: gf.embed_genes(adata, **how),
        dict(emb_layer=0, token_budget=99, layer="other"),
        GENEFORMER,
    ),
    "perturb": (
        geneformer,
        lambda gf, adata, **how: gf.perturb(
            adata, **(dict(genes=GENES[:3], state="cell_type", start="B", goal="T") | how)
        ),
        dict(
            genes=GENES[1:4],
            states=dict(start="T", goal="B"),
            kind="overexpress",
            combine="each",
            emb_layer=0,
            max_cells=4,
        )
        | dict(seed=7, token_budget=99, layer="other", groupby="side", where={"side": "left"}, donor="side", matched=2),
        GENEFORMER,
    ),
    "scGPT finetune": (
        scgpt,
        lambda gpt, adata, **how: gpt.finetune(
            adata, how.pop("label", "cell_type"), split=split(adata), n_boot=0, **({"epochs": 1} | how)
        ),
        LEARNING | dict(label="side", freeze_layers=1, max_length=9, layer="other"),
        dict(nheads=2, n_bins=7, pad_value=-3, dropout=0.5),
    ),
    "continual pretraining": (
        scgpt,
        lambda gpt, adata, **how: gpt.continue_pretraining(adata, **({"epochs": 1} | how)),
        LEARNING
        | dict(label="side", mask_share=0.3, held_out=0.3, max_length=9, layer="other", accumulate=None, batch_size=7),
        dict(nheads=2, n_bins=7, pad_value=-3, dropout=0.5, mask_value=-5),
    ),
    "scGPT embed": (
        scgpt,
        lambda gpt, adata, **how: gpt.embed(adata, **how),
        dict(pool="mean", max_length=9, overlong="top", seed=4, token_budget=99, layer="other"),
        dict(nheads=2, n_bins=7, pad_value=-3),
    ),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_changed_input_or_setting_of_a_run_that_resumes_is_refused(tmp_path, run):
    make, call, settings, files = RUNS[run]
    call(make(tmp_path / "model"), with_layer(cells()), folder=tmp_path / "run")
    before = tree(tmp_path / "run")
    tried = [("other counts", dict(adata=other_counts(with_layer(cells())))), ("weights", dict(weights=True))]
    changes = {
        name: value if name == "states" else {name: value} for name, value in settings.items() if value is not None
    }
    tried += [(name, {"settings": change}) for name, change in changes.items()]
    tried += [(name, {"files": {name: value}}) for name, value in files.items()]
    for name, change in tried:
        model = make(tmp_path / "model", **change.get("files", {}))
        model = heavier(model) if "weights" in change else model
        with pytest.raises(StoreError, match="another run|other inputs"):
            call(model, change.get("adata", with_layer(cells())), folder=tmp_path / "run", **change.get("settings", {}))
            pytest.fail(f"{name} was changed and the old result came back")
        assert tree(tmp_path / "run") == before, name
    call(make(tmp_path / "model"), with_layer(cells()), folder=tmp_path / "run")
    assert tree(tmp_path / "run") == before


def test_cells_of_the_same_tokens_are_the_same_input_and_what_reads_counts_is_computed_anew(tmp_path):
    "Geneformer reads ranks: what a run keeps does not depend on the factor of a cell; what does, it does not keep."
    gf, adata = geneformer(tmp_path / "model"), cells()
    tok, share = gf.tokenizer, split(adata)
    factors = np.where(adata.obs["cell_type"] == "T", 7.0, 1.0).astype(np.float32)
    more = anndata.AnnData(sparse.diags(factors) @ adata.X, adata.obs.copy(), adata.var.copy())
    unknown = np.column_stack([factors * 50, np.ones(24)]).astype(np.float32)  # a gene without a token
    more = anndata.AnnData(
        sparse.hstack([more.X, unknown]).tocsr(), adata.obs.copy(), pd.DataFrame(index=[*GENES, "ENSG9", "ENSG8"])
    )
    assert [list(cell) for cell in tok(more)] == [list(cell) for cell in tok(adata)]
    goal = dict(genes=GENES[:3], state="cell_type", start="B", goal="T")
    first, alone = gf.perturb(adata, folder=tmp_path / "screen", **goal), gf.perturb(more, **goal)
    again = gf.perturb(more, folder=tmp_path / "screen", **goal)
    pd.testing.assert_frame_equal(again.table(), alone.table())
    assert not np.allclose(again.genes["log2fc"], first.genes["log2fc"])
    training = dict(split=share, epochs=1, n_boot=0)
    gf.finetune(adata, "cell_type", folder=tmp_path / "clf", **training)
    again, alone = (
        geneformer(tmp_path / "model").finetune(more, "cell_type", folder=folder, **training)
        for folder in (tmp_path / "clf", None)
    )
    pd.testing.assert_frame_equal(again.scores.table, alone.scores.table)


def test_two_trainings_do_not_write_one_checkpoint(tmp_path):
    gf, adata = geneformer(tmp_path / "model"), cells()
    (tmp_path / "run" / "fold0").mkdir(parents=True)
    held = Lock(tmp_path / "run" / "fold0" / "lock")
    with pytest.raises(StoreError, match="is being written by process"):
        gf.finetune(adata, "cell_type", split=split(adata), n_boot=0, folder=tmp_path / "run")
    held.release()
    (tmp_path / "run" / "fold0" / "lock").write_text("{")
    os.utime(tmp_path / "run" / "fold0" / "lock", (time.time() + 86400,) * 2)
    gf.finetune(adata, "cell_type", split=split(adata), n_boot=0, folder=tmp_path / "run")
    assert list(tree(tmp_path / "run")) == ["fold0/training.safetensors"]


# ---- D16: numbers of numpy and pandas


def graded(adata):
    "A column of whole numbers and one of nullable booleans."
    adata.obs["grade"] = pd.array([1, 2] * (adata.n_obs // 2), dtype="Int64")
    adata.obs["treated"] = pd.array([True, False] * (adata.n_obs // 2), dtype="boolean")
    return adata


def test_a_screen_between_values_of_a_column_is_saved_and_read_back(tmp_path):
    gf, adata = geneformer(tmp_path / "model"), graded(cells())
    first, second = adata.obs["grade"].unique()[:2]
    options = dict(genes=GENES[:3], combine="each", max_cells=np.int32(4), seed=np.uint8(3), emb_layer=np.int64(-1))
    screen = gf.perturb(adata, state="grade", start=first, goal=second, where={"treated": [np.True_, False]}, **options)
    screen.save(tmp_path / "screen")
    params = Screen.load(tmp_path / "screen").params
    assert [params[name] for name in ("max_cells", "seed", "emb_layer")] == [4, 3, -1]
    assert all(type(params[name]) is int for name in ("max_cells", "seed", "emb_layer"))


@pytest.mark.parametrize("label", ["grade", "treated"])
def test_settings_of_a_classifier_come_back_with_their_types(tmp_path, label):
    gf, adata = geneformer(tmp_path / "model"), graded(cells())
    numbers = dict(epochs=np.int64(1), seed=np.int16(3), batch_size=np.uint8(6), freeze_layers=np.int64(1))
    more = dict(learning_rate=np.float32(0.001), class_weights=None, n_boot=np.int64(0))
    clf = gf.finetune(adata, label, split=split(adata), **numbers, **more)
    clf.save_pretrained(tmp_path / "clf")
    settings = CellClassifier.from_pretrained(tmp_path / "clf", device="cpu").settings
    assert {name: settings[name] for name in numbers} == {name: int(value) for name, value in numbers.items()}
    assert all(type(settings[name]) is int for name in numbers) and type(settings["learning_rate"]) is float
    clf.predict(adata)
    assert adata.obs[f"{label}_predicted"].notna().all()


# ---- E36, and kills


def test_the_same_model_is_saved_to_the_same_bytes(made, tmp_path):
    for name in ("one", "another"):
        made["scGPT"](tmp_path / name)
        made["scGPT classifier"](tmp_path / f"{name} classifier")
    assert tree(tmp_path / "one") == tree(tmp_path / "another")
    assert tree(tmp_path / "one classifier") == tree(tmp_path / "another classifier")


# ---- E32, E33, E35: files that are believed too early


def use(found):
    "What a reader of a saved thing does first."
    repr(found)
    scores = getattr(found, "scores", None)
    for table in scores.values() if isinstance(scores, dict) else [scores] if scores is not None else []:
        repr(table), table._repr_html_()
    if isinstance(found, Screen):
        found.table(method="goal_state_shift")


READERS = {
    "tokenizer": RankTokenizer.from_pretrained,
    "Geneformer": lambda path: Geneformer.from_pretrained(path, device="cpu"),
    "cell classifier": lambda path: CellClassifier.from_pretrained(path, device="cpu"),
    "gene classifier": lambda path: GeneClassifier.from_pretrained(path, device="cpu"),
    "classifier of several labels": lambda path: TaskClassifier.from_pretrained(path, device="cpu"),
    "scGPT classifier": lambda path: ScGPTClassifier.from_pretrained(path, device="cpu"),
    "screen": Screen.load,
    "scGPT": lambda path: ScGPT.from_pretrained(path, device="cpu"),
    "reference map": ReferenceMap.load,
}


def mutate(made, folder, thing, rounds):
    "A saved thing, read with other values in its JSON files."
    made[thing](folder)
    mutate_saved(folder, lambda path: use(READERS[thing](path)), rounds)


@pytest.mark.parametrize("thing", READERS)
def test_json_with_a_value_of_another_type_is_named_or_read(made, tmp_path, thing):
    mutate(made, tmp_path / "out", thing, 12)


@pytest.mark.slow
@pytest.mark.parametrize("thing", READERS)
def test_json_with_a_value_of_another_type_is_named_or_read_in_a_long_trial(made, tmp_path, thing):
    mutate(made, tmp_path / "out", thing, 1500)


@pytest.mark.parametrize(
    "thing, file, change",
    [
        ("Geneformer", "config.json", {"num_hidden_layers": 999}),
        ("Geneformer", "config.json", {"vocab_size": 2**24}),
        ("Geneformer", "config.json", {"num_hidden_layers": 10**6}),
        ("Geneformer", "config.json", {"max_position_embeddings": 2**20}),
        ("Geneformer", "token_dictionary.json", {GENES[0]: 10**9}),
        ("scGPT", "args.json", {"nlayers": 999}),
        ("scGPT", "args.json", {"embsize": 2**16}),
        ("scGPT", "args.json", {"d_hid": 2**18}),
        ("cell classifier", "classifier.json", {"folds": 1000}),
    ],
)
def test_sizes_are_those_of_the_tensors_before_anything_is_built(made, tmp_path, thing, file, change):
    made[thing](tmp_path)
    told = json.loads((tmp_path / file).read_text()) | change
    (tmp_path / file).write_text(json.dumps(told))
    tracemalloc.start()
    try:
        with pytest.raises(AssetError):
            READERS[thing](tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2e8
    finally:
        tracemalloc.stop()


def test_a_pickle_of_nested_pairs_that_share_their_parts_does_not_hang(tmp_path):
    nested = (
        b"\x80\x02}K\x01K\x01\x86q\x01" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(1, 60)) + b"Nsu."
    )
    start = time.monotonic()
    for content in (nested, nested[:-3] + b"K\x01s."):
        (tmp_path / "in_silico_delete_x_raw.pickle").write_bytes(content)
        with pytest.raises(AssetError):
            read_dictionary(tmp_path / "in_silico_delete_x_raw.pickle", lists=True)
    assert time.monotonic() - start < 5


def test_a_hub_that_accepts_and_never_answers_is_given_up(tmp_path, monkeypatch):
    listener = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(hub, "STALLED", 0.5)
    monkeypatch.setattr(hub, "ATTEMPTS", 1)
    for name, value in (
        ("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}"),
        ("ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}"),
        ("HF_HUB_CACHE", str(tmp_path)),
        ("HF_HUB_OFFLINE", False),
    ):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value, raising=False)
    start = time.monotonic()
    with pytest.raises(AssetError, match="could not be reached|no answer"):
        hub.find("some/model", revision="0" * 40)
    listener.close()
    assert time.monotonic() - start < 60


def test_a_mark_that_leaves_the_cache_is_refused(tmp_path, monkeypatch):
    about = SimpleNamespace(siblings=[SimpleNamespace(rfilename="config.json")], sha="0" * 40)
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *args, **options: about)
    for mark in ("../../x", "a/b", "..\\x"):
        found = SimpleNamespace(etag=mark)
        monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *args, found=found, **options: found)
        with pytest.raises(AssetError, match="neither a hash"):
            hub.check_marks("some/model", None, {"allow_patterns": ["*"]})


# ---- E35: text that no file takes


def test_names_with_half_a_character_are_written_out_in_every_file(tmp_path):
    adata = cells()
    adata.obs_names = [f"c{i}\ud800" for i in range(24)]
    adata.obs["cell_type"] = ["B \udfff", "T"] * 12
    genes = [*GENES[:29], "ENSG\ud800"]
    adata.var_names = genes
    tok = RankTokenizer.fit(adata)
    tok.save_pretrained(tmp_path / "tok")
    assert RankTokenizer.from_pretrained(tmp_path / "tok").token_dictionary == tok.token_dictionary
    tok(adata, columns=["cell_type"]).save(tmp_path / "set")
    assert TokenizedCells.load(tmp_path / "set").obs.index[0] == r"c0\ud800"
    assert TokenizedCells.load(tmp_path / "set").obs["cell_type"].iloc[0] == r"B \udfff"
    gf = Geneformer.from_config("tiny", tok, device="cpu")
    screen = gf.perturb(adata, genes=genes[-3:], combine="each", state="cell_type", start="B \udfff", goal="T")
    screen.save(tmp_path / "screen")
    assert Screen.load(tmp_path / "screen").shifts["cell"].iloc[0].endswith(r"\ud800")
    gf.finetune(adata, "cell_type", split=split(adata), epochs=1, n_boot=0).save_pretrained(tmp_path / "clf")
    assert "B \udfff" in CellClassifier.from_pretrained(tmp_path / "clf", device="cpu").classes
    gpt = ScGPT.from_config("tiny", genes, device="cpu")
    gpt.save_pretrained(tmp_path / "gpt")
    assert list(ScGPT.from_pretrained(tmp_path / "gpt", device="cpu").vocabulary.tokens) == list(gpt.vocabulary.tokens)
    for task, folder in ((gf.embed, "cells"), (gf.embed_genes, "genes"), (gpt.embed, "scgpt")):
        task(adata, folder=tmp_path / folder)
