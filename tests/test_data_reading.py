"""Counts arrive as they are in the file, from any storage; other values are refused with their place and the fix."""

import hashlib
import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import real_data
from scipy import io, sparse

from scellfm.core import DataError, ScellfmWarning
from scellfm.data import matrices
from scellfm.data.reading import check_counts, count_blocks, count_matrix, read


def cells(n_cells=37, n_genes=23, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    dense = rng.poisson(0.6, (n_cells, n_genes)).astype(dtype)
    dense[3] = 0  # an empty cell
    dense[:, 5] = 0  # a gene that nobody expresses
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(n_cells)])
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(n_genes)])
    return anndata.AnnData(sparse.csr_matrix(dense), obs=obs, var=var), dense


def gathered(source, **options):
    starts, blocks = zip(*count_blocks(source, **options))
    assert list(starts) == list(np.cumsum([0, *(block.shape[0] for block in blocks[:-1])]))
    for block in blocks:
        assert isinstance(block, sparse.csr_matrix) and block.has_canonical_format and (block.data != 0).all()
    return sparse.vstack(blocks).toarray()


def fingerprint(adata):
    digest = hashlib.sha256()
    for matrix in (adata.X, *adata.layers.values()):
        parts = [matrix.data, matrix.indices, matrix.indptr] if hasattr(matrix, "indptr") else [np.asarray(matrix)]
        for part in parts:
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(
    "form",
    [
        sparse.csr_matrix,
        sparse.csc_matrix,
        sparse.csr_array,
        sparse.csc_array,
        np.asarray,
        np.asfortranarray,
    ],
)
@pytest.mark.parametrize("rows", [1, 7, 37, 1000])
def test_every_storage_gives_the_same_blocks(form, rows):
    adata, dense = cells()
    adata.X = form(dense)
    assert (gathered(adata, rows=rows) == dense).all()


@pytest.mark.parametrize("form", [sparse.coo_matrix, sparse.lil_matrix, sparse.dok_matrix, sparse.bsr_matrix])
def test_other_sparse_forms_are_cut_too(form):
    _, dense = cells()
    blocks = [matrices.canonical_csr(block).toarray() for _, block in matrices.slices(form(dense), 10)]
    assert (np.vstack(blocks) == dense).all()


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16, np.int32, np.int64, np.float16, np.float32, np.float64])
def test_every_number_type_gives_the_same_counts(dtype):
    adata, dense = cells()
    adata.X = np.minimum(dense, 1).astype(dtype)
    assert (gathered(adata) == np.minimum(dense, 1)).all()
    check_counts(adata)


def test_number_types_are_kept():
    for dtype in (np.uint16, np.int64, np.float32, np.float64):
        adata, _ = cells(dtype=dtype)
        assert count_matrix(adata).dtype == dtype


def test_unsorted_and_repeated_entries_and_stored_zeros_are_put_right_in_a_copy():
    adata, dense = cells()
    coo = sparse.coo_matrix(dense)
    order = np.lexsort((-coo.col, coo.row))  # backwards within each row
    halves = np.concatenate([coo.data[order] - 1, np.ones(coo.nnz), np.zeros(5)]).astype(np.float32)
    row, col = np.tile(coo.row[order], 2), np.tile(coo.col[order], 2)
    row, col = np.append(row, [0] * 5), np.append(col, [1] * 5)
    by_row = np.argsort(row, kind="stable")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=dense.shape[0]))])
    adata.X = sparse.csr_matrix((halves[by_row], col[by_row], indptr), shape=dense.shape)
    before, entries = fingerprint(adata), adata.X.nnz
    assert (gathered(adata, rows=10) == dense).all() and (count_matrix(adata).toarray() == dense).all()
    check_counts(adata)
    assert fingerprint(adata) == before and adata.X.nnz == entries, "the input was changed"


def test_repeated_small_integers_do_not_overflow():
    csr = sparse.csr_matrix((np.full(4, 200, dtype=np.uint8), [0, 0, 0, 0], [0, 4]), shape=(1, 2))
    assert matrices.canonical_csr(csr).toarray().tolist() == [[800, 0]]


def test_writing_into_a_block_leaves_the_input_alone():
    for form in (sparse.csr_matrix, sparse.csc_matrix, np.asarray):
        adata, dense = cells()
        adata.X = form(dense)
        before = fingerprint(adata)
        for _, block in count_blocks(adata, rows=1000):
            block.data[:] = -1
            block.indices[:] = 0
        assert fingerprint(adata) == before


def test_a_view_is_read_and_stays_a_view():
    adata, dense = cells()
    view = adata[::2, 3:]
    assert (gathered(view) == dense[::2, 3:]).all()
    check_counts(view)
    assert view.is_view


def test_dask_is_computed_block_by_block():
    array = pytest.importorskip("dask.array")
    adata, dense = cells()
    adata.X = array.from_array(dense, chunks=(10, 23))
    assert (gathered(adata, rows=8) == dense).all()
    adata.X = array.from_array(dense, chunks=(10, 23)).map_blocks(sparse.csr_matrix)
    assert (gathered(adata, rows=8) == dense).all()


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
@pytest.mark.parametrize("window", [60, 2**24])
def test_files_are_read_in_blocks(tmp_path, monkeypatch, form, window):
    monkeypatch.setattr(matrices, "WINDOW", window)
    adata, dense = cells()
    adata.X = form(dense)
    adata.layers["twice"] = form(dense * 2)
    adata.raw = adata[:, :20].copy()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    for rows in (5, 100):
        assert (gathered(tmp_path / "cells.h5ad", rows=rows) == dense).all()
        assert (gathered(str(tmp_path / "cells.h5ad"), layer="twice", rows=rows) == dense * 2).all()
        assert (gathered(tmp_path / "cells.h5ad", layer="raw", rows=rows) == dense[:, :20]).all()
    backed = read(tmp_path / "cells.h5ad", backed=True)
    assert backed.isbacked
    assert (gathered(backed, rows=5) == dense).all() and (gathered(backed, layer="raw", rows=5) == dense[:, :20]).all()
    assert (gathered(backed[4:20, 2:9], rows=5) == dense[4:20, 2:9]).all()
    with pytest.warns(ScellfmWarning, match="twice"):
        check_counts(backed)
    backed.file.close()


def test_zarr_is_read_and_streamed(tmp_path):
    adata, dense = cells()
    for number, form in enumerate((sparse.csr_matrix, sparse.csc_matrix, np.asarray)):
        adata.X = form(dense)
        adata.write_zarr(tmp_path / f"{number}.zarr")
        assert (gathered(tmp_path / f"{number}.zarr", rows=9) == dense).all()
        assert (count_matrix(read(tmp_path / f"{number}.zarr")).toarray() == dense).all()


def test_loom_is_read(tmp_path):
    loompy = pytest.importorskip("loompy")
    _, dense = cells()
    names = {"CellID": np.array([f"cell{i}" for i in range(37)])}, {"Gene": np.array([f"GENE{i}" for i in range(23)])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loompy.create(str(tmp_path / "cells.loom"), dense.T, names[1], names[0])
        assert list(read(tmp_path / "cells.loom").var_names[:2]) == ["GENE0", "GENE1"]
        assert (count_matrix(read(tmp_path / "cells.loom")).toarray() == dense).all()
        assert (gathered(tmp_path / "cells.loom", rows=9) == dense).all()


def write_10x_h5(path, dense, ids, symbols):
    csr = sparse.csr_matrix(dense)  # 10x stores genes x cells as CSC, which is cells x genes as CSR
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["data"], group["indices"], group["indptr"] = (
            csr.data.astype(np.int32),
            csr.indices.astype(np.int64),
            csr.indptr.astype(np.int64),
        )
        group["shape"] = np.array(dense.T.shape, dtype=np.int32)
        group["barcodes"] = np.array([f"AAAC{i}-1" for i in range(len(dense))], dtype="S")
        features = group.create_group("features")
        features["id"], features["name"] = np.array(ids, dtype="S"), np.array(symbols, dtype="S")
        features["feature_type"] = np.array(["Gene Expression"] * len(ids), dtype="S")
        features["genome"] = np.array(["GRCh38"] * len(ids), dtype="S")


@pytest.mark.parametrize("prefix,zipped", [("", True), ("", False), ("sample1_", True)])
def test_10x_files_keep_ensembl_ids(tmp_path, prefix, zipped):
    import gzip

    _, dense = cells()
    ids, symbols = [f"ENSG{i:011d}" for i in range(23)], [f"SYM{i}" for i in range(23)]
    write_10x_h5(tmp_path / "filtered.h5", dense, ids, symbols)
    folder = tmp_path / "filtered"
    folder.mkdir()
    if zipped:
        io.mmwrite(folder / "matrix.mtx", sparse.coo_matrix(dense.T.astype(int)))
        (folder / f"{prefix}matrix.mtx.gz").write_bytes(gzip.compress((folder / "matrix.mtx").read_bytes()))
        (folder / "matrix.mtx").unlink()
        features = "".join(f"{i}\t{s}\tGene Expression\n" for i, s in zip(ids, symbols))
        (folder / f"{prefix}features.tsv.gz").write_bytes(gzip.compress(features.encode()))
        (folder / f"{prefix}barcodes.tsv.gz").write_bytes(gzip.compress("".join(f"c{i}\n" for i in range(37)).encode()))
    else:
        io.mmwrite(folder / f"{prefix}matrix.mtx", sparse.coo_matrix(dense.T.astype(int)))
        (folder / f"{prefix}genes.tsv").write_text("".join(f"{i}\t{s}\n" for i, s in zip(ids, symbols)))
        (folder / f"{prefix}barcodes.tsv").write_text("".join(f"c{i}\n" for i in range(37)))
    for path in (tmp_path / "filtered.h5", folder):
        adata = read(path)
        assert (count_matrix(adata).toarray() == dense).all()
        assert list(adata.var["ensembl_id"]) == ids and list(adata.var_names) == symbols
        check_counts(adata)


def test_a_unicode_path_with_spaces_is_read(tmp_path):
    adata, dense = cells()
    folder = tmp_path / "größe und länge" / ("x" * 100)
    folder.mkdir(parents=True)
    adata.write_h5ad(folder / "zellen 1.h5ad")
    assert (gathered(folder / "zellen 1.h5ad") == dense).all()


# --- bad inputs


def refused(adata, *words, layer=None):
    with pytest.raises(DataError) as caught:
        check_counts(adata, layer)
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
    return message


def spoilt(value, row=30, column=7):
    adata, dense = cells()
    dense[row, column] = value
    adata.X = sparse.csr_matrix(dense)
    return adata


def test_log_normalised_values_are_refused_and_the_layer_with_integers_named():
    adata, dense = cells()
    adata.layers["counts"] = adata.X.copy()
    adata.layers["scaled"] = sparse.csr_matrix(dense * 0.37)
    adata.X = np.log1p(dense)
    first = np.argwhere(dense % 1 != np.log1p(dense))[0]
    message = refused(adata, "not integers", f"'cell{first[0]}'", f"'GENE{first[1]}'", "0.693147", "layer='counts'")
    assert "scaled" not in message


def test_raw_with_integers_is_named_and_judged_by_its_own_genes():
    adata, dense = cells()
    adata.raw = adata.copy()
    adata = adata[:, 10:].copy()
    adata.X = np.log1p(dense[:, 10:])
    refused(adata, "layer='raw'")
    check_counts(adata, "raw")
    broken, dense = cells()
    dense[2, 1] = 0.5
    broken.X = dense
    adata.raw = broken
    refused(adata, "'cell2'", "'GENE1'", "0.5", "No layer", layer="raw")


def test_without_integers_anywhere_the_message_says_so():
    adata, dense = cells()
    adata.X = np.log1p(dense)
    refused(adata, "No layer and no raw", "raw counts")


def test_a_single_bad_value_in_the_last_block_is_found_wherever_it_is():
    adata, dense = cells(n_cells=5000, n_genes=8)
    dense[4999, 7] = 2.5
    for form in (sparse.csr_matrix, sparse.csc_matrix, np.asarray):
        adata.X = form(dense)
        refused(adata, "1 values", "'cell4999'", "'GENE7'", "2.5")


@pytest.mark.parametrize(
    "value,words",
    [
        (-3, ["negative", "-3"]),
        (np.nan, ["1 values", "NaN or infinite", "nan"]),
        (np.inf, ["infinite", "inf"]),
        (1.5, ["not integers", "1.5"]),
    ],
)
def test_bad_values_are_named_with_cell_gene_and_value(value, words):
    refused(spoilt(value), "'cell30'", "'GENE7'", *words)


def test_all_bad_values_are_counted_and_the_first_in_cell_order_named():
    adata, dense = cells(n_cells=5000, n_genes=8)
    dense[[4000, 10, 2500], [1, 6, 0]] = np.nan
    adata.X = sparse.csc_matrix(dense)
    refused(adata, "3 values", "'cell10'", "'GENE6'")


@pytest.mark.parametrize("shape,words", [((0, 5), "0 cells x 5 genes"), ((5, 0), "5 cells x 0 genes")])
def test_no_cells_or_no_genes_is_refused(shape, words):
    refused(anndata.AnnData(sparse.csr_matrix(shape, dtype=np.float32)), words)
    assert count_matrix(anndata.AnnData(sparse.csr_matrix(shape, dtype=np.float32))).shape == shape


def test_an_empty_matrix_is_refused():
    refused(anndata.AnnData(sparse.csr_matrix((4, 3), dtype=np.float32)), "only zeros", "4 cells x 3 genes")
    refused(
        anndata.AnnData(obs=pd.DataFrame(index=list("ab")), var=pd.DataFrame(index=list("cd"))),
        "adata.X is empty",
        "layer=",
    )


def test_counts_too_large_for_float32_are_warned_of():
    with pytest.warns(ScellfmWarning, match=r"1 counts above 2\*\*24.*'cell30'.*'GENE7'.*float64"):
        check_counts(spoilt(2.0**24 + 2))
    adata = spoilt(2.0**24)
    adata.layers["exact"] = sparse.csr_matrix(adata.X, dtype=np.float64)
    adata.layers["exact"].data[0] = 2.0**40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_counts(adata)
        check_counts(adata, "exact")


def test_integers_that_were_log_transformed_are_warned_of():
    adata, _ = cells()
    adata.uns["log1p"] = {}
    with pytest.warns(ScellfmWarning, match="log1p"):
        check_counts(adata)


def test_integers_beside_a_layer_with_larger_counts_are_warned_of():
    adata, dense = cells()
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.rint(np.log1p(dense))
    with pytest.warns(ScellfmWarning, match="layer='counts'"):
        check_counts(adata)


def test_repeated_cell_names_are_warned_of():
    adata, _ = cells()
    adata.obs_names = ["same"] * 2 + list(adata.obs_names[2:])
    with pytest.warns(ScellfmWarning, match="'same'.*obs_names_make_unique"):
        check_counts(adata)


def test_an_unknown_layer_is_named_with_what_there_is():
    adata, _ = cells()
    adata.layers["counts"] = adata.X.copy()
    refused(adata, "'count'", "Did you mean layer='counts'?", layer="count")
    refused(adata, "'raw'", "counts", layer="raw")


def test_text_is_not_counts():
    with pytest.raises(DataError, match="str.*are not numbers|<U1.*are not numbers"):
        matrices.canonical_csr(np.array([["a", "b"]]))
    with pytest.raises(DataError, match="complex"):
        matrices.canonical_csr(np.ones((2, 2), dtype=complex))


def test_files_that_are_missing_unknown_or_damaged_are_named(tmp_path):
    adata, _ = cells()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(DataError, match="did you mean 'cells.h5ad'"):
        read(tmp_path / "cell.h5ad")
    with pytest.raises(DataError, match="did you mean 'cells.h5ad'"):
        next(count_blocks(tmp_path / "cell.h5ad"))
    with pytest.raises(DataError, match=".csv suffix"):
        (tmp_path / "x.csv").write_text("a,b")
        read(tmp_path / "x.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="neither matrix.mtx"):
        read(tmp_path / "empty")
    whole = (tmp_path / "cells.h5ad").read_bytes()
    for name, content in (
        ("cut.h5ad", whole[: len(whole) // 2]),
        ("page.h5ad", b"<html>login</html>"),
        ("zero.h5ad", b""),
        ("lfs.h5ad", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"),
    ):
        (tmp_path / name).write_bytes(content)
        for opened in (lambda path: read(path), lambda path: list(count_blocks(path))):
            with pytest.raises(DataError, match=f"{name}.*({len(content)} bytes|Git-LFS|HTML)"):
                opened(tmp_path / name)
    with pytest.raises(DataError, match="backed=True needs an h5ad"):
        write_10x_h5(tmp_path / "x.h5", np.ones((2, 2)), ["a", "b"], ["c", "d"])
        read(tmp_path / "x.h5", backed=True)
    with pytest.raises(DataError, match="layers/none"):
        list(count_blocks(tmp_path / "cells.h5ad", layer="none"))


@pytest.mark.parametrize("part", ["matrix.mtx.gz", "features.tsv.gz"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_10x_folder_that_was_cut_is_named(tmp_path, part, share):
    import gzip

    _, dense = cells()
    io.mmwrite(tmp_path / "x.mtx", sparse.coo_matrix(dense.T.astype(int)))
    content = {
        "matrix.mtx.gz": (tmp_path / "x.mtx").read_bytes(),
        "features.tsv.gz": "".join(f"ENSG{i:011d}\tSYM{i}\tGene Expression\n" for i in range(23)).encode(),
        "barcodes.tsv.gz": "".join(f"c{i}\n" for i in range(37)).encode(),
    }
    folder = tmp_path / "filtered"
    folder.mkdir()
    for name, data in content.items():
        zipped = gzip.compress(data)
        (folder / name).write_bytes(zipped[: int(len(zipped) * share)] if name == part else zipped)
    with pytest.raises(DataError, match="filtered cannot be read.*copied whole"):
        read(folder)


class Hostile:
    "Unpickled, it leaves a file behind."

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


@pytest.mark.parametrize("place", ["X/indices", "X/data"])
@pytest.mark.parametrize("key", ["compressor", "filters"])
def test_a_zarr_store_that_would_run_a_program_is_refused_and_runs_nothing(tmp_path, place, key):
    import json
    import pickle

    zarr = pytest.importorskip("zarr")
    adata, _ = cells()
    group = zarr.open_group(tmp_path / "evil.zarr", mode="w", zarr_format=2)
    anndata.io.write_elem(group, "/", adata)
    chunk, description = (tmp_path / "evil.zarr" / place / name for name in ("0", ".zarray"))
    told = json.loads(description.read_text())
    pickled = {"id": "pickle", "protocol": 2}
    description.write_text(json.dumps({**told, "compressor": None, key: pickled if key == "compressor" else [pickled]}))
    chunk.write_bytes(pickle.dumps(Hostile(tmp_path / "canary"), protocol=2))
    for opened in (read, lambda path: list(count_blocks(path))):
        with pytest.raises(DataError, match="zarray asks for the codec 'pickle'.*nothing was executed"):
            opened(tmp_path / "evil.zarr")
    assert not (tmp_path / "canary").exists()
    pickle.loads(chunk.read_bytes()).close()
    assert (tmp_path / "canary").exists(), "the hostile chunk of this test does not work"


def test_a_damaged_zarr_store_is_named_however_it_is_read(tmp_path):
    pytest.importorskip("zarr")
    adata, _ = cells()
    adata.write_zarr(tmp_path / "cells.zarr")
    for chunk in (tmp_path / "cells.zarr" / "X").rglob("*"):
        if chunk.is_file() and not chunk.name.startswith(".") and chunk.name != "zarr.json":
            chunk.write_bytes(chunk.read_bytes()[:5])
    for opened in (read, lambda path: list(count_blocks(path))):
        with pytest.raises(DataError, match="cells.zarr cannot be read.*copied whole"):
            opened(tmp_path / "cells.zarr")


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    adata, _ = cells()
    adata.write_h5ad(tmp_path / "cells.h5ad")

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(h5py, "File", forbidden)
    with pytest.raises(DataError, match=r"cells.h5ad cannot be read.*chmod \+r"):
        list(count_blocks(tmp_path / "cells.h5ad"))


def test_reading_a_large_csc_file_takes_memory_of_the_window(tmp_path, monkeypatch):
    import tracemalloc

    rng = np.random.default_rng(0)
    n_cells, n_genes = 4000, 1000
    csc = sparse.random(n_cells, n_genes, 0.5, format="csc", dtype=np.float32, random_state=rng)
    csc.data[:] = 1
    anndata.AnnData(csc).write_h5ad(tmp_path / "big.h5ad")
    monkeypatch.setattr(matrices, "WINDOW", 150_000)
    tracemalloc.start()
    total = sum(block.sum() for _, block in count_blocks(tmp_path / "big.h5ad", rows=256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == csc.nnz
    whole = csc.data.nbytes + csc.indices.nbytes
    assert peak < 0.75 * whole, f"peak {peak / 1e6:.1f} MB; the matrix alone has {whole / 1e6:.1f} MB"


def test_real_cells_of_a_published_study_are_counts():
    path = real_data("kang18/kang18_2000.h5ad")
    adata = read(path)
    check_counts(adata)
    assert sum(block.sum() for _, block in count_blocks(path)) == adata.X.sum(dtype=np.float64)


def test_a_file_without_the_layer_is_closed_again(tmp_path):
    adata, _ = cells()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(DataError, match="layer='nope'") as caught:  # the traceback keeps what was open alive
        list(count_blocks(tmp_path / "cells.h5ad", "nope"))
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        assert "X" in file
    assert "there are: ['X (layer=None)']" in str(caught.value)
