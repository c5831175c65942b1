# make demo | gpu | test | lint: each creates .venv and installs what is missing.
PYTHON ?= python3
VENV := .venv
DEMO := $(if $(DATA),--data "$(DATA)") $(if $(TARGET),--target "$(TARGET)") $(if $(WEIGHTS),--weights "$(WEIGHTS)") \
	$(if $(BACKBONE),--backbone "$(BACKBONE)") $(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(DRAWS),--draws $(DRAWS))

GPU := $(if $(DATA),--target.root "$(DATA)") $(if $(WEIGHTS),--weights "$(WEIGHTS)") $(if $(OUTPUT),--output "$(OUTPUT)") \
	$(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(DRAWS),--draws $(DRAWS))

.PHONY: demo gpu test lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/python -m benchmarks.demo $(DEMO)

gpu: $(VENV)/.installed
	$(VENV)/bin/python -m benchmarks.gpu --config benchmarks/configs/gpu_resnet18.yaml $(GPU)

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo results build *.egg-info
