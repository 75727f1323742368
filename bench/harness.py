"""Times the variants of one case in turns, so that a drift of the machine falls on all alike.

A bench module has CASES, `problem(case, device) -> Problem`, and one test over the grid of both:

    @pytest.mark.parametrize(("case", "variant"), harness.grid(CASES, VARIANTS))
    def test_speed(race, case, variant):
        race(OP, problem, case, variant)

The first variant's test runs all of the case's variants; every test then hands its own durations
to pytest-benchmark.
"""

import contextlib
import glob
import importlib
import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
MIN_ROUNDS, MAX_ROUNDS = 7, 300
WARMUP_ROUNDS = 2
# Where the limit itself takes longer, a case would take an hour: one call to warm up, fewer rounds,
# and fewer still for a variant so far from the limit that a spread of some per cent says nothing.
LONG_SECONDS = 0.5
LONG_ROUNDS, FAR_ROUNDS = 3, 2
FAR = 2.0
# A round of a variant lasts about this long, by calling a short one several times.
ROUND_SECONDS = 2e-3
# A variant that takes less than this is called once before it is timed: whichever comes after one
# that fills the caches and returns its memory would pay for that, twice the time of a short one.
COLD_SECONDS = 10 * ROUND_SECONDS
# Another process takes a core for a tick of the scheduler, 4 ms, often at the same place of round
# after round: one variant then seems several times slower. Left out: a round whose threads waited
# for a core for more than this share of it. A case may take PATIENCE times longer to have enough.
WAITED = 0.1
PATIENCE = 4
FLUSH_BYTES = 256 * 2**20  # five times the last-level cache of an H200
LIMIT, OURS = "limit", "rlkern"


@dataclass(frozen=True)
class Case:
    shape: str
    dtype: str = "float32"
    passes: str = "forward"  # or "forward+backward"
    device: str = "any"  # "cpu" or "cuda": where it makes sense to run it
    memory: bool = False  # peak memory beside time: a process of its own per variant on CPU

    def __str__(self) -> str:
        return f"{self.shape}-{self.dtype}-{self.passes}"


class Problem(NamedTuple):
    variants: dict[str, Callable[[], object]]
    """By name; `limit` is the work that no implementation can avoid, "rlkern" is ours."""
    limit: str
    """What the limit is: "matmul", or "copy" of limit_bytes."""
    sizes: dict[str, int]
    """What the shape's name stands for."""
    limit_bytes: int | None = None
    """Bytes read plus bytes written: makes the harness add a copy that moves as many."""
    memory_of: frozenset[str] | None = None
    """The variants whose peak memory is measured where the case asks for it; None: of all."""
    returned_bytes: int | None = None
    """Of the peak, what a call returns: the rest is its own."""


def grid(cases: Iterable[Case], variants: Iterable[str]) -> list:
    return [(case, variant) for case in cases for variant in variants]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def copy_of(num_bytes: int, where: str) -> Callable[[], object]:
    source = torch.ones(max(1, num_bytes // 2), dtype=torch.uint8, device=where)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def build(problem: Callable[[Case, str], Problem], case: Case) -> Problem:
    torch.manual_seed(0)
    # else the ninth shape of a compiled peer would run uncompiled
    torch._dynamo.reset()
    made = problem(case, device())
    if made.limit_bytes is not None:
        copy = copy_of(made.limit_bytes, device())
        # first: how long it takes decides how often all are called
        made = made._replace(variants={LIMIT: copy, **made.variants})
    return made


class Clock:
    """The timer of pytest-benchmark: replays durations that were measured in turns."""

    def __init__(self) -> None:
        self.pending: deque[float] = deque()
        self.now = 0.0
        self.inside = False

    def __call__(self) -> float:
        if not self.pending:
            return time.perf_counter()
        if self.inside:
            self.now += self.pending.popleft()
        self.inside = not self.inside
        return self.now


clock = Clock()


class Failure(NamedTuple):
    reason: str


class Measured(NamedTuple):
    seconds: dict[str, list[float] | Failure]
    disturbed: dict[str, float]
    """The share of a variant's rounds that were."""
    peak_bytes: dict[str, int | None]
    problem: Problem


def measure(problem: Callable[[Case, str], Problem], case: Case, budget_s: float) -> Measured:
    """Every variant to warm up (a peer may fail there), then in turns until budget_s."""
    made = build(problem, case)
    time_once = _time_cuda if device() == "cuda" else _time_cpu
    # events on a GPU do not see what the host waits for
    waited_seconds = (lambda: 0.0) if device() == "cuda" else _waited_seconds
    calls: dict[str, int] = {}
    failures: dict[str, Failure] = {}
    # of each round the seconds of a call, and the share of them that was spent waiting
    taken: dict[str, list[tuple[float, float]]] = {}
    cold: set[str] = set()
    long = False
    for name, function in made.variants.items():
        try:
            for _ in range(WARMUP_ROUNDS):
                once = time_once(function, 1)
                long = long or (name == LIMIT and once > LONG_SECONDS)
                if long:
                    break
        except Exception as error:  # a peer that runs out of memory must not stop the others
            if name in (OURS, LIMIT):
                raise
            failures[name] = Failure(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
            continue
        calls[name] = max(1, min(1000, int(ROUND_SECONDS / max(once, 1e-7))))
        taken[name] = []
        if device() == "cpu" and once < COLD_SECONDS:
            cold.add(name)
    start = time.perf_counter()
    for rounds in range(MAX_ROUNDS):
        # the very first call may have been slow for other reasons
        long = long and min(taken[LIMIT], default=(LONG_SECONDS,))[0] >= LONG_SECONDS
        wanted = LONG_ROUNDS if long else MIN_ROUNDS
        spent = time.perf_counter() - start
        calm = all(len(_calm(rows)) >= wanted for rows in taken.values())
        if rounds >= wanted and spent > budget_s * (1 if calm else PATIENCE):
            break
        for name, count in calls.items():
            rows = taken[name]
            if long and rounds >= FAR_ROUNDS and min(rows) > (FAR * min(taken[LIMIT])[0],):
                continue
            if name in cold:
                made.variants[name]()
            before = waited_seconds()
            once = time_once(made.variants[name], count)
            rows.append((once, (waited_seconds() - before) / max(once * count, 1e-9)))
    seconds = failures | {name: least_disturbed(rows, wanted) for name, rows in taken.items()}
    disturbed = {name: 1 - len(_calm(rows)) / len(rows) for name, rows in taken.items()}
    peak = {}
    if case.memory:
        for name in calls if made.memory_of is None else made.memory_of & calls.keys():
            cuda = device() == "cuda"
            peak[name] = (
                _peak_cuda(made.variants[name]) if cuda else peak_apart(problem, case, name)
            )
    return Measured(seconds, disturbed, peak, made._replace(variants={}))


def _calm(rows: list[tuple[float, float]]) -> list[float]:
    return [once for once, waited in rows if waited <= WAITED]


def least_disturbed(rows: list[tuple[float, float]], wanted: int) -> list[float]:
    """The undisturbed rounds; where they are too few, those with the shortest waits."""
    calm = _calm(rows)
    if len(calm) >= wanted:
        return calm
    return [once for once, _ in sorted(rows, key=lambda row: row[1])[:wanted]]


def time_and_wait(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds of one call, and the share of them that threads of this process waited for a core."""
    before = _waited_seconds()
    once = _time_cpu(function, 1)
    return once, (_waited_seconds() - before) / max(once, 1e-9)


def _waited_seconds() -> float:
    """How long the threads of this process have waited for a core, all together; 0 off Linux."""
    total = 0
    for path in glob.glob("/proc/self/task/*/schedstat"):
        with contextlib.suppress(OSError), open(path) as file:  # a thread that has just ended
            total += int(file.read().split()[1])
    return total / 1e9


def _time_cpu(function: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        function()
    return (time.perf_counter() - start) / count


_FLUSH: list[torch.Tensor] = []


def _time_cuda(function: Callable[[], object], count: int) -> float:
    """Mean of `count` calls, each with a cold L2 and timed by events of its own."""
    if not _FLUSH:
        _FLUSH.append(torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda"))
    events = []
    for _ in range(min(count, 20)):
        _FLUSH[0].zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return sum(begin.elapsed_time(end) for begin, end in events) / len(events) / 1e3


def _peak_cuda(function: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_apart(problem: Callable[[Case, str], Problem], case: Case, variant: str) -> int | None:
    """Peak growth of the resident memory of a process that does nothing else, in bytes.

    None where a peer fails there.
    """
    request = json.dumps({"module": problem.__module__, "case": asdict(case), "variant": variant})
    run = subprocess.run(
        [sys.executable, "-m", "bench.memory", request],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if run.returncode:
        print(run.stderr[-3000:])
        if variant == OURS:
            raise RuntimeError(f"{case}: the process that measures memory failed")
        return None
    return int(run.stdout.splitlines()[-1])


def load(request: str) -> Callable[[], object]:
    """The function that a process of its own is asked to run."""
    asked = json.loads(request)
    problem = importlib.import_module(asked["module"]).problem
    return build(problem, Case(**asked["case"])).variants[asked["variant"]]
