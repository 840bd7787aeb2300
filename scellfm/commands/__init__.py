"""What each command of `scellfm` does: a function whose signature is its options."""

from scellfm import _lazy

__getattr__, __dir__, __all__ = _lazy(
    __name__,
    {
        "demo": "demonstration",
        "tokenize": "tokens",
        "embed": "vectors",
        "finetune": "classifiers",
        "predict": "classifiers",
        "perturb": "screens",
        "map": "references",
        "integrate": "references",
        "evaluate": "perturbations",
        "reproduce": "reproductions",
    },
)
