"""The mask that keeps packed samples from attending to each other, in the form that each attention takes."""

import torch


def attention_mask(segment_ids: torch.Tensor, attention: str, sliding_window: int | None = None) -> torch.Tensor | None:
    """The mask for transformers' models, on the device of `segment_ids`.

    Args:
        segment_ids: int64 [B, T]; 1, 2, … for the samples of a row, 0 for padding.
        attention: `sdpa` and `eager` take a float mask [B, 1, T, T] that is added to the scores; `flex_attention`
            takes the segment ids themselves; `flash_attention_2` takes no mask and finds the samples by their restarted
            positions.
        sliding_window: how many tokens a token sees, itself included; None = all. It must be in this mask, which
            replaces transformers' own.

    Raises:
        ValueError: packed samples cannot be isolated in this attention.
    """
    if attention == "flash_attention_2":
        return None
    if attention == "flex_attention":
        return segment_ids
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f"model.attn_implementation must be sdpa, eager, flex_attention or flash_attention_2, not {attention!r}, "
            "which cannot isolate packed samples."
        )
    position = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    distance = position[:, None] - position[None, :]
    near = (distance >= 0) & (distance < (sliding_window or len(position)))
    # Padding attends to padding: a row of the softmax with nothing in it would be NaN.
    allowed = (near & (segment_ids[:, :, None] == segment_ids[:, None, :]))[:, None]
    mask = torch.zeros(allowed.shape, device=segment_ids.device)
    return mask.masked_fill_(~allowed, torch.finfo(torch.float32).min)
