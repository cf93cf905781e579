"""What the documents name exists, and the seeded bugs of mutants.py still fit the code."""

import ast
import functools
import re

import pytest
from mutants import MUTANTS, ROOT

pytestmark = pytest.mark.project
DETAILS = (ROOT / "docs" / "ppo_details.md").read_text(encoding="utf-8")


@functools.cache
def names(path):
    """Functions and classes of a file."""
    return {node.name for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_every_detail_is_decided_and_every_name_exists():
    """40 rows of PPO and 16 of the reward model, each with a place in the code and a test that are there."""
    rows = [line for line in DETAILS.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(line.split("|")[1]) for line in rows] == [*range(1, 41), *range(1, 17)]
    for line in rows:
        assert len(line.split("|")) == 7, line
        assert re.search(r"`[\w/]+\.py: \w+`", line.split("|")[4]) and "`tests/" in line.split("|")[5], line
    for path, name in re.findall(r"`([\w/]+\.py): (\w+)`", DETAILS) + re.findall(r"`(tests/\w+\.py)::(\w+)`", DETAILS):
        assert name in names(path), f"{path} has no {name}"


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_no_seeded_bug_is_stale(file):
    """Each still fits the code once and names tests that exist."""
    seen = set()
    for mutant in (mutant for mutant in MUTANTS if mutant.file == file):
        mutant.source()
        assert mutant.name not in seen
        seen.add(mutant.name)
        for node_id in mutant.node_ids:
            path, name = node_id.removeprefix(f"{ROOT}/").split("[")[0].split("::")
            assert name in names(path), f"{path} has no {name}"
