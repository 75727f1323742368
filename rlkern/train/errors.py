"""The one error that the command line prints without a traceback."""


class TrainError(Exception):
    """Something the user can put right; the message says what and where."""
