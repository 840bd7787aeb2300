"""scellfm sequence windows | embed | variants | fit: the numbers of the Python, one sentence for a user's error."""

import inspect

import numpy as np
import pandas as pd
import pytest

from scellfm import cli
from scellfm.commands import options, signatures
from scellfm.data import GeneVectors, read, simulate_genome
from scellfm.rosa import Enformer, KmerEncoder, Rosa, embed_genes, hold_out_grid, tss_windows, variant_effect

COMMANDS = options.commands_in("scellfm.commands.sequence")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with genome.fa, genes.gtf, variants.csv, an Enformer, and the names of its tracks."
    folder = tmp_path_factory.mktemp("sequence")
    simulation = simulate_genome(n_genes=8, n_chromosomes=2, n_cells=1)
    simulation.write(folder)
    simulation.variants(30).to_csv(folder / "variants.csv", index=False)
    tracks = ["DNASE:a", "CHIP:b", "CAGE:c", "CAGE:d"]
    model = Enformer.from_config("tiny", device="cpu", tracks=tracks, dim=48, dim_divisible_by=6, depth=1)
    model.save_pretrained(folder / "enformer")
    pd.DataFrame({"description": tracks}).to_csv(folder / "targets.txt", sep="\t", index=False)
    return folder


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_windows_are_those_of_the_function(place, capsys, tmp_path):
    given = ["sequence", "windows", place / "genes.gtf", "--fasta", place / "genome.fa", "--length", 256]
    expected = tss_windows(place / "genes.gtf", place / "genome.fa", length=256, align="bin").table
    for name in ("w.tsv", "w.csv", "w.bed"):
        code, out, _ = run(capsys, *given, "--align", "bin", "--out", tmp_path / name)
        assert code == 0 and out.strip() == str(tmp_path / name)
    table = pd.read_csv(tmp_path / "w.tsv", sep="\t")
    assert table["start"].tolist() == expected["start"].tolist() == pd.read_csv(tmp_path / "w.csv")["start"].tolist()
    bed = pd.read_csv(tmp_path / "w.bed", sep="\t", header=None)
    assert bed[5].tolist() == expected["strand"].tolist() and bed[2].tolist() == expected["end"].tolist()


def test_vectors_are_those_of_the_function(place, capsys, tmp_path):
    given = ["sequence", "embed", place / "genes.gtf", "--fasta", place / "genome.fa", "--length", 256]
    windows = tss_windows(place / "genes.gtf", place / "genome.fa", length=256)
    assert run(capsys, *given, "--model", "kmer-3", "--out", tmp_path / "k")[0] == 0
    assert np.allclose(GeneVectors.load(tmp_path / "k").values, KmerEncoder(3, None).embed(windows))
    more = ["--model", place / "enformer", "--targets", place / "targets.txt", "--device", "cpu"]
    code, _, err = run(
        capsys, *given, *more, "--strands", "both", "--folder", tmp_path / "kept", "--out", tmp_path / "e"
    )
    model = Enformer.from_pretrained(place / "enformer", tracks=place / "targets.txt", device="cpu")
    assert code == 0, err
    expected = embed_genes(windows, model=model, strands="both")
    assert np.allclose(GeneVectors.load(tmp_path / "e").values, expected.values, atol=1e-6)


def test_variants_are_those_of_the_function_and_scored_where_they_have_labels(place, capsys, tmp_path):
    given = ["sequence", "variants", place / "variants.csv", place / "genes.gtf", "--fasta", place / "genome.fa"]
    more = ["--model", place / "enformer", "--targets", place / "targets.txt", "--device", "cpu", "--length", 256]
    code, out, err = run(capsys, *given, *more, "--strands", "forward", "--out", tmp_path / "e.csv")
    assert code == 0, err
    assert "distance alone" in out and "between people" in out and out.strip().endswith("e.csv")
    windows = tss_windows(place / "genes.gtf", place / "genome.fa", length=256)
    model = Enformer.from_pretrained(place / "enformer", tracks=place / "targets.txt", device="cpu")
    expected = variant_effect(place / "variants.csv", model=model, windows=windows, strands="forward").table
    assert np.allclose(pd.read_csv(tmp_path / "e.csv")["effect"], expected["effect"], atol=1e-6)


def test_a_users_errors_are_one_sentence(place, capsys, tmp_path):
    given = ["sequence", "embed", place / "genes.gtf", "--fasta", place / "genome.fa", "--length", 256]
    for more, words in (
        (["--model", "kmer-9", "--out", tmp_path / "x"], "k=9"),
        (["--model", "gc", "--dtype", "bfloat16", "--out", tmp_path / "x"], "option of Enformer"),
        (["--model", tmp_path / "nothing", "--out", tmp_path / "x"], "nothing"),
    ):
        code, out, err = run(capsys, *given, *more)
        assert code == 2 and not out and words in err.splitlines()[-1] and "Traceback" not in err
    assert run(capsys, "sequence")[0] == 2
    assert run(capsys, "sequence", "windows", place / "genes.gtf", "--out", tmp_path / "x.doc")[0] == 2


@pytest.fixture(scope="module")
def expression(tmp_path_factory):
    "A folder with cells.h5ad and the vectors of words of DNA of its genes."
    folder = tmp_path_factory.mktemp("expression")
    simulation = simulate_genome(n_genes=32, n_chromosomes=4, n_cells=3, seed=1)
    paths = simulation.write(folder)
    simulation.adata.write_h5ad(folder / "cells.h5ad")
    windows = tss_windows(paths["annotation"], paths["fasta"], length=256)
    embed_genes(windows, model=KmerEncoder(3, None), rule="mean").save(folder / "vectors")
    return folder


@pytest.mark.parametrize("kind", ["ridge", "mlp"])
def test_expression_is_fitted_scored_and_predicted_as_by_the_functions(expression, capsys, tmp_path, kind):
    given = ["sequence", "fit", expression / "cells.h5ad", "--vectors", expression / "vectors", "--kind", kind]
    more = ["--hold-genes", "chromosome", "--held-genes", "chr2", "--hold-cells", "donor", "--seed", 3]
    more += ["--kmers", expression / "vectors", "--device", "cpu"]
    more += [] if kind == "ridge" else ["--epochs", 2, "--batch-size", 8]
    code, out, err = run(capsys, *given, *more, "--out", tmp_path / "fitted")
    assert code == 0, err
    assert "new genes and cells" in out and "permuted vectors" in out and out.strip().endswith("model")
    cells, vectors = read(expression / "cells.h5ad"), GeneVectors.load(expression / "vectors")
    grid = hold_out_grid(cells, genes="chromosome", held_genes=["chr2"], cells="donor", seed=3)
    rosa, recipe = Rosa(kind, device="cpu", seed=3), {} if kind == "ridge" else {"epochs": 2, "batch_size": 8}
    rosa.fit(cells, vectors, grid, **recipe)
    expected = rosa.score(references={"k-mer ridge": vectors})
    table = pd.read_csv(tmp_path / "fitted" / "scores.csv").set_index(["quadrant", "method"])
    for quadrant, scores in expected.quadrants.items():
        columns = list(scores.table)
        np.testing.assert_allclose(table.loc[quadrant][columns], scores.table, atol=1e-6)
        np.testing.assert_allclose(table.loc[quadrant][[f"{c}_low" for c in columns]], scores.low, atol=1e-6)
    assert np.isfinite(table.loc[("new genes", "k-mer ridge")]).all()
    predicted = pd.read_parquet(tmp_path / "fitted" / "predictions.parquet")
    held = [name for name, part in zip(grid.genes, grid.gene_part) if part == "test"]
    assert list(predicted) == held and set(cells.var.loc[held, "chrom"]) == {"chr2"}
    rows = grid.cells if kind != "mlp" else grid.cells[grid.cell_part == "train"]
    assert set(predicted.index) == set(rows) and np.isfinite(predicted.to_numpy()).all()
    again = Rosa.from_pretrained(tmp_path / "fitted" / "model", device="cpu")
    np.testing.assert_allclose(again.predict(held), predicted.loc[again.task.cells], rtol=1e-5, atol=1e-6)
    assert again.scores.table.equals(expected.table)
    page = (tmp_path / "fitted" / "report.html").read_text()
    assert "New genes and cells" in page and "vectors" in page


def test_errors_of_fit_are_one_sentence_and_write_nothing(expression, capsys, tmp_path):
    given = ["sequence", "fit", expression / "cells.h5ad", "--out", tmp_path / "none"]
    own = ["--vectors", expression / "vectors"]
    GeneVectors([f"X{i}" for i in range(32)], np.eye(32)).save(tmp_path / "others")
    for more, words in (
        (["--vectors", tmp_path / "nothing"], "nothing"),
        (["--vectors", tmp_path / "others"], "0 of 32 genes have a vector"),
        ([*own, "--kind", "forest"], "kind='forest'"),
        ([*own, "--loss", "poisson"], "closed form"),
        ([*own, "--epochs", 3], "training loop"),
        ([*own, "--hold-genes", "famly"], "not a column of var"),
        ([*own, "--hold-cells", "tissue"], "not a column of obs"),
        ([*own, "--hold-genes", "chromosome", "--held-genes", "chr9"], "chr9"),
        ([*own, "--context", 2], "context=2"),
        ([*own, "--layer", "logs"], "logs"),
    ):
        code, out, err = run(capsys, *given, *more)
        assert code == 2 and not out and words in err.splitlines()[-1] and "Traceback" not in err, (more, err)
    assert not (tmp_path / "none" / "model").exists() and not (tmp_path / "none" / "scores.csv").exists()
    code, _, err = run(capsys, *given[:3], *own, "--out", expression / "cells.h5ad")
    assert code == 2 and "cells.h5ad" in err and read(expression / "cells.h5ad").n_vars == 32


@pytest.mark.parametrize("path", COMMANDS)
def test_every_option_has_a_help_and_the_functions_default(path, capsys):
    parser = options.command_parser(path)
    assert all(action.help for action in parser._actions), [a.dest for a in parser._actions if not a.help]
    for borrowed, _ in (found for many in options.borrowed(path).values() for found in many):
        module, names = signatures.split_path(borrowed)
        function = getattr(__import__(module, fromlist=names), names[0])
        for name in names[1:]:
            function = getattr(function, name)
        python = inspect.signature(function).parameters
        for parameter in signatures.parameters_of(borrowed):
            assert parameter.default is signatures.REQUIRED or parameter.default == python[parameter.name].default
    code = cli.main(["sequence", path.rpartition(".")[2], "--help"])
    assert code == 0 and "example: scellfm sequence" in capsys.readouterr().out
