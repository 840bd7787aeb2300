"Processes that share each batch have the losses of one process, for every model that can be trained."

import json
from pathlib import Path

import numpy as np
from every_training import histories
from two_processes import two_processes

SCRIPT = Path(__file__).resolve().parent / "every_training.py"


def compared(tmp_path, *wings, n):
    "The losses of one process, after it was checked that n processes have the same."
    process = two_processes(SCRIPT, tmp_path / "losses.json", *wings, n=n)
    try:
        one = histories(*wings)
        told, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, told[-6000:]
    several = json.loads((tmp_path / "losses.json").read_text())
    assert several.keys() == one.keys()
    for name, rows in one.items():
        assert len(rows) == len(several[name]) > 4, name
        for mine, theirs in zip(rows, several[name]):
            np.testing.assert_allclose(theirs, mine, rtol=1e-5, atol=1e-5, err_msg=name)
    return one


def test_two_processes_train_every_model_as_one_does(tmp_path):
    assert len(compared(tmp_path, n=2)) >= 17


def test_a_row_that_a_process_without_rows_runs_counts_once(tmp_path):
    compared(tmp_path, "enformer", n=3)  # two rows remain for the second step
