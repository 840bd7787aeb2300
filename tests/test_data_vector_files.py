"""Published gene vectors: every format gives the same table, and nothing that a file says is done."""

import gzip
import json
import os
import pickle
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest
from conftest import real_data
from hypothesis import given
from hypothesis import strategies as st

from scellfm import AssetError, DataError, OptionError, ScellfmWarning
from scellfm.assets.dictionaries import Refused, read_arrays, read_pickle
from scellfm.data import read_vectors

GENES = ["JAK2", "STAT1", "IRF1"]
VALUES = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)


def as_lists(kind=list):
    return kind((gene, row.astype(float).tolist()) for gene, row in zip(GENES, VALUES))


WRITERS = {
    "lists.pickle": lambda path: path.write_bytes(pickle.dumps(dict(as_lists()))),
    "ordered.pkl": lambda path: path.write_bytes(pickle.dumps(OrderedDict(as_lists()))),
    "arrays.pkl": lambda path: path.write_bytes(pickle.dumps(dict(zip(GENES, VALUES)))),
    "rows.pkl": lambda path: path.write_bytes(pickle.dumps({g: row[None] for g, row in zip(GENES, VALUES)})),
    "one_array.pkl": lambda path: path.write_bytes(pickle.dumps(np.asfortranarray(VALUES))),
    "list_of_lists.pkl": lambda path: path.write_bytes(pickle.dumps(VALUES.tolist())),
    "dictionary.json": lambda path: path.write_text(json.dumps(dict(as_lists()))),
    "array.npy": lambda path: np.save(path, VALUES),
    "table.csv": lambda path: path.write_text(
        "gene,"
        + ",".join(map(str, range(40)))
        + "\n"
        + "".join(f"{g},{','.join(map(str, r))}\n" for g, r in as_lists())
    ),
    "word2vec.txt": lambda path: path.write_text(
        "3 40\n" + "".join(f"{gene}\t{' '.join(map(str, row))}\n" for gene, row in as_lists())
    ),
    "table.csv.gz": lambda path: path.write_bytes(
        gzip.compress("".join(f"{gene},{','.join(map(str, row))}\n" for gene, row in as_lists()).encode())
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_table(tmp_path, name):
    WRITERS[name](tmp_path / name)
    found = read_vectors(tmp_path / name, genes=GENES)
    assert list(found.genes) == GENES and found.covered.all()
    np.testing.assert_allclose(found.values, VALUES, rtol=1e-6)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("n", [0, 1, 2, 999, 1000, 1001, 3000])
def test_runs_of_floats_are_read_as_the_single_instructions_would_be(protocol, n):
    numbers = np.random.default_rng(n).normal(size=n)
    mixed = [1, *numbers.tolist(), 2, 0.5, True]
    given = {"a": numbers.tolist(), "b": mixed, "c": numbers.astype(">f8"), "d": np.arange(n, dtype=np.int16)}
    found = read_pickle(pickle.dumps(given, protocol=protocol), arrays=True)
    for key, values in given.items():
        np.testing.assert_array_equal(found[key], np.asarray(values, dtype=float))
    lists = {key: given[key] for key in "ab"}
    assert read_pickle(pickle.dumps(lists, protocol=protocol), lists=True) == lists


def test_many_vectors_stay_arrays_in_memory():
    data = pickle.dumps({f"G{i}": np.full(1536, i / 7).tolist() for i in range(300)})
    tracemalloc.start()
    found = read_pickle(data, arrays=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 300 and found["G5"][0] == 5 / 7
    assert peak < 1.5 * 300 * 1536 * 8


class Run:
    "Unpickled by the usual means, it calls os.system."

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


PLACES = {
    "a value": lambda bad: {"JAK2": [0.5] * 40, "STAT1": bad},
    "in a list": lambda bad: {"JAK2": [0.5] * 2000 + [bad] + [0.5] * 2000},
    "a key": lambda bad: {bad: [0.5] * 40},
    "an array of objects": lambda bad: {"JAK2": np.array([0.5, bad], dtype=object)},
    "the top": lambda bad: bad,
    "a list of lists": lambda bad: [[0.5] * 40, [bad]],
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_hostile_file_runs_nothing(tmp_path, place, protocol):
    canary, path = tmp_path / "canary", tmp_path / "vectors.pkl"
    path.write_bytes(pickle.dumps(PLACES[place](Run(canary)), protocol=protocol))
    with pytest.raises(AssetError, match="was executed"):
        read_vectors(path, genes=GENES)
    assert not canary.exists()
    pickle.loads(path.read_bytes())  # it is no blank cartridge
    assert canary.exists()


def test_an_array_of_objects_on_its_own_runs_nothing(tmp_path):
    canary = tmp_path / "canary"
    np.save(tmp_path / "array.npy", np.array([[Run(canary)]], dtype=object), allow_pickle=True)
    with pytest.raises(AssetError, match="cannot be read as an array of numbers"):
        read_vectors(tmp_path / "array.npy", genes=["JAK2"])
    assert not canary.exists()


WHOLE = pickle.dumps({"JAK2": [0.5, 1.5, 2.5], "STAT1": np.arange(3.0), "IRF1": [1, 2, 3]}, protocol=4)


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255), st.integers(0, len(WHOLE)))
def test_a_damaged_pickle_is_refused_or_is_still_vectors(place, byte, end):
    data = bytearray(WHOLE)
    data[place] = byte
    try:
        found = read_pickle(bytes(data[: end or None]), arrays=True)
    except (Refused, ValueError, LookupError, StopIteration, TypeError, OverflowError, RecursionError):
        return  # what `parsed` turns into an AssetError
    assert isinstance(found, (dict, np.ndarray))


def test_arrays_of_lying_shapes_are_refused():
    data = pickle.dumps({"JAK2": np.arange(4, dtype=np.uint8)}, protocol=4)
    for shape in (b"K\x05\x85", b"J\xff\xff\xff\x7f\x85", b"K\x00\x85"):
        assert data.count(b"K\x04\x85") == 1
        with pytest.raises(Refused, match="an array of uint8"):
            read_pickle(data.replace(b"K\x04\x85", shape), arrays=True)


def test_the_same_array_twice_is_read_twice_and_a_list_in_itself_is_refused():
    row = np.arange(3.0)
    found = read_pickle(pickle.dumps({"a": row, "b": row}), arrays=True)
    assert found["a"].tolist() == found["b"].tolist() == [0, 1, 2]
    endless = [0.5]
    endless.append(endless)
    with pytest.raises(Refused, match="inside itself"):
        read_pickle(pickle.dumps({"a": endless}), arrays=True)


def test_a_converted_table_is_used_for_the_same_file_alone(tmp_path):
    WRITERS["lists.pickle"](tmp_path / "a.pickle")
    first = read_vectors(tmp_path / "a.pickle", folder=tmp_path / "kept")
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["vectors.json", "vectors.safetensors"]
    np.testing.assert_array_equal(read_vectors(tmp_path / "a.pickle", folder=tmp_path / "kept").values, first.values)
    np.testing.assert_array_equal(read_vectors(tmp_path / "kept").values, first.values)
    (tmp_path / "a.pickle").write_bytes(pickle.dumps({"JAK2": [1.0, 2.0]}))
    with pytest.raises(OptionError, match="another file"):
        read_vectors(tmp_path / "a.pickle", folder=tmp_path / "kept")


def test_a_converted_array_is_used_under_the_names_that_it_was_made_with_alone(tmp_path):
    values = VALUES.copy()
    values[1, 0] = np.nan
    np.save(tmp_path / "a.npy", values)
    with pytest.warns(ScellfmWarning, match="left out"):
        first = read_vectors(tmp_path / "a.npy", genes=GENES, folder=tmp_path / "kept")
    again = read_vectors(tmp_path / "a.npy", genes=iter(GENES), folder=tmp_path / "kept")
    assert list(again.genes) == list(first.genes) == ["JAK2", "IRF1"]
    for others in (GENES[::-1], ["JAK2", "other", "IRF1"]):
        with pytest.raises(OptionError, match="under other names"):
            read_vectors(tmp_path / "a.npy", genes=others, folder=tmp_path / "kept")


def test_rows_that_are_no_knowledge_are_told(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"JAK2": [1.0, 2.0], "ctrl": [0.0, 0.0], "BAD": [np.nan, 1.0]}))
    with pytest.warns(ScellfmWarning, match="1 genes have NaN or infinite values and were left out, e.g. .'BAD'"):
        found = read_vectors(tmp_path / "a.pkl")
    assert list(found.genes) == ["JAK2", "ctrl"] and found.covered.tolist() == [True, False]
    assert (found.manifest["not_finite"], found.manifest["zeros"]) == (1, 1)


@pytest.mark.parametrize(
    "name, content, error, message",
    [
        ("a.pkl", pickle.dumps({"JAK2": [1.0, 2.0], "STAT1": [1.0]}), DataError, r"shapes \(2,\) \('JAK2'\), \(1,\)"),
        ("a.pkl", pickle.dumps({"JAK2": 3140}), AssetError, "more than vectors by name"),
        ("a.pkl", pickle.dumps({3140: [1.0, 2.0]}), AssetError, "more than vectors by name"),
        ("a.pkl", pickle.dumps({"JAK2": ["x"]}), AssetError, "a list of something that is a str"),
        ("a.pkl", pickle.dumps({}), DataError, "no entry"),
        ("a.pkl", pickle.dumps({"JAK2": [1.0, 2.0]})[:-12], AssetError, "cannot be read as a dictionary"),
        ("a.pkl", b"version https://git-lfs.github.com/spec/v1\n", AssetError, "git-lfs pointer"),
        ("a.txt", b"JAK2 1 2\nSTAT1 1\n", AssetError, "line 2: 2 numbers"),
        ("a.txt", b"JAK2 1 2\nSTAT1 1 x\n", AssetError, "line 2"),
        ("a.txt", b"JAK2 1 2\nJAK2 1 3\n", DataError, "more than once"),
        ("a.txt", b"gene a b\n", AssetError, "holds no vector"),
        ("a.txt", b"\xff\xfe\x00JAK2 1 2", AssetError, "cannot be read as text"),
        ("a.txt.gz", gzip.compress(b"JAK2 1 2\n" * 99, mtime=0)[:-9], AssetError, "cannot be read as text"),
        ("a.json", b'{"JAK2": [1, "x"]}', AssetError, "numbers are needed"),
        ("a.json", b'{"JAK2": [[1], [1, 2]]}', AssetError, "not an array of numbers"),
        ("a.zip", b"PK\x03\x04....", AssetError, "a zip archive; vectors are read from"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # the bytes of an archive hold the time
)
def test_bad_files_are_named(tmp_path, name, content, error, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        read_vectors(tmp_path / name)


def test_a_damaged_header_of_an_array_is_named(tmp_path):
    np.save(tmp_path / "genes.npy", np.ones((3, 2), np.float32))
    whole = (tmp_path / "genes.npy").read_bytes()
    (tmp_path / "genes.txt").write_text("\n".join(GENES))
    for bracket in (b"(3, 2), }", b"}"):
        (tmp_path / "genes.npy").write_bytes(whole.replace(bracket, b" " * len(bracket), 1))
        with pytest.raises(AssetError, match="genes.npy"):
            read_vectors(tmp_path / "genes.npy", genes=GENES)


def test_an_array_needs_its_names(tmp_path):
    np.save(tmp_path / "a.npy", VALUES)
    with pytest.raises(AssetError, match="pass genes=, or put genes.txt"):
        read_vectors(tmp_path / "a.npy")
    (tmp_path / "genes.txt").write_text("JAK2\nSTAT1\n")
    with pytest.raises(AssetError, match="3 rows and 2 names"):
        read_vectors(tmp_path / "a.npy")
    (tmp_path / "genes.txt").write_text("\n".join(GENES))
    assert list(read_vectors(tmp_path / "a.npy").genes) == GENES


def test_published_vectors_are_read():
    gene2vec = read_vectors(real_data("gene2vec/gene2vec_200d.npy"))
    assert (len(gene2vec), gene2vec.width) == (16906, 200)
    unit = gene2vec.values / np.linalg.norm(gene2vec.values, axis=1, keepdims=True)
    order = np.argsort(-unit @ unit[gene2vec.genes.get_loc("CD3D")])
    assert "CD2" in gene2vec.genes[order[1:4]]
    genept = read_vectors(real_data("scgenept/Embedding_small.csv.gz"))
    assert (len(genept), genept.width, int((~genept.covered).sum())) == (87, 1536, 1)
    assert not genept.covered[genept.genes.get_loc("ctrl")]


def test_a_file_of_vectors_is_no_vocabulary(tmp_path):
    from scellfm.assets import read_dictionary

    WRITERS["lists.pickle"](tmp_path / "a.pkl")
    with pytest.raises(AssetError, match="EMPTY_LIST"):
        read_dictionary(tmp_path / "a.pkl")
    assert read_arrays(tmp_path / "a.pkl")["JAK2"].shape == (40,)
