"""`python -m rlkern.train`."""

import os
import sys

if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    # Threads that spin while they wait made a run seven times slower as soon as the machine had
    # other work. libgomp reads the setting once, when torch loads it: begin again with it set.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.execv(sys.executable, [sys.executable, "-m", "rlkern.train", *sys.argv[1:]])

if __name__ == "__main__":
    # not above: the process of a reward (rewards.TimedReward) imports this module, too
    from rlkern.train.cli import main

    sys.exit(main())
