"""Every run that goes on from a folder, killed at any moment: the same bytes, and nothing else is left (E28, E36)."""

import json
import os
import subprocess
import sys

import kill_runs
import pytest
from conftest import ROOT

SOME = ["finetune", "perturb", "download", "vectors converted", "rosa mlp", "tokenize"]  # embed: see test_resume


def killed(place, kills: int, *runs: str) -> list[dict]:
    "What `kill_runs` says of runs that it killed so often, in a process of its own; it fails where bytes differ."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "kill_runs.py"), str(place), str(kills), *runs]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_runs_that_are_killed_go_on_to_the_same_bytes_and_leave_nothing(tmp_path):
    assert [run["killed"] for run in killed(tmp_path, 2, *SOME)] == [2] * len(SOME)


@pytest.mark.slow
@pytest.mark.parametrize("run", kill_runs.RUNS)
def test_thirty_kills_leave_the_same_bytes_and_nothing_else(tmp_path, run):
    assert killed(tmp_path, 30, run)[0]["killed"] == 30
