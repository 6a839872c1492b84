"""dllm: train, decode and evaluate masked-diffusion language models."""
