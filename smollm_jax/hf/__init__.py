"""Hugging Face folders, both ways: read, write, check and push them."""

from smollm_jax.hf.export import export_folder, load_hf, save_hf
from smollm_jax.hf.publish import push
from smollm_jax.hf.reader import read_folder

__all__ = ["export_folder", "load_hf", "push", "read_folder", "save_hf"]
