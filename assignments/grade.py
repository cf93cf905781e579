"""Grade submissions: pytest in a process per exercise, points per property, one sentence per failure.

    python assignments/grade.py handed_in/alice handed_in/bob.zip        # folders, archives, files
    python assignments/grade.py downloads --csv > scores.csv             # a folder of them, with reasons
    python assignments/grade.py /autograder/submission --gradescope /autograder/results/results.json

A test is a property. 40 % of a function's points are shared by its public tests, 60 % by its hidden ones; the first of
each is the formula itself, and without it the others of its kind earn nothing. While an exercise is graded all others
are the reference's, so that no mistake is paid for twice. As root, student code runs as nobody.
"""

import argparse
import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import exercises
from exercises import CLOSED, EXERCISES, KIT, TESTS, Exercise
from handed_in import read_submission, submissions

SHARES = {"public": 0.4, "hidden": 0.6}
# 4 GB of memory, on Linux
COMMAND = 'ulimit -Sd 4194304 2>/dev/null; exec "$0" -B -m pytest -p no:cacheprovider --assert=plain --tb=short "$@"'


class Property(NamedTuple):
    """One test of one function, and what it earned."""

    exercise: str
    function: str
    group: str  # 'public' or 'hidden'
    test: str
    most: float
    score: float
    failure: str  # empty if it holds


def lay_out(folder: Path, exercise: Exercise, source: str) -> None:
    """The project with a student's file in it, all other exercises solved, the tests; nothing that solves this one."""
    sources = dict(exercises.reference())
    for other in EXERCISES:
        for name in other.functions if other.file == exercise.file and other != exercise else ():
            source = exercises.graft(source, name, sources[exercise.file])
    for name in exercise.functions:
        exercises.find(source, name)
    sources[exercise.file] = source
    module, names = CLOSED.get(exercise.id, ("", ()))
    for name in names:
        closed = f'        raise PermissionError("{name} is closed while {exercise.id} is graded")\n'
        sources[module] = exercises.with_body(sources[module], name, closed)
    for path in (TESTS["hidden"], *KIT.glob("public/*.py")):
        sources[f"tests/{path.name}"] = path.read_text("utf-8")
    sources |= {"pytest.ini": "[pytest]\n", "solved.py": (KIT / "student" / "solved.py").read_text("utf-8")}
    exercises.write(folder, sources)
    (folder / "out").mkdir()
    folder.chmod(0o755)
    (folder / "out").chmod(0o777)  # whoever runs the tests writes their result


def run_tests(exercise: Exercise, source: str, seconds: int, seed: int, user: str | None) -> dict[str, str]:
    """What failed: test -> one sentence, empty if it passed. The key '' says why no test has a result."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        lay_out(Path(folder), exercise, source)
        environment = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH") if key in os.environ}
        environment |= {"HOME": f"{folder}/out", "PYTHONPATH": folder, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            ["bash", "-c", COMMAND, sys.executable, "--junitxml=out/results.xml", "tests", "-m", exercise.id],
            cwd=folder,
            env=environment | {"SEED": str(seed)},
            user=user,
            start_new_session=True,
            **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL),
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return {"": f"it took longer than {seconds} seconds"}
        finally:
            with contextlib.suppress(ProcessLookupError):  # the processes that it started, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        cases = []
        with contextlib.suppress(OSError, ElementTree.ParseError):
            cases = ElementTree.parse(f"{folder}/out/results.xml").findall(".//testcase[@name]")
        if not cases:
            return {"": "its process ended before its tests did: too much memory, or the code stops Python"}
        broken = any(case.find("error") is not None for case in cases)  # the file could not be imported
        return {"" if broken else case.get("name", ""): sentence(case, exercise.file) for case in cases}


def sentence(case: ElementTree.Element, file: str) -> str:
    """Why a test failed; empty if it passed."""
    bad = next(iter(case.findall("failure") + case.findall("error") + case.findall("skipped")), None)
    if bad is None:
        return ""
    text = bad.text or ""
    message = (re.findall(r"^E +(\w.*)", text, re.M) or [bad.get("message", "")])[-1 if bad.tag == "error" else 0]
    kind, _, said = message.partition(": ")
    if said and (kind == "AssertionError" or re.match(r"E\d+: write", said)):
        return said
    where = re.findall(rf"^\S*\b{re.escape(file)}:\d+: in .*\n +(.*)", text, re.M)
    return f"it raised {message[:300]}" + (f", at: {where[-1]}" if where else "")


def grade_exercise(
    exercise: Exercise, source: str | Exception | None, seconds: int = 60, seed: int = 0, user: str | None = None
) -> list[Property]:
    """The properties of an exercise as a student's file has them; an exception or None says why there is no text."""
    try:
        if not isinstance(source, str):
            raise source or ValueError("it is not in the submission")
        found = run_tests(exercise, source, seconds, seed, user)
    except SyntaxError as error:
        found = {"": f"{exercise.file}, line {error.lineno}: {error.msg}; a file that is no Python cannot be graded"}
    except (ValueError, LookupError, RecursionError, MemoryError) as error:
        found = {"": f"{exercise.file}: {error.args[0] if error.args else error}"}
    results = []
    for function, points in exercise.functions.items():
        for group, share in SHARES.items():
            tests = exercises.properties(group)[exercise.id, function]
            failures = [found.get("", found.get(test, "it was not tried")) for test in tests]
            if failures[0]:
                failures = [failure or "holds, but earns nothing until the formula does" for failure in failures]
            for test, failure in zip(tests, failures):
                most = points * share / len(tests)
                results.append(Property(exercise.id, function, group, test, most, 0.0 if failure else most, failure))
    return results


def grade(sources: dict[str, str | Exception], *settings: object) -> list[Property]:
    """All properties of a submission: module -> its text, or why there is none; seconds, seed, user as above."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        work = [pool.submit(grade_exercise, e, sources.get(e.file[:-3]), *settings) for e in EXERCISES]
        return [result for part in work for result in part.result()]


def points(results: list[Property], exercise: str = "") -> str:
    """Their sum, of one exercise or of all."""
    score = sum(result.score for result in results if exercise in ("", result.exercise))
    return f"{score:.2f}".rstrip("0").rstrip(".")


def reasons(results: list[Property], exercise: str) -> list[str]:
    """Each failure of an exercise once, with the function and the kinds of tests that met it."""
    found: dict[tuple[str, str], list[str]] = {}
    for result in results:
        if result.exercise == exercise and result.failure:
            found.setdefault((result.function, result.failure), []).append(result.group)
    return [f"{name}, {' and '.join(dict.fromkeys(met))} tests: {text}" for (name, text), met in found.items()]


def table(name: str, notes: list[str], results: list[Property]) -> str:
    """Points per exercise, and under each what failed."""
    lines = [name, *(f"  note: {note}" for note in notes)]
    for e in EXERCISES:
        lines.append(f"  {e.id:4} {e.title:36} {points(results, e.id):>5} / {e.points:g}")
        lines += [f"         {reason}" for reason in reasons(results, e.id)]
    return "\n".join([*lines, f"  {'total':41} {points(results):>5} / 100"])


def gradescope(notes: list[str], results: list[Property], seconds: float) -> dict:
    """Gradescope's results.json (gradescope-autograders.readthedocs.io, specs): hidden tests show after publication."""
    tests = [
        {
            "name": f"{result.exercise} {result.test.split('_', 2)[2].replace('__', ': ').replace('_', ' ')}",
            "score": round(result.score, 6),
            "max_score": round(result.most, 6),
            "status": "failed" if result.failure else "passed",
            "output": result.failure or "passed",
            "visibility": "visible" if result.group == "public" else "after_published",
        }
        for result in results
    ]
    return {"tests": tests, "execution_time": round(seconds), "output": "\n".join(notes), "stdout_visibility": "hidden"}


def who_runs(user: str | None) -> str | None:
    """The user for student code: as asked, else nobody where that is possible. ValueError if it cannot run Python."""
    chosen = user if user is not None else "nobody" if os.geteuid() == 0 else ""
    try:
        if chosen:
            subprocess.run([sys.executable, "-c", "import pytest, torch"], user=chosen, cwd="/", check=True)
        return chosen or None
    except (OSError, LookupError, ValueError, subprocess.SubprocessError) as error:
        if user:
            raise ValueError(f"--user {user} cannot run {sys.executable} ({error})") from None
        print(f"warning: student code runs as you, for {chosen} cannot run {sys.executable}", file=sys.stderr)
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("submissions", nargs="+", type=Path, help="folders, archives or files, or a folder of them")
    parser.add_argument("--gradescope", type=Path, metavar="results.json", help="one submission: write its result")
    parser.add_argument("--csv", action="store_true", help="print one line per submission instead of tables")
    parser.add_argument("--seconds", type=int, default=60, help="time limit per exercise (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the hidden tests' inputs; choose your own")
    parser.add_argument("--user", help="run student code as this user (default: nobody, if you are root)")
    args = parser.parse_args()
    try:
        if args.gradescope and len(args.submissions) != 1:
            raise ValueError(f"--gradescope takes one submission, not {len(args.submissions)}")
        found = submissions(args.submissions)
        user = who_runs(args.user)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = csv.writer(sys.stdout)
    if args.csv:
        rows.writerow(["submission", "total", *(exercise.id for exercise in EXERCISES), "why"])
    for path in args.submissions if args.gradescope else found:
        start, notes = time.monotonic(), []
        results = grade(read_submission(path, notes), args.seconds, args.seed, user)
        name = path.name if len(args.submissions) == 1 else str(path)
        if args.gradescope:
            text = json.dumps(gradescope(notes, results, time.monotonic() - start), indent=2)
            args.gradescope.write_text(text + "\n", encoding="utf-8")
        if args.csv:
            notes += [f"{e.id} {reason}" for e in EXERCISES for reason in reasons(results, e.id)]
            rows.writerow([name, points(results), *(points(results, e.id) for e in EXERCISES), "; ".join(notes)])
        else:
            print(table(name, notes, results), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
