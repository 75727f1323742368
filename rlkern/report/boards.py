"""The metrics of a run for viewers of others: TensorBoard, Weights & Biases."""

import hashlib
from pathlib import Path
from typing import Any

from rlkern.report.records import ReportError


class Boards:
    """Those that are asked for; each is imported here and nowhere else.

    Args:
        folder: of the run; its path names the run at Weights & Biases, also after a resume.
        tensorboard: events go to <folder>/tensorboard.
        wandb: a project; "": none. Where and whether it sends is decided by wandb's own settings.
        settings: what wandb shows of the run's.
        step: what comes after it is about to be repeated, and hidden by TensorBoard.

    Raises:
        ReportError: the package is not there.
    """

    def __init__(
        self, folder: Path, tensorboard: bool, wandb: str, settings: dict[str, Any], step: int
    ) -> None:
        self.events = self.run = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ReportError(
                    "log.tensorboard = true needs tensorboard: pip install 'rlkern[train]', or "
                    "set --log.tensorboard false"
                ) from error
            self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if wandb:
            try:
                from wandb import init
            except ImportError as error:
                raise ReportError(
                    f"log.wandb = {wandb!r} needs wandb: pip install wandb, or set --log.wandb ''"
                ) from error
            key = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
            how = {"id": key, "name": folder.name, "resume": "allow"}
            self.run = init(project=wandb, dir=str(folder), config=settings, **how)

    def log(self, record: dict[str, Any]) -> None:
        """A record of metrics.jsonl."""
        numbers = {
            name if "/" in name else f"{record['phase']}/{name}": value
            for name, value in record.items()
            if isinstance(value, int | float) and name != "step"
        }
        if self.events is not None:
            for tag, value in numbers.items():
                self.events.add_scalar(tag, value, record["step"])
        if self.run is not None:
            # with `step` as a value: wandb's own counter takes no step twice, and a step may have
            # a record of training and one of evaluation
            self.run.log(numbers | {"step": record["step"]})

    def close(self) -> None:
        if self.events is not None:
            self.events.close()
        if self.run is not None:
            self.run.finish()
