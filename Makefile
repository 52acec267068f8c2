# make setup        every package (requirements.txt); the other commands install what they need
# make quickstart   from nothing to a trained, evaluated, talking model on this machine
# make test         the tests
# make fuzz         50,000 changed inputs (configs, data, checkpoints, GGUF, templates); FUZZ_INPUTS=N for another number
# make demo         talk to the newest model under checkpoints/ in a browser
# make check        linter and type checker
# make clean        forget the quickstart run (its data stay)

.PHONY: core setup quickstart test fuzz demo check clean

core:
	@scripts/setup.sh

setup:
	@scripts/setup.sh requirements.txt

quickstart: core
	@.venv/bin/python -m scripts.pipeline --plan configs/quickstart/plan.yaml

test:
	@scripts/setup.sh requirements.txt requirements-cluster.txt requirements-parity.txt requirements-demo.txt
	@.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

fuzz:
	@scripts/setup.sh requirements.txt requirements-parity.txt
	@FUZZ_INPUTS=$${FUZZ_INPUTS:-50000} .venv/bin/python -m pytest tests/fuzz

demo:
	@scripts/setup.sh requirements-demo.txt
	@.venv/bin/python demo_ui.py

check: core
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

clean:
	rm -rf checkpoints/quickstart logs/quickstart results/quickstart
