"""Overexpression of every gene of a cell, against BertForMaskedLM with all hidden states: see deletion.py.

python benchmarks/overexpression.py [--cells 1] [--genes 300] [--pairs 5] [--quick]
"""

import sys

from deletion import main

if __name__ == "__main__":
    sys.exit(main("overexpress"))
