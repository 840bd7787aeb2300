"""Cells as sentences of genes: dictionaries, medians, ranking, files in, tokenized cells out."""

from scellfm import _lazy

__getattr__, __dir__, __all__ = _lazy(
    __name__,
    {
        "RankTokenizer": "rank_tokenizer",
        "TokenizedCells": "tokenized",
        "Corpus": "corpus",
        "encode": "ranking",
    },
)
