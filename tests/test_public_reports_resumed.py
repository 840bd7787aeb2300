"""Runs of the newer wings that go on from a folder: only from their own parts, whatever was changed meanwhile."""

from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
from rosa_models import lively
from scipy import sparse

from scellfm.core import StoreError
from scellfm.data import GeneVectors, simulate_perturbations
from scellfm.geneformer import Geneformer, RankTokenizer
from scellfm.rosa import Enformer, Rosa, embed_bins, embed_genes, hold_out_grid, tss_windows, variant_effect
from scellfm.scgenept import PerturbationData, ScGenePT

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTH = 2048


def refused(run, folder, before: dict, changes: dict):
    "Each change alone is refused by the folder that `run(**before)` wrote; without one the folder serves."
    run(folder=folder, **before)
    for name, change in changes.items():
        with pytest.raises(StoreError, match="another run|other inputs"):
            run(folder=folder, **before | change)
            pytest.fail(f"{name} was changed and the old result came back")
    run(folder=folder, **before)


# ---- rosa: from vectors to expression

GENES = [f"G{i:02d}" for i in range(60)]
TINY = {"dim": 16, "heads": 2, "dim_head": 8, "depth": 1, "latents": 4, "latent_dim": 8, "dropout": 0.0}


def expressed(seed: int = 0) -> anndata.AnnData:
    obs = pd.DataFrame({"donor": [f"d{i % 4}" for i in range(40)]}, index=[f"c{i}" for i in range(40)])
    counts = np.random.default_rng(seed).poisson(2.0, (40, 60)).astype(np.float32)
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=GENES))


def shuffled(adata: anndata.AnnData) -> anndata.AnnData:
    "The counts of each gene dealt to other cells: means and numbers stay, the numbers of a cell do not."
    changed, rng = adata.copy(), np.random.default_rng(5)
    changed.X = sparse.csr_matrix(np.column_stack([rng.permutation(column) for column in adata.X.toarray().T]))
    return changed


def described(seed: int = 0) -> GeneVectors:
    return GeneVectors(GENES, np.random.default_rng(seed).normal(size=(60, 5)).astype(np.float32), None, {})


def fit_rosa(folder, kind="transformer", adata=None, vectors=None, grid=1, recipe=None, **settings):
    adata = expressed() if adata is None else adata
    with_layer = adata.copy()
    with_layer.layers["other"] = shuffled(adata).X
    layer = settings.pop("layer", None)
    how = dict(loss="mse", size=TINY, asked=12, read=30) | settings
    model = Rosa(kind, device="cpu", **how)
    grid = hold_out_grid(expressed(), cells="donor", seed=grid)
    recipe = {"epochs": 1, "batch_size": 8} | (recipe or {})
    return model.fit(with_layer, vectors or described(), grid, layer=layer, folder=folder, **recipe)


@pytest.mark.parametrize("kind", ["mlp", "transformer", "encoder_decoder", "performer", "perceiver"])
def test_a_rosa_goes_on_only_from_its_own_training(tmp_path, kind):
    changes = {
        "counts": {"adata": shuffled(expressed())},
        "layer": {"layer": "other"},
        "vectors": {"vectors": described(1)},
        "cells and genes held out": {"grid": 2},
        "learning rate": {"recipe": {"learning_rate": 0.01}},
        "seed": {"seed": 3},
    }
    if kind == "transformer":
        changes |= {name: {name: value} for name, value in (("asked", 10), ("read", 20), ("normalise", "all"))}
        changes |= {"n_bins": {"n_bins": 5}, "loss": {"loss": "poisson"}, "size": {"size": TINY | {"dropout": 0.2}}}
    refused(fit_rosa, tmp_path / "run", {"kind": kind}, changes)


# ---- rosa: from DNA to vectors, coverage and effects


def genome_of(folder, seed: int = 0):
    letters = "".join(np.random.default_rng(seed).choice(list("ACGT"), 6000))
    path = folder / f"genome{seed}.fa"
    path.write_text(f">chr1\n{letters}\n")
    return path, letters


def starts() -> pd.DataFrame:
    rows = [("A", "+", 2500, 3500), ("B", "-", 1200, 2900), ("C", "+", 5900, 5990)]
    genes = pd.DataFrame(rows, columns=["gene", "strand", "start", "end"])
    return genes.assign(transcript=genes["gene"] + ".1", chrom="chr1", biotype="protein_coding")


@pytest.fixture
def windows(tmp_path):
    return {seed: tss_windows(starts(), genome_of(tmp_path, seed)[0], length=LENGTH) for seed in (0, 1)}


@pytest.fixture(scope="module")
def enformers():
    return {seed: lively(seed, target_length=8) for seed in (1, 2)}


def test_vectors_of_genes_go_on_only_from_their_own(tmp_path, windows, enformers):
    changes = {
        "another genome": {"windows": windows[1]},
        "other ends": {"windows": replace(windows[0], pad=".")},
        "another model": {"model": enformers[2]},
        "strands": {"strands": "both"},
        "shifts": {"shifts": (0, 1)},
    }
    before = {"windows": windows[0], "model": enformers[1]}
    refused(embed_bins, tmp_path / "bins", before, changes)
    changes |= {"rule": {"rule": "tss"}, "tracks": {"tracks": 0}, "block": {"block": 2}}
    refused(embed_genes, tmp_path / "genes", before, changes)


def test_what_a_killed_writer_of_bins_left_is_swept(tmp_path, windows, enformers):
    bins = embed_bins(windows[0], model=enformers[1], folder=tmp_path / "run")
    (bins / "c" / "0" / "0.1f2e.partial").write_bytes(b"half a chunk")  # as zarr names what it writes
    again = embed_bins(windows[0], model=enformers[1], folder=tmp_path / "run")
    assert again == bins and not list(bins.rglob("*.partial"))


def test_effects_of_variants_go_on_only_from_their_own(tmp_path, windows, enformers):
    _, letters = genome_of(tmp_path)
    variants = pd.DataFrame({"chrom": "chr1", "pos": [2510, 2600], "ref": [letters[2509], letters[2599]]})
    variants["alt"] = ["CA"[base == "C"] for base in variants["ref"]]
    others = variants.assign(alt=["GT"[base == "G"] for base in variants["ref"]])
    changes = {
        "other alleles": {"variants": others},
        "fewer": {"variants": variants[:1]},
        "another model": {"model": enformers[2]},
        "other ends": {"windows": replace(windows[0], pad=".")},
        "around": {"around": "variant"},
        "width": {"width": 129},
        "tracks": {"tracks": 0},
        "strands": {"strands": "forward"},
        "shifts": {"shifts": (0, 1)},
    }
    before = {"variants": variants, "windows": windows[0], "model": enformers[1]}
    refused(variant_effect, tmp_path / "effects", before, changes)


def test_an_enformer_goes_on_only_from_its_own_training(tmp_path):
    rng = np.random.default_rng(0)
    codes, targets = rng.integers(0, 4, (4, 1024)), rng.poisson(2.0, (4, 4, 4)).astype(np.float32)
    judged = (codes[:2], targets[:2])

    def train(folder, model=0, windows=codes, targets=targets, valid=judged, **how):
        enformer = Enformer.from_config("tiny", device="cpu", seed=model, target_length=4)
        targets = targets[:, :, : enformer.heads["human"]]
        valid = valid and (valid[0], valid[1][:, :, : enformer.heads["human"]])
        return enformer.fit(windows, targets, valid=valid, folder=folder, **{"epochs": 1, "batch_size": 2} | how)

    head = Enformer.from_config("tiny", device="cpu").heads["human"]
    targets = rng.poisson(2.0, (4, 4, head)).astype(np.float32)
    judged = (codes[:2], targets[:2])
    changes = {
        "windows": {"windows": codes[::-1].copy()},
        "targets": {"targets": targets[::-1].copy()},
        "judged windows": {"valid": (codes[2:], targets[:2])},
        "judged targets": {"valid": (codes[:2], targets[2:])},
        "nothing judged": {"valid": None},
        "weights": {"model": 1},
        "augment": {"augment": False},
        "rate": {"learning_rate": 0.3},
    }
    refused(train, tmp_path / "run", {"targets": targets, "valid": judged}, changes)


# ---- scGenePT


@pytest.fixture(scope="module")
def perturbed():
    return simulate_perturbations(n_targets=10, n_pairs=4, n_genes=40, n_modules=3, n_cells=8, n_controls=20)


def test_a_scgenept_goes_on_only_from_its_own_training(tmp_path, perturbed):
    small = dict(d_model=16, n_heads=2, d_hid=16, n_layers=1, device="cpu")

    def exchanged(adata):
        "Two perturbations under each other's names, their cells as before."
        changed = adata.copy()
        first, second = [name for name in pd.unique(adata.obs["condition"].astype(str)) if name != "ctrl"][:2]
        names = {first: second, second: first}
        changed.obs["condition"] = [names.get(name, name) for name in adata.obs["condition"].astype(str)]
        return changed

    def other(adata):
        changed, rng = adata.copy(), np.random.default_rng(0)
        values = sparse.csr_matrix(changed.X)
        values.data = rng.permutation(values.data)
        changed.X = values
        return changed

    def renamed(adata):
        changed = adata.copy()
        changed.obs_names = [f"other{i}" for i in range(changed.n_obs)]
        return changed

    def fit(folder, adata=perturbed.adata, split=("simulation", 1), vectors=perturbed.vectors["know"], model=(), **how):
        data = PerturbationData(adata)
        made = dict(knowledge="ncbi", gene_vectors=vectors, **small | dict(model))
        scgenept = ScGenePT.from_config("tiny", data, **made)
        options = dict(epochs=1, batch_size=32, max_genes=30) | how
        return scgenept.fit(data, data.split(split[0], seed=split[1]), folder=folder, **options)

    values = perturbed.vectors["know"]
    changes = {
        "other counts": {"adata": other(perturbed.adata)},
        "names exchanged": {"adata": exchanged(perturbed.adata)},
        "cells of other names": {"adata": renamed(perturbed.adata)},
        "split": {"split": ("simulation", 2)},
        "vectors": {"vectors": GeneVectors(values.genes, values.values[::-1].copy(), None, {})},
        "heads": {"model": {"n_heads": 4}},
        "dropout of the model": {"model": {"dropout": 0.4}},
        "frozen tables": {"model": {"freeze_language": True}},
        "seed of the weights": {"model": {"seed": 3}},
        "original": {"model": {"original": True}},
    }
    settings = dict(max_genes=20, dropout=0.3, attention_dropout=0.0, seed=5, learning_rate=0.01, epochs=2)
    settings |= dict(batch_size=16, patience=3, decay=0.5, clip=0.3, accumulate=2, warmup=0.2, weight_decay=0.1)
    refused(fit, tmp_path / "run", {}, changes | {name: {name: value} for name, value in settings.items()})


# ---- a search of settings


def test_a_search_notes_nothing_of_other_cells(tmp_path):
    pytest.importorskip("optuna")
    from scellfm.data import folds

    obs = pd.DataFrame({"kind": ["B", "T"] * 20, "donor": [f"d{i // 10}" for i in range(40)]})
    obs.index = [f"c{i}" for i in range(40)]
    counts = np.random.default_rng(0).poisson(2.0, (40, 60)).astype(np.float32)
    adata = anndata.AnnData(
        sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(60)])
    )
    tok = RankTokenizer.fit(adata)

    def search(cells, folder):
        gf = Geneformer.from_config("tiny", tok, device="cpu")
        how = dict(split=folds(adata, by="donor", k=2), trials=2, space={"learning_rate": (1e-4, 1e-2)}, n_boot=0)
        return gf.search(cells, "kind", folder=folder, **how).trials

    first = search(adata, tmp_path / "run")
    for donor in ("d0", "d1", "d2", "d3"):  # of each fold one donor is learned from and one judges the trials
        changed, here = adata.copy(), (adata.obs["donor"] == donor).to_numpy()
        values = changed.X.toarray()
        values[here] = values[here][:, ::-1]
        changed.X = sparse.csr_matrix(values)
        (tmp_path / donor).mkdir()
        (tmp_path / donor / "trials.json").write_bytes((tmp_path / "run" / "trials.json").read_bytes())
        found = search(changed, tmp_path / donor)
        pd.testing.assert_frame_equal(found, search(changed, None))
    pd.testing.assert_frame_equal(first, search(adata, tmp_path / "run"))
