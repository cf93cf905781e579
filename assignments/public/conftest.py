"""Finds the scripts, names the marks E1 to E14, and sums the tests up by exercise."""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "ppo.py").is_file())))


def pytest_configure(config):
    for number in range(1, 15):
        config.addinivalue_line("markers", f"E{number}(function): a test of exercise E{number}")


def pytest_terminal_summary(terminalreporter):
    passed, failed = (
        Counter(report.nodeid.split("::test_E")[1].split("_")[0] for report in terminalreporter.getreports(outcome))
        for outcome in ("passed", "failed")
    )
    for number in sorted({*passed, *failed}, key=int):
        wrong = f", {failed[number]} fail" if failed[number] else ": done, as far as these tests can tell"
        terminalreporter.write_line(f"E{number}: {passed[number]} tests pass{wrong}")
