"""A run so small that it takes a second, with everything switched on."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from rlkern.train import checkpoint as ckpt
from rlkern.train import cli

sys.path.insert(0, str(Path(__file__).parent))

TINY = {
    "model.layers": "1",
    "model.hidden_size": "32",
    "model.intermediate_size": "64",
    "model.heads": "2",
    "model.kv_heads": "2",
    "data.size": "3",
    "data.train_size": "200",
    "data.heldout_size": "20",
    "reward": "sample_rewards:distinct",
    "warmup.steps": "4",
    "warmup.batch_size": "16",
    "run.steps": "6",
    "run.threads": "1",
    "rollout.prompts": "4",
    "rollout.group_size": "4",
    "rollout.max_new_tokens": "4",
    "rollout.save": "true",
    "optim.warmup_steps": "2",
    "optim.lr": "3e-3",
    "eval.every": "3",
    "eval.samples": "4",
    "eval.k": "[1, 4]",
    "eval.min_accuracy": "0",
    "checkpoint.every": "2",
    "checkpoint.keep": "100",
    "log.tensorboard": "false",
}


def arguments(folder: Path, **changes: object) -> list[str]:
    """Command-line words of a tiny run in `folder`; section__key=value changes a setting."""
    settings = TINY | {"run.dir": str(folder)}
    settings |= {key.replace("__", "."): str(value) for key, value in changes.items()}
    return [word for key, value in settings.items() for word in (f"--{key}", value)]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(folder: Path) -> list[dict]:
    """The records of a run without seconds and memory, which no two runs share."""
    return [
        {k: v for k, v in record.items() if not k.startswith(("time/", "memory/"))}
        for record in read(folder / "metrics.jsonl")
    ]


def cut(source: Path, folder: Path, step: int) -> Path:
    """A copy of a run as it was when it was killed after writing checkpoint `step`."""
    shutil.copytree(source, folder)
    for path in ckpt.list_checkpoints(folder / "checkpoints"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete tiny run: copy it before changing anything."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    assert cli.main(arguments(folder, log__tensorboard="true")) == 0
    return folder
