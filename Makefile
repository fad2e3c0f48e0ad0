# make demo   set up .venv, train on a synthetic benchmark, paint a real film: everything lands in runs/demo/
# make test   set up .venv, run the tests
# make lint   ruff and mypy
# make bench  time the kernels against their literal formulas and the best of torch, on this machine

PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test lint bench

demo: $(INSTALLED)
	rm -rf runs/demo
	$(BIN)/python launch/demo.py --out runs/demo

# by files: what one makes once is not made by several processes side by side
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python launch/bench.py kernels

# rebuilt whenever the requirements change; the stamp is written last, so a broken install is not taken for a whole one
$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt wheel torch torchvision torchaudio numpy
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e ".[demo,dev]"
	touch $(INSTALLED)
