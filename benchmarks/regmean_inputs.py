"""Inputs of the benchmarks of RegMean: models, a substitute for a fine-tuned model, texts of given lengths."""

import argparse
import json
import random
import shutil
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LENGTHS = (40, 256)  # tokens of the shortest and of the longest text
CHARACTERS = 900  # of a piece of code: about 256 tokens


def parser(description: str, rows: dict[str, Callable]) -> argparse.ArgumentParser:
    """Parser of the flags shared by the benchmarks of RegMean."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="hub id or local folder")
    parser.add_argument("--quick", action="store_true", help="smaller, a minute or two in all")
    parser.add_argument("--rounds", type=int, default=3)
    if rows:
        parser.add_argument("--row", choices=list(rows), action="append", help="only this row; default: all")
    # Set for child processes that the benchmark starts.
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser


def run_rows(args: argparse.Namespace, rows: dict[str, Callable[[argparse.Namespace, Path], None]]) -> None:
    """Measure the selected rows, each in a temporary folder of its own."""
    for name in args.row or rows:
        with tempfile.TemporaryDirectory() as work:
            rows[name](args, Path(work))


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


def write_texts(path: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    """Write `count` texts of the standard library's source as JSON lines, with lengths spread evenly over LENGTHS."""
    generator = random.Random(0)
    lengths = np.linspace(*LENGTHS, count).round().astype(int).tolist()
    generator.shuffle(lengths)
    pieces = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in code_texts())
    with path.open("w", encoding="utf-8") as file:
        ids: list[int] = []
        for length in lengths:
            while len(ids) < length:
                ids += next(pieces)
            file.write(json.dumps({"text": tokenizer.decode(ids[:length])}) + "\n")
            ids = ids[length:]


def read_texts(path: Path) -> list[str]:
    """Read the texts of such a file."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer with one token per byte, so that the vocabulary adds little to a model."""
    vocabulary = {character: number for number, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocabulary | {"<pad>": len(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def make_layer(folder: Path, hidden: int, intermediate: int, dtype: torch.dtype, layers: int = 1) -> Path:
    """Write a Llama with layers of this shape, random weights and an untied head; return the folder."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 512,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_sibling(model: Path, folder: Path) -> Path:
    """Write `model` with 2% of seeded noise on every tensor, in place of fine-tuning; return the folder."""
    shutil.copytree(model, folder)
    weights, generator = load_file(model / "model.safetensors"), torch.Generator().manual_seed(1)
    for name in sorted(weights):
        noise = torch.randn(weights[name].shape, generator=generator)
        weights[name] = (weights[name] + 0.02 * weights[name].float().std() * noise).to(weights[name].dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
