# make setup        install all packages (requirements.txt); other targets install their own
# make quickstart   train, evaluate and chat with a small model on this machine; MINUTES=30 writes
#                   and runs a plan of that length (docs/new_plan.md)
# make test         run the tests, three processes on two cores: tests also wait for processes
# make fuzz         fuzz configs, data, checkpoints, GGUF files and templates (FUZZ_INPUTS=50000)
# make demo         chat with the newest run's model under checkpoints/ in a browser
# make check        run the linter and the type checker
# make clean        delete the quickstart run (MINUTES=30: that one), but not its data

QUICKSTART = quickstart$(if $(MINUTES),_$(MINUTES)m)

.PHONY: core setup quickstart test fuzz demo check clean

core:
	@scripts/setup.sh

setup:
	@scripts/setup.sh requirements.txt

quickstart: core
ifdef MINUTES
	@test -d configs/$(QUICKSTART) || .venv/bin/python -m scripts.new_plan --gpu cpu \
		--minutes $(MINUTES) --name $(QUICKSTART)
endif
	@.venv/bin/python -m scripts.pipeline --plan configs/$(QUICKSTART)/plan.yaml

test:
	@scripts/setup.sh requirements.txt requirements-dev.txt requirements-cluster.txt \
		requirements-parity.txt requirements-demo.txt
	@.venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

fuzz:
	@scripts/setup.sh requirements.txt requirements-dev.txt requirements-parity.txt
	@FUZZ_INPUTS=$${FUZZ_INPUTS:-50000} .venv/bin/python -m pytest tests/fuzz

demo:
	@scripts/setup.sh requirements-demo.txt
	@.venv/bin/python demo_ui.py

check:
	@scripts/setup.sh requirements-dev.txt
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

clean:
	rm -rf checkpoints/$(QUICKSTART) logs/$(QUICKSTART) results/$(QUICKSTART)
