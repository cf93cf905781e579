"""The course kit: surgery on source text, the handout, grading. `python assignments/check.py` is the whole proof."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.project
if sys.version_info < (3, 11) or sys.platform == "win32":
    pytest.skip("the kit needs Python 3.11, and to grade a Unix", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "assignments"))

import bugs
import exercises
import grade
import handout

SCRIPT = '''class A:
    @staticmethod
    def f(x):
        """Task."""
        return x + 1
        # a remark about the solution

    def g(self): ...


def h(x):
    """Task
    of two lines.
    """
    y = x * 2  # twice

    return y


def after():
    return 1
'''


def exercise(*functions):
    return exercises.Exercise("E7", "t", "t.py", dict.fromkeys(functions, 1), 1)


def test_blanking_keeps_signature_task_and_everything_else():
    blank = exercises.blank(SCRIPT, exercise("A.f", "h"))
    gone = ("        return x + 1\n        # a remark about the solution\n", "    y = x * 2  # twice\n\n    return y\n")
    want = SCRIPT.replace(gone[0], '        raise NotImplementedError("E7: write A.f")\n')
    assert blank == want.replace(gone[1], '    raise NotImplementedError("E7: write h")\n')
    with pytest.raises(ValueError, match="docstring"):
        exercises.blank(SCRIPT, exercise("after"))
    with pytest.raises(LookupError, match="no k"):
        exercises.blank(SCRIPT, exercise("k"))


def test_grafting_takes_one_function_and_leaves_a_students_own_helpers():
    student = exercises.blank("import re\n\n\ndef helper(): return 3\n\n\n" + SCRIPT, exercise("A.f", "h"))
    healed = exercises.graft(exercises.graft(student, "A.f", SCRIPT), "h", SCRIPT)
    assert healed.split("\n\n\n", 2)[2] == SCRIPT and "def helper" in healed
    assert exercises.function_text(exercises.graft("x = 1\n", "h", SCRIPT), "h") == exercises.function_text(SCRIPT, "h")


def test_a_function_is_graded_among_the_references_others():
    right = exercises.reference()
    ppo = exercises.graft(exercises.blanked(exercises.load())["ppo"], "gae", right["ppo"])
    unit = next(unit for unit in grade.units() if unit[1] == "gae")
    assert grade.in_reference(*unit, ppo, right) == right["ppo"] != ppo


def test_the_points_are_a_hundred_and_every_seeded_bug_fits_its_function():
    assert sum(e.points for e in exercises.load()) == 100 and len(exercises.load()) == 14
    sources = exercises.reference()
    assert set(bugs.BUGS) == {function for _, function in grade.units()}
    assert sum(map(len, bugs.BUGS.values())) >= 100
    for e, function in grade.units():
        body = "".join(exercises.body_lines(sources[Path(e.file).stem], function))
        names = [name for name, _, _ in bugs.BUGS[function]]
        assert len(names) == len(set(names)) >= 3
        assert all(bugs.seeded(body, old, new) != body for _, old, new in bugs.BUGS[function])


def test_the_handout_has_no_solution_and_planted_ones_are_found(tmp_path):
    blank = exercises.chosen("E7,E12")
    files = handout.export(tmp_path / "out", blank)
    names = {str(path.relative_to(tmp_path / "out")) for path in files}
    assert {"ppo.py", "README.md", "AGENTS.md", "CHANGELOG.md", "tests/test_exercises.py"} <= names
    assert {name for name in names if name.startswith("lab/") and "/" not in name[4:]} == {"lab/LAB.md"}
    assert not any(word in name for name in names for word in ("hidden", "bugs", ".pyc", "mutants", "assignments"))
    text = (tmp_path / "out" / "ppo.py").read_text()
    assert 'raise NotImplementedError("E12: write shape_rewards")' in text and "next_advantage" in text  # E13 stays
    for name, line in (("README.md", "# rewards=torch.where(mask, -kl_coef*(logprobs - ref_logprobs), 0.0)"),
                       ("sft.py", "def f():\n    last = mask & (\n        mask.flip(1).cumsum(1).flip(1) == 1)\n")):
        before = (tmp_path / "out" / name).read_text()
        (tmp_path / "out" / name).write_text(before + "\n" + line)
        assert len(handout.leaks(files, blank)) == 1, line
        (tmp_path / "out" / name).write_text(before)
    assert handout.leaks(files, blank) == []
    (tmp_path / "out" / "ppo.cpython-311.pyc").write_bytes(b"")
    assert handout.leaks([tmp_path / "out" / "ppo.cpython-311.pyc"], blank)
    with pytest.raises(ValueError, match="not empty"):
        handout.export(tmp_path / "out", exercises.load())


def test_a_submission_is_read_wherever_its_files_lie(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("alice/old/ppo.py", "old = 1\n")
        archive.writestr("alice/ppo.py", "new = 1\r\n")
        archive.writestr("__MACOSX/ppo.py", "junk")
        archive.writestr("alice/data.py", b"\xff\xfe")
        archive.writestr("alice/chat.py", "not an exercise")
    read = grade.read_submission(tmp_path / "a.zip")
    assert read["ppo"] == "new = 1\n" and set(read) == {"ppo", "data"} and isinstance(read["data"], ValueError)
    assert grade.submissions([tmp_path]) == [tmp_path / "a.zip"]
    (tmp_path / "b.zip").write_text("no zip")
    with pytest.raises(ValueError, match="neither a folder nor a zip"):
        grade.submissions([tmp_path / "b.zip"])


@pytest.mark.slow
def test_the_kit_proves_itself():
    """check.py: the reference, every stub, every seeded bug, leaks, cheats."""
    done = subprocess.run([sys.executable, exercises.KIT / "check.py"], capture_output=True, text=True)
    assert done.returncode == 0 and "0 faults" in done.stdout, done.stdout + done.stderr


@pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning")  # E1 to E14 are marks of the handout
def test_grading_a_submission(tmp_path, monkeypatch, capsys):
    """One right function, one wrong, one that loops for ever, one file that is no Python, and all others blank."""
    sources, right = exercises.blanked(exercises.load()), exercises.reference()
    ppo = exercises.graft(exercises.graft(sources["ppo"], "gae", right["ppo"]), "whiten", right["ppo"])
    sources |= {"ppo": ppo.replace("delta + gamma * lam * next_advantage", "delta + gamma * next_advantage"),
                "data": "def collate(:\n"}
    folder, out = tmp_path / "bob", tmp_path / "results.json"
    folder.mkdir()
    for name, text in sources.items():
        (folder / f"{name}.py").write_text(text)
    runner, close = grade.Runner(), grade.Runner.close
    monkeypatch.setattr(grade, "Runner", lambda user: runner)
    monkeypatch.setattr(runner, "close", lambda: None)
    monkeypatch.setattr(sys, "argv", ["grade.py", str(folder), "--gradescope", str(out), "--seed", "3"])
    assert grade.main() == 0
    assert "5 / 100" in capsys.readouterr().out  # whiten alone
    result = json.loads(out.read_text())
    assert sum(test["max_score"] for test in result["tests"]) == pytest.approx(100)
    assert sum(test["score"] for test in result["tests"]) == pytest.approx(5)
    found = {test["name"]: test for test in result["tests"]}
    assert found["E13 whiten: hidden tests"]["status"] == "passed"
    wrong = found["E13 gae: hidden tests"]
    assert (wrong["status"], wrong["visibility"]) == ("failed", "after_published") and "(gamma lam)" in wrong["output"]
    assert "data.py, line 1" in found["E2 collate: public tests"]["output"]
    assert found["E7 majority_vote: public tests"]["output"].startswith("it raised NotImplementedError: E7: write maj")
    e, function = next(unit for unit in grade.units() if unit[1] == "sft_loss")
    loop = sources["sft"].replace('raise NotImplementedError("E5: write sft_loss")', "while True: pass")
    results = grade.grade_function(runner, e, function, loop, 1, 0)
    assert [result.failures for result in results] == [["it took longer than 1 seconds"]] * 2
    close(runner)
