"""Models with quantised weights: replace the linear layers, keep them in step with a trainer,
write them as checkpoints that inference engines read."""

from rlkern.quant.checkpoint import save_quantized
from rlkern.quant.delta import DeltaPacket
from rlkern.quant.experts import MasterExperts, QuantizedExperts
from rlkern.quant.linear import PRESETS, MasterLinear, QuantizedLinear, Recipe
from rlkern.quant.model import quantize_model
from rlkern.quant.sync import SyncReport, TensorStats, WeightSync

__all__ = [
    "PRESETS",
    "DeltaPacket",
    "MasterExperts",
    "MasterLinear",
    "QuantizedExperts",
    "QuantizedLinear",
    "Recipe",
    "SyncReport",
    "TensorStats",
    "WeightSync",
    "quantize_model",
    "save_quantized",
]
