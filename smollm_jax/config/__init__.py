"""Settings of a run: dataclasses with checks, recipes, presets, and their JSON."""
