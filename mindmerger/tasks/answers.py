"""Parsers of the number in a model's answer: pure functions of strings."""

import itertools
import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

_MARKER = re.compile(r"the\s+(?:final\s+)?answer\s+is|####|\\boxed\s*\{", re.IGNORECASE)

# Alternatives in the order of trial; `'` stands for every separator other than comma and point.
_UNSIGNED = r"""
        (?<![\d.,])\d{1,3}(?:[ ]\d{3})+(?![.,]?\d)              # 1 234
      | (?<!\d,)\d{1,3}(?:,\d{2,3})*,\d{3}(?!,?\d)(?:\.\d+)?    # 1,234,567.8 and India's 1,23,456
      | \d{1,3}(?:\.\d{3})+,\d+                                 # 1.234,56
      | \d{1,3}(?:\.\d{3}){2,}                                  # 1.234.567
      | \d{1,3}(?:'\d{3})+(?:[.,]\d+)?                          # 1'234
      | (?<!\d,)\d+,\d+(?![,\d])                                # 1,5
      | \d+(?:\.\d+)?
      | (?<!\d)(?<!Rs)\.\d+                                     # $.50, but Rs.50 is 50
"""
_NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![\w)])(?<!\d\s)[-+])?
    (?:[$€£¥₹]\s?)?
    (?P<inner_sign>(?<=[$€£¥₹])-)?
    (?:
        (?:(?P<frac_whole>\d+)\s?)?\\[dt]?frac\s*\{{\s*(?P<frac_sign>-?)(?P<frac_top>\d+)\s*\}}\s*\{{\s*(?P<frac_bottom>\d+)\s*\}}
      | (?:(?P<whole>\d+)[ ]+)?(?P<top>\d+)\s?/\s?(?P<bottom>\d+)(?![\d/]|[.,]\d)
      | (?P<plain>{_UNSIGNED})
        (?:
            (?:[eE]|\s*(?:[*x×·]|\\times|\\cdot)\s*10\s*\^\s*\{{?)(?P<exponent>[-+]?\d+)
          | \s*\^\s*\{{?(?P<power>-?\d+)
          | \s*(?P<myriads>[万萬亿億])(?P<rest>\d{{1,4}}(?![\d.,千万萬]))?
        )?
    )
    """,
    re.VERBOSE,
)
# Longer numbers occur in no problem. The limit keeps a model's loop of digits from taking long or overflowing a float.
_LONGEST = 100

# Beginning of the prompt of `tasks/math.py`: a model without an eos continues with a next problem, which is cut off.
_NEXT_PROBLEM = re.compile(r"#\s*Instruction\b|Below is an instruction that describes a task", re.IGNORECASE)
# End of the prompt, which a model may repeat before or after its answer.
_RESPONSE = re.compile(r"#\s*Response\b", re.IGNORECASE)
# A remark after a number, as in `18 (x = 2)`.
_REMARK = re.compile(r"(?<=[\d%])\s+\([^()]*=[^()]*\)?")
_CLAUSE = r"(?:(?!\b(?:and|as|because|but|for|if|or|since|so|when|where|with)\b)[^,;:.!?(])*"
_EQUALS = r"(?:[-=]>|[=≈≅→⇒]|\\(?:approx|[rR]ightarrow)\b|\bequals?\b)"
# Text between two numbers of one equation.
_LINK = re.compile(
    rf"""
    \s*\(
  | {_CLAUSE}(?:[-*×·÷+/^]|\\(?:times|cdot|div)\b|\b(?:x|of|times|plus|minus|by|at)\b)[\s({{\\$*]*
  | {_CLAUSE}{_EQUALS}[\s({{\\$*]*(?:[a-z]+\s|[A-Z][A-Za-z]*\.?\s?)?  # about 18, USD 18, Rs. 18
    """,
    re.VERBOSE,
)
_MYRIADS = {"万": 4, "萬": 4, "亿": 8, "億": 8}
_GROUP_SEPARATORS = {"\u00a0", "\u2009", "\u202f", "'", "’", "٬"}
_MINUS_SIGNS = "−‐‑‒–﹣－"
# Not the comma, which separates clauses, nor parentheses.
_FULLWIDTH = str.maketrans("＝＋＊／＄", "=+*/$")


def parse_answer(text: str) -> Fraction | None:
    """Parse the number that `text` answers; None if it has no number.

    The result is the first number after the last marker (`The answer is`, `####`, `\\boxed{}`) that has a number on its
    line. Of an equation, `9 eggs * $2 = $18` or `18 = 9 * 2`, it is the last of the sides with the fewest numbers.
    Without a marker it is the last number of the text. A text is cut where the prompt of
    a next problem begins, and after an answer with a marker at a bare `### Response:`.

    Supported are signs, thousands and decimal separators, fractions, exponents, powers, currency signs, the digits of
    any script, 万 and 亿. `million` is not, since some problems ask for a number of millions. A single separator before
    exactly three digits is a thousands comma (`1,234`) or a decimal point (`1.234`), as in English text.
    """
    text = _normalise(_NEXT_PROBLEM.split(text, maxsplit=1)[0])
    for response in _RESPONSE.split(text):
        for marker in reversed(list(_MARKER.finditer(response))):
            claim = response[marker.end() :].lstrip(" :\t\n").split("\n", 1)[0]
            if marker.group().startswith("\\"):
                claim = _braced(response[marker.end() :])
            if (number := _claimed(claim)) is not None:
                return number
    numbers = [value for match in _NUMBER.finditer(text) if (value := _value(match)) is not None]
    return numbers[-1] if numbers else None


def parse_answer_published(text: str) -> Fraction:
    """Parse by the published parser, to compare with published figures: the last unsigned decimal number, or 0.

    A comma between two digits is removed as a thousands separator. A run of too many digits gives 0.
    """
    numbers = re.findall(r"\d+(?:\.\d+)?", re.sub(r"(\d),(\d)", r"\1\2", text))
    if not numbers or len(numbers[-1]) > _LONGEST:
        return Fraction(0)
    return Fraction(_ascii_digits(numbers[-1]))


def is_same_number(number: Fraction | None, gold: Fraction) -> bool:
    """True if `number` equals `gold` to a relative 1e-6; False for None."""
    return number is not None and abs(number - gold) <= abs(gold) / 10**6


PARSERS: dict[str, Callable[[str], Fraction | None]] = {"default": parse_answer, "published": parse_answer_published}


def _ascii_digits(text: str) -> str:
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)


def _normalise(text: str) -> str:
    """Convert digits, signs and separators of all scripts to ASCII, for one grammar."""
    characters = []
    for position, character in enumerate(_ascii_digits(text).translate(_FULLWIDTH)):
        if character in _MINUS_SIGNS:
            character = "-"
        elif character in _GROUP_SEPARATORS:
            character = "'"
        elif character == "٫":
            character = "."
        elif unicodedata.category(character) == "No" and "VULGAR FRACTION" in unicodedata.name(character):
            # `1½` and `1 ½` become the mixed number `1 1/2`; NFKC writes the fraction with U+2044.
            plain = unicodedata.normalize("NFKC", character).replace("⁄", "/")
            character = f" {plain}" if position and text[position - 1].isdecimal() else plain
        characters.append(character)
    text = re.sub(r"\\!|<<[^<>]*>>", "", "".join(characters))  # also GSM8K's `<<9*2=18>>`
    text = re.sub(r"(?:\\text)?\{,\}", ",", text)
    return re.sub(r"(?<=\d)\\[,;: ](?=\d)", "'", text).replace("\\$", "$")


def _claimed(claim: str) -> Fraction | None:
    """Parse the number after a marker; of an equation, the side that is a single number."""
    claim = _REMARK.sub("", claim)
    matches = [match for match in _NUMBER.finditer(claim) if _value(match) is not None]
    sides = [matches[:1]]
    for before, after in itertools.pairwise(matches):
        between = claim[before.end() : after.start() + len(after["sign"] or "")]
        if not _LINK.fullmatch(between):
            break
        if re.search(_EQUALS, between):
            sides.append([])
        sides[-1].append(after)
    return _value(min(reversed(sides), key=len)[0]) if matches else None


def _braced(text: str) -> str:
    """Cut `text`, which follows an opening brace, at its closing brace."""
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:position]
    return text


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match.group()) > _LONGEST:
        return None
    part = match.groupdict()
    negative = (part["sign"] or "").startswith("-") != bool(part["inner_sign"])
    if part["frac_top"]:
        if int(part["frac_bottom"]) == 0:
            return None
        value = Fraction(int(part["frac_top"]), int(part["frac_bottom"])) + int(part["frac_whole"] or 0)
        negative = negative != bool(part["frac_sign"])
    elif part["top"]:
        if int(part["bottom"]) == 0:
            return None
        value = Fraction(int(part["top"]), int(part["bottom"])) + int(part["whole"] or 0)
    else:
        value = _decimal(part["plain"])
        exponent, power = int(part["exponent"] or 0), int(part["power"] or 1)
        if abs(exponent) > _LONGEST or len(part["plain"]) * abs(power) > _LONGEST or (power < 0 and value == 0):
            return None
        exponent += _MYRIADS.get(part["myriads"], 0)
        value = value**power * Fraction(10) ** exponent + int(part["rest"] or 0)
    return -value if negative else value


def _decimal(digits: str) -> Fraction:
    """Value of a match of `_UNSIGNED`: the last separator is the decimal one unless it groups thousands."""
    separators = re.findall(r"[.,' ]", digits)
    if not separators:
        return Fraction(digits)
    last = separators[-1]
    whole, _, fraction = digits.rpartition(last)
    groups_thousands = (
        last in "' " or separators.count(last) > 1 or (last == "," and separators == [","] and len(fraction) == 3)
    )
    if groups_thousands:
        whole, fraction = whole + fraction, ""
    return Fraction(f"{re.sub(r'[^0-9]', '', whole) or 0}.{fraction or 0}")
