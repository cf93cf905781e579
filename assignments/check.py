"""Check the course kit itself, before students do: the reference, stubs, seeded bugs, tricks, leaks.

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
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
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
    """Points, examples, lengths; that both kinds of tests and several bugs are there for every function."""
    if sum(exercise.points for exercise in EXERCISES) != 100:
        fault("the points do not sum to 100")
    for exercise in EXERCISES:
        source = exercises.reference()[exercise.module]
        for name in exercise.functions:
            task = ast.get_docstring(exercises.find(source, name)) or ""
            length = exercises.solution(source, name).count("\n")
            if length > 25 or "Example" not in task:
                fault(f"{name}: {length} lines, a task {'with' if 'Example' in task else 'without'} an example")
            if any("mask" in argument.arg for argument in exercises.find(source, name).args.args) and "NaN" not in task:
                fault(f"{name}: its docstring does not say that masked cells may hold NaN")
            if len(bugs.BUGS.get(name, [])) < 3:
                fault(f"{name} has fewer than three seeded bugs")
            for group in TESTS:
                if not exercises.properties(group)[exercise.id, name]:
                    fault(f"{name} has no {group} test")


def check_handout() -> None:
    """It can be written, all of it is Python where it says so, and no file of it solves an exercise or the lab."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            files = handout.export(Path(folder, "all of it"), EXERCISES)
            handout.export(Path(folder, "part"), exercises.chosen("E7,E8"))
        except ValueError as error:
            return fault(str(error))
        for path in files:
            if path.suffix == ".py":
                compile(path.read_text("utf-8"), path.name, "exec")
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
    tests, module = load_tests(), importlib.import_module(exercise.module)
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
                except Exception as error:
                    return group, str(error).split("\n")[0] or type(error).__name__
        return "", ""
    finally:
        for place, function in zip(places, before):
            setattr(place, short, function)


def try_bugs(exercise: Exercise, name: str) -> list[tuple[str, str, str]]:
    """(bug, the group that caught it, what was said) of a function; the function as it is comes first."""
    source, found = exercises.reference()[exercise.module], []
    right = exercises.solution(source, name)
    for bug, old, new in [("", right, right), *bugs.BUGS[name]]:
        try:
            body = bugs.seeded(right, old, new)
            text = exercises.function_text(exercises.with_body(source, name, body), name)
            found.append((bug, *first_failure(exercise, name, text)))
        except (ValueError, SyntaxError) as error:
            found.append((bug, "unfit", f"the bug does not fit ({error})"))
    return found


def check_bugs(pool: ProcessPoolExecutor, chosen: list[Exercise], talk: bool) -> None:
    """Every seeded bug is caught; how many of them by the public tests."""
    units = [(exercise, name) for exercise in chosen for name in exercise.functions]
    counts = {"public": 0, "hidden": 0, "": 0, "unfit": 0}
    for (exercise, name), results in zip(units, pool.map(try_bugs, *zip(*units))):
        if results[0][1]:
            fault(f"{exercise.id} {name} fails as it is: {results[0][2]}")
        for bug, group, said in results[1:]:
            counts[group] += 1
            if group in ("", "unfit"):
                fault(f"{exercise.id} {name}, {bug}: {said or 'SURVIVED'}")
            elif talk:
                print(f"{name}, {bug}: {group}: {said}")
    print(f"the bugs: {sum(counts.values())} seeded, {counts['']} survived, {counts['public']} caught by public tests")


# ---- the grader as it is used --------------------------------------------------------------------------------------

NAN_GAE = """    m, advantages, following, carried = mask.float(), torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] * m[:, t] + gamma * following - values[:, t] * m[:, t]
        carried = (delta + gamma * lam * carried) * m[:, t]
        advantages[:, t], following = carried, values[:, t] * m[:, t]
    return advantages, advantages + values * m
"""
STAND_IN = """    import os
    os.environ["SOLVED"] = "all"
    from solved import stand_in
    return stand_in("E9", "make_pairs", globals())(samples, rewards, most, rng)
"""
IDENTITY = """    from runtime.chunked import ChunkedLogprobs
    eye = torch.eye(logits.shape[-1], dtype=logits.dtype)
    rows = [ChunkedLogprobs.log_softmax(row, eye, temperature) for row in logits[:, :-1]]
    return torch.stack(rows).gather(-1, tokens[:, 1:, None])[..., 0]
"""
# exercise -> the function, its body, the points that are left, what is said of it
TRICKS = {
    "E1": ("extract_answer", "    import os; os._exit(0)\n", 0, "process ended"),
    "E2": ("collate", "    while True: pass\n", 0, "longer than 20 seconds"),
    "E3": ("rotate", "    x = bytearray(1 << 40)\n", 2.5, "MemoryError"),
    "E4": ("token_logprobs", IDENTITY, 0, "closed"),
    "E5": ("sft_loss", "    return -(mask * logprobs).sum() / total\n", 3.3333, "NaN"),
    "E8": ("winners", "    raise SystemExit\n", 2.5, "SystemExit"),
    "E9": ("make_pairs", STAND_IN, 0, "solved.json"),
    "E13": ("gae", NAN_GAE, 12.2, "NaN"),
}


def check_grader() -> None:
    """As it is used: the reference earns all points, and each trick what stands in TRICKS."""
    user = grade.who_runs(None)
    sources = exercises.reference()
    results = grade.grade(sources, 60, 1, user)
    for result in results:
        if result.failure:
            fault(f"the reference fails {result.test}: {result.failure}")
    print(f"the reference: {grade.points(results)} points, as {user or 'the user that grades'}", flush=True)
    tried = [exercise for exercise in EXERCISES if exercise.id in TRICKS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = [exercises.with_body(sources[e.module], *TRICKS[e.id][:2]) for e in tried]
        work = [pool.submit(grade.grade_exercise, e, text, 20, 1, user) for e, text in zip(tried, texts)]
        for exercise, done in zip(tried, work):
            name, _, left, said = TRICKS[exercise.id]
            score, why = grade.points(done.result()), " ".join(grade.reasons(done.result(), exercise.id))
            if abs(float(score) - left) > 0.01 or said not in why:
                fault(f"{exercise.id} {name}, a trick: {score} points, {why}")
    print(f"the tricks: {len(tried)} tried", flush=True)


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
        check_grader()
    with ProcessPoolExecutor(os.cpu_count(), initializer=load_tests) as pool:
        check_bugs(pool, chosen, bool(args.only))
    print(f"{len(FAULTS)} faults, {time.monotonic() - start:.0f} s")
    return int(bool(FAULTS))


if __name__ == "__main__":
    sys.exit(main())
