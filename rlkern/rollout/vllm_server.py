"""vLLM as a server: in processes, on devices or on a machine of its own.

    with VllmServer(model, eos_token_ids=[1]) as engine:       # starts `vllm serve` and ends it
        rollouts = engine.generate(prompts, group_size=16, max_new_tokens=64, generator=generator)
        engine.update_weights(dict(model.named_parameters()))

    VllmServer(folder, eos_token_ids=[1], url="http://node7:8000")     # one that runs already

Weights travel as a checkpoint in a folder that both sides see: written whole, then reloaded by
vLLM in place, between requests. vLLM need not be importable where `url` is given.
"""

import contextlib
import copy
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from rlkern.rollout.engine import Rollouts
from rlkern.rollout.environment import Environment
from rlkern.rollout.run import Kept
from rlkern.rollout.strategies.base import Strategy
from rlkern.rollout.vllm import (
    check_weights,
    draw_seeds,
    pack_tied_head,
    packed,
    sampling_arguments,
    shapes_of,
)

# what `vllm serve` of a server started elsewhere needs too, with VLLM_SERVER_DEV_MODE=1
FLAGS = {
    "runner": "generate",
    "skip-tokenizer-init": True,
    "enable-scale-out": True,  # tokens in, tokens out
    "enable-prompt-tokens-details": True,
    "generation-config": "vllm",  # none of a checkpoint's sampling defaults
    "logprobs-mode": "processed_logprobs",  # of the distribution that is sampled from
    "worker-extension-cls": "rlkern.rollout.vllm_server.Worker",
}
TAIL = 2000  # characters of a failed server's log


class Worker:
    """What each of the server's workers can do besides."""

    def reload_from(self, folder: str) -> None:
        runner = self.model_runner
        runner.reload_weights(weights_path=folder)
        if runner.device.type == "cpu":
            pack_tied_head(runner.get_model())


class VllmServer:
    """Group sampling by `vllm serve`, over HTTP.

    Args:
        model: of Hugging Face, whose weights are written to `folder`; or the folder of a checkpoint
            that the server was or will be started with.
        eos_token_ids: a sequence ends with any of these, and with nothing else.
        max_sequences: sequences decoded at once; the others wait.
        url: of a server that runs already, with VLLM_SERVER_DEV_MODE=1 and the options of FLAGS;
            "": one is started here, and ended by `close`.
        folder: where weights are handed over; the server must see it under the same path. Default:
            a temporary one, in memory where /dev/shm is.
        timeout: seconds for the start, and for a call.
        options: of `vllm serve`, such as tensor_parallel_size=2 or kv_cache_memory_bytes.

    Raises:
        RuntimeError: the server did not start, ended, or answered with an error.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        *,
        eos_token_ids: Sequence[int],
        max_sequences: int = 256,
        url: str = "",
        folder: str | Path | None = None,
        timeout: float = 600.0,
        **options: Any,
    ) -> None:
        if not len(eos_token_ids):
            raise ValueError("VllmServer: expected at least one end token id, got none")
        self.eos, self.timeout, self.version = [int(i) for i in eos_token_ids], timeout, 0
        self.stats: dict[str, float] = {}  # of the last call, see generate
        self.kept = Kept()  # stays empty: nothing goes on in the next call
        shm = Path("/dev/shm")
        self.made = None
        if folder is None:
            self.made = tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None)
            folder = self.made.name
        self.folder = Path(folder)
        if isinstance(model, PreTrainedModel):
            weights = dict(model.named_parameters())
            self.dtype, self.ties = model.dtype, _ties(model, weights)
            self.shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
            self.config, source = copy.deepcopy(model.config), self.folder
            self.config.architectures = [type(model).__name__]
            self.config.save_pretrained(self.folder)
            options = {"dtype": str(model.dtype).removeprefix("torch.")} | options
            self._write(weights)
        else:
            source, self.ties = Path(model), set()
            self.shapes, self.config = shapes_of(source), AutoConfig.from_pretrained(source)
            self.dtype = self.config.dtype or torch.bfloat16
            self.config.save_pretrained(self.folder)
        self.server, self.url = None, url.rstrip("/")
        if not self.url:
            self._start(source, {"max-num-seqs": max_sequences} | options)
        served = self._call("/v1/models")["data"][0]
        self.limit = served["max_model_len"]
        if url and isinstance(model, PreTrainedModel):
            self.update_weights(weights, 0)  # the server may hold others

    def _start(self, source: Path, options: dict[str, Any]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        # `vllm serve` by its older name: the CPU build's package has no metadata for the newer one
        words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(source)]
        words += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
        for name, value in (FLAGS | options).items():
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                words.append(flag if value else flag.replace("--", "--no-", 1))
            else:
                told = json.dumps(value) if isinstance(value, dict) else str(value)
                words += [flag, told]
        # vLLM compiles one function, of ranks that nobody asks for: 20 s on a CPU
        env = {"TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "WARNING"} | os.environ
        env |= {"VLLM_SERVER_DEV_MODE": "1"}
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.server = subprocess.Popen(
            words, env=env, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._finalizer = weakref.finalize(self, _end, self.server)
        end = time.monotonic() + self.timeout
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health"):
                return
            if self.server.poll() is not None or time.monotonic() > end:
                _end(self.server)
                raise RuntimeError(f"VllmServer: `vllm serve` did not start: {self._tail()}")
            time.sleep(0.2)

    def _tail(self) -> str:
        self.log.seek(0)
        return self.log.read()[-TAIL:]

    def _call(self, path: str, body: dict | None = None, post: bool = False) -> dict:
        data = json.dumps(body).encode() if body is not None else b"" if post else None
        asked = urllib.request.Request(self.url + path, data)
        asked.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(asked, timeout=self.timeout) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            told = error.read().decode(errors="replace")[:TAIL]
            raise RuntimeError(f"VllmServer: {path}: {error.code} {told}") from error
        except OSError as error:
            gone = self.server is not None and self.server.poll() is not None
            told = f"the server has ended: {self._tail()}" if gone else error
            raise RuntimeError(f"VllmServer: {self.url}{path}: {told}") from error

    def _write(self, weights: Mapping[str, Tensor]) -> None:
        tensors = {
            name: weights[name].detach().to("cpu", self.dtype).contiguous() for name in self.shapes
        }
        part = self.folder / ".part"
        save_file(tensors, part, metadata={"format": "pt"})
        part.replace(self.folder / "model.safetensors")

    def update_weights(self, weights: Mapping[str, Tensor], version: int | None = None) -> None:
        """Puts new weights in place of the old ones, when the requests before are answered.

        Args:
            weights: all of them, by the names that they have in the model, or in the checkpoint,
                that the engine was made from; on any device, cast to the model's dtype.
            version: of these weights; default: the one after the present one.

        Raises:
            ValueError: a missing, unknown or ill-shaped tensor. The old weights stay then.
        """
        check_weights("VllmServer", weights, self.shapes, self.ties)
        version = self.version + 1 if version is None else version
        self._write(weights)
        self._call("/pause?mode=wait", post=True)
        try:
            self._call("/collective_rpc", {"method": "reload_from", "args": [str(self.folder)]})
            if not self._call("/reset_prefix_cache", post=True)["success"]:
                raise RuntimeError("VllmServer.update_weights: the prefix cache is in use")
            self._call("/update_weight_version", {"new_version": str(version)})
        finally:
            self._call("/resume", post=True)
        self.version = version

    def generate(
        self,
        prompts: list[list[int]],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        greedy: bool = False,
        strategy: Strategy | None = None,
        environment: Environment | None = None,
        generator: torch.Generator | None = None,
    ) -> Rollouts:
        """Samples `group_size` completions of every prompt: as `VllmEngine.generate` does.

        A generator gives each prompt a seed of its own.

        stats: rollout/prefix_cached, the share of prompt tokens that were read from the cache.
        """
        arguments = sampling_arguments(
            "VllmServer",
            prompts,
            [i for i in self.eos if 0 <= i < self.config.get_text_config().vocab_size],
            self.limit,
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            greedy=greedy,
            strategy=strategy,
            environment=environment,
        )
        # greedy samples are one sample: vLLM refuses more
        arguments["n"] = 1 if greedy else group_size

        def ask(prompt: list[int], seed: int | None) -> dict:
            body = {"token_ids": list(prompt), "sampling_params": arguments | {"seed": seed}}
            return self._call("/inference/v1/generate", body)

        with ThreadPoolExecutor(min(64, len(prompts))) as pool:
            answers = list(pool.map(ask, prompts, draw_seeds(generator, len(prompts))))
        read = sum((a["usage"]["prompt_tokens_details"] or {})["cached_tokens"] for a in answers)
        self.stats = {"rollout/prefix_cached": read / sum(map(len, prompts))}
        drawn = []
        for answer in answers:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            for choice in choices * (group_size // len(choices)):
                logprobs = [one["logprob"] for one in choice["logprobs"]["content"]]
                drawn.append((choice["token_ids"], logprobs, choice["finish_reason"] == "length"))
        return packed(prompts, group_size, drawn, self.version, generator)

    def sleep(self, level: int = 1) -> None:
        """Frees the device's memory: of a server started with enable_sleep_mode=True, on a GPU."""
        self._call(f"/sleep?level={level}", post=True)

    def wake(self) -> None:
        """Takes the memory back; after level 2, `update_weights` comes before `generate`."""
        self._call("/wake_up", post=True)

    def close(self) -> None:
        """Ends the server, if this has started it, and removes its folder."""
        if self.server is not None:
            self._finalizer()
        if self.made is not None:
            self.made.cleanup()

    def __enter__(self) -> "VllmServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ties(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> set[str]:
    return dict(model.named_parameters(remove_duplicate=False)).keys() - weights.keys()


def _end(server: subprocess.Popen) -> None:
    """Asks, then kills, with all processes that it has started."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(10)
