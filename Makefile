# make venv          set up: .venv with everything installed
# make demo          set up, train ECA-ResNet-18 on handwritten digits, evaluate the best checkpoint
# make demo-light    the same with ECA-MobileNetV2
# make demo-detect   Mask R-CNN with ECA-ResNet-18 on digits over photographs, with a picture
# make ablation      no attention, SE, ECA-NS and ECA of every k on the digits, three seeds each
# make evidence-smoke  a whole study on a tiny part of the digits, in two minutes: docs/EVIDENCE.md
# make benchmarks    every benchmark, with JSON files in runs/benchmarks: half an hour on a CPU
# make gpu           what needs a GPU, in ten minutes: results/gpu-NAME.json, rows for docs/PERFORMANCE.md
# make test          set up, run the quick tests; make test-slow: the long ones, with kills and full
#                    disks (KILLS=60: more); make test-all: both
# make test-pythons  demo and tests with each Python from 3.10 on that is here, each in a venv of its own
# make test-oldest   the tests with the oldest packages that requirements.txt allows
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
KILLS ?= 24

# The Pythons of test-pythons: those of pyenv, whose shims on the PATH may not start, else the PATH's.
PYTHONS ?= $(foreach n,10 11 12 13 14,$(firstword $(wildcard \
	$(HOME)/.pyenv/versions/3.$n.*/bin/python3.$n $(addsuffix /python3.$n,$(subst :, ,$(PATH))))))
# What test-oldest installs: each lower bound of requirements.txt as the release itself.
OLDEST = $(shell sed -nE 's/^([a-z-]+)>=([0-9.]+).*/\1~=\2.0/p' requirements.txt | \
	grep -E '^(torch|torchvision|numpy|pillow|matplotlib|tensorboard)~')

.PHONY: venv demo demo-light demo-detect ablation evidence-smoke benchmarks gpu test test-slow test-all test-pythons test-oldest lint clean

$(READY): requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $(READY)

venv: $(READY)

demo: $(READY)
	$(RUN) main.py demo:digits --action demo --seed 0
	$(RUN) main.py -e --resume auto --action demo -a eca_resnet18

demo-light: $(READY)
	$(RUN) light_main.py demo:digits --action demo --seed 0
	$(RUN) light_main.py -e --resume auto --action demo

demo-detect: $(READY)
	$(RUN) detect_main.py demo:shapes --action demo --seed 0
	$(RUN) detect_main.py -e --resume auto -a mask_rcnn -b eca_resnet18 --action demo

ablation: $(READY)
	$(RUN) -m tools.study tools/study_plans/ablation.json --jobs 2

evidence-smoke: $(READY)
	$(RUN) -m tools.study tools/study_plans/smoke.json --jobs 2

benchmarks: $(READY)
	mkdir -p runs/benchmarks
	for name in memory tail train_step inference deployment data_loading resume_overhead; do \
	    $(RUN) benchmarks/$$name.py --json runs/benchmarks/$$name.json || failed="$$failed $$name"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

gpu: $(READY)
	$(RUN) benchmarks/gpu.py

test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

test-slow: $(READY)
	OMP_NUM_THREADS=1 KILLS=$(KILLS) $(RUN) -m pytest -m 'slow or faults' -n 2 --dist worksteal

test-all: test test-slow

test-pythons:
	set -e; for python in $(PYTHONS); do \
		echo "== $$($$python --version)"; \
		$(MAKE) demo test PYTHON=$$python VENV=.venvs/$$(basename $$python); \
	done

test-oldest:
	$(PYTHON) -m venv .venvs/oldest
	.venvs/oldest/bin/python -m pip install --quiet --disable-pip-version-check \
		$(OLDEST) -r requirements-dev.txt
	OMP_NUM_THREADS=1 .venvs/oldest/bin/python -m pytest -n 2

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) .venvs demo_data
