"""A table of what users get wrong, over all scripts: one sentence, exit code 2, no traceback, nothing overwritten.

Each row names a script, what differs from a command that works, and words of the sentence. The output folder holds a
finished stage, which must be there afterwards. What a reader of files refuses in detail stands in its own tests
(test_model.py, test_chat.py, test_data.py); here each kind of fault goes once through a script.
"""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch

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
    "data fetch": "gsm8k",
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
MAINS = {"data check": ("data", "check", "CheckConfig"), "data fetch": ("data", "fetch", "FetchConfig"),
         "preflight": ("runtime.preflight", "main", "Config"), "votes": ("ppo", "main", "Config"),
         "best_of_n": ("eval", "main", "Config")}


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
    data.write_jsonl(folder / "questions.jsonl", QUESTIONS)
    data.write_jsonl(folder / "samples.jsonl", ANSWERS)
    data.write_jsonl(folder / "sft.jsonl", [{"prompt": f"{i}?", "response": f"#### {i}"} for i in range(4)])
    data.write_jsonl(folder / "pairs.jsonl", PAIRS)
    data.write_jsonl(folder / "votes.jsonl", [{"id": f"q{i}", "vote": str(i)} for i in range(8)])
    record = {"config": {}, "settings": {}, "inputs": {}, "seconds": 1, "peak_memory_mb": 1, "tokens": 1, "flops": 1.0,
              "results": {}, "outputs": {"precious.txt": 8}, "versions": {"torch": "2", "python": "3"}, "threads": 1}
    accuracy = {"strict": 0.5, "lenient": 0.5, "n": 2, "ci95": [0.1, 0.9], "no_answer": 0, "truncated": 0,
                "mean_tokens": 1}
    for name in ("sft", "ppo"):
        stage = folder / "run" / "7_eval" / "test" / name
        stage.mkdir(parents=True)
        data.write_jsonl(stage / "transcripts.jsonl", [
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
    """Run a command of COMMANDS in this process, with flags added, or ("~...") others instead; the exit code."""
    module, main, config = MAINS.get(command, (command, "main", "Config"))
    words = changes[1:].split() if changes.startswith("~") else (COMMANDS[command] + " " + changes).split()
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
    *usage, sentence = error.strip().split("\n")  # argparse shows the flags first
    assert code == 2 and "error: " in sentence and not (usage and not usage[0].startswith("usage: ")), error
    assert all(word in sentence for word in words) and len(sentence) < 600, sentence
    kept = [folder for folder in (here / "out", here / "out.old1") if folder.exists() and tree(folder) == before]
    assert kept, "what was there is overwritten"


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "data fetch"])
def test_the_commands_work_as_long_as_nothing_is_wrong_with_them(here, command, monkeypatch):
    assert run(command) == 0


# ---- flags ---------------------------------------------------------------------------------------------------------

FLAGS = [  # what one script alone refuses, and of the ranges, which the types of the flags know, one a script
    ("data", "--test 1.5", ["--test"]), ("data", "--train 0", ["--train 0"]),
    ("data", "--questions out", ["'out'"]), ("data", "--out questions.jsonl/x", ["questions.jsonl"]),
    ("data check", "nowhere.jsonl", ["nowhere.jsonl"]), ("data check", "~", ["files"]),
    ("data fetch", "~../gsm8k", ["../gsm8k", "only gsm8k"]),
    *[("generate", f"--{flag} {value}", [f"--{flag}", value.split(",")[-1]]) for flag, value in [
        ("samples", "many"), ("source", "me"), ("temperatures", "1,cold"), ("seed", "-1")]],
    ("generate", "--shots 9", ["--shots 9", "8 examples"]), ("generate", "--model out", ["out/config.json"]),
    ("generate", "--max_new_tokens 500", ["context of 256", "--max_new_tokens 500"]),
    ("generate", "--modle x", ["--modle"]), ("generate", "~--model model", ["--questions", "--out"]),
    ("generate", "~--questions questions.jsonl", ["--model"]),
    ("sft", "--lr nan", ["--lr", "nan"]), ("sft", "--max_tokens 3", ["none of its 4 examples", "--max_tokens 3"]),
    ("sft", "--model nowhere", ["nowhere"]), ("sft", "--data out", ["out", "not"]),
    ("pseudo_reward", "--voters nobody", ["--voters"]), ("pseudo_reward", "--min_share nan", ["--min_share"]),
    *[(command, f"--{flag} nowhere", ["nowhere"]) for command, flag in [
        ("pseudo_reward", "teacher"), ("reward", "pairs"), ("reward", "calibrate"), ("ppo", "valid")]],
    ("reward", "--held_out 1.5", ["--held_out"]),
    *[("ppo", f"--{flag} {value}", [f"--{flag}", value]) for flag, value in [
        ("kl_coef", "inf"), ("minibatches", "5"), ("unfinished_score", "nan"), ("max_new_tokens", "300")]],
    ("ppo", "--votes votes.jsonl", ["--reward_model", "--votes"]), ("ppo", "--gold", ["--gold"]),
    *[("ppo", f"~--policy model --questions questions.jsonl --out out --reward {spec}", ["--reward", spec]) for spec in
      ("nowhere", "questions.jsonl:score")],
    ("ppo", "--policy scorer", ["scorer", "language model"]),
    *[("ppo", f"--{flag} {folder}", [folder, word]) for flag in ("reward_model", "critic")
      for folder, word in (("model", "score.weight"), ("other", "tokenizer"))],
    *[("eval", f"--{flag}", [f"--{flag.split()[0]}"]) for flag in ("samples 0", "reward_model scorer", "shots 9")],
    *[("eval", f"~{models} --questions questions.jsonl --out out", words) for models, words in [
        ("x=nowhere", ["nowhere"]), ("x=scorer", ["scorer"]), ("model", ["NAME=FOLDER"]),
        ("x=samples.jsonl --shots 1", ["samples.jsonl", "recorded answers"])]],
    ("best_of_n", "--temperature 0", ["--temperature 0"]), ("best_of_n", "--shots 1", ["--shots"]),
    ("report", "~nowhere", ["nowhere", "7_eval"]), ("report", "~run run", ["2 runs"]),
    ("preflight", "--student out", ["STUDENT=out", "config.json"]),
    ("preflight", "--run questions.jsonl/x", ["OUT=", "questions.jsonl is no folder"])]


@pytest.mark.parametrize(("command", "flags", "words"), FLAGS, ids=lambda value: value if type(value) is str else "")
def test_a_bad_flag(here, capsys, command, flags, words):
    refuses(here, capsys, command, flags, words)


# ---- files of lines ------------------------------------------------------------------------------------------------

READS = {  # command -> the file it reads, a good line of it
    "data": ("questions.jsonl", QUESTIONS[0]), "data check": ("questions.jsonl", QUESTIONS[0]),
    "generate": ("questions.jsonl", QUESTIONS[0]), "sft": ("sft.jsonl", {"prompt": "1?", "response": "1"}),
    "pseudo_reward": ("samples.jsonl", ANSWERS[0]), "reward": ("pairs.jsonl", PAIRS[0]),
    "votes": ("votes.jsonl", {"id": "q0", "vote": "1"}), "eval": ("questions.jsonl", QUESTIONS[0]),
    "report": ("run/7_eval/test/ppo/transcripts.jsonl", {"id": "q0", "correct": True}),
}
LINES = {  # a bad line, words
    "half an object": (b'{"id": "a", "question', "JSON"), "a list": (b'["a"]', "object"),
    "NULs, as after a crash": (b"\x00" * 64, "JSON"), "not UTF-8": (b'{"id": "\xff\xfe"}', "UTF-8"),
    "deeply nested": (b"[" * 100_000, "JSON"), "half a surrogate pair": (b'{"id": "\\ud800"}', "surrogates"),
    "an endless number": (b'{"id": ' + b"9" * 5000 + b"}", "JSON")}


@pytest.mark.parametrize(("command", "name"), [
    (command, name) for i, command in enumerate(READS) for j, name in enumerate(LINES) if (i + j) % 4 == 0])
def test_a_bad_line(here, capsys, command, name):
    path, good = READS[command]
    bad, word = LINES[name]
    (here / path).write_bytes(json.dumps(good).encode() + b"\n" + bad + b"\n")
    refuses(here, capsys, command, "", [Path(path).name, "line 2", word])


ROWS = [  # command, file, rows or bytes, words
    ("sft", "sft.jsonl", [], ["sft.jsonl", "0 examples"]), ("votes", "votes.jsonl", [], ["votes.jsonl"]),
    ("reward", "pairs.jsonl", PAIRS[:1], ["pairs.jsonl"]),
    *[("reward", "pairs.jsonl", [*PAIRS, PAIRS[0] | {"weight": weight}], ["pairs.jsonl", "weight"])
      for weight in (-1, "x", 0, None, [1], float("nan"), float("inf"))],
    *[("reward", "pairs.jsonl", [PAIRS[0], PAIRS[1] | {key: value}], ["pairs.jsonl", "line 2", f"'{key}'"])
      for key, value in (("id", None), ("prompt", 5), ("chosen", ["x"]), ("rejected", {"x": "y"}))],
    ("sft", "sft.jsonl", [{"prompt": "1?"}], ["sft.jsonl", "line 1", "'response'"]),
    ("votes", "votes.jsonl", [{"id": "q0", "vote": 1}], ["votes.jsonl", "line 1", "'vote'"]),
    ("data", "questions.jsonl", [{"question": None}], ["questions.jsonl", "line 1", "'question'"]),
    *[("reward", "samples.jsonl", [row | change for row in ANSWERS], ["0 finished responses"])
      for change in ({"finish": "length"}, {"id": "other"})],
    ("reward", "pairs.jsonl", [row | {"chosen": "1 " * 500} for row in PAIRS], ["context", "256"]),
    ("sft", "sft.jsonl", [{"prompt": "1 " * 300, "response": "1"}], ["context", "256"]),
    *[(command, "questions.jsonl", [{"question": "1 " * 300, "answer": "1"}], ["questions-1", "context of 256"])
      for command in ("generate", "ppo", "eval")],
    ("eval", "questions.jsonl", [{"question": "How many?"}], ["no gold answer"]),
    ("generate", "questions.jsonl", b"\x1f\x8b" + bytes(30), ["questions.jsonl", "gzip"]),
    ("generate", "questions.jsonl", b"id,question\n1,How many?", ["questions.jsonl", "CSV", "read_csv"]),
    ("pseudo_reward", "samples.jsonl", [{"id": "other", "responses": ["1"]}], ["none of its 1", "'other'", "'q0'"]),
    ("pseudo_reward", "samples.jsonl", [{"id": "q0", "responses": [1]}], ["line 1", "responses"]),
    ("votes", "votes.jsonl", [{"id": "other", "vote": "1"}], ["votes.jsonl", "no answer to any question"]),
    ("votes", "votes.jsonl", [{"id": "q0", "vote": "1"}, {"id": "q0", "vote": "2"}], ["votes.jsonl", "q0"]),
    *[("report", "run/7_eval/test/ppo/done.json", content, ["done.json"]) for content in (b"{", b"[]", b"{}")]]


@pytest.mark.parametrize(("command", "path", "content", "words"), ROWS)
def test_bad_rows(here, capsys, command, path, content, words):
    if isinstance(content, bytes):
        (here / path).write_bytes(content)
    else:
        data.write_jsonl(here / path, content)
    refuses(here, capsys, command, "", words)


def test_a_line_without_end(here, capsys, monkeypatch):
    monkeypatch.setattr("runtime.files.LONGEST_LINE", 1000)
    (here / "questions.jsonl").write_text(json.dumps(QUESTIONS[0]) + '\n{"question": "' + 1000 * "x" + '"}\n')
    refuses(here, capsys, "generate", "", ["questions.jsonl, line 2", "longer than"])
    monkeypatch.setattr("runtime.files.LONGEST_ARRAY", 500)
    (here / "questions.jsonl").write_text("[\n" + ",\n".join(map(json.dumps, QUESTIONS)) + "]")
    refuses(here, capsys, "generate", "", ["questions.jsonl", "longer than"])


def test_empty_answers_are_answers(here):
    """A model may say nothing: no vote, no reward, and training on it is training on the end token."""
    data.write_jsonl(here / "samples.jsonl", [*ANSWERS, *(row | {"response": ""} for row in ANSWERS)])
    data.write_jsonl(here / "sft.jsonl", [{"prompt": "", "response": ""}])
    data.write_jsonl(here / "pairs.jsonl", [row | {"rejected": ""} for row in PAIRS])
    assert [run(command) for command in ("pseudo_reward", "sft", "reward")] == [0, 0, 0]


# ---- fuzzing -------------------------------------------------------------------------------------------------------

CASES = [pytest.param(60, id="few"), pytest.param(10_000, id="many", marks=pytest.mark.slow)]


def fuzz(cases, strategy, check):
    """Run check on so many examples of strategy(hypothesis.strategies); the test is skipped without hypothesis."""
    h = pytest.importorskip("hypothesis")
    limits = h.settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(h.HealthCheck))
    limits(h.given(strategy(h.strategies))(check))()


def lines_of_json(st):
    """Lines of a file: bytes, objects whose keys are those that are read, nothing."""
    value = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4))
    name = st.sampled_from("id question answer kind options instruction subject response responses choices finish "
                           "logprob tokens body message content text custom_id error status_code q0 label answerKey "
                           "question_id finish_reason logprobs token_logprobs type temperature".split())
    rows = st.dictionaries(name, value | st.dictionaries(name, value, max_size=3), max_size=6)
    line = st.binary(max_size=80) | rows.map(lambda row: json.dumps(row).encode())
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
    """Some bytes replaced by others, or all behind them cut: the same shapes load, or one sentence names the file."""
    shutil.copytree(model_folder, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    shapes = {name: tensor.shape for name, tensor in load_model(model_folder).state_dict().items()}

    def edits(st):
        place = st.integers(0, 7) | st.integers(0, header - 1) | st.integers(0, len(whole) - 1)
        dropped = st.integers(0, 4) | st.just(len(whole))
        return st.lists(st.tuples(place, dropped, st.binary(max_size=4) | st.just(b"7")), min_size=1, max_size=3)

    def check(edits):
        content = bytearray(whole)
        for at, dropped, new in edits:
            content[at : at + dropped] = new
        fresh = tmp_path / "model" / "new"  # under a name of its own: the old one may still be mapped
        fresh.write_bytes(content)
        fresh.replace(path)
        try:
            found = load_model(tmp_path / "model").state_dict()
            assert {name: tensor.shape for name, tensor in found.items()} == shapes
        except ValueError as error:
            assert "model" in str(error) and "\n" not in str(error)

    fuzz(cases, edits, check)
