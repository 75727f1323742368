"""Adapters: peft's, in the model itself; whole weights with them merged in for all who sample."""

import copy
import sys

import pytest
import torch
from conftest import arguments, cut, metrics
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlkern.rollout.weights import dense_weights
from rlkern.train import TrainError, cli
from rlkern.train.config import load_config
from rlkern.train.model import add_adapters, load_model

peft = pytest.importorskip("peft")

LORA = {"lora__rank": 4, "optim__lr": "3e-2"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    assert cli.main(arguments(folder, **LORA)) == 0
    return folder


def test_the_adapters_learn_and_nothing_else_moves(run):
    records = [r for r in metrics(run) if r["phase"] == "rl"]
    assert all(r["grad_norm"] > 0 and r["logprob_gap/max"] < 1e-4 for r in records)
    assert records[-1]["entropy"] != records[0]["entropy"]
    base = load_model(load_config(run / "config.json", {}))[0].state_dict()
    merged = load_file(run / "checkpoints/step_000010/model/model.safetensors")
    moved = {name for name, tensor in merged.items() if not torch.equal(tensor, base[name])}
    assert moved == {name for name in base if "_proj" in name}


def test_resume_continues_bit_for_bit(run, tmp_path):
    folder = cut(run, tmp_path / "run", 6)
    assert cli.main(["--resume", str(folder)]) == 0
    assert metrics(folder) == metrics(run)
    name = "checkpoints/step_000010/adapter/adapter_model.safetensors"
    one, other = load_file(run / name), load_file(folder / name)
    assert all(torch.equal(one[key], other[key]) for key in one)


@torch.no_grad()
def test_the_saved_adapters_are_those_of_peft(run):
    """PeftModel on the weights that the run began with = the merged folder."""
    last = run / "checkpoints/step_000010"
    model = peft.PeftModel.from_pretrained(
        load_model(load_config(run / "config.json", {}))[0], last / "adapter"
    ).eval()
    merged = AutoModelForCausalLM.from_pretrained(last / "model").eval()
    ids = torch.arange(2, 14)[None]
    torch.testing.assert_close(model(ids).logits, merged(ids).logits)


def test_the_reference_is_the_model_without_adapters(tmp_path):
    changes = {"algorithm__options__kl_coef": 0.1, "warmup__steps": 0}
    assert cli.main(arguments(tmp_path / "run", **LORA | changes)) == 0
    kl = [r["policy/kl"] for r in metrics(tmp_path / "run") if r["phase"] == "rl"]
    assert kl[0] < kl[-1]
    assert not (tmp_path / "run" / "reference").exists()


@torch.no_grad()
def test_dense_weights_make_the_same_function(run):
    cfg = load_config(run / "config.json", {})
    model = load_model(cfg)[0].eval()
    plain = copy.deepcopy(model)
    add_adapters(model, cfg, run / "checkpoints/step_000010/adapter")
    found = dict(dense_weights(model))
    assert found.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(found)
    ids = torch.arange(2, 14)[None]
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora.targets": '["lm_head"]'}, "linear layers other than the head, .* got lm_head"),
        ({"lora.targets": '["embed_tokens"]'}, "got model.embed_tokens"),
        ({"lora.targets": '["nope"]'}, "lora.targets: Target modules .*nope.* not found"),
        ({"precision": "fp8-unified"}, "both replace the linear layers"),
        ({"algorithm.options.kl_coef": "0.1"}, "reference of a KL term would lack the warm-up"),
    ],
)
def test_what_is_refused(run, changes, told):
    def add():
        cfg = load_config(run / "config.json", changes)
        add_adapters(load_model(cfg)[0], cfg, None)

    with pytest.raises(TrainError, match=told):
        add()


def test_without_peft(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    cfg = load_config(run / "config.json", {})
    with pytest.raises(TrainError, match=r"needs peft: pip install 'rlkern\[lora\]'"):
        add_adapters(load_model(cfg)[0], cfg, None)
