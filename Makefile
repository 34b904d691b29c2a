# make demo: from nothing to a trained policy and pictures of what it foresees. make demo-gr2: the same with
# GR-2. make test: the tests.
PYTHON ?= python3
VENV := .venv
REQUIREMENTS := requirements.txt
ON := . $(VENV)/bin/activate &&

$(VENV)/ready: $(REQUIREMENTS) pyproject.toml bin/torchrun
	$(PYTHON) -m venv $(VENV)
	$(ON) pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	touch $@

demo: $(VENV)/ready
	$(ON) python train.py --stage pretrain
	$(ON) torchrun --nproc 8 train.py --stage finetune
	$(ON) python sample.py --show-predictions
	$(ON) python eval_calvin.py

demo-gr2: $(VENV)/ready
	$(ON) python train.py --stage pretrain --preset gr2-tiny --out out/gr2-pretrain
	$(ON) torchrun --nproc 8 train.py --preset gr2-tiny --init out/gr2-pretrain --out out/gr2-finetune
	$(ON) python sample.py --checkpoint out/gr2-finetune --roll-out 4 --data data/tabletop-demonstrations \
		--out out/gr2-sample
	$(ON) python eval_calvin.py --checkpoint out/gr2-finetune --out out/gr2-eval

test: $(VENV)/ready
	$(ON) pip install --quiet --disable-pip-version-check pytest
	$(ON) python -m pytest -q test_model.py tests course

.PHONY: demo demo-gr2 test
