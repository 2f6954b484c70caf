"""The doctor: checks hidden states, and names what is wrong with them.

``observation`` is what is looked at, ``algebra`` needs nothing else; ``reference`` is the same model in transformers,
``compare`` holds the two together. On a mismatch ``diagnose`` tries hypotheses (``labels``, ``orders``, ``inputs``,
``weights``, ``layers``, ``values``), each of which says what the reference would have to be for the mismatch to vanish.

Needs neither NeMo nor Megatron, ``live`` apart.
"""
