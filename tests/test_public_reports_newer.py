"""Folders of scGenePT, rosa and their encoders: nothing of the user's is lost, and damage is named where it is read."""

import json
import os
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import tree
from fuzz_readers import mutate_saved
from test_public_reports_resumed import described, expressed, fit_rosa
from test_public_reports_runs import thesis

from scellfm.core import AssetError, DataError, OptionError, ScellfmError, StoreError
from scellfm.data import GeneVectors, simulate_perturbations
from scellfm.rosa import ESM2, Enformer, Rosa, hold_out_grid
from scellfm.scgenept import PerturbationData, ScGenePT

pytestmark = pytest.mark.filterwarnings("ignore")


def esm(folder) -> None:
    model = ESM2.from_config("tiny", device="cpu").model
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def made():
    "Everything that a folder is written of, by name: how to write it."
    simulated = simulate_perturbations(n_targets=10, n_pairs=4, n_genes=40, n_modules=3, n_cells=8, n_controls=20)
    data, vectors = PerturbationData(simulated.adata), simulated.vectors["know"]
    small = dict(d_model=16, n_heads=2, d_hid=16, n_layers=1, device="cpu", knowledge="ncbi", gene_vectors=vectors)
    rosas = {kind: fit_rosa(None, kind=kind) for kind in ("mlp", "transformer", "perceiver")}
    rosas["mlp"].score(baselines="none")
    return {
        "rosa": rosas["mlp"].save_pretrained,
        "rosa, transformer": rosas["transformer"].save_pretrained,
        "rosa, perceiver": rosas["perceiver"].save_pretrained,
        "Enformer": Enformer.from_config("tiny", device="cpu").save_pretrained,
        "scGenePT": ScGenePT.from_config("tiny", data, **small).save_pretrained,
        "gene vectors": vectors.permuted(0).save,
        "ESM-2": esm,
    }


READERS = {
    "rosa": lambda path: Rosa.from_pretrained(path, device="cpu"),
    "rosa, transformer": lambda path: Rosa.from_pretrained(path, device="cpu"),
    "rosa, perceiver": lambda path: Rosa.from_pretrained(path, device="cpu"),
    "Enformer": lambda path: Enformer.from_pretrained(path, device="cpu"),
    "scGenePT": lambda path: ScGenePT.from_pretrained(path, device="cpu"),
    "gene vectors": GeneVectors.load,
    "ESM-2": lambda path: ESM2.from_pretrained(path, device="cpu"),
}
OURS = [name for name in READERS if name != "ESM-2"]


def use(found) -> None:
    "What one does first with what was read."
    repr(found)
    if isinstance(found, Rosa):
        if found._scores is not None:
            found.scores._repr_html_(), found.scores.to_markdown()
        genes = GeneVectors(["new1", "new2"], np.ones((2, 5), np.float32))
        found.predict(genes)
    if isinstance(found, Enformer):
        found.embed(np.zeros((1, found.bin_size * 8), np.int64))
    if isinstance(found, ESM2):
        found.embed(["MKV"])


def trial(made, folder: Path, thing: str, rounds: int, seed: int = 0) -> None:
    "A saved thing, read with other values in its JSON files."
    made[thing](folder)
    mutate_saved(folder, lambda path: use(READERS[thing](path)), rounds, seed)


@pytest.mark.parametrize("thing", READERS)
def test_json_with_a_value_of_another_type_is_named_or_read(made, tmp_path, thing):
    trial(made, tmp_path / "out", thing, 25)


@pytest.mark.slow
@pytest.mark.parametrize("thing", READERS)
def test_json_with_a_value_of_another_type_is_named_or_read_in_a_long_trial(made, tmp_path, thing):
    trial(made, tmp_path / "out", thing, 1500, seed=1)


def changed(whole: dict, place: str, value) -> dict:
    "The same with one value replaced; `place`: names with dots between."
    *outer, last = place.split(".")
    inner = whole
    for name in outer:
        inner = inner[name]
    inner[last] = value
    return whole


@pytest.mark.parametrize(
    "thing, file, place, value",
    [
        ("rosa, transformer", "config.json", "settings.size.dim", 2**16),
        ("rosa, transformer", "config.json", "settings.size.depth", 1000),
        ("rosa, perceiver", "config.json", "settings.size.latents", 2**16),
        ("rosa", "config.json", "genes", ["A", "B"]),
        ("Enformer", "config.json", "dim", 2**13),
        ("Enformer", "config.json", "depth", 150),
        ("Enformer", "config.json", "output_heads", {"human": 10**6}),
        ("scGenePT", "args.json", "embsize", 2**16),
        ("scGenePT", "args.json", "nlayers", 999),
        ("scGenePT", "args.json", "d_hid", 2**18),
        ("scGenePT", "scgenept.json", "widths", {"ncbi": 2**19}),
        ("ESM-2", "config.json", "hidden_size", 2**15),
        ("ESM-2", "config.json", "num_hidden_layers", 999),
        ("gene vectors", "vectors.json", "width", 10**9),
    ],
)
def test_sizes_are_those_of_the_tensors_before_anything_is_built(made, tmp_path, thing, file, place, value):
    made[thing](tmp_path)
    (tmp_path / file).write_text(json.dumps(changed(json.loads((tmp_path / file).read_text()), place, value)))
    tracemalloc.start()
    try:
        with pytest.raises(AssetError):
            READERS[thing](tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2e8
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("thing", OURS)
def test_a_folder_of_the_user_is_never_replaced_nor_a_file_in_it_overwritten(made, tmp_path, thing):
    before = thesis(tmp_path / "thesis")
    with pytest.raises(StoreError, match="nothing was touched"):
        made[thing](tmp_path / "thesis")
    assert tree(tmp_path / "thesis") == before
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


@pytest.mark.parametrize("thing", OURS)
def test_an_earlier_result_of_the_same_kind_is_replaced_by_the_same_bytes(made, tmp_path, thing):
    made[thing](tmp_path / "out")
    whole = tree(tmp_path / "out")
    made[thing](tmp_path / "out")
    assert tree(tmp_path / "out") == whole


@pytest.mark.parametrize("at", range(4))
def test_a_save_that_was_interrupted_before_one_of_its_files_is_done_again(made, tmp_path, monkeypatch, at):
    from scellfm.scgenept import checkpoint

    calls = iter(range(4))

    def interrupted(write):
        def until(*args, **options):
            if next(calls) == at:
                raise KeyboardInterrupt
            return write(*args, **options)

        return until

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for name in ("atomic_write", "save_tensors"):
            patch.setattr(checkpoint, name, interrupted(getattr(checkpoint, name)))
        made["scGenePT"](tmp_path / "model")
    made["scGenePT"](tmp_path / "model")
    assert READERS["scGenePT"](tmp_path / "model") is not None


@pytest.mark.parametrize("thing", OURS)
def test_a_path_that_can_be_no_output_is_refused_in_words(made, tmp_path, monkeypatch, thing):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious.txt").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    for path in (".", "..", "/", "", "  ", "~nobody-of-that-name/out", "pipe", "a\0b", 3):
        with pytest.raises(OptionError, match="path|folder"):
            made[thing](path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pipe", "precious.txt"]


@pytest.mark.parametrize("thing", READERS)
def test_a_home_folder_is_meant_by_who_writes_and_who_reads(made, tmp_path, monkeypatch, thing):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    made[thing]("~/out" if thing in OURS else tmp_path / "home" / "out")
    use(READERS[thing]("~/out"))
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize("thing", READERS)
@pytest.mark.parametrize("path", ["", "nowhere", "a\0b", 3, None, "pipe", "file"])
def test_what_is_no_folder_of_a_result_is_refused_in_words(tmp_path, monkeypatch, thing, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("mine")
    with warnings.catch_warnings():
        with pytest.raises(ScellfmError):
            READERS[thing](path)


# ---- D18: what a user gives for the path of a file


def genome_files(folder: Path) -> None:
    "A healthy file of each kind."
    (folder / "g.fa").write_text(">chr1\n" + "ACGT" * 400 + "\n")
    (folder / "g.gtf").write_text('chr1\tx\ttranscript\t500\t900\t.\t+\t.\tgene_id "A"; transcript_id "A1";\n')
    (folder / "g.bed").write_text("chr1\t500\t501\tA\t.\t+\n")
    (folder / "v.vcf").write_text(
        "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\nchr1\t501\t.\tA\tC\t.\t.\t.\n"
    )
    (folder / "p.fa").write_text(">P1 gene:A\nMKVLA\n")
    (folder / "t.txt").write_text("index\tdescription\n0\tCAGE:a\n")
    (folder / "x.json").write_text('{"A": "a kinase", "B": "a receptor"}')
    (folder / "vec.json").write_text('{"A": [1.0, 2.0], "B": [0.5, 1.5]}')


def doors() -> dict:
    from scellfm.data import read_vectors
    from scellfm.rosa import read_annotation, read_variants
    from scellfm.rosa.genome import Genome
    from scellfm.rosa.proteins import read_proteins
    from scellfm.rosa.tracks import read_tracks
    from scellfm.scgenept.texts import read_texts

    return {
        "g.fa": Genome,
        "g.gtf": read_annotation,
        "g.bed": read_annotation,
        "v.vcf": read_variants,
        "p.fa": read_proteins,
        "t.txt": read_tracks,
        "x.json": read_texts,
        "vec.json": read_vectors,
    }


@pytest.mark.parametrize("name", doors())
def test_files_of_sequences_and_texts_are_found_in_the_home_folder_and_odd_paths_refused(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    genome_files(tmp_path)
    door = doors()[name]
    assert door(f"~/{name}") is not None
    os.mkfifo(tmp_path / f"pipe.{name.rsplit('.')[-1]}")
    (tmp_path / "folder.d").mkdir()
    for odd in (
        "",
        " ",
        "~nobody-of-that-name/x.fa",
        "a\0b",
        f"pipe.{name.rsplit('.')[-1]}",
        "folder.d",
        "nowhere.fa",
        3,
        b"x",
    ):
        with pytest.raises(ScellfmError):
            door(odd)


@pytest.mark.parametrize("name", doors())
def test_damaged_files_of_sequences_and_texts_are_named(tmp_path, name):
    genome_files(tmp_path)
    whole, rng = (tmp_path / name).read_bytes(), np.random.default_rng(0)
    changed = [
        b"",
        b"\xff\xfe\x00",
        whole[:7],
        whole[: len(whole) // 2],
        b"\0" * 50,
        whole[::-1],
        b"PK\x03\x04" + whole,
    ]
    for _ in range(60):
        broken = bytearray(whole)
        broken[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        changed.append(bytes(broken))
    for broken in changed:
        (tmp_path / name).write_bytes(broken)
        for old in tmp_path.glob("*.fai"):
            old.unlink()
        try:
            repr(doors()[name](tmp_path / name))
        except ScellfmError:
            continue
        except BaseException as error:
            raise AssertionError(f"{name} with {broken[:200]!r}") from error


# ---- B, D: what users bring to the newer wings


@pytest.fixture(scope="module")
def perturbed():
    simulated = simulate_perturbations(n_targets=10, n_pairs=4, n_genes=40, n_modules=3, n_cells=8, n_controls=20)
    return simulated.adata, PerturbationData(simulated.adata), simulated.vectors["know"]


SMALL = dict(d_model=16, n_heads=2, d_hid=16, n_layers=1, device="cpu")


def test_what_is_no_perturbation_data_is_named(perturbed, tmp_path):
    adata, data, vectors = perturbed
    model = ScGenePT.from_config("tiny", data, knowledge="ncbi", gene_vectors=vectors, **SMALL)
    deal = data.split("simulation", seed=1)
    for wrong in (None, [1], 3):
        with pytest.raises(OptionError, match="AnnData"):
            PerturbationData(wrong)
        with pytest.raises(OptionError, match="genes is a|list of gene names"):
            ScGenePT.from_config("tiny", wrong if wrong != [1] else "cells.h5ad", **SMALL)
    for ask in (model.fit, model.evaluate):
        with pytest.raises(OptionError, match="split is of the type NoneType"):
            ask(data)
        with pytest.raises(OptionError, match=r"PerturbationData\(adata\)"):
            ask(adata, deal)
    for wrong in (None, [], "FOSB"):
        with pytest.raises(OptionError, match="list of names|several values: 'A'"):
            model.predict(wrong)
    numbered = adata.copy()
    numbered.var_names = [str(i) for i in range(numbered.n_vars)]
    with pytest.raises(DataError, match="integers"):
        PerturbationData(numbered)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    assert PerturbationData(tmp_path / "cells.h5ad").genes.equals(data.genes)


def test_numbers_of_numpy_become_plain_settings_of_the_newer_wings(perturbed, tmp_path):
    adata, data, vectors = perturbed
    model = ScGenePT.from_config("tiny", data, knowledge="ncbi", gene_vectors=vectors, seed=np.int64(3), **SMALL)
    how = dict(epochs=np.int64(1), batch_size=np.int32(32), seed=np.uint8(2))
    model.fit(data, data.split("simulation", seed=np.int64(1)), **how).save_pretrained(tmp_path / "scgenept")
    assert type(ScGenePT.from_pretrained(tmp_path / "scgenept").settings["seed"]) is int
    rosa = fit_rosa(None, kind="mlp", n_bins=np.int64(8), read=np.int32(30), class_weights=np.True_, seed=np.int64(1))
    rosa.save_pretrained(tmp_path / "rosa")
    assert Rosa.from_pretrained(tmp_path / "rosa").settings == rosa.settings


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5])
def test_a_seed_that_no_library_takes_is_refused_by_the_newer_wings(perturbed, seed):
    adata, data, vectors = perturbed
    for ask in (
        lambda: ScGenePT.from_config("tiny", data, knowledge="ncbi", gene_vectors=vectors, seed=seed, **SMALL),
        lambda: data.split("simulation", seed=seed),
        lambda: Rosa("ridge", seed=seed),
        lambda: hold_out_grid(expressed(), seed=seed),
    ):
        with pytest.raises(OptionError, match="seed"):
            ask()


def test_rosa_takes_a_path_raw_counts_and_nullable_groups_and_names_the_rest(tmp_path):
    whole, vectors = expressed(), described()
    grid = hold_out_grid(whole, cells="donor", seed=1)
    plain = Rosa("ridge").fit(whole, vectors, grid).fitted.weights
    whole.write_h5ad(tmp_path / "cells.h5ad")
    part = whole[:, np.random.default_rng(0).permutation(60)].copy()
    part.raw = whole
    for given, layer in ((tmp_path / "cells.h5ad", None), (str(tmp_path / "cells.h5ad"), None), (part, "raw")):
        np.testing.assert_array_equal(Rosa("ridge").fit(given, vectors, grid, layer=layer).fitted.weights, plain)
    for wrong in (None, [1, 2], 3):
        for ask in (lambda: Rosa("ridge").fit(wrong, vectors, grid), lambda: hold_out_grid(wrong)):
            with pytest.raises(OptionError, match="AnnData"):
                ask()
    whole.obs["ill"] = pd.array([True, False] * 20, dtype="boolean")
    parts = hold_out_grid(whole, cells="ill", seed=1).cell_part
    assert set(parts[::2]) | set(parts[1::2]) == {"train", "test"} and len(set(parts[::2])) == 1
    numbered = whole.copy()
    numbered.var_names = [str(i) for i in range(60)]
    with pytest.raises(DataError, match="gene_column="):
        hold_out_grid(numbered)
