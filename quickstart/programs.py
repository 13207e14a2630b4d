"""A small world of Python functions: an English description; the function; asserts that grade any answer.

Code written by a model is never run: `evaluate` interprets a small subset of Python in its syntax tree.
"""

import ast
import operator
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from quickstart.world import Split

NAMES = ("score", "total", "price", "level", "count", "width", "speed", "value", "result", "amount", "weight", "points")
PARAMETERS = "abcdkmnpqrstuvwxyz"
# Expressions in English and in Python; {x} and {y} are parameters, {k} a constant, {inner} the inner expression.
INNER = (
    (("the sum of {x} and {y}", "{x} plus {y}"), "({x} + {y})"),
    (("the difference of {x} and {y}", "{x} minus {y}"), "({x} - {y})"),
    (("the product of {x} and {y}", "{x} multiplied by {y}"), "({x} * {y})"),
    (("the larger of {x} and {y}", "the maximum of {x} and {y}"), "({x} if {x} > {y} else {y})"),
    (("the smaller of {x} and {y}", "the minimum of {x} and {y}"), "({x} if {x} < {y} else {y})"),
)
OUTER = (
    (("plus {k}", "increased by {k}"), "{inner} + {k}"),
    (("minus {k}", "reduced by {k}"), "{inner} - {k}"),
    (("times {k}",), "{inner} * {k}"),
    (("divided by {k} and rounded down",), "{inner} // {k}"),
    (("modulo {k}",), "{inner} % {k}"),
)
# The same in other languages: sentence, expressions in the order of INNER and of OUTER, and the mark between them.
TRANSLATIONS = {
    "de": (
        "Schreibe {name}({x}, {y}), die {words} zurückgibt.",
        ("die Summe von {x} und {y}", "die Differenz von {x} und {y}", "das Produkt von {x} und {y}",
         "das Größere von {x} und {y}", "das Kleinere von {x} und {y}"),
        ("plus {k}", "minus {k}", "mal {k}", "geteilt durch {k} und abgerundet", "modulo {k}"),
        ", ",
    ),
    "es": (
        "Escribe {name}({x}, {y}), que devuelve {words}.",
        ("la suma de {x} y {y}", "la diferencia de {x} y {y}", "el producto de {x} y {y}", "el mayor de {x} y {y}",
         "el menor de {x} y {y}"),
        ("más {k}", "menos {k}", "por {k}", "dividido por {k} y redondeado hacia abajo", "módulo {k}"),
        ", ",
    ),
    "sw": (
        "Andika {name}({x}, {y}), inayorudisha {words}.",
        ("jumla ya {x} na {y}", "tofauti ya {x} na {y}", "zao la {x} na {y}", "kubwa kati ya {x} na {y}",
         "ndogo kati ya {x} na {y}"),
        ("jumlisha {k}", "toa {k}", "mara {k}", "gawanya kwa {k} na kushusha hadi namba nzima",
         "baki ya kugawanya kwa {k}"),
        ", ",
    ),
    "ru": (
        "Напиши {name}({x}, {y}), которая возвращает {words}.",
        ("сумму {x} и {y}", "разность {x} и {y}", "произведение {x} и {y}", "большее из {x} и {y}",
         "меньшее из {x} и {y}"),
        ("плюс {k}", "минус {k}", "умножить на {k}", "делить на {k} с округлением вниз", "по модулю {k}"),
        ", ",
    ),
    "zh": (
        "编写{name}({x}, {y})，返回{words}。",
        ("{x}与{y}的和", "{x}与{y}的差", "{x}与{y}的积", "{x}与{y}中较大的", "{x}与{y}中较小的"),
        ("加{k}", "减{k}", "乘以{k}", "除以{k}并向下取整", "模{k}"),
        "，",
    ),
}  # fmt: skip
CONSTANTS = range(11, 99)
ARGUMENTS = range(4000, 10000)  # so large that // gives different results for different constants

LONGEST_SOURCE = 300  # characters: no tree of so few is too deep for the walk below
LARGEST_VALUE = 10**12
LARGEST_EXPONENT = 12

OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


class Refused(Exception):
    """Raised for anything but a Python function of integers that returns one expression."""


@dataclass(frozen=True)
class Program:
    """A function to write.

    Attributes:
        question: its name and result, in English.
        solution: a right function.
        name: its name.
        calls: arguments for which every right function has the same results.
        translations: the question in the languages of TRANSLATIONS, by ISO code.
    """

    question: str
    solution: str
    name: str
    calls: tuple[tuple[int, ...], ...]
    translations: dict[str, str]

    @property
    def asserts(self) -> list[str]:
        """Calls and their results as assert statements."""
        return [f"assert {self.name}{call} == {evaluate(self.solution, self.name, call)}" for call in self.calls]

    def is_right(self, answer: str) -> bool:
        """True if the function that `answer` defines passes every assert."""
        try:
            return all(
                evaluate(answer, self.name, call) == evaluate(self.solution, self.name, call) for call in self.calls
            )
        except Refused:
            return False


def programs(split: Split, seed: int) -> Iterator[Program]:
    """An endless stream of programs of one set; an expression is in one set only, a tenth of all in dev and in test."""
    rng = random.Random(f"{split} {seed}")
    while True:
        chosen = (inner_words, inner), (outer_words, outer) = rng.choice(INNER), rng.choice(OUTER)
        x, y = rng.sample(PARAMETERS, 2)
        k = rng.choice(CONSTANTS)
        expression = outer.format(inner=inner, k=k).format(x=x, y=y)
        if {0: "dev", 1: "test"}.get(zlib.crc32(expression.encode()) % 10, "train") != split:
            continue
        name = rng.choice(NAMES)
        words = f"{rng.choice(inner_words)}, {rng.choice(outer_words)}".format(x=x, y=y, k=k)
        solution = f"def {name}({x}, {y}):\n    return {expression}"
        first, second, third = rng.sample(ARGUMENTS, 3)
        # Both orders of two arguments, so that "the first" does not pass for "the larger".
        calls = ((first, second), (second, first), (first, third))
        number = INNER.index(chosen[0]), OUTER.index(chosen[1])
        translations = {code: _translated(code, *number, name=name, x=x, y=y, k=k) for code in TRANSLATIONS}
        yield Program(f"Write {name}({x}, {y}), which returns {words}.", solution, name, calls, translations)


def _translated(code: str, inner: int, outer: int, **values: object) -> str:
    sentence, inners, outers, mark = TRANSLATIONS[code]
    return sentence.format(words=f"{inners[inner]}{mark}{outers[outer]}".format(**values), **values)


def evaluate(source: str, name: str, arguments: tuple[int, ...]) -> int:
    """Result of the function `name`, the only definition in `source`, for `arguments`. No code is run.

    Raises:
        Refused: `source` is anything but one function of that name and number of arguments, whose body returns one
            expression of integers, parameters, + - * // % **, comparisons and `a if b else c`; or it divides by zero,
            or a value is beyond `LARGEST_VALUE`, an exponent beyond `LARGEST_EXPONENT`.
    """
    if len(source) > LONGEST_SOURCE:
        raise Refused("too long")
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Refused("not Python") from error
    match body:
        case [ast.FunctionDef(args=ast.arguments(args=declared), body=[ast.Return(value=ast.expr() as result)])]:
            parameters = [parameter.arg for parameter in declared]
        case _:
            raise Refused("not one function that returns one expression")
    # Detects all else that a function may have: defaults, decorators, annotations.
    plain = f"def {name}({', '.join(parameters)}):\n    return {ast.unparse(result)}"
    if ast.unparse(body) != plain or len({*parameters}) != len(parameters) or len(parameters) != len(arguments):
        raise Refused(f"not a function {name} of {len(arguments)} plain arguments")
    return _value(result, dict(zip(parameters, arguments, strict=True)))


def _value(node: ast.expr, names: dict[str, int]) -> int:
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            pass
        case ast.Name(id=name) if name in names:
            value = names[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_value(operand, names)
        case ast.IfExp(test=test, body=first, orelse=second):
            value = _value(first if _value(test, names) else second, names)
        case ast.BinOp(left=left, op=sign, right=right) | ast.Compare(left=left, ops=[sign], comparators=[right]):
            value = _apply(sign, _value(left, names), _value(right, names))
        case _:
            raise Refused(f"{type(node).__name__} is not known here")
    if abs(value) > LARGEST_VALUE:
        raise Refused("too large a value")
    return value


def _apply(sign: ast.operator | ast.cmpop, left: int, right: int) -> int:
    if type(sign) not in OPERATORS:
        raise Refused(f"{type(sign).__name__} is not known here")
    if isinstance(sign, ast.FloorDiv | ast.Mod) and right == 0:
        raise Refused("division by zero")
    # A negative exponent gives a fraction, a large one a number that fills the memory.
    if isinstance(sign, ast.Pow) and not 0 <= right <= LARGEST_EXPONENT:
        raise Refused("exponent out of range")
    return OPERATORS[type(sign)](left, right)
