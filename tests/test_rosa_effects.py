"""Variant effects and mutagenesis: the numbers of whole predictions, on both strands, for substitutions and indels."""

import numpy as np
import pandas as pd
import pytest
from conftest import real_data
from rosa_models import lively

from scellfm.core import DataError, OptionError, ScellfmWarning, StoreError
from scellfm.rosa import mutagenesis, read_annotation, tss_windows, variant_effect, variant_vectors
from scellfm.rosa.effects import bins_around, exon_bins, ln_ratio
from scellfm.rosa.in_silico import log2_ratio
from scellfm.rosa.substitution import WindowReader

LENGTH = 2048


@pytest.fixture(scope="module")
def enformer():
    return lively(1, target_length=8)


@pytest.fixture(scope="module")
def genome(tmp_path_factory):
    "A genome with genes on both strands, one at the very end, and variants of every kind."
    folder = tmp_path_factory.mktemp("genome")
    letters = "".join(np.random.default_rng(5).choice(list("ACGT"), 6000))
    (folder / "genome.fa").write_text(f">chr1\n{letters}\n")
    rows = [("A", "+", 2500, 3500), ("B", "-", 1200, 2900), ("C", "+", 5900, 5990)]
    genes = pd.DataFrame(rows, columns=["gene", "strand", "start", "end"])
    genes = genes.assign(transcript=genes["gene"] + ".1", chrom="chr1", biotype="protein_coding")
    places = [2400, 2510, 2600, 2890, 3100, 5905]
    variants = pd.DataFrame({"chrom": "chr1", "pos": places, "ref": [letters[pos - 1] for pos in places]})
    variants["alt"] = ["CA"[base == "C"] for base in variants["ref"]]
    variants.loc[2, "alt"] = variants.loc[2, "ref"] + "TTTT"
    variants.loc[3, "ref"] = letters[2889:2894]
    variants.loc[3, "alt"] = letters[2889]
    return folder / "genome.fa", genes, variants, letters


@pytest.fixture(scope="module")
def windows(genome):
    return tss_windows(genome[1], genome[0], length=LENGTH)


def by_hand(enformer, genome, windows, row, variant, width=501, score="log2_sum"):
    "The effect of a variant of any kind from two whole predictions, the changed sequence spliced as text."
    _, _, variants, letters = genome
    window, change = windows.table.iloc[row], variants.iloc[variant]
    start, end, tss = int(window["start"]), int(window["end"]), int(window["tss"])
    pos, ref, alt = change["pos"] - 1, change["ref"], change["alt"]
    pad = 3000
    whole = "N" * pad + letters + "N" * pad
    changed = whole[: pad + pos] + alt + whole[pad + pos + len(ref) :]
    # a change left of the start moves the rest: the start keeps its place in the window
    move = len(alt) - len(ref) if pos + len(ref) <= tss else 0
    texts = [whole[pad + start : pad + end], changed[pad + start + move : pad + end + move]]
    if window["strand"] == "-":
        texts = [text[::-1].translate(str.maketrans("ACGTN", "TGCAN")) for text in texts]
    first, count = enformer.bins(LENGTH)
    bins = bins_around(int(window["index"]), width, enformer.bin_size, first, count)
    before, after = (enformer.predict(text, tracks="CAGE", bins=bins, strands="both")[0] for text in texts)
    return float(log2_ratio(after.sum(axis=0), before.sum(axis=0)).mean())


def test_every_kind_of_variant_has_the_effect_of_two_whole_predictions(enformer, genome, windows):
    effects = variant_effect(genome[2], model=enformer, windows=windows)
    assert {"A", "B", "C"} == set(effects.table["gene"])
    order = windows.table["gene"].tolist()
    for _, row in effects.table.iterrows():
        expected = by_hand(enformer, genome, windows, order.index(row["gene"]), row["variant"])
        assert row["effect"] == pytest.approx(expected, abs=1e-5)
        assert row["direction"] == ("none" if abs(expected) < 1e-6 else "up" if expected > 0 else "down")
    assert effects.table["effect"].abs().max() > 1e-3
    assert np.allclose(effects.by_track.mean(axis=1), effects.table["effect"], atol=1e-6)


def test_substitutions_equal_whole_predictions_for_every_reading(enformer, windows):
    codes = windows.codes([0])[0]
    changes = [(0, 3), (129, 1), (1024, 0), (LENGTH - 1, 2), (700, 4)]
    for how in (dict(strands="forward"), dict(strands="reverse"), dict(strands="both", shifts=(-3, 0, 5))):
        for cut in (0, 37):  # a length that is no multiple of the bin
            window = codes[: LENGTH - cut]
            reader = WindowReader(enformer, window, tracks="CAGE", **how)
            usable = [change for change in changes if change[0] < len(window)]
            found = reader.substituted(usable)
            assert np.allclose(reader.reference(), enformer.predict(window, tracks="CAGE", **how)[0], atol=1e-5)
            for (place, code), ours in zip(usable, found):
                changed = window.copy()
                changed[place] = code
                assert np.allclose(ours, enformer.predict(changed, tracks="CAGE", **how)[0], rtol=1e-4, atol=1e-5)


def test_batches_of_variants_give_the_same_numbers(enformer, windows):
    codes = windows.codes([0])[0]
    changes = [(place, int(codes[place] + 1) % 4) for place in range(900, 905)]
    one, many = (WindowReader(enformer, codes, tracks=[0], batch_size=size).substituted(changes) for size in (1, 4))
    assert np.allclose(one, many, atol=1e-5)


def test_exons_are_mirrored_on_the_negative_strand(tmp_path, enformer, genome, windows):
    exons = pd.DataFrame({"gene": ["A", "B"], "transcript": ["A.1", "B.1"], "chrom": "chr1"})
    exons = exons.assign(start=[2500, 2600], end=[2620, 2900])
    windows = windows[:]
    windows.annotation.exons = exons
    first, count = enformer.bins(LENGTH)
    for row, gene in enumerate(windows.table["gene"]):
        if gene == "C":
            continue
        start, end = exons.loc[exons["gene"] == gene, ["start", "end"]].iloc[0]
        window = windows.table.iloc[row]
        inside = np.zeros(LENGTH, bool)
        inside[start - window["start"] : end - window["start"]] = True
        inside = inside[::-1] if window["strand"] == "-" else inside
        wanted = np.flatnonzero(inside.reshape(-1, 128).any(axis=1)) - first
        wanted = wanted[(wanted >= 0) & (wanted < count)]
        assert exon_bins(windows, row, 128, first, count).tolist() == wanted.tolist()
    with pytest.warns(ScellfmWarning, match="no exon"):
        effects = variant_effect(genome[2], model=enformer, windows=windows, score="ln_mean_exons")
    at = effects.table.query("gene == 'A' and variant == 0").index[0]
    row = windows.table["gene"].tolist().index("A")
    codes = windows.codes([row])[0]
    bins = exon_bins(windows, row, 128, first, count)
    index = 2400 - 1 - int(windows.table["start"][row])
    before = enformer.predict(codes, tracks="CAGE", bins=bins, strands="both")[0].mean(axis=0)
    codes[index] = "ACGT".index(genome[2]["alt"][0])
    after = enformer.predict(codes, tracks="CAGE", bins=bins, strands="both")[0].mean(axis=0)
    assert effects.table["effect"][at] == pytest.approx(float(ln_ratio(after, before).mean()), abs=1e-5)


def test_around_the_variant_reads_other_bins_and_leaves_out_what_the_model_does_not_give(enformer, genome, windows):
    near = variant_effect(genome[2], model=enformer, windows=windows, around="variant", width=101, max_distance=300)
    assert near.table["distance"].abs().max() <= 300
    with pytest.warns(ScellfmWarning, match="left out"):
        fewer = variant_effect(genome[2], model=enformer, windows=windows, around="variant", width=11)
    whole = variant_effect(genome[2], model=enformer, windows=windows)
    assert len(fewer) < len(whole)


def test_effects_are_kept_and_a_folder_of_other_settings_is_refused(tmp_path, enformer, genome, windows):
    first = variant_effect(genome[2], model=enformer, windows=windows, folder=tmp_path / "kept")
    again = variant_effect(genome[2], model=enformer, windows=windows, folder=tmp_path / "kept")
    assert first.table.equals(again.table)
    for changed in (dict(width=101), dict(strands="forward"), dict(model=lively(2, target_length=8))):
        with pytest.raises(StoreError):
            variant_effect(genome[2], windows=windows, folder=tmp_path / "kept", **{"model": enformer} | changed)


def test_vectors_before_and_after(enformer, genome, windows):
    pairs, before, after = variant_vectors(genome[2], model=enformer, windows=windows)
    own = windows.bins(8)[:, None]
    assert np.allclose(before, enformer.embed(windows, bins=own)[pairs["window"], 0], atol=1e-4)
    at = int(np.flatnonzero((pairs["variant"] == 1) & (pairs["gene"] == "A"))[0])
    codes = windows.codes([pairs["window"][at]])[0]
    codes[pairs["index"][at]] = pairs["alt_code"][at]
    assert np.allclose(after[at], enformer.embed(codes, bins=own[pairs["window"][at]])[0, 0], atol=1e-4)


def test_mutagenesis_is_every_substitution(enformer, windows):
    codes = windows.codes([0])[0]
    found = mutagenesis(enformer, codes, region=(1020, 1026), bins=[3, 4], tracks="CAGE")
    before = enformer.predict(codes, tracks="CAGE", bins=[3, 4], strands="both")[0].sum(axis=0)
    for place in range(6):
        for code in range(4):
            changed = codes.copy()
            changed[1020 + place] = code
            after = enformer.predict(changed, tracks="CAGE", bins=[3, 4], strands="both")[0].sum(axis=0)
            assert found.effects[place, code] == pytest.approx(log2_ratio(after, before).mean(), abs=1e-5)
    assert len(found.frame()) == 18 and found.letters == "".join("ACGT"[code] for code in codes[1020:1026])


def test_wrong_inputs_are_named(enformer, genome, windows):
    wrong = genome[2].assign(ref="A", alt="G")
    with pytest.raises(DataError, match="REF"):
        variant_effect(wrong, model=enformer, windows=windows)
    for changed in (dict(score="difference"), dict(around="gene"), dict(width=0), dict(max_distance=-1)):
        with pytest.raises(OptionError):
            variant_effect(genome[2], model=enformer, windows=windows, **changed)
    with pytest.raises(OptionError, match="exons"):
        bare = tss_windows(genome[1], genome[0], length=LENGTH)
        bare.annotation.exons = None
        variant_effect(genome[2], model=enformer, windows=bare, score="ln_mean_exons")
    with pytest.raises(DataError, match="near a start"):
        variant_effect(genome[2][:1], model=enformer, windows=windows, max_distance=0)
    for region in ((5, 5), (-1, 3), (0, 10**6)):
        with pytest.raises(OptionError):
            mutagenesis(enformer, windows.codes([0])[0], region=region, bins=[3])


@pytest.mark.parametrize("most", [30, pytest.param(None, marks=pytest.mark.slow)])
def test_real_variants_near_starts_are_scored(tmp_path, most):
    "chr20:1-2 Mb: records within 1 kb of a start, on both strands."
    from scellfm.rosa import read_variants

    bed = real_data("genome/hg19_genes_stranded_liger.bed")
    table = pd.read_csv(bed, sep="\t", header=None).iloc[:, :6]
    table.columns = ["chrom", "start", "end", "gene", "score", "strand"]
    table = table[(table["chrom"] == "chr20") & (table["start"] >= 1_000_000) & (table["end"] <= 2_000_000)]
    table = table.assign(chrom="z", start=table["start"] - 1_000_000, end=table["end"] - 1_000_000)
    table = table.drop_duplicates("gene").assign(transcript=table["gene"], biotype="protein_coding")
    fasta = tmp_path / "z.fa"
    fasta.write_bytes(real_data("chr20-1mb/z.fa").read_bytes())
    planned = tss_windows(read_annotation(table.drop(columns="score")), fasta, length=2001)  # 1 kb to each side
    assert len(planned) == 17 and set(planned.table["strand"]) == {"+", "-"}
    variants = read_variants(real_data("chr20-1mb/z.vcf.gz"), fasta)
    model = lively(1, target_length=8)
    if most is not None:
        planned = planned[:2]
    effects = variant_effect(variants, model=model, windows=planned, strands="forward" if most else "both")
    assert np.isfinite(effects.table["effect"]).all() and set(effects.table["gene"]) <= set(table["gene"])
    assert (effects.table["distance"].abs() <= 1000).all() and effects.table["direction"].ne("none").mean() > 0.9
    if most is None:
        assert variants.table["record"].iloc[effects.table["variant"]].nunique() == 964
