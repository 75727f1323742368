"""What a policy objective is: orthogonal options with the names of verl and TRL, and presets."""

import math
from dataclasses import dataclass, field
from typing import Any, Self

from rlkern import _check

_OP = "PolicyObjective"

LEVELS = ("token", "sequence")
SURROGATES = ("clip", "detached")
KL_TYPES = ("k1", "k2", "k3")
LOSS_AGG_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)

# What the weighted token losses are divided by: the codes of the schema's `denominator`.
NOTHING, TOKENS, FILLED_SEQUENCES, ALL_SEQUENCES = range(4)

_PRESETS: dict[str, dict[str, Any]] = {
    "ppo": {"loss_agg_mode": "token-mean"},
    "grpo": {"loss_agg_mode": "seq-mean-token-mean"},
    "dapo": {"epsilon_high": 0.28, "loss_agg_mode": "token-mean"},
    "dr_grpo": {"loss_agg_mode": "seq-mean-token-sum-norm"},
    "gspo": {
        "importance_sampling_level": "sequence",
        "epsilon_low": 3e-4,
        "epsilon_high": 4e-4,
        "loss_agg_mode": "seq-mean-token-mean",
    },
    "cispo": {
        "surrogate": "detached",
        "epsilon_low": None,
        "epsilon_high": None,
        "cispo_max_ratio": 5.0,
        "loss_agg_mode": "token-mean",
    },
}


@dataclass(frozen=True, kw_only=True)
class PolicyObjective:
    """The loss of one token, and how tokens are averaged.

    With x = logprob - old_logprob clamped to ±log_ratio_clamp and r = exp(x), or, for sequences,
    r = exp of the mean of x over the sequence, the same for all of its tokens:

        clip      L = -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)
        detached  L = -stop_gradient(clip(r, 1 - epsilon_low, 1 + epsilon_high)) A logprob
        loss = aggregate(L + kl_coef KL(logprob, ref_logprob) - entropy_coef entropy)

    Attributes:
        importance_sampling_level: "token", or "sequence" (GSPO; with one advantage per token the
            gradient is that of GSPO-token: it reaches a token through its own advantage only).
        surrogate: "clip" (PPO and its relatives) or "detached" (CISPO).
        epsilon_low, epsilon_high: offsets from 1; None leaves that side unbounded. Two None
            with "clip" give the plain importance-weighted loss.
        cispo_max_ratio: "detached" only: an absolute upper bound in place of 1 + epsilon_high.
            (TRL passes this number as `epsilon_high`.)
        clip_ratio_c: dual clip (verl): for A < 0 the loss is at most -A c; c > 1.
        delta: two-sided clip (TRL): r is capped at delta before the minimum. For
            delta >= 1 + epsilon_high the same as clip_ratio_c = delta.
        log_ratio_clamp: bound of |x|, or of |mean x|; no gradient beyond it. None: no clamp.
        kl_coef: weight of the KL to the reference, TRL's `beta`, which `preset` accepts too.
        kl_type: with D = logprob - ref_logprob: k1 = D, k2 = D^2 / 2, k3 = exp(-D) + D - 1.
        kl_input_clamp_value: bound of |D|; kl_output_clamp_value: bound of |KL|. No gradient
            beyond either; None: no clamp. verl uses 20 and 10, for k3 alone; TRL neither.
        entropy_coef: weight of the entropy bonus.
        loss_agg_mode: with n_i tokens in sequence i, B sequences and N tokens
            token-mean               sum L / N
            token-sum                sum L
            seq-mean-token-mean      1/B sum_i 1/n_i sum_t L
            seq-mean-token-sum       1/B sum_i sum_t L
            seq-mean-token-sum-norm  1/B sum_i sum_t L / loss_scale_factor
        loss_scale_factor: that constant, e.g. the maximum completion length. It has no default:
            verl falls back to the padded width, which differs from batch to batch.
        count_empty: whether sequences without tokens count in B (TRL) or not (verl).
    """

    importance_sampling_level: str = "token"
    surrogate: str = "clip"
    epsilon_low: float | None = 0.2
    epsilon_high: float | None = 0.2
    cispo_max_ratio: float | None = None
    clip_ratio_c: float | None = None
    delta: float | None = None
    log_ratio_clamp: float | None = 20.0
    kl_coef: float = 0.0
    kl_type: str = "k3"
    kl_input_clamp_value: float | None = 20.0
    kl_output_clamp_value: float | None = None
    entropy_coef: float = 0.0
    loss_agg_mode: str = "token-mean"
    loss_scale_factor: float | None = None
    count_empty: bool = False

    # The numbers of the schema, resolved once: ratio constants, then `denominator`,
    # `divide_by_length` and `scale` without the normalizer.
    constants: tuple = field(init=False, repr=False, compare=False)
    aggregation: tuple = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_values()
        self._check_combinations()
        object.__setattr__(self, "constants", self._constants())
        object.__setattr__(self, "aggregation", self._aggregation())

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The objective of a paper, with some of its fields replaced.

        ppo      (1707.06347) clip 0.2, mean over tokens. The paper has no dual clip and no KL;
                 verl adds clip_ratio_c = 3.
        grpo     (2402.03300) clip, mean over the tokens of a sequence, then over sequences. The
                 paper adds k3 to a reference with kl_coef = 0.04, off here as in TRL: pass
                 kl_coef=0.04 and ref_logprob. Its clip range was not published; 0.2 is that of
                 verl and TRL.
        dapo     (2503.14476) clip 0.2 below and 0.28 above, mean over tokens, no KL. Dynamic
                 sampling and overlong shaping belong to the trainer.
        dr_grpo  (2503.20783) sum over tokens divided by a constant, mean over sequences, no KL;
                 advantages without division by the deviation. loss_scale_factor must be given:
                 the paper's code uses the generation budget. Its clip range is that of grpo.
        gspo     (2507.18071) the ratio of a sequence, clipped at 3e-4 below and 4e-4 above, mean
                 over sequences. (verl bounds the log-ratio at 10, here log_ratio_clamp = 20.)
        cispo    (2506.13585) weight min(r, cispo_max_ratio), detached; every token has a
                 gradient; mean over tokens. The paper leaves the lower side unbounded and does
                 not publish the upper bound; 5 is what TRL recommends.
        """
        if name not in _PRESETS:
            known = ", ".join(sorted(_PRESETS))
            raise ValueError(f"{_OP}: expected a preset of {known}, got {name!r}")
        if not overrides and name in _READY:
            return _READY[name]
        if "beta" in overrides:
            if "kl_coef" in overrides:
                _check.fail(_OP, "kl_coef or beta", "(two names of one number)", "both")
            overrides["kl_coef"] = overrides.pop("beta")
        fields = [f for f in cls.__dataclass_fields__.values() if f.init]
        unknown = sorted(set(overrides) - {f.name for f in fields})
        if unknown:
            known = ", ".join(f.name for f in fields)
            raise TypeError(f"{_OP}: no field {', '.join(unknown)}; the fields are {known}")
        return cls(**{**_PRESETS[name], **overrides})

    @property
    def needs_sequences(self) -> bool:
        """Whether the loss depends on where sequences begin and end."""
        return self.importance_sampling_level == "sequence" or "seq-" in self.loss_agg_mode

    def _check_values(self) -> None:
        _check.one_of(_OP, "importance_sampling_level", self.importance_sampling_level, LEVELS)
        _check.one_of(_OP, "surrogate", self.surrogate, SURROGATES)
        _check.one_of(_OP, "kl_type", self.kl_type, KL_TYPES)
        _check.one_of(_OP, "loss_agg_mode", self.loss_agg_mode, LOSS_AGG_MODES)
        for name in ("epsilon_low", "epsilon_high", "kl_coef", "entropy_coef"):
            value = getattr(self, name)
            optional = name.startswith("epsilon")
            if not (optional and value is None):
                _number(name, value, "at least 0 and finite", lambda v: 0 <= v < math.inf)
        for name in (
            "log_ratio_clamp",
            "kl_input_clamp_value",
            "kl_output_clamp_value",
            "cispo_max_ratio",
            "loss_scale_factor",
        ):
            if getattr(self, name) is not None:
                _check.positive(_OP, name, getattr(self, name))
        for name in ("clip_ratio_c", "delta"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), "above 1 and finite", lambda v: 1 < v < math.inf)
        if not isinstance(self.count_empty, bool):
            raise TypeError(f"{_OP}: expected count_empty to be a bool, got {self.count_empty!r}")

    def _check_combinations(self) -> None:
        if self.surrogate == "detached":
            for name in ("clip_ratio_c", "delta"):
                if getattr(self, name) is not None:
                    reason = "with surrogate='detached', where no loss is clipped"
                    _check.fail(_OP, name, f"to be None {reason}", getattr(self, name))
            if self.cispo_max_ratio is not None and self.epsilon_high is not None:
                reason = "or cispo_max_ratio to be None: both bound the ratio from above"
                _check.fail(_OP, "epsilon_high", reason, (self.epsilon_high, self.cispo_max_ratio))
        elif self.cispo_max_ratio is not None:
            reason = "to be None with surrogate='clip', whose upper bound is 1 + epsilon_high"
            _check.fail(_OP, "cispo_max_ratio", reason, self.cispo_max_ratio)
        if self.clip_ratio_c is not None and self.delta is not None:
            reason = "to be None with clip_ratio_c: both cap the loss of negative advantages"
            _check.fail(_OP, "delta", reason, self.delta)
        normed = self.loss_agg_mode == "seq-mean-token-sum-norm"
        if normed and self.loss_scale_factor is None:
            reason = (
                "with loss_agg_mode='seq-mean-token-sum-norm' (the constant that token sums are "
                "divided by, e.g. the maximum completion length)"
            )
            _check.fail(_OP, "loss_scale_factor", reason, None)
        if not normed and self.loss_scale_factor is not None:
            reason = f"to be None with loss_agg_mode={self.loss_agg_mode!r}, which ignores it"
            _check.fail(_OP, "loss_scale_factor", reason, self.loss_scale_factor)
        if self.count_empty and not self.loss_agg_mode.startswith("seq-"):
            reason = f"to be False with loss_agg_mode={self.loss_agg_mode!r}: it counts tokens"
            _check.fail(_OP, "count_empty", reason, True)

    def _constants(self) -> tuple:
        low = -math.inf if self.epsilon_low is None else 1.0 - self.epsilon_low
        high = math.inf if self.epsilon_high is None else 1.0 + self.epsilon_high
        cap = math.inf if self.clip_ratio_c is None else float(self.clip_ratio_c)
        if self.delta is not None:
            # min(r, delta) against clip(r): the tighter bound wins for A > 0, the looser for A < 0
            high, cap = min(high, self.delta), max(high, float(self.delta))
        if self.cispo_max_ratio is not None:
            high = float(self.cispo_max_ratio)
        return (
            self.importance_sampling_level == "sequence",
            SURROGATES.index(self.surrogate),
            low,
            high,
            cap,
            _or_inf(self.log_ratio_clamp),
            KL_TYPES.index(self.kl_type) + 1,
            float(self.kl_coef),
            _or_inf(self.kl_input_clamp_value),
            _or_inf(self.kl_output_clamp_value),
            float(self.entropy_coef),
        )

    def _aggregation(self) -> tuple[int, bool, float]:
        if self.loss_agg_mode == "token-sum":
            return NOTHING, False, 1.0
        if self.loss_agg_mode == "token-mean":
            return TOKENS, False, 1.0
        count = ALL_SEQUENCES if self.count_empty else FILLED_SEQUENCES
        scale = 1.0 / self.loss_scale_factor if self.loss_scale_factor else 1.0
        return count, self.loss_agg_mode == "seq-mean-token-mean", scale


def _number(name: str, value: Any, expected: str, holds) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{_OP}: expected {name} to be a number, got {type(value).__name__}")
    if not holds(value):
        _check.fail(_OP, name, f"to be {expected}", value)


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else float(value)


# dr_grpo has no default: its horizon is the caller's
_READY = {name: PolicyObjective(**_PRESETS[name]) for name in _PRESETS if name != "dr_grpo"}
