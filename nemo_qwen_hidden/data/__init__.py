"""Text and tokens in, checked token rows out.

    document.py     one document, before its tokens are known
    files.py        which files a path stands for, and what each holds
    record.py       one record of a file as a document; chat_record.py, mask_record.py: its messages and its mask
    jsonl.py        JSON lines
    columns.py      Parquet, and folders saved by ``datasets``
    sources.py      a path as a stream of documents
    tokenizer.py    the model's own tokenizer and chat template
    chat.py         a chat as one text, and what of it the assistant says
    tokenize.py     documents as checked token ids, in batches
    fingerprint.py  one hash over ids and tokens
    selector.py     which tokens of each document are kept

Depends on ``errors.py``, and the selector on ``config.py`` and ``plan/``. pyarrow, datasets and transformers are
imported where they are first needed, so that importing this room is cheap and a run over ready-made tokens needs no
tokenizer.
"""
