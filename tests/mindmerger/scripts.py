"""Runs the scripts as a user does: a process of its own, in a folder of its own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY

# DeepSpeed calls `ninja`, which stands on the PATH of a user who has activated the environment.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": PATH}


def deepspeed_command(ranks: int, script: str, *words: object) -> list[str]:
    """`deepspeed --num_accelerators RANKS SCRIPT WORDS`, on a port that nobody else uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks)]
    return [*launcher, "--master_port", str(port), str(REPOSITORY / script), *map(str, words)]


def torchrun_command(ranks: int, script: str, *words: object) -> list[str]:
    """`torchrun --nproc_per_node RANKS SCRIPT WORDS`."""
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", str(ranks)]
    return [*launcher, str(REPOSITORY / script), *map(str, words)]


def python_command(script: str, *words: object) -> list[str]:
    """`python SCRIPT WORDS`."""
    return [sys.executable, str(REPOSITORY / script), *map(str, words)]


def run(command: list[str], folder: Path, expect: int = 0) -> str:
    """Run to the end in `folder`; what it printed."""
    done = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert done.returncode == expect, done.stdout
    return done.stdout
