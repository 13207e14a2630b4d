"""`tools.demo` in a headless browser: a question is typed and sent, and every model's answer appears."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from common.cli import parse_flags
from common.errors import InputError
from common.models import load_tokenizer
from common.ranks import Process
from mindmerger.checkpoint import SAFETENSORS, write_verdicts
from mindmerger.data import Example
from mindmerger.evaluation.answerer import Answerer
from mindmerger.frozen_models import load_llm
from mindmerger.tasks import LANGUAGES, Prompt, math_prompt
from mindmerger.tokenization import ExampleTokenizer
from tests.mindmerger.scripts import free_port, module_command, run, started, wait_for
from tools.demo import DemoFlags, mapping_columns

QUESTION = "Wie viele Äpfel hat Anna?"
RECORD = """() => {
    window.shown = []
    setInterval(() => shown.push([...document.querySelectorAll("textarea")].map(area => area.value)), 5)
}"""
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    if find_spec("gradio") is None:
        pytest.skip("gradio is not installed (requirements-demo.txt)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH")
    with playwright.sync_playwright() as starter:
        chromium = starter.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def served(folder: Path, *words: object) -> Iterator[str]:
    """Address of `tools.demo WORDS`, after it has started."""
    port = free_port()
    output = folder / "output.txt"
    with started(module_command("tools.demo", *words, "--port", port), folder) as process:
        wait_for(lambda: f":{port}" in output.read_text(), process)
        yield f"http://127.0.0.1:{port}"


def ask(browser: Any, address: str, expected: dict[str, str]) -> None:
    """Type and send the question; each column with a given title must show the given answer, word by word."""
    playwright = pytest.importorskip("playwright.sync_api")
    # Line ends as in a browser's text field; a random model may generate any.
    expected = {title: text.replace("\r\n", "\n").replace("\r", "\n") for title, text in expected.items()}
    page = browser.new_page()
    page.set_default_timeout(120_000)
    elsewhere: list[str] = []
    page.on("request", lambda request: elsewhere.append(request.url) if address not in request.url else None)
    page.goto(address)
    page.get_by_label("Question").fill(QUESTION)
    page.evaluate(RECORD)
    page.get_by_role("button", name="Ask").click()
    for title, text in expected.items():
        playwright.expect(page.get_by_label(title, exact=True)).to_have_value(text, timeout=120_000)
    # The question's own field is the first.
    for text, shown in zip(expected.values(), list(zip(*page.evaluate("shown"), strict=True))[1:], strict=True):
        assert len(set(shown)) > 3 and all(text.startswith(start.rstrip("\ufffd")) for start in shown)
    assert [url for url in elsewhere if url.startswith("http")] == []
    page.close()


def test_the_llm_alone_beside_the_llm_with_the_mapping(tmp_path: Path, build: Callable, browser: Any) -> None:
    model, tokenizer = build()
    model.config.augmentation, model.config.task = True, "math"
    model.save_pretrained(tmp_path / "checkpoint")
    alone = ExampleTokenizer(
        None, None, tokenizer.llm_tokenizer, augmentation=True, max_seq_len=9, max_prompt_len=512, max_gen_len=9
    )
    example = Example(Prompt("", QUESTION, ""), math_prompt(QUESTION), "", LANGUAGES["English"])
    texts = []
    for answerer in (Answerer(model.llm, alone), Answerer(model.llm, tokenizer, model)):
        [row] = answerer.tokenizer([example], with_targets=False)
        [output] = [output for outputs in answerer.generate({0: row}, 40, 1) for output in outputs]
        texts.append(output.text)
    assert texts[0] != texts[1]
    with served(tmp_path, "--checkpoint", "checkpoint", "--max_gen_len", 40) as address:
        ask(browser, address, dict(zip(["The LLM alone", "The LLM with the mapping"], texts, strict=True)))


def test_the_mapping_is_left_out_where_it_harms(tmp_path: Path, build: Callable) -> None:
    model, _ = build()
    model.config.augmentation, model.config.task = False, "math"
    model.save_pretrained(tmp_path)
    process = Process(0, 1, torch.device("cpu"))

    def answers(*words: str) -> tuple[list[str], str | None, dict[str, list[str]]]:
        flags = parse_flags(DemoFlags, ["--checkpoint", str(tmp_path), "--max_gen_len", "12", *words])
        columns, default = mapping_columns(flags, torch.float32, process)
        texts = {
            name: [list(column.stream(QUESTION, name))[-1] for column in columns] for name in ("German", "not given")
        }
        return [column.title for column in columns], default, texts

    titles, default, texts = answers()
    assert titles[1] == "The LLM with the mapping" and default is None
    alone, mapped = texts["German"]
    assert alone != mapped and texts["not given"] == [alone, mapped]
    write_verdicts(tmp_path / SAFETENSORS, {"German": {"verdict": "harms"}})
    titles, default, texts = answers()
    assert titles[1] == "The LLM with the mapping (without it in German)" and default == "not given"
    assert texts == {"German": [alone, alone], "not given": [alone, mapped]}
    assert answers("--switch", "off")[2]["German"] == [alone, mapped]


def test_parents_beside_their_merge(tmp_path: Path, models: dict[str, Path], browser: Any) -> None:
    expected = {}
    for seed, name in enumerate(("A", "B", "MERGED")):
        shutil.copytree(models["llama"], tmp_path / name)
        llm = load_llm(str(tmp_path / name), None, torch.float32, trust_remote_code=False)
        torch.manual_seed(seed)
        torch.nn.init.normal_(llm.lm_head.weight)
        llm.save_pretrained(tmp_path / name)
        tokenizer = load_tokenizer(str(tmp_path / name))
        ids = torch.tensor([tokenizer(QUESTION + "\n").input_ids])
        new = llm.generate(ids, max_new_tokens=60, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        expected[name] = tokenizer.decode(new, skip_special_tokens=True)
    assert len(set(expected.values())) == 3
    with served(tmp_path, "--models", *expected, "--max_gen_len", 60) as address:
        ask(browser, address, expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --checkpoint (a mapping), or --models (LLMs to compare), one of the two"),
        (["--checkpoint", "c", "--models", "A"], "one of the two"),
        (["--models", "A", "--llm_path", "B"], "with --models leave them out"),
        (["--checkpoint", "c", "--port", "0"], "--port 0 must be from 1 to 65535"),
    ],
)
def test_wrong_flags_are_told(words: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        parse_flags(DemoFlags, words)
    assert message in str(error.value)


@pytest.mark.skipif(find_spec("gradio") is not None, reason="gradio is installed")
def test_a_missing_gradio_is_told_in_one_sentence(tmp_path: Path) -> None:
    output = run(module_command("tools.demo", "--checkpoint", "c"), tmp_path, expect=2)
    assert output == "error: gradio is not installed: pip install -r requirements-demo.txt\n"
