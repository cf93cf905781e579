"""Text to token ids and back: a model folder's tokenizer.json and its chat template, written out by hand.

A chat template is a small Jinja program that pastes special tokens and what people wrote into one string, which is
then tokenised: a user who types '<|eot_id|>' ends the turn. Here a template yields pieces, and no piece but those
marked `Special` can become a special token.
"""

import re
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

import tokenizers

from runtime.files import read_object

CONFIGS = "tokenizer_config.json", "generation_config.json", "config.json"  # the files that name end tokens
FILES = "tokenizer.json", *CONFIGS[:2], "special_tokens_map.json", "chat_template.jinja"
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
    """ChatML; `system` is what Qwen2.5's and SmolLM2's templates say where no system turn is given."""
    if system is not None and turns[0][0] != "system":
        turns = [("system", system), *turns]
    for role, text in turns:
        yield from (IM_START, role, "\n", text, IM_END, "\n")
    if opened:
        yield from (IM_START, "assistant", "\n")


def plain(turns: Turns, opened: bool, begin: list[Special], end: Special) -> Iterator[str]:
    """A base model, which knows no turns: each text ends with a newline, an answer with the end token."""
    yield from begin
    for role, text in turns:
        yield from (text, end if role == "assistant" else "\n")


def family(template: object) -> str | None:
    """'llama3', 'llama3.1' or 'chatml': whose Jinja template this is, told from its text. None: nobody's we know.

    A relative that differs in what stands above (newlines, trimming, a system turn or thoughts of its own) is nobody's:
    a template that is nearly right is worse than a refusal.
    """
    if not isinstance(template, str):
        return None
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


def _name(token: object) -> object:
    """A token that a file names, alone or with its flags."""
    return token.get("content") if isinstance(token, dict) else token


# ---- the tokenizer -------------------------------------------------------------------------------------------------


class Tokenizer:
    """A Hugging Face folder's tokenizer.json with its chat template.

    style: 'llama3', 'llama3.1', 'chatml', or 'plain' for a base model. The template's text tells it. A folder without a
    template is a base model, unless an end token that it names (where it names none: its vocabulary) closes a turn.
    Llama 3.1 and 3.2 are told a date: tokenizer_config.json's "date_string", else DATE, the same tomorrow as today.
    ValueError: a damaged file, an unknown template, more tokens than the embedding, an end token that is none.
    """

    def __init__(self, folder: str | Path):
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
            raise ValueError(f"{path} has {self.vocab_size} tokens, but config.json's vocab_size is only {rows}")
        added = self.backend.get_added_tokens_decoder()
        # Text is text. The switch is for tokens known as special, and files flag some ('<tool_call>') as ordinary.
        self.backend.add_special_tokens([token.content for token in added.values()])
        self.backend.encode_special_tokens = True

        stops = self._stops()
        tokens = self._choose_style([self.backend.id_to_token(id) for id in stops])
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

    def _choose_style(self, ends: list[str]) -> list[Special]:
        """Set `style` and `pieces`, the template with its arguments; its special tokens, the end token last."""
        config, path = self._json("tokenizer_config.json"), self.folder / "chat_template.jinja"
        template = path.read_text("utf-8", "replace") if path.is_file() else config.get("chat_template") or ""
        closing = {EOT: "llama3", IM_END: "chatml"}
        ends = ends or [end for end in closing if self.id(end) is not None]
        told_by_end = next((closing[end] for end in ends if end in closing), "plain")
        self.style = family(template) if template else told_by_end
        if self.style is None:
            known = "Llama 3, Llama 3.1, Llama 3.2, SmolLM2, Qwen2.5 or plain ChatML"
            raise ValueError(f"{self.folder} has an unknown chat_template: take one with that of {known}")
        if self.style == "plain":
            if not ends:
                raise ValueError(f"{self.folder}: no end token is known; name it as eos_token in tokenizer_config.json")
            bos = _name(config.get("bos_token"))
            begin = [bos] if bos else self.backend.encode("").tokens[:1]
            *begin, end = [Special(token) for token in (*begin, ends[0])]
            self.pieces = partial(plain, begin=begin, end=end)
            return [*begin, end]
        if self.style == "chatml":
            self.pieces = partial(chatml, system=default_system(template))
            return CHATML
        date = config.get("date_string") or DATE
        self.pieces = partial(llama3, date=date if self.style == "llama3.1" else None)
        return LLAMA3

    def _stops(self) -> list[int]:
        """The ids of all end tokens that the folder's files name, the tokenizer's own first."""
        stops = []
        for file in CONFIGS:
            named = _name(self._json(file).get("eos_token" if file == CONFIGS[0] else "eos_token_id"))
            for token in named if isinstance(named, list) else [] if named is None else [named]:
                id = self.id(token) if isinstance(token, str) else token
                if type(id) is not int or not 0 <= id < self.vocab_size:
                    raise ValueError(f"{self.folder / file}: the end token {token!r:.80} is not in tokenizer.json")
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
        or ends with white space, which a template may trim or join to what stands beside it: a sample is not changed.
        """
        return [*self.encode(text), self.end_id]

    def require_same(self, *folders: str) -> None:
        """ValueError unless a model of each folder could read this one's tokens; an empty name is left out."""
        kind = lambda tokenizer: (tokenizer.backend.get_vocab(), tokenizer.style, tokenizer.end_id)
        for folder in filter(None, folders):
            if kind(Tokenizer(folder)) != kind(self):
                raise ValueError(f"{folder} and {self.folder} have different tokenizers: take models of one family")

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files beside a model."""
        for path in (self.folder / name for name in FILES):
            if path.is_file():
                (Path(folder) / path.name).write_bytes(path.read_bytes())
