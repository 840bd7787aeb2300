"""Atlas runs on Ray, for real: the bytes of one process. Skipped where Ray is not installed (`make ray`)."""

import os
import warnings

import numpy as np
import pytest
from atlas_cases import KINDS, begun_twice, cut_after, quiet, result, run_kind, shards, write_inputs

import scellfm as sf
from scellfm.atlas import ray_engine, workers

ray = pytest.importorskip("ray", reason="needs Ray: make ray")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    "Two files of cells, and the models."
    with quiet():
        return write_inputs(tmp_path_factory.mktemp("atlas"))[0]


@pytest.fixture(scope="module")
def begun(inputs, tmp_path_factory):
    "A run that two processes began and two ranks went on with, interrupted both times; before Ray starts its threads."
    return begun_twice(inputs, "geneformer", tmp_path_factory.mktemp("begun") / "run", rows=2)


@pytest.fixture(scope="module")
def place(inputs, begun):
    "The inputs, and Ray on two processors of this machine."
    os.environ.setdefault("RAY_worker_niceness", "0")  # else its workers give way to all other work of this machine
    root = os.path.dirname(os.path.dirname(sf.__file__))
    paths = os.pathsep.join([root, os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    env = {"env_vars": {"PYTHONPATH": paths, "SCELLFM_PROGRESS": "0"}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error", runtime_env=env)
    yield inputs
    ray.shutdown()


@pytest.mark.parametrize("kind", KINDS)
def test_ray_writes_what_one_process_writes(place, tmp_path, kind):
    run_kind(place, kind, tmp_path / "ray", backend="ray", workers=2)
    run_kind(place, kind, tmp_path / "here")
    assert result(tmp_path / "ray") == result(tmp_path / "here")


def test_a_run_that_one_process_began_goes_on_with_ray(place, tmp_path, monkeypatch):
    keep = workers.write_stretch

    def stop_after_five(*arguments):
        if shards(tmp_path / "run") >= 5:
            raise KeyboardInterrupt
        return keep(*arguments)

    monkeypatch.setattr("scellfm.atlas.crew.write_stretch", stop_after_five)
    with pytest.raises(KeyboardInterrupt):
        run_kind(place, "geneformer", tmp_path / "run")
    monkeypatch.undo()
    run_kind(place, "geneformer", tmp_path / "run", backend="ray", workers=1)
    run_kind(place, "geneformer", tmp_path / "here")
    assert result(tmp_path / "run") == result(tmp_path / "here")


def test_two_processes_two_ranks_and_ray_write_one_run(place, begun, tmp_path):
    run_kind(place, "geneformer", begun, backend="ray", workers=2, rows=2)
    run_kind(place, "geneformer", tmp_path / "here", rows=2)
    assert result(begun) == result(tmp_path / "here")


def test_ray_goes_on_with_another_number_of_workers(place, tmp_path):
    with cut_after(3):
        run_kind(place, "geneformer", tmp_path / "run", backend="ray", workers=2)
    assert shards(tmp_path / "run") < 8
    run_kind(place, "geneformer", tmp_path / "run", backend="ray", workers=1)
    run_kind(place, "geneformer", tmp_path / "here")
    assert result(tmp_path / "run") == result(tmp_path / "here")


def test_an_error_of_the_data_names_the_stretch(place, tmp_path):
    import anndata

    cells = anndata.read_h5ad(place / "cells" / "a.h5ad")
    cells.X.data[-1] = -1
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(sf.DataError, match="cells 32 to 39"), quiet():
        given = dict(model=place / "tokenizer", out=tmp_path / "out", rows=8, backend="ray", workers=1)
        sf.atlas.run("tokenize", tmp_path / "cells.h5ad", **given)


def test_a_stretch_without_memory_is_asked_for_again_in_smaller_batches(place, tmp_path, monkeypatch):
    asked = []

    def answers(ray, work, tasks, folder, workers, threads):
        asked.append([(task.name, task.token_budget) for task in tasks])
        actor = ray_engine.Actor(vars(work), str(folder), threads)
        read = ray_engine.ReadingActor(vars(work))
        for row in ray_engine.rows_of(tasks):
            batch = {name: [value] for name, value in row.items()}
            if row["budget"] > 128 or not row["budget"]:
                yield row | {"error": "MemoryError", "message": "no room", "bytes": 0, "sha256": ""}
            else:
                answer = actor(read({name: np.array(value) for name, value in batch.items()}))
                yield {name: value[0] for name, value in answer.items()}

    monkeypatch.setattr(ray_engine, "answers_of", answers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sf.atlas.run(
            "embed",
            place / "cells",
            model=place / "geneformer",
            out=tmp_path / "out",
            rows=32,
            backend="ray",
            settings={"token_budget": 256},
        )
    assert [budget for _, budget in asked[0]] == [None] * 3 and [budget for _, budget in asked[1]] == [128] * 3
    assert any("batches of at most 128 tokens" in str(one.message) for one in caught)
