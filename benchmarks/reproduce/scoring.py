"""Log probabilities of given texts under a causal language model, and the likeliest of several endings."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.reproduce.texts import Text, choices
from mindmerger.batching import plan_once

BATCH_SIZE = 16


class TokenTree:
    """Texts with common beginnings, which are stored once and read in one pass.

    Attributes:
        ids: token ids, each after its parent.
        parents: position of the token before each, -1 for the first one.
        learned: positions of the tokens to predict.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.parents: list[int] = []
        self.learned: set[int] = set()
        self._places: dict[tuple[int, int], int] = {}

    def add(self, read: list[int], learned: list[int]) -> list[int]:
        """Add a text, with `read` not empty; return the positions of its learned tokens."""
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
        """Attention mask, bool [tokens, tokens]: each token attends to its ancestors and itself."""
        seen = torch.eye(len(self.ids), dtype=torch.bool)
        for place, parent in enumerate(self.parents[1:], 1):
            seen[place] |= seen[parent]
        return seen


@torch.inference_mode()
def token_scores(model: PreTrainedModel, trees: Sequence[TokenTree]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Log probability of every learned token given its ancestors, and True if no token is more likely.

    Requires a model whose tokens interact in full attention only, and whose logits are its head's output. The head runs
    in its weights' dtype even under autocast, since logits rounded to bfloat16 have ties.

    Returns:
        For each tree, in order, float32 [tokens] in nats and bool [tokens]; 0 and False for tokens not learned.
    """
    head = model.get_output_embeddings()
    found: list[Any] = [None] * len(trees)
    (plan,) = plan_once([len(tree.ids) for tree in trees], BATCH_SIZE, ranks=1)
    for numbers in plan:
        batch = [trees[number] for number in numbers]
        longest = len(batch[0].ids)
        ids = torch.tensor([tree.ids + [0] * (longest - len(tree.ids)) for tree in batch])
        # Padding attends to itself: a softmax over nothing is NaN.
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
    """Scores of a model on the learned part of each text, and on its choices if it has any.

    Returns:
        Values per text: `loss`, in nats over the learned tokens; `tokens`, the number of these; `right`, the number of
        those predicted as most likely; `chosen`, True if the right ending is likelier than every wrong one, None for a
        text without choices.
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
