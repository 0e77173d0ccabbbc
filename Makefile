# make demo: set up and run the main job on generated data.   make test: set up and pass the tests.
# Nothing but Python 3.11 or newer is needed; everything is installed into .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DEMO   ?= demo
# the real pipeline, for a few minutes: smaller patches, so that a slow CPU gets to see enough of them; all phantoms have contrast
# medium, so their intensities vary less than patients'
DEMO_SETTINGS ?= --set train.minutes=5 --set 'train.patch=[64,64,32]' --set augment.RandShiftIntensityd.offsets=0.1
# two test processes of one thread each are faster on two cores than one of two
JOBS   ?= 2

.PHONY: demo test lint install clean

demo: $(VENV)/.installed
	@test -d $(DEMO)/data/Task03_Liver || $(BIN)/medseg data phantom liver -o $(DEMO)/data --cases 10 --seed 0
	@rm -rf $(DEMO)/runs $(DEMO)/predictions $(DEMO)/evaluation
	$(BIN)/medseg train liver --data $(DEMO)/data --output $(DEMO)/runs $(DEMO_SETTINGS)
	$(BIN)/medseg predict $(DEMO)/runs/liver $(DEMO)/data/Task03_Liver/imagesTs -o $(DEMO)/predictions
	$(BIN)/medseg evaluate $(DEMO)/predictions $(DEMO)/data/Task03_Liver/labelsTs -o $(DEMO)/evaluation --images $(DEMO)/data/Task03_Liver/imagesTs --run $(DEMO)/runs/liver

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("medseg needs Python 3.11 or newer, this is %d.%d: give another with make PYTHON=python3.12" % v[:2])'
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing medseg and what it needs into $(VENV) (minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(DEMO) build dist .pytest_cache .ruff_cache .hypothesis
