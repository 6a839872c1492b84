"""lm-eval adapters, each run as `python -m memdlm.eval.NAME`."""
