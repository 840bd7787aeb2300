"""`scellfm reproduce`: every quoted score has an entry, its files are named, and its protocol runs on stand-ins."""

import json
import pickle
import re

import anndata
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from scipy import sparse

from scellfm import cli
from scellfm.commands.figures import FIGURES, find_figure, missing_files, published_scores
from scellfm.commands.protocols import RUNS, reproduce_figure
from scellfm.core import DataError, OptionError
from scellfm.data import GeneVectors, simulate_cells, simulate_perturbations
from scellfm.scgenept import PerturbationData
from scellfm.scgpt import ReferenceMap, ScGPT

pytestmark = pytest.mark.filterwarnings("ignore::scellfm.core.ScellfmWarning")  # tiny and random models


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Stand-ins of the published files of scGPT: the same names and layout, simulated cells and random weights."
    folder = tmp_path_factory.mktemp("files")
    cells = simulate_cells(140, 120, cell_types=["B", "T"], donors=4, depth=200, seed=3)
    cells.obs["celltype"] = cells.obs["cell_type"].astype(object)
    cells.obs["str_batch"] = cells.obs["donor"]
    cells.obs = cells.obs.drop(columns="batch")
    cells.obs.loc[cells.obs_names[0], "celltype"] = None  # a cell that was not annotated
    cells.var["gene_name"] = cells.var_names
    cells.var_names = [f"row{i}" for i in range(cells.n_vars)]
    (folder / "covid").mkdir()
    cells[:90].copy().write_h5ad(folder / "covid" / "batch_covid_subsampled_train.h5ad")
    cells[90:].copy().write_h5ad(folder / "covid" / "batch_covid_subsampled_test.h5ad")
    ScGPT.from_config("tiny", list(cells.var["gene_name"]), device="cpu").save_pretrained(folder / "scGPT_human")
    return folder


def numbers_in(page: str, heading: str) -> list[str]:
    "The decimal numbers of the tables below a heading of a page."
    cells = json.loads((ROOT / "nbs" / page).read_text(encoding="utf8"))["cells"]
    text = next("".join(cell["source"]) for cell in cells if heading in "".join(cell["source"]))
    return re.findall(r"0\.\d{3}", "\n".join(line for line in text.splitlines() if line.startswith("|")))


@pytest.mark.parametrize(
    "page, system",
    [
        ("tutorials/scgpt_reference_mapping.ipynb", "scgpt-mapping"),
        ("tutorials/scgpt_integration.ipynb", "scgpt-integration"),
        ("tutorials/scgpt_integration_continual_pretraining.ipynb", "scgpt-integration"),
    ],
)
def test_every_published_score_of_a_page_has_an_entry(page, system):
    quoted = numbers_in(page, "## What was published")
    tables = [published_scores(figure) for name, figure in FIGURES.items() if name.startswith(system)]
    known = np.concatenate([table.to_numpy(np.float64).ravel() for table in tables])
    absent = [number for number in quoted if not (np.abs(known - float(number)) < 0.00051).any()]
    assert len(quoted) >= 5 and not absent, absent


def test_every_entry_says_where_its_files_are_and_what_was_published():
    assert len(FIGURES) == 11
    for figure in FIGURES.values():
        assert all(file.source and file.what for file in figure.files) and figure.what and figure.differs
        assert (ROOT / "nbs" / f"{figure.page}.ipynb").is_file(), figure.page
        assert np.isfinite(published_scores(figure).select_dtypes("number").to_numpy(np.float64)).any()


def test_the_list_and_the_files_of_one_entry_are_printed(files, capsys):
    assert cli.main(["reproduce"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in FIGURES)
    assert cli.main(["reproduce", "--files", str(files)]) == 0 and "5 of 5" in capsys.readouterr().out
    assert cli.main(["reproduce", "norman"]) == 0
    assert "norman/perturb_processed.h5ad" in capsys.readouterr().out
    assert cli.main(["reproduce", "scgpt-maping-covid"]) == 2
    assert "Did you mean 'scgpt-mapping-covid'" in capsys.readouterr().err


@pytest.mark.parametrize("name", FIGURES)
def test_missing_files_are_named_with_their_source_and_nothing_is_written(name, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["reproduce", name, "--files", str(tmp_path), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    needed = missing_files(find_figure(name), tmp_path)
    assert needed and all(file.path in said and file.source in said for file in needed) and not out.exists()


def test_mapping_runs_on_stand_ins_and_stands_beside_the_published_score(files, tmp_path, capsys):
    given = ["--files", str(files), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main(["reproduce", "scgpt-mapping-covid", *given]) == 0
    table = pd.read_csv(tmp_path / "out" / "table.csv", index_col=0, header=[0, 1])
    assert table.loc["scGPT", ("accuracy", "published")] == 0.8668
    model = ScGPT.from_pretrained(files / "scGPT_human", device="cpu")
    ref, query = (
        anndata.read_h5ad(files / "covid" / f"batch_covid_subsampled_{part}.h5ad") for part in ("train", "test")
    )
    ref = ref[ref.obs["celltype"].notna()].copy()
    for cells in (ref, query):
        model.embed(cells, gene_column="gene_name")
    direct = ReferenceMap(ref, "X_scGPT", "celltype", k=10).evaluate(query, baselines=False).table.loc["X_scGPT"]
    assert table.loc["scGPT", ("accuracy", "here")] == pytest.approx(direct["accuracy"])
    assert 0.5 < table.loc["HVG + PCA", ("accuracy", "here")] <= 1  # a simple method on the same cells
    assert "published" in capsys.readouterr().out


def test_integration_runs_on_stand_ins(files):
    table = reproduce_figure("scgpt-integration-covid", files, device="cpu")
    assert table.loc["HVG + PCA", ("avg_batch", "published")] == 0.6743
    assert table.loc[["scGPT", "HVG + PCA"], [("avg_bio", "here"), ("avg_batch", "here")]].notna().all(axis=None)


def test_a_column_that_is_not_there_is_named(files, tmp_path):
    for file in find_figure("scgpt-mapping-covid").files:
        (tmp_path / file.path).parent.mkdir(exist_ok=True)
        if file.path.endswith(".h5ad"):
            cells = anndata.read_h5ad(files / file.path)
            cells.obs = cells.obs.drop(columns="celltype")
            cells.write_h5ad(tmp_path / file.path)
        else:
            (tmp_path / file.path).write_bytes((files / file.path).read_bytes())
    with pytest.raises(DataError, match="the labels are in none of the columns.*celltype"):
        reproduce_figure("scgpt-mapping-covid", tmp_path, device="cpu")


def test_the_tables_of_scgenept_run_on_stand_ins(tmp_path):
    simulated = simulate_perturbations(n_targets=10, n_pairs=4, n_genes=30, n_modules=2, n_cells=6, n_controls=12)
    (tmp_path / "norman").mkdir()
    (tmp_path / "vectors").mkdir()
    simulated.adata.write_h5ad(tmp_path / "norman" / "perturb_processed.h5ad")
    genes = list(PerturbationData(simulated.adata).genes)
    small = dict(d_model=16, n_heads=2, d_hid=16, n_layers=1)
    ScGPT.from_config("tiny", genes, device="cpu", **small).save_pretrained(tmp_path / "scGPT_human")
    know = simulated.vectors["know"]
    (tmp_path / "vectors" / "ncbi.pickle").write_bytes(pickle.dumps(dict(zip(know.genes, know.values))))
    with pytest.raises(OptionError, match="name a folder"):
        reproduce_figure("scgenept-norman", tmp_path)
    call = dict(out=tmp_path / "out", seeds=[42], epochs=1)
    table = reproduce_figure("scgenept-norman", tmp_path, **call)
    assert list(table.index) == ["scgpt", "ncbi"] and table.loc["ncbi", ("pearson_delta", "card")] == 0.548
    assert np.isfinite(table.loc["ncbi", ("pearson_delta", "here")])
    assert table.equals(reproduce_figure("scgenept-norman", tmp_path, **call))  # the runs are read


def test_the_figures_of_rosa_run_on_stand_ins(tmp_path):
    draws = np.random.default_rng(0)
    vectors = draws.normal(size=(40, 6)).astype(np.float32)
    kind = np.arange(480) % 2
    rate = 2 * np.exp(vectors @ draws.normal(0, 0.4, (6, 2))).T[kind]
    obs = pd.DataFrame(
        {"donor_id": [f"d{i // 2 % 4}" for i in range(480)], "cell_type": np.array(["B", "T"])[kind]},
        index=[f"c{i}" for i in range(480)],
    )
    genes = [f"ENSG{i:011d}" for i in range(40)]
    cells = anndata.AnnData(
        sparse.csr_matrix(draws.poisson(rate).astype(np.float32)), obs=obs, var=pd.DataFrame(index=genes)
    )
    (tmp_path / "rosa").mkdir()
    cells.write_h5ad(tmp_path / "rosa" / "tabula_sapiens.h5ad")
    GeneVectors(genes, vectors, None, {"source": "simulated"}).save(tmp_path / "rosa" / "gene_vectors")
    table = reproduce_figure("rosa", tmp_path, epochs=1, device="cpu")
    for name in RUNS:
        assert np.isfinite(table.loc[name, ("across_genes", "here")]), name
        assert np.isfinite(table.loc[name, ("across_genes", "published")]), name
    assert np.isnan(table.loc["autoregressive performer (14 May)", ("across_genes", "here")])  # not fitted: a dash
    assert "scooby" not in " ".join(table.index)


def test_the_figures_of_scooby_are_computed_from_tables_joined_by_name(tmp_path):
    draws = np.random.default_rng(0)
    measured = pd.DataFrame(draws.gamma(2, 20, (30, 4)), index=[f"G{i}" for i in range(30)], columns=list("abcd"))
    (tmp_path / "scooby").mkdir()
    measured.to_csv(tmp_path / "scooby" / "measured.csv")
    measured.iloc[::-1, ::-1].to_csv(tmp_path / "scooby" / "predicted.csv")  # the same in another order
    table = reproduce_figure("scooby", tmp_path)
    assert table.loc["scooby", ("pearson_across_genes", "here")] == pytest.approx(1)
    assert table.loc["scooby", ("pearson_across_cells_centred", "here")] == pytest.approx(1)
    assert table.loc["scooby", ("pearson_across_genes", "published")] == 0.859
    logged = np.log2(measured + 1)
    flat = [np.corrcoef(logged.mean(axis=1), logged[name])[0, 1] for name in logged]
    assert table.loc["its mean over types", ("pearson_across_genes", "here")] == pytest.approx(np.mean(flat))
    (measured - 5).to_csv(tmp_path / "scooby" / "predicted.csv")
    with pytest.raises(DataError, match="at least 0"):
        reproduce_figure("scooby", tmp_path)
