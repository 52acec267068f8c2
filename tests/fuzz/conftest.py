"""Print how many inputs each fuzzer ran, and how many were accepted."""

import importlib.util
from typing import Any

# Of requirements-parity.txt.
collect_ignore_glob = [] if importlib.util.find_spec("hypothesis") else ["test_*.py"]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for found in terminalreporter.stats.values() for report in found]
    counts = {
        name: text for report in reports for name, text in getattr(report, "user_properties", ())
    }
    for name, text in counts.items():
        if name.startswith("fuzz "):
            terminalreporter.write_line(f"{name}: {text}")
