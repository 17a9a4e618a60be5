"""The command `fate`: the only place that prints and that reads the environment."""

from fate_moe.cli.app import app, main

__all__ = ["app", "main"]
