"""Hidden states on disk: one folder, safetensors shards of a fixed number of rows, token tables, a manifest.

Knows no model and no process group. The modules here say what a store is; ``write`` makes one, ``read`` opens it, and
``upkeep`` verifies, repairs, merges and exports. Who needs one thing imports the module that has it.
"""
