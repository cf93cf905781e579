"""Kill the whole pipeline again and again, and count what is lost. It takes half an hour or more: not a part of pytest.

    python bench/tests/soak.py --kills 200            # of QUICK=1 bash train_all.sh, with SEED= and so on as there

First one run that nobody disturbs. Then runs that are killed at random moments (kill -9) and started again until they
are finished, as many runs as it takes. Two kills of three fall while a stage is at work, the third at any moment of the
first seconds, when finished stages are looked at. Every third takes the stage's process alone, as a system out of
memory does, the others the shell script and all that it has started, as a power cut would.

Lost is: a finished stage that is done again, a saved step that is not gone on from, a file of a finished run that is
missing, or has other bytes than the undisturbed run's, or should not be there. Exit code 1 if anything is. Linux only.

To save the seconds that every stage takes to import torch, $PYTHON is a small client here, and the stages are forked
from this process, which has imported everything.
"""

import argparse
import atexit
import collections
import contextlib
import json
import os
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "QUICK": "1"}

import ppo  # noqa: E402, F401  and with it all that takes long to import
import reward  # noqa: E402, F401

TIMES = {"config", "seconds", "peak_memory_mb", "cost"}  # keys of done.json and report.json: how long, which folder
PAGE = "report.md"  # has times in it; report.json has all of its other numbers
CLIENT = """#!{python} -SE
import json, os, socket, sys
line = socket.socket(socket.AF_UNIX)
line.connect({place!r})
line.sendall(json.dumps([sys.argv[1:], dict(os.environ)]).encode() + b"\\n")
sys.exit((line.recv(1) or b"\\x01")[0])
"""


class Pipeline:
    """train_all.sh at work, in a session of its own, so that all it starts is found; its stages are our children."""

    def __init__(self, out, folder):
        self.log, self.stages = folder / "log", {}  # process id -> the client that waits for it
        self.listener, place, python = socket.socket(socket.AF_UNIX), folder / "socket", folder / "python"
        place.unlink(missing_ok=True)
        self.listener.bind(str(place))
        self.listener.listen()
        self.listener.setblocking(False)
        python.write_text(CLIENT.format(python=sys.executable, place=str(place)))
        python.chmod(0o755)
        self.log.unlink(missing_ok=True)
        with self.log.open("a") as file:  # as the stages do: a writer with a place of its own would overwrite theirs
            self.shell = subprocess.Popen(["bash", str(ROOT / "train_all.sh")], start_new_session=True, stdout=file,
                                          stderr=file, env=os.environ | {"OUT": str(out), "PYTHON": str(python)})
        atexit.register(self.kill, False)  # when this script is stopped

    def running(self):
        """Start the stage that is asked for, tell of the one that has ended; False once the shell has ended."""
        try:
            client, _ = self.listener.accept()
            client.setblocking(True)
            argv, environment = json.loads(client.makefile().readline())
        except (BlockingIOError, ValueError):  # nobody asks, or who asked was killed
            pass
        else:
            if child := os.fork():
                self.stages[child] = client
            else:
                self.stage(argv, environment)
        for child in list(self.stages):
            number, status = os.waitpid(child, os.WNOHANG)
            if number:
                self.tell(child, os.waitstatus_to_exitcode(status) % 256)
        return self.shell.poll() is None

    def tell(self, child, code):
        client = self.stages.pop(child)
        with contextlib.suppress(BrokenPipeError):
            client.sendall(bytes([code]))
        client.close()

    def stage(self, argv, environment):
        """A script with its flags, in this process, a child of the one that soaks."""
        code = 0
        try:
            os.setsid()
            os.environ |= environment
            handle = os.open(self.log, os.O_WRONLY | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            if argv[0] == "-m":
                sys.argv = argv[1:]
                runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = argv
                runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def kill(self, only_the_stage):
        """kill -9: the stage alone, if there is one, and the shell ends by itself; else all, until nobody is left."""
        for child in self.stages:
            os.kill(child, signal.SIGKILL)
        if self.stages and only_the_stage:
            while self.running():
                time.sleep(0.01)
        while alive := list(members(self.shell.pid)):
            for number in alive:
                try:
                    os.kill(number, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        for child in list(self.stages):
            os.waitpid(child, 0)
            self.tell(child, 137)
        self.shell.wait()
        self.listener.close()

    def text(self):
        return self.log.read_text(encoding="utf-8", errors="replace")  # the last character may be half a one

    def stages_begun(self):
        return re.findall(r"^\[\S+\] ([^\s:]+)", self.text(), re.MULTILINE)


def members(session):
    """Processes of a session that are alive."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if int(owner) == session and state not in "ZX":
            yield int(path.parent.name)


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
    whole, begun = folder / "whole", time.monotonic()
    pipeline = Pipeline(whole, folder)
    while pipeline.running():
        time.sleep(0.01)
    if pipeline.shell.returncode:
        sys.exit(f"the undisturbed run failed:\n{pipeline.text()[-2000:]}")
    span, expected = (time.monotonic() - begun) / 5, contents(whole)
    done = went_on = runs = 0
    while done < kills:
        runs += 1
        out, finished, saved = folder / f"killed{runs}", {}, {}
        while True:
            at_work, only_the_stage = rng.random() < 2 / 3, rng.random() < 1 / 3
            wait, pipeline = rng.uniform(0, span if at_work else span / 4), Pipeline(out, folder)
            moment = None if at_work else time.monotonic() + wait
            while (running := pipeline.running()) and (moment is None or time.monotonic() < moment or done == kills):
                if moment is None and len(pipeline.stages_begun()) > len(finished):
                    moment = time.monotonic() + wait
                time.sleep(0.01)
            if running:
                pipeline.kill(only_the_stage)
                done += 1
                where[(pipeline.stages_begun() or ["preflight"])[-1]] += 1
            text, place = pipeline.text(), f"run {runs}, kill {done}"
            for line in re.findall(r"^.*(?:is damaged|redone|not as it was written).*$", text, re.MULTILINE):
                lost.append(f"{place}: {line}")
            for stage, step in re.findall(r"^(.+): goes on after step (\d+)$", text, re.MULTILINE):
                went_on += 1
                if int(step) < saved.get(stage, 0):
                    lost.append(f"{place}: {stage} goes on after step {step}, {saved[stage]} was saved")
            now = finished_stages(out)
            lost += [f"{place}: {path} is not as it was" for path, old in finished.items() if now.get(path) != old]
            finished, saved = now, saved_steps(out)
            if not running and pipeline.shell.returncode == 0:
                break
            if not running:
                sys.exit(f"{place}: it failed by itself with code {pipeline.shell.returncode}:\n{text[-2000:]}")
        found = contents(out)
        lost += [f"run {runs}: {name} {'differs' if name in found and name in expected else 'is missing or too many'}"
                 for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
        print(f"run {runs} is finished, {done} kills so far; lost: {len(lost)}", flush=True)
    places, seconds = ", ".join(f"{stage} {n}" for stage, n in where.items()), time.monotonic() - begun
    print(f"{done} kills over {runs} runs of {len(expected)} files in {seconds:.0f} s; a stage went on in its middle "
          f"{went_on} times. Killed in: {places}")
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
