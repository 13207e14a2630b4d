"""RegMean on a real model, end to end: two specialists, their Grams, every kind of merge, held-out loss of all.

Fine-tunes MODEL once on English math and once on Python source, computes both specialists' Grams on their own training
texts, merges them, and evaluates everything on texts of both kinds that no one trained on. Each step is a process of
its own, so that its time and peak memory are its own; the published algorithm runs beside on the same input.

    python -m benchmarks.regmean_real --model MODEL --math_data math.json --work_dir runs/regmean_real --minutes 5

`math.json` is a JSON list of {query, response, lang}, as MindMerger's. The last line printed is one JSON object.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

DOMAINS = ("math", "code")
RESERVED = 40  # texts of each kind, from the end, that no one trains on
HELD_OUT = 16  # of these, evaluated
CHARACTERS = 900  # of a text: about 256 tokens


def math_texts(path: Path) -> list[str]:
    """Question and solution of every English problem, shuffled with a fixed seed."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    texts = [f"Question: {row['query']}\nAnswer: {row['response']}" for row in rows if row["lang"] == "English"]
    random.Random(0).shuffle(texts)
    return texts


def code_texts() -> list[str]:
    """Pieces of the installed standard library's source, whole lines, from files in shuffled order."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(0).shuffle(files)
    texts = []
    for file in files:
        piece = ""
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            if piece and len(piece) + len(line) > CHARACTERS:
                texts.append(piece)
                piece = ""
            piece += line
    return texts


def write_texts(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def read_texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def fine_tune(model_path: str, data: Path, minutes: float, out: Path, seed: int = 0) -> None:
    """Train all weights on the texts in order until the time is up; the texts used are left beside the model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)
    texts, used = read_texts(data), 0
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end and used + 8 <= len(texts):
        batch = tokenizer(
            texts[used : used + 8],
            truncation=True,
            max_length=256,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        used += 8
        print(f"{used} texts, loss {loss.item():.3f}", flush=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_texts(out / "training_texts.jsonl", texts[:used])


def held_out_loss(model_path: str, data: Path) -> float:
    """Mean negative log-likelihood per token, in nats, over the texts one by one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for text in read_texts(data):
            ids = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")["input_ids"]
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    return total / tokens


def run(name: str, words: list[str], steps: dict[str, dict]) -> None:
    """Run a step as a process and record its wall time, its CPU time and its peak resident memory."""
    print(f"== {name}: {' '.join(words)}", flush=True)
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *words])
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    steps[name] = {
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
    }
    if code:
        steps[name]["exit_code"] = code
    print(f"== {name}: {steps[name]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--math_data", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0, help="of fine-tuning for each specialist")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--arguments", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step == "train":
        fine_tune(args.model, Path(args.arguments[0]), args.minutes, Path(args.arguments[1]))
        return
    if args.step == "loss":
        path = Path(args.arguments[0])
        losses = {domain: held_out_loss(args.model, args.work_dir / f"{domain}_held_out.jsonl") for domain in DOMAINS}
        path.write_text(json.dumps(losses))
        return

    work = args.work_dir
    work.mkdir(parents=True, exist_ok=True)
    for domain, all_texts in (("math", math_texts(args.math_data)), ("code", code_texts())):
        # From the end: the standard library's texts there come from files that training never reaches.
        write_texts(work / f"{domain}_held_out.jsonl", all_texts[-RESERVED:][:HELD_OUT])
        write_texts(work / f"{domain}_training.jsonl", all_texts[:-RESERVED])

    steps: dict[str, dict] = {}
    own = ["-m", "benchmarks.regmean_real", "--math_data", str(args.math_data), "--work_dir", str(work)]
    models = {domain: work / domain for domain in DOMAINS}
    for domain, folder in models.items():
        if not folder.exists():
            texts = str(work / f"{domain}_training.jsonl")
            run(f"train {domain}", [*own, "--model", args.model, "--minutes", str(args.minutes), "--step", "train",
                                    "--arguments", texts, str(folder)], steps)  # fmt: skip

    for domain, folder in models.items():
        data = str(folder / "training_texts.jsonl")
        run(f"gram {domain}", ["compute_gram.py", "--model", str(folder), "--dataset", data, "--text_column", "text",
                               "--device", "cpu", "--output_dir", str(work / f"gram_{domain}")], steps)  # fmt: skip
        run(f"published gram {domain}", ["-m", "benchmarks.published_regmean", "gram", "--model", str(folder), "--data",
                                         data, "--out", str(work / f"gram_{domain}" / "gram.pkl")], steps)  # fmt: skip

    pair = ["--models", *map(str, models.values())]
    grams = ["--grams", *(str(work / f"gram_{domain}") for domain in DOMAINS)]
    pickles = ["--grams", *(str(work / f"gram_{domain}" / "gram.pkl") for domain in DOMAINS)]
    merge = ["merge_model.py", "--device", "cpu", *pair]
    run("avg", [*merge, "--method", "avg", "--output_dir", str(work / "avg")], steps)
    for alpha in ("0.1", "0.5", "0.9"):
        run(f"regmean {alpha}", [*merge, *grams, "--method", "regmean", "--alpha", alpha, "--output_dir",
                                 str(work / f"regmean_{alpha}")], steps)  # fmt: skip
    run("regmean 0.1 0.5 0.9 together", [*merge, *grams, "--method", "regmean", "--alpha", "0.1", "0.5", "0.9",
                                         "--output_dir", str(work / "together")], steps)  # fmt: skip
    run("regmean 0.1 lstsq", [*merge, *grams, "--method", "regmean", "--alpha", "0.1", "--solver", "lstsq",
                              "--output_dir", str(work / "lstsq_0.1")], steps)  # fmt: skip
    run("regmean 0.1 published Grams", [*merge, *pickles, "--method", "regmean", "--alpha", "0.1", "--output_dir",
                                        str(work / "from_pickles_0.1")], steps)  # fmt: skip
    for name, driver in (("published 0.1 default driver", []), ("published 0.1 gels", ["--driver", "gels"])):
        run(name, ["-m", "benchmarks.published_regmean", "merge", *pair, *pickles, "--alpha", "0.1", *driver, "--out",
                   str(work / name.replace(" ", "_"))], steps)  # fmt: skip

    losses = {}
    merged = ["avg", "regmean_0.1", "regmean_0.5", "regmean_0.9", "lstsq_0.1", "from_pickles_0.1",
              "published_0.1_default_driver", "published_0.1_gels"]  # fmt: skip
    for name, folder in {"base": args.model} | {name: str(work / name) for name in [*DOMAINS, *merged]}.items():
        result = work / f"loss_{name}.json"
        run(f"loss {name}", [*own, "--model", folder, "--step", "loss", "--arguments", str(result)], steps)
        losses[name] = json.loads(result.read_text()) if result.exists() else None

    print(f"\n{'':<32}{'math':>8}{'code':>8}   held-out loss, nats per token")
    for name, loss in losses.items():
        print(f"{name:<32}{loss['math']:>8.4f}{loss['code']:>8.4f}" if loss else f"{name:<32}  failed")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {len(os.sched_getaffinity(0))} used"
    print(json.dumps({"benchmark": "regmean_real", "losses": losses, "steps": steps, "machine": machine}))


if __name__ == "__main__":
    main()
