"""Build the release and try it as a user would: `python tools/check_release.py [--install PYTHON ...]`.

Builds an sdist and a wheel into dist/ and checks what is in them. For each PYTHON that is named, the wheel is installed
into a new environment, with `--constraint FILE` if one is given, and the first commands of the README are run there.
`--extras` asks pip to resolve every extra by itself (nothing is installed).
"""

import argparse
import email.parser
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = re.compile(r"\.ipynb$|(^|/)(tests|nbs|benchmarks|tools|_docs|\.git|runs)(/|$)|\.h5ad$|\.pyc$|__pycache__")
IN_SDIST = ("settings.ini", "README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md", "CITATION.cff", "pyproject.toml")
FIRST_STEPS = """
import scellfm as sf
from scellfm.geneformer import Geneformer, RankTokenizer
cells = sf.data.demo()
sf.data.check_counts(cells)
tokenizer = RankTokenizer.fit(cells)
model = Geneformer.from_config("tiny", tokenizer, device="cpu")
model.embed(cells)
assert cells.obsm["X_geneformer"].shape[0] == cells.n_obs
print("scellfm", sf.__version__, "embeds", cells.n_obs, "cells")
"""


def config() -> dict:
    "What settings.ini says."
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf8")
    return dict(parser["DEFAULT"])


def extras() -> list[str]:
    "The names of the extras."
    return [key.removesuffix("_requirements") for key in config() if key.endswith("_requirements")]


def run(*command: object, **more) -> str:
    "The output of a command; an error ends the script with what it said."
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **more)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))[:200]}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    return done.stdout


def build(folder: Path, isolated: bool = True) -> tuple[Path, Path]:
    "Build into a folder: (sdist, wheel)."
    run(sys.executable, "-m", "build", "--outdir", folder, *([] if isolated else ["--no-isolation"]), ROOT)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def check_wheel(path: Path) -> None:
    "Every module, py.typed, the licence, the entry point and every extra are in; nothing else is."
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        about = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.parser.Parser().parsestr(archive.read(about).decode())
        points = archive.read(about.replace("METADATA", "entry_points.txt")).decode()
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "scellfm").rglob("*.py")}
    problems = [f"lacks {name}" for name in sorted(modules | {"scellfm/py.typed"}) if name not in names]
    problems += [f"holds {name}" for name in names if FORBIDDEN.search(name)]
    problems += [] if any("LICENSE" in name for name in names) else ["lacks the licence"]
    problems += [] if "scellfm=scellfm.cli:main" in points.replace(" ", "") else ["lacks the command scellfm"]
    problems += [f"lacks the extra {name}" for name in extras() if name not in metadata.get_all("Provides-Extra", [])]
    wanted = {"Version": config()["version"], "Requires-Python": f">={config()['min_python']}"}
    problems += [f"{key} is {metadata[key]}" for key, value in wanted.items() if metadata[key] != value]
    if problems:
        sys.exit(f"{path.name}: {'; '.join(problems)}")


def check_sdist(path: Path) -> None:
    "The files that a build needs are in, and those that are for readers; no notebook, no test, no data."
    with tarfile.open(path) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    problems = [f"lacks {name}" for name in IN_SDIST if name not in names]
    problems += [f"holds {name}" for name in names if FORBIDDEN.search(name)]
    if problems:
        sys.exit(f"{path.name}: {'; '.join(problems)}")


def check_citation() -> None:
    "CITATION.cff: the fields that the format asks for, and the version of settings.ini."
    text = (ROOT / "CITATION.cff").read_text(encoding="utf8")
    lacking = [key for key in ("cff-version:", "message:", "title:", "authors:") if not re.search(rf"(?m)^{key}", text)]
    version = re.search(r"(?m)^version: (\S+)$", text)
    if lacking or version is None or version[1] != config()["version"]:
        sys.exit(f"CITATION.cff lacks {lacking}, or its version is not {config()['version']}")


def check_changelog() -> None:
    "CHANGELOG.md: the version of settings.ini comes first, with (unreleased) or a date."
    first = re.search(r"(?m)^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text("utf8"))
    if first is None or first[1] != config()["version"]:
        sys.exit(f"CHANGELOG.md does not begin with the version {config()['version']}")


def try_in(python: str, wheel: Path, constraint: str | None) -> str:
    "Install the wheel into a new environment of this Python, and take the first steps there."
    with tempfile.TemporaryDirectory() as place:
        run(python, "-m", "venv", Path(place) / "venv")
        inside = Path(place) / "venv" / "bin" / "python"
        pinned = ["--constraint", Path(constraint).resolve()] if constraint else []
        run(inside, "-m", "pip", "install", "--quiet", *pinned, wheel)
        run(inside, "-m", "pip", "check")
        said = run(inside, "-c", FIRST_STEPS, cwd=place)
        return said + run(inside.with_name("scellfm"), "--version", cwd=place)


def resolve(wheel: Path, extra: str) -> str:
    "What pip would install for one extra: a line, or why it cannot."
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", f"{wheel}[{extra}]"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"{extra}: CANNOT BE RESOLVED: {done.stderr.strip().splitlines()[-1]}"
    return f"{extra}: {done.stdout.count('is_yanked')} packages to install"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", nargs="*", default=[], help="interpreters to try the wheel with")
    parser.add_argument("--constraint", help="file of pins, such as constraints-oldest.txt")
    parser.add_argument("--extras", nargs="*", help="extras to resolve; all where none is named")
    parser.add_argument("--here", action="store_true", help="build with the setuptools of this environment")
    given = parser.parse_args()
    folder = ROOT / "dist"
    for old in folder.glob("scellfm-*"):
        old.unlink()
    sdist, wheel = build(folder, isolated=not given.here)
    check_wheel(wheel), check_sdist(sdist), check_citation(), check_changelog()
    print(f"{sdist.name} ({sdist.stat().st_size // 1024:,} KiB), {wheel.name} ({wheel.stat().st_size // 1024:,} KiB)")
    for python in given.install:
        print(python, try_in(python, wheel, given.constraint).strip(), sep=": ")
    lines = [resolve(wheel, name) for name in (given.extras or extras())] if given.extras is not None else []
    print("\n".join(lines))
    sys.exit("CANNOT" in "".join(lines))


if __name__ == "__main__":
    main()
