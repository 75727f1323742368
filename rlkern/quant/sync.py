"""From a trainer's weights to a quantised model that is in use: in place, all or nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rlkern.quant.delta import DeltaPacket, as_bytes
from rlkern.quant.experts import STACKED, slices_of
from rlkern.quant.linear import QuantizedLinear
from rlkern.quant.model import quantized_experts, quantized_layers, shared_amax


@dataclass(frozen=True)
class TensorStats:
    """Of one tensor of the quantised model, in one sync."""

    num_bytes: int
    changed_bytes: int
    saturated: int
    """Codes of the largest magnitude: at least one a block with the amax of its own weights."""

    @property
    def changed(self) -> float:
        """The share of bytes that the update has reached; 0: it was below the codes' steps."""
        return self.changed_bytes / max(1, self.num_bytes)


@dataclass(frozen=True)
class SyncReport:
    version: int
    stats: dict[str, TensorStats] = field(default_factory=dict)
    """By name of the quantised model's tensor."""
    delta: dict[str, DeltaPacket] | None = None
    """What a copy of the model at version - 1 needs, where it was asked for."""

    @property
    def num_bytes(self) -> int:
        return sum(s.num_bytes for s in self.stats.values())

    @property
    def changed_bytes(self) -> int:
        return sum(s.changed_bytes for s in self.stats.values())

    @property
    def delta_bytes(self) -> int:
        return sum(p.num_bytes for p in (self.delta or {}).values())


class WeightSync:
    """Keeps a model from `quantize_model` in step with the weights that a trainer holds.

        sync = WeightSync(rollout_model)
        report = sync.update(dict(trainer_model.named_parameters()))

    Every tensor is written into the storage that it has: pointers, and with them CUDA graphs and
    engines' views, stay valid. Updating twice with the same weights gives the same bytes and
    reports no change. The weights may be bfloat16 or the float32 masters: the codes are those of
    the values as given, and about 2 % of FP8 codes differ between a master and its bfloat16
    rounding, so that a trainer whose forward uses one must send the same one.

    Args:
        model: with QuantizedLinear layers; other parameters are copied, in their own dtype.
        process_group: where each rank holds a shard of every weight, and a model of such shards:
            amax is reduced over the group before anything is quantised. 128x128 blocks need no
            reduction, and shards that do not cut them.
    """

    def __init__(self, model: nn.Module, process_group=None) -> None:
        self.model, self.group, self.version = model, process_group, 0
        self.layers: dict[str, QuantizedLinear] = dict(quantized_layers(model))
        if not self.layers:
            raise ValueError("WeightSync: expected a model with quantised layers, got none")
        self.experts = dict(quantized_experts(model))
        recipes = {layer.recipe for layer in self.layers.values()}
        if len(recipes) > 1:
            raise ValueError(f"WeightSync: expected one recipe, got {len(recipes)}")
        (self.recipe,) = recipes
        self.sources = {f"{name}.weight": name for name in self.layers}
        owned = {f"{n}.{part}" for n in self.layers for part in ("data", "scale", "global_scale")}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        biases = {f"{n}.bias": m.bias for n, m in self.layers.items() if m.bias is not None}
        self.plain: dict[str, Tensor] = {n: p for n, p in parameters.items() if n not in owned}
        self.plain |= biases

    @torch.no_grad()
    def update(
        self, weights: Mapping[str, Tensor], *, delta: bool = False, statistics: bool = True
    ) -> SyncReport:
        """Quantises and writes all weights.

        Args:
            weights: by the names that the model had before it was quantised, experts stacked or by
                the names of their layers. All of them; others are refused. A tied weight may be
                missing where the one it is tied to is there.
            delta: also return packets of the changed bytes, for `apply` on other copies.
            statistics: count changed and saturated codes, at the cost of reading the old ones.

        Raises:
            ValueError: a missing, unknown or ill-shaped tensor, or one that is not finite. Nothing
                was written then.
        """
        weights = self._unstacked(weights)
        self._check(weights)
        chosen = {name: weights[name].detach() for name in self.sources}
        amax = shared_amax(chosen, self.recipe, self.group)
        staged: dict[str, Tensor] = {}
        for source, name in self.sources.items():
            q = self.recipe.quantize(chosen[source], amax.get(source))
            scale = q.scale if q.global_scale is None else q.global_scale
            if not bool(scale.float().isfinite().all()):
                # with a shared scale it may be another layer's
                bad = next((n for n, w in chosen.items() if not w.isfinite().all()), source)
                raise ValueError(f"WeightSync.update: expected finite weights, got {bad}")
            staged[f"{name}.data"] = q.data
            staged[f"{name}.scale"] = q.scale
            if q.global_scale is not None:
                staged[f"{name}.global_scale"] = q.global_scale
        live = {name: self.model.get_buffer(name) for name in staged}
        packets = None
        if delta:
            plain = {n: self._plain_of(n, weights).to(t.dtype) for n, t in self._plain()}
            live |= dict(self._plain())
            staged |= {name: tensor.contiguous() for name, tensor in plain.items()}
            packets = {name: DeltaPacket.between(live[name], new) for name, new in staged.items()}
        stats = {}
        if statistics:
            for name, new in staged.items():
                if name not in self.plain:
                    stats[name] = self._stats(name, live[name], new, packets)
        for name, new in staged.items():
            live[name].copy_(new)
        if not delta:
            for name, target in self._plain():
                target.copy_(self._plain_of(name, weights))
        self.version += 1
        return SyncReport(self.version, stats, packets)

    @torch.no_grad()
    def apply(self, report: SyncReport) -> None:
        """Writes another copy's changed bytes into this one.

        Raises:
            ValueError: packets that are missing, or made for another version or model. A packet of
                the version that is already here changes nothing.
        """
        if report.delta is None:
            raise ValueError("WeightSync.apply: expected a report with packets, got none")
        if report.version not in (self.version, self.version + 1):
            raise ValueError(
                f"WeightSync.apply: expected packets of version {self.version + 1}, got "
                f"{report.version}"
            )
        live = dict(self._plain())
        for name in self.layers:
            for part in ("data", "scale", "global_scale"):
                if getattr(self.layers[name], part) is not None:
                    live[f"{name}.{part}"] = getattr(self.layers[name], part)
        if live.keys() != report.delta.keys():
            odd = sorted(live.keys() ^ report.delta.keys())[:3]
            raise ValueError(f"WeightSync.apply: packets and model differ in {', '.join(odd)}")
        for name, packet in report.delta.items():
            if packet.count != len(as_bytes(live[name])):
                raise ValueError(f"WeightSync.apply: {name} has another size")
        for name, packet in report.delta.items():
            packet.apply(live[name])
        self.version = report.version

    def _unstacked(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """With a name for each expert's layer in place of parameters of three dimensions."""
        out = dict(weights)
        for name, experts in self.experts.items():
            names = [f"{name}.{part}" for part in STACKED]
            given = [n for n in names if n in weights]
            if not given:
                continue
            if len(given) < len(names):
                (missing,) = set(names) - set(given)
                raise ValueError(f"WeightSync.update: 1 missing weights: {missing}")
            first = self.layers[f"{name}.0.gate_proj"]
            rows, hidden = first.out_features, first.in_features
            shapes = ((2 * rows, hidden), (hidden, rows))
            for n, shape in zip(names, shapes):
                want = (experts.num_experts, *shape)
                if tuple(weights[n].shape) != want:
                    got = f"{tuple(weights[n].shape)} {weights[n].dtype}"
                    raise ValueError(f"WeightSync.update: expected {n} of shape {want}, got {got}")
            out |= slices_of(name, *(out.pop(n) for n in names))
        return out

    def _plain(self) -> list[tuple[str, Tensor]]:
        """Each storage once."""
        seen: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in self.plain.items():
            seen.setdefault(id(tensor), (name, tensor))
        return list(seen.values())

    def _plain_of(self, name: str, weights: Mapping[str, Tensor]) -> Tensor:
        """By this name, or by that of a parameter that it is tied to."""
        names = [n for n, t in self.plain.items() if t is self.plain[name]]
        return next(weights[n] for n in names if n in weights)

    def _check(self, weights: Mapping[str, Tensor]) -> None:
        known = self.sources.keys() | self.plain.keys()
        tied = {id(t) for n, t in self.plain.items() if n in weights}
        missing = [n for n in self.sources if n not in weights]
        missing += [n for n, t in self.plain.items() if n not in weights and id(t) not in tied]
        unknown = [n for n in weights if n not in known]
        for what, names in (("missing", missing), ("unknown", unknown)):
            if names:
                shown = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
                raise ValueError(f"WeightSync.update: {len(names)} {what} weights: {shown}")
        for name, w in weights.items():
            want = self.plain.get(name)
            if want is None:
                layer = self.layers[self.sources[name]]
                shape, device = (layer.out_features, layer.in_features), layer.data.device
            else:
                shape, device = tuple(want.shape), want.device
            if tuple(w.shape) != shape or w.device != device or not w.is_floating_point():
                got = f"{tuple(w.shape)} {w.dtype} on {w.device}"
                raise ValueError(
                    f"WeightSync.update: expected {name} of shape {shape} and floats on {device}, "
                    f"got {got}"
                )

    def _stats(self, name, old: Tensor, new: Tensor, packets) -> TensorStats:
        a, b = as_bytes(old), as_bytes(new)
        changed = len(packets[name].values) if packets else _count(torch.ne, a, b)
        saturated = 0
        if name.endswith(".data"):
            saturated = _count(_FULL[self.recipe.format == "nvfp4"], b)
        return TensorStats(len(b), changed, saturated)


# of FP8, and of NVFP4, whose bytes hold two codes
_FULL = (
    lambda codes: (codes & 127) == 126,
    lambda codes: torch.stack(((codes & 7) == 7, (codes & 112) == 112)),
)
# what is counted at once: within L2, where temporaries cost nothing
_PIECE = 2**18


def _count(where, *tensors: Tensor) -> int:
    if not tensors[0].is_cpu:
        return int(where(*tensors).sum())
    pieces = zip(*(t.split(_PIECE) for t in tensors))
    return sum(int(torch.count_nonzero(where(*piece))) for piece in pieces)
