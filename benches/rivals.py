#!/usr/bin/env python3
"""Times PyTorch's equivalents of the kernels, the rivals of the benches in this folder.

    rivals.py [--ours kernels.csv] >rivals.csv
    rivals.py --smoke                  # runs everything once on the CPU with tiny shapes; no numbers

Shapes, names of cases, repetitions with a cold or warm L2 cache and columns are those of the benches
(docs/benchmarks.md). With --ours, the file that DLLM_BENCH_CSV made of the same run, each row also holds
our numbers for its case. Each rival is compared with a reference in float64 before it is timed. Rows go to
stdout, all else to stderr. Without torch or a CUDA device it says so and ends with status 0.
"""

import argparse
import csv
import statistics
import sys
import time

COLUMNS = (
    "op case dtype l2 bytes median_us min_us max_us gb_per_s roof_gb_per_s share_of_roof rival rival_us"
).split()
MASK, THRESHOLD, EPS = 3, 0.9, 1e-5
VERY_LOW = float("-inf")


def note(text):
    print(text, file=sys.stderr, flush=True)


try:
    import torch
    import torch.nn.functional as F
except ImportError as error:
    note(f"rivals: not measured ({error})")
    sys.exit(0)


class Rivals:
    """The device, our numbers, and where rows go."""

    def __init__(self, smoke, ours):
        self.smoke, self.failed = smoke, []
        self.device = "cpu" if smoke else "cuda"
        self.ours = {}
        for row in csv.DictReader(open(ours, newline="")) if ours else []:
            if not row["rival"]:
                self.ours[row["op"], row["case"], row["dtype"], row["l2"]] = row
        self.rows = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n", restval="")
        self.rows.writeheader()
        self.evicting = torch.zeros((1 if smoke else 256) << 18, dtype=torch.float32, device=self.device)
        torch.manual_seed(0)

    def size(self, real, small):
        return small if self.smoke else real

    def logits(self, rows, width, dtype, scale=2.0):
        """Roughly normal, one in a hundred four times as large."""
        x = torch.randn(rows, width, device=self.device) * scale
        x[torch.rand(rows, width, device=self.device) < 0.01] *= 4.0
        return x.to(dtype)

    def case(self, op, name, dtype, rivals, check, l2=("cold",), reset=lambda: None):
        """`rivals` are (name, function without arguments); `check` takes the function's result and says if it is right."""
        for rival, run in rivals:
            try:
                reset()
                right = check(run())
            except Exception as error:  # torch.compile needs Triton or a compiler, a backend of SDPA the right device
                note(f"{op} {name} {rival}: not measured ({str(error).strip().splitlines()[:1]})")
                if not rival.startswith(("torch.compile", "torch SDPA ")) or rival.endswith("originals"):
                    self.failed.append(f"{op} {name} {rival}")
                continue
            if not right:
                note(f"{op} {name} {rival}: wrong result, not measured")
                self.failed.append(f"{op} {name} {rival}")
                continue
            for warmth in l2:
                us = self.median_us(run, reset, warmth)
                row = dict(self.ours.get((op, name, dtype, warmth), {}))
                row.update(op=op, case=name, dtype=dtype, l2=warmth, rival=rival, rival_us="" if us is None else f"{us:.3f}")
                self.rows.writerow(row)
                sys.stdout.flush()
                note(f"{op} {name} {dtype} {warmth}: {rival}: " + ("ran" if us is None else f"{us:.2f} us"))
        torch.compiler.reset()

    def median_us(self, run, reset, warmth):
        """As the benches: the device evicts the L2 cache while the host enqueues the launches."""
        if self.smoke:
            run()
            return None
        times, end = [], time.monotonic() + 1.0
        while len(times) < 5 or (len(times) < 100 and time.monotonic() < end):
            reset()
            self.evicting.sum()
            if warmth == "warm":
                run()
                reset()
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            run()
            after.record()
            after.synchronize()
            times.append(before.elapsed_time(after) * 1e3)
        return statistics.median(times)


def close(got, want, share, least=1e-30):
    return torch.allclose(got.double(), want.double(), rtol=share, atol=least)


def compiled(function):
    return torch.compile(function, dynamic=False, fullgraph=True)


# unmask


def unmask_original(logits, tokens):
    """As Fast-dLLM: probabilities in float64, then one topk per sequence, each with a synchronisation."""
    candidate = tokens == MASK
    choice = logits.argmax(-1)
    probability = torch.softmax(logits.to(torch.float64), dim=-1)
    confidence = probability.gather(-1, choice.unsqueeze(-1)).squeeze(-1)
    confidence = torch.where(candidate, confidence, VERY_LOW)
    number = candidate.sum(1)
    transfer = torch.zeros_like(candidate)
    for sequence in range(tokens.shape[0]):
        best = torch.topk(confidence[sequence], k=int(number[sequence])).indices
        keep = confidence[sequence, best] >= THRESHOLD
        keep[:1] = True
        transfer[sequence, best] = keep
    tokens.copy_(torch.where(transfer, choice, tokens))
    return tokens, confidence


def unmask_f32(logits, tokens):
    """Without float64, loops and synchronisation."""
    candidate = tokens == MASK
    confidence, choice = torch.softmax(logits, dim=-1, dtype=torch.float32).max(-1)
    confidence = torch.where(candidate, confidence, VERY_LOW)
    best = confidence.argmax(1, keepdim=True)
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    transfer = candidate & ((confidence >= THRESHOLD) | (positions == best))
    tokens.copy_(torch.where(transfer, choice, tokens))
    return tokens, confidence


def unmask(to):
    shapes = [(rows, vocab, torch.bfloat16) for vocab in (126464, 152064) for rows in (32, 256, 1024)]
    for rows, vocab, dtype in shapes + [(32, 126464, torch.float32)]:
        number, width = to.size(rows, 8), to.size(vocab, 1000)
        block = min(number, 32)
        logits = to.logits(number, width, dtype).view(number // block, block, width)
        logits[..., MASK] = -10.0  # Fast-dLLM's code does not exclude the mask token
        tokens = torch.full((number // block, block), MASK, device=to.device)

        def check(result, logits=logits):
            tokens, confidence = result
            some = logits[0].double()
            want, choice = torch.softmax(some, -1).max(-1)
            transfer = (want >= THRESHOLD) | (want == want.max())
            near = (want - THRESHOLD).abs() < 1e-5
            right = (tokens[0] == torch.where(transfer, choice, MASK)) | near
            # bf16 logits tie; any of the equal ones will do.
            ties = transfer & (some.gather(-1, tokens[0].unsqueeze(-1)).squeeze(-1) == some.max(-1).values)
            return bool((right | ties).all()) and close(confidence[0], want, 1e-4, 1e-6)

        fast = compiled(unmask_f32)
        to.case(
            "unmask",
            f"{rows}x{vocab}",
            "bf16" if dtype == torch.bfloat16 else "f32",
            [
                ("torch eager float64 as Fast-dLLM", lambda: unmask_original(logits, tokens)),
                ("torch eager f32", lambda: unmask_f32(logits, tokens)),
                ("torch.compile f32", lambda: fast(logits, tokens)),
            ],
            check,
            l2=("cold", "warm") if (rows, vocab, dtype) == (32, 126464, torch.bfloat16) else ("cold",),
            reset=lambda: tokens.fill_(MASK),
        )
        del logits


def cut(to):
    rows, width = to.size(32, 4), to.size(126464, 1000)
    logits = to.logits(rows, width, torch.bfloat16)

    def top_p():
        ordered = logits.float().sort(-1, descending=True).values
        sums = torch.softmax(ordered, -1).cumsum(-1)
        return ordered.gather(-1, (sums <= 0.9).sum(-1, keepdim=True).clamp(max=width - 1)).squeeze(-1)

    def right_top_p(got):
        kept = logits.double() >= got.double().unsqueeze(-1)
        return bool(((torch.softmax(logits.double(), -1) * kept).sum(-1) >= 0.9 - 1e-4).all())

    to.case("top_k_top_p", "top-p 32x126464", "bf16", [("torch eager sort", top_p)], right_top_p)
    k = min(50, width)
    want = logits.double().sort(-1, descending=True).values[:, k - 1]
    top_k = ("torch eager topk", lambda: logits.topk(k, dim=-1).values[:, -1])
    to.case("top_k_top_p", "top-k 32x126464", "bf16", [top_k], lambda got: close(got, want, 0.0))


# The layers' small ops


def add_norm(x, delta, weight):
    x.add_(delta)
    return F.rms_norm(x, weight.shape, weight, EPS)


def norm(to):
    for rows in (32, 2048):
        number, width = to.size(rows, 4), to.size(4096, 256)
        x, delta = (to.logits(number, width, torch.bfloat16, scale) for scale in (1.0, 1e-3))
        weight = to.logits(1, width, torch.bfloat16, 1.0).view(-1)

        def check(got):
            some = x[0].double()  # with the delta by now
            want = some / (some.square().mean() + EPS).sqrt() * weight.double()
            return close(got[0], want, 0.02, 1e-6)

        fast = compiled(add_norm)
        rivals = [
            ("torch eager add and rms_norm", lambda: add_norm(x, delta, weight)),
            ("torch.compile", lambda: fast(x, delta, weight)),
        ]
        to.case("norm", f"{rows}x4096", "bf16", rivals, check)


def gate(gate_up):
    first, second = gate_up.chunk(2, dim=-1)
    return F.silu(first) * second


def swiglu(to):
    for rows in (32, 2048):
        number, width = to.size(rows, 4), to.size(12288, 512)
        gate_up = to.logits(number, 2 * width, torch.bfloat16, 1.0)
        first, second = gate_up[0].double().chunk(2)
        want = first * torch.sigmoid(first) * second
        fast = compiled(gate)
        rivals = [("torch eager", lambda: gate(gate_up)), ("torch.compile", lambda: fast(gate_up))]
        to.case("swiglu", f"{rows}x12288", "bf16", rivals, lambda got: close(got[0], want, 0.02, 1e-6))


def rows(to):
    for rows in (32, 8192):
        number, width = to.size(rows, 4), to.size(4096, 256)
        source = to.logits(2 * number, width, torch.bfloat16, 1.0)
        index = torch.randint(2 * number, (number,), dtype=torch.int32, device=to.device)
        out = torch.empty(number, width, dtype=torch.bfloat16, device=to.device)
        select = ("torch.index_select", lambda: torch.index_select(source, 0, index, out=out))
        check = lambda got: torch.equal(got[-1], source[int(index[-1])])
        to.case("gather_scatter", f"gather {rows}x4096", "bf16", [select], check)


def embed(to):
    number, width, vocab = to.size(32, 4), to.size(4096, 256), to.size(32768, 100)
    table = to.logits(vocab, width, torch.bfloat16, 1.0)
    tokens = torch.randint(vocab, (number,), dtype=torch.int32, device=to.device)
    embedding = ("torch embedding", lambda: F.embedding(tokens, table))
    to.case("embed", "32x4096", "bf16", [embedding], lambda got: torch.equal(got[-1], table[int(tokens[-1])]))


def lowest(fresh, cached):
    similarity = F.cosine_similarity(fresh, cached, dim=-1)
    return similarity, similarity.topk(fresh.shape[0] // 4, largest=False).indices


def vverify(to):
    for rows in (256, 4096, 16384):
        number, width = to.size(rows, 12), to.size(4096, 256)
        fresh = to.logits(number, width, torch.bfloat16, 1.0)
        turn = torch.randn(number, 1, device=to.device)
        cached = fresh + (turn * to.logits(number, width, torch.float32, 0.3)).to(torch.bfloat16)
        want = F.cosine_similarity(fresh[:2].double(), cached[:2].double(), dim=-1)
        # In bf16, as the models call it; selections of equal similarities differ.
        check = lambda got: close(got[0][:2], want, 0.03, 0.01) and got[1].numel() == number // 4
        fast = compiled(lowest)
        rivals = [
            ("torch eager cosine_similarity and topk", lambda: lowest(fresh, cached)),
            ("torch.compile", lambda: fast(fresh, cached)),
        ]
        to.case("vverify", f"{rows}x4096", "bf16", rivals, check)


# attention


def attention_shapes(to):
    """name, sequences, rows, keys, heads, kv heads, share of the tiles: those of benches/attention.rs, without those of forced forms."""
    llada, dream, wide = (32, 32), (28, 4), (16, 16)
    yield "llada 1x32 32/32x128 1024 keys", 1, 32, 1024, *llada, 1
    yield "dream 1x32 28/4x128 1024 keys", 1, 32, 1024, *dream, 1
    yield "llada 1x32 32/32x128 4096 keys", 1, 32, 4096, *llada, 1
    yield "llada 4x32 32/32x128 1024 keys", 4, 32, 1024, *llada, 1
    yield "dream 8x32 28/4x128 4096 keys", 8, 32, 4096, *dream, 1
    yield "llada 1x32 32/32x128 16384 keys", 1, 32, 16384, *llada, 1
    yield "llada 1x32 32/32x128 a quarter of 16384 keys", 1, 32, 16384, *llada, 4
    yield "full 16x1024 16/16x128", 16, 1024, 1024, *wide, 1
    yield "full 8x2048 16/16x128", 8, 2048, 2048, *wide, 1
    yield "full 4x4096 16/16x128", 4, 4096, 4096, *wide, 1
    yield "full 4x4096 16/16x128 a quarter of the keys", 4, 4096, 4096, *wide, 4


def attention(to):
    tile = 64
    for name, sequences, rows, keys, heads, kv_heads, every in attention_shapes(to):
        sequences, rows, keys = to.size(sequences, 1), to.size(rows, 8), to.size(keys, 512)
        dtype, group = torch.bfloat16, heads // kv_heads
        normal = lambda heads, n: to.logits(sequences * heads * n, 128, dtype, 1.0).view(sequences, heads, n, 128)
        q, k, v = normal(heads, rows), normal(kv_heads, keys), normal(kv_heads, keys)
        visited = (torch.arange(keys, device=to.device) // tile) % every == 0
        some_k, some_v = (x[0, 0][visited].double() for x in (k, v))
        want = torch.softmax(q[0, 0].double() @ some_k.T / 128**0.5, -1) @ some_v
        check = lambda got: close(got[0, 0], want, 0.02, 0.02)
        rivals = []
        if every == 1:
            sdpa = lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=group > 1)
            for backend in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
                rivals.append((f"torch SDPA {backend}", with_backend(backend, sdpa)))
            # A quarter of the cached keys are in the suffix.
            live = rows if rows < keys else keys // 2
            suffix = (keys - live) // 4
            parts = [[x.contiguous() for x in x.split([keys - live - suffix, live, suffix], dim=2)] for x in (k, v)]

            def concatenated():
                k, v = (torch.cat(part, dim=2) for part in parts)
                if group > 1:
                    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
                return F.scaled_dot_product_attention(q, k, v)

            rivals.append(("torch SDPA on concatenated keys as Fast-dLLM", concatenated))
        rivals.append(("torch.compile FlexAttention", flex(q, k, v, visited, every, tile)))
        to.case("attention", name, "bf16", rivals, check)
        del q, k, v


def with_backend(name, run):
    """A backend that cannot run these inputs is reported as not measured."""

    def only():
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel([getattr(SDPBackend, name)]):
            return run()

    return only


def flex(q, k, v, visited, every, tile):
    """Compiled at its first call: FlexAttention or a compiler may be missing."""
    made = []

    def run():
        if not made:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            sees = lambda b, h, row, key: visited[key]
            sizes = (None, None, q.shape[2], k.shape[2])
            mask = create_block_mask(sees, *sizes, device=q.device, BLOCK_SIZE=(128, tile)) if every > 1 else None
            made.append((compiled(flex_attention), mask))
        compiled_flex, mask = made[0]
        return compiled_flex(q, k, v, block_mask=mask, enable_gqa=q.shape[1] > k.shape[1])

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="on the CPU, tiny shapes, no numbers")
    parser.add_argument("--ours", metavar="FILE", help="what DLLM_BENCH_CSV made in the same run")
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        note(f"rivals: not measured (torch {torch.__version__} finds no CUDA device)")
        return 0
    note(f"torch {torch.__version__}, CUDA {torch.version.cuda}")
    to = Rivals(arguments.smoke, arguments.ours)
    with torch.inference_mode():
        for op in (unmask, cut, norm, swiglu, rows, embed, vverify, attention):
            op(to)
    for failed in to.failed:
        note(f"rivals: failed: {failed}")
    return 1 if to.failed else 0


if __name__ == "__main__":
    sys.exit(main())
