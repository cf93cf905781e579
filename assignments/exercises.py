"""The exercises: read exercises.toml, and find, blank and exchange functions in source text.

Functions are found by name in the syntax tree, never by line number or marker, so the scripts stay free of both.
"""

import ast
import functools
import sys
from dataclasses import dataclass
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036  the project itself runs on 3.10
    sys.exit("error: the course kit needs Python 3.11 or newer (it reads TOML); the handout itself runs on 3.10")

import tomllib

KIT = Path(__file__).resolve().parent
ROOT = KIT.parent
PACKAGES = ("hf", "runtime", "tasks")
# where PUBLIC's tests lie in the kit; hidden tests never leave it
PUBLIC_TESTS, HIDDEN_TESTS = KIT / "public" / "test_exercises.py", KIT / "hidden" / "hidden_tests.py"


@dataclass(frozen=True)
class Exercise:
    """One exercise: one file, one function or two that belong together."""

    id: str  # E1 to E14
    title: str
    file: str
    functions: dict[str, float]  # name (or Class.method) -> points
    hours: float

    @property
    def points(self) -> float:
        return sum(self.functions.values())


@functools.cache
def load() -> list[Exercise]:
    """All exercises, in learning order."""
    return [Exercise(**entry) for entry in tomllib.loads((KIT / "exercises.toml").read_text("utf-8"))["exercise"]]


def chosen(ids: str) -> list[Exercise]:
    """Those of a list such as 'E7,E8'; all of an empty one. ValueError names an id that does not exist."""
    wanted = [word.strip() for word in ids.split(",") if word.strip()]
    exercises = load()
    known = [exercise.id for exercise in exercises]
    for word in wanted:
        if word not in known:
            raise ValueError(f"--only {word}: there is no such exercise; they are {', '.join(known)}")
    return [exercise for exercise in exercises if not wanted or exercise.id in wanted]


def reference() -> dict[str, str]:
    """The project's scripts and packages: module name, dotted -> source text."""
    paths = sorted([*ROOT.glob("*.py"), *(path for package in PACKAGES for path in ROOT.glob(f"{package}/*.py"))])
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)
    return {name.removesuffix(".__init__"): path.read_text("utf-8") for name, path in zip(names, paths)}


def file_of(module: str) -> Path:
    """Where a module lies, relative to the project."""
    return Path(module, "__init__.py") if module in PACKAGES else Path(*module.split(".")).with_suffix(".py")


# ---- surgery -------------------------------------------------------------------------------------------------------


parse = functools.lru_cache(maxsize=64)(ast.parse)  # the same few scripts again and again


def find(source: str, name: str) -> ast.FunctionDef:
    """The last definition of a function, or of a method as 'Class.method'. LookupError without one."""
    scope = parse(source)
    for part in name.split("."):
        found = [n for n in scope.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == part]
        if not found:
            raise LookupError(f"there is no {name}")
        scope = found[-1]
    if not isinstance(scope, ast.FunctionDef):
        raise LookupError(f"{name} is no function")
    return scope


def lines_of(node: ast.FunctionDef, lines: list[str]) -> tuple[int, int]:
    """First and past-last line index of a function: decorators, and comments of its depth after its last statement."""
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    end = node.end_lineno
    for i in range(end, len(lines)):
        text = lines[i].strip()
        if text.startswith("#") and len(lines[i]) - len(lines[i].lstrip()) > node.col_offset:
            end = i + 1
        elif text:
            break
    return start, end


def function_text(source: str, name: str) -> str:
    """A function as it stands, from its decorators to its last line."""
    lines = source.splitlines(keepends=True)
    start, end = lines_of(find(source, name), lines)
    return "".join(lines[start:end])


def graft(source: str, name: str, donor: str) -> str:
    """`source` with its function `name` exchanged for that of `donor`; at its end, if it has none of this name."""
    lines = source.splitlines(keepends=True)
    try:
        start, end = lines_of(find(source, name), lines)
    except LookupError:
        if "." in name:
            raise
        return f"{source}\n\n{function_text(donor, name)}"
    return "".join([*lines[:start], function_text(donor, name), *lines[end:]])


def body_lines(source: str, name: str) -> list[str]:
    """The lines of a function after its docstring: the solution."""
    node, lines = find(source, name), source.splitlines(keepends=True)
    if ast.get_docstring(node) is None:
        raise ValueError(f"{name} has no docstring: an exercise's docstring is its task")
    return lines[node.body[0].end_lineno : lines_of(node, lines)[1]]


def blank(source: str, exercise: Exercise) -> str:
    """The source with the bodies of an exercise's functions replaced by NotImplementedError; signatures and tasks stay.

    ValueError if a function has no docstring, LookupError if there is no such function.
    """
    for name in exercise.functions:
        node, lines = find(source, name), source.splitlines(keepends=True)
        end = node.body[0].end_lineno + len(body_lines(source, name))
        stub = f'{" " * node.body[0].col_offset}raise NotImplementedError("{exercise.id}: write {name}")\n'
        source = "".join([*lines[: node.body[0].end_lineno], stub, *lines[end:]])
    compile(source, exercise.file, "exec")
    return source


def blanked(exercises: list[Exercise]) -> dict[str, str]:
    """The project's scripts without the solutions of these exercises."""
    sources = reference()
    for exercise in exercises:
        module = Path(exercise.file).stem
        sources[module] = blank(sources[module], exercise)
    return sources
