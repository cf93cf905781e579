"""A table of what users get wrong, over all scripts: one sentence, exit code 2, no traceback, nothing overwritten.

Each row names a script, what differs from a command that works, and words of the sentence. The output folder holds a
finished stage, which must be there afterwards. What a reader of files refuses in detail stands in the tests of that
reader: model folders in test_model.py, tokenizers in test_chat.py, questions in test_data.py. Here each kind of fault
goes once through a script.
"""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

import data
import runtime
from hf.tokenizer import Tokenizer
from model import ScalarModel, load_model, load_scalar_model, save_model
from tasks.recorded import load_samples

# ---- commands that work --------------------------------------------------------------------------------------------

QUESTIONS = [{"id": f"q{i}", "question": f"Ava has {i} pens. How many?", "answer": str(i)} for i in range(8)]
ANSWERS = [{"id": f"q{i}", "response": f"#### {i + right}", "finish": "stop", "answer": f"{i + right}",
            "source": "student"} for i in range(8) for right in (0, 0, 1)]
PAIRS = [{"id": f"q{i}", "prompt": f"{i}?", "chosen": f"#### {i}", "rejected": "no", "weight": 1.0} for i in range(8)]
COMMANDS = {  # flags whose values are paths within the world below, or plain values
    "data": "--questions questions.jsonl --train 2 --valid 2 --test 2 --out out",
    "data check": "questions.jsonl",
    "data fetch": "gsm8k --to out",
    "generate": "--model model --questions questions.jsonl --samples 1 --max_new_tokens 2 --out out",
    "sft": "--model model --data sft.jsonl --epochs 1 --out out",
    "pseudo_reward": "--questions questions.jsonl --teacher samples.jsonl --out out",
    "reward": "--model model --pairs pairs.jsonl --calibrate samples.jsonl --questions questions.jsonl --out out",
    "ppo": "--policy model --reward_model scorer --questions questions.jsonl --iterations 1 --rollout_size 4 "
           "--max_new_tokens 4 --out out",
    "votes": "--policy model --votes votes.jsonl --questions questions.jsonl --iterations 1 --rollout_size 4 "
             "--max_new_tokens 4 --out out",
    "eval": "x=model --questions questions.jsonl --max_new_tokens 2 --out out",
    "best_of_n": "x=model --questions questions.jsonl --max_new_tokens 2 --reward_model scorer --samples 2 --out out",
    "report": "run",
    "preflight": "--run out --preset tiny --seed 0 --teacher model --student model --questions questions.jsonl",
}
MAINS = {"data check": ("data", "check_files", "CheckConfig"), "data fetch": ("data", "fetch", "FetchConfig"),
         "preflight": ("runtime.preflight", "main", "Config"), "votes": ("ppo", "main", "Config"),
         "best_of_n": ("eval", "main", "Config")}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def world(tmp_path_factory, model_folder, make_chatml):
    """All that the commands read; every case gets a copy."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(model_folder, folder / "model")
    scorer = load_scalar_model(model_folder, torch.float32, new_head="normal")
    save_model(scorer, folder / "scorer")
    Tokenizer(model_folder).save(folder / "scorer")
    shutil.copytree(make_chatml(), folder / "other")  # a scorer of another family
    size = tokenizers.Tokenizer.from_file(str(folder / "other" / "tokenizer.json")).get_vocab_size(True)
    save_model(ScalarModel(replace(scorer.config, vocab_size=size)), folder / "other")
    write(folder / "questions.jsonl", QUESTIONS)
    write(folder / "samples.jsonl", ANSWERS)
    write(folder / "sft.jsonl", [{"prompt": f"{i}?", "response": f"#### {i}"} for i in range(4)])
    write(folder / "pairs.jsonl", PAIRS)
    write(folder / "votes.jsonl", [{"id": f"q{i}", "vote": str(i)} for i in range(8)])
    record = {"config": {}, "settings": {}, "inputs": {}, "seconds": 1, "peak_memory_mb": 1, "tokens": 1, "flops": 1.0,
              "results": {}, "outputs": {"precious.txt": 8}, "versions": {"torch": "2", "python": "3"}, "threads": 1}
    accuracy = {"strict": 0.5, "lenient": 0.5, "n": 2, "ci95": [0.1, 0.9], "no_answer": 0, "truncated": 0,
                "mean_tokens": 1}
    for name in ("sft", "ppo"):
        stage = folder / "run" / "7_eval" / name
        stage.mkdir(parents=True)
        write(stage / "transcripts.jsonl", [
            {"id": f"q{i}", "question": "?", "gold": "1", "response": "1", "correct": i == 0} for i in range(2)])
        (stage / "done.json").write_text(json.dumps(record | {"results": {"accuracy": accuracy}, "outputs": {}}))
    (folder / "out").mkdir()
    (folder / "out" / "precious.txt").write_text("precious")
    (folder / "out" / "done.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A copy of the world, which is also the working folder."""
    shutil.copytree(world, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    monkeypatch.setenv("DATA_DIR", "nowhere")
    monkeypatch.delenv("DEBUG", raising=False)
    return tmp_path / "w"


def run(command, changes=""):
    """Run a command of COMMANDS in this process, with flags replaced or added; the exit code."""
    module, main, config = MAINS.get(command, (command, "main", "Config"))
    words = COMMANDS[command].split() + changes.split("~")[0].split()
    if changes.startswith("~"):  # instead of all
        words = changes[1:].split()
    script = importlib.import_module(module)
    try:
        runtime.launch(getattr(script, main), getattr(script, config), words)
    except SystemExit as stop:
        return stop.code
    return 0


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuses(here, capsys, command, flags, words):
    before = tree(here / "out")
    code = run(command, flags)
    error = capsys.readouterr().err
    *usage, sentence = error.strip().split("\n")
    assert code == 2, error
    assert ("error: " in sentence) and "Traceback" not in error, error
    assert not usage or usage[0].startswith("usage: ")  # argparse shows the flags first
    assert all(word in sentence for word in words), sentence
    assert len(sentence) < 600
    kept = [folder for folder in (here / "out", here / "out.old1") if folder.exists() and tree(folder) == before]
    assert kept, "what was there is overwritten"


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "data fetch"])
def test_the_commands_work_as_long_as_nothing_is_wrong_with_them(here, command, monkeypatch):
    assert run(command) == 0


# ---- flags ---------------------------------------------------------------------------------------------------------

FLAGS = [  # of the ranges, which the types of the flags know, one a script
    *[("data", f"--{flag}", [flag.split()[0]]) for flag in ("train 0", "valid -3", "test 1.5")],
    ("data", "--train 7", ["8 different questions", "--train 7"]),
    ("data", "--questions arith:exam", ["exam", "train, valid, test"]),
    ("data", "--questions gsm8k", ["gsm8k", "DATA_DIR"]), ("data", "--questions mmlu_pro", ["DATA_DIR"]),
    ("data", "--questions out", ["'out'"]), ("data", "--questions nowhere.jsonl", ["nowhere.jsonl"]),
    ("data", "--out questions.jsonl", ["--out questions.jsonl"]),
    ("data", "--out questions.jsonl/x", ["questions.jsonl"]),
    ("data check", "--max_tokens 5", ["--max_tokens", "--tokenizer"]),
    ("data check", "--tokenizer model --max_tokens -1", ["--max_tokens -1"]),
    ("data check", "nowhere.jsonl", ["nowhere.jsonl"]), ("data check", "~", ["files"]),
    ("data check", "--tokenizer nowhere", ["nowhere", "tokenizer.json"]),
    ("data fetch", "~mmlu_pro --to out", ["mmlu_pro"]),
    ("data fetch", "~../gsm8k --to out", ["../gsm8k", "only gsm8k"]),
    *[("generate", f"--{flag} {value}", [f"--{flag}", value.split(",")[-1]]) for flag, value in [
        ("samples", "0"), ("samples", "many"), ("source", "me"), ("temperatures", "hot"), ("temperatures", "nan"),
        ("temperatures", "1,cold"), ("temperatures", "1e9"), ("seed", "-1"), ("seed", "1.0")]],
    ("generate", "--shots 9", ["--shots 9", "8 examples"]), ("generate", "--model out", ["out/config.json"]),
    ("generate", "--max_new_tokens 500", ["context of 256", "--max_new_tokens 500"]),
    ("generate", "--questions arith:", ["--questions arith:"]), ("generate", "--modle x", ["--modle"]),
    ("generate", "~--model model", ["--questions", "--ask"]), ("generate", "~--questions questions.jsonl", ["--model"]),
    ("generate", "~--model model --ask", ["--ask"]), ("generate", "--lenient=maybe", ["--lenient"]),
    *[("sft", f"--{flag} {value}", [f"--{flag}", value]) for flag, value in [
        ("epochs", "0.5"), ("lr", "nan"), ("lr", "-1"), ("max_grad_norm", "0"), ("seed", str(2**64))]],
    ("sft", "--max_tokens 3", ["none of its 4 examples", "--max_tokens 3"]),
    ("sft", "--model nowhere", ["nowhere"]), ("sft", "--data out", ["out", "not"]),
    *[("pseudo_reward", f"--{flag} {value}", [f"--{flag}"]) for flag, value in [
        ("voters", "nobody"), ("min_share", "1.5"), ("min_share", "-0.1"), ("min_share", "nan"),
        ("sft_per_question", "0"), ("pairs_per_question", "-1"), ("teacher", "nowhere.jsonl")]],
    *[("reward", f"--{flag} {value}", [f"--{flag}"]) for flag, value in [
        ("held_out", "1.5"), ("held_out", "nan"), ("calibration_samples", "0")]],
    *[(command, f"--{flag} nowhere", ["nowhere"]) for command, flag in [
        ("reward", "pairs"), ("reward", "calibrate"), ("reward", "questions"), ("ppo", "valid")]],
    *[("ppo", f"--{flag} {value}", [f"--{flag}", value]) for flag, value in [
        ("iterations", "0"), ("temperature", "0"), ("kl_coef", "inf"), ("gamma", "1.5"), ("minibatches", "5"),
        ("unfinished_score", "nan"), ("max_new_tokens", "300")]],
    ("ppo", "--votes votes.jsonl", ["--reward_model", "--votes"]), ("ppo", "--gold", ["--gold"]),
    ("ppo", "--policy scorer", ["scorer", "language model"]),
    ("ppo", "--reward_model model", ["model", "score.weight"]), ("ppo", "--critic model", ["model", "score.weight"]),
    *[("ppo", f"--{flag} other", ["other", "tokenizer"]) for flag in ("reward_model", "critic")],
    *[("eval", f"--{flag} {value}", [f"--{flag}"]) for flag, value in [
        ("samples", "0"), ("samples", "2"), ("reward_model", "scorer"), ("shots", "9")]],
    *[("eval", f"~{models} --questions questions.jsonl --out out", words) for models, words in [
        ("x=nowhere", ["nowhere"]), ("x=scorer", ["scorer"]), ("model", ["NAME=FOLDER"]),
        ("x=samples.jsonl --shots 1", ["samples.jsonl", "recorded answers"])]],
    ("best_of_n", "--temperature 0", ["--temperature 0"]), ("best_of_n", "--shots 1", ["--shots"]),
    ("best_of_n", "--reward_model other", ["tokenizer"]),
    ("report", "~nowhere", ["nowhere", "7_eval"]), ("report", "~run run --out x", ["twice"]),
    ("report", "~model", ["model", "7_eval"]), ("report", "~run --out x", ["--out"]),
    ("preflight", "--questions nowhere", ["QUESTIONS=nowhere"]),
    ("preflight", "--student out", ["STUDENT=out", "config.json"]),
    ("preflight", "--teacher nowhere", ["TEACHER=nowhere"]),
    ("preflight", "--run questions.jsonl/x", ["OUT=", "questions.jsonl is no folder"]),
]


@pytest.mark.parametrize(("command", "flags", "words"), FLAGS, ids=lambda value: value if type(value) is str else "")
def test_a_bad_flag(here, capsys, command, flags, words):
    refuses(here, capsys, command, flags, words)


# ---- files of lines ------------------------------------------------------------------------------------------------

READS = {  # command -> the file it reads, a good line of it
    "data": ("questions.jsonl", QUESTIONS[0]), "data check": ("questions.jsonl", QUESTIONS[0]),
    "generate": ("questions.jsonl", QUESTIONS[0]), "sft": ("sft.jsonl", {"prompt": "1?", "response": "1"}),
    "pseudo_reward": ("samples.jsonl", ANSWERS[0]), "reward": ("pairs.jsonl", PAIRS[0]),
    "votes": ("votes.jsonl", {"id": "q0", "vote": "1"}), "eval": ("questions.jsonl", QUESTIONS[0]),
    "report": ("run/7_eval/ppo/transcripts.jsonl", {"id": "q0", "correct": True}),
}
LINES = {  # a bad line, words
    "half an object": (b'{"id": "a", "question', ["line 2", "JSON"]),
    "a list": (b'["a"]', ["line 2", "object"]),
    "a number": (b"7", ["line 2", "object"]),
    "two objects": (b"{} {}", ["line 2", "JSON"]),
    "NUL": (b'{"id": "a\x00b"}', ["line 2", "JSON"]),
    "NULs, as after a crash": (b"\x00" * 64, ["line 2", "JSON"]),
    "not UTF-8": (b'{"id": "\xff\xfe"}', ["line 2", "UTF-8"]),
    "deeply nested": (b"[" * 100_000, ["line 2", "JSON"]),
    "a BOM in the middle": (b"\xef\xbb\xbf{}", ["line 2", "JSON"]),
    "half a surrogate pair": (b'{"id": "\\ud800"}', ["line 2", "half a character"]),
    "an endless number": (b'{"id": ' + b"9" * 5000 + b"}", ["line 2", "JSON"]),
}


@pytest.mark.parametrize(("command", "name"), [
    (command, name) for i, command in enumerate(READS) for j, name in enumerate(LINES) if (i + j) % 3 == 0])
def test_a_bad_line(here, capsys, command, name):
    path, good = READS[command]
    bad, words = LINES[name]
    (here / path).write_bytes(json.dumps(good).encode() + b"\n" + bad + b"\n")
    refuses(here, capsys, command, "", [Path(path).name, *words])


KEYS = [  # command, keys that a line must have as texts
    *[("sft", key) for key in ("prompt", "response")],
    *[("reward", key) for key in ("id", "prompt", "chosen", "rejected")],
    *[("votes", key) for key in ("id", "vote")], ("data", "question"), ("report", "id"),
]


@pytest.mark.parametrize(("command", "key", "value"), [
    (*which, value) for i, which in enumerate(KEYS) for j, value in enumerate(["missing", None, 5, ["x"], {"x": "y"}])
    if (i + j) % 2 == 0])
def test_a_key_without_its_text(here, capsys, command, key, value):
    path, good = READS[command]
    bad = {name: text for name, text in good.items() if name != key} | ({} if value == "missing" else {key: value})
    (here / path).write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    refuses(here, capsys, command, "", [Path(path).name, "line 2", f"'{key}'"])


ROWS = [  # command, file, rows or bytes, words
    ("sft", "sft.jsonl", [], ["sft.jsonl", "0 examples"]), ("votes", "votes.jsonl", [], ["votes.jsonl"]),
    ("reward", "pairs.jsonl", [], ["pairs.jsonl", "0 pairs"]), ("reward", "pairs.jsonl", PAIRS[:1], ["pairs.jsonl"]),
    *[("reward", "pairs.jsonl", [*PAIRS, PAIRS[0] | {"weight": weight}], ["pairs.jsonl", "weight"])
      for weight in (-1, "x", 0, None, [1], float("nan"), float("inf"))],
    ("reward", "samples.jsonl", [], ["samples.jsonl", "too few"]),
    ("reward", "samples.jsonl", [row | {"finish": "length"} for row in ANSWERS], ["0 finished responses"]),
    ("reward", "samples.jsonl", [row | {"id": "other"} for row in ANSWERS], ["0 finished responses"]),
    ("reward", "samples.jsonl", [row | {"response": None} for row in ANSWERS], ["line 1", "'response'"]),
    ("reward", "pairs.jsonl", [row | {"chosen": "1 " * 500} for row in PAIRS], ["context", "256"]),
    ("sft", "sft.jsonl", [{"prompt": "1 " * 300, "response": "1"}], ["context", "256"]),
    *[(command, "questions.jsonl", [{"question": "1 " * 300, "answer": "1"}], ["questions-1", "context of 256"])
      for command in ("generate", "ppo", "eval")],
    ("eval", "questions.jsonl", [{"question": "How many?"}], ["no gold answer"]),
    ("eval", "questions.jsonl", b"", ["no question"]),
    ("generate", "questions.jsonl", b"PK\x03\x04" + bytes(range(256)), ["line 1"]),
    ("generate", "questions.jsonl", b"\x1f\x8b" + bytes(30), ["line 1"]),
    ("generate", "questions.jsonl", json.dumps(QUESTIONS, indent=1).encode(), ["line 1", "JSON"]),
    ("pseudo_reward", "samples.jsonl", [{"id": "q0", "responses": [1]}], ["line 1", "responses"]),
    ("pseudo_reward", "samples.jsonl", [{"id": ["q0"], "response": "1"}], ["ids match"]),
    ("votes", "votes.jsonl", [{"id": "other", "vote": "1"}], ["votes.jsonl", "no answer to any question"]),
    ("votes", "votes.jsonl", [{"id": "q0", "vote": "1"}, {"id": "q0", "vote": "2"}], ["votes.jsonl", "q0"]),
    *[("report", "run/7_eval/ppo/done.json", content, ["done.json"]) for content in (b"{", b"[]", b"{}", b"\xff")],
    ("report", "run/7_eval/ppo/transcripts.jsonl", [{"id": "q0"}], ["transcripts.jsonl", "correct"]),
]


@pytest.mark.parametrize(("command", "path", "content", "words"), ROWS)
def test_bad_rows(here, capsys, command, path, content, words):
    if isinstance(content, bytes):
        (here / path).write_bytes(content)
    else:
        write(here / path, content)
    refuses(here, capsys, command, "", words)


def test_a_line_of_100_megabytes(here, capsys):
    with (here / "questions.jsonl").open("w") as file:
        file.write(json.dumps(QUESTIONS[0]) + '\n{"question": "')
        for _ in range(100):
            file.write("x" * 10**6)
        file.write('"}\n')
    refuses(here, capsys, "generate", "", ["questions.jsonl, line 2", "longer than"])


def test_empty_answers_are_answers(here):
    """A model may say nothing: no vote, no reward, and training on it is training on the end token."""
    write(here / "samples.jsonl", [*ANSWERS, *(row | {"response": ""} for row in ANSWERS)])
    write(here / "sft.jsonl", [{"prompt": "", "response": ""}])
    write(here / "pairs.jsonl", [row | {"rejected": ""} for row in PAIRS])
    assert [run(command) for command in ("pseudo_reward", "sft", "reward")] == [0, 0, 0]


# ---- model folders -------------------------------------------------------------------------------------------------


def config(**changes):
    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return damage


def weights(change):
    """Damage the tensors: change(tensors) in place."""
    def damage(folder):
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return damage


def file(name, content):
    return lambda folder: (folder / name).write_bytes(content)


MODELS = {
    "NaN": (weights(lambda t: [tensor.fill_(float("nan")) for tensor in t.values()]), ["model.safetensors", "NaN"]),
    "NaN in a matrix": (weights(lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(float("nan"))), ["nan"]),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ["tokenizer.json", "not found"]),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ["model.safetensors", "not found"]),
    "weights are a folder": (lambda folder: ((folder / "model.safetensors").unlink(),
                                             (folder / "model.safetensors").mkdir()), ["model.safetensors"]),
    "nested config": (file("config.json", b'{"a":' * 100_000), ["config.json", "JSON"]),
    "nested tokenizer": (file("tokenizer.json", b"[" * 100_000), ["tokenizer.json"]),
    "text as weights": (file("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n" * 9), ["damaged"]),
    "a huge header": (file("model.safetensors", b"\xff" * 8 + b"{}"), ["model.safetensors", "damaged"]),
    "another template": (file("tokenizer_config.json", b'{"eos_token": "<|eot_id|>", "chat_template": "{{ x }}"}'),
                         ["template"]),
    "templates of another kind": (file("tokenizer_config.json", b'{"eos_token": "<|eot_id|>", "chat_template": 7}'),
                                  ["tokenizer_config.json", "chat_template"]),
    "templates without names": (file("tokenizer_config.json", b'{"eos_token": "<|eot_id|>", "chat_template": [{}]}'),
                                ["tokenizer_config.json", "chat_template"]),
    "end token as a list": (file("tokenizer_config.json", b'{"eos_token": ["x"]}'), ["eos_token"]),
    "another family": (config(model_type="gemma"), ["model_type", "gemma"]),
    "a size beyond memory": (config(vocab_size=10**12), ["vocab_size"]),
    "a size that does not fit the weights": (config(intermediate_size=64), ["shape", "config.json"]),
    "fewer rows than tokens": (config(vocab_size=100), ["vocab_size", "tokenizer.json"]),
}
USERS = {"generate": "--model bad", "sft": "--model bad", "reward": "--model bad", "ppo": "--policy bad",
         "eval": "~x=bad --questions questions.jsonl --out out"}


@pytest.mark.parametrize(("command", "name"), [(list(USERS)[i % len(USERS)], name) for i, name in enumerate(MODELS)])
def test_a_bad_model_folder(here, capsys, name, command):
    damage, words = MODELS[name]
    shutil.copytree("model", "bad")
    damage(here / "bad")
    refuses(here, capsys, command, USERS[command], words)


# ---- fuzzing -------------------------------------------------------------------------------------------------------

CASES = [pytest.param(200, id="few"), pytest.param(10_000, id="many", marks=pytest.mark.slow)]


def fuzz(cases, strategy, check):
    """Run check on so many examples of strategy(hypothesis.strategies); the test is skipped without hypothesis."""
    h = pytest.importorskip("hypothesis")
    limits = h.settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(h.HealthCheck))
    limits(h.given(strategy(h.strategies))(check))()


def lines_of_json(st):
    """Lines of a file: bytes, objects whose keys are those that are read, nothing."""
    value = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=10)
    name = st.sampled_from("id question answer kind options instruction subject response responses choices finish "
                           "logprob tokens body message content text custom_id error status_code q0".split())
    rows = st.dictionaries(name, value | st.dictionaries(name, value, max_size=3), max_size=6)
    line = st.one_of(st.binary(max_size=80), rows.map(lambda row: json.dumps(row).encode()), st.just(b""),
                     rows.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")))
    return st.lists(line, max_size=4)


@pytest.mark.parametrize("cases", CASES)
def test_any_lines_are_read_or_refused_with_file_and_line(tmp_path, cases):
    """read_jsonl, load_questions and load_samples: objects, or one ValueError that names the file."""
    path, questions = tmp_path / "lines.jsonl", {"q0": data.Question("q0", "How many?")}

    def check(lines):
        path.write_bytes(b"\n".join(lines))
        for read in (lambda: list(data.read_jsonl(path)), lambda: data.load_questions(str(path)),
                     lambda: load_samples(str(path), "teacher", questions, True)):
            try:
                for row in read():
                    assert isinstance(row, dict) or row.id
            except ValueError as error:
                assert str(path) in str(error) and "\n" not in str(error)

    fuzz(cases, lines_of_json, check)


@pytest.mark.parametrize("cases", CASES)
def test_any_damage_to_a_safetensors_file_is_refused_or_harmless(tmp_path, model_folder, cases):
    """Bytes cut off, changed, inserted or dropped: the same shapes load, or one sentence names the file."""
    shutil.copytree(model_folder, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    shapes = {name: tensor.shape for name, tensor in load_model(model_folder).state_dict().items()}

    def edits(st):
        place = st.one_of(st.integers(0, 7), st.integers(0, header - 1), st.integers(0, len(whole) - 1))
        kind = st.sampled_from(["cut", "change", "insert", "drop", "digit"])
        return st.lists(st.tuples(place, kind, st.binary(min_size=1, max_size=4)), min_size=1, max_size=3)

    def check(edits):
        content = bytearray(whole)
        for at, kind, new in edits:
            if kind == "cut":
                del content[at:]
            elif kind == "drop":
                del content[at : at + len(new)]
            elif kind == "digit":
                content[at : at + 1] = b"%d" % (new[0] % 10)
            else:
                content[at : at + len(new) * (kind == "change")] = new
        fresh = tmp_path / "model" / "new"  # under a name of its own: the old one may still be mapped
        fresh.write_bytes(content)
        fresh.replace(path)
        try:
            model = load_model(tmp_path / "model")
            assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
        except ValueError as error:
            assert "model" in str(error) and "\n" not in str(error)

    fuzz(cases, edits, check)
