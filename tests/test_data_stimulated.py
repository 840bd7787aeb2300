"""The interferon cells have one set of columns, whichever source they came from, and say which it was."""

import logging

import anndata
import numpy as np
import pytest
from conftest import real_data

from scellfm.core import AssetError, ScellfmWarning
from scellfm.data import stimulated
from scellfm.data.reading import check_counts
from scellfm.data.stimulated import PATHWAY, interferon_cells


@pytest.fixture
def no_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("SCELLFM_DATA", raising=False)
    monkeypatch.setenv("SCELLFM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def public_file(tmp_path):
    "A small file with the columns of the published one."
    cells = stimulated.simulated_interferon(120, seed=3)
    obs = cells.obs.rename(columns={"condition": "label", "donor": "replicate"})
    obs["replicate"] = "patient_" + obs["replicate"].astype(str)
    obs["cell_type"] = obs["cell_type"].astype(object).where(np.arange(120) > 2)  # three cells without a name
    path = tmp_path / "public.h5ad"
    anndata.AnnData(cells.X, obs=obs, var=cells.var).write_h5ad(path)
    return path


def same_columns(cells):
    check_counts(cells)
    assert set(cells.obs["condition"].astype(str)) == {"ctrl", "stim"}
    assert set(cells.obs["donor"].astype(str)) <= set(stimulated.DONORS)
    assert cells.obs["cell_type"].notna().all() and set(PATHWAY) <= set(cells.var_names)


def test_without_folder_and_download_the_cells_are_simulated_and_say_so(no_folder):
    with pytest.warns(ScellfmWarning, match="these cells are simulated"):
        cells = interferon_cells(200, download=False)
    same_columns(cells)
    assert cells.n_obs == 200 and cells.uns["source"].startswith("simulated")
    assert (cells.X != interferon_cells(200, download=False).X).nnz == 0


def test_the_public_file_gets_our_columns(no_folder, monkeypatch, public_file):
    asked = []
    monkeypatch.setattr(stimulated, "download_file", lambda url, path: asked.append(url) or public_file)
    cells = interferon_cells(60)
    same_columns(cells)
    assert asked == [stimulated.PUBLIC] and stimulated.PUBLIC in cells.uns["source"]
    assert cells.n_obs == 60 and interferon_cells(5000).n_obs == 117


def test_a_failed_download_is_logged_and_cells_are_simulated(no_folder, monkeypatch, caplog):
    def fails(url, path):
        raise AssetError("no network")

    monkeypatch.setattr(stimulated, "download_file", fails)
    with caplog.at_level(logging.WARNING, logger="scellfm"):
        cells = interferon_cells(100)
    assert cells.uns["source"].startswith("simulated") and "no network" in caplog.text


def test_fewer_cells_are_drawn_by_name(no_folder, monkeypatch, public_file):
    whole = anndata.read_h5ad(public_file)
    shuffled = public_file.with_name("shuffled.h5ad")
    whole[::-1].copy().write_h5ad(shuffled)
    drawn = []
    for path in (public_file, shuffled):
        monkeypatch.setattr(stimulated, "download_file", lambda url, target, path=path: path)
        drawn.append(set(interferon_cells(40).obs_names))
    assert drawn[0] == drawn[1] and len(drawn[0]) == 40


def test_the_real_cells_come_from_the_folder(monkeypatch):
    real_data("kang18")
    monkeypatch.setenv("SCELLFM_DATA", str(real_data("kang18").parent))
    cells = interferon_cells()
    same_columns(cells)
    assert cells.n_obs == 2000 and "SCELLFM_DATA" in cells.uns["source"] and "ensembl_id" in cells.var


def test_a_cell_without_a_donor_stays_without(public_file):
    cells = anndata.read_h5ad(public_file)
    cells.obs["replicate"] = cells.obs["replicate"].astype(object).where(np.arange(cells.n_obs) != 5)
    donors = stimulated.with_our_columns(cells).obs["donor"]
    assert donors.isna().sum() == 1 and "nan" not in donors.cat.categories
