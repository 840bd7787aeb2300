"""Alleles get into windows as a naive edit of the whole chromosome puts them; files are read whole or refused."""

import gzip
import re

import numpy as np
import pandas as pd
import pytest
from conftest import real_data
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_rosa_windows import chr20

from scellfm.core import AssetError, DataError, OptionError, ScellfmError, ScellfmWarning
from scellfm.rosa import Genome, allele_codes, decode, pair_with_windows, personal_codes, read_variants, tss_windows
from scellfm.rosa.blockgzip import BLOCK, write_blocks
from scellfm.rosa.variants import Edit, edited_window, edits_of, smallest_edit
from scellfm.rosa.vcf import reference_fits

HEADER = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
LETTERS = "".join(np.random.default_rng(5).choice(list("ACGT"), 300))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    (folder / "g.fa").write_text(f">20\n{LETTERS}\n")
    return folder


def windows_at(place, tss, strand, length):
    table = pd.DataFrame({"gene": ["g"], "chrom": ["20"], "strand": [strand], "tss": [tss]})
    return tss_windows(table, place / "g.fa", length=length)


def complement(text):
    return text[::-1].translate(str.maketrans("ACGT", "TGCA"))


def naive(edits, tss, strand, length):
    "Edit the whole padded chromosome as text, keep track of the start, and cut the window out."
    pad = 400
    text, anchor = "N" * pad + LETTERS + "N" * pad, tss + pad
    for edit in sorted(edits, reverse=True):
        at = edit.start + pad
        if at + edit.length <= anchor or (edit.length == 0 and at <= anchor):
            anchor += len(edit.letters) - edit.length
        elif at <= anchor:  # the start itself is replaced or deleted
            anchor = min(anchor, at + len(edit.letters))
        text = text[:at] + edit.letters + text[at + edit.length :]
    left = length // 2
    cut = text[anchor - left : anchor - left + length]
    return cut if strand == "+" else complement(cut)


@st.composite
def some_edits(draw):
    edits, at = [], 0
    for _ in range(draw(st.integers(1, 6))):
        at += draw(st.integers(0, 60))
        length = draw(st.integers(0, 6))
        letters = draw(st.text("ACGT", max_size=6))
        if at + length > 300 or not (length or letters):
            break
        edits.append(Edit(at, length, letters))
        at += length + 1
    return edits


@hypothesis_settings(max_examples=60)
@given(edits=some_edits(), tss=st.integers(0, 299), strand=st.sampled_from("+-"), length=st.integers(1, 90))
def test_edits_are_those_of_the_whole_chromosome(place, edits, tss, strand, length):
    windows = windows_at(place, tss, strand, length)
    edited = edited_window(windows, 0, edits)
    assert decode(edited.codes) == naive(edits, tss, strand, length)
    assert len(edited.places) == length
    known = edited.places[edited.places >= 0]
    order = np.diff(known) if strand == "+" else -np.diff(known)
    assert (order > 0).all()


@hypothesis_settings(max_examples=60)
@given(pos=st.integers(1, 280), ref=st.integers(1, 5), alt=st.text("ACGT", min_size=1, max_size=5))
def test_the_smallest_edit_is_the_same_change(pos, ref, alt):
    letters = LETTERS[pos - 1 : pos - 1 + ref]
    edit = smallest_edit(pos, letters, alt)
    by_edit = LETTERS[: edit.start] + edit.letters + LETTERS[edit.start + edit.length :]
    assert by_edit == LETTERS[: pos - 1] + alt + LETTERS[pos - 1 + ref :]


@pytest.mark.parametrize("strand", "+-")
def test_pairs_tell_where_an_snv_lies_and_what_it_changes(place, strand):
    windows = windows_at(place, 150, strand, 64)
    table = pd.DataFrame({"chrom": "chr20", "pos": range(1, 301), "ref": list(LETTERS)})
    table["alt"] = [{"A": "C", "C": "G", "G": "T", "T": "A"}[base] for base in LETTERS]
    variants = read_variants(table, windows.genome)
    pairs = pair_with_windows(variants, windows)
    assert len(pairs) == 64 and sorted(pairs["index"]) == list(range(64))
    reference, codes = windows.codes()[0], allele_codes(variants, windows, pairs)
    at = pairs["index"].to_numpy()
    assert (reference[at] == pairs["ref_code"]).all() and (codes[np.arange(64), at] == pairs["alt_code"]).all()
    assert ((codes != reference).sum(axis=1) == 1).all()
    assert (pairs["distance"] == at - windows.table["index"].iloc[0]).all()


@pytest.fixture(scope="module")
def real_variants():
    genome = Genome(real_data("chr20-1mb/z.fa"))
    return genome, read_variants(real_data("chr20-1mb/z.vcf.gz"), genome)


@pytest.mark.parametrize("length", [4096, 4097])
def test_snvs_and_indels_of_the_real_chromosome(real_variants, length):
    genome, variants = real_variants
    table = variants.table
    alone = ~table["record"].duplicated(keep=False)
    assert table[alone]["kind"].value_counts().to_dict() == {"snv": 28_017, "indel": 819}
    assert (variants.counts["records"], variants.counts["multi-allelic"], variants.counts["symbolic"]) == (
        28_998,
        138,
        24,
    )
    assert reference_fits(table, genome).all()
    windows = tss_windows(chr20(), genome, length=length)
    pairs = pair_with_windows(variants, windows)
    near = table["record"].iloc[pairs["variant"][pairs["distance"].abs() <= 1000]].nunique()
    assert near >= 964
    narrow = tss_windows(chr20(), genome, length=2001)
    assert table["record"].iloc[pair_with_windows(variants, narrow)["variant"]].nunique() == 964
    indels = pairs[(table["kind"].iloc[pairs["variant"]] == "indel").to_numpy()][:40]
    for row, code in zip(indels.itertuples(), allele_codes(variants, windows, indels)):
        assert (code == edited_window(windows, row.window, [edits_of(variants[[row.variant]])[0]]).codes).all()


def simulated_family(place, seed=0, n=40):
    draw = np.random.default_rng(seed)
    lines, pos = [], 2
    while pos < 290 and len(lines) < n:
        ref = LETTERS[pos - 1 : pos - 1 + int(draw.integers(1, 4))]
        alt = "".join(draw.choice(list("ACGT"), int(draw.integers(1, 4))))
        if ref != alt:
            calls = [f"{draw.integers(0, 2)}|{draw.integers(0, 2)}" for _ in range(3)]
            lines.append("\t".join(["20", str(pos), ".", ref, alt, ".", "PASS", ".", "GT", *calls]))
        pos += len(ref) + int(draw.integers(1, 12))
    text = HEADER.replace("INFO\n", "INFO\tFORMAT\ta\tb\tc\n") + "\n".join(lines) + "\n"
    (place / "family.vcf").write_text(text)
    return place / "family.vcf"


@pytest.mark.parametrize("strand", "+-")
@pytest.mark.parametrize("sample", ["a", "c"])
def test_personal_genomes_carry_all_alleles_of_each_copy(place, strand, sample):
    windows = windows_at(place, 120, strand, 150)
    variants = read_variants(simulated_family(place), windows.genome, samples=["c", "a"])
    copies = personal_codes(variants, windows, sample)
    at = variants.samples.index(sample)
    edits = edits_of(variants)
    for copy in range(2):
        mine = [edit for edit, carried in zip(edits, variants.genotypes[:, at, copy]) if carried]
        assert decode(copies[0, copy]) == naive(mine, 120, strand, 150)


def write(place, body, header=HEADER, name="x.vcf"):
    (place / name).write_bytes((header + body).encode() if isinstance(body, str) else body)
    return place / name


GOOD = f"20\t5\t.\t{LETTERS[4]}\t{'A' if LETTERS[4] != 'A' else 'C'}\t.\t.\t.\n"


def test_windows_line_ends_and_a_missing_header_are_accepted(place):
    crlf = write(place, b"\xef\xbb\xbf" + (HEADER + GOOD).replace("\n", "\r\n").encode(), name="crlf.vcf")
    assert len(read_variants(crlf, place / "g.fa")) == 1
    with pytest.warns(ScellfmWarning, match="no line that begins with #CHROM"):
        bare = read_variants(write(place, GOOD, header=""), place / "g.fa")
    assert bare.table.drop(columns="allele_frequency").equals(
        read_variants(crlf).table.drop(columns="allele_frequency")
    )
    with pytest.raises(DataError, match="its samples have no names"):
        read_variants(write(place, GOOD, header=""), samples="a")


@pytest.mark.parametrize(
    "body, words",
    [
        ("20\t5\t.\tA\n", "line 3: it has 4 columns"),
        ("20\tfive\t.\tA\tC\n", "line 3: a record needs a chromosome, a position"),
        ("20\t0\t.\tA\tC\n", "line 3: a record needs a chromosome, a position"),
        ("20 5 . A C\n", "line 3: it has 1 columns, separated by tabs"),
        ("20\t5\t.\tA\t<DEL>\n", "holds no allele with an explicit sequence"),
        ("", "holds no allele"),
        (b"\xff\xfe\x00binary", "is not text"),
        ("20\t5\u00b2\t.\tA\tC\n", "line 3: a record needs a chromosome, a position"),
        ("20\t" + "5" * 5000 + "\t.\tA\tC\n", "line 3: a record needs a chromosome, a position"),
    ],
)
def test_a_damaged_record_is_named(place, body, words):
    with pytest.raises(DataError, match=words):
        read_variants(write(place, body))


def test_a_reference_that_does_not_fit_is_an_error_or_counted(place):
    wrong = GOOD.replace("20\t5\t", "20\t6\t", 1) if LETTERS[5] != LETTERS[4] else GOOD.replace("20\t5\t", "20\t7\t", 1)
    path = write(place, GOOD + wrong + "7\t5\t.\tA\tC\t.\t.\t.\n" + GOOD.replace("20\t5\t", "20\t500\t"))
    with pytest.raises(DataError, match="3 of 4 alleles of x.vcf differ from g.fa: at 20:.* but the genome has"):
        read_variants(path, place / "g.fa")
    with pytest.warns(ScellfmWarning, match="they are left out"):
        kept = read_variants(path, place / "g.fa", mismatch="leave_out")
    assert len(kept) == 1 and kept.counts["with another REF"] == 3


@pytest.mark.parametrize("kind", ["bgzip", "gzip"])
@pytest.mark.parametrize("cut", [5, 28, 200, 70_000])
def test_a_truncated_file_is_refused(place, kind, cut):
    path = place / "cut.vcf.gz"
    names = np.random.default_rng(0).integers(0, 10**9, 20_000)
    text = HEADER.encode() + "".join(GOOD.replace(".", f"rs{name}", 1) for name in names).encode()
    if kind == "bgzip":
        write_blocks(path, text)
    else:
        path.write_bytes(gzip.compress(text))
    if cut == 5:
        assert len(read_variants(path)) == 20_000
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ScellfmError, match="incomplete|truncated"):
        read_variants(path)


def test_unphased_genotypes_are_refused(place):
    header = HEADER.replace("INFO\n", "INFO\tFORMAT\ta\n")
    with pytest.raises(DataError, match="line 3: genotype '0/1' is heterozygous and not phased"):
        read_variants(write(place, GOOD.strip() + "\tGT\t0/1\n", header), samples="a")
    with pytest.raises(DataError, match="has no sample 'b'; it has a"):
        read_variants(write(place, GOOD.strip() + "\tGT\t0|1\n", header), samples="b")
    for more, words in (
        ("GT\t0|7", "'0|7' names an allele that the record does not have: it has 1"),
        ("GT\t0|" + "7" * 5000, "is not one or two numbers"),
        ("DP:GT\t31:0|1", "FORMAT is 'DP:GT', which does not begin with GT"),
        ("DP\t1", "FORMAT is 'DP'"),
    ):
        with pytest.raises(DataError, match=re.escape(words)):
            read_variants(write(place, GOOD.strip() + f"\t{more}\n", header), samples="a")
    windows = windows_at(place, 50, "+", 20)
    with pytest.raises(DataError, match="no genotypes of 'a' were read"):
        personal_codes(read_variants(place / "x.vcf"), windows, "a")


def test_overlapping_alleles_of_one_copy_are_counted(place):
    header = HEADER.replace("INFO\n", "INFO\tFORMAT\ta\n")
    body = f"20\t50\t.\t{LETTERS[49:53]}\t{LETTERS[49]}\t.\t.\t.\tGT\t1|0\n"
    other = "A" if LETTERS[51] != "A" else "C"
    body += f"20\t52\t.\t{LETTERS[51]}\t{other}\t.\t.\t.\tGT\t1|1\n"
    windows = windows_at(place, 50, "+", 20)
    variants = read_variants(write(place, body, header), windows.genome, samples="a")
    with pytest.warns(ScellfmWarning, match="1 alleles of 'a' overlap others"):
        personal_codes(variants, windows, "a")


def test_two_spellings_of_a_chromosome_in_one_file_are_one(place):
    header = HEADER.replace("INFO\n", "INFO\tFORMAT\ta\n")
    other = {"A": "C", "C": "G", "G": "T", "T": "A"}
    body = "".join(
        f"{chrom}\t{pos}\t.\t{LETTERS[pos - 1]}\t{other[LETTERS[pos - 1]]}\t.\t.\t.\tGT\t1|1\n"
        for chrom, pos in (("20", 48), ("chr20", 52), ("CHR20", 55))
    )
    windows = windows_at(place, 50, "+", 20)
    variants = read_variants(write(place, body, header, name="two.vcf"), windows.genome, samples="a")
    assert len(pair_with_windows(variants, windows)) == 3
    copies = personal_codes(variants, windows, "a")
    assert (copies[0] != windows.codes()).sum() == 6  # three bases on each of two copies


def test_wrong_kinds_of_input_are_named(place):
    with pytest.raises(OptionError, match="a path, a DataFrame or Variants, not a int"):
        read_variants(5)
    with pytest.raises(AssetError, match="does not exist"):
        read_variants(place / "nothing.vcf")
    (place / "x.bcf").write_bytes(b"BCF")
    with pytest.raises(DataError, match="bcftools view"):
        read_variants(place / "x.bcf")
    with pytest.raises(DataError, match="no column ref, alt"):
        read_variants(pd.DataFrame({"chrom": ["1"], "pos": [1]}))
    with pytest.raises(OptionError, match="original=True"):
        table = pd.DataFrame({"gene": ["g"], "chrom": ["20"], "strand": ["+"], "start": [5], "end": [9]})
        pair_with_windows(
            read_variants(write(place, GOOD)), tss_windows(table, place / "g.fa", length=8, original=True)
        )


@hypothesis_settings(max_examples=80)
@given(at=st.integers(0, 200), junk=st.binary(min_size=1, max_size=6), zipped=st.booleans())
def test_a_file_with_any_damage_is_read_or_refused_in_words(place, at, junk, zipped):
    whole = (HEADER + GOOD * 3).encode()
    if zipped:
        whole = gzip.compress(whole, mtime=0)
    at = at % len(whole)
    (place / "fuzz.vcf").write_bytes(whole[:at] + junk + whole[at + len(junk) :])
    try:
        read_variants(place / "fuzz.vcf", place / "g.fa", mismatch="leave_out")
    except ScellfmError:
        pass


def test_blocks_of_bgzip_span_windows(tmp_path):
    "A bgzip FASTA file longer than a block gives the same windows as the plain one."
    letters = "".join(np.random.default_rng(1).choice(list("ACGT"), BLOCK + 5000))
    lines = "\n".join(letters[start : start + 60] for start in range(0, len(letters), 60))
    (tmp_path / "g.fa").write_text(f">1\n{lines}\n")
    write_blocks(tmp_path / "g.fa.gz", (tmp_path / "g.fa").read_bytes())
    table = pd.DataFrame({"gene": ["g"], "chrom": ["1"], "strand": ["-"], "tss": [BLOCK - 400]})
    plain, zipped = (tss_windows(table, tmp_path / name, length=6000) for name in ("g.fa", "g.fa.gz"))
    assert (plain.codes() == zipped.codes()).all()
