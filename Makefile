# What there is to run. `make help` lists it; everything is built in the release profile, so that torch-sys compiles once.
SHELL := bash
MODEL ?= models/nano
ADDRESS ?= 127.0.0.1:50051
# Served beside it, to compare with.
SIBLING ?= models/nano-ar
LACUNA := target/release/lacuna
# How the model that ships was trained; its folder's training/curve.jsonl has the curve.
TRAIN ?= --minutes 85 --batch 16 --learning-rate 1e-3 --dtype bf16 --seed 1
# Its autoregressive sibling: the same tasks, batches, steps and optimiser.
TRAIN_AR ?= --objective autoregressive --tokenizer models/nano --steps 24900 --batch 16 --learning-rate 1e-3 --dtype bf16 --seed 1
# Its sibling that fills block after block begins with its weights.
TRAIN_BLOCK ?= --objective block --block-length 8 --tokenizer models/nano --from models/nano --minutes 34 --batch 16 \
	--learning-rate 6e-4 --dtype bf16 --seed 1 --threads 1
# How the draft heads of the autoregressive model that ships were trained; drafters/*/training/curve.jsonl has the curves.
TEACHER ?= models/nano-ar
DRAFTERS ?= $(TEACHER)/drafters-new
TRAIN_HEADS ?= --layers 1 --learning-rate 3e-3 --dtype bf16 --seed 1 --threads 1
# Results that are committed (their index.toml says what docs/BENCHMARKS.md says of them), and what `make sweep` adds to them.
RESULTS ?= benches/results/cpu-2-threads
PLAN ?= benches/plans/pair.toml
# A task of the kind that the model has learnt.
EXAMPLE := \# Return the sum of the numbers in xs that are greater than 17.\ndef solve(xs):\n

.DEFAULT_GOAL := help
.PHONY: help setup setup-tests build cuda serve demo test fuzz fmt clippy doc eval bench sweep report train train-ar train-block train-drafters clean

help: ## list what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo "  MODEL=$(MODEL) and ADDRESS=$(ADDRESS) may be set; LIBTORCH names a libtorch 2.11 of your own"

setup: ## check the tools, install libtorch, fetch the crates
	@scripts/setup-libtorch.sh

setup-tests: ## install what the tests' clients need: .venv, tests/node, Chromium
	@scripts/setup-tests.sh

build: setup ## build target/release/lacuna
	cargo build --release --locked

cuda: setup ## build target/release/liblacuna_*.so, CUDA graphs and kernels for a machine with a GPU
	@scripts/build-cuda.sh

serve: build ## serve MODEL and SIBLING on ADDRESS, with a page
	@echo 'Call it from another terminal (README.md has Python too):'
	@echo "  $(LACUNA) generate --server $(ADDRESS) \$$'$(EXAMPLE)'"
	@echo "  grpcurl -plaintext -d '{\"text\": \"$(EXAMPLE)\"}' $(ADDRESS) lacuna.v1.Generation/Generate"
	@echo 'Or watch it on the page whose address is logged below'
	$(LACUNA) serve $(addprefix --model ,$(MODEL) $(filter-out $(MODEL),$(SIBLING))) --address $(ADDRESS)

demo: build ## start a server, watch a canvas resolve, stop the server
	@scripts/demo.sh $(MODEL)

test: setup setup-tests ## run every test
	cargo test --release --locked

fuzz: setup ## run each fuzzer for FUZZ_SECONDS (60)
	@scripts/fuzz.sh

fmt: ## format the code
	cargo fmt

clippy: setup ## lint, with warnings denied
	cargo clippy --release --all-targets --locked -- -D warnings

doc: setup ## build the documentation, with warnings denied
	RUSTDOCFLAGS="-D warnings" cargo doc --release --no-deps --locked

eval: build ## measure how often MODEL is right
	$(LACUNA) eval --model $(MODEL)

bench: build ## measure how fast MODEL is
	$(LACUNA) bench step --model $(MODEL)
	cargo bench --locked

sweep: build ## run PLAN, methods by settings by requests in flight, into RESULTS
	$(LACUNA) sweep $(PLAN) -o $(RESULTS)

report: build ## make docs/BENCHMARKS.md and its plots of RESULTS
	rm -f docs/plots/*.svg
	$(LACUNA) report $(RESULTS) -o docs/BENCHMARKS.md

train: build ## train the model that ships anew, into models/nano-new
	$(LACUNA) train --out models/nano-new $(TRAIN)

train-ar: build ## train its autoregressive sibling anew, into models/nano-ar-new
	$(LACUNA) train --out models/nano-ar-new $(TRAIN_AR)

train-block: build ## train its sibling by blocks anew, into models/nano-block-new
	$(LACUNA) train --out models/nano-block-new $(TRAIN_BLOCK)

train-drafters: build ## train draft heads for TEACHER anew, into DRAFTERS
	$(LACUNA) train drafter --teacher $(TEACHER) --out $(DRAFTERS) --kind redrafter --steps 6000 --draft-vocabulary 256 $(TRAIN_HEADS)
	$(LACUNA) train drafter --teacher $(TEACHER) --out $(DRAFTERS) --kind medusa --steps 4000 $(TRAIN_HEADS)

clean: ## remove what was built, but neither libtorch nor what the tests need
	cargo clean
