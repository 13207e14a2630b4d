"""The regression of an aligned start, one choice changed at a time, evaluated before any training on pairs.

    python -m benchmarks.aligned_fit --llm_path LLM --mt_path MT --data_dir ./datas --languages de,es,fr,ru,sw \\
        --layers 7 1 4 10 14 18 --dtype bfloat16

For each choice: the relative error on held-out English text; the correlation of sentences of other languages with
their translations (`layer_scores`); and the LLM's dev perplexity, also with shuffled sources. The last line is one JSON
object.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from benchmarks.mapping_control import perplexity, shuffled_sources
from common.cli import flag, parse_flags
from common.errors import InputError, exit_with_message
from common.io import write_json
from common.logging import quiet_libraries
from common.ranks import start_process
from mindmerger.config import ModelFlags
from mindmerger.data import Example, hold_out, read_training
from mindmerger.init.aligned import PENALTY, layer_scores, pair_vectors, read_states, token_targets
from mindmerger.init.ridge import as_mlp, relative_error, ridge
from mindmerger.init.scaled import mean_embedding
from mindmerger.modeling import MLP, MindMergerForCausalLM, mapping_config
from mindmerger.tasks import LANGUAGES, TRAINING_TASKS, find_task, select_languages
from mindmerger.tokenization import ExampleTokenizer, ids_with_spans, load_example_tokenizer

State = dict[str, torch.Tensor]
# English sentences that are not used for fitting.
HELD_OUT = 100
# Tokens of a step of gradient descent, as in a batch of the mapping stage.
TOKENS_PER_STEP = 512


@dataclass
class FitFlags:
    """An aligned start's regression by layer, amount of text and method."""

    llm_path: str = flag("quickstart/models/llm", "hub id or local folder")
    mt_path: str = flag("quickstart/models/mt", "hub id or local folder")
    data_dir: str = flag("quickstart/build/datas", "folder in the published data layout")
    languages: str = flag("de,es,sw,ru,zh", "comma-separated")
    layers: list[int] = flag([], "of a decoder-only encoder; all other choices are tried with the first")
    sentences: list[int] = flag([300, 30, 100, 1000, 3000], "English sentences; all other choices take the first")
    penalties: list[float] = flag([PENALTY, 0.001, 0.1, 1.0], "of the ridge; all other choices take the first")
    descents: list[int] = flag([100, 300, 600], "instead of a ridge: steps of AdamW on both layers of the mapping")
    pairs: list[int] = flag([150, 300], "beside the English tokens: sentence pairs of all languages, as means")
    dev_size: int = flag(60, "rows of the perplexities")
    max_len: int = flag(512, "tokens of a source and of a target")
    batch_size: int = flag(12, "rows of a batch")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "of both models")


@dataclass(frozen=True)
class Texts:
    """Data for fitting and evaluation at one layer.

    Attributes:
        inputs, targets: of each English sentence, [tokens, mt_hidden_size] and [tokens, llm_hidden_size].
        foreign, meant: of the translation pairs, the states of each source and the mean embeddings of the translations,
            [pairs, llm_hidden_size].
        languages: of the pairs.
    """

    inputs: list[torch.Tensor]
    targets: list[torch.Tensor]
    foreign: list[torch.Tensor]
    meant: torch.Tensor
    languages: list[str]


def read_texts(
    flags: FitFlags, model: MindMergerForCausalLM, tokenizer: ExampleTokenizer, rows: list[Example], sentences: int
) -> Texts:
    """Both models' vectors of HELD_OUT English sentences, at most `sentences` others, and the translation pairs."""
    process = start_process("cpu")
    english = list(dict.fromkeys(row.target for row in rows))[: sentences + HELD_OUT]
    if len(english) < min(flags.sentences) + HELD_OUT:
        raise InputError(f"--data_dir {flags.data_dir} has {len(english)} English sentences: {HELD_OUT} are held out")
    ids_and_spans = tokenizer.sources_with_spans(english, LANGUAGES["English"])
    embedding, mean = model.llm.get_input_embeddings(), model.mapping.end_boundary.detach().flatten()
    targets = [
        token_targets(embedding, mean, spans, *of_llm)
        for (_, spans), of_llm in zip(ids_and_spans, ids_with_spans(tokenizer.llm_tokenizer, english), strict=True)
    ]
    pairs = rows[: max([150, *flags.pairs])]
    sources, meant = pair_vectors(tokenizer, embedding, mean, pairs)
    read = [ids for ids, _ in ids_and_spans] + sources
    (states,) = read_states(model.encoder, read, tokenizer.source_pad_id, flags.batch_size, process, all_layers=False)
    languages = [row.language.name for row in pairs]
    return Texts(states[: len(english)], targets, states[len(english) :], meant, languages)


def by_descent(inputs: torch.Tensor, targets: torch.Tensor, steps: int) -> State:
    """Alternative to the closed form: fit both layers of a mapping with AdamW on the mean squared error."""
    torch.manual_seed(0)
    mean, scale = inputs.mean(dim=0), inputs.std(dim=0).clamp(min=1e-6)
    size = targets.square().mean().sqrt()
    mlp = MLP(inputs.shape[1], targets.shape[1])
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(inputs), (TOKENS_PER_STEP,))
        loss = F.mse_loss(mlp((inputs[rows] - mean) / scale), targets[rows] / size)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        mlp.linear1.weight /= scale
        mlp.linear1.bias -= mlp.linear1.weight @ mean
        mlp.linear2.weight *= size
        mlp.linear2.bias *= size
    return {f"mlp.{name}": tensor for name, tensor in mlp.state_dict().items()}


def choices(flags: FitFlags, texts: Texts, of_first_layer: bool) -> Iterator[tuple[str, State]]:
    """Name and state of each mapping at one layer; a state without `end_boundary` gets the mean embedding."""

    def fitted(sentences: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat(texts.inputs[HELD_OUT:][:sentences]).float(), torch.cat(texts.targets[HELD_OUT:][:sentences])

    count, penalty = flags.sentences[0], flags.penalties[0]
    inputs, targets = fitted(count)
    first = as_mlp(ridge(inputs, targets, penalty))
    yield f"ridge {penalty:g}, {count} sentences", first
    if not of_first_layer:
        return
    for sentences in flags.sentences[1:]:
        if sentences <= len(texts.inputs) - HELD_OUT:
            yield f"{sentences} sentences", as_mlp(ridge(*fitted(sentences), penalty))
    for other in flags.penalties[1:]:
        yield f"ridge {other:g}", as_mlp(ridge(inputs, targets, other))
    for steps in flags.descents:
        yield f"both layers by AdamW, {steps} steps", by_descent(inputs, targets, steps)
    yield "boundary zero", first | {"end_boundary": torch.zeros(1, 1, targets.shape[1])}
    for pairs in flags.pairs:
        means = torch.stack([states.float().mean(dim=0) for states in texts.foreign[:pairs]])
        with_pairs = torch.cat([inputs, means]), torch.cat([targets, texts.meant[:pairs]])
        yield f"{pairs} sentence pairs besides", as_mlp(ridge(*with_pairs, penalty))


def judge(model: MindMergerForCausalLM, texts: Texts, dev: list, state: State, size: int, pad_id: int) -> dict:
    """Evaluate one mapping."""
    model.mapping.load_state_dict(state)

    def as_map(states: torch.Tensor) -> torch.Tensor:
        return model.mapping.mlp(states.float()).double()

    with torch.inference_mode():
        held_out, targets = torch.cat(texts.inputs[:HELD_OUT]), torch.cat(texts.targets[:HELD_OUT])
        return {
            "relative_error": round(relative_error(as_map(held_out), targets), 3),
            "correlation": round(layer_scores([as_map], [texts.foreign], texts.meant, texts.languages)[0], 3),
            "perplexity": round(perplexity(model, dev, size, pad_id), 2),
            "shuffled": round(perplexity(model, shuffled_sources(dev, 0), size, pad_id), 2),
        }


def main() -> None:
    flags = parse_flags(FitFlags)
    quiet_libraries()
    task, languages = find_task("math", TRAINING_TASKS), select_languages(flags.languages)
    limits = {"max_seq_len": flags.max_len, "max_gen_len": flags.max_len}
    names = ModelFlags(llm_path=flags.llm_path, mt_path=flags.mt_path, **limits)
    tokenizer = load_example_tokenizer(names.models, names.limits, augmentation=False)
    # Enough even if all languages translate the same English sentences.
    each = max(flags.sentences) + HELD_OUT + flags.dev_size
    rows = list(read_training(Path(flags.data_dir), task, "mapping", languages, each))
    dev, train = ([rows[row] for row in part] for part in hold_out(len(rows), flags.dev_size, seed=0))
    dev_tokens, table = tokenizer(dev), {}
    for number, layer in enumerate(flags.layers or [None]):
        config = mapping_config(replace(names.models, encoder_layer=layer), tokenizer.llm_tokenizer.bos_token_id)
        model = MindMergerForCausalLM.from_base_models(config, getattr(torch, flags.dtype))
        model.pack_rows()
        with torch.no_grad():
            model.mapping.end_boundary.add_(mean_embedding(model.llm.get_input_embeddings(), torch.device("cpu"))[0])
        texts = read_texts(flags, model, tokenizer, train, flags.sentences[0] if number else max(flags.sentences))
        boundary = {"end_boundary": model.mapping.end_boundary.detach().clone()}
        for name, state in choices(flags, texts, number == 0):
            where = "" if layer is None else f"layer {layer}, "
            row = judge(model, texts, dev_tokens, boundary | state, flags.batch_size, tokenizer.source_pad_id)
            table[where + name] = row
            print(f"{where}{name}: {row}", flush=True)

    print("\n| | error on English | correlation | perplexity | shuffled |\n|" + " --- |" * 5)
    for name, row in table.items():
        print(f"| {name} | {' | '.join(map(str, row.values()))} |")
    write_json(Path("results/aligned_start/fit.json"), table)
    print(json.dumps({"benchmark": "aligned_fit", "choices": table}))


if __name__ == "__main__":
    exit_with_message(main)
