"""Hidden states on disk: one folder, safetensors shards of a fixed number of rows, a token table, a manifest.

Knows no model and no process group. Who needs one thing imports the module that has it: ``session`` (the life of a
store being made), ``tokens`` and ``writer`` (what goes in), ``reader`` and ``describe`` (what comes out).
"""
