"""What a rank of our fork server does for a run. Imports NeMo only there: whoever starts the ranks names it."""

from nemo_qwen_hidden.parallel.launch import Rank
from nemo_qwen_hidden.training.job import FinetuningJob


def fit_started(rank: Rank, job: FinetuningJob) -> None:
    """Trains on a rank that ``run_ranks`` has started. Collective over all ranks."""
    from nemo_qwen_hidden.training.ranks import as_if_torchrun
    from nemo_qwen_hidden.training.run import fit

    with as_if_torchrun(rank):
        fit(job, report=rank.send, pulse=rank.pulse, rendezvous=rank.rendezvous)
