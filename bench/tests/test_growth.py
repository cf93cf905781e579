"""bench/growth.py: the slope, and that a point is measured from files to files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent


def test_the_slope_is_the_power_of_the_last_three_points():
    import growth

    points = [{"size": n, "seconds": 7 * n**1.5, "mb": 3.0} for n in (2, 8, 64, 128)]
    points[0] |= {"seconds": 1e6, "mb": 1e6}  # a start that costs more than the work
    assert growth.slope(points, "seconds") == pytest.approx(1.5)
    assert growth.slope(points, "mb") == pytest.approx(0, abs=1e-9)


def test_a_point_of_the_vote(tmp_path):
    """A process of its own prints a point and nothing else; its files are in the temporary folder that it was given."""
    command = [sys.executable, str(BENCH / "growth.py"), "--point", "questions=50"]
    done = subprocess.run(command, capture_output=True, text=True, env={"TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    point = json.loads(done.stdout)
    assert point["size"] == 50 and 0 < point["seconds"] < 60 and 0 < point["mb"] < 500
    rewards = [json.loads(line) for line in next(tmp_path.glob("*/out0/rewards.jsonl")).read_text().splitlines()]
    assert len(rewards) == 50 and {row["share"] for row in rewards} == {0.75}
    assert {len(row["responses"]) for row in rewards} == {8}
