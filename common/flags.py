"""Command lines and YAML files, parsed as one: a dataclass holds the flags, the command line wins."""

import dataclasses
import difflib
import reprlib
import sys
from datetime import date
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser

from common.errors import InputError

Flags = TypeVar("Flags")
MAX_YAML = 8192
MAX_BRACKETS = 200


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field that documents itself in `--help`."""
    metadata["help"] = help
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_flags(flags_class: type[Flags], argv: list[str] | None = None, presets: Path | None = None) -> Flags:
    """Parse `argv` (default: the process's) into an instance of the dataclass `flags_class`.

    `--config FILE.yaml` supplies flags in the same words; whatever stands on the command line wins over the file.
    With `presets`, a first word NAME without dashes stands for `--config {presets}/NAME.yaml`.

    Raises:
        InputError: an unknown flag or key (the nearest name is suggested), a value of the wrong type, an
            unreadable YAML file. Cross-field checks are the dataclass's own, in `__post_init__`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(flags_class, allow_abbrev=False, description=flags_class.__doc__)
    parser.add_argument("--config", type=Path, help="YAML file of flags; the command line wins over it")
    if presets is not None and words and not words[0].startswith("-"):
        words[:1] = ["--config", str(_preset(presets, words[0]))]

    config_parser = _Parser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", type=Path)
    config = config_parser.parse_known_args(words)[0].config
    from_file = [] if config is None else _words_of_yaml(config, parser)
    if any("\0" in word for word in (*from_file, *words)):
        raise InputError("a flag's value holds a NUL character, which no text or file name has")
    # Before the dataclass is made: its own checks would blame a misspelt flag on the one that it stands for.
    unknown = parser.parse_known_args(from_file + words)[1]
    if unknown:
        raise InputError(f"unknown flag or word {unknown[0]!r}{_nearest(unknown[0], parser.flag_names())}")
    return parser.parse_args_into_dataclasses(from_file + words, look_for_args_file=False)[0]


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the flags)")

    def flag_names(self) -> list[str]:
        return [option for option in self._option_string_actions if option.startswith("--") and "-" not in option[2:]]


def _nearest(word: str, names: list[str]) -> str:
    matches = difflib.get_close_matches(word.split("=")[0], names, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _preset(presets: Path, name: str) -> Path:
    names = sorted(path.stem for path in presets.glob("*.yaml"))
    if name not in names:
        raise InputError(f"no preset {name!r} in {presets}; there are: {', '.join(names)}")
    return presets / f"{name}.yaml"


def _words_of_yaml(path: Path, parser: _Parser) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        # PyYAML takes seconds for a few thousand brackets, and a file of flags has a few.
        if len(text) > MAX_YAML or text.count("[") + text.count("{") > MAX_BRACKETS:
            raise InputError(f"--config {path}: more than {MAX_YAML} characters or {MAX_BRACKETS} brackets")
        content = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: not UTF-8, the 99th of May
        raise InputError(f"--config {path}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: expected `flag: value` lines at the top level")

    words: list[str] = []
    keys = [name[2:] for name in parser.flag_names() if name not in ("--help", "--config")]
    for key, value in content.items():
        if key not in keys:
            raise InputError(f"--config {path}: unknown key {reprlib.repr(key)}{_nearest(str(key)[:100], keys)}")
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str | int | float | date) for item in values):
            # Shortened: by references to itself a few lines of YAML stand for gigabytes.
            raise InputError(f"--config {path}: {key} takes a value or a list of values, not {reprlib.repr(value)}")
        try:
            texts = [str(item) for item in values]
            "".join(texts).encode()
        except ValueError as error:
            raise InputError(f"--config {path}: {key} holds what is no text, or too long a number") from error
        if isinstance(value, list) and parser._option_string_actions[f"--{key}"].nargs == "+":
            words += [f"--{key}", *texts]
        else:
            words.append(f"--{key}={','.join(texts)}")
    return words
