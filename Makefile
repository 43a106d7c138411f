# make demo    train a tiny base model, turn it into a Zero by reinforcement learning, write the report
# make test    run the tests
# make check   lint, formatting, types
# Everything is installed into .venv, once. Another interpreter: make demo PYTHON=python3.12

PYTHON = python3
VENV = .venv
BIN = $(VENV)/bin
OUT = runs/demo
INSTALL = $(BIN)/python -m pip install --quiet -c constraints.txt

.PHONY: demo test check clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/thinkstack demo --out $(OUT)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Files that say when the environment was last brought up to date; pip makes `thinkstack` follow the sources.
$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v '$(PYTHON)' >/dev/null 2>&1 || { \
	  echo "error: no '$(PYTHON)' found; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: '$(PYTHON)' is $$('$(PYTHON)' --version 2>&1); thinkstack needs Python 3.11 or newer:" \
	    "make PYTHON=python3.11" >&2; exit 1; }
	@'$(PYTHON)' -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' cannot make virtual environments (no venv or ensurepip module);" \
	    "on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || '$(PYTHON)' -m venv $(VENV)
	@echo "installing into $(VENV) (PyTorch is large: this takes a few minutes the first time)"
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(INSTALL) -e '.[test,dev]'
	@touch $@

clean:
	rm -rf $(VENV)
