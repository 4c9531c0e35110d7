"""Check whether a run fits devices that are not here, and estimate its speed."""
