"""Folders of scGenePT, rosa and their encoders: nothing of the user's is lost, and damage is named where it is read."""

import json
import os
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from fuzz_readers import json_mutated
from test_public_reports_resumed import fit_rosa
from test_public_reports_runs import thesis, tree

from scellfm.core import AssetError, OptionError, ScellfmError, StoreError
from scellfm.data import GeneVectors, simulate_perturbations
from scellfm.rosa import ESM2, Enformer, Rosa
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
    "Read a saved thing again and again, each time with one value of one of its JSON files replaced."
    made[thing](folder)
    use(READERS[thing](folder))
    files, rng = sorted(folder.rglob("*.json")), np.random.default_rng(seed)
    for _ in range(rounds):
        file = files[int(rng.integers(len(files)))]
        whole = file.read_bytes()
        file.write_bytes(json_mutated(whole, rng))
        try:
            use(READERS[thing](folder))
        except ScellfmError:
            pass
        except BaseException as error:
            raise AssertionError(f"{file.name} with {file.read_text()[:500]}") from error
        finally:
            file.write_bytes(whole)


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
