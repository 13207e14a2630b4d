"""Seconds, fraction of the roofline, peak memory beside its estimate, and waits of the host, at full width."""

import contextlib
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForTextEncoding

from benchmarks.decoding import StandIn
from benchmarks.gpu.measure import HALF, ROOM, Bench, LeftOut, random_model, random_texts
from benchmarks.host import mean_rows, merge_rows
from benchmarks.regmean_inputs import make_layer, make_sibling
from mindmerger.batching import Batch, Tokens, lay_out
from mindmerger.config import ModelFlags
from mindmerger.evaluation.decoding import greedy_steps
from mindmerger.modeling import InputEmbeds, MindMergerConfig, MindMergerForCausalLM
from regmean.calibration import collate
from regmean.config import MergeFlags
from regmean.gram import GramSums, add_products, zeros
from regmean.gram_file import FILE_NAME, Gram, GramFile, write_grams
from regmean.hooks import LinearInputs, linear_layers
from regmean.merge import merge
from regmean.solve import System
from tools.estimate import LAUNCH_SECONDS, causal_lm_on_meta, weight_bytes
from tools.estimate_mindmerger import (
    MEAN_PAIR,
    MEAN_PROBLEM,
    Row,
    encoder_cost,
    model_on_meta,
    prefill_cost,
    step_cost,
)
from tools.estimate_regmean import batch_cost, estimate_merge, layer_inputs

ALPHA = 0.1
LIMIT = 512  # tokens of a source, a prompt and a target: the flags' defaults
# For each stage: the published rows of a micro batch, a row of mean length and one at the limits.
STAGES = {
    "mapping": (8, Row(MEAN_PAIR.source, 0, MEAN_PAIR.target), Row(LIMIT, 0, LIMIT)),
    "augmentation": (2, MEAN_PROBLEM, Row(LIMIT, LIMIT, LIMIT)),
}
SMALL_ROW = Row(8, 0, 6)


def rates(bench: Bench) -> list[dict[str, Any]]:
    """Roofline: measured rates of 16-bit products, float32 products and a copy."""
    roofline = bench.roofline
    figures = {"half_TFLOPs": roofline.half_flops / 1e12, "single_TFLOPs": roofline.single_flops / 1e12}
    figures |= {"GB_per_s": roofline.bandwidth / 1e9, "free_GB": roofline.memory / 1e9}
    return [{"what": ", ".join(f"{name} {value:.4g}" for name, value in figures.items())} | figures]


def gram_batch(bench: Bench) -> list[dict[str, Any]]:
    """A batch of texts of 256 tokens through the LLM and into its sums, and the sums of one input alone."""
    planned, llm = bench.planned_llm, bench.llm
    layers, sums = linear_layers(llm), GramSums()
    rows = bench.tokens // bench.length
    texts = random_texts(rows, bench.length, bench.length, llm.config.vocab_size)
    with LinearInputs(layers, llm.get_output_embeddings(), sums.add, True, sums.shared_name) as inputs:

        def batch() -> None:
            ids, mask = (tensor.to(bench.device) for tensor in collate(texts))
            inputs.run(llm, ids, mask)

        peak = bench.peak_of(batch, llm)
        with bench.waits() as waits:
            batch()
        seconds = bench.seconds_of(batch)
    widths = [len(total) for total in sums.totals.values()]
    flops = batch_cost(planned, rows, bench.length, bench.roofline).flops + bench.tokens * sum(w**2 for w in widths)
    memory = bench.planned_grams(planned).memory
    found = [
        {
            "what": f"a batch of {bench.tokens} tokens, {llm.config.num_hidden_layers} layers",
            "seconds": seconds,
            "roofline": flops / bench.roofline.half_flops / seconds,
            "peak_GB": peak / 1e9,
            "planned_GB": (memory["sums"] + memory["activations"]) / 1e9,
            "waits": waits,
        }
    ]
    for width in sorted(set(widths)):
        total, x = zeros(width, bench.device), torch.randn(bench.tokens, width, device=bench.device, dtype=HALF)
        seconds = bench.seconds_of(lambda total=total, x=x: add_products(total, x), 2.0)
        fraction = bench.tokens * width**2 / bench.roofline.half_flops / seconds
        found.append({"what": f"sum of {width} inputs", "seconds": seconds, "roofline": fraction})
    return found


def write_pair(bench: Bench, folder: Path, small: bool) -> list[Path]:
    """Write two models of one bfloat16 layer of Llama-3-8B's shape, with Grams of random rows; return their folders."""
    shape = (512, 700) if small else (4096, 14336)
    models = [make_layer(folder / "A", *shape, HALF)]
    models.append(make_sibling(models[0], folder / "B"))
    inputs = layer_inputs(causal_lm_on_meta(str(models[0])))
    widths = {each.layers[0]: each.width for each in inputs}
    described = [Gram(name, tuple(each.layers), 1000, each.width) for name, each in zip(widths, inputs, strict=True)]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)

        def make(name: str) -> Any:
            x = torch.randn(2 * widths[name], widths[name], device=bench.device)
            return (x.T @ x).cpu().numpy()

        write_grams(model / FILE_NAME, described, make, {})
    return models


def merge_layer(bench: Bench) -> list[dict[str, Any]]:
    """merge_model.py's merge of one layer of Llama-3-8B's shape, files to files; the host's work alone, with copies
    for solutions; and the widest system alone.
    """
    alone = widest_system(bench)
    with tempfile.TemporaryDirectory() as work:
        models = [str(model) for model in write_pair(bench, Path(work), bench.small)]
        options = {"models": models, "alpha": [ALPHA], "output_dir": str(Path(work) / "merged")}
        flags = MergeFlags(method="regmean", grams=models, device=str(bench.device), **options)
        planned = estimate_merge(MergeFlags(method="regmean", plan="h100", **options), bench.roofline)
        times: list[float] = []

        def run() -> None:
            started = time.perf_counter()
            with contextlib.redirect_stdout(sys.stderr):
                merge(flags, "benchmarks.gpu")
            times.append(time.perf_counter() - started)

        peak = bench.peak_of(run)
        ((what, seconds, _, gigabytes),) = merge_rows(Path(work), device=str(bench.device))
    host = {"what": f"{what}: {gigabytes / seconds:.3g} GB/s", "seconds": seconds}
    whole = {
        "what": f"files to files; {planned.seconds:.2g} s planned",
        "seconds": times[0],
        "roofline": planned.flops / bench.roofline.single_flops / times[0],
        "peak_GB": peak / 1e9,
        "planned_GB": planned.peak / 1e9,
    }
    return [whole, host, alone]


def host_work(bench: Bench) -> list[dict[str, Any]]:
    """A Gram from the device to a file and back, and the mean of two models' tensors, on the host."""
    width, elements = (700, 1 << 16) if bench.small else (14336, 1 << 26)
    total = torch.ones(width, width, device=bench.device)
    described = [Gram("a", ("a",), 1, width)]
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / FILE_NAME
        pinned = lambda shape, dtype: torch.empty(shape, pin_memory=bench.is_cuda).numpy()  # noqa: E731
        seconds = {
            "to a file": bench.seconds_of(lambda: write_grams(path, described, lambda name: total.cpu().numpy(), {})),
            "from a file": bench.seconds_of(
                lambda: torch.from_numpy(GramFile(path).read("a", pinned)).to(bench.device)
            ),
        }
        rows = mean_rows(Path(work), elements)
    size = 2e-9 * width * (width + 1)
    found = [
        {"what": f"Gram of {width} inputs {way}: {size / time:.3g} GB/s", "seconds": time}
        for way, time in seconds.items()
    ]
    return found + [
        {"what": f"mean of {elements} elements: {gigabytes / time:.3g} GB/s", "seconds": time}
        for _, time, _, gigabytes in rows
    ]


def widest_system(bench: Bench) -> dict[str, Any]:
    """A system of two models, from Grams in host memory to its solution on the device."""
    inputs, outputs = (200, 128) if bench.small else (14336, 4096)
    grams = []
    for _ in range(2):
        x = torch.randn(2 * inputs, inputs, device=bench.device)
        grams.append((x.T @ x).cpu())

    def read(index: int) -> Any:
        # The result may be overwritten, as happens without a copy to a GPU.
        return (grams[index] if bench.is_cuda else grams[index].clone()).numpy()

    def solve() -> None:
        rows = [torch.randn(outputs, inputs, device=bench.device) for _ in range(2)]
        system = System(read, [2 * inputs] * 2, [0.5, 0.5], "cholesky")
        system.regress(rows, (rows[0] + rows[1]) / 2).solve(ALPHA)

    seconds = bench.seconds_of(solve)
    # Factor; right-hand side, solution, and half a product for the objective.
    flops = inputs**3 / 3 + 5 * outputs * inputs**2
    fraction = flops / bench.roofline.single_flops / seconds
    return {"what": f"{inputs} inputs, {outputs} outputs", "seconds": seconds, "roofline": fraction}


def training(bench: Bench) -> list[dict[str, Any]]:
    """A packed micro batch of both stages, forward and backward; memory at the limits, the rest at mean length."""
    llm, config = bench.llm, AutoConfig.from_pretrained(bench.mt)
    encoder = random_model(AutoModelForTextEncoding, config, bench.device)
    sizes = {"llm_hidden_size": llm.config.hidden_size, "mt_hidden_size": config.hidden_size}
    model = MindMergerForCausalLM(MindMergerConfig(**sizes), encoder, llm)
    model.mapping.to(bench.device, HALF)
    llm.set_attn_implementation("sdpa")  # as loaded; an earlier check may have changed it
    if not model.pack_rows():
        raise RuntimeError("rows are not packed")
    names = ModelFlags(llm_path=bench.planned_llm.name_or_path, mt_path=str(bench.mt))
    planned = model_on_meta(names, HALF)
    return [stage(bench, model, planned, name) for name in STAGES]


def stage(bench: Bench, model: MindMergerForCausalLM, planned: MindMergerForCausalLM, name: str) -> dict[str, Any]:
    """Figures of a stage's micro batch, with rows halved until the estimate at the limits fits."""
    rows, mean, limits = STAGES[name] if not bench.small else (2, SMALL_ROW, SMALL_ROW)
    free = ROOM * bench.roofline.memory - weight_bytes(model.llm, model.encoder)

    def costs(row: Row) -> tuple[Any, Any]:
        return encoder_cost(planned, rows, row), step_cost(planned, rows, row)

    while (memory := max(cost.peak_bytes for cost in costs(limits))) > free:
        if rows == 1:
            raise LeftOut(f"a row at the limits takes {memory / 1e9:.1f} GB, and {free / 1e9:.1f} are free")
        rows //= 2

    def step(batch: Batch) -> None:
        model.mapping.zero_grad()
        model(batch=batch, num_items_in_batch=100.0).loss.backward()

    vocabulary = min(model.llm.config.vocab_size, model.encoder.config.vocab_size)
    batches = [random_batch(rows, mean, vocabulary, seed).to(bench.device) for seed in range(4)]
    step(batches[0])
    with bench.waits() as waits:
        step(batches[0])
    seconds = bench.seconds_of(lambda: [step(batch) for batch in batches]) / len(batches)
    longest = random_batch(rows, limits, vocabulary, spread=0).to(bench.device)
    flops = sum(cost.flops for cost in costs(mean))
    return {
        "what": f"{name} stage, micro batch of {rows}",
        "seconds": seconds,
        "tokens_per_s": sum(sum(batch.lengths) for batch in batches) / len(batches) / seconds,
        "roofline": flops / bench.roofline.half_flops / seconds,
        "peak_GB": bench.peak_of(lambda: step(longest), model) / 1e9,
        "planned_GB": memory / 1e9,
        "waits": waits,
    }


def random_batch(rows: int, mean: Row, vocabulary: int, seed: int = 0, spread: float = 0.4) -> Batch:
    """Packed batch of rows whose lengths vary around `mean` by the fraction `spread`."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> array:
        low, high = round(length * (1 - spread)), round(length * (1 + spread))
        count = int(torch.randint(low, high + 1, (1,), generator=generator))
        return array("i", torch.randint(3, vocabulary, (count,), generator=generator).tolist())

    return lay_out([Tokens(*map(ids, (mean.source, mean.prompt, mean.target))) for _ in range(rows)], 1, packed=True)


def decoding(bench: Bench) -> list[dict[str, Any]]:
    """One token for each of 16 problems of mean length, in their slots."""
    llm, planned = bench.llm, bench.planned_llm
    llm.set_attn_implementation("sdpa")
    rows, length, new = (4, 9, 6) if bench.small else (16, MEAN_PROBLEM.prefix, 40)
    with torch.inference_mode():
        embeds = llm.get_input_embeddings()(torch.zeros(rows, length, dtype=torch.long, device=bench.device))
    mask, stamps = torch.ones(rows, length, dtype=torch.int64, device=bench.device), []

    def decode() -> None:
        for _ in greedy_steps(llm, range(rows), lambda some: InputEmbeds(embeds[some], mask[some]), rows, new, set()):
            stamps.append(time.perf_counter())

    peak = bench.peak_of(decode, llm)
    half = stamps[-new // 2 :]
    seconds = median(after - before for before, after in pairwise(half))
    before = len(stamps)
    with bench.waits() as waits:
        decode()
    steps = len(stamps) - before
    with torch.no_grad():
        prefill, full = (prefill_cost(planned, rows, tokens) for tokens in (length, length + new))
        launching = prefill_cost(planned, rows, 1).calls * LAUNCH_SECONDS
    read = weight_bytes(llm) - weight_bytes(llm.get_input_embeddings()) + full.kept_bytes
    return [
        {
            "what": f"a token of {rows} rows, {llm.config.num_hidden_layers} layers; planned launches "
            f"{1e3 * launching:.1f} ms",
            "seconds": seconds,
            "roofline": read / bench.roofline.bandwidth / seconds,
            "peak_GB": peak / 1e9,
            "planned_GB": (full.kept_bytes + prefill.peak_bytes - prefill.kept_bytes) / 1e9,
            "waits": {place: count / steps for place, count in waits.items()},
        },
        decoding_loop(bench),
        mixed_lengths(bench),
    ]


def decoding_loop(bench: Bench) -> dict[str, Any]:
    """Pass of the decoding loop without an LLM: 64 slots, two layers, among them prefills."""
    slots, length, passes = 64, 40, []
    llm = StandIn(2, slots, bench.device)
    sequence = InputEmbeds(torch.zeros(4, length, 16, device=bench.device), torch.ones_like(llm.mask[:4]))

    def decode() -> None:
        def read(some: list[int]) -> InputEmbeds:
            return InputEmbeds(sequence.embeds[: len(some)], sequence.mask[: len(some)])

        passes.append(sum(1 for _ in greedy_steps(llm, range(4 * slots), read, slots, 128, {0})))

    seconds = bench.seconds_of(decode) / passes[-1]
    with bench.waits() as waits:
        decode()
    per_pass = {place: count / passes[-1] for place, count in waits.items()}
    return {"what": f"a pass of {slots} slots without an LLM", "seconds": seconds, "waits": per_pass}


def mixed_lengths(bench: Bench) -> dict[str, Any]:
    """Peak memory of 16 slots for problems of mixed lengths; as published: 8 rows padded to the longest."""
    llm, new = bench.llm, 6 if bench.small else 40
    lengths = dict(enumerate(sorted((max(4, MEAN_PROBLEM.prefix * n // 40) for n in range(1, 65)), reverse=True)))
    if bench.small:
        lengths = {problem: length // 8 + 1 for problem, length in lengths.items()}

    def read(some: list[int]) -> InputEmbeds:
        ids = torch.zeros(len(some), lengths[some[0]], dtype=torch.long, device=bench.device)
        mask = torch.arange(ids.shape[1], device=bench.device).flip(0) < torch.tensor(
            [[lengths[problem]] for problem in some], device=bench.device
        )
        with torch.inference_mode():
            return InputEmbeds(llm.get_input_embeddings()(ids), mask.long())

    def ours() -> None:
        for _ in greedy_steps(llm, lengths, read, 16, new, set(), None, lengths):
            pass

    def published() -> None:
        first = read(list(range(8)))
        llm.generate(inputs_embeds=first.embeds, attention_mask=first.mask, max_new_tokens=new, do_sample=False)

    peaks = [bench.peak_of(work, llm) / 1e9 for work in (ours, published)]
    what = "16 slots, mixed lengths; published: 8 padded rows"
    return {"what": what, "peak_GB": peaks[0], "published_GB": peaks[1]}


# Checks, with the maximum seconds of each.
SPEED: dict[Callable[[Bench], list[dict[str, Any]]], float] = {
    rates: 15,
    gram_batch: 75,
    merge_layer: 90,
    host_work: 20,
    training: 75,
    decoding: 60,
}
