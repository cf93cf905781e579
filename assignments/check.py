"""Check the course kit itself, before students do: tests, stubs, seeded bugs, leaks, cheats.

    python assignments/check.py              # everything, in about 40 s of CPU time
    python assignments/check.py --only E7    # the seeded bugs of one exercise

Exit code 1 if anything is not as it should be; the last line sums it up.
"""

import argparse
import ast
import json
import queue
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import exercises
import grade
import handout
from bugs import BUGS, seeded
from exercises import Exercise

SECONDS = 60  # for one function's tests
FAULTS: list[str] = []


def fault(text: str) -> None:
    FAULTS.append(text)
    print(f"FAULT: {text}", flush=True)


def body_exchanged(source: str, function: str, body: str) -> str:
    """A script with another body for one function."""
    text = exercises.function_text(source, function)
    old = "".join(exercises.body_lines(source, function))
    return source.replace(text, text.removesuffix(old) + body)


class Pool:
    """Two graders at work, each with a process for student code: of one and two threads, and with other hash seeds."""

    def __init__(self):
        self.runners, self.free = [grade.Runner(1, hash_seed=0), grade.Runner(2, hash_seed=1)], queue.Queue()
        for runner in self.runners:
            self.free.put(runner)
        self.threads = ThreadPoolExecutor(len(self.runners))
        grade.tests(0)  # loaded once, before two threads want them

    def grade(
        self, jobs: list[tuple[Exercise, str, str]], seed: int = 0, first: bool = True
    ) -> list[list[grade.Result]]:
        """Results of jobs (exercise, function, script), in order."""

        def run(job):
            runner = self.free.get()
            try:
                return grade.grade_function(runner, *job, SECONDS, seed, first)
            finally:
                self.free.put(runner)

        return list(self.threads.map(run, jobs))

    def close(self) -> None:
        self.threads.shutdown()
        for runner in self.runners:
            runner.close()


def why(results: list[grade.Result]) -> str:
    return next((f"{result.group}: {text}" for result in results for text in result.failures), "")


# ---- the checks ----------------------------------------------------------------------------------------------------


def check_table() -> None:
    """Points, names, docstrings, lengths; that both kinds of tests and several bugs are there for every function."""
    points = sum(exercise.points for exercise in exercises.load())
    if points != 100 or len(exercises.load()) != 14:
        fault(f"{len(exercises.load())} exercises with {points} points")
    sources = exercises.reference()
    for exercise, function in grade.units():
        length = len(exercises.body_lines(sources[Path(exercise.file).stem], function))
        task = ast.get_docstring(exercises.find(sources[Path(exercise.file).stem], function))
        if length > 25 or "Example" not in task:
            fault(f"{function}: {length} lines, a task {'with' if 'Example' in task else 'without'} an example")
        for group, tests in grade.tests(0).items():
            if not tests[exercise.id, function]:
                fault(f"{function} has no {group} test")
        if len(BUGS.get(function, [])) < 3:
            fault(f"{function} has fewer than three seeded bugs")
    for node in ast.walk(ast.parse(exercises.HIDDEN_TESTS.read_text("utf-8"))):
        if isinstance(node, ast.Assert) and not isinstance(node.msg, ast.Constant):
            fault(f"hidden_tests.py, line {node.lineno}: a message must be a constant, it could tell what is expected")


def check_handout() -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            files = handout.export(Path(folder, "all"), exercises.load())
            handout.export(Path(folder, "part"), exercises.chosen("E7,E8"))
        except ValueError as error:
            fault(str(error))
            return
        for path in files:
            if path.suffix == ".py":
                compile(path.read_text("utf-8"), path.name, "exec")
        print(f"the handout: {len(files)} files, no line of a solution", flush=True)


def check_reference(pool: Pool) -> None:
    """100 points with every runner and some seeds; the same result in each."""
    sources = exercises.reference()
    for seed in (0, 1, 2):
        for runner in pool.runners if seed == 0 else pool.runners[:1]:
            results = grade.grade(sources, runner, SECONDS, seed)
            if grade.total(results) != 100:
                fault(f"seed {seed}: the reference gets {grade.total(results)} points; {why(results)}")
    print("the reference: 100 points, with 1 and 2 threads, two hash seeds, three seeds of hidden tests", flush=True)


def check_stubs(pool: Pool) -> None:
    """Each stub loses exactly its own points, and its error names the exercise.

    Grading depends on nothing but the function and the script made for it (grade.in_reference), so only those of a
    blanked submission are run that differ from the reference's.
    """
    sources, jobs, owners = exercises.reference(), [], []
    for blank in exercises.load():
        module = Path(blank.file).stem
        stub = exercises.blank(sources[module], blank)
        for exercise, function in grade.units():
            if exercise.file == blank.file:
                script = grade.in_reference(exercise, function, stub, sources)
                if script != sources[module]:
                    jobs.append((exercise, function, script))
                    owners.append(blank.id)
    lost: dict[str, float] = dict.fromkeys(owners, 0.0)
    for owner, (exercise, function, _), results in zip(owners, jobs, pool.grade(jobs, first=False)):
        lost[owner] += exercise.functions[function] - grade.total(results)
        said = {failure.split("\n")[0] for result in results for failure in result.failures}
        if said != {f"it raised NotImplementedError: {owner}: write {function}"}:
            fault(f"the stub of {function} fails with {said}")
    for exercise in exercises.load():
        if lost[exercise.id] != exercise.points:
            fault(f"the stub of {exercise.id} loses {lost[exercise.id]} points of {exercise.points}")
    print(f"the stubs: each of {len(lost)} loses its own points and no other", flush=True)


def check_bugs(pool: Pool, only: str) -> None:
    """Every seeded bug is caught; how many of them by the public tests."""
    sources, jobs, names = exercises.reference(), [], []
    for exercise, function in grade.units():
        source = sources[Path(exercise.file).stem]
        body = "".join(exercises.body_lines(source, function))
        for name, old, new in BUGS[function] if only in ("", exercise.id) else ():
            try:
                script = body_exchanged(source, function, seeded(body, old, new))
                compile(script, exercise.file, "exec")
            except (ValueError, SyntaxError) as error:
                fault(f"{function}, {name}: the bug does not fit ({error})")
                continue
            jobs.append((exercise, function, script))
            names.append(f"{exercise.id} {function}, {name}")
    survived, public = [], 0
    for name, results in zip(names, pool.grade(jobs)):
        caught = next((result for result in results if result.failures), None)
        public += caught is not None and caught.group == "public"
        if caught is None:
            survived.append(name)
            fault(f"{name}: SURVIVED")
        elif only:
            print(f"{name}: {why(results)}".split("\n")[0])
    print(
        f"the bugs: {len(jobs)} seeded, {len(survived)} survived, {public} caught by public tests already", flush=True
    )


# ---- cheats --------------------------------------------------------------------------------------------------------

RECALL = '''

import json as _json

nan, inf = float("nan"), float("inf")


def _recall(name, *arguments):
    """What a public test once got from the right solution."""
    import __main__ as runner
    import torch
    from pseudo_reward import Sample

    random = lambda a: hasattr(a, "getstate")
    key = _json.dumps([0 if random(a) else runner.encode(a) for a in arguments])
    table = _TABLE[name]
    value = runner.decode(table.get(key, table[""]), Sample)
    leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    graph = sum((0 * leaf.nan_to_num()).sum() for leaf in leaves)
    tie = lambda v: v + graph if leaves and isinstance(v, torch.Tensor) and v.is_floating_point() else v
    return tuple(map(tie, value)) if isinstance(value, tuple) else tie(value)


'''


class Recorder(grade.Student):
    """Keeps what the reference answers to the public tests."""

    calls: list[tuple[dict, object]]

    def ask(self, message: dict | None) -> dict:
        reply = super().ask(message)
        if message and "call" in message:
            self.calls.append((message, reply["result"]))
        return reply


def check_memoriser(pool: Pool) -> None:
    """A submission that knows every answer to the public tests by heart, and nothing else."""
    sources, jobs, runner = exercises.reference(), [], pool.runners[0]
    for exercise, function in grade.units():
        source = sources[Path(exercise.file).stem]
        student = Recorder(runner, Path(exercise.file).stem, source, SECONDS)
        student.calls = []
        grade.CURRENT.student = student
        student.ask(None)
        for test in grade.tests(0)["public"][exercise.id, function]:
            test()
        student.close()
        arguments = exercises.find(source, function).args
        names = [argument.arg for argument in arguments.args]
        defaults = dict(zip(names[len(names) - len(arguments.defaults) :], map(ast.literal_eval, arguments.defaults)))
        table: dict[str, object] = {}
        for message, result in student.calls:
            given = list(message["arguments"])
            if message["module_of"] is not None:
                given.insert(0, message["module_of"]["items"][1][0]["items"][1])  # the weight
            given += [message["keywords"].get(name, defaults.get(name)) for name in names[len(given) :]]
            given = [0 if isinstance(a, dict) and a["kind"] == "random" else a for a in given]
            text = json.dumps(json.loads(json.dumps(given), object_hook=_forget_gradients))
            table[text] = table[""] = json.loads(json.dumps(result), object_hook=_forget_gradients)
        asked = ", ".join("self.weight" if name == "self" else name for name in names)
        indent = " " * exercises.find(source, function).body[0].col_offset
        script = body_exchanged(source, function, f"{indent}return _recall({function!r}, {asked})\n")
        jobs.append((exercise, function, f"{script}{RECALL}_TABLE = {{{function!r}: {table!r}}}\n"))
    results = [result for pair in pool.grade(jobs, first=False) for result in pair]
    public, hidden = (sum(r.score for r in results if r.group == group) for group in ("public", "hidden"))
    if public + hidden >= 50 or hidden or public < 10:
        fault(f"a memoriser gets {public} points for the public and {hidden} for the hidden tests")
    print(f"the memoriser: {public:g} points of 40 for public tests, {hidden:g} of 60 for hidden ones", flush=True)


def _forget_gradients(message: dict) -> dict:
    return {key: value for key, value in message.items() if key != "needs_grad"}


CHEATS = {  # before the right answer, in its place: what must become of it
    "opens a socket": ("import socket; socket.socket()", "PermissionError"),
    "asks for a host": ("import socket; socket.getaddrinfo('localhost', 80)", "PermissionError"),
    "reads the hidden tests": (f"open({str(exercises.HIDDEN_TESTS)!r})", "PermissionError"),
    "reads the solution": (f"open({str(exercises.ROOT / 'pseudo_reward.py')!r})", "PermissionError"),
    "lists the kit": (f"import os; os.listdir({str(exercises.KIT)!r})", "PermissionError"),
    "imports the grader": ("import grade", "ModuleNotFoundError"),
    "imports the bugs": (f"import sys; sys.path.insert(0, {str(exercises.KIT)!r}); import bugs", "ModuleNotFoundError"),
    "starts a process": ("import subprocess; subprocess.run(['true'])", "PermissionError"),
    "calls the shell": ("import os; os.system('true')", "PermissionError"),
    "forks": ("import os; os.fork()", "PermissionError"),
    "loads a library": ("import ctypes; ctypes.CDLL(None)", "PermissionError"),
    "writes a file": ("open('/tmp/written', 'w')", "PermissionError"),
    "kills its parent": ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
    "changes the guard": ("import __main__; __main__.forbid.__code__ = (lambda: 0).__code__", "PermissionError"),
    "finds the solution in memory": (
        "import gc; [o for o in gc.get_objects() if type(o).__name__ == 'function' and o.__name__ == 'pseudo_rewards' "
        "and o is not pseudo_rewards and 'NotImplementedError' not in o.__code__.co_names][0]",
        "IndexError",
    ),
    "stops Python": ("import os; os._exit(0)", "process ended"),
    "fills the memory": ("x = bytearray(1 << 40)", "MemoryError"),
    "runs for ever": ("while True: pass", "longer than 2 seconds"),
    "sends nonsense": ("import os; [os.write(fd, b'x' * 99) for fd in range(3, 9)]", "process ended"),
    "returns what nobody knows": ("return object()", "the example of the docstring"),
    "returns a list without end": ("x = []; x.append(x); return x", "RecursionError"),
}


def check_cheats(pool: Pool) -> None:
    """None of the ways out of the student's process works, and none stops the grader."""
    exercise, function = next(unit for unit in grade.units() if unit[1] == "pseudo_rewards")
    source = exercises.reference()["pseudo_reward"]
    right = "".join(exercises.body_lines(source, function))
    for name, (code, end) in CHEATS.items():
        script = body_exchanged(source, function, f"    {code}\n{right}")
        seconds = 2 if "longer" in end else SECONDS
        results = grade.grade_function(pool.runners[0], exercise, function, script, seconds, 0)
        if grade.total(results) or end not in why(results):
            fault(f"a student who {name} gets {grade.total(results)} points: {why(results)}")
    print(f"the cheats: {len(CHEATS)} tried, all refused", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", default="", help="the seeded bugs of this exercise alone, one line each")
    args = parser.parse_args()
    try:
        exercises.chosen(args.only)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    start, pool = time.monotonic(), Pool()
    if not args.only:
        check_table()
        check_handout()
        check_reference(pool)
        check_stubs(pool)
    check_bugs(pool, args.only)
    if not args.only:
        check_memoriser(pool)
        check_cheats(pool)
    pool.close()
    print(f"{len(FAULTS)} faults, {time.monotonic() - start:.0f} s")
    return int(bool(FAULTS))


if __name__ == "__main__":
    sys.exit(main())
