r"""The final answer in a text, in one spelling: one function for the vote, the reward and the score alike.

`extract_answer` reads it, strictly (an answer that is stated) or leniently (else the last one mentioned). Three kinds:
'number' (GSM8K), 'choice' (a letter, MMLU-Pro) and 'calculation', whose value is the answer (MAWPS).

    '... 3+4=7\n#### 7'  stated: 7      '12 of the 20 pens'     lenient: 20
    'The answer is (C)'  stated: C      'The answer is five.'   none
    '(3 + 4) * 2'        stated: 14     'so 3 + 4 = 8 pens'     lenient: 7

A wrong answer is worse than none: a number or letter that may be part of something else ('5 + x', 'C-14') is passed
over. The time is linear in the length of the text: a repetition in these patterns is bounded, or what may follow it
cannot be one more of it. The functions come first, then the patterns that they search for, each with what it matches.
"""

import ast
import operator
import re
from decimal import Decimal
from fractions import Fraction
from functools import partial
from itertools import product
from math import prod
from unicodedata import normalize


def extract_answer(text: str, kind: str, lenient: bool = False) -> str | None:
    """The final answer of a response in canonical form, or None.

    Strict: an answer that is stated ('#### 7', 'A: 7', 'the answer is (C)', '\\boxed{7}'). Lenient: that, else the
    last number or the last lone capital letter. Example: ('3+4=7\\n#### 1,007.', 'number') -> '1007'.
    Of the strongest mark the first statement counts that is not TAKEN_BACK within 100 characters. What is taken back
    counts if nothing that could be the answer follows it.
    """
    text = "\n" + _plain(without_thoughts(text))
    if kind == "calculation":
        return _calculated(text, lenient)
    stated, start = None, 0
    for form, mark in product(STATED[kind], MARKS):
        for found in mark.finditer(text, start):  # the first one counts, for a model may run on to a new question ...
            stated = _stated(text, found.end(), kind, form) or stated
            if stated and not TAKEN_BACK.search(text, stated.end(), stated.end() + 100):  # ... unless '7. Wait, ...'
                return canonical(stated["answer"], kind)
        start = stated.end() if stated else 0
    if stated and not MENTIONED[kind].search(text, stated.end()):
        return canonical(stated["answer"], kind)
    mentioned = [found["answer"] for found in MENTIONED[kind].finditer(text)] if lenient else []
    return canonical(mentioned[-1], kind) if mentioned else None


def _stated(text: str, place: int, kind: str, form: re.Pattern) -> re.Match | None:
    """The answer that begins at a place: the 8 of ' x = 5 + 3 = 8'."""
    place = LEAD.match(text, place).end()
    while kind == "number" and (left := LEFT.match(text, place)) and not NO_LEFT.search(left[0]):
        place = left.end()
    return form.match(text, place)


def _calculated(text: str, lenient: bool) -> str | None:
    """The value of a calculation: the 7 of '3 + 4' and of '3 + 4 = 8'. Lenient: else of the last one in the text."""
    text = TIMES.sub("*", text.replace("$", "").replace(",", ""))
    stated = CALCULATION.fullmatch(text.partition("=")[0].strip().rstrip("."))
    found = [stated] if stated else [run for run in CALCULATION.finditer(text) if lenient and CALCULATED.search(run[0])]
    values = [_value(run[0].strip()) for run in found if len(run[0]) <= LONGEST]
    return next((value for value in reversed(values) if value is not None), None)


def _value(calculation: str) -> str | None:
    """'(3 + 4) / 2' -> '3.5', without an error of rounding; None for '3 +' and '3 / 0'."""

    def of(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(ast.get_source_segment(calculation, node))  # not by way of a float
        if isinstance(node, ast.UnaryOp):
            return of(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
        return OPERATORS[type(node.op)](of(node.left), of(node.right))

    try:
        return canonical(str(of(ast.parse(calculation, mode="eval").body)), "number")
    except (SyntaxError, AttributeError, KeyError, ZeroDivisionError):  # '3 +', '3(4)', '3 ** 4', '3 / 0'
        return None


def canonical(text: str, kind: str) -> str | None:
    """One spelling per answer: ' $1,234.50' -> '1234.5', '4/8' -> '0.5', '(c)' -> 'C'. None if the text is no answer.

    Numbers are compared exactly: a fraction is reduced, and a decimal if it has an end: '2/6' -> '1/3'.
    """
    text = _plain(text).strip().rstrip(".")
    if kind == "choice":
        letter = text.strip("(). ").upper()
        return letter if re.fullmatch("[A-J]", letter) else None
    number = WHOLE_NUMBER.fullmatch(text)
    if not number or len(text) > LONGEST:
        return None
    parts = (number["decimal"] or number["mixed"], number["top"], number["bottom"])
    whole, top, bottom = (Fraction(re.sub("[,_' ]", "", part or "0")) for part in parts)
    if number["bottom"] and not bottom:
        return None
    value = whole * Fraction(10) ** int(number["power"] or 0) + top / (bottom or 1)
    scale = number["words"] or number["short"] or number["letter"] or ""
    value *= prod(SCALE[word] for word in scale.lower().split())
    value *= -1 if re.search("-|eg|in", number["sign"]) else 1  # -5, negative 5, minus 5
    places = value.denominator.bit_length()  # enough: a denominator of only 2s and 5s divides 10**places
    spelled = str(value)
    if value.denominator > 1 and 10**places % value.denominator == 0:
        spelled = format(Decimal(f"{value * 10**places}e-{places}"), "f").rstrip("0")  # Decimal(text) is exact
    return spelled if len(spelled) <= LONGEST else None


def is_correct(answer: str | None, gold: str | None, kind: str) -> bool:
    """Whether an extracted answer equals the gold one. No answer is never correct."""
    if answer is None or gold is None:
        return False
    return canonical(answer, kind) == canonical(gold, kind) is not None


def without_thoughts(text: str) -> str:
    """A response without what a reasoning model only thought, which is no answer, be the thought closed or not.

    Example: '<think>a</think>b' -> 'b', and 'a</think>b' too, for a template may open the thought; '<think>a' -> ''.
    """
    if not any(sign in text for sign in ("<", "[", "◁", "analysis")):  # to save time
        return text
    said, start, depth, thinking = [], 0, 0, False
    for i, tag in enumerate(TAG.finditer(text)):
        opening = bool(tag["opening"])
        if not thinking and (opening or (i > 0 and depth == 0)):  # else the text before a closing tag was thought
            said.append(text[start : tag.start()])
        depth = depth + 1 if opening else max(depth - 1, 0)
        start, thinking = tag.end(), opening
    return "\n".join(said if thinking else [*said, text[start:]])


def _plain(text: str) -> str:
    """Without what only decorates: '\\dfrac{3}{4}' -> '3/4', '1{,}000 \\text{ g}' -> '1,000 { g}'."""
    if not text.isascii():
        text = normalize("NFKC", VULGAR.sub(r" \g<0>", POWERS.sub(r"^\g<0>", text)))
    elif "\\" not in text and "{,}" not in text and "~" not in text:  # to save time
        return text
    return FRAC.sub(r" \1\2/\3\4", FANCY.sub(lambda fancy: PLAIN[fancy[1]], FONT.sub("", text)))


# ---- LaTeX and typography ------------------------------------------------------------------------------------------

verbose = partial(re.compile, flags=re.VERBOSE)  # a space in a pattern is written '\ '
FONT = re.compile(r"\\(?:text|math)(?!dollar)[a-z]*|\\(?:left|right|displaystyle)(?![a-z])|\\!")  # \text{ g}, 1,\!000
PLAIN = {  # as a keyboard writes it: 3 \times 4 -> 3 * 4, 1{,}000 -> 1,000, \$5 -> $5
    **dict.fromkeys("\N{MINUS SIGN} \N{EN DASH} \N{HYPHEN} {-}".split(), "-"),
    **dict.fromkeys(r"× · \times \cdot".split(), "*"),
    **dict.fromkeys("÷ \\div \N{FRACTION SLASH} \N{DIVISION SLASH}".split(), "/"),
    **dict.fromkeys(r"{,} ,\,".split(), ","),
    **dict.fromkeys([r"\ ", *r"~ \, \; \: \thinspace \medspace \enspace \quad".split()], " "),
    **dict.fromkeys(r"\$ {$} {\$} \textdollar".split(), "$"),
    **{r"\%": "%", r"\(": "(", r"\[": "[", "’": "'", r"\approx": "≈"},
}
FANCY = "|".join(re.escape(form) + "(?![a-z])" * form[-1].isalpha() for form in PLAIN)
FANCY = re.compile(rf"({FANCY})(?:(?<=[a-z])\ )?")  # a form of PLAIN; of '\div 4' the space belongs to it
DIGITS = r"(?:\d{1,3}(?:[,_'\ ]\d{3}){1,9}(?!\d)|\d{1,2}(?:,\d\d){1,9},\d{3}(?!\d)|\d+)"  # 1'234, 12,34,567, 1234
DECIMAL = rf"{DIGITS}(?:\.\d+)?"  # 1,234.50
FRAC_PART = rf"\s?(?:\{{\s?(-?{DECIMAL})\s?\}}|(\d))"  # { 12 }, 1
FRAC = re.compile(rf"\\[a-z]{{0,4}}frac{FRAC_PART}{FRAC_PART}")  # \frac12, \dfrac{ 1 }{2}, \cfrac{-1.5}{2}
POWERS, VULGAR = re.compile("[⁰¹²³⁴-⁹⁺⁻]+"), re.compile("[¼-¾⅐-⅞]")  # 10⁻³, 2½

# ---- a number --------------------------------------------------------------------------------------------------------

SCALE = {"hundred": 100, "thousand": 10**3, "lakh": 10**5, "million": 10**6, "crore": 10**7, "billion": 10**9}
SCALE |= {"trillion": 10**12}
LARGE = rf"(?i:{'|'.join(SCALE)})"  # million, Million
SCALE |= {"k": 10**3, "m": 10**6, "mn": 10**6, "b": 10**9, "bn": 10**9}
MONEY = r"(?:(?:[A-Z]{1,2}(?=\$))?[$€£¥\u20a0-\u20c0]\ ?|(?:Rs\.?|USD|EUR)\ )"  # $, US$, ₹, Rs.
SIGN = rf"(?:[+-]\ ?|(?:[Nn]egative|[Mm]inus|[Pp]ositive)\ )?(?:(?P<money>{MONEY})-?)?"  # -5, +$5, $-5, negative 5
UNIT = "(?:hour|hr|min|minute|sec|second|day|week|month|year|ft|yard|pound|lb|dollar)s?|feet|foot|kg|m"  # hours, kg
TERM = r"\ {0,2}[({$-]{0,3}(?:\d|\\(?:sqrt|frac|pi))"  # what is added or multiplied: (3, $3, \sqrt
WORD, END = r"[\ {]{1,3}", r"[}\ ]{1,3}"  # before a word and after it, also of LaTeX: 5 and 6, 5 { and } 6
NO_ANSWER = r"\W{0,3}\?|[)*$]{0,3}\ is\ (?:wrong|incorrect|not)|,?\ or,?\ rather"  # 5? 5 is wrong; 5, or rather 6
NUMBER_GOES_ON = [  # what makes a number part of something else
    r"[.,:/'`hx\ ]?\d|['X]\ \d|\ [:X]\ \d|_\{?\d",  # 12:30, 3,5, 5'10, 5h30, 5 6, 5 : 6, 11_2
    r",\ \d{3}\b|[eE][+-]?\d|[.\ ]?\\(?:over|bar|l?dot)",  # 1, 000; 1e400; 0.\overline{3}
    rf"[}}$]{{0,2}}{WORD}and{END}(?:\d|an?\b|one\b|\\boxed)|\ [a-z]{{1,20}}\ and\ \d",  # 5 and a half, 5 pens and 6
    rf"[,;]\ ?[-+]?[\d.]+\s?[,;)\]}}\\]|[$,;]{{0,2}}{WORD}(?:(?:and|or){END})?\$?[a-z]\ ?=",  # (5, 6); x = 5, y = 6
    rf"\ ?[-+*^/]{TERM}|\ ?[-+*^]\ ?[({{]*[b-hj-z]\b|\+|!\s?[}}$)]",  # 5+3, 5 + x, 5!
    r"\ ?(?:[inxyz]\b|pi\b|[π√∞≤≥±])|[abd-fj-kn-rt-z]\b|\ [<>]\ |\s?[=≈]",  # 5x, 5 i, 5 < x, 5 =
    r"\ ?\\(?:pi|sqrt|frac|log|ln|sin|cos|tan|le|ge|pm|p?mod|alpha|beta|theta|phi)|\ \(?mod\b",  # 5\pi, 5 mod 6
    rf"{WORD}(?:times|plus|minus|to|over|in|out\ of|(?:more|less)\ than){END}{TERM}",  # 5 times 6, 5 to 6
    r"\ (?:divided|multiplied|squared|cubed|factorial|sqrt|(?:half|third|(?:four|fif|six|eigh|ten)th)s?\b)",  # 5 sixths
    rf"(?:\ ?%|\ percent)\ of{TERM}|{WORD}(?:{UNIT})[,}}\ ]{{1,3}}\d|\ or\ (?:more|less)",  # 5% of 6; 5 hours 6 minutes
    rf"[-\ {{*$]{{0,4}}(?:{LARGE}|[kKMBT]\b|MM\b|(?i:[mbt]n|mi[lo]|mrd|cr|quadrillion|score)\b)",  # 5 thousandths, 5 K
]
NUMBER = rf"""
    (?P<sign> {SIGN} )
    (?: (?:(?P<mixed>\d+)\ {{1,3}}(?:and\ )?)?                                  # 1 3/4, 1 and 3/4
        (?P<top>{DECIMAL})\ ?/\ ?(?P<bottom>{DECIMAL})(?!\ of\ \$?\d)           # 3/4, 1,000 / 3
      | (?P<decimal>{DECIMAL}|\.\d+)                                            # 1,234.50, 0.5, .5
        (?: (?:[eE]\+?|\ ?[xX*]\ ?10(?:\^|\*\*)\{{?\+?) (?P<power>-?\d{{1,2}})\b\}}? )? )  # 2.5e3, 2.5 * 10^{{3}}
    (?: [\ {{*$]{{0,4}}(?P<words>{LARGE}(?:\ {LARGE})?)s?\b(?!-|\ and\ [a-z])     # 3 Million, 2 hundred thousand
      | (?(money)\ ?(?P<short>[kKmMbB]n?)|(?P<letter>[kKMB]))\b(?!\$) )?        # $1.5m, $4 bn, 20K
    (?! {NO_ANSWER}|{"|".join(NUMBER_GOES_ON)} )
"""
WHOLE_NUMBER = verbose(f"{NUMBER}%?")  # all of a text: $1,234.50, 5%
LONGEST = 300  # more digits than that are noise

# ---- a calculation ---------------------------------------------------------------------------------------------------

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
CALCULATION = re.compile(r"(?:[-+*/()\d ]|\.\d)+")  # (3 + 4) / 2, 7
CALCULATED = re.compile(r"\d[) ]{0,9}[-+*/]")  # something is, in it
TIMES = re.compile(r"(?<=[\d) ])x(?=[\d( ])")  # of 3 x 4

# ---- a letter --------------------------------------------------------------------------------------------------------

OTHER = r"\(?[A-HJ]\b(?!\)?\ (?!and\b|are\b|both\b)\w)"  # the B of 'A and B', not of 'A and B is wrong'
LETTER_GOES_ON = [  # what makes a letter part of something else
    r"[(\[\#^/|%]|_\{?\w|'[a-z]|[-*]\w|[.:][\dA-J]\b|\\[A-Z]|\ -\ [A-J]\b|\ \*\ ?\w|>\ ?\w|\ \d",  # A(x), A_1, A's, A-1
    r"\.\ ?(?:[A-Z]\.|[A-Z][a-z]+(?:'s|,\ who))",  # J. S. Bach; A. Smith, who
    r"\ ?[=≈≠&|+∪∩⊂∈∧∨⊕⊗→⇒]|\ [<>]|<[A-Z]|\ ?->",  # E = mc^2, A + B
    r"\ ?\\(?:cup|cap|subset|in|to|rightarrow|neq|leq?|geq?|wedge|vee|land|lor|oplus|otimes)\b",  # A \cup B
    r"(?:,\ ?[A-J]){1,9}(?:[.}\n]|\Z)|,\ ?[A-J]\)",  # A, B, C; (A, B); the official graders read '(A, B, C)' as A
    rf"(?:,\ [A-J]){{0,9}}[,}}$]{{0,2}}{WORD}(?:and|or|&){END}(?:\\boxed\{{)?{OTHER}",  # A, B and D
    r"(?<=A)[).:]\ [^\n]{1,200}\n\W{0,4}B[).:]",  # A. Paris\nB. Rome
    r"\ (?!(?:is|as|and|or|in|for|due|because|since|with|by|which|that)\b)[a-z]|(?<=I)'",  # A bird; I'm sure
]
LETTER = rf"[A-J]\b(?!{NO_ANSWER}|{'|'.join(LETTER_GOES_ON)})"  # C, but not the C of C-14
SMALL_LETTER = r"[a-j](?=\))(?!\)[^\n]{0,60}\([a-z]{1,4}\)(?!\ (?:is|was)))"  # (c), not (a) of '(a) 5 and (b) 6'

# ---- what was only thought -------------------------------------------------------------------------------------------

THOUGHT = "(?i:think(?:ing)?|thoughts?|reason(?:ing)?|analysis|scratchpad)"  # think, Thinking
OPENING_TAG = (  # DeepSeek, Qwen, Seed, Sky-T1, Command A; Kimi; Magistral; gpt-oss, also without its special tokens
    rf"<\|?(?:seed:)?(?i:begin_of_|start_)?{THOUGHT}(?:\s[^<>\n]{{0,99}})?\|?>"
    r"|◁think▷|\[THINK\]|<\|channel\|>(?!final)|\Aanalysis(?=[A-Z])"
)
CLOSING_TAG = (  # of the same, </think> and its like
    rf"</(?:seed:)?{THOUGHT}>|<\|(?i:end_of_|end_|/){THOUGHT}\|>"
    r"|◁/think▷|\[/THINK\]|<\|channel\|>final|assistantfinal"
)
TAG = re.compile(f"(?P<opening>{OPENING_TAG})|{CLOSING_TAG}")

# ---- how an answer is stated -----------------------------------------------------------------------------------------

ANSWER = "answer|Answer|ANSWER"
NO_LIST = r"(?!\**\s*\d+[.)]\ +[*\w]|\**\ *\n\s*[-*]\ )"  # '#### 1. Add' is a heading, 'Answer:\n1. Add' a list
NO_TITLE = r"(?!\W{0,5}[A-J]\b[^\w\n<=]*\w)"  # '#### A. Add the eggs' is a heading too
TOTAL = r"(?:[^<\n\d]{0,60}\bis\b)?"  # <answer>The total is 5</answer>
FINAL = rf"\n[#*_\ ]*(?:Answer|ANSWER|Result|[Ff]inal\ (?:{ANSWER}|[Rr]esult))[*_\ ]*"  # a line's: ## Final Answer
MARKS = [  # the strongest first: a form that was asked for, 'the answer is 7', a label, a heading over a short line
    verbose(rf"\#\#\#\#{NO_LIST}{NO_TITLE}|\\boxed\s?\{{|<answer>{TOTAL}|<ANSWER>{TOTAL}"),  # #### 7, \boxed{7}
    verbose(rf"(?:{ANSWER}|correct\ option|correct\ choice)\**(?:\ to\ [^.\n]{{1,80}}?)?\ (?:is|IS)(?=\W|n't)"),
    verbose(rf"(?:{ANSWER}|\n[\ *]*A|{FINAL})[*_]*:{NO_LIST}"),  # A: 7, **Answer**: 7
    verbose(rf"{FINAL}(?:\ [=-](?=\ )|(?=\n\s*[^\n]{{1,30}}(?:\n|\Z))){NO_LIST}"),  # Result = 7, ## Final Answer\n7
]
OPENING = r"""(?:[\s*_:"'`(\[{]|<(?=\w+>)|\$(?!\ ?[-+]?[\d.]))*"""  # bold, quotes, brackets; not the '$' of $5
NOT_BUT = r"(?:\ not|n't|\ no\ longer)\ [^\n;]{1,40}?\b(?:but|[Ii]t(?:'s|\ is))\b"  # is not 5 but
HEDGE = "about|approximately|around|roughly|exactly|only|actually|just|simply|therefore|thus|now|option|choice"
# what may stand between a mark and the answer: the ' not 5 but' of 'is not 5 but 7', ': about'
LEAD = verbose(rf"(?:\s?\}})?(?:{NOT_BUT})?(?:[\s*_:]*(?:{HEDGE})\b){{0,2}}")
LEFT = verbose(r"[\s*:]{0,9}[^\n=≈;:?\#<>]{1,100}(?:[=≈]|\bequals\b)")  # a left side: 'x =', '5 + 3 =' before 8
JOINS = "since|because|as|if|when|where|while|so|thus|which|that|then|but|or|not|is|was|are|has|had"
NO_LEFT = verbose(rf"""  # no left side, though an = follows
    \b(?:{JOINS})\b | [.,](?!\d) | !\ *[a-zA-Z] | \band\ (?!\$?\d)           # 7, since n =
  | [\w)}}]\ *[({{][^)}}]*$ | ^[^({{]*[)}}]                                      # 7 (n =
  | [-+*/^|]\ ?[a-z]\b | \b[xyzn]\ ?[-+*/^] | \d[xyzn]\b                      # 5 + x =, x + 5 =, 5x =
  | \\[a-z]+(?![a-z])\ ?\{{?[a-z]\b                                             # \sin x =
  | \d[^=]*\ [a-z]\ ?=$                                                          # 7 for n =
""")
TAKEN_BACK = verbose(r"""
    (?:Wait|Actually|actually|Sorry|sorry|Correction|correction|Mistake|mistake|Oops|oops|Hold\ on|hold\ on)\b
  | wait[,.!:] | [Nn]o[,.:!]\ | rather, | I\ mean | (?:cratch|trike)\ that | second\ thought | polog(?:i[sz]e|ies)
  | (?:[Tt]his|[Tt]hat|[Ii]t|which)(?:'s|\ is|\ was)\ (?:wrong|incorrect) | made\ an\ error
  | (?:not|isn't|can't\ be|cannot\ be)\ (?:right|correct) | [Ll]et\ me\ (?:re|double|correct)
  | (?:[Bb]ut|However)\b[^.\n]{0,90}\banswer\ is                              # but he ate 2, so the answer is 3
""")
STATED = {  # after a mark and LEAD: **7, (C), c)
    "number": [verbose(f"{OPENING}(?P<answer>{NUMBER})")],
    "choice": [verbose(f"{OPENING}(?P<answer>{letter})") for letter in (LETTER, SMALL_LETTER)],
}
NO_PART = r"(?<![\w)^]) (?<!\d[.,:/']) (?<!\d\ (?=minus)) (?!-\ (?!\d+/))"  # of a word or time; no minus in '- 7 pens'
MENTIONED = {  # the last of these counts: the 5 of '5 pens' but not of '5th', C
    "number": verbose(rf"{NO_PART}(?P<answer>{NUMBER})(?!(?:st|nd|rd|th)\b)"),
    "choice": verbose(r"(?P<answer>[A-J])(?<!\w.)(?<![A-J],\ .)\b(?!,\ [A-J]\))"),  # none of (A, B)
}
