# Every target sets up .venv by itself; it needs Python 3.11 to 3.13 and git, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# notebooks and files of tests run two at a time, one thread each (numba, left alone, raises the number of torch too); bars
# would only clutter a log
QUIET := SCELLFM_PROGRESS=0 OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 MPLBACKEND=agg

.PHONY: help demo test check-form check-site export clean notebooks tutorials docs site-check benchmarks ray

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "scellfm needs Python 3.11 to 3.13; this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	# --no-compile: Python compiles what is imported when it is imported, a tenth of what is installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

demo: $(READY)  ## the main job on real cells: train, classify, screen, report
	$(BIN)/scellfm demo

test: $(READY)  ## everything that must hold
	$(MAKE) --jobs 2 check-form check-site
	$(QUIET) SCELLFM_QUICK=1 $(BIN)/nbdev_test --n_workers 2 --timing
	$(QUIET) $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check-form: $(READY)
	$(BIN)/ruff format --quiet --check nbs tests tools benchmarks setup.py scellfm/__init__.py scellfm/*/__init__.py scellfm/*/*/__init__.py
	$(BIN)/ruff check --quiet nbs tests tools benchmarks setup.py
	$(QUIET) $(BIN)/python tools/check_notebooks.py

check-site: $(READY)
	$(QUIET) $(BIN)/python tools/build_site.py --check

export: $(READY)  ## write scellfm/ from the notebooks
	$(BIN)/nbdev_export

clean: $(READY)  ## format notebooks and code, and strip superfluous metadata from the notebooks
	$(BIN)/ruff format nbs tests tools benchmarks setup.py scellfm/__init__.py scellfm/*/__init__.py scellfm/*/*/__init__.py
	$(BIN)/nbdev_clean

notebooks: $(READY)  ## run every notebook and keep what it shows
	$(QUIET) $(BIN)/python tools/run_notebooks.py

tutorials: $(READY)  ## run the tutorials alone, at full size, and keep what they show
	$(QUIET) $(BIN)/python tools/run_notebooks.py nbs/tutorials/*.ipynb nbs/index.ipynb

docs: $(READY)  ## render the site into _docs/, and README.md
	$(QUIET) $(BIN)/python tools/build_site.py
	if command -v quarto >/dev/null; then $(BIN)/nbdev_docs; fi

site-check: docs  ## open every page of the site in headless Chromium, wide and narrow
	$(BIN)/python tools/check_site_in_browser.py

benchmarks: $(READY)  ## measure every promise of speed and memory
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

ray: .venv-ray/.ready  ## run an atlas on Ray, for real, in an environment of its own
	$(QUIET) .venv-ray/bin/python -m pytest -rs tests/test_atlas_ray.py

.venv-ray/.ready: settings.ini setup.py constraints.txt
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,ray]"
	touch .venv-ray/.ready
