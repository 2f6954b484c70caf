"""How the states of the same tokens change from step to step, from a store that holds captured steps of a probe set.

    probe_set.py       the captured steps of a store: which there are, that their tokens are the same, their states
    change.py          two steps at one hook point: cosine, linear CKA, relative change, norms
    labels.py          a class for each token: from the tokens themselves, or from a field of the probe documents
    probe_accuracy.py  what a linear probe reads out of the states of a step
    measures.py        both as flat numbers, for a logger
    report.py          all steps of a store: values, JSON, tables
    pictures.py        the same as pictures; the only one that needs matplotlib

`docs/drift.md` has the formulas and what to make of them.
"""
