"""Equality of results on the device and on the CPU, at small shapes; checks return differences and their limits."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForTextEncoding, LlamaConfig, MT5Config, PreTrainedModel

from benchmarks.gpu.measure import HALF, REPOSITORY, Bench, LeftOut, random_model, random_texts, relative
from benchmarks.gpu.speed import write_pair
from benchmarks.regmean_inputs import make_layer, make_sibling
from common.ranks import start_process
from mindmerger.batching import Tokens, lay_out
from mindmerger.evaluation.decoding import greedy_steps, label_log_likelihoods
from mindmerger.modeling import InputEmbeds, MindMergerConfig, MindMergerForCausalLM
from mindmerger.packing import packed_attention
from regmean.calibration import collate, make_batches
from regmean.compute import compute_grams
from regmean.config import SEQUENTIAL, GramFlags, MergeFlags
from regmean.gram import GramSums, add_products, zeros
from regmean.gram_file import FILE_NAME, GramFile
from regmean.hooks import LinearInputs, linear_layers
from regmean.layerwise.merge import merge_layer_by_layer
from regmean.merge import merge
from regmean.solve import System

VOCABULARY = 128
CHILD_SECONDS = 150  # time limit of a program started by a check
START = "import sys; sys.path.insert(0, '.'); import torch; from common.ranks import start_process; "


def row(what: str, difference: float, at_most: float) -> dict[str, Any]:
    """One comparison; NaN fails."""
    return {"what": what, "difference": difference, "at_most": at_most, "failed": not difference <= at_most}


def child(words: list[str], folder: Path = REPOSITORY, **environment: str) -> str:
    """The output of a Python program.

    Raises:
        RuntimeError: it fails; the message is the last line of its errors, which are printed.
    """
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
    )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
    return done.stdout


def tiny_llama(device: torch.device | str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """An LLM of three layers with weights from the CPU's generator, large enough that tokens differ."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 200, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config = LlamaConfig(**sizes | heads | {"initializer_range": 0.3} | options)
    return random_model(AutoModelForCausalLM, config, "cpu", torch.float32).to(device, dtype)


def rounding(device: torch.device) -> float:
    """The error of a float32 product that TF32 would round: of 1 + 2^-12 by ones."""
    numbers = torch.full((256, 256), 1 + 2.0**-12, device=device)
    return float((numbers @ torch.eye(256, device=device) - numbers).abs().max())


def float32_products(bench: Bench) -> list[dict[str, Any]]:
    """Precision of float32 products, also if a vendor's container enables TF32 in its environment."""
    code = f"{START} from benchmarks.gpu.equality import rounding; "
    code += f"print(rounding(start_process({str(bench.device)!r}).device))"
    there = float(child(["-c", code], TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="1"))
    return [
        row("float32 product", rounding(bench.device), 0.0),
        row("the same under TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1", there, 0.0),
    ]


def process_group(bench: Bench) -> list[dict[str, Any]]:
    """Process group of one rank, by NCCL on a GPU: barrier, sums, gathered objects, close."""
    code = START + (
        f"import torch.distributed as dist; process = start_process({str(bench.device)!r}, needs_group=True); "
        "dist.barrier(); total = torch.full((4,), 2.0, device=process.device); dist.all_reduce(total); "
        "gathered = [None]; dist.all_gather_object(gathered, 8.0); print(float(total.sum()) - gathered[0]); "
        "process.close()"
    )
    return [row("sums over one rank", float(child(["-c", code]).split()[-1]), 0.0)]


def gram_products(bench: Bench) -> list[dict[str, Any]]:
    """Lower triangles of sums of x x^T, against float64; rows contiguous and not, widths odd."""
    rows = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        worst = 0.0
        for width, tokens in ((96, 33), (700, 300), (1537, 511)):
            wide = torch.randn(tokens, width + 8, generator=torch.Generator().manual_seed(0)).to(dtype)
            exact = 2 * (wide[:, :width].double().T @ wide[:, :width].double())
            total, there = zeros(width, bench.device), wide.to(bench.device)[:, :width]
            add_products(total, there)
            add_products(total, there.contiguous())
            scale = exact.diagonal().sqrt()
            worst = max(worst, float(((total.double().cpu() - exact) / (scale * scale[:, None])).tril().abs().max()))
        rows.append(row(str(dtype).removeprefix("torch."), worst, 1e-5))
    return rows


def grams(bench: Bench) -> list[dict[str, Any]]:
    """Grams of a tiny LLaMA over padded batches."""
    examples = random_texts(40, 2, 60, VOCABULARY)

    def sums_of(device: torch.device | str, dtype: torch.dtype, spread: float) -> GramSums:
        model, sums = tiny_llama(device, dtype, initializer_range=spread), GramSums()
        layers = linear_layers(model)
        with LinearInputs(layers, model.get_output_embeddings(), sums.add, True, sums.shared_name) as inputs:
            for batch in make_batches(list(map(len, examples)), 256, padding=True):
                ids, mask = (tensor.to(device) for tensor in collate([examples[index] for index in batch]))
                inputs.run(model, ids, mask, mask.flatten().nonzero().flatten())
        return sums

    rows = []
    # With small weights, bfloat16 is accurate enough to compare.
    for dtype, spread, at_most in ((torch.float32, 0.3, 1e-5), (HALF, 0.1, 3e-2)):
        reference, ours = sums_of("cpu", torch.float32, spread), sums_of(bench.device, dtype, spread)
        assert (ours.tokens, ours.shared_name) == (reference.tokens, reference.shared_name)
        worst = max(relative(ours.totals[name].tril(), total.tril()) for name, total in reference.totals.items())
        rows.append(row(str(dtype).removeprefix("torch."), worst, at_most))
    return rows


def merges(bench: Bench) -> list[dict[str, Any]]:
    """Merged weights of one layer of 700 inputs, for two models and for three."""
    generator, inputs, outputs = torch.Generator().manual_seed(0), 700, 300
    tokens = [1400, 300, 1400]  # the second Gram is singular
    texts = [torch.randn(count, inputs, generator=generator) for count in tokens]
    weights = [torch.randn(outputs, inputs, generator=generator) for _ in tokens]

    def merged(device: torch.device | str, models: int, alpha: float, solver: str) -> torch.Tensor:
        rows = [weight.clone().to(device) for weight in weights[:models]]
        read = lambda index: (texts[index].T @ texts[index]).numpy()  # noqa: E731
        system = System(read, tokens[:models], [1 / models] * models, solver)
        return system.regress(rows, torch.stack(rows).mean(0)).solve(alpha)

    cases = [("two", 2, 0.1, "cholesky"), ("two, alpha 0.99", 2, 0.99, "cholesky"), ("three", 3, 0.5, "cholesky")]
    cases += [("two, lstsq", 2, 0.1, "lstsq"), ("two, inverse", 2, 0.1, "inverse")]
    return [row(what, relative(merged(bench.device, *case), merged("cpu", *case)), 2e-5) for what, *case in cases]


def merged_files(bench: Bench) -> list[dict[str, Any]]:
    """merge_model.py's merge of two models, from files to files, in blocks that are read ahead of the solver."""
    with tempfile.TemporaryDirectory() as work:
        models = [str(model) for model in write_pair(bench, Path(work), small=True)]
        options = {"method": "regmean", "models": models, "grams": models, "alpha": [0.1], "dtype": "float32"}
        merged = {}
        for name, device in (("ours", str(bench.device)), ("reference", "cpu")):
            with contextlib.redirect_stdout(sys.stderr):
                merge(MergeFlags(**options, device=device, output_dir=str(Path(work) / name)), "benchmarks.gpu")
            merged[name] = load_file(Path(work) / name / "model.safetensors")
    ours, reference = merged["ours"], merged["reference"]
    return [row("tensors of a layer", max(relative(ours[name], reference[name]) for name in reference), 2e-5)]


def layer_by_layer(bench: Bench) -> list[dict[str, Any]]:
    """Grams of a tiny LLaMA layer by layer, and its merges by both layer-sequential methods, from files to files."""
    options = {"dtype": "float32", "tokens_per_batch": 256}
    with tempfile.TemporaryDirectory() as work, contextlib.redirect_stdout(sys.stderr):
        folder = Path(work)
        models = [str(make_layer(folder / "A", 512, 700, torch.float32, layers=3))]
        models.append(str(make_sibling(Path(models[0]), folder / "B")))
        texts = [{"text": "".join(map(chr, (97 + n % 26 for n in ids)))} for ids in random_texts(40, 2, 60, VOCABULARY)]
        (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
        (folder / "texts.yaml").write_text(f"dataset: {folder / 'texts.jsonl'}\ntext_column: text\n")
        found: dict[str, dict[str, dict[str, torch.Tensor]]] = {name: {} for name in ("grams", *SEQUENTIAL)}
        for side, device in (("ours", bench.device.type), ("reference", "cpu")):
            process, out = start_process(device), folder / side
            source = {"dataset": str(folder / "texts.jsonl"), "text_column": "text", "layerwise": "on"}
            compute_grams(GramFlags(model=models[0], **source, **options, device=device, output_dir=str(out)), process)
            file = GramFile(out / FILE_NAME)
            found["grams"][side] = {name: torch.from_numpy(file.read(name)) for name in file.grams}
            for method in SEQUENTIAL:
                target = {"output_dir": str(out / method), "calibration": [str(folder / "texts.yaml")] * 2}
                flags = MergeFlags(method=method, models=models, **target, **options, device=device)
                merge_layer_by_layer(flags, process, "benchmarks.gpu")
                found[method][side] = load_file(out / method / "model.safetensors")
    rows = []
    for what, sides in found.items():
        ours, reference = sides["ours"], sides["reference"]
        rows.append(row(what, max(relative(ours[name], reference[name]) for name in reference), 2e-5))
    return rows


def attention(bench: Bench) -> list[dict[str, Any]]:
    """Packed attention of segments, output and gradients, in bfloat16, against float32 on the CPU."""
    lengths = [5, 64, 1, 130]
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)

    def results(heads: list[torch.Tensor], window: int | None) -> list[torch.Tensor]:
        heads = [tensor.detach().requires_grad_() for tensor in heads]
        options = {"cu_seq_lens_q": edges.to(heads[0].device), "max_length_q": max(lengths), "segment_lengths": lengths}
        out, _ = packed_attention(torch.nn.Identity(), *heads, None, sliding_window=window, **options)
        signs = torch.ones_like(out).cumsum(1).remainder(3) - 1
        return [out, *torch.autograd.grad((out * signs).float().sum(), heads)]

    rows = []
    for what, counts, window in (
        ("all heads", (8, 8, 8), None),
        ("grouped", (8, 2, 2), None),
        ("window", (8, 2, 2), 16),
    ):
        heads = [torch.randn(1, count, sum(lengths), 64, generator=generator).to(HALF) for count in counts]
        ours = results([tensor.to(bench.device) for tensor in heads], window)
        reference = results([tensor.float() for tensor in heads], window)
        rows.append(row(what, max(map(relative, ours, reference)), 2e-2))
    return rows


def packed_step(bench: Bench) -> list[dict[str, Any]]:
    """Loss and the mapping's gradient of a micro batch, packed and padded, against the CPU's packed one in float32."""
    generator = torch.Generator().manual_seed(0)
    lengths = [torch.randint(8, 24, (3,), generator=generator).tolist() for _ in range(5)]
    examples = [
        Tokens(*(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in row)) for row in lengths
    ]

    def step(device: torch.device | str, dtype: torch.dtype, packs: bool) -> tuple[torch.Tensor, torch.Tensor]:
        # Heads of 32 numbers, which the kernel supports.
        llm = tiny_llama("cpu", initializer_range=0.05)
        mt = {"vocab_size": VOCABULARY, "d_model": 24, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 3}
        encoder = random_model(AutoModelForTextEncoding, MT5Config(**mt), "cpu", torch.float32)
        model = MindMergerForCausalLM(MindMergerConfig(llm_hidden_size=128, mt_hidden_size=24), encoder, llm)
        for part in (model.encoder, model.llm, model.mapping):
            part.to(device, dtype)
        if packs and not model.pack_rows():
            raise RuntimeError(f"rows are not packed in {dtype}")
        batch = lay_out(examples, 1, packed=packs).to(torch.device(device))
        loss = model(batch=batch, num_items_in_batch=100.0).loss
        loss.backward()
        return loss, torch.cat([parameter.grad.flatten().float().cpu() for parameter in model.mapping.parameters()])

    reference, rows, rounding = step("cpu", torch.float32, True), [], 0.0
    for dtype, packs in ((torch.float32, False), (torch.float32, True), (HALF, False), (HALF, True)):
        loss, gradient = map(relative, step(bench.device, dtype, packs), reference)
        what = f"{'packed' if packs else 'padded'} {str(dtype).removeprefix('torch.')}"
        rows.append(row(f"{what}, loss", loss, 1e-4 if dtype == torch.float32 else 3e-2))
        if dtype == torch.float32:
            rows.append(row(f"{what}, gradient", gradient, 1e-4))
        elif packs:
            # As accurate as padded rows.
            rows.append(row(f"{what}, gradient", gradient, 1.5 * rounding + 0.02))
        rounding = gradient
    return rows


def answers(bench: Bench) -> list[dict[str, Any]]:
    """Greedy answers to eleven problems in four slots, token for token, and likelihoods of labels."""
    generator = torch.Generator().manual_seed(3)
    ids, mask = torch.randint(VOCABULARY, (11, 14), generator=generator), torch.ones(11, 14, dtype=torch.int64)
    for problem in range(11):
        mask[problem, : problem % 5] = 0

    def answer(device: torch.device | str) -> tuple[dict[int, list[int]], torch.Tensor]:
        llm, there = tiny_llama(device), mask.to(device)
        embeds = llm.get_input_embeddings()(ids.to(device))
        steps = greedy_steps(llm, range(11), lambda some: InputEmbeds(embeds[some], there[some]), 4, 90, {7, 9})
        written = {answer.problem: answer.ids for some in steps for answer in some}
        return written, label_log_likelihoods(llm, InputEmbeds(embeds, there), [[5, 6, 7], [8], [9, 10]])[0]

    (ours, scores), (reference, expected) = answer(bench.device), answer("cpu")
    unequal = sum(ours[problem] != ids for problem, ids in reference.items())
    return [row("answers that differ", unequal, 0), row("likelihoods", relative(scores, expected), 1e-4)]


def deepspeed_runs(bench: Bench) -> list[dict[str, Any]]:
    """run_training.py on tiny models: dev perplexity falls, under ZeRO-3 with recomputation as under ZeRO-2."""
    if missing := [name for name in ("deepspeed", "datasets") if importlib.util.find_spec(name) is None]:
        raise LeftOut(f"{' and '.join(missing)} not installed: run_training.py under ZeRO-2, ZeRO-3 and with Muon")
    if bench.small:
        raise LeftOut("--small: three runs of run_training.py take longer than all else")
    zero3 = ["--deepspeed_config", str(REPOSITORY / "configs/deepspeed/zero3_bf16.json"), "--gradient_checkpointing"]
    words = "--llm_path llama --mt_path mt5 --languages de,sw --train_num 10 --dev_size 4 --epoch_num 2 --lr 1e-3"
    words += f" --train_batch_size 8 --report_to none --device {bench.device.type}"
    code = (
        "from pathlib import Path; from tests import tiny_models; from tests.mindmerger.datas import write_datas; "
        "folder = Path(__import__('sys').argv[1]); tiny_models.tiny_llama(folder / 'llama'); "
        "tiny_models.tiny_mt5(folder / 'mt5'); write_datas(folder / 'datas')"
    )
    rows, after = [], {}
    with tempfile.TemporaryDirectory() as work:
        child(["-c", code, work], PYTHONPATH=str(REPOSITORY))
        for name, more in (("zero2", []), ("zero3", zero3), ("muon", ["--optimizer", "muon"])):
            child([str(REPOSITORY / "run_training.py"), *words.split(), *more, "--save_name", name], Path(work))
            lines = (Path(work) / "outputs" / name / "mapping/metrics.jsonl").read_text().splitlines()
            dev = [line["dev_perplexity"] for line in map(json.loads, lines) if "dev_perplexity" in line]
            after[name] = dev[-1]
            rows.append(row(f"{name}, dev perplexity after to before", dev[-1] / dev[0], 1.0))
    return [*rows, row("zero3 to zero2", abs(after["zero3"] / after["zero2"] - 1), 0.05)]


# Checks, with the maximum seconds of each.
EQUALITY: dict[Callable[[Bench], list[dict[str, Any]]], float] = {
    float32_products: 30,
    process_group: 20,
    gram_products: 10,
    grams: 10,
    merges: 15,
    merged_files: 30,
    layer_by_layer: 40,
    attention: 10,
    packed_step: 15,
    answers: 20,
}
# Last, since these may take as long as all others.
PROGRAMS = {deepspeed_runs: 150}
