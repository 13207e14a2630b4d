"""How well a causal language model foresees given texts, and which of several endings it prefers."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.reproduce.texts import Text, choices
from mindmerger.batching import plan_once

BATCH_SIZE = 16


class TokenTree:
    """Texts that begin alike, to be read in one pass: what they share is there once.

    Attributes:
        ids: token ids, each after the one that it follows.
        parents: place of the token that each follows, -1 of the first one.
        learned: places of the tokens to be foreseen.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.parents: list[int] = []
        self.learned: set[int] = set()
        self._places: dict[tuple[int, int], int] = {}

    def add(self, read: list[int], learned: list[int]) -> list[int]:
        """Add a text, `read` not empty; the places of its learned tokens."""
        path, parent = [], -1
        for token in read + learned:
            place = self._places.setdefault((parent, token), len(self.ids))
            if place == len(self.ids):
                self.ids.append(token)
                self.parents.append(parent)
            path.append(place)
            parent = place
        self.learned.update(path[len(read) :])
        return path[len(read) :]

    def ancestors(self) -> torch.Tensor:
        """Bool [tokens, tokens]: row by row the tokens that one sees, itself included."""
        seen = torch.eye(len(self.ids), dtype=torch.bool)
        for place, parent in enumerate(self.parents[1:], 1):
            seen[place] |= seen[parent]
        return seen


@torch.inference_mode()
def token_scores(model: PreTrainedModel, trees: Sequence[TokenTree]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Log probability of every learned token, given those that it follows, and whether none is more likely.

    For a model whose tokens meet in full attention alone, and whose logits are its head's output. The head runs in its
    weights' own dtype even under autocast: logits rounded to bfloat16 tie.

    Returns:
        Of each tree, in order, float32 [tokens] in nats and bool [tokens]; 0 and False of what is not learned.
    """
    head = model.get_output_embeddings()
    found: list[Any] = [None] * len(trees)
    (plan,) = plan_once([len(tree.ids) for tree in trees], BATCH_SIZE, ranks=1)
    for numbers in plan:
        batch = [trees[number] for number in numbers]
        longest = len(batch[0].ids)
        ids = torch.tensor([tree.ids + [0] * (longest - len(tree.ids)) for tree in batch])
        # Padding sees itself: a softmax over nothing is not a number.
        seen = torch.eye(longest, dtype=torch.bool).repeat(len(batch), 1, 1)
        for row, tree in enumerate(batch):
            seen[row, : len(tree.ids), : len(tree.ids)] = tree.ancestors()
        states = model.base_model(
            input_ids=ids, attention_mask=seen[:, None], position_ids=seen.sum(dim=2) - 1, use_cache=False
        ).last_hidden_state
        for number, tree, state in zip(numbers, batch, states, strict=True):
            places = sorted(tree.learned)
            with torch.autocast(state.device.type, enabled=False):
                logits = head(state[[tree.parents[place] for place in places]].to(head.weight.dtype)).float()
            tokens = torch.tensor([tree.ids[place] for place in places])
            likelihoods, is_right = torch.zeros(len(tree.ids)), torch.zeros(len(tree.ids), dtype=torch.bool)
            likelihoods[places] = -F.cross_entropy(logits, tokens, reduction="none")
            is_right[places] = logits.argmax(dim=1) == tokens
            found[number] = likelihoods, is_right
    return found


def score_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text]) -> dict[str, list]:
    """What a model makes of the learned part of each text, and of its choices where it has any.

    Returns:
        One value of each text: `loss`, in nats over the learned tokens; `tokens`, how many these are; `right`, how many
        of them are the most likely one; `chosen`, whether the right ending is likelier than every wrong one, None where
        there is nothing to choose.
    """

    def ids_of(learned: str) -> list[int]:
        return tokenizer(learned, add_special_tokens=False).input_ids

    trees, learned, endings = [], [], []
    for text in texts:
        tree, read, asked = TokenTree(), tokenizer(text.read).input_ids, choices(text)
        learned.append(tree.add(read, ids_of(text.learned)))
        endings.append(asked and [tree.add(read, ids_of(asked.shown + ending)) for ending in asked.endings])
        trees.append(tree)

    result: dict[str, list] = {"loss": [], "tokens": [], "right": [], "chosen": []}
    for places, paths, (likelihoods, is_right) in zip(learned, endings, token_scores(model, trees), strict=True):
        result["loss"].append(-float(likelihoods[places].double().sum()))
        result["tokens"].append(len(places))
        result["right"].append(int(is_right[places].sum()))
        totals = paths and [float(likelihoods[path].double().sum()) for path in paths]
        result["chosen"].append(totals and totals[0] > max(totals[1:]))
    return result
