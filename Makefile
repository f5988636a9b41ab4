# Everything runs in .venv, which the first target that needs it creates.
VENV    := .venv
BIN     := $(VENV)/bin
UV      := VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install -q -c constraints.txt
SCALE   ?= demo
RESULTS ?= $(if $(filter demo,$(SCALE)),results,results/$(SCALE)-scale)
# Where reports go: beside the records but over nothing that git tracks, unless INTO=DIR is given.
REPORT   = $(BIN)/deltalab-report results=$(RESULTS) $(if $(INTO),into=$(INTO))
SWEEP   ?= hydra/launcher=$(if $(filter demo,$(SCALE)),workers,gpus)
PAPER   := table1 fig1 fig2 fig3 fig4 fig5 fig6 fig7 fig8 fig9 fig10 fig11 fig12 fig13
# Those that take an hour, or train models first: apart from `reproduce`.
APART   := atlas regime
# Studies of the committed points of others: nothing is run.
GATHERED := scores
STUDIES := intensity rules predict saturation merging compression sotu visionfuse safety
export HF_HUB_OFFLINE ?= 1
# Some containers forbid Python to keep bytecode: importing torch then takes twice as long each time.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help architectures demo demo-llm test check slurm ray fuzz nulls audit constraints bench format report results recompute clean
.PHONY: reproduce $(PAPER) $(STUDIES) $(APART) $(GATHERED)

help: ## show this list
	@grep -hE '^[a-z_-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

demo: $(VENV)/.user ## install, sweep every kind of edit over the embedded pairs, print the table
	@$(BIN)/deltalab -m experiment=demo results=$(RESULTS)
	@$(REPORT) experiment=demo

demo-llm: $(VENV)/.user ## the same on small language models, scored by lm-eval
	@$(BIN)/deltalab -m experiment=demo_llm results=$(RESULTS)
	@$(REPORT) experiment=demo_llm

$(PAPER) $(STUDIES) $(APART): $(VENV)/.user
	@$(BIN)/deltalab -m experiment=$@ scale=$(SCALE) results=$(RESULTS) $(SWEEP)
	@$(BIN)/python -m experiments.paper $@ scale=$(SCALE) results=$(RESULTS)

$(GATHERED): $(VENV)/.user
	@$(BIN)/python -m experiments.paper $@ from=committed results=$(RESULTS)

visionfuse: results/models/visionfuse/4
results/models/visionfuse/4: $(VENV)/.user
	@$(BIN)/python -m experiments.visionfuse

regime: results/models/regime/text_0.008/run.json
results/models/regime/text_0.008/run.json: $(VENV)/.user
	@$(BIN)/python -m experiments.regime

# One after the other, those first whose points others share.
reproduce: $(VENV)/.user ## every table, figure and study of the paper at SCALE=demo (or paper), the page
	@for name in fig8 fig11 fig12 $(filter-out fig8 fig11 fig12,$(PAPER)) $(STUDIES); do \
	  $(MAKE) --no-print-directory $$name || exit; done
	@for name in $(GATHERED); do $(MAKE) --no-print-directory $$name || exit; done
	@$(BIN)/deltalab-report results=$(RESULTS) into=$(RESULTS) >/dev/null

test: $(VENV)/.dev ## install the dev tools, run the whole test suite
	@$(BIN)/pytest -n 2 --dist worksteal

check: $(VENV)/.dev ## formatting, lint, types, tests with doctests
	@$(BIN)/ruff format --check deltalab experiments tests
	@$(BIN)/ruff check deltalab experiments tests
	@$(BIN)/mypy
	@$(BIN)/pytest -n 2 --dist worksteal

slurm: $(VENV)/.dev ## sweeps on a real SLURM of one node (root, Debian)
	@if experiments/slurm/one_node.sh install; then $(BIN)/pytest -m slurm tests/test_slurm.py -n0 -x; \
	else echo "slurm: skipped, it cannot be installed or started here"; fi

ray: $(VENV)/.dev ## sweeps on a real Ray
	@$(BIN)/pytest -m ray tests/test_ray.py -n0 -s

architectures: $(VENV)/.dev ## every causal language model of transformers against from_pretrained
	@$(BIN)/python tests/architectures.py results/architectures.md

format: $(VENV)/.dev ## format the code
	@$(BIN)/ruff format deltalab experiments tests
	@$(BIN)/ruff check --fix deltalab experiments tests

report: $(VENV)/.user ## tables and figures from the records in RESULTS
	@$(REPORT)

fuzz: $(VENV)/.dev ## property tests with 36,000 cases, some minutes
	@HYPOTHESIS_PROFILE=fuzz $(BIN)/pytest tests/test_fuzz_checkpoints.py tests/test_fuzz_settings.py tests/test_fuzz_edits.py tests/test_fuzz_rows.py tests/test_fuzz_meaning.py

nulls: $(VENV)/.dev ## every check against its null in 1,000 drawn data sets (six minutes on two cores)
	@DELTALAB_NULLS=1000 $(BIN)/pytest -n 2 --dist worksteal tests/test_verdicts.py

audit: $(VENV)/.user ## known vulnerabilities of the pinned packages, where an index can be reached
	@$(BIN)/python -m experiments.audit

# Change a version in constraints.txt, then this; any index gives the same hashes for the same files.
constraints: $(VENV)/.uv ## the hashes of the versions in constraints.txt, from the package index
	@grep -o '^[^ #]*==[^ ]*' constraints.txt > $(VENV)/pins.txt
	@$(BIN)/uv pip compile -q --no-deps --generate-hashes --no-header --no-annotate $(VENV)/pins.txt \
	  -o $(VENV)/hashes.txt
	@{ grep '^#' constraints.txt; cat $(VENV)/hashes.txt; } > $(VENV)/pins.txt
	@mv $(VENV)/pins.txt constraints.txt

bench: $(VENV)/.dev ## speed of the edits, of streaming and of the engine, against their floors
	@$(BIN)/python -m experiments.bench.edits
	@$(BIN)/python -m experiments.bench.order
	@$(BIN)/python -m experiments.bench.audit
	@$(BIN)/python -m experiments.bench.lowrank
	@d=$$(mktemp -d) && $(BIN)/python -m experiments.bench.streamed $$d; rm -rf $$d
	@d=$$(mktemp -d) && $(BIN)/python -m experiments.bench.merged $$d; rm -rf $$d
	@d=$$(mktemp -d) && $(BIN)/python -m experiments.bench.streamed $$d 4.2 3 nomergekit; rm -rf $$d
	@$(BIN)/python -m experiments.bench.packed
	@$(BIN)/python -m experiments.bench.engine
	@$(BIN)/python -m experiments.bench.lm_eval bare
	@$(BIN)/python -m experiments.bench.lm_eval scoring
	@$(BIN)/python -m experiments.bench.lm_eval start

results: ## the demo again, its committed report and its table in the README
	@$(MAKE) --no-print-directory demo INTO=$(RESULTS)
	@$(BIN)/python -m experiments.readme

recompute: $(VENV)/.user ## every committed number again, from the committed points
	@$(BIN)/python -m experiments.paper.recompute

clean: ## remove the environment and caches, keep results
	rm -rf $(VENV) .mypy_cache .ruff_cache dist *.egg-info

$(VENV)/.uv:
	@echo "creating $(VENV)"
	@python3 -m venv $(VENV)
	@sed -n '/^uv==/,/[^\\]$$/p' constraints.txt > $(VENV)/uv.txt
	@$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r $(VENV)/uv.txt
	@touch $@

$(VENV)/.user: $(VENV)/.uv pyproject.toml constraints.txt
	@echo "installing deltalab and what it needs (a few minutes at most)"
	@$(UV) -e '.[all]'
	@touch $@

$(VENV)/.dev: $(VENV)/.user
	@$(UV) -e '.[dev]'
	@touch $@
