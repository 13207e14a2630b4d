from dataclasses import dataclass
from pathlib import Path

import pytest

from common.cli import flag, parse_flags
from common.errors import InputError


@dataclass
class Flags:
    """Flags of a script for tests."""

    llm_path: str = flag(None, "required in practice")
    lr: float = flag(2e-5, "learning rate")
    languages: str = flag("de,fr", "comma-separated")
    models: list[str] = flag(["a", "b"], "several words")
    augmentation: bool | None = flag(None, "three states")
    deepspeed: bool = flag(False, "a switch")

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise InputError("--lr must be above 0")


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_published_manner_of_flags() -> None:
    flags = parse_flags(Flags, ["--deepspeed", "--llm_path", "L", "--augmentation", "False", "--lr", "1e-3"])
    assert (flags.deepspeed, flags.llm_path, flags.augmentation, flags.lr) == (True, "L", False, 1e-3)
    assert parse_flags(Flags, []).augmentation is None


def test_command_line_wins_over_yaml(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", "lr: 2e-3\nlanguages: [sw, th]\nmodels: [x, y, z]\naugmentation: yes\n")
    flags = parse_flags(Flags, ["--lr", "0.5", "--config", config])
    assert (flags.lr, flags.languages, flags.models, flags.augmentation) == (0.5, "sw,th", ["x", "y", "z"], True)


def test_preset_is_the_first_word(tmp_path: Path) -> None:
    write(tmp_path / "code.yaml", "lr: 3\n")
    assert parse_flags(Flags, ["code", "--languages", "ru"], presets=tmp_path).lr == 3
    with pytest.raises(InputError, match=r"no preset 'coed'.*code"):
        parse_flags(Flags, ["coed"], presets=tmp_path)


@pytest.mark.parametrize(
    ("words", "yaml_text", "message"),
    [
        (["--langages", "de"], None, "unknown flag or word '--langages'; did you mean '--languages'"),
        (["--lang", "de"], None, "unknown flag or word '--lang'"),
        (["--config"], None, "argument --config: expected one argument"),
        (["--lr", "-1", "--langages", "de"], None, "unknown flag or word '--langages'"),
        (["stray"], None, "unknown flag or word 'stray'"),
        (["--lr", "fast"], None, "argument --lr: invalid float value: 'fast'"),
        (["--lr", "-1"], None, "--lr must be above 0"),
        ([], "langages: de", "unknown key 'langages'; did you mean 'languages'"),
        ([], "lr: fast", "argument --lr: invalid float value: 'fast'"),
        ([], "lr: -1", "--lr must be above 0"),
        ([], "lr: {a: 1}", "lr takes a value or a list of values"),
        ([], "- a\n- b", "expected `flag: value` lines"),
        ([], "a: [", "while parsing"),
        ([], "lr: 2001-99-99", "month must be in 1..12"),
        ([], "lr: &a [*a]", "lr takes a value or a list of values"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, words: list[str], yaml_text: str | None, message: str) -> None:
    if yaml_text is not None:
        words = ["--config", write(tmp_path / "c.yaml", yaml_text)]
    with pytest.raises(InputError) as error:
        parse_flags(Flags, words)
    assert message in str(error.value)
    if yaml_text is not None and "--lr" not in message:
        assert "c.yaml" in str(error.value)


def test_missing_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere.yaml"):
        parse_flags(Flags, ["--config", str(tmp_path / "nowhere.yaml")])
