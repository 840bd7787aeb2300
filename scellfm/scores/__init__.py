"""Every score, defined once, with its source; and the table that shows a model beside its baselines."""

from scellfm import _lazy

__getattr__, __dir__, __all__ = _lazy(
    __name__,
    {
        "Scores": "table",
        "classification": "labels",
        "ClassificationResult": "labels",
        "integration": "batches",
        "umaps": "pictures",
        "perturbation": "perturbations",
        "PerturbationScores": "perturbations",
        "plot_shares": "shares",
        "expression_scores": "sequence",
        "GridScores": "sequence",
        "gears_scores": "gears",
        "gears_summary": "gears",
    },
)
