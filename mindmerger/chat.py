"""An LLM's chat template around the turn of a user, for `--prompt chat`."""

import re
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.errors import InputError, first_line
from mindmerger.tasks import Prompt

# Stand-ins for the texts of the two turns, which occur in no template.
_TURN, _ANSWER = "QUESTION7F3A", "ANSWER7F3A"
# Date for templates that contain today's, since training and evaluation need the same ids on any day. Only a macro can
# replace transformers' `strftime_now`: it turns functions among a template's variables into strings.
_DATE = datetime(2024, 7, 26)
_DIRECTIVES = [f"%{flag}{letter}" for letter in "aAbBcdHIjmMpSUwWxXyYzZ" for flag in ("", "-")]
_FIXED_DATE = "".join(f"|replace('{directive}', '{_DATE.strftime(directive)}')" for directive in _DIRECTIVES)
_CLOCK = f"{{% macro strftime_now(format) %}}{{{{ format{_FIXED_DATE} }}}}{{% endmacro %}}"
# Tags around the thinking part of an answer: <think>, <thinking>, [THINK], <|begin_of_thought|>, <|START_THINKING|>.
_OPENING_TAG = re.compile(
    r"<(?:think|thinking|thought|reasoning)>|\[THINK\]|<\|begin_of_thought\|>|<\|START_THINKING\|>"
)
_CLOSING_TAG = re.compile(r"</(?:think|thinking|thought|reasoning)>|\[/THINK\]|<\|end_of_thought\|>|<\|END_THINKING\|>")


def without_thinking(text: str) -> str:
    """Remove the thinking part of an answer; a part that is not closed leaves an empty answer."""
    *thoughts, answer = _CLOSING_TAG.split(text)
    if _OPENING_TAG.search(answer):
        return ""
    return answer.lstrip() if thoughts else answer


def is_thinking_tag(token: str) -> bool:
    """True if a token opens or closes the thinking part of an answer."""
    return bool(_OPENING_TAG.fullmatch(token) or _CLOSING_TAG.fullmatch(token))


class ChatTemplate:
    """The chat template of an LLM around one turn of the user, without a thinking part of the answer.

    Args:
        tokenizer: tokenizer of the LLM.

    Attributes:
        before, after: text before and after the text of the user's turn, up to the beginning of the answer.
        closing: ids at the end of an answer: those that the template puts after it, up to its first special token.

    Raises:
        InputError: the tokenizer has no chat template, or the template refuses the two turns or changes their texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special.discard(tokenizer.unk_token_id)
        turns = [{"role": "user", "content": _TURN}, {"role": "assistant", "content": _ANSWER}]
        self.before, self.after = self._around(_TURN, turns[:1], add_generation_prompt=True)
        if opened := re.search(rf"(?:{_OPENING_TAG.pattern})\s*$", self.after):
            self.after = f"{self.after.rstrip()}\n{_closing_tag(opened.group().strip())}\n\n"
        _, ending = self._around(_ANSWER, turns)
        self._counts = [sum(index in self._special for index in self._raw_ids([text])[0]) for text in self._texts]
        self.closing = self._closing_ids(ending)

    @property
    def _texts(self) -> tuple[str, str]:
        return self.before, self.after

    def prompt(self, turn: Prompt) -> Prompt:
        """Build the prompt of a user's turn, of which only the query may be cut."""
        return Prompt(self.before + turn.before, turn.query.strip(), turn.after + self.after)

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of whole prompts: special tokens in the turn of the user are plain text."""
        return [self._with_plain_turn(ids) for ids in self._raw_ids(texts)]

    def _around(self, text: str, turns: list[dict[str, str]], **options: Any) -> tuple[str, str]:
        """Render `turns`, and split the result at `text`."""
        path = self._tokenizer.name_or_path
        if not self._tokenizer.chat_template:
            raise InputError(f"--prompt chat: the tokenizer in {path} has no chat template: leave --prompt out")
        try:
            template = _CLOCK + self._tokenizer.get_chat_template()
            rendered = self._tokenizer.apply_chat_template(
                turns, chat_template=template, tokenize=False, enable_thinking=False, **options
            )
        except Exception as error:  # a template may raise anything
            roles = " and ".join(turn["role"] for turn in turns)
            raise InputError(
                f"--prompt chat: the chat template of {path} refuses turns of {roles}: {first_line(error)}"
            ) from error
        if rendered.count(text) != 1:
            raise InputError(f"--prompt chat: the chat template of {path} does not contain the text of each turn once")
        before, _, after = rendered.partition(text)
        return before, after

    def _raw_ids(self, texts: list[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return self._tokenizer(texts, split_special_tokens=False, **options).input_ids

    def _with_plain_turn(self, ids: list[int]) -> list[int]:
        """Replace special tokens of the turn by the ids of their texts."""
        positions = [position for position, index in enumerate(ids) if index in self._special]
        first, last = self._counts
        for position in reversed(positions[first : len(positions) - last]):
            text = self._tokenizer.convert_ids_to_tokens(ids[position])
            plain = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
            ids = [*ids[:position], *plain, *ids[position + 1 :]]
        return ids

    def _closing_ids(self, ending: str) -> list[int]:
        ids = self._raw_ids([ending])[0] if ending else []
        ends = [position for position, index in enumerate(ids) if index in self._tokenizer.added_tokens_decoder]
        return ids[: ends[0] + 1] if ends else [self._tokenizer.eos_token_id]


def _closing_tag(opening: str) -> str:
    """Closing tag of the thinking part that `opening` begins."""
    if opening.startswith("<|"):
        return opening.replace("begin", "end").replace("START", "END")
    return f"{opening[0]}/{opening[1:]}"
