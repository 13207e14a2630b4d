"""Ranks and devices: this process among its peers, and where its tensors are."""

import atexit
import math
import os
import resource
import socket
import sys
import threading
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from common import errors
from common.errors import InputError

# A rank that waits on a GPU for a dead one may not notice, and DeepSpeed's launcher ends such ranks one by one, with
# half a minute for each. So each rank checks its peers, this often.
LOOK_SECONDS = 5.0
_closed = threading.Event()


@dataclass(frozen=True)
class Process:
    """This process among its peers.

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
        """Wait until every process is here."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        self.sum_(total)
        return total.tolist()

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace `tensor`, of one shape and dtype everywhere, in place by its sum over all processes.

        This and those beside it wait for all processes; where one of a machine has died, its others end themselves.
        """
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def concatenate(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes, of one shape [n, ...] and on their devices, in rank order: [ranks * n, ...]."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, in rank order, on every process. Values must pickle."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def peak_memory(self) -> dict[str, int]:
        """The most bytes this process has held so far, on its GPU or, without one, in host memory."""
        if self.device.type == "cuda":
            return {"peak_device_bytes": torch.cuda.max_memory_allocated(self.device)}
        return {"peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}

    def rng_state(self) -> torch.Tensor:
        """State of the generator that this device draws from, uint8 on the CPU."""
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Restore the state of that generator, a `rng_state` of this kind of device."""
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)

    def close(self) -> None:
        """Leave the process group."""
        _closed.set()
        if dist.is_initialized():
            dist.destroy_process_group()


def leave_together() -> None:
    """Wait for all ranks and leave the process group, in code that holds no `Process`."""
    if dist.is_initialized():
        dist.barrier()
        _closed.set()
        dist.destroy_process_group()


def end_rank(code: int) -> None:
    """End a process that has been in a process group: as `sys.exit(code)`, without the interpreter's shutdown.

    A thread of Gloo's lets go of a collective's tensors when it next runs, and asks the interpreter to free them: one
    that is ending aborts the process, and the launcher calls a run failed that is complete. DeepSpeed keeps groups, and
    with them their threads, beyond `Process.close`. `multiprocessing` ends its processes this way.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def available_memory(device: torch.device) -> int:
    """Bytes that this process may still take on `device`; ranks that share a machine's memory share what is free."""
    if device.type == "cuda":
        # What PyTorch keeps of freed tensors would not count as free.
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    free = min(psutil.virtual_memory().available, free_in_groups())
    return int(free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_in_groups(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that this process's control groups, those of a container or a job, may still take; infinite without limits.

    Args:
        root: where the kernel shows control groups, version 2.
    """
    try:
        own = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
    except OSError:
        return math.inf
    free = math.inf
    # In a container the path may be the host's, of which only the last part exists, at the root.
    for group in (root / own, *(root / own).parents):
        try:
            limit, taken = (float((group / name).read_text()) for name in ("memory.max", "memory.current"))
            kept = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            # Of what is taken, cached files may go.
            free = min(free, limit - taken + float(kept["inactive_file"]) + float(kept["active_file"]))
        except (OSError, ValueError, KeyError):  # no group, or "max": no limit
            pass
        if group == root:
            break
    return free


def finish(device: torch.device) -> None:
    """Synchronize: wait until `device` has done all work that was started on it, as before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a computation ran out of memory, on a GPU or in PyTorch's allocator of host memory."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def start_process(
    device: str = "auto", timeout: timedelta = timedelta(minutes=30), needs_group: bool = False
) -> Process:
    """Join the process group that the launcher announced in the environment, if any, and pick this rank's device.

    Args:
        device: "auto" takes this rank's GPU where there is one, else the CPU; "cuda" this rank's GPU; any other torch
            device name that very device.
        timeout: of a collective.
        needs_group: without a launcher, form a group of one, which DeepSpeed needs.

    Raises:
        InputError: no such device.
    """
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        if chosen.type == "cuda":
            chosen = torch.device("cuda", local_rank if chosen.index is None else chosen.index)
            torch.cuda.set_device(chosen)
            # In torch 2.13 its attention, the default on an H100, has NaN gradients under some masks: pytorch#196678.
            torch.backends.cuda.enable_cudnn_sdp(False)
    except (RuntimeError, AssertionError, AttributeError) as error:
        raise InputError(f"--device {device}: {error}") from error

    backend = "nccl" if chosen.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    elif needs_group:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not dist.is_initialized():
        return Process(0, 1, chosen)
    process = Process(dist.get_rank(), dist.get_world_size(), chosen)
    _leave_with_peers(process)
    return process


def _leave_with_peers(process: Process) -> None:
    """From now until `Process.close`, end this process when another rank on this machine has died."""
    here = _where_pids_count()
    pids = [pid for where, pid in process.gather((here, os.getpid())) if where == here and pid != os.getpid()]
    peers = [psutil.Process(pid) for pid in pids]

    def look() -> None:
        while not _closed.wait(LOOK_SECONDS):
            dead = [peer.pid for peer in peers if not _is_alive(peer)]
            # This rank's own error, if it has one, and the dead one's come first.
            if dead and not _closed.wait(LOOK_SECONDS):
                print(
                    f"error (rank {process.rank}): process {dead[0]} of this run has died", file=sys.stderr, flush=True
                )
                os._exit(1)

    errors.end_process = end_rank
    _closed.clear()
    if peers:
        threading.Thread(target=look, daemon=True).start()


def _where_pids_count() -> tuple[str, ...]:
    """Equal for processes with one space of process ids: machines and containers may have the same host name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    linux = (boot.read_text(), str(Path("/proc/self/ns/pid").readlink())) if boot.exists() else ()
    return socket.gethostname(), *linux


def _is_alive(peer: psutil.Process) -> bool:
    try:
        return peer.is_running() and peer.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
