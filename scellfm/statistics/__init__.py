"""The test of a screen against similar genes and the variation between donors; other tests beside it; known targets."""

from scellfm import _lazy

__getattr__, __dir__, __all__ = _lazy(
    __name__,
    {
        "screen_test": "screen",
        "bh": "table",
        "rank_sum_test": "comparison",
        "donor_t_test": "comparison",
        "log2_fold_change": "targets",
        "recovery": "targets",
        "recall_at_budget": "targets",
        "recall_at_fdr": "targets",
        "realised_fdr": "targets",
    },
)
