"""Arithmetic of a run: stages, microbatches, the rows of a local slice, bytes. Integers in, integers out.

No torch, no files, no process groups, so that each rank's share can be checked in one process.
"""
