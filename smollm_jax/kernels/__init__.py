"""Faster forms of the model's functions for each device, checked against the reference."""
