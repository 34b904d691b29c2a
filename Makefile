# make demo: from nothing to a trained policy and pictures of what it foresees. make test: the tests.
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

test: $(VENV)/ready
	$(ON) pip install --quiet --disable-pip-version-check pytest
	$(ON) python -m pytest -q test_model.py tests course

.PHONY: demo test
