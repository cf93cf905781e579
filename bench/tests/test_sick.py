"""bench/sick.py edits exact text: this says at once which bug the last change of a script has orphaned."""

import sick


def test_every_seeded_bug_fits_the_source():
    clean = sick.sources(sick.BUGS["healthy"])
    for bug in sick.BUGS.values():
        texts = sick.sources(bug)
        assert {name for name in clean if texts[name] != clean[name]} == {file for file, *_ in bug.edits}
        for text in texts.values():
            compile(text, bug.what, "exec")
    assert {name for curve in sick.CURVES.values() for name in curve.bugs.split()} <= set(sick.BUGS)
