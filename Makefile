# Every target works alone on a fresh clone: it makes .venv from requirements.lock first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# uv does not read pip's settings; pass on where wheels lie, so that a CPU wheel of the pinned torch is found.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

.PHONY: setup demo test unit slow lint format bench lock clean

setup: $(VENV)/.installed

# Bytecode is written at once, as pip does: else the first start of everything, or every start where Python is told to write
# none, compiles torch, Ray and transformers anew, in each of their many processes.
$(VENV)/.installed: requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed; name it by make PYTHON=..."; exit 1; }
	@echo "making $(VENV) from requirements.lock (about 3 GB; a minute or two the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv || echo "uv cannot be installed; pip does the work"
	@if test -x $(BIN)/uv; then \
		$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock && \
		$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .; \
	else \
		$(BIN)/python -m pip install --quiet -r requirements.lock && \
		$(BIN)/python -m pip install --quiet --no-deps -e .; \
	fi
	@touch $@

demo: setup
	$(BIN)/vilseg demo --out runs/demo

# Unit tests share the cores; the others start clusters that want all of them.
test: setup unit
	$(BIN)/python -m pytest tests/integration tests/e2e

unit: setup
	$(BIN)/python -m pytest -n 2 tests/unit

slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/check_docstrings.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/python -m benchmarks train_input --json
	$(BIN)/python -m benchmarks real_photos --json

# CUDA packages stay out of the lock: torch's own wheel asks for the right ones, and a CPU wheel for none.
lock: setup
	echo "torch==2.13.0" > $(VENV)/constraints.txt
	$(BIN)/uv pip compile --quiet pyproject.toml --all-extras --no-annotate --no-header --python-version 3.11 \
		--constraint $(VENV)/constraints.txt --output-file $(VENV)/all.lock
	grep -vE '^(nvidia-|cuda-|triton)' $(VENV)/all.lock | sed 's/^\(torch==[0-9.]*\)+cpu/\1/' > requirements.lock

clean:
	rm -rf $(VENV) runs store
