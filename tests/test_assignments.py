"""The course kit: surgery on source text, the handout, what was handed in, grading. check.py proves the rest."""

import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("to grade, the kit needs a Unix", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "assignments"))

import exercises
import grade
import handout
from exercises import EXERCISES, KIT
from handed_in import read_submission, submissions

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


def test_a_body_is_exchanged_and_everything_else_stays():
    blank = exercises.with_body(SCRIPT, "A.f", "        pass\n")
    blank = exercises.with_body(blank, "h", "    pass\n")
    want = SCRIPT.replace("        return x + 1\n        # a remark about the solution\n", "        pass\n")
    assert blank == want.replace("    y = x * 2  # twice\n\n    return y\n", "    pass\n")
    with pytest.raises(LookupError, match="no k"):
        exercises.with_body(SCRIPT, "k", "")
    student = "import re\n\n\ndef helper(): return 3\n\n\n" + blank
    healed = exercises.graft(exercises.graft(student, "A.f", SCRIPT), "h", SCRIPT)
    assert healed.split("\n\n\n", 2)[2] == SCRIPT and "def helper" in healed
    assert exercises.function_text(exercises.graft("x = 1\n", "h", SCRIPT), "h") == exercises.function_text(SCRIPT, "h")


@pytest.fixture(scope="module")
def handed_out(tmp_path_factory):
    out = tmp_path_factory.mktemp("course") / "hand out"
    return out, handout.export(out, EXERCISES)


def test_a_planted_solution_and_an_answer_of_the_lab_are_found(handed_out):
    out, files = handed_out
    assert not any(word in str(path.relative_to(out)) for path in files for word in ("hidden", "bugs", "assignments"))
    assert handout.leaks(files, EXERCISES) == []
    for name, line in (("README.md", "# rewards=torch.where(mask, -kl_coef*(logprobs - ref_logprobs), 0.0)"),
                       ("sft.py", "def f():\n    last = mask & (\n        mask.flip(1).cumsum(1).flip(1) == 1)\n"),
                       ("lab/LAB.md", "the reference is the policy itself, or nothing was updated (lr 0, frozen)")):
        before = (out / name).read_text()
        (out / name).write_text(before + "\n" + line)
        assert len(handout.leaks(files, EXERCISES)) == 1, line
        (out / name).write_text(before)
    (out / "ppo.cpython-311.pyc").write_bytes(b"")
    assert handout.leaks([out / "ppo.cpython-311.pyc"], EXERCISES)


def test_what_is_not_written_is_one_line_and_can_stand_in(handed_out):
    out, _ = handed_out
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    done = subprocess.run([sys.executable, "-m", "pytest", "-m", "E4 or E12", "tests"], cwd=out, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 1 and "E4: 4 to be written" in done.stdout, done.stdout
    assert "Traceback" not in done.stdout and len(done.stdout.splitlines()) < 20, done.stdout
    code = """
import os, torch, ppo
for solved in ("", "E12", "E13", "all"):
    os.environ["SOLVED"] = solved
    try:
        print(ppo.gae(*(torch.ones(1, 3) for _ in "rv"), torch.ones(1, 3).bool(), 1.0, 0.5)[0].tolist())
    except NotImplementedError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=out, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["E13: write gae"] * 2 + ["[[1.5, 1.0, 0.0]]"] * 2, done.stderr
    assert "E13: gae" in done.stderr  # who runs on a stand-in is told so


def archive(names, kind="zip"):
    """Bytes of an archive of small files: name -> text, bytes, or None for a link out of it."""
    data = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(data, "w") as file:
            for name, text in names.items():
                info = zipfile.ZipInfo("x")
                info.filename = name  # as it is, with its backslashes
                file.writestr(info, text)
    else:
        with tarfile.open(fileobj=data, mode=f"w:{kind}") as file:
            for name, text in names.items():
                info = tarfile.TarInfo(name)
                info.size = len(text or "")
                if text is None:
                    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                file.addfile(info, io.BytesIO((text or "").encode()))
    return data.getvalue()


ONE = {"handout/ppo.py": "x = 1\n"}
HANDED_IN = [  # name -> contents, the text of ppo.py that is read (None: none), a word of the note
    ("a.zip", archive(ONE), "x = 1\n", ""),
    ("B.ZIP", archive(ONE), "x = 1\n", ""),
    ("C D_1_assignsubmission_file_/work.zip", archive(ONE), "x = 1\n", ""),
    ("windows.zip", archive({"handout\\ppo.py": "x = 1\r\n"}), "x = 1\n", ""),
    ("g.tar.gz", archive(ONE, "gz"), "x = 1\n", ""),
    ("g.tgz", archive(ONE, "gz"), "x = 1\n", ""),
    ("g.tar.xz", archive(ONE, "xz"), "x = 1\n", ""),
    ("f_ppo.py", b"\xef\xbb\xbfx = 1\n", "x = 1\n", ""),
    ("smith_123_4_ppo-1.py", b"x = 1\n", "x = 1\n", ""),
    ("windows/PPO.PY", b"x = 1\n", "x = 1\n", ""),
    ("zoë ä/ppo (1).py", b"x = 1\n", "x = 1\n", ""),
    ("nested.zip", archive({"a/b.zip": archive(ONE)}), "x = 1\n", ""),
    ("mac.zip", archive(ONE | {"__MACOSX/handout/._ppo.py": "junk", "__MACOSX/ppo.py": "junk"}), "x = 1\n", ""),
    ("two.zip", archive({"old/old/ppo.py": "old\n", "new/ppo.py": "x = 1\n"}), "x = 1\n", "2 different"),
    ("up.zip", archive({"../../ppo.py": "x = 1\n"}), "x = 1\n", ""),
    ("links.tar.gz", archive({"ppo.py": None, "data.py": "x = 1\n"}, "gz"), None, ""),
    ("damaged.zip", archive(ONE)[:40], None, "cannot be read"),
    ("damaged.tar.gz", b"\x1f\x8b", None, "cannot be read"),
    ("work.rar", b"Rar!", None, ".zip"),
    ("7/work.7z", b"7z", None, ".zip"),
    ("notes.pdf", b"%PDF", None, "named like"),
    ("empty/", b"", None, "empty"),
    ("large.zip", archive({"ppo.py": "x" * (2 << 20)}), ValueError, ""),
    ("latin/ppo.py", b"x = '\xff'", ValueError, ""),
]


@pytest.mark.parametrize("name, data, want, note", HANDED_IN, ids=[entry[0] for entry in HANDED_IN])
def test_everything_that_is_handed_in_is_read_or_has_its_reason(tmp_path, name, data, want, note):
    place = tmp_path / name
    place.parent.mkdir(exist_ok=True)
    if name.endswith("/"):
        place.mkdir()
    else:
        place.write_bytes(data)
    (tmp_path / ".DS_Store").write_bytes(b"")
    (tmp_path / "bob").mkdir()
    (tmp_path / "bob" / "ppo.py").write_text("bob")  # another student's file of the same name
    found = submissions([tmp_path])
    assert {path.name for path in found} == {"bob", Path(name).parts[0]}
    path, notes = next(path for path in found if path.name != "bob"), []
    read = read_submission(path, notes).get("ppo")
    assert read == want if not isinstance(want, type) else isinstance(read, want), (read, notes)
    assert (note in " ".join(notes)) if note else not (notes and want is not None), notes
    assert not [other for other in tmp_path.rglob("*") if other.name == "ppo.py" and "zip" in str(other.parent)]


def test_a_link_to_the_solution_is_not_followed(tmp_path):
    (tmp_path / "eve").mkdir()
    (tmp_path / "eve" / "ppo.py").symlink_to(exercises.ROOT / "ppo.py")
    notes = []
    assert read_submission(tmp_path / "eve", notes) == {} and "link" in notes[0]


@pytest.mark.slow
def test_the_kit_proves_itself():
    """check.py: the reference, the handout, every seeded bug."""
    done = subprocess.run([sys.executable, KIT / "check.py"], capture_output=True, text=True)
    assert done.returncode == 0 and "0 faults" in done.stdout, done.stdout + done.stderr


def test_grading_a_class(tmp_path):
    """One student with a right whiten, a gae without lambda and a file that is no Python; one with nothing readable."""
    right, ppo = exercises.reference()["ppo.py"], exercises.blanked(EXERCISES)["ppo.py"]
    ppo = exercises.graft(exercises.graft(ppo, "gae", right), "whiten", right)
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "ppo.py").write_text(ppo.replace("gamma * lam * next_advantage", "gamma * next_advantage"))
    (tmp_path / "ann" / "data.py").write_text("def collate(:\n")
    (tmp_path / "bob.rar").write_bytes(b"Rar!")
    command = [sys.executable, KIT / "grade.py", "--seed", "3"]
    done = subprocess.run([*command, tmp_path, "--csv"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    header, ann, bob = done.stdout.splitlines()
    assert header.startswith("submission,total,E1,") and header.endswith(",why")
    # whiten has all of its 5 points; of gae what holds without lambda, and that is not its formula
    assert ann.startswith("ann,5,0,0,") and "data.py, line 1" in ann and "the example of the docstring" in ann
    assert bob.startswith("bob.rar,0,0,") and ".rar" in bob
    out = tmp_path / "results.json"
    done = subprocess.run([*command, tmp_path / "ann", "--gradescope", out], capture_output=True, text=True)
    assert done.returncode == 0 and "5 / 100" in done.stdout, done.stderr
    tests = json.loads(out.read_text())["tests"]
    assert sum(test["max_score"] for test in tests) == pytest.approx(100, abs=0.01)
    assert sum(test["score"] for test in tests) == pytest.approx(5)
    shown = {test["visibility"] for test in tests if "whiten" in test["name"] and test["status"] == "passed"}
    assert shown == {"visible", "after_published"}
    gae = [test for test in tests if "gae" in test["name"]]
    assert {test["score"] for test in gae} == {0.0} and any("does not" not in test["output"] for test in gae)


NAN_GAE = """    m, advantages, following, carried = mask.float(), torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] * m[:, t] + gamma * following - values[:, t] * m[:, t]
        carried = (delta + gamma * lam * carried) * m[:, t]
        advantages[:, t], following = carried, values[:, t] * m[:, t]
    return advantages, advantages + values * m
"""
CHUNKED = """    from runtime.chunked import ChunkedLogprobs
    eye = torch.eye(logits.shape[-1], dtype=logits.dtype)
    rows = [ChunkedLogprobs.log_softmax(row, eye, temperature) for row in logits[:, :-1]]
    return torch.stack(rows).gather(-1, tokens[:, 1:, None])[..., 0]
"""
STAND_IN = """    import os
    os.environ["SOLVED"] = "all"
    from solved import stand_in
    return stand_in("E9", "make_pairs", globals())(samples, rewards, most, rng)
"""
ANSWERS = {  # exercise -> function, its body, the share of its points that is left, what is said of it
    "E1": ("extract_answer", "    import os; os._exit(0)\n", 0, "process ended"),
    "E2": ("collate", "    while True: pass\n", 0, "longer than 20 seconds"),
    "E3": ("rotate", "    x = bytearray(1 << 40)\n", 0, "MemoryError"),
    "E4": ("token_logprobs", CHUNKED, 0, "closed"),
    "E5": ("sft_loss", "    return -(mask * logprobs).sum() / total\n", 0.6, "NaN came out"),
    "E7": ("majority_vote", "    assert False\n", 0, "it raised AssertionError, at: assert False"),
    "E8": ("winners", "    raise SystemExit\n", 0, "SystemExit"),
    "E11": ("bradley_terry_loss", "    raise KeyboardInterrupt\n", 0, "process ended"),
    "E9": ("make_pairs", STAND_IN, 0, "solved.json"),
    "E13": ("gae", NAN_GAE, 0.7, "NaN came out"),  # a textbook's: right but for the masked cells
}


def test_a_textbook_answer_loses_the_points_of_NaN_alone_and_a_trick_earns_nothing():
    def graded(exercise):
        source = exercises.with_body(exercises.reference()[exercise.file], *ANSWERS[exercise.id][:2])
        return exercise, grade.grade_exercise(exercise, source, seconds=20 if exercise.id == "E2" else 600)

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(graded, [exercise for exercise in EXERCISES if exercise.id in ANSWERS]))
    for exercise, results in answers:
        name, _, left, said = ANSWERS[exercise.id]
        mine = [result for result in results if result.function == name]
        assert all(result.score == result.most for result in results if result not in mine), (exercise.id, results)
        share = sum(result.score for result in mine) / exercise.functions[name]
        assert left <= share < 1 if left else share == 0, (exercise.id, results)
        failures = [result.failure for result in mine if result.failure]
        assert all(failure.startswith(said) for failure in failures) if left else said in failures[0], failures
