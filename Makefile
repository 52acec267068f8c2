# make quickstart   from nothing to a trained, evaluated, talking model on this machine
# make test         the tests
# make check        linter and type checker
# make clean        forget the quickstart run (its data stay)

.PHONY: setup quickstart test check clean

setup:
	@scripts/setup.sh

quickstart: setup
	@.venv/bin/python -m scripts.pipeline --plan configs/quickstart/plan.yaml

test:
	@scripts/setup.sh requirements-cluster.txt requirements-parity.txt requirements-demo.txt
	@.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: setup
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

clean:
	rm -rf checkpoints/quickstart logs/quickstart results/quickstart
