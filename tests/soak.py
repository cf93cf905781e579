"""Kill the whole pipeline again and again, and count what is lost. It takes an hour or more: pytest does not run it.

    python tests/soak.py --kills 200            # of QUICK=1 bash train_all.sh, with SEED= and so on as there

First one run that nobody disturbs. Then runs that are killed at random moments (kill -9) and started again until they
are finished, as many runs as it takes. Two kills of three fall while a stage is at work, the third at any moment of the
first seconds, when finished stages are looked at. Every third takes the stage's process alone, as a system out of
memory does, the others the shell script and all that it has started, as a power cut would.

Lost is: a finished stage that is done again, a saved step that is not gone on from, a file of a finished run that is
missing, or has other bytes than the undisturbed run's, or should not be there. Exit code 1 if anything is. Linux only.
"""

import argparse
import collections
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMES = {"config", "seconds", "peak_memory_mb", "cost"}  # keys of done.json and report.json: how long, which folder
PAGE = "report.md"  # has times in it; report.json has all of its other numbers


def start(out, log):
    """train_all.sh in a session of its own, so that all it starts can be found."""
    env = {"OMP_NUM_THREADS": "1", "QUICK": "1", "PYTHON": sys.executable} | os.environ | {"OUT": str(out)}
    with log.open("w") as file:
        return subprocess.Popen(["bash", str(ROOT / "train_all.sh")], env=env, stdout=file, stderr=file,
                                stdin=subprocess.DEVNULL, start_new_session=True)


def members(session):
    """Processes of a session that are alive, and the process group of each."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group, owner = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if int(owner) == session and state not in "ZX":
            yield int(path.parent.name), int(group)


def kill(process, only_the_stage):
    """kill -9: the whole session until nobody is left, or the stage's process group; the shell then ends by itself."""
    while alive := dict(members(process.pid)):
        stage = [number for number, group in alive.items() if group != process.pid] if only_the_stage else []
        for number in stage or alive:
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if stage:
            break
    process.wait()


def finished_stages(out):
    return {path: path.read_bytes() for path in out.rglob("done.json")}


def saved_steps(out):
    """The newest state of every stage that has one."""
    return {str(folder.parent): max((int(path.stem) for path in folder.glob("*.json")), default=0)
            for folder in out.rglob("resume")}


def contents(out):
    """All files of a finished run by name, without times."""
    found = {}
    for path in (path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if name == PAGE:
            found[name] = path.stat().st_size > 1000
        elif path.name in ("done.json", "report.json"):
            found[name] = {key: value for key, value in json.loads(path.read_bytes()).items() if key not in TIMES}
        else:
            found[name] = path.read_bytes()
    return found


def main(kills, seed, folder):
    rng, lost, where = random.Random(seed), [], collections.Counter()
    whole, log, begun = folder / "whole", folder / "log", time.monotonic()
    if start(whole, log).wait():
        sys.exit(f"the undisturbed run failed:\n{log.read_text()[-2000:]}")
    span, expected = (time.monotonic() - begun) / 10, contents(whole)
    done = went_on = runs = 0
    while done < kills:
        runs += 1
        out, finished, saved = folder / f"killed{runs}", {}, {}
        while True:
            at_work, only_the_stage = rng.random() < 2 / 3, rng.random() < 1 / 3
            wait, stages = rng.uniform(0, span if at_work else span / 2), len(finished)
            process = start(out, log)
            moment = None if at_work else time.monotonic() + wait
            while process.poll() is None and (moment is None or time.monotonic() < moment or done == kills):
                if moment is None and len(re.findall(r"^\[\S+\]$", log.read_text(), re.MULTILINE)) > stages:
                    moment = time.monotonic() + wait
                time.sleep(0.01)
            ended = process.poll() is not None
            if not ended:
                kill(process, only_the_stage)
                done += 1
            text = log.read_text()
            where[(re.findall(r"^\[(\S+)\]$", text, re.MULTILINE) or ["preflight"])[-1]] += not ended
            for state in re.findall(r"^.*(?:is damaged|redone|not as it was written).*$", text, re.MULTILINE):
                lost.append(f"run {runs}, kill {done}: {state}")
            for stage, step in re.findall(r"^(.+): goes on after step (\d+)$", text, re.MULTILINE):
                went_on += 1
                if int(step) < saved.get(stage, 0):
                    lost.append(f"run {runs}, kill {done}: {stage} goes on after step {step}, {saved[stage]} was saved")
            now = finished_stages(out)
            lost += [f"run {runs}, kill {done}: {path} was finished and is not as it was"
                     for path, old in finished.items() if now.get(path) != old]
            finished, saved = now, saved_steps(out)
            if ended and process.returncode == 0:
                break
            if ended:
                sys.exit(f"run {runs} failed by itself after kill {done}, code {process.returncode}:\n{text[-2000:]}")
        found = contents(out)
        lost += [f"run {runs}: {name} {'differs' if name in found and name in expected else 'is missing or too many'}"
                 for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
        print(f"run {runs} is finished, {done} kills so far; lost: {len(lost)}", flush=True)
    places = ", ".join(f"{stage} {n}" for stage, n in where.items() if n)
    print(f"{done} kills over {runs} runs of {len(expected)} files, {time.monotonic() - begun:.0f} s; {went_on} times a "
          f"stage went on in its middle. Killed in: {places}")
    print("\n".join([f"lost: {len(lost) or 'nothing'}", *lost]))
    return 1 if lost else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keeps the runs; left out, a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = args.folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        sys.exit(main(args.kills, args.seed, place))
