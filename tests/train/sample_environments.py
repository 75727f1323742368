"""Environments that the tests name as `sample_environments:<name>`."""

from rlkern.rollout import Environment, Reply


class Players(Environment):
    """Two players say a digit each in turn, and what the other hears is the digit twice; the higher
    one takes a point from the lower one."""

    first_agent = 1

    def __init__(self, tokenizer, max_turns=3):
        self.tokenizer, self.max_turns = tokenizer, max_turns
        self.turn_ends = tokenizer.encode("0123456789")

    def reply(self, turns):
        return [self.one(turn) for turn in turns]

    def one(self, turn):
        assert self.tasks[turn.number].prompt == self.tokenizer.decode(turn.prompt)
        said = turn.response[turn.begin :]
        if said[-1] not in self.turn_ends:
            return Reply(done=True, reward=-1.0)
        before = turn.response[turn.begin - 1] if turn.begin else said[-1]
        point = float((said[-1] > before) - (said[-1] < before))
        other = 1 - turn.agent
        return Reply([said[-1]] * 2, point, agent=other, others={other: -point})


class Broken(Players):
    def reply(self, turns):
        raise ConnectionError("no tool at this address")
