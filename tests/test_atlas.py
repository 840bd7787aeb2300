"""Atlas runs: the same bytes from any number of workers and after any kill; bad inputs are refused before the work."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, tree

import scellfm as sf
from scellfm.atlas import crew, runs
from scellfm.atlas.stretches import Stretch, stretches_of
from scellfm.atlas.work import Work


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    "Two files of 60 and 30 cells with their tokenizer, a tiny Geneformer, a tiny scGPT, and a classifier."
    place, cells = tmp_path_factory.mktemp("atlas"), sf.data.demo()
    cells.obs["donor"] = np.where(np.arange(cells.n_obs) % 2, "a", "b")
    (place / "cells").mkdir()
    cells[:60].write_h5ad(place / "cells" / "a.h5ad")
    cells[60:90].write_h5ad(place / "cells" / "b.h5ad")
    tokenizer = sf.geneformer.RankTokenizer.fit(cells)
    tokenizer.save_pretrained(place / "tokenizer")
    gf = sf.geneformer.Geneformer.from_config("tiny", tokenizer)
    gf.save_pretrained(place / "geneformer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        split = sf.data.hold_out(cells[:40], seed=0)
        clf = gf.finetune(cells[:40].copy(), label="donor", split=split, epochs=1)
    clf.save_pretrained(place / "classifier")
    sf.scgpt.ScGPT.from_config("tiny", cells).save_pretrained(place / "scgpt")
    return place, cells[:90].copy()


def run(place, task, model, out, **options):
    "A run over both files in stretches of 16 cells."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sf.atlas.run(task, place / "cells", model=place / model, out=out, **{"rows": 16, "workers": 1} | options)


def result(folder):
    "The files of a finished run but for the time stamps of its inputs."
    return {name: content for name, content in tree(folder).items() if name != "fingerprints.json"}


def test_tokens_are_those_of_the_tokenizer(atlas, tmp_path):
    place, cells = atlas
    run(place, "tokenize", "tokenizer", tmp_path / "out", columns=["donor"])
    found = sf.atlas.read(tmp_path / "out")
    expected = sf.geneformer.RankTokenizer.from_pretrained(place / "tokenizer")(cells)
    assert (found.tokens == expected.tokens).all() and (found.offsets == expected.offsets).all()
    assert list(found.obs.index) == list(cells.obs_names) and list(found.obs["donor"]) == list(cells.obs["donor"])
    assert found.report["n_cells"] == 90


@pytest.mark.parametrize("model, key", [("geneformer", "X_geneformer"), ("scgpt", "X_scGPT")])
def test_vectors_are_those_of_embed(atlas, tmp_path, model, key):
    place, cells = atlas
    run(place, "embed", model, tmp_path / "out", columns=["donor"])
    found = sf.atlas.read(tmp_path / "out")
    kind = {"geneformer": sf.geneformer.Geneformer, "scgpt": sf.scgpt.ScGPT}[model]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = kind.from_pretrained(place / model).embed(cells, copy=True).obsm[key]
    np.testing.assert_allclose(found.X[:], expected, atol=1e-5)
    assert found.isbacked and found.obs_names.equals(cells.obs_names)
    assert found.obs["file"].tolist() == ["a.h5ad"] * 60 + ["b.h5ad"] * 30
    assert found.obs["donor"].astype(str).tolist() == cells.obs["donor"].tolist()


def test_predictions_are_those_of_predict(atlas, tmp_path):
    place, cells = atlas
    run(place, "predict", "classifier", tmp_path / "out")
    found = sf.atlas.read(tmp_path / "out").obs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clf = sf.geneformer.CellClassifier.from_pretrained(place / "classifier")
        expected = clf.predict(cells, copy=True).obs
    assert found["donor_predicted"].astype(str).tolist() == expected["donor_predicted"].astype(str).tolist()
    np.testing.assert_allclose(found["donor_confidence"], expected["donor_confidence"], atol=1e-5)


def test_any_number_of_workers_gives_the_same_bytes(atlas, tmp_path):
    place, _ = atlas
    one = run(place, "embed", "geneformer", tmp_path / "one")
    two = run(place, "embed", "geneformer", tmp_path / "two", workers=2)
    assert result(one) == result(two)


STARTED = """
import sys, warnings
import scellfm as sf
warnings.simplefilter("ignore")
place, out, workers = sys.argv[1:]
print("ready", flush=True)
sf.atlas.run("embed", f"{place}/cells", model=f"{place}/geneformer", out=out, rows=8, workers=int(workers))
print("finished", flush=True)
"""


def start(place, out, workers):
    "The run as a process of its own."
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STARTED, str(place), str(out), str(workers)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def killed_again_and_again(place, folder, kills):
    "A run that is killed so often, each time with another number of workers, and one that was left alone."
    whole = run(place, "embed", "geneformer", folder / "whole", rows=8)
    rng, died = np.random.default_rng(0), 0
    for number in range(kills):
        process = start(place, folder / "run", 2 - number % 2)
        process.stdout.readline()
        deadline, seen = time.monotonic() + 120, len(list((folder / "run").rglob("*.npz")))
        while (
            len(list((folder / "run").rglob("*.npz"))) <= seen
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        time.sleep(0.1 * rng.random())
        process.send_signal(signal.SIGKILL)
        died += process.communicate()[0] == ""
    run(place, "embed", "geneformer", folder / "run", rows=8, workers=2)
    return result(whole), result(folder / "run"), died


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(atlas, tmp_path):
    whole, resumed, died = killed_again_and_again(atlas[0], tmp_path, 1)
    assert whole == resumed and died


@pytest.mark.slow
def test_thirty_kills_leave_the_same_bytes(atlas, tmp_path):
    whole, resumed, died = killed_again_and_again(atlas[0], tmp_path, 30)
    assert whole == resumed and died > 5


def work_of(place):
    "Tokenizing of both files."
    return Work("tokenize", str(place / "cells"), str(place / "tokenizer"))


def test_a_worker_that_is_killed_is_named_and_its_stretch_computed_again(atlas, tmp_path):
    tasks = [crew.Task("cells-0", Stretch("a.h5ad", 0, 8))]
    hired = crew.Crew(work_of(atlas[0]), tasks, tmp_path, workers=1, threads=1)
    hired.hands[0].process.kill()
    with pytest.warns(sf.ScellfmWarning, match="cells 0 to 7 of a.h5ad: the worker was killed"):
        while hired.hands:
            shard = hired.take(*hired.answers.get())
    assert shard.name == "cells-0" and (tmp_path / "cells-0.npz").exists()


def test_a_stretch_that_kills_its_worker_three_times_ends_the_run_and_is_named():
    work = Work("embed", "cells", "model")
    task = crew.Task("cells-7", Stretch("a.h5ad", 0, 8))
    with pytest.warns(sf.ScellfmWarning):
        twice = crew.once_more(crew.once_more(task, "killed", work), "killed", work)
    assert twice.token_budget == crew.BUDGET // 4
    with pytest.raises(sf.StoreError, match="cells 0 to 7 of a.h5ad: killed, 3 times"):
        crew.once_more(twice, "killed", work)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_no_worker_outlives_its_parent(atlas, tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from scellfm.atlas import crew; from scellfm.atlas.work import Work;"
        "from scellfm.atlas.stretches import Stretch;"
        f"work = Work('tokenize', {str(atlas[0] / 'cells')!r}, {str(atlas[0] / 'tokenizer')!r});"
        f"one = crew.Crew(work, [crew.Task('a', Stretch('a.h5ad', 0, 8))], Path({str(tmp_path)!r}), 1, 1);"
        "print(one.hands[0].process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    worker = Path("/proc") / ended.stdout.strip()
    deadline = time.monotonic() + 60
    while (
        worker.exists()
        and (worker / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
        and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    assert time.monotonic() < deadline


def test_other_inputs_models_and_settings_are_refused(atlas, tmp_path):
    place, cells = atlas
    (tmp_path / "cells").mkdir()
    cells[:20].write_h5ad(tmp_path / "cells" / "a.h5ad")
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
    other = cells[:20].copy()
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
    assert len(rows) == len(set(rows)) == 90 and rows == sorted(rows)


def test_totals_and_marks_of_cells_count_as_in_one_call(atlas, tmp_path):
    cells = atlas[1].copy()
    cells.obs["n_counts"] = np.arange(cells.n_obs) + 1000.0
    cells.obs["filter_pass"] = (np.arange(cells.n_obs) % 3 > 0).astype(int)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    given = dict(model=atlas[0] / "tokenizer", rows=16, workers=1, settings={"keep_counts": False})
    found = sf.atlas.read(sf.atlas.run("tokenize", tmp_path / "cells.h5ad", out=tmp_path / "out", **given))
    expected = sf.geneformer.RankTokenizer.from_pretrained(atlas[0] / "tokenizer")(cells)
    assert (found.tokens == expected.tokens).all() and (found.cell_index == expected.cell_index).all()
    assert found.report["n_filtered"] == 30 and not list(found.obs)


def test_settings_that_no_method_takes_are_refused_before_the_work(atlas, tmp_path):
    place, _ = atlas
    for task, model, settings, word in (
        ("embed", "geneformer", {"emb_lyer": 0}, "emb_layer"),
        ("embed", "geneformer", {"overlong": "top"}, "overlong"),
        ("embed", "scgpt", {"copy": True}, "copy"),
        ("tokenize", "tokenizer", {"columns": ["donor"]}, "columns"),
        ("predict", "classifier", {"epochs": 3}, "epochs"),
    ):
        with pytest.raises(sf.OptionError, match=word):
            run(place, task, model, tmp_path / "out", settings=settings)
        assert not (tmp_path / "out").exists()


def test_a_column_of_the_result_does_not_take_the_place_of_the_users(atlas, tmp_path):
    place, cells = atlas
    with pytest.raises(sf.OptionError, match="donor_predicted"):
        run(place, "predict", "classifier", tmp_path / "out", columns=["donor_predicted"])
    with pytest.raises(sf.OptionError, match="file"):
        run(place, "tokenize", "tokenizer", tmp_path / "out", columns=["file"])


def test_cells_that_change_while_a_run_goes_on_end_it(atlas, tmp_path, monkeypatch):
    cells = atlas[1][:20].copy()
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
    cells = atlas[1][:20].copy()
    cells.X.data[-1] = -1
    cells.write_h5ad(tmp_path / "cells.h5ad")
    for workers in (1, 2):
        with pytest.raises(sf.DataError, match="cells 16 to 19"):
            given = dict(model=atlas[0] / "tokenizer", out=tmp_path / f"out{workers}", rows=8, workers=workers)
            sf.atlas.run("tokenize", tmp_path / "cells.h5ad", **given)
