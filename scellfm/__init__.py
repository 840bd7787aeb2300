"""AnnData in, a foundation model's answer out, beside the answer of the simplest method that could have given it."""

__version__ = "0.1.0"

from importlib import import_module


def _lazy(package: str, names: dict):
    "`__getattr__`, `__dir__` (PEP 562), `__all__`: `names` {public name: module in `package`} imported on first use."

    def __getattr__(name):
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(f"{package}.{names[name]}")
        return module if names[name] == name else getattr(module, name)

    def __dir__():
        return sorted(names)

    return __getattr__, __dir__, sorted(names)


__getattr__, __dir__, __all__ = _lazy(
    __name__,
    {
        **{
            module: module
            for module in (
                "assets",
                "atlas",
                "baselines",
                "cli",
                "commands",
                "core",
                "crossfit",
                "data",
                "demo",
                "geneformer",
                "heatmaps",
                "inference",
                "metrics",
                "plotting",
                "report",
                "rosa",
                "scgenept",
                "scgpt",
                "scores",
                "statistics",
                "store",
                "training",
            )
        },
        **{
            name: "core"
            for name in (
                "settings",
                "ScellfmError",
                "DataError",
                "DivergedError",
                "AssetError",
                "OptionError",
                "StoreError",
                "ExtraError",
                "ScellfmWarning",
            )
        },
    },
)
