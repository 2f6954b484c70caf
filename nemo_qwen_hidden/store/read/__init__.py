"""What comes out of a store: ``reader`` (``open_store``), ``views``, ``tokens``, ``datasets``, ``describe``.

Files are reached through a ``source``: a folder of this machine, mapped into memory (``maps``, ``slots``, ``mapped``),
or another file system (``remote``).
"""
