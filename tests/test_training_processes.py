"Two processes that share each batch have the losses of one process, for every model that can be trained."

import json
import os
import socket
import subprocess
import sys

import numpy as np
import torch
from every_training import histories


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def test_two_processes_train_every_model_as_one_does(tmp_path):
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "every_training.py")
    shared = {
        "PYTHONPATH": os.path.dirname(os.path.dirname(script)),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "SCELLFM_PROGRESS": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    process = subprocess.Popen(
        [sys.executable, script, str(tmp_path / "two.json")],
        env=os.environ | shared,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        one = histories()
        told, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, told[-6000:]
    two = json.loads((tmp_path / "two.json").read_text())
    assert two.keys() == one.keys() and len(one) >= 13
    for name, rows in one.items():
        assert len(rows) == len(two[name]) > 4, name
        for mine, theirs in zip(rows, two[name]):
            np.testing.assert_allclose(theirs, mine, rtol=1e-5, atol=1e-5, err_msg=name)
