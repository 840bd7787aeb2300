"""Encoders beside Enformer: words counted as by hand, the mirror of the other strand, and Borzoi where it is there."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

from scellfm.core import DataError, OptionError
from scellfm.rosa import BorzoiEncoder, KmerEncoder, embed_genes, tss_windows
from scellfm.rosa.chunks import BASES, reverse_complement


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("genome")
    letters = "".join(np.random.default_rng(0).choice(list("ACGTN"), 9000))
    (folder / "genome.fa").write_text(f">chr1\n{letters}\n")
    genes = pd.DataFrame({"gene": ["A", "B"], "strand": ["+", "-"], "start": [4000, 2000], "end": [6000, 4500]})
    genes = genes.assign(transcript=genes["gene"], chrom="chr1", biotype="protein_coding")
    return tss_windows(genes, folder / "genome.fa", length=4096)


@pytest.mark.parametrize("k, both_strands", [(1, True), (3, True), (3, False), (4, True)])
def test_words_are_counted_as_by_hand(windows, k, both_strands):
    encoder = KmerEncoder(k, bin_size=256, both_strands=both_strands)
    shares, words = encoder.embed(windows), encoder.words
    turned = str.maketrans("ACGT", "TGCA")
    text = "".join(BASES[code] for code in windows.codes([1])[0, 512:768])
    found = Counter()
    for place in range(256 - k + 1):
        word = text[place : place + k]
        if "N" not in word:
            found[min(word, word[::-1].translate(turned)) if both_strands else word] += 1
    expected = np.array([found[word] for word in words]) / sum(found.values())
    assert sum(found[word] for word in words) == sum(found.values())
    assert np.allclose(shares[1, 2], expected, atol=1e-6)


@pytest.mark.parametrize("length, size", [(640, 128), (768, 128), (105, 7), (70, 7), (75, 5)])
def test_bins_of_the_other_strand_are_mirrored_exactly(length, size):
    codes = torch.from_numpy(np.random.default_rng(1).integers(0, 5, (3, length)).astype(np.uint8))
    for k in (1, 2, 3):
        encoder = KmerEncoder(k, bin_size=size)
        assert np.array_equal(encoder.embed(codes), encoder.embed(reverse_complement(codes))[:, ::-1])


def test_word_counts_become_gene_vectors_that_resume(windows, tmp_path):
    encoder = KmerEncoder(k=3)
    vectors = embed_genes(windows, model=encoder, rule="tss", folder=tmp_path / "kept")
    assert np.allclose(vectors.values, encoder.embed(windows)[np.arange(2), windows.bins()])
    assert np.array_equal(
        embed_genes(windows, model=KmerEncoder(3), rule="tss", folder=tmp_path / "kept").values, vectors.values
    )
    whole = embed_genes(windows, model=KmerEncoder(3, bin_size=None), rule="mean")
    assert whole.width == 32 and np.allclose(whole.values.sum(axis=1), 1, atol=1e-5)


def test_wrong_encoders_are_named(windows):
    with pytest.raises(DataError, match="whole number of bins"):
        KmerEncoder(2, bin_size=100).embed(windows)
    for wrong in (dict(k=0), dict(k=9), dict(k=4, bin_size=3)):
        with pytest.raises(OptionError):
            KmerEncoder(**wrong)
    with pytest.raises(OptionError, match="pretrained"):
        BorzoiEncoder()


def test_borzoi_fits_where_enformer_does(windows):
    borzoi = pytest.importorskip("borzoi_pytorch")
    from borzoi_pytorch.config_borzoi import BorzoiConfig

    torch.manual_seed(0)
    config = BorzoiConfig(depth=1, heads=2, attn_dim_key=8, attn_dim_value=192, bins_to_return=64)
    encoder = BorzoiEncoder(borzoi.Borzoi(config), device="cpu")
    vectors = embed_genes(windows, model=encoder, rule="tss")
    assert vectors.width == encoder.embed(windows).shape[2] and np.isfinite(vectors.values).all()
