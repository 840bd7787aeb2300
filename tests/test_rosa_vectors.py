"""Simple gene vectors and protein vectors beside those of Enformer."""

import gzip
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from scellfm.core import AssetError, DataError, OptionError, ScellfmError, ScellfmWarning, StoreError
from scellfm.data import simulate_genome
from scellfm.rosa import (
    ESM2,
    GCEncoder,
    KmerEncoder,
    embed_proteins,
    gc_vectors,
    identity_vectors,
    kmer_vectors,
    one_protein_each,
    promoter_windows,
    read_annotation,
    read_proteins,
    tss_windows,
)
from scellfm.rosa.chunks import reverse_complement
from scellfm.rosa.protein_vectors import TOKENS
from scellfm.rosa.proteins import RESIDUES

SEQUENCES = {"P1": "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ", "P2": "MSUXKVLLAZB", "P3": "ACDEFGHIKLMNPQRSTVWY" * 3}


@pytest.fixture(scope="module")
def genome(tmp_path_factory):
    simulation = simulate_genome(n_genes=12, n_chromosomes=2, n_cells=1)
    return simulation.write(tmp_path_factory.mktemp("genome"))


@pytest.mark.parametrize("align", ["base", "bin"])
@pytest.mark.parametrize("length, short", [(512, 128), (512, 101), (301, 100), (301, 301), (301, 77)])
def test_promoters_are_the_windows_planned_at_their_length(genome, align, length, short):
    windows = tss_windows(genome["annotation"], genome["fasta"], length=length, align=align)
    planned = tss_windows(genome["annotation"], genome["fasta"], length=short, align=align)
    cut = promoter_windows(windows, short)
    assert cut.table.equals(planned.table) and np.array_equal(cut.codes(), planned.codes())


def test_promoters_longer_than_windows_or_of_the_original_are_refused(genome):
    windows = tss_windows(genome["annotation"], genome["fasta"], length=128)
    with pytest.raises(OptionError, match="length"):
        promoter_windows(windows, 129)
    with pytest.raises(OptionError, match="original"):
        promoter_windows(tss_windows(genome["annotation"], genome["fasta"], length=128, original=True), 64)


def test_words_and_gc_are_those_of_each_genes_window(genome, tmp_path):
    windows = tss_windows(genome["annotation"], genome["fasta"], length=300)
    words, gc = kmer_vectors(windows, k=3, folder=tmp_path / "kept"), gc_vectors(windows)
    letters = [windows.sequence(row) for row in range(12)]
    expected = [sum(base in "GC" for base in text) / sum(base != "N" for base in text) for text in letters]
    assert np.allclose(gc.values[:, 0], expected) and list(gc.genes) == windows.table["gene"].tolist()
    assert np.array_equal(words.values, KmerEncoder(3, bin_size=None).embed(windows))
    assert len(words.manifest["words"]) == words.width == 32
    with pytest.raises(StoreError):
        kmer_vectors(windows, k=4, folder=tmp_path / "kept")


@pytest.mark.parametrize("length, size", [(640, 128), (105, 7), (75, 5), (70, 10)])
def test_gc_of_the_other_strand_is_mirrored_exactly(length, size):
    codes = torch.from_numpy(np.random.default_rng(1).integers(0, 6, (3, length)).astype(np.uint8))
    encoder = GCEncoder(size)
    assert np.array_equal(encoder.embed(codes), encoder.embed(reverse_complement(codes))[:, ::-1])
    with pytest.raises(DataError, match="whole number"):
        encoder.embed(codes[:, 1:])


def test_identity_knows_each_gene_by_name():
    vectors = identity_vectors(["b", "a", "c"])
    assert vectors.take(["a", "b"]).values.tolist() == [[0, 1, 0], [1, 0, 0]]
    for wrong in (["a", "a"], [], [1]):
        with pytest.raises((DataError, OptionError)):
            identity_vectors(wrong)


@pytest.fixture(scope="module")
def proteins(tmp_path_factory):
    path = tmp_path_factory.mktemp("proteins") / "pep.fa.gz"
    genes = {"P1": "gene:ENSG01.4 transcript:ENST01.1", "P2": "gene:ENSG01.4 transcript:ENST02.1", "P3": "GN=JAK3"}
    lines = [f">{name} {genes[name]}\n{sequence}*" for name, sequence in SEQUENCES.items()]
    path.write_bytes(gzip.compress("\r\n".join(lines).encode()))
    return path


def test_proteins_are_read_with_their_genes_and_stops_counted(proteins):
    read = read_proteins(proteins)
    assert read.table["gene"].tolist() == ["ENSG01", "ENSG01", "JAK3"]
    assert read.table["sequence"].tolist() == list(SEQUENCES.values())
    assert read.counts == {"proteins": 3, "stops at the end": 3}


def test_the_canonical_protein_is_taken_and_else_the_longest(proteins):
    read = read_proteins(proteins)
    assert one_protein_each(read).table["protein"].tolist() == ["P1", "P3"]
    table = pd.DataFrame({"gene": ["ENSG01"], "transcript": ["ENST02"], "chrom": "1", "strand": "+"})
    annotation = read_annotation(table.assign(start=0, end=9))
    assert one_protein_each(read, annotation).table["protein"].tolist() == ["P2", "P3"]
    with pytest.warns(ScellfmWarning, match="1 of 2 genes"):
        assert len(one_protein_each(read, genes=["JAK3", "nothing"])) == 1
    with pytest.raises(DataError, match="another kind of name"):
        one_protein_each(read, genes=["nothing"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "empty|no protein"),
        ("MKT\n", "start with '>'"),
        (">a\n>b\n", "no protein"),
        (">a\nMKT1\n", "position 4"),
        (">a\nMK-T\n", "'-'"),
        (">a\nMKT\n>a\nMKV\n", "twice"),
        (">a\n" + "ACGT" * 9 + "\n>b\n" + "GGCA" * 9 + "\n", "are DNA"),
        (b">a\nMK\xff\xfe\n", "not text"),
        (gzip.compress(b">a\nMKTAYIAKQRQISF\n" * 1, mtime=0)[:-9], "incomplete"),
    ],
)
def test_what_is_no_protein_fasta_is_refused(tmp_path, text, message):
    path = tmp_path / "wrong.fa"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((DataError, AssetError), match=message):
        read_proteins(path)


def test_records_without_residues_are_counted(tmp_path):
    (tmp_path / "some.fa").write_text(">a\nMK*T\n>b\n*\n>c\nmjk\n")
    with pytest.warns(ScellfmWarning, match="1 of 3 records"):
        read = read_proteins(tmp_path / "some.fa")
    assert read.table["sequence"].tolist() == ["MKXT", "MXK"]
    assert read.counts["stops inside"] == read.counts["with J"] == read.counts["without residues or name"] == 1


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "A small random checkpoint as transformers saves it, with a language model's head, and its tokenizer."
    from transformers import EsmConfig, EsmForMaskedLM, EsmTokenizer

    folder = tmp_path_factory.mktemp("esm")
    (folder / "vocab.txt").write_text("\n".join(TOKENS))
    config = EsmConfig(
        vocab_size=33, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        pad_token_id=1, mask_token_id=32, position_embedding_type="rotary", token_dropout=True,
        emb_layer_norm_before=False, max_position_embeddings=1026,
    )  # fmt: skip
    torch.manual_seed(0)
    model = EsmForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder, model, EsmTokenizer.from_pretrained(folder)


def test_protein_vectors_are_those_of_transformers(published):
    folder, model, tokenizer = published
    ours = ESM2.from_pretrained(folder, device="cpu")
    for pool in ("mean", "cls"):
        for sequence, vector in zip(SEQUENCES.values(), ours.embed(SEQUENCES.values(), pool=pool)):
            with torch.inference_mode():
                states = model.esm(**tokenizer(sequence, return_tensors="pt")).last_hidden_state[0]
            expected = states[1:-1].mean(0) if pool == "mean" else states[0]
            assert np.allclose(vector, expected, atol=1e-5)


def test_long_proteins_are_cut_and_counted_and_the_work_resumes(published, proteins, tmp_path):
    esm = ESM2.from_pretrained(published[0], device="cpu")
    vectors = embed_proteins(proteins, model=esm, max_length=20, folder=tmp_path / "kept", block=1)
    assert vectors.manifest["cut"] == 2 and vectors.manifest["protein_of"] == {"ENSG01": "P1", "JAK3": "P3"}
    assert np.allclose(vectors.values[0], esm.embed([SEQUENCES["P1"][:20]])[0], atol=1e-5)
    again = embed_proteins(proteins, model=esm, max_length=20, folder=tmp_path / "kept", block=1)
    assert np.array_equal(again.values, vectors.values)
    with pytest.raises(StoreError, match="pool"):
        embed_proteins(proteins, model=esm, max_length=20, folder=tmp_path / "kept", block=1, pool="cls")


def test_other_checkpoints_are_refused(published, tmp_path):
    import json

    folder = published[0]
    config = json.loads((folder / "config.json").read_text())
    for name in ("model.safetensors", "vocab.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for changed, message in (({"model_type": "bert"}, "not an ESM-2"), ({"vocab_size": 30}, "vocab_size")):
        (tmp_path / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(AssetError, match=message):
            ESM2.from_pretrained(tmp_path, device="cpu")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(TOKENS)))
    with pytest.raises(AssetError, match="another order"):
        ESM2.from_pretrained(tmp_path, device="cpu")


@hypothesis_settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10_000), junk=st.binary(min_size=1, max_size=8), zipped=st.booleans())
def test_a_protein_file_with_any_damage_is_read_or_refused_in_words(tmp_path, at, junk, zipped):
    text = "".join(f">{name} gene:ENSG0{name[1]}.4\n{sequence}*\n" for name, sequence in SEQUENCES.items()).encode()
    whole = gzip.compress(text) if zipped else text
    at = at % len(whole)
    path = tmp_path / "fuzz.fa"
    path.write_bytes(whole[:at] + junk + whole[at + len(junk) :])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read = read_proteins(path)
        except ScellfmError:
            return
    assert set("".join(read.table["sequence"])) <= set(RESIDUES) and (read.table["gene"] != "").all()
