"""Geneformer: rank value encoding, embedding, fine-tuning and in silico perturbation."""
from scellfm import _lazy

__getattr__, __dir__, __all__ = _lazy(__name__, {
    "RankTokenizer": "tokenizer", "TokenizedCells": "tokenized",
    "Geneformer": "model", "CellClassifier": "classifier", "TaskClassifier": "multitask",
    "perturb": "perturbation", "gene_effects": "affected", "Screen": "screen",
    "gene_vectors": "embedding",
    "original_effects": "original_results",
    "GeneClassifier": "genes",
})
