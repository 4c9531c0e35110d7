"""Find out whether a run fits devices that are not here, and estimate how fast it would be."""
