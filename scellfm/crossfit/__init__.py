"""Which models were trained on what, held-out predictions beside baselines, and whether a model has memorised."""

from scellfm import _lazy

__getattr__, __dir__, __all__ = _lazy(
    __name__,
    {
        "cross_fit": "predictions",
        "predict_held_out": "predictions",
        "FoldPredictions": "predictions",
        "baseline_predictions": "baselines",
        "score_table": "tables",
        "class_score_table": "tables",
        "check_overfit": "check",
        "OverfitCheck": "check",
        "Evidence": "evidence",
        "TrainedOn": "membership",
    },
)
