"""Readers of text lines, JSON lines and JSON lists, whose errors name file and line."""

import json
import reprlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from common.errors import InputError
from mindmerger.tasks.languages import Language, find_language
from mindmerger.tasks.task import Example, Reader


def one_file_each(
    path: str, read: Callable[[Path, Language], Iterator[Example]], default: tuple[Language, ...] = ()
) -> Reader:
    """Build a reader of one file for each language.

    Args:
        path: path in the data folder, with `{language.code}` or `{language.name}` in it.
        read: reader of one such file.
        default: languages to read if none are named.
    """

    def read_files(data_dir: Path, languages: tuple[Language, ...] | None) -> dict[Language, Iterable[Example]]:
        return {
            language: read(data_dir / path.format(language=language), language) for language in languages or default
        }

    return read_files


def one_list(path: str, language_key: str, make_example: Callable[[dict[str, Any], Language, str], Example]) -> Reader:
    """Build a reader of one JSON list of objects in several languages.

    Args:
        path: path in the data folder.
        language_key: key of a row's language.
        make_example: function from (row, language, location) to the example.
    """

    def read_list(data_dir: Path, _: tuple[Language, ...] | None) -> dict[Language, Iterable[Example]]:
        examples: dict[Language, list[Example]] = {}
        for location, row in json_list(data_dir / path):
            try:
                language = find_language(string(row, language_key, location))
            except InputError as error:
                raise InputError(f"{location}: {error}") from error
            examples.setdefault(language, []).append(make_example(row, language, location))
        return examples

    return read_list


def read_text(path: Path) -> str:
    """Read a UTF-8 file, without a byte order mark.

    Raises:
        InputError: there is no such file, or it is not UTF-8.
    """
    try:
        # Not Path.read_text, which would convert a carriage return inside a sentence to a line feed.
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file (--data_dir names the folder in the published layout)") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error


def text_lines(path: Path) -> list[str]:
    """Read the lines of a text file and check that none is empty."""
    # Only line feeds end a row: splitlines() would also split at U+2028 and U+0085, which occur in sentences.
    lines = read_text(path).replace("\r\n", "\n").split("\n")
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise InputError(f"{path}: the file is empty")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise InputError(f"{path}, line {number}: the line is empty")
    return lines


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read (location, object) of every line of a JSON Lines file."""
    for number, line in enumerate(text_lines(path), start=1):
        location = f"{path}, line {number}"
        yield location, _object(_parse(line, location), location)


def json_list(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read (location, object) of every row of a JSON list."""
    rows = _parse(read_text(path), str(path))
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a JSON list of objects")
    for number, row in enumerate(rows, start=1):
        location = f"{path}, row {number}"
        yield location, _object(row, location)


def string(row: dict[str, Any], key: str, location: str) -> str:
    """Text under `key`, which must exist and not be blank."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{location}: {key!r} must be a text, found {reprlib.repr(value)}")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(f"{location}: {key!r} has half of a surrogate pair, which is not a character")
    return value


def _parse(text: str, location: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5000 digits
        raise InputError(f"{location}: not JSON: {error}") from error


def _object(row: Any, location: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{location}: expected a JSON object")
    return row
