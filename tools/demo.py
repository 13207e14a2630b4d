"""Web page for trying a mapping or a merge, with answers of several models side by side.

python -m tools.demo --checkpoint C
python -m tools.demo --models A B MERGED
"""

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from transformers import PreTrainedTokenizerBase

from common.cli import flag, parse_flags
from common.errors import InputError, exit_with_message
from common.logging import quiet_libraries
from common.models import load_tokenizer
from common.optional import require
from common.ranks import Process, start_process
from mindmerger.checkpoint import read_record, switched_languages
from mindmerger.config import Limits, ModelPair, require_positive
from mindmerger.data import Example
from mindmerger.evaluation.answerer import Answerer, pick_dtype, prepare_answerer
from mindmerger.frozen_models import check_llm, load_llm
from mindmerger.modeling import InputEmbeds
from mindmerger.probe import check_answers
from mindmerger.tasks import LANGUAGES, TRAINING_TASKS, UNKNOWN, Prompt, math_prompt
from mindmerger.tokenization import ExampleTokenizer

if TYPE_CHECKING:
    import gradio as gr

_NO_LANGUAGE = "not given"
# Before the import of gradio, which reads it once.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"


@dataclass
class DemoFlags:
    """Serve a page with answers of an LLM alone and with its mapping, or of merged models and their parents."""

    checkpoint: str | None = flag(None, "mapping: folder, .safetensors or pytorch_model.bin")
    llm_path: str | None = flag(None, "LLM of the mapping; default: the one in its config.json")
    mt_path: str | None = flag(None, "multilingual model of the mapping; default: the one in its config.json")
    models: list[str] = flag([], "LLMs to show side by side instead of a mapping, for example parents and their merge")
    switch: Literal["on", "off"] = flag(
        "on", "on: no mapping in languages that it harms, by the verdicts in its config; off: in all languages"
    )
    max_gen_len: int = flag(512, "maximum tokens of an answer")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "auto: bfloat16 on a GPU, float32 on a CPU")
    device: str = flag("auto", "auto: the GPU if there is one, else the CPU")
    trust_remote_code: bool = flag(False, "run code from a model's repository")
    host: str = flag("127.0.0.1", "address to serve at; 0.0.0.0 admits other machines")
    port: int = flag(7860, "port to serve at")

    def __post_init__(self) -> None:
        require_positive(self, "max_gen_len")
        if (self.checkpoint is None) == (not self.models):
            raise InputError("give --checkpoint (a mapping), or --models (LLMs to compare), one of the two")
        if self.models and (self.llm_path or self.mt_path):
            raise InputError("--llm_path and --mt_path are those of a --checkpoint: with --models leave them out")
        if not 0 < self.port < 2**16:
            raise InputError(f"--port {self.port} must be from 1 to 65535")


@dataclass(frozen=True)
class Column:
    """One model on the page.

    Attributes:
        title: title above its answers.
        stream: function from a question and the English name of its language to the answer so far, after each token.
    """

    title: str
    stream: Callable[[str, str], Iterator[str]]


def serve(flags: DemoFlags) -> None:
    """Load the models of the flags and serve the page until the process is stopped.

    Raises:
        InputError: a model cannot be loaded, or the port is taken.
    """
    import gradio as gr

    process = start_process(flags.device)
    quiet_libraries()
    dtype = pick_dtype(flags.dtype, process.device)
    if flags.checkpoint is None:
        columns, default = model_columns(flags, dtype, process.device), None
    else:
        columns, default = mapping_columns(flags, dtype, process)
    # The default theme's fonts come from Google.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        page(columns, default).launch(
            server_name=flags.host, server_port=flags.port, share=False, theme=theme, footer_links=[]
        )
    except OSError as error:
        raise InputError(f"--host {flags.host} --port {flags.port}: {error}") from error


def mapping_columns(flags: DemoFlags, dtype: torch.dtype, process: Process) -> tuple[list[Column], str | None]:
    """Load the columns of the LLM alone and with the mapping; also return the field's default language, or None.

    The LLM alone gets the prompt of `run_evaluation.py --baseline`. The LLM is in memory once. There is a field for a
    question's language if the encoder or the mapping's verdicts need it.

    Raises:
        InputError: a model cannot be loaded, or does not fit the mapping.
    """
    models = ModelPair(flags.llm_path, flags.mt_path, trust_remote_code=flags.trust_remote_code)
    limits = Limits(**_limits(flags))
    task = TRAINING_TASKS.get(read_record(Path(flags.checkpoint)).get("task"))
    switched = switched_languages(Path(flags.checkpoint), flags.switch, process)
    parts = prepare_answerer(models, Path(flags.checkpoint), limits, None, switched)
    with_mapping, tokenizer = parts.load(dtype, process.device), parts.tokenizer
    alone = Answerer(with_mapping.llm, _prompts_only(tokenizer.llm_tokenizer, flags, tokenizer.chat is not None))

    def asking(answerer: Answerer) -> Callable[[str, str], Iterator[str]]:
        def stream(question: str, language: str) -> Iterator[str]:
            text = Prompt("", question, "")
            # The prompt of a classification has more parts than a question: there the text is used as typed.
            prompt = text if task is not None and task.labels else math_prompt(question)
            example = Example(text, prompt, "", LANGUAGES.get(language, UNKNOWN), turn=text)
            [row] = answerer.tokenizer([example], with_targets=False)
            return answerer.stream(answerer.embed([row]), flags.max_gen_len)

        return stream

    title = "The LLM with the mapping"
    if switched:
        title += f" (without it in {', '.join(sorted(switched))})"
    columns = [Column("The LLM alone", asking(alone)), Column(title, asking(with_mapping))]
    if tokenizer.names_language:
        return columns, "English"
    return columns, _NO_LANGUAGE if switched else None


def model_columns(flags: DemoFlags, dtype: torch.dtype, device: torch.device) -> list[Column]:
    """Load the LLMs of `--models`; a prompt is the question in the chat template or, without one, with a line break.

    Raises:
        InputError: a model cannot be loaded.
    """

    def asking(path: str) -> Callable[[str, str], Iterator[str]]:
        tokenizer = load_tokenizer(path, None, flags.trust_remote_code)
        check_llm(ModelPair(path, trust_remote_code=flags.trust_remote_code))
        llm = load_llm(path, None, dtype, flags.trust_remote_code).to(device)
        check_answers(llm)
        answerer = Answerer(llm, _prompts_only(tokenizer, flags, bool(tokenizer.chat_template)))

        def stream(question: str, _: str) -> Iterator[str]:
            if chat := answerer.tokenizer.chat:
                [ids] = chat.ids([chat.prompt(Prompt("", question, "")).text])
            else:
                # The break marks the end of the question.
                ids = tokenizer(question + "\n").input_ids
            with torch.inference_mode():
                inputs = torch.tensor([ids], device=device)
                sequence = InputEmbeds(llm.get_input_embeddings()(inputs), torch.ones_like(inputs))
            return answerer.stream(sequence, flags.max_gen_len)

        return stream

    return [Column(path, asking(path)) for path in flags.models]


def page(columns: list[Column], default: str | None) -> "gr.Blocks":
    """Build the page: a question, and a column of answers for each model.

    Args:
        columns: columns from left to right; on a phone, from top to bottom.
        default: first value of a field for the question's language; None for no field.
    """
    import gradio as gr

    def answer(question: str, language: str) -> Iterator[list[str]]:
        if not question.strip():
            raise gr.Error("There is no question yet.")
        texts = [""] * len(columns)
        try:
            streams = [column.stream(question.strip(), language) for column in columns]
            for step in itertools.zip_longest(*streams):
                texts = [old if new is None else new for old, new in zip(texts, step, strict=True)]
                yield texts
            yield [text or "(no answer)" for text in texts]
        except InputError as error:
            raise gr.Error(str(error)) from error

    with gr.Blocks(title="MindMerger", analytics_enabled=False) as blocks:
        gr.Markdown("# Ask in any language")
        question = gr.Textbox(label="Question", lines=1, max_lines=10, autofocus=True)
        choices = list(dict.fromkeys([*LANGUAGES, default or _NO_LANGUAGE]))
        language = gr.Dropdown(
            choices, value=default or _NO_LANGUAGE, label="Its language", visible=default is not None
        )
        ask = gr.Button("Ask", variant="primary")
        with gr.Row():
            answers = [
                gr.Textbox(label=column.title, lines=5, max_lines=30, interactive=False, min_width=280)
                for column in columns
            ]
        gr.on([ask.click, question.submit], answer, [question, language], answers, show_progress="minimal")
    return blocks


def _prompts_only(llm_tokenizer: PreTrainedTokenizerBase, flags: DemoFlags, chats: bool) -> ExampleTokenizer:
    return ExampleTokenizer(None, None, llm_tokenizer, augmentation=True, chats=chats, **_limits(flags))


def _limits(flags: DemoFlags) -> dict[str, int]:
    return {"max_seq_len": 512, "max_prompt_len": 512, "max_gen_len": flags.max_gen_len}


def main() -> None:
    """Parse the command line and serve."""
    flags = parse_flags(DemoFlags)
    require("gradio", "requirements-demo.txt")
    serve(flags)


if __name__ == "__main__":
    exit_with_message(main)
