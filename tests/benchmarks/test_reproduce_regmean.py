"""RegMean's table in miniature: its parts against plain implementations, and a whole run on a very small model."""

import json
import textwrap
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import benchmarks.reproduce.regmean as reproduce
from benchmarks.reproduce import texts
from benchmarks.reproduce.bootstrap import ratio_interval
from benchmarks.reproduce.scoring import TokenTree, score_texts, token_scores
from benchmarks.reproduce.texts import Text, choices
from common.errors import InputError
from common.io import read_json
from quickstart.world import problems
from tests.conftest import REPOSITORY

MODEL = REPOSITORY / "quickstart/models/regmean/base"
PROBLEM = Text(
    "Question: Ann has 48 clips and 5 boxes. She sells half. How many of 1,000 are left in 2.5 days?\nAnswer:",
    " She sells 48/2 = 24.\nSo 48 - 24 = 24 are gone.\nThat leaves 24 + 7 = 31 clips.\nThe answer is: 31",
)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def test_the_interval_is_scipys_percentile_bootstrap() -> None:
    generator = np.random.default_rng(1)
    tokens = generator.integers(5, 100, 80)
    losses = tokens * generator.normal(1.5, 0.3, 80) + generator.normal(0, 5, 80)
    expected = scipy.stats.bootstrap(
        (losses, tokens),
        lambda loss, count, axis: loss.sum(axis=axis) / count.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=10_000,
        rng=np.random.default_rng(2),
    ).confidence_interval
    low, high = ratio_interval(losses, tokens)
    width = expected.high - expected.low
    assert low == pytest.approx(expected.low, abs=0.03 * width)
    assert high == pytest.approx(expected.high, abs=0.03 * width)
    assert ratio_interval(losses, tokens) == (low, high)


def test_the_interval_of_many_texts_is_that_of_a_normal_mean() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 1000)
    error = values.std() / np.sqrt(len(values))
    low, high = ratio_interval(values, np.ones_like(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_functions_are_cut_behind_their_docstrings() -> None:
    source = '''
        class A:
            @property
            def f(self, x=1):
                """Double.

                Twice."""
                # as told
                return 2 * x

        async def g(): "One line."; return 1
        def h():
            """Nothing follows."""
        def no_docstring():
            return 3
        def outer():
            "Has an inner one."
            def inner():
                """Four."""
                return 4
            return inner
    '''
    found = list(texts._functions_of(textwrap.dedent(source)))
    assert set(found) == {
        Text(
            'def f(self, x=1):\n    """Double.\n\n    Twice."""',
            "\n    # as told\n    return 2 * x",
        ),
        Text(
            'def outer():\n    "Has an inner one."',
            '\n    def inner():\n        """Four."""\n        return 4\n    return inner',
        ),
        Text('def inner():\n    """Four."""', "\n    return 4"),
    }
    assert list(texts._functions_of("def broken(")) == []


def test_every_body_is_there_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    function = 'def {}():\n    """Doc."""\n    return {}\n'
    for name, content in {"p/a.py": ("f", 1), "p/b.py": ("g", 1), "p/tests/c.py": ("h", 2), "p/d.py": ("i", 3)}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(function.format(*content))
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert [text.read.split("(")[0] for text in texts.functions(["p"])] == ["def f", "def i"]
    with pytest.raises(InputError, match="requirements.txt"):
        texts.functions(["q"])


def test_wrong_endings_are_other_numbers_of_the_problem() -> None:
    asked = choices(PROBLEM)
    assert asked.shown == " She sells 48/2 = 24.\nSo 48 - 24 = 24 are gone.\nThat leaves 24 + 7 = "
    assert asked.endings[0] == "31 clips.\n"
    assert all(ending.endswith(" clips.\n") for ending in asked.endings)
    numbers = {ending.split()[0] for ending in asked.endings[1:]}
    assert len(numbers) == 3 and numbers <= {"48", "5", "24", "7"}
    assert choices(PROBLEM) == asked
    few = choices(Text("Question: double 1?\nAnswer:", " 1+1 = $2\nThe answer is: 2"))
    assert few == (" 1+1 = $", ("2\n", "1\n", "3\n", "4\n"))
    for unasked in (
        "Two.\nThe answer is: 2",
        "1/2 = 0.5\nThe answer is: 0.5",
        "4/2 = 2\nThe answer is: 3",
        "4 = 2.5\nThe answer is: 2",
    ):
        assert choices(Text("", unasked)) is None


def test_a_tree_says_what_its_texts_say_one_by_one(model) -> None:
    ids = torch.randint(3, 600, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    wanted = [
        [(ids[:5], ids[5:20]), (ids[:5], ids[5:9] + ids[30:33]), (ids[:5], ids[5:9] + ids[30:32] + ids[35:38])],
        [(ids[20:22], ids[22:40])],
    ]
    trees, places = [TokenTree() for _ in wanted], []
    for tree, rows in zip(trees, wanted, strict=True):
        places.append([tree.add(*row) for row in rows])
    assert len(trees[0].ids) == 20 + 3 + 3
    for rows, paths, (likelihoods, is_right) in zip(wanted, places, token_scores(model, trees), strict=True):
        for (read, learned), path in zip(rows, paths, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([read + learned])).logits[0, len(read) - 1 : -1]
            expected = logits.log_softmax(-1)[range(len(learned)), learned]
            torch.testing.assert_close(likelihoods[path], expected, atol=1e-4, rtol=1e-4)
            assert torch.equal(is_right[path], logits.argmax(-1) == torch.tensor(learned))


def test_scores_are_sums_over_what_is_learned(model, tokenizer) -> None:
    problem, function = PROBLEM, Text('def f():\n    """Doc."""', "\n    return 1")
    scores = score_texts(model, tokenizer, [problem, function])

    def loss(read: str, learned: str) -> float:
        before, after = tokenizer(read).input_ids, tokenizer(learned, add_special_tokens=False).input_ids
        labels = torch.tensor([[-100] * len(before) + after])
        with torch.no_grad():
            return float(model(torch.tensor([before + after]), labels=labels).loss) * len(after)

    assert scores["tokens"] == [
        len(tokenizer(text.learned, add_special_tokens=False).input_ids) for text in (problem, function)
    ]
    assert scores["loss"] == pytest.approx([loss(*problem), loss(*function)], rel=1e-4)
    asked = choices(problem)
    of_endings = [loss(problem.read, asked.shown + ending) for ending in asked.endings]
    assert scores["chosen"] == [of_endings[0] == min(of_endings), None]


def test_batches_are_of_like_length_and_each_seeds_own() -> None:
    all_texts = [Text("x" * n, "y") for n in range(100)]
    drawn = reproduce.training_order(all_texts, 4, 5, seed=0)
    assert len(set(drawn)) == 20
    lengths = [[len(text.read) for text in drawn[start : start + 5]] for start in range(0, 20, 5)]
    ranges = sorted((min(row), max(row)) for row in lengths)
    assert all(before[1] < after[0] for before, after in pairwise(ranges))
    assert (
        drawn == reproduce.training_order(all_texts, 4, 5, seed=0) != reproduce.training_order(all_texts, 4, 5, seed=1)
    )


def made_scores(loss: float, right: int) -> dict:
    one = {"loss": [loss, 3 * loss], "tokens": [10, 30], "right": [right, 3 * right], "chosen": [True, False]}
    return {"math": one, "code": one | {"chosen": [None, None]}}


def test_a_model_of_one_seed_is_compared_with_the_average_of_that_seed() -> None:
    seeds = [
        {
            "base": made_scores(20, 1),
            "average": made_scores(10, 5),
            reproduce.REGMEAN: made_scores(9, 6),
            "first": made_scores(8, 5),
        },
        {"base": made_scores(20, 1), "average": made_scores(14, 3), reproduce.REGMEAN: made_scores(11, 4)},
    ]
    result = reproduce.summary(seeds)
    assert list(result["models"]) == ["base", "average", reproduce.REGMEAN, "first"]
    average = result["models"]["average"]["math_loss"]
    assert average["mean"] == pytest.approx(1.2) and [seed["value"] for seed in average["seeds"]] == [1.0, 1.4]
    assert (average["low"], average["high"]) == pytest.approx((1.2, 1.2))  # both texts have the same loss per token
    assert list(result["less_average"]) == [reproduce.REGMEAN, "first"]
    assert result["less_average"][reproduce.REGMEAN]["math_loss"]["mean"] == pytest.approx(-0.2)
    assert result["less_average"]["first"]["code_loss"]["mean"] == pytest.approx(-0.2)
    assert result["less_regmean"]["first"]["math_loss"]["mean"] == pytest.approx(-0.1)
    assert reproduce.REGMEAN not in result["less_regmean"]
    choice = result["models"][reproduce.REGMEAN]["forced_choice"]
    assert (choice["mean"], choice["low"], choice["high"]) == (0.5, 0.0, 1.0)

    lines = reproduce.table(result).splitlines()
    assert "| average | 1.2000 (1.2000 to 1.2000) | 40.0 (40.0 to 40.0) | 50.0 (0.0 to 100.0) |" in "\n".join(lines)
    assert any(line.startswith("| average | 1.0000 / 1.4000 | 50.0 / 30.0 |") for line in lines)
    assert any(line.startswith(f"| {reproduce.REGMEAN} | -0.2000 (-0.2000 to -0.2000) | +10.0 (") for line in lines)


@pytest.fixture
def flags(work: Path, monkeypatch: pytest.MonkeyPatch) -> reproduce.ReproduceFlags:
    """Two steps of fine-tuning on the small world's problems and on a small package, in a folder of its own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(work / "datasets_cache"))
    monkeypatch.setattr(reproduce, "TRAINING_PACKAGES", ("tqdm",))
    monkeypatch.setattr(reproduce, "HELD_OUT_PACKAGES", ("psutil",))
    monkeypatch.setattr(reproduce, "HELD_OUT", 10)
    monkeypatch.setattr(reproduce, "MAX_TOKENS", 240)
    rows = [
        {
            "query": p.question("en"),
            "response": "\n".join([*p.equations, f"The answer is: {p.answer}"]),
            "lang": "English",
        }
        for p in islice(problems("train", 0), 60)
    ]
    Path("math.json").write_text(json.dumps([*rows, {"query": "?", "response": "", "lang": "German"}]))
    return reproduce.ReproduceFlags(
        model=str(MODEL),
        math_data="math.json",
        work_dir="work",
        seeds=1,
        steps=2,
        batch_size=4,
        num_examples=4,
        alphas=[0.1, 0.9],
        test_num=6,
    )


def test_specialists_that_move_apart_have_other_questions_and_held_out_functions(flags, tokenizer) -> None:
    rows = json.loads(Path("math.json").read_text())
    rows += [row | {"query": f"Swali: {row['query']}", "lang": "Swahili"} for row in rows[:40]]
    Path("math.json").write_text(json.dumps(rows))
    reproduce.write_all_texts(Path("apart"), replace(flags, language="Swahili", same_packages=True), tokenizer)
    found = reproduce.read_all_texts(Path("apart"), test_num=6, training_num=20)
    for domain in reproduce.DOMAINS:
        assert not set(found.training[domain]) & set(found.held_out[domain])
    assert all(text.read.startswith("Question: Swali: ") for text in found.training["math"] + found.held_out["math"])
    assert set(found.held_out["code"]) < set(texts.functions(["tqdm"]))


def test_the_whole_is_done_once(flags, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reproduce, "merge", stop)
        reproduce.reproduce(flags)
    fine_tuned = Path("work/seed0/math/model/model.safetensors")
    made = fine_tuned.stat().st_mtime_ns

    result = reproduce.reproduce(flags)
    assert fine_tuned.stat().st_mtime_ns == made
    names = list(result["models"])
    assert names[:4] == ["base", "math model", "code model", "average"]
    assert names[4:7] == ["RegMean, alpha 0.1", "RegMean, alpha 0.9", "RegMean, alpha 0.9, token counts"]
    assert names[7:9] == ["RegMean++, alpha 0.9", "asymmetric RegMean, alpha 0.9"]
    assert names[9] == "asymmetric RegMean, alpha 0.9, token counts"
    assert len(names) == 13
    value = {name: figures["math_loss"]["mean"] for name, figures in result["models"].items()}
    assert value["math model"] < value["base"]
    assert value["RegMean, alpha 0.1"] == pytest.approx(value["RegMean, alpha 0.1, lstsq"], abs=1e-3)
    assert set(result["steps"]) >= {"texts", "seed0/math", "seed0/gram_code", "seed0/regmean", "seed0/scores_0"}
    assert read_json(reproduce.results_file(flags)) == json.loads(json.dumps(result))
    assert not list(Path("work").rglob(".*"))

    with monkeypatch.context() as patch:
        for name in ("fine_tune", "merge", "compute_grams", "score_texts", "write_merge"):
            patch.setattr(reproduce, name, stop)
        given = {
            name: value
            for name, value in vars(flags).items()
            if name not in ("overwrite", "token_counts", "published", "alphas")
        }
        words = [*(f"--{name}={value}" for name, value in given.items()), "--alphas", *map(str, flags.alphas)]
        monkeypatch.setattr(
            "sys.argv",
            ["regmean", *words],
        )
        capsys.readouterr()
        reproduce.main()
        output = capsys.readouterr().out
    assert json.loads(output.splitlines()[-1]) == json.loads(json.dumps(result))
    assert reproduce.table(result) in output
    with pytest.raises(InputError, match="steps was 2, now 3"):
        reproduce.reproduce(replace(flags, steps=3))
    with pytest.raises(InputError, match="training texts of math are needed"):
        reproduce.reproduce(replace(flags, steps=300, overwrite=True))
