"""Manage the mesh, the shardings, and the processes of a job."""
