"""`import scellfm` in a fresh process: under one second, without the heavy libraries.

    python benchmarks/import_time.py [--pairs 5]

Beside it stands the import of the libraries that scellfm loads only where it uses them.
"""

import argparse
import statistics
import subprocess
import sys

SIDES = {"scellfm": "import scellfm", "torch, scanpy, transformers": "import torch, scanpy, transformers"}
PROBE = (
    "import sys, time; t = time.perf_counter(); {code}; s = time.perf_counter() - t;"
    "status = open('/proc/self/status').read() if sys.platform == 'linux' else 'VmHWM: 0 kB';"
    "print(s, int(status.split('VmHWM:')[1].split()[0]) / 1024)"
)


def measure(code: str) -> tuple[float, float]:
    "(seconds, peak memory in MB) of some imports in a process of their own."
    out = subprocess.run(
        [sys.executable, "-c", PROBE.format(code=code)], capture_output=True, text=True, check=True
    ).stdout.split()
    return float(out[0]), float(out[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    pairs = parser.parse_args().pairs
    times = {name: [] for name in SIDES}
    for _ in range(pairs):
        for name, code in SIDES.items():
            times[name].append(measure(code))
    medians = {name: [statistics.median(values) for values in zip(*runs)] for name, runs in times.items()}
    for name, (seconds, peak) in medians.items():
        print(f"{name:32s} {seconds:6.3f} s   peak {peak:6.0f} MB")
    ours = medians["scellfm"][0]
    print(
        f"ratio {medians['torch, scanpy, transformers'][0] / ours:.0f}x; promise: under 1 s: "
        f"{'kept' if ours < 1 else 'BROKEN'}"
    )
    return 0 if ours < 1 else 1


if __name__ == "__main__":
    sys.exit(main())
