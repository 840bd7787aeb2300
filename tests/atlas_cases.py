"""What tests of atlas runs share: small inputs for every kind, and runs in processes that can be killed."""

import os
import signal
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from conftest import tree
from scipy import sparse

import scellfm as sf
from scellfm.atlas import crew
from scellfm.store.shards import Store

N, IN_FIRST = 64, 40  # cells of both files, of the first
GENES = [f"ENSG{i:011d}" for i in range(40)]


@contextmanager
def quiet():
    "Random weights and few cells warn; that is not what these tests are about."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def simulated(n=N, seed=0):
    "Cells of two states, two types and four donors; the first two have no counts."
    rng = np.random.default_rng(seed)
    counts = rng.poisson(1.5, (n, len(GENES))).astype(np.float32)
    counts[:, :8] += 3 * (np.arange(n) % 2)[:, None]
    counts[:2] = 0
    obs = pd.DataFrame({"state": ["ill", "well"] * (n // 2), "donor": [f"d{i // 4 % 4}" for i in range(n)]})
    obs["kind"] = np.where(np.arange(n) % 3 > 0, "T", "B")
    obs.index = [f"cell{i}" for i in range(n)]
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=GENES))


def write_genome(place):
    "A chromosome of random letters and 24 genes on it."
    rng = np.random.default_rng(0)
    (place / "genome.fa").write_text(">chr1\n" + "".join(rng.choice(list("ACGT"), 30_000)) + "\n")
    names = 'gene_id "GENE{0}"; transcript_id "T{0}"; gene_name "G{0}";'
    lines = [
        f"chr1\tmade\ttranscript\t{start}\t{start + 400}\t.\t{'+-'[i % 2]}\t.\t{names.format(i)}\n"
        for i, start in enumerate(range(2_000, 26_000, 1_000))
    ]
    (place / "genes.gtf").write_text("".join(lines))


def write_inputs(place):
    "Two files, a genome, a tokenizer, two models, four classifiers; (folder, the cells of both files)."
    cells, fast = simulated(), dict(epochs=1, n_boot=0)
    (place / "cells").mkdir()
    cells[:IN_FIRST].write_h5ad(place / "cells" / "a.h5ad")
    cells[IN_FIRST:].write_h5ad(place / "cells" / "b.h5ad")
    write_genome(place)
    tokenizer = sf.geneformer.RankTokenizer.fit(cells)
    tokenizer.save_pretrained(place / "tokenizer")
    gf, gpt = sf.geneformer.Geneformer.from_config("tiny", tokenizer), sf.scgpt.ScGPT.from_config("tiny", cells)
    gf.save_pretrained(place / "geneformer")
    gpt.save_pretrained(place / "scgpt")
    known, halves = cells[2:34].copy(), {"a": GENES[:20], "b": GENES[20:]}
    split, one = sf.data.folds(known, by="donor", k=2), sf.data.hold_out(known, fractions=(0.5, 0, 0.5), seed=0)
    gf.finetune(known, label="state", split=split, **fast).save_pretrained(place / "of_cells")
    gf.finetune(known, label=["state", "kind"], split=one, **fast).save_pretrained(place / "of_tasks")
    gf.finetune_genes(known, halves, folds=2, **fast).save_pretrained(place / "of_genes")
    gpt.finetune(known, label="state", split=one, **fast).save_pretrained(place / "of_scgpt")
    return place, cells


SCREEN = {"state": "state", "start": "ill", "goal": "well", "genes": GENES[:3], "combine": "each"}
KINDS = {  # (task, what is read, model, settings, rows of a stretch)
    "tokens": ("tokenize", "cells", "tokenizer", {}, 8),
    "geneformer": ("embed", "cells", "geneformer", {}, 8),
    "scgpt": ("embed", "cells", "scgpt", {"max_length": 12}, 8),
    "predict": ("predict", "cells", "of_cells", {}, 8),
    "perturb": ("perturb", "cells", "geneformer", SCREEN, 8),
    "sequence": ("sequence", "genes.gtf", "kmer-2", {"length": 512, "fasta": "genome.fa"}, 4),
}


def run_kind(place, kind, out, **options):
    "A run of one kind over the inputs in `place`."
    task, source, model, settings, rows = KINDS[kind]
    settings = settings | ({"fasta": str(place / settings["fasta"])} if "fasta" in settings else {})
    model = place / model if (place / model).exists() else model
    with quiet():
        given = dict(model=model, out=out, settings=settings, rows=rows, workers=1) | options
        return sf.atlas.run(task, place / source, **given)


def result(folder):
    "The files of a finished run but for the time stamps of its inputs."
    return {name: content for name, content in tree(folder).items() if name != "fingerprints.json"}


def shards(folder):
    "How many shards there are."
    names = [name for _, _, files in os.walk(folder) for name in files]  # folders may go meanwhile
    return sum(name.endswith(".npz") and "-" in name for name in names)


class Forked:
    "A function in a process of its own, which begins as a copy of this one; killed, or waited for."

    def __init__(self, function, **environment):
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                os.setpgid(0, 0)
                os.environ.update(environment)
                function()
                code = 0
            finally:
                os._exit(code)

    def alive(self):
        "Whether it still runs."
        pid, self.status = os.waitpid(self.pid, os.WNOHANG)
        return pid == 0

    def kill(self, number=signal.SIGKILL):
        "Send a signal; whether there was a process to take it."
        os.kill(self.pid, number)
        return self.wait()

    def wait(self):
        "Its exit code, or minus the signal that ended it."
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class ForkedWorker:
    "What `crew` uses of a Popen: a worker that begins as a copy of this process, so that it need not import again."

    def __init__(self, command, **options):
        assert "serve" in command[-1]
        their_in, my_in = os.pipe()
        my_out, their_out = os.pipe()
        self.returncode, self.lock = None, threading.Lock()
        self.pid = os.fork()
        if not self.pid:
            try:
                self.serve(their_in, their_out)
            finally:
                os._exit(1)
        os.close(their_in)
        os.close(their_out)
        self.stdin, self.stdout = open(my_in, "w", encoding="utf8"), open(my_out, encoding="utf8")

    def serve(self, channel_in, channel_out):
        "The life of the copy: it keeps nothing open of what its parent has open."
        import torch

        os.setsid()
        os.dup2(channel_in, 0)
        os.dup2(channel_out, 1)
        os.closerange(3, 4096)
        sys.stdin = open(0, encoding="utf8")
        torch.set_num_threads(1)
        crew.serve()

    def poll(self):
        "Its exit code, or None while it runs."
        with self.lock:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self):
        "Its exit code, when it has ended."
        while self.poll() is None:
            time.sleep(0.001)
        return self.returncode

    def kill(self):
        "Kill it, if it has not ended."
        with self.lock:
            if self.returncode is None:
                os.kill(self.pid, signal.SIGKILL)


def killed_in_its_midst(process, out, pause):
    "Kill a process some time after it has written its next shard; whether it was killed before it had ended."
    seen, deadline = shards(out), time.monotonic() + 120
    while shards(out) <= seen and time.monotonic() < deadline:
        if not process.alive():
            return False
        time.sleep(0.002)
    time.sleep(pause)
    return process.kill() == -signal.SIGKILL


def ranks_of(place, kind, out, n=2, **options):
    "A run by so many ranks, each a process of its own, as torchrun would start them."
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    job = partial(run_kind, place, kind, out, backend="ranks", **options)
    return [Forked(job, RANK=str(rank), **where) for rank in range(n)]


def children_of(pid):
    "The processes that a process has started and that still run."
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if fields[1] == str(pid) and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@contextmanager
def cut_after(n):
    "A block in which a run is interrupted when it has recorded n shards."
    record, seen = Store.record, []

    def count(self, *arguments):
        if len(seen) == n:
            raise KeyboardInterrupt
        seen.append(record(self, *arguments))

    Store.record = count
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        Store.record = record


def begun_twice(place, kind, out, rows):
    "The folder of a run that two processes began and two ranks went on with, interrupted both times."
    with cut_after(2):
        run_kind(place, kind, out, workers=2, rows=rows)
    first = shards(out)
    ranks = ranks_of(place, kind, out, rows=rows)
    assert killed_in_its_midst(ranks[1], out, 0.0) and ranks[0].kill() == -signal.SIGKILL
    assert 2 <= first < shards(out) < N // rows
    return out
