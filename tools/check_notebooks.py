"""Fail when scellfm/ differs from what the notebooks export, or when a notebook carries superfluous metadata.

Works on a copy: nothing in the checkout is written.
"""

import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def differing(kind: str, copy: Path, folder: str, pattern: str) -> list[str]:
    "The files below `folder` that differ between the checkout and the regenerated copy."
    names = {str(p.relative_to(base)) for base in (ROOT, copy) for p in (base / folder).rglob(pattern)}
    names = {name for name in names if ".ipynb_checkpoints" not in name and "__pycache__" not in name}
    same = lambda name: (
        (ROOT / name).exists() and (copy / name).exists() and filecmp.cmp(ROOT / name, copy / name, shallow=False)
    )
    return [f"{kind}: {name}" for name in sorted(names) if not same(name)]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("settings.ini", "pyproject.toml", "README.md"):
            if (ROOT / name).exists():
                shutil.copy(ROOT / name, copy / name)
        for name in ("nbs", "scellfm"):
            shutil.copytree(
                ROOT / name,
                copy / name,
                ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "_quarto.yml"),
            )
        bin_folder = Path(sys.executable).parent
        for command in ("nbdev_export", "nbdev_clean"):
            subprocess.run([bin_folder / command], cwd=copy, check=True, stdout=subprocess.DEVNULL)
        problems = differing("not in step with its notebook (run `make export`)", copy, "scellfm", "*.py")
        problems += differing("not clean (run `make clean`)", copy, "nbs", "*.ipynb")
    print("\n".join(problems) or "notebooks are clean and exported")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
