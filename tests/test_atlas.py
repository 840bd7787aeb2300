"""Atlas runs: the same bytes from any engine, any number of workers and after any kill; bad inputs are refused."""

import json
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from atlas_cases import (
    GENES,
    IN_FIRST,
    KINDS,
    SCREEN,
    Forked,
    ForkedWorker,
    N,
    begun_twice,
    children_of,
    killed_in_its_midst,
    quiet,
    ranks_of,
    result,
    run_kind,
    shards,
    write_inputs,
)
from conftest import tree

import scellfm as sf
from scellfm.atlas import crew, runs
from scellfm.atlas.stretches import Stretch, stretches_of
from scellfm.atlas.work import Work
from scellfm.commands.inputs import load_classifier

POSIX = pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="signals, fork and /proc of Linux")
FORKS = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    "Two files of 40 and 24 cells with all that runs over them need; the cells of both."
    with quiet():
        return write_inputs(tmp_path_factory.mktemp("atlas"))


@pytest.fixture(scope="module")
def whole(atlas, tmp_path_factory):
    "The files of an undisturbed run of each kind."
    place, runs = tmp_path_factory.mktemp("whole"), {}

    def of(kind):
        if kind not in runs:
            runs[kind] = result(run_kind(atlas[0], kind, place / kind))
        return runs[kind]

    return of


def run(place, task, model, out, **options):
    "A run over both files in stretches of 16 cells."
    with quiet():
        return sf.atlas.run(task, place / "cells", model=place / model, out=out, **{"rows": 16, "workers": 1} | options)


# ---- results are those of one call in memory


def test_tokens_are_those_of_the_tokenizer(atlas, tmp_path):
    place, cells = atlas
    run(place, "tokenize", "tokenizer", tmp_path / "out", columns=["donor"], settings={"keep_counts": True})
    found = sf.atlas.read(tmp_path / "out")
    with quiet():
        expected = sf.geneformer.RankTokenizer.from_pretrained(place / "tokenizer")(cells, keep_counts=True)
    assert (found.tokens == expected.tokens).all() and (found.offsets == expected.offsets).all()
    assert (found.counts == expected.counts).all()
    assert (
        list(found.obs.index) == list(cells.obs_names)[2:] and list(found.obs["donor"]) == list(cells.obs["donor"])[2:]
    )
    assert found.report["n_cells"] == N and found.report["n_empty"] == 2


@pytest.mark.parametrize("model, key", [("geneformer", "X_geneformer"), ("scgpt", "X_scGPT")])
def test_vectors_are_those_of_embed(atlas, tmp_path, model, key):
    place, cells = atlas
    run(place, "embed", model, tmp_path / "out", columns=["donor"])
    found = sf.atlas.read(tmp_path / "out")
    kind = {"geneformer": sf.geneformer.Geneformer, "scgpt": sf.scgpt.ScGPT}[model]
    with quiet():
        expected = kind.from_pretrained(place / model).embed(cells, copy=True).obsm[key]
    np.testing.assert_allclose(found.X[:], expected, atol=1e-5)
    assert np.isnan(found.X[:2]).all() and not np.isnan(found.X[2:]).any()
    assert found.isbacked and found.obs_names.equals(cells.obs_names)
    assert found.obs["file"].tolist() == ["a.h5ad"] * IN_FIRST + ["b.h5ad"] * (N - IN_FIRST)
    assert found.obs["donor"].astype(str).tolist() == cells.obs["donor"].tolist()


@pytest.mark.parametrize("folder", ["of_cells", "of_tasks", "of_scgpt"])
def test_predictions_are_those_of_predict(atlas, tmp_path, folder):
    place, cells = atlas
    run(place, "predict", folder, tmp_path / "out")
    found = sf.atlas.read(tmp_path / "out").obs.drop(columns="file")
    with quiet():
        expected = load_classifier(str(place / folder)).predict(cells, copy=True).obs
    expected = expected[[name for name in expected if name not in cells.obs]]
    assert sorted(found) == sorted(expected) and len(expected.columns) == (4 if folder == "of_tasks" else 2)
    for name in expected:
        if name.endswith("_predicted"):
            assert found[name].astype(object).fillna("-").tolist() == expected[name].astype(object).fillna("-").tolist()
        else:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-5)


def test_classes_of_genes_are_those_of_predict(atlas, tmp_path):
    place, cells = atlas
    run(place, "predict", "of_genes", tmp_path / "out", settings={"genes": GENES[5:30]})
    found = sf.atlas.read(tmp_path / "out")
    with quiet():
        clf = sf.geneformer.GeneClassifier.from_pretrained(place / "of_genes")
        expected = clf.predict(cells, genes=GENES[5:30])
    assert found.index.tolist() == expected.index.tolist() and (found["n_cells"] == expected["n_cells"]).all()
    assert found["predicted"].astype(str).tolist() == expected["predicted"].astype(str).tolist()
    np.testing.assert_allclose(found[["confidence", "a", "b"]], expected[["confidence", "a", "b"]], atol=1e-6)


SCREENS = {
    "no goal": ("geneformer", {"genes": GENES[:4], "combine": "pairs"}),
    "a goal": (
        "geneformer",
        {**SCREEN, "groupby": "kind", "donor": "donor", "max_cells": 5, "where": {"donor": ["d0", "d1"]}},
    ),
    "estimates": (
        "geneformer",
        {"state": "state", "start": "ill", "goal": "well", "gradient": {"top": 3, "check_cells": 2}},
    ),
    "folds": ("of_cells", {**SCREEN, "genes": GENES[2], "combine": "each", "matched": 2}),
}


@pytest.mark.parametrize("which", SCREENS)
def test_a_screen_is_that_of_one_process(atlas, tmp_path, which):
    (place, cells), (model, settings) = atlas, SCREENS[which]
    found = sf.atlas.read(run(place, "perturb", model, tmp_path / "out", settings=settings))
    with quiet():
        kind = sf.geneformer.CellClassifier if model == "of_cells" else sf.geneformer.Geneformer
        kind.from_pretrained(place / model).perturb(cells.copy(), **settings).save(tmp_path / "one")
    expected = sf.geneformer.Screen.load(tmp_path / "one")
    pd.testing.assert_frame_equal(found.shifts, expected.shifts, check_exact=True)
    pd.testing.assert_frame_equal(found.genes, expected.genes, check_exact=False, rtol=1e-12)
    made_from = found.params.pop("made_from")
    assert found.params == expected.params and len(found.shifts)
    assert ("states" in made_from) == ("goal" in settings) and len(made_from["tokens"]) == 64


@pytest.mark.parametrize("model", ["kmer-2", "gc"])
def test_gene_vectors_are_those_of_embed_genes(atlas, tmp_path, model):
    place, _ = atlas
    settings = {"length": 512, "fasta": str(place / "genome.fa")}
    out = sf.atlas.run("sequence", place / "genes.gtf", model=model, out=tmp_path / "out", settings=settings, workers=1)
    windows = sf.rosa.tss_windows(place / "genes.gtf", place / "genome.fa", length=512)
    encoder = sf.rosa.KmerEncoder(2, None) if model == "kmer-2" else sf.rosa.GCEncoder(None)
    expected, found = sf.rosa.embed_genes(windows, model=encoder, rule="mean"), sf.atlas.read(out)
    assert np.array_equal(found.values, expected.values) and list(found.genes) == list(expected.genes)
    assert found.manifest == expected.manifest and len(found.genes) == 24


def test_names_that_come_twice_count_over_all_files(atlas, tmp_path):
    place, cells = atlas
    again = cells[2:].copy()
    names = again.obs_names.to_numpy().astype(object)
    names[30:] = names[: len(names) - 30]  # most names twice, in other stretches and in the other file
    again.obs_names = names
    (tmp_path / "cells").mkdir()
    again[:IN_FIRST].write_h5ad(tmp_path / "cells" / "a.h5ad")
    again[IN_FIRST:].write_h5ad(tmp_path / "cells" / "b.h5ad")
    given, settings = dict(rows=7, workers=1), {"max_length": 8}  # most genes of a cell are left out by lot
    with quiet():
        out = sf.atlas.run(
            "embed", tmp_path / "cells", model=place / "scgpt", out=tmp_path / "v", settings=settings, **given
        )
        expected = sf.scgpt.ScGPT.from_pretrained(place / "scgpt").embed(again, copy=True, **settings).obsm["X_scGPT"]
        np.testing.assert_allclose(sf.atlas.read(out).X[:], expected, atol=1e-5)
        assert sf.atlas.read(out).obs_names.tolist() == names.tolist()
        for folder in ("of_cells", "of_scgpt"):
            out = sf.atlas.run("predict", tmp_path / "cells", model=place / folder, out=tmp_path / folder, **given)
            clf = load_classifier(str(place / folder))
            table = clf.predict(again, copy=True).obs["state_confidence"]
            np.testing.assert_allclose(sf.atlas.read(out).obs["state_confidence"], table, atol=1e-5)


# ---- kills


@POSIX
@FORKS
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(atlas, whole, tmp_path, kind):
    process = Forked(partial(run_kind, atlas[0], kind, tmp_path / "out"))
    assert killed_in_its_midst(process, tmp_path / "out", 0.003)
    assert not (tmp_path / "out" / "atlas.json").read_text().count('"finished": true')
    run_kind(atlas[0], kind, tmp_path / "out")
    assert result(tmp_path / "out") == whole(kind)


@POSIX
@FORKS
@pytest.mark.parametrize("kind", ["geneformer", "perturb"])
def test_ranks_of_which_one_is_killed_leave_the_same_bytes(atlas, whole, tmp_path, kind):
    killed_ranks(atlas[0], kind, tmp_path / "out", victim=1, pause=0.003)
    run_kind(atlas[0], kind, tmp_path / "out")
    assert result(tmp_path / "out") == whole(kind)


def killed_ranks(place, kind, out, victim, pause):
    "A run by two ranks of which one is killed, and then the other, as torchrun does; whether it died in its midst."
    ranks = ranks_of(place, kind, out)
    died = killed_in_its_midst(ranks[victim], out, pause)
    other = ranks[1 - victim]
    if died:
        other.kill()
    else:
        other.wait()
    return died


@POSIX
@FORKS
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind != "perturb" else ()) for kind in KINDS]
)
def test_ranks_write_what_one_process_writes(atlas, whole, tmp_path, kind):
    ranks = ranks_of(atlas[0], kind, tmp_path / "out", n=3)
    assert [rank.wait() for rank in ranks] == [0, 0, 0]
    assert result(tmp_path / "out") == whole(kind)


@POSIX
@FORKS
def test_two_processes_two_ranks_and_three_processes_write_one_run(atlas, tmp_path, monkeypatch):
    monkeypatch.setattr(crew, "subprocess", SimpleNamespace(Popen=ForkedWorker, PIPE=None))
    out = begun_twice(atlas[0], "geneformer", tmp_path / "out", rows=2)
    run_kind(atlas[0], "geneformer", out, workers=3, rows=2)
    run_kind(atlas[0], "geneformer", tmp_path / "one", rows=2)
    assert result(out) == result(tmp_path / "one")


@POSIX
@FORKS
def test_progress_tells_the_cells_of_all_workers_and_of_an_earlier_half(atlas, tmp_path, monkeypatch):
    monkeypatch.setattr(crew, "subprocess", SimpleNamespace(Popen=ForkedWorker, PIPE=None))
    monkeypatch.setattr(sf.core.settings, "progress", True)
    real, bars, counts, halves = runs.progress, [], [], []

    def progress(**given):
        bars.append(real(**given))
        update = bars[-1].update

        def count(n=1):
            counts.append(n)
            update(n)
            if not halves and sum(counts) >= 24:
                raise KeyboardInterrupt

        if given["unit"] == "cell":
            bars[-1].update = count
        return bars[-1]

    monkeypatch.setattr(runs, "progress", progress)
    with pytest.raises(KeyboardInterrupt):
        run_kind(atlas[0], "tokens", tmp_path / "out", workers=2)
    halves.append(counts.copy())
    counts.clear()
    run_kind(atlas[0], "tokens", tmp_path / "out", workers=2)
    bar = next(bar for bar in reversed(bars) if bar.unit == "cell")
    assert counts[0] >= 24 and bar.n == bar.total == sum(counts) == N  # what the first half finished comes first
    shown = bar.format_meter(**bar.format_dict | {"n": 32, "elapsed": 2.0, "ncols": 100})
    assert "32/64 [00:02<00:02, 16.00cell/s]" in shown


@POSIX
def test_two_workers_of_which_one_is_killed_write_what_one_process_writes(atlas, whole, tmp_path):
    with Killer(tmp_path / "out", 1) as killer, pytest.warns(sf.ScellfmWarning, match="the worker was killed"):
        run_loudly(atlas[0], "geneformer", tmp_path / "out", workers=2)
    assert killer.killed == 1 and result(tmp_path / "out") == whole("geneformer")


def run_loudly(place, kind, out, **options):
    "A run whose warnings are seen."
    task, source, model, settings, rows = KINDS[kind]
    sf.atlas.run(task, place / source, model=place / model, out=out, settings=settings, rows=rows, **options)


class Killer:
    "Kills workers of runs in this process, each a random moment after some shard was written, each stretch once."

    def __init__(self, out, kills, seed=0):
        self.out, self.left, self.killed, self.rng = out, kills, 0, np.random.default_rng(seed)
        self.thread, self.over, self.hands = threading.Thread(target=self.watch), False, []

    def __enter__(self):
        self.hire, killer = crew.Crew.hire, self

        def hire(team):
            killer.hire(team)
            killer.hands.append(team.hands[-1])

        crew.Crew.hire = hire
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.over, crew.Crew.hire = True, self.hire
        self.thread.join()

    def watch(self):
        "Wait for the next shard, then for a moment, then kill a worker that is at its first attempt."
        seen = 0
        while not self.over and self.left:
            time.sleep(0.005)
            written = shards(self.out)
            mine = [
                hand for hand in self.hands if hand.process.poll() is None and getattr(hand.task, "attempt", 9) == 1
            ]
            if written > seen and mine:
                seen = written
                time.sleep(0.05 * self.rng.random())
                hand = mine[self.rng.integers(len(mine))]
                if hand.process.poll() is None and hand.task.attempt == 1:
                    hand.process.kill()
                    self.left, self.killed = self.left - 1, self.killed + 1


# ---- the long forms: thirty kills of every kind of run


@POSIX
@FORKS
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_thirty_kills_of_the_process_leave_the_same_bytes(atlas, whole, tmp_path, kind):
    rng, died, number = np.random.default_rng(1), 0, 0
    while died < 30:
        out = tmp_path / f"out{number}"
        for _ in range(4):  # a run that was killed is killed again
            died += killed_in_its_midst(Forked(partial(run_kind, atlas[0], kind, out)), out, 0.02 * rng.random())
        run_kind(atlas[0], kind, out)
        assert result(out) == whole(kind)
        number += 1


@POSIX
@FORKS
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_thirty_kills_of_a_rank_leave_the_same_bytes(atlas, whole, tmp_path, kind):
    rng, died, number = np.random.default_rng(2), 0, 0
    while died < 30:
        out = tmp_path / f"out{number}"
        for turn in range(3):
            died += killed_ranks(atlas[0], kind, out, victim=(number + turn) % 2, pause=0.02 * rng.random())
        run_kind(atlas[0], kind, out)
        assert result(out) == whole(kind)
        number += 1


@POSIX
@FORKS
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_thirty_kills_of_a_worker_leave_the_same_bytes(atlas, whole, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(crew, "subprocess", SimpleNamespace(Popen=ForkedWorker, PIPE=None))
    killed, number = 0, 0
    while killed < 30:
        with Killer(tmp_path / f"out{number}", 30 - killed, seed=number) as killer:
            run_kind(atlas[0], kind, tmp_path / f"out{number}", workers=2)
        assert result(tmp_path / f"out{number}") == whole(kind)
        killed, number = killed + killer.killed, number + 1


# ---- one worker


def work_of(place):
    "Tokenizing of both files."
    return Work("tokenize", str(place / "cells"), str(place / "tokenizer"))


def test_a_worker_that_the_kernel_killed_is_named_and_its_stretch_tried_in_smaller_batches(monkeypatch):
    class Gone:
        kills, task = 3, crew.Task("cells-7", Stretch("a.h5ad", 0, 8), 4096)

        class process:
            returncode = -9

    team = object.__new__(crew.Crew)
    team.work, team.waiting, team.dismiss, team.hire = Work("embed", "cells", "model"), crew.deque(), list, list
    team.dismiss, team.hire = (lambda hand: None), (lambda: None)
    for now, budget, words in (
        (4, 2048, "when memory runs out"),
        (3, 4096, "not because of memory"),
        (None, 2048, "memory"),
    ):
        monkeypatch.setattr(crew, "memory_kills", lambda: now)
        with pytest.warns(sf.ScellfmWarning, match=f"cells 0 to 7 of a.h5ad: the worker was killed.*{words}"):
            assert team.take(Gone, None) is None
        assert team.waiting.popleft() == Gone.task._replace(token_budget=budget, attempt=2)


def test_a_stretch_that_kills_its_worker_three_times_ends_the_run_and_is_named():
    work = Work("embed", "cells", "model")
    task = crew.Task("cells-7", Stretch("a.h5ad", 0, 8))
    with pytest.warns(sf.ScellfmWarning):
        twice = crew.once_more(crew.once_more(task, "killed", work), "killed", work)
    assert twice.token_budget == crew.BUDGET // 4
    with pytest.raises(sf.StoreError, match="cells 0 to 7 of a.h5ad: killed, 3 times"):
        crew.once_more(twice, "killed", work)


def children_once_there(parent, n):
    "The processes that a forked parent has started, as soon as there are so many."
    deadline = time.monotonic() + 120
    while len(children := children_of(parent.pid)) < n and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(children) == n
    return children


def gone(children):
    "Whether all of these processes end."
    deadline = time.monotonic() + 120
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    return time.monotonic() < deadline


@POSIX
@FORKS
def test_ctrl_c_leaves_no_orphan(atlas, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parent = Forked(partial(run_kind, atlas[0], "tokens", tmp_path / "out", workers=2))
    children = children_once_there(parent, 2)
    assert parent.kill(signal.SIGINT) == 1 and gone(children)


@POSIX
@FORKS
def test_no_worker_outlives_a_parent_that_is_killed(atlas, tmp_path):
    task = crew.Task("cells-0", Stretch("a.h5ad", 0, 8))
    parent = Forked(lambda: (crew.Crew(work_of(atlas[0]), [task], tmp_path, 1, 1), time.sleep(60)))
    children = children_once_there(parent, 1)
    assert parent.kill() == -signal.SIGKILL and gone(children)


# ---- what is refused


def test_other_inputs_models_and_settings_are_refused(atlas, tmp_path):
    place, cells = atlas
    (tmp_path / "cells").mkdir()
    cells[2:22].write_h5ad(tmp_path / "cells" / "a.h5ad")
    given = dict(model=place / "tokenizer", out=tmp_path / "out", rows=8, workers=1)
    sf.atlas.run("tokenize", tmp_path / "cells", **given)
    for change, words in (
        ({"rows": 9}, "rows"),
        ({"columns": ["donor"]}, "columns"),
        ({"settings": {"keep_counts": True}}, "keep_counts"),
        ({"model": place / "geneformer"}, "model"),
        ({"layer": "raw"}, "layer"),
    ):
        with pytest.raises((sf.StoreError, sf.DataError), match=words):
            sf.atlas.run("tokenize", tmp_path / "cells", **given | change)
    other = cells[2:22].copy()
    other.X.data[0] += 1
    other.write_h5ad(tmp_path / "cells" / "a.h5ad")
    with pytest.raises(sf.StoreError, match="cells/a.h5ad"):
        sf.atlas.run("tokenize", tmp_path / "cells", **given)


def test_two_runs_on_one_output_the_second_is_refused(atlas, tmp_path):
    place, _ = atlas
    run(place, "tokenize", "tokenizer", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "atlas.json").read_text())
    (tmp_path / "out" / "atlas.json").write_text(json.dumps(record | {"finished": False}))
    with sf.store.Store(tmp_path / "out" / "parts", record["inputs"], record["settings"]):
        with pytest.raises(sf.StoreError, match="is being written by process"):
            run(place, "tokenize", "tokenizer", tmp_path / "out")


def test_a_folder_with_something_else_is_not_touched(atlas, tmp_path):
    place, _ = atlas
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.md").write_text("It was a dark and stormy night.")
    for out in (tmp_path / "thesis", place / "cells", place):
        with pytest.raises(sf.StoreError):
            run(place, "tokenize", "tokenizer", out)
    assert tree(tmp_path / "thesis") == {"chapter.md": b"It was a dark and stormy night."}


def test_bad_inputs_are_refused_before_the_work(atlas, tmp_path):
    place, cells = atlas
    empty = tmp_path / "empty"
    empty.mkdir()
    for given, error in (
        (dict(task="cluster"), sf.OptionError),
        (dict(cells=empty), sf.DataError),
        (dict(cells=tmp_path / "none"), sf.DataError),
        (dict(model=tmp_path / "none"), sf.AssetError),
        (dict(workers=0), sf.OptionError),
        (dict(rows=0), sf.OptionError),
        (dict(threads=-1), sf.OptionError),
        (dict(backend="mpi"), sf.OptionError),
        (dict(backend="ranks"), sf.OptionError),
        (dict(out=""), sf.OptionError),
        (dict(columns=["absent"]), sf.DataError),
        (dict(layer="absent"), sf.DataError),
    ):
        options = dict(task="tokenize", cells=place / "cells", model=place / "tokenizer", out=tmp_path / "out") | given
        with pytest.raises(error):
            sf.atlas.run(options.pop("task"), options.pop("cells"), **options)
        assert not list((tmp_path / "out").rglob("*.npz"))


def test_a_file_stored_by_genes_is_refused_with_the_line_that_mends_it(atlas, tmp_path):
    cells = atlas[1].copy()
    cells.X = cells.X.tocsc()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(sf.DataError, match="tocsr"):
        sf.atlas.run("tokenize", tmp_path / "cells.h5ad", model=atlas[0] / "tokenizer", out=tmp_path / "out")


def test_stretches_do_not_depend_on_order_and_cover_every_cell_once(atlas):
    stretches = stretches_of(atlas[0] / "cells", rows=7)
    rows = [(part.file, row) for part in stretches for row in range(part.start, part.stop)]
    assert len(rows) == len(set(rows)) == N and rows == sorted(rows)


def test_totals_and_marks_of_cells_count_as_in_one_call(atlas, tmp_path):
    cells = atlas[1].copy()
    cells.obs["n_counts"] = np.arange(cells.n_obs) + 1000.0
    cells.obs["filter_pass"] = (np.arange(cells.n_obs) % 3 > 0).astype(int)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    given = dict(model=atlas[0] / "tokenizer", rows=16, workers=1, settings={"keep_counts": False})
    found = sf.atlas.read(sf.atlas.run("tokenize", tmp_path / "cells.h5ad", out=tmp_path / "out", **given))
    expected = sf.geneformer.RankTokenizer.from_pretrained(atlas[0] / "tokenizer")(cells)
    assert (found.tokens == expected.tokens).all() and (found.cell_index == expected.cell_index).all()
    assert found.report["n_filtered"] == 22 and not list(found.obs)


def test_settings_that_no_method_takes_are_refused_before_the_work(atlas, tmp_path):
    place, _ = atlas
    for task, model, settings, word in (
        ("embed", "geneformer", {"emb_lyer": 0}, "emb_layer"),
        ("embed", "geneformer", {"overlong": "top"}, "overlong"),
        ("embed", "scgpt", {"copy": True}, "copy"),
        ("tokenize", "tokenizer", {"columns": ["donor"]}, "columns"),
        ("predict", "of_cells", {"epochs": 3}, "epochs"),
    ):
        with pytest.raises(sf.OptionError, match=word):
            run(place, task, model, tmp_path / "out", settings=settings)
        assert not (tmp_path / "out").exists()


def test_a_column_of_the_result_does_not_take_the_place_of_the_users(atlas, tmp_path):
    place, cells = atlas
    with pytest.raises(sf.OptionError, match="state_predicted"):
        run(place, "predict", "of_cells", tmp_path / "out", columns=["state_predicted"])
    with pytest.raises(sf.OptionError, match="file"):
        run(place, "tokenize", "tokenizer", tmp_path / "out", columns=["file"])


def test_cells_that_change_while_a_run_goes_on_end_it(atlas, tmp_path, monkeypatch):
    cells = atlas[1][2:22].copy()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    write = runs.work_off

    def work_and_change(*arguments):
        write(*arguments)
        cells.X.data[0] += 1
        cells.write_h5ad(tmp_path / "cells.h5ad")

    monkeypatch.setattr(runs, "work_off", work_and_change)
    with pytest.raises(sf.StoreError, match="cells/cells.h5ad was changed while the run went on"):
        sf.atlas.run("tokenize", tmp_path / "cells.h5ad", model=atlas[0] / "tokenizer", out=tmp_path / "out", workers=1)
    assert not (tmp_path / "out" / "cells.dataset").exists()


def test_a_finished_run_without_its_result_says_so(atlas, tmp_path):
    folder = run(atlas[0], "embed", "geneformer", tmp_path / "out")
    (folder / "cells.h5ad").unlink()
    with pytest.raises(sf.StoreError, match="its result is gone"):
        run(atlas[0], "embed", "geneformer", tmp_path / "out")


def test_an_error_of_the_data_names_the_stretch_in_one_process_too(atlas, tmp_path):
    cells = atlas[1][2:22].copy()
    cells.X.data[-1] = -1
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(sf.DataError, match="cells 16 to 19"):
        given = dict(model=atlas[0] / "tokenizer", out=tmp_path / "out", rows=8, workers=1)
        sf.atlas.run("tokenize", tmp_path / "cells.h5ad", **given)
