"""Text to token ids and back: a model folder's tokenizer.json and its chat template, written out by hand."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import tokenizers


class Tokenizer:
    """A Hugging Face folder's tokenizer.json with its chat template, the template being written out by hand.

    Special tokens come from the template alone: a '<|eot_id|>' inside a question is encoded as plain text.
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
        self.backend.encode_special_tokens = True  # text is text
        self.config = self._json("tokenizer_config.json") | self._json("generation_config.json")
        self.vocab_size = self.backend.get_vocab_size(with_added_tokens=True)
        if self.id("<|start_header_id|>") is not None:
            self.style, end = "llama3", "<|eot_id|>"
        elif self.id("<|im_start|>") is not None:
            self.style, end = "chatml", "<|im_end|>"
        else:
            self.style, end = "plain", self.config.get("eos_token", "</s>")
        end = end["content"] if isinstance(end, dict) else end
        if self.id(end) is None:
            raise ValueError(f"{path}: no end token '{end}' in the vocabulary")
        self.end_id = self.id(end)  # closes every training response
        listed = self.config.get("eos_token_id")
        listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
        self.stop_ids = frozenset([self.end_id, *listed])  # any of these stops generation

    def _json(self, name: str) -> dict:
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Plain text to ids, no special token among them."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; special tokens are left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def chat(self, user: str) -> list[int]:
        """One user turn and the opening of the assistant's: what every stage shows the model."""
        if self.style == "llama3":
            start, stop = self.id("<|start_header_id|>"), self.id("<|end_header_id|>")

            def header(role: str) -> list[int]:
                return [start, *self.encode(role), stop, *self.encode("\n\n")]

            return [
                self.id("<|begin_of_text|>"),
                *header("user"),
                *self.encode(user.strip()),
                self.end_id,
                *header("assistant"),
            ]
        if self.style == "chatml":
            start = self.id("<|im_start|>")
            # a template may put its own system turn first; its words stand in the template's text
            file = self.folder / "chat_template.jinja"  # where transformers 5 puts it
            template = file.read_text(encoding="utf-8") if file.is_file() else self.config.get("chat_template") or ""
            system = re.search(r"""<\|im_start\|>system\\n([^'"]*)<\|im_end\|>""", template)
            turns = [("system", system.group(1))] if system else []
            ids = []
            for role, text in [*turns, ("user", user)]:
                ids += [start, *self.encode(f"{role}\n{text}"), self.end_id, *self.encode("\n")]
            return [*ids, start, *self.encode("assistant\n")]
        bos = self.config.get("bos_token") or "<s>"
        bos = self.id(bos["content"] if isinstance(bos, dict) else bos)
        return [*([] if bos is None else [bos]), *self.encode(user + "\n")]

    def response(self, text: str) -> list[int]:
        """A response as it is trained on and scored: its text and the end token."""
        return [*self.encode(text), self.end_id]

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files beside a model."""
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
            if (self.folder / name).is_file():
                (Path(folder) / name).write_bytes((self.folder / name).read_bytes())
