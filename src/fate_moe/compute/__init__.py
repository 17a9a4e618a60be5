"""RUN THEM. The reference path; faster ones must equal it."""

from fate_moe.compute.eager import EagerExperts, ExpertMath
from fate_moe.compute.precision import make_low_experts

__all__ = ["EagerExperts", "ExpertMath", "make_low_experts"]
