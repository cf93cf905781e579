"""Grade submissions: points per exercise, each on its own, with one sentence per failure.

    python assignments/grade.py handed_in/alice handed_in/bob.zip        # folders or zips
    python assignments/grade.py handed_in --csv > scores.csv             # a folder of them
    python assignments/grade.py /autograder/submission --gradescope /autograder/results/results.json --user nobody

A function earns 40 % of its points if all its public tests pass and 60 % if all its hidden tests do. While it is graded
every other exercise is the reference's, so that no mistake is paid for twice. The tests are ordinary functions that
run here; what they import from `ppo`, `data` ... stands for the student's function in another process (runner.py), to
which only arguments go and from which only results come. What is expected is worked out here and never leaves.
"""

import argparse
import csv
import functools
import hashlib
import importlib.util
import json
import os
import pwd
import select
import socket
import subprocess
import sys
import threading
import time
import types
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import exercises
from exercises import Exercise
from runner import decode, encode, pack, receive

sys.path.insert(0, str(exercises.ROOT))
from tasks.recorded import Sample

PUBLIC_SHARE = 0.4
LARGEST_FILE = 1 << 20  # bytes of a student's script


class StudentError(Exception):
    """The student's code raised, ran too long, or its process ended: one sentence, and the lines where."""


# ---- the other process ---------------------------------------------------------------------------------------------


class Runner:
    """A process of runner.py, which forks one child per graded function. One child at a time."""

    def __init__(self, threads: int = 1, hash_seed: int = 0, user: str | None = None):
        self.threads = threads
        self.user = None if user is None else (pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
        self.control, theirs = socket.socketpair()
        environment = {name: os.environ[name] for name in ("HOME", "PATH", "LD_LIBRARY_PATH") if name in os.environ}
        environment |= {"PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-P", "-B", str(exercises.KIT / "runner.py")]
        # in a session of its own: Ctrl-C is the grader's, and the runner ends when the grader is gone
        self.process = subprocess.Popen(command, stdin=theirs, env=environment, cwd="/", start_new_session=True)
        theirs.close()
        stubs, sources = exercises.blanked(exercises.load()), exercises.reference()
        self.digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in sources.items()}
        cache = [(self.digests[name], name, sources[name]) for name in sources]
        self._order({"preload": stubs, "cache": cache})
        self.ready = False  # importing torch takes seconds, which are not the student's

    def _order(self, message: dict, fd: int | None = None) -> None:
        socket.send_fds(self.control, [b"x"], [] if fd is None else [fd])
        self.control.sendall(pack(message))

    def start(self, module: str, source: str, seconds: int) -> socket.socket:
        """A new child with the reference's scripts but for `module`; the returned socket talks to it."""
        if not self.ready:
            self.ready = self.control.recv(1) == b"x"
            if not self.ready:
                raise RuntimeError("runner.py did not start; its error stands above")
        scripts = {name: (digest, None) for name, digest in self.digests.items()} | {module: ("", source)}
        ours, theirs = socket.socketpair()
        job = {"module": module, "scripts": scripts, "seconds": seconds, "threads": self.threads, "user": self.user}
        self._order(job, theirs.fileno())
        theirs.close()
        return ours

    def end(self) -> None:
        """Kill the child if it still runs."""
        self.control.send(b"x")
        self.control.recv(1)

    def close(self) -> None:
        self.control.close()
        self.process.wait()


class Student:
    """One child: a student's version of one function among the reference's."""

    def __init__(self, runner: Runner, module: str, source: str, seconds: int):
        self.runner, self.seconds, self.deadline = runner, seconds, time.monotonic() + seconds
        self.socket = runner.start(module, source, seconds)

    def ask(self, message: dict | None) -> dict:
        """Send a message (None: the first reply needs none) and wait for the reply. StudentError if there is none."""
        try:
            if message is not None:
                self.socket.sendall(pack(message))
            reply = receive(self._read)
        except TimeoutError:
            raise StudentError(f"it took longer than {self.seconds} seconds") from None
        except (OSError, ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise StudentError("its process ended: it used too much memory or time, or stopped Python")
        if isinstance(error := reply.get("error"), dict):
            where = "".join(f"\n    {line}" for line in list(error.get("where", []))[:5])
            raise StudentError(f"it raised {error.get('type')}: {error.get('message')}{where}")
        return reply

    def _read(self, count: int) -> bytes:
        left = self.deadline - time.monotonic()
        if left <= 0 or not select.select([self.socket], [], [], left)[0]:
            raise TimeoutError
        return self.socket.recv(count)

    def close(self) -> None:
        self.socket.close()
        self.runner.end()


# ---- stand-ins: what the tests import ------------------------------------------------------------------------------

CURRENT = threading.local()  # .student: whom the tests of this thread are about


class Remote(torch.autograd.Function):
    """Gives results that need a gradient their backward pass, which the other process works out."""

    @staticmethod
    def forward(ctx, student, number, outputs, *inputs):
        ctx.student, ctx.number = student, number
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *gradients):
        message = {"backward": ctx.number, "gradients": encode(list(gradients))}
        found = decode(ctx.student.ask(message)["gradients"], Sample)
        return None, None, None, *found


def call(name: str, *arguments: object, module_of: tuple | None = None, **keywords: object) -> object:
    """A function of the current student. Arguments that it changes in place change here too."""
    student, inputs, outputs = CURRENT.student, [], []
    message = {
        "call": name,
        "arguments": [encode(argument, inputs) for argument in arguments],
        "keywords": {key: encode(value, inputs) for key, value in keywords.items()},
        "module_of": None if module_of is None else encode(module_of, inputs),
    }
    reply = student.ask(message)
    try:
        result = decode(reply["result"], Sample, outputs)
        for argument, left in zip(arguments, reply["arguments"], strict=True):
            _update(argument, decode(left, Sample))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError, OverflowError):
        raise StudentError("what it returned cannot be read") from None
    if not outputs or not inputs:
        return result
    tracked = Remote.apply(student, reply["number"], [output.detach() for output in outputs], *inputs)
    return _exchange(result, {id(output): new for output, new in zip(outputs, tracked)})


def _update(argument: object, left: object) -> None:
    if isinstance(argument, torch.Tensor) and isinstance(left, torch.Tensor) and left.shape == argument.shape:
        argument.data.copy_(left)
    elif isinstance(argument, list) and isinstance(left, list):
        argument[:] = left
    elif hasattr(argument, "setstate"):
        argument.setstate(left.getstate())


def _exchange(value: object, new: dict[int, torch.Tensor]) -> object:
    if isinstance(value, (list, tuple)):
        return type(value)(_exchange(item, new) for item in value)
    return new.get(id(value), value)


class RMSNorm(torch.nn.Module):
    """Stands for the student's: same constructor, same parameter."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.arguments = torch.nn.Parameter(torch.ones(size)), (size, eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return call("RMSNorm.forward", x, module_of=(self.arguments, [("weight", self.weight)]))


def stand_ins() -> dict[str, types.ModuleType]:
    """Modules with the names of the project's, in which every exercise function asks the current student."""
    modules: dict[str, types.ModuleType] = {}
    for exercise in exercises.load():
        module = modules.setdefault(Path(exercise.file).stem, types.ModuleType(Path(exercise.file).stem))
        for name in exercise.functions:
            setattr(module, name.split(".")[0], RMSNorm if name == "RMSNorm.forward" else functools.partial(call, name))
    modules["pseudo_reward"].Sample = Sample
    return modules


def load_tests(path: Path) -> dict[tuple[str, str], list[Callable[[], None]]]:
    """The tests of a file by (exercise, function), as their marks say: @pytest.mark.E13("gae")."""
    modules = stand_ins()
    real = {name: sys.modules.pop(name, None) for name in modules}
    sys.modules.update(modules)
    try:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for name, old in real.items():
            del sys.modules[name]
            if old is not None:
                sys.modules[name] = old
    tests = defaultdict(list)
    for test in vars(module).values():
        for mark in getattr(test, "pytestmark", []):
            tests[mark.name, mark.args[0]].append(test)
    return tests


@functools.cache
def tests(seed: int) -> dict[str, dict]:
    """Public and hidden tests; the inputs of the hidden ones are drawn from the seed."""
    hidden = load_tests(exercises.HIDDEN_TESTS)
    next(iter(hidden.values()))[0].__globals__["SEED"] = seed
    return {"public": load_tests(exercises.PUBLIC_TESTS), "hidden": hidden}


# ---- grading -------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """The public or the hidden tests of one function."""

    exercise: str
    function: str
    group: str  # 'public' or 'hidden'
    most: float
    score: float = 0.0
    failures: list[str] = field(default_factory=lambda: ["not graded: the time was up"])


def units() -> list[tuple[Exercise, str]]:
    """What is graded on its own: every function of every exercise."""
    return [(exercise, name) for exercise in exercises.load() for name in exercise.functions]


def blank_results(exercise: Exercise, function: str) -> list[Result]:
    points = exercise.functions[function]
    shares = {"public": PUBLIC_SHARE, "hidden": 1 - PUBLIC_SHARE}
    return [Result(exercise.id, function, group, round(points * share, 6)) for group, share in shares.items()]


def in_reference(exercise: Exercise, function: str, source: str, known: dict[str, str]) -> str:
    """A student's file with all other exercises' functions replaced by the reference's."""
    for other, name in units():
        if other.file == exercise.file and name != function:
            source = exercises.graft(source, name, known[Path(exercise.file).stem])
    exercises.find(source, function)
    return source


def grade_function(
    runner: Runner, exercise: Exercise, function: str, source: str, seconds: int, seed: int, first: bool = False
) -> list[Result]:
    """Run the tests of one function on a script that is otherwise the reference's. first: stop at the first failure."""
    results = blank_results(exercise, function)
    student, dead = Student(runner, Path(exercise.file).stem, source, seconds), ""
    CURRENT.student = student
    try:
        student.ask(None)
    except StudentError as error:
        dead = str(error)
    for result in results:
        result.failures = [dead] if dead else []
        for test in [] if dead else tests(seed)[result.group][exercise.id, function]:
            try:
                test()
            except StudentError as error:
                result.failures.append(str(error))
                if "it raised" not in str(error):  # nobody is there to answer
                    dead = str(error)
                    break
            except AssertionError as error:
                result.failures.append(str(error).split("\n")[0])
            except Exception as error:  # the test could not work with what came back
                no_gradient = "does not require grad" in str(error)
                what = "has no gradient" if no_gradient else f"cannot be used ({type(error).__name__})"
                result.failures.append(f"what it returned {what}")
            if first and result.failures:
                break
        result.failures = list(dict.fromkeys(result.failures))
        result.score = 0.0 if result.failures else result.most
        if first and result.failures:
            break
    student.close()
    return results


def grade(
    sources: dict[str, str | Exception], runner: Runner, seconds: int, seed: int, report: Callable = lambda _: None
) -> list[Result]:
    """All functions of a submission: module name -> its text, or why there is none. `report` hears after each."""
    results = {unit[1]: blank_results(*unit) for unit in units()}
    known = exercises.reference()
    for exercise, function in units():
        source = sources.get(Path(exercise.file).stem, FileNotFoundError(f"{exercise.file} is not in the submission"))
        try:
            if isinstance(source, Exception):
                raise source
            source = in_reference(exercise, function, source, known)
            results[function] = grade_function(runner, exercise, function, source, seconds, seed)
        except SyntaxError as error:
            failure = f"{exercise.file}, line {error.lineno}: {error.msg}; a file that is no Python cannot be graded"
        except (OSError, ValueError, LookupError, RecursionError, MemoryError) as error:
            failure = f"{exercise.file}: {error.args[0] if error.args else error}"
        else:
            failure = None
        if failure:
            for result in results[function]:
                result.failures = [failure]
        report([result for pair in results.values() for result in pair])
    return [result for pair in results.values() for result in pair]


# ---- submissions ---------------------------------------------------------------------------------------------------


def read_submission(path: Path) -> dict[str, str | Exception]:
    """The scripts with exercises in a folder or a zip, wherever they lie in it: the least deep one of each name."""
    wanted = {exercise.file for exercise in exercises.load()}
    if path.is_dir():
        inside = path.resolve()  # a link could lead to the solution
        files = [file for file in path.rglob("*.py") if file.is_file() and inside in file.resolve().parents]
        found = {file.relative_to(path).parts: functools.partial(_read_file, file) for file in files}
    else:
        archive = zipfile.ZipFile(path)
        names = [info for info in archive.infolist() if not info.is_dir() and "__MACOSX" not in info.filename]
        found = {tuple(info.filename.split("/")): functools.partial(_read_member, archive, info) for info in names}
    sources: dict[str, str | Exception] = {}
    for parts in sorted(found, key=lambda parts: (len(parts), parts)):
        stem = parts[-1].removesuffix(".py")
        if parts[-1] in wanted and stem not in sources:
            try:
                data = found[parts]()
                if len(data) > LARGEST_FILE:
                    raise ValueError(f"larger than {LARGEST_FILE} bytes")
                sources[stem] = data.decode("utf-8-sig").replace("\r\n", "\n")
            except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
                sources[stem] = ValueError(f"cannot be read ({error})")
    return sources


def _read_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(LARGEST_FILE + 1)


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    with archive.open(info) as file:
        return file.read(LARGEST_FILE + 1)


def submissions(paths: list[Path]) -> list[Path]:
    """Every folder and zip that is one submission: a folder without exercises holds submissions."""
    wanted, found = {exercise.file for exercise in exercises.load()}, []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: there is no such folder or zip")
        if path.is_dir() and not any((path / file).is_file() for file in wanted):
            inside = sorted(p for p in path.iterdir() if p.suffix == ".zip" or (p.is_dir() and any(p.rglob("*.py"))))
            if not inside:
                raise ValueError(f"{path} holds neither {', '.join(sorted(wanted))} nor submissions")
            found += inside
        elif path.is_file() and not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is neither a folder nor a zip")
        else:
            found.append(path)
    return found


# ---- reports -------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def table(name: str, results: list[Result]) -> str:
    """Points per exercise, and under each what failed."""
    lines = [name]
    for exercise in exercises.load():
        mine = [result for result in results if result.exercise == exercise.id]
        score = number(sum(result.score for result in mine))
        lines.append(f"  {exercise.id:4} {exercise.title:36} {score:>5} / {number(exercise.points)}")
        for function in exercise.functions:
            groups: dict[str, list[str]] = {}  # a failure -> the tests that met it
            for result in mine:
                for failure in result.failures if result.function == function else ():
                    groups.setdefault(failure, []).append(result.group)
            lines += [f"         {function}, {' and '.join(met)} tests: {text}" for text, met in groups.items()]
    return "\n".join([*lines, f"  {'total':41} {number(total(results)):>5} / 100"])


def total(results: list[Result]) -> float:
    return round(sum(result.score for result in results), 6)


def gradescope(results: list[Result], seconds: float) -> dict:
    """Gradescope's results.json (gradescope-autograders.readthedocs.io, specs): hidden tests show after publication."""
    entries, parts = [], Counter()
    for result in results:
        parts[result.exercise] += 1
        entries.append(
            {
                "name": f"{result.exercise} {result.function}: {result.group} tests",
                "number": f"{result.exercise[1:]}.{parts[result.exercise]}",
                "score": result.score,
                "max_score": result.most,
                "status": "failed" if result.failures else "passed",
                "output": "\n".join(result.failures) or "all passed",
                "output_format": "text",
                "visibility": "visible" if result.group == "public" else "after_published",
            }
        )
    return {"tests": entries, "execution_time": round(seconds), "stdout_visibility": "hidden"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("submissions", nargs="+", type=Path, help="folders or zips, or a folder of them")
    parser.add_argument("--gradescope", type=Path, metavar="results.json", help="one submission: write its result")
    parser.add_argument("--csv", action="store_true", help="print one line per submission instead of tables")
    parser.add_argument("--seconds", type=int, default=60, help="time limit per function (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the hidden tests' inputs; choose your own")
    parser.add_argument("--user", help="run student code as this user, such as nobody (needs root)")
    args = parser.parse_args()
    try:
        paths = submissions(args.submissions)
        if args.gradescope and len(paths) != 1:
            raise ValueError(f"--gradescope takes one submission, not {len(paths)}")
        if args.user and os.geteuid() != 0:
            raise ValueError(f"--user {args.user}: only root can run code as another user")
        runner = Runner(user=args.user)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 2
    writer, ids = csv.writer(sys.stdout), [exercise.id for exercise in exercises.load()]
    if args.csv:
        writer.writerow(["submission", "total", *ids])
    for path in paths:
        start = time.monotonic()

        def write(results: list[Result], start: float = start) -> None:
            if args.gradescope:  # after every function: what is there when the container is stopped counts
                text = json.dumps(gradescope(results, time.monotonic() - start), indent=2)
                args.gradescope.write_text(text + "\n", encoding="utf-8")

        try:
            sources = read_submission(path)
        except (OSError, zipfile.BadZipFile) as error:
            unreadable = ValueError(f"the submission cannot be read ({error})")
            sources = {Path(exercise.file).stem: unreadable for exercise in exercises.load()}
        results = grade(sources, runner, args.seconds, args.seed, write)
        if args.csv:
            points = [number(sum(r.score for r in results if r.exercise == exercise)) for exercise in ids]
            writer.writerow([path.name, number(total(results)), *points])
        else:
            print(table(path.name, results), flush=True)
    runner.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
