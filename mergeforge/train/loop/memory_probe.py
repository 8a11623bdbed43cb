"""A probe: one worst-case pass before training, so that memory runs out at once or not at all."""

from __future__ import annotations

import torch

from mergeforge.train.loop.context import TrainingContext, autocast, memory_used


def probe_memory(job: TrainingContext, seq_len: int) -> int:
    """Forward and backward of a full batch of `seq_len` tokens with a label each; the peak in bytes.

    Leaves no gradient and no random number drawn. Raises torch.OutOfMemoryError.
    """
    vocabulary = int(job.inner.get_input_embeddings().weight.shape[0])
    tokens = (
        torch.arange(job.schedule.micro_batch * seq_len, device=job.device).view(job.schedule.micro_batch, seq_len)
        % vocabulary
    )
    positions = torch.arange(seq_len, device=job.device).expand_as(tokens)
    states = torch.random.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    if job.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(job.device)
    try:
        with autocast(job):
            loss = job.model(input_ids=tokens, position_ids=positions, labels=tokens, num_items_in_batch=tokens.numel())
        loss["loss"].backward()
        return memory_used(job.device)
    finally:
        job.model.zero_grad(set_to_none=True)
        torch.random.set_rng_state(states[0])
        if states[1]:
            torch.cuda.set_rng_state_all(states[1])
