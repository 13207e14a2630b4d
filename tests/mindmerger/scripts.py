"""Runs the scripts as a user does: a process of its own, in a folder of its own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, suppress
from pathlib import Path

import psutil

from tests.conftest import REPOSITORY

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def free_port() -> int:
    """A port of this machine that nobody uses just now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def deepspeed_command(ranks: int, script: str, *words: object) -> list[str]:
    """`deepspeed --num_accelerators RANKS SCRIPT WORDS`, on a port that nobody else uses."""
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
    """Run to the end in `folder`, with more in its environment; what it printed."""
    environment = ENVIRONMENT | (environment or {})
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert done.returncode == expect, done.stdout
    return done.stdout


@contextmanager
def started(command: list[str], folder: Path) -> Iterator[subprocess.Popen]:
    """Start a process group in `folder`, its output to `folder/output.txt`, and leave none of it behind."""
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
    """The processes that train under `launcher`, which without ranks is the one itself."""
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
    """Undo what a run in this process leaves: DeepSpeed's process groups, and linear layers as under ZeRO-3."""
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
