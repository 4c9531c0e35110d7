"""The machinery that the benchmark commands share: tables, sides of a comparison, workloads and peers."""
