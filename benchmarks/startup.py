"""Time from a training script's start to its first batch, and memory of each rank at that point, on two ranks.

    python -m benchmarks.startup --pairs 900000

generates translation pairs of the small world, then runs the mapping stage of its models up to the first batch: with an
empty cache, again with the filled cache, and with 1,000 pairs. Imports and the loading of models are not counted;
memory is a rank's private memory.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import psutil

from common.cli import flag, parse_flags
from common.errors import InputError, exit_with_message
from common.io import read_json, write_json
from quickstart.world import WORLD_LANGUAGES, problems

LANGUAGES = [language.code for language in WORLD_LANGUAGES if language.code != "en"]
MODELS = Path(__file__).resolve().parent.parent / "quickstart" / "models"
FEW = 1000


@dataclass
class StartupFlags:
    """Time the start of a training run with many pairs."""

    pairs: int = flag(900_000, "translation pairs over all languages")
    side: str | None = flag(None, "one rank of a run: the folder of its data; set by the command itself")

    def __post_init__(self) -> None:
        if self.pairs < FEW:
            raise InputError(f"--pairs {self.pairs} must be at least {FEW}")


def write_pairs(folder: Path, pairs: int) -> None:
    """Write `pairs` translation pairs, equally many per language, in the published layout."""
    for number, code in enumerate(LANGUAGES):
        home = folder / "bilingual_pairs" / f"en-{code}"
        home.mkdir(parents=True)
        with (home / f"train_100k.{code}").open("w") as source, (home / "train_100k.en").open("w") as target:
            for problem in islice(problems("train", number), pairs // len(LANGUAGES)):
                source.write(problem.question(code) + "\n")
                target.write(problem.question("en") + "\n")


class _FirstBatch(BaseException):
    """Raised in place of making the first batch."""


def one_rank(folder: Path, pairs: int) -> None:
    """Train up to the first batch, and write time and memory."""
    import pandas  # noqa: F401  # pyarrow imports it with the first array
    import torch.distributed as dist

    from mindmerger import build
    from mindmerger.config import TrainingFlags
    from mindmerger.trainer import Trainer

    loading: list[float] = []

    def timed(function: object) -> object:
        def run(*args: object, **kwargs: object) -> object:
            started = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                loading.append(time.monotonic() - started)

        return run

    def stop(_: Trainer) -> None:
        raise _FirstBatch

    flags = TrainingFlags(
        llm_path=str(MODELS / "llm"),
        mt_path=str(MODELS / "mt"),
        data_dir=str(folder / "datas"),
        cache_dir=str(folder / "cache"),
        languages=",".join(LANGUAGES),
        train_num=pairs // len(LANGUAGES),
        dev_size=100,
        device="cpu",
        report_to="none",
        overwrite=True,
    )
    model = build.MindMergerForCausalLM
    started = time.monotonic()
    with (
        patch.object(Trainer, "_between_steps", stop),
        patch.object(model, "from_base_models", timed(model.from_base_models)),
        patch.object(model, "pack_rows", timed(model.pack_rows)),
        patch.object(build.deepspeed, "initialize", timed(build.deepspeed.initialize)),
        # DeepSpeed compiles and loads an operator on first use.
        patch.object(build.deepspeed, "init_distributed", timed(build.deepspeed.init_distributed)),
    ):
        try:
            build.train(flags)
        except _FirstBatch:
            seconds = time.monotonic() - started - sum(loading)
    private = psutil.Process().memory_full_info().uss
    dist.barrier()
    write_json(folder / f"rank_{dist.get_rank()}.json", {"seconds": round(seconds, 2), "private_bytes": private})
    dist.barrier()


def measure(folder: Path, pairs: int) -> dict[str, float]:
    """Maximum over ranks of seconds and of private bytes, for one run in `folder`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += ["benchmarks.startup", "--pairs", str(pairs), "--side", "."]
    environment = os.environ | {"PYTHONPATH": str(MODELS.parent.parent)}
    subprocess.run(command, cwd=folder, env=environment, check=True)
    ranks = [read_json(path) for path in sorted(folder.glob("rank_*.json"))]
    return {name: max(rank[name] for rank in ranks) for name in ranks[0]}


def main() -> None:
    """Parse the command line; measure, or run one rank."""
    flags = parse_flags(StartupFlags)
    if flags.side:
        one_rank(Path(flags.side), flags.pairs)
        return
    found = {}
    with tempfile.TemporaryDirectory() as work:
        for name, pairs in (("many", flags.pairs), ("few", FEW)):
            write_pairs(Path(work) / name / "datas", pairs)
        found["few"] = measure(Path(work) / "few", FEW)
        found["first run"] = measure(Path(work) / "many", flags.pairs)
        found["second run"] = measure(Path(work) / "many", flags.pairs)
    print(f"{'':<12}{'seconds':>10}{'private GB':>12}")
    for name, cost in found.items():
        print(f"{name:<12}{cost['seconds']:>10.2f}{cost['private_bytes'] / 1e9:>12.3f}")
    print(json.dumps({"benchmark": "startup", "pairs": flags.pairs, **found}))


if __name__ == "__main__":
    exit_with_message(main)
