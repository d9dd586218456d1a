# make demo   the main job, on a machine with Python and make alone
# make test   formatter, linter, types, import rules, tests
# make slow   the tests that take longest
# make browser  the studio in Chromium
# make gpu    what only an NVIDIA card can show; ARGS=--help says how
# make train-card MINUTES=7   a small model learns on a card; results in build/train-card
# make train-example   the example model from nothing: between four and five hours on two cores
# make lock   docker/*.lock: the hash of everything that the images install
# make sbom   build/sbom/*.json: the same as CycloneDX bills of materials
# make clean  removes build/, with the bundles and results in it, and what tools leave behind; .venv stays
# make dev    .venv with every extra that installs here, for working on the project

PYTHON ?= python3
VENV ?= .venv
MINUTES ?= 7
RECIPES ?= training/recipes/anydoor-card.toml
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

PYTEST = $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=25 --durations-min=5

DEMO_BUNDLE := examples/anydoor-small
DEMO_PICTURE := build/demo.png

.PHONY: demo test slow browser gpu train-card train-example lock sbom dev check proto nightly versions bindings format clean

demo: $(VENV)/.lean
	@mkdir -p $(dir $(DEMO_PICTURE))
	@$(BIN)/anydoor composite --bundle $(DEMO_BUNDLE) \
		--reference examples/object.png --scene examples/scene.png --box "$$(cat examples/scene_box.txt)" \
		--backend onnxruntime --steps 12 --seed 7 --output $(DEMO_PICTURE)

test: $(VENV)/.dev check
	$(PYTEST)

# what builds, trains and measures longest
slow: $(VENV)/.dev
	$(PYTEST) -m "slow and not nightly"

# the studio in Chromium, which must be there: apt-get install chromium. Screenshots in build/studio; the one of
# the documentation is made by `npm run picture`
browser: $(VENV)/.dev
	cd tests/browser && npm install --silent --no-audit --no-fund
	cd tests/browser && PYTHON=$(abspath $(BIN))/python npm test --silent

# needs nothing of this project installed: PYTHON is one that has onnxruntime-gpu
gpu:
	$(PYTHON) benchmarks/card.py $(ARGS)

# a small model learns on a card; RECIPES are others, side by side. Several processes draw objects: threads of
# NumPy's products would be in each other's way. PYTHON is one that has PyTorch for it, and the other packages of '.[train]'
train-card:
	OPENBLAS_NUM_THREADS=1 $(PYTHON) -m training.train_card --minutes $(MINUTES) $(RECIPES)

# goes on where it was stopped
train-example: $(VENV)/.dev
	$(BIN)/python -m training.train training/recipes/anydoor-small.toml
	$(BIN)/python -m training.train training/recipes/anydoor-small-128.toml

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# the gRPC stubs in runtime/rpc, from proto/
proto: $(VENV)/.dev
	$(BIN)/python -m runtime.rpc.generate

# what takes too long for every test run
nightly: $(VENV)/.dev
	$(BIN)/python -m pytest -m nightly
	ANYDOOR_FUZZ_REQUESTS=5000 $(BIN)/python -m pytest tests/runtime/server/test_server_fuzz.py
	ANYDOOR_FUZZ_CHECKPOINTS=20000 $(BIN)/python -m pytest tests/training/network/test_checkpoint_fuzz.py
	$(BIN)/python -m tests.versions

# the lean tests with the oldest versions that pyproject.toml allows, and on other Pythons; downloads them
versions: $(VENV)/.dev
	$(BIN)/python -m tests.versions

# the code against the types of TensorRT 10.3 and 11; downloads both
bindings: $(VENV)/.dev
	$(BIN)/python -m tests.bindings

LOCK = $(BIN)/uv pip compile --quiet --generate-hashes --constraint constraints.txt \
	--custom-compile-command 'make lock' --output-file

# Python and machine are those of the image. cuda-python follows the CUDA of the JetPack
lock: $(BIN)/python
	$(PIP) uv
	echo setuptools | $(LOCK) docker/build.lock --universal --python-version 3.10 -
	$(LOCK) docker/rtx.lock --python-version 3.12 --python-platform x86_64-manylinux_2_28 \
		--extra tensorrt --extra serve pyproject.toml
	echo 'cuda-python<13' | $(LOCK) docker/jetpack6.lock --python-version 3.10 \
		--python-platform aarch64-manylinux_2_28 --extra serve pyproject.toml -
	echo 'cuda-python>=13' | $(LOCK) docker/jetpack7.lock --python-version 3.12 \
		--python-platform aarch64-manylinux_2_28 --extra serve pyproject.toml -

sbom: $(BIN)/python
	$(PIP) cyclonedx-bom
	@mkdir -p build/sbom
	for image in rtx jetpack6 jetpack7; do $(BIN)/cyclonedx-py requirements docker/$$image.lock \
		--pyproject pyproject.toml --output-reproducible --output-file build/sbom/$$image.json || exit 1; done

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

dev: $(VENV)/.dev

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

# the lean runtime: numpy, Pillow, tqdm and ONNX Runtime; no torch
$(VENV)/.lean: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[cpu]'
	@touch $@

# benchmarks and tests are not installed: a path file lets Python find them in this clone
$(VENV)/.dev: $(VENV)/.lean
	$(PIP) --editable '.[cpu,openvino,export,train,tensorrt,dev]'
	@$(BIN)/python -c 'import pathlib, sysconfig; \
		path = pathlib.Path(sysconfig.get_path("purelib"), "anydoor-clone.pth"); \
		path.write_text(f"{pathlib.Path.cwd()}\n")'
	@touch $@

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
