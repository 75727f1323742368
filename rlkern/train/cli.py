"""The command line: `python -m rlkern.train [recipe] [--section.key value ...]`, `report RUN ...`.

Exit codes: 0 done, 1 held-out accuracy under eval.min_accuracy, 2 an error with a message,
130 interrupted.
"""

import argparse
import errno
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from rlkern import _ranks as ranks
from rlkern.report import ReportError, read_lines, report
from rlkern.rollout.environment import ReplyError
from rlkern.train import EngineHang, TrainError
from rlkern.train.checkpoint import MANIFEST, check_checkpoint, last_whole, tidy
from rlkern.train.config import Config, find_recipe, load_config
from rlkern.train.diagnose import out_of_memory
from rlkern.train.log import write_whole
from rlkern.train.loop import Trainer
from rlkern.train.model import load_model

FLAGS = ("dry-run", "resume", "null", "help")


def main(argv: list[str] | None = None) -> int:
    try:
        ranks.start()
        return run(sys.argv[1:] if argv is None else argv)
    except (TrainError, ReportError) as error:
        return tell(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        return tell(f"{error}. Free some space, then use --resume")
    except RuntimeError:
        if ranks.failed():  # another process, which has told why, has left this one
            return 2
        raise
    except KeyboardInterrupt:
        print("stopped without saving", file=sys.stderr)
        return 130


def tell(error: str) -> int:
    """Prints it, once where several processes end by it."""
    if ranks.is_first_failure():
        print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


def run(argv: list[str]) -> int:
    if argv[:1] == ["report"]:
        if not argv[1:]:
            raise TrainError("report: expected the folder of a run, or of several to compare")
        print(f"report: {report([Path(word) for word in argv[1:]]).resolve()}")
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m rlkern.train",
        description="GRPO from a TOML recipe. Any setting: --section.key value (docs/train.md).",
    )
    parser.add_argument("recipe", nargs="?", help="TOML file or shipped recipe; default: demo")
    parser.add_argument("--dry-run", action="store_true", help="show what would run, and stop")
    parser.add_argument("--resume", nargs="?", const="", help="go on from a run or checkpoint")
    parser.add_argument("--null", action="store_true", help="control: advantages shuffled")
    words, overrides = split_overrides(argv)
    args = parser.parse_args(words)
    if args.null:
        overrides["run.null"] = "true"
    origin = Path(args.resume) if args.resume else None
    checkpoint = None
    if origin and (origin / MANIFEST).is_file():
        checkpoint, origin = origin, origin.parent.parent
    if origin and not args.recipe:
        cfg = load_config(origin / "config.json", overrides)
        name = origin.name
    else:
        recipe = find_recipe(args.recipe or "demo")
        cfg = load_config(recipe, overrides)
        name = f"{recipe.stem}{'-null' if cfg.run.null else ''}-seed{cfg.run.seed}"

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if cfg.run.threads:
        torch.set_num_threads(cfg.run.threads)
    torch.use_deterministic_algorithms(cfg.run.deterministic, warn_only=True)
    # Filling fresh memory with NaN is a debugging aid; it costs time and changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False
    if args.dry_run:
        print(cfg.model_dump_json(indent=1))
        print(describe(cfg, load_model(cfg)[0]))
        return 0

    ready = partial(place, cfg, name, origin, checkpoint, args.resume is not None)
    run_dir, checkpoint = ranks.of_first(ready)
    trainer = Trainer(cfg, run_dir, checkpoint)
    main = ranks.rank() == 0
    if main:  # later steps are done again
        tidy(run_dir / "checkpoints", trainer.step, cfg.checkpoint.keep)
        write_whole(run_dir / "config.json", json.dumps(cfg.model_dump(), indent=1))
    trainer.log.say(describe(cfg, trainer.policy))
    resumed = f", resumed at step {trainer.step}" if checkpoint else ""
    trainer.log.say(f"run: {run_dir}{resumed}")

    def on_signal(*_: Any) -> None:
        if ranks.failed():  # torchrun ends the others
            sys.exit(2)
        trainer.stop = True
        trainer.log.say("stopping after this step; once more to stop at once, without saving")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, on_signal)
    try:
        complete = trainer.fit()
    except EngineHang as error:
        start_again(error, run_dir, trainer)
    except ReplyError as error:
        raise TrainError(f"step {trainer.step}: {error}") from error
    except (RuntimeError, MemoryError) as error:
        if advice := out_of_memory(error, cfg):
            raise TrainError(f"step {trainer.step}: {advice}") from error
        raise
    finally:
        trainer.worker.shutdown(cancel_futures=True)
        trainer.log.close()
    if not complete:
        trainer.log.say(
            f"saved at step {trainer.step}; go on: python -m rlkern.train --resume {run_dir}"
        )
        return 130
    return finish(cfg, run_dir) if main else 0


def place(
    cfg: Config, name: str, origin: Path | None, checkpoint: Path | None, resume: bool
) -> tuple[Path, Path | None]:
    """-> the folder of the run, made ready, and the checkpoint that it goes on from."""
    run_dir = origin or choose_folder(cfg, name, resume)
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    elif resume:
        checkpoint, ailing = last_whole(run_dir / "checkpoints")
        for told in ailing:
            print(f"NOTE {told}")
        if checkpoint is None:
            print(f"no checkpoint in {run_dir} yet: starting from the beginning")
    run_dir.mkdir(parents=True, exist_ok=True)
    if checkpoint is None:  # from here on --resume finds a run
        write_whole(run_dir / "config.json", json.dumps(cfg.model_dump(), indent=1))
    return run_dir, checkpoint


def start_again(error: EngineHang, run_dir: Path, trainer: Trainer) -> None:
    """A new process in place of this one, which goes on from the last checkpoint."""
    trainer.log.close()
    step, known = str(trainer.step), "RLKERN_HUNG_AT"
    if os.environ.get(known) == step or ranks.size() > 1:
        again = ", for the second time" if ranks.size() == 1 else ". Use --resume"
        os._exit(tell(f"{error}{again}"))  # nothing else leaves with the thread still there
    print(f"NOTE {error}: starting again from the last checkpoint", flush=True)
    os.environ[known] = step
    os.execv(sys.executable, [sys.executable, "-m", "rlkern.train", "--resume", str(run_dir)])


def finish(cfg: Config, run_dir: Path) -> int:
    """Summary, report and exit code of a complete run."""
    records = read_lines(run_dir / "metrics.jsonl")
    evals = [record for record in records if record["phase"] == "eval"]
    before, after = evals[0]["eval/greedy"], evals[-1]["eval/greedy"]
    # The control is there to fail; it is read, not judged.
    passed = cfg.run.null or after >= cfg.eval.min_accuracy
    seconds = sum(r.get("time/step", 0) + r.get("time/eval", 0) for r in records)
    summary = {"passed": passed, "greedy_before": before, "greedy_after": after}
    summary |= {k: v for k, v in evals[-1].items() if "@" in k}
    summary |= {"training_seconds": seconds, "seed": cfg.run.seed, "null": cfg.run.null}
    summary |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1))
    page = report([run_dir])
    print(f"held-out greedy {before:.1%} -> {after:.1%}, {seconds:.0f} s of training")
    print(f"report: {page.resolve()}")
    if not passed:
        print(f"FAILED: {after:.1%} is under eval.min_accuracy = {cfg.eval.min_accuracy:.1%}")
    return 0 if passed else 1


def describe(cfg: Config, model: transformers.PreTrainedModel) -> str:
    parameters, r = sum(p.numel() for p in model.parameters()), cfg.rollout
    sequences = r.prompts * r.group_size
    return (
        f"model: {cfg.model.path or 'Qwen3 from scratch'}, {parameters:,} parameters, "
        f"{cfg.model.dtype}, {model.device}\n"
        f"data: {cfg.data.task or cfg.data.train}, reward {cfg.reward}\n"
        f"steps: {cfg.warmup.steps} warm-up, {cfg.run.steps} RL of {r.prompts} x {r.group_size} = "
        f"{sequences} sequences, at most {sequences * r.max_new_tokens:,} response tokens; "
        f"{cfg.algorithm.objective}{', NULL CONTROL (advantages shuffled)' * cfg.run.null}"
    )


def choose_folder(cfg: Config, name: str, resume: bool) -> Path:
    """`run.dir` or a name under runs/: a free one, or on --resume the newest that is there."""
    base = Path(cfg.run.dir or Path("runs") / name)
    if resume:
        runs = [base] if cfg.run.dir else [p for p in base.parent.glob(f"{name}*") if p.is_dir()]
        newest = max(runs, key=lambda p: p.stat().st_mtime if p.is_dir() else 0, default=base)
        if not newest.is_dir():
            raise TrainError(f"--resume: there is no run at {base}")
        return newest
    number, folder = 1, base
    while (folder / "metrics.jsonl").exists():
        if cfg.run.dir:
            raise TrainError(f"run.dir: {base} holds a run: add --resume, or name another folder")
        number += 1
        folder = Path(f"{base}-{number}")
    return folder


def split_overrides(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """-> words for the parser, and the settings given as --section.key value (or =value)."""
    words, overrides, queue = [], {}, list(argv)
    while queue:
        word = queue.pop(0)
        key, equals, value = word[2:].partition("=")
        if not word.startswith("--") or key in FLAGS:
            words.append(word)
            continue
        if not equals and not queue:
            raise TrainError(f"--{key}: expected a value after it")
        overrides[key] = value if equals else queue.pop(0)
    return words, overrides
