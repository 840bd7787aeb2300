"""Classifiers of cells and of genes, fine-tuned from a pretrained Geneformer and scored on what was held out."""

from scellfm import _lazy

__getattr__, __dir__, __all__ = _lazy(
    __name__,
    {
        "CellClassifier": "classifier",
        "TaskClassifier": "multitask",
        "GeneClassifier": "genes",
        "finetune": "multitask",
        "finetune_genes": "genes",
        "search": "hyperparameters",
        "Search": "hyperparameters",
    },
)
