"""Steering on two tensor parallel ranks: the difference of the mean states of two texts, added while a third goes on:

torchrun --standalone --nproc-per-node 2 recipes/steering/steer.py
"""

import torch
from transformers import AutoTokenizer

from nemo_qwen_hidden import Qwen2HiddenModel, demo
from nemo_qwen_hidden.capture import edits
from nemo_qwen_hidden.parallel.groups import process_groups
from nemo_qwen_hidden.topology import Topology

MODEL = str(demo.model_folder())  # or any folder of a Qwen2 or Qwen2.5
TOWARDS = "def area(self, radius):\n    return self.pi * radius ** 2\n\n    def __init__(self):\n        self.pi = 3\n"
FROM = "The area of a circle is computed from its radius. If the object has no radius, an exception is raised."
PROMPT = "This function"
HOOK_POINT, FACTOR, TOKENS = "resid_post@1", 1.0, 12

tokenizer = AutoTokenizer.from_pretrained(MODEL)
texts = tokenizer([TOWARDS, FROM], padding=True, padding_side="right", return_tensors="pt")
prompt = tokenizer([PROMPT], return_tensors="pt").input_ids

with process_groups(Topology(tp=2)) as groups:
    model = Qwen2HiddenModel.from_pretrained(MODEL, groups=groups, output_layer=True)
    (means,) = model.hidden_states(  # every rank calls it, and all of them get [texts, hidden]
        texts.input_ids, lengths=texts.attention_mask.sum(dim=1), hook_points=[HOOK_POINT], pool="mean", gather="all"
    ).values()
    vector = means[0] - means[1]
    shown = {"plain": (), "steered": (edits.add(HOOK_POINT, vector, factor=FACTOR),)}
    new = {name: model.generate(prompt, tokens=TOKENS, edits=chosen)[0] for name, chosen in shown.items()}
    if groups.place.rank == 0:
        print(f"norm of the vector: {vector.norm():.4f}")
        for name, tokens in new.items():
            print(f"{name}: {PROMPT + tokenizer.decode(torch.tensor(tokens))!r}")
