"""Fenced blocks of Markdown pages: their commands, checked by the programs' own parsers or run in this process."""

import contextlib
import importlib.util
import itertools
import os
import re
import runpy
import shlex
import sys
import textwrap
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from common.cli import FlagParser
from tests.conftest import REPOSITORY
from tests.mindmerger.scripts import forget_ranks

# Requirements in `<!-- needs: GPU, hub -->` before a block; such a block is checked, and not run.
NEEDS = {
    "GPU": "one or more of them",
    "cluster": "several machines, ssh or Slurm",
    "hub": "models or data from the Hugging Face hub",
    "models": "real models, in local folders",
    "minutes": "more than seconds, on the shipped models",
    "package": "an optional package",
}
_BLOCK = re.compile(r"(?:^ *<!-- needs: ([^>]*?) -->\n)?^( *)```(\w*)\n(.*?)^\2```$", re.MULTILINE | re.DOTALL)
_KEYWORDS = {"if", "then", "else", "fi", "do", "done"}
_REDIRECTIONS = {">", ">>", "<"}
# Common programs, which are not checked.
_UNCHECKED = {
    *("[", "cd", "echo", "export", "git", "hf", "hostname", "mkdir", "scontrol", "sbatch", "sed", "source", "trap"),
}
_FOLDERS = "benchmarks|common|configs|docs|mindmerger|quickstart|regmean|tests|tools"
_PATH = re.compile(rf"(?<![\w/.-])(?:{_FOLDERS})/[\w./-]*")
_MADE_HERE = ("quickstart/build", "quickstart/results")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        language: the word after the fence.
        text: its lines.
        needs: requirements that are missing here; empty if it can run.
        place: page and line.
    """

    language: str
    text: str
    needs: frozenset[str]
    place: str


def blocks(page: Path) -> list[Block]:
    """Fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        needs = frozenset(word.strip() for word in match[1].split(",")) if match[1] else frozenset()
        place = f"{page.relative_to(REPOSITORY)}, line {text.count(chr(10), 0, match.start(2)) + 1}"
        found.append(Block(match[3], textwrap.dedent(match[4]), needs, place))
    return found


def missing_paths(text: str) -> list[str]:
    """Missing files and folders of the repository that a text names."""
    named = [path.rstrip("./") for path in _PATH.findall(text) if not path.startswith(_MADE_HERE)]
    return [path for path in named if not (REPOSITORY / path).exists()]


def commands(script: str) -> list[list[str]]:
    """Simple commands of a shell text, as words, without assignments, keywords and redirections."""
    # A variable is replaced by one word: a number, which is also a valid name.
    script = re.sub(r"\$\{?\w+\}?|\$\?", "1", script.replace("\\\n", " "))
    found: list[list[str]] = []
    for line in script.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        into_file = False
        for word in [*lexer, ";"]:
            if into_file or word in _REDIRECTIONS:
                into_file = not into_file
            elif not word or word.strip(";&|()"):
                before_command = not words and (word in _KEYWORDS or re.match(r"\w+=", word))
                words += [] if before_command else [word]
            else:
                found += [words] if words else []
                words = []
    return found


class _Parsed(BaseException):
    """Raised to end a program after its flags are parsed."""


def check(words: list[str], world_size: int = 1) -> None:
    """Check one command: its program exists, its flags parse, the files that it names exist.

    Args:
        words: of the command; paths are relative to the current folder.
        world_size: number of ranks that its launcher starts.

    Raises:
        AssertionError, SystemExit: the command is wrong.
    """
    (program, *rest), line = words, shlex.join(words)
    assert "..." not in words, f"{line}: spell it out, or it cannot be checked"
    assert not missing_paths(line), f"{line}: there is no {missing_paths(line)}"
    if program == "srun":
        check(rest, world_size)
    elif program == "bash":
        assert rest[0] == "-c", line
        for command in commands(rest[1]):
            check(command, world_size)
    elif program == "deepspeed":
        from deepspeed.launcher.runner import fetch_hostfile, parse_args

        launcher = parse_args(rest)
        nodes = fetch_hostfile(launcher.hostfile) if "--hostfile" in rest else None
        ranks = sum(nodes.values()) if nodes else max(1, launcher.num_gpus)
        check(["python", launcher.user_script, *launcher.user_args], ranks)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        launcher = get_args_parser().parse_args(rest)
        ranks = int(launcher.nproc_per_node) * int(launcher.nnodes.rpartition(":")[2])
        check(["python", launcher.training_script, *launcher.training_script_args], ranks)
    elif program == "python":
        with patch.dict(os.environ, {"WORLD_SIZE": str(world_size)}):
            _check_python(rest)
    elif program == "lm_eval":
        from lm_eval.__main__ import cli_evaluate

        with _stopped_when_parsed(), patch.object(sys, "argv", words):
            cli_evaluate()
    elif program == "make":
        targets = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
        for word in rest:
            name, is_variable, _ = word.partition("=")
            assert (f"$({name})" if is_variable else f"\n{name}:") in targets, f"{line}: no such target or variable"
    elif program == "python3":
        # Before the environment, which has `python`, exists.
        assert rest[:2] == ["-m", "venv"], f"{line}: python3 is for making the environment"
    elif program == "pip":
        files = [file for option, file in itertools.pairwise(rest) if option == "-r"]
        assert all((REPOSITORY / file).exists() for file in files), f"{line}: no such file"
    else:
        assert program in _UNCHECKED, f"{line}: tests/commands.py cannot check {program}"


def run(words: list[str]) -> None:
    """Run one of this repository's commands, in this process and under no launcher.

    Raises:
        AssertionError: it is not a command of this repository.
        SystemExit: it failed.
    """
    if words[0] == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        launcher = parse_args(words[1:])
        words = ["python", launcher.user_script, *launcher.user_args]
    assert words[0] == "python", f"{shlex.join(words)}: cannot be run here; say before the block what it needs"
    try:
        _start(words[1:])
    except SystemExit as error:
        if error.code:
            raise
    finally:
        os.environ.pop("LOCAL_RANK", None)
        forget_ranks()


def _check_python(words: list[str]) -> None:
    path = Path(words[0])
    if words[0] == "-m":
        module = Path(*words[1].split("."))
        path = next((p for p in (module.with_suffix(".py"), module / "__main__.py") if p.exists()), module)
        if not path.is_file() and importlib.util.find_spec(words[1]) is not None:
            return  # Python's own, or an installed package's
    assert path.is_file(), f"python {shlex.join(words)}: there is no such program"
    if re.search(r"parse_|cli_evaluate", path.read_text(encoding="utf-8")):
        with _stopped_when_parsed():
            _start(words)
    else:
        assert not any(word.startswith("--") for word in words), f"{path} reads no flags"


def _start(words: list[str]) -> None:
    # end_rank would end the test process.
    with (
        patch.object(sys, "argv", words[1:] if words[0] == "-m" else words),
        patch("common.ranks.end_rank", sys.exit),
        patch("common.errors.end_process", sys.exit),
    ):
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")


@contextlib.contextmanager
def _stopped_when_parsed() -> Iterator[None]:
    def then_stop(parse: Any) -> Any:
        def parse_and_stop(*arguments: Any, **options: Any) -> None:
            parse(*arguments, **options)
            raise _Parsed

        return parse_and_stop

    with (
        patch.object(ArgumentParser, "parse_args", then_stop(ArgumentParser.parse_args)),
        patch.object(FlagParser, "make_flags", then_stop(FlagParser.make_flags)),
        contextlib.suppress(_Parsed),
    ):
        yield
        raise AssertionError("the program has read no flags")
