"""Which model does Fate bring along? `smolmoe`, a real MoE checkpoint built on first use."""

from fate_moe.reference.smolmoe import FITTED_PATH, SMOLMOE, build_smolmoe

__all__ = ["FITTED_PATH", "SMOLMOE", "build_smolmoe"]
