"""A small world of word problems in six languages, in the published data layout: `python -m quickstart.world FOLDER`.

One template is one story, told in every language; names, objects and numbers fill it. All numbers and results are from
1 to 99, and every solution is in English, step by step.
"""

import argparse
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.io import atomic_folder, write_json, write_text
from mindmerger.tasks import LANGUAGES

WORLD_LANGUAGES = tuple(LANGUAGES[name] for name in ("German", "Spanish", "Swahili", "Russian", "Chinese", "English"))

Split = Literal["train", "dev", "test"]


@dataclass(frozen=True)
class Name:
    """A person. Russian declines names: nominative, genitive, dative."""

    latin: str
    ru: tuple[str, str, str]
    zh: str


@dataclass(frozen=True)
class Noun:
    """A countable noun, with its forms after numbers in each language.

    Attributes:
        en, de: plural.
        es: plural and "how many", which agrees with its gender.
        sw: plural and "how many", which agrees with its noun class.
        ru: after 1, after 2 to 4, after 5 and more; nominative and accusative alike.
        zh: measure word and noun.
    """

    en: str
    de: str
    es: tuple[str, str]
    sw: tuple[str, str]
    ru: tuple[str, str, str]
    zh: tuple[str, str]


NAMES = (
    Name("Anna", ("Анна", "Анны", "Анне"), "安娜"),
    Name("Maria", ("Мария", "Марии", "Марии"), "玛丽亚"),
    Name("Laura", ("Лаура", "Лауры", "Лауре"), "劳拉"),
    Name("Nina", ("Нина", "Нины", "Нине"), "尼娜"),
    Name("Sara", ("Сара", "Сары", "Саре"), "萨拉"),
    Name("Tom", ("Том", "Тома", "Тому"), "汤姆"),
    Name("Peter", ("Пётр", "Петра", "Петру"), "彼得"),
    Name("Omar", ("Омар", "Омара", "Омару"), "奥马尔"),
    Name("David", ("Давид", "Давида", "Давиду"), "大卫"),
    Name("Ivan", ("Иван", "Ивана", "Ивану"), "伊万"),
)
NOUNS = (
    Noun(
        "apples",
        "Äpfel",
        ("manzanas", "cuántas"),
        ("matufaa", "mangapi"),
        ("яблоко", "яблока", "яблок"),
        ("个", "苹果"),
    ),
    Noun(
        "pencils",
        "Bleistifte",
        ("lápices", "cuántos"),
        ("penseli", "ngapi"),
        ("карандаш", "карандаша", "карандашей"),
        ("支", "铅笔"),
    ),
    Noun(
        "tickets",
        "Karten",
        ("boletos", "cuántos"),
        ("tiketi", "ngapi"),
        ("билет", "билета", "билетов"),
        ("张", "票"),
    ),
    Noun("eggs", "Eier", ("huevos", "cuántos"), ("mayai", "mangapi"), ("яйцо", "яйца", "яиц"), ("个", "鸡蛋")),
    Noun(
        "flowers",
        "Blumen",
        ("flores", "cuántas"),
        ("maua", "mangapi"),
        ("цветок", "цветка", "цветов"),
        ("朵", "花"),
    ),
    Noun("balls", "Bälle", ("pelotas", "cuántas"), ("mipira", "mingapi"), ("мяч", "мяча", "мячей"), ("个", "球")),
    Noun(
        "oranges",
        "Orangen",
        ("naranjas", "cuántas"),
        ("machungwa", "mangapi"),
        ("апельсин", "апельсина", "апельсинов"),
        ("个", "橙子"),
    ),
    Noun("keys", "Schlüssel", ("llaves", "cuántas"), ("funguo", "ngapi"), ("ключ", "ключа", "ключей"), ("把", "钥匙")),
    Noun(
        "bananas",
        "Bananen",
        ("plátanos", "cuántos"),
        ("ndizi", "ngapi"),
        ("банан", "банана", "бананов"),
        ("根", "香蕉"),
    ),
    Noun(
        "cups",
        "Becher",
        ("vasos", "cuántos"),
        ("vikombe", "vingapi"),
        ("стакан", "стакана", "стаканов"),
        ("个", "杯子"),
    ),
)
DOLLARS = Noun(
    "dollars",
    "Dollar",
    ("dólares", "cuántos"),
    ("dola", "ngapi"),
    ("доллар", "доллара", "долларов"),
    ("", "美元"),
)


@dataclass(frozen=True)
class Template:
    """One story.

    Placeholders: {N} and {M} are people, with {N_gen} and {N_dat} in Russian; {a}, {b}, {c} numbers; {a_O} that many
    of the object, {a_D} that many dollars; {a_C} number and measure word in Chinese; {C} the measure word alone;
    {Q} "how many" of the object, {D} how many dollars, {O} the object after another word for "how many".

    Attributes:
        texts: the story by language code.
        steps: the computation, as (left, operator, right); `x` stands for the result of the step before.
        ranges: the numbers from which each of a, b and c is drawn.
    """

    texts: dict[str, str]
    steps: tuple[tuple[str, str, str], ...]
    ranges: dict[str, tuple[int, int]]


_ANY, _FEW, _SOME = (2, 97), (2, 9), (2, 20)


def _template(steps: str, ranges: str, **texts: str) -> Template:
    """Create a template; `steps` as in "a + b, x - c", `ranges` as in "any any few"."""
    named = {"any": _ANY, "few": _FEW, "some": _SOME, "times": (2, 4)}
    return Template(
        texts,
        tuple(tuple(step.split()) for step in steps.split(", ")),
        {number: named[word] for number, word in zip("abc", ranges.split(), strict=False)},
    )


TEMPLATES = (
    _template(
        "a + b",
        "any any",
        en="{N} has {a_O}. {N} buys {b} more. {Q} does {N} have now?",
        de="{N} hat {a_O}. {N} kauft {b} weitere. {Q} hat {N} jetzt?",
        es="{N} tiene {a_O}. {N} compra {b} más. ¿{Q} tiene {N} ahora?",
        sw="{N} ana {a_O}. {N} ananunua {b} zaidi. {N} ana {Q} sasa?",
        ru="У {N_gen} {a_O}. {N} покупает ещё {b}. {Q} теперь у {N_gen}?",
        zh="{N}有{a_O}。{N}又买了{b_C}。{N}现在有{Q}？",
    ),
    _template(
        "a - b",
        "any any",
        en="{N} has {a_O} and gives {b} of them to {M}. {Q} does {N} have left?",
        de="{N} hat {a_O} und gibt {M} {b} davon. {Q} hat {N} noch?",
        es="{N} tiene {a_O} y le da {b} a {M}. ¿{Q} le quedan a {N}?",
        sw="{N} ana {a_O} na anampa {M} {b}. {N} amebaki na {Q}?",
        ru="У {N_gen} {a_O}. {N} отдаёт {M_dat} {b}. {Q} осталось у {N_gen}?",
        zh="{N}有{a_O}，给了{M}{b_C}。{N}还剩{Q}？",
    ),
    _template(
        "a * b",
        "some some",
        en="There are {a} boxes. Each box holds {b_O}. {Q} are there in all?",
        de="Es gibt {a} Kisten. In jeder Kiste sind {b_O}. {Q} sind es insgesamt?",
        es="Hay {a} cajas. En cada caja hay {b_O}. ¿{Q} hay en total?",
        sw="Kuna masanduku {a}. Kila sanduku lina {b_O}. Kuna {Q} kwa jumla?",
        ru="Всего ящиков {a}. В каждом ящике {b_O}. {Q} во всех ящиках?",
        zh="有{a}个箱子，每个箱子里有{b_O}。一共有{Q}？",
    ),
    _template(
        "a / b",
        "any few",
        en="{N} shares {a_O} equally among {b} children. {Q} does each child get?",
        de="{N} verteilt {a_O} gleichmäßig an {b} Kinder. {Q} bekommt jedes Kind?",
        es="{N} reparte {a_O} por igual entre {b} niños. ¿{Q} recibe cada niño?",
        sw="{N} anagawa {a_O} sawasawa kwa watoto {b}. Kila mtoto anapata {Q}?",
        ru="{N} делит {a_O} поровну между {b} детьми. {Q} получает каждый?",
        zh="{N}把{a_O}平均分给{b}个孩子。每个孩子得到{Q}？",
    ),
    _template(
        "a - b",
        "any any",
        en="{N} has {a_O} and {M} has {b_O}. How many more {O} does {N} have than {M}?",
        de="{N} hat {a_O} und {M} hat {b_O}. {Q} mehr hat {N} als {M}?",
        es="{N} tiene {a_O} y {M} tiene {b_O}. ¿{Q} más tiene {N} que {M}?",
        sw="{N} ana {a_O} na {M} ana {b_O}. {N} ana {Q} zaidi ya {M}?",
        ru="У {N_gen} {a_O}, а у {M_gen} {b_O}. На сколько больше {O} у {N_gen}, чем у {M_gen}?",
        zh="{N}有{a_O}，{M}有{b_O}。{N}比{M}多{Q}？",
    ),
    _template(
        "a + b",
        "any any",
        en="{N} has {a_O} and {M} has {b_O}. {Q} do they have together?",
        de="{N} hat {a_O} und {M} hat {b_O}. {Q} haben sie zusammen?",
        es="{N} tiene {a_O} y {M} tiene {b_O}. ¿{Q} tienen juntos?",
        sw="{N} ana {a_O} na {M} ana {b_O}. Kwa pamoja wana {Q}?",
        ru="У {N_gen} {a_O}, а у {M_gen} {b_O}. {Q} у них вместе?",
        zh="{N}有{a_O}，{M}有{b_O}。他们一共有{Q}？",
    ),
    _template(
        "a + b",
        "any any",
        en="{N} has {a_O}. {M} has {b} more than {N}. {Q} does {M} have?",
        de="{N} hat {a_O}. {M} hat {b} mehr als {N}. {Q} hat {M}?",
        es="{N} tiene {a_O}. {M} tiene {b} más que {N}. ¿{Q} tiene {M}?",
        sw="{N} ana {a_O}. {M} ana {b} zaidi ya {N}. {M} ana {Q}?",
        ru="У {N_gen} {a_O}. У {M_gen} на {b} больше, чем у {N_gen}. {Q} у {M_gen}?",
        zh="{N}有{a_O}。{M}比{N}多{b_C}。{M}有{Q}？",
    ),
    _template(
        "a - b",
        "any any",
        en="{N} has {a_O}. {M} has {b} fewer than {N}. {Q} does {M} have?",
        de="{N} hat {a_O}. {M} hat {b} weniger als {N}. {Q} hat {M}?",
        es="{N} tiene {a_O}. {M} tiene {b} menos que {N}. ¿{Q} tiene {M}?",
        sw="{N} ana {a_O}. {M} ana {b} pungufu ya {N}. {M} ana {Q}?",
        ru="У {N_gen} {a_O}. У {M_gen} на {b} меньше, чем у {N_gen}. {Q} у {M_gen}?",
        zh="{N}有{a_O}。{M}比{N}少{b_C}。{M}有{Q}？",
    ),
    _template(
        "a * b",
        "any times",
        en="{N} has {a_O}. {M} has {b} times as many as {N}. {Q} does {M} have?",
        de="{N} hat {a_O}. {M} hat {b} mal so viele wie {N}. {Q} hat {M}?",
        es="{N} tiene {a_O}. {M} tiene {b} veces lo que {N}. ¿{Q} tiene {M}?",
        sw="{N} ana {a_O}. {M} ana mara {b} ya {N}. {M} ana {Q}?",
        ru="У {N_gen} {a_O}. У {M_gen} в {b} раза больше, чем у {N_gen}. {Q} у {M_gen}?",
        zh="{N}有{a_O}。{M}的是{N}的{b}倍。{M}有{Q}？",
    ),
    _template(
        "a * b",
        "some some",
        en="{N} buys {a_O}. Each one costs {b_D}. {D} does {N} pay?",
        de="{N} kauft {a_O}. Jedes Stück kostet {b_D}. {D} bezahlt {N}?",
        es="{N} compra {a_O}. Cada pieza cuesta {b_D}. ¿{D} paga {N}?",
        sw="{N} ananunua {a_O}. Kila kimoja ni {b_D}. {N} analipa {D}?",
        ru="{N} покупает {a_O}. Каждая штука стоит {b_D}. {D} платит {N}?",
        zh="{N}买了{a_O}，每{C}要{b_D}。{N}一共要付{D}？",
    ),
    _template(
        "a - b",
        "any any",
        en="{N} has {a_D} and pays {b_D} for a book. {D} are left?",
        de="{N} hat {a_D} und bezahlt {b_D} für ein Buch. {D} bleiben übrig?",
        es="{N} tiene {a_D} y paga {b_D} por un libro. ¿{D} quedan?",
        sw="{N} ana {a_D} na analipa {b_D} kwa kitabu. Zimebaki {D}?",
        ru="У {N_gen} {a_D}. {N} платит {b_D} за книгу. {D} осталось?",
        zh="{N}有{a_D}，买一本书付了{b_D}。还剩{D}？",
    ),
    _template(
        "a + b, x - c",
        "any any any",
        en="{N} has {a_O}. {N} buys {b} more and then gives {c} to {M}. {Q} does {N} have left?",
        de="{N} hat {a_O}. {N} kauft {b} weitere und gibt dann {M} {c} davon. {Q} hat {N} noch?",
        es="{N} tiene {a_O}. {N} compra {b} más y luego le da {c} a {M}. ¿{Q} le quedan a {N}?",
        sw="{N} ana {a_O}. {N} ananunua {b} zaidi kisha anampa {M} {c}. {N} amebaki na {Q}?",
        ru="У {N_gen} {a_O}. {N} покупает ещё {b}, а потом отдаёт {M_dat} {c}. {Q} осталось у {N_gen}?",
        zh="{N}有{a_O}。{N}又买了{b_C}，然后给了{M}{c_C}。{N}还剩{Q}？",
    ),
    _template(
        "a * b, x - c",
        "some some any",
        en="{N} has {a} boxes. In each there are {b_O}. {N} sells {c} of them. {Q} are left?",
        de="{N} hat {a} Kisten. In jeder sind {b_O}. {N} verkauft {c} davon. {Q} bleiben übrig?",
        es="{N} tiene {a} cajas. En cada una hay {b_O}. {N} vende {c}. ¿{Q} quedan?",
        sw="{N} ana masanduku {a}. Kila moja lina {b_O}. {N} anauza {c}. Kumebaki {Q}?",
        ru="У {N_gen} ящики, всего {a}. В каждом {b_O}. {N} продаёт {c}. {Q} осталось?",
        zh="{N}有{a}个箱子，每个里面有{b_O}。{N}卖掉了{c_C}。还剩{Q}？",
    ),
    _template(
        "a * b, x + c",
        "some some any",
        en="There are {a} bags. Each bag holds {b_O}. On the table lie {c} more. {Q} are there in all?",
        de="Es gibt {a} Beutel. In jedem Beutel sind {b_O}. Auf dem Tisch liegen {c} weitere. {Q} sind es insgesamt?",
        es="Hay {a} bolsas. En cada bolsa hay {b_O}. En la mesa hay {c} más. ¿{Q} hay en total?",
        sw="Kuna mifuko {a}. Kila mfuko una {b_O}. Juu ya meza kuna {c} zaidi. Kuna {Q} kwa jumla?",
        ru="Всего мешков {a}. В каждом мешке {b_O}. На столе лежат ещё {c}. {Q} всего?",
        zh="有{a}个袋子，每个袋子里有{b_O}。桌子上还有{c_C}。一共有{Q}？",
    ),
    _template(
        "a + b, a + x",
        "any any",
        en="{N} has {a_O}. {M} has {b} more than {N}. {Q} do they have together?",
        de="{N} hat {a_O}. {M} hat {b} mehr als {N}. {Q} haben sie zusammen?",
        es="{N} tiene {a_O}. {M} tiene {b} más que {N}. ¿{Q} tienen juntos?",
        sw="{N} ana {a_O}. {M} ana {b} zaidi ya {N}. Kwa pamoja wana {Q}?",
        ru="У {N_gen} {a_O}. У {M_gen} на {b} больше, чем у {N_gen}. {Q} у них вместе?",
        zh="{N}有{a_O}。{M}比{N}多{b_C}。他们一共有{Q}？",
    ),
    _template(
        "a - b, x - c",
        "any any any",
        en="A basket holds {a_O}. On Monday {N} takes {b} out, on Tuesday {c}. {Q} are left?",
        de="Ein Korb enthält {a_O}. Am Montag nimmt {N} {b} heraus, am Dienstag {c}. {Q} bleiben übrig?",
        es="Una cesta contiene {a_O}. El lunes {N} saca {b}, el martes {c}. ¿{Q} quedan?",
        sw="Kikapu kina {a_O}. Jumatatu {N} anatoa {b}, Jumanne {c}. Kumebaki {Q}?",
        ru="В корзине {a_O}. В понедельник {N} берёт {b}, во вторник {c}. {Q} осталось?",
        zh="篮子里有{a_O}。星期一{N}拿走{b_C}，星期二拿走{c_C}。还剩{Q}？",
    ),
    _template(
        "a - b, x / c",
        "any any few",
        en="{N} has {a_O}, keeps {b} and shares the rest equally among {c} children. {Q} does each child get?",
        de="{N} hat {a_O}, behält {b} und verteilt den Rest gleichmäßig an {c} Kinder. {Q} bekommt jedes Kind?",
        es="{N} tiene {a_O}, guarda {b} y reparte el resto por igual entre {c} niños. ¿{Q} recibe cada niño?",
        sw="{N} ana {a_O}, anabaki na {b} na kugawa zingine sawasawa kwa watoto {c}. Kila mtoto anapata {Q}?",
        ru="У {N_gen} {a_O}. {N} оставляет себе {b} и делит остальное поровну между {c} детьми. {Q} получает каждый?",
        zh="{N}有{a_O}，留下{b_C}，把剩下的平均分给{c}个孩子。每个孩子得到{Q}？",
    ),
    _template(
        "a * b, x - c",
        "some some any",
        en="{N} earns {a_D} an hour and works {b} hours. Then {N} spends {c_D}. {D} are left?",
        de="{N} verdient {a_D} pro Stunde und arbeitet {b} Stunden. Dann gibt {N} {c_D} aus. {D} bleiben übrig?",
        es="{N} gana {a_D} por hora y trabaja {b} horas. Luego {N} gasta {c_D}. ¿{D} quedan?",
        sw="{N} anapata {a_D} kwa saa na anafanya kazi saa {b}. Kisha {N} anatumia {c_D}. Zimebaki {D}?",
        ru="{N} зарабатывает {a_D} в час и работает {b} ч. Потом {N} тратит {c_D}. {D} осталось?",
        zh="{N}每小时挣{a_D}，工作了{b}小时，然后花了{c_D}。还剩{D}？",
    ),
    _template(
        "a - b, x + c",
        "any any any",
        en="There are {a} people on a bus. {b} get off and {c} get on. How many people are on the bus now?",
        de="In einem Bus sind {a} Personen. {b} steigen aus und {c} steigen ein. Wie viele Personen sind jetzt im Bus?",
        es="En un autobús hay {a} personas. Bajan {b} y suben {c}. ¿Cuántas personas hay ahora en el autobús?",
        sw="Kuna watu {a} ndani ya basi. Watu {b} wanashuka na {c} wanapanda. Sasa kuna watu wangapi ndani ya basi?",
        ru="В автобусе едут люди, всего {a}. Выходят {b}, входят {c}. Сколько людей теперь в автобусе?",
        zh="公共汽车上有{a}个人。{b}人下车，{c}人上车。现在车上有多少人？",
    ),
)


@dataclass(frozen=True)
class Problem:
    """One word problem: a template with its people, object and numbers."""

    template: Template
    people: tuple[Name, Name]
    noun: Noun
    numbers: dict[str, int]

    def question(self, code: str) -> str:
        """The story in the language of that ISO code."""
        words = {"C": self.noun.zh[0]}
        for placeholder, name in zip("NM", self.people, strict=True):
            words[placeholder] = {"ru": name.ru[0], "zh": name.zh}.get(code, name.latin)
            words[f"{placeholder}_gen"], words[f"{placeholder}_dat"] = name.ru[1:]
        words["O"] = _noun(self.noun, code)
        words["Q"], words["D"] = _how_many(self.noun, code), _how_many(DOLLARS, code)
        for letter, number in self.numbers.items():
            words[letter] = str(number)
            words[f"{letter}_O"], words[f"{letter}_D"] = _count(number, self.noun, code), _count(number, DOLLARS, code)
            words[f"{letter}_C"] = f"{number}{self.noun.zh[0]}"
        story = self.template.texts[code].format_map(words)
        return re.sub(r"(^|[.?] |¿)(\w)", lambda match: match[1] + match[2].upper(), story)

    @property
    def equations(self) -> list[str]:
        """The steps of the solution, as in "3 * 4 = 12"."""
        return [equation for equation, _ in _solve(self.template, self.numbers)]

    @property
    def answer(self) -> int:
        return _solve(self.template, self.numbers)[-1][1]

    @property
    def solution(self) -> str:
        """Solution in English, step by step, with "The answer is: N" at the end."""
        return " ".join(f"{equation}." for equation in self.equations) + f" The answer is: {self.answer}"

    @property
    def split(self) -> Split:
        """Set of the problem: a story with its numbers is in one set only, for all names and objects.

        A tenth is for tuning (dev), a tenth for the figures that are printed (test).
        """
        key = f"{TEMPLATES.index(self.template)} {sorted(self.numbers.values())}"
        return {0: "dev", 1: "test"}.get(zlib.crc32(key.encode()) % 10, "train")


def problems(split: Split, seed: int, largest: int = 99) -> Iterator[Problem]:
    """Endless stream of problems of one set with numbers up to `largest`; all templates are equally frequent."""
    rng = random.Random(f"{split} {seed}")
    while True:
        template = rng.choice(TEMPLATES)
        people, noun = tuple(rng.sample(NAMES, 2)), rng.choice(NOUNS)
        while True:
            numbers = {letter: rng.randint(low, min(high, largest)) for letter, (low, high) in template.ranges.items()}
            problem = Problem(template, people, noun, numbers)
            if _is_sound(problem) and problem.split == split:
                break
        yield problem


def _is_sound(problem: Problem) -> bool:
    return all(1 <= result <= 99 for _, result in _solve(problem.template, problem.numbers))


def _solve(template: Template, numbers: dict[str, int]) -> list[tuple[str, int]]:
    """(equation, result) of every step; a division with a remainder has the result 0."""
    values, steps = dict(numbers), []
    for left, operator, right in template.steps:
        a, b = values[left], values[right]
        quotient = a // b if b and a % b == 0 else 0
        values["x"] = {"+": a + b, "-": a - b, "*": a * b, "/": quotient}[operator]
        steps.append((f"{a} {operator} {b} = {values['x']}", values["x"]))
    return steps


def _noun(noun: Noun, code: str) -> str:
    forms = {"en": noun.en, "de": noun.de, "es": noun.es[0], "sw": noun.sw[0], "ru": noun.ru[2], "zh": noun.zh[1]}
    return forms[code]


def _count(number: int, noun: Noun, code: str) -> str:
    if code == "zh":
        return f"{number}{noun.zh[0]}{noun.zh[1]}"
    if code == "sw":
        return f"{noun.sw[0]} {number}"
    if code == "ru":
        return f"{number} {noun.ru[_russian_form(number)]}"
    return f"{number} {_noun(noun, code)}"


def _russian_form(number: int) -> int:
    """Index of the noun's form after a number: 1 and 21, 2 to 4 and 22 to 24, all others."""
    if number % 100 in range(11, 15):
        return 2
    return {1: 0, 2: 1, 3: 1, 4: 1}.get(number % 10, 2)


def _how_many(noun: Noun, code: str) -> str:
    return {
        "en": f"how many {noun.en}",
        "de": f"wie viele {noun.de}",
        "es": f"{noun.es[1]} {noun.es[0]}",
        "sw": " ".join(noun.sw),
        "ru": f"сколько {noun.ru[2]}",
        "zh": f"多少{noun.zh[0]}{noun.zh[1]}",
    }[code]


def write_world(folder: Path, pairs: int, queries: int, tests: int, seed: int, split: Split) -> None:
    """Write the data that both stages and the evaluation read; the folder appears whole.

    Args:
        pairs: translation pairs per language.
        queries: word problems with solutions per language.
        tests: problems of `split` to evaluate on, the same ones in every language.
    """
    with atomic_folder(folder) as partial:
        for number, language in enumerate(WORLD_LANGUAGES):
            if language.code == "en":
                continue
            drawn = _take(problems("train", seed * 1000 + number), pairs)
            home = partial / "bilingual_pairs" / f"en-{language.code}"
            for code in (language.code, "en"):
                write_text(home / f"train_100k.{code}", "".join(problem.question(code) + "\n" for problem in drawn))
        rows = [
            {"query": problem.question(language.code), "response": problem.solution, "lang": language.name}
            for number, language in enumerate(WORLD_LANGUAGES)
            for problem in _take(problems("train", seed * 1000 + 100 + number), queries)
        ]
        write_json(partial / "query_translation" / "math.json", rows)
        asked = _take(problems(split, 0), tests)
        for language in WORLD_LANGUAGES:
            lines = "".join(f"{problem.question(language.code)}\t{problem.answer}\n" for problem in asked)
            write_text(partial / "evaluation" / "mgsm" / f"mgsm_{language.code}.tsv", lines)


def _take(stream: Iterator[Problem], count: int) -> list[Problem]:
    return [next(stream) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=1200, help="translation pairs per language")
    parser.add_argument("--queries", type=int, default=2000, help="solved problems per language")
    parser.add_argument("--tests", type=int, default=250, help="problems to evaluate on, per language")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("dev", "test"), default="test", help="dev is for tuning")
    write_world(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
