"""What comes from outside is data: no pickle, code or template of a model folder runs; no path leaves its folder."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from test_report import make_run

import data
import report
import runtime
from hf.tokenizer import Tokenizer
from model import load_model, load_scalar_model, save_model

ROOT = Path(runtime.__file__).resolve().parent.parent


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "it ran")


@pytest.fixture
def folder(tmp_path, model_folder):
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors", "tokenizer.json",
                                  "config.json", "tokenizer.pkl"])
@pytest.mark.parametrize("alone", [True, False])
def test_no_pickle_is_ever_loaded(folder, tmp_path, name, alone):
    """Beside the weights, in their place, or under their name: refused or never opened."""
    bomb = tmp_path / "ran"
    if alone:
        (folder / "model.safetensors").unlink()
    torch.save(Bomb(bomb), folder / name, pickle_protocol=4)
    (folder / f"{name}.2").write_bytes(pickle.dumps(Bomb(bomb)))
    for load in (Tokenizer, load_model, lambda path: load_scalar_model(path, new_head="zero")):
        try:
            load(folder)
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error)
    assert not bomb.exists()
    pickle.loads(pickle.dumps(Bomb(bomb)))
    assert bomb.exists()  # the bomb is one


def test_nothing_in_the_project_can_load_a_pickle_or_run_a_text():
    """By the names in the source: what is not called cannot be reached by any file."""
    risky = re.compile(r"^ *(?:import|from) (?:pickle|dill|joblib|marshal|shelve|jinja2|yaml|transformers)\b"
                       r"|(?<![\w.])(?:exec|eval|compile|__import__)\(|(?:torch|np|numpy)\.load\(", re.MULTILINE)
    product = [path for folder in (".", "runtime", "hf", "tasks") for path in (ROOT / folder).glob("*.py")]
    found = {path.name: risky.findall(path.read_text(encoding="utf-8")) for path in product}
    assert len(product) > 20 and not any(found.values()), found


def test_code_of_a_model_folder_is_not_run_and_that_is_said(folder, tmp_path, capsys):
    """auto_map asks for Python files of the folder: they are left alone, with a warning that names them."""
    bomb = tmp_path / "ran"
    code = f"open({str(bomb)!r}, 'w').write('it ran')\nclass Model: pass\n"
    for name in ("modeling_llama", "configuration_llama", "tokenization", "__init__", "model", "chat"):
        (folder / f"{name}.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_llama.Model", "AutoConfig": "configuration_llama.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    load_model(folder)
    assert Tokenizer(folder).chat("1+1?")
    error = capsys.readouterr().err
    assert error.count("warning:") == 1 and "auto_map" in error and str(folder / "config.json") in error
    assert not bomb.exists()
    save_model(load_model(folder), tmp_path / "saved")
    assert "auto_map" not in (tmp_path / "saved" / "config.json").read_text()


ATTACK = ("{%% for c in ().__class__.__base__.__subclasses__() %%}{{ c }}{%% endfor %%}"
          "{{ cycler.__init__.__globals__.os.system('touch %s') }}")


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("disguise", [False, True])
def test_a_template_of_a_model_folder_is_read_and_never_rendered(folder, tmp_path, place, disguise):
    """A hostile template is refused, also where Llama 3's stands behind it: nothing of it runs."""
    bomb = tmp_path / "ran"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = ATTACK % bomb + (config["chat_template"] if disguise else "")
    if place == "chat_template.jinja":
        (folder / place).write_text(template)
    else:
        (folder / place).write_text(json.dumps(config | {"chat_template": template}))
    with pytest.raises(ValueError, match="template"):
        Tokenizer(folder)
    assert not bomb.exists()


@pytest.mark.parametrize("shard", [
    "../model.safetensors", "/etc/x.safetensors", "..", "", "sub/x.safetensors", "x.bin", "x.safetensors\x00.bin"])
def test_an_index_cannot_leave_its_folder(folder, tmp_path, shard):
    shutil.copy(folder / "model.safetensors", tmp_path)  # it is there, and must not be taken
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises((ValueError, FileNotFoundError), match=r"weight_map|not found"):
        load_model(folder)


@pytest.mark.parametrize("id", ["../../outside", "/tmp/outside", "..", "x\x00y", "-rf"])
def test_an_id_in_a_file_of_lines_names_no_file(tmp_path, monkeypatch, id):
    """Ids, texts and answers become contents of files whose names are ours."""
    monkeypatch.chdir(tmp_path)
    data.write_jsonl(tmp_path / "q.jsonl", [{"id": f"{id}{i}", "question": f"{id} {i}?", "answer": "1", "subject": id}
                                            for i in range(4)])
    data.main(data.Config("q.jsonl", "out", 2, 1, 1))
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        ["q.jsonl", "out", "train.jsonl", "valid.jsonl", "test.jsonl", "done.json"])


@pytest.mark.parametrize("text", [
    "<script>alert(1)</script>", "[click](javascript:alert(1))", "# a heading", "```\nout of the block\n```",
    "| a | table |\n|---|---|", "![x](http://tracker/x.png)", "~~~\n<b>", "\x1b[2J\x1b]0;x\x07", "a\r<b>",
    "\u2028<i>\u2029<u>", "\x0b# b\x0c<s>", "\u202egnp.exe", "&lt;b&gt;", "* * *\n\n---\n\n> q"])
def test_the_report_shows_what_a_model_said_and_does_not_obey_it(tmp_path, monkeypatch, text):
    """In a code block of the page every line of it stays behind four spaces, without control characters."""
    monkeypatch.setattr(report, "draw_pictures", lambda *_: None)
    folder = make_run(tmp_path / "run")
    for name in ("sft", "ppo"):
        path = folder / report.evaluation(name) / "transcripts.jsonl"
        rows = [row | {"response": text, "question": text, "gold": text} for row in data.read_jsonl(path)]
        data.write_jsonl(path, rows)
    for split in ("train", "test"):
        path = folder / "0_questions" / f"{split}.jsonl"
        data.write_jsonl(path, [row | {"question": f"{text} {row['id']}"} for row in list(data.read_jsonl(path))])
    report.main(report.Config((str(folder),), preset="tiny", seed=3))
    page = (folder / "report.md").read_text(encoding="utf-8")
    control = [c for c in page if (ord(c) < 32 and c != "\n") or ord(c) in (0x2028, 0x2029, 0x202E, 0x7F, 0x85)]
    assert not control, control
    outside = [line for line in page.split("\n") if not line.startswith("    ")]
    words = "<script|javascript:|# a heading|out of the block|tracker|<b>|<i>|<u>|# b|gnp.exe|<s>|&lt;|\\* \\* \\*"
    assert not re.findall(words, "\n".join(outside))


def test_the_page_on_security_names_tests_that_exist():
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    names = set(re.findall(r"`(test_\w+)`", text))
    assert len(names) > 10 and all(f"def {name}(" in sources for name in names)
