"A corpus on disk: the same cells, the same training, and memory that does not follow its size."

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from scellfm.core import DataError
from scellfm.data.cells import simulate_cells
from scellfm.data.splits import hold_out
from scellfm.geneformer import Geneformer, RankTokenizer
from scellfm.geneformer.model import check_tokens
from scellfm.geneformer.pretraining import pretrain
from scellfm.geneformer.tokenizer.corpus import CellNames, Corpus
from scellfm.geneformer.tokenizer.tokenized import DatasetWriter, TokenizedCells
from scellfm.inference import Sequences
from scellfm.training import Run

pytestmark = pytest.mark.filterwarnings("ignore:after pretraining", "ignore:Observation names")


@pytest.fixture(scope="module")
def studies():
    return [
        simulate_cells(50, 60, cell_types=2, donors=3, depth=150, regulators=1, targets=4, programme_size=12, seed=seed)
        for seed in (0, 1, 2)
    ]


@pytest.fixture(scope="module")
def tokenizer(studies):
    return RankTokenizer.fit(studies)


@pytest.fixture(scope="module")
def folder(studies, tokenizer, tmp_path_factory):
    "Three data sets of a study each, the last one in shards of a few cells."
    folder = tmp_path_factory.mktemp("corpus")
    for name, study in zip("abc", studies):
        cells = tokenizer(study, columns=["donor"])
        if name != "c":
            cells.save(folder / f"{name}.dataset")
            continue
        with DatasetWriter(folder / "c.dataset", shard_bytes=10) as writer:
            for start in range(0, len(cells), 7):
                writer.write(cells[start : start + 7])
            writer.finish(cells.report, cells.special)
    return folder


def tiny(tokenizer):
    return Geneformer.from_config("tiny", tokenizer, device="cpu")


def test_each_cell_is_what_it_is_in_memory(folder, studies, tokenizer):
    corpus, cells = Corpus(folder), [tokenizer(study) for study in studies]
    assert len(list((folder / "c.dataset").glob("data-*.arrow"))) == 8
    assert corpus.lengths.tolist() == np.concatenate([part.lengths for part in cells]).tolist()
    for i in range(len(corpus)):
        assert (corpus[i] == cells[i // 50][i % 50]).all() and corpus[i].dtype == np.int64
    assert list(corpus.names) == [name for study in studies for name in study.obs_names]
    assert corpus.obs["donor"].tolist() == [donor for study in studies for donor in study.obs["donor"]]
    with pytest.raises(IndexError):
        corpus[len(corpus)]


def test_a_folder_of_the_originals_is_a_corpus(studies, tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    cells = tokenizer(studies[0])
    rows = {"input_ids": [cells[i].tolist() for i in range(len(cells))], "length": cells.lengths.tolist()}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "their.dataset")
    corpus = Corpus(tmp_path / "their.dataset")
    assert corpus.blocks[0][0].dtype.itemsize > 2 and all((corpus[i] == cells[i]).all() for i in range(len(cells)))
    assert corpus.names[3] == TokenizedCells.load(tmp_path / "their.dataset").obs.index[3] == "3"
    loaded = TokenizedCells.load(tmp_path / "their.dataset")
    from_disk, from_memory = (pretrain(tiny(tokenizer), data, steps=2).history for data in (corpus, loaded))
    assert from_disk == from_memory


def test_names_are_sorted_and_counted_as_python_does():
    names = np.random.default_rng(0).choice(["b", "a-1", "a", "é", "Z", "😀", "a-10"], 200)
    ours = CellNames.of(names)
    assert ours.sort(np.arange(200)).tolist() == np.argsort(names, kind="stable").tolist()
    assert ours.occurrence.tolist() == [int((names[:i] == names[i]).sum()) for i in range(200)]
    assert len(set(ours.keys())) == 200
    blocks = ours.repeats(np.argsort(names, kind="stable"), block=3)
    assert (blocks == ours.repeats(np.argsort(names, kind="stable"))).all()


def test_training_from_disk_equals_training_from_memory(folder, studies, tokenizer):
    import anndata

    both = tokenizer(anndata.concat(studies), columns=["donor"])
    from_disk, from_memory = (pretrain(tiny(tokenizer), data, epochs=1).history for data in (folder, both))
    assert from_disk == from_memory and len(from_disk.step_rows) == 12
    split = hold_out(Corpus(folder), by="donor", fractions=(0.6, 0, 0.4))
    one, two = (pretrain(tiny(tokenizer), data, split=split, steps=2).history for data in (Corpus(folder), both))
    assert one == two


def test_the_order_of_the_data_sets_changes_only_which_cell_of_a_name_is_first(studies, tokenizer, tmp_path):
    for name, study in zip("ab", studies):
        other = study.copy()
        other.obs_names = [f"{name}-{cell}" for cell in study.obs_names]
        tokenizer(other).save(tmp_path / name)
    one, two = (pretrain(tiny(tokenizer), [tmp_path / name for name in order], steps=4) for order in ("ab", "ba"))
    assert one.history == two.history


def test_a_run_from_disk_that_was_stopped_goes_on(folder, tokenizer, tmp_path, monkeypatch):
    whole = pretrain(tiny(tokenizer), folder, epochs=1).history
    step = Run.step

    def dies(self, *arguments):
        if self.position["step"] == 8:
            raise KeyboardInterrupt
        step(self, *arguments)

    monkeypatch.setattr(Run, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny(tokenizer), folder, epochs=1, folder=tmp_path, save_every=3)
    monkeypatch.setattr(Run, "step", step)
    assert (tmp_path / "training.safetensors").exists()
    assert pretrain(tiny(tokenizer), folder, epochs=1, folder=tmp_path, save_every=3).history == whole


def test_tokens_of_another_dictionary_are_found_in_any_data_set(folder, tokenizer):
    corpus = Sequences(Corpus(folder))
    check_tokens(corpus, len(tokenizer.genes), None, None)
    highest = max(int(corpus[i].max()) for i in range(len(corpus)))
    with pytest.raises(DataError, match=f"token {highest} .*tokenize them with this model's"):
        check_tokens(corpus, highest, None, None)
    with pytest.raises(DataError, match="cell 0 does not begin with <cls>"):
        check_tokens(corpus, len(tokenizer.genes), 2, 3)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda folder: folder / "none", "not a saved data set and holds none .*no such folder.*name folders"),
        (lambda folder: folder / "a.dataset" / "state.json", "state.json is not a saved data set"),
        (lambda folder: [folder / "a.dataset", folder], "a.dataset is named twice.*name each data set once"),
        (lambda folder: [], "list of data sets is empty; name at least one"),
    ],
)
def test_what_is_no_corpus_is_told_so(folder, wrong, words):
    with pytest.raises(DataError, match=words):
        Corpus(wrong(folder))


def test_a_data_file_that_was_cut_is_named(folder, tmp_path):
    import shutil

    shutil.copytree(folder / "a.dataset", tmp_path / "a.dataset")
    file = next((tmp_path / "a.dataset").glob("data-*.arrow"))
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(DataError, match=f"{file.name} cannot be read .*tokenize again"):
        Corpus(tmp_path)


SCRIPT = textwrap.dedent("""
    import sys, threading, time, warnings
    warnings.simplefilter("ignore")
    import numpy as np, pandas as pd, torch
    from scellfm.geneformer import Geneformer
    from scellfm.geneformer.tokenizer.tokenized import DatasetWriter, TokenizedCells
    from scellfm.geneformer import RankTokenizer

    folder, n = sys.argv[1], 12_000
    random = np.random.default_rng(0)
    with DatasetWriter(folder) as writer:
        for start in range(0, n, 1000):
            names = [f"cell{i:07d}" for i in range(start, start + 1000)]
            tokens = random.integers(4, 60, 1000 * 1600, dtype=np.uint16)
            writer.write(TokenizedCells(tokens, np.arange(1001) * 1600, pd.DataFrame(index=names), np.arange(1000)))
        writer.finish({}, False)
    words = {"<pad>": 0, "<mask>": 1, **{f"G{i}": i for i in range(2, 60)}}
    tokenizer = RankTokenizer(words, {f"G{i}": 1.0 for i in range(2, 60)}, max_length=32)
    gf = Geneformer.from_config("tiny", tokenizer, device="cpu")
    gf.pretrain(TokenizedCells.load(folder)[:200], steps=2)  # what torch itself takes

    def own():  # anonymous memory; pages of mapped files can be taken back at any time
        return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1024

    def watch():
        while True:
            seen.append(own())
            time.sleep(0.002)

    seen, grown = [own()], []
    threading.Thread(target=watch, daemon=True).start()
    for data in (folder, TokenizedCells.load):
        before = own()
        seen[:] = [before]
        gf.pretrain(data if data is folder else data(folder), steps=2, held_out=0.01)
        grown.append(max(seen) - before)
    print(*grown)
""")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured by Linux's /proc")
def test_memory_does_not_follow_the_size_of_the_corpus(tmp_path):
    "Of 38 MB of tokens the memory sees all where they are loaded, and next to nothing where they stay on disk."
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "corpus")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    from_disk, loaded = map(float, done.stdout.split())
    assert from_disk < 15 and loaded > 36
