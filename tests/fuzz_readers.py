"""Every public door through which a file comes in, and what to do with a damaged one: `DOORS[reader](folder)` reads the
files in `folder` (laid out as the seeds are) and uses what it read; `outcome` does so in a process of its own.

As a program: `python tests/fuzz_readers.py SEEDS CASES` reads each case (`reader__what__file`) in place of the file of
that name in a copy of SEEDS, and prints what came of it.
"""

import json
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import fuzz_seeds
import numpy as np


def cells_of(folder: Path):
    from scellfm.data import read

    return read(folder / "cells.h5ad")


def read_cells(name: str):
    def door(folder: Path):
        from scellfm.core import DataError
        from scellfm.data import check_counts, count_blocks, read

        sum(block.sum() for _, block in count_blocks(folder / name))
        adata = read(folder / name)
        repr(adata)
        try:
            check_counts(adata)
        except DataError:
            return

    return door


def tokenize(name: str):
    def door(folder: Path):
        from scellfm.geneformer import RankTokenizer

        tokenizer = RankTokenizer.from_pretrained(folder / "tokenizer")
        columns = [] if name == "tenx.h5" else ["cell_type"]
        cells = tokenizer(folder / name, columns=columns, empty="keep")
        if cells.tokens.max() >= len(tokenizer.genes):
            raise AssertionError(f"token {cells.tokens.max()} of a vocabulary of {len(tokenizer.genes)}")

    return door


def scgpt(folder: Path):
    from scellfm.scgpt import ScGPT

    model = ScGPT.from_pretrained(folder / "scgpt")
    repr(model)
    model.embed(cells_of(folder))


def scgpt_path(folder: Path):
    from scellfm.scgpt import ScGPT

    ScGPT.from_pretrained(folder / "scgpt").embed(folder / "cells.h5ad")


def geneformer(folder: Path):
    from scellfm.geneformer import Geneformer

    model = Geneformer.from_pretrained(folder / "model")
    repr(model)
    model.embed(cells_of(folder))


def tokenizer_folder(folder: Path):
    from scellfm.geneformer import RankTokenizer

    tokenizer = RankTokenizer.from_pretrained(folder / "tokenizer")
    repr(tokenizer)
    tokenizer(cells_of(folder))


def corpus(folder: Path):
    from scellfm.geneformer import Corpus

    found = Corpus(folder / "cells.dataset")
    repr(found), found.obs, list(found.names)
    for i in range(len(found)):
        found[i]


def dataset(folder: Path):
    from scellfm.geneformer import Geneformer, TokenizedCells

    cells = TokenizedCells.load(folder / "cells.dataset")
    repr(cells), cells._repr_html_()
    Geneformer.from_pretrained(folder / "model").embed(cells)


def classifier(kind: str, name: str):
    def door(folder: Path):
        import scellfm.geneformer as wing

        found = getattr(wing, kind).from_pretrained(folder / name)
        repr(found)
        scores = found.scores
        for table in scores.values() if isinstance(scores, dict) else [scores]:
            repr(table), table._repr_html_()
        found.predict(cells_of(folder))

    return door


def checkpoint(folder: Path):
    import torch

    from scellfm.geneformer import CellClassifier
    from scellfm.training import Checkpoint

    model = CellClassifier.from_pretrained(folder / "clf").models[0].model
    optimizer = torch.optim.AdamW(model.parameters())
    kept = Checkpoint(folder / "training" / "fold0", identity_of(folder))
    found = kept.load(model, optimizer)
    if found:
        best, history, position = found
        history.to_dict(), int(position["step"]), int(position["waited"])


def identity_of(folder: Path) -> dict:
    "The identity that the whole checkpoint of these seeds has."
    return json.loads((folder / "identity.json").read_text())


def reference_map(folder: Path):
    from scellfm.scgpt import ReferenceMap

    found = ReferenceMap.load(folder / "map")
    repr(found)
    query = cells_of(folder)
    query.obsm["X_scGPT"] = np.random.default_rng(0).normal(size=(query.n_obs, 4)).astype(np.float32)
    found.transfer(query)


def screen(folder: Path):
    from scellfm.geneformer import Screen

    found = Screen.load(folder / "screen")
    repr(found)
    for method in ("matched", "goal_state_shift"):
        found.table(method=method)


def store(folder: Path):
    from scellfm.store import Store
    from scellfm.store.shards import Shards, _read_manifest

    found = Shards(folder / "store", _read_manifest(folder / "store"))
    repr(found)
    for name in found.names:
        if found.done(name):
            found.read(name)
    Store(folder / "store", {"cells": "other"}, {"k": 3})


def pickled_tokenizer(folder: Path):
    from scellfm.geneformer import RankTokenizer

    repr(RankTokenizer.from_pretrained(folder / "pkl"))


def torch_weights(name: str):
    def door(folder: Path):
        from scellfm.assets import read_tensors

        found = read_tensors(folder / name)
        [tuple(found[key].shape) for key in found]

    return door


def original_results(folder: Path):
    from scellfm.geneformer import RankTokenizer, Screen

    repr(Screen.from_original(folder / "raw", RankTokenizer.from_pretrained(folder / "tokenizer")))


DOORS = {
    "cell_classifier": classifier("CellClassifier", "clf"),
    "gene_classifier": classifier("GeneClassifier", "genes"),
    "task_classifier": classifier("TaskClassifier", "tasks"),
    "checkpoint": checkpoint,
    "config_json": geneformer,
    "dataset_corpus": corpus,
    "dataset_load_embed": dataset,
    "h5ad_csr_read": read_cells("cells.h5ad"),
    "h5ad_csr_scgpt": scgpt_path,
    "h5ad_csr_tokenize": tokenize("cells.h5ad"),
    "h5ad_csc_read": read_cells("csc.h5ad"),
    "h5ad_csc_tokenize": tokenize("csc.h5ad"),
    "h5ad_dense_tokenize": tokenize("dense.h5ad"),
    "loom_read": read_cells("cells.loom"),
    "loom_tokenize": tokenize("cells.loom"),
    "mtx_read": read_cells("mtx"),
    "original_results": original_results,
    "reference_map": reference_map,
    "scgpt_args": scgpt,
    "screen": screen,
    "store": store,
    "tenx_h5": read_cells("tenx.h5"),
    "tokenizer_folder": tokenizer_folder,
    "zarr_v2": read_cells("v2.zarr"),
    "zarr_v3": read_cells("v3.zarr"),
    "zarr_tokenize": tokenize("v3.zarr"),
    "pickled_dictionaries": pickled_tokenizer,
    "torch_weights": torch_weights("model.bin"),
    "torch_weights_old": torch_weights("legacy.bin"),
}
KEPT = tuple(DOORS)  # of these, seeds are kept in a folder; the others' are made: see fuzz_seeds
DOORS |= fuzz_seeds.DOORS
PLACES = {  # the file or folder whose files are mutated
    "cell_classifier": "clf",
    "gene_classifier": "genes",
    "task_classifier": "tasks",
    "checkpoint": "training",
    "config_json": "model",
    "dataset_corpus": "cells.dataset",
    "dataset_load_embed": "cells.dataset",
    "h5ad_csr_read": "cells.h5ad",
    "h5ad_csr_scgpt": "cells.h5ad",
    "h5ad_csr_tokenize": "cells.h5ad",
    "h5ad_csc_read": "csc.h5ad",
    "h5ad_csc_tokenize": "csc.h5ad",
    "h5ad_dense_tokenize": "dense.h5ad",
    "loom_read": "cells.loom",
    "loom_tokenize": "cells.loom",
    "mtx_read": "mtx",
    "original_results": "raw",
    "reference_map": "map",
    "scgpt_args": "scgpt",
    "screen": "screen",
    "store": "store",
    "tenx_h5": "tenx.h5",
    "tokenizer_folder": "tokenizer",
    "zarr_v2": "v2.zarr",
    "zarr_v3": "v3.zarr",
    "zarr_tokenize": "v3.zarr",
    "pickled_dictionaries": "pkl",
    "torch_weights": "model.bin",
    "torch_weights_old": "legacy.bin",
} | fuzz_seeds.PLACES
TEXTS = (".json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")


def files_of(seeds: Path, reader: str) -> list[Path]:
    "The files of a reader, relative to the seeds, that are worth mutating (large weights are left out)."
    place = seeds / PLACES[reader]
    found = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    small = [path for path in found if path.stat().st_size < 2**20]
    return [path.relative_to(seeds) for path in small or found]


def run(reader: str, folder: Path) -> str:
    "'content', 'ours: ...' or 'foreign: ...' of reading a folder through a door, in this process."
    import warnings

    from scellfm.core import ScellfmError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            DOORS[reader](folder)
        except ScellfmError as error:
            return f"ours: {type(error).__name__}: {error}"
        except BaseException as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "scellfm" in f.filename]
            last = frames[-1] if frames else None
            where = f"{Path(last.filename).name}:{last.lineno} {last.name}" if last else "?"
            return f"foreign: {type(error).__name__} in {where}: {str(error)[:150]}"
    return "content"


def outcome(reader: str, folder: Path, seconds: float = 20, memory: int = 2 * 2**30) -> str:
    "The same in a child process with limits of time and memory: also 'crash: signal' and 'hang'."
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        pages = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (pages + memory, pages + memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.write(write_end, run(reader, folder).encode("utf8", "replace")[:4000])
        os._exit(0)
    os.close(write_end)
    end, status = time.monotonic() + seconds, None
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.005)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        status = None
    with os.fdopen(read_end, "rb") as pipe:
        said = pipe.read().decode("utf8", "replace")
    if status is None:
        return "hang"
    return said if said else f"crash: signal {os.WTERMSIG(status)}"


def is_fine(said: str) -> bool:
    "Is what came of a damaged file one of our errors, or content?"
    return said == "content" or said.startswith("ours")


def mutated(data: bytes, rng: np.random.Generator, text: bool) -> bytes:
    "One random change: bits, bytes, a cut, a repeat; in JSON also a value of another type."
    way = rng.integers(0, 6 if text else 4)
    if way >= 4:
        return json_mutated(data, rng)
    data = bytearray(data)
    at = int(rng.integers(0, max(len(data), 1)))
    if not data:
        return b"{}"
    if way == 0:
        data[at] ^= 1 << int(rng.integers(0, 8))
    elif way == 1:
        width = int(rng.choice([1, 4, 8]))
        data[at : at + width] = rng.choice([0, 255]).astype(np.uint8).tobytes() * width
    elif way == 2:
        del data[at : at + int(rng.integers(1, 64))]
    else:
        data[at:at] = data[at : at + int(rng.integers(1, 64))]
    return bytes(data)


VALUES = (None, True, -1, 0, 10**6, 2**70, 1e400, float("nan"), "", "x", [], [[]], {}, {"a": 1}, [1, "a", None])


def mutate_saved(folder: Path, read, rounds: int, seed: int = 0) -> None:
    "Read a saved folder again and again, each time with one value of one of its JSON files replaced: ours or content."
    from scellfm.core import ScellfmError

    read(folder)
    files, rng = sorted(folder.rglob("*.json")), np.random.default_rng(seed)
    for _ in range(rounds):
        file = files[int(rng.integers(len(files)))]
        whole = file.read_bytes()
        file.write_bytes(json_mutated(whole, rng))
        try:
            read(folder)
        except ScellfmError:
            pass
        except BaseException as error:
            raise AssertionError(f"{file.name} with {file.read_text()[:500]}") from error
        finally:
            file.write_bytes(whole)


def json_mutated(data: bytes, rng: np.random.Generator) -> bytes:
    "JSON with one value replaced by one of another type, or one entry removed."
    try:
        whole = json.loads(data)
    except ValueError:
        return data[: len(data) // 2]
    inside = []

    def visit(value):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            inside.append((value, key))
            if isinstance(value[key], (dict, list)):
                visit(value[key])

    if isinstance(whole, (dict, list)):
        visit(whole)
    if not inside:
        return b"[]"
    holder, key = inside[int(rng.integers(0, len(inside)))]
    if rng.random() < 0.25:
        del holder[key]
    else:
        holder[key] = VALUES[int(rng.integers(0, len(VALUES)))]
    return json.dumps(whole).encode()


def header_mutated(data: bytes, rng: np.random.Generator) -> bytes:
    "safetensors with one value of its header, or of our record in it, replaced or removed."
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    record = header.get("__metadata__", {}).get("scellfm")
    if record and rng.random() < 0.7:
        header["__metadata__"]["scellfm"] = json_mutated(record.encode(), rng).decode()
    else:
        header = json.loads(json_mutated(json.dumps(header).encode(), rng))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def fuzz(reader: str, seeds: Path, rounds: int, seed: int = 0, seconds: float | None = None) -> dict[str, bytes]:
    "{what came out: the file's path and bytes} of the mutations of one reader that were not fine."
    found, start = {}, time.monotonic()
    rng = np.random.default_rng([seed, sum(reader.encode())])
    files = files_of(seeds, reader)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "seeds"
        shutil.copytree(seeds, folder)
        for _ in range(rounds):
            if seconds is not None and time.monotonic() - start > seconds:
                break
            name = files[int(rng.integers(0, len(files)))]
            whole = (folder / name).read_bytes()
            headed = name.suffix == ".safetensors" and rng.random() < 0.5
            broken = header_mutated(whole, rng) if headed else mutated(whole, rng, name.name.endswith(TEXTS))
            (folder / name).chmod(0o644)
            (folder / name).write_bytes(broken)
            said = outcome(reader, folder)
            (folder / name).write_bytes(whole)
            if not is_fine(said):
                found[f"{name}: {said}"] = broken
    return found


def warm_up(seeds: Path) -> None:
    "Import everything and compile what is compiled, so that each child need not."
    for reader in KEPT:
        said = run(reader, seeds)
        if not is_fine(said):
            raise AssertionError(f"the whole files of {reader} are not read: {said}")


def writable(source: Path, target: Path) -> Path:
    "A copy whose files may be changed, and the identity of its checkpoint beside it."
    from safetensors import safe_open

    shutil.copytree(source, target)
    for path in [target, *target.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    with safe_open(target / "training" / "fold0" / "training.safetensors", "np") as file:
        identity = json.loads(file.metadata()["scellfm"])["identity"]
    (target / "identity.json").write_text(json.dumps(identity))
    return target


def targets_of(case: Path, folder: Path) -> list[Path]:
    "The files, relative to the seeds, whose place a case takes: every one of its name that the case's reader reads."
    reader, name = case.name.split("__")[0], case.name.rsplit("__", 1)[1].lstrip("_")
    place = folder / PLACES[reader]
    found = [path for path in (place.rglob(name) if place.is_dir() else [place]) if path.is_file()]
    return sorted(path.relative_to(folder) for path in found)


def read_case(case: Path, target: Path, folder: Path) -> str:
    "What comes of reading the seeds in `folder` with one case in the place of one file, which is put back."
    whole = (folder / target).read_bytes()
    (folder / target).write_bytes(case.read_bytes())
    try:
        return outcome(case.name.split("__")[0], folder)
    finally:
        (folder / target).write_bytes(whole)


def main(seeds: str, cases: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = writable(Path(seeds), Path(place) / "seeds")
        warm_up(folder)
        tally = {}
        for case in sorted(Path(cases).iterdir()):
            for target in targets_of(case, folder):
                start = time.monotonic()
                said = read_case(case, target, folder)
                kind = said.split(":")[0]
                tally[kind] = tally.get(kind, 0) + 1
                mark = "  " if is_fine(said) else "!!"
                print(
                    f"{mark} {time.monotonic() - start:5.1f} s {case.name} [{target}]\n      {said[:220]}", flush=True
                )
        print(tally)


if __name__ == "__main__":
    main(*sys.argv[1:3])
