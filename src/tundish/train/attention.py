"""What keeps packed samples from seeing each other, in the form that each attention takes."""

import torch


def attention_mask(segment_ids: torch.Tensor, attention: str, sliding_window: int | None = None) -> torch.Tensor | None:
    """The mask for transformers' models, on the device of `segment_ids`.

    Args:
        segment_ids: int64 [B, T]; 1, 2, … for the samples of a row, 0 for padding.
        attention: `sdpa` and `eager` take a float mask [B, 1, T, T] that is added to the scores; `flex_attention`
            takes the segment ids themselves; `flash_attention_2` finds the samples by their restarted positions and
            must be given no mask.
        sliding_window: tokens that a token sees, itself included; None = all. A mask of ours takes the place of
            transformers' own, which would have it.

    Raises:
        ValueError: packed samples cannot be isolated in this attention.
    """
    if attention == "flash_attention_2":
        return None
    if attention == "flex_attention":
        return segment_ids
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f"model.attn_implementation: found {attention!r}, which cannot isolate packed samples; "
            "allowed are sdpa, eager, flex_attention and flash_attention_2."
        )
    position = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    distance = position[:, None] - position[None, :]
    near = (distance >= 0) & (distance < (sliding_window or len(position)))
    # Padding looks at padding, so that no row of the softmax is empty.
    allowed = (near & (segment_ids[:, :, None] == segment_ids[:, None, :]))[:, None]
    mask = torch.zeros(allowed.shape, device=segment_ids.device)
    return mask.masked_fill_(~allowed, torch.finfo(torch.float32).min)
