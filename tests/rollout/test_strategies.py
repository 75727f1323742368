"""What each strategy chooses, on a model whose next-token probabilities are written down."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

import rlkern
from rlkern.rollout import NativeEngine, Rollouts
from rlkern.rollout.run import Run
from rlkern.rollout.state import Rows
from rlkern.rollout.strategies import (
    APRIL,
    CURE,
    EAD,
    LATR,
    ROSE,
    SMC,
    STRATEGIES,
    ARRoL,
    DeepSearch,
    PowerSMC,
    PrefixRL,
    ReinforceAda,
    Strategy,
    TreeRL,
)
from rlkern.rollout.strategies.arrol import too_many

V, EOS = 16, 1
SHAPE = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


def chain(table):
    """A model with P(next | last) = table[last]; rows that are not given go to the end token."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).eval()
    p = torch.full((V, V), 1e-9)
    p[:, EOS] = 1.0
    for last, row in table.items():
        p[last] = 1e-9
        for token, share in row.items():
            p[last, token] = share
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        # the norm makes sqrt(hidden_size) of a unit vector
        model.model.embed_tokens.weight.copy_(100 * torch.eye(V))
        model.lm_head.weight.copy_(p.log().T / math.sqrt(V))
    return model


@pytest.fixture(scope="module", params=[Qwen3Config, LlamaConfig], ids=["qwen3", "llama"])
def model(request):
    torch.manual_seed(3)
    config = request.param(**SHAPE, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config).eval()


def engine(model, **options):
    return NativeEngine(model, eos_token_ids=[EOS], **{"page_size": 4} | options)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def run(one, strategy, prompts=PROMPTS, seed=0, **arguments):
    arguments = {"group_size": 4, "max_new_tokens": 12} | arguments
    return one.generate(prompts, strategy=strategy, generator=seeded(seed), **arguments)


def texts(rollouts):
    return [response.tolist() for response in rollouts.responses()]


def is_empty(one):
    return one.cache.free_pages == one.cache.num_pages and not len(one.cache.branches())


def flat(parts):
    return [token for part in parts for token in part]


def origins(rollouts):
    return [part.tolist() for part in rollouts.origin.split(rollouts.lengths.tolist())]


@torch.no_grad()
def check(model, rollouts, temperature=lambda t: 1.0):
    """Log-probs and entropies are those of a full forward; shared tokens are alike throughout."""
    at = 0
    tokens, mask = rollouts.tokens, rollouts.mask
    for prompt, response in zip(rollouts.prompts(), rollouts.responses(), strict=True):
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        warmth = torch.tensor([float(temperature(t)) for t in range(len(response))])
        logp = (logits / warmth[:, None]).log_softmax(-1)
        here = slice(at, at + len(response))
        want = logp.gather(1, response[:, None])[:, 0]
        keep = mask[here]
        torch.testing.assert_close(rollouts.logprob[here][keep], want[keep], rtol=1e-5, atol=1e-5)
        entropy = -(logp.exp() * logp).sum(-1)
        torch.testing.assert_close(
            rollouts.entropy[here][keep], entropy[keep], rtol=1e-5, atol=1e-5
        )
        at += len(response)
    assert at == len(tokens)
    # sequences share tokens from their first on, and then never again
    parts, words = origins(rollouts), texts(rollouts)
    for i, mine in enumerate(parts):
        for j in range(i):
            alike = np.array(mine[: len(parts[j])]) == np.array(parts[j][: len(mine)])
            shared = int(alike.cumprod().sum())
            assert not alike[shared:].any()
            assert words[i][:shared] == words[j][:shared]
            assert not shared or rollouts.group_ids[i] == rollouts.group_ids[j]


def length_reward(number, tokens):
    return float(len(tokens) % 2)


def strategies():
    trace = [4, 5, 6, 7, 8, 9]
    return {
        "groups": lambda: Strategy(),
        "april": lambda: APRIL(3),
        "arrol": lambda: ARRoL(lambda hidden: hidden[:, 0].sigmoid(), [3, 6], [0.75, 0.5]),
        "cure": lambda: CURE(num_first=2, num_regenerated=1, top_k=3),
        "deepsearch": lambda: DeepSearch(length_reward, segment=3, width=3, num_terminals=4),
        "ead": lambda: EAD(hold=2, d_first=3, tau_min=0.5),
        "latr": lambda: LATR(tau_abs=0.02, tau_rel=0.6, ages=(2, 3), tau_ed=0.7, tree_tokens=6),
        "power_smc": lambda: PowerSMC(num_particles=6, every=2, ramp=4, min_ess=0.9),
        "prefix_rl": lambda: PrefixRL(lambda n, p: trace, [1, 3, 5]),
        "reinforce_ada": lambda: ReinforceAda(length_reward, round_size=3),
        "rose": lambda: ROSE(),
        "smc": lambda: SMC(lambda n, t: float((t % 3).sum()), num_particles=6, every=3),
        "tree_rl": lambda: TreeRL(num_trees=2),
    }


def test_every_strategy_has_a_name_and_a_test():
    assert set(STRATEGIES) == set(strategies())
    for name, make in strategies().items():
        assert type(make()) is STRATEGIES[name]


@pytest.mark.parametrize("name", list(strategies()))
def test_what_comes_out_is_what_the_model_says(model, name):
    one, strategy = engine(model), strategies()[name]()
    rollouts = run(one, strategy)
    warmth = (lambda t: strategy.temperature(np.array([t]), 1.0)[0]) if name == "ead" else None
    check(model, rollouts, *([warmth] if warmth else []))
    assert is_empty(one)
    assert rollouts.prompt_ids.tolist() == [0, 1, 2]
    assert len(rollouts.tokens)
    assert rollouts.group_ids.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["ead", "latr"])
@pytest.mark.parametrize("direct", [True, False])
def test_log_probs_of_a_scorer(model, name, direct):
    seen = []

    def score(hidden, tokens, temperature):
        seen.append(len(tokens))
        weight = model.get_output_embeddings().weight
        return rlkern.linear_logprob(hidden, weight, tokens, temperature=temperature).logprob

    got = run(engine(model, score=score, direct=direct), strategies()[name]())
    want = run(engine(model), strategies()[name]())
    assert torch.equal(got.tokens, want.tokens)
    assert seen
    torch.testing.assert_close(got.logprob, want.logprob, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(strategies()))
def test_what_is_decoded_together_changes_nothing(model, name):
    want, one = run(engine(model), strategies()[name]()), engine(model, max_sequences=3)
    got = run(one, strategies()[name]())
    for field in ("tokens", "cu_seqlens", "group_ids", "origin", "mask", "truncated"):
        assert torch.equal(getattr(want, field), getattr(got, field)), field
    torch.testing.assert_close(want.logprob, got.logprob, rtol=1e-5, atol=1e-5)
    assert is_empty(one)


# LATR


FORK = {8: {2: 0.52, 3: 0.48}}
LATE = {8: {9: 1.0}, 9: FORK[8]}


def test_latr_forks_greedy_branches_at_likely_alternatives():
    table = FORK | {2: {4: 0.7, 5: 0.3}, 3: {6: 0.54, 7: 0.46}}
    model = chain(table | {t: {t: 1.0} for t in (4, 6, 7)})
    one = engine(model)
    # 5 never comes: 0.7 - 0.3 is too much; the fourth is a plain sample
    rollouts = run(one, LATR(tree_tokens=5), [[8]], max_new_tokens=7)
    *tree, plain = texts(rollouts)
    assert tree == [[2] + [4] * 6, [3] + [6] * 6, [3] + [7] * 6]
    assert plain[0] in (2, 3)
    shared = origins(rollouts)
    assert shared[2][0] == shared[1][0] == 7
    assert shared[0][0] == 0
    assert len(set(flat(shared))) == 20 + len(plain)
    check(model, rollouts)


@pytest.mark.parametrize(
    ("options", "forks"),
    [
        ({"tau_abs": 0.47}, True),
        ({"tau_abs": 0.49}, False),
        ({"tau_rel": 0.05}, True),
        ({"tau_rel": 0.03}, False),
        ({"top_m": 1}, False),
    ],
)
def test_latr_thresholds(options, forks):
    model = chain(LATE | {2: {2: 1.0}, 3: {3: 1.0}})
    rollouts = run(engine(model), LATR(**options), [[8]], group_size=2, max_new_tokens=3)
    assert texts(rollouts)[0] == [9, 2, 2]
    assert (origins(rollouts)[1][0] == 0) == forks  # a plain sample shares no token
    assert not forks or texts(rollouts)[1] == [9, 3, 3]


@pytest.mark.parametrize(
    ("options", "pruned"),
    [
        ({}, True),  # one edit in three
        ({"tau_ed": 0.3}, False),
        ({"ages": (4,)}, False),  # the phase is over by then
        ({"tau_ed": None, "suffix": 0.6}, True),
        ({"tau_ed": None, "suffix": 0.7}, False),
        ({"tau_ed": None, "rouge": 0.6}, True),
        ({"tau_ed": None, "rouge": 0.7}, False),
    ],
)
def test_latr_prunes_what_says_the_same(options, pruned):
    model = chain(LATE | {2: {4: 1.0}, 3: {4: 1.0}, 4: {4: 1.0}})
    strategy = LATR(**{"ages": (3,), "tree_tokens": 4} | options)
    rollouts = run(engine(model), strategy, [[8]], group_size=2, max_new_tokens=6)
    first, second = texts(rollouts)
    assert first == [9, 2, 4, 4, 4, 4]
    assert (origins(rollouts)[1][0] != 0) == pruned  # then a plain sample stands there
    assert pruned or second == [9, 3, 4, 4, 4, 4]


def test_latr_prunes_the_subtree_and_spares_what_has_ended():
    # the branch of 3 says what that of 2 does, and has forked to 6
    table = LATE | {2: {5: 1.0}, 3: {5: 0.52, 6: 0.48}, 5: {7: 1.0}, 6: {10: 1.0}, 10: {10: 1.0}}
    strategy = LATR(ages=(4,), tree_tokens=8)
    rollouts = run(engine(chain(table | {7: {7: 1.0}})), strategy, [[8]], max_new_tokens=6)
    assert texts(rollouts)[0] == [9, 2, 5, 7, 7, 7]
    assert len(rollouts.origin.unique()) == len(rollouts.tokens)  # three plain samples
    # now both have ended by the time
    rollouts = run(engine(chain(table)), strategy, [[8]], max_new_tokens=6)
    ended = [[9, 2, 5, 7, EOS], [9, 3, 5, 7, EOS], [9, 3, 6, 10, 10, 10]]
    assert texts(rollouts)[:3] == ended
    assert [part[0] for part in origins(rollouts)[:3]] == [0, 0, 0]


def test_latr_has_a_share_of_the_group():
    table = FORK | {2: {4: 0.52, 5: 0.48}} | {t: {t: 1.0} for t in (3, 4, 5)}
    one, strategy = engine(chain(table)), LATR(share={0: 1.0, 10: 0.5, 20: 0.0}, tree_tokens=4)
    trees = {}
    for step in (0, 10, 20):
        strategy.training_step = step
        rollouts = run(one, strategy, [[8]], max_new_tokens=3)
        trees[step] = len(rollouts.origin) - len(rollouts.origin.unique())
        assert len(rollouts.lengths) == 4
    # three branches, then two, then none; of those that are plain none shares a token
    assert trees == {0: 1, 10: 0, 20: 0}
    strategy.training_step = 10
    assert texts(run(one, strategy, [[8]], max_new_tokens=3))[:2] == [[2, 4, 4], [3, 3, 3]]


# CURE, ROSE, TreeRL


def test_cure_begins_again_before_its_least_certain_token():
    # as uncertain at the first token, which does not count, as at the third
    table = {8: {2: 0.5, 9: 0.5}, 2: {3: 1.0}, 9: {3: 1.0}, 3: {4: 0.5, 5: 0.5}}
    model = chain(table | {4: {6: 1.0}, 5: {6: 1.0}, 6: {EOS: 1.0}})
    one = engine(model)
    rollouts = run(one, CURE(top_k=1), [[8]], group_size=16)
    words, parts = texts(rollouts), origins(rollouts)
    assert len(words) == 16
    assert {tuple(w[1:2] + w[3:]) for w in words} == {(3, 6, EOS)}
    assert {w[2] for w in words} == {4, 5}
    for i in range(4):
        children = parts[4 + 3 * i : 7 + 3 * i]
        assert all(child[:2] == parts[i][:2] for child in children)
    own = flat(parts[:4]) + flat(child[2:] for child in parts[4:])
    assert len(set(own)) == len(own)
    assert rollouts.mask.all()
    assert is_empty(one)
    check(model, rollouts)


def test_cure_chooses_uniformly_among_the_top_k_and_skips():
    # less and less certain
    table = {8: {2: 1.0}} | {t: {t + 1: 0.5 + 0.1 * t, 15: 0.5 - 0.1 * t} for t in (2, 3, 4)}
    model = chain(table | {5: {6: 1.0}, 6: {7: 1.0}, 15: {EOS: 1.0}, 7: {EOS: 1.0}})

    def places(strategy):
        rollouts = run(engine(model), strategy, [[8]] * 40, group_size=2, max_new_tokens=9)
        shared = []
        for parent, child, words in zip(*[iter(origins(rollouts))] * 2, texts(rollouts)[::2]):
            if words[:4] == [2, 3, 4, 5]:
                shared.append(
                    int((np.array(parent[:9])[: len(child)] == child[: len(parent)]).sum())
                )
        return shared

    options = {"num_first": 1, "num_regenerated": 1}
    assert set(places(CURE(top_k=1, **options))) == {1}
    assert set(places(CURE(top_k=2, **options))) == {1, 2}
    assert set(places(CURE(top_k=1, skip=[3], **options))) == {2}
    with pytest.raises(ValueError, match="CURE: makes 2 sequences a prompt, got group_size=3"):
        run(engine(model), CURE(**options), [[8]], group_size=3)


@torch.no_grad()
def test_rose_begins_again_at_the_largest_score(model):
    rollouts = run(engine(model), ROSE(epsilon=0.0), [[5, 6]], group_size=6, max_new_tokens=6)
    parts, words = origins(rollouts), texts(rollouts)
    e = model.get_input_embeddings().weight.double()
    e = e / e.norm(dim=1, keepdim=True).clamp(min=1e-12)
    best: dict[tuple[int, int], float] = {}
    for i, mine in enumerate(parts):
        shared = max([sum(a == b for a, b in zip(mine, other)) for other in parts[:i]], default=0)
        if best:
            owner, at = max(best, key=best.get)
            assert at == shared
            assert mine[:at] == parts[owner][:at]
            del best[owner, at]
        logits = model(torch.tensor([[5, 6] + words[i]])).logits[0, 1:-1].double()
        for t in range(shared + 1, len(mine)):
            p = logits[t].softmax(0)
            h = -(p * p.log()).sum()
            mean = (p[:, None] * e).sum(0)
            best[i, t] = float(h * ((p * p).sum() - mean @ mean))
    roots = run(engine(model), ROSE(epsilon=1.0), [[5, 6]], group_size=6, max_new_tokens=6)
    assert len(roots.origin.unique()) == len(roots.tokens) > len(rollouts.origin.unique())


def test_tree_rl_forks_at_the_least_likely_tokens(model):
    for seed in range(200):  # whose responses are long enough to fork
        rollouts = run(
            engine(model), TreeRL(num_rounds=2), [[5, 6]], seed, group_size=54, max_new_tokens=8
        )
        if len(rollouts.lengths) == 54:
            break
    parts, logprob = origins(rollouts), rollouts.logprob
    assert len(parts) == 6 * (2 * 2 * 2 + 1)
    first, second = parts[6:30], parts[30:]

    def shared(child, parents):
        return max(
            (sum(a == b for a, b in zip(child, parent)), -i) for i, parent in enumerate(parents)
        )

    for i in range(6):
        owned = sorted(parts[i][1:], key=lambda t: float(logprob[t]))
        owned = [t for t in owned if rollouts.tokens[t] != EOS]
        want = [parts[i].index(t) for t in owned[:2]]
        got = [child for child in first if shared(child, parts[:6])[1] == -i]
        assert sorted(shared(child, parts[:6])[0] for child in got) == sorted(2 * want)
    assert len(second) == 24
    # no place serves twice
    places = [set(), set()]
    for used, children, parents in ((0, first, parts[:6]), (1, second, parts[:30])):
        for child in children:
            places[used].add(tuple(child[: shared(child, parents)[0]]))
    assert len(places[0]) == len(places[1]) == 12
    assert not places[0] & places[1]
    default = run(engine(model), TreeRL(), [[5, 6]], group_size=16, max_new_tokens=8)
    assert len(default.lengths) == 16


# EAD, PrefixRL, Reinforce-Ada


def test_ead_anneals_by_position_and_training_step():
    strategy = EAD()

    def want(t, d):
        return 1.0 if t < 10 else max(1 + 1.2 - math.exp(t / d), 0.1)

    places = np.array([0, 9, 10, 15, 20, 40, 10**6])
    for step, d in ((0, 25), (3, 40), (10**5, 40000)):
        strategy.training_step = step
        with np.errstate(all="raise"):
            got = strategy.temperature(places, 2.0)
        np.testing.assert_allclose(got, [2 * want(min(t, 700 * d), d) for t in places])


def test_prefix_rl_goes_on_from_nested_prefixes(model):
    trace = [4, 5, EOS, 7, 8, 9]  # an end token that is given ends nothing
    one = engine(model)
    strategy = PrefixRL(lambda number, prompt: trace[: 6 - 4 * (number == 1)], [5, 3, 1])
    rollouts = run(one, strategy, PROMPTS[:2], group_size=7)
    words, mask = texts(rollouts), rollouts.mask.split(rollouts.lengths.tolist())
    given = [int(m.sum()) for m in (~x for x in mask)]
    assert given[:7] == [5, 5, 5, 3, 3, 1, 1]
    assert given[7:] == [1] * 7  # of a trace of two tokens
    for word, m, h in zip(words, mask, given, strict=True):
        assert word[:h] == trace[:h]
        assert not m[:h].any()
        assert m[h:].all()
        assert len(word) > h
    shared = origins(rollouts)[:7]
    assert all(part[:h] == shared[0][:h] for part, h in zip(shared, given[:7], strict=True))
    own = flat(part[h:] for part, h in zip(shared, given[:7], strict=True))
    assert len(set(own)) == len(own)
    check(model, rollouts)
    with pytest.raises(ValueError, match="5 given tokens leave nothing of max_new_tokens = 5"):
        run(engine(model), strategy, PROMPTS[:1], max_new_tokens=5)
    plain = run(engine(model), PrefixRL(lambda *_: [], [2]))
    assert plain.mask.all()
    assert texts(plain) == texts(run(engine(model), Strategy()))


@pytest.mark.parametrize(
    ("scores", "until", "rounds", "chosen"),
    [
        ([1, 0, 1, 0] * 2, "balanced", 1, [0, 1, 2, 3]),
        ([0, 0, 1, 0, 0, 0, 0, 1], "balanced", 1, [0, 1, 2, 7]),
        ([0] * 8 + [1, 0] * 4, "balanced", 2, [0, 1, 8, 10]),
        ([0] * 15 + [1], "balanced", 4, [0, 1, 2, 15]),
        ([0] * 15 + [1], "positive_focused", 2, [0, 1, 2, 15]),
        ([1] * 32, "balanced", 4, [0, 1, 2, 3]),
        ([0.7] * 32, "positive_focused", 4, [0, 1, 2, 3]),  # not above the threshold
    ],
)
def test_reinforce_ada_goes_on_until_both_kinds_are_there(scores, until, rounds, chosen):
    given = iter(scores + [0] * 32)
    strategy = ReinforceAda(lambda number, tokens: next(given), until=until)
    kept = []

    def select(group):
        kept.extend(type(strategy).select(strategy, group))
        return kept

    strategy.select = select
    one = engine(chain({8: {2: 1.0}}))
    rollouts = run(one, strategy, [[8]])
    assert [done.stream for done in kept] == chosen
    assert len(rollouts.lengths) == 4
    assert strategy.rewards[0] == (scores + [0] * 32)[: 8 * rounds]
    assert is_empty(one)


# APRIL


LINE = {2: {EOS: 1.0}, 3: {6: 1.0}, 4: {4: 1.0}, 5: {7: 1.0}, 7: {8: 1.0}}


def test_april_returns_what_is_complete_and_goes_on_with_the_rest():
    one, strategy = engine(chain(LINE)), APRIL(2)
    options = {"group_size": 2, "max_new_tokens": 6}
    first = run(one, strategy, [[2], [3], [4], [5]], **options)
    assert first.prompt_ids.tolist() == [0, 1]
    assert texts(first) == [[EOS]] * 2 + [[6, EOS]] * 2
    assert [group.number for group, _ in one.kept.groups] == [2, 3]
    assert one.cache.free_pages == one.cache.num_pages  # of weights that will change
    one.bump_version()
    second = run(one, strategy, [[3], [3]], **options)
    assert second.prompt_ids.tolist() == [3, 4]  # 5 was as fast, and waits for the next call
    assert texts(second) == [[7, 8, EOS]] * 2 + [[6, EOS]] * 2
    assert second.versions.tolist() == [0, 0, 1] * 2 + [1] * 4
    one.bump_version()
    last = run(one, Strategy(), [[2]], **options)
    assert last.prompt_ids.tolist() == [2, 5, 6]
    assert texts(last) == [[4] * 6] * 2 + [[6, EOS]] * 2 + [[EOS]] * 2
    assert last.versions.tolist() == [0, 0, 1, 1, 2, 2] * 2 + [1] * 4 + [2] * 2
    assert is_empty(one)
    assert not one.kept.groups
    assert run(one, Strategy(), [[2]], **options).prompt_ids.tolist() == [0]


@pytest.mark.parametrize("stale", ["recompute", "forbid", "keep"])
@pytest.mark.parametrize("options", [{}, {"max_sequences": 4}, {"max_cached_tokens": 60}])
@torch.no_grad()
def test_april_over_new_weights(model, stale, options):
    one, strategy = engine(model, stale=stale, **options), APRIL(1)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    after = {name: x + 0.05 * torch.randn_like(x) for name, x in before.items()}
    prompts, calls = [[5, 6], [7, 3, 9], [8, 9], [10, 2, 4]], []
    try:
        calls.append(run(one, strategy, prompts, group_size=3, seed=2))
        model.load_state_dict(after)
        one.bump_version()
        calls.append(run(one, Strategy(), [[2, 2, 2, 2, 2, 2, 2, 2, 2]], group_size=3, seed=3))
        numbers = flat(call.prompt_ids.tolist() for call in calls)
        assert sorted(numbers) == [0, 1, 2, 3, 4]
        assert is_empty(one)
        logps = []
        for weights in (before, after):
            model.load_state_dict(weights)
            for prompt, response in zip(calls[1].prompts(), calls[1].responses(), strict=True):
                logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
                logps.append(logits.log_softmax(-1).gather(1, response[:, None])[:, 0])
        old, new = torch.cat(logps).chunk(2)
        versions, got = calls[1].versions, calls[1].logprob
        assert versions.unique().tolist() == [0, 1]  # some began under the old weights
        torch.testing.assert_close(got[versions == 0], old[versions == 0], rtol=1e-5, atol=1e-5)
        if stale != "keep":
            torch.testing.assert_close(got[versions == 1], new[versions == 1], rtol=1e-5, atol=1e-5)
    finally:
        model.load_state_dict(before)


def test_what_is_left_over_may_be_longer_than_a_later_call():
    one = engine(chain(LINE))
    run(one, APRIL(1), [[2], [4] * 40, [3]], max_new_tokens=12)
    rollouts = run(one, APRIL(1), [], max_new_tokens=3)
    assert rollouts.prompt_ids.tolist() == [2]
    rollouts = run(one, Strategy(), [[2]], max_new_tokens=3)
    assert texts(rollouts) == [[4] * 3] * 4 + [[EOS]] * 4
    with pytest.raises(ValueError, match="expected prompts of at least one token"):
        run(one, Strategy(), [])


def test_a_call_that_fails_leaves_nothing():
    one = engine(chain(LINE))
    run(one, APRIL(1), [[2], [4], [4]], max_new_tokens=6)
    assert len(one.kept.groups) == 2

    class Fails(Strategy):
        def on_finish(self, run, group, done):
            raise KeyError

    with pytest.raises(KeyError):
        run(one, Fails(), [[2]], max_new_tokens=6)
    assert is_empty(one)
    assert not one.kept.groups


# ARRoL


def test_arrol_prunes_towards_the_ratio():
    quality = np.array([0.9, 0.8, 0.9, 0.1, 0.7, 0.9])
    # from a mean of 0.72 to one of 0.5, best ones first
    assert too_many(quality, 3, 0.5).tolist() == [0, 2, 5]
    assert too_many(quality, 2, 0.0).tolist() == [0, 1, 2, 5]
    assert too_many(quality, 6, 0.5).tolist() == []
    model = chain({8: {2: 0.8, 3: 0.2}, 2: {2: 1.0}, 3: {3: 1.0}})
    asked = []

    def head(hidden):
        asked.append(len(hidden))
        return hidden[:, 2] / 4  # the last token was 2

    plain = texts(run(engine(model), Strategy(), [[8]], group_size=12, max_new_tokens=4))
    few = sum(word[0] == 3 for word in plain)
    assert 0 < few < 4
    one = engine(model)
    strategy = ARRoL(head, [1, 3], [0.75, 0.5])
    rollouts = run(one, strategy, [[8]], group_size=12, max_new_tokens=4)
    assert asked == [12, 9]
    words = texts(rollouts)
    assert len(words) == 6
    assert sum(word[0] == 3 for word in words) == few
    assert is_empty(one)


def test_arrol_leaves_what_has_ended():
    model = chain({8: {2: 0.5, 3: 0.5}, 2: {EOS: 1.0}, 3: {3: 1.0}})
    ended = sum(
        word == [2, EOS]
        for word in texts(run(engine(model), Strategy(), [[8]], group_size=8, max_new_tokens=4))
    )
    strategy = ARRoL(lambda hidden: hidden[:, 0] * 0, [3], [0.125])
    words = texts(run(engine(model), strategy, [[8]], group_size=8, max_new_tokens=4))
    assert ended
    assert words == [[2, EOS]] * ended


# SMC


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize(("every", "ramp"), [(1, 3), (2, 6), (100, 3), (100, 6)])
def test_power_smc_samples_the_power_of_the_policy(every, ramp, temperature):
    # short ones end early: they take part, and their weights rise with the ramp
    table = {8: {2: 0.6, 3: 0.4}, 2: {EOS: 0.5, 4: 0.5}, 3: {EOS: 0.9, 4: 0.1}, 4: {5: 0.7, 6: 0.3}}
    p = {(2, EOS): 0.3, (2, 4, 5, EOS): 0.21, (2, 4, 6, EOS): 0.09}
    p |= {(3, EOS): 0.36, (3, 4, 5, EOS): 0.028, (3, 4, 6, EOS): 0.012}
    total = sum(x**2 for x in p.values())
    strategy = PowerSMC(num_particles=600, every=every, ramp=ramp, min_ess=0.99)
    one = engine(chain(table))
    rollouts = run(one, strategy, [[8]] * 4, group_size=600, temperature=temperature)
    words = [tuple(word) for word in texts(rollouts)]
    for word, x in p.items():
        assert words.count(word) / 2400 == pytest.approx(x**2 / total, abs=0.035), word
    assert is_empty(one)


def test_smc_keeps_what_its_potential_likes():
    model = chain({8: {2: 0.5, 3: 0.5}, 2: {2: 1.0}, 3: {3: 0.5, EOS: 0.5}})

    def potential(number, tokens):
        return -50.0 * float((tokens == 3).sum())

    one = engine(model)
    rollouts = run(
        one, SMC(potential, num_particles=8, every=2), [[8]], group_size=8, max_new_tokens=5
    )
    assert texts(rollouts) == [[2] * 5] * 8
    parts = origins(rollouts)
    assert len({part[0] for part in parts}) < 8  # particles were forked
    assert is_empty(one)
    check(model, rollouts)
    # equal potentials: nothing is resampled, all particles are their own
    rollouts = run(engine(model), SMC(lambda *_: 0.0, num_particles=4, every=1), [[8]])
    assert len({part[0] for part in origins(rollouts)}) == 4


@pytest.mark.parametrize("every", [1, 2, 100])
def test_smc_samples_its_target(every):
    # 3 ends at once; what begins with 2 and goes on to 4 is three times as good
    table = {8: {2: 0.4, 3: 0.4, 7: 0.2}, 2: {4: 0.5, 5: 0.5}, 4: {6: 1.0}, 5: {6: 1.0}}
    model = chain(table | {7: {7: 1.0}})

    def potential(number, tokens):
        asked.append(tokens.tolist())
        if tokens[0] == 7:
            return -math.inf
        return math.log(3) if tokens.tolist()[:2] == [2, 4] else 0.0

    asked = []
    strategy = SMC(potential, num_particles=1000, every=every, min_ess=1.0)
    words = texts(run(engine(model), strategy, [[8]] * 2, group_size=500))
    for start, mass in {(3, EOS): 0.5, (2, 4): 0.75, (2, 5): 0.25}.items():
        got = sum(tuple(word[:2]) == start for word in words) / 1000
        assert got == pytest.approx(mass / 1.5, abs=0.05), start
    assert asked.count([3, EOS]) <= 2 * 1000


# DeepSearch


def search(model, reward, seed=0, max_new_tokens=6, **options):
    strategy = DeepSearch(reward, **{"segment": 2, "width": 3, "num_terminals": 4} | options)
    groups = []

    def select(group):
        groups.append(group)
        return type(strategy).select(strategy, group)

    strategy.select = select
    one = engine(model)
    rollouts = run(one, strategy, [[8]], seed, max_new_tokens=max_new_tokens)
    assert is_empty(one)
    check(model, rollouts)
    return rollouts, groups[0].notes["nodes"]


def test_deepsearch_goes_down_and_then_to_the_best_of_the_frontier():
    rollouts, nodes = search(chain({8: {2: 1.0}, 2: {2: 1.0}}), lambda *_: 1.0)
    # nothing ends: -1 for whole responses. Down through 1 and 4; 2 has a better parent than 5
    assert [node.parent for node in nodes] == [-1, 0, 0, 0, 1, 1, 1, 4, 4, 4, 2, 2, 2, 10, 10, 10]
    assert nodes[0].q == pytest.approx(-6 * 0.25)
    assert nodes[0].visits == 6
    assert nodes[1].q == pytest.approx(-3 * 0.5)
    assert nodes[4].q == pytest.approx(-3 * 0.75)
    assert nodes[7].q == -1
    assert nodes[7].is_terminal
    assert nodes[3].visits == 0
    assert texts(rollouts) == [[2] * 6] * 4
    assert rollouts.truncated.all()
    assert [len(set(parts)) for parts in zip(*origins(rollouts))] == [2, 2, 2, 2, 4, 4]


def test_deepsearch_returns_right_answers_first_and_respects_depth():
    table = {8: {2: 0.5, 3: 0.5}, 2: {EOS: 1.0}, 3: {3: 1.0}}

    def reward(number, tokens):
        return float(tokens.tolist() == [2, EOS])

    rollouts, nodes = search(chain(table), reward, width=8, num_terminals=9)
    words, first = texts(rollouts), [node for node in nodes if node.parent == 0]
    right = [node for node in first if node.is_terminal]
    assert right
    assert words[: len(right)] == [[2, EOS]] * len(right[:4])
    assert all(node.q == 1 for node in right)
    # of one that ends, the next comes from the frontier: all of it at depth 1
    assert all(node.depth == 2 for node in nodes[9:17])
    _, shallow = search(chain({8: {2: 1.0}, 2: {2: 1.0}}), reward, max_depth=1)
    assert len(shallow) == 4


@pytest.mark.parametrize("seed", range(4))
def test_deepsearch_replayed(seed):
    """What is expanded next, from the nodes that there were."""
    table = {8: {3: 1.0}, 3: {3: 0.6, 4: 0.4}, 4: {EOS: 1.0}}
    _, nodes = search(chain(table), lambda *_: 0.0, seed=seed, num_terminals=12, max_new_tokens=9)
    order = list(dict.fromkeys(node.parent for node in nodes[1:]))
    q, is_open, frontiers = {0: 0.0}, set(), 0

    def score(i):
        return 0.4 * math.tanh(q[nodes[i].parent]) + 0.01 * math.sqrt(nodes[i].depth / 64)

    for now, then in itertools.pairwise(order):
        new = [i for i, node in enumerate(nodes) if node.parent == now]
        is_open -= {now}
        for i in new:
            q[i] = 0.0
            if not nodes[i].is_terminal:
                is_open.add(i)
                continue
            path = [i]
            while nodes[path[-1]].parent >= 0:
                path.append(nodes[path[-1]].parent)
            for place, one in enumerate(reversed(path)):
                q[one] -= max((place + 1) / len(path), 0.1)
        local = [i for i in new if i in is_open]
        if len(local) == len(new):
            assert then == local[0]
        else:
            assert then == max(sorted(is_open), key=score)
            frontiers += bool(local) and then not in local
    assert frontiers  # was chosen where new nodes were open, too


# The engine under strategies


class ForkAt(Strategy):
    """Forks its finished sequence once, at a place."""

    keeps_pages = True

    def __init__(self, at):
        self.at = at

    def first(self, group):
        return 1

    def on_group_done(self, run, group):
        if len(group.done) == 1:
            run.fork(Rows.of(group.done), self.group_size - 1, at=self.at)


@pytest.mark.parametrize("at", [0, 1, 4])
def test_fork_at(model, at):
    one = engine(model)
    # the prompt ends with an end token, which ends no fork of it
    for seed in range(50):
        if run(one, Strategy(), [[5, 6, EOS]], seed, group_size=1).lengths[0] > 4:
            break
    rollouts = run(one, ForkAt(at), [[5, 6, EOS]], seed)
    assert rollouts.lengths[0] > 4
    assert len(rollouts.lengths) == 4
    check(model, rollouts)
    parts = origins(rollouts)
    for part in parts[1:]:
        assert part[:at] == parts[0][:at]
        assert len(part) > at
        assert not set(part[at:]) & set(parts[0])
    assert is_empty(one)


class Prunes(Strategy):
    """Ends every branch of the first prompt, and then asks for others."""

    acts_on_steps = True
    keeps_root = True

    def on_step(self, run, step):
        rows = run.rows
        mine = (rows.group == 0) & (rows.length == 2) & (rows.stream < self.group_size)
        if mine.any():
            run.prune(rows.branch[mine])

    def on_group_done(self, run, group):
        if not group.done:
            run.spawn(group, 2)


@pytest.mark.parametrize("options", [{}, {"max_sequences": 4}, {"max_cached_tokens": 64}])
def test_groups_that_lose_all_branches_begin_again(model, options):
    one = engine(model, **options)
    rollouts = run(one, Prunes(), [[5, 6], [9, 2, 3]], seed=1, max_new_tokens=10)
    counts = torch.bincount(rollouts.group_ids).tolist()
    assert counts[1] == 4
    assert counts[0] in range(1, 5)
    check(model, rollouts)
    want = run(engine(model), Prunes(), [[5, 6], [9, 2, 3]], seed=1, max_new_tokens=10)
    assert texts(rollouts) == texts(want)
    assert is_empty(one)


class PrunesAll(Strategy):
    acts_on_steps = True

    def on_logits(self, run, step):
        run.prune(step.rows.branch[step.rows.group == 0])


def test_a_group_may_end_without_sequences(model):
    one = engine(model)
    rollouts = run(one, PrunesAll())
    assert rollouts.group_ids.unique().tolist() == [1, 2]
    assert rollouts.prompt_ids.tolist() == [0, 1, 2]
    empty = run(one, PrunesAll(), PROMPTS[:1])
    assert not len(empty.tokens)
    assert empty.group_ids.dtype == torch.int64
    assert empty.truncated.dtype == torch.bool
    assert is_empty(one)


def test_what_on_finish_prunes_is_gone():
    finished = []

    class KeepsOne(Strategy):
        def on_finish(self, run, group, done):
            finished.append(done.stream)
            run.prune([other.branch for other in group.done if other is not done])

    one = engine(chain({8: {2: 1.0}}))
    rollouts = run(one, KeepsOne(), [[8]])  # all end at the same step
    assert finished == [0]
    assert texts(rollouts) == [[2, EOS]]
    assert is_empty(one)


def test_forks_before_tokens_are_appended_need_a_token(model):
    class Forks(Strategy):
        acts_on_steps = True

        def on_logits(self, run, step):
            run.fork(step.rows)

    one = engine(model)
    with pytest.raises(ValueError, match="expected `forced` or `at` in on_logits"):
        run(one, Forks())
    assert is_empty(one)


def test_groups_are_put_aside_with_all_that_they_hold(model, monkeypatch):
    """Waiting samples, parked branches, finished ones whose pages are kept, and prompts."""
    aside, waiting = [], []
    put = Run._put_aside

    def counted(self, group, drop):
        aside.append(type(self.strategy).__name__)
        waiting.append(group.waiting)
        return put(self, group, drop)

    monkeypatch.setattr(Run, "_put_aside", counted)
    for name, make in strategies().items():
        want, aside[:] = run(engine(model), make()), []
        for tokens in range(16, 400, 8):  # the smallest cache that one group fits in
            one = engine(
                model, max_cached_tokens=tokens, max_sequences=14 if make().together else 6
            )
            try:
                got = run(one, make())
                break
            except RuntimeError:
                assert is_empty(one)
        assert torch.equal(want.tokens, got.tokens), name
        assert torch.equal(want.origin, got.origin), name
        torch.testing.assert_close(want.logprob, got.logprob, rtol=1e-5, atol=1e-5)
        assert aside, name
        assert is_empty(one)
    assert any(waiting)


@pytest.mark.parametrize("name", ["groups", "cure"])
def test_a_cache_for_one_group_is_enough_for_many(name):
    model = chain({8: {2: 1.0}, 2: {3: 0.5, 4: 0.5}, 3: {6: 1.0}, 4: {6: 1.0}, 6: {6: 1.0}})

    def smallest(prompts):
        for tokens in range(16, 400, 4):
            one = engine(model, max_cached_tokens=tokens, max_sequences=4 * len(prompts))
            try:
                rollouts = run(one, strategies()[name](), prompts, max_new_tokens=20)
            except RuntimeError:
                continue
            assert is_empty(one)
            return tokens, len(rollouts.lengths)

    tokens, sequences = smallest([[8]])
    many, of_many = smallest([[8]] * 5)
    # what was put aside does not go on in its prompt's last page: one page more
    assert many <= tokens + 4
    assert of_many == 5 * sequences


def test_optional_fields_are_selected_saved_and_loaded(model, tmp_path):
    rollouts = run(engine(model), strategies()["cure"]())
    order = torch.tensor([3, 0, 2, 2])
    part = rollouts.select(order)
    for field in ("tokens", "logprob", "entropy", "versions", "mask"):
        split = getattr(rollouts, field).split(rollouts.lengths.tolist())
        assert torch.equal(getattr(part, field), torch.cat([split[i] for i in order]))
    old = [origins(rollouts)[i] for i in order.tolist()]
    new, old = flat(origins(part)), flat(old)
    assert new == [old.index(token) for token in old]
    assert torch.equal(part.prompt_ids, rollouts.prompt_ids)
    part.save(tmp_path / "r.safetensors")
    loaded, _ = Rollouts.load(tmp_path / "r.safetensors")
    for name, tensor in vars(part).items():
        got = getattr(loaded, name)
        assert got is None if tensor is None else torch.equal(got, tensor), name


def test_the_examples_of_the_documentation_run():
    page = Path(__file__).parents[2].joinpath("docs", "rollout.md").read_text()
    blocks = [block.split("```")[0] for block in page.split("```python\n")[1:]]
    first, own = blocks[0], next(block for block in blocks if "class HalfWay" in block)
    names = {}
    exec(first, names)
    assert names["rollouts"].group_ids.bincount().tolist() == [16, 16]
    assert names["drawn"] < len(names["rollouts"].tokens)
    exec(own, names)
    assert all(f"`{name}` | `{kind.__name__}`" in page for name, kind in STRATEGIES.items())
    one = names["engine"]
    rollouts = run(one, names["HalfWay"](), group_size=6)
    assert rollouts.group_ids.bincount().tolist() == [6, 6, 6]
    check(names["model"], rollouts)
    assert is_empty(one)
