# What can be done here; `make help` lists it.
PYTHON ?= $(shell command -v python3.11 || echo python3)
BIN := .venv/bin
# The models are tiny: one thread a process and two processes are faster than two threads, and never stall each other.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY ?= 1

# Nothing here needs a hub: the organism is in the package.
report test check notebooks pytest bench execute: export HF_HUB_OFFLINE = 1

.DEFAULT_GOAL := help
.PHONY: help env report test check notebooks pytest bench execute readme export sync hooks site clean

help:  ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

env: .venv/installed  ## the virtual environment .venv, at the exact versions of constraints.txt

# torch first and alone: whichever build of this version pip is set up to find is the one that the rest then keeps.
.venv/installed: constraints.txt settings.ini setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,train,eval]'
	touch $@

report: env  ## dissect the organism and write report/report.html
	$(BIN)/franken dissect organism --out report

test: env check notebooks pytest  ## all that CI runs: notebooks and package in step, the notebooks' tests, pytest

check: env  ## are package, notebooks and README in step?
	PATH="$(CURDIR)/$(BIN):$$PATH" bash .ci/in_step

notebooks: env  ## run every notebook of library and book (but for cells marked notest, slow or gpu)
	$(BIN)/nbdev_test --n_workers 2 --do_print

pytest: env  ## the invariants, on small models
	$(BIN)/python -m pytest -q -n 2 tests

bench: env  ## what interventions, sweeps, attention, comparing and grafting cost (10 GB of disk for a while)
	for bench in tests/bench*.py; do $(BIN)/python $$bench || exit 1; done

export: env  ## write franken/*.py from nbs/library, and tidy the notebooks
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

NB ?= $(shell find nbs -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*' | sort)
execute: env  ## run notebooks and store their outputs: all, or NB=nbs/library/scenes.ipynb
	$(BIN)/python .ci/execute.py $(NB)
	$(BIN)/nbdev_clean

readme: env  ## write README.md from nbs/index.ipynb, outputs as stored there
	$(BIN)/python .ci/readme.py

sync: env  ## pair nbs/*.ipynb with plain scripts in nbs_py/ (not tracked): the newer of the two wins
	find nbs -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*' -print0 | xargs -0 $(BIN)/jupytext --quiet --sync
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

# The hooks and drivers run from the top of the checkout, where .venv need not be active.
hooks: env  ## git hooks that keep notebooks clean and mergeable, and notebook diffs as text
	$(BIN)/nbdev_install_hooks
	printf '#!/bin/sh\n$(BIN)/nbdev_trust\n' > "$$(git rev-parse --git-path hooks)/post-merge"
	git config merge.nbdev-merge.driver '$(BIN)/nbdev_merge %O %A %B %P'
	git config diff.jupytext.textconv '$(BIN)/jupytext --quiet --from ipynb --to py:percent --opt notebook_metadata_filter=-all --opt cell_metadata_filter=-all --output - <'
	git config diff.jupytext.cachetextconv true

site: env  ## the site, into _docs/ (needs Quarto: https://quarto.org/docs/get-started)
	@command -v quarto >/dev/null || { echo 'make site needs Quarto, which no Python registry carries: https://quarto.org/docs/get-started'; exit 2; }
	touch README.md  # were it older than nbs/index.ipynb, nbdev would write a README of its own over it
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_docs

clean:  ## remove what was made: report/, _docs/, _proc/, caches (.venv stays)
	rm -rf report _docs _proc build dist .pytest_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
