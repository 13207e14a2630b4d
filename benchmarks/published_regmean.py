"""RegMean as published, in plain form: the baseline of this repository's benchmarks.

Written from the published description: a hook on every nn.Linear, padding counted, one Gram per module, logits
computed; both models and all Grams in memory, one `torch.linalg.lstsq` per module.

python -m benchmarks.published_regmean gram --model LLM --data texts.jsonl --out gram.pkl
python -m benchmarks.published_regmean merge --models A B --grams A.pkl B.pkl --alpha 0.1 --out merged
"""

import argparse
import contextlib
import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def published_grams(model: nn.Module, tokenizer, texts: list[str], max_length: int) -> dict[str, torch.Tensor]:
    """Mean Gram of every nn.Linear, in left-padded batches of 32 in the order of the texts."""
    grams: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def hook_of(name: str):
        def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            x = inputs[0].float().reshape(-1, inputs[0].shape[-1])
            count = counts.get(name, 0)
            mean = grams.get(name, 0.0)
            grams[name] = (mean * count + x.T @ x) / (count + len(x))
            counts[name] = count + len(x)

        return hook

    handles = [
        module.register_forward_hook(hook_of(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    for start in range(0, len(texts), 32):
        batch = tokenizer(
            texts[start : start + 32],
            truncation=True,
            max_length=max_length,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        model(**batch)
    for handle in handles:
        handle.remove()
    return grams


@torch.no_grad()
def published_merge(
    models: list[nn.Module], grams: list[dict[str, torch.Tensor]], alpha: float, driver: str | None
) -> dict[str, torch.Tensor]:
    """Merged parameters by name; `driver` None is the default of `torch.linalg.lstsq`."""
    parameters = [dict(model.named_parameters()) for model in models]
    merged = {}
    for name in parameters[0]:
        weights = [theirs[name].float() for theirs in parameters]
        module = name.removesuffix(".weight")
        if module == name or module not in grams[0]:
            merged[name] = torch.stack(weights).mean(0)
            continue
        scaled = []
        for theirs in grams:
            factor = torch.full_like(theirs[module], alpha).fill_diagonal_(1.0)
            scaled.append(theirs[module] * factor)
        products = sum(gram @ weight.T for gram, weight in zip(scaled, weights, strict=True))
        merged[name] = torch.linalg.lstsq(sum(scaled), products, driver=driver).solution.T.contiguous()
    return merged


@torch.no_grad()
def published_regmean_plus_plus(model_paths: list[str], texts: list[list[str]], alpha: float, out: Path) -> None:
    """RegMean++ from its paper's description (arXiv 2508.03121): at each decoder layer, Grams of each model's own layer
    on the states that the merged layers before it produce; one text at a time, one Gram and one inverse per module.
    """
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in model_paths]
    merged = AutoModelForCausalLM.from_pretrained(model_paths[0], dtype=torch.float32).eval()
    for target, *parts in zip(merged.parameters(), *(model.parameters() for model in models), strict=True):
        target.copy_(torch.stack(parts).mean(0))
    tokenizer = AutoTokenizer.from_pretrained(model_paths[0])
    states = [[first_states(merged, tokenizer, text) for text in own] for own in texts]
    for number, target in enumerate(merged.model.layers):
        grams = []
        for model, own in zip(models, states, strict=True):
            sums: dict[str, torch.Tensor] = {}

            def hook_of(name: str, sums: dict[str, torch.Tensor] = sums):
                def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
                    x = inputs[0].reshape(-1, inputs[0].shape[-1])
                    sums[name] = sums.get(name, 0.0) + x.T @ x

                return hook

            layer = model.model.layers[number]
            linear = [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
            handles = [module.register_forward_hook(hook_of(name)) for name, module in linear]
            for hidden, arguments in own:
                layer(hidden, **arguments)
            for handle in handles:
                handle.remove()
            tokens = sum(hidden.shape[1] for hidden, _ in own)
            grams.append({name: total / tokens for name, total in sums.items()})
        solve_layer(target, [model.model.layers[number] for model in models], grams, alpha)
        states = [[(target(hidden, **arguments), arguments) for hidden, arguments in own] for own in states]
    merged.save_pretrained(out)
    tokenizer.save_pretrained(out)


def first_states(model: nn.Module, tokenizer, text: str) -> tuple[torch.Tensor, dict]:
    """States before the first decoder layer, and the layer's other arguments."""
    seen = []

    def hook(module: nn.Module, inputs: tuple, arguments: dict) -> None:
        seen.append((inputs[0], arguments))
        raise StopIteration

    handle = model.model.layers[0].register_forward_pre_hook(hook, with_kwargs=True)
    with contextlib.suppress(StopIteration):
        model(**tokenizer(text, truncation=True, max_length=256, return_tensors="pt"), use_cache=False)
    handle.remove()
    return seen[0]


def solve_layer(target: nn.Module, layers: list[nn.Module], grams: list[dict[str, torch.Tensor]], alpha: float) -> None:
    """Put the solution for each nn.Linear into a decoder layer, in float64.

    A Gram's float32 inverse is useless at a condition of 6e6.
    """
    for name in grams[0]:
        scaled = [theirs[name] * torch.full_like(theirs[name], alpha).fill_diagonal_(1.0) for theirs in grams]
        scaled = [matrix.double() for matrix in scaled]
        weights = [layer.get_submodule(name).weight.double() for layer in layers]
        products = sum(gram @ weight.T for gram, weight in zip(scaled, weights, strict=True))
        target.get_submodule(name).weight.copy_((torch.linalg.inv(sum(scaled)) @ products).T)


def write_grams(model_path: str, texts: list[str], max_length: int, out: Path) -> None:
    """Load a model, compute its Grams and write them."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    grams = published_grams(model, AutoTokenizer.from_pretrained(model_path), texts, max_length)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Published form, except for pickling: this repository unpickles no file without restrictions.
    torch.save(grams, out)


def write_merge(model_paths: list[str], gram_paths: list[Path], alpha: float, driver: str | None, out: str) -> None:
    """Load models and Grams, merge and write the merged model."""
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in model_paths]
    grams = [torch.load(path, weights_only=True) for path in gram_paths]
    models[0].load_state_dict(published_merge(models, grams, alpha, driver), strict=False)
    models[0].save_pretrained(out)
    AutoTokenizer.from_pretrained(model_paths[0]).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    gram = commands.add_parser("gram")
    gram.add_argument("--model", required=True)
    gram.add_argument("--data", type=Path, required=True)
    gram.add_argument("--max_length", type=int, default=256)
    gram.add_argument("--out", type=Path, required=True)
    merge = commands.add_parser("merge")
    merge.add_argument("--models", nargs="+", required=True)
    merge.add_argument("--grams", nargs="+", type=Path, required=True)
    merge.add_argument("--alpha", type=float, default=0.1)
    merge.add_argument("--driver")
    merge.add_argument("--out", required=True)
    args = parser.parse_args()

    if args.command == "gram":
        texts = [json.loads(line)["text"] for line in args.data.read_text(encoding="utf-8").splitlines()]
        write_grams(args.model, texts, args.max_length, args.out)
    else:
        write_merge(args.models, args.grams, args.alpha, args.driver, args.out)


if __name__ == "__main__":
    main()
