"""Questions for training and the held-out ones, from a JSONL file or a built-in task."""

import json
import random
from pathlib import Path

from rlkern.train import TrainError
from rlkern.train.config import Config
from rlkern.train.tasks import TASKS, Example

# Draws without a new question before a generated task is called exhausted.
PATIENCE = 20_000


def load_data(cfg: Config) -> tuple[list[Example], list[Example]]:
    """-> training and held-out examples; no prompt is in both."""
    data = cfg.data
    train = generate(cfg) if data.task else read_jsonl(data.train)
    if data.heldout:
        heldout = read_jsonl(data.heldout)
    else:
        if len(train) <= data.heldout_size:
            raise TrainError(
                f"data.heldout_size = {data.heldout_size} leaves nothing to train on: there are "
                f"{len(train)} examples"
            )
        random.Random(f"split/{cfg.run.seed}").shuffle(train)
        heldout, train = train[: data.heldout_size], train[data.heldout_size :]
    seen = {json.dumps(example.prompt) for example in heldout}
    train = [example for example in train if json.dumps(example.prompt) not in seen]
    if not train:
        raise TrainError("data: every training prompt is also a held-out prompt")
    if cfg.warmup.steps and any(example.demonstrate is None for example in train):
        raise TrainError("warmup.steps > 0 needs a `demonstration` in every line of data.train")
    return train, heldout


def read_jsonl(path: str) -> list[Example]:
    """One example a line; a bad line is named by file and number."""
    try:
        # Not splitlines(): a JSON string may hold U+2028 as it is.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"data: {path} cannot be read: {error}") from error
    examples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise TrainError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise TrainError(f"{path}:{number}: expected an object, got {line[:60]}")
        for key in ("prompt", "answer"):
            if record.get(key) in (None, "", []):
                raise TrainError(f"{path}:{number}: the field {key!r} is missing or empty")
        if not isinstance(record["prompt"], str | list):
            raise TrainError(f"{path}:{number}: expected prompt as a string or chat messages")
        text = record.get("demonstration")
        show = None if text is None else lambda rng, text=str(text): text
        examples.append(Example(record["prompt"], record["answer"], show))
    if not examples:
        raise TrainError(f"{path}: the data set is empty")
    return examples


def generate(cfg: Config) -> list[Example]:
    """Distinct questions of a built-in task: as many as asked for, or as there are."""
    data, found, misses = cfg.data, {}, 0
    if data.task in ("sort", "calculation") and data.size > 10:
        raise TrainError(f"data.size = {data.size}: there are only 10 distinct digits")
    rng = random.Random(f"task/{cfg.run.seed}")
    while len(found) < data.heldout_size + data.train_size and misses < PATIENCE:
        example = TASKS[data.task](rng, data.size)
        misses = misses + 1 if example.prompt in found else 0
        found.setdefault(example.prompt, example)
    return list(found.values())


def batch_at(examples: list[Example], cursor: int, size: int, seed: int) -> list[Example]:
    """`size` examples from position `cursor` of an endless stream, shuffled anew every epoch."""
    batch: list[Example] = []
    while len(batch) < size:
        epoch, start = divmod(cursor + len(batch), len(examples))
        order = random.Random(f"data/{seed}/{epoch}").sample(range(len(examples)), len(examples))
        batch += [examples[i] for i in order[start : start + size - len(batch)]]
    return batch
