# make demo: set up and run the main job. make test: set up and run the tests. Nothing else is installed by hand.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo setup test slow lint speed nni clean

demo: $(READY)
	$(BIN)/nas search --benchmark nas-bench-201/cifar10 --strategy regularized-evolution --queries 300 --seed 0 --out runs/demo
	$(BIN)/nas report runs/demo

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[data,train,moo,onnx,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt timm
	touch $(READY)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

speed: $(READY)
	for script in benchmarks/speed/speed_*.py; do $(BIN)/python -m benchmarks.speed.$$(basename $$script .py) || exit 1; done

# NNI pins an old filelock and setuptools, so its tests have an environment of their own.
nni:
	$(PYTHON) -m venv .venv-nni
	grep -v '^filelock==' constraints.txt | grep -v '^setuptools==' > .venv-nni/constraints.txt
	.venv-nni/bin/python -m pip install --quiet -c .venv-nni/constraints.txt 'setuptools>=77,<81' wheel
	.venv-nni/bin/python -m pip install --quiet --no-build-isolation -c .venv-nni/constraints.txt -e '.[nni,dev]'
	OMP_NUM_THREADS=1 .venv-nni/bin/python -m pytest -m 'slow or not slow' tests/nas/test_interop_nni.py

clean:
	rm -rf $(VENV) .venv-nni build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
