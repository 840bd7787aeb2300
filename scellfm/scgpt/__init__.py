"""scGPT: value binning, cell embedding, reference mapping, integration and continual pretraining."""

from scellfm import _lazy

__getattr__, __dir__, __all__ = _lazy(
    __name__,
    {
        "Vocabulary": "vocabulary",
        "BinnedCells": "tokenizer",
        "ScGPT": "scgpt",
        "ReferenceMap": "mapping",
        "CellClassifier": "annotation",
        "CellAnnotator": "annotation",
        "ScGPTModel": "model",
        "ScGPTConfig": "model",
    },
)
