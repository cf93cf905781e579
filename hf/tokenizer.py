"""Text to token ids and back: a model folder's tokenizer.json and its chat template."""

from collections.abc import Iterable
from functools import partial
from itertools import groupby, takewhile
from pathlib import Path

import tokenizers

from hf.folder import not_found
from hf.template import BEGIN, CHATML, EOT, IM_END, LLAMA3, Special, chatml, family, llama3, plain
from runtime.files import read_object, write_json

CONFIGS = "tokenizer_config.json", "generation_config.json", "config.json"  # the files that name end tokens
FILES = "tokenizer.json", *CONFIGS[:2], "special_tokens_map.json", "chat_template.jinja"


def _name(token: object) -> object:
    """A token that a file names, alone or with its flags."""
    return token.get("content") if isinstance(token, dict) else token


class Tokenizer:
    """A Hugging Face folder's tokenizer.json with its chat template.

    style: 'llama3', 'llama3.1', 'chatml', or 'plain' for a base model. The template's text tells it. A folder without a
    template is a base model, unless an end token that it names (where it names none: its vocabulary) closes a turn.
    Llama 3.1 and 3.2 are told a date: tokenizer_config.json's "date_string", else the template's own, not today's.
    ValueError: a damaged file, an unknown template, more tokens than the embedding, an end token that is none, a text
    whose tokens depend on what stands beside it.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise not_found(path, "a model's folder holds its tokenizer.json")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from None
        self.backend.no_truncation()  # these three are settings of whoever trained with the file
        self.backend.no_padding()
        if getattr(self.backend.model, "dropout", None):
            self.backend.model.dropout = None
        empty = self.backend.encode(".")  # with what stands before and behind every text
        self.begin = [id for id, added in takewhile(lambda pair: pair[1], zip(empty.ids, empty.special_tokens_mask))]
        self.vocab_size = 1 + max(self.backend.get_vocab().values(), default=-1)
        rows = self._json("config.json").get("vocab_size")
        if isinstance(rows, int) and rows < self.vocab_size:  # fewer tokens than rows are fine: Qwen pads its embedding
            raise ValueError(f"{path} has {self.vocab_size} tokens, but config.json's vocab_size is only {rows}")
        stops = self._stops()
        tokens = self._choose_style([self.backend.id_to_token(id) for id in stops])
        for token in tokens:
            if self.id(token) is None:
                raise ValueError(f"{path} has no token '{token}', which the {self.style} template needs")
        added = self.backend.get_added_tokens_decoder()
        self.special_ids = {id for id, token in added.items() if token.special or token.content in tokens}
        self.end_id = self.id(tokens[-1])  # closes every training response
        self.stop_ids = frozenset([self.end_id, *stops])  # any of these stops generation
        probes = [[("user", text), ("assistant", text), ("user", text)] for text in ("The sum is 42.", "42", "**a**")]
        whole = [self.backend.encode("".join(self.pieces(turns, False)), add_special_tokens=False) for turns in probes]

        # Text is text. The switch is for tokens known as special, and files flag some ('<tool_call>') as ordinary.
        self.backend.add_special_tokens([token.content for token in added.values()])
        self.backend.encode_special_tokens = True
        for turns, expected in zip(probes, whole):
            first = [*self.chat(turns[0][1]), *self.response(turns[1][1])]
            if self._ids(self.pieces(turns, False)) != expected.ids or first != expected.ids[: len(first)]:
                told = "a text has other tokens alone than in a conversation (as in many SentencePiece vocabularies)"
                raise ValueError(f"{path}: {told}, which is not supported: take another model")

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
        bos = _name(config.get("bos_token") or self._json("special_tokens_map.json").get("bos_token"))
        self.style, own = (family(template) or (None, None)) if template else (told_by_end, None)
        if self.style is None:
            known = "Llama 3, Llama 3.1, Llama 3.2, SmolLM2, Qwen2.5 or plain ChatML"
            raise ValueError(f"{self.folder} has an unknown chat_template: take one with that of {known}")
        if self.style == "plain":
            if not ends:
                raise ValueError(f"{self.folder}: no end token is known; name it as eos_token in tokenizer_config.json")
            begin = [bos] if bos else map(self.backend.id_to_token, self.begin)
            *begin, end = [Special(token) for token in (*begin, ends[0])]
            self.pieces = partial(plain, begin=begin, end=end)
            return [*begin, end]
        if self.style == "chatml":
            self.pieces = partial(chatml, system=own)
            return CHATML
        if template and bos != BEGIN:
            raise ValueError(f"{self.folder}: the chat_template begins with bos_token, which is {bos}, not {BEGIN}")
        if self.style == "llama3":
            self.pieces = partial(llama3, always=bool(template) and own is None)
        else:
            self.pieces = partial(llama3, date=config.get("date_string") or own)
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
        return [*self.begin, *self.encode(text)]

    def render(self, messages: list[dict[str, str]], generation_prompt: bool = True) -> list[int]:
        """A conversation [{"role": ..., "content": ...}, ...] as its chat template writes it.

        `generation_prompt` opens the assistant's turn. ValueError: no message, or a role other than system, user and
        assistant.
        """
        turns = [(message["role"], message["content"]) for message in messages]
        for role, _ in turns or [("nobody", "")]:
            if role not in ("system", "user", "assistant"):
                raise ValueError(f"a conversation has turns of system, user and assistant, not of '{role}'")
        return self._ids(self.pieces(turns, generation_prompt))

    def _ids(self, pieces: Iterable[str]) -> list[int]:
        """Neighbouring texts are encoded as one, since a token may span them."""
        ids = []
        for special, group in groupby(pieces, lambda piece: isinstance(piece, Special)):
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
        """Copy the tokenizer's files beside a model; generation_config.json names all tokens that stop it."""
        for path in (self.folder / name for name in FILES):
            if path.is_file():
                (Path(folder) / path.name).write_bytes(path.read_bytes())
        content = self._json("tokenizer.json")
        if content.get("truncation") or content.get("padding") or content["model"].get("dropout"):
            content |= {"truncation": None, "padding": None, "model": content["model"] | {"dropout": None}}
            write_json(Path(folder) / "tokenizer.json", content)
        generation = self._json("generation_config.json") | {"eos_token_id": sorted(self.stop_ids)}
        write_json(Path(folder) / "generation_config.json", generation)
