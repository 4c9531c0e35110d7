"""Read, write, check and push Hugging Face folders."""

from smollm_jax.hf.export import export_folder, load_hf, save_hf
from smollm_jax.hf.publish import push
from smollm_jax.hf.reader import read_folder

__all__ = ["export_folder", "load_hf", "push", "read_folder", "save_hf"]
