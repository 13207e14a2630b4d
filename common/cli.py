"""Command lines and YAML files of flags, parsed into a dataclass; the command line wins."""

import argparse
import dataclasses
import difflib
import sys
from datetime import date
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml

from common.errors import InputError

Flags = TypeVar("Flags")


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with its help text."""
    metadata["help"] = help
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_flags(flags_class: type[Flags], argv: list[str] | None = None, presets: Path | None = None) -> Flags:
    """Parse `argv` (default: `sys.argv`) into an instance of the dataclass `flags_class`.

    `--config FILE.yaml` holds flags by the same names; the command line wins over the file.
    With `presets`, a first word NAME without dashes means `--config {presets}/NAME.yaml`.

    Raises:
        InputError: an unknown flag or key (the nearest name is suggested), a value of the wrong type, an
            unreadable YAML file, a failed check in the dataclass's `__post_init__`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = FlagParser(flags_class)
    parser.add_argument("--config", type=Path, help="YAML file of flags; the command line wins over it")
    if presets is not None and words and not words[0].startswith("-"):
        words[:1] = ["--config", str(_preset(presets, words[0]))]

    config = parser.parse_known_args(words)[0].config
    from_file = [] if config is None else _words_of_yaml(config, parser)
    # Before the dataclass is made: its checks would report a misspelt flag as missing.
    values, unknown = parser.parse_known_args(from_file + words)
    if unknown:
        names = ["--config", *(f"--{name}" for name in parser.flags)]
        raise InputError(f"unknown flag or word {unknown[0]!r}{_nearest(unknown[0], names)}")
    return parser.make_flags(values)


class FlagParser(argparse.ArgumentParser):
    """A flag `--name` (or with dashes) for each field of a dataclass, as in transformers' HfArgumentParser.

    A field's type is str, int, float, bool, a Literal of strings, one of these or None, or a list of these, which takes
    several words. A bool that cannot be None is true without a value, and has `--no_name` where its default is true.
    HfArgumentParser is not used since its import takes a second or more: it imports all of transformers.

    Attributes:
        flags: action of each flag by its name without dashes.
    """

    def __init__(self, flags_class: type):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=formatter, description=flags_class.__doc__)
        self._flags_class = flags_class
        self.flags: dict[str, argparse.Action] = {}
        hints = get_type_hints(flags_class)
        for field in dataclasses.fields(flags_class):
            self._add(field, hints[field.name])

    def make_flags(self, values: argparse.Namespace) -> Any:
        """Create the dataclass from the parsed values; its own checks may raise."""
        return self._flags_class(**{f.name: getattr(values, f.name) for f in dataclasses.fields(self._flags_class)})

    def _add(self, field: dataclasses.Field, hint: Any) -> None:
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        options: dict[str, Any] = {"default": default, "help": field.metadata["help"]}
        kind = hint
        if isinstance(hint, UnionType):
            (kind,) = (member for member in get_args(hint) if member is not NoneType)
        if get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        elif get_origin(kind) is list:
            options |= {"type": get_args(kind)[0], "nargs": "+"}
        elif kind is bool:
            options["type"] = _boolean
            if hint is bool:
                options |= {"nargs": "?", "const": True}
        else:
            options["type"] = kind
        # The field's options of `add_argument`.
        options |= {name: value for name, value in field.metadata.items() if name != "help"}
        self._add_spellings(field.name, **options)
        if hint is bool and default is True:
            options = {"action": "store_false", "dest": field.name, "help": field.metadata["help"]}
            self._add_spellings(f"no_{field.name}", **options)

    def _add_spellings(self, name: str, **options: Any) -> None:
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        self.flags[name] = self.add_argument(*spellings, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the flags)")


def _boolean(word: str) -> bool:
    if word.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if word.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, not {word!r}")


def _nearest(word: str, names: list[str]) -> str:
    matches = difflib.get_close_matches(word.split("=")[0], names, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _preset(presets: Path, name: str) -> Path:
    names = sorted(path.stem for path in presets.glob("*.yaml"))
    if name not in names:
        raise InputError(f"no preset {name!r} in {presets}; there are: {', '.join(names)}")
    return presets / f"{name}.yaml"


def _words_of_yaml(path: Path, parser: FlagParser) -> list[str]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, the 99th of May
        raise InputError(f"--config {path}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: expected `flag: value` lines at the top level")

    words: list[str] = []
    for key, value in content.items():
        if key not in parser.flags:
            raise InputError(f"--config {path}: unknown key {key!r}{_nearest(str(key), list(parser.flags))}")
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str | int | float | date) for item in values):
            raise InputError(f"--config {path}: {key} takes a value or a list of values, not {value!r}")
        texts = [str(item) for item in values]
        if isinstance(value, list) and parser.flags[key].nargs == "+":
            words += [f"--{key}", *texts]
        else:
            words.append(f"--{key}={','.join(texts)}")
    return words
