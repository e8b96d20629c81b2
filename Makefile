# make demo   the whole line on the embedded data, in a fresh .venv
# make test   the test suite          make check   ruff, mypy, layers, docs
# make slow   tests of Ray, Spark, C++ and several training processes, minutes
# make e2e    tests in MLflow's UI, of its webhook, and on PostgreSQL, 3 minutes
# make soak   an hour of load on a server: promotions, a canary, killed workers
# make images an image of a packaged model, built by buildah and run by podman; as root, minutes
# make CI     what CI runs
# make gpu    tests and benchmark on a CUDA device, eight minutes, by a python3 that has torch and
#             transformers

PYTHON ?= python3
VENV := .venv
GPU_OUT ?= gpu-results
GPU_FLAGS ?=
# folders whose tests marked gpu need no MLflow
GPU_FOLDERS := tests/artifacts tests/evaluation tests/runtimes tests/serving/device tests/system tests/training
E2E_FLAGS ?=
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export MLFLOW_TRACKING_URI ?= sqlite:///$(CURDIR)/mlflow.db
export MLFLOW_DISABLE_TELEMETRY ?= true

.PHONY: demo test slow e2e soak images check format clean CI gpu

demo: $(VENV)/.all
	mlflow run . --env-manager local --experiment-name pt-deploy \
	  -P epochs=2 -P learning_rate=4e-4 -P student_epochs=2 -P static_epochs=8 -P seconds=1

# one thread a process, and quick compilation: what is tested here is not speed. Three processes on two
# cores, because much waits. Each takes a third, and then from what the others have left: so few
# files are set up more than once
test: $(VENV)/.dev
	MLFLOW_TRACKING_URI= OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 \
	  AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL=O0 pytest -n 3 --dist worksteal

slow: $(VENV)/.dev
	MLFLOW_TRACKING_URI= OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 pytest -m slow

soak: $(VENV)/.dev
	MLFLOW_TRACKING_URI= python benchmarks/soak.py

e2e: $(VENV)/.dev
	MLFLOW_TRACKING_URI= OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 pytest -n 2 -m slow tests/e2e $(E2E_FLAGS)

images: $(VENV)/.dev
	tests/packaging/images.sh

check: $(VENV)/.dev
	ruff check
	ruff format --check
	mypy
	lint-imports
	python docs/generate_reference.py --check
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

format: $(VENV)/.dev
	ruff check --fix
	ruff format

CI: check test e2e

# no .venv: on a borrowed machine nothing can be installed, so other test files could not even be
# imported. The tests' failure ends it last
gpu: export PYTHONPATH := .:$(PYTHONPATH)
gpu:
	mkdir -p $(GPU_OUT)
	timeout 200 $(PYTHON) -m pytest -m gpu -rs --continue-on-collection-errors \
	  $$(grep -rl --include='test_*.py' 'mark[.]gpu' $(GPU_FOLDERS)) \
	  > $(GPU_OUT)/tests.txt 2>&1; tests=$$?; tail -n 40 $(GPU_OUT)/tests.txt; \
	  timeout 270 $(PYTHON) benchmarks/gpu.py --out $(GPU_OUT) $(GPU_FLAGS) && exit $$tests

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

# torch goes first and by its exact version: a range could pull another build with CUDA
$(VENV)/.all: setup.cfg conda.yaml pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	sed -n 's/^ *- \([a-z].*==.*\)/\1/p' conda.yaml > $(VENV)/pins.txt
	pip install --quiet $$(grep '^torch==' $(VENV)/pins.txt)
	pip install --quiet --constraint $(VENV)/pins.txt --editable '.[all]'
	touch $@

$(VENV)/.dev: $(VENV)/.all
	pip install --quiet --constraint $(VENV)/pins.txt --editable '.[all,dev]'
	touch $@
