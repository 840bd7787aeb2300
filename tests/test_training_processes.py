"Two processes that share each batch have the losses of one process, for every model that can be trained."

import json
from pathlib import Path

import numpy as np
from every_training import histories
from two_processes import two_processes


def test_two_processes_train_every_model_as_one_does(tmp_path):
    script = Path(__file__).resolve().parent / "every_training.py"
    process = two_processes(script, tmp_path / "two.json")
    try:
        one = histories()
        told, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, told[-6000:]
    two = json.loads((tmp_path / "two.json").read_text())
    assert two.keys() == one.keys() and len(one) >= 17
    for name, rows in one.items():
        assert len(rows) == len(two[name]) > 4, name
        for mine, theirs in zip(rows, two[name]):
            np.testing.assert_allclose(theirs, mine, rtol=1e-5, atol=1e-5, err_msg=name)
