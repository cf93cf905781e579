"""Export the handout: the project without the solutions, with public tests, the lab and what students should read.

    python assignments/handout.py ../handout                     # all exercises blank
    python assignments/handout.py ../week3 --only E12,E13,E14    # these blank, the others solved

The bodies of the exercises' functions become two lines that call a stand-in (student/solved.py); signatures and
docstrings, the tasks, stay. Copied is what is listed here and nothing else. Then every file is searched for lines of
the solutions, and for what would answer the lab.
"""

import argparse
import ast
import base64
import json
import shutil
import sys
import textwrap
import zlib
from pathlib import Path

import exercises
from exercises import EXERCISES, KIT, ROOT, Exercise

AS_IT_IS = """train_all.sh presets/*.sh runtime/stages.sh LICENSE requirements.txt pyproject.toml docs/pipeline.svg
tasks/*.txt weights/README.md weights/make.py weights/tiny-*/*config.json weights/tiny-*/tokenizer.json
weights/tiny-*/model.safetensors""".split()
OF_THE_KIT = {  # -> folder in the handout
    "public/*.py": "tests",
    "student/*.md": "",
    "student/solved.py": "",
    "lab/LAB.md": "lab",
    "lab/runs.jsonl": "lab",
}
STUB = """from solved import stand_in  # write your code instead of these lines

return stand_in("{id}", "{name}", globals())({arguments})"""
KINDS = (".py", ".md", ".txt", ".toml", ".sh", ".json", ".jsonl", ".svg", ".yml")
SHORTEST = 12  # characters: a shorter line of a solution tells nothing
WORKFLOW = """name: Autograding
on: [push]
permissions: {{checks: write, actions: read, contents: read}}
jobs:
  grade:
    runs-on: ubuntu-latest
    if: github.actor != 'github-classroom[bot]'
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with: {{python-version: "3.11"}}
      - run: pip install -r requirements.txt
{steps}      - uses: classroom-resources/autograding-grading-reporter@v1
        env: {{{results}}}
        with: {{runners: "{runners}"}}
"""
STEP = """      - id: {e.id}
        uses: classroom-resources/autograding-command-grader@v1
        with: {{test-name: {e.id}, command: python -m pytest -m {e.id}, timeout: 5, max-score: {points:g}}}
"""


def export(out: Path, blank: list[Exercise]) -> list[Path]:
    """Write the handout into an empty folder and search it; returns its files. ValueError if a solution is in it."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose a new folder")
    texts = exercises.blanked(blank, STUB)
    texts["health.py"] = without(texts["health.py"], causes(texts["health.py"]))
    texts["README.md"] = (KIT / "STUDENT.md").read_text("utf-8").replace("<!-- exercises -->", table(blank))
    texts["solved.json"] = json.dumps(packed(blank), indent=0) + "\n"
    texts[".github/workflows/classroom.yml"] = workflow(blank)
    exercises.write(out, texts)
    for pattern in [*AS_IT_IS, *(f"assignments/{pattern}" for pattern in OF_THE_KIT)]:
        found = [path for path in ROOT.glob(pattern) if path.is_file()]
        if not found:
            raise ValueError(f"the project has no {pattern}")
        for path in found:
            moved = OF_THE_KIT.get(pattern.removeprefix("assignments/"))
            target = out / path.relative_to(ROOT) if moved is None else out / moved / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    found = leaks(files, blank)
    if found:
        raise ValueError(f"the handout leaks: {found[0]}")
    return files


def table(blank: list[Exercise]) -> str:
    """The exercises, as Markdown."""
    lines = ["| | what | function | points | hours |", "|---|---|---|---|---|"]
    for e in blank:
        names = ", ".join(f"`{name}`" for name in e.functions)
        lines.append(f"| {e.id} | {e.title} | {names} in `{e.file}` | {e.points:g} | {e.hours:g} |")
    return "\n".join(lines)


def packed(blank: list[Exercise]) -> dict[str, str]:
    """The solved functions, so that they run (student/solved.py) and nobody reads one by accident."""
    texts = {name: exercises.function_text(exercises.reference()[e.file], name) for e in blank for name in e.functions}
    return {name: base64.b85encode(zlib.compress(textwrap.dedent(x).encode())).decode() for name, x in texts.items()}


def workflow(blank: list[Exercise]) -> str:
    """GitHub Classroom: the public tests of each exercise on every push, for their share of the points."""
    steps = "".join(STEP.format(e=e, points=e.points * 0.4) for e in blank)
    results = ", ".join(f'{e.id}_RESULTS: "${{{{ steps.{e.id}.outputs.result }}}}"' for e in blank)
    return WORKFLOW.format(steps=steps, results=results, runners=",".join(e.id for e in blank))


# ---- leaks ---------------------------------------------------------------------------------------------------------


def causes(source: str) -> list[ast.Constant]:
    """What health.py says of causes, half of the lab's answers: some constants, and texts in Range and Change."""
    found: list[ast.AST] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Range":
            found += [*node.args[3:5], *(word.value for word in node.keywords if word.arg in ("below", "above"))]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Change":
            found.append(node.args[-1])
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ("DISAGREE", "TOO_FAR", "OVERDONE"):
            found.append(node.value)
    return [node for node in found if isinstance(node, ast.Constant)]


def without(source: str, nodes: list[ast.Constant]) -> str:
    """The source with other words in place of these texts."""
    lines = source.encode().splitlines(keepends=True)  # a node's columns count bytes
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        rest = lines[node.end_lineno - 1][node.end_col_offset :]
        start = lines[node.lineno - 1][: node.col_offset]
        lines[node.lineno - 1 : node.end_lineno] = [start + b'"find out why"' + rest]
    return b"".join(lines).decode()


def squeeze(line: str) -> str:
    """A line without spaces and without the remark behind its code."""
    return "".join(line.split("  # ")[0].split())


def secrets(blank: list[Exercise]) -> set[str]:
    """The lines of the solutions, squeezed, that stand nowhere else in the project's scripts; the lab's answers."""
    sources = exercises.reference()
    texts = [exercises.cut(sources[exercise.file], name)[2] for exercise in blank for name in exercise.functions]
    elsewhere = {squeeze(line) for text in exercises.blanked(EXERCISES).values() for line in text.splitlines()}
    lines = {squeeze(line) for text in texts for line in text.splitlines()} - elsewhere
    lines |= {"".join(node.value.split()) for node in causes(sources["health.py"])}
    return {line for line in lines if len(line) >= SHORTEST}


def leaks(files: list[Path], blank: list[Exercise]) -> list[str]:
    """What must not be in these files: compiled or unknown ones, lines of solutions, whole statements of them."""
    hidden, found = secrets(blank), []
    for path in files:
        if path.suffix not in (*KINDS, ".safetensors") and path.name != "LICENSE":
            found.append(f"{path}: no file of this kind belongs there")
        elif path.suffix != ".safetensors":
            text = path.read_text(encoding="utf-8")
            for number, line in enumerate(text.splitlines(), 1):
                line = "".join(line.split())
                found += [f"{path}, line {number}: {secret}" for secret in hidden if secret in line]
            nodes = ast.walk(ast.parse(text)) if path.suffix == ".py" else ()  # a statement in another layout
            written = {squeeze(ast.unparse(node)) for node in nodes if isinstance(node, ast.stmt)}
            found += [f"{path}: {secret}" for secret in sorted(hidden & written)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    parser.add_argument("--only", default="", help="blank these alone, such as E7,E8 (default: all)")
    args = parser.parse_args()
    try:
        blank = exercises.chosen(args.only)
        files = export(args.out, blank)
    except (OSError, ValueError, LookupError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in files) / 1e6
    names = ", ".join(exercise.id for exercise in blank)
    print(f"{args.out}: {len(files)} files, {size:.1f} MB, {names} to be written; no line of a solution is in them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
