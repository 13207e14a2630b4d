import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from common import ranks
from common.ranks import available_memory, free_in_groups, start_process
from tests.conftest import REPOSITORY
from tests.mindmerger.scripts import free_port


def test_ranks_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "free_in_groups", lambda: math.inf)
    free = psutil.virtual_memory().available
    assert 0.5 * free < available_memory(torch.device("cpu")) < 1.5 * free
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0.5 * free < 4 * available_memory(torch.device("cpu")) < 1.5 * free


def test_a_container_or_a_job_has_less_than_its_machine(tmp_path: Path) -> None:
    assert free_in_groups(tmp_path) == math.inf
    for name, content in {"max": "max", "current": "400", "stat": "anon 200\ninactive_file 60\nactive_file 40"}.items():
        (tmp_path / f"memory.{name}").write_text(content + "\n")
    assert free_in_groups(tmp_path) == math.inf
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_in_groups(tmp_path) == 1000 - 400 + 100


@pytest.mark.parametrize(("device", "expected"), [("auto", "cuda:2"), ("cuda", "cuda:2"), ("cuda:1", "cuda:1")])
def test_a_rank_takes_its_gpu(monkeypatch: pytest.MonkeyPatch, device: str, expected: str) -> None:
    """Without one: what would be asked of it is recorded."""
    asked: list[object] = []
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", asked.append)
    assert start_process(device).device == torch.device(expected)
    assert asked == [torch.device(expected), False]


RANK = """
import sys, time
from datetime import timedelta
from common import ranks
from common.ranks import start_process
ranks.LOOK_SECONDS = 0.5
process = start_process("cpu", timeout=timedelta(seconds=4))
print("started", flush=True)
if sys.argv[1] == "computes":
    time.sleep(600)
elif process.rank == 1:
    time.sleep(600)
process.sum(1.0)
"""


@pytest.mark.parametrize(
    ("doing", "fault", "message"),
    [
        # In no collective, as a rank that waits on a GPU for the other is in none that would tell it.
        ("computes", signal.SIGKILL, "has died"),
        # Its peer is there, but hangs.
        ("waits", signal.SIGSTOP, "Timed out"),
    ],
)
def test_no_rank_outlives_another(doing: str, fault: signal.Signals, message: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, doing],
            env={**environment, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        for process in processes:
            assert process.stdout.readline() == "started\n"
        processes[1].send_signal(fault)
        begun = time.monotonic()
        if fault == signal.SIGKILL:
            processes[1].wait()
        _, errors = processes[0].communicate(timeout=60)
        assert processes[0].returncode != 0 and message in errors
        assert time.monotonic() - begun < 60
    finally:
        for process in processes:
            process.kill()
            process.communicate()


LAST_COLLECTIVE = """
import atexit, sys, time
import torch
import torch.distributed as dist
from common.ranks import start_process
from common.errors import InputError, Stopped, exit_with_message

def main():
    process = start_process("cpu", needs_group=True)
    # As DeepSpeed does: the group's threads live on.
    sys.kept = dist.group.WORLD
    # Gloo's thread, which here wants the interpreter late, as one that another process keeps from running.
    dist.all_reduce(torch.ones(1), async_op=True).get_future().then(lambda future: time.sleep(1))
    process.close()
    atexit.register(print, "done")
    print("buffered", end=" ")
    if sys.argv[1] == "stopped":
        raise Stopped("by a signal")
    if sys.argv[1] == "wrong":
        raise InputError("a flag")

exit_with_message(main)
"""


@pytest.mark.parametrize(("how", "code"), [("complete", 0), ("stopped", 75), ("wrong", 2)])
def test_a_rank_ends_with_its_code_whatever_gloo_still_does(how: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LAST_COLLECTIVE, how],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (code, "buffered done\n"), done.stderr
