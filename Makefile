# make help shows these targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash
RUN := .venv/bin
# Tests start hundreds of processes: each would compile the package anew.
export PYTHONDONTWRITEBYTECODE :=
# Tests that mount file systems need root; everyone else runs the rest.
MINE := $(if $(filter 0,$(shell id -u)),,not root and )
# With real Ray two files or folders at a time, for they wait a lot (of three on two cores, those that train wait for each other); threads of
# an engine that wait must not take the others' cores.
INTEGRATION := OMP_WAIT_POLICY=passive $(RUN)/pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder --durations 25 tests/integration
.PHONY: help setup setup-convert setup-lm-eval quickstart test test-unit test-integration test-full test-ipex test-lab test-lab-full test-lab-ipex pictures lint reference format bench bench-serving clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 22

setup: ## Make .venv with everything pinned (nothing to do when nothing changed); PROFILE=ipex: .venv-ipex
	@scripts/setup $(filter-out stock,$(PROFILE))

setup-convert: ## Make .venv-convert, in which models are converted to OpenVINO
	@scripts/setup convert

setup-lm-eval: setup ## Add lm-eval to .venv, in a folder of its own: what runs the tasks of evaluation.tasks
	@scripts/setup lm-eval

quickstart: setup ## Finetune the real small model on bundled data, serve it, ask it; under 15 minutes on 2 cores
	@$(RUN)/llm-ray quickstart

test: test-unit test-integration ## All tests that need neither root nor a second machine

test-unit: setup ## The fast tests, on several cores
	$(RUN)/pytest --numprocesses auto --maxprocesses 8 -m '$(MINE)not long' tests/unit

test-integration: setup setup-convert setup-lm-eval ## The tests with real Ray, real training, a real endpoint and a browser
	$(INTEGRATION) -m '$(MINE)not long'

test-full: setup setup-convert setup-lm-eval ## Training of every causal architecture, schemas and settings of every kind in every engine, the page from a file to an answer, and what is long of the integration tests: two hours; CI does not run it
	$(RUN)/pytest $(or $(TESTS),tests/full)
	$(if $(TESTS),,$(INTEGRATION) -m '$(MINE)long')

pictures: setup ## Take the pictures of the page that docs/ shows, by the test that goes the whole way
	LLM_RAY_PICTURES=$(CURDIR)/docs/images $(RUN)/pytest tests/full/test_page.py

test-ipex: setup ## Both profiles side by side: the same losses and the same answer with IPEX (make setup PROFILE=ipex before)
	$(RUN)/pytest $(or $(TESTS),tests/ipex)

test-lab: setup ## As root: site.yml and validate.yml against throw-away hosts, both runtimes
	$(RUN)/pytest --timeout 3600 --durations 10 -m 'not long and not ipex' $(or $(TESTS),tests/lab)

test-lab-full: setup ## As root: all playbooks and roles against throw-away hosts, NFS on virtual machines
	$(RUN)/pytest --timeout 3600 --durations 20 -m 'not ipex' $(or $(TESTS),tests/lab)

test-lab-ipex: setup ## As root: the profile ipex on hosts, by the role and in the image; needs a CPU build of torch 2.8 (TORCH_INDEX_URL)
	$(RUN)/pytest --timeout 3600 --durations 10 tests/lab/test_ipex.py

lint: setup ## ruff, mypy, yamllint, shellcheck, and whether generated files are up to date
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/yamllint --strict .
	$(RUN)/shellcheck scripts/setup scripts/lock .ci/run findings/*.sh docker/install docker/llm-ray-entry
	PATH=$(CURDIR)/$(RUN):$$PATH $(RUN)/ansible-lint --offline --profile production -q roles playbooks $(wildcard *.yml) inventory
	@$(MAKE) --no-print-directory reference

reference: ## Check that the generated pages are up to date
	@$(RUN)/python -m llm_ray.conf.reference --check
	@$(RUN)/python -m llm_ray.cli.reference --check
	@$(RUN)/python scripts/sample-inventory --check
	@$(RUN)/python scripts/role-readmes --check

format: setup ## Format the code and write the generated files
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .
	$(RUN)/python -m llm_ray.conf.reference
	$(RUN)/python -m llm_ray.cli.reference
	$(RUN)/python scripts/sample-inventory
	$(RUN)/python scripts/role-readmes

bench: ## Training against TRL, two workers against one: a table and bench-results/benchmarks.json
	@scripts/setup bench
	$(RUN)/python -m benchmarks $(if $(DATA),--data $(DATA))

bench-serving: setup-convert ## The serving league: our engines beside vLLM, ray.serve.llm and llama.cpp; hours, or a part with OPTIONS='--rounds 1 --concurrency 1,4 --prompts 32'
	@scripts/setup bench
	$(RUN)/python -m benchmarks league $(OPTIONS)

clean: ## Remove the environments and caches; models, data and runs stay
	rm -rf .venv .venv-convert .mypy_cache .ruff_cache .pytest_cache .hypothesis bench-results
