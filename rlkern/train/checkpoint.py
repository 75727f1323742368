"""Checkpoints that are either whole or absent.

One is written to a hidden folder, synced, listed with sizes and CRCs in `manifest.json`, and
renamed into place. Its `model/` is an ordinary Hugging Face folder, good for `model.path`. Tensors
are safetensors and the rest is JSON: loading one runs no code. Every tensor is whole, however many
processes share it: the first one gathers and writes them, and each cuts its part where it loads.
"""

import json
import os
import random
import shutil
import zlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlkern._ranks import cut_like, rank, whole
from rlkern.rollout import Rollouts
from rlkern.train import TrainError

MANIFEST, TRAINER, STATE = "manifest.json", "trainer.safetensors", "state.json"
ADAPTER = "adapter"


def save_checkpoint(
    folder: Path, run: Any, state: dict[str, Any], ahead: dict[int, Rollouts]
) -> None:
    """Writes `folder`/step_<step> and drops older ones than asked for; a failure drops nothing.

    run: the Trainer. Its policy has the adapters merged in; they are saved beside it, too, as peft
    does.
    """
    step, adapters = run.step, run.adapters
    target, part = folder / f"step_{step:06d}", folder / f".part_{step:06d}"
    lora = adapters.named_parameters() if adapters else ()
    lora, tensors = _held((n, p) for n, p in lora if p.requires_grad), _tensors(run.optimizer)
    if rank() > 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".part_*"):  # of a run that was killed while writing
            shutil.rmtree(leftover)
        part.mkdir()
        run.policy.save_pretrained(part / "model")
        run.tokenizer.save_pretrained(part / "model")
        save_file(tensors, part / TRAINER)
        if lora:
            how = {"state_dict": lora, "save_embedding_layers": False}
            adapters.save_pretrained(part / ADAPTER, **how)
        for number, rollouts in ahead.items():
            rollouts.save(rollouts_of(part, number))
        (part / STATE).write_text(json.dumps({"step": step, **state, **_streams()}))
        files = [path for path in part.rglob("*") if path.is_file()]
        manifest = {str(f.relative_to(part)): [f.stat().st_size, _crc(f)] for f in files}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (*part.rglob("*"), part):
            _sync(path)
        part.rename(target)
        _sync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        # safetensors turns a full disk into an error of its own.
        shutil.rmtree(part, ignore_errors=True)
        last = latest_checkpoint(folder)
        raise TrainError(
            f"the checkpoint of step {step} could not be written to {folder}: {error}\n"
            f"  last good checkpoint: {last or 'none'}. Free some space, then use --resume"
        ) from error
    tidy(folder, step, run.cfg.checkpoint.keep)


def tidy(folder: Path, step: int, keep: int) -> None:
    """Drops checkpoints of later steps, and of the others all but the last `keep`."""
    paths = list_checkpoints(folder)
    wanted = [path for path in paths if path.name <= f"step_{step:06d}"][-keep:]
    for path in paths:
        if path not in wanted:
            shutil.rmtree(path)


def rollouts_of(path: Path, step: int) -> Path:
    """Where a checkpoint keeps rollouts that were drawn ahead for a later step."""
    return path / "ahead" / f"step_{step:06d}.safetensors"


def check_checkpoint(path: Path) -> None:
    """Raises where a file is not as it was written."""
    try:
        for name, (size, crc) in json.loads((path / MANIFEST).read_text()).items():
            if (found := (path / name).stat().st_size) != size:
                raise ValueError(f"{name} has {found} bytes, expected {size}")
            if _crc(path / name) != crc:
                raise ValueError(f"{name} has changed since it was written")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        others = [str(p) for p in list_checkpoints(path.parent) if p != path]
        hint = f"; --resume {others[-1]} may still work" if others else ""
        raise TrainError(f"checkpoint {path} is unreadable: {error}{hint}") from error


def last_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """-> the newest checkpoint that is whole, None where there is none; what ails newer ones."""
    ailing = []
    for path in reversed(list_checkpoints(folder)):
        try:
            check_checkpoint(path)
            return path, ailing
        except TrainError as error:
            ailing.append(str(error))
    if ailing:
        raise TrainError("\n  ".join([*ailing, "no other is left"]))
    return None, []


def read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / STATE).read_text())


def restore_trainer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Optimiser and random states; the model is loaded from `path`/model before."""
    tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in load_file(path / TRAINER).items():
        owner, _, name = key.partition("/")
        tensors[owner][name] = tensor
    first, *others = (tensor for _, tensor in sorted(tensors.pop("rng").items()))
    states = {int(number): state for number, state in tensors.items()}
    # the settings are those of this run
    groups = optimizer.state_dict()["param_groups"]
    parameters = optimizer.param_groups[0]["params"]
    for number, state in states.items():
        state |= {name: cut_like(tensor, parameters[number]) for name, tensor in state.items()}
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    torch.set_rng_state(first)
    if others and torch.cuda.is_available():
        torch.cuda.set_rng_state(others[0])
    streams = read_state(path)
    version, words, gauss = streams["python"]
    random.setstate((version, tuple(words), gauss))
    name, words, *rest = streams["numpy"]
    numpy.random.set_state((name, numpy.array(words, dtype=numpy.uint32), *rest))


def list_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def latest_checkpoint(folder: Path) -> Path | None:
    return (list_checkpoints(folder) or [None])[-1]


def _tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """<parameter>/<name> of the optimiser, rng/<number> of torch's random streams."""
    states = optimizer.state_dict()["state"]
    tensors = _held((f"{i}/{name}", t) for i, state in states.items() for name, t in state.items())
    streams = [torch.get_rng_state()]
    if torch.cuda.is_available():
        streams.append(torch.cuda.get_rng_state())
    return tensors | {f"rng/{number:03d}": stream for number, stream in enumerate(streams)}


def _held(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """In the first process all of them, whole and off the device; in the others none."""
    held = {}
    for name, tensor in tensors:
        tensor = whole(tensor)  # every process takes part
        if rank() == 0:
            held[name] = tensor.detach().cpu().contiguous()
    return held


def _streams() -> dict[str, Any]:
    """The trainer derives its own streams from (seed, step); these serve dropout and rewards."""
    version, words, gauss = random.getstate()
    name, numpy_words, *rest = numpy.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, numpy_words.tolist(), *rest],
    }


def _crc(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
