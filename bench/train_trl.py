"""`rlkern.train` beside TRL's `GRPOTrainer`: results/<machine>/train_trl.json.

    make .venv-peers/.installed && .venv/bin/python -m bench.train_trl

The same start weights, tokenizer, questions, reward, group size, lengths, learning rates and loss
(token-mean clipped surrogate, 0.2 and 0.28, advantages over the group's deviation), each in a
process of its own with the packages that it is installed with. `vocab` is the size at which the
head is most of the model; `demo` is the demo's second half, from its warmed-up weights. A step is a
batch of rollouts and its updates; its time leaves out start, evaluation and checkpoints. Peak
memory is the process's, and beside it that of a process which only imports the trainer.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from bench.harness import ROOT

PEERS = ROOT / ".venv-peers/bin/python"
BETAS, CLIP = (0.9, 0.95), (0.2, 0.28)


class Case(NamedTuple):
    steps: int
    prompts: int
    group: int
    new: int  # tokens at most
    updates: int
    lr: float
    warmup_steps: int
    share_prefix: bool  # rlkern's: a prompt is computed once for its group, with the same gradients
    seeds: tuple[int, ...]


CASES = {
    "vocab": Case(12, 8, 8, 128, 1, 1e-3, 0, False, (0,)),
    "demo": Case(30, 32, 16, 6, 2, 3e-4, 10, True, (0, 1, 2)),
}
VOCAB = 32_000


def even(prompt: str, completion: str, answer: str) -> float:
    """The share of even words: all groups differ, but 12 steps teach nothing of it."""
    words = completion.split()
    return sum(int(word) % 2 == 0 for word in words) / max(1, len(words))


def exact(prompt: str, completion: str, answer: str) -> float:
    return float(completion.strip() == answer)


REWARDS = {"vocab": even, "demo": exact}


def prepare(name: str, seed: int, folder: Path) -> None:
    """folder/model, as transformers loads it, and folder/train.jsonl."""
    import tokenizers
    import torch
    import transformers

    rng = random.Random(seed)
    if name == "vocab":
        words = ["<pad>", "</s>", *map(str, range(VOCAB - 2))]
        split, decoder = tokenizers.pre_tokenizers.Whitespace(), None
        torch.manual_seed(seed)
        config = transformers.Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=1,
        )
        transformers.Qwen3ForCausalLM(config).save_pretrained(folder / "model")
        draw = lambda: " ".join(str(rng.randrange(VOCAB - 2)) for _ in range(16))  # noqa: E731
        rows = [{"prompt": draw(), "answer": "-"} for _ in range(512)]
    else:
        from rlkern.train.config import find_recipe, load_config
        from rlkern.train.data import load_data
        from rlkern.train.tasks import ALPHABET

        run = [sys.executable, "-m", "rlkern.train", "demo", "--run.steps", "1"]
        run += ["--run.dir", str(folder / "warm"), "--run.seed", str(seed), "--log.tensorboard"]
        run += ["false", "--checkpoint.every", "100", "--eval.max_prompts", "1"]
        subprocess.run([*run, "--eval.min_accuracy", "0"], check=True, stdout=subprocess.DEVNULL)
        shutil.copytree(folder / "warm/checkpoints/step_000100/model", folder / "model")
        (folder / "model/char_tokenizer.json").unlink()
        words = ["<pad>", "</s>", *ALPHABET]
        split = tokenizers.pre_tokenizers.Split("", "isolated")
        decoder = tokenizers.decoders.Fuse()
        cfg = load_config(find_recipe("demo"), {"run.seed": str(seed)})
        rows = [{"prompt": e.prompt, "answer": e.answer} for e in load_data(cfg)[0]]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = split
    if decoder:
        tokenizer.decoder = decoder
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"
    )
    fast.save_pretrained(folder / "model")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_rlkern(name: str, seed: int, folder: Path, out: Path) -> None:
    case = CASES[name]
    settings = {
        "run.dir": folder / "rlkern",
        "run.seed": seed,
        "run.steps": case.steps,
        "model.path": folder / "model",
        "data.task": "",
        "data.train": folder / "train.jsonl",
        "data.heldout_size": 64,
        "reward": f"bench.train_trl:{REWARDS[name].__name__}",
        "warmup.steps": 0,
        "rollout.prompts": case.prompts,
        "rollout.group_size": case.group,
        "rollout.max_new_tokens": case.new,
        "algorithm.objective": "dapo",
        "algorithm.options": f"{{ epsilon_low = {CLIP[0]}, epsilon_high = {CLIP[1]} }}",
        "optim.lr": case.lr,
        "optim.warmup_steps": case.warmup_steps,
        "optim.updates": case.updates,
        "optim.share_prefix": str(case.share_prefix).lower(),
        "eval.every": 0,
        "eval.max_prompts": 1,
        "eval.min_accuracy": 0,
        "checkpoint.every": 0,
        "log.tensorboard": "false",
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    from rlkern.train import cli

    if code := cli.main(["demo", *words]):
        raise SystemExit(code)
    lines = (folder / "rlkern/metrics.jsonl").read_text().splitlines()
    steps = [r for r in map(json.loads, lines) if r["phase"] == "rl"]
    out.write_text(
        json.dumps(
            {
                "seconds": [r["time/step"] for r in steps],
                "rollout": [r["time/rollout"] for r in steps],
                "tokens": [r["completion/tokens"] for r in steps],
                "rewards": [r["reward/mean"] for r in steps],
            }
        )
    )


def run_trl(name: str, seed: int, folder: Path, out: Path) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "0"}
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    case, reward = CASES[name], REWARDS[name]
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    steps: dict[str, list[float]] = {"seconds": [], "tokens": [], "rewards": []}

    def judge(prompts, completions, answer, completion_ids, **_):
        rewards = [reward(*row) for row in zip(prompts, completions, answer)]
        steps["tokens"].append(sum(map(len, completion_ids)))
        steps["rewards"].append(statistics.fmean(rewards))
        return rewards

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            steps["seconds"].append(time.perf_counter() - self.start)

    sequences = case.prompts * case.group
    args = GRPOConfig(
        output_dir=str(folder / "trl"),
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=sequences // case.updates,
        steps_per_generation=case.updates,
        num_generations=case.group,
        max_completion_length=case.new,
        max_steps=case.steps * case.updates,
        learning_rate=case.lr,
        warmup_steps=case.warmup_steps * case.updates,
        lr_scheduler_type="linear",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=1.0,
        epsilon=CLIP[0],
        epsilon_high=CLIP[1],
        loss_type="dapo",
        beta=0.0,
        temperature=1.0,
        logging_steps=case.updates,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=judge,
        args=args,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Clock()],
    )
    trainer.train()
    # an optimiser step each; rollouts are in the first of a batch
    parts = [steps["seconds"][i :: case.updates] for i in range(case.updates)]
    steps["seconds"] = [sum(part) for part in zip(*parts)]
    out.write_text(json.dumps(steps))


SIDES = {"rlkern": run_rlkern, "trl": run_trl}
IMPORTS = {"rlkern": "import rlkern.train.loop", "trl": "from trl import GRPOTrainer"}


def child(words: list[str], python: Path | str) -> float:
    """Runs it -> its peak memory, MiB."""
    done = subprocess.Popen([str(python), *words], stdout=subprocess.DEVNULL, cwd=ROOT)
    _, status, usage = os.wait4(done.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)}: exit status {status}")
    return usage.ru_maxrss / 1024


def measure(name: str, seed: int) -> dict:
    row: dict = {"case": name, "seed": seed}
    with tempfile.TemporaryDirectory() as there:
        folder = Path(there)
        prepare(name, seed, folder)
        for side in SIDES:
            python, out = PEERS if side == "trl" else sys.executable, folder / f"{side}.json"
            words = ["-m", "bench.train_trl", "--child", side, name, str(seed), there, str(out)]
            peak = child(words, python)
            imports = child(["-c", IMPORTS[side]], python)
            got = json.loads(out.read_text())
            rate = sum(got["tokens"]) / sum(got["seconds"])
            row[side] = {
                "tokens_per_second": round(rate, 1),
                "peak_mib": round(peak),
                "imports_mib": round(imports),
                "last_rewards": round(statistics.fmean(got["rewards"][-5:]), 4),
                **{key: [round(x, 4) for x in values] for key, values in got.items()},
            }
    row["speedup"] = row["rlkern"]["tokens_per_second"] / row["trl"]["tokens_per_second"]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        side, name, seed, folder, out = args.child
        SIDES[side](name, int(seed), Path(folder), Path(out))
        return 0
    from bench.machine import machine

    if not PEERS.exists():
        raise SystemExit("TRL is not installed: make .venv-peers/.installed")
    info = machine()
    path = ROOT / "bench/results" / info["name"] / "train_trl.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in rows if row["case"] not in args.cases]  # the others are kept
    for name in args.cases:
        for seed in CASES[name].seeds:
            rows.append(measure(name, seed))
            told = {side: rows[-1][side]["tokens_per_second"] for side in SIDES}
            print(name, seed, told, f"{rows[-1]['speedup']:.2f}x", flush=True)
    versions = subprocess.run(
        [PEERS, "-c", "import trl, transformers as t; print(trl.__version__, t.__version__)"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()[-2:]
    info["load_at_end"] = [round(x, 2) for x in os.getloadavg()]
    saved = {
        "kind": "train_trl",
        "machine_info": info,
        "command": "python -m bench.train_trl",
        "trl": versions[0],
        "trl_transformers": versions[1],
        "cases": {name: case._asdict() for name, case in CASES.items()},
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(saved, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
