"""What does a setting cost in quality? Evaluation tasks, comparisons, tables and plots."""

from fate_moe.bench.compare import compare
from fate_moe.bench.evaluate import Evaluation, Tasks, evaluate

__all__ = ["Evaluation", "Tasks", "compare", "evaluate"]
