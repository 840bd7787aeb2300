"""What a release promises in its files: versions agree, pins are those of settings.ini, workflows call scripts."""

import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import check_release  # noqa: E402

yaml = pytest.importorskip("yaml")


def floors() -> dict[str, str]:
    "{package: the oldest version} of the requirements in settings.ini."
    words = check_release.config()["requirements"].split()
    return dict(re.match(r"([\w-]+)>=([\d.]+)", word).groups() for word in words if ">=" in word)


def test_the_oldest_pins_are_the_floors_of_the_settings():
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert pins.keys() == floors().keys()
    for name, version in floors().items():
        assert pins[name] == version or pins[name].startswith(f"{version}."), (name, pins[name], version)


def test_versions_of_the_package_the_citation_and_the_changelog_agree():
    import scellfm

    assert scellfm.__version__ == check_release.config()["version"]
    check_release.check_citation()
    check_release.check_changelog()


def test_the_citation_is_valid_yaml_with_what_the_format_asks_for():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf8"))
    assert found["cff-version"] == "1.2.0" and found["type"] == "software" and found["authors"]
    assert found["license"] == "Apache-2.0" and str(found["version"]) == check_release.config()["version"]
    for reference in found["references"]:
        assert reference["title"] and reference["authors"] and reference["type"] in ("article", "software")
        assert re.fullmatch(r"10\.\d{4,}/\S+", reference.get("doi", "10.1000/x"))


def test_the_workflows_call_what_is_there():
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        found = yaml.safe_load(path.read_text())
        steps = [step.get("run", "") for job in found["jobs"].values() for step in job["steps"]]
        for script in re.findall(r"tools/\w+\.py", " ".join(steps)):
            assert (ROOT / script).is_file(), (path.name, script)
        for target in re.findall(r"make (\w+)", " ".join(steps)):
            assert re.search(rf"(?m)^{target}:", (ROOT / "Makefile").read_text()), (path.name, target)
    release = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert "constraints-oldest.txt" in release and "--extras" in release and '"3.13"' in release


@pytest.mark.parametrize(
    "name, held",
    [
        ("scellfm/core.py", True),
        ("scellfm/py.typed", True),
        ("tests/test_cli.py", False),
        ("nbs/core.ipynb", False),
        ("scellfm/cells.h5ad", False),
    ],
)
def test_what_may_be_in_a_release(name, held):
    assert (check_release.FORBIDDEN.search(name) is None) == held
