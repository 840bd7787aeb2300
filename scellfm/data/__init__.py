"""AnnData in: reading, checking, gene identifiers, splits, demonstration and simulated data."""

from scellfm import _lazy

__getattr__, __dir__, __all__ = _lazy(
    __name__,
    {
        "read": "reading",
        "check_counts": "reading",
        "count_blocks": "reading",
        "count_matrix": "reading",
        "gene_ids": "genes",
        "match_genes": "genes",
        "GeneMatch": "genes",
        "hold_out": "splits",
        "folds": "splits",
        "Split": "splits",
        "Folds": "splits",
        "check_leakage": "splits",
        "demo": "demonstration",
        "interferon_cells": "stimulated",
        "simulate_cells": "cells",
        "simulate_shifts": "shifts",
        "GeneVectors": "vectors",
        "read_vectors": "vector_files",
        "simulate_perturbations": "perturbed",
        "PerturbationSimulation": "perturbed",
        "simulate_genome": "genomes",
        "GenomeSimulation": "genomes",
    },
)
