"""Checks of all code that differs on a GPU: equality with the CPU, then seconds, memory and waits at full width.

    python -m benchmarks.gpu            # about eight minutes
    python -m benchmarks.gpu --small --device cpu

Weights are random, of Llama-3-8B's and mT5-xl's shapes, with as many layers as memory allows; nothing is downloaded.
Each check prints a JSON line; a table follows. Checks that fail or do not fit into the time are listed, and the others
continue. The exit code is 1 if an equality check fails. `roofline` is the fraction of the rate that the first check
measures: of products in 16 bits for Grams and training, in float32 for merges, of a copy for decoding.
"""

import argparse
import gc
import json
import math
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.gpu.equality import EQUALITY, PROGRAMS
from benchmarks.gpu.measure import Bench, LeftOut, adapt_to_older_torch
from benchmarks.gpu.speed import SPEED, rates
from common.errors import first_line
from common.logging import quiet_libraries
from common.ranks import start_process

Check = Callable[[Bench], list[dict[str, Any]]]
COLUMNS = (
    *("check", "result", "what", "ms", "roofline", "peak_GB", "planned_GB", "published_GB"),
    *("waits", "difference", "at_most"),
)


def main() -> int:
    """Run the checks and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes: a dry run of the checks themselves")
    parser.add_argument("--device", default="auto", help="auto (GPU if there is one), cpu, cuda")
    parser.add_argument(
        "--seconds", type=float, default=480.0, help="time limit; checks that may exceed it are left out"
    )
    flags = parser.parse_args()
    quiet_libraries()
    if flags.small:
        # At such sizes several threads are slower than one.
        torch.set_num_threads(1)
    ends = time.monotonic() + flags.seconds
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(start_process(flags.device), flags.small, Path(folder))
        is_adapted = adapt_to_older_torch()
        show(
            {"check": "setup", "device": torch.cuda.get_device_name(bench.device) if bench.is_cuda else "cpu"}
            | {"torch": torch.__version__, "transformers": transformers.__version__, "small": flags.small}
            | {"varlen_attn_adapted": is_adapted}
        )
        for check, seconds in ({rates: SPEED[rates]} | EQUALITY | SPEED | PROGRAMS).items():
            left = float("inf") if flags.small else ends - time.monotonic()
            lines.append(line_of(check, bench, seconds, left))
            show(lines[-1])
    print(table(lines))
    return int(any(line["kind"] == "equality" and line["result"] == "failed" for line in lines))


def line_of(check: Check, bench: Bench, needed: float, left: float) -> dict[str, Any]:
    """Results of a check, or the reason why there are none."""
    line: dict[str, Any] = {"check": check.__name__, "kind": "speed" if check in SPEED else "equality"}
    if left < needed:
        return line | {"result": "left out", "reason": f"{left:.0f} s are left, and it may take {needed:.0f}"}
    started = time.monotonic()
    try:
        rows = check(bench)
        failed = any(row.pop("failed", False) for row in rows)
        line |= {"result": "failed" if failed else "measured" if check in SPEED else "passed", "rows": rows}
    except LeftOut as reason:
        line |= {"result": "left out", "reason": str(reason)}
    except Exception as error:
        traceback.print_exc()
        # The line is published: paths are reduced to their names.
        reason = re.sub(r"/[\w./-]+", lambda path: Path(path[0]).name, first_line(error))
        line |= {"result": "failed", "reason": f"{type(error).__name__}: {reason}"}
    gc.collect()
    if bench.is_cuda:
        torch.cuda.empty_cache()
    return line | {"took_s": time.monotonic() - started}


def show(line: dict[str, Any]) -> None:
    """Print a JSON line with numbers rounded to four digits."""
    print(json.dumps(rounded(line)), flush=True)


def rounded(value: Any) -> Any:
    """Round every float in a value to four digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown table of all checks, with a row for each figure."""
    cells = [COLUMNS, ["---"] * len(COLUMNS)]
    for line in lines:
        for row in line.get("rows") or [{"what": line["reason"]}]:
            row = row | {"check": line["check"], "result": line["result"]}
            if "seconds" in row:
                row["ms"] = 1e3 * row["seconds"]
            if "waits" in row:
                row["waits"] = sum(row["waits"].values())
            values = (row.get(column, "") for column in COLUMNS)
            cells.append([f"{value:.3g}" if isinstance(value, float) else str(value) for value in values])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


if __name__ == "__main__":
    sys.exit(main())
