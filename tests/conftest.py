"""Where tests find the recorded outputs of the original software, and real data."""

import os
import time
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("SCELLFM_PROGRESS", "0")
settings.register_profile(
    "ci", derandomize=True, database=None, deadline=None, print_blob=True
)  # the same examples at every run
settings.register_profile("dev", deadline=None)  # a busy machine is no counter-example
settings.load_profile("ci" if os.environ.get("CI") else "dev")
ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("SCELLFM_GOLDEN", ROOT / "tests" / "golden"))
DATA = Path(os.environ.get("SCELLFM_DATA", ROOT.parent / "shared" / "data"))


def golden(system: str) -> Path:
    "The folder of one system's recorded outputs; sizes, seeds and options in it may be others."
    return GOLDEN / system


def real_data(name: str) -> Path:
    "A file or folder of the real data; the test is skipped where it is absent."
    path = DATA / name
    if not path.exists():
        pytest.skip(f"real data {name} is not here (SCELLFM_DATA={DATA})")
    return path


@pytest.fixture(scope="session")
def yardstick() -> float:
    "Seconds of a fixed piece of plain Python; bounds on time are multiples of it and hold on a slow machine too."
    seconds = []
    for _ in range(3):
        start, table = time.process_time(), {}
        for number in range(300_000):
            table[f"ENSG{number:011d}"] = number
        seconds.append(time.process_time() - start)
    return min(seconds)


def tree(folder: Path) -> dict[str, bytes]:
    "The bytes of every file below a folder, by its path from there."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long forms too")


# Files that take longest, longest first: two workers that begin with them end together.
LONGEST = [
    "test_end_to_end",
    "test_public_reports_runs",
    "test_interferon",
    "test_cli",
    "test_statistics",
    "test_no_invented_result",
    "test_assets",
    "test_atlas",
    "test_public_reports_kills",
    "test_training_processes",
    "test_scores_integration",
    "test_geneformer_true_size",
    "test_geneformer_classifier",
    "test_rosa_model",
    "test_rosa_simulated",
    "test_training",
    "test_geneformer_pretraining",
    "test_fuzz_readers",
    "test_faults",
    "test_readme",
    "test_resume",
    "test_scgpt_embedding",
    "test_scgenept_simulation",
    "test_reproduce",
    "test_store_blocks",
    "test_store",
]


def pytest_collection_modifyitems(config, items):
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))  # the others keep their order
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="long form: run with --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)
