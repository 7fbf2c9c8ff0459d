PYTHON ?= python3
BIN := .venv/bin
OLDEST_TORCH := 2.11.0
OLDEST := model branches kernels training artifacts export_model hf_integration tied_weights peft \
    serve serve_clients chat_template structured streaming prefix_cache data documents \
    prepare_documents tokenizer_travels
# pip need not compile what nobody imports: the first import writes the bytecode.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo assistant site test test-slow test-gpu test-oldest container base-image chaos clean

demo: .venv/core data/text/train.bin  ## train a small model on the built-in corpus
	$(BIN)/python testv2.py --preset demo

assistant: .venv/dev data/text/train.bin tinymamba_model_latest.pt  ## teach the demo to answer
	$(BIN)/python -m data.instructions --force
	$(BIN)/python data/prepare.py --chat data/assistant/train.jsonl --val_input data/assistant/val.jsonl \
	    --tokenizer data/text/tokenizer.json --output_dir data/assistant --force
	$(BIN)/python peft.py --method full --train_data data/assistant/train.bin \
	    --val_data data/assistant/val.bin --steps 300 --lr 2e-3 --output_dir assistant_model
	$(BIN)/python -m benchmarks.assistant \
	    --checkpoints tinymamba_model_latest.pt assistant_model/tinymamba_model_latest.pt
	@echo "to chat: $(BIN)/python streaming.py --checkpoint assistant_model/tinymamba_model_latest.pt --chat"

site: .venv/dev tinymamba_model_latest.pt node_modules  ## the demo as a web page that runs the model
	$(BIN)/python export_model.py --format web --output_dir site --force
	@echo "to open it: $(BIN)/python -m http.server 8080 --bind 127.0.0.1 --directory site"

test: .venv/dev  ## style, types and tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-slow: .venv/dev  ## the checks that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

test-gpu: .venv/dev  ## that a GPU, if there is one, gives the same results as the CPU
	$(BIN)/python -m pytest -m gpu tests/test_gpu.py

test-oldest: .venv-oldest/dev  ## the oldest versions of PyTorch and of every package that work
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 3 --dist loadfile $(OLDEST:%=tests/test_%.py)

container: .venv/dev  ## build the image with docker or podman, run it, and break what it promises
	$(BIN)/python -m pytest -m container tests/test_image.py

base-image:  ## the images it needs from Debian's packages, if no registry can be reached
	tests/base_image.sh $(ENGINE)

chaos: .venv/dev  ## break runs on purpose a hundred times: half an hour
	OMP_NUM_THREADS=1 CHAOS=1 $(BIN)/python -m pytest -m 'not gpu' tests/test_reliability.py tests/test_restarts.py

clean:  ## remove the environments, caches, builds and prepared data
	rm -rf .venv .venv-oldest data/text build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

tinymamba_model_latest.pt: | .venv/dev data/text/train.bin
	$(BIN)/python testv2.py --preset demo

data/text/train.bin: | .venv/core
	$(BIN)/python data/prepare.py

node_modules: package.json
	npm install --no-package-lock --no-audit --no-fund
	touch $@

.venv/core: requirements.txt
.venv/dev: requirements-dev.txt requirements.txt
.venv/core .venv/dev:
	$(PYTHON) -m venv --upgrade-deps .venv  # a new pip installs in half the time
	$(BIN)/python -m pip install --no-compile -r $<
	touch .venv/core $@

.venv-oldest/dev: requirements-dev.txt requirements.txt
	$(PYTHON) -m venv --upgrade-deps .venv-oldest
	grep -hv '^-r\|^torch==' requirements.txt requirements-dev.txt > .venv-oldest/packages
	.venv-oldest/bin/python -m pip install --no-compile uv torch==$(OLDEST_TORCH)
	.venv-oldest/bin/uv pip install --python .venv-oldest/bin/python --resolution lowest-direct \
	    -r .venv-oldest/packages torch==$(OLDEST_TORCH)
	touch $@
