"""The vocabulary: numbers as in the file, special tokens as in the original, and what does not add up is refused."""

import json
import pickle

import anndata
import numpy as np
import pandas as pd
import pytest
from conftest import golden, real_data

from scellfm.core import AssetError, DataError, ScellfmWarning
from scellfm.scgpt import Vocabulary


def test_numbers_are_those_of_the_file_and_missing_specials_are_appended():
    folder = golden("scgpt")
    stored = json.loads((folder / "model" / "vocab.json").read_text())
    vocabulary = Vocabulary.from_file(folder / "model" / "vocab.json")
    assert all(vocabulary[token] == number for token, number in stored.items())
    assert len(vocabulary) == json.loads((folder / "config.json").read_text())["ntoken"]
    assert vocabulary.tokens[len(stored) :] == [t for t in ("<pad>", "<cls>", "<eoc>") if t not in stored]
    assert vocabulary.tokens[vocabulary.pad] == "<pad>" and vocabulary.tokens[vocabulary.cls] == "<cls>"


def test_the_three_published_vocabularies_are_read():
    for path in sorted(real_data("scgpt").glob("*vocab.json")):
        vocabulary = Vocabulary.from_file(path)
        stored = json.loads(path.read_text())
        assert [vocabulary.tokens[number] for number in stored.values()] == list(stored)


def test_saved_and_read_it_is_the_same(tmp_path):
    vocabulary = Vocabulary(["B2M", "ACTB"])
    vocabulary.save(tmp_path / "vocab.json")
    assert (
        Vocabulary.from_file(tmp_path / "vocab.json").tokens
        == vocabulary.tokens
        == ["B2M", "ACTB", "<pad>", "<cls>", "<eoc>"]
    )


class Hostile:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    "content, message",
    [
        (
            '{"B2M": 0, "ACTB": 2}',
            "token 'ACTB' has the number 2; the 2 tokens of a vocabulary must be numbered 0 to 1",
        ),
        ('{"B2M": 0, "ACTB": 0}', "tokens 'B2M' and 'ACTB' have the same number 0"),
        ('{"B2M": "a"}', "token 'B2M' has the number 'a'"),
        ('["B2M"]', "not a dictionary"),
        ('{"B2M": 0', "cannot be read as a dictionary"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        ("<!DOCTYPE html><html>", "web page"),
        ("", "empty file"),
    ],
)
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path, content, message):
    (tmp_path / "vocab.json").write_text(content)
    with pytest.raises(AssetError, match=message):
        Vocabulary.from_file(tmp_path / "vocab.json")


def test_a_hostile_pickle_is_not_run(tmp_path, capsys):
    (tmp_path / "vocab.pkl").write_bytes(pickle.dumps({"B2M": Hostile()}))
    with pytest.raises(AssetError):
        Vocabulary.from_file(tmp_path / "vocab.pkl")
    assert "run" not in capsys.readouterr().out


def test_a_token_twice_is_refused():
    with pytest.raises(AssetError, match="token 'B2M' appears twice"):
        Vocabulary(["B2M", "ACTB", "B2M"])


def genes(**columns):
    names = columns.pop("names")
    return anndata.AnnData(np.ones((1, len(names)), dtype="float32"), var=pd.DataFrame(columns, index=names))


def test_names_are_taken_from_where_the_vocabulary_knows_them():
    vocabulary = Vocabulary(["B2M", "ACTB", "CD3D"])
    found = vocabulary.match(genes(names=["0", "1", "2"], feature_name=["CD3D", "ACTB", "B2M"]))
    assert found.index.tolist() == [2, 1, 0] and found.report["names_from"] == "feature_name"
    assert vocabulary.match(genes(names=["b2m", "Actb", "CD3D"], x=[1, 2, 3]), gene_column=None).index.tolist() == [
        0,
        1,
        2,
    ]
    assert vocabulary.match(genes(names=["0", "1"], mine=["CD3D", "ACTB"]), gene_column="mine").index.tolist() == [2, 1]


@pytest.mark.filterwarnings("ignore::scellfm.core.ScellfmWarning")
def test_special_tokens_are_no_genes():
    found = Vocabulary(["B2M", "ACTB"]).match(genes(names=["<cls>", "<pad>", "B2M"]))
    assert found.index.tolist() == [-1, -1, 0]


def test_few_known_genes_are_warned_of_and_almost_none_refused():
    vocabulary = Vocabulary([f"G{i}" for i in range(30)])
    with pytest.warns(ScellfmWarning, match="only 4 of 10 genes"):
        vocabulary.match(genes(names=[*(f"G{i}" for i in range(4)), *(f"Q{i}" for i in range(6))]))
    with pytest.raises(DataError, match="only 1 of 20 genes"):
        vocabulary.match(genes(names=["G1", *(f"Q{i}" for i in range(19))]))
