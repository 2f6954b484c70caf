"""How a store comes to be: ``session`` (the life of a job), ``token_writer`` and ``writer`` (what goes in), ``journal``
and ``locks`` (what is durable, and who is at work), ``seal`` (when a shard is done)."""
