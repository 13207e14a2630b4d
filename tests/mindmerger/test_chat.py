"""Prompts in an LLM's chat template: the ids of `apply_chat_template`, and answers without their thinking part."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.cli import parse_flags
from common.errors import InputError
from common.io import read_json
from mindmerger.batching import Batch, Tokens, lay_out
from mindmerger.chat import without_thinking
from mindmerger.config import EvaluationFlags
from mindmerger.data import Example
from mindmerger.evaluation.answerer import Answerer
from mindmerger.evaluation.run import evaluate
from mindmerger.tasks import LANGUAGES, Prompt, math_prompt, x_csqa_prompt
from mindmerger.tokenization import ExampleTokenizer
from tests.mindmerger.datas import sentence
from tests.mindmerger.scripts import train_here
from tests.tiny_models import tiny_tokenizer

ROLES = "{% for m in messages %}"
END = "{% endfor %}{% if add_generation_prompt %}"


@dataclass(frozen=True)
class Template:
    """A chat template in the form of a family, its special tokens, and whether its tokenizer adds a bos to a text."""

    text: str
    specials: tuple[str, ...] = ()
    adds_bos: bool = True
    bos: str | None = "<s>"
    metaspace: bool = False


CHATML = (
    ROLES + "{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe good<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n" + END + "<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (
    ROLES + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n" + END + "<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}<|head|>system<|/head|>\n\nToday: {{ strftime_now('%d %b %Y') }}<|eot_id|>" + ROLES
    + "<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot_id|>" + END
    + "<|head|>assistant<|/head|>\n\n{% endif %}"
)  # fmt: skip
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + ROLES
    + "<|turn|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|/turn|>\n" + END
    + "<|turn|>model\n{% endif %}"
)  # fmt: skip
MISTRAL = (
    "{{ bos_token }}" + ROLES + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
R1 = ROLES + "<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}" + END + (
    "<|assistant|><think>\n{% endif %}"
)  # fmt: skip
IM = ("<|im_start|>", "<|im_end|>")
TEMPLATES = {
    "chatml": Template(CHATML, IM, adds_bos=False, bos="<|im_start|>"),
    "chatml without bos": Template(CHATML, IM, adds_bos=False, bos=None),
    "bos that only the tokenizer adds": Template(CHATML, IM),
    "bos that nothing adds": Template(CHATML, IM, adds_bos=False),
    "qwen3": Template(QWEN3, IM, adds_bos=False, bos=None),
    "llama3": Template(LLAMA3, ("<|head|>", "<|/head|>", "<|eot_id|>")),
    "gemma": Template(GEMMA, ("<|turn|>", "<|/turn|>")),
    "mistral": Template(MISTRAL, ("[INST]", "[/INST]"), metaspace=True),
    "mistral without control tokens": Template(MISTRAL, metaspace=True),
}


def tokenizer_of(template: Template) -> PreTrainedTokenizerBase:
    """A tiny tokenizer with a chat template."""
    if template.metaspace:
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
        specials = ["<pad>", "<s>", "</s>", "<unk>", *template.specials]
        alphabet = sorted(set("Wie viele Äpfel hat Anna? 3+4=7.INST[]/\n<>s苹果ab1("))
        trainer = trainers.BpeTrainer(special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(["Wie viele Äpfel hat Anna?", "[INST] [/INST]"], trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    else:
        tokenizer = tiny_tokenizer(["<s>"] if template.adds_bos else [], [], template.specials)
    tokenizer.bos_token = template.bos
    tokenizer.chat_template = template.text
    return tokenizer


def example_tokenizer(tokenizer: PreTrainedTokenizerBase, **more: int | bool) -> ExampleTokenizer:
    limits = {"max_seq_len": 99, "max_prompt_len": 300, "max_gen_len": 40}
    return ExampleTokenizer(None, None, tokenizer, **({"augmentation": True, "chats": True} | limits | more))


def row(question: str, target: str = "3 + 4 = 7.") -> Example:
    text = Prompt("", question, "")
    return Example(text, math_prompt(question), target, LANGUAGES["German"], turn=text)


def reference(tokenizer: PreTrainedTokenizerBase, *texts: str) -> list[int]:
    """Ids of transformers' own function for turns of user and assistant, on the repository's fixed date."""
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=False)]
    options = {"add_generation_prompt": len(texts) == 1, "enable_thinking": False}
    template = tokenizer.chat_template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    return tokenizer.apply_chat_template(
        turns, chat_template=template, return_dict=False, sanitize_control_tokens=True, **options
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_apply_chat_template(name: str) -> None:
    tokenizer = tokenizer_of(TEMPLATES[name])
    chats, bos = example_tokenizer(tokenizer), tokenizer.bos_token_id
    questions = ["Wie viele Äpfel hat Anna?", " 苹果 3 + 4 ", "(1)", "a </s> b <|im_end|>[/INST] c"]
    # A special token in a metaspace tokenizer's text gets spaces of its own.
    questions = questions[:3] if TEMPLATES[name].metaspace else questions
    rows = chats([row(question) for question in questions])
    for question, tokens in zip(questions, rows, strict=True):
        prompt, whole = reference(tokenizer, question.strip()), reference(tokenizer, question.strip(), "3 + 4 = 7.")
        if chats.bos_token_id is not None and prompt[0] != bos:
            prompt, whole = [bos, *prompt], [bos, *whole]
        [ids] = lay_out([replace(tokens, target=[], mapped=False)], chats.bos_token_id).token_ids.tolist()
        assert ids == prompt
        target = [*ids, *tokens.target]
        # The rest is a line break after the end of the turn.
        assert target == whole[: len(target)] and tokenizer.decode(whole[len(target) :]).strip() == ""
        # The mapped states stand where the user's text begins.
        mapped = lay_out([replace(tokens, source=[5, 6], target=[], mapped=True)], chats.bos_token_id)
        start = int(mapped.mapped_positions[0])
        assert mapped.token_ids[0].tolist() == [*ids[:start], 0, 0, 0, *ids[start:]]
        # Decoding of a metaspace tokenizer drops the space before a text.
        assert tokenizer.decode(ids[start:]).lstrip()[:2] == question.strip()[:2]
    assert rows[0].target[-1] not in tokenizer("3 + 4 = 7.").input_ids
    wanted = {"bos that nothing adds": None, "chatml without bos": None, "qwen3": None}
    assert chats.bos_token_id == wanted.get(name, bos)


def test_without_augmentation_the_turn_holds_the_mapped_states_alone() -> None:
    tokenizer = tokenizer_of(TEMPLATES["gemma"])
    limits = {"max_seq_len": 99, "max_prompt_len": 300, "max_gen_len": 40}
    chats = ExampleTokenizer(tokenizer, None, tokenizer, augmentation=False, chats=True, **limits)
    [tokens] = chats([row("Wie viele?")])
    ids = [tokenizer.bos_token_id, *tokens.opening, *tokens.prompt]
    assert tokenizer.decode(ids) == "<s><|turn|>user\n<|/turn|>\n<|turn|>model\n"
    assert tokenizer.decode([tokenizer.bos_token_id, *tokens.opening]) == "<s><|turn|>user\n"


def test_a_cut_prompt_keeps_the_template() -> None:
    tokenizer = tokenizer_of(TEMPLATES["chatml"])
    prompt = x_csqa_prompt("Wo kauft man Äpfel? " * 40, ["Markt", "Mond"])
    question = Example(prompt, prompt, "A", LANGUAGES["German"])
    chats = example_tokenizer(tokenizer, max_prompt_len=150, max_gen_len=1)
    [tokens] = chats([question])
    ids = [tokenizer.bos_token_id, *tokens.opening, *tokens.prompt]
    text = tokenizer.decode(ids)
    assert tokens.cut == ("prompt", "target") and len(ids) <= 150 and len(tokens.target) == 1
    assert text.startswith("<|im_start|>system\nBe good<|im_end|>\n<|im_start|>user\nWo kauft")
    assert text.endswith(f"{prompt.after}<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(InputError, match="--max_prompt_len 9 leaves no room: the template alone has"):
        example_tokenizer(tokenizer, max_prompt_len=9)([question])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no chat template: leave --prompt out"),
        ("{{ raise_exception('no user here') }}", "refuses turns of user: no user here"),
        (MISTRAL + "{% if messages[1] is defined %}{{ raise_exception('so') }}{% endif %}", "user and assistant: so"),
        ("always the same", "does not contain the text of each turn once"),
    ],
)  # fmt: skip
def test_an_unusable_template_is_one_line(text: str | None, message: str) -> None:
    tokenizer = tiny_tokenizer(["<s>"], [])
    tokenizer.chat_template = text
    with pytest.raises(InputError, match=message) as error:
        example_tokenizer(tokenizer)
    assert str(error.value).startswith("--prompt chat: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is: 7", "The answer is: 7"),
        (" 7", " 7"),
        ("<think>\n3 + 4 = 8?</think>\n\nThe answer is: 7", "The answer is: 7"),
        ("3 + 4 = 8?</think>7", "7"),
        ("<think>a</think>5 <think>b</think>7", "7"),
        ("<think>\n3 + 4 = 8", ""),
        ("<think>a</think><think>8", ""),
        ("[THINK]8[/THINK]7", "7"),
        ("[THINK]8", ""),
        ("<|begin_of_thought|>8<|end_of_thought|>7", "7"),
        ("I think <b>7</b>", "I think <b>7</b>"),
    ],
)
def test_thinking_is_no_answer(text: str, answer: str) -> None:
    assert without_thinking(text) == answer


def test_answers_stop_at_the_end_of_a_turn_and_lose_their_thinking(build: Callable) -> None:
    model, _ = build()
    template = replace(TEMPLATES["llama3"], specials=("<|head|>", "<|/head|>", "<|eot_id|>", "[THINK]", "[/THINK]"))
    tokenizer = tokenizer_of(template)
    model.llm.generation_config.eos_token_id = [2, 3]
    answerer = Answerer(model.llm, example_tokenizer(tokenizer))
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in template.specials}
    assert answerer.eos_token_ids == {2, 3, ids["<|eot_id|>"]}
    plain = tokenizer("8", add_special_tokens=False).input_ids
    thought = [ids["[THINK]"], *plain, ids["[/THINK]"], *plain, ids["<|eot_id|>"]]
    assert answerer.output(0, thought) == (0, "8", True) and answerer.output(0, thought[:2]) == (0, "", False)
    assert answerer.text(thought) == "88"


def test_an_opened_thinking_part_is_closed() -> None:
    tokenizer = tokenizer_of(Template(R1, ("<|user|>", "<|assistant|>")))
    [tokens] = example_tokenizer(tokenizer)([row("Wie viele?")])
    assert tokenizer.decode([*tokens.opening, *tokens.prompt]) == (
        "<|user|>Wie viele?<|assistant|><think>\n</think>\n\n"
    )  # fmt: skip


def test_the_opening_counts_as_length() -> None:
    assert len(Tokens([1, 2], [3], [4], opening=[5, 6, 7])) == 9


@pytest.fixture
def chat_llm(work: Path, models: dict[str, Path]) -> Path:
    """The tiny LLM with a chat template."""
    folder = work / "chat_llm"
    shutil.copytree(models["llama"], folder, dirs_exist_ok=True)
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n" + END + "assistant:\n{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_training_and_evaluation_have_the_same_prompts(
    work: Path, chat_llm: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(work)
    seen: dict[str, list[str]] = {}
    monkeypatch.setattr("mindmerger.build.lay_out", partial(spy, seen.setdefault("training", [])))
    monkeypatch.setattr("mindmerger.evaluation.answerer.lay_out", partial(spy, seen.setdefault("evaluation", [])))
    words = ("--deepspeed", "--llm_path", chat_llm, "--mt_path", models["mt5"], "--max_seq_len", 64)
    words = (
        *words,
        "--languages",
        "de,en",
        "--train_num",
        4,
        "--dev_size",
        2,
        "--train_batch_size",
        4,
        "--epoch_num",
        1,
    )
    train_here(work, *words, "--stage_name", "mapping", "--prompt", "chat", "--save_name", "chat", "--languages", "de")
    chats = read_json(work / "outputs/chat/mapping/config.json")
    assert (chats["prompt_format"], chats["prompt"]) == ("chat", "<s>user:\n\nassistant:\n")
    # Dev rows are read by the LLM alone, too, which has the text in its prompt.
    mapped = [text.split("MAPPED") for text in seen["training"] if "MAPPED" in text]
    assert {before for before, _ in mapped} == {"<s>user:\n"}
    assert {after.split("English")[0] for _, after in mapped} == {"\nassistant:\n"}
    alone = [text for text in seen["training"] if "MAPPED" not in text]
    assert alone and all(text.startswith("<s>user:\nTranslate ") for text in alone)
    seen["training"].clear()
    train_here(work, *words, "--stage_name", "augmentation", "--prompt", "chat", "--save_name", "chat")
    start, *rest = seen["training"][0].split("MAPPED")[1].partition("\nassistant:\n")
    assert start in {sentence(name, n) for name in ("German", "English") for n in range(12)}
    assert rest[1].startswith("It is ")

    asked = ("--init_checkpoint", "outputs/chat/augmentation", "--languages", "de", "--max_gen_len", 4)
    with pytest.raises(InputError, match="with --baseline --prompt chat and the same --llm_path"):
        evaluate_words(*asked, "--save_name", "chat", "--switch", "decide")
    evaluate_words(*asked, "--save_name", "chat")
    wanted = {f"<s>user:\nMAPPED{sentence('German', n)}\nassistant:\n" for n in range(2)}
    assert set(seen["evaluation"]) == wanted
    seen["evaluation"].clear()
    evaluate_words("--baseline", "--prompt", "chat", "--llm_path", chat_llm, *asked[2:], "--save_name", "chat")
    assert set(seen["evaluation"]) == {text.replace("MAPPED", "") for text in wanted}
    with pytest.raises(InputError, match="--prompt published: .*augmentation was trained with --prompt chat"):
        evaluate_words(*asked, "--prompt", "published", "--save_name", "other")
    capsys.readouterr()
    with pytest.raises(InputError, match="holds out all"):
        train_here(work, *words, "--stage_name", "augmentation", "--save_name", "chat", "--dev_size", 999)
    assert "outputs/chat/mapping was trained with --prompt chat, not published" in capsys.readouterr().out


def spy(seen: list[str], rows: list[Tokens], bos_token_id: int | None, *more: object, **options: object) -> Batch:
    """`lay_out`, which keeps the texts of all sequences, with MAPPED for the mapped states."""
    batch = lay_out(rows, bos_token_id, *more, **options)
    tokenizer = tiny_tokenizer(["<s>"], [])
    for row in rows:
        before, after = [bos_token_id, *row.opening], [*row.prompt, *row.target]
        seen.append(tokenizer.decode(before) + "MAPPED" * row.mapped + tokenizer.decode(after))
    return batch


def evaluate_words(*words: object) -> None:
    evaluate(parse_flags(EvaluationFlags, ["--task", "mgsm", *map(str, words)]))
