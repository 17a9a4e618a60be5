"""SLOTS THAT HOLD BYTES."""

from fate_moe.memory.arena import Arena

__all__ = ["Arena"]
