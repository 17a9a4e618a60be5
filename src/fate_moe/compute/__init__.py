"""RUN THEM. The reference path; faster ones must equal it."""

from fate_moe.compute.eager import EagerExperts, ExpertMath

__all__ = ["EagerExperts", "ExpertMath"]
