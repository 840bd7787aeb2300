"The index of large references: what it finds is exact, what it misses is measured, and what is damaged is refused."

import json
import sys

import anndata
import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from scellfm import AssetError, ExtraError, ScellfmWarning
from scellfm.scgpt import approximate, mapping
from scellfm.scgpt.approximate import index_of, tuned
from scellfm.scgpt.mapping import ReferenceMap
from scellfm.scgpt.neighbours import Subset, nearest


@pytest.fixture(scope="module")
def cells():
    "20,100 cells of 24 types; within a type they differ in a few directions, and a little in all."
    rng = np.random.default_rng(0)
    types = rng.integers(0, 24, 20_100)
    inside = rng.normal(size=(20_100, 8)) * np.linspace(2, 0.3, 8)
    vectors = 3 * rng.normal(size=(24, 40))[types] + inside @ rng.normal(size=(8, 40))
    vectors = (vectors + 0.05 * rng.normal(size=vectors.shape)).astype(np.float32)
    obs = pd.DataFrame({"cell_type": pd.Categorical(types.astype(str))}, index=np.arange(20_100).astype(str))
    return anndata.AnnData(obs=obs, obsm={"X_scGPT": vectors})


@pytest.fixture(scope="module")
def halves(cells):
    return cells[:20_000].copy(), cells[20_000:].copy()


@pytest.fixture(scope="module")
def saved(halves, tmp_path_factory):
    pytest.importorskip("faiss")
    reference = ReferenceMap(halves[0], search="approximate")
    reference.transfer(halves[1].copy())
    folder = tmp_path_factory.mktemp("maps") / "map"
    reference.save(folder)
    return folder


def test_most_near_cells_are_found_and_their_distances_are_exact(saved, halves, monkeypatch):
    monkeypatch.setattr(approximate, "index_of", None)  # it is read and not built again
    ref, query = halves
    found = ReferenceMap.load(saved, search="approximate")
    distances, positions, _ = found.neighbours(query)
    exact = nearest(ref.obsm["X_scGPT"], query.obsm["X_scGPT"], 10)
    assert np.mean([np.isin(a, b).mean() for a, b in zip(exact[1], positions)]) >= 0.95
    assert found.index.recall >= 0.97 and found.index.probes < len(found.index.centres) / 2
    true = ((ref.obsm["X_scGPT"][positions].astype(float) - query.obsm["X_scGPT"][:, None]) ** 2).sum(-1)
    np.testing.assert_allclose(distances, true, rtol=1e-6)
    assert (np.diff(distances, axis=1) >= 0).all()
    named = found.transfer(query, copy=True)
    assert named.uns["cell_type_transferred"]["params"]["recall"] == found.index.recall
    assert (named.obs["cell_type_transferred"].astype(str) == query.obs["cell_type"].astype(str)).mean() > 0.97


def test_a_map_of_a_mapped_file_leaves_the_vectors_there(halves, tmp_path):
    ref = halves[0][:500].copy()
    ReferenceMap(ref).save(tmp_path / "memory")
    values = np.memmap(tmp_path / "vectors", np.float32, "w+", shape=ref.obsm["X_scGPT"].shape)
    values[:] = ref.obsm["X_scGPT"]
    values.flush()
    ref.obsm["X_scGPT"] = np.memmap(tmp_path / "vectors", np.float32, "r", shape=values.shape)
    reference = ReferenceMap(ref)
    assert isinstance(reference.vectors, np.memmap)
    reference.save(tmp_path / "file")
    for name in ("index.safetensors", "index.json"):
        assert (tmp_path / "memory" / name).read_bytes() == (tmp_path / "file" / name).read_bytes()
    ref.obs.loc[ref.obs_names[7], "cell_type"] = np.nan
    with pytest.warns(ScellfmWarning, match="1 of 500 reference cells are left out"):
        reference = ReferenceMap(ref)
    assert isinstance(reference.vectors, Subset) and len(reference.vectors) == 499
    positions = reference.neighbours(halves[1])[1]
    assert (positions == nearest(np.delete(values, 7, 0), halves[1].obsm["X_scGPT"], 10)[1]).all()


def test_a_query_whose_lists_hold_too_few_cells_is_searched_exactly(halves):
    pytest.importorskip("faiss")
    rows, queries = halves[0].obsm["X_scGPT"][:600], halves[1].obsm["X_scGPT"]
    index = index_of(rows)
    index.probes = 1
    assert (index.sizes < 300).any()
    found, exact = index.search(rows, queries, 300), nearest(rows, queries, 300)
    short = index.sizes.max() < 300
    same = (found[1] == exact[1]).all(1)
    assert same.all() if short else same.any()


def test_an_index_that_misses_too_much_warns():
    pytest.importorskip("faiss")
    noise = np.random.default_rng(0).normal(size=(1000, 200)).astype(np.float32)  # no directions: nothing to index
    index = index_of(noise)
    with pytest.warns(ScellfmWarning, match="search exactly"):
        tuned(index, noise, 10, recall=1.01)
    assert 0 <= index.recall <= 1


def test_an_index_whose_settings_are_entries_of_their_own_is_read_as_before(saved, halves, tmp_path):
    for name in ("index.safetensors", "index.json"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    with safe_open(saved / mapping.INDEX, "numpy") as file:
        told = json.loads(file.metadata()["settled"])
    save_file(load_file(saved / mapping.INDEX), tmp_path / mapping.INDEX, told)
    before, now = (ReferenceMap.load(place, search="approximate").neighbours(halves[1]) for place in (tmp_path, saved))
    for one, other in zip(before, now, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("change", ["twice", "lists", "width", "type", "probes", "cut", "vectors"])
def test_a_damaged_index_is_named(saved, halves, tmp_path, change):
    for name in ("index.safetensors", "index.json"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    arrays = load_file(saved / mapping.INDEX)
    with safe_open(saved / mapping.INDEX, "numpy") as file:
        told = json.loads(file.metadata()["settled"])
    if change == "twice":
        arrays["members"][1] = arrays["members"][0]
    elif change == "lists":
        arrays["sizes"][0] -= 1
    elif change == "width":
        arrays["codes"] = np.ascontiguousarray(arrays["codes"][:, 1:])
    elif change == "type":
        arrays["centres"] = arrays["centres"].astype(np.float64)
    elif change == "probes":
        told["probes"] = "0"
    elif change == "vectors":
        told["vectors"] = "those of another map"
    save_file(arrays, tmp_path / mapping.INDEX, {"settled": json.dumps(told)})
    if change == "cut":
        (tmp_path / mapping.INDEX).write_bytes((saved / mapping.INDEX).read_bytes()[:1000])
    with pytest.raises(AssetError, match="approximate.safetensors"):
        ReferenceMap.load(tmp_path, search="approximate").neighbours(halves[1])


def test_without_faiss_the_extra_is_named(halves, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ExtraError, match="search"):
        ReferenceMap(halves[0], search="approximate").transfer(halves[1].copy())
