# make demo: environment, data, eight experts, results.  make test: the tests.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: setup demo check fmt test test-slow bench docs clean

setup: .venv/.ok
demo: .venv/.ok
	$(BIN)/pyper quickstart
test: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 -m "not slow"
test-slow: .venv/.llama
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m slow
check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
fmt: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
bench: .venv/.test
	for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done
docs:
	@echo "Nothing to build yet: read README.md, docs/decisions/ and docs/log.md."
clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist

.venv/.ok: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@
.venv/.test: .venv/.ok
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@
# llama.cpp is built from source: minutes, and a C++ compiler. Without it its tests are skipped.
.venv/.llama: .venv/.test
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check 'llama-cpp-python>=0.3'
	touch $@
.venv/.dev: .venv/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@
