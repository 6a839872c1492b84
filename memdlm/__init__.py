"""memdlm: memory between the denoising steps of a diffusion language model."""
