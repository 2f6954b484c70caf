"""Kills a job at every moment that chance finds, and checks each time that what is claimed is true.

``python -m tests.torture --kills 100 --seed 1``; the same seed makes the same choices. Read ``harness`` first.
"""
