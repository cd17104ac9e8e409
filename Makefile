# make demo          set up, train ECA-ResNet-18 on handwritten digits, evaluate the best checkpoint
# make demo-light    the same with ECA-MobileNetV2
# make demo-detect   Mask R-CNN with ECA-ResNet-18 on digits over photographs, with a picture
# make ablation      no attention, SE, ECA-NS and ECA of every k on the digits, three seeds each
# make evidence-smoke  a whole study on a tiny part of the digits, in two minutes: docs/EVIDENCE.md
# make benchmarks    every benchmark, with JSON files in runs/benchmarks: half an hour on a CPU
# make test          set up, run the tests; make test-faults: kills and full disks, minutes long (KILLS=60: more)
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
KILLS ?= 24

.PHONY: demo demo-light demo-detect ablation evidence-smoke benchmarks test test-faults lint clean

$(READY): requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $(READY)

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
	$(RUN) -m tools.ablation demo:digits --jobs 2 -- --epochs 4

evidence-smoke: $(READY)
	$(RUN) -m tools.study tools/study_plans/smoke.json --jobs 2

benchmarks: $(READY)
	$(RUN) benchmarks/all.py --out runs/benchmarks

test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2

test-faults: $(READY)
	OMP_NUM_THREADS=1 KILLS=$(KILLS) $(RUN) -m pytest -m faults -n 2

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) demo_data
