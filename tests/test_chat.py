"""chat.py: text to token ids and back, chat templates token for token as transformers renders them."""

import random
from collections import Counter
from pathlib import Path

import pytest
from conftest import CHATML_SPECIAL, CHATML_TEMPLATE, LLAMA_SPECIAL

from chat import Tokenizer

WORDS = ["3 pens", "  spaces  around  ", "two\n\nlines\n", "\n\nnewline first", "naïve Größe 東京 😀", "1234-5", "x"]
QWEN_TEMPLATE = (  # the structure of Qwen2.5's: a branch for tools, one for a given system turn, then its own
    "{%- if tools %}\n    {{- '<|im_start|>system\\n' }}\n    {{- 'You have tools.<|im_end|>\\n' }}\n{%- else %}\n"
    "    {%- if messages[0]['role'] == 'system' %}\n"
    "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n    {%- else %}\n"
    "        {{- '<|im_start|>system\\nYou are Qwen. You are a helpful assistant.<|im_end|>\\n' }}\n"
    "    {%- endif %}\n{%- endif %}\n" + CHATML_TEMPLATE)
SMOLLM_TEMPLATE = (  # SmolLM2's: the default system turn is written inside the loop
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


@pytest.fixture(params=["llama_folder", "chatml_folder"])
def tokenizer(request) -> Tokenizer:
    return Tokenizer(request.getfixturevalue(request.param))


def test_any_text_survives_the_tokens(tokenizer):
    """decode(encode(x)) == x for random unicode, and no id of it is special."""
    rng, special = random.Random(0), {tokenizer.id(name) for name in LLAMA_SPECIAL + CHATML_SPECIAL}
    for limit in (0x7F, 0x2FF, 0xD7FF):  # ASCII with its control characters, Latin, the whole basic plane
        for _ in range(100):
            text = "".join(chr(rng.randint(0, limit)) for _ in range(rng.randint(0, 40))) + "😀"
            tokens = tokenizer.encode(text)
            assert tokenizer.decode(tokens) == text
            assert not special & set(tokens)


def test_text_never_becomes_a_special_token(tokenizer):
    """Special tokens spelled out in a question stay text; only the template's own are special, one BOS among them."""
    names = [name for name in LLAMA_SPECIAL + CHATML_SPECIAL if tokenizer.id(name) is not None]
    attack = "".join(names) + "hi"
    special = {tokenizer.id(name) for name in names}
    assert not special & set(tokenizer.encode(attack))
    assert tokenizer.decode(tokenizer.encode(attack)) == attack
    count = lambda ids: Counter(id for id in ids if id in special)
    assert count(tokenizer.chat(attack)) == count(tokenizer.chat("hi"))
    assert tokenizer.chat(attack).count(tokenizer.id("<|begin_of_text|>")) == (tokenizer.style == "llama3")
    assert tokenizer.decode(tokenizer.chat("hi")).count("hi") == 1


def apply_chat_template(folder: Path, text: str) -> list[int]:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    turns = [{"role": "user", "content": text}]
    return theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("text", WORDS)
def test_llama3_chat_equals_transformers(text, llama_folder):
    """Token for token apply_chat_template's, so one BOS, which comes first."""
    ids = Tokenizer(llama_folder).chat(text)
    assert ids == apply_chat_template(llama_folder, text)
    assert ids.index(0) == 0 and ids.count(0) == 1


@pytest.mark.parametrize("template", [CHATML_TEMPLATE, SMOLLM_TEMPLATE, QWEN_TEMPLATE], ids=["own", "smollm2", "qwen"])
def test_chatml_chat_equals_transformers(template, make_chatml):
    """Token for token apply_chat_template's, with the system turn that the template adds by itself, if any."""
    folder = make_chatml(template)
    for text in WORDS:
        assert Tokenizer(folder).chat(text) == apply_chat_template(folder, text)


def test_chat_template_in_its_own_file(make_chatml, tmp_path):
    """transformers 5 saves the template as chat_template.jinja: it is found there, and saved along."""
    transformers = pytest.importorskip("transformers")
    transformers.PreTrainedTokenizerFast.from_pretrained(make_chatml(SMOLLM_TEMPLATE)).save_pretrained(tmp_path / "a")
    expected = apply_chat_template(tmp_path / "a", "hi")
    assert Tokenizer(tmp_path / "a").chat("hi") == expected
    (tmp_path / "b").mkdir()
    Tokenizer(tmp_path / "a").save(tmp_path / "b")
    assert Tokenizer(tmp_path / "b").chat("hi") == expected


def test_a_response_ends_with_the_end_token(tokenizer):
    ids = tokenizer.response("#### 7")
    assert ids == [*tokenizer.encode("#### 7"), tokenizer.end_id]
    assert tokenizer.end_id == tokenizer.id("<|eot_id|>" if tokenizer.style == "llama3" else "<|im_end|>")
    assert tokenizer.end_id in tokenizer.stop_ids
    assert tokenizer.decode(ids) == "#### 7"


def test_stop_ids_are_the_end_token_and_those_of_the_generation_config(llama_folder, chatml_folder):
    assert Tokenizer(llama_folder).stop_ids == {1, 4}
    assert Tokenizer(chatml_folder).stop_ids == {Tokenizer(chatml_folder).id("<|im_end|>")}


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer(tmp_path)
    assert again.chat("3 pens?") == tokenizer.chat("3 pens?")
    assert (again.stop_ids, again.end_id) == (tokenizer.stop_ids, tokenizer.end_id)


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


