"""Diffusion-policy training with LoRA adapters, the first user of `registry`. Imports `registry`, never the reverse."""
