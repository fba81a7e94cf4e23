#!/usr/bin/env python3
"""Writes reference.safetensors and reference.json next to this file: a dozen small attentions computed by PyTorch.

Inputs are rounded to bf16 or f16 and kept as such; outputs are those of torch.nn.functional.scaled_dot_product_attention in
float64 on the keys and values of three segments, concatenated; log-sum-exps are those of torch.logsumexp. Both are stored
as float32. Needs torch and numpy. The output is deterministic.
"""

import json
import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

KEY_TILE = 64
HERE = Path(__file__).parent

# name, dtype, heads, kv heads, head_dim, query rows, keys of the segments, tiles visited (None: all)
CASES = [
    ("mha_32", "bf16", 2, 2, 32, 8, [40, 8, 20], None),
    ("mha_64", "bf16", 2, 2, 64, 9, [64, 9, 55], None),
    ("mha_128", "bf16", 1, 1, 128, 8, [33, 8, 60], None),
    ("mha_128_f16", "f16", 1, 1, 128, 8, [33, 8, 60], None),
    ("gqa_4", "bf16", 4, 1, 64, 6, [50, 6, 44], None),
    ("gqa_7", "f16", 7, 1, 32, 5, [70, 5, 65], None),
    ("gqa_7_128", "bf16", 7, 1, 128, 3, [30, 3, 20], None),
    ("gqa_14", "f16", 14, 1, 32, 4, [10, 4, 90], None),
    ("no_prefix", "f16", 2, 1, 64, 7, [0, 7, 80], None),
    ("one_key", "bf16", 2, 2, 32, 3, [0, 1, 0], None),
    ("mask", "bf16", 2, 1, 64, 6, [100, 6, 120], [0, 2]),
    ("mask_f16", "f16", 2, 2, 32, 6, [200, 6, 30], [3, 1]),
]


def main():
    random = torch.Generator().manual_seed(4)
    tensors, cases = {}, []
    for name, dtype, heads, kv_heads, head_dim, rows, keys, tiles in CASES:
        kind = {"bf16": torch.bfloat16, "f16": torch.float16}[dtype]
        normal = lambda *shape: torch.randn(*shape, generator=random).to(kind)
        q = normal(rows, heads, head_dim) * 2
        segments = [(normal(n, kv_heads, head_dim), normal(n, kv_heads, head_dim)) for n in keys]
        k, v = (torch.cat([segment[i] for segment in segments]).double() for i in (0, 1))
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1).transpose(0, 1) for x in (k, v))
        visited = torch.ones(sum(keys), dtype=torch.bool)
        if tiles is not None:
            visited = torch.isin(torch.arange(sum(keys)) // KEY_TILE, torch.tensor(tiles))
        mask = visited.expand(rows, -1)
        wide = q.double().transpose(0, 1)
        out = F.scaled_dot_product_attention(wide, k, v, attn_mask=mask).transpose(0, 1)
        scores = (wide @ k.transpose(1, 2) / head_dim**0.5).masked_fill(~mask, float("-inf"))
        tensors[f"{name}.q"] = q
        for i, (k, v) in enumerate(segments):
            tensors[f"{name}.k{i}"], tensors[f"{name}.v{i}"] = k, v
        tensors[f"{name}.out"] = out.float()
        tensors[f"{name}.lse"] = torch.logsumexp(scores, -1).transpose(0, 1).float()
        case = dict(name=name, dtype=dtype, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
        cases.append(dict(case, rows=rows, keys=keys, tiles=tiles))
    write_safetensors(HERE / "reference.safetensors", tensors)
    made = dict(torch=torch.__version__, cases=cases)
    (HERE / "reference.json").write_text(json.dumps(made, indent=1) + "\n")


def write_safetensors(path, tensors):
    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    header, parts, end = {}, [], 0
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        view = tensor.view(torch.int16) if tensor.element_size() == 2 else tensor
        parts.append(np.ascontiguousarray(view.numpy()).tobytes())
        offsets = [end, end + len(parts[-1])]
        header[name] = dict(dtype=names[tensor.dtype], shape=list(tensor.shape), data_offsets=offsets)
        end = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


if __name__ == "__main__":
    main()
