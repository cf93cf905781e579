"""Stand-ins for what you have not written yet, so that the whole method is at work from the first week on:

    SOLVED=all QUICK=1 bash train_all.sh         # SOLVED=E4,E5: these two alone

They are packed so that nobody reads one by accident. The tests and the grader have none.
"""

import base64
import json
import os
import sys
import zlib
from pathlib import Path

UNPACKED = {}


def stand_in(exercise: str, name: str, scope: dict):
    """The solved function, if SOLVED asks for it; else NotImplementedError. `scope` is what its file has defined."""
    if not {"all", exercise} & set(os.environ.get("SOLVED", "").replace(" ", "").split(",")):
        raise NotImplementedError(f"{exercise}: write {name}")
    if name not in UNPACKED:
        print(f"{exercise}: {name} is still to be written; a stand-in runs", file=sys.stderr)
        packed = json.loads(Path(__file__).with_name("solved.json").read_text(encoding="utf-8"))
        exec(zlib.decompress(base64.b85decode(packed[name])), scope, UNPACKED)
        UNPACKED[name] = UNPACKED[name.split(".")[-1]]
    return UNPACKED[name]
