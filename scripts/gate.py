"""Hold the gates of a config against a results file. Exit status 0 for go and caution, 3 for no-go.

python -m scripts.gate --config configs/quickstart/gold.yaml --results results/quickstart/perplexity.json
"""

import argparse
import json
from pathlib import Path

from entrypoint import user_errors
from training.config import load
from training.gates import decide, judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--results", required=True, type=Path, help="JSON of an evaluation, with its figures under metrics")
    args = parser.parse_args()
    with user_errors():
        gates = load(args.config).gates
        if not gates:
            raise ValueError(f"{args.config} has no gates to hold the results against")
        if not args.results.is_file():
            raise ValueError(f"there are no results at {args.results}; run the evaluation first")
        results = json.loads(args.results.read_text())["metrics"]
        verdicts = [judge(gate, results) for gate in gates]
        print("\n".join(f"  {verdict}" for verdict in verdicts))
        print(f"decision: {decide(verdicts).upper()}")
    raise SystemExit(3 if decide(verdicts) == "no-go" else 0)


if __name__ == "__main__":
    main()
