"""`import scellfm` in a fresh process: under one second, without the heavy libraries.

    python benchmarks/import_time.py [--pairs 5]

For comparison, it also measures the import of the libraries that scellfm loads only when it uses them.
"""

import statistics
import subprocess
import sys

import harness

SIDES = {"scellfm": "import scellfm", "torch, scanpy, transformers": "import torch, scanpy, transformers"}
PROBE = (
    "import sys, time; t = time.perf_counter(); {code}; s = time.perf_counter() - t;"
    "status = open('/proc/self/status').read() if sys.platform == 'linux' else 'VmHWM: 0 kB';"
    "print(s, int(status.split('VmHWM:')[1].split()[0]) / 1024)"
)


def measure(code: str) -> tuple[float, float]:
    "(seconds, peak memory in MB) of some imports in a separate process."
    out = subprocess.run(
        [sys.executable, "-c", PROBE.format(code=code)], capture_output=True, text=True, check=True
    ).stdout.split()
    return float(out[0]), float(out[1])


def main() -> int:
    options = harness.parser(__doc__, quick="one pair").parse_args()
    pairs = 1 if options.quick else options.pairs
    times = {name: [] for name in SIDES}
    for _ in range(pairs):
        for name, code in SIDES.items():
            times[name].append(measure(code))
    medians = {name: [statistics.median(values) for values in zip(*runs)] for name, runs in times.items()}
    for name, (seconds, peak) in medians.items():
        print(f"{name:32s} {seconds:6.3f} s   peak {peak:6.0f} MB")
    ours, theirs = (found[0] for found in medians.values())
    return harness.verdict(
        ("seconds of import scellfm", ours, "ceiling", 1), more=f"{theirs / ours:.0f} times as fast as the libraries"
    )


if __name__ == "__main__":
    sys.exit(main())
