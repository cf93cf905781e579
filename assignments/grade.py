"""Grade submissions: pytest in a process per exercise, points per property, one sentence per failure.

    python assignments/grade.py handed_in/alice handed_in/bob.zip        # folders, archives, files
    python assignments/grade.py downloads --csv > scores.csv             # a folder of them, with reasons
    python assignments/grade.py /autograder/submission --gradescope /autograder/results/results.json

A test is a property. 40 % of a function's points are shared by its public tests, 60 % by its hidden ones; the first of
each is the formula itself, and without it the others of its kind earn nothing. While an exercise is graded all others
are the reference's, so that no mistake is paid for twice. As root, student code runs as nobody. A container protects
the machine, not this script (README.md).
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
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import exercises
from exercises import CLOSED, EXERCISES, KIT, TESTS, Exercise
from handed_in import read_submission, submissions

SHARES = {"public": 0.4, "hidden": 0.6}
MEMORY = 4 << 30  # bytes that student code may allocate
LIMITS = f"import resource, sys\nif sys.platform == 'linux':\n    resource.setrlimit(resource.RLIMIT_DATA, ({MEMORY},) * 2)\n"


@dataclass
class Property:
    """One test of one function, and what it earned."""

    exercise: str
    function: str
    group: str  # 'public' or 'hidden'
    test: str
    most: float
    score: float = 0.0
    failure: str = "not graded: the time was up"  # empty if it passed


def properties(exercise: Exercise) -> list[Property]:
    """Those of an exercise, before they are tried."""
    return [
        Property(exercise.id, function, group, test, points * share / len(tests))
        for function, points in exercise.functions.items()
        for group, share in SHARES.items()
        for tests in [exercises.properties(group)[exercise.id, function]]
        for test in tests
    ]


# ---- one exercise, in a process of its own -------------------------------------------------------------------------


def in_reference(exercise: Exercise, source: str) -> str:
    """A student's file with the functions of all other exercises replaced by the reference's."""
    for other in EXERCISES:
        for name in other.functions if other.file == exercise.file and other != exercise else ():
            source = exercises.graft(source, name, exercises.reference()[exercise.module])
    for name in exercise.functions:
        exercises.find(source, name)
    return source


def lay_out(folder: Path, exercise: Exercise, source: str) -> None:
    """The project with a student's file in it, the tests, and what closes other ways to the same result."""
    sources = dict(exercises.reference()) | {exercise.module: source}
    module, names = CLOSED.get(exercise.id, ("", ()))
    for name in names:
        closed = f'        raise NotImplementedError("{name} is closed while {exercise.id} is graded")\n'
        sources[module] = exercises.with_body(sources[module], name, closed)
    tests = {path.stem: path.read_text("utf-8") for path in [*TESTS.values(), *KIT.glob("public/*.py")]}
    sources |= {f"tests.{name}": text for name, text in tests.items()}
    sources |= {"limits": LIMITS, "solved": (KIT / "student" / "solved.py").read_text("utf-8")}
    exercises.write(folder, sources)
    (folder / "pytest.ini").write_text("[pytest]\n")
    folder.chmod(0o755)
    (folder / "out").mkdir()
    (folder / "out").chmod(0o777)  # whoever runs the tests writes their result


def run_tests(exercise: Exercise, source: str, seconds: int, seed: int, user: str | None) -> dict[str, str]:
    """What failed: test -> one sentence, empty if it passed. The key '' says why no test has a result."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        lay_out(folder, exercise, source)
        environment = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH") if key in os.environ}
        environment |= {"HOME": f"{folder}/out", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "SEED": str(seed)}
        command = f"-m pytest -p limits -p no:cacheprovider --assert=plain --tb=short -m {exercise.id} tests".split()
        process = subprocess.Popen(
            [sys.executable, "-B", *command, "--junitxml=out/results.xml"],
            cwd=folder,
            env=environment | {"PYTHONPATH": name},
            user=user,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return {"": f"it took longer than {seconds} seconds"}
        finally:
            with contextlib.suppress(ProcessLookupError):  # the children that it left, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        try:
            cases = ElementTree.parse(folder / "out" / "results.xml").findall(".//testcase")
        except (OSError, ElementTree.ParseError):
            return {"": "its process ended before its tests did: too much memory, or the code stops Python"}
        found = {case.get("name", "").split("[")[0]: sentence(case, exercise.file) for case in cases}
        broken = [text for case, text in zip(cases, found.values()) if case.find("error") is not None]
        return {"": broken[0]} if broken else found


def sentence(case: ElementTree.Element, file: str) -> str:
    """Why a test failed; empty if it passed."""
    bad = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
    if bad is None:
        return ""
    message, text = bad.get("message", ""), bad.text or ""
    if bad.tag == "error":  # the file could not be imported
        message = (re.findall(r"^E +(\w.*)", text, re.M) or [message])[-1]
    kind, _, said = message.split("\n")[0].partition(": ")
    if kind == "AssertionError" or said.startswith(tuple(f"{exercise.id}: write" for exercise in EXERCISES)):
        return said
    where = re.findall(rf"^\S*\b{re.escape(file)}:\d+: in .*\n +(.*)", text, re.M)
    return f"it raised {kind}: {said[:300]}" + (f" at: {where[-1]}" if where else "")


def grade_exercise(
    exercise: Exercise, source: str | Exception | None, seconds: int, seed: int, user: str | None
) -> list[Property]:
    """The properties of an exercise as a student's file has them; an exception or None says why there is no text."""
    results = properties(exercise)
    try:
        if source is None:
            raise ValueError("it is not in the submission")
        if isinstance(source, Exception):
            raise source
        found = run_tests(exercise, in_reference(exercise, source), seconds, seed, user)
    except SyntaxError as error:
        found = {"": f"{exercise.file}, line {error.lineno}: {error.msg}; a file that is no Python cannot be graded"}
    except (ValueError, LookupError, RecursionError, MemoryError) as error:
        found = {"": f"{exercise.file}: {error.args[0] if error.args else error}"}
    formula = {}  # whether the first property holds, by function and group
    for result in results:
        result.failure = found.get("", found.get(result.test, "it was not tried"))
        held = formula.setdefault((result.function, result.group), not result.failure)
        if held and not result.failure:
            result.score = result.most
        elif not result.failure:
            result.failure = "holds, and counts once the first property does"
    return results


def grade(sources: dict, seconds: int = 60, seed: int = 0, user: str | None = None, report=lambda _: None) -> list:
    """All properties of a submission (module -> its text, or why there is none); `report` hears after each exercise."""
    results = {exercise.id: properties(exercise) for exercise in EXERCISES}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        work = {
            pool.submit(grade_exercise, exercise, sources.get(exercise.module), seconds, seed, user): exercise.id
            for exercise in EXERCISES
        }
        for done in as_completed(work):
            results[work[done]] = done.result()
            report([result for part in results.values() for result in part])
    return [result for part in results.values() for result in part]


# ---- reports -------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def points(results: list[Property], exercise: str = "") -> str:
    return number(sum(result.score for result in results if exercise in ("", result.exercise)))


def reasons(results: list[Property], exercise: str) -> list[str]:
    """Each failure once, with the functions and the kinds of tests that met it."""
    found: dict[tuple[str, str], list[str]] = {}
    for result in results:
        if result.exercise == exercise and result.score < result.most:
            found.setdefault((result.function, result.failure), []).append(result.group)
    return [f"{name}, {' and '.join(dict.fromkeys(met))} tests: {text}" for (name, text), met in found.items()]


def table(name: str, notes: list[str], results: list[Property]) -> str:
    """Points per exercise, and under each what failed."""
    lines = [name, *(f"  note: {note}" for note in notes)]
    for exercise in EXERCISES:
        mine, most = points(results, exercise.id), number(exercise.points)
        lines.append(f"  {exercise.id:4} {exercise.title:36} {mine:>5} / {most}")
        lines += [f"         {reason}" for reason in reasons(results, exercise.id)]
    return "\n".join([*lines, f"  {'total':41} {points(results):>5} / 100"])


def csv_row(name: str, notes: list[str], results: list[Property]) -> list[str]:
    why = [f"{e.id} {reason}" for e in EXERCISES for reason in reasons(results, e.id)]
    return [name, points(results), *(points(results, e.id) for e in EXERCISES), "; ".join([*notes, *why])]


def gradescope(notes: list[str], results: list[Property], seconds: float) -> dict:
    """Gradescope's results.json (gradescope-autograders.readthedocs.io, specs): hidden tests show after publication."""
    entries = [
        {
            "name": f"{result.exercise} {result.test.removeprefix(f'test_{result.exercise}_').replace('_', ' ')}",
            "score": round(result.score, 4),
            "max_score": round(result.most, 4),
            "status": "failed" if result.failure else "passed",
            "output": result.failure or "passed",
            "visibility": "visible" if result.group == "public" else "after_published",
        }
        for result in results
    ]
    said = {"output": "\n".join(notes)} if notes else {}
    return {"tests": entries, "execution_time": round(seconds), "stdout_visibility": "hidden", **said}


def who_runs(user: str | None) -> str | None:
    """The user for student code: as asked, else nobody where that is possible. ValueError if it cannot run Python."""
    chosen = user if user is not None else "nobody" if os.geteuid() == 0 else ""
    if chosen:
        try:
            subprocess.run([sys.executable, "-c", "import pytest, torch"], user=chosen, cwd="/", check=True)
        except (OSError, LookupError, ValueError, subprocess.SubprocessError) as error:
            if user:
                raise ValueError(f"--user {user} cannot run {sys.executable} ({error})") from None
            print(f"warning: student code runs as you, for {chosen} cannot run {sys.executable}", file=sys.stderr)
            return None
    return chosen or None


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
        handed_in = args.submissions if args.gradescope else submissions(args.submissions)
        user = who_runs(args.user)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    writer = csv.writer(sys.stdout)
    if args.csv:
        writer.writerow(["submission", "total", *(exercise.id for exercise in EXERCISES), "why"])
    for path in handed_in:
        start, notes = time.monotonic(), []
        sources = read_submission(path, notes)

        def keep(results: list[Property], start: float = start, notes: list[str] = notes) -> None:
            if args.gradescope:  # after every exercise: what is there when the container is stopped counts
                text = json.dumps(gradescope(notes, results, time.monotonic() - start), indent=2)
                args.gradescope.write_text(text + "\n", encoding="utf-8")

        results = grade(sources, args.seconds, args.seed, user, keep)
        if args.csv:
            writer.writerow(csv_row(path.name, notes, results))
        else:
            print(table(path.name, notes, results), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
