"""The exercises: which functions they are, and how they are found, blanked and exchanged in source text.

Functions are found by name in the syntax tree, never by line number or marker, so the scripts stay free of both.
"""

import ast
import functools
from pathlib import Path
from typing import NamedTuple

KIT = Path(__file__).resolve().parent
ROOT = KIT.parent
TESTS = {"public": KIT / "public" / "test_exercises.py", "hidden": KIT / "hidden" / "test_hidden.py"}


class Exercise(NamedTuple):
    """One exercise: one file, one function or two that belong together."""

    id: str
    title: str
    file: str
    functions: dict[str, float]  # name (or Class.method) -> points
    hours: float  # what a student who knows PyTorch should plan, reading and tests included

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
    Exercise("E10", "The score of a whole answer", "model.py", {"last_token": 5}, 0.5),
    Exercise("E11", "The Bradley-Terry loss", "reward.py", {"bradley_terry_loss": 5}, 1),
    Exercise("E12", "The reward of every token", "ppo.py", {"shape_rewards": 10}, 1.5),
    Exercise("E13", "Advantages", "ppo.py", {"gae": 10, "whiten": 5}, 3),
    Exercise("E14", "The clipped losses", "ppo.py", {"policy_loss": 5, "value_loss": 5}, 2),
]
# functions of other files that do an exercise's work: they are closed while it is graded
CLOSED = {"E4": ("runtime/chunked.py", ("ChunkedLogprobs.forward", "ChunkedLogprobs.log_softmax"))}


def chosen(ids: str) -> list[Exercise]:
    """Those of a list such as 'E7,E8'; all of an empty one. ValueError names an id that does not exist."""
    wanted = {word.strip() for word in ids.split(",") if word.strip()}
    unknown = wanted - {exercise.id for exercise in EXERCISES}
    if unknown:
        raise ValueError(f"--only {min(unknown)}: there is no such exercise; they are E1 to {EXERCISES[-1].id}")
    return [exercise for exercise in EXERCISES if not wanted or exercise.id in wanted]


@functools.cache
def reference() -> dict[str, str]:
    """The project's scripts and packages: path -> source text."""
    paths = [path for pattern in ("*.py", "hf/*.py", "runtime/*.py", "tasks/*.py") for path in ROOT.glob(pattern)]
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in sorted(paths)}


def write(folder: Path, sources: dict[str, str]) -> None:
    """Write path -> text under a folder."""
    for name, text in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def properties(group: str) -> dict[tuple[str, str], list[str]]:
    """The public or hidden tests of (exercise, function), in order: named test_EXERCISE_FUNCTION__PROPERTY."""
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


def cut(source: str, name: str) -> tuple[str, str, str, str]:
    """The source in four: before a function, its head with its docstring, the rest of it (the solution), and after.

    Decorators belong to it, and comments of its depth after its last statement.
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
    return tuple("".join(part) for part in (lines[:start], lines[start:body], lines[body:end], lines[end:]))


def function_text(source: str, name: str) -> str:
    """A function as it stands, from its decorators to its last line."""
    return "".join(cut(source, name)[1:3])


def with_body(source: str, name: str, text: str) -> str:
    """The source with other lines after the docstring of a function."""
    before, head, _, after = cut(source, name)
    return before + head + text + after


def graft(source: str, name: str, donor: str) -> str:
    """`source` with its function `name` exchanged for that of `donor`; at its end, if it has none of this name."""
    try:
        before, _, _, after = cut(source, name)
    except LookupError:
        if "." in name:
            raise
        before, after = f"{source}\n\n", ""
    return before + function_text(donor, name) + after


def blanked(blank: list[Exercise], stub: str = 'raise NotImplementedError("{id}: write {name}")') -> dict[str, str]:
    """The project's scripts without the solutions of these exercises; `stub` is what stands there instead."""
    sources = dict(reference())
    for exercise in blank:
        for name in exercise.functions:
            node = find(sources[exercise.file], name)
            names = ", ".join(argument.arg for argument in node.args.args)
            lines = stub.format(id=exercise.id, name=name, arguments=names).split("\n")
            body = "".join(" " * node.body[0].col_offset * bool(line) + f"{line}\n" for line in lines)
            sources[exercise.file] = with_body(sources[exercise.file], name, body)
    return sources
