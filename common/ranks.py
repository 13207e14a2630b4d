"""Ranks and devices: this process in its process group, its device, its threads, and checks on the other ranks."""

import atexit
import math
import os
import resource
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from common import errors
from common.errors import InputError, first_line

# Between two checks of the other ranks: a rank that waits on a GPU for a dead one may wait forever, and DeepSpeed's
# launcher ends such ranks one by one, with half a minute for each.
LOOK_SECONDS = 5.0
# Checks without a beat of another machine until it counts as dead: two minutes, with one more before and after.
# Checks, not seconds: a rank that was itself stopped has read no beats meanwhile.
SILENT_CHECKS = 22
_closed = threading.Event()
# Control groups; those of a container or a job have limits.
GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Process:
    """This process in its process group.

    Attributes:
        rank: 0 to `world_size` - 1, over all nodes.
        world_size: number of processes.
        device: of this process's models and batches.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process has called this."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        self.sum_(total)
        return total.tolist()

    def sum_(self, tensor: torch.Tensor) -> None:
        """Sum `tensor`, of the same shape and dtype in all processes, over them in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def concatenate(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate the tensors of all processes, each [n, ...] on its device, in rank order: [ranks * n, ...]."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def gather(self, value: Any) -> list[Any]:
        """Gather `value` of every process, in rank order, on every process. Values must be picklable."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def check_same(self, values: dict[str, Any]) -> None:
        """Raise InputError in every process, with the first differences' names, unless all have the same `values`."""
        first, *others = self.gather(values)
        for rank, other in enumerate(others, start=1):
            if names := sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name)):
                raise InputError(
                    f"{', '.join(names)} differ between rank 0 and rank {rank}: all machines need the same flags, "
                    "data, models and versions of libraries"
                )

    def peak_memory(self) -> dict[str, int]:
        """Peak bytes of this process so far, on its GPU or, without one, in host memory."""
        if self.device.type == "cuda":
            return {"peak_device_bytes": torch.cuda.max_memory_allocated(self.device)}
        return {"peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}

    def close(self) -> None:
        """Leave the process group."""
        _closed.set()
        if dist.is_initialized():
            dist.destroy_process_group()


def leave_together() -> None:
    """Wait for all ranks and leave the process group; for code that has no `Process`."""
    if dist.is_initialized():
        dist.barrier()
        _closed.set()
        dist.destroy_process_group()


def end_rank(code: int) -> None:
    """End a process that has been in a process group: like `sys.exit(code)`, without the interpreter's shutdown.

    A thread of Gloo frees a collective's tensors in the interpreter; during the interpreter's shutdown this aborts the
    process, and the launcher reports a complete run as failed. DeepSpeed keeps groups, and so their threads, beyond
    `Process.close`. `multiprocessing` ends its processes this way, too.
    """
    # Private, as in `multiprocessing`: `atexit` has no public function that runs the registered functions.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def available_memory(device: torch.device) -> int:
    """Bytes that this process may still allocate on `device`; on a CPU, its fraction of the machine's free memory."""
    if device.type == "cuda":
        # Otherwise PyTorch's cache of freed tensors would not count as free.
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    free = min(psutil.virtual_memory().available, free_in_groups())
    return int(free) // _ranks_here()


def free_in_groups(root: Path = GROUPS) -> float:
    """Bytes that this process's control groups may still allocate; infinite without limits."""
    free = math.inf
    for group in _own_groups(root):
        try:
            limit, taken = (float((group / name).read_text()) for name in ("memory.max", "memory.current"))
            kept = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            # The kernel frees cached files if memory is needed.
            free = min(free, limit - taken + float(kept["inactive_file"]) + float(kept["active_file"]))
        except (OSError, ValueError, KeyError):  # no group, or "max": no limit
            pass
    return free


def cores_in_groups(root: Path = GROUPS) -> float:
    """Cores that this process's control groups may use at a time; infinite without limits."""
    cores = math.inf
    for group in _own_groups(root):
        with suppress(OSError, ValueError):  # no group, or "max": no limit
            quota, period = map(int, (group / "cpu.max").read_text().split())
            cores = min(cores, quota / period)
    return cores


def _own_groups(root: Path) -> list[Path]:
    """Control groups (version 2) of this process: its own, then its parents up to the root."""
    try:
        own = root / Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
    except OSError:
        return []
    # In a container the path may be the host's; only its last part then exists, at the root.
    return [group for group in (own, *own.parents) if group.is_relative_to(root)]


def usable_cores() -> frozenset[str]:
    """Cores that this process may run on, each named by its processors: two, if a core runs two threads."""
    processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for number in processors:
        siblings = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        cores.add(siblings.read_text().strip() if siblings.exists() else str(number))
    return frozenset(cores)


def synchronize(device: torch.device) -> None:
    """Wait for all work on `device`, as before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_process(
    device: str = "auto", timeout: timedelta = timedelta(minutes=30), needs_group: bool = False
) -> Process:
    """Join the process group of the launcher, if there is one, and choose this rank's device.

    Sets this rank's number of threads, and float32 products to full float32 precision.

    Args:
        device: "auto" for this rank's GPU if there is one, else the CPU; "cuda" for this rank's GPU; else the name of
            a torch device.
        timeout: of a collective.
        needs_group: True to form a group of one process without a launcher, as DeepSpeed requires.

    Raises:
        InputError: unknown device, one GPU for several ranks, or a port that is in use.
    """
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    # NVIDIA's containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE: TF32 has 10 bits of mantissa in place of 23.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    chosen = _choose_device(device, local_rank)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        try:
            dist.init_process_group(backend, timeout=timeout)
        except dist.DistNetworkError as error:
            advice = "if another run has this port, choose one by deepspeed --master_port N or torchrun --master_port N"
            raise InputError(f"{first_line(error)}: {advice}") from error
    elif needs_group:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    has_group = dist.is_initialized()
    process = Process(dist.get_rank(), dist.get_world_size(), chosen) if has_group else Process(0, 1, chosen)
    peers = process.gather(_Peer(process.rank, os.getpid(), socket.gethostname(), usable_cores()))
    _share_cores(peers[process.rank], peers)
    if has_group:
        errors.end_process = end_rank
        _leave_with_peers(peers[process.rank], peers)
    return process


def _choose_device(name: str, local_rank: int) -> torch.device:
    """Device of this rank by the value of --device; a GPU becomes the current one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
        if chosen.type == "cuda":
            if chosen.index is not None and _ranks_here() > 1:
                raise RuntimeError("all ranks would share it; choose GPUs by CUDA_VISIBLE_DEVICES instead")
            chosen = torch.device("cuda", local_rank if chosen.index is None else chosen.index)
            torch.cuda.set_device(chosen)
            # In torch 2.13 its attention, the default on an H100, has NaN gradients under some masks: pytorch#196678.
            torch.backends.cuda.enable_cudnn_sdp(False)
    except (RuntimeError, AssertionError, AttributeError) as error:
        raise InputError(f"--device {name}: {error}") from error
    return chosen


def _ranks_here() -> int:
    """Number of ranks on this machine, as set by torchrun and by DeepSpeed, respectively."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "1"))


@dataclass(frozen=True)
class _Peer:
    """A rank as the other ranks see it: its process, the machine by its host name, the cores that it may use."""

    rank: int
    pid: int
    machine: str
    cores: frozenset[str]


def _share_cores(own: _Peer, peers: list[_Peer]) -> None:
    """Set this rank's threads to its fraction of the cores that it may use, unless the user has set OMP_NUM_THREADS.

    DeepSpeed's launcher starts every rank with as many threads as the machine has cores, `torchrun` with one.
    """
    is_set, by_torchrun = "OMP_NUM_THREADS" in os.environ, False
    if is_set and "TORCHELASTIC_RUN_ID" in os.environ:
        with suppress(psutil.Error):
            # The environment that `torchrun` was started with.
            by_torchrun = "OMP_NUM_THREADS" not in psutil.Process(os.getppid()).environ()
    if is_set and not by_torchrun:
        return
    here = [peer for peer in peers if peer.machine == own.machine]
    part = sum(1 / sum(core in peer.cores for peer in here) for core in own.cores)
    # The sum of thirds may be slightly less than one.
    threads = max(1, int(min(part, cores_in_groups() / len(here)) + 1e-6))
    if by_torchrun:
        torch.set_num_threads(threads)
    elif threads < len(own.cores):
        torch.set_num_threads(min(threads, torch.get_num_threads()))


def _leave_with_peers(own: _Peer, peers: list[_Peer]) -> None:
    """Until `Process.close`, end this process when another rank has died.

    Each rank checks the processes of its machine; the first rank of each machine checks the first ones of the others.
    """
    here = {peer.rank: psutil.Process(peer.pid) for peer in peers if peer.machine == own.machine and peer != own}
    firsts = {peer.machine: peer.rank for peer in reversed(peers)}.values()
    # Checks since the last beat of each.
    silent = {rank: 0 for rank in firsts if rank != own.rank} if own.rank in firsts else {}

    def find_dead() -> str | None:
        for rank, process in here.items():
            if not _is_alive(process):
                return f"rank {rank} (process {process.pid}) has died"
        for rank in silent:
            silent[rank] += 1
            if silent[rank] > SILENT_CHECKS:
                seconds = round(SILENT_CHECKS * LOOK_SECONDS)
                return f"no sign of rank {rank} for {seconds} s: it, its machine or the network has failed"
        return None

    def look() -> None:
        while not _closed.wait(LOOK_SECONDS):
            found = find_dead()
            # Leaves time for errors of the dead rank and of this one to be printed first.
            if found and not _closed.wait(LOOK_SECONDS):
                print(f"error (rank {own.rank}): {found}", file=sys.stderr, flush=True)
                os._exit(1)

    _closed.clear()
    if silent:
        # A second connection: the group's is in use while it waits for another rank.
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
        threading.Thread(target=_beat, args=(own.rank, store, silent), daemon=True).start()
    if here or silent:
        threading.Thread(target=look, daemon=True).start()


def _beat(own: int, store: dist.Store, silent: dict[int, int]) -> None:
    """Count up this rank's beats in the store, and set `silent` to 0 for each other rank whose beats have gone up."""
    beats = dict.fromkeys(silent, 0)
    # If the rank that holds the store has died, all others are silent.
    with suppress(RuntimeError):
        while not _closed.wait(LOOK_SECONDS):
            store.add(f"beats/{own}", 1)
            for rank, before in beats.items():
                beats[rank] = store.add(f"beats/{rank}", 0)
                if beats[rank] != before:
                    silent[rank] = 0


def _is_alive(peer: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return peer.is_running() and peer.status() != psutil.STATUS_ZOMBIE
    return False
