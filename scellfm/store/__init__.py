"""Results that survive: atomic writes, fingerprints of inputs, and long runs that resume where they stopped."""

from scellfm import _lazy

__getattr__, __dir__, __all__ = _lazy(
    __name__,
    {
        "sha256": "files",
        "atomic_write": "files",
        "atomic_files": "files",
        "FolderKind": "outputs",
        "fingerprint": "fingerprints",
        "Store": "shards",
        "write_shard": "shards",
        "block_rows": "blocks",
        "each_block": "blocks",
        "rows_in_blocks": "blocks",
    },
)
