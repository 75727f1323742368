"""What torchrun starts in the tests: command lines of rlkern.train, one after another, from a file.

The exit codes go to <file>.codes of the first process.
"""

import json
import os
import sys
from pathlib import Path

from rlkern.train import cli

if __name__ == "__main__":
    path = Path(sys.argv[1])
    codes = [cli.main(words) for words in json.loads(path.read_text())]
    if os.environ["RANK"] == "0":
        path.with_suffix(".codes").write_text(json.dumps(codes))
