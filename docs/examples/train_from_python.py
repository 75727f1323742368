"""A run of the trainer from a program of yours, with a reward of yours.

Two steps, to show how; `python -m rlkern.train` is the run that learns.
"""

import json
import sys
import tempfile
from pathlib import Path

from rlkern.train.cli import main

REWARD = '''
def sorted_digits(prompt, completion, answer):
    """The share of digits in their places."""
    return sum(a == b for a, b in zip(completion, answer)) / len(answer)
'''

with tempfile.TemporaryDirectory() as folder:
    Path(folder, "my_reward.py").write_text(REWARD)
    sys.path.insert(0, folder)
    settings = {
        "reward": "my_reward:sorted_digits",
        "run.dir": f"{folder}/run",
        "run.steps": 2,
        "warmup.steps": 5,
        "rollout.prompts": 4,
        "rollout.group_size": 4,
        "eval.max_prompts": 16,
        "eval.min_accuracy": 0.0,
    }
    code = main(["demo", *(word for k, v in settings.items() for word in (f"--{k}", str(v)))])
    assert code == 0
    lines = Path(folder, "run/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if "reward/mean" in record]
    print("reward of each step:", *(f"{record['reward/mean']:.2f}" for record in steps))
    assert len(steps) == 2
