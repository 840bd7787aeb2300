"""scellfm sequence windows | embed | variants: the same numbers as the Python, one sentence for a user's error."""

import inspect

import numpy as np
import pandas as pd
import pytest

from scellfm import cli
from scellfm.commands import options, signatures
from scellfm.data import GeneVectors, simulate_genome
from scellfm.rosa import Enformer, KmerEncoder, embed_genes, tss_windows, variant_effect

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
