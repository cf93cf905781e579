"""Chat templates, written out by hand, and whose template a model's folder has.

A chat template is a small Jinja program that pastes special tokens and what people wrote into one string, which is then
tokenised: a user who types '<|eot_id|>' ends the turn. Here a template yields pieces, and no piece but those marked
`Special` can become a special token. The program itself is never run: it is read, and compared with those known.
"""

import re
from collections.abc import Iterator

Turns = list[tuple[str, str]]  # (role, text)


class Special(str):
    """The name of a special token, as a template writes it."""


LLAMA3 = BEGIN, START, STOP, EOT = [
    Special(f"<|{name}|>") for name in ("begin_of_text", "start_header_id", "end_header_id", "eot_id")
]
CHATML = IM_START, IM_END = [Special("<|im_start|>"), Special("<|im_end|>")]


def llama3(turns: Turns, opened: bool, date: str | None = None, always: bool = False) -> Iterator[str]:
    """Llama 3, whose first version opens a turn always; with a date Llama 3.1 and 3.2, whose first turn is the system's
    and begins with two dates. `opened` adds the opening of the assistant's turn, in all of them.
    """
    turns = [(role, text.strip()) for role, text in turns]
    if date is not None:
        system = turns.pop(0)[1] if turns[0][0] == "system" else ""
        turns.insert(0, ("system", f"Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n{system}"))
    yield BEGIN
    for role, text in turns:
        yield from (START, role, STOP, "\n\n", text, EOT)
    if opened or always:
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


# ---- whose template a folder has -------------------------------------------------------------------------------------

STRING = r"""'(?:\\[\s\S]|[^'\\])*'|"(?:\\[\s\S]|[^"\\])*\""""
TAG = re.compile(rf"""\{{#.*?#\}}|\{{[{{%](?:{STRING}|[^'"{{]|\{{(?![{{%#]))*?[%}}]\}}""", re.DOTALL)


def skeleton(template: str) -> str:
    """What a Jinja template does, without what changes nothing, such as quotes and the white space that Jinja drops:
    the texts that it writes as they are, what else it writes in ⟨⟩, statements in ⟦⟧.

    Example: "{% if a %}\\n{{ 'It is ' + b['c'] }}{% endif %}" -> "⟦if a⟧It is ⟨b.c⟩⟦endif⟧".
    """
    text = re.sub(r"\r\n?", "\n", template).removesuffix("\n")
    text = re.sub(r"(?m)^[ \t]+(?=\{[%#])", "", text)  # lstrip_blocks, which transformers sets
    text = re.sub(r"(?<=[%#]\})\n", "", text)  # trim_blocks
    text = re.sub(r"\s+(?=\{[{%#]-)|(?<=-[}%#]\})\s+", "", text)
    text = TAG.sub(_tag, text)
    for name in re.findall(r"⟦for (\w+) in messages⟧", text):  # whatever its name is
        text = re.sub(rf"(?<=⟦for ){name}\b|\b{name}(?=\.(?:role|content)\b)", "message", text)
    return text


def _tag(tag: re.Match) -> str:
    body = re.sub(r"^-?\s*|\s*-?$", "", tag[0][2:-2])
    body = re.sub(r"""\[(['"])(\w+)\1\]""", r".\2", body)  # message['role'] is message.role
    name, _, value = body.partition("=")
    if tag[0][1] == "%":
        return f"⟦{name.strip()}={_written(value)}⟧" if name.startswith("set ") else f"⟦{_code(body)}⟧"
    return _written(body) if tag[0][1] == "{" else ""  # of a comment


def _written(expression: str) -> str:
    found = ""
    for part in re.split(f"({STRING})", expression):
        if part[:1] in ("'", '"'):
            found += part[1:-1].encode("ascii", "backslashreplace").decode("unicode_escape")  # as Jinja reads it
        elif code := _code(part).strip("+~"):
            found += f"⟨{code}⟩"
    return found


def _code(text: str) -> str:
    """Without white space that changes nothing, and with one kind of quotes."""
    short = lambda part: part[1].replace('"', "'") if part[1] else part[2] or " "
    return re.sub(rf"({STRING})|\s*([^\w\s'\"])\s*|\s+", short, text.strip())


UNUSED = ""  # what may stand in a branch that no conversation takes: anything, with ifs that are closed
for _ in range(4):
    UNUSED = rf"(?:(?!⟦(?:if|el|endif)).|⟦if\b[^⟧]*⟧{UNUSED}(?:⟦el[^⟧]*⟧{UNUSED})*⟦endif⟧)*"
TEXT = r"((?:(?!<\|)[^⟦⟨])*)"
PARTS = {  # what the skeletons below leave open
    "⟪unused⟫": UNUSED,
    "⟪text⟫": TEXT,
    "⟪system⟫": r"(?:⟦if loop.first and messages\[0\].role!='system'⟧"
    rf"<\|im_start\|>system\n{TEXT}<\|im_end\|>\n⟦endif⟧)?",
    "⟪date⟫": r"(?:⟦if strftime_now is defined⟧⟦set date_string=[^⟦⟧]*⟧⟦else⟧)?"
    rf"⟦set date_string={TEXT}⟧(?:⟦endif⟧)?",
    "⟪tools⟫": r"(?:⟦if not \w*tools\w* is defined⟧⟦set \w+=⟨\w+⟩⟧⟦endif⟧"
    rf"|⟦if (?!not|tools is none)[^⟧]*tool[^⟧]*⟧{UNUSED}⟦endif⟧)*",
    "⟪if asked⟫": r"(⟦if add_generation_prompt⟧)?",
    "⟪end⟫": r"(?:⟦endif⟧)?",
    "⟪unless tools⟫": r"(?:⟦if not\(message.role=='ipython' or message.role=='tool' or 'tool_calls' in message\)⟧)?",
    "⟪no calls⟫": r"(?: and not message.tool_calls)?",
    "⟪calls⟫": rf"(?:⟦elif[^⟧]*⟧{UNUSED})*(?:⟦endif⟧)?",
}
LOOP, LAST = "⟦for message in messages⟧", "⟦endfor⟧⟦if add_generation_prompt⟧{}⟦endif⟧"
LLAMA3_TURN = f"{START}⟨message.role⟩{STOP}\n\n⟨message.content|trim⟩{EOT}"
LLAMA3_LAST = f"⟦endfor⟧⟪if asked⟫{START}assistant{STOP}\n\n⟪end⟫"
CHATML_TURN = f"{IM_START}⟨message.role⟩\n⟨message.content⟩{IM_END}\n"
CHATML_LAST = LAST.format(f"{IM_START}assistant\n")
USER, ASSISTANT, SYSTEM = (f"{IM_START}{role}\n⟨message.content⟩{IM_END}\n" for role in ("user", "assistant", "system"))
KNOWN = {  # style: skeletons of published templates
    "llama3": (
        f"⟨bos_token⟩{LOOP}{LLAMA3_TURN}{LLAMA3_LAST}",
        f"⟦set loop_messages=⟨messages⟩⟧⟦for message in loop_messages⟧⟦set content={LLAMA3_TURN}⟧"
        f"⟦if loop.index0==0⟧⟦set content=⟨bos_token+content⟩⟧⟦endif⟧⟨content⟩{LLAMA3_LAST}",
    ),
    "llama3.1": (  # and 3.2, 3.3
        "⟨bos_token⟩⟪tools⟫⟦if not date_string is defined⟧⟪date⟫⟦endif⟧⟪tools⟫"
        "⟦if messages[0].role=='system'⟧⟦set system_message=⟨messages[0].content|trim⟩⟧⟦set messages=⟨messages[1:]⟩⟧"
        f"⟦else⟧⟦set system_message=⟧⟦endif⟧{START}system{STOP}\n\n⟪tools⟫Cutting Knowledge Date: December 2023\n"
        f"Today Date: ⟨date_string⟩\n\n⟪tools⟫⟨system_message⟩{EOT}⟪tools⟫"
        f"{LOOP}⟪unless tools⟫{LLAMA3_TURN}⟪calls⟫" + LAST.format(f"{START}assistant{STOP}\n\n"),
    ),
    "chatml": (
        f"{LOOP}⟪system⟫{CHATML_TURN}{CHATML_LAST}",  # with a system turn of its own SmolLM2, Qwen2
        f"{LOOP}⟦if message.role=='user'⟧{USER}⟦elif message.role=='assistant'⟧{ASSISTANT}⟦else⟧{SYSTEM}⟦endif⟧"
        f"{CHATML_LAST}",
        "⟦if tools⟧⟪unused⟫⟦else⟧⟦if messages[0].role=='system'⟧"  # Qwen2.5
        f"{IM_START}system\n⟨messages[0].content⟩{IM_END}\n⟦else⟧{IM_START}system\n⟪text⟫{IM_END}\n⟦endif⟧⟦endif⟧"
        f"{LOOP}⟦if(message.role=='user')or(message.role=='system' and not loop.first)or(message.role=='assistant'"
        f"⟪no calls⟫)⟧{CHATML_TURN}⟪calls⟫{CHATML_LAST}",
    ),
}
LONGEST = 20_000  # characters of a template; those known have less than 5,000
PREAMBLE = "⟦if not add_generation_prompt is defined⟧⟦set add_generation_prompt=⟨false⟩⟧⟦endif⟧"


def family(template: object) -> tuple[str, str | None] | None:
    """'llama3', 'llama3.1' or 'chatml', and what the template has of its own: an opening that is asked for, a date, a
    system turn.

    None: nobody's whom we know. One that is nearly right is worse than a refusal.
    """
    if not isinstance(template, str) or len(template) > LONGEST:
        return None
    try:
        found = skeleton(template).removeprefix(PREAMBLE)
    except UnicodeError:  # a string in it is none
        return None
    for style, known in ((style, known) for style, skeletons in KNOWN.items() for known in skeletons):
        pattern = re.sub("⟪.*?⟫", lambda part: PARTS[part[0]], re.escape(known).replace(r"\ ", " "))
        if match := re.fullmatch(pattern, found, re.DOTALL):
            return style, next(iter(match.groups()), None)
    return None
