"""What a policy objective is: orthogonal options with the names of verl and TRL."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Self

from rlkern import _check
from rlkern.ops.policy_loss import presets, reference
from rlkern.ops.policy_loss.reference import (
    ALL_SEQUENCES,
    FILLED_SEQUENCES,
    NOTHING,
    TOKENS,
    Kinds,
    Numbers,
)

_OP = "PolicyObjective"

LEVELS = (
    "token",
    "sequence",
    "product",
    "segment",
    "prefix_min",
    "prefix_min_capped",
    "prefix_mean",
)
SURROGATES = tuple(function.__name__ for function, _ in reference.SURROGATES)
ANCHORS = ("old", "rollout")
CORRECTIONS = ("token", "sequence", "geometric")
CORRECTION_MODES = ("truncate", "mask")
KL_TYPES = reference.KL_TYPES
KL_ANCHORS = ("ref", "old", "rollout")
SELECTIONS = ("top_entropy", "entropy_above", "clip_cov", "kl_cov")
LOSS_AGG_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)

# Options that one surrogate has for itself, with its defaults, in the order of p0 to p5; `...`: it
# must be given.
_OWN: dict[str, dict[str, Any]] = {
    "soft_gate": {"tau_pos": 1.0, "tau_neg": 1.05},
    "hazard": {
        "mhpo_c": 1.5,
        "mhpo_k_pos": 1.5,
        "mhpo_lambda_pos": 1.0,
        "mhpo_k_neg": 2.0,
        "mhpo_lambda_neg": 0.8,
        "mhpo_normalize": False,
    },
    "gamma_weight": {
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
    },
    "quadratic": {"variance_coef": 0.04},
    "regression": {"dro_beta": ...},
    "shaped": {"shaping_gamma": 0.1},
    "balanced": {"exploration_power": 0.5},
    "squared": {"rover_t": 1.0},
    "hinge": {"pos_margin": ..., "neg_margin": ..., "beta_neg": 1.0},
    "tapered": {"topr_positive_weight": 1.0, "topr_negative_weight": 1.0},
    "banded": {"fspo_c": ...},
    "dppo_tv": {"two_sided": False},
}
_OWNER = {name: surrogate for surrogate, options in _OWN.items() for name in options}
# Which surrogates read the epsilons, and which of them clip_ratio_c.
_BOUNDED = ("clip", "detached", "mask", "dppo_tv", "dppo_kl", "flipped", "dynamic", "geometric")
_CAPPED = ("clip", "mask", "dppo_tv", "dppo_kl", "flipped", "dynamic")
# The levels that a surrogate without a ratio, or with a ratio of its own kind, is written for.
_ONLY_LEVEL = {
    "mask": "token",
    "banded": "product",
    "dppo_tv": "token",
    "dppo_kl": "token",
    "flipped": "token",
    "quadratic": "token",
    "regression": "token",
    "dynamic": "token",
    "geometric": "sequence",
    "gamma_weight": "product",
    "reinforce": "token",
    "shaped": "token",
    "balanced": "token",
    "squared": "token",
    "hinge": "token",
}
# Those whose loss is not a multiple of the advantage.
_NOT_LINEAR = ("quadratic", "regression", "squared")
_FOR_PRODUCTS = ("clip", "detached", "gamma_weight", "banded")
# Options of `selection`, each for the selection of its name.
_SELECTION_OWN = {
    "top_entropy_quantile": "top_entropy",
    "entropy_threshold": "entropy_above",
    "clip_cov_ratio": "clip_cov",
    "clip_cov_lb": "clip_cov",
    "clip_cov_ub": "clip_cov",
    "kl_cov_ratio": "kl_cov",
    "ppo_kl_coef": "kl_cov",
}
_SELECTION_DEFAULTS = {
    "top_entropy_quantile": 0.2,
    "entropy_threshold": ...,
    "clip_cov_ratio": 2e-4,
    "clip_cov_lb": 1.0,
    "clip_cov_ub": 5.0,
    "kl_cov_ratio": 2e-4,
    "ppo_kl_coef": 1.0,
}


@dataclass(frozen=True, kw_only=True)
class PolicyObjective:
    """The loss of one token, and how tokens are averaged.

    With x = logprob - old_logprob, z = x or its statistic clamped to ±log_ratio_clamp, r = exp(z):

        L = W S(r, A)                    S: the surrogate, W: the correction, a constant
        loss = aggregate(L + kl_coef KL(logprob, ref_logprob) - entropy_coef entropy
                         - nll_coef nll_weight logprob)

    Attributes:
        importance_sampling_level: what z is. Statistics reach the gradient through a token's own
            log-prob, which is exact where advantages and weights are those of the sequence.
            token        x
            sequence     the mean of x over the sequence (GSPO, TRL's name; verl: geometric mean)
            product      the sum of x over the sequence (VESPO, FSPO)
            segment      the mean of x over the token's segment (Rank-GRPO): give cu_segments
            prefix_min   x + the least x of the tokens before it (MinPRO); x for the first
            prefix_min_capped   the same with at most 0 as the least: no prefix raises a ratio
            prefix_mean  the mean of x up to this token (PNPO)
        surrogate: docs/ops/policy_loss.md has all formulas.
            clip         -min(r A, clip(r) A): PPO, GRPO, GSPO
            detached     -sg[clip(r)] A logprob: CISPO
            mask         -sg[min(r, clip_ratio_c)] A logprob where PPO would not clip: MiniRL
            dppo_tv, dppo_kl  the same, masked by the divergence of the token's probability
            soft_gate    -A 4 / tau sigmoid(tau (r - 1)): SAPO
            hazard       -A exp(psi - sg[zeta]): MHPO
            gamma_weight -sg[exp(lambda + k z - lambda r)] A logprob: VESPO
            flipped      1 / r in place of r for A > 0: ASPO
            quadratic    -A r + variance_coef (r - 1)^2: R2VPO
            regression   -(A logprob - dro_beta x^2 / 2): DRO
            dynamic      clip with bounds from the old probability: DCPO
            geometric    -A exp(mean of the clipped x): GMPO
            banded       clip with |z| <= fspo_c sqrt(n): FSPO
            tapered      weight 1 for A > 0, min(r, 1) otherwise: TOPR
            reinforce    -A logprob
            shaped       -A p / (p + gamma): LUFFY
            balanced     -A sg[1 - p]^power 2p / (q + (q + 1) / 2): RL-PLUS' demonstrations
            squared      (rover_t x - A)^2, A a target: ROVER
            hinge        |A| relu(margin -+ x): ReasonMaxxer's delta_hinge
        ratio_anchor: "old", or "rollout": x = logprob - rollout_logprob. `mask` decides by
            old_logprob in either case.
        epsilon_low, epsilon_high: offsets from 1; None leaves that side unbounded. Of x for
            `geometric`, of the probability and of the KL for dppo_tv and dppo_kl.
        cispo_max_ratio: "detached" only: an absolute upper bound in place of 1 + epsilon_high.
            (TRL passes this number as `epsilon_high`.)
        clip_ratio_c: dual clip (verl): for A < 0 the loss is at most -A c; c > 1. The bound of the
            weight for mask, dppo_tv, dppo_kl and flipped.
        delta: two-sided clip (TRL): r is capped at delta before the minimum. For
            delta >= 1 + epsilon_high the same as clip_ratio_c = delta.
        log_ratio_clamp: bound of |z|; no gradient through r beyond it. None: no clamp.
        tau_pos, tau_neg: of the surrogate with that option, and so are mhpo_c, mhpo_k_pos,
            mhpo_lambda_pos, mhpo_k_neg, mhpo_lambda_neg, mhpo_normalize (the surrogate is 1 at
            r = 1); vespo_k_pos, ...; variance_coef; dro_beta; shaping_gamma; exploration_power;
            rover_t; pos_margin, neg_margin, beta_neg; topr_positive_weight, topr_negative_weight;
            fspo_c; two_sided (dppo_tv whatever the sign of A).
        rollout_is: W from d = old_logprob - rollout_logprob: exp of d ("token"), of its sum
            ("sequence", as in verl and TRL) or of its mean ("geometric") over the sequence.
        rollout_is_mode: "truncate" to [rollout_is_low, rollout_is_threshold], or "mask": 0 outside
            (MIS, IcePop). A bound of None is none.
        rollout_is_batch_normalize: divides W by its mean (verl): over the tokens of this call, or
            over its sequences; rejected ones count.
        rollout_rs, rollout_rs_threshold: rejection, verl's names and meaning: token_k1 ... k3,
            seq_sum_k*, seq_mean_k*, seq_max_k2, seq_max_k3, of one token and one sequence
            statistic at most, with a comma between; "low_high" for k1, a number else. k1 = -d:
            its bounds are those of exp(-d), the reciprocal of the weight.
        count_rejected: whether rejected tokens stay in the denominators (AReaL) or not (verl).
        off_policy_mask_threshold: sequences whose mean of rollout_logprob - logprob is above it
            lose their negative advantages (DeepSeek-V3.2; TRL's name).
        selection: tokens without a policy term, chosen over the tokens of this call.
            top_entropy    below the quantile 1 - top_entropy_quantile of the entropy
            entropy_above  below entropy_threshold
            clip_cov       a random clip_cov_ratio of those whose covariance of A and logprob lies
                           in (clip_cov_lb, clip_cov_ub)
            kl_cov         none; the kl_cov_ratio of largest covariance get ppo_kl_coef |x| on top
        kl_coef: weight of the KL to the reference, TRL's `beta`.
        kl_type: with D = logprob - ref_logprob: k1 = D, k2 = D^2 / 2, k3 = exp(-D) + D - 1,
            abs = |D|; k1+, k3+ with the derivative of k2 (verl).
        kl_against: what D is taken against: "ref", "old" or "rollout".
        use_bias_correction_kl: multiplies the KL by r (DeepSeek-V3.2; TRL).
        kl_input_clamp_value: bound of |D|; kl_output_clamp_value: bound of |KL|. No gradient
            beyond either; None: no clamp. verl uses 20 and 10, for k3 alone; TRL neither.
        entropy_coef: weight of the entropy bonus.
        entropy_low, entropy_high, entropy_low_coef, entropy_high_coef: adds
            entropy_low_coef relu(entropy_low - H) + entropy_high_coef relu(H - entropy_high)
            (SPINE); with selection="entropy_above" on the selected tokens alone.
        nll_coef: weight of the negative log-likelihood of the tokens that the argument nll_weight
            of policy_loss marks: correct answers, demonstrations. Aggregated as L is; no
            correction applies to it. For a mean over the marked tokens alone divide nll_weight by
            its mean.
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
    ratio_anchor: str = "old"
    epsilon_low: float | None = 0.2
    epsilon_high: float | None = 0.2
    cispo_max_ratio: float | None = None
    clip_ratio_c: float | None = None
    delta: float | None = None
    log_ratio_clamp: float | None = 20.0
    tau_pos: float | None = None
    tau_neg: float | None = None
    mhpo_c: float | None = None
    mhpo_k_pos: float | None = None
    mhpo_lambda_pos: float | None = None
    mhpo_k_neg: float | None = None
    mhpo_lambda_neg: float | None = None
    mhpo_normalize: bool | None = None
    vespo_k_pos: float | None = None
    vespo_lambda_pos: float | None = None
    vespo_k_neg: float | None = None
    vespo_lambda_neg: float | None = None
    variance_coef: float | None = None
    dro_beta: float | None = None
    shaping_gamma: float | None = None
    exploration_power: float | None = None
    rover_t: float | None = None
    pos_margin: float | None = None
    neg_margin: float | None = None
    beta_neg: float | None = None
    topr_positive_weight: float | None = None
    topr_negative_weight: float | None = None
    fspo_c: float | None = None
    two_sided: bool | None = None
    rollout_is: str | None = None
    rollout_is_mode: str = "truncate"
    rollout_is_low: float | None = None
    rollout_is_threshold: float | None = None
    rollout_is_batch_normalize: bool = False
    rollout_rs: str | None = None
    rollout_rs_threshold: str | float | None = None
    count_rejected: bool = False
    off_policy_mask_threshold: float | None = None
    selection: str | None = None
    top_entropy_quantile: float | None = None
    entropy_threshold: float | None = None
    clip_cov_ratio: float | None = None
    clip_cov_lb: float | None = None
    clip_cov_ub: float | None = None
    kl_cov_ratio: float | None = None
    ppo_kl_coef: float | None = None
    kl_coef: float = 0.0
    kl_type: str = "k3"
    kl_against: str = "ref"
    use_bias_correction_kl: bool = False
    kl_input_clamp_value: float | None = 20.0
    kl_output_clamp_value: float | None = None
    entropy_coef: float = 0.0
    entropy_low: float | None = None
    entropy_high: float | None = None
    entropy_low_coef: float = 0.0
    entropy_high_coef: float = 0.0
    nll_coef: float = 0.0
    loss_agg_mode: str = "token-mean"
    loss_scale_factor: float | None = None
    count_empty: bool = False

    # The schema's kinds and numbers, resolved once, without the normalizer.
    kinds: Kinds = field(init=False, repr=False, compare=False)
    numbers: Numbers = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_names()
        self._fill_defaults(_OWNER, self.surrogate, "surrogate", _OWN.get(self.surrogate, {}))
        chosen = {n: d for n, d in _SELECTION_DEFAULTS.items() if self._selects(n)}
        self._fill_defaults(_SELECTION_OWN, self.selection, "selection", chosen)
        self._check_values()
        self._check_ratio()
        self._check_correction()
        self._check_aggregation()
        rejections = _rejections(self.rollout_rs, self.rollout_rs_threshold)
        object.__setattr__(self, "kinds", self._kinds(rejections))
        object.__setattr__(self, "numbers", self._numbers(rejections))

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The objective of a paper, with some of its fields replaced.

        name: one of presets.PRESETS, or what TRL (loss_type) or verl (loss_mode) calls it;
        `PolicyObjective.explain(name)` gives formula, paper, defaults and what is unpublished.
        overrides: fields, or TRL's and verl's names of them (presets.ALIASES).
        """
        name, overrides = presets.resolve(name, overrides)
        if not overrides and name in _READY:
            return _READY[name]
        known = [f.name for f in fields(cls) if f.init]
        unknown = sorted(set(overrides) - set(known))
        if unknown:
            raise TypeError(
                f"{_OP}: no field {', '.join(unknown)}; the fields are {', '.join(known)}"
            )
        return cls(**{**presets.PRESETS[name].fields, **overrides})

    @staticmethod
    def explain(name: str) -> str:
        """Formula, paper, defaults of a preset, and what was not published."""
        return presets.PRESETS[presets.resolve(name, {})[0]].text

    @property
    def needs_sequences(self) -> bool:
        """Whether the loss depends on where sequences begin and end."""
        by_rejection = self.rollout_rs is not None and "seq_" in self.rollout_rs
        return (
            self.importance_sampling_level not in ("token", "segment")
            or "seq-" in self.loss_agg_mode
            or self.rollout_is in ("sequence", "geometric")
            or by_rejection
            or self.off_policy_mask_threshold is not None
        )

    @property
    def needs_rollout(self) -> bool:
        """Whether the loss reads rollout_logprob."""
        return (
            self.ratio_anchor == "rollout"
            or self.rollout_is is not None
            or self.rollout_rs is not None
            or self.off_policy_mask_threshold is not None
            or (self.kl_coef != 0 and self.kl_against == "rollout")
        )

    @property
    def trains_entropy(self) -> bool:
        """Whether the loss is differentiated by entropy."""
        return any((self.entropy_coef, self.entropy_low_coef, self.entropy_high_coef))

    @property
    def needs_entropy(self) -> bool:
        """Whether the loss reads entropy."""
        return self.trains_entropy or self.selection in ("top_entropy", "entropy_above")

    @property
    def idle_without_advantage(self) -> bool:
        """Whether a token of advantage 0 has a gradient of 0 and touches no other token's."""
        return (
            self.kl_coef == 0
            and self.nll_coef == 0
            and not self.trains_entropy
            and self.is_linear
            and self.selection is None
        )

    @property
    def is_linear(self) -> bool:
        """Whether a token's policy term is a multiple of the size of its advantage."""
        return self.surrogate not in _NOT_LINEAR

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads ref_logprob."""
        return self.kl_coef != 0 and self.kl_against == "ref"

    def reason(self, argument: str) -> str:
        """The fields for which the loss reads `argument`."""
        names = {
            "ref_logprob": ("kl_coef",),
            "entropy": ("entropy_coef", "entropy_low_coef", "entropy_high_coef", "selection"),
            "nll_weight": ("nll_coef",),
            "rollout_logprob": (
                "ratio_anchor",
                "rollout_is",
                "rollout_rs",
                "off_policy_mask_threshold",
                "kl_against",
            ),
        }[argument]
        default = {f.name: f.default for f in fields(self)}
        chosen = [n for n in names if getattr(self, n) != default[n]]
        return " and ".join(f"{n}={getattr(self, n)!r}" for n in chosen)

    def _selects(self, option: str) -> bool:
        return _SELECTION_OWN[option] == self.selection

    def _fill_defaults(self, owners: dict, owner: Any, what: str, defaults: dict) -> None:
        for name, wanted in owners.items():
            if getattr(self, name) is not None and wanted != owner:
                reason = f"to be None with {what}={owner!r}: it is an option of {wanted!r}"
                _check.fail(_OP, name, reason, getattr(self, name))
        for name, default in defaults.items():
            if getattr(self, name) is None:
                if default is ...:
                    _check.fail(_OP, name, f"with {what}={owner!r}, which has no default", None)
                object.__setattr__(self, name, default)

    def _check_names(self) -> None:
        for name, known in (
            ("importance_sampling_level", LEVELS),
            ("surrogate", SURROGATES),
            ("ratio_anchor", ANCHORS),
            ("rollout_is_mode", CORRECTION_MODES),
            ("kl_type", KL_TYPES),
            ("kl_against", KL_ANCHORS),
            ("loss_agg_mode", LOSS_AGG_MODES),
        ):
            _check.one_of(_OP, name, getattr(self, name), known)
        for name, known in (("rollout_is", CORRECTIONS), ("selection", SELECTIONS)):
            if getattr(self, name) is not None:
                _check.one_of(_OP, name, getattr(self, name), known)

    def _check_values(self) -> None:
        for name in _NOT_NEGATIVE:
            if getattr(self, name) is not None:
                _number(
                    name,
                    getattr(self, name),
                    "at least 0 and finite",
                    lambda v: 0 <= v < math.inf,
                )
        for name in _POSITIVE:
            if getattr(self, name) is not None:
                _check.positive(_OP, name, getattr(self, name))
        for name in ("clip_ratio_c", "delta"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), "above 1 and finite", lambda v: 1 < v < math.inf)
        for name in _ANY:
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), "finite", math.isfinite)
        for name in _SHARES:
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), "in (0, 1]", lambda v: 0 < v <= 1)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool | None):
                got = repr(getattr(self, name))
                raise TypeError(f"{_OP}: expected {name} to be a bool, got {got}")

    def _check_ratio(self) -> None:
        surrogate, level = self.surrogate, self.importance_sampling_level
        wanted = _ONLY_LEVEL.get(surrogate, level)
        if level != wanted:
            reason = f"to be {wanted!r} with surrogate={surrogate!r}"
            _check.fail(_OP, "importance_sampling_level", reason, repr(level))
        if level == "product" and surrogate not in _FOR_PRODUCTS:
            reason = f"to be one of {', '.join(_FOR_PRODUCTS)} with importance_sampling_level="
            _check.fail(_OP, "surrogate", reason + repr(level), repr(surrogate))
        default = {f.name: f.default for f in fields(self)}
        for name, readers in (
            ("epsilon_low", _BOUNDED),
            ("epsilon_high", _BOUNDED),
            ("clip_ratio_c", _CAPPED),
            ("delta", ("clip",)),
            ("cispo_max_ratio", ("detached",)),
        ):
            value = getattr(self, name)
            if surrogate not in readers and value is not None and value != default[name]:
                reason = f"to be None with surrogate={surrogate!r}, which does not read it"
                _check.fail(_OP, name, reason, value)
        if self.cispo_max_ratio is not None and self.epsilon_high is not None:
            reason = "or cispo_max_ratio to be None: both bound the ratio from above"
            _check.fail(_OP, "epsilon_high", reason, (self.epsilon_high, self.cispo_max_ratio))
        if self.clip_ratio_c is not None and self.delta is not None:
            reason = "to be None with clip_ratio_c: both cap the loss of negative advantages"
            _check.fail(_OP, "delta", reason, self.delta)
        if self.use_bias_correction_kl and level not in ("token", "sequence"):
            reason = f"to be False with importance_sampling_level={level!r}"
            _check.fail(_OP, "use_bias_correction_kl", reason, True)
        if self.use_bias_correction_kl and self.kl_type.endswith("+"):
            reason = f"to be False with kl_type={self.kl_type!r}: both correct the gradient"
            _check.fail(_OP, "use_bias_correction_kl", reason, True)
        if self.selection == "kl_cov" and self.kl_coef != 0:
            reason = "to be 0 with selection='kl_cov', whose penalty takes the place of the KL"
            _check.fail(_OP, "kl_coef", reason, self.kl_coef)

    def _check_correction(self) -> None:
        if self.rollout_is is None:
            for name in ("rollout_is_low", "rollout_is_threshold"):
                if getattr(self, name) is not None:
                    reason = "to be None without rollout_is (token, sequence or geometric)"
                    _check.fail(_OP, name, reason, getattr(self, name))
        low, high = self.rollout_is_low, self.rollout_is_threshold
        if low is not None and high is not None and low > high:
            _check.fail(_OP, "rollout_is_low", f"to be at most rollout_is_threshold={high}", low)
        if self.rollout_is_batch_normalize:
            if self.rollout_is is None:
                reason = "to be False without rollout_is (token, sequence or geometric)"
                _check.fail(_OP, "rollout_is_batch_normalize", reason, True)
            if not self.is_linear:
                reason = f"to be False with surrogate={self.surrogate!r}, not linear in A"
                _check.fail(_OP, "rollout_is_batch_normalize", reason, True)
        if self.count_rejected and self.rollout_rs is None:
            _check.fail(_OP, "count_rejected", "to be False without rollout_rs", True)

    def _check_aggregation(self) -> None:
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

    def _kinds(self, rejections: "_Rejections") -> Kinds:
        denominator = ALL_SEQUENCES if self.count_empty else FILLED_SEQUENCES
        if self.loss_agg_mode == "token-sum":
            denominator = NOTHING
        elif self.loss_agg_mode == "token-mean":
            denominator = TOKENS
        level = self.importance_sampling_level
        kl_type = "abs" if self.selection == "kl_cov" else self.kl_type
        return Kinds(
            surrogate=SURROGATES.index(self.surrogate),
            level=reference.LEVELS.index("sequence" if level == "segment" else level),
            from_rollout=int(self.ratio_anchor == "rollout"),
            correction=reference.CORRECTIONS.index(self.rollout_is),
            correction_masks=int(self.rollout_is_mode == "mask"),
            token_rejection=rejections.token,
            sequence_rejection=rejections.sequence,
            rejection_reduction=rejections.reduction,
            count_rejected=int(self.count_rejected),
            kl_type=KL_TYPES.index(kl_type),
            kl_times_ratio=int(self.use_bias_correction_kl),
            denominator=denominator,
            divide_by_length=int(self.loss_agg_mode == "seq-mean-token-mean"),
        )

    def _numbers(self, rejections: "_Rejections") -> Numbers:
        shape = dict(zip(("p0", "p1", "p2", "p3", "p4", "p5"), self._shape()))
        return Numbers()._replace(
            **dict.fromkeys(("p0", "p1", "p2", "p3", "p4", "p5"), 0.0) | shape,
            log_ratio_clamp=_or(self.log_ratio_clamp, math.inf),
            correction_low=_or(self.rollout_is_low, -math.inf),
            correction_high=_or(self.rollout_is_threshold, math.inf),
            token_rejection_low=rejections.token_bounds[0],
            token_rejection_high=rejections.token_bounds[1],
            sequence_rejection_low=rejections.sequence_bounds[0],
            sequence_rejection_high=rejections.sequence_bounds[1],
            off_policy_limit=_or(self.off_policy_mask_threshold, math.inf),
            kl_coef=float(self.ppo_kl_coef if self.selection == "kl_cov" else self.kl_coef),
            kl_input_clamp=_or(self.kl_input_clamp_value, math.inf),
            kl_output_clamp=_or(self.kl_output_clamp_value, math.inf),
            entropy_coef=float(self.entropy_coef),
            entropy_low=_or(self.entropy_low, -math.inf),
            entropy_high=_or(self.entropy_high, math.inf),
            entropy_low_coef=float(self.entropy_low_coef),
            entropy_high_coef=float(self.entropy_high_coef),
            entropy_from=_or(self.entropy_threshold, -math.inf),
            nll_coef=float(self.nll_coef),
            scale=1.0 / self.loss_scale_factor if self.loss_scale_factor else 1.0,
        )

    def _shape(self) -> tuple[float, ...]:
        """p0, p1, ...: what the surrogate reads."""
        off_low, off_high = _or(self.epsilon_low, math.inf), _or(self.epsilon_high, math.inf)
        low, high, cap = 1.0 - off_low, 1.0 + off_high, _or(self.clip_ratio_c, math.inf)
        if self.delta is not None:
            # min(r, delta) against clip(r): the tighter bound wins for A > 0, the looser for A < 0
            high, cap = min(high, self.delta), max(high, float(self.delta))
        own = tuple(float(getattr(self, name)) for name in _OWN.get(self.surrogate, {}))
        if self.surrogate == "detached":
            return low, _or(self.cispo_max_ratio, high)
        if self.surrogate in ("clip", "mask", "flipped"):
            return low, high, cap
        if self.surrogate in ("dppo_tv", "dppo_kl", "dynamic"):
            return off_low, off_high, cap, *own
        if self.surrogate == "geometric":
            return -off_low, off_high
        if self.surrogate == "gamma_weight":
            return *own, math.log(1e-8)
        if self.surrogate == "hazard":
            c, *weibull, normalize = own
            k_pos, lambda_pos, k_neg, lambda_neg = weibull
            at_one = (math.log(2) / lambda_pos) ** k_pos + (math.log(2) / lambda_neg) ** k_neg
            return c, *weibull, math.exp(at_one) if normalize else 1.0
        return own


_NOT_NEGATIVE = (
    "epsilon_low",
    "epsilon_high",
    "kl_coef",
    "entropy_coef",
    "entropy_low_coef",
    "entropy_high_coef",
    "nll_coef",
    "rollout_is_low",
    "variance_coef",
    "exploration_power",
    "beta_neg",
    "topr_positive_weight",
    "topr_negative_weight",
    "ppo_kl_coef",
)
_POSITIVE = (
    "log_ratio_clamp",
    "kl_input_clamp_value",
    "kl_output_clamp_value",
    "cispo_max_ratio",
    "loss_scale_factor",
    "rollout_is_threshold",
    "dro_beta",
    "shaping_gamma",
    "rover_t",
    "fspo_c",
    *(n for s in ("soft_gate", "gamma_weight", "hazard") for n in _OWN[s] if "normalize" not in n),
)
_ANY = (
    "pos_margin",
    "neg_margin",
    "entropy_low",
    "entropy_high",
    "entropy_threshold",
    "clip_cov_lb",
    "clip_cov_ub",
    "off_policy_mask_threshold",
)
_SHARES = ("top_entropy_quantile", "clip_cov_ratio", "kl_cov_ratio")
_FLAGS = (
    "count_empty",
    "count_rejected",
    "use_bias_correction_kl",
    "rollout_is_batch_normalize",
    "mhpo_normalize",
    "two_sided",
)


@dataclass
class _Rejections:
    token: int = 0
    sequence: int = 0
    reduction: int = 0
    token_bounds: tuple[float, float] = (-math.inf, math.inf)
    sequence_bounds: tuple[float, float] = (-math.inf, math.inf)


_REDUCTIONS = {"seq_sum": reference.SUM, "seq_mean": reference.MEAN, "seq_max": reference.MAX}


def _rejections(names: str | None, thresholds: str | float | None) -> _Rejections:
    """verl's rollout_rs and rollout_rs_threshold."""
    out = _Rejections()
    if names is None:
        if thresholds is not None:
            reason = "to be None without rollout_rs"
            _check.fail(_OP, "rollout_rs_threshold", reason, thresholds)
        return out
    wanted = [name.strip() for name in names.split(",")]
    limits = [limit.strip() for limit in str(thresholds).split(",")]
    if len(wanted) != len(limits):
        reason = f"to hold as many bounds as rollout_rs={names!r}"
        _check.fail(_OP, "rollout_rs_threshold", reason, repr(thresholds))
    for name, limit in zip(wanted, limits):
        scope, _, metric = name.rpartition("_")
        if scope not in ("token", *_REDUCTIONS) or metric not in ("k1", "k2", "k3"):
            known = "token_k1..k3, seq_sum_k1..k3, seq_mean_k1..k3, seq_max_k2, seq_max_k3"
            _check.fail(_OP, "rollout_rs", f"of {known}", repr(name))
        if name == "seq_max_k1":
            _check.fail(_OP, "rollout_rs", "of seq_max_k2 or seq_max_k3 for a maximum", repr(name))
        code, bounds = int(metric[1]), _bounds(name, metric, limit)
        if (scope == "token" and out.token) or (scope != "token" and out.sequence):
            reason = "to hold one token and one sequence statistic at most"
            _check.fail(_OP, "rollout_rs", reason, repr(names))
        if scope == "token":
            out.token, out.token_bounds = code, bounds
        else:
            out.sequence, out.sequence_bounds = code, bounds
            out.reduction = _REDUCTIONS[scope]
    return out


def _bounds(name: str, metric: str, limit: str) -> tuple[float, float]:
    try:
        numbers = [float(part) for part in limit.split("_")]
    except ValueError:
        numbers = []
    wanted = (1, 2) if metric == "k1" else (1,)
    if len(numbers) not in wanted or min(numbers) <= 0:
        form = "'low_high' or one number above 0" if metric == "k1" else "a number above 0"
        _check.fail(_OP, "rollout_rs_threshold", f"{form} for {name}", repr(limit))
    if metric != "k1":
        return -math.inf, numbers[0]
    high = numbers[-1]
    low = numbers[0] if len(numbers) == 2 else 1.0 / high
    return math.log(low), math.log(high)


def _number(name: str, value: Any, expected: str, holds) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{_OP}: expected {name} to be a number, got {type(value).__name__}")
    if not holds(value):
        _check.fail(_OP, name, f"to be {expected}", value)


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


# those without an option that is the caller's to give
_READY = {
    name: PolicyObjective(**preset.fields)
    for name, preset in presets.PRESETS.items()
    if not preset.required
}
