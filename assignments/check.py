"""Check the course kit itself, before students do: the reference, the handout, seeded bugs.

    python assignments/check.py              # everything, under a minute on two cores
    python assignments/check.py --only E7    # the seeded bugs of one exercise, and what each is told

Exit code 1 if anything is not as it should be; the last line sums it up.
"""

import argparse
import ast
import importlib
import os
import sys
import tempfile
import textwrap
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType

import bugs
import exercises
import grade
import handout
from exercises import EXERCISES, ROOT, TESTS, Exercise

FAULTS: list[str] = []


def fault(text: str) -> None:
    FAULTS.append(text)
    print(f"FAULT: {text}", flush=True)


def check_table() -> None:
    """Points; and of each function its task, its length, its tests and its bugs."""
    if sum(exercise.points for exercise in EXERCISES) != 100:
        fault("the points do not sum to 100")
    for exercise, name in [(e, name) for e in EXERCISES for name in e.functions]:
        source = exercises.reference()[exercise.file]
        node = exercises.find(source, name)
        task = ast.get_docstring(node) or ""
        masked = any(argument.arg == "mask" for argument in node.args.args)
        for wrong, what in (
            ("Example" not in task, "its task has no example"),
            (masked and "NaN" not in task, "its task does not say that masked cells may hold NaN"),
            (len(bugs.BUGS.get(name, [])) < 3, "it has fewer than three seeded bugs"),
            (not all(exercises.properties(group)[exercise.id, name] for group in TESTS), "it lacks tests"),
        ):
            if wrong:
                fault(f"{exercise.id} {name}: {what}")


def check_handout() -> None:
    """It can be written, all of it is Python where it says so, and no file of it solves an exercise or the lab."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            files = handout.export(Path(folder, "all of it"), EXERCISES)
            handout.export(Path(folder, "part"), exercises.chosen("E7,E8"))
        except (ValueError, SyntaxError) as error:
            return fault(str(error))
        print(f"the handout: {len(files)} files, no line of a solution", flush=True)


# ---- seeded bugs: the tests' functions are called here, without pytest, for speed ----------------------------------


def load_tests() -> list[ModuleType]:
    """The test files, with the project's own functions in them."""
    for folder in (*(path.parent for path in TESTS.values()), ROOT):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    return [importlib.import_module(path.stem) for path in TESTS.values()]


def first_failure(exercise: Exercise, name: str, text: str) -> tuple[str, str]:
    """Which group of tests catches this version of a function first, and what it says; empty if none does."""
    tests, module = load_tests(), importlib.import_module(exercise.file[:-3])
    scope, (owner, _, short) = dict(vars(module)), name.rpartition(".")
    exec(compile(textwrap.dedent(text), exercise.file, "exec"), scope)
    places = [vars(module)[owner]] if owner else tests
    before = [getattr(place, short) for place in places]
    for place in places:
        setattr(place, short, scope[short])
    try:
        for group, file in zip(TESTS, tests):
            for test in exercises.properties(group)[exercise.id, name]:
                try:
                    getattr(file, test)()
                except NameError as error:  # a mistake in the entry, and not in the answer
                    return "unfit", str(error)
                except Exception as error:
                    return group, str(error).split("\n")[0] or type(error).__name__
        return "", ""
    finally:
        for place, function in zip(places, before):
            setattr(place, short, function)


def try_bugs(exercise: Exercise, name: str) -> list[tuple[str, str, str]]:
    """(bug, the group that caught it, what was said) of a function; the function as it is comes first."""
    source, found = exercises.reference()[exercise.file], []
    right = exercises.cut(source, name)[2]
    for bug, old, new in [("", right, right), *bugs.BUGS[name]]:
        try:
            body = bugs.seeded(right, old, new)
            text = exercises.function_text(exercises.with_body(source, name, body), name)
            found.append((bug, *first_failure(exercise, name, text)))
        except (ValueError, SyntaxError) as error:
            found.append((bug, "unfit", f"the bug does not fit ({error})"))
    return found


def check_bugs(chosen: list[Exercise], talk: bool) -> None:
    """Every seeded bug is caught; how many of them by the public tests."""
    units, counts = [(exercise, name) for exercise in chosen for name in exercise.functions], Counter()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for (exercise, name), results in zip(units, pool.map(try_bugs, *zip(*units))):
            for bug, group, said in results:
                counts[group] += bool(bug)
                if bool(bug) != (group in TESTS):
                    fault(f"{exercise.id} {name}, {bug or 'as it is'}: {said or 'SURVIVED'}")
                elif talk and bug:
                    print(f"{name}, {bug}: {group}: {said}")
    print(f"the bugs: {counts.total()} seeded, {counts['']} survived, {counts['public']} caught by public tests")


def check_reference() -> None:
    """Graded as a submission is, the project's own functions earn all points."""
    user = grade.who_runs(None)
    results = grade.grade({name[:-3]: text for name, text in exercises.reference().items()}, 60, 1, user)
    for result in results:
        if result.failure:
            fault(f"the reference fails {result.test}: {result.failure}")
    print(f"the reference: {grade.points(results)} points, run as {user or 'the user that grades'}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", default="", help="the seeded bugs of this exercise alone, one line each")
    args = parser.parse_args()
    try:
        chosen = exercises.chosen(args.only)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    start = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"
    if not args.only:
        check_table()
        check_handout()
        check_reference()
    check_bugs(chosen, bool(args.only))
    print(f"{len(FAULTS)} faults, {time.monotonic() - start:.0f} s")
    return int(bool(FAULTS))


if __name__ == "__main__":
    sys.exit(main())
