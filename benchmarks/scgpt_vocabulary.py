"""Reading scGPT's vocabulary of 60,697 tokens takes under 0.3 s.

python benchmarks/scgpt_vocabulary.py [--quick] [vocab.json]
"""

import sys
import tempfile
from pathlib import Path

import harness  # first: it sets the number of threads

from scellfm.scgpt import Vocabulary

N_TOKENS = 60_697


def main() -> int:
    parser = harness.parser(__doc__, pairs=None, quick="one reading instead of five")
    parser.add_argument("vocabulary", nargs="?", help="a vocab.json; by default one of the published size is simulated")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.vocabulary or Path(folder) / "vocab.json")
        if not options.vocabulary:
            Vocabulary(f"GENE{i}" for i in range(N_TOKENS - 3)).save(path)
        found = harness.Pairs({"scellfm": lambda: Vocabulary.from_file(path)}, 1 if options.quick else 5)
    print(f"{len(found.results['scellfm']):,} tokens, {found.median('scellfm', 'cpu'):.3f} s of CPU")
    return harness.verdict(("seconds to read scGPT's vocabulary", found.median("scellfm"), "ceiling", 0.3))


if __name__ == "__main__":
    sys.exit(main())
