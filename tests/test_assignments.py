"""The course kit: surgery on source text, the handout, grading. `python assignments/check.py` is the whole proof."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info < (3, 11) or sys.platform == "win32":
    pytest.skip("the kit needs Python 3.11, and to grade a Unix", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "assignments"))

import bugs
import exercises
import grade
import handout

pytestmark = pytest.mark.project
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


def test_the_handout_runs_and_a_planted_solution_is_found(tmp_path):
    out, blank = tmp_path / "hand out", exercises.chosen("E7,E12")
    files = handout.export(out, blank)
    assert not any(word in str(path.relative_to(out)) for path in files for word in ("hidden", "bugs", "assignments"))
    text = (out / "ppo.py").read_text()
    assert 'raise NotImplementedError("E12: write shape_rewards")' in text and "next_advantage" in text  # E13 stays
    stage = [sys.executable, out / "data.py", "--questions", "arith", "--out", tmp_path / "q", "--train", "2"]
    assert subprocess.run(stage, cwd=tmp_path).returncode == 0
    assert handout.leaks(files, blank) == []
    for name, line in (("README.md", "# rewards=torch.where(mask, -kl_coef*(logprobs - ref_logprobs), 0.0)"),
                       ("sft.py", "def f():\n    last = mask & (\n        mask.flip(1).cumsum(1).flip(1) == 1)\n")):
        before = (out / name).read_text()
        (out / name).write_text(before + "\n" + line)
        assert len(handout.leaks(files, blank)) == 1, line
        (out / name).write_text(before)
    (out / "ppo.cpython-311.pyc").write_bytes(b"")
    assert handout.leaks([out / "ppo.cpython-311.pyc"], blank)


def test_a_submission_is_read_wherever_its_files_lie(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("alice/old/ppo.py", "old = 1\n")
        archive.writestr("alice/ppo.py", "new = 1\r\n")
        archive.writestr("__MACOSX/ppo.py", "junk")
        archive.writestr("alice/data.py", b"\xff\xfe")
        archive.writestr("alice/eval.py", "not an exercise")
    read = grade.read_submission(tmp_path / "a.zip")
    assert read["ppo"] == "new = 1\n" and set(read) == {"ppo", "data"} and isinstance(read["data"], ValueError)
    assert grade.submissions([tmp_path]) == [tmp_path / "a.zip"]


@pytest.mark.slow
def test_the_kit_proves_itself():
    """check.py: the reference, every stub, every seeded bug, leaks, cheats."""
    done = subprocess.run([sys.executable, exercises.KIT / "check.py"], capture_output=True, text=True)
    assert done.returncode == 0 and "0 faults" in done.stdout, done.stdout + done.stderr


def test_grading_a_submission(tmp_path):
    """Two functions right, one in another way than ours; one wrong, one endless, one file no Python, the rest blank."""
    sources, right = exercises.blanked(exercises.load()), exercises.reference()
    ppo = exercises.graft(exercises.graft(sources["ppo"], "gae", right["ppo"]), "whiten", right["ppo"])
    by_hand = '        raise NotImplementedError("E3: write RMSNorm.forward")\n', bugs.NORM
    endless = 'raise NotImplementedError("E5: write sft_loss")', "while True: pass"
    sources |= {"ppo": ppo.replace("delta + gamma * lam * next_advantage", "delta + gamma * next_advantage"),
                "data": "def collate(:\n", "model": sources["model"].replace(*by_hand),
                "sft": sources["sft"].replace(*endless)}
    for e in exercises.load():
        (tmp_path / e.file).write_text(sources[Path(e.file).stem])
    out = tmp_path / "results.json"
    flags = [tmp_path, "--gradescope", out, "--seed", "3", "--seconds", "10"]
    done = subprocess.run([sys.executable, exercises.KIT / "grade.py", *flags], capture_output=True, text=True)
    assert done.returncode == 0 and "7.5 / 100" in done.stdout, done.stderr
    result = json.loads(out.read_text())
    assert sum(test["max_score"] for test in result["tests"]) == pytest.approx(100)
    found = {test["name"]: test for test in result["tests"]}
    passed = {name for name, test in found.items() if test["status"] == "passed"}
    functions = ("E3 RMSNorm.forward", "E13 whiten")
    assert passed == {f"{function}: {kind} tests" for function in functions for kind in ("public", "hidden")}
    assert sum(found[name]["score"] for name in passed) == pytest.approx(7.5)
    wrong = found["E13 gae: hidden tests"]
    assert wrong["visibility"] == "after_published" and "(gamma lam)" in wrong["output"]
    assert "data.py, line 1" in found["E2 collate: public tests"]["output"]
    assert found["E7 majority_vote: public tests"]["output"].startswith("it raised NotImplementedError: E7: write maj")
    assert found["E5 sft_loss: hidden tests"]["output"] == "it took longer than 10 seconds"
