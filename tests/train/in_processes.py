"""What torchrun starts in the tests: command lines of rlkern.train, one after another, from a file.

A command `cut SOURCE FOLDER STEP` copies a run as it was after checkpoint STEP.
"""

import json
import sys
from functools import partial
from pathlib import Path

from rlkern import _ranks
from rlkern.train import cli

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from conftest import cut

    for words in json.loads(Path(sys.argv[1]).read_text()):
        if words[0] == "cut":
            _ranks.of_first(partial(cut, Path(words[1]), Path(words[2]), int(words[3])))
        elif code := cli.main(words):
            sys.exit(code)
