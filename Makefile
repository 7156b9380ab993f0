# Every stamp lies inside the environment it describes and is written only after its installation succeeded.
PYTHON ?= python3
VENV := .venv
TF4 := .venv-tf4
MLX := .venv-mlx
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/neoxconv
LLAMA := $(shell sed -n 's/^llama-cpp-python==//p' constraints.txt)
CTRANSLATE2 := $(shell sed -n 's/^ctranslate2==//p' constraints.txt)
SDIST := $(CACHE)/llama_cpp_python-$(LLAMA).tar.gz
WHEEL := $(CACHE)/portable-wheels/llama_cpp_python-$(LLAMA)
CONVERTER := $(CACHE)/llama.cpp-$(LLAMA)
PINS := pyproject.toml constraints.txt
INSTALL := $(VENV)/bin/pip install -q -c constraints.txt

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test lint check docs dist image bench fuzz verify-table oracles clean

help:     ## list the targets
	@sed -n 's/^\([a-z-]*\): .*## /  make \1\t/p' Makefile

demo:     $(VENV)/.run ## make a small checkpoint, convert it to every format, verify each
	$(VENV)/bin/neoxconv demo demo-out

test:     $(VENV)/.test ## run the test suite (PYTEST_ARGS=... is passed on)
	$(VENV)/bin/python -m pytest -n auto --dist worksteal $(PYTEST_ARGS)

lint:     $(VENV)/.dev ## check format, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy --strict neoxconv
	! test -x $(VENV)/bin/hadolint || $(VENV)/bin/hadolint Dockerfile

check:    lint test ## all that CI checks

docs:     $(VENV)/.docs ## build the documentation's site into build/site
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

dist:     $(VENV)/.dev ## build sdist and wheel, check both, and run the demo from the wheel outside of this folder
	rm -rf dist
	$(VENV)/bin/python -m build --quiet
	$(VENV)/bin/twine check --strict dist/*
	$(VENV)/bin/python -m tests.dist dist
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(VENV)/bin/python -m venv "$$folder/venv" && \
	  "$$folder/venv/bin/pip" install -q -c constraints.txt dist/*.whl && \
	  cd "$$folder" && env -u PYTHONPATH venv/bin/neoxconv demo

image:    ## build the Docker image, and run the demo in it on a read-only file system
	docker build --tag neoxconv .
	docker run --rm --read-only --tmpfs /tmp --tmpfs /cache:mode=1777 neoxconv demo /tmp/demo

bench:    $(VENV)/.run ## measure speed and memory
	@for name in encoders page memory; do echo "== $$name"; $(VENV)/bin/python -m benchmarks.$$name || exit 1; done

fuzz:     $(VENV)/.run ## feed damaged and hostile files to every parser: FUZZ_ARGS='--inputs 1000 zip'
	$(VENV)/bin/python -m tests.fuzz $(FUZZ_ARGS)

verify-table: $(VENV)/.test ## how far every target's predictions are: SOURCE=checkpoint TOKENS=ids.npy
	$(VENV)/bin/python -m benchmarks.verify_table --source $(SOURCE) $(if $(TOKENS),--tokens $(TOKENS))

oracles:  $(VENV)/.llama $(VENV)/.ctranslate2 $(TF4)/.oracles $(TF4)/.ctranslate2 $(MLX)/.oracles $(CONVERTER)/convert_hf_to_gguf.py ## install the programs that the tests compare with

clean:    ## remove the environments and all that was made here
	rm -rf $(VENV) $(TF4) $(MLX) build dist demo-out fuzz-failures *.egg-info .*_cache .hypothesis

$(VENV)/bin/pip $(TF4)/bin/pip $(MLX)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null || \
	  { echo "neoxconv needs Python 3.10 to 3.14, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1); try: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(@:/bin/pip=)

$(VENV)/.run: $(PINS) | $(VENV)/bin/pip
	$(INSTALL) -e '.[logits]'
	@touch $@

$(VENV)/.test $(VENV)/.dev $(VENV)/.docs: $(VENV)/.%: $(PINS) | $(VENV)/bin/pip
	$(INSTALL) -e '.[$*]'
	@touch $@

$(VENV)/.llama: $(PINS) $(SDIST) | $(VENV)/.test
	ls $(WHEEL)-*.whl >/dev/null 2>&1 || \
	  CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF" $(VENV)/bin/pip wheel --no-deps -w $(CACHE)/portable-wheels $(SDIST)
	$(INSTALL) $(WHEEL)-*.whl
	@touch $@

# It runs what is written in .venv; its converter needs transformers 4.
$(VENV)/.ctranslate2: $(PINS) | $(VENV)/.test
	$(INSTALL) ctranslate2
	@touch $@

$(TF4)/.ctranslate2: constraints.txt | $(TF4)/.oracles
	$(TF4)/bin/pip install -q ctranslate2==$(CTRANSLATE2)
	@touch $@

$(SDIST): | $(VENV)/bin/pip
	$(VENV)/bin/pip download -q --no-deps --no-binary llama-cpp-python -d $(CACHE) llama-cpp-python==$(LLAMA)

$(CONVERTER)/convert_hf_to_gguf.py: $(SDIST)
	rm -rf $(CONVERTER) && mkdir $(CONVERTER)
	tar -xmzf $(SDIST) -C $(CONVERTER) --strip-components=3 --wildcards \
	  '*/vendor/llama.cpp/gguf-py' '*/vendor/llama.cpp/conversion' '*/vendor/llama.cpp/convert_hf_to_gguf.py'

# The last transformers before version 5, and what llama.cpp's converter imports.
$(TF4)/.oracles: Makefile | $(TF4)/bin/pip
	$(TF4)/bin/pip install -q transformers==4.57.6 torch==2.13.0 safetensors==0.8.0 gguf==0.19.0 'numpy<2.3' \
	  accelerate==1.15.0 'sentencepiece<0.3' 'protobuf>=4.21,<5'
	@touch $@

# MLX on a CPU, and the program that runs language models with it.
$(MLX)/.oracles: Makefile | $(MLX)/bin/pip
	$(MLX)/bin/pip install -q mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2
	@touch $@
