"""Damaged files of every kind that is read: one of our errors or their content, and a process that lives.

Of cells, dictionaries, models and results, seeds and recorded cases lie in a folder of their own (SCELLFM_CASES);
without it those tests are skipped. The seeds of all other kinds are made here.
"""

import os
from pathlib import Path

import fuzz_readers
import fuzz_seeds
import pytest
from conftest import ROOT

CASES = Path(os.environ.get("SCELLFM_CASES", ROOT.parent / "shared" / "cases"))
CELLS = ("dataset_", "h5ad_", "loom_", "mtx_", "tenx_", "tokenizer_", "zarr_")
READERS = [reader for reader in fuzz_readers.KEPT if reader.startswith(CELLS)]
OF_MODELS = [reader for reader in fuzz_readers.KEPT if reader not in READERS]
MADE = list(fuzz_seeds.DOORS)
RECORDED = sorted((CASES / "fuzz").iterdir()) if (CASES / "fuzz").is_dir() else []
OF_CELLS = [case for case in RECORDED if case.name.startswith(CELLS)]
OTHERS = [case for case in RECORDED if not case.name.startswith(CELLS)]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    if not (CASES / "seeds").is_dir():
        pytest.skip(f"the seeds are not here (SCELLFM_CASES={CASES})")
    folder = fuzz_readers.writable(CASES / "seeds", tmp_path_factory.mktemp("fuzz") / "seeds")
    for reader in READERS:
        assert fuzz_readers.run(reader, folder) == "content", reader
    return folder


def check_case(case: Path, seeds: Path, most: int | None = None):
    for target in fuzz_readers.targets_of(case, seeds)[:most]:
        said = fuzz_readers.read_case(case, target, seeds)
        assert fuzz_readers.is_fine(said), f"{case.name} as {target}: {said}"


def test_recorded_damage_to_cells_is_named_or_harmless(seeds, request):
    every = 1 if request.config.getoption("--slow") else 4
    for case in OF_CELLS[::every]:
        check_case(case, seeds, None if every == 1 else 1)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_recorded_damage_to_models_and_results_is_named_or_harmless(seeds, case):
    check_case(case, seeds)


@pytest.mark.parametrize("reader", READERS)
def test_a_few_random_mutations_are_named_or_harmless(seeds, reader):
    assert fuzz_readers.fuzz(reader, seeds, rounds=3) == {}


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_half_a_minute_of_random_mutations_is_named_or_harmless(seeds, reader):
    found = fuzz_readers.fuzz(reader, seeds, rounds=10**6, seed=1, seconds=30)
    assert list(found) == []


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # models of one step
        folder = fuzz_seeds.make(tmp_path_factory.mktemp("made") / "seeds")
    for reader in MADE:
        assert fuzz_readers.run(reader, folder) == "content", reader
    return folder


def test_every_reader_has_a_place_and_every_place_a_reader():
    assert set(fuzz_readers.PLACES) == set(fuzz_readers.DOORS)


@pytest.mark.parametrize("reader", MADE)
def test_a_few_random_mutations_of_other_files_are_named_or_harmless(made, reader):
    assert fuzz_readers.fuzz(reader, made, rounds=3) == {}


@pytest.mark.slow
@pytest.mark.parametrize("reader", MADE)
def test_a_minute_of_random_mutations_of_other_files_is_named_or_harmless(made, reader):
    found = fuzz_readers.fuzz(reader, made, rounds=10**6, seed=1, seconds=60)
    assert list(found) == []


@pytest.mark.slow
@pytest.mark.parametrize("reader", OF_MODELS)
def test_a_minute_of_random_mutations_of_models_and_results_is_named_or_harmless(seeds, reader):
    found = fuzz_readers.fuzz(reader, seeds, rounds=10**6, seed=1, seconds=60)
    assert list(found) == []


PROGRAM = """c{module}
{name}
(S'touch {canary}'
tR."""


@pytest.mark.parametrize(
    "module, name", [("os", "system"), ("posix", "system"), ("builtins", "eval"), ("subprocess", "call")]
)
@pytest.mark.parametrize("reader", ["vectors_pickle", "vectors_pickled_lists"])
def test_a_pickle_of_vectors_that_is_a_program_runs_nothing(made, tmp_path, reader, module, name):
    import shutil

    folder = shutil.copytree(made, tmp_path / "seeds")
    (folder / fuzz_seeds.PLACES[reader]).write_text(
        PROGRAM.format(module=module, name=name, canary=tmp_path / "canary")
    )
    assert fuzz_readers.run(reader, folder).startswith("ours: AssetError")
    assert not (tmp_path / "canary").exists()
