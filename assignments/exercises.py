"""The exercises: which functions they are, and how they are found, blanked and exchanged in source text.

Functions are found by name in the syntax tree, never by line number or marker, so the scripts stay free of both.
"""

import ast
import functools
from pathlib import Path
from typing import NamedTuple

KIT = Path(__file__).resolve().parent
ROOT = KIT.parent
PACKAGES = ("hf", "runtime", "tasks")
# where the tests lie in the kit; hidden ones never leave it
TESTS = {"public": KIT / "public" / "test_exercises.py", "hidden": KIT / "hidden" / "test_hidden.py"}


class Exercise(NamedTuple):
    """One exercise: one file, one function or two that belong together."""

    id: str
    title: str
    file: str
    functions: dict[str, float]  # name (or Class.method) -> points
    hours: float  # what a student who knows PyTorch should plan, reading and tests included

    @property
    def module(self) -> str:
        return self.file.removesuffix(".py")

    @property
    def points(self) -> float:
        return sum(self.functions.values())


EXERCISES = [  # in learning order; 100 points in all
    Exercise("E1", "Read the final answer", "answers.py", {"extract_answer": 5}, 1.5),
    Exercise("E2", "A batch and its mask", "data.py", {"collate": 10}, 1.5),
    Exercise("E3", "Two parts of Llama", "model.py", {"RMSNorm.forward": 2.5, "rotate": 2.5}, 1.5),
    Exercise("E4", "Log-probabilities of tokens", "model.py", {"token_logprobs": 5}, 1),
    Exercise("E5", "The loss of supervised fine-tuning", "sft.py", {"sft_loss": 5}, 0.5),
    Exercise("E6", "Draw a token", "generate.py", {"sample_token": 5}, 1),
    Exercise("E7", "The majority vote", "pseudo_reward.py", {"majority_vote": 10}, 1.5),
    Exercise("E8", "Rewards without labels", "pseudo_reward.py", {"pseudo_rewards": 2.5, "winners": 2.5}, 0.5),
    Exercise("E9", "Pairs for the reward model", "pseudo_reward.py", {"make_pairs": 5}, 1),
    Exercise("E10", "The score of a whole answer", "model.py", {"last_value": 5}, 0.5),
    Exercise("E11", "The Bradley-Terry loss", "reward.py", {"bradley_terry_loss": 5}, 1),
    Exercise("E12", "The reward of every token", "ppo.py", {"shape_rewards": 10}, 1.5),
    Exercise("E13", "Advantages", "ppo.py", {"gae": 10, "whiten": 5}, 3),
    Exercise("E14", "The clipped losses", "ppo.py", {"policy_loss": 5, "value_loss": 5}, 2),
]
# functions of other files that do an exercise's work: they are blank while it is graded
CLOSED = {"E4": ("runtime.chunked", ("ChunkedLogprobs.forward", "ChunkedLogprobs.log_softmax"))}


def chosen(ids: str) -> list[Exercise]:
    """Those of a list such as 'E7,E8'; all of an empty one. ValueError names an id that does not exist."""
    wanted = [word.strip() for word in ids.split(",") if word.strip()]
    known = [exercise.id for exercise in EXERCISES]
    for word in wanted:
        if word not in known:
            raise ValueError(f"--only {word}: there is no such exercise; they are {', '.join(known)}")
    return [exercise for exercise in EXERCISES if not wanted or exercise.id in wanted]


@functools.cache
def reference() -> dict[str, str]:
    """The project's scripts and packages: module name, dotted -> source text."""
    paths = sorted([*ROOT.glob("*.py"), *(path for package in PACKAGES for path in ROOT.glob(f"{package}/*.py"))])
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)
    return {name.removesuffix(".__init__"): path.read_text("utf-8") for name, path in zip(names, paths)}


def write(folder: Path, sources: dict[str, str]) -> None:
    """Modules as files, at the places where the project has them."""
    for module, text in sources.items():
        inner = Path(module, "__init__.py") if module in PACKAGES else Path(*module.split(".")).with_suffix(".py")
        (folder / inner).parent.mkdir(parents=True, exist_ok=True)
        (folder / inner).write_text(text, encoding="utf-8")


def properties(group: str) -> dict[tuple[str, str], list[str]]:
    """The public or hidden tests of (exercise, function), in order; the names are test_EXERCISE_FUNCTION__PROPERTY."""
    defined = [node.name for node in parse(TESTS[group].read_text("utf-8")).body if isinstance(node, ast.FunctionDef)]
    units = [(exercise.id, name) for exercise in EXERCISES for name in exercise.functions]
    start = {unit: f"test_{unit[0]}_{unit[1].replace('.', '_')}__" for unit in units}
    return {unit: [name for name in defined if name.startswith(start[unit])] for unit in units}


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


def span(source: str, name: str) -> tuple[list[str], int, int, int]:
    """The lines, and the indices of a function: its first line, the first of its solution, the one past its last.

    Decorators belong to it, and comments of its depth after its last statement; its docstring is no solution.
    """
    node, lines = find(source, name), source.splitlines(keepends=True)
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    body = node.body[0].lineno - 1 if ast.get_docstring(node) is None else node.body[0].end_lineno
    end = node.end_lineno
    for i in range(end, len(lines)):
        text = lines[i].strip()
        if text.startswith("#") and len(lines[i]) - len(lines[i].lstrip()) > node.col_offset:
            end = i + 1
        elif text:
            break
    return lines, start, body, end


def function_text(source: str, name: str) -> str:
    """A function as it stands, from its decorators to its last line."""
    lines, start, _, end = span(source, name)
    return "".join(lines[start:end])


def solution(source: str, name: str) -> str:
    """The lines of a function after its docstring."""
    lines, _, body, end = span(source, name)
    return "".join(lines[body:end])


def with_body(source: str, name: str, text: str) -> str:
    """The source with other lines after the docstring of a function."""
    lines, _, body, end = span(source, name)
    return "".join([*lines[:body], text, *lines[end:]])


def graft(source: str, name: str, donor: str) -> str:
    """`source` with its function `name` exchanged for that of `donor`; at its end, if it has none of this name."""
    try:
        lines, start, _, end = span(source, name)
    except LookupError:
        if "." in name:
            raise
        return f"{source}\n\n{function_text(donor, name)}"
    return "".join([*lines[:start], function_text(donor, name), *lines[end:]])


def blanked(blank: list[Exercise], stub: str = 'raise NotImplementedError("{id}: write {name}")') -> dict[str, str]:
    """The project's scripts without the solutions of these exercises; `stub` is what stands there instead."""
    sources = dict(reference())
    for exercise in blank:
        for name in exercise.functions:
            source = sources[exercise.module]
            indent = " " * find(source, name).body[0].col_offset
            names = ", ".join(argument.arg for argument in find(source, name).args.args)
            text = stub.format(id=exercise.id, name=name, module=exercise.module, arguments=names)
            sources[exercise.module] = with_body(source, name, "".join(f"{indent}{x}\n" for x in text.split("\n")))
    return sources
