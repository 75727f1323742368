"""The lean reference trainer: `python -m rlkern.train`, see docs/train.md."""


class TrainError(Exception):
    """Something the user can put right; printed without a traceback."""
