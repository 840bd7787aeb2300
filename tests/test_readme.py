"""The front page keeps its word: its Python runs as printed, its commands and links exist."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf8")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_python_of_the_readme_runs():
    code = re.search(r"```python\n(.*?)```", README, flags=re.S)[1]
    assert "sf.data.demo()" in code and "epochs=" in code and "scores" in code
    quick = re.sub(r"epochs=\d+", "epochs=1", code.replace("sf.data.demo()", "sf.data.demo()[::2, ::4].copy()"))
    run = subprocess.run([sys.executable, "-W", "error::SyntaxWarning", "-c", quick], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_the_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = set(re.findall(r"^make ([a-z]+)", README, flags=re.M))
    assert named == {"demo", "test"} and named <= targets


def test_pictures_of_the_readme_exist():
    pictures = re.findall(r"!\[[^]]*\]\((?!https?:)([^)]+)\)", README)
    assert pictures and all((ROOT / name).exists() for name in pictures)
