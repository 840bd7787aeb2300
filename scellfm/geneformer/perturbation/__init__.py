"""Genes deleted, overexpressed or shifted in silico, and the change of the cells' embeddings."""

from scellfm import _lazy

__getattr__, __dir__, __all__ = _lazy(
    __name__,
    {
        "perturb": "runner",
        "gene_effects": "effects",
        "Screen": "screen",
        "original_effects": "original_results",
    },
)
