"""PUT TOGETHER. Build an engine from a store and a config; load a model by name."""

from fate_moe.engine.build import build
from fate_moe.engine.handle import Engine
from fate_moe.engine.load import load

__all__ = ["Engine", "build", "load"]
