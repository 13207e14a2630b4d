"""SIGKILL at random moments of real runs under the real launcher, until each has been killed five times.

Minutes: `pytest -m slow -s tests/mindmerger/test_kills.py` prints what was hit.
"""

import random
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.mindmerger.scripts import deepspeed_command, python_command, ranks_of, run, started, wait_for

KILLS = 5


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", ["mapping", "augmentation"])
def test_killed_at_random_moments(work: Path, models: dict[str, Path], stage: str, ranks: int) -> None:
    words = (
        *(
            "--llm_path",
            models["llama"],
            "--mt_path",
            models["mt5"],
            "--stage_name",
            stage,
            "--init_checkpoint",
            "none",
        ),
        *("--languages", "de,sw", "--train_num", 12, "--dev_size", 4, "--train_batch_size", 8, "--epoch_num", 60),
        *("--lr", "1e-3", "--lr_scheduler", "cosine", "--max_seq_len", 64, "--eval_steps", 7, "--save_steps", 3),
    )

    def command(name: str) -> list[str]:
        named = (*words, "--save_name", f"{name}{ranks}")
        if ranks == 1:
            return python_command("run_training.py", *named)
        return deepspeed_command(ranks, "run_training.py", "--deepspeed", *named)

    run(command("whole"), work)
    folder = work / f"outputs/killed{ranks}" / stage
    state, generator, hit = folder / "state", random.Random(f"{stage} {ranks}"), Counter()

    def steps() -> list[int]:
        return sorted(int(path.name.removeprefix("step_")) for path in state.glob("step_*"))

    for number in range(KILLS):
        moment = ("before", "inside", "after", "anywhere", "inside")[number]
        alone = ranks > 1 and number % 2 == 1
        with started(command("killed"), work) as process:
            first = max(steps(), default=0)
            # Kill some steps after training begins: five such runs fit into the 180 steps.
            target = first + generator.randint(4, 25)
            wait_for(lambda target=target: max(steps(), default=0) >= target, process)
            if moment == "before":
                time.sleep(generator.random() * 0.02)
            elif moment == "inside":
                wait_for(lambda: any(state.glob(".*.partial")), process)
            elif moment == "after":
                seen = max(steps())
                wait_for(lambda seen=seen: max(steps()) > seen, process)
            else:
                time.sleep(generator.random() * 0.3)
            victims = ranks_of(process)
            for victim in generator.sample(victims, 1) if alone else [psutil.Process(process.pid), *victims]:
                victim.kill()
            died = time.monotonic()
            assert process.wait(timeout=60) != 0
            hit[
                f"{'one rank' if alone else 'all'}, {'inside' if any(state.glob('.*.partial')) else 'outside'} a write"
            ] += 1
            print(f"{stage}, {ranks} rank(s), {moment}: killed after step {max(steps())}, all gone after "
                  f"{time.monotonic() - died:.1f} s")  # fmt: skip
    printed = run(command("killed"), work)
    assert "continuing after step" in printed
    whole, killed = (
        load_file(work / f"outputs/{name}{ranks}" / stage / "model.safetensors") for name in ("whole", "killed")
    )
    assert whole.keys() == killed.keys()
    assert all(whole[name].numpy().tobytes() == killed[name].numpy().tobytes() for name in whole)
    print(f"{stage}, {ranks} rank(s): {dict(hit)}, the mapping is the same bit for bit")
