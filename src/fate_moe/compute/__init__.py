"""RUN THEM. The reference path, and the native one that follows it."""

from fate_moe.compute import gpu
from fate_moe.compute.eager import Arriving, EagerExperts, ExpertMath, RoutedSum
from fate_moe.compute.native import GateForm, NativeExperts, can_compute
from fate_moe.compute.precision import LowExperts, light_experts, make_low_experts

__all__ = [
    "Arriving",
    "EagerExperts",
    "ExpertMath",
    "GateForm",
    "LowExperts",
    "NativeExperts",
    "RoutedSum",
    "can_compute",
    "gpu",
    "light_experts",
    "make_low_experts",
]
