"""Training on two ranks by the plain command, compared with OMP_NUM_THREADS set by hand.

    python -m benchmarks.threads

60 steps of the quickstart's models under DeepSpeed's launcher, which by default starts each rank with as many threads
as the machine has cores. Seconds are those that the run reports, without imports. The two are run in turn. It is an
error if the plain command's median is more than `LIMIT` times the other's.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.side_by_side import machine
from common.cli import flag, parse_flags
from common.errors import InputError, exit_with_message
from common.io import read_json
from quickstart.world import write_world

REPOSITORY = Path(__file__).resolve().parent.parent
MODELS = REPOSITORY / "quickstart" / "models"
RANKS, STEPS, BATCH, DEV = 2, 60, 8, 20
LIMIT = 1.1


@dataclass
class ThreadsFlags:
    """Compare two ranks that divide the cores automatically with two whose threads are set by hand."""

    rounds: int = flag(3, "runs of each")

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise InputError(f"--rounds {self.rounds} must be at least 1")


def seconds(folder: Path, environment: dict[str, str]) -> float:
    """Seconds that a training run reports."""
    words = {
        "--llm_path": MODELS / "llm",
        "--mt_path": MODELS / "mt",
        "--languages": "German,Spanish",
        "--train_num": (STEPS * BATCH + DEV) // 2,
        "--dev_size": DEV,
        "--train_batch_size": BATCH,
        "--epoch_num": 1,
        "--cache_dir": "cache",
        "--save_name": "run",
    }
    programs = Path(sys.executable).parent
    command = [programs / "deepspeed", "--num_accelerators", RANKS, REPOSITORY / "run_training.py"]
    command += ["--deepspeed", "--overwrite", "--device", "cpu", *(word for pair in words.items() for word in pair)]
    # DeepSpeed calls ninja by name.
    path = f"{programs}{os.pathsep}{environment['PATH']}"
    environment = {**environment, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PATH": path}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"exit code {done.returncode} of the training run:\n{done.stdout}{done.stderr}")
    result = read_json(folder / "outputs/run/mapping/run.json")["result"]
    assert result["steps"] == STEPS, result
    return result["seconds"]


def main() -> None:
    flags = parse_flags(ThreadsFlags)
    plain = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    by_hand = {**plain, "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // RANKS))}
    found: dict[str, list[float]] = {"plain": [], "by hand": []}
    with tempfile.TemporaryDirectory() as folder:
        write_world(Path(folder) / "datas", pairs=STEPS * BATCH, queries=1, tests=1, seed=0, split="test")
        for number in range(flags.rounds):
            for name, environment in (("plain", plain), ("by hand", by_hand)):
                found[name].append(seconds(Path(folder), environment))
                print(f"round {number + 1} of {flags.rounds}, {name}: {found[name][-1]:.1f} s", flush=True)
    ratio = statistics.median(found["plain"]) / statistics.median(found["by hand"])
    print(json.dumps({"benchmark": "threads", **found, "ratio": round(ratio, 2), "machine": machine()}))
    if ratio > LIMIT:
        raise InputError(f"the plain command takes {ratio:.2f} times as long: more than {LIMIT}")


if __name__ == "__main__":
    exit_with_message(main)
