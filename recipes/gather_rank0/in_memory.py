"""Hidden states of a few texts as tensors on rank 0, from four ranks, TP x PP:

torchrun --standalone --nproc-per-node 4 recipes/gather_rank0/in_memory.py
"""

from transformers import AutoTokenizer

from nemo_qwen_hidden import Qwen2HiddenModel, demo
from nemo_qwen_hidden.parallel.groups import process_groups
from nemo_qwen_hidden.topology import Topology

MODEL = str(demo.model_folder())  # or any folder of a Qwen2 or Qwen2.5
TEXTS = ["def area(radius):", "A class is a template.", "import sys"]

tokenizer = AutoTokenizer.from_pretrained(MODEL)
batch = tokenizer(TEXTS, padding=True, padding_side="right", return_tensors="pt")

with process_groups(Topology(tp=2, pp=2)) as groups:
    model = Qwen2HiddenModel.from_pretrained(MODEL, groups=groups)
    states = model.hidden_states(  # every rank calls it, with the same arguments
        batch.input_ids,
        lengths=batch.attention_mask.sum(dim=1),
        hook_points=["embed", "resid_post@2", "resid_post@-1", "final_norm"],
        gather="rank0",
    )
    for hook_point, values in states.items():  # [batch, tokens, hidden] on rank 0, nothing on the others
        print(f"{hook_point}: {list(values.shape)} {values.dtype}, norm of the first token {values[0, 0].norm():.4f}")
