"""Bytes that a process has sent over TCP, as the kernel counts them."""

import os
import socket
import stat
from collections.abc import Iterator
from typing import Any

# struct tcp_info of linux/tcp.h: tcpi_bytes_acked, the payload that the other side has confirmed
_BYTES_ACKED = slice(120, 128)


def sent_bytes() -> int:
    """Payload sent by all TCP sockets that are open in this process."""
    return sum(
        int.from_bytes(each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)[_BYTES_ACKED], "little")
        for each in _tcp_sockets()
    )


def _tcp_sockets() -> Iterator[socket.socket]:
    for name in os.listdir("/proc/self/fd"):
        try:
            is_socket = stat.S_ISSOCK(os.fstat(int(name)).st_mode)
        except OSError:  # the listing's own descriptor
            continue
        if not is_socket:
            continue
        with socket.socket(fileno=os.dup(int(name))) as found:
            if found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM:
                yield found


def sent_by_a_run(rank: Any, job: Any, begun: Any, store: bool) -> int:
    """Bytes that this rank sends in running a job, into its store or thrown away."""
    import torch

    from nemo_qwen_hidden import running
    from nemo_qwen_hidden.capture.taps import Capture
    from nemo_qwen_hidden.parallel.agree import wait_for_all
    from nemo_qwen_hidden.parallel.groups import process_groups
    from nemo_qwen_hidden.plan.microbatches import plan
    from nemo_qwen_hidden.store.read.tokens import TokenTable

    with process_groups(job.topology, rank=rank.rank, rendezvous=rank.rendezvous) as groups:
        if store:
            running.run(job, begun, groups)
        else:
            from nemo_qwen_hidden.model.hidden_model import Qwen2HiddenModel

            model = Qwen2HiddenModel.from_pretrained(job.model_folder, groups=groups, num_layers=job.num_layers)
            table = TokenTable(job.store_path, begun.manifest.parts)

            def tokens(first_row: int, length: int) -> torch.Tensor:
                return torch.from_numpy(table.token_id[first_row : first_row + length].astype("int64"))

            microbatches = plan(table.part(0).lengths(0, table.documents).tolist(), job.batching)
            model.capture(
                microbatches,
                tokens,
                capture=Capture(points=job.points),
                sink=lambda piece: None,
                done=lambda done: None,
            )
        wait_for_all(groups)
        return sent_bytes()
