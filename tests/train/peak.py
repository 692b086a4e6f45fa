"""Peak memory of training steps of models with random weights: `python peak.py PORT '[[…], …]'`, one size a list.

A size is hidden_size, layers, feed_forward_size, heads, key_value_heads, vocabulary_size, context_length, microbatch,
whether activations are computed again and whether layers are gathered again. Prints the peaks above what is there
before, in bytes, as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from tundish.train.attention import attention_mask
from tundish.train.lion import DecoupledLionW
from tundish.train.model import target_loss


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _peak(size: list[int]) -> int:
    hidden, layers, feed_forward, heads, key_values, vocabulary, context, rows, again, reshard = size
    before = _status("VmRSS")
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=feed_forward, num_attention_heads=heads,
        num_key_value_heads=key_values, vocab_size=vocabulary, max_position_embeddings=context, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model: Any = LlamaForCausalLM(config)
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=bool(reshard))
    fully_shard(model, mesh=mesh, reshard_after_forward=bool(reshard))
    if again:
        model.gradient_checkpointing_enable()
    optimizer = DecoupledLionW(model.parameters(), lr=1e-4)
    segments, positions = torch.ones(rows, context, dtype=torch.long), torch.arange(context).repeat(rows, 1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    for _ in range(2):
        ids = torch.randint(0, vocabulary, (rows, context))
        mask = attention_mask(segments, "sdpa")
        output = model(input_ids=ids, position_ids=positions, attention_mask=mask)
        target_loss(output.logits, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        del output
    return _status("VmHWM") - before


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[1]}", rank=0, world_size=1)
    print(json.dumps([_peak(size) for size in json.loads(sys.argv[2])]))
