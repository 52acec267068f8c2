"""Entry point of `python -m evals.report`; see evals/report/build.py."""

from evals.report.build import main

if __name__ == "__main__":
    main()
