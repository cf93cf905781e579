"""Finds the scripts, names the marks, says in one line what is still to be written, and sums up by exercise."""

import os
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "ppo.py").is_file())))
os.environ.pop("SOLVED", None)  # tests are about your own functions


def pytest_configure(config):
    for number in range(1, 15):
        config.addinivalue_line("markers", f"E{number}: a property of exercise E{number}")
    config.option.tbstyle = config.option.tbstyle.replace("auto", "short")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(item.name.split("_")[1])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(call):
    outcome = yield
    if call.excinfo and call.excinfo.errisinstance(NotImplementedError):
        outcome.get_result().to_write = True


def pytest_report_teststatus(report):
    if hasattr(report, "to_write"):  # one line at the end instead of a traceback each
        return "to write", "w", "TO WRITE"


def pytest_terminal_summary(terminalreporter):
    counts = defaultdict(Counter)  # exercise -> outcome -> tests
    for outcome, word in (("passed", "tests pass"), ("failed", "fail"), ("to write", "to be written")):
        for report in terminalreporter.getreports(outcome):
            counts[report.nodeid.split("::test_")[1].split("_")[0]][word] += 1
    for name in sorted(counts, key=lambda name: int(name[1:])):
        told = ", ".join(f"{count} {word}" for word, count in counts[name].items())
        done = ": done, as far as these tests can tell" * (set(counts[name]) == {"tests pass"})
        terminalreporter.write_line(f"{name}: {told}{done}")
