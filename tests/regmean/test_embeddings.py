"""Embedding tables by token counts, against dense solutions row by row in float64."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GemmaConfig,
    GemmaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from common.io import read_json
from regmean.average import weighted_mean
from regmean.embeddings import EVEN, TiedTable, merge_by_counts
from regmean.gram_file import FILE_NAME, GramFile, write_grams
from regmean.solve import SolveError
from tests.regmean.conftest import make_gpt2, make_llama
from tests.regmean.folders import ALPHA, TEXT, TEXTS, grams, load, run, save

WIDTH, ROWS = 6, 9
WEIGHTS = {2: [0.3, 0.7], 3: [0.2, 0.5, 0.3]}
ALPHAS = [0.0, 0.1, 0.9]


def make(models: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Tables, frequencies and Grams of models; no model reads the last row, and only the first reads row 1."""
    generator = torch.Generator().manual_seed(models)
    base = torch.randn(ROWS, WIDTH, generator=generator)
    tables = [base + 0.1 * torch.randn(ROWS, WIDTH, generator=generator) for _ in range(models)]
    frequencies, grams = [], []
    for model in range(models):
        counts = torch.randint(0, 5, (ROWS,), generator=generator)
        counts[0], counts[1], counts[-1] = 3, 4 * (model == 0), 0
        frequencies.append(counts / counts.sum(dtype=torch.float64))
        states = torch.randn(40, WIDTH, generator=generator) + torch.linspace(0, 2, WIDTH)
        grams.append((states.double().T @ states.double() / 40).float())
    return tables, frequencies, grams


def scale(gram: torch.Tensor, alpha: float) -> torch.Tensor:
    return alpha * gram.double() + (1 - alpha) * torch.diag(gram.double().diagonal())


def tied(tables, frequencies, grams, weights, alphas) -> tuple[TiedTable, dict[float, torch.Tensor]]:
    """A tied table merged in two blocks of rows."""
    table, blocks, merged = TiedTable(grams, weights), (slice(0, 4), slice(4, ROWS)), {alpha: [] for alpha in alphas}
    for block in blocks:
        table.measure([each[block] for each in tables], [each[block] for each in frequencies])
    for block in blocks:
        rows = table.merge([each[block] for each in tables], [each[block] for each in frequencies], alphas)
        for alpha, values in zip(alphas, rows, strict=True):
            merged[alpha].append(values)
    return table, {alpha: torch.cat(values) for alpha, values in merged.items()}


def objective(table, tables, frequencies, grams, weights, factor=1.0) -> float:
    """The sum of both terms over models, written as defined."""
    value = 0.0
    for weight, own, frequency, gram in zip(weights, tables, frequencies, grams, strict=True):
        delta = table.double() - own.double()
        value += weight * (torch.trace(delta @ gram @ delta.T) + factor * (frequency @ delta.square().sum(1))).item()
    return value


@pytest.mark.parametrize("models", [2, 3])
def test_rows_by_counts_are_weighted_means(models: int) -> None:
    tables, frequencies, _ = make(models)
    weights = WEIGHTS[models]
    merged, values = merge_by_counts(tables, frequencies, weights)
    for row in range(ROWS):
        factors = [w * (f[row] + EVEN) for w, f in zip(weights, frequencies, strict=True)]
        expected = sum(c * v[row].double() for c, v in zip(factors, tables, strict=True)) / sum(factors)
        torch.testing.assert_close(merged[row], expected, rtol=0, atol=1e-14)
    mean = sum(w * v.double() for w, v in zip(weights, tables, strict=True))
    none = [torch.zeros(WIDTH, WIDTH, dtype=torch.float64)] * models
    expected = [objective(table, tables, frequencies, none, weights) for table in (mean, *tables, merged)]
    assert [values.mean, *values.inputs, values.merged] == pytest.approx(expected, rel=1e-9)
    assert values.merged < min(values.mean, *values.inputs)


@pytest.mark.parametrize("models", [2, 3])
def test_rows_of_a_tied_table_solve_their_systems(models: int) -> None:
    tables, frequencies, grams = make(models)
    weights = WEIGHTS[models]
    table, merged = tied(tables, frequencies, grams, weights, ALPHAS)
    mean = sum(w * v.double() for w, v in zip(weights, tables, strict=True))
    none = [torch.zeros_like(scale(gram, 1)) for gram in grams]
    for alpha in ALPHAS:
        own, beta = [scale(gram, alpha) for gram in grams], table.beta(alpha)
        # Both terms are equal at the mean.
        head, embedding = (
            objective(mean, tables, frequencies, of, weights, factor) for of, factor in ((own, 0), (none, beta))
        )
        assert head == pytest.approx(embedding, rel=1e-6)
        for row in range(ROWS):
            systems = [
                g + beta * f[row] * torch.eye(WIDTH, dtype=torch.float64) for g, f in zip(own, frequencies, strict=True)
            ]
            right = sum(w * (v[row].double() @ s) for w, v, s in zip(weights, tables, systems, strict=True))
            expected = torch.linalg.solve(sum(w * s for w, s in zip(weights, systems, strict=True)), right)
            torch.testing.assert_close(merged[alpha][row], expected, rtol=0, atol=1e-12)
        values = table.objective(alpha)
        tried = (mean, *tables, merged[alpha])
        expected = [objective(each, tables, frequencies, own, weights, beta) for each in tried]
        assert [values.mean, *values.inputs, values.merged] == pytest.approx(expected, rel=1e-6)
        assert values.merged < min(values.mean, *values.inputs)


def test_equal_models_and_unread_rows_stay_as_they_are() -> None:
    tables, frequencies, grams = make(3)
    weights = [0.1, 0.2, 0.7]
    same = [tables[0]] * 3
    assert torch.equal(merge_by_counts(same, frequencies, weights)[0].float(), tables[0])
    # With a singular Gram as well.
    for own in (grams, [torch.ones(WIDTH, WIDTH)] * 3):
        _, merged = tied(same, frequencies, own, weights, [0.9, 1.0])
        assert all(torch.equal(each.float(), tables[0]) for each in merged.values())
    mean = weighted_mean([each.flatten().numpy() for each in tables], weights).reshape(ROWS, WIDTH)
    merged, _ = merge_by_counts(tables, frequencies, weights)
    assert torch.equal(merged[-1].float(), torch.from_numpy(mean[-1]))
    assert not torch.equal(merged[0].float(), torch.from_numpy(mean[0]))


def test_a_tied_table_with_singular_or_damaged_grams() -> None:
    tables, frequencies, _ = make(2)
    state = torch.linspace(1, 2, WIDTH)
    dead = torch.outer(state, state)
    dead[0], dead[:, 0] = 0, 0
    _, merged = tied(tables, frequencies, [dead, 2 * dead], [0.5, 0.5], [1.0])
    difference = (tables[0] - tables[1]).abs().max()
    mean = (tables[0] + tables[1]).double() / 2
    assert (merged[1.0] - mean).abs().max() < 2 * difference
    # An input that is always zero, in a row that no text reads.
    assert torch.equal(merged[1.0][-1, 0], mean[-1, 0])
    with pytest.raises(SolveError, match="damaged"):
        tied(tables, frequencies, [2 - torch.eye(WIDTH), torch.eye(WIDTH)], [0.9, 0.1], [1.0])


def make_opt() -> PreTrainedModel:
    sizes = {"vocab_size": 32, "hidden_size": 16, "ffn_dim": 24, "word_embed_proj_dim": 8, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=4, max_position_embeddings=64, pad_token_id=0))


# Model, number of models, names of both tables, and the row of the first position.
CASES: dict[str, tuple[Callable[[], PreTrainedModel], int, str, str | None, int]] = {
    "llama": (make_llama, 3, "model.embed_tokens.weight", None, 0),
    "tied llama": (lambda: make_llama(tied=True), 2, "model.embed_tokens.weight", None, 0),
    "gpt2": (make_gpt2, 2, "transformer.wte.weight", "transformer.wpe.weight", 0),
    "opt": (make_opt, 3, "model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight", 2),
    "gemma": (lambda: GemmaForCausalLM(GemmaConfig(**TEXT)), 2, "model.embed_tokens.weight", None, 0),
}


def specialists(make: Callable[[], PreTrainedModel], count: int, folder: Path) -> list[Path]:
    """Folders of models that differ from one base, each with the Grams of texts of its own."""
    folders = []
    for seed in range(count):
        torch.manual_seed(0)
        model = make().eval()
        torch.manual_seed(1 + seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        folders.append(save(model, folder / f"model{seed}"))
        grams(folders[-1], TEXTS[seed : 12 + 5 * seed])
    return folders


@torch.no_grad()
def solved(folders: list[Path], weights: list[float], table: str, positions: str | None, first: int) -> dict:
    """Both tables from the definition: texts one by one, counts token by token, systems row by row."""
    models = [load(folder) for folder in folders]
    token_counts, position_counts, states = [], [], []
    for seed, model in enumerate(models):
        tokenizer, own, at, seen = AutoTokenizer.from_pretrained(model.name_or_path), Counter(), Counter(), []
        hook = model.lm_head.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0][0]))
        for text in TEXTS[seed : 12 + 5 * seed]:
            ids = tokenizer(text)["input_ids"]
            own.update(ids)
            at.update(first + position for position in range(len(ids)))
            model(input_ids=torch.tensor([ids]))
        hook.remove()
        token_counts.append(own)
        position_counts.append(at)
        states.append(torch.cat(seen))
    tables = [model.state_dict()[table] for model in models]
    tied = models[0].lm_head.weight is models[0].get_input_embeddings().weight
    systems = [scale(x.T @ x / len(x), ALPHA) if tied else 0 for x in states]
    beta = 1.0
    if tied:
        mean = sum(w * v for w, v in zip(weights, tables, strict=True))
        head = sum(
            w * torch.trace((mean - v) @ s @ (mean - v).T) for w, v, s in zip(weights, tables, systems, strict=True)
        )
        embedding = sum(
            w * own[row] / own.total() * (mean - v)[row].square().sum()
            for w, v, own in zip(weights, tables, token_counts, strict=True)
            for row in range(len(mean))
        )
        beta = head / embedding
    expected = {table: _rows(tables, weights, token_counts, systems, beta, 0 if tied else EVEN)}
    if positions:
        values = [model.state_dict()[positions] for model in models]
        expected[positions] = _rows(values, weights, position_counts, [0] * len(models), 1.0, EVEN)
    return expected


def _rows(tables, weights, counts, grams, beta, even) -> torch.Tensor:
    rows, identity = [], torch.eye(tables[0].shape[1], dtype=torch.float64)
    for row in range(len(tables[0])):
        systems = [g + beta * (c[row] / c.total() + even) * identity for g, c in zip(grams, counts, strict=True)]
        right = sum(w * (v[row] @ s) for w, v, s in zip(weights, tables, systems, strict=True))
        rows.append(torch.linalg.solve(sum(w * s for w, s in zip(weights, systems, strict=True)), right))
    return torch.stack(rows)


@pytest.mark.parametrize("case", CASES)
def test_merged_tables_equal_dense_solutions(case: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    make_model, count, table, positions, first = CASES[case]
    folders = specialists(make_model, count, tmp_path)
    weights = [2.0, 1.0, 1.5][:count]
    out = run(folders, tmp_path / "out", embeddings="counts", model_weights=weights)
    expected = solved(folders, [w / sum(weights) for w in weights], table, positions, first)
    merged, *own = (load(folder).state_dict() for folder in (out, *folders))
    for name, values in expected.items():
        assert (merged[name] - values).norm() / (own[0][name] - own[1][name]).norm() < 1e-5, name
    report = read_json(out / "merge_report.json")
    assert {entry["tensor"] for entry in report["tables"]} == set(expected)
    assert not set(expected) & set(report["averaged"])
    file = GramFile(folders[0].with_suffix(".gram") / FILE_NAME)
    tokens = file.provenance["tokens"]
    assert [entry["tokens"][0] for entry in report["tables"]] == [tokens] * len(expected)
    unread = next(entry["unread"] for entry in report["tables"] if entry["tensor"] == table)
    assert 0 < unread < 32
    assert f"no text reads {unread} of 32 rows" in capfd.readouterr().out
    assert all(0 < entry["objective"]["merged"] < entry["objective"]["mean"] for entry in report["tables"])
    averaged = run(folders, tmp_path / "averaged", embeddings="average", model_weights=weights)
    plain = run(folders, tmp_path / "plain", "avg", model_weights=weights)
    averaged, plain = load(averaged).state_dict(), load(plain).state_dict()
    assert all(torch.equal(averaged[name], plain[name]) for name in expected)
    assert set(read_json(tmp_path / "averaged" / "merge_report.json")["averaged"]) >= set(expected)


@pytest.mark.parametrize("tied", [False, True])
def test_a_file_without_counts_averages_with_a_note(tied: bool, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    folders = specialists(lambda: make_llama(tied=tied), 2, tmp_path)
    older = folders[1].with_suffix(".gram") / FILE_NAME
    file, name = GramFile(older), "model.embed_tokens.weight"
    older_grams = [gram for gram in file.grams.values() if not tied or gram.name != "lm_head"]
    write_grams(older, older_grams, file.read, file.provenance)
    out = run(folders, tmp_path / "out", embeddings="counts")
    printed = capfd.readouterr().out
    assert f"no token counts in {older}, embedding tables are averaged" in printed
    report = read_json(out / "merge_report.json")
    assert (report["tables"], name in report["averaged"]) == ([], True)
    plain = run(folders, tmp_path / "plain", "avg")
    assert torch.equal(load(out).state_dict()[name], load(plain).state_dict()[name])


def test_only_selected_tables_are_merged_by_counts(tmp_path: Path) -> None:
    folders = specialists(make_gpt2, 2, tmp_path)
    out = run(folders, tmp_path / "out", embeddings="counts", include=["wpe"])
    report = read_json(out / "merge_report.json")
    assert [entry["tensor"] for entry in report["tables"]] == ["transformer.wpe.weight"]
    merged, first = (load(folder).state_dict() for folder in (out, folders[0]))
    changed = {name for name, value in first.items() if not torch.equal(merged[name], value)}
    assert changed == {"transformer.wpe.weight"}
    assert report["solved_fraction"] == pytest.approx(
        (64 - report["tables"][0]["unread"]) * 16 / sum(value.numel() for value in load(out).parameters()), rel=1e-6
    )
