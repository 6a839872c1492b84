"""Programming benchmarks (HumanEval, MBPP): problems, code in answers, and a sandbox that runs it."""
