"""The heatmap of an embedding: which cells and dimensions it shows, and in what order."""

import anndata
import numpy as np
import pandas as pd
import pytest

from scellfm.core import DataError
from scellfm.heatmaps import drawn_cells, heatmap, ordered


@pytest.fixture
def adata():
    "Three hundred cells of three labels, five of them without an embedding, one dimension constant."
    random = np.random.default_rng(0)
    label = np.repeat(["a", "b", "c"], 100)
    values = random.normal(size=(300, 6)) + 4 * (label == "b")[:, None] * np.arange(6)
    values[:, 3], values[:5] = 1.0, np.nan
    return anndata.AnnData(
        np.zeros((300, 1)), pd.DataFrame({"label": label}, index=[f"cell{i}" for i in range(300)]), obsm={"X": values}
    )


def image(axes) -> np.ndarray:
    "The numbers behind the picture."
    return np.asarray(axes.images[0].get_array())


def test_rows_are_cells_by_label_and_columns_standard_deviations(adata):
    shown = image(heatmap(adata, "X", "label"))
    assert shown.shape == (295, 6) and np.abs(shown.mean(0)).max() < 1e-9
    assert set(np.round(shown.std(0), 6)) == {0.0, 1.0} and (shown[:, -1] == 0).all()
    kept = adata.obsm["X"][5:]
    scaled = (kept - kept.mean(0)) / np.where(kept.std(0) > 0, kept.std(0), 1)
    for start, stop in ((0, 95), (95, 195), (195, 295)):
        ours, theirs = np.sort(shown[start:stop], axis=0), np.sort(scaled[start:stop], axis=0)
        np.testing.assert_allclose(np.sort(ours.sum(0)), np.sort(theirs.sum(0)), atol=1e-9)


def test_the_drawn_cells_depend_on_names_and_seed_alone(adata):
    turned = adata[::-1].copy()
    one, other = (set(data.obs_names[drawn_cells(data, "X", 40, 0)]) for data in (adata, turned))
    assert one == other and len(one) == 40 != len(one & set(adata.obs_names[drawn_cells(adata, "X", 40, 1)]))


def test_like_cells_stand_side_by_side():
    values = np.array([[0.0, 0], [5, 5], [0.1, 0], [5.1, 5]])
    cells, _ = ordered(values, pd.Series(["x"] * 4, dtype="category"))
    assert {frozenset(cells[:2]), frozenset(cells[2:])} == {frozenset({0, 2}), frozenset({1, 3})}


def test_it_draws_into_given_axes_one_cell_and_no_label(adata):
    import matplotlib.pyplot as plt

    _, ax = plt.subplots()
    assert heatmap(adata[10:11].copy(), "X", ax=ax) is ax and image(ax).shape == (1, 6)
    assert not any(text.get_text() for text in ax.get_yticklabels())


def test_what_cannot_be_drawn_is_named(adata):
    for change, message in ((dict(basis="X_none"), "X_none"), (dict(label="no_such"), "no_such")):
        with pytest.raises(DataError, match=message):
            heatmap(adata, **{"basis": "X", **change})
    with pytest.raises(DataError, match="finite"):
        heatmap(adata[:5].copy(), "X")
