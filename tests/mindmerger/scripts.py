"""Runs of the scripts as by a user: in processes and folders of their own."""

import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def deepspeed_command(ranks: int, script: str, *words: object) -> list[str]:
    """`deepspeed --num_accelerators RANKS SCRIPT WORDS`, on a free port."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks)]
    return [*launcher, "--master_port", str(free_port()), str(REPOSITORY / script), *map(str, words)]


def torchrun_command(ranks: int, script: str, *words: object) -> list[str]:
    """`torchrun --nproc_per_node RANKS SCRIPT WORDS`."""
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", str(ranks)]
    return [*launcher, str(REPOSITORY / script), *map(str, words)]


def python_command(script: str, *words: object) -> list[str]:
    """`python SCRIPT WORDS`."""
    return [sys.executable, str(REPOSITORY / script), *map(str, words)]


def module_command(module: str, *words: object) -> list[str]:
    """`python -m MODULE WORDS`."""
    return [sys.executable, "-m", module, *map(str, words)]


def run(command: list[str], folder: Path, expect: int = 0, environment: dict[str, str] | None = None) -> str:
    """Run to the end in `folder`, with additional environment variables; return the output."""
    environment = ENVIRONMENT | (environment or {})
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert done.returncode == expect, done.stdout
    return done.stdout


def rank_processes(ranks: int, folder: Path, script: str, *words: object) -> list[BaseProcess]:
    """Start a script's ranks as a launcher would, their output to `folder/output.txt`.

    They are forked from a process that has imported the libraries, which takes longer than a small run.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.mindmerger.libraries"])
    (folder / "output.txt").write_text("")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    processes = []
    for rank in map(str, range(ranks)):
        environment = ENVIRONMENT | shared | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": str(ranks)}
        argv = [str(REPOSITORY / script), *map(str, words)]
        processes.append(context.Process(target=_one_rank, args=(argv, folder, environment)))
        processes[-1].start()
    return processes


def _one_rank(argv: list[str], folder: Path, environment: dict[str, str]) -> None:
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def run_ranks(ranks: int, folder: Path, script: str, *words: object) -> str:
    """Run a script's ranks to the end in `folder`; return their output."""
    return end_of(rank_processes(ranks, folder, script, *words), folder)


def end_of(processes: list[BaseProcess], folder: Path, expect: int = 0) -> str:
    """Wait for ranks, all of which must end with the exit code `expect`; return their output."""
    for process in processes:
        process.join(timeout=300)
    printed = (folder / "output.txt").read_text()
    assert [process.exitcode for process in processes] == [expect] * len(processes), printed
    return printed


@contextmanager
def started(command: list[str], folder: Path) -> Iterator[subprocess.Popen]:
    """Start a process group in `folder`, with output to `folder/output.txt`, and end all of it afterwards."""
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            for member in psutil.process_iter():
                with suppress(psutil.Error, ProcessLookupError):
                    if os.getsid(member.pid) == process.pid:
                        member.kill()
            process.wait()


def ranks_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    """Training processes under `launcher`, or `launcher` itself if it has no ranks."""
    family = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
    trainers = [p for p in family if any(word.endswith("run_training.py") for word in p.cmdline()[1:3])]
    return trainers or family


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Wait until `condition` holds; an AssertionError if the process ends before."""
    while not condition():
        assert process.poll() is None
        time.sleep(0.001)


def train_here(work: Path, *words: object) -> None:
    """Train in this process, in `work`."""
    from common.cli import parse_flags
    from mindmerger.build import train
    from mindmerger.config import TrainingFlags

    try:
        with chdir(work):
            train(parse_flags(TrainingFlags, [str(word) for word in words]))
    finally:
        forget_ranks()


def forget_ranks() -> None:
    """Undo the effects of a run in this process: DeepSpeed's process groups, and ZeRO-3's linear layers."""
    import torch
    import torch.distributed as dist
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    if dist.is_initialized():
        dist.destroy_process_group()
    comm.cdb = None
    torch.nn.functional.linear = torch._C._nn.linear
    for name, value in vars(groups).items():
        if isinstance(value, dist.ProcessGroup):
            setattr(groups, name, None)


def trained_before_5(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change a mapping's record to transformers 4, and the tiny LLM's type to one that scaled embeddings there."""
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"transformers_version": "4.57.3"}))
    monkeypatch.setattr("mindmerger.checkpoint._SCALED_BEFORE_5", ("llama",))
