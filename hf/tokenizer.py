"""Text to token ids and back: a model folder's tokenizer.json and its chat template, written out by hand.

A chat template is a small Jinja program that pastes special tokens and what people wrote into one string, which is
then tokenised: a user who types '<|eot_id|>' ends the turn. Here a template yields pieces, and no piece but those
marked `Special` can become a special token.
"""

import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

import tokenizers

from runtime.files import read_object

FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json generation_config.json chat_template.jinja".split()
)
DATE = "26 Jul 2024"  # what Llama 3.1's own template says when nobody tells it the day
Turns = list[tuple[str, str]]  # (role, text)

# ---- the templates; `opened` adds the opening of the assistant's turn ----------------------------------------------


class Special(str):
    """The name of a special token, as a template writes it."""


LLAMA3 = BEGIN, START, STOP, EOT = [
    Special(f"<|{name}|>") for name in ("begin_of_text", "start_header_id", "end_header_id", "eot_id")
]
CHATML = IM_START, IM_END = [Special("<|im_start|>"), Special("<|im_end|>")]


def llama3(turns: Turns, opened: bool, date: str | None = None) -> Iterator[str]:
    """Llama 3; with a date Llama 3.1 and 3.2, whose first turn is always the system's and begins with two dates."""
    turns = [(role, text.strip()) for role, text in turns]
    if date is not None:
        system = turns.pop(0)[1] if turns[0][0] == "system" else ""
        turns.insert(0, ("system", f"Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n{system}"))
    yield BEGIN
    for role, text in turns:
        yield from (START, role, STOP, "\n\n", text, EOT)
    if opened:
        yield from (START, "assistant", STOP, "\n\n")


def chatml(turns: Turns, opened: bool, system: str | None = None) -> Iterator[str]:
    """ChatML; `system` is what Qwen2.5's and SmolLM2's templates say by themselves where no system turn is given."""
    if system is not None and turns[0][0] != "system":
        turns = [("system", system), *turns]
    for role, text in turns:
        yield from (IM_START, role, "\n", text, IM_END, "\n")
    if opened:
        yield from (IM_START, "assistant", "\n")


def plain(turns: Turns, opened: bool, tokens: list[Special]) -> Iterator[str]:
    """A base model, which knows no turns: each text ends with a newline, an answer with the end token, tokens' last."""
    *begin, end = tokens
    yield from begin
    for role, text in turns:
        yield from (text, end if role == "assistant" else "\n")


def family(template: str) -> str | None:
    """'llama3', 'llama3.1' or 'chatml': whose Jinja template this is, told from its text. None: nobody's we know.

    A relative that differs in what stands above (newlines, trimming, a system turn or thoughts of its own) is nobody's:
    a template that is nearly right is worse than a refusal.
    """
    has = lambda pattern: re.search(pattern, template) is not None
    if START in template:
        if not has("trim") or has(r"<think|<\|end_header_id\|>(?!(\\n|\n){2})"):
            return None
        if has("Cutting Knowledge Date: December 2023"):
            return None if has(r"""set system_message = (["'])(?!\1)""") else "llama3.1"
        return None if has(r"system<\|end_header_id\|>") else "llama3"
    if IM_START not in template or has(r"""<think|trim|strip|bos_token|set system|(^|[^'"])<\|im_start\|>system"""):
        return None
    return None if has(r"""<\|im_end\|>(?!(["'] ?\+ ?["'])?(\\n|\n))""") else "chatml"


def default_system(template: str) -> str | None:
    """The system turn that a ChatML template adds by itself: one whole string literal of its text."""
    literal = re.search(r"""(["'])<\|im_start\|>system(?:\\n|\n)((?:\\.|(?!\1|\\).)*?)<\|im_end\|>""", template, re.S)
    return literal and literal[2].encode("ascii", "backslashreplace").decode("unicode_escape")  # as Jinja reads it


# ---- the tokenizer -------------------------------------------------------------------------------------------------


class Tokenizer:
    """A Hugging Face folder's tokenizer.json with its chat template.

    style: 'llama3', 'llama3.1', 'chatml', or 'plain' for a base model. The template's text tells it. A folder without a
    template is a base model, unless an end token that it names (where it names none: its vocabulary) closes a turn.
    date: the day that Llama 3.1 and 3.2 are told; by default tokenizer_config.json's "date_string", else DATE, which
    stays the same, so that a run gives the same numbers tomorrow.
    ValueError: a damaged file, an unknown template, more tokens than the embedding, an end token that is none.
    """

    def __init__(self, folder: str | Path, date: str | None = None):
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} not found: a model's folder holds its tokenizer.json")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from None
        self.vocab_size = 1 + max(self.backend.get_vocab().values(), default=-1)
        rows = self._json("config.json").get("vocab_size")
        if isinstance(rows, int) and rows < self.vocab_size:  # fewer tokens than rows are fine: Qwen pads its embedding
            sizes = f"{self.vocab_size} tokens but config.json's embedding only {rows} rows (vocab_size)"
            raise ValueError(f"{path} has {sizes}: take both from the same model")
        added = self.backend.get_added_tokens_decoder()
        # Text is text. The switch is for tokens known as special, and files flag some ('<tool_call>') as ordinary.
        self.backend.add_special_tokens([token.content for token in added.values()])
        self.backend.encode_special_tokens = True

        self.config = self._json("tokenizer_config.json") | ({"date_string": date} if date else {})
        template, stops, ends = self._template(), self._stops(), {EOT: "llama3", IM_END: "chatml"}
        names = [self.backend.id_to_token(id) for id in stops] or [end for end in ends if self.id(end) is not None]
        self.style = family(template) if template else next((ends[name] for name in names if name in ends), "plain")
        if self.style == "plain" and not names:
            raise ValueError(f"{self.folder}: no end token is known; name it as eos_token in tokenizer_config.json")
        if self.style == "plain":
            begin = [self._named("bos_token")] if self._named("bos_token") else self.backend.encode("").tokens[:1]
            tokens = [Special(token) for token in (*begin, names[0])]
            self.pieces = partial(plain, tokens=tokens)
        elif self.style == "chatml":
            self.pieces, tokens = partial(chatml, system=default_system(template)), CHATML
        elif self.style == "llama3":
            self.pieces, tokens = llama3, LLAMA3
        elif self.style == "llama3.1":
            self.pieces, tokens = partial(llama3, date=self.config.get("date_string") or DATE), LLAMA3
        else:
            known = "Llama 3, Llama 3.1, Llama 3.2, SmolLM2, Qwen2.5 or plain ChatML"
            raise ValueError(
                f"{self.folder} has a chat template that hf/tokenizer.py does not know: take one with that of {known}"
            )
        for token in tokens:
            if self.id(token) is None:
                raise ValueError(f"{path} has no token '{token}', which the {self.style} template needs")
        self.special_ids = {id for id, token in added.items() if token.special or token.content in tokens}
        self.end_id = self.id(tokens[-1])  # closes every training response
        self.stop_ids = frozenset([self.end_id, *stops])  # any of these stops generation

    def _json(self, name: str) -> dict:
        """One of the folder's JSON files; {} where it is missing."""
        path = self.folder / name
        return read_object(path) if path.is_file() else {}

    def _template(self) -> str:
        """The text of the folder's chat template, '' if it has none."""
        path = self.folder / "chat_template.jinja"  # where transformers 5 puts it, and looks first
        template = path.read_text("utf-8", "replace") if path.is_file() else self.config.get("chat_template") or ""
        try:
            if isinstance(template, list):  # several with names
                template = {entry["name"]: entry["template"] for entry in template}.get("default", "no default")
        except (KeyError, TypeError):
            template = None
        if not isinstance(template, str):
            raise ValueError(f"{self.folder / 'tokenizer_config.json'}: chat_template is no text and no named texts")
        return template

    def _named(self, key: str) -> str | None:
        """A token that tokenizer_config.json names, alone or with its flags."""
        token = self.config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str | None):
            raise ValueError(f"{self.folder / 'tokenizer_config.json'}: {key} must be a text, not {token!r:.80}")
        return token

    def _stops(self) -> list[int]:
        """The ids of all end tokens that the folder's files name, the tokenizer's own first."""
        eos = self._named("eos_token")
        if eos and self.id(eos) is None:
            raise ValueError(f"{self.folder / 'tokenizer_config.json'}: eos_token '{eos}' is not in tokenizer.json")
        stops = [self.id(eos)] if eos else []
        for name in ("generation_config.json", "config.json"):
            listed = self._json(name).get("eos_token_id")
            for id in listed if isinstance(listed, list) else [] if listed is None else [listed]:
                if type(id) is not int or not 0 <= id < self.vocab_size:
                    where = f"{self.folder / name}: eos_token_id"
                    raise ValueError(
                        f"{where} {id!r} is none of tokenizer.json's ids, which end at {self.vocab_size - 1}"
                    )
                stops.append(id)
        return stops

    def id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Text to ids: none of them a special or an added token, whatever the text spells."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; special tokens are left out."""
        return self.backend.decode([id for id in ids if id not in self.special_ids], skip_special_tokens=False)

    def text(self, text: str) -> list[int]:
        """A plain completion prompt (k shots): the text, after one BOS if the model's texts begin with one."""
        return self.backend.encode(text).ids

    def render(self, messages: list[dict[str, str]], generation_prompt: bool = True) -> list[int]:
        """A conversation [{"role": ..., "content": ...}, ...] as its chat template writes it.

        Neighbouring texts are encoded as one, since a token may span them. `generation_prompt` opens the assistant's
        turn. ValueError: no message, or a role other than system, user and assistant.
        """
        turns = [(message["role"], message["content"]) for message in messages]
        for role, _ in turns or [("nobody", "")]:
            if role not in ("system", "user", "assistant"):
                raise ValueError(f"a conversation has turns of system, user and assistant, not of '{role}'")
        ids = []
        for special, group in groupby(self.pieces(turns, generation_prompt), lambda piece: isinstance(piece, Special)):
            pieces = list(group)
            ids += [self.id(name) for name in pieces] if special else self.encode("".join(pieces))
        return ids

    def chat(self, user: str) -> list[int]:
        """One user turn and the opening of the assistant's: what every stage shows the model."""
        return self.render([{"role": "user", "content": user}])

    def response(self, text: str) -> list[int]:
        """A response as it is trained on and scored: its text, encoded on its own, and the end token.

        chat(user) + response(text) is render() of both turns (ChatML's adds a newline behind), unless the text begins
        with white space, or in Llama 3 ends with it: its template trims, and '\\n\\n' would be one token with a newline
        that follows. A model that samples has no such second look, so neither have we.
        """
        return [*self.encode(text), self.end_id]

    def same_ids(self, other: "Tokenizer") -> bool:
        """Whether the other writes a conversation as the same ids: then one model can read the other's tokens."""
        same_words = self.backend.get_vocab() == other.backend.get_vocab()
        return same_words and (self.style, self.end_id) == (other.style, other.end_id)

    def require_same(self, *folders: str) -> None:
        """ValueError unless the models of these folders write the same ids; an empty name is left out."""
        for folder in filter(None, folders):
            if not self.same_ids(Tokenizer(folder)):
                raise ValueError(
                    f"{folder} and {self.folder} have different tokenizers: one cannot read the other's tokens"
                )

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files beside a model; a date that was given is kept in tokenizer_config.json."""
        for name in FILES:
            if (self.folder / name).is_file():
                (Path(folder) / name).write_bytes((self.folder / name).read_bytes())
        if self.config != self._json("tokenizer_config.json"):
            text = json.dumps(self.config, indent=2, ensure_ascii=False)
            (Path(folder) / "tokenizer_config.json").write_text(text, encoding="utf-8")
