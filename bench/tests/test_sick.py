"""bench/sick.py edits exact text: this says at once which bug the last change of a script has orphaned."""

import json

import pytest
import sick


def test_every_seeded_bug_fits_the_source():
    clean = sick.sources(sick.BUGS["healthy"])
    for bug in sick.BUGS.values():
        texts = sick.sources(bug)
        assert {name for name in clean if texts[name] != clean[name]} == {file for file, *_ in bug.edits}
        for text in texts.values():
            compile(text, bug.what, "exec")
    assert {name for curve in sick.CURVES.values() for name in curve.bugs.split()} <= set(sick.BUGS)


def test_a_bug_differs_from_the_runs_own_ppo_in_what_it_says(tmp_path):
    """The settings are those of the run, whatever its preset; paths are not among them."""
    (tmp_path / "6_ppo").mkdir()
    kept = {"lr": 0.002, "kl_coef": 0.4, "seed": 3, "critic": "", "gold": False}
    (tmp_path / "6_ppo" / "done.json").write_text(json.dumps({"settings": kept}))
    ppo = sick.settings(str(tmp_path))
    assert ppo == {"lr": 0.002, "kl_coef": 0.4, "seed": 3, "gold": False}
    changed = {name: bug.changes(ppo) for name, bug in sick.BUGS.items() if bug.changes(ppo)}
    assert changed == {"healthy_1": {"seed": 4}, "no_kl": {"kl_coef": 0, "lr": pytest.approx(0.008)},
                       "lr_10": {"lr": pytest.approx(0.02)}}


def test_the_table_goes_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{sick.START}\nold\n{sick.END}\nbelow\n")
    for text in ("new", "newer"):
        sick.write_page(page, text)
    assert page.read_text() == f"above\n{sick.START}\n\nnewer\n\n{sick.END}\nbelow\n"
    assert sick.START in (sick.ROOT / "docs" / "healthy.md").read_text()
    page.write_text("nothing to fill")
    with pytest.raises(ValueError, match="lacks the lines"):
        sick.write_page(page, "new")
