# make quickstart   from nothing to a trained, evaluated, talking model on this machine
# make test         the tests
# make demo         talk to the quickstart's model in a browser
# make check        linter and type checker
# make clean        forget the quickstart run (its data stay)

.PHONY: setup quickstart test demo check clean

setup:
	@scripts/setup.sh

quickstart: setup
	@.venv/bin/python -m scripts.pipeline --plan configs/quickstart/plan.yaml

test:
	@scripts/setup.sh requirements-cluster.txt requirements-parity.txt requirements-demo.txt
	@.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

demo:
	@scripts/setup.sh requirements-demo.txt
	@found=$$(ls -td checkpoints/quickstart/dpo/step_*/ 2>/dev/null || ls -td checkpoints/quickstart/sft/step_*/ 2>/dev/null \
		|| ls -td checkpoints/quickstart/gold/step_*/ 2>/dev/null); \
	if [ -z "$$found" ]; then echo "error: the quickstart has left no model yet; run make quickstart" >&2; exit 2; fi; \
	.venv/bin/python demo_ui.py --checkpoint "$$(echo "$$found" | head -n 1)"

check: setup
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

clean:
	rm -rf checkpoints/quickstart logs/quickstart results/quickstart
