"""Damaged files of every kind that cells come in: one of our errors or their content, and a process that lives.

The seeds and the recorded cases lie in a folder of their own (SCELLFM_CASES); without it these tests are skipped.
"""

import os
from pathlib import Path

import fuzz_readers
import pytest
from conftest import ROOT

CASES = Path(os.environ.get("SCELLFM_CASES", ROOT.parent / "shared" / "cases"))
CELLS = ("dataset_", "h5ad_", "loom_", "mtx_", "tenx_", "tokenizer_", "zarr_")
READERS = [reader for reader in fuzz_readers.DOORS if reader.startswith(CELLS)]
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
