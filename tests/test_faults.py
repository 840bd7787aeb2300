"""Faults of the machine: full disk, kill -9, flipped bits, no cache, two writers, forks, odd locale and clock.

Whatever is saved is whole or absent, a run goes on to the same bytes, an error names the file. What the store itself
does in any order of faults is in `test_store_machine`, damaged files of every kind in `test_fuzz_readers`.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, tree
from scipy import sparse

from scellfm.core import AssetError, ScellfmError, StoreError
from scellfm.data import GeneVectors, hold_out, simulate_perturbations
from scellfm.geneformer import (
    CellClassifier,
    GeneClassifier,
    Geneformer,
    RankTokenizer,
    Screen,
    TaskClassifier,
    TokenizedCells,
)
from scellfm.rosa import Rosa, hold_out_grid
from scellfm.scgenept import PerturbationData, ScGenePT
from scellfm.scgpt import CellClassifier as Annotator
from scellfm.scgpt import ReferenceMap, ScGPT
from scellfm.store import Store
from scellfm.training import Checkpoint, History

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.filterwarnings("ignore::scellfm.core.ScellfmWarning")  # models of one step
GENES = [f"ENSG{i:011d}" for i in range(30)]


def cells(n=24):
    obs = pd.DataFrame({"cell_type": ["B", "T"] * (n // 2)}, index=[f"c{i}" for i in range(n)])
    counts = np.random.default_rng(0).poisson(2.0, (n, 30)).astype(np.float32)
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=GENES))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "One of each thing that can be saved: (how to save it, how to read it back)."
    adata, folder = cells(), tmp_path_factory.mktemp("made")
    tok = RankTokenizer.fit(adata)
    gf = Geneformer.from_config("tiny", tok, device="cpu")
    clf = gf.finetune(adata, "cell_type", split=hold_out(adata, fractions=(0.5, 0, 0.5)), epochs=1, n_boot=0)
    of_genes = gf.finetune_genes(adata, {"a": GENES[:10], "b": GENES[10:]}, folds=2, epochs=1, n_boot=0)
    adata.obs["side"] = ["left", "right", "right", "left"] * 6
    of_tasks = gf.finetune(
        adata, ["cell_type", "side"], split=hold_out(adata, fractions=(0.5, 0, 0.5)), epochs=1, n_boot=0
    )
    screen = clf.perturb(adata, state="cell_type", start="B", goal="T", genes=GENES[:3])
    scgpt = ScGPT.from_config("tiny", GENES, device="cpu")
    adata.obsm["X"] = np.random.default_rng(0).normal(size=(24, 4))
    adata.write_h5ad(folder / "cells.h5ad")
    tokens = tok(adata)
    draws = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    vectors = GeneVectors(GENES, draws, None, {"source": "simulated"})
    rosa = Rosa("ridge", device="cpu").fit(adata, vectors, hold_out_grid(adata, fraction=0.3))
    halves = hold_out(adata, fractions=(0.5, 0, 0.5))
    annotator = scgpt.finetune(adata, "cell_type", split=halves, epochs=1, n_boot=0)
    simulated = simulate_perturbations(n_targets=6, n_pairs=0, n_genes=20, n_modules=2, n_cells=3, n_controls=6)
    perturbed = PerturbationData(simulated.adata)
    small = dict(d_model=8, n_heads=2, d_hid=8, n_layers=1)
    scgenept = ScGenePT.from_config("tiny", perturbed, device="cpu", **small)
    return {
        "gene vectors": (vectors.save, GeneVectors.load),
        "rosa": (rosa.save_pretrained, lambda path: Rosa.from_pretrained(path, device="cpu")),
        "scGPT's classifier": (annotator.save_pretrained, lambda path: Annotator.from_pretrained(path, device="cpu")),
        "perturbation data": (perturbed.save, PerturbationData.load),
        "scGenePT": (scgenept.save_pretrained, lambda path: ScGenePT.from_pretrained(path, device="cpu")),
        "tokenizer": (tok.save_pretrained, RankTokenizer.from_pretrained),
        "tokenized cells": (tokens.save, TokenizedCells.load),
        "tokenized file": (lambda path: tok.tokenize_files(folder / "cells.h5ad", path), TokenizedCells.load),
        "Geneformer": (gf.save_pretrained, lambda path: Geneformer.from_pretrained(path, device="cpu")),
        "cell classifier": (clf.save_pretrained, lambda path: CellClassifier.from_pretrained(path, device="cpu")),
        "gene classifier": (of_genes.save_pretrained, lambda path: GeneClassifier.from_pretrained(path, device="cpu")),
        "classifier of several labels": (
            of_tasks.save_pretrained,
            lambda path: TaskClassifier.from_pretrained(path, device="cpu"),
        ),
        "screen": (screen.save, Screen.load),
        "scGPT": (scgpt.save_pretrained, lambda path: ScGPT.from_pretrained(path, device="cpu")),
        "reference map": (ReferenceMap(adata, "X", k=3).save, ReferenceMap.load),
    }


@pytest.fixture
def full_disk():
    "No file may grow over 100 bytes; the write fails as on a full disk."
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, old[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, old)
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


THINGS = [
    "tokenizer",
    "tokenized cells",
    "tokenized file",
    "Geneformer",
    "cell classifier",
    "gene classifier",
    "classifier of several labels",
    "screen",
    "scGPT",
    "reference map",
    "gene vectors",
    "rosa",
    "scGPT's classifier",
    "scGenePT",
]


@pytest.mark.parametrize("thing", THINGS)
def test_a_full_disk_is_told_and_the_same_call_works_once_there_is_room(made, full_disk, tmp_path, thing):
    save, load = made[thing]
    with pytest.raises(StoreError, match="could not be written.*free some disk space"):
        save(tmp_path / "out")
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(path.name.startswith(".part-") for path in tmp_path.rglob("*")), left
    assert all(path.stat().st_size < 100 for path in left), left
    full_disk()
    save(tmp_path / "out")
    assert load(tmp_path / "out") is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_full_disk_is_told_by_what_is_written_through_hdf5_too(made, tmp_path):
    "In a process of its own: after a failed write, HDF5 may end the process at a later one."
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        try:
            made["perturbation data"][0](tmp_path / "out")
            said = "nothing"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write_end, said.encode()[:2000])
        os._exit(0)
    os.close(write_end)
    os.waitpid(child, 0)
    with os.fdopen(read_end, "rb") as pipe:
        said = pipe.read().decode()
    assert said.startswith("StoreError") and "could not be written" in said, said
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("thing", THINGS)
def test_a_file_in_the_way_is_left_alone(made, tmp_path, thing):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(StoreError, match="could not be written"):
        made[thing][0](tmp_path / "taken" / "out")
    assert (tmp_path / "taken").read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["taken"]


TOKENIZE = """
import sys, time
from scellfm.geneformer import RankTokenizer
from scellfm.geneformer.tokenizer import tokenized
tok = RankTokenizer.fit(sys.argv[1])
write = tokenized.DatasetWriter.write
def slowly(self, *arguments):
    write(self, *arguments)
    print("half", flush=True)
    time.sleep(float(sys.argv[3]))
tokenized.DatasetWriter.write = slowly
tok.tokenize_files(sys.argv[1], sys.argv[2])
"""


def test_killed_while_tokenizing_a_file_nothing_is_there_and_the_next_run_has_the_same_bytes(tmp_path):
    cells(400).write_h5ad(tmp_path / "cells.h5ad")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(out, slow):
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", TOKENIZE, tmp_path / "cells.h5ad", out, str(slow)],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )

    killed, whole = start(tmp_path / "out", 60), start(tmp_path / "whole", 0)
    assert killed.stdout.readline().strip() == "half"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "out").exists()
    whole.communicate(timeout=120)
    again = start(tmp_path / "out", 0)
    again.communicate(timeout=120)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert again.returncode == 0 and names == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)


# ---- kill -9 while an older result is replaced

REPLACE = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np
from scellfm.data import GeneVectors
from scellfm.store import atomic_write
genes = [f"G{{i}}" for i in range(500)]
for turn in range(10**6):
    if turn == 1:
        print("begun", flush=True)
    GeneVectors(genes, np.full((500, 40), turn % 2, dtype=np.float32), None, {{"turn": turn % 2}}).save(sys.argv[1])
    with atomic_write(sys.argv[2]) as part:
        part.write_bytes(bytes([turn % 2]) * 100_000)
"""


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_at_any_moment_the_old_result_or_the_new_one_is_read_or_a_mixture_is_refused(tmp_path, kills):
    draws, seen = np.random.default_rng(0), set()
    for _ in range(kills):
        saving = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", REPLACE.format(tests=str(ROOT / "tests")), "vectors", "file.bin"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert saving.stdout.readline().strip() == "begun"
        time.sleep(0.3 + 0.3 * draws.random())
        saving.send_signal(signal.SIGKILL)
        saving.wait()
        try:
            found = GeneVectors.load(tmp_path / "vectors")
            assert (found.values == found.manifest["turn"]).all()
            seen.add(found.manifest["turn"])
        except AssetError as error:  # killed between the two files: named, and never read as one
            assert "write both again" in str(error)
            seen.add("refused")
        data = (tmp_path / "file.bin").read_bytes()
        assert len(data) == 100_000 and len(set(data)) == 1
    assert seen


# ---- flipped bits and cuts


def test_a_training_checkpoint_with_a_flipped_bit_or_a_cut_is_refused(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    kept = Checkpoint(tmp_path / "run", {"cells": "x"})
    position = {"step": 1, "waited": 0}
    best = {name: value.detach().clone() for name, value in model.state_dict().items()}
    kept.save(model, optimizer, best, History(), position)
    assert kept.load(model, optimizer) is not None
    path = kept.path
    whole, draws = path.read_bytes(), np.random.default_rng(0)
    for i in range(60):
        data = bytearray(whole)
        at = int(draws.integers(0, len(data)))
        if i % 3:
            data[at] ^= 1 << int(draws.integers(0, 8))
        else:
            del data[at:]
        path.write_bytes(data)
        with pytest.raises(StoreError):
            kept.load(model, optimizer)
    path.write_bytes(whole)
    assert kept.load(model, optimizer) is not None


@pytest.mark.parametrize("thing", ["tokenizer", "reference map", "gene vectors", "screen", "tokenized cells"])
def test_a_saved_thing_that_was_cut_is_an_error_of_ours(made, tmp_path, thing):
    save, load = made[thing]
    save(tmp_path / "out")
    files = [path for path in sorted((tmp_path / "out").rglob("*")) if path.is_file() and path.stat().st_size]
    needed = 0
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        try:
            load(tmp_path / "out")
        except ScellfmError as error:
            needed += path.name in str(error) or "out" in str(error)
        path.write_bytes(whole)
    assert needed, "no file of the folder is needed to read it"


# ---- a machine where nothing is as usual

ELSEWHERE = """
import locale, sys, warnings
warnings.simplefilter("ignore")
try:
    locale.setlocale(locale.LC_ALL, "")
except locale.Error:
    pass
from scellfm import cli
line = "tokenize cells.h5ad --fit tokenizer --columns cell_type --out tokens --quiet"
code = cli.main(line.split())
sys.exit(code)
"""


def test_without_home_and_cache_and_in_any_locale_and_time_zone_the_bytes_are_the_same(tmp_path):
    "No folder for a cache can be written, the locale has a decimal comma or no UTF-8, the time zone is a day away."
    places = {"here": {}, "there": {}}
    nowhere = dict.fromkeys(
        ("HOME", "XDG_CACHE_HOME", "HF_HOME", "NUMBA_CACHE_DIR", "MPLCONFIGDIR", "TRITON_CACHE_DIR"), "/proc/nowhere"
    )
    places["there"] = nowhere | {"LANG": "tr_TR.UTF-8", "LC_ALL": "C", "TZ": "Pacific/Kiritimati", "PYTHONUTF8": "0"}
    for name, environment in places.items():
        (tmp_path / name).mkdir()
        cells().write_h5ad(tmp_path / name / "cells.h5ad")
        done = subprocess.run(
            [sys.executable, "-c", ELSEWHERE],
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            cwd=tmp_path / name,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    for part in ("tokens", "tokenizer"):
        here, there = tree(tmp_path / "here" / part), tree(tmp_path / "there" / part)
        assert here.keys() == there.keys() and here
        assert all(here[name] == there[name] for name in here if not name.endswith("report.json"))


def embedded(folder=None) -> np.ndarray:
    "The vectors of 24 cells by a model of fixed weights."
    adata = cells()
    torch.manual_seed(0)
    gf = Geneformer.from_config("tiny", RankTokenizer.fit(adata), device="cpu")
    gf.embed(adata, folder=folder)
    return adata.obsm["X_geneformer"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_that_is_forked_while_threads_run_computes_the_same_and_leaves_the_lock_alone(tmp_path):
    expected, stop = embedded(), threading.Event()
    busy = [threading.Thread(target=stop.wait, daemon=True) for _ in range(4)]
    [thread.start() for thread in busy]
    store = Store(tmp_path / "run", {"cells": "x"})
    child = os.fork()
    if child == 0:
        code = 1
        try:
            np.save(tmp_path / "child.npy", embedded())
            code = 0
        finally:
            os._exit(code)
    end, status = time.monotonic() + 120, None
    while time.monotonic() < end and status is None:
        done, found = os.waitpid(child, os.WNOHANG)
        status = found if done else None
        time.sleep(0.05)
    stop.set()
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert status == 0, "the forked child hangs or failed"
    np.testing.assert_allclose(np.load(tmp_path / "child.npy"), expected, atol=1e-6)
    store.write("a", x=np.arange(3))  # the lock is still ours
    store.close()


def test_a_clock_that_is_set_back_changes_nothing_and_a_living_writer_still_holds_its_lock(tmp_path, monkeypatch):
    now = time.time
    whole = embedded(tmp_path / "whole")
    first = Store(tmp_path / "other", {"cells": "x"})
    monkeypatch.setattr(time, "time", lambda: now() - 10 * 365 * 86400)
    np.testing.assert_array_equal(embedded(tmp_path / "run"), whole)
    np.testing.assert_array_equal(embedded(tmp_path / "whole"), whole)  # made in what is now the future
    with pytest.raises(StoreError, match="is being written by process"):
        Store(tmp_path / "other", {"cells": "x"})
    monkeypatch.setattr(time, "time", lambda: now() + 10 * 365 * 86400)
    with pytest.raises(StoreError, match="is being written by process"):
        Store(tmp_path / "other", {"cells": "x"})
    first.close()
    names = sorted(path.name for path in (tmp_path / "run").glob("*.npz"))
    assert names == sorted(path.name for path in (tmp_path / "whole").glob("*.npz")) and names
    assert all((tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)


TWICE = """
import sys
sys.path.insert(0, {tests!r})
import warnings
warnings.simplefilter("ignore")
import test_faults
from scellfm.core import StoreError
write = test_faults.Store.write
def slowly(self, *arguments, **arrays):
    import time
    time.sleep(1)
    write(self, *arguments, **arrays)
test_faults.Store.write = slowly
from scellfm.geneformer import embedding
embedding.CELL_BLOCK = 8
print("ready", flush=True)
sys.stdin.readline()
try:
    test_faults.embedded(sys.argv[1])
    print("done")
except StoreError as error:
    print("refused", error)
"""


@pytest.mark.slow
def test_of_two_runs_on_one_folder_one_is_refused_and_the_other_is_whole(tmp_path):
    code = TWICE.format(tests=str(ROOT / "tests"))
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "run")],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    assert [one.stdout.readline().strip() for one in both] == ["ready"] * 2
    for one in both:
        one.stdin.write("go\n")
        one.stdin.flush()
    said = sorted(one.communicate(timeout=300)[0].split()[0] for one in both)
    assert said == ["done", "refused"]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["finished"] and len(manifest["shards"]) == 3


FORKED = """
import os, signal, time
from scellfm.core import progress

for _ in range(20):
    child = os.fork()
    while child == 0:
        with progress(desc="child", total=1) as bar:
            bar.update()
    time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with progress(desc="parent", total=1) as bar:
        bar.update()
"""


def test_a_child_that_is_killed_while_it_draws_a_bar_does_not_stop_its_parent():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", FORKED], env=env, timeout=60).returncode == 0
