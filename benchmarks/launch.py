"""The scripts that run on several ranks, started as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

LAUNCHERS = {
    "run_training.py": "deepspeed --num_accelerators",
    "run_evaluation.py": "torchrun --standalone --nproc_per_node",
}


def launch(script: str, words: str, ranks: int = 2) -> None:
    """Run one of the two scripts with these flags; the machine's cores are divided among the ranks.

    Raises:
        subprocess.CalledProcessError: it has failed.
    """
    name, *flags = LAUNCHERS[script].split()
    command = [Path(sys.executable).with_name(name), *flags, str(ranks), script, *words.split()]
    if script == "run_training.py":
        command.append("--deepspeed")
    threads = max(1, (os.cpu_count() or 1) // ranks)
    subprocess.run(command, check=True, env={"OMP_NUM_THREADS": str(threads), **os.environ})
