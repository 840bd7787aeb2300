"""A script run by two or more processes that share each batch. `python tests/two_processes.py SCRIPT ARGUMENT...`
imports what training needs once and then becomes these; torch.distributed.run would import everything three times."""

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def two_processes(script, *arguments, n: int = 2) -> subprocess.Popen:
    "Start a script with its arguments; what both (or n) processes write to stdout and stderr is one stream."
    import torch

    shared = {
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "SCELLFM_PROGRESS": "0",
        "WORLD_SIZE": str(n),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    return subprocess.Popen(
        [sys.executable, __file__, str(script), *map(str, arguments)],
        env=os.environ | shared,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def become_several(n: int) -> list[int]:
    "Fork after the imports; the ids of the other processes in the first one, nothing in the others."
    import scanpy  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import torch._dynamo  # noqa: F401  the first optimizer of a process imports it, for seconds
    from transformers import BertForMaskedLM  # noqa: F401

    import scellfm.geneformer.geneformer  # noqa: F401
    import scellfm.training  # noqa: F401

    children = []
    for rank in range(1, n):
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
        if not (child := os.fork()):
            return []
        children.append(child)
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0"
    return children


if __name__ == "__main__":
    children = become_several(int(os.environ["WORLD_SIZE"]))
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    if not children:
        sys.stdout.flush()
        os._exit(0)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(next((code for code in ended if code), 0))
