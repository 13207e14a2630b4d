from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import BatchEncoding, PreTrainedTokenizerBase

from common.errors import InputError
from common.models import base_config
from mindmerger.data import Example
from mindmerger.tasks import LANGUAGES, Prompt, math_prompt, x_csqa_prompt, xnli_prompt
from mindmerger.tokenization import ExampleTokenizer
from tests.tiny_models import tiny_tokenizer

GERMAN = LANGUAGES["German"]


def example(prompt: Prompt, target: str = "7", language: str = "German") -> Example:
    return Example(Prompt("", prompt.query, ""), prompt, target, LANGUAGES[language])


@pytest.mark.parametrize(
    "prompt",
    [
        math_prompt("Anna hat viele Äpfel. " * 40),
        x_csqa_prompt("Wo kauft man Äpfel? " * 40, ["Markt", "Mond", "Meer", "Moor", "Mars"]),
        xnli_prompt("Anna kauft Äpfel auf dem Markt. " * 40, "Anna war auf dem Markt."),
    ],
)
def test_a_cut_prompt_keeps_template_and_tail(build: Callable, prompt: Prompt) -> None:
    _, tokenizer = build(max_prompt_len=260, max_seq_len=50)
    tokens = tokenizer([example(prompt)])[0]
    text = tokenizer.llm_tokenizer.decode(tokens.prompt)
    assert text.startswith(prompt.before) and text.endswith(prompt.after)
    kept = text.removeprefix(prompt.before).removesuffix(prompt.after)
    assert prompt.query.startswith(kept)
    # As much of the query stays as fits: its next character would not.
    longer = prompt.before + prompt.query[: len(kept) + 1] + prompt.after
    assert len(tokens.prompt) <= 260 < len(tokenizer.llm_tokenizer(longer, add_special_tokens=False).input_ids)
    assert len(tokens.source) <= 50
    assert tokens.cut == ("source", "prompt")


def test_a_cut_target_carries_no_eos(build: Callable) -> None:
    _, tokenizer = build(max_gen_len=5)
    target = "3 + 4 = 7. The answer is: 7"
    ids = tokenizer.llm_tokenizer(target, add_special_tokens=False).input_ids
    cut = tokenizer([example(math_prompt("?"), target)])[0]
    assert (list(cut.target), cut.cut) == (ids[:5], ("target",))
    _, tokenizer = build(max_gen_len=len(ids) + 1)
    whole = tokenizer([example(math_prompt("?"), target)])[0]
    assert (list(whole.target), whole.cut) == ([*ids, 2], ())
    _, tokenizer = build(max_gen_len=len(ids))
    assert list(tokenizer([example(math_prompt("?"), target)])[0].target) == ids


def test_special_tokens_are_added_by_id_and_once(build: Callable) -> None:
    prompt = math_prompt("Anna")
    for mt, prefix in (("mt5", []), ("xlm_roberta", ["<s>"]), ("nllb", ["deu_Latn"]), ("qwen", [])):
        _, tokenizer = build(mt=mt)
        tokens = tokenizer([example(prompt)])[0]
        suffix = [] if mt == "qwen" else ["</s>"]
        plain = tokenizer.mt_tokenizer.tokenize("Anna")
        assert tokenizer.mt_tokenizer.convert_ids_to_tokens(tokens.source) == [*prefix, *plain, *suffix]
        assert 1 not in tokens.prompt and 2 not in tokens.prompt
        assert tokenizer.llm_tokenizer.decode(tokens.prompt) == prompt.text


def test_special_tokens_in_a_text_are_text(build: Callable) -> None:
    _, tokenizer = build()
    tokens = tokenizer([example(math_prompt("a </s> b"), "c </s> d")])[0]
    assert list(tokens.target).count(2) == 1 and tokens.target[-1] == 2
    assert 2 not in tokens.prompt and list(tokens.source).count(2) == 1
    assert tokenizer.llm_tokenizer.decode(tokens.target[:-1]) == "c </s> d"


def test_a_source_ends_where_the_encoders_positions_do(build: Callable) -> None:
    _, tokenizer = build(mt="xlm_roberta", max_seq_len=5000)
    tokens = tokenizer([Example(Prompt("", "Äpfel " * 2000, ""), math_prompt("?"), "7", GERMAN)])[0]
    assert len(tokens.source) == 512 and tokens.cut == ("source",)


def test_a_template_longer_than_its_limit_is_refused(build: Callable) -> None:
    _, tokenizer = build(max_prompt_len=10)
    with pytest.raises(InputError, match="--max_prompt_len 10 leaves no room: the template alone has"):
        tokenizer([example(math_prompt("Anna"))])


def test_without_augmentation_there_is_no_prompt(build: Callable) -> None:
    _, tokenizer = build(augmentation=False)
    assert len(tokenizer([example(math_prompt("Anna"))])[0].prompt) == 0


def test_an_encoder_that_lacks_a_language_says_so(build: Callable, models: dict[str, Path]) -> None:
    _, pair = build(mt="nllb")
    # M2M100's spelling, without Telugu, as M2M100 is.
    m2m100 = tiny_tokenizer(["__en__"], ["</s>"], ("__en__", "__de__"))
    limits = {"augmentation": True, "max_seq_len": 50, "max_prompt_len": 300, "max_gen_len": 9}
    tokenizer = ExampleTokenizer(m2m100, base_config(str(models["nllb"])), pair.llm_tokenizer, **limits)
    assert tokenizer([example(math_prompt("?"))])[0].source[0] == m2m100.convert_tokens_to_ids("__de__")
    with pytest.raises(InputError, match=r"no language token for Telugu: leave it out, as in --languages en,de"):
        tokenizer([example(math_prompt("?"), language="Telugu")])


def test_language_tokens_of_nllb_and_m2m100_exist() -> None:
    """Against the lists that transformers itself carries; M2M100 was never trained on Telugu."""
    from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES as M2M100
    from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES as NLLB

    assert {language.name for language in LANGUAGES.values() if language.nllb not in NLLB} == set()
    assert {language.name for language in LANGUAGES.values() if language.code not in M2M100["m2m100"]} == {"Telugu"}


def test_the_llm_alone_reads_no_source(build: Callable) -> None:
    _, pair = build()
    alone = ExampleTokenizer(
        None, None, pair.llm_tokenizer, augmentation=True, max_seq_len=9, max_prompt_len=300, max_gen_len=9
    )
    tokens = alone([example(math_prompt("Anna"))], with_targets=False)[0]
    assert (len(tokens.source), len(tokens.target), alone.source_pad_id) == (0, 0, 0)


def test_many_texts_have_the_ids_of_the_tokenizers_own_call(build: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"Anna hat {n} Äpfel </s> und <s> {n + 1}  Birnen" for n in range(40)]
    rows = [example(math_prompt(text), text) for text in texts]

    def call(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    _, tokenizer = build()
    llm_tokenizer = tokenizer.llm_tokenizer
    # Options of an earlier call do not leak in.
    llm_tokenizer("Anna </s>", padding="max_length", max_length=8, truncation=True)
    for row, text in zip(tokenizer(rows), texts, strict=True):
        assert row.source[:-1] == call(tokenizer.mt_tokenizer, text)
        assert row.target[:-1] == call(llm_tokenizer, text)

    # A tokenizer that changes a text before its backend reads it.
    own_call = type(llm_tokenizer).__call__

    def lower(self: PreTrainedTokenizerBase, text: str | list[str], **options: object) -> BatchEncoding:
        return own_call(self, text.lower() if isinstance(text, str) else [one.lower() for one in text], **options)

    monkeypatch.setattr(type(llm_tokenizer), "__call__", lower)
    changed = tokenizer(rows)
    assert [row.target[:-1] for row in changed] == [call(llm_tokenizer, text) for text in texts]
    assert changed[0].target != tokenizer.llm_tokenizer.backend_tokenizer.encode(texts[0]).ids
