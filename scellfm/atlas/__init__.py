"""More cells than fit into memory or one night: stretches of cells, worked on by many processes, that resume."""

from scellfm import _lazy

__getattr__, __dir__, __all__ = _lazy(
    __name__,
    {
        "run": "runs",
        "read": "results",
    },
)
