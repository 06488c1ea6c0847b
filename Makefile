# Everything a person or CI runs here. `make` lists the targets.
# Python of an existing .venv, else the newest one that diffray runs on; `make setup PYTHON=...` takes another.
PYTHON ?= $(shell for each in .venv/bin/python python3.13 python3.12 python3.11 python3; do \
	$$each -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$each && break; done)
CONFIG ?= configs/demo.yaml
BIN := .venv/bin
INCEPTION := .cache/inception-2015-12-05.pt
EFFICIENTNET := .cache/efficientnet-lite0.safetensors
# Bytecode of the tests is kept even where PYTHONDONTWRITEBYTECODE is set: four processes collect them all.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n 2 --dist loadfile
OWN := benchmarks cluster diffray examples ray_jobs scripts serving tests

# Programs that start programs find the environment's (ninja for DeepSpeed, python for Ray) before the machine's.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup demo subject check test journeys faults lint format serve bench-gpu base-model configuration-page lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# Nothing is left for a first start to compile, also where PYTHONDONTWRITEBYTECODE is set: compileall writes anyway.
setup: .venv/complete $(BIN)/diffray $(INCEPTION) $(EFFICIENTNET) ## install everything into .venv, skipped when nothing changed
	@$(BIN)/python -m compileall -q $(OWN)

# torch goes first and by pip, which takes the build meant for this machine; uv then keeps it. Both compile what they
# install, uv when asked; what an older set-up left is compiled behind them (templates among the packages fail).
.venv/complete: requirements.lock
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info[:2] <= (3, 13) or sys.exit(1); print("set-up with Python", sys.version.split()[0])' \
		|| { echo "error: Python 3.11, 3.12 or 3.13 is needed: make setup PYTHON=..."; exit 1; }
	[ "$$($(BIN)/python -V 2>/dev/null)" = "$$($(PYTHON) -V)" ] || \
		$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.8 $$(grep -E '^torch==' requirements.lock)
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	touch $@

# The command, of this checkout; a wheel brings its own.
$(BIN)/diffray: .venv/complete
	printf '%s\n' '#!$(CURDIR)/$(BIN)/python' 'import sys' 'sys.path.insert(0, "$(CURDIR)")' \
		'from diffray.command import main' 'sys.exit(main())' > $@
	chmod +x $@

$(INCEPTION): ray_jobs/weights/fetch.py .venv/complete
	$(BIN)/python -m ray_jobs.weights.fetch inception
	touch $@

$(EFFICIENTNET): ray_jobs/weights/fetch.py .venv/complete
	$(BIN)/python -m ray_jobs.weights.fetch efficientnet
	touch $@

demo: setup ## run the main job end to end, then ask the model it made for four pictures
	$(BIN)/python -m cluster.submit --config $(CONFIG) -- python -m ray_jobs.pipeline --config $(CONFIG)
	$(BIN)/python -m serving.command --config $(CONFIG) --ask 4

subject: setup ## learn one cat from nine pictures, then draw it crying (docs/subject.md)
	$(BIN)/python -m cluster.submit --config configs/dreambooth.yaml -- \
		python -m ray_jobs.pipeline --config configs/dreambooth.yaml
	$(BIN)/python -m serving.command --config configs/dreambooth.yaml --ask 2 --prompt "a crying nch cat"

check: lint ## check style and types, and run the tests that need neither Ray nor a model (3 minutes)
	$(PYTEST) -m "not ray and not slow" tests/unit tests/k8s

# What needs Ray, in new processes: two, each with a Ray of its own, since one computes while the other's starts.
test: setup ## run the tests
	@begun=$$(date +%s); \
	$(PYTEST) -m "not ray and not faults and not journeys" && \
	$(PYTEST) --no-loadscope-reorder -m "ray and not faults and not journeys"; \
	code=$$?; echo "make test took $$(($$(date +%s) - begun)) seconds"; exit $$code

journeys: setup ## walk the whole way with bases, pictures and methods of every kind (minutes)
	$(BIN)/python -m pytest tests/journeys tests/ray/test_nothing_left.py tests/ray/test_api.py
	$(BIN)/python -m pytest -m journeys tests/ray/test_gpus.py tests/unit/test_benchmark_gpu.py

faults: setup ## take machines, disks and processes away, and see what is lost (as root; docs/faults.md)
	$(BIN)/python -m benchmarks.faults

lint: setup ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

serve: setup ## serve the champion over HTTP until Ctrl-C
	$(BIN)/python -m serving.command --config $(CONFIG)

bench-gpu: setup ## what a GPU gives, in eight minutes: training, evaluation, serving, all at once
	$(BIN)/python -m benchmarks.gpu

base-model: setup ## train the demo's base model from nothing (an afternoon on two cores)
	$(BIN)/python -m examples.emoji base
	$(BIN)/python -m examples.emoji pictures
	$(BIN)/python -m ray_jobs.pretrain --config configs/pretrain_emoji.yaml

configuration-page: setup ## write docs/configuration.md anew
	$(BIN)/python -m scripts.configuration_page

# One lock for every Python that diffray runs on; lines that are for other systems alone are left out.
lock: .venv/complete ## resolve pyproject.toml into requirements.lock anew
	grep '^#' requirements.lock > .venv/lock
	$(BIN)/uv pip compile --quiet pyproject.toml --extra dev --universal --python-version 3.11 \
		--no-annotate --no-header --no-emit-index-url \
		| grep -vE "^(nvidia-|cuda-|triton==)|sys_platform == '(win32|emscripten)'" >> .venv/lock
	cp .venv/lock requirements.lock

clean: ## remove what runs, tests and tools left (not .venv, not .cache)
	rm -rf runs .diffray build *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find cluster diffray ray_jobs serving examples scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
