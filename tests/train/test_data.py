"""Data sets, built-in tasks, rewards, pass@k."""

import itertools
import math
import random

import pytest

from rlkern.train import TrainError
from rlkern.train.config import find_recipe, load_config
from rlkern.train.data import batch_at, load_data, read_jsonl
from rlkern.train.loop import pass_at_k
from rlkern.train.model import CharTokenizer
from rlkern.train.rewards import countdown, exact, load_reward, numeric, score
from rlkern.train.tasks import ALPHABET, TASKS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "answer": 1}\nnot json\n', r"d\.jsonl:2: not JSON"),
        ('\n\n{"prompt": "a"}', r"d\.jsonl:3: the field 'answer' is missing or empty"),
        ('{"prompt": "", "answer": 1}', r"d\.jsonl:1: the field 'prompt' is missing or empty"),
        ("[1, 2]", r"d\.jsonl:1: expected an object, got \[1, 2\]"),
        ('{"prompt": 3, "answer": 1}', r"d\.jsonl:1: expected prompt as a string"),
        (" \n\n", r"d\.jsonl: the data set is empty"),
        ("", r"d\.jsonl: the data set is empty"),
    ],
)
def test_bad_jsonl(tmp_path, text, message):
    path = tmp_path / "d.jsonl"
    path.write_text(text)
    with pytest.raises(TrainError, match=message):
        read_jsonl(str(path))


def test_jsonl(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "a\u2028b", "answer": 0}\n{"prompt": "c", "answer": "d"}')
    assert [(e.prompt, e.answer) for e in read_jsonl(str(path))] == [("a\u2028b", 0), ("c", "d")]
    with pytest.raises(TrainError, match=r"no\.jsonl cannot be read"):
        read_jsonl(str(tmp_path / "no.jsonl"))


def config(**changes):
    return load_config(
        find_recipe("demo"), {k.replace("__", "."): str(v) for k, v in changes.items()}
    )


@pytest.mark.parametrize("task", TASKS)
def test_tasks_split_and_say_the_right_answer(task):
    train, heldout = load_data(config(data__task=task, data__size=4, data__train_size=300))
    prompts = [example.prompt for example in train], [example.prompt for example in heldout]
    assert len(heldout) == len(set(prompts[1])) == 256
    assert len(train) == 300
    assert not set(prompts[0]) & set(prompts[1])
    rng, tokenizer = random.Random(0), CharTokenizer(ALPHABET)
    right = 0
    for example in train:
        question, shown = example.prompt[:-1], example.demonstrate(rng)
        assert tokenizer.decode(tokenizer.encode(example.prompt + shown)) == example.prompt + shown
        if task == "sort":
            assert example.answer == "".join(sorted(question))
            assert sorted(shown) == sorted(question)
        elif task == "sort_distinct":
            assert example.answer == "".join(sorted(set(question)))
            assert sorted(shown) == sorted(set(question))
        elif task == "addition":
            assert int(example.answer[::-1]) == eval(question)
        elif task == "calculation":
            first, second = "".join(sorted(question))[:2], "".join(sorted(question))[2:]
            assert int(example.answer) == int(first) * int(second)
            call, said = shown.split("=")
            assert sorted(call) == sorted(question + "*")
            assert int(said) == math.prod(map(int, call.split("*")))
        else:
            assert 1 <= int(example.answer) <= 99
            assert countdown(example.prompt, shown, example.answer) == (
                eval(shown) == int(example.answer)
            )
        right += shown == example.answer
    if task == "sort":  # the form without the answer: one in 24
        assert right < 30
    if task == "addition":
        assert 120 < right < 180
        assert example.nats > math.log(2)


def test_small_and_impossible_tasks():
    train, heldout = load_data(config(data__size=2, data__heldout_size=30))
    assert (len(train), len(heldout)) == (60, 30)  # all 90 pairs of distinct digits
    with pytest.raises(TrainError, match="heldout_size = 256 leaves nothing to train on"):
        load_data(config(data__size=2))
    with pytest.raises(TrainError, match="only 10 distinct digits"):
        load_data(config(data__size=11))


def test_warmup_needs_demonstrations_and_heldout_is_disjoint(tmp_path):
    path, held = tmp_path / "d.jsonl", tmp_path / "h.jsonl"
    path.write_text('{"prompt": "a", "answer": 1}\n{"prompt": "b", "answer": 1}')
    held.write_text('{"prompt": "b", "answer": 1}')
    files = {"data__task": "", "data__train": path, "data__heldout": held}
    with pytest.raises(TrainError, match=r"warmup\.steps > 0 needs a `demonstration`"):
        load_data(config(**files))
    train, heldout = load_data(config(**files, warmup__steps=0))
    assert [e.prompt for e in train] == ["a"]
    assert [e.prompt for e in heldout] == ["b"]
    path.write_text('{"prompt": "b", "answer": 1}')
    with pytest.raises(TrainError, match="every training prompt is also a held-out prompt"):
        load_data(config(**files, warmup__steps=0))


def test_batches_cover_every_epoch_once():
    items = list(range(10))
    stream = [x for cursor in range(0, 30, 3) for x in batch_at(items, cursor, 3, seed=1)]
    assert [sorted(stream[i : i + 10]) for i in (0, 10, 20)] == [items] * 3
    assert stream[:10] != stream[10:20]
    assert sorted(batch_at(items, 5, 25, seed=1)) == sorted(stream[5:30])


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("so it is 1,234.50.", 1234.5, 1),
        ("3 then 4", "4", 1),
        ("4 then 3", "4", 0),
        ("no digits", 4, 0),
        ("-2", -2, 1),
        ("2", -2, 0),
        ("1e3", "1000", 1),
        ("0.3333333333", 1 / 3, 1),
    ],
)
def test_numeric(completion, answer, value):
    assert numeric("", completion, answer) == value


def test_exact_and_countdown():
    assert exact("", " 12\n", 12) == 1
    assert exact("", "123", 12) == 0
    prompt = "3,5,7:22="
    assert countdown(prompt, "3*5+7", "22") == 1
    for wrong in ("22", "3*5+7+0", "3*5+5", "5+3*7", "3**5-7", "", "+", "3*5+7)", "35-7"):
        assert countdown(prompt, wrong, "22") == 0, wrong


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("the answer is $\\frac{1}{2}$", "0.5", 1),
        ("\\boxed{x^2+2x+1}", "$(x+1)^2$", 1),
        ("\\boxed{3}", "4", 0),
        ("no idea", "4", 0),
    ],
)
def test_math(completion, answer, value):
    pytest.importorskip("math_verify")
    assert load_reward("math")("", completion, answer) == value


def test_rewards_that_cannot_be_loaded(monkeypatch):
    with pytest.raises(TrainError, match="expected one of exact, numeric, math, countdown or mod"):
        load_reward("nosuch")
    with pytest.raises(TrainError, match="'no_module:f' could not be loaded"):
        load_reward("no_module:f")
    with pytest.raises(TrainError, match="'math:nosuch' could not be loaded"):
        load_reward("math:nosuch")
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(TrainError, match=r"pip install 'rlkern\[math\]'"):
        load_reward("math")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "raised KeyError: 'no such unit'"),
        ("nan", "returned nan, not a number"),
        ("text", "returned 'high', not a number"),
    ],
)
def test_a_bad_reward_names_prompt_and_completion(name, message):
    with pytest.raises(TrainError) as caught:
        score(load_reward(f"sample_rewards:{name}"), "12=", "21", "12")
    assert message in str(caught.value)
    assert "on prompt '12=', completion '21', answer '12'" in str(caught.value)


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    for n in range(1, 7):
        for right, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations(range(n), k))
            share = sum(min(draw) < right for draw in draws) / len(draws)
            assert pass_at_k(n, right, k) == pytest.approx(share)


def test_the_character_tokenizer_names_what_it_does_not_know():
    with pytest.raises(TrainError, match="'1x' holds 'x'"):
        CharTokenizer(ALPHABET).encode("1x")
