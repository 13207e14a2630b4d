"""A training step as published against this repository's: the same rows, the same gradient.

    python -m benchmarks.train --llm_path LLM --mt_path MT --data_dir ./datas [--quick]

As published: micro batches of rows in random order, padded to the longest, every state and every logit kept. Here: rows
of similar length in micro batches of similar token counts (`plan_epoch`), packed for the LLM, logits only at targets.
Both are plain PyTorch, forward, backward and AdamW, from one mapping at the embeddings' scale; DeepSpeed adds the same
to both. Seconds are of the steps, peak memory is beside the loaded models. The difference reported is that of the first
step's loss and mapping gradient (norm of the difference over norm), and in bfloat16 that of the dev perplexity after
`--steps`, which are two by default. A longer run:

    python -m benchmarks.train ... --rows bf16 --steps 60 --batch_size 8 --lr 5e-4 --rounds 1

`--rows replay` compares a step of this repository, as baseline, with a step of as many rows of which one in eleven is
replayed (`--replay 0.1`), with the divergence from the LLM alone. There the differences are those that the terms make.
"""

import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.mapping_control import perplexity
from benchmarks.padded import PaddedBatch, collate
from benchmarks.pair_inputs import PairFlags, unlearned_model
from benchmarks.side_by_side import in_turn, measured, report, run
from common.cli import flag, parse_flags
from common.errors import exit_with_message
from common.logging import quiet_libraries
from common.models import base_config, load_tokenizer
from mindmerger.batching import IGNORED, Tokens, lay_out, plan_epoch, without_sources
from mindmerger.data import hold_out, read_training
from mindmerger.losses import Replayed
from mindmerger.modeling import MindMergerForCausalLM
from mindmerger.tasks import TRAINING_TASKS, find_task, select_languages
from mindmerger.tokenization import ExampleTokenizer

# Rows of a micro batch, as published.
MICRO = {"mapping": 8, "augmentation": 2}
DEV_ROWS = 24
ROWS = ("mapping", "augmentation", "bf16", "replay")
# A tenth of the training rows once more.
ONE_REPLAYED_IN = 11
LIMIT = 256  # tokens of a source, a prompt or a target


@dataclass
class TrainBenchmarkFlags(PairFlags):
    """Compare a training step as published with this repository's."""

    languages: str = flag("de,es,fr", "comma-separated")
    rows: list[str] = flag(list(ROWS), f"which rows of the table, of: {', '.join(ROWS)}")
    batch_size: int = flag(32, "training rows of a step")
    steps: int = flag(2, "of the bf16 rows; one epoch at most")
    # AdamW's first steps change each weight by the learning rate. If that is a tenth of the weights, as 1e-4 is, the
    # result depends on the signs of gradients that bfloat16 gets wrong.
    lr: float = flag(1e-5, "learning rate")
    quick: bool = flag(False, "16 rows a step, one round: a minute or two, and noisy")
    stage: Literal["mapping", "augmentation"] = flag("mapping", "of one side's own process")
    side: Literal["", "baseline", "ours", "replay"] = flag(
        "", "the side that this process is; its result goes to --out"
    )
    dtype: Literal["float32", "bfloat16"] = flag("float32", "of one side's own process")
    out: str = flag("", "of one side's own process")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quick:
            self.batch_size, self.rounds = 16, 1


def published_loss(model: MindMergerForCausalLM, batch: PaddedBatch, divisor: float) -> torch.Tensor:
    """Summed cross entropy of the targets over `divisor`: every column of left-padded rows, every logit."""
    encoded = model.encoder(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
    ).last_hidden_state
    vectors, boundary = model.mapping(encoded.float())
    boundary = boundary.expand(len(encoded), 1, -1)
    embedding, target_mask = model.llm.get_input_embeddings(), (batch.labels != IGNORED).long()
    count = len(encoded)
    bos = torch.full((count, 1), model.config.llm_bos_token_id)
    embeds = [embedding(bos), vectors, boundary, embedding(batch.prompt_ids), embedding(batch.labels.clamp(min=0))]
    ones = torch.ones(count, 1, dtype=torch.int64)
    mask = torch.cat([ones, batch.attention_mask, ones, batch.prompt_attention_mask, target_mask], dim=1)
    labels = torch.cat([torch.full_like(mask[:, : -target_mask.shape[1]], IGNORED), batch.labels], dim=1)
    order = mask.argsort(dim=1, stable=True)[:, -int(mask.sum(dim=1).max()) :]
    sequence = torch.cat([part.to(model.llm.dtype) for part in embeds], dim=1)
    sequence = sequence.gather(1, order.unsqueeze(-1).expand(-1, -1, sequence.shape[-1]))
    return model.llm(
        inputs_embeds=sequence,
        attention_mask=mask.gather(1, order),
        labels=labels.gather(1, order),
        num_items_in_batch=divisor,
        output_hidden_states=True,
    ).loss


def one_side(flags: TrainBenchmarkFlags) -> None:
    """Train `flags.steps` steps in one way; write loss, gradient and dev perplexity to `flags.out`."""
    quiet_libraries()
    augmentation = flags.stage == "augmentation"
    task, languages = find_task("math", TRAINING_TASKS), select_languages(flags.languages)
    examples = list(read_training(Path(flags.data_dir), task, flags.stage, languages, 200))
    dev, train = ([examples[row] for row in part] for part in hold_out(len(examples), DEV_ROWS, seed=0))
    tokenizer = ExampleTokenizer(
        load_tokenizer(flags.mt_path),
        base_config(flags.mt_path),
        load_tokenizer(flags.llm_path),
        augmentation=augmentation,
        max_seq_len=LIMIT,
        max_prompt_len=LIMIT,
        max_gen_len=LIMIT,
    )
    tokens, pad_id = tokenizer(train), tokenizer.source_pad_id
    bos_token_id, dtype = tokenizer.llm_tokenizer.bos_token_id, getattr(torch, flags.dtype)
    model = unlearned_model(flags, bos_token_id, lay_out(tokens[:32], bos_token_id, pad_id), dtype)
    optimizer = torch.optim.AdamW(model.mapping.parameters(), lr=flags.lr)
    if flags.side != "baseline":
        model.pack_rows(pad_id)
    own = {id(row) for row in tokens[::ONE_REPLAYED_IN]} if flags.side == "replay" else set()

    micro = MICRO[flags.stage]
    plan = plan_epoch([len(row) for row in tokens], flags.batch_size, flags.batch_size // micro, 1, seed=0, epoch=0)
    found: dict[str, Any] = {}
    with measured():
        for micro_batches in ([ranks[0] for ranks in step] for step in islice(plan, flags.steps)):
            if flags.side == "baseline":
                drawn = sorted(row for rows in micro_batches for row in rows)
                micro_batches = [drawn[start : start + micro] for start in range(0, len(drawn), micro)]
            step_rows = [[tokens[row] for row in rows] for rows in micro_batches]
            found |= _step(model, step_rows, pad_id, flags.side, own, found)
            optimizer.step()
            optimizer.zero_grad()
    if flags.dtype == "bfloat16":
        found["perplexity"] = perplexity(model, tokenizer(dev), 8, pad_id)
    torch.save(found, flags.out)


def _replayed(model: MindMergerForCausalLM, rows: list[Tokens], pad_id: int, own: set[int]) -> Replayed | None:
    """Replayed rows of a micro batch: those whose identities are in `own`."""
    is_own = [id(row) in own for row in rows]
    if not any(is_own):
        return None
    chosen = [row for row, is_replayed in zip(rows, is_own, strict=True) if is_replayed]
    alone = lay_out(without_sources(chosen), model.config.llm_bos_token_id, pad_id, packed=model.packs)
    positions = np.flatnonzero(np.repeat(is_own, [len(row.target) for row in rows]))
    return Replayed(torch.from_numpy(positions), alone, 1.0, 1.0)


def _step(
    model: MindMergerForCausalLM,
    micro_batches: list[list[Tokens]],
    pad_id: int,
    side: str,
    own: set[int],
    found: dict[str, Any],
) -> dict[str, Any]:
    """Accumulate a step's gradient; return {"loss", "gradient"} of the first step."""
    divisor = float(sum(len(row.target) for rows in micro_batches for row in rows))
    total = 0.0
    for rows in micro_batches:
        if side == "baseline":
            loss = published_loss(model, collate(rows, pad_id), divisor)
        else:
            batch = lay_out(rows, model.config.llm_bos_token_id, pad_id, packed=model.packs)
            replayed = _replayed(model, rows, pad_id, own)
            loss = model(batch=batch, num_items_in_batch=divisor, replayed=replayed).loss
        loss.backward()
        total += loss.item()
    if found:
        return found
    return {"loss": total, "gradient": torch.cat([p.grad.flatten() for p in model.mapping.parameters()])}


def compare(
    flags: TrainBenchmarkFlags,
    name: str,
    stage: str,
    dtype: str,
    steps: int,
    sides: tuple[str, str] = ("baseline", "ours"),
) -> None:
    """Measure one row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        out = {side: Path(folder) / side for side in sides}
        words = ["-m", "benchmarks.train", "--llm_path", flags.llm_path, "--mt_path", flags.mt_path]
        words += ["--data_dir", flags.data_dir, "--languages", flags.languages, "--batch_size", str(flags.batch_size)]
        words += ["--stage", stage, "--dtype", dtype, "--steps", str(steps), "--lr", str(flags.lr)]
        baseline, ours = in_turn(
            *(lambda side=side: run([*words, "--side", side, "--out", str(out[side])]) for side in out), flags.rounds
        )
        one, other = (torch.load(path, weights_only=True) for path in out.values())
    if dtype == "bfloat16":
        differences = {"dev_perplexity": abs(one["perplexity"] - other["perplexity"]) / one["perplexity"]}
    else:
        gradient = float((one["gradient"] - other["gradient"]).norm() / one["gradient"].norm())
        differences = {"loss": abs(one["loss"] - other["loss"]) / one["loss"], "gradient": gradient}
    report(name, baseline, ours, max(differences.values()), relative_differences=differences)


def main() -> None:
    flags = parse_flags(TrainBenchmarkFlags)
    if flags.side:
        one_side(flags)
        return
    for stage in MICRO:
        if stage in flags.rows:
            compare(flags, f"train {stage}", stage, "float32", 1)
    if "bf16" in flags.rows:
        for stage in MICRO:
            compare(flags, f"train {stage} bf16", stage, "bfloat16", flags.steps)
    if "replay" in flags.rows:
        compare(flags, "train replay", "augmentation", "float32", flags.steps, ("ours", "replay"))


if __name__ == "__main__":
    exit_with_message(main)
