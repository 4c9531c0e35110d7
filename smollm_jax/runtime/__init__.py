"""The process and its machine: errors, exit codes, signals, threads, files, retries and devices."""
