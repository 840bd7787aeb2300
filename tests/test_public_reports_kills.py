"""Every run that goes on from a folder, killed at any moment: the same bytes, and nothing else is left (E28, E36)."""

import json
import os
import subprocess
import sys

import kill_runs
import pytest
from conftest import ROOT

SOME = ["finetune", "perturb", "download", "vectors converted", "rosa mlp", "tokenize"]  # embed: see test_resume


def killed(run: str, place, kills: int) -> dict:
    "What `kill_runs` says of a run that it killed so often, in a process of its own; it fails where bytes differ."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "kill_runs.py"), run, str(place), str(kills)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("run", SOME)
def test_a_run_that_is_killed_goes_on_to_the_same_bytes_and_leaves_nothing(tmp_path, run):
    assert killed(run, tmp_path / "place", 2)["killed"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("run", kill_runs.RUNS)
def test_thirty_kills_leave_the_same_bytes_and_nothing_else(tmp_path, run):
    assert killed(run, tmp_path / "place", 30)["killed"] == 30
