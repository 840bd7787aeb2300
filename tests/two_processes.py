"""A script run by two processes that share each batch. `python tests/two_processes.py SCRIPT ARGUMENT...` imports what
training needs once and then becomes the two; torch.distributed.run would import everything three times."""

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


def two_processes(script, *arguments) -> subprocess.Popen:
    "Start a script with its arguments; what both processes write to stdout and stderr is one stream."
    import torch

    shared = {
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "SCELLFM_PROGRESS": "0",
        "WORLD_SIZE": "2",
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


def become_two() -> int:
    "Fork after the imports; the process id of the second process in the first, 0 in the second."
    import scanpy  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import torch._dynamo  # noqa: F401  the first optimizer of a process imports it, for seconds
    from transformers import BertForMaskedLM  # noqa: F401

    import scellfm.geneformer.geneformer  # noqa: F401
    import scellfm.training  # noqa: F401

    child = os.fork()
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if child else "1"
    return child


if __name__ == "__main__":
    child = become_two()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    if not child:
        sys.stdout.flush()
        os._exit(0)
    _, ended = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(ended))
