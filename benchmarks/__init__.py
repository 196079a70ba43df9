"""Measurements against PEFT's LoRA, one script per claim: `python -m benchmarks.step`, `benchmarks.lifecycle`, ..."""
