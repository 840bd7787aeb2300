"""rosa: from the genome around a gene's start to gene vectors, variant effects and expression in single cells."""
from scellfm import _lazy

__getattr__, __dir__, __all__ = _lazy(__name__, {
})
