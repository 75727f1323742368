"""Tests against vLLM's CPU build, in a venv of their own: `make test-vllm`."""

import os

# before vLLM is imported: nothing here may go to a network
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

import pytest
from tiny import KINDS, engine_of, tiny


@pytest.fixture(scope="session", params=KINDS)
def pair(request):
    """A model, and an engine that samples from a copy of it."""
    model = tiny(**KINDS[request.param])
    return model, engine_of(model)
