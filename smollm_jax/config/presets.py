"""Define the sampling presets of the page. An export's generation_config.json has the default one."""

# temperature, top-p, top-k, repetition penalty
PRESETS = {"Textbook": (0.6, 0.9, 50, 1.1), "Story": (0.9, 0.95, 0, 1.1), "Greedy": (0.0, 1.0, 0, 1.0)}
START = "Textbook"
