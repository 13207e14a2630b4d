"""Growth of each cost: seconds against size on logarithmic axes, and exponents of straight lines fitted to them.

    python -m benchmarks.growth

writes docs/growth.svg and prints the exponents. Each point is the minimum of three timings, with synthetic inputs,
float32 and all cores of this machine; for the curve over ranks, one core for each.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MT5Config, MT5EncoderModel

from benchmarks.regmean_inputs import make_layer
from benchmarks.side_by_side import machine
from mindmerger.batching import Tokens, lay_out
from mindmerger.modeling import MindMergerConfig, MindMergerForCausalLM
from regmean.average import weighted_mean
from regmean.gram import add_products
from regmean.solve import System

PLOT = Path(__file__).resolve().parent.parent / "docs" / "growth.svg"
ROW = 100  # tokens of a training row, split like a question's pair


def seconds(work: Callable[[], object]) -> float:
    """Minimum of three timings, after one warm-up."""
    found = []
    for _ in range(4):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found[1:])


def gram_seconds(tokens: int, width: int) -> float:
    """Seconds to add `tokens` rows to one layer input's sum."""
    total, rows = torch.zeros(width, width), torch.randn(tokens, width)
    return seconds(lambda: add_products(total, rows))


def merge_seconds(width: int, models: int) -> float:
    """Seconds for one square layer of three models or more, Grams in memory: factor, solution, objective."""
    rows = torch.randn(models, 2 * width, width)
    grams = [x.T @ x / len(x) for x in rows]
    weights = torch.randn(models, width, width)

    def work() -> None:
        system = System(lambda index: grams[index].numpy(), [1] * models, [1 / models] * models, "cholesky")
        system.regress([weight.clone() for weight in weights], weights.mean(0)).solve(0.9)

    return seconds(work)


def average_seconds(elements: int, models: int) -> float:
    arrays = [np.ones(elements, np.float32)] * models
    return seconds(lambda: weighted_mean(arrays, [1 / models] * models))


def training_seconds(rows: int, width: int) -> float:
    """Seconds for forward and backward of a packed micro batch through four layers of this width."""
    torch.manual_seed(0)
    llm = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=4,
            num_attention_heads=width // 64,
            vocab_size=512,
        )
    )
    encoder = MT5EncoderModel(MT5Config(d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, vocab_size=512))
    config = MindMergerConfig(llm_hidden_size=width, mt_hidden_size=64, llm_bos_token_id=1)
    model = MindMergerForCausalLM(config, encoder, llm)
    assert model.pack_rows()
    ids = list(range(10, 10 + ROW // 2))
    batch = lay_out([Tokens(source=ids, prompt=[], target=ids)] * rows, 1, packed=True)
    return seconds(lambda: model(batch=batch).loss.backward())


def ranks_seconds(ranks: int, folder: Path) -> float:
    """Seconds that compute_gram.py reports for a model of one layer, each rank on one core."""
    model = folder / "model"
    if not model.exists():
        make_layer(model, 1024, 3584, torch.float32)
        lines = (json.dumps({"text": "x" * 256}) + "\n" for _ in range(96))
        (folder / "texts.jsonl").write_text("".join(lines))
    words = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "compute_gram.py", "--model", str(model)]
    words += ["--dataset", str(folder / "texts.jsonl"), "--text_column", "text", "--max_length", "256"]
    words += ["--device", "cpu", "--output_dir", str(folder / f"gram_{ranks}")]
    cores = sorted(os.sched_getaffinity(0))[:ranks]
    output = subprocess.run(
        [sys.executable, *words],
        check=True,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    ).stdout
    return float(output.strip().splitlines()[-1].rsplit(", ", 1)[1].removesuffix(" s"))


def exponent(sizes: list[int], costs: list[float]) -> float:
    """Slope of the straight line through (log size, log cost), by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        curves = {
            "Gram of one input, by tokens": ([2**n for n in range(9, 14)], lambda n: gram_seconds(n, 1024)),
            "Gram of one input, by width": ([2**n for n in range(9, 13)], lambda n: gram_seconds(1024, n)),
            "regmean of one layer, by width": ([2**n for n in range(8, 12)], lambda n: merge_seconds(n, 3)),
            "regmean of one layer, by models": ([3, 4, 6, 8], lambda n: merge_seconds(1024, n)),
            "avg, by elements": ([2**n for n in range(20, 25)], lambda n: average_seconds(n, 2)),
            "avg, by models": ([2, 4, 8], lambda n: average_seconds(2**22, n)),
            "training step, by rows": ([4, 8, 16, 32], lambda n: training_seconds(n, 256)),
            "training step, by width": ([128, 256, 512, 1024], lambda n: training_seconds(8, n)),
            "compute_gram.py, by ranks": ([1, 2], lambda n: ranks_seconds(n, Path(folder))),
        }
        costs = {}
        for name, (sizes, timed) in curves.items():
            costs[name] = [timed(size) for size in sizes]
            print(name, *(f"{size}: {cost:.4f} s" for size, cost in zip(sizes, costs[name], strict=True)), sep="  ")
    draw({name: (sizes, costs[name]) for name, (sizes, _) in curves.items()})
    fitted = {name: round(exponent(sizes, costs[name]), 2) for name, (sizes, _) in curves.items()}
    print(json.dumps({"benchmark": "growth", "exponents": fitted, "machine": machine()}))


def draw(curves: dict[str, tuple[list[int], list[float]]]) -> None:
    """Draw a small panel for each curve, with its fitted line and exponent."""
    matplotlib.use("svg")
    # Makes the file reproducible.
    matplotlib.rcParams["svg.hashsalt"] = "growth"
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, panels = plt.subplots(3, math.ceil(len(curves) / 3), figsize=(9, 7.5), constrained_layout=True)
    for panel, (name, (sizes, costs)) in zip(panels.flat, curves.items(), strict=False):
        slope, offset = np.polyfit(np.log(sizes), np.log(costs), 1)
        panel.loglog(sizes, np.exp(offset) * np.array(sizes, float) ** slope, color="0.7")
        panel.loglog(sizes, costs, "o", color="#0b6e4f")
        panel.set_title(f"{name}: $n^{{{slope:.2f}}}$", fontsize=9)
        panel.set_xticks(sizes, [f"{size:,}" if size < 10**6 else f"{size / 2**20:.0f}M" for size in sizes], fontsize=7)
        # At least two ticks in a panel that spans a factor of two.
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        panel.tick_params(axis="y", labelsize=7)
        panel.minorticks_off()
        panel.set_ylabel("seconds", fontsize=7)
    figure.savefig(PLOT, metadata={"Date": None})


if __name__ == "__main__":
    main()
