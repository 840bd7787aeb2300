"""Annotations and genomes: what is damaged is refused in words or counted, and nothing is silently wrong."""

import gzip
import os
import stat
import warnings

import numpy as np
import pandas as pd
import pytest
from conftest import real_data
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from scellfm.core import AssetError, DataError, OptionError, ScellfmError, ScellfmWarning
from scellfm.rosa import Genome, encode, read_annotation, start_table, tss_windows
from scellfm.rosa.blockgzip import write_blocks
from scellfm.rosa.effects import exon_bins
from scellfm.rosa.windows import read_sizes

MOUSE = [
    ("gene", 101, 900, "+", 'gene_id "ENSMUSG01.4"; gene_name "Actb"; gene_biotype "protein_coding";'),
    ("transcript", 101, 900, "+", 'gene_id "ENSMUSG01.4"; transcript_id "T1"; transcript_biotype "retained_intron";'),
    ("transcript", 301, 800, "+", 'gene_id "ENSMUSG01.4"; transcript_id "T2"; transcript_biotype "protein_coding";'),
    ("exon", 301, 400, "+", 'gene_id "ENSMUSG01.4"; transcript_id "T2";'),
    ("exon", 700, 800, "+", 'gene_id "ENSMUSG01.4"; transcript_id "T2";'),
    ("gene", 501, 700, "-", 'gene_id "ENSMUSG02.1"; gene_name "Xist"; gene_biotype "lncRNA";'),
]


def gtf(rows=MOUSE, chrom="1"):
    return "".join(f"{chrom}\tH\t{what}\t{a}\t{b}\t.\t{strand}\t.\t{rest}\n" for what, a, b, strand, rest in rows)


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("pack", ["plain", "gzip", "bgzip"])
def test_a_mouse_gtf_in_three_packings(tmp_path, pack):
    path = tmp_path / ("m.gtf" if pack == "plain" else "m.gtf.gz")
    text = ("#!genome-build GRCm39\n" + gtf()).encode()
    if pack == "bgzip":
        write_blocks(path, text)
    else:
        path.write_bytes(text if pack == "plain" else gzip.compress(text))
    annotation = read_annotation(path, exons=True)
    table = annotation.table.set_index("transcript")
    assert table["tss"].to_dict() == {"T1": 100, "T2": 300, "ENSMUSG02.1": 699}
    assert table["canonical"].to_dict() == {"T1": False, "T2": True, "ENSMUSG02.1": True}
    assert table.loc["T2", ["gene_start", "gene_end"]].tolist() == [100, 900]
    assert annotation.exons[["start", "end"]].to_numpy().tolist() == [[300, 400], [699, 800]]
    assert read_annotation(path, protein_coding=True).table["transcript"].tolist() == ["T2"]
    assert annotation.select(["Xist"]).table["gene"].tolist() == ["ENSMUSG02"]
    assert annotation.starts("gene")["tss"].tolist() == [100, 699]


def test_transcripts_are_joined_from_exons_where_a_gtf_has_no_others(tmp_path):
    path = write(tmp_path, "x.gtf", gtf([row for row in MOUSE if row[0] == "exon"]))
    assert read_annotation(path).table[["tss", "end"]].to_numpy().tolist() == [[300, 800]]


def test_bad_lines_of_a_gtf_are_counted_and_too_many_refused(tmp_path):
    few = gtf() + "1\tH\tgene\t9\n" + '1\tH\tgene\t9\t5\t.\t+\t.\tgene_id "a";\n' + "garbage\n"
    with pytest.warns(
        ScellfmWarning, match="3 of 9 lines .* are not valid GTF; the first is line 7 .*: 4 fields and not 9"
    ):
        annotation = read_annotation(write(tmp_path, "few.gtf", few))
    assert annotation.counts["bad lines"] == 3 and len(annotation) == 3
    many = gtf() + "1\tH\tgene\tbad\t9\t.\t+\t.\tgene_id 5;\n" * 1_000_000
    with pytest.raises(DataError, match="1,000,000 of 1,000,006 lines .* is line 7 .* is this a GTF file"):
        read_annotation(write(tmp_path, "many.gtf", many))


def test_the_release_of_a_gtf_is_kept(tmp_path):
    said = "##description: evidence of the mouse (GRCm39), version M33\n##provider: X\n#!genome-version GRCm39\n"
    annotation = read_annotation(write(tmp_path, "m.gtf", said + gtf()))
    assert annotation.release == "description: evidence of the mouse (GRCm39), version M33; genome-version GRCm39"
    assert annotation.protein_coding().release == annotation.release
    assert read_annotation(write(tmp_path, "n.gtf", gtf())).release == ""


def test_a_gtf_from_windows_and_one_without_names_of_genes(tmp_path):
    crlf = b"\xef\xbb\xbf" + gtf().replace("\n", "\r\n").encode()
    plain = read_annotation(write(tmp_path, "m.gtf", gtf()))
    assert read_annotation(write(tmp_path, "crlf.gtf", crlf)).table.equals(plain.table)
    with pytest.warns(ScellfmWarning, match="1 of 7 lines .* no gene_id"):
        unnamed = read_annotation(write(tmp_path, "u.gtf", gtf() + '1\tH\tgene\t5\t9\t.\t+\t.\tgene_id "";\n'))
    assert unnamed.table.equals(plain.table)


def test_starts_at_the_3_prime_end_are_told(tmp_path):
    table = pd.DataFrame({"gene": list("abc"), "chrom": "1", "strand": list("+--"), "start": 10, "end": 90})
    with pytest.warns(ScellfmWarning, match="2 of 2 genes on the negative strand have their tss at the smaller end"):
        read_annotation(table.assign(tss=10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_annotation(table.assign(tss=[10, 89, 89]))
    for columns in (["gene", "chrom", "strand"], ["gene", "chrom", "strand", "start"]):  # without both ends
        assert read_annotation(table[columns].assign(tss=10)).table["end"].tolist() == [11, 11, 11]


def test_gff3_and_other_files_are_not_taken_for_gtf(tmp_path):
    gff = "1\tH\tgene\t101\t900\t.\t+\t.\tID=gene:ENSG01;Name=AAA\n" * 3
    with pytest.raises(DataError, match="no gene_id; is this a GTF file|no gene_id"):
        read_annotation(write(tmp_path, "x.gtf", gff))
    with pytest.raises(DataError, match="ends in '.gff3'"):
        read_annotation(write(tmp_path, "x.gff3", gff))
    with pytest.raises(DataError, match="no gene, transcript or exon"):
        read_annotation(write(tmp_path, "cds.gtf", gtf([("CDS", 1, 9, "+", 'gene_id "a";')])))
    with pytest.raises(AssetError, match="an empty file"):
        read_annotation(write(tmp_path, "empty.gtf", ""))
    with pytest.raises(AssetError, match="a web page"):
        read_annotation(write(tmp_path, "page.gtf", "<!DOCTYPE html><html>log in</html>"))
    with pytest.raises(OptionError, match="a path, a DataFrame or an Annotation, not a int"):
        read_annotation(5)


@pytest.mark.parametrize("pack", ["gzip", "bgzip"])
@pytest.mark.parametrize("cut", [4, 28, 300])
def test_a_truncated_gtf_is_refused(tmp_path, pack, cut):
    names = np.random.default_rng(0).integers(0, 10**9, 3000)
    text = "".join(gtf(MOUSE[:1]).replace("ENSMUSG01", f"G{name}") for name in names).encode()
    path = tmp_path / "x.gtf.gz"
    if pack == "bgzip":
        write_blocks(path, text)
    else:
        path.write_bytes(gzip.compress(text))
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ScellfmError, match="incomplete|truncated"):
        read_annotation(path)


def test_rows_without_strand_are_left_out_and_files_without_strand_refused(tmp_path):
    some = "1\t5\t9\ta\t0\t+\n1\t5\t9\tb\t0\t.\n"
    with pytest.warns(ScellfmWarning, match="1 of 2 transcripts .* have no strand"):
        annotation = read_annotation(write(tmp_path, "some.bed", some))
    assert annotation.counts["without strand"] == 1 and annotation.table["gene"].tolist() == ["a"]
    for text in ("1\t5\t9\ta\n", "1\t5\t9\t.\tOR4F5\n", "1\t5\t9\ta\t0\t.\n"):
        with pytest.raises(DataError, match="no strand"):
            read_annotation(write(tmp_path, "none.bed", text))
    with pytest.raises(DataError, match="has no strand"):
        read_annotation(real_data("genome/gencode_v28_hg38_protein_coding_l12_genes.bed"))


def test_the_older_bed_of_the_original_is_understood(tmp_path):
    table = read_annotation(write(tmp_path, "old.bed", "1\t5\t9\t-\tENSG01\n")).table
    assert table[["gene", "strand", "tss"]].to_numpy().tolist() == [["ENSG01", "-", 8]]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"strand": None}, "no column strand"),
        ({"start": -5}, "start=-5 of 'a' is not a position"),
        ({"start": "x"}, "start=x of 'a' is not a position"),
        ({"start": 2.5}, "is not a position"),
        ({"end": 1}, "ends before it starts"),
        ({"gene": np.nan}, "without a gene or a chromosome"),
        ({"strand": "forward"}, "has no strands"),
    ],
)
def test_a_wrong_table_is_named(change, words):
    table = pd.DataFrame({"gene": ["a"], "chrom": ["1"], "strand": ["+"], "start": [5], "end": [9]})
    table = table.drop(columns="strand") if change == {"strand": None} else table.assign(**change)
    with pytest.raises(DataError, match=words):
        read_annotation(table)


def test_genes_that_match_nothing(tmp_path):
    annotation = read_annotation(write(tmp_path, "m.gtf", gtf()))
    with pytest.raises(
        DataError, match="2 of 2 genes are not in m.gtf, e.g. BRCA1, TP53; its genes look like 'ENSMUSG01'"
    ):
        annotation.select(["TP53", "BRCA1"])
    with pytest.warns(ScellfmWarning, match="1 of 2 genes are not in m.gtf"):
        assert annotation.select(["Actb", "TP53"]).table["gene"].unique().tolist() == ["ENSMUSG01"]
    windows = tss_windows(annotation, length=64)
    assert windows.select(["ENSMUSG02.7"]).table["gene"].tolist() == ["ENSMUSG02"]


@pytest.fixture
def fasta(tmp_path):
    return write(tmp_path, "g.fa", ">20 primary\n" + "ACGTNacgtnRYKM\n" * 10 + ">M\nACGT\n")


BED = "chr20\t20\t40\ta\t0\t+\nchr20\t20\t60\tb\t0\t-\n"


def test_chromosomes_under_another_name_or_none(tmp_path, fasta):
    windows = tss_windows(write(tmp_path, "a.bed", BED), fasta, length=10)
    assert windows.table["chrom"].tolist() == ["20", "20"]
    with pytest.warns(ScellfmWarning, match="1 of 3 starts are on chr7, which is not in g.fa:"):
        windows = tss_windows(write(tmp_path, "b.bed", BED + "chr7\t5\t9\tc\t0\t+\n"), fasta, length=10)
    assert windows.left_out["gene"].tolist() == ["c"] and len(windows) == 2
    with pytest.raises(DataError, match="none of the chromosomes chr7 is in g.fa"):
        tss_windows(write(tmp_path, "c.bed", "chr7\t5\t9\tc\t0\t+\n"), fasta, length=10)


@pytest.mark.parametrize(
    "given, in_genome",
    [("chr20", "20"), ("20", "chr20"), ("CHR20", "chr20"), ("20", "Chr20"), ("Chr20", "20")]
    + [(one, other) for one in ("chrM", "MT", "M", "chrMT") for other in ("chrM", "MT", "M", "chrMT")],
)
def test_usual_spellings_of_a_chromosome_are_one(tmp_path, given, in_genome):
    path = write(tmp_path, "one.fa", f">{in_genome}\n{'ACGTTGCAAC' * 5}\n")
    windows = tss_windows(write(tmp_path, "a.bed", f"{given}\t20\t40\ta\t0\t-\n"), path, length=10)
    assert windows.table["chrom"].tolist() == [in_genome] and len(windows.sequence(0)) == 10
    assert len(start_table(windows, bin_size=5)) == 1


def test_a_gene_on_two_chromosomes_has_the_starts_of_each(tmp_path):
    rows = [("g", "chrX", "+", 100, "x1"), ("g", "chrX", "+", 104, "x2"), ("g", "chrY", "+", 103, "y1")]
    table = pd.DataFrame(rows, columns=["gene", "chrom", "strand", "start", "transcript"]).assign(end=200)
    windows = tss_windows(table, chrom_sizes={"X": 500, "Y": 500}, length=64, tss="all")
    starts = start_table(windows, bin_size=8)
    for row, chrom in enumerate(windows.table["chrom"]):
        assert set(starts.loc[starts["row"] == row, "transcript"]) == ({"x1", "x2"} if chrom == "X" else {"y1"})
    exons = pd.DataFrame({"gene": "g", "chrom": ["chrX", "chrY"], "start": [104, 120], "end": [108, 124]})
    windows.annotation.exons = exons.assign(transcript=["x1", "y1"])
    for row, (chrom, start) in enumerate(zip(windows.table["chrom"], windows.table["start"])):
        exon = 104 if chrom == "X" else 120
        assert exon_bins(windows, row, 4, 0, 16).tolist() == sorted({(exon - start) // 4, (exon + 3 - start) // 4})


def test_a_start_beyond_its_chromosome_is_another_build(tmp_path, fasta):
    with pytest.raises(DataError, match="gene 'c' starts at 20:899, but the chromosome has 140 bases in g.fa"):
        tss_windows(write(tmp_path, "a.bed", BED + "20\t5\t900\tc\t0\t-\n"), fasta, length=10)
    with pytest.raises(DataError, match="another build"):
        tss_windows(write(tmp_path, "a.bed", BED), chrom_sizes={"chr20": 30}, length=10)


def test_windows_without_a_genome_cannot_be_read(tmp_path):
    windows = tss_windows(write(tmp_path, "a.bed", BED), length=10)
    with pytest.raises(OptionError, match="planned without a FASTA file"):
        windows.codes()


@pytest.mark.parametrize(
    "options, words",
    [({"length": 0}, "length"), ({"tss": "best"}, "tss"), ({"align": "x"}, "align"), ({"pad": "A"}, "pad")],
)
def test_wrong_options_are_named(tmp_path, options, words):
    with pytest.raises(OptionError, match=words):
        tss_windows(write(tmp_path, "a.bed", BED), **{"length": 10, **options})


def test_lower_case_and_ambiguous_letters(fasta):
    genome = Genome(fasta)
    assert genome.letters("20", 0, 14) == "ACGTNACGTNRYKM"
    assert genome.codes("20", 0, 14).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 4, 4, 4, 4]
    assert genome.letters("20", 10, 14, strand="-") == "KMRY"
    with pytest.raises(DataError, match="character 'E' at position 3 is not a base"):
        encode("ACGE")


@pytest.mark.parametrize(
    "text, words",
    [
        (b"", "an empty file"),
        (b"no fasta\n", "cannot be read as a FASTA file"),
        (b">1\nACGT\nAC\nACGT\n", "cannot be read as a FASTA file"),
        (b">1\nACGT\n>1\nACGT\n", "cannot be read as a FASTA file"),
        (b">\nACGT\n", "cannot be read as a FASTA file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer|Git"),
    ],
)
def test_a_file_that_is_no_fasta_is_refused(tmp_path, text, words):
    with pytest.raises(AssetError, match=words):
        Genome(write(tmp_path, "x.fa", text))


@pytest.mark.parametrize("text", [b"no fasta\n", b">1\nACGT\nAC\nACGT\n", b">1\nACGT\n>1\nACGT\n", b">\nACGT\n"])
def test_a_bgzip_file_that_is_no_fasta_is_refused(tmp_path, text):
    write_blocks(tmp_path / "x.fa.gz", text)
    with pytest.raises(AssetError):
        Genome(tmp_path / "x.fa.gz")


@pytest.mark.parametrize("cut", [1, 28, 40])
def test_a_truncated_bgzip_genome_is_refused(tmp_path, cut):
    write_blocks(tmp_path / "x.fa.gz", b">1\n" + b"ACGT\n" * 40_000)
    (tmp_path / "x.fa.gz").write_bytes((tmp_path / "x.fa.gz").read_bytes()[:-cut])
    with pytest.raises(AssetError, match="incomplete|truncated"):
        Genome(tmp_path / "x.fa.gz")


def test_plain_gzip_and_damaged_blocks_are_named(tmp_path):
    (tmp_path / "x.fa.gz").write_bytes(gzip.compress(b">1\nACGT\n"))
    with pytest.raises(AssetError, match="plain gzip, which cannot be read in the middle"):
        Genome(tmp_path / "x.fa.gz")
    text = b">1\n" + bytes(np.random.default_rng(0).choice(list(b"ACGT"), 70_000).astype(np.uint8)) + b"\n"
    write_blocks(tmp_path / "y.fa.gz", text)
    genome, data = Genome(tmp_path / "y.fa.gz"), bytearray((tmp_path / "y.fa.gz").read_bytes())
    data[5000] ^= 255
    (tmp_path / "y.fa.gz").write_bytes(bytes(data))
    with pytest.raises(AssetError, match="is damaged at byte 0"):
        genome.letters("1", 0, 100)


@pytest.mark.parametrize("at", [0, 25, 60, -30, -60])
def test_a_damaged_bgzip_genome_is_named_while_it_is_indexed(tmp_path, at):
    write_blocks(tmp_path / "x.fa.gz", b">1\n" + b"ACGTTGCA\n" * 30)
    data = bytearray((tmp_path / "x.fa.gz").read_bytes())
    data[at] ^= 255
    (tmp_path / "x.fa.gz").write_bytes(bytes(data))
    with pytest.raises(AssetError, match="damaged|was cut|compressed"):
        Genome(tmp_path / "x.fa.gz")


@pytest.mark.parametrize(
    "line", ["20\t140\t12\t14\t15", "20\t140\t11\t13\t15", "20\t150\t12\t14\t15", "X\t140\t12\t14\t15"]
)
def test_an_index_of_another_file_is_an_error_and_not_a_wrong_sequence(tmp_path, fasta, line):
    right = "20\t140\t12\t14\t15\nM\t4\t165\t4\t5\n"
    index = write(tmp_path, "g.fa.fai", right if line == "20\t140\t12\t14\t15" else f"{line}\nM\t4\t165\t4\t5\n")
    os.utime(index, (2e9, 2e9))
    genome = Genome(fasta)
    if line == "20\t140\t12\t14\t15":
        assert genome.letters("20", 13, 16) == "MAC"
        return
    with pytest.raises(AssetError, match="is wrong at"):
        genome.letters("X" if line.startswith("X") else "20", 13, 16)


@pytest.mark.parametrize(
    "text",
    ["", "x", "20\t1\n", "20\ta\tb\tc\td\n", "20\t140\t12\t0\t15\n", "20\t140\t12\t14\t15\n20\t140\t12\t14\t15\n"],
)
def test_a_damaged_index_is_named(tmp_path, fasta, text):
    index = write(tmp_path, "g.fa.fai", text)
    os.utime(index, (2e9, 2e9))
    with pytest.raises(ScellfmError, match="not an index|has no sequence"):
        Genome(fasta).letters("20", 0, 4)


def test_the_index_is_kept_in_the_cache_where_the_folder_cannot_be_written(tmp_path, fasta, monkeypatch):
    monkeypatch.setenv("SCELLFM_CACHE", str(tmp_path / "cache"))
    from scellfm.rosa import genome as module

    write_index, folder = module.write_index, fasta.parent

    def refuse_beside(index, path):
        if path.parent == folder:
            raise module.StoreError("read-only file system")
        write_index(index, path)

    monkeypatch.setattr(module, "write_index", refuse_beside)
    assert Genome(fasta).letters("20", 0, 4) == "ACGT" and not (tmp_path / "g.fa.fai").exists()
    kept = list((tmp_path / "cache" / "fasta").glob("*.fai"))
    assert len(kept) == 1
    monkeypatch.setattr(module, "make_index", lambda path: pytest.fail("the index in the cache was not used"))
    assert Genome(fasta).sizes == {"20": 140, "M": 4}


def test_an_index_older_than_its_fasta_is_made_again(tmp_path, fasta):
    index = write(tmp_path, "g.fa.fai", "20\t9\t12\t9\t10\n")
    os.utime(index, (1, 1))
    assert Genome(fasta).sizes == {"20": 140, "M": 4}
    assert stat.S_ISREG(index.stat().st_mode) and index.read_text().startswith("20\t140")


def test_sizes_of_chromosomes_that_are_none(tmp_path):
    for sizes in (write(tmp_path, "x.sizes", "chr1\n"), write(tmp_path, "y.sizes", "chr1\tlong\n"), tmp_path / "no"):
        with pytest.raises(DataError, match="not a table of names and lengths"):
            read_sizes(sizes)
    with pytest.raises(OptionError, match="chrom_sizes"):
        read_sizes({"chr1": -5})


@hypothesis_settings(max_examples=150)
@given(
    kind=st.sampled_from(["x.gtf", "x.bed", "x.tsv", "x.fa", "x.fai", "x.fa.gz"]),
    at=st.integers(0, 10_000),
    junk=st.binary(min_size=1, max_size=8),
)
def test_any_damage_is_read_or_refused_in_words(tmp_path_factory, kind, at, junk):
    folder = tmp_path_factory.getbasetemp()
    tsv = "gene\tchrom\tstrand\ttss\tstart\tend\na\t1\t+\t5\t5\t8\nb\t1\t-\t9\t7\t10\n"
    texts = {"x.gtf": gtf(), "x.bed": BED, "x.tsv": tsv, "x.fa": ">20\nACGT\nACGT\n>M\nAC\n"}
    texts |= {"x.fai": "20\t8\t4\t4\t5\nM\t2\t17\t2\t3\n", "x.fa.gz": texts["x.fa"]}
    whole = texts[kind].encode()
    if kind == "x.fa.gz":
        write_blocks(folder / "whole.gz", whole)
        whole = (folder / "whole.gz").read_bytes()
    at = at % len(whole)
    damaged = whole[:at] + junk + whole[at + len(junk) :]
    try:
        if kind in ("x.fa", "x.fai", "x.fa.gz"):
            name = "fuzz.fa.gz" if kind == "x.fa.gz" else "fuzz.fa"
            path = write(folder, name, texts["x.fa"] if kind == "x.fai" else damaged)
            (folder / f"{name}.fai").unlink(missing_ok=True)
            if kind == "x.fai":
                os.utime(write(folder, "fuzz.fa.fai", damaged), (2e9, 2e9))
            genome = Genome(path)
            for name, size in genome.sizes.items():
                assert size < 100 or pytest.fail("a length that the file does not have")
                genome.codes(name, -3, size + 3)
        else:
            tss_windows(write(folder, f"fuzz{kind[1:]}", damaged), length=16)
    except ScellfmError:
        pass
