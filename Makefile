# Every target makes the virtual environment first, if it is not there or if the requirements changed.
BIN := .venv/bin
REAL := runs/demo-real
DEMO := runs/demo

.PHONY: demo demo-real demo-hearth test test-slow check bench tables screenshots clean

demo: demo-real demo-hearth

demo-real: .venv/stamp
	@echo "This fetches a real model (93 MB) and a real text (6 MB), trains an autoencoder on 400,000 tokens,"
	@echo "judges it, and shows three of its features: about 15 minutes on 2 cores."
	$(BIN)/undertow subject fetch smollm2
	$(BIN)/undertow text fetch brown
	@if [ -e $(REAL) ]; then \
		echo "$(REAL) is there already: training is skipped. To train again: rm -r $(REAL)"; \
	else \
		set -x; $(BIN)/undertow sae train --model smollm2 --site blocks.12.hook_resid_post --width 4096 --k 32 \
			--text brown --tokens 400000 --out $(REAL); \
	fi
	$(BIN)/undertow sae eval $(REAL)
	$(BIN)/undertow features show $(REAL) --random 3

# Removing the folder runs it again.
demo-hearth: .venv/stamp
	@if [ -e $(DEMO) ]; then \
		echo "$(DEMO) is there already; to run it again: rm -r $(DEMO) $(DEMO)-sae"; \
	else \
		set -x; $(BIN)/undertow demo --out $(DEMO); \
	fi

test: .venv/stamp
	HF_HUB_OFFLINE=1 $(BIN)/pytest -q -m "not slow"

test-slow: .venv/stamp
	HF_HUB_OFFLINE=1 $(BIN)/pytest -q -m slow

check: .venv/stamp
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/pytest -q tests/test_architecture.py

bench: .venv/stamp
	$(BIN)/undertow bench harvest
	$(BIN)/undertow bench sae
	$(BIN)/undertow bench dashboard

# The tables of figures in the documentation, from the studies in runs/ladder and runs/ladder-hs2 (docs/results.md).
tables: .venv/stamp
	$(BIN)/python benchmarks/fill_tables.py runs/ladder docs/results.md docs/four-levels.md docs/four-levels.ru.md
	$(BIN)/python benchmarks/fill_tables.py runs/ladder-hs2 docs/results.md docs/four-levels.md docs/four-levels.ru.md

# The pictures of docs/dashboard.md. Needs a finished demo under runs/, another SAE there to compare with, and Chromium.
screenshots: .venv/stamp
	$(BIN)/python benchmarks/screenshots.py runs docs/screenshots

.venv/stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || python3 -m venv .venv
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -e ".[dev]" -c constraints.txt
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
