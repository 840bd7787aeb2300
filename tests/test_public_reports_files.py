"""Files that people bring: damaged, old, hostile or merely unusual. Named and refused, or read as what they are."""

import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from scipy import sparse

from scellfm.core import AssetError, DataError, ExtraError, OptionError, ScellfmError
from scellfm.data.reading import count_blocks, count_matrix, read
from scellfm.geneformer import RankTokenizer

GENES = [f"ENSG{i:011d}" for i in range(30)]


def cells(n=24, seed=0):
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical(rng.choice(["B", "T", "NK"], n)), "donor": [f"d{i % 3}" for i in range(n)]},
        index=[f"cell{i}" for i in range(n)],
    )
    counts = sparse.csr_matrix(rng.poisson(1.0, (n, len(GENES))).astype(np.float32))
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=GENES))


@pytest.fixture(scope="module")
def tokenizer():
    return RankTokenizer.fit(cells())


def stored(path, kind, form):
    adata = cells()
    adata.X = adata.X.asformat(form)
    if kind == "zarr":
        pytest.importorskip("zarr")
        adata.write_zarr(path)
    else:
        adata.write_h5ad(path)
    return path


def change(path, name, edit):
    "Write the edited values of one array of a file back into it."
    if path.is_dir():
        import zarr

        group = zarr.open_group(path, mode="r+")
    else:
        group = h5py.File(path, "r+")
    values = edit(group[name][:])
    if values.shape != group[name].shape:
        del group[name]
        group.create_dataset(name, data=values) if not path.is_dir() else group.create_array(name, data=values)
    else:
        group[name][:] = values
    getattr(group, "close", lambda: None)()


def flip(at, bit):
    def edit(values):
        values = values.copy()
        values[at] ^= values.dtype.type(-(2**31) if bit == 31 else 1 << bit)
        return values

    return edit


FAULTS = {
    "an index beyond the last gene": ("X/indices", flip(7, 20)),
    "an index beyond the last gene by one bit": ("X/indices", flip(7, 5)),
    "a negative index": ("X/indices", flip(7, 31)),
    "offsets that fall": ("X/indptr", flip(3, 10)),
    "an offset beyond the entries": ("X/indptr", flip(-1, 12)),
    "offsets that begin late": ("X/indptr", flip(0, 0)),
    "offsets for fewer rows": ("X/indptr", lambda values: values[:16]),
}


@pytest.mark.parametrize("form", ["csr", "csc"])
@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_sparse_matrix_with_a_flipped_bit_is_refused_by_every_reader(tmp_path, tokenizer, fault, kind, form):
    path = stored(tmp_path / f"cells.{kind}", kind, form)
    name, edit = FAULTS[fault]
    change(path, name, edit)
    for opened in (
        read,
        lambda path: list(count_blocks(path)),
        tokenizer,
        lambda path: tokenizer.tokenize_files(path, tmp_path / "out"),
        RankTokenizer.fit,
    ):
        with pytest.raises(DataError, match="damaged|cannot be read"):
            opened(path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["csr", "csc", "coo"])
@pytest.mark.parametrize("place", ["X", "layer", "raw", "view"])
def test_a_damaged_matrix_in_memory_is_refused_before_a_compiled_loop(tokenizer, form, place):
    good, bad = cells(), cells().X.asformat(form)
    (bad.col if form == "coo" else bad.indices)[5] = 28270
    if form == "coo":
        with pytest.raises(DataError, match="28270"):
            from scellfm.data.matrices import slices

            list(slices(bad, 4))
        return
    if place == "layer":
        good.layers["counts"] = bad
    elif place == "raw":
        raw = cells()
        raw.X = bad
        good.raw = raw
    else:
        good.X = bad
    given = good[2:20] if place == "view" else good
    layer = {"layer": "counts", "raw": "raw"}.get(place)
    for opened in (lambda: count_matrix(given, layer), lambda: tokenizer(given, layer=layer)):
        with pytest.raises(DataError, match="28270"):
            opened()


def test_a_matrix_whose_shape_is_not_that_of_its_tables_is_refused(tmp_path, tokenizer):
    path = stored(tmp_path / "cells.h5ad", "h5ad", "csr")
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = [24, 29]
    for opened in (lambda: list(count_blocks(path)), lambda: tokenizer(path), lambda: read(path)):
        with pytest.raises(DataError):
            opened()


def test_indices_of_a_10x_file_are_checked(tmp_path):
    from scipy.sparse import csr_matrix

    counts = csr_matrix(np.random.default_rng(0).poisson(1.0, (6, 5)))
    with h5py.File(tmp_path / "tenx.h5", "w") as file:
        for name in ("data", "indices", "indptr"):
            file[f"matrix/{name}"] = getattr(counts, name)
        file["matrix/shape"] = [5, 6]
        file["matrix/barcodes"] = [f"C{i}" for i in range(6)]
        for name in ("id", "name"):
            file[f"matrix/features/{name}"] = [f"G{i}" for i in range(5)]
        file["matrix/features/feature_type"] = ["Gene Expression"] * 4 + ["Antibody Capture"]
    assert read(tmp_path / "tenx.h5").shape == (6, 4)
    change(tmp_path / "tenx.h5", "matrix/indices", flip(3, 20))
    with pytest.raises(DataError, match="tenx.h5: matrix is damaged: indices is"):
        read(tmp_path / "tenx.h5")


@pytest.mark.parametrize("dtype", ["uint64", "int64"])
def test_sums_of_64_bit_counts_do_not_overflow(dtype):
    from scellfm.data.matrices import row_sums

    large = sparse.csr_matrix(np.full((2, 4), 2**62, dtype=dtype))
    assert (row_sums(large) == 2.0**64).all()


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">i4", ">u2"])
def test_numbers_of_the_other_byte_order_are_read(tmp_path, tokenizer, dtype):
    adata = cells()
    plain = tokenizer(adata).tokens
    adata.X = adata.X.toarray().astype(dtype)
    assert (tokenizer(adata).tokens == plain).all()
    path = stored(tmp_path / "cells.h5ad", "h5ad", "csr")
    with h5py.File(path, "r+") as file:
        values = file["X/data"][:].astype(dtype)
        del file["X/data"]
        file["X/data"] = values
    assert (tokenizer(path).tokens == plain).all()


def test_a_file_of_cells_that_reads_other_files_is_refused(tmp_path, tokenizer):
    (tmp_path / "secret").write_bytes(b"a private note, 24 bytes")
    for way in ("external", "link", "virtual"):
        path = stored(tmp_path / f"{way}.h5ad", "h5ad", "csr")
        with h5py.File(path, "r+") as file, h5py.File(tmp_path / "other.h5", "w") as other:
            other["notes"] = np.arange(24)
            del file["obs/donor"]
            if way == "external":
                file.create_dataset("obs/donor", (24,), "u1", external=[(str(tmp_path / "secret"), 0, 24)])
            elif way == "link":
                file["obs/donor"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "notes")
            else:
                layout = h5py.VirtualLayout((24,), "i8")
                layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "notes", (24,))
                file.create_virtual_dataset("obs/donor", layout)
        for opened in (read, lambda path: tokenizer(path, columns=["donor"])):
            with pytest.raises(DataError, match="nothing was read"):
                opened(path)


def test_a_zarr_store_is_searched_behind_links_and_may_not_lead_out(tmp_path):
    import json

    pytest.importorskip("zarr")
    path = stored(tmp_path / "cells.zarr", "zarr", "csr")
    inside = path / "hidden"
    (inside / "X").mkdir(parents=True)
    (inside / "X" / ".zarray").write_text(json.dumps({"filters": [{"id": "Pickle"}]}))
    (tmp_path / "elsewhere").mkdir()
    for name, target, words in (
        ("linked", inside / "X", "nothing was executed"),
        ("out", tmp_path / "elsewhere", "leads out"),
    ):
        (path / name).symlink_to(target)
        with pytest.raises(DataError, match=words):
            read(path)
        (path / name).unlink()
        if name == "linked":
            (inside / "X" / ".zarray").unlink()
    assert read(path).n_obs == 24


def test_an_array_that_claims_more_than_it_stores_is_refused_before_memory_is_asked_for(tmp_path):
    path = stored(tmp_path / "cells.h5ad", "h5ad", "csr")
    with h5py.File(path, "r+") as file:
        file.create_dataset("obsm/X_big", (24, 2**36), "f8", chunks=(1, 2**10))
    with pytest.raises(DataError, match="claims"):
        read(path)


def test_an_anndata_that_was_named_h5_is_read(tmp_path, tokenizer):
    path = stored(tmp_path / "cells.h5", "h5ad", "csr")
    assert read(path).n_obs == 24 and sum(block.shape[0] for _, block in count_blocks(path)) == 24
    assert (tokenizer(path).tokens == tokenizer(cells()).tokens).all()


@pytest.mark.parametrize("form", ["csr", "dense"])
def test_a_file_of_anndata_0_5_is_read_by_every_reader_with_its_labels(tmp_path, tokenizer, form):
    adata, path = cells(), tmp_path / "cells.h5ad"
    kinds = adata.obs["cell_type"].cat
    obs = list(zip([name.encode() for name in adata.obs_names], kinds.codes))
    with h5py.File(path, "w") as file:  # tables as compound types, categories in uns, a sparse matrix as h5sparse
        if form == "csr":
            group = file.create_group("X")
            group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = b"csr", np.array(adata.shape)
            for name in ("data", "indices", "indptr"):
                group[name] = getattr(adata.X, name)
        else:
            file["X"] = adata.X.toarray()
        file["obs"] = np.array(obs, dtype=[("index", "S8"), ("cell_type", "i1")])
        file["var"] = np.array([(gene.encode(),) for gene in GENES], dtype=[("index", "S16")])
        file["uns/cell_type_categories"] = np.array([name.encode() for name in kinds.categories])
    wanted = adata.obs["cell_type"].astype(str).tolist()
    by_path = tokenizer(path, columns=["cell_type"])
    assert (by_path.tokens == tokenizer(adata).tokens).all()
    for obs in (read(path).obs, by_path.obs):
        assert obs["cell_type"].astype(str).tolist() == wanted and list(obs.index) == list(adata.obs_names)
    assert RankTokenizer.fit(path).token_dictionary == tokenizer.token_dictionary


def test_a_file_of_molecules_and_one_of_two_genomes_say_what_they_are(tmp_path):
    with h5py.File(tmp_path / "molecule_info.h5", "w") as file:
        for name in ("barcode_idx", "feature_idx", "umi", "count", "gem_group"):
            file[name] = np.arange(3)
    with pytest.raises(DataError, match="molecules.*filtered_feature_bc_matrix.h5"):
        read(tmp_path / "molecule_info.h5")
    with h5py.File(tmp_path / "two.h5", "w") as file:
        for genome in ("hg19", "mm10"):
            for name in ("data", "indices"):
                file[f"{genome}/{name}"] = [1, 2]
            file[f"{genome}/indptr"], file[f"{genome}/shape"] = [0, 1, 2], [3, 2]
            file[f"{genome}/barcodes"], file[f"{genome}/genes"] = ["A", "B"], [f"{genome}_{i}" for i in range(3)]
            file[f"{genome}/gene_names"] = ["X", "Y", "Z"]
    with pytest.raises(DataError, match=r"2 genomes.*'hg19', 'mm10'.*genome="):
        read(tmp_path / "two.h5")
    assert read(tmp_path / "two.h5", genome="mm10").var["gene_ids"].iloc[0] == "mm10_0"
    with pytest.raises(OptionError, match="there is"):
        read(tmp_path / "two.h5", genome="mm9")


def test_a_compression_that_is_not_installed_is_named_with_what_to_install(tmp_path, monkeypatch):
    import importlib

    path = stored(tmp_path / "cells.h5ad", "h5ad", "csr")
    real = importlib.import_module

    def absent(name, *args):
        if name == "hdf5plugin":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", absent)
    with h5py.File(path, "r+") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((4,))
        plist.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
        space = h5py.h5s.create_simple((24,))
        h5py.h5d.create(file["obs"].id, b"dose", h5py.h5t.NATIVE_INT32, space, plist)
    with pytest.raises(ExtraError, match="hdf5plugin"):
        read(path)


def write_sample(folder, prefix, n, columns=3, gene_file="features.tsv", zipped=()):
    import gzip

    from scipy.io import mmwrite

    counts = np.random.default_rng(n).poisson(1.0, (n, 5))
    mmwrite(folder / f"{prefix}matrix.mtx", sparse.coo_matrix(counts.T))
    rows = [[f"ENSG{i:011d}", f"SYM{i}", "Gene Expression"] for i in range(5)]
    picked = [row[1:2] if columns == 1 else row[:columns] for row in rows]
    (folder / f"{prefix}{gene_file}").write_text("".join("\t".join(row) + "\n" for row in picked))
    (folder / f"{prefix}barcodes.tsv").write_text("".join(f"C{i}-1\n" for i in range(n)))
    for name in zipped:
        path = folder / f"{prefix}{name}"
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    return counts


def test_several_samples_in_one_folder_are_listed_and_read_one_by_one_or_all(tmp_path):
    counts = {name: write_sample(tmp_path, name, n) for name, n in (("GSM1_a_", 3), ("GSM2_b_", 4), ("GSM3_c_", 2))}
    with pytest.raises(DataError, match=r"3 samples.*'GSM1_a_', 'GSM2_b_', 'GSM3_c_'.*prefix="):
        read(tmp_path)
    for name, expected in counts.items():
        assert (read(tmp_path, prefix=name).X.toarray() == expected).all()
    whole = read(tmp_path, prefix="all")
    assert (whole.X.toarray() == np.vstack([*counts.values()])).all() and whole.obs_names.is_unique
    assert whole.obs["sample"].value_counts().to_dict() == {"GSM1_a": 3, "GSM2_b": 4, "GSM3_c": 2}
    assert "ensembl_id" in whole.var
    with pytest.raises(OptionError, match="GSM9"):
        read(tmp_path, prefix="GSM9")


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("gene_file", ["genes.tsv", "features.tsv"])
@pytest.mark.parametrize("zipped", [(), "genes", "all"])
def test_healthy_10x_folders_of_every_form_are_read(tmp_path, columns, gene_file, zipped):
    packed = {"genes": (gene_file,), "all": (gene_file, "barcodes.tsv", "matrix.mtx")}.get(zipped, ())
    counts = write_sample(tmp_path, "", 4, columns, gene_file, packed)
    adata = read(tmp_path)
    assert (adata.X.toarray() == counts).all() and list(adata.var_names) == [f"SYM{i}" for i in range(5)]
    assert list(adata.obs_names) == [f"C{i}-1" for i in range(4)]
    assert ("ensembl_id" in adata.var) == (columns > 1)


def test_a_home_folder_is_found_and_an_empty_path_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    stored(tmp_path / "cells.h5ad", "h5ad", "csr")
    assert read("~/cells.h5ad").n_obs == 24 and next(count_blocks("~/cells.h5ad"))[1].shape == (24, 30)
    for given in ("", "~nobody-at-all/x.h5ad", 3, b"cells.h5ad"):
        with pytest.raises((OptionError, DataError)):
            read(given)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "cells.h5ad")
    with pytest.raises(DataError, match="pipe"):
        read(tmp_path / "cells.h5ad")


def test_messages_hold_no_control_sequences():
    import scellfm.core as core

    for kind in (core.DataError, core.StoreError, core.ExtraError):
        assert str(kind("cell '\x1b[2J\x07\ud800'")) == r"cell '\x1b[2J\x07\ud800'"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        core.warn("gene '\x1b[31mX'")
    assert str(caught[0].message) == r"gene '\x1b[31mX'"
    assert issubclass(core.DataError, ScellfmError)


def best_of(call, times: int = 5) -> float:
    "The least processor time of several calls, in seconds."
    import time

    found = []
    for _ in range(times):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


@pytest.mark.parametrize("kind", ["memory", "h5ad"])
def test_looking_at_the_indices_costs_less_than_three_hundredths(tmp_path, monkeypatch, kind):
    import scellfm.data.matrices as matrices

    rng = np.random.default_rng(0)
    counts = sparse.random(4000, 3000, density=0.1, format="csr", dtype=np.float32, random_state=0)
    counts.data[:] = rng.integers(1, 9, counts.nnz)
    genes = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(3000)])
    adata = anndata.AnnData(counts, obs=pd.DataFrame(index=[f"c{i}" for i in range(4000)]), var=genes)
    tok, spent = RankTokenizer.fit(adata), {"checks": 0.0}
    given = adata
    if kind == "h5ad":
        adata.write_h5ad(tmp_path / "cells.h5ad")
        given = tmp_path / "cells.h5ad"

    def timed(function):
        import time

        def with_time(*args, **options):
            start = time.process_time()
            try:
                return function(*args, **options)
            finally:
                spent["checks"] += time.process_time() - start

        return with_time

    for name in ("offsets_fault", "indices_fault"):
        monkeypatch.setattr(matrices, name, timed(getattr(matrices, name)))
    shares = []
    for _ in range(5):
        spent["checks"] = 0.0
        whole = best_of(lambda: tok(given), 1)
        shares.append(spent["checks"] / whole)
    assert 0 < min(shares) < 0.03, shares


# ---- D18: one place turns what a user gives into a path


def test_one_place_turns_what_a_user_gives_into_a_path():
    found = [path.name for path in (ROOT / "scellfm").rglob("*.py") if ".expanduser(" in path.read_text()]
    assert found == ["core.py"]


NOBODY = "~nobody-of-that-name/x"


def test_a_home_folder_of_nobody_is_named_by_every_door(tmp_path):
    from scellfm import atlas, data, geneformer, rosa, scgenept, scgpt

    tok = geneformer.RankTokenizer.fit(cells())
    gf = geneformer.Geneformer.from_config("tiny", tok, device="cpu")
    perturbed = scgenept.PerturbationData(
        data.simulate_perturbations(n_targets=6, n_pairs=2, n_genes=20, n_modules=2, n_cells=3).adata
    )
    doors = {
        "read": lambda: data.read(NOBODY),
        "vectors": lambda: data.read_vectors(NOBODY),
        "tokenizer": lambda: geneformer.RankTokenizer.from_pretrained(NOBODY),
        "fit": lambda: geneformer.RankTokenizer.fit(NOBODY),
        "model": lambda: geneformer.Geneformer.from_pretrained(NOBODY),
        "embed": lambda: gf.embed(NOBODY),
        "pretrain": lambda: gf.pretrain(NOBODY),
        "perturb": lambda: gf.perturb(NOBODY),
        "original": lambda: geneformer.Screen.from_original(NOBODY, tok),
        "classifier": lambda: geneformer.CellClassifier.from_pretrained(NOBODY),
        "scGPT": lambda: scgpt.ScGPT.from_pretrained(NOBODY),
        "map": lambda: scgpt.ReferenceMap.load(NOBODY),
        "Perturb-seq": lambda: scgenept.PerturbationData.load("norman", root=NOBODY),
        "published": lambda: scgenept.fetch_model("ncbi", "norman", NOBODY),
        "reproduce": lambda: scgenept.reproduce(perturbed, NOBODY, {}, tmp_path / "runs", seeds=(1,)),
        "reproduce into": lambda: scgenept.reproduce(perturbed, tmp_path, {}, NOBODY),
        "scGenePT": lambda: scgenept.ScGenePT.from_pretrained(NOBODY),
        "annotation": lambda: rosa.read_annotation(NOBODY),
        "variants": lambda: rosa.read_variants(NOBODY, None),
        "rosa": lambda: rosa.Rosa.from_pretrained(NOBODY),
        "Enformer": lambda: rosa.Enformer.from_pretrained(NOBODY),
        "proteins": lambda: rosa.read_proteins(NOBODY),
        "atlas": lambda: atlas.run("embed", NOBODY, model=tmp_path, out=tmp_path / "atlas"),
    }
    for door, ask in doors.items():
        with pytest.raises(OptionError, match="no user of that name"):
            ask()
            pytest.fail(door)


def test_a_home_folder_of_nobody_is_named_by_every_command(capsys):
    from scellfm import cli

    for words in (
        f"embed {NOBODY} --model m --out x.csv",
        f"embed c.h5ad --model {NOBODY} --out x.csv",
        f"predict c.h5ad --model {NOBODY} --out x.csv",
        f"tokenize {NOBODY} --fit t --out x",
        f"finetune {NOBODY} --model m --label l --out x",
        f"perturb {NOBODY} --model {NOBODY} --genes A --out x",
        f"map {NOBODY} q --use-rep X --out x",
        f"integrate {NOBODY} --reps X --batch b --label l --out x",
        f"evaluate {NOBODY} --model {NOBODY} --out x.csv",
        f"sequence windows {NOBODY} --out x.csv",
        f"sequence variants {NOBODY} a --fasta f --model m --out x.csv",
    ):
        with pytest.raises(SystemExit) as done:
            raise SystemExit(cli.main(words.split()))
        told = capsys.readouterr().err
        assert done.value.code == 2 and "Traceback" not in told and "nobody" in told, (words, told)


def test_a_broken_character_in_a_table_of_a_screen_is_named(tmp_path):
    from scellfm.geneformer.perturbation.screen import saved_table

    path = tmp_path / "genes.parquet"
    pd.DataFrame({"gene": ["ENSG1", "ENSG2"]}).to_parquet(path, compression=None)
    path.write_bytes(path.read_bytes().replace(b"ENSG2", b"ENSG\xff"))
    with pytest.raises(AssetError, match="genes.parquet is missing, damaged"):
        saved_table(path)
