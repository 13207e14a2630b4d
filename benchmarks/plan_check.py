"""Estimates of `--plan` against measurements: peak memory of a training step, a Gram pass and a merge.

    python -m benchmarks.plan_check --llm_path LLM --mt_path MT

Each is run in a process of its own, on the CPU in float32, with rows at the planned limits. Memory is measured beyond
that of a process that has imported everything, and for training has loaded the models. The last line is a JSON object.
"""

import argparse
import ctypes
import json
import tempfile
from pathlib import Path

from benchmarks.side_by_side import machine, measured, run
from common.devices import HERE

# Rows that take about 1 GB with models of some 100 million parameters.
STEP = {"rows": 8, "source": 96, "prompt": 128, "target": 96}
TOKENS_PER_BATCH, LENGTH, TEXTS = 4096, 128, 64
# Model to merge: one layer whose systems are much larger than the interpreter's memory.
WIDE = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm_path", required=True, help="LLM, a local folder; also the model of the Grams")
    parser.add_argument("--mt_path", required=True, help="multilingual model, a local folder")
    parser.add_argument("--only", choices=list(CHECKS), help="run one check in this process, without an estimate")
    parser.add_argument("--work_dir", help="of --only")
    arguments = parser.parse_args()
    if arguments.only:
        CHECKS[arguments.only](arguments.llm_path, arguments.mt_path, Path(arguments.work_dir))
        return

    result = {}
    words = ["-m", "benchmarks.plan_check", "--llm_path", arguments.llm_path, "--mt_path", arguments.mt_path]
    with tempfile.TemporaryDirectory() as folder:
        write_texts(Path(folder) / "texts.jsonl")
        write_wide_model(Path(folder) / "wide")
        expected = predictions(arguments.llm_path, arguments.mt_path, str(Path(folder) / "wide"))
        for name in CHECKS:
            peak = run([*words, "--only", name, "--work_dir", folder]).peak_bytes
            result[name] = {"predicted": round(expected[name]), "measured": peak, "ratio": expected[name] / peak}
            print(f"{name}: {expected[name] / 1e9:.3f} GB predicted, {peak / 1e9:.3f} GB measured", flush=True)
    print(json.dumps({"benchmark": "plan_check", **result, "machine": machine()}))


def predictions(llm_path: str, mt_path: str, wide: str) -> dict[str, float]:
    """Estimated bytes of each check."""
    import torch

    from mindmerger.config import ModelFlags
    from regmean.config import GramFlags, MergeFlags
    from tools.estimate import Device, causal_lm_on_meta
    from tools.estimate_mindmerger import Row, encoder_cost, model_on_meta, step_cost
    from tools.estimate_regmean import estimate_grams, estimate_merge

    model = model_on_meta(ModelFlags(llm_path=llm_path, mt_path=mt_path), torch.float32)
    row = Row(STEP["source"], STEP["prompt"], STEP["target"])
    step = max(cost(model, STEP["rows"], row).peak_bytes for cost in (encoder_cost, step_cost))
    options = {"tokens_per_batch": TOKENS_PER_BATCH, "max_length": LENGTH, "num_examples": TEXTS}
    here = Device(HERE, "cpu", 1, 2**50, 1, 1, 1, "")
    flags = GramFlags(model=llm_path, dtype="float32", plan=HERE, **options)
    grams = estimate_grams(flags, causal_lm_on_meta(llm_path, dtype=torch.float32), here)
    merge = estimate_merge(MergeFlags(method="regmean", models=[wide] * 2, plan=HERE), here)
    return {"train": step, "gram": grams.peak, "merge": merge.peak}


def write_texts(path: Path) -> None:
    """Write texts that are all longer than the limit."""
    path.write_text("".join(json.dumps({"text": f"{n} of them, " * LENGTH}) + "\n" for n in range(TEXTS)))


def write_wide_model(folder: Path) -> None:
    """Write a model of one wide layer, and its Grams."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from regmean.gram_file import FILE_NAME, Gram, write_grams
    from tools.estimate import causal_lm_on_meta
    from tools.estimate_regmean import layer_inputs

    torch.manual_seed(0)
    config = LlamaConfig(**WIDE, num_hidden_layers=1, vocab_size=32, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    inputs = layer_inputs(causal_lm_on_meta(str(folder)))
    grams = [Gram(each.layers[0], tuple(each.layers), 1000, each.width) for each in inputs]
    widths = {gram.name: gram.width for gram in grams}
    write_grams(folder / FILE_NAME, grams, lambda name: 1 + np.eye(widths[name], dtype=np.float32), {})


def keep_heap_small() -> None:
    """Make the C library return memory above 1 MB at once, to measure tensors without unused heap memory."""
    threshold = -3  # M_MMAP_THRESHOLD of glibc's <malloc.h>
    ctypes.CDLL(None).mallopt(threshold, 1 << 20)


def step(llm_path: str, mt_path: str, _: Path) -> None:
    """Run a micro batch, forward and backward."""
    import torch

    from mindmerger.config import ModelPair
    from mindmerger.modeling import MindMergerForCausalLM, mapping_config

    keep_heap_small()
    config = mapping_config(ModelPair(llm_path=llm_path, mt_path=mt_path), llm_bos_token_id=1)
    model = MindMergerForCausalLM.from_base_models(config)
    model.pack_rows()

    def forward_backward(rows: int, source: int, prompt: int, target: int) -> None:
        def ids(length: int) -> torch.Tensor:
            return torch.randint(10, 1000, (rows, length))

        sources, prompts = ids(source), ids(prompt)
        model(sources, torch.ones_like(sources), prompts, torch.ones_like(prompts), ids(target)).loss.backward()

    forward_backward(1, 8, 8, 8)
    with measured():
        forward_backward(**STEP)


def gram(llm_path: str, _: str, folder: Path) -> None:
    """Run compute_gram.py except for the imports."""
    import datasets  # noqa: F401
    import torch._dynamo  # noqa: F401

    from common.ranks import start_process
    from regmean.compute import compute_grams
    from regmean.config import GramFlags

    flags = GramFlags(
        model=llm_path,
        dataset=str(folder / "texts.jsonl"),
        text_column="text",
        output_dir=str(folder / "grams"),
        dtype="float32",
        device="cpu",
        tokens_per_batch=TOKENS_PER_BATCH,
        max_length=LENGTH,
    )
    keep_heap_small()
    process = start_process("cpu")
    with measured():
        compute_grams(flags, process)


def merge(_: str, __: str, folder: Path) -> None:
    """Run merge_model.py except for the imports, for the wide model with itself."""
    import torch

    from regmean.config import MergeFlags
    from regmean.merge import merge as merge_models

    flags = MergeFlags(
        method="regmean",
        models=[str(folder / "wide")] * 2,
        grams=[str(folder / "wide")] * 2,
        alpha=[0.5],
        device="cpu",
        output_dir=str(folder / "merged"),
    )
    # Linear algebra libraries are loaded on first use.
    torch.linalg.solve_triangular(torch.linalg.cholesky_ex(torch.eye(64))[0], torch.eye(64), upper=False)
    with measured():
        merge_models(flags, command="")


CHECKS = {"train": step, "gram": gram, "merge": merge}

if __name__ == "__main__":
    main()
