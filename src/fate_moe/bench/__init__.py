"""What does a setting cost in quality? Evaluation tasks, comparisons, tables and plots."""
