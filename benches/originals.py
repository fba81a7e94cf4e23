#!/usr/bin/env python3
"""Times the published Fast-dLLM decoding of LLaDA, for `dllm bench` to compare with this crate.

Run as `$DLLM_PYTHON originals.py`; the interpreter needs torch, numpy, transformers 4.46 and
safetensors. One JSON object comes in on stdin:

    originals     folder with a checkout of github.com/NVlabs/Fast-dLLM: <dir>/Fast-dLLM,
                  <dir>/fast-dllm, or <dir> itself (the one that holds llada/)
    threads       torch threads (default 1)
    device        cpu (default; f32), or a CUDA device as torch names it (bf16)
    checkpoint    folder of a LLaDA checkpoint, or null for random weights of `shape`
    shape         d_model, n_heads, n_kv_heads, n_layers, mlp_hidden_size, vocab_size, rope_theta,
                  rms_norm_eps, max_sequence_length, mask_token_id; with a checkpoint only
                  mask_token_id is read, and without it the checkpoint's own is used
    prompt        token ids; gen_length, block_length: as in Fast-dLLM
    repeat        timed runs of each mode (default 1), taken in turns over the modes
    modes         list of {name, cache, policy, steps, threshold or factor}, where cache is none,
                  prefix or dual, and policy is fixed, threshold or factor (a checkout from before
                  `factor` existed refuses that policy)

and one comes out, on the last line of stdout; everything else goes to stderr:

    {"torch": version, "revision": short hash or null,
     "modes": [{"name", "nfe", "seconds": [one a run], "ms_per_forward": median run / nfe}]}

A failure exits with status 1 and a message on stderr. The published functions are called as they
are: batch 1, temperature 0, low_confidence remasking, torch.compile off. They never
end, or raise IndexError, when the model predicts the mask token itself; random weights cannot.
"""

import importlib
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
import types
from pathlib import Path

FUNCTIONS = dict(
    none="generate", prefix="generate_with_prefix_cache", dual="generate_with_dual_cache"
)


def find_checkout(originals):
    """The Fast-dLLM checkout under (or at) the folder `originals`."""
    root = Path(originals)
    for folder in (root / "Fast-dLLM", root / "fast-dllm", root):
        if (folder / "llada" / "generate.py").is_file():
            return folder.resolve()
    raise ValueError(f"no Fast-dLLM checkout (a folder with llada/generate.py) in {root}")


def revision(checkout):
    """The checkout's own short hash; None for an unpacked archive, whatever repository is around it."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def import_originals(checkout, threads, device):
    """torch and Fast-dLLM's `generate` module, set up for a plain run."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # its attention is wrapped in torch.compile
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["OMP_NUM_THREADS"] = str(threads)
    sys.dont_write_bytecode = True  # leave the checkout as it is
    sys.path[:0] = [str(checkout), str(checkout / "llada")]  # revisions differ in which they need
    import torch

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    torch.set_grad_enabled(False)
    try:
        import einops  # noqa: F401
    except ImportError:  # Fast-dLLM imports it for a block class that LLaDA does not build
        stand_in = sys.modules["einops"] = types.ModuleType("einops")
        stand_in.rearrange = None
    return torch, importlib.import_module("llada.generate")


def load_model(torch, generate, checkpoint, shape, device):
    """(model, mask id), from the checkpoint or with random weights."""
    model_class = generate.LLaDAModelLM
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if checkpoint is not None:
        model = model_class.from_pretrained(checkpoint, torch_dtype=dtype).to(device)
        return model.eval(), shape.get("mask_token_id", model.config.mask_token_id)
    sizes = dict(shape, embedding_size=shape["vocab_size"])
    config = model_class.config_class(
        **sizes, block_type="llama", activation_type="silu", layer_norm_type="rms", rope=True,
        include_bias=False, include_qkv_bias=False, bias_for_layer_norm=False, weight_tying=False,
        attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0,
    )
    torch.set_default_dtype(dtype)  # 8 billion parameters in f32 would be made first, and take twice the memory
    with torch.device(device):
        model = model_class(config).to(dtype=dtype, device=device).eval()
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(std=0.02)
        else:
            weight.fill_(1.0)  # norms
    model.model.transformer.ff_out.weight[shape["mask_token_id"]] = 0.0  # never the largest logit
    return model, shape["mask_token_id"]


def bind_mode(generate, mode, common):
    """A call of no arguments that decodes the prompt in this mode and returns (x, nfe)."""
    cache, policy = mode["cache"], mode["policy"]
    if cache not in FUNCTIONS or policy not in ("fixed", "threshold", "factor"):
        raise ValueError(f"Fast-dLLM has no cache {cache!r} with policy {policy!r}")
    blocks, rest = divmod(common["gen_length"], common["block_length"])
    if rest or blocks < 1 or mode["steps"] % blocks:
        raise ValueError("gen_length must be whole blocks, and steps a multiple of their number")
    function = getattr(generate, FUNCTIONS[cache])
    arguments = dict(common, steps=mode["steps"])
    if policy != "fixed":
        if policy not in inspect.signature(function).parameters:
            raise ValueError(f"this Fast-dLLM checkout's {function.__name__} has no {policy}")
        arguments[policy] = mode[policy]
    return lambda: function(**arguments)


def run(request):
    checkout = find_checkout(request["originals"])
    device = request.get("device", "cpu")
    torch, generate = import_originals(checkout, request.get("threads", 1), device)
    synchronize = torch.cuda.synchronize if device != "cpu" else lambda: None
    model, mask_id = load_model(torch, generate, request.get("checkpoint"), request.get("shape") or {}, device)
    prompt = torch.tensor([request["prompt"]], dtype=torch.long, device=device)
    common = {
        "model": model, "prompt": prompt, "mask_id": mask_id, "temperature": 0.0,
        "gen_length": request["gen_length"], "block_length": request["block_length"],
    }
    modes = request["modes"]
    calls = [bind_mode(generate, mode, common) for mode in modes]
    names = [mode.get("name", f"{mode['cache']}-{mode['policy']}") for mode in modes]
    rows = [{"name": name, "nfe": 0, "seconds": []} for name in names]

    model(torch.nn.functional.pad(prompt, (0, request["gen_length"]), value=mask_id))  # warm-up
    for _ in range(request.get("repeat", 1)):
        for row, call in zip(rows, calls):
            synchronize()
            start = time.perf_counter()
            _, row["nfe"] = call()
            synchronize()
            row["seconds"].append(time.perf_counter() - start)
            print(f"{row['name']}: {row['nfe']} forwards, {row['seconds'][-1]:.3f} s", file=sys.stderr)
    for row in rows:
        row["ms_per_forward"] = 1000.0 * statistics.median(row["seconds"]) / row["nfe"]
    return {"torch": torch.__version__, "revision": revision(checkout), "modes": rows}


def main():
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print belongs on stderr
    try:
        print(json.dumps(run(json.load(sys.stdin))), file=answer, flush=True)
    except Exception as error:
        traceback.print_exc()
        sys.exit(f"originals.py: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
