"""Distributed fine-tuning of text-to-image diffusion models: the command `diffray` and its Python API."""
