"""An environment's replies: forced through the cache, masked, and what turns are worth."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from rlkern.rollout import Calculator, Environment, NativeEngine, Reply, Turn, turn_rows
from rlkern.rollout.engine import TURNS
from rlkern.rollout.environment import ReplyError, calculate, replies_in
from rlkern.rollout.strategies import APRIL, CURE, ReinforceAda, Strategy
from rlkern.train.model import CharTokenizer

SHAPE = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]
EOS, CALLS = [1, 2], (3, 4, 5, 6)


class Echo(Environment):
    """To a turn that ends with a call: its first tokens, backwards, with an end token among them.
    Two agents take turns; each is paid by the length of its turn, and takes 1 from the other."""

    turn_ends, max_turns, first_agent = CALLS, 4, 1

    def __init__(self, longest=3):
        self.longest, self.asked = longest, []

    def reply(self, turns):
        self.asked += turns
        return [self.one(turn) for turn in turns]

    def one(self, turn: Turn) -> Reply:
        mine = turn.response[turn.begin :]
        assert mine[-1] in (*EOS, *CALLS)
        assert turn.prompt == PROMPTS[turn.number % 4]
        if mine[-1] in EOS:
            return Reply(done=True, reward=5.0, others={0: -5.0, 7: 1.0})
        said = [*mine[: self.longest][::-1], 1][: 1 + len(mine) % (self.longest + 1)]
        said = said if mine[-1] != 6 else []
        return Reply(said, reward=len(mine), agent=1 - turn.agent, others={1 - turn.agent: -1.0})


@pytest.fixture(params=[Qwen3Config, LlamaConfig], ids=["qwen3", "llama"])
def model(request):
    torch.manual_seed(3)
    options = {"head_dim": 8} if request.param is Qwen3Config else {}
    return AutoModelForCausalLM.from_config(request.param(**SHAPE, **options)).eval()


def generate(model, environment=None, prompts=PROMPTS, seed=0, options=(), **arguments):
    arguments = {"group_size": 6, "max_new_tokens": 24} | arguments
    engine = NativeEngine(model, eos_token_ids=EOS, **dict(options))
    rollouts = engine.generate(
        prompts,
        generator=torch.Generator().manual_seed(seed),
        environment=environment or Echo(),
        **arguments,
    )
    assert not len(engine.cache.branches())
    assert engine.cache.free_pages == engine.cache.num_pages
    return rollouts, engine


def walked(response, environment):
    """The turns of a response, by asking again: (begin, end, end of the reply), and who spoke."""
    turns, begin, agent = [], 0, environment.first_agent
    while begin < len(response):
        ends = [i for i in range(begin, len(response)) if response[i] in (*EOS, *CALLS)]
        if not ends:
            return [*turns, (begin, len(response), len(response), agent, 0.0)]
        end = ends[0] + 1
        said = environment.one(Turn(0, PROMPTS[0], response[:end], begin, len(turns), agent))
        stays = not said.done and end < len(response)
        after = end + len(said.tokens) if stays else end
        assert response[end:after] == list(said.tokens) * stays
        turns.append((begin, end, after, agent, said.reward))
        for other, reward in said.others.items():
            theirs = [i for i, turn in enumerate(turns) if turn[3] == other]
            for i in theirs[-1:]:
                turns[i] = (*turns[i][:4], turns[i][4] + reward)
        begin, agent = after, said.agent
    return turns


def test_replies_stand_behind_their_turns_and_are_masked(model):
    environment = Echo()
    rollouts, engine = generate(model, environment)
    lengths = rollouts.lengths.tolist()
    columns = [x.split(lengths) for x in (rollouts.mask, rollouts.turns, rollouts.agents)]
    seen = set()
    for i, response in enumerate(rollouts.responses()):
        turns = walked(response.tolist(), environment)
        mask, number, agent = ([*column[i].tolist()] for column in columns)
        paid = rollouts.turn_rewards.split(lengths)[i].tolist()
        for k, (begin, end, after, who, reward) in enumerate(turns):
            assert mask[begin:after] == [True] * (end - begin) + [False] * (after - end)
            assert number[begin:after] == [k] * (after - begin)
            assert agent[begin:after] == [who] * (after - begin)
            assert paid[begin:after] == [0.0] * (end - begin - 1) + [reward] + [0.0] * (after - end)
            seen.add((after - end, end - begin > 1))
        assert len(turns) <= 4
        ended = response[-1].item() in EOS and mask[-1]
        assert bool(rollouts.truncated[i]) != ended
        assert not rollouts.truncated[i] or len(turns) == 4 or len(response) + 4 >= 24
    assert {(0, True), (1, True), (2, True), (3, True)} <= seen | {(0, True)}
    assert not rollouts.mask.all()
    stats = engine.stats
    assert stats["rollout/replied"] == pytest.approx(1 - rollouts.mask.float().mean().item())
    assert stats["rollout/turns"] > 1.5
    total = rollouts.turn_rewards.sum().item() / len(lengths)
    assert stats["reward/turns"] == pytest.approx(total)


@torch.no_grad()
def assert_logprobs(model, rollouts, temperature=1.0):
    """Those of drawn tokens are a plain forward's over the whole sequence, replies included."""
    lengths = rollouts.lengths.tolist()
    packed = zip(*(x.split(lengths) for x in (rollouts.logprob, rollouts.entropy, rollouts.mask)))
    for prompt, response, (logprob, entropy, mask) in zip(
        rollouts.prompts(), rollouts.responses(), packed, strict=True
    ):
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        full = (logits / temperature).log_softmax(-1)
        expected = full.gather(1, response[:, None])[:, 0]
        near = {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(logprob[mask], expected[mask], **near)
        torch.testing.assert_close(entropy[mask], -(full.exp() * full).sum(-1)[mask], **near)
        assert (logprob[~mask] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_forced_tokens_are_cached_as_a_plain_forward_has_them(model, temperature):
    rollouts, _ = generate(model, temperature=temperature)
    assert_logprobs(model, rollouts, temperature)


@pytest.mark.parametrize("chunk", [None, 4])
def test_shared_equals_unshared_in_bits(model, chunk):
    shared, engine = generate(model, options={"chunk": chunk})
    plain, unshared = generate(model, options={"chunk": chunk, "share": False})
    for name in ("tokens", "logprob", "entropy", "mask", "origin", *TURNS):
        assert torch.equal(getattr(shared, name), getattr(plain, name)), name
    assert (engine.stats["rollout/kv_saved"] > 0) == (chunk == 4)
    assert unshared.stats["rollout/kv_saved"] == 0


def test_neither_batching_nor_a_small_cache_changes_a_token(model):
    """In the smallest cache that will do, groups are put aside, some with replies not fed yet."""
    rollouts, roomy = generate(model)
    computed = []
    for tokens in (None, *range(160, 0, -8)):
        options = {"max_cached_tokens": tokens, "page_size": 4, "max_sequences": 15}
        try:
            others, engine = generate(model, options=options)
        except RuntimeError as error:
            if "one group needs" not in str(error):
                raise
            break
        for name in ("tokens", "cu_seqlens", "mask", "truncated", *TURNS):
            assert torch.equal(getattr(rollouts, name), getattr(others, name)), name
        assert_logprobs(model, others)
        computed.append(engine.stats["rollout/computed"])
    assert len(computed) > 3
    assert computed[-1] > computed[0] == roomy.stats["rollout/computed"]


def test_strategies_that_fork_no_responses(model):
    environment = Echo()
    right = ReinforceAda(lambda number, tokens: float(tokens[0] % 2), round_size=4, max_rounds=2)
    rollouts, _ = generate(model, environment, strategy=right)
    assert_logprobs(model, rollouts)
    engine, april = NativeEngine(model, eos_token_ids=EOS), APRIL(2)
    for call in range(2):
        rollouts = engine.generate(
            PROMPTS[:: 1 - 2 * call] if not call else [PROMPTS[0]],
            group_size=3, max_new_tokens=24, strategy=april, environment=environment,
            generator=torch.Generator().manual_seed(call),
        )  # fmt: skip
        assert_logprobs(model, rollouts)
        assert len(rollouts.prompt_ids) == 2
    with pytest.raises(ValueError, match="CURE does not go with an environment"):
        generate(model, strategy=CURE(), group_size=16)

    class Forks(Strategy):
        keeps_pages = True

        def on_group_done(self, run, group):
            run.fork(self.rows_of(group), at=1)

        def rows_of(self, group):
            from rlkern.rollout.state import Rows

            return Rows.of(group.done[:1])

    with pytest.raises(ValueError, match="with an environment a response has no forks"):
        NativeEngine(model, eos_token_ids=EOS).generate(
            PROMPTS, group_size=2, max_new_tokens=8, strategy=Forks(), environment=Echo()
        )


def test_bad_replies_are_refused(model):
    class Silent(Echo):
        def reply(self, turns):
            return []

    class Stranger(Echo):
        def one(self, turn):
            return Reply([3, 24])

    class Absent(Echo):
        def one(self, turn):
            raise ConnectionError("nobody there")

    for environment, message in (
        (Silent(), r"gave 0 replies to \d+ turns"),
        (Stranger(), r"tokens that are not in \[0, 24\)"),
        (Absent(), "the environment raised ConnectionError: nobody there"),
    ):
        engine = NativeEngine(model, eos_token_ids=EOS)
        with pytest.raises(ReplyError, match=message):
            engine.generate(PROMPTS, group_size=2, max_new_tokens=8, environment=environment)
        assert not len(engine.cache.branches())


def test_rollouts_with_turns_are_saved_and_selected(model, tmp_path):
    rollouts, _ = generate(model)
    rollouts.save(tmp_path / "some")
    again = rollouts.load(tmp_path / "some")[0].select(torch.tensor([3, 0]))
    for name in ("mask", *TURNS):
        parts = getattr(rollouts, name).split(rollouts.lengths.tolist())
        assert torch.equal(getattr(again, name), torch.cat([parts[3], parts[0]]))


def test_returns_of_turns(model):
    rollouts, _ = generate(model)
    rewards = torch.randn(len(rollouts.group_ids), generator=torch.Generator().manual_seed(1))
    rows = turn_rows(rollouts, rewards)
    lengths, at, row = rollouts.lengths.tolist(), 0, 0
    per = [x.split(lengths) for x in (rollouts.turns, rollouts.agents, rollouts.turn_rewards)]
    for i, mask in enumerate(rollouts.mask.split(lengths)):
        turns, agents, paid = (x[i] for x in per)
        outcome = rewards[i] - paid.sum()
        for k in range(int(turns.max()) + 1):
            who = int(agents[turns == k][0])
            later = (turns >= k) & (agents == who)
            assert rows.returns[row] == pytest.approx(float(outcome + paid[later].sum()), abs=1e-5)
            assert (int(rows.group_ids[row]), int(rows.agent_ids[row])) == (
                int(rollouts.group_ids[i]), who,
            )  # fmt: skip
            drawn = int((mask & (turns == k)).sum())
            assert rows.of_token[at : at + drawn].tolist() == [row] * drawn
            at, row = at + drawn, row + 1
    assert (at, row) == (len(rows.of_token), len(rows.returns))
    with pytest.raises(ValueError, match="expected rollouts of a call with an environment"):
        turn_rows(replace(rollouts, turns=None), rewards)


def test_calculate():
    for text in ("7", "12+7*2", "-3+4*5", "2*3*4-50", "007-8"):
        assert calculate(text) == eval(text.replace("007", "7"))


def test_the_calculator_answers_calls():
    tokenizer = CharTokenizer("0123456789=+-*,:")
    tool = Calculator(tokenizer, penalty=0.25, error=":")

    def said(text, end=False, begin=0):
        response = tokenizer.encode(text) + [1] * end
        (reply,) = tool.reply([Turn(0, [5], response, begin, 0, 0)])
        return reply._replace(tokens=tokenizer.decode(list(reply.tokens)))

    assert said("12+7*2=") == Reply("26")
    assert said("3-9=") == Reply("-6")
    assert said("3-9=-6-1=", begin=4).tokens == "-7"
    assert said("3-9=-6", end=True).done
    for broken in ("3+=", "=", "+=", "3:=", "3++4=", "*2="):
        assert said(broken) == Reply(":", -0.25)
    assert Calculator(tokenizer).reply([Turn(0, [5], tokenizer.encode("+="), 0, 0, 0)]) == [Reply()]
    assert tool.turn_ends == set(tokenizer.encode("="))


def test_replies_in_a_demonstration():
    tokenizer = CharTokenizer("0123456789=+-*,:")
    tool = Calculator(tokenizer)
    response = [*tokenizer.encode("3+9=124*2=8"), 1]
    said = replies_in(tool, 0, [5], response, [1], 18)
    shown = "".join("x" if x else "." for x in said)
    assert shown == "....xx....x."
    response = [*tokenizer.encode("3+9=114*2=9"), 1]  # not what the tool says
    assert not any(replies_in(tool, 0, [5], response, [1], 18))
