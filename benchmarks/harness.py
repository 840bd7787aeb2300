"""What the benchmarks share: one thread, sides in turns, medians of pairs, peak memory, checks with an exit code.

A benchmark imports this first: numerical libraries read the number of threads when they are loaded.
"""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS", "ARROW_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["SCELLFM_PROGRESS"] = "0"

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path


def parser(description: str, *, pairs: int | None = 5, quick: str = "a small problem") -> argparse.ArgumentParser:
    "A parser with the options that all benchmarks have: --pairs (if there are pairs) and --quick."
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if pairs is not None:
        made.add_argument("--pairs", type=int, default=pairs, help="how often the sides take turns")
    made.add_argument("--quick", action="store_true", help=quick)
    return made


def timed(function: Callable) -> tuple[float, float, object]:
    "(wall seconds, processor seconds of this process, what the function returned)."
    wall, busy = time.perf_counter(), time.process_time()
    result = function()
    return time.perf_counter() - wall, time.process_time() - busy, result


DISTURBED = 0.15  # cores used by others, above which wall times mean little


def rivals() -> int:
    "How many other processes want a processor now, without those of low priority (nice 10 and above)."
    found = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        found += fields[0] == "R" and int(fields[16]) < 10 and int(fields[2]) != os.getpgrp()
    return found


def wait_for_quiet(seconds: float, still: int = 10) -> None:
    "Wait until no other process has wanted a processor for two seconds, at most `seconds`."
    end, seen = time.monotonic() + seconds, 0
    while seen < still and time.monotonic() < end:
        time.sleep(0.2)
        seen = 0 if rivals() else seen + 1


class Others:
    "A block; afterwards `cores` is the mean number of processors that other processes used during it."

    def __enter__(self) -> "Others":
        self.start = self.now()
        return self

    def __exit__(self, *error: object) -> None:
        wall, everyone, own = (b - a for a, b in zip(self.start, self.now()))
        self.cores = max(everyone - own, 0.0) / wall

    def now(self) -> tuple[float, float, float]:
        "Seconds: wall, all processors, and this process with the processes that it has waited for."
        user, nice, system, _, _, hard, soft, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
        everyone = (user + nice + system + hard + soft) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), everyone, sum(os.times()[:4])


class Pairs:
    "Seconds of sides that took turns: `wall` and `cpu` by side, one per pair; `results`: the last of each side."

    def __init__(self, sides: dict[str, Callable], n: int):
        self.wall, self.cpu, self.results = ({side: [] for side in sides} for _ in range(3))
        for _ in range(n):
            for side, run in sides.items():
                wall, busy, self.results[side] = timed(run)
                self.wall[side].append(wall)
                self.cpu[side].append(busy)

    def median(self, side: str, clock: str = "wall") -> float:
        "The median seconds of a side."
        return statistics.median(getattr(self, clock)[side])

    def ratio(self, ours: str, theirs: str, clock: str = "wall") -> float:
        "How many times as fast `ours` is (median over the pairs)."
        times = getattr(self, clock)
        return statistics.median(b / a for a, b in zip(times[ours], times[theirs]))


def peak_memory(reset: bool = False) -> float:
    "Peak memory of this program so far, MB (ru_maxrss would include its parent's); `reset` begins a new count."
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def print_growth(function: Callable) -> None:
    "Run a side and print by how many MB the peak memory grew; `growth_of` calls this in a separate process."
    before = peak_memory(reset=True)
    function()
    print(json.dumps({"mb": peak_memory() - before}))


def figures_of(script: str, *arguments: object, env: dict[str, str] | None = None) -> dict:
    "What a separate process prints as its last line, in JSON; `env` adds to its environment."
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}))
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def growth_of(script: str, *arguments: object, env: dict[str, str] | None = None) -> float:
    "MB by which the peak memory of one side grows in a separate process, which calls `print_growth`."
    return figures_of(script, *arguments, env=env)["mb"]


def write_map(folder: Path, blocks: Iterable[tuple], shape: tuple[int, int], n_labels: int, k: int) -> None:
    "A saved map of reference cells, written block by block: (float32 [rows, d], int64 labels [rows])."
    import numpy as np

    (n, d), codes = shape, []
    size = n * d * 4
    header = json.dumps(
        {
            "embedding": {"dtype": "F32", "shape": [n, d], "data_offsets": [0, size]},
            "codes": {"dtype": "I64", "shape": [n], "data_offsets": [size, size + n * 8]},
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    with open(folder / "index.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for vectors, labels in blocks:
            file.write(vectors.tobytes())
            codes.append(labels)
        file.write(np.concatenate(codes).astype("<i8").tobytes())
    record = {"use_rep": "X_scGPT", "label": "cell_type", "k": k, "vote": "majority", "ties": "first"}
    record |= {"classes": [f"type {i:03d}" for i in range(n_labels)], "min_confidence": 0.0, "max_distance": None}
    (folder / "index.json").write_text(json.dumps(record))


def verdict(*checks: tuple[str, float, str, float], more: str = "") -> int:
    "Print each check (name, value, 'floor' or 'ceiling', limit) and return the exit code: 1 if one is not met."
    kept = [value >= limit if kind == "floor" else value <= limit for _, value, kind, limit in checks]
    for (name, value, kind, limit), good in zip(checks, kept):
        print(f"{name} {value:.3g} ({kind} {limit:g}){'' if good else ': NOT MET'}")
    if more:
        print(more)
    return int(not all(kept))
