"""Gene vectors: rosa's own variants as recorded, the right bins on both strands, folders that survive being killed."""

import hashlib
import json
import os
import random
import re
import signal
import time
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from conftest import golden
from rosa_models import lively

from scellfm.core import DataError, OptionError, ScellfmWarning, StoreError
from scellfm.data.vectors import GeneVectors
from scellfm.rosa import embed_bins, embed_genes, tss_windows
from scellfm.rosa.extraction import original_kernel, original_smoothed, original_vectors, strongest_start

FOLDER = golden("rosa")


@pytest.fixture(scope="module")
def recorded():
    return dict(np.load(FOLDER / "tss.npz")), json.loads((FOLDER / "tss.json").read_text())


def inputs(recorded):
    arrays, options = recorded
    return arrays["embeddings"], arrays["cage"], arrays["tss_vectors"], options["tss_bin"]


def kernel_sizes(arrays) -> dict[int, int]:
    "Size by sigma, as the names of the recorded kernels say."
    found = (re.fullmatch(r"gauss_kernel_s(\d+)_k(\d+)", name) for name in arrays)
    return {int(match[1]): int(match[2]) for match in found if match}


def test_the_first_set_of_variants_is_the_originals(recorded):
    arrays, options = recorded
    sizes = kernel_sizes(arrays)
    names = ["tss", "sum", "amax", "amax_tss", "sum_tss"]
    names += [f"{kind}_s{sigma}" for sigma in options["sigmas"] for kind in ("amax", "sum")]
    assert len(names) == len(arrays["v1_all"])
    for name, theirs in zip(names, arrays["v1_all"]):
        size = sizes.get(int(name.rpartition("_s")[2])) if name[-1].isdigit() else None
        assert np.allclose(original_vectors(*inputs(recorded), name, size), theirs, rtol=1e-5, atol=1e-6), name


def test_several_bins_are_the_originals(recorded):
    for name, key in (("trio", "v2_trio"), ("top10", "v3_top10")):
        assert np.array_equal(original_vectors(*inputs(recorded), name), recorded[0][key])


def test_the_originals_smoothing_with_its_shift(recorded):
    arrays, _ = recorded
    for sigma, size in kernel_sizes(arrays).items():
        assert np.allclose(original_kernel(sigma, size), arrays[f"gauss_kernel_s{sigma}_k{size}"], atol=1e-6)
        ours = original_smoothed(arrays["tss_vectors"], sigma, size)
        assert np.allclose(ours, arrays[f"gauss_filter_s{sigma}"], atol=1e-6)


def test_the_strongest_start_is_among_the_starts(recorded):
    _, cage, vectors, _ = inputs(recorded)
    rows = np.flatnonzero(vectors.any(axis=1))
    starts = [np.flatnonzero(vectors[row]) for row in rows]
    assert strongest_start(cage[rows], starts).tolist() == (cage * vectors)[rows].argmax(axis=1).tolist()


@pytest.fixture(scope="module")
def genome(tmp_path_factory):
    "A chromosome and its other strand, with genes at mirrored places on the other strand."
    folder, length = tmp_path_factory.mktemp("genome"), 20_000
    letters = "".join(np.random.default_rng(1).choice(list("ACGT"), length))
    other = letters[::-1].translate(str.maketrans("ACGT", "TGCA"))
    (folder / "genome.fa").write_text(f">one\n{letters}\n>two\n{other}\n")
    rows = []
    for number, start in enumerate((500, 4000, 4700, 9000, 15_000, 19_000)):
        gene = dict(gene=f"G{number}", transcript=f"G{number}.1", chrom="one", strand="+-"[number % 2])
        gene |= dict(start=start, end=start + 400, biotype="protein_coding")
        mirrored = dict(start=length - gene["end"], end=length - gene["start"], chrom="two")
        rows += [gene, gene | mirrored | dict(gene=f"M{number}", strand="-+"[number % 2], transcript=f"M{number}.1")]
    return folder / "genome.fa", pd.DataFrame(rows)


@pytest.fixture(scope="module")
def windows(genome):
    return tss_windows(genome[1], genome[0], length=2048, align="bin")


@pytest.fixture(scope="module")
def enformer():
    return lively(3, target_length=8)


def test_a_gene_on_the_other_strand_of_a_mirrored_genome_has_the_same_vector(windows, enformer):
    "The window, its direction and its bin are consistent on both strands."
    vectors = embed_genes(windows, model=enformer)
    for number in range(6):
        both = vectors.take([f"G{number}", f"M{number}"]).values
        assert np.array_equal(both[0], both[1])


class Shares:
    "Counts of G and C in each bin: the same from either strand, in mirrored order."

    def __init__(self, bin_size):
        self.bin_size = bin_size

    def embed(self, windows):
        codes = windows.codes()
        strong = np.isin(codes, (1, 2)).astype(np.float32)
        return strong.reshape(len(codes), -1, self.bin_size).sum(axis=2)[:, :, None]


@pytest.mark.parametrize("length, size", [(2048, 128), (1920, 128), (105, 7), (75, 5)])
def test_a_symmetric_encoder_gives_mirrored_bins_for_the_other_strand(genome, length, size):
    planned = tss_windows(genome[1], genome[0], length=length, align="bin")
    turned = planned.table.assign(strand=planned.table["strand"].map({"+": "-", "-": "+"}))
    forward, backward = (Shares(size).embed(w) for w in (planned, replace(planned, table=turned)))
    assert np.array_equal(forward, backward[:, ::-1])


def test_averaging_both_strands_does_not_depend_on_the_strand(windows, enformer):
    turned = windows.table.assign(strand=windows.table["strand"].map({"+": "-", "-": "+"}))
    other = replace(windows, table=turned)
    for method in (enformer.embed, enformer.predict):
        forward, backward = method(windows, strands="both"), method(other, strands="both")[:, ::-1]
        assert np.allclose(forward, backward, rtol=1e-5, atol=1e-5)
        assert np.abs(method(windows) - method(other)[:, ::-1]).max() > 0.01  # a single reading does differ


def test_rules_read_what_they_say(windows, enformer):
    own = windows.bins(8)
    every = enformer.embed(windows)
    vectors = embed_genes(windows, model=enformer, rule="tss").values
    assert np.allclose(vectors, every[np.arange(len(windows)), own], atol=1e-5)
    assert np.allclose(embed_genes(windows, model=enformer, rule="mean").values, every.mean(axis=1), atol=1e-5)
    cage = enformer.predict(windows, tracks="CAGE").mean(axis=2)
    chosen = embed_genes(windows, model=enformer).manifest["read"]
    for row, gene in enumerate(windows.table["gene"]):
        assert chosen[gene]["cage"] == pytest.approx(cage[row, chosen[gene]["bin"]], abs=1e-4)


def test_several_starts_of_one_window_are_read_at_once(genome, enformer):
    table = pd.concat([genome[1], genome[1].iloc[[4]].assign(transcript="G2.2", start=4900)])
    planned = tss_windows(table, genome[0], length=2048)
    vectors = embed_genes(planned, model=enformer)
    where = planned.table["gene"].tolist().index("G2")
    cage = enformer.predict(planned[[where]], tracks="CAGE").mean(axis=2)[0]
    first, _ = enformer.bins(2048)
    index = int(planned.table["index"][where])
    bins = [place // enformer.bin_size - first for place in (index, index + 4900 - 4700)]
    assert bins[0] != bins[1] and vectors.manifest["read"]["G2"]["bin"] == bins[int(np.argmax(cage[bins]))]


def test_original_variants_have_their_widths(windows, enformer):
    width = enformer.width
    for name, parts in (("amax", 1), ("sum_tss", 1), ("amax_s3", 1), ("trio", 6), ("top10", 8 * 5)):
        # a model of eight bins has no more than eight largest
        assert embed_genes(windows[:2], model=enformer, original=name).width == parts * width
    with pytest.raises(OptionError, match="original"):
        embed_genes(windows, model=enformer, original="best")


def test_an_encoder_without_coverage_reads_the_own_start_and_says_so(windows):
    with pytest.warns(ScellfmWarning, match="predicts no coverage"):
        vectors = embed_genes(windows, model=Shares(128))
    assert vectors.manifest["rule"] == "tss"
    theirs = Shares(128).embed(windows)[np.arange(len(windows)), windows.bins()]
    assert np.array_equal(vectors.values, theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed_genes(windows, model=Shares(128), rule="mean")
    with pytest.raises(OptionError, match="options of Enformer"):
        embed_genes(windows, model=Shares(128), rule="tss", strands="both")


def test_a_folder_of_other_settings_or_another_model_is_refused(windows, enformer, tmp_path):
    embed_genes(windows[:3], model=enformer, folder=tmp_path / "a")
    other = lively(4, target_length=8)
    for changed in (dict(model=other), dict(model=enformer, strands="both"), dict(model=enformer, rule="tss")):
        with pytest.raises(StoreError):
            embed_genes(windows[:3], folder=tmp_path / "a", **changed)
    with pytest.raises(StoreError):
        embed_genes(windows[1:4], model=enformer, folder=tmp_path / "a")


def test_windows_without_a_start_in_the_models_bins_are_refused(genome, enformer):
    planned = tss_windows(genome[1], genome[0], length=2048)
    shifted = planned[:]
    shifted.table = shifted.table.assign(index=0)
    shifted.annotation = None
    with pytest.raises(DataError, match="no start"):
        embed_genes(shifted, model=enformer)


def test_vectors_can_be_saved_and_opened(windows, enformer, tmp_path):
    vectors = embed_genes(windows[:2], model=enformer)
    vectors.save(tmp_path)
    assert GeneVectors.load(tmp_path).manifest == vectors.manifest


def test_the_manifest_says_what_the_vectors_were_made_of(genome, enformer, tmp_path):
    columns = (
        'gene_id "ENSG01.2"; transcript_id "T1"; gene_name "AAA"; transcript_type "protein_coding"; tag "MANE_Select";'
    )
    line = f"one\tH\ttranscript\t4001\t4400\t.\t-\t.\t{columns}\n"
    (tmp_path / "g.gtf").write_text("##description: a test (GRCt1), version 7\n" + line)
    planned = tss_windows(tmp_path / "g.gtf", genome[0], length=2048)
    vectors = embed_genes(planned, model=enformer, folder=tmp_path / "kept")
    found = vectors.manifest
    assert found["genome"]["sha256"] == hashlib.sha256(genome[0].read_bytes()).hexdigest()
    assert found["annotation"]["release"] == "description: a test (GRCt1), version 7"
    assert found["model"] == enformer.fingerprint() and found["rule"] == "strongest_cage"
    assert found["windows"] == planned.settings and set(found["read"]["ENSG01"]) == {"bin", "cage"}
    adata = AnnData(np.ones((2, 2), np.float32), var=pd.DataFrame(index=["ENSG01", "ENSG02"]))
    vectors.write_varm(adata, key_added="dna")
    assert np.array_equal(adata.varm["dna"][0], vectors.values[0]) and np.isnan(adata.varm["dna"][1]).all()


def bytes_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_goes_on_to_the_same_bytes(windows, enformer, tmp_path):
    "kill -9 at ten random moments, each in a child of this process."
    run = partial(embed_genes, windows, model=enformer, block=1)
    start = time.perf_counter()
    whole = run(folder=tmp_path / "whole")
    seconds, draw, killed = time.perf_counter() - start, random.Random(0), 0
    for _ in range(40):
        child = os.fork()
        if child == 0:
            try:
                run(folder=tmp_path / "killed")
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0.02, 0.4) * seconds)
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if killed == 10:
            break
    assert killed >= 5  # at least so many were not finished before
    assert np.array_equal(run(folder=tmp_path / "killed").values, whole.values)
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")


def test_all_bins_go_to_zarr_and_a_second_run_adds_nothing(windows, enformer, tmp_path):
    zarr = pytest.importorskip("zarr")
    path = embed_bins(windows[:3], model=enformer, folder=tmp_path / "bins")
    array = zarr.open_array(str(path), mode="r")
    assert array.attrs["genes"] == windows.table["gene"][:3].tolist()
    assert np.array_equal(array[:], enformer.embed(windows[:3]))
    before = bytes_of(tmp_path)
    embed_bins(windows[:3], model=enformer, folder=tmp_path / "bins")
    assert {name for name in bytes_of(tmp_path)} == set(before)
