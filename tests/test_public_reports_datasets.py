"""Saved data sets: labels keep their names, numbers their text, and what a file says is checked before it is used."""

import json
import shutil

import anndata
import numpy as np
import pandas as pd
import pytest

from scellfm.core import DataError, ScellfmError
from scellfm.geneformer import Corpus, RankTokenizer, TokenizedCells

GENES = [f"ENSG{i:011d}" for i in range(30)]


def cells(n=12):
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(rng.choice(["B", "T"], n)),
            "dose": np.tile(np.float32([0.1, 10]), n // 2),
            "half": np.tile(np.float16([0.1, 10]), n // 2),
            "wide": np.tile([0.1, 10], n // 2),
            "grade": pd.array([1, None] * (n // 2), dtype="Int64"),
            "sick": pd.array([True, None] * (n // 2), dtype="boolean"),
            "large": np.full(n, 2**63 + 1, dtype=np.uint64),
            "donor": pd.array(["d1", None] * (n // 2), dtype="string"),
        },
        index=[f"c{i}" for i in range(n)],
    )
    return anndata.AnnData(rng.poisson(2.0, (n, 30)).astype(np.float32), obs=obs, var=pd.DataFrame(index=GENES))


@pytest.fixture(scope="module")
def tok():
    return RankTokenizer.fit(cells())


def in_texts(column):
    return [None if pd.isna(value) else str(value) for value in column]


def test_labels_read_the_same_in_memory_and_from_a_saved_data_set(tmp_path, tok):
    adata = cells()
    columns = list(adata.obs.columns)
    tok(adata, columns=columns).save(tmp_path / "saved")
    loaded = TokenizedCells.load(tmp_path / "saved").obs
    for obs in (tok(adata, columns=columns).obs, loaded, Corpus(tmp_path / "saved").obs):
        for name in columns:
            assert in_texts(obs[name]) == in_texts(adata.obs[name]), name
    assert str(loaded["grade"].dtype) == "Int64" and str(loaded["sick"].dtype) == "boolean"


def test_classes_of_a_hugging_face_data_set_are_their_names(tmp_path, tok):
    datasets = pytest.importorskip("datasets")
    adata = cells()
    saved = tok(adata, columns=["cell_type"]).to_dataset().class_encode_column("cell_type")
    assert isinstance(saved.features["cell_type"], datasets.ClassLabel) and isinstance(saved["cell_type"][0], int)
    saved.save_to_disk(tmp_path / "theirs")
    for found in (TokenizedCells.load(tmp_path / "theirs"), Corpus(tmp_path / "theirs")):
        assert list(found.obs["cell_type"]) == list(adata.obs["cell_type"])


def test_a_value_that_another_file_stores_more_exactly_is_not_rounded_silently(tmp_path, tok):
    for name, dtype in (("a", np.float32), ("b", np.float64)):
        adata = cells()
        adata.obs = pd.DataFrame({"dose": np.full(adata.n_obs, 0.1, dtype)}, index=adata.obs_names)
        (tmp_path / "files").mkdir(exist_ok=True)
        adata.write_h5ad(tmp_path / "files" / f"{name}.h5ad")
    with pytest.raises(DataError, match="b.h5ad.*dose.*one type"):
        tok.tokenize_files(tmp_path / "files", tmp_path / "out", columns=["dose"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../other/data.arrow", "/etc/passwd", "", "..", "a/b.arrow"])
def test_a_state_names_files_of_its_own_folder_alone(tmp_path, tok, name):
    tok(cells()).save(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "other")
    (next((tmp_path / "other").glob("data*.arrow"))).rename(tmp_path / "other" / "data.arrow")
    state = tmp_path / "saved" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_data_files": [{"filename": name}]}))
    for door in (TokenizedCells.load, Corpus):
        with pytest.raises(DataError, match="not in this folder"):
            door(tmp_path / "saved")


def rewritten(folder, ids):
    import pyarrow as pa

    path = next(folder.glob("data*.arrow"))
    with pa.ipc.new_stream(str(path), pa.schema([("input_ids", ids.type)])) as stream:
        stream.write_table(pa.table({"input_ids": ids}))
    (folder / "cells.arrow").unlink(missing_ok=True)


def test_ids_that_are_no_tokens_are_refused(tmp_path, tok):
    import pyarrow as pa

    cases = {
        str(2**32): pa.array([[2**32]], pa.list_(pa.int64())),
        "-1": pa.array([[-1]], pa.list_(pa.int32())),
        "null": pa.array([[1, None]], pa.list_(pa.uint16())),
        "lists": pa.array([["a"]], pa.list_(pa.string())),
        "double": pa.array([[1.5]], pa.list_(pa.float64())),
        "without tokens": pa.array([[1], None], pa.list_(pa.uint16())),
    }
    for words, ids in cases.items():
        tok(cells()).save(tmp_path / "saved")
        rewritten(tmp_path / "saved", ids)
        for door in (TokenizedCells.load, Corpus):
            with pytest.raises(DataError, match=words):
                door(tmp_path / "saved")


def test_flipped_bits_of_a_data_set_give_our_errors_or_tokens(tmp_path, tok):
    tok(cells(), columns=["cell_type"], keep_counts=True).save(tmp_path / "saved")
    path, rng = next((tmp_path / "saved").glob("data*.arrow")), np.random.default_rng(0)
    whole = path.read_bytes()
    for _ in range(200):
        broken = bytearray(whole)
        broken[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(broken))
        for door in (TokenizedCells.load, Corpus):
            try:
                found = door(tmp_path / "saved")
                assert sum(len(found[i]) for i in range(len(found))) >= 0
            except ScellfmError as error:
                assert "saved" in str(error)


def test_a_dictionary_of_data_sets_points_to_one_of_them(tmp_path, tok):
    datasets = pytest.importorskip("datasets")
    part = tok(cells()).to_dataset()
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "both")
    for door in (TokenizedCells.load, Corpus):
        with pytest.raises(DataError, match="several data sets.*'test', 'train'.*name one"):
            door(tmp_path / "both")


def test_a_home_folder_is_meant_by_every_door(tmp_path, tok, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    tok(cells()).save("~/saved")
    tok.save_pretrained("~/tok")
    cells().write_h5ad(tmp_path / "cells.h5ad")
    tok.tokenize_files("~/cells.h5ad", "~/out")
    assert len(TokenizedCells.load("~/saved")) == len(Corpus("~/out")) == 12 and not (tmp_path / "~").exists()
    assert RankTokenizer.from_pretrained("~/tok").token_dictionary == tok.token_dictionary
    assert RankTokenizer.fit("~/cells.h5ad").token_dictionary == tok.token_dictionary


VALUES = [{}, [], None, True, "7", 1.5, -1, 10**9]
MEDIANS = {1.5, 10**9}  # a median may be any positive number


@pytest.mark.parametrize(
    "name, value",
    [("token_dictionary", value) for value in VALUES]
    + [("gene_median_dictionary", value) for value in VALUES if str(value) not in map(str, MEDIANS)],
)
def test_dictionaries_of_other_types_are_named(tmp_path, tok, name, value):
    tok.save_pretrained(tmp_path / "tok")
    path = tmp_path / "tok" / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {GENES[3]: value}))
    with pytest.raises(ScellfmError):
        RankTokenizer.from_pretrained(tmp_path / "tok")
