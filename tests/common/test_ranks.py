import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from common import ranks
from common.errors import InputError, is_out_of_memory, within_memory
from common.ranks import available_memory, cores_in_groups, free_in_groups, start_process
from tests.conftest import REPOSITORY
from tests.mindmerger.scripts import ENVIRONMENT, deepspeed_command, free_port, run, torchrun_command


def test_ranks_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "free_in_groups", lambda: math.inf)
    free = psutil.virtual_memory().available
    assert 0.5 * free < available_memory(torch.device("cpu")) < 1.5 * free
    for name, count in {"LOCAL_SIZE": 2, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(count))
        assert 0.5 * free < count * available_memory(torch.device("cpu")) < 1.5 * free


def test_a_container_or_a_job_has_less_than_its_machine(tmp_path: Path) -> None:
    assert free_in_groups(tmp_path) == math.inf
    for name, content in {"max": "max", "current": "400", "stat": "anon 200\ninactive_file 60\nactive_file 40"}.items():
        (tmp_path / f"memory.{name}").write_text(content + "\n")
    assert free_in_groups(tmp_path) == math.inf
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_in_groups(tmp_path) == 1000 - 400 + 100
    for content, cores in {"max 100000": math.inf, "250000 100000": 2.5}.items():
        (tmp_path / "cpu.max").write_text(content + "\n")
        assert cores_in_groups(tmp_path) == cores


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"), False),
    ],
)
def test_memory_runs_out_in_several_ways(error: RuntimeError, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
    with pytest.raises(InputError if expected else type(error)) as raised, within_memory("use less"):
        raise error
    assert (str(raised.value) == "use less") is expected


PRECISION = """
import torch
from common.ranks import start_process
def show():
    print(torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
show()
start_process("cpu")
show()
"""


def test_float32_is_float32_whatever_a_container_sets() -> None:
    environment = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    shown = run([sys.executable, "-c", PRECISION], REPOSITORY, environment=environment).splitlines()
    assert shown == ["high True True", "highest False False"]


THREADS = """
import math, os
import torch
from common import ranks
from common.ranks import start_process
# As on a machine of eight cores.
ranks.usable_cores, ranks.cores_in_groups = lambda: frozenset("abcdefgh"), lambda: math.inf
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(8)
process = start_process("cpu")
threads = process.gather(torch.get_num_threads())
if process.is_main:
    print("threads:", *threads)
process.close()
"""


def test_ranks_share_the_cores_under_every_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "threads.py"
    script.write_text(THREADS)

    def threads(command: list[str], **environment: str) -> list[int]:
        shown = run(command, tmp_path, environment=environment).splitlines()
        return [int(word) for line in shown if line.startswith("threads:") for word in line.split()[1:]]

    monkeypatch.delitem(ENVIRONMENT, "OMP_NUM_THREADS", raising=False)
    assert threads(deepspeed_command(2, script)) == [4, 4]
    # `torchrun` sets 1 for any number of cores.
    assert threads(torchrun_command(2, script)) == [4, 4]
    assert threads(torchrun_command(2, script), OMP_NUM_THREADS="1") == [1, 1]


@pytest.mark.parametrize(
    ("own", "others", "quota", "expected"),
    [
        (8, [8], math.inf, 4),
        (8, [8, 8], math.inf, 2),
        (8, [8] * 15, math.inf, 1),
        (8, [8], 3.0, 1),
        (8, [], 3.5, 3),
        (6, [6, 6], math.inf, 2),
        # Another rank may use half of those cores, too.
        (8, [4], math.inf, 6),
        # No other rank: PyTorch's own number is kept.
        (8, [], math.inf, None),
        (8, ["elsewhere"], math.inf, None),
    ],
)
def test_a_rank_takes_its_part_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, own: int, others: list, quota: float, expected: int | None
) -> None:
    def peer(rank: int, cores: int | str) -> ranks._Peer:
        if cores == "elsewhere":
            return ranks._Peer(rank, rank, "other", frozenset("01234567"))
        return ranks._Peer(rank, rank, "this", frozenset(map(str, range(cores))))

    found: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(ranks, "cores_in_groups", lambda: quota)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    peers = [peer(rank, cores) for rank, cores in enumerate([own, *others])]
    ranks._share_cores(peers[0], peers)
    assert found == [] if expected is None else [expected]
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    found.clear()
    ranks._share_cores(peers[0], peers)
    assert found == []


@pytest.mark.parametrize(("device", "expected"), [("auto", "cuda:2"), ("cuda", "cuda:2"), ("cuda:1", "cuda:1")])
def test_a_rank_takes_its_gpu(monkeypatch: pytest.MonkeyPatch, device: str, expected: str) -> None:
    """Calls to a GPU are recorded instead of run."""
    asked: list[object] = []
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", asked.append)
    assert start_process(device).device == torch.device(expected)
    assert asked == [torch.device(expected), False]
    for launched in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.setenv(launched, "2")
        if device == "cuda:1":
            with pytest.raises(InputError, match="^--device cuda:1: all ranks would share it; choose GPUs by CUDA"):
                start_process(device)
        else:
            assert start_process(device).device == torch.device(expected)
        monkeypatch.delenv(launched)


def test_a_port_that_is_in_use_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "0"}
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match=f"port: {port}, .*: if another run has .*deepspeed --master_port N"):
            start_process("cpu")


RANK = """
import os, sys, time
from datetime import timedelta
from common import ranks
from common.ranks import start_process
ranks.LOOK_SECONDS = 0.5
if "machines" in sys.argv:
    ranks.LOOK_SECONDS = 0.2
    ranks.socket.gethostname = lambda: os.environ["RANK"]
process = start_process("cpu", timeout=timedelta(seconds=4 if sys.argv[1] == "waits" else 60))
print("started", flush=True)
if sys.argv[1] == "computes":
    time.sleep(600)
elif sys.argv[1] == "a while":
    time.sleep(9)
elif process.rank == 1:
    time.sleep(600)
process.sum(1.0)
process.close()
"""


FAILING = """
import threading, time
import torch
import torch.distributed as dist
from common import ranks
from common.errors import exit_with_message
from common.ranks import start_process
ranks.LOOK_SECONDS = 0.5

def main():
    process = start_process("cpu")
    print("started", flush=True)
    if process.rank == 1:
        # Never completes without the other rank; the interpreter would wait for the thread.
        threading.Thread(target=dist.all_reduce, args=(torch.ones(1),)).start()
        raise ValueError("of no foreseen kind")
    time.sleep(600)

exit_with_message(main)
"""


@contextmanager
def two_ranks(errors: Path, program: str, *words: str) -> Iterator[list[subprocess.Popen]]:
    """Start two ranks without a launcher and wait until each has printed `started`; stderr goes to `errors`."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(free_port())
    with errors.open("a") as stderr:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", program, *words],
                env={**environment, "RANK": rank, "LOCAL_RANK": rank},
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
            for rank in "01"
        ]
    try:
        for process in processes:
            assert process.stdout.readline() == "started\n"
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("doing", "fault", "message"),
    [
        # Not in a collective: neither would a rank that waits on a GPU for the other be notified.
        ("computes", signal.SIGKILL, "rank 1 .* has died"),
        # The other rank exists, but hangs.
        ("waits", signal.SIGSTOP, "Timed out"),
    ],
)
def test_no_rank_outlives_another(tmp_path: Path, doing: str, fault: signal.Signals, message: str) -> None:
    with two_ranks(tmp_path / "errors", RANK, doing) as processes:
        processes[1].send_signal(fault)
        begun = time.monotonic()
        if fault == signal.SIGKILL:
            processes[1].wait()
        assert processes[0].wait(timeout=60) != 0
        assert time.monotonic() - begun < 60
        assert re.search(message, (tmp_path / "errors").read_text())


@pytest.mark.parametrize("dead", [1, 0], ids=["", "with the store"])
def test_a_rank_that_dies_on_another_machine_is_missed(tmp_path: Path, dead: int) -> None:
    """Each rank treats the other as one of another machine; one check per 0.2 s, of which 22 may find no beat."""
    with two_ranks(tmp_path / "errors", RANK, "computes", "machines") as processes:
        time.sleep(2)
        processes[dead].kill()
        begun = time.monotonic()
        assert processes[1 - dead].wait(timeout=60) == 1
        assert 4 < time.monotonic() - begun < 30
        assert f"error (rank {1 - dead}): no sign of rank {dead} for 4 s" in (tmp_path / "errors").read_text()


@pytest.mark.parametrize(("stopped", "seconds"), [([1], 2), ([0, 1], 6)], ids=["less than the limit", "both, longer"])
def test_ranks_that_were_only_stopped_go_on(tmp_path: Path, stopped: list[int], seconds: float) -> None:
    with two_ranks(tmp_path / "errors", RANK, "a while", "machines") as processes:
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for rank in stopped:
                processes[rank].send_signal(number)
            time.sleep(seconds)
        assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert (tmp_path / "errors").read_text() == ""


def test_an_error_of_any_kind_ends_all_ranks_and_comes_first(tmp_path: Path) -> None:
    with two_ranks(tmp_path / "errors", FAILING) as processes:
        assert [process.wait(timeout=60) for process in processes] == [1, 1]
    errors = (tmp_path / "errors").read_text()
    assert errors.startswith("error (rank 1): Traceback")
    assert errors.index("ValueError: of no foreseen kind") < errors.index("error (rank 0): rank 1 (process")


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
