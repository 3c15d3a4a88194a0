"""Benchmarks through lm-evaluation-harness (extra `eval`): our model class, our suite and task files, the runs and tables."""
