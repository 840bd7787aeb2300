"""Windows have the bases of the goldens: on the right strand, padded on the right side; the original's on demand."""

import json
import time

import numpy as np
import pandas as pd
import pytest
from conftest import golden, real_data

from scellfm.rosa import (
    Genome,
    Interval,
    encode,
    one_hot,
    read_annotation,
    reverse_complement,
    start_table,
    tss_windows,
)
from scellfm.rosa.genome import interval_codes
from scellfm.rosa.sequence import original_indices, original_reverse_complement
from scellfm.rosa.windows import original_start_vectors

FOLDER = golden("rosa")


def load(name):
    return json.loads((FOLDER / name).read_text())


@pytest.fixture(scope="module")
def genome(tmp_path_factory):
    path = tmp_path_factory.mktemp("genome") / "genome.fa"
    path.write_bytes((FOLDER / "genome.fa").read_bytes())
    return Genome(path)


def genes():
    table = pd.DataFrame(load("genes.json"))
    return read_annotation(table.rename(columns={"gene_id": "gene", "contig": "chrom"}), one_based=True)


LENGTHS = sorted({case["length"] for case in load("intervals.json")})


@pytest.mark.parametrize("length", LENGTHS)
def test_windows_of_the_goldens(genome, length):
    cases = {case["gene_id"]: case for case in load("intervals.json") if case["length"] == length}
    right, original = (tss_windows(genes(), genome, length=length, original=flag) for flag in (False, True))
    assert right.table["gene"].tolist() == original.table["gene"].tolist() == list(cases)
    for row, case in enumerate(cases.values()):
        assert right.table.loc[row, ["start", "end"]].tolist() == case["tss_window"]
        assert original.table.loc[row, ["start", "end"]].tolist() == [case["start"], case["end"]]
        assert original.sequence(row) == case["sequence"]
        interval = case["contig"], case["start"], case["end"], case["strand"]
        assert genome.letters(*interval) == case["reference_sequence"]
        mine = right.table.iloc[row]
        base = right.sequence(row)[mine["index"]]
        plus = genome.letters(mine["chrom"], mine["tss"], mine["tss"] + 1)
        expected = plus if mine["strand"] == "+" else plus.translate(str.maketrans("ACGTRY", "TGCAYR"))
        assert base == expected


def test_the_bed_file_of_the_goldens():
    table = pd.read_csv(FOLDER / "intervals.bed", sep="\t", header=None, dtype={0: str})
    length = int((table[2] - table[1]).iloc[0])
    windows = tss_windows(genes(), length=length, original=True).table
    assert windows["gene"].tolist() == table[3].tolist() and windows["strand"].tolist() == table[5].tolist()
    assert windows["chrom"].tolist() == table[0].tolist()
    assert (windows[["start", "end"]].to_numpy() == table[[1, 2]].to_numpy()).all()


def test_interval_arithmetic_of_the_goldens():
    for case in load("interval_ops.json"):
        interval = Interval(case["start"], case["end"], case["strand"])
        assert len(interval) == case["length"] and interval.center() == case["center"]
        assert interval.center(use_strand=False) == case["center_nostrand"]
        resized = interval.resize(case["resize_length"], use_strand=case["use_strand"])
        assert [resized.start, resized.end] == case["resized"]
        trimmed = interval.trim(0, 300, original=True)
        assert [trimmed.start, trimmed.end] == case["trim_0_300"]


def test_intervals_read_as_by_enformer_pytorch(genome):
    arrays = np.load(FOLDER / "fasta_interval.npz")
    for case in load("fasta_interval_cases.json"):
        named = lambda kind: arrays[f"c{case['case']}_{kind}"]
        place = case["contig"], case["start"], case["end"]
        codes = interval_codes(genome, *place, context_length=case["context_length"])
        assert len(codes) == case["out_length"]
        assert (one_hot(codes).numpy() == named("onehot")).all()
        assert (one_hot(reverse_complement(codes)).numpy() == named("onehot_rc")).all()
        extra = case["out_length"] - (case["end"] - case["start"])
        wide = case["contig"], case["start"] - extra // 2, case["end"] + extra - extra // 2
        indices = original_indices(genome.ascii(*wide, pad="."))
        assert (indices == named("indices")).all()
        assert (original_reverse_complement(indices) == named("indices_rc")).all()
        channels = one_hot(np.where(indices < 0, 5, indices))
        assert (channels.numpy() == named("onehot_from_indices")).all()


def test_vectors_of_starts_as_the_original_makes_them():
    case = load("tss.json")
    rows = [
        {"gene": gene["gene_id"], "chrom": "1", "strand": gene["strand"], "gene_start": gene["start"]}
        | {"gene_end": gene["start"] + 1, "start": each["start"], "end": each["start"] + 1, "biotype": each["biotype"]}
        for gene in case["genes"]
        for each in gene["transcripts"]
    ]
    vectors = original_start_vectors(read_annotation(pd.DataFrame(rows)), case["length"], case["tss_bin"])
    assert (vectors == np.load(FOLDER / "tss.npz")["tss_vectors"]).all()


@pytest.mark.parametrize("length", [8, 9, 256, 257, 1000])
@pytest.mark.parametrize("align", ["base", "bin"])
@pytest.mark.parametrize("pad", ["N", "."])
def test_the_other_strand_is_the_mirror_image(tmp_path, length, align, pad):
    "A gene on the reverse complement of its chromosome has the same window, but for the one base that align moves."
    draw = np.random.default_rng(length)
    letters = "".join(draw.choice(list("ACGTN"), 500))
    mirrored = letters[::-1].translate(str.maketrans("ACGT", "TGCA"))
    (tmp_path / "two.fa").write_text(f">f\n{letters}\n>r\n{mirrored}\n")
    table = pd.DataFrame({"gene": ["a", "b"], "chrom": ["f", "r"], "strand": ["+", "-"]})
    for tss in (0, 3, 250, 499):
        starts = table.assign(tss=[tss, 499 - tss])
        windows = tss_windows(starts, tmp_path / "two.fa", length=length, align=align, pad=pad)
        codes, index = windows.codes(), windows.table["index"].to_numpy()
        shift = index[0] - index[1]
        assert shift == (length % 2 == 0 and align == "base")
        assert (codes[0, shift:] == codes[1, : length - shift]).all()
        assert codes[0, index[0]] == codes[1, index[1]] == encode(letters[tss])[0]


class Content:
    "An encoder that is symmetric by construction: the share of G and C in each bin."

    def embed(self, codes, bin_size=16):
        bins = codes[:, : codes.shape[1] // bin_size * bin_size].reshape(len(codes), -1, bin_size)
        return ((bins == 1) | (bins == 2)).mean(axis=2)


@pytest.mark.parametrize("n_bins", [9, 10])
def test_bins_are_mirrored_for_the_reverse_complement(n_bins):
    codes = np.random.default_rng(n_bins).integers(0, 6, (5, 16 * n_bins)).astype(np.uint8)
    assert (Content().embed(reverse_complement(codes)) == Content().embed(codes)[:, ::-1]).all()


def chr20():
    "The 17 genes of chr20:1-2 Mb with coordinates on the contig z, which begins at about 1,000,000."
    table = pd.read_csv(real_data("genome/hg19_genes_stranded_liger.bed"), sep="\t", header=None)
    table.columns = ["chrom", "start", "end", "gene", "score", "strand"]
    inside = table[(table["chrom"] == "chr20") & (table["start"] >= 1_000_000) & (table["end"] <= 2_000_000)]
    offset = {"start": inside["start"] - 1_000_000, "end": inside["end"] - 1_000_000}
    return read_annotation(inside.assign(chrom="z", **offset).reset_index(drop=True))


def test_real_genes_on_both_strands():
    annotation, fasta = chr20(), real_data("chr20-1mb/z.fa")
    assert annotation.table["gene"].nunique() == 17
    windows = tss_windows(annotation, fasta, length=4096)
    assert len(windows) == 17 and set(windows.table["strand"]) == {"+", "-"}
    for row, window in windows.table.iterrows():
        codes = windows.codes([row])[0]
        plus = windows.genome.codes("z", window["start"], window["end"])
        assert (codes == (plus if window["strand"] == "+" else reverse_complement(plus))).all()
        assert window["index"] == 2048 - (window["strand"] == "-") and window["bin"] == window["index"] // 128
    of_gene = annotation.table.set_index("transcript").loc[windows.table["transcript"]]
    five_prime = np.where(of_gene["strand"] == "-", of_gene["end"] - 1, of_gene["start"])
    assert (windows.table["tss"].to_numpy() == five_prime).all()
    assert (start_table(windows).groupby("row")["index"].count() >= 1).all()


def test_windows_of_all_human_genes_are_planned_in_seconds(yardstick):
    path = real_data("genome/grch38_genes.tsv")
    started = time.process_time()
    windows = tss_windows(path)
    assert len(windows) == windows.table["gene"].nunique() == len(pd.read_csv(path, sep="\t"))
    assert set(windows.bins(896)) == {447, 448} and time.process_time() - started < 25 * yardstick
