"""Work on finished stores: ``verify``, ``repair``, ``merge``, ``export``; and the ``summary`` for ``inspect``."""
