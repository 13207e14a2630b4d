"""Launch of the scripts that run on several ranks, with a user's commands."""

import shlex
import socket
import subprocess
import sys
from pathlib import Path

from common.errors import InputError

LAUNCHERS = {
    "run_training.py": "deepspeed --num_accelerators",
    "run_evaluation.py": "torchrun --standalone --nproc_per_node",
}


def launch(script: str, words: str, ranks: int = 2) -> None:
    """Run one of the two scripts.

    Args:
        script: one of `LAUNCHERS`.
        words: its flags, in shell syntax.
        ranks: number of processes.

    Raises:
        InputError: the script failed; its own message is printed above.
    """
    name, *flags = LAUNCHERS[script].split()
    command = [Path(sys.executable).with_name(name), *flags, str(ranks), script, *shlex.split(words)]
    if script == "run_training.py":
        with socket.socket() as free:  # by default all runs of a machine have one port
            free.bind(("127.0.0.1", 0))
            command[1:1] = ["--master_port", str(free.getsockname()[1])]
        command.append("--deepspeed")
    code = subprocess.run(command).returncode
    if code:
        raise InputError(f"{script} has ended with exit code {code}: its own message is above")
