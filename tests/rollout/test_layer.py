"""The decoder's own ops: a layer in one call, and linear layers of few rows."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from rlkern.kv import TreeKVCache
from rlkern.ops.rms_norm import reference
from rlkern.rollout import layer
from rlkern.rollout.decoder import Attend, Decoder, Layer
from rlkern.testing.numerics import assert_within_budget

SHAPE = {
    "vocab_size": 24,
    "hidden_size": 264,
    "intermediate_size": 300,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
}
needs_native = pytest.mark.skipif(not layer.NATIVE, reason="_C_cpu is not built")


def case(kind, dtype, group=3):
    """A model's only layer, and a step of `group` branches of each of two prompts."""
    torch.manual_seed(0)
    options = {"head_dim": 44} if kind is Qwen3Config else {}
    model = AutoModelForCausalLM.from_config(kind(**SHAPE, **options)).eval().to(dtype)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.1)
    cache = TreeKVCache(num_layers=1, num_kv_heads=2, head_dim=44, num_pages=40, page_size=4,
                        dtype=dtype)  # fmt: skip
    cache.k.normal_()
    cache.v.normal_()
    roots = cache.new(list(range(16)), torch.tensor([0, 5, 16]))
    cache.append_slots(roots)
    branches = cache.fork(roots, group)
    cache.append(branches, torch.arange(len(branches)))
    work = cache.append_slots(branches)
    decoder = Decoder(model, 40)
    x = torch.randn(len(branches), 264).to(dtype)
    rope = decoder.cos[work.positions.long()], decoder.sin[work.positions.long()]
    return decoder.layers[0], x, rope, cache, work, cache.plan(branches)


def arguments(one, x, rope, cache, work, plan):
    return x, *one.weights, *rope, work.slots, cache.k[0], cache.v[0], *plan, one.scale


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Qwen3Config])
@torch.no_grad()
def test_a_layer_in_one_call_is_the_layer(kind, dtype):
    one, x, rope, cache, work, plan = case(kind, dtype)
    before = cache.k.clone(), cache.v.clone()
    got = torch.ops.rlkern.decoder_layer(*arguments(one, x, rope, cache, work, plan))
    written = cache.k.clone(), cache.v.clone()
    cache.k.copy_(before[0])
    cache.v.copy_(before[1])
    want = layer.forward(*arguments(one, x, rope, cache, work, plan))
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    torch.testing.assert_close(got, want, **close)
    for ours, theirs, old in zip(written, (cache.k, cache.v), before, strict=True):
        torch.testing.assert_close(ours, theirs, **close)
        assert not torch.equal(ours, old)


@needs_native
@torch.no_grad()
def test_a_layer_passes_opcheck():
    one, x, rope, cache, work, plan = case(Qwen2Config, torch.float32)
    checks = ("test_schema", "test_faketensor")
    args = tuple(a.detach() if isinstance(a, torch.Tensor) else a
                 for a in arguments(one, x, rope, cache, work, plan))  # fmt: skip
    torch.library.opcheck(torch.ops.rlkern.decoder_layer.default, args, test_utils=checks)
    args = torch.randn(3, 264), torch.randn(8, 264), torch.randn(8)
    torch.library.opcheck(torch.ops.rlkern.decoder_linear.default, args, test_utils=checks)


@torch.no_grad()
def test_who_computes_a_layer():
    one = case(Qwen3Config, torch.float32)[0]
    assert (one.weights is not None) == layer.NATIVE
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    # a scorer wants the bits of torch
    assert Decoder(model, 40, exact=True).layers[0].weights is None

    class Quantized(torch.nn.Linear):
        pass

    module = model.model.layers[0]
    module.mlp.up_proj = Quantized(264, 300, bias=False)
    assert Layer(module, reference.forward, native=True).weights is None


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("depth", [128, 300, 1024])
def test_few_rows_are_the_product_and_do_not_know_each_other(depth, biased):
    torch.manual_seed(0)
    x, weight = torch.randn(70, depth), torch.randn(36, depth)
    bias = torch.randn(36) if biased else None
    run = torch.ops.rlkern.decoder_linear
    truth = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    few = run(x[:64], weight, bias)
    for rows in (1, 2, 5, 8, 13, 64, 70):
        got, plain = run(x[:rows], weight, bias), F.linear(x[:rows], weight, bias)
        assert_within_budget(f"{rows} rows", got, truth[:rows], plain)
        if layer.NATIVE and torch.backends.cpu.get_cpu_capability() == "AVX512" and rows <= 64:
            assert torch.equal(got, few[:rows]), rows
    # a row of the weight ends where the next one begins
    weight[7] = float("nan")
    assert run(x[:5], weight, bias).isnan().nonzero()[:, 1].tolist() == [7] * 5
    assert run(x[:5], weight[:35].contiguous(), None).shape == (5, 35)
    assert run(x[:0], weight, bias).shape == (0, 36)
    assert run(x[:3].bfloat16(), weight.bfloat16(), None).dtype == torch.bfloat16


def test_attention_is_written_along_a_plan():
    """The decoder's calls and the model's own see the same keys."""
    *_, cache, work, plan = case(LlamaConfig, torch.float32)
    attend = Attend([(cache.k[0], cache.v[0])], work, plan)
    q, k, v = torch.randn(6, 6, 44), torch.randn(6, 2, 44), torch.randn(6, 2, 44)
    assert attend(0, q, k, v, 0.2, None).shape == q.shape
    assert torch.equal(cache.k[0].flatten(0, 1)[work.slots.long()], k)
