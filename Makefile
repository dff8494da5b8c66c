# Needs Python >= 3.10 and make. Everything is installed into .venv, nowhere else.
#   make quickstart   train MnM on InvertedPendulum-v5, evaluate, save the model and its learning curve
#   make test         ruff, mypy --strict, pytest
#   make docs         the documentation, in docs/_build/html
#   make constraints  pin the newest versions of everything in constraints.txt
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# Without --no-compile pip compiles every module of every package, which takes as long as the rest of the install.
INSTALL := $(PIP) install --prefer-binary --no-compile --constraint constraints.txt --editable
# The networks are small: more threads only get in each other's way, and the tests run side by side.
export OMP_NUM_THREADS ?= 1
unexport PYTHONDONTWRITEBYTECODE

.NOTPARALLEL:
.PHONY: quickstart test lint docs constraints clean

quickstart: OMP_NUM_THREADS = 2
quickstart: $(VENV)/.base
	$(BIN)/python examples/quickstart.py

test: lint
	$(BIN)/python -m pytest --quiet --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/.tests
	$(BIN)/ruff check --quiet --output-format concise
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy --strict --no-error-summary

docs: $(VENV)/.docs
	@$(BIN)/python -m sphinx --quiet -W --keep-going -b html docs docs/_build/html
	@$(BIN)/python docs/check_links.py docs/_build/html
	@echo "Open docs/_build/html/index.html"

# One stamp for each set of packages: an install is repeated only when its pins or the project's metadata change.
$(VENV)/.created:
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.base: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing sb3_mismatch into $(VENV): a minute or two"
	@$(INSTALL) .
	@touch $@

$(VENV)/.tests $(VENV)/.docs: $(VENV)/.%: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing what the $* need into $(VENV): a minute or two"
	@$(INSTALL) ".[$*]"
	@touch $@

constraints:
	rm -rf $(VENV)-pins
	$(PYTHON) -m venv $(VENV)-pins
	$(VENV)-pins/bin/python -m pip install --quiet torch==2.13.0 --editable ".[tests,docs]"
	$(VENV)-pins/bin/python -m pip freeze --exclude-editable > $(VENV)-pins/freeze.txt
	sed -n '/^#/p' constraints.txt > $(VENV)-pins/header.txt
	sed -E 's/\+cpu$$//; s/$$/; python_version >= "3.11"/' $(VENV)-pins/freeze.txt | cat $(VENV)-pins/header.txt - > constraints.txt

clean:
	rm -rf $(VENV) $(VENV)-pins docs/_build
