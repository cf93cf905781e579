"""Seeded bugs: every entry is a small change to a script, and a test that must fail because of it.

    python tests/mutants.py                  # all of them, in one process
    python tests/mutants.py --only ppo       # those whose file or name holds this text

A mutant is served by an import hook: no file is changed. First the named tests must pass on the code as it is; then
each runs on its mutants, and a mutant under which all of them still pass has survived. Exit code 1 if one survives,
or if an entry no longer fits the code (its `old` text must occur exactly once).
"""

import argparse
import contextlib
import importlib.abc
import importlib.util
import io
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent


@dataclass(frozen=True)
class Mutant:
    """`new` instead of `old` in a script; one of `tests` ('name', or 'file::name') must fail."""

    file: str
    name: str
    old: str
    new: str
    tests: str

    @property
    def node_ids(self) -> list[str]:
        """Example: 'last_value test_eval::auc' of model.py -> tests/test_model.py::test_last_value, ..."""
        ids = []
        for test in self.tests.split():
            file, _, name = test.rpartition("::")
            ids.append(f"{TESTS / (file or 'test_' + Path(self.file).stem)}.py::{name}")
        return ids

    def source(self) -> str:
        """The script with the bug in it. ValueError if the entry no longer fits."""
        text = (ROOT / self.file).read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file}: {self.old!r} occurs {text.count(self.old)} times")
        return text.replace(self.old, self.new)


MUTANTS = []


# ---- running -------------------------------------------------------------------------------------------------------


class Served(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports of one module get the mutated source, under the path of the real file."""

    def __init__(self, mutant: Mutant):
        self.name, self.path = Path(mutant.file).stem, ROOT / mutant.file
        self.code = compile(mutant.source(), str(self.path), "exec")

    def find_spec(self, fullname, path=None, target=None):
        if fullname == self.name:
            return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def exec_module(self, module):
        exec(self.code, module.__dict__)


class FirstFailure:
    """A pytest plugin: which test failed first."""

    name = None

    def pytest_runtest_logreport(self, report):
        if report.failed and self.name is None:
            self.name = report.nodeid.split("::", 1)[1]

    def pytest_collectreport(self, report):
        if report.failed:
            raise RuntimeError(f"{report.nodeid} cannot be collected: {report.longreprtext}")


def failing(node_ids: list[str], folder: str) -> str | None:
    """Run tests in this process, with every module of the project imported anew; the first that fails, or None."""
    import pytest

    own = {path.stem for folder in (ROOT, TESTS) for path in folder.glob("*.py")}
    for name in own & sys.modules.keys() - {"mutants"}:
        del sys.modules[name]
    first, output = FirstFailure(), io.StringIO()
    options = ["-x", "-q", "-s", "--tb=short", f"--rootdir={ROOT}", f"--basetemp={folder}/t", "-p", "no:cacheprovider",
               "-p", "no:hypothesispytest", "-W", "ignore"]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = pytest.main([*options, *node_ids], plugins=[first])
    if code not in (0, 1):
        raise RuntimeError(f"pytest ended with {code!r}\n{output.getvalue()}")
    return first.name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="text in the file or the name of a mutant")
    only = parser.parse_args().only
    chosen = [mutant for mutant in MUTANTS if only in mutant.file or only in mutant.name]
    start, survived, stale = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        broken = failing(sorted({node_id for mutant in chosen for node_id in mutant.node_ids}), folder)
        if broken:
            print(f"{broken} fails without any mutant")
            return 1
        print(f"the named tests pass on the code as it is ({time.monotonic() - start:.0f} s)", flush=True)
        for mutant in chosen:
            try:
                served = Served(mutant)
            except ValueError as error:
                stale += 1
                print(f"STALE     {mutant.file}: {mutant.name}: {error}", flush=True)
                continue
            sys.meta_path.insert(0, served)
            try:
                catcher = failing(mutant.node_ids, folder)
            finally:
                sys.meta_path.remove(served)
            survived += catcher is None
            verdict = f"caught by {catcher}" if catcher else "SURVIVED"
            print(f"{mutant.file}: {mutant.name}: {verdict}", flush=True)
    print(f"{len(chosen)} mutants, {survived} survived, {stale} stale, {time.monotonic() - start:.0f} s")
    return int(bool(survived or stale or not chosen))


if __name__ == "__main__":
    sys.exit(main())
