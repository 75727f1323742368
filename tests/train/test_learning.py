"""The reward teaches, and shuffled rewards do not; any Hugging Face folder will do."""

import json
import shutil

import pytest
import torch
from conftest import metrics, read
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from rlkern.train import cli

SORT_FOUR = {
    "data.size": "4",
    "data.train_size": "4000",
    "warmup.steps": "60",
    "warmup.batch_size": "128",
    "rollout.max_new_tokens": "5",
    "run.steps": "15",
    "optim.schedule": "constant",
    "eval.every": "0",
    "eval.k": "[]",
    "eval.min_accuracy": "0.8",
    "checkpoint.every": "60",
    "log.tensorboard": "false",
}


def greedy(folder):
    return [r["eval/greedy"] for r in metrics(folder) if r["phase"] == "eval"]


def test_the_reward_teaches_and_the_null_control_does_not(tmp_path):
    real, null = tmp_path / "real", tmp_path / "null"
    settings = [word for key, value in SORT_FOUR.items() for word in (f"--{key}", value)]
    assert cli.main(["demo", *settings, "--run.dir", str(real)]) == 0
    before, after = greedy(real)
    assert before <= 0.1
    assert after > 0.8
    # The control starts from the same warm-up.
    warm = real / "checkpoints" / "step_000060"
    shutil.copytree(warm, null / "checkpoints" / warm.name)
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(real / name, null / name)
    words = ["--resume", str(null), "--null", "--run.dir", str(null)]
    assert cli.main(words) == 0
    assert greedy(null)[0] == before
    assert greedy(null)[1] < 0.05
    assert all(r["signal/groups"] > 0 for r in metrics(null) if r["phase"] == "rl")


@pytest.fixture
def folder(tmp_path):
    """A Llama with a word tokenizer and a chat template, as a user would bring one."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "</s>", "<user>", "<assistant>", *map(str, range(10)), "what", "is", "plus"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="is"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            eos_token_id=1,
            bos_token_id=None,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [{"prompt": f"what is {a}", "answer": a} for a in range(8)]
    lines += [{"prompt": [{"role": "user", "content": "1 plus 2 plus 3"}], "answer": 6}] * 4
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "recipe.toml").write_text(
        f"""
reward = "numeric"
[run]
steps = 3
dir = "{tmp_path}/run"
[model]
path = "{tmp_path}/model"
[data]
train = "{tmp_path}/data.jsonl"
heldout_size = 3
[rollout]
prompts = 4
group_size = 8
max_new_tokens = 5
[checkpoint]
every = 1
"""
    )
    return tmp_path


def test_a_model_and_data_of_the_users_own(folder):
    assert cli.main([str(folder / "recipe.toml")]) == 0
    records = [r for r in metrics(folder / "run") if r["phase"] == "rl"]
    assert [r["step"] for r in records] == [1, 2, 3]
    assert all(r["logprob_gap/max"] < 1e-4 for r in records)
    assert records[0]["policy/ratio_max"] == pytest.approx(1, abs=0.2)
    assert len(read(folder / "run" / "samples.jsonl")) == 3
    # A checkpoint is a Hugging Face folder, tokenizer included.
    saved = folder / "run" / "checkpoints" / "step_000003" / "model"
    words = [str(folder / "recipe.toml"), "--model.path", str(saved)]
    assert cli.main([*words, "--run.dir", str(folder / "second")]) == 0


def test_chat_template_reaches_the_prompt(folder, capsys):
    from transformers import AutoTokenizer

    from rlkern.train.model import encode_prompt

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    through = encode_prompt(tokenizer, "what is 3", "auto")
    assert tokenizer.decode(through) == "<user> what is 3 <assistant>"
    messages = [{"role": "user", "content": "what is 3"}]
    assert encode_prompt(tokenizer, messages, "on") == through
    assert tokenizer.decode(encode_prompt(tokenizer, "what is 3", "off")) == "what is 3"
    assert cli.main([str(folder / "recipe.toml"), "--data.chat_template", "off"]) == 2
    assert "chat messages need a chat template" in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded(folder, capsys):
    words = [str(folder / "recipe.toml"), "--model.path", str(folder / "nothing")]
    assert cli.main(words) == 2
    assert "model.path: " in capsys.readouterr().err
    assert cli.main(["--run.device", "nodevice", "--run.dir", str(folder / "x")]) == 2
    assert "run.device: 'nodevice' cannot be used" in capsys.readouterr().err
