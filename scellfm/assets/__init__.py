"""Checkpoints and dictionaries in: found, verified, read without executing anything, checked tensor by tensor."""

from scellfm import _lazy

__getattr__, __dir__, __all__ = _lazy(
    __name__,
    {
        "find": "hub",
        "download_file": "download",
        "unpack_zip": "download",
        "sha256": "files",
        "kind_of": "files",
        "read_dictionary": "dictionaries",
        "read_tensors": "tensors",
        "save_tensors": "tensors",
        "save_model": "tensors",
        "save_torch": "tensors",
        "check_sizes": "tensors",
        "check_layers": "tensors",
        "Tensors": "tensors",
        "load_state": "accounting",
        "LoadReport": "accounting",
    },
)
