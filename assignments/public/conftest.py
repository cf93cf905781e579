"""Finds the scripts, names the marks, says in one line what is still to be written, and sums up by exercise."""

import os
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "ppo.py").is_file())))
os.environ.pop("SOLVED", None)  # tests are about your own functions


def pytest_configure(config):
    for number in range(1, 15):
        config.addinivalue_line("markers", f"E{number}: a property of exercise E{number}")
    if config.option.tbstyle == "auto":
        config.option.tbstyle = "short"


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
    passed, failed, to_write = (
        Counter(report.nodeid.split("::test_")[1].split("_")[0] for report in terminalreporter.getreports(outcome))
        for outcome in ("passed", "failed", "to write")
    )
    for name in sorted(passed | failed | to_write, key=lambda name: int(name[1:])):
        wrong = f", {failed[name]} fail" * bool(failed[name]) + f", {to_write[name]} to be written" * bool(
            to_write[name]
        )
        terminalreporter.write_line(f"{name}: {passed[name]} tests pass{wrong or ': done, as far as they can tell'}")
