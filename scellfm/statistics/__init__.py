"""Donors as evidence, genes like it as the standard: the test of a screen, the usual tests beside it, known targets."""

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
    },
)
