"""Run notebooks from top to bottom and keep their outputs.

    python tools/run_notebooks.py [notebook ...]    default: every notebook under nbs/

A notebook whose front matter says `skip_exec` needs real data and runs only where SCELLFM_DATA is set. Cells marked
`eval: false`, or with a flag listed in `tst_flags` of settings.ini, keep their old outputs. A notebook that fails is
not changed, and the exit code is 1.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("SCELLFM_PROGRESS", "0")
from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor

# figures at 80 dots per inch with a palette: a quarter of the size
SMALL_PICTURES = """
import matplotlib; from scellfm.plotting import png as _png
matplotlib.rcParams['figure.dpi'] = 80
get_ipython().display_formatter.formatters['image/png'].for_type(matplotlib.figure.Figure, _png)
"""


def skips(cell, flags: set) -> bool:
    "Whether a test run skips this cell."
    if cell.cell_type != "code" or "nbdev_export" + "(" in cell.source:
        return True
    directives = getattr(cell, "directives_", {}) or {}
    return directives.get("eval:", [""])[0].lower() == "false" or bool(flags & directives.keys())


def run(path: Path) -> bool:
    "Execute one notebook and write its outputs into the file; False if a cell raises an error."
    flags = set(get_config().tst_flags.split())
    processed = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    if getattr(processed, "frontmatter_", {}).get("skip_exec") and "SCELLFM_DATA" not in os.environ:
        print(f"{path}: left as it is (set SCELLFM_DATA to run it)", flush=True)
        return True
    shell = CaptureShell(path, mpl_format="png")
    shell.run_cell(SMALL_PICTURES)
    start = time.time()
    try:
        with working_directory(path.parent):
            shell.run_all(processed, exc_stop=True, preproc=lambda cell: skips(cell, flags))
    except Exception:
        sys.stderr.write(f"{path}\n{shell.prettytb(fname=path)}\n")
        return False
    notebook = read_nb(path)
    for kept, fresh in zip(notebook.cells, processed.cells):
        if not skips(fresh, flags):
            # messages on stderr depend on versions of packages: they are not part of the page
            kept["outputs"] = [o for o in fresh.get("outputs", []) if o.get("name") != "stderr"]
    write_nb(notebook, path)
    nbdev_clean.__wrapped__(str(path))
    print(f"{path}: {time.time() - start:.0f} s", flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path)
    chosen = parser.parse_args().notebooks or sorted(nbglob(as_path=True))
    sys.path.insert(0, str(get_config().config_path))
    return 0 if all([run(path.absolute()) for path in chosen]) else 1


if __name__ == "__main__":
    sys.exit(main())
