"""Comparison of two ways to do the same work, run in turn: the cost of each, and the difference of their results.

A benchmark starts a new process for every run, so that no run inherits another's memory or caches:

    baseline, ours = in_turn(lambda: run(words("baseline")), lambda: run(words("ours")), rounds)
    report("gram", baseline, ours, difference)

To measure only a part of a process, such as the cost beside the loaded model, put that part into `with measured():`.
Without it the whole process is measured, including imports.
"""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

COST_FILE = "BENCHMARK_COST_FILE"
# Linux counts the memory of the parent in the peak of a new process, so a small parent starts it.
LAUNCHER = """
import json, os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - started
with open(sys.argv[1], "w") as file:
    json.dump([os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss * 1024], file)
"""


@dataclass(frozen=True)
class Cost:
    """Wall-clock seconds and peak resident memory in bytes of a process."""

    seconds: float
    peak_bytes: int


@contextlib.contextmanager
def measured() -> Iterator[None]:
    """Measure only this block of the process started by `run`; its peak is relative to the memory before it."""
    # Linux: resets the peak of resident memory in /proc.
    Path("/proc/self/clear_refs").write_text("5")
    before, started = _status("VmRSS"), time.perf_counter()
    yield
    cost = Cost(time.perf_counter() - started, _status("VmHWM") - before)
    if COST_FILE in os.environ:
        Path(os.environ[COST_FILE]).write_text(json.dumps(asdict(cost)))


def run(words: list[str]) -> Cost:
    """Cost of `python words...`, or of its part inside `measured`.

    Raises:
        SystemExit: the process failed; its own output has the reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, whole = Path(folder) / "cost.json", Path(folder) / "whole.json"
        launcher = [sys.executable, "-S", "-c", LAUNCHER, str(whole)]
        subprocess.run([*launcher, sys.executable, *words], env=os.environ | {COST_FILE: str(file)}, check=True)
        code, seconds, peak = json.loads(whole.read_text())
        if code:
            raise SystemExit(f"exit code {code} of: {' '.join(words)}")
        return Cost(**json.loads(file.read_text())) if file.exists() else Cost(seconds, peak)


def in_turn(baseline: Callable[[], Cost], ours: Callable[[], Cost], rounds: int) -> tuple[Cost, Cost]:
    """Run both, one after the other, `rounds` times.

    Returns:
        Medians, (baseline, ours).
    """
    costs: tuple[list[Cost], list[Cost]] = ([], [])
    for number in range(rounds):
        for name, side, kept in zip(("baseline", "ours"), (baseline, ours), costs, strict=True):
            kept.append(side())
            print(f"round {number + 1} of {rounds}, {name}: {kept[-1].seconds:.2f} s, {kept[-1].peak_bytes:,} bytes")
            sys.stdout.flush()
    first, second = (
        Cost(statistics.median(cost.seconds for cost in kept), round(statistics.median(c.peak_bytes for c in kept)))
        for kept in costs
    )
    return first, second


def report(benchmark: str, baseline: Cost, ours: Cost, max_relative_difference: float | None, **more: object) -> None:
    """Print the result as one JSON object, the last line of a benchmark's output.

    Args:
        benchmark: name of the row.
        baseline, ours: cost of each side.
        max_relative_difference: between the results of the two, as defined by the benchmark; None if they do not
            compare.
        more: further results.
    """
    print(
        json.dumps(
            {
                "benchmark": benchmark,
                "baseline_s": round(baseline.seconds, 3),
                "ours_s": round(ours.seconds, 3),
                "speedup": round(baseline.seconds / ours.seconds, 2),
                "baseline_peak_bytes": baseline.peak_bytes,
                "ours_peak_bytes": ours.peak_bytes,
                "max_relative_difference": max_relative_difference,
                **more,
                "machine": machine(),
            }
        ),
        flush=True,
    )


def machine() -> str:
    """Name of the processor and number of usable cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024
