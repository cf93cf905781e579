"""hf/tokenizer.py: text to token ids and back, chat templates token for token as transformers renders them."""

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
from conftest import CHATML_SPECIAL, CHATML_TEMPLATE, LLAMA_SPECIAL, LLAMA_TEMPLATE, real_model

from hf.template import family
from hf.tokenizer import Tokenizer

# The published templates' turns, dates and system turns; their branches for tools are left out, Qwen2.5's but for the
# start of one, which is a trap: it opens a system turn, and its default text is not written in one piece.
LLAMA3_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
LLAMA31_TEMPLATE = (
    "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- set date_string = \"26 Jul 2024\" %}\n{%- endif %}"
    "\n{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}\n"
    "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message = \"\" %}\n{%- endif %}\n"
    "{{- \"<|start_header_id|>system<|end_header_id|>\\n\\n\" }}\n{{- \"Cutting Knowledge Date: December 2023\\n\" }}\n"
    "{{- \"Today Date: \" + date_string + \"\\n\\n\" }}\n{{- system_message }}\n{{- \"<|eot_id|>\" }}\n"
    "{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n")
LLAMA32_TEMPLATE = LLAMA31_TEMPLATE.replace(
    '{%- set date_string = "26 Jul 2024" %}',
    '{%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}\n'
    '    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}')
QWEN_TEMPLATE = (
    "{%- if tools %}\n    {{- '<|im_start|>system\\n' }}\n    {%- if messages[0]['role'] == 'system' %}\n"
    "        {{- messages[0]['content'] }}\n    {%- else %}\n        {{- 'You are Qwen.' }}\n    {%- endif %}\n"
    "    {{- '# Tools<|im_end|>\\n' }}\n{%- else %}\n    {%- if messages[0]['role'] == 'system' %}\n"
    "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n    {%- else %}\n"
    "        {{- '<|im_start|>system\\nYou are Qwen.\\nUse \\\\boxed{}, it\\'s \"ok\" für 東京.<|im_end|>\\n' }}\n"
    "    {%- endif %}\n{%- endif %}\n{%- for message in messages %}\n"
    "    {%- if (message.role == \"user\") or (message.role == \"system\" and not loop.first) or"
    " (message.role == \"assistant\") %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n    {%- endif %}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n")
SMOLLM_TEMPLATE = (  # its newlines are real ones, not '\' and 'n'
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TOOLS = "{%- if tools is not none %}\n    {{- 'Tools:\\n' }}\n    {%- for t in tools %}{{- t | tojson }}{%- endfor %}\n"
TOOLS += "    {%- if tools | length != 1 %}{{- 'many' }}{%- else %}{{- 'one' }}{%- endif %}\n{%- endif %}\n"
CALLS = "    {%- elif 'tool_calls' in message %}\n        {%- if not loop.last %}{{- '<|eom_id|>' }}{%- endif %}\n"
CALLS += "    {%- elif message.role == 'tool' %}\n        {{- message | tojson }}\n    {%- endif %}\n{%- endfor %}"
LLAMA32_TOOLS = (  # with branches for tools where the published ones have them
    LLAMA32_TEMPLATE.replace("{{- system_message", TOOLS + "{{- system_message").replace("{%- if messages[0]",
    "{%- if not tools is defined %}\n    {%- set tools = none %}\n{%- endif %}\n\n{#- the system's turn, it's one #}\n"
    "{%- if messages[0]").replace('{{- "Cutting', TOOLS + TOOLS + '{{- "Cutting').replace(
    "{%- for message in messages %}\n", TOOLS + "{%- for message in messages %}\n    {%- if not (message.role =="
    " 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}\n").replace("{%- endfor %}\n{%- if add",
    CALLS + "\n{%- if add"))
QWEN_TOOLS = QWEN_TEMPLATE.replace('"assistant") %}', '"assistant" and not message.tool_calls) %}').replace(
    "    {%- endif %}\n{%- endfor %}", CALLS)
PER_ROLE = (  # unsloth's
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{'<|im_start|>user\n' + message['content'] + '<|im_end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|im_start|>assistant\n' + message['content'] + '<|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>system\n' + message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
OTHER_WORDS = (  # an older preamble, another name, another sign, one kind of quotes, comments, lines of its own
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{# it's ChatML #}\n"
    "{%- for m in messages -%}\n    {{ \"<|im_start|>\" ~ m.role }}{{ \"\\n\" + m.content + \"<|im_end|>\\n\" -}}\n"
    "{% endfor %}\n  {% if add_generation_prompt -%}\n  <|im_start|>assistant{{ '\\n' }}{% endif %}\n")
TEMPLATES = {  # name: template, its family
    "llama3": (LLAMA3_TEMPLATE, "llama3"), "llama3.1": (LLAMA31_TEMPLATE, "llama3.1"),
    "llama3.2": (LLAMA32_TEMPLATE, "llama3.1"), "ours": (LLAMA_TEMPLATE, "llama3"),
    "chatml": (CHATML_TEMPLATE, "chatml"), "qwen2.5": (QWEN_TEMPLATE, "chatml"),
    "smollm2": (SMOLLM_TEMPLATE, "chatml"), "llama3.2, tools": (LLAMA32_TOOLS, "llama3.1"),
    "llama3, as first published": (LLAMA3_TEMPLATE.replace("{% if add_generation_prompt %}", "").removesuffix(
        "{% endif %}"), "llama3"),
    "qwen2.5, tools": (QWEN_TOOLS, "chatml"), "per role": (PER_ROLE, "chatml"), "other words": (OTHER_WORDS, "chatml")}

TEXTS = ["What is 12*7?", "", " ", "\n", "  spaces  around  ", "\n\nnewlines\n\n\nlines\n x\n\n",
         "\t\ttabs\r\nreturns\r", "naïve Größe 東京 😀", "\u00a0no-break\u3000wide\u2028", "e\u0301 is not é",
         "'s 're 12345678 + 0.5 = $1,234",
         "]]>.\n{%- if x %}{{ bos_token }}", "user\nassistant\n\n"]
SHAPES = ["u", "su", "uau", "suau", "s", "uu", "usu", "ssu", "suauau", "a"]
ROLE = {"u": "user", "s": "system", "a": "assistant"}


def conversations():
    """Every text as the only turn, in the second and in every place; every shape with mixed texts."""
    turns = lambda shape, texts: [{"role": ROLE[r], "content": text} for r, text in zip(shape, texts)]
    rng = random.Random(0)
    found = [turns("u", [text]) for text in TEXTS]
    found += [turns("suau", ["Be brief.", text, "I see.", "Go on"]) for text in TEXTS]
    found += [turns("suau", [text] * 4) for text in TEXTS]
    found += [turns(shape, rng.choices(TEXTS, k=6)) for shape in SHAPES]
    return [(messages, opened) for messages in found for opened in (True, False)]


def compare(folder, template=None):
    """Our ids of all conversations are those of transformers' apply_chat_template."""
    transformers = pytest.importorskip("transformers")
    ours, theirs = Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for messages, opened in conversations():
        expected = theirs.apply_chat_template(messages, chat_template=template, add_generation_prompt=opened,
                                              return_dict=False, date_string="26 Jul 2024")
        assert ours.render(messages, opened) == expected, (messages, opened)
    return ours, theirs


def variant(source: Path, folder: Path, tokenizer_json=lambda content: None, config=None, **files) -> Path:
    """A copy of a tokenizer's folder: config={...} changes tokenizer_config.json (None drops a key), generation={...}
    and model={...} are the other two files whole, tokenizer_json a function that changes the parsed tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    content, settings = (json.loads((source / f"{name}.json").read_text(encoding="utf-8"))
                         for name in ("tokenizer", "tokenizer_config"))
    tokenizer_json(content)
    settings = {key: value for key, value in (settings | (config or {})).items() if value is not None}
    names = {"generation": "generation_config", "model": "config"}
    files = {names[name]: files[name] for name in files} | {"tokenizer": content, "tokenizer_config": settings}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(params=["llama_folder", "chatml_folder"])
def tokenizer(request) -> Tokenizer:
    return Tokenizer(request.getfixturevalue(request.param))


# ---- templates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_equal_transformers(name, llama_folder, chatml_folder, tmp_path):
    template, style = TEMPLATES[name]
    folder = chatml_folder if style == "chatml" else llama_folder
    ours, _ = compare(variant(folder, tmp_path, config={"chat_template": template}), template)
    assert ours.style == style


def test_a_chat_of_llama_3_written_out(llama_folder):
    """By hand, without transformers: one beginning, headers in special tokens, an end to each turn."""
    tokenizer = Tokenizer(llama_folder)
    user, assistant = ([2, *tokenizer.encode(role), 3, *tokenizer.encode("\n\n")] for role in ("user", "assistant"))
    assert tokenizer.chat("?") in (  # a token may span the line ends and the text
        [0, *user, *tokenizer.encode("?"), 4, *assistant], [0, *user[:-1], *tokenizer.encode("\n\n?"), 4, *assistant])


def test_the_date_is_the_folders_else_fixed(llama_folder, tmp_path):
    folder = variant(llama_folder, tmp_path / "a", config={"chat_template": LLAMA31_TEMPLATE})
    dated = variant(folder, tmp_path / "b", config={"date_string": "05 May 2025"})
    for path, day in ((folder, "26 Jul 2024"), (dated, "05 May 2025")):
        tokenizer = Tokenizer(path)
        assert f"Today Date: {day}\n" in tokenizer.decode(tokenizer.chat("x"))


def test_chat_template_in_its_own_file_comes_first(make_chatml, tmp_path):
    """transformers 5 saves the template as chat_template.jinja."""
    folder = make_chatml(SMOLLM_TEMPLATE)
    own = variant(folder, tmp_path / "own", config={"chat_template": QWEN_TEMPLATE})
    (own / "chat_template.jinja").write_text(SMOLLM_TEMPLATE, encoding="utf-8")
    assert compare(own)[0].chat("hi") == Tokenizer(folder).chat("hi") != Tokenizer(make_chatml()).chat("hi")


@pytest.mark.parametrize("content", [
    "{{ x }}[INST] y [/INST]", 7, [{"name": "a", "template": CHATML_TEMPLATE}],
    # relatives: one newline after the header, no trimming, a system turn of their own, thoughts, a BOS, no last newline
    LLAMA3_TEMPLATE.replace("\n\n", "\n"), LLAMA3_TEMPLATE.replace(" | trim", ""),
    LLAMA31_TEMPLATE.replace('system_message = ""', 'system_message = "Be kind."'),
    LLAMA3_TEMPLATE + "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>",
    LLAMA31_TEMPLATE.replace("Today", "{{ '<think>' }}Today"),
    CHATML_TEMPLATE.replace("message['content']", "message['content'] | trim"),
    CHATML_TEMPLATE + "{{ '<think>' }}", "{{ bos_token }}" + CHATML_TEMPLATE,
    "<|im_start|>system\nBe kind.<|im_end|>\n" + CHATML_TEMPLATE,
    "{% set system_message = 'Be kind.' %}{{ '<|im_start|>system\n' + system_message }}" + CHATML_TEMPLATE,
    CHATML_TEMPLATE.replace("<|im_end|>\\n", "<|im_end|>"),
    # layout: text between the tags
    LLAMA3_TEMPLATE.replace("{% set content = b", " {% set content = b"), LLAMA_TEMPLATE.replace("{% for", "\n{% for"),
    CHATML_TEMPLATE.replace("{% for", "   {% if true %}{% endif %}{% for"),
    CHATML_TEMPLATE.replace("%}{{", "%}\n    {{"), CHATML_TEMPLATE + "\n\n\n",
    CHATML_TEMPLATE.replace("{% endfor", "{# #} {% endfor"),
    LLAMA32_TOOLS.replace(TOOLS + TOOLS, TOOLS + "x" + TOOLS), QWEN_TEMPLATE.replace("{%- for", "{{- '' }}\n{%+ for"),
    # what is written of a turn, and of which
    *[CHATML_TEMPLATE.replace("message['role']", role) for role in (
        "message['role'] | upper", "message.role.title()", "'User'", "message['name']", "message['role'] + ' '")],
    CHATML_TEMPLATE.replace("message['content']", "message['content'].strip()"),
    CHATML_TEMPLATE.replace("assistant\\n", "assistant\\nThink. "), PER_ROLE.replace("user\n", "human\n"),
    CHATML_TEMPLATE.replace("{% if add_generation_prompt %}", "{% if true %}"),
    SMOLLM_TEMPLATE.replace("loop.first and ", ""), SMOLLM_TEMPLATE.replace("!= 'system'", "!= ' system'"),
    QWEN_TEMPLATE.replace(" and not loop.first", ""), CHATML_TEMPLATE.replace("in messages", "in messages[1:]"),
    LLAMA3_TEMPLATE.replace("index0 == 0", "index0 == 1"), LLAMA31_TEMPLATE.replace("messages[1:]", "messages")])
def test_a_template_that_is_not_written_out_here_is_refused(content, make_chatml, tmp_path):
    """Nearly right would be silently wrong."""
    assert family(content) is None
    folder = variant(make_chatml(), tmp_path, config={"chat_template": content})
    with pytest.raises(ValueError, match="unknown chat_template"):
        Tokenizer(folder)


def test_the_begin_token_that_a_template_names_must_be_the_real_one(llama_folder, tmp_path):
    """transformers writes whatever tokenizer_config.json calls so, and nothing where it does not."""
    for i, token in enumerate((None, "<|end_of_text|>")):
        with pytest.raises(ValueError, match="bos_token"):
            Tokenizer(variant(llama_folder, tmp_path / str(i), config={"bos_token": token}))


@pytest.mark.parametrize("roles", [["user", "tool"], ["<|eot_id|>"], []])
def test_other_roles_are_refused(roles, tokenizer):
    with pytest.raises(ValueError, match="system, user"):
        tokenizer.render([{"role": role, "content": "x"} for role in roles])


# ---- responses and plain texts -------------------------------------------------------------------------------------

ANSWERS = ["Ben has 3+4=7.\n#### 7", "", "**Step 1**: é 東京\n\n 😀", "'s", "\u0301x", "12345", "{\"a\": 1}"]


def check_responses(tokenizer):
    """A prompt and its response are the rendered conversation; ChatML writes a newline behind every turn."""
    behind = tokenizer.encode("\n") if tokenizer.style == "chatml" else []
    for answer in ANSWERS:
        ids = tokenizer.response(answer)
        assert ids[-1] == tokenizer.end_id and tokenizer.end_id not in ids[:-1]
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
        assert tokenizer.chat("Hi") + ids + behind == tokenizer.render(messages, False), answer


def test_prompt_and_response_are_the_rendered_conversation(tokenizer):
    check_responses(tokenizer)
    assert tokenizer.end_id == tokenizer.id("<|eot_id|>" if tokenizer.style == "llama3" else "<|im_end|>")
    assert tokenizer.decode(tokenizer.response("#### 7")) == "#### 7"
    assert tokenizer.response(" 7\n") == [*tokenizer.encode(" 7\n"), tokenizer.end_id]  # not trimmed: it is a sample


def test_a_plain_text_begins_with_one_bos_if_any(llama_folder, chatml_folder):
    for folder, bos in ((llama_folder, [0]), (chatml_folder, [])):
        for text in ("2+2=", "", "<|begin_of_text|>"):
            assert Tokenizer(folder).text(text) == bos + Tokenizer(folder).encode(text)


def test_base_models_are_plain(llama_folder, chatml_folder, tmp_path):
    """No template, and an end token that closes no turn: text, newline, answer, end; the headers stay unused."""
    bare = {"chat_template": None, "eos_token": None, "bos_token": None}
    for i, (folder, config, files, end, begun) in enumerate([
            (llama_folder, {"eos_token": "<|end_of_text|>"}, {}, "<|end_of_text|>", True),
            (llama_folder, {}, {"model": {"eos_token_id": 1}}, "<|end_of_text|>", True),
            (chatml_folder, {"eos_token": {"content": "<|endoftext|>"}}, {}, "<|endoftext|>", False),
            (chatml_folder, {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}, {}, "<|endoftext|>", True)]):
        tokenizer = Tokenizer(variant(folder, tmp_path / str(i), config=bare | config, **files))
        assert (tokenizer.style, tokenizer.end_id) == ("plain", tokenizer.id(end))
        begin = [tokenizer.id(config.get("bos_token", "<|begin_of_text|>"))] if begun else []
        assert tokenizer.chat("2+2?") == [*begin, *tokenizer.encode("2+2?\n")]
        check_responses(tokenizer)


def test_without_a_template_the_end_token_tells_the_style(llama_folder, chatml_folder, tmp_path):
    """So does, where no file names an end token, the vocabulary."""
    for folder in (llama_folder, chatml_folder):
        for i, config in enumerate(({}, {"eos_token": None})):
            bare = variant(folder, tmp_path / folder.name / str(i), config={"chat_template": None} | config)
            assert Tokenizer(bare).chat(" 2+2? ") == Tokenizer(folder).chat(" 2+2? ")


def test_settings_of_who_trained_with_a_tokenizer_are_neither_obeyed_nor_handed_on(llama_folder, tmp_path):
    """Truncation and padding, merges left out by chance, an end token behind every text."""
    def used(content):
        content["truncation"] = {"direction": "Right", "max_length": 6, "strategy": "LongestFirst", "stride": 0}
        content["padding"] = {"strategy": {"Fixed": 40}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                              "pad_type_id": 0, "pad_token": "x"}
        content["model"]["dropout"] = 0.9

    def ended(content):
        content["post_processor"]["single"].append({"SpecialToken": {"id": "<|eot_id|>", "type_id": 0}})
        content["post_processor"]["special_tokens"]["<|eot_id|>"] = {
            "id": "<|eot_id|>", "ids": [4], "tokens": ["<|eot_id|>"]}

    clean, text = Tokenizer(llama_folder), "Ava has 3 pens. How many pens does Ava have now?"
    folder = variant(llama_folder, tmp_path / "used", used)
    for name in ("a", "b"):
        tokenizer = Tokenizer(folder)
        assert (tokenizer.chat(text), tokenizer.text(text)) == (clean.chat(text), clean.text(text))
        folder = tmp_path / name
        folder.mkdir()
        tokenizer.save(folder)
        saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        assert saved == json.loads((llama_folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert Tokenizer(variant(llama_folder, tmp_path / "ended", ended)).text(text) == clean.text(text)


# ---- texts among others --------------------------------------------------------------------------------------------


def sentencepiece(source, folder, kind, **config):
    """A copy of a ChatML folder whose spaces are '\u2581', put before every text, before the first one, or nowhere."""
    def change(content):
        before = {"every": [{"type": "Prepend", "prepend": "\u2581"}]}.get(kind, [])
        content["normalizer"] = {"type": "Sequence", "normalizers": [
            *before, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}
        content["pre_tokenizer"] = None if kind != "first" else {
            "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
        letters = [*dict.fromkeys("\u2581\n".join(map(chr, range(33, 127))))]
        content["model"] = {"type": "BPE", "vocab": {letter: i for i, letter in enumerate(letters)}, "merges": [
            ["\u2581", letter] for letter in "au"], "unk_token": None}
        content["model"]["vocab"] |= {"\u2581a": len(letters), "\u2581u": len(letters) + 1}
        for i, token in enumerate(content["added_tokens"]):
            token["id"] = len(letters) + 2 + i

    return variant(source, folder, change, config=config)


@pytest.mark.parametrize("kind, template", [("every", CHATML_TEMPLATE), ("first", CHATML_TEMPLATE), ("every", None)])
def test_tokens_that_depend_on_what_stands_before_are_refused(kind, template, chatml_folder, tmp_path):
    """As many SentencePiece vocabularies have them: a response alone is not a response behind its prompt."""
    folder = sentencepiece(chatml_folder, tmp_path, kind, chat_template=template, eos_token="<|endoftext|>")
    with pytest.raises(ValueError, match=r"tokenizer\.json: .*SentencePiece"):
        Tokenizer(folder)


def test_a_vocabulary_like_sentencepiece_that_does_not_depend_is_read(chatml_folder, tmp_path):
    folder = sentencepiece(chatml_folder, tmp_path, "none", chat_template=CHATML_TEMPLATE)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    for messages, opened in conversations():
        if all(set(message["content"]) <= set(map(chr, [10, *range(32, 127)])) for message in messages):
            assert Tokenizer(folder).render(messages, opened) == theirs.apply_chat_template(
                messages, add_generation_prompt=opened, return_dict=False)


def test_a_token_that_eats_the_space_beside_it_is_refused(chatml_folder, tmp_path):
    def eat(content):
        content["added_tokens"][-1]["rstrip"] = True

    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer(variant(chatml_folder, tmp_path, eat))


def test_stop_ids_are_those_of_every_file(llama_folder, tmp_path):
    assert Tokenizer(llama_folder).stop_ids == {1, 4}
    folder = variant(llama_folder, tmp_path, config={"eos_token": "<|end_of_text|>"},
                     generation={"eos_token_id": [2, 9]}, model={"eos_token_id": 3})
    assert (Tokenizer(folder).stop_ids, Tokenizer(folder).end_id) == ({1, 2, 3, 4, 9}, 4)


# ---- text is text --------------------------------------------------------------------------------------------------


def check_text_is_text(tokenizer, names):
    """Names of tokens, alone and among spaces, give none of these tokens; in a conversation only the template's."""
    tokens = {tokenizer.id(name) for name in names}
    assert None not in tokens
    count = lambda ids: Counter(id for id in ids if id in tokens)
    for attack in [*names, "".join(names), *(f"a {name} {name}\n" for name in names)]:
        assert not tokens & set(tokenizer.encode(attack))
        assert tokenizer.decode(tokenizer.encode(attack)) == attack
        assert count(tokenizer.text(attack)) == count(tokenizer.text(""))
        assert count(tokenizer.response(attack)) == {tokenizer.end_id: 1}
    attack, roles = "".join(names) + "hi", ("system", "user", "assistant", "user")
    render = lambda text: tokenizer.render([{"role": role, "content": text} for role in roles])
    assert count(render(attack)) == count(render("hi"))
    assert tokenizer.decode(render(attack)).count(attack) == 4


def test_text_never_becomes_a_special_token(tokenizer):
    """Nor is anything of it lost, whatever unicode it is."""
    names = LLAMA_SPECIAL if tokenizer.style == "llama3" else CHATML_SPECIAL
    check_text_is_text(tokenizer, names)
    h = pytest.importorskip("hypothesis")

    @h.settings(max_examples=50, deadline=None)
    @h.given(h.strategies.text())
    def check(text):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert not {tokenizer.id(name) for name in names} & set(tokenizer.encode(text))

    check()


def test_text_never_becomes_an_added_token_however_it_is_flagged(llama_folder, tmp_path):
    """special false, normalized, stripping: each combination; decoding still shows what is no special token."""
    flags = list(itertools.product((False, True), repeat=4))

    def add(content):
        start = 1 + max(max(content["model"]["vocab"].values()), *(token["id"] for token in content["added_tokens"]))
        content["normalizer"] = {"type": "NFC"}
        for i, (special, normalized, left, right) in enumerate(flags):
            content["added_tokens"].append({
                "id": start + i, "content": f"<tool{i}>", "single_word": False, "lstrip": left, "rstrip": right,
                "normalized": normalized, "special": special})

    tokenizer = Tokenizer(variant(llama_folder, tmp_path, add))
    names = [f"<tool{i}>" for i in range(len(flags))]
    check_text_is_text(tokenizer, LLAMA_SPECIAL + names)
    shown = [name for name, (special, *_) in zip(names, flags) if not special]
    assert tokenizer.decode(tokenizer.id(name) for name in names).replace(" ", "") == "".join(shown)


# ---- files ---------------------------------------------------------------------------------------------------------


def test_a_saved_tokenizer_is_the_same_here_and_in_transformers(make_chatml, tmp_path):
    folder = make_chatml(SMOLLM_TEMPLATE)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [7], "top_k": 5}')
    Tokenizer(folder).save(tmp_path)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [7, Tokenizer(folder).id("<|im_end|>")], "top_k": 5}
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in folder.iterdir()}
    ours, theirs = compare(tmp_path)
    assert (ours.end_id, ours.stop_ids) == (Tokenizer(folder).end_id, Tokenizer(folder).stop_ids)
    assert (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_an_embedding_may_have_more_rows_than_tokens(llama_folder, chatml_folder, tmp_path):
    for folder in (llama_folder, chatml_folder):  # one counts its special tokens first, one last
        size = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
        assert Tokenizer(variant(folder, tmp_path / folder.name, model={"vocab_size": size + 9})).vocab_size == size
        with pytest.raises(ValueError, match=f"{size} tokens.* {size - 1}"):
            Tokenizer(variant(folder, tmp_path / f"{folder.name} small", model={"vocab_size": size - 1}))


def no_turns(content):
    content["added_tokens"] = [token for token in content["added_tokens"] if "im_" not in token["content"]]


BAD = [  # folder, what is changed in its copy, words of the sentence
    *[("llama", {file: {"eos_token_id": ids}}, [name, "end token"])
      for file, name in (("generation", "generation_config.json"), ("model", "config.json"))
      for ids in (-1, [1, 10**6], True)],
    ("llama", dict(config={"eos_token": "</s>"}), ["tokenizer_config.json", "'</s>'"]),
    ("llama", dict(config={"eos_token": ["nope"]}), ["tokenizer_config.json", "nope"]),
    ("chatml", dict(config={"chat_template": LLAMA_TEMPLATE, "bos_token": "<|begin_of_text|>"}),
     ["no token '<|begin_of_text|>'", "llama3"]),
    ("llama", dict(config={"chat_template": CHATML_TEMPLATE}), ["no token '<|im_start|>'", "chatml"]),
    ("chatml", dict(tokenizer_json=no_turns, config={"chat_template": None, "eos_token": None}), ["no end token"]),
    *[("llama", {"raw": (name, content)}, [f"/{name}"])
      for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")
      for content in (b"{", b"[1]", b"\xff{}")],
    ("llama", {"raw": ("tokenizer.json", b'{"model": null}')}, ["/tokenizer.json"]),
]


@pytest.mark.parametrize("folder, changes, words", BAD)
def test_a_bad_tokenizer_folder_is_refused_by_name(folder, changes, words, llama_folder, chatml_folder, tmp_path):
    name, content = changes.get("raw", ("nothing", b""))
    rest = {key: value for key, value in changes.items() if key != "raw"}
    folder = variant(llama_folder if folder == "llama" else chatml_folder, tmp_path, **rest)
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        Tokenizer(folder)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


# ---- published folders ---------------------------------------------------------------------------------------------


def check_a_real_folder(tokenizer, theirs, bos):
    """Responses, plain texts, which begin with `bos`, and every added token, which stays text."""
    check_responses(tokenizer)
    for text in TEXTS:
        assert tokenizer.text(text) == theirs(text)["input_ids"] == bos + tokenizer.encode(text)
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    added = json.loads((tokenizer.folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    names = [token["content"] for token in added]  # Qwen2.5 flags its <tool_call> as an ordinary one
    check_text_is_text(tokenizer, names[:20] + names[-5:])


@pytest.mark.parametrize("name", ["llama3", "llama3.1", "llama3.2"])
def test_real_llama_vocabulary_equals_transformers(name, tmp_path):
    """The real 128,256 tokens, whose file puts a BOS before every text it encodes: it is not doubled."""
    template, _ = TEMPLATES[name]
    folder = variant(real_model("llama3-tokenizer"), tmp_path, config={"chat_template": template})
    ours, theirs = compare(folder, template)
    assert (ours.chat("Hi").count(128000), ours.end_id) == (1, 128009)
    if name == "llama3":  # the others have system turns of their own, and response() knows none
        check_a_real_folder(ours, theirs, [128000])


@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct"])
def test_real_chatml_folders_equal_transformers(name):
    """Published folders as they are: vocabulary, template and its own system turn."""
    ours, theirs = compare(real_model(name))
    assert ours.decode(ours.chat("Hi")).startswith("system\nYou are ")
    assert theirs.eos_token_id in ours.stop_ids
    check_a_real_folder(ours, theirs, [])
