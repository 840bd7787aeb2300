"""Every public function that reads a dictionary or a checkpoint gets files that would run a program: nothing runs."""

import ast
import json
import os
import pickle
import shutil

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, golden
from scipy import sparse

from scellfm.core import AssetError, DataError, StoreError
from scellfm.data.splits import hold_out
from scellfm.geneformer import (
    CellClassifier,
    GeneClassifier,
    Geneformer,
    RankTokenizer,
    Screen,
    TaskClassifier,
    TokenizedCells,
)
from scellfm.geneformer.finetuning import genes as genes_module
from scellfm.geneformer.finetuning.classifier import RECORD
from scellfm.scgpt import ReferenceMap, ScGPT
from scellfm.store import Store, sha256
from scellfm.training import CHECKPOINT, fit

pytestmark = pytest.mark.filterwarnings("ignore")
GENES = [f"ENSG{i:011d}" for i in range(30)]


class Run:
    "Unpickled by the usual means, it calls os.system."

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


def cells():
    draw = np.random.default_rng(0)
    obs = pd.DataFrame({"cell_type": ["B", "T"] * 12}, index=[f"c{i}" for i in range(24)])
    return anndata.AnnData(
        sparse.csr_matrix(draw.poisson(2.0, (24, 30)).astype(np.float32)), obs=obs, var=pd.DataFrame(index=GENES)
    )


@pytest.fixture(scope="module")
def geneformer(tmp_path_factory):
    "A folder with a small model, its dictionaries, and one with a classifier of ours."
    folder, adata = tmp_path_factory.mktemp("geneformer"), cells()
    gf = Geneformer.from_config("tiny", RankTokenizer.fit(adata), device="cpu")
    gf.save_pretrained(folder / "model")
    clf = gf.finetune(adata, "cell_type", split=hold_out(adata, fractions=(0.5, 0, 0.5)), epochs=1, n_boot=0)
    clf.save_pretrained(folder / "ours")
    clf.models[0].model.save_pretrained(folder / "theirs")  # the layout of the original
    clf.models[0].tokenizer.save_pretrained(folder / "theirs")
    of_genes = gf.finetune_genes(adata, {"a": GENES[:10], "b": GENES[10:]}, folds=2, epochs=1, n_boot=0)
    of_genes.save_pretrained(folder / "genes")
    adata.obs["side"] = ["left", "right", "right", "left"] * 6
    gf.finetune(
        adata, ["cell_type", "side"], split=hold_out(adata, fractions=(0.5, 0, 0.5)), epochs=1, n_boot=0
    ).save_pretrained(folder / "tasks")
    clf.perturb(adata, state="cell_type", start="B", goal="T", genes=GENES[:3]).save(folder / "screen")
    return folder


@pytest.fixture
def place(geneformer, tmp_path):
    shutil.copytree(geneformer, tmp_path / "files")
    return tmp_path / "files", tmp_path / "canary"


def refused(read, canary, error=AssetError, words=""):
    with pytest.raises(error, match=words):
        read()
    assert not canary.exists(), "a program in the file was run"


def put_pickle(path, canary, content=None):
    path.write_bytes(pickle.dumps({**(content or {}), "x": Run(canary)}))
    assert pickle.loads(path.read_bytes()) and canary.exists(), "the hostile file of this test does not work"
    canary.unlink()


def put_torch(folder, name, canary):
    "Replace the weights by a torch file with a program in it."
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.pt")]:
        path.unlink()
    torch.save({"bert.embeddings.word_embeddings.weight": torch.zeros(3, 2), "x": Run(canary)}, folder / name)
    with open(folder / name, "rb") as file:
        torch.load(file, weights_only=False)
    assert canary.exists(), "the hostile file of this test does not work"
    canary.unlink()


@pytest.mark.parametrize(
    "name",
    [
        "token_dictionary_gc104M",
        "gene_median_dictionary_gc104M",
        "ensembl_mapping_dict_gc104M",
        "gene_name_id_dict_gc104M",
    ],
)
def test_the_tokenizer_reads_no_hostile_dictionary(tmp_path, name):
    folder, canary, ids = tmp_path / "files", tmp_path / "canary", {gene: i + 4 for i, gene in enumerate(GENES)}
    folder.mkdir()
    contents = {
        "token_dictionary_gc104M": {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3, **ids},
        "gene_median_dictionary_gc104M": dict.fromkeys(GENES, 1.0),
        "ensembl_mapping_dict_gc104M": dict(zip(GENES, GENES)),
        "gene_name_id_dict_gc104M": {f"S{i}": gene for i, gene in enumerate(GENES)},
    }
    for each, content in contents.items():
        (folder / f"{each}.pkl").write_bytes(pickle.dumps(content))
    assert len(RankTokenizer.from_pretrained(folder).genes) == 34
    put_pickle(folder / f"{name}.pkl", canary, contents[name])
    refused(
        lambda: RankTokenizer.from_pretrained(folder), canary, words=f"{name}.pkl is a pickle that asks for .*system"
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_geneformer_reads_no_hostile_weights(place, name):
    folder, canary = place
    put_torch(folder / "model", name, canary)
    refused(lambda: Geneformer.from_pretrained(folder / "model", device="cpu"), canary, words=name)


@pytest.mark.parametrize("content", [b"<html>log in</html>", b"", b"[1]", b'{"a": '])
@pytest.mark.parametrize(
    "name", ["config.json", "token_dictionary.json", "gene_median_dictionary.json", "rank_tokenizer.json"]
)
def test_a_damaged_file_of_a_model_is_named_although_a_whole_one_lies_next_to_it(place, name, content):
    folder, _ = place
    (folder / "model" / name).write_bytes(content)
    with pytest.raises(AssetError, match=name):
        Geneformer.from_pretrained(folder / "model", device="cpu")


def test_a_config_that_names_code_runs_none(place):
    folder, canary = place
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text())
    (folder / "model" / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    config |= {
        "auto_map": dict.fromkeys(
            ("AutoConfig", "AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"), "evil.Evil"
        )
    }
    path.write_text(json.dumps({**config, "_attn_implementation": "org/kernel", "trust_remote_code": True}))
    Geneformer.from_pretrained(folder / "model", device="cpu")
    theirs = folder / "theirs" / "config.json"
    theirs.write_text(
        json.dumps(
            {**json.loads(theirs.read_text()), "auto_map": config["auto_map"], "_attn_implementation": "org/kernel"}
        )
    )
    shutil.copy(folder / "model" / "evil.py", folder / "theirs" / "evil.py")
    CellClassifier.from_pretrained(folder / "theirs", label="x", device="cpu")
    assert not canary.exists()


@pytest.mark.parametrize("where", ["theirs", "."])
@pytest.mark.parametrize("name", ["id_class_dict.pkl", "run_id_class_dict.pkl"])
def test_the_classifier_reads_no_hostile_names_of_classes(place, where, name):
    folder, canary = place
    put_pickle(folder / where / name, canary, {0: "B", 1: "T"})
    refused(
        lambda: CellClassifier.from_pretrained(folder / "theirs", label="x", device="cpu"),
        canary,
        words=f"{name} (is a pickle that asks for|cannot be read as JSON)",
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("layout", ["theirs", "ours/fold0"])
def test_the_classifier_reads_no_hostile_weights(place, layout, name):
    folder, canary = place
    put_torch(folder / layout, name, canary)
    refused(
        lambda: CellClassifier.from_pretrained(folder / layout.split("/")[0], label="x", device="cpu"),
        canary,
        words=name,
    )


def test_the_classifier_leaves_the_trainers_pickle_alone(place):
    folder, canary = place
    put_pickle(folder / "theirs" / "training_args.bin", canary)
    CellClassifier.from_pretrained(folder / "theirs", label="x", device="cpu")
    assert not canary.exists()


@pytest.mark.parametrize("name", [RECORD, "cells.safetensors"])
def test_our_own_classifier_folder_with_other_files_in_it_is_refused(place, name):
    folder, canary = place
    put_pickle(folder / "ours" / name, canary)
    refused(lambda: CellClassifier.from_pretrained(folder / "ours", device="cpu"), canary, words=name)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("layout", ["genes/fold0", "lone"])
def test_the_gene_classifier_reads_no_hostile_weights(place, layout, name):
    folder, canary = place
    shutil.copytree(folder / "genes" / "fold0", folder / "lone")
    put_torch(folder / layout, name, canary)
    refused(lambda: GeneClassifier.from_pretrained(folder / layout.split("/")[0], device="cpu"), canary, words=name)


@pytest.mark.parametrize("name", [genes_module.RECORD, "id_class_dict.pkl"])
def test_the_gene_classifier_reads_no_hostile_names_of_classes(place, name):
    folder, canary = place
    shutil.copytree(folder / "genes" / "fold0", folder / "lone")
    where = folder / ("genes" if name == genes_module.RECORD else "lone")
    put_pickle(where / name, canary, {0: "a", 1: "b"})
    refused(
        lambda: GeneClassifier.from_pretrained(where, device="cpu"),
        canary,
        words=f"{name} (is a pickle that asks for|cannot be read as JSON)",
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "tasks.json", "cells.safetensors"])
def test_the_classifier_of_several_labels_reads_nothing_hostile(place, name):
    folder, canary = place
    if name in ("tasks.json", "cells.safetensors"):
        put_pickle(folder / "tasks" / name, canary)
    else:
        put_torch(folder / "tasks" / "fold0", name, canary)
    refused(lambda: TaskClassifier.from_pretrained(folder / "tasks", device="cpu"), canary, words=name)


@pytest.mark.parametrize("name", ["screen.json", "shifts.parquet", "genes.parquet"])
def test_a_saved_screen_runs_nothing_and_names_the_damaged_file(place, name):
    folder, canary = place
    assert len(Screen.load(folder / "screen").shifts)
    put_pickle(folder / "screen" / name, canary)
    refused(lambda: Screen.load(folder / "screen"), canary, words=name)
    for content in (b"", b"<html>log in</html>", None):
        (folder / "screen" / name).unlink() if content is None else (folder / "screen" / name).write_bytes(content)
        with pytest.raises(AssetError, match=name):
            Screen.load(folder / "screen")


def test_a_saved_screen_with_an_extension_type_runs_nothing(place):
    import pyarrow as pa
    import pyarrow.parquet

    folder, canary = place
    table = pyarrow.parquet.read_table(folder / "screen" / "shifts.parquet")
    forged = table.schema.field("cell").with_metadata(
        {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Run(canary))}
    )
    at = table.schema.get_field_index("cell")
    pyarrow.parquet.write_table(
        pa.table(table.columns, schema=table.schema.set(at, forged)), folder / "screen" / "shifts.parquet"
    )
    try:
        Screen.load(folder / "screen")
    except AssetError as error:
        assert "shifts.parquet" in str(error)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["index.json", "index.safetensors"])
def test_a_reference_map_runs_nothing(tmp_path, name):
    adata, canary = cells(), tmp_path / "canary"
    adata.obsm["X_scGPT"] = np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32)
    ReferenceMap(adata, k=3).save(tmp_path / "map")
    put_pickle(tmp_path / "map" / name, canary)
    refused(lambda: ReferenceMap.load(tmp_path / "map"), canary, words="map is damaged")


@pytest.mark.parametrize("word", ["pickle", r"p\u0069ckle"])
@pytest.mark.parametrize("array", ["X/data", "obs/cell_type", "var/_index"])
def test_the_tokenizer_reads_no_zarr_store_with_a_codec_that_runs_programs(tmp_path, array, word):
    zarr = pytest.importorskip("zarr")
    store, canary, tok = tmp_path / "cells.zarr", tmp_path / "canary", RankTokenizer.fit(cells())
    anndata.io.write_elem(zarr.open_group(store, mode="w", zarr_format=2), "/", cells())
    meta = next((store / array).rglob(".zarray"))  # newer versions keep texts one folder further down
    described = json.loads(meta.read_text()) | {"compressor": None, "filters": [{"id": "WORD", "protocol": 2}]}
    meta.write_text(json.dumps(described).replace("WORD", word))
    for chunk in meta.parent.glob("[0-9]*"):
        put_pickle(chunk, canary)
    for read in (RankTokenizer.fit, tok, lambda path: tok.tokenize_files(path, tmp_path / "out")):
        refused(lambda: read(store), canary, DataError, "asks for the codec 'pickle'.*nothing was executed")


@pytest.fixture
def scgpt(tmp_path):
    folder = tmp_path / "scgpt"
    ScGPT.from_config("tiny", ["A", "B", "C"], device="cpu").save_pretrained(folder)
    ScGPT.from_pretrained(folder, device="cpu")
    return folder, tmp_path / "canary"


@pytest.mark.parametrize("name", ["best_model.pt", "model.safetensors"])
def test_scgpt_reads_no_hostile_weights(scgpt, name):
    folder, canary = scgpt
    put_torch(folder, name, canary)
    refused(lambda: ScGPT.from_pretrained(folder, device="cpu"), canary, words=name)


@pytest.mark.parametrize("name", ["vocab.json", "args.json"])
def test_scgpt_reads_no_hostile_description(scgpt, name):
    folder, canary = scgpt
    put_pickle(folder / name, canary)
    refused(
        lambda: ScGPT.from_pretrained(folder, device="cpu"),
        canary,
        words=f"{name} (is a pickle that asks for|cannot be read as JSON)",
    )


def test_scgpt_checkpoints_of_the_original_are_read_and_a_program_among_them_is_not(tmp_path):
    folder, canary = tmp_path / "model", tmp_path / "canary"
    found = [
        path.parent for path in sorted(golden("scgpt").rglob("args.json")) if list(path.parent.glob("best_model.pt"))
    ]
    shutil.copytree(found[0], folder)
    ScGPT.from_pretrained(folder, device="cpu")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    tensors = torch.load(folder / "best_model.pt", weights_only=True)
    torch.save({**tensors, "optimizer": Run(canary)}, folder / "best_model.pt")
    refused(lambda: ScGPT.from_pretrained(folder, device="cpu"), canary, words="best_model.pt holds more than tensors")


def test_a_training_checkpoint_with_a_program_in_it_is_refused(tmp_path):
    canary, model = tmp_path / "canary", torch.nn.Linear(2, 2)
    put_pickle(tmp_path / CHECKPOINT, canary)

    def resume():
        fit(
            model,
            lambda m, b: (m(b).sum(), len(b)),
            4,
            lambda rows, epoch: torch.ones(len(rows), 2),
            folder=tmp_path,
            device="cpu",
        )

    refused(resume, canary, StoreError, CHECKPOINT)


def test_a_store_reads_no_objects(tmp_path):
    canary = tmp_path / "canary"
    with Store(tmp_path / "run", {"a": 1}) as store:
        store.write("part", x=np.arange(3))
    path = next((tmp_path / "run").rglob("part*"))
    evil = np.empty(1, dtype=object)
    evil[0] = Run(canary)
    np.savez(tmp_path / "evil.npz", x=evil)
    shutil.copy(tmp_path / "evil.npz", path)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    manifest["shards"]["part"] |= {
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
    }  # whoever forges one forges both
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))

    def read():
        with Store(tmp_path / "run", {"a": 1}) as store:
            store.read("part")

    refused(read, canary, StoreError, path.name)
    np.load(tmp_path / "evil.npz", allow_pickle=True)["x"]
    assert canary.exists(), "the hostile file of this test does not work"


def test_tokenized_cells_with_an_extension_type_run_nothing(tmp_path):
    import pyarrow as pa

    canary, folder = tmp_path / "canary", tmp_path / "cells.dataset"
    RankTokenizer.fit(cells())(cells()).save(folder)
    field = pa.field(
        "input_ids",
        pa.list_(pa.uint16()),
        metadata={
            "ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": pickle.dumps(Run(canary)),
        },
    )
    for path in folder.glob("data-*.arrow"):
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_stream(file).read_all()
        forged = pa.table(
            [table["input_ids"].combine_chunks(), table["length"].combine_chunks()],
            schema=pa.schema([field, table.schema.field("length")]),
        )
        with pa.ipc.new_stream(str(path), forged.schema) as stream:
            stream.write_table(forged)
    try:
        TokenizedCells.load(folder)
    except DataError as error:
        assert "arrow" in str(error)
    assert not canary.exists()


@pytest.mark.parametrize("content", [b"<html>log in</html>", b"", b"[1]", b'{"a": '])
@pytest.mark.parametrize("name", ["state.json", "tokenizer_report.json", "rank_tokenizer.json"])
def test_a_description_that_is_damaged_is_named(tmp_path, name, content):
    tok = RankTokenizer.fit(cells())
    tok(cells()).save(tmp_path / "cells.dataset")
    tok.save_pretrained(tmp_path / "tokenizer")
    path = next(tmp_path.rglob(name))
    path.write_bytes(content)
    with pytest.raises(AssetError, match=name):
        RankTokenizer.from_pretrained(path.parent) if path.parent.name == "tokenizer" else TokenizedCells.load(
            path.parent
        )


def test_no_module_knows_a_function_that_runs_what_a_file_says():
    unsafe = {
        "eval",
        "exec",
        "compile",
        "pickle.load",
        "pickle.loads",
        "pickle.Unpickler",
        "pd.read_pickle",
        "pandas.read_pickle",
        "torch.jit.load",
        "yaml.load",
        "marshal.loads",
        "shelve.open",
        "joblib.load",
        "dill.load",
        "torch.package.PackageImporter",
    }
    for path in (ROOT / "scellfm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in unsafe, f"{path.name}:{node.lineno}"
                for keyword in node.keywords:
                    told = (keyword.arg, ast.unparse(keyword.value))
                    assert told[0] != "trust_remote_code" or told[1] == "False", f"{path.name}:{node.lineno}"
                    assert told != ("allow_pickle", "True") and told != ("weights_only", "False"), (
                        f"{path.name}:{node.lineno}"
                    )
