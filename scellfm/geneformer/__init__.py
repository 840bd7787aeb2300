"""Geneformer: rank value encoding, embedding, fine-tuning and in silico perturbation."""

from scellfm import _lazy

__getattr__, __dir__, __all__ = _lazy(
    __name__,
    {
        "Geneformer": "geneformer",
        "GeneformerModel": "model",
        "GeneformerReader": "reader",
        "RankTokenizer": "tokenizer.rank_tokenizer",
        "TokenizedCells": "tokenizer.tokenized",
        "Corpus": "tokenizer.corpus",
        "CellClassifier": "finetuning.classifier",
        "TaskClassifier": "finetuning.multitask",
        "GeneClassifier": "finetuning.genes",
        "perturb": "perturbation.runner",
        "gene_effects": "perturbation.effects",
        "Screen": "perturbation.screen",
        "original_effects": "perturbation.original_results",
        "gene_vectors": "embedding",
    },
)
