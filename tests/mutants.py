#!/usr/bin/env python3
"""Mutation tests: applies mutations to copies of kernels and host code, one at a time. The test that each names must fail.

    tests/mutants.py                       all mutations
    tests/mutants.py vverify "no barrier"  those whose file or description contains one of these
    tests/mutants.py --table               only checks that every mutation fits its source and that its test exists
    tests/mutants.py --markdown            only prints the table of all mutations

Needs the requirements of the tests (cargo, a C++17 compiler, Linux on x86-64) and python3 without packages. The tests are
built once. For a mutation of a kernel, only the kernels that contain it are compiled, with the commands of
softgpu/build.rs, and the tests load them through SOFTGPU_KERNELS. For a mutation of src/, the test program that shall detect it
is built from a copy of the repository. Fails if a mutation survives, does not compile, crashes or hangs the tests, or does not fit
its source. docs/mutation-tests.md has more.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Kernel files that the tests of a file launch.
KERNELS = {
    "unmask": ["unmask", "top_k_top_p"],
    "vverify": ["vverify", "gather_scatter"],
    **{name: [name] for name in ["gather_scatter", "embed", "norm", "rope", "swiglu", "attention"]},
    "merge_state": ["merge_state", "attention"],
    "advance": ["advance", "unmask"],
}
# Tests of several ops.
KERNELS["offsets"] = sorted({kernel for kernels in KERNELS.values() for kernel in kernels})
# Programs of tests/.
PROGRAMS = ["ops", "engine", "device", "cli", "build"]
# A test that runs longer hangs; the slowest takes a minute alone.
TIMEOUT_S = 300


def source(cuda, name):
    """Returns the kernel file of this name."""
    return next(cuda.glob(f"*/{name}.cu"))


@dataclass
class Mutant:
    file: str  # in cuda/, or in src/ if it ends in .rs
    description: str  # the mutated behaviour
    test: str  # of a kernel: MODULE::TEST in tests/ops; of src/: PROGRAM/MODULE::TEST in tests/, or the path of a unit test
    original: str  # occurs once in the file; lines around the mutated one make it unique
    mutated: str


MUTANTS = [
    # ---- unmask: phase 1
    Mutant("common/logits.cuh", "vectors across the end of the vocabulary are 0",
           "unmask::vocabularies_and_policies",
           "if (first + v * step + kVector<T> > vocab_size) bits[v]", "if (first + v * step >= vocab_size) bits[v]"),
    Mutant("common/logits.cuh", "the last full vector of the vocabulary is 0", "unmask::vocabularies_and_policies",
           "if (first + v * step + kVector<T> <= vocab_size) bits[v]",
           "if (first + v * step + kVector<T> < vocab_size) bits[v]"),
    Mutant("common/logits.cuh", "logits beyond the vocabulary are 0", "unmask::vocabularies_and_policies",
           "if (first + v * step + kVector<T> > vocab_size) bits[v]",
           "if (first + v * step + kVector<T> > vocab_size && first + v * step < vocab_size) bits[v]"),
    Mutant("common/logits.cuh", "all vectors of a thread equal its first", "unmask::vocabularies_and_policies",
           "reinterpret_cast<const uint4*>(row + first + v * step);", "reinterpret_cast<const uint4*>(row + first);"),
    Mutant("any/unmask.cu", "ties in a vector go to the higher token", "unmask::ties_go_to_the_lowest_token",
           "for (int j = kVector<T> - 1; j >= 0; j--) token", "for (int j = 0; j < kVector<T>; j++) token"),
    Mutant("any/unmask.cu", "ties in a thread go to the higher vector", "unmask::ties_go_to_the_lowest_token",
           "for (int v = kVectors - 1; v >= 0; v--) {", "for (int v = 0; v < kVectors; v++) {"),
    Mutant("common/reduce.cuh", "ties between threads go to the higher token", "unmask::ties_go_to_the_lowest_token",
           "min(index_of(a), index_of(b))", "max(index_of(a), index_of(b))"),
    Mutant("any/unmask.cu", "the loop is never repeated with sanitized logits", "unmask::nan_and_infinities",
           "if (clean || sum_of(both) < INFINITY) break;", "break;"),
    Mutant("any/unmask.cu", "the repeated loop does not sanitize the logits", "unmask::nan_and_infinities",
           "if (clean) logits[v].x[j] = sanitized(logits[v].x[j]);", ";"),
    Mutant("any/unmask.cu", "general: NaN stays in the sum", "unmask::nan_and_infinities",
           "float logit = sanitized(logits[i * kThreads]);\n    if (logit < min_logit)",
           "float logit = logits[i * kThreads];\n    if (logit < min_logit)"),
    Mutant("any/unmask.cu", "general: every batch loads the first one", "unmask::every_confidence",
           "first_token<T>(chunk, batch), kStep", "first_token<T>(chunk, 0), kStep"),
    Mutant("any/unmask.cu", "general: every batch is stored over the first one", "unmask::every_confidence",
           "put(logits[((batch + v) * kVec + j) * kThreads]", "put(logits[(v * kVec + j) * kThreads]"),
    Mutant("any/unmask.cu", "general: ties in a thread go to the higher token", "unmask::ties_go_to_the_lowest_token",
           "if (logit > max) {", "if (logit >= max) {"),
    Mutant("any/unmask.cu", "the mask token takes part in a chunk", "unmask::the_mask_token_is_never_chosen",
           "        logits[v].x[j] = -INFINITY;", "        ;"),
    Mutant("any/unmask.cu", "general: the mask token takes part in a chunk", "unmask::the_mask_token_is_never_chosen",
           "      logits[i * kThreads] = -INFINITY;", "      ;"),
    Mutant("any/unmask.cu", "the mask token's logit is not saved", "unmask::the_mask_token_is_never_chosen",
           "if (p.mask_token < p.vocab_size) *mask = sanitized(logits[v].x[j]);", ";"),
    Mutant("any/unmask.cu", "general: a mask token below min_logit is saved", "unmask::top_p_and_top_k",
           "if (p.mask_token < p.vocab_size && logit >= min_logit) *mask", "if (p.mask_token < p.vocab_size) *mask"),
    Mutant("any/unmask.cu", "the mask token is searched in the first chunk only",
           "unmask::the_mask_token_is_never_chosen",
           "if (mask_token / kChunk != chunk) return", "if (mask_token / kChunk != 0 || chunk != 0) return"),
    Mutant("any/unmask.cu", "a mask token at a chunk's end is searched in the next chunk",
           "unmask::the_mask_token_is_never_chosen",
           "if (mask_token / kChunk != chunk) return", "if ((mask_token + 1) / kChunk != chunk) return"),
    Mutant("any/unmask.cu", "no barrier before the mask token's logit is saved",
           "unmask::the_same_bits_in_every_order",
           "mask = -INFINITY;\n  __syncthreads();", "mask = -INFINITY;\n  ;"),
    Mutant("any/unmask.cu", "no barrier before the mask token's logit is read", "unmask::the_same_bits_in_every_order",
           "take(&mask);\n  __syncthreads();", "take(&mask);\n  ;"),
    Mutant("any/unmask.cu", "the mask token's logit is lost between chunks", "unmask::the_mask_token_is_never_chosen",
           "high.mask = fmaxf(high.mask, low.mask);", ";"),
    Mutant("any/unmask.cu", "the mask token's logit is lost between lanes",
           "unmask::the_mask_token_is_never_chosen",
           "b.mask = __shfl_xor_sync(kAllLanes, a.mask, lanes);", "b.mask = -INFINITY;"),
    Mutant("any/unmask.cu", "a logit equal to min_logit is dropped", "unmask::top_p_and_top_k",
           "if (logit < min_logit) logit = -INFINITY;", "if (logit <= min_logit) logit = -INFINITY;"),
    Mutant("any/unmask.cu", "ties with the largest logit are not the second largest",
           "unmask::ties_go_to_the_lowest_token",
           "if (token_of(i) != partial.token) second", "if (logit < partial.max) second"),
    Mutant("any/unmask.cu", "entropy's moment is of logits, not of distances", "unmask::every_confidence",
           "if (weight > 0.f) moment += weight * x;\n    if (token",
           "if (weight > 0.f) moment += weight * logit;\n    if (token"),
    Mutant("any/unmask.cu", "confidences are never tempered", "unmask::draws",
           "return p.tempered_confidence && p.temperature > 0.f ? 1.f / p.temperature : 1.f;", "return 1.f;"),
    Mutant("any/unmask.cu", "draws take the random numbers of ranks", "unmask::draws",
           "philox(p.seed, kToken, step", "philox(p.seed, kRank, step"),
    Mutant("any/unmask.cu", "noise is assumed to be at most 3", "unmask::draws",
           "p.temperature * 37.f", "p.temperature * 3.f"),
    # ---- unmask: phase 2
    Mutant("any/unmask.cu", "sums of chunks are added without rescaling", "unmask::vocabularies_and_policies",
           "high.sum += weight * low.sum;", "high.sum += low.sum;"),
    Mutant("any/unmask.cu", "moments of chunks are not shifted", "unmask::every_confidence",
           "high.moment += weight * (low.moment + x * low.sum);", "high.moment += weight * low.moment;"),
    Mutant("any/unmask.cu", "the other chunk's largest is not considered as the second", "unmask::every_confidence",
           "high.second = fmaxf(high.second, low.max);", "high.second = fmaxf(high.second, low.second);"),
    Mutant("any/unmask.cu", "chunks past the 16th are dropped", "unmask::published_vocabularies",
           "for (int c = threadIdx.x; c < chunks; c += kWarp) all =",
           "for (int c = threadIdx.x; c < 16; c += kWarp) all ="),
    Mutant("any/unmask.cu", "the mask token is left out of the sum", "unmask::the_mask_token_is_never_chosen",
           "    all.sum += weight;", "    ;"),
    Mutant("any/unmask.cu", "a mask token that would win keeps its share of the sum",
           "unmask::the_mask_token_is_never_chosen",
           "const bool mask_wins = ranked(all.mask, p.mask_token) > ranked(all.max, all.token);",
           "const bool mask_wins = false;"),
    Mutant("any/unmask.cu", "a mask token that equals a later best does not win",
           "unmask::the_mask_token_is_never_chosen",
           "ranked(all.mask, p.mask_token) > ranked(all.max, all.token);", "all.mask > all.max;"),
    Mutant("any/unmask.cu", "the mask token is never the second largest", "unmask::the_mask_token_is_never_chosen",
           "all.second = fmaxf(all.second, all.mask);", ";"),
    Mutant("any/unmask.cu", "a row without a finite logit counts as not masked", "unmask::rows_without_a_finite_logit",
           "return {0.f, kNoFiniteLogit};", "return {0.f, kNotMasked};"),
    Mutant("any/unmask.cu", "confidence is that of the largest, not of the drawn token", "unmask::draws",
           "const float logit = draws ? logit_at<T>(p, row.logits_row, result.token, min_logit) : all.max;",
           "const float logit = all.max;"),
    Mutant("common/logits.cuh", "an infinite logit of a drawn token stays infinite", "unmask::nan_and_infinities",
           "return sanitized(logit);", "return logit;"),
    # ---- unmask: phase 3
    Mutant("any/unmask.cu", "the row counter's total is one short", "unmask::vocabularies_and_policies",
           "is_last(workspace.row_counter + row_index, gridDim.x)",
           "is_last(workspace.row_counter + row_index, gridDim.x - 1)"),
    Mutant("any/unmask.cu", "all sequences share a counter", "unmask::the_same_bits_in_every_order",
           "is_last(workspace.sequence_counter + row.sequence, rows)", "is_last(workspace.sequence_counter, rows)"),
    Mutant("any/unmask.cu", "rows that are not masked can be committed", "unmask::vocabularies_and_policies",
           "if (result.token >= 0 && position < before) {", "if (result.token >= kNotMasked && position < before) {"),
    Mutant("any/unmask.cu", "the window's end is one late", "unmask::positions_past_the_window_are_scored_and_left",
           "if (result.token >= 0 && position < before) {", "if (result.token >= 0 && position <= before) {"),
    Mutant("any/unmask.cu", "the threshold must be exceeded", "unmask::selections_of_every_size",
           "reach += result.confidence >= p.threshold;", "reach += result.confidence > p.threshold;"),
    Mutant("any/unmask.cu", "the threshold's bound is an ulp high", "unmask::selections_of_every_size",
           "uint64_t(ordered(p.threshold)) << 32", "uint64_t(ordered(p.threshold) + 1) << 32"),
    Mutant("any/unmask.cu", "the threshold's bound is an ulp low", "unmask::selections_of_every_size",
           "uint64_t(ordered(p.threshold)) << 32", "uint64_t(ordered(p.threshold) - 1) << 32"),
    Mutant("any/unmask.cu", "nothing is committed where no candidate reaches the threshold",
           "unmask::equal_rows_are_taken_in_order",
           "count = min(count, max(1, reach));", "count = min(count, reach);"),
    Mutant("any/unmask.cu", "all candidates above the threshold are written, despite the quota",
           "unmask::vocabularies_and_policies",
           "if (reach > 0 && reach <= count) bound", "if (reach > 0) bound"),
    Mutant("any/unmask.cu", "the quota may exceed the number of candidates",
           "unmask::positions_past_the_window_are_scored_and_left",
           "int count = max(0, min(quota, eligible));", "int count = max(0, quota);"),
    Mutant("any/unmask.cu", "a failed row does not stop its sequence", "unmask::rows_without_a_finite_logit",
           "if (bad || failed != 0x7fffffff) count = 0;", "if (bad) count = 0;"),
    Mutant("any/unmask.cu", "factor: the j-th has the bound of the one before",
           "unmask::selections_of_every_size",
           "1.f - factor / (middle + 2);", "1.f - factor / (middle + 1);"),
    Mutant("any/unmask.cu", "factor: the best may fail", "unmask::factors_of_few_rows",
           "int low = 1, high = n;", "int low = 0, high = n;"),
    Mutant("any/unmask.cu", "factor: the search for the first failure is off by one",
           "unmask::selections_of_every_size",
           "Sum()) <= middle) {", "Sum()) < middle) {"),
    Mutant("any/unmask.cu", "factor: the last one is not committed as in the reference",
           "unmask::selections_of_every_size",
           "if (count == 0 || count == n - 1) count++;", "if (count == 0) count++;"),
    Mutant("any/unmask.cu", "the bound of token indices is one high", "unmask::indices_out_of_range",
           "row.token < p.num_tokens &&", "row.token <= p.num_tokens &&"),
    Mutant("any/unmask.cu", "the bound of logits rows is one high", "unmask::indices_out_of_range",
           "row.logits_row < p.num_logits_rows;", "row.logits_row <= p.num_logits_rows;"),
    Mutant("any/unmask.cu", "a single empty sequence is not cleared", "unmask::sequences_without_rows_or_masks",
           "(p.num_sequences > 1 || cu_rows[1] <= 0)", "p.num_sequences > 1"),
    Mutant("any/unmask.cu", "empty sequences keep their last failure", "unmask::sequences_without_rows_or_masks",
           "at<int32_t>(p.failed)[s] = DLLM_NONE_FAILED;", ";"),
    Mutant("any/unmask.cu", "rows' partials overlap", "unmask::the_same_bits_in_every_order",
           "workspace.partials + int64_t(row_index) * gridDim.x;", "workspace.partials + row_index;"),
    # ---- top_k_top_p
    Mutant("any/top_k_top_p.cu", "top-p keeps one token too few at a full sum", "unmask::top_p_and_top_k",
           "(double(p.top_p) * double(total)) + 1;", "(double(p.top_p) * double(total));"),
    Mutant("any/top_k_top_p.cu", "a mask token that would win takes part", "unmask::min_logits",
           "row.without_mask = rank_index(top) == p.mask_token;", "row.without_mask = false;"),
    Mutant("any/top_k_top_p.cu", "a thread's second vector is its first", "unmask::min_logits",
           "first, kStep, p.vocab_size, bits);", "first, 0, p.vocab_size, bits);"),
    Mutant("any/top_k_top_p.cu", "every second vector is taken twice", "unmask::min_logits",
           "first += kBatch * kStep", "first += kStep"),
    Mutant("any/top_k_top_p.cu", "the weight above a step is not subtracted", "unmask::min_logits",
           "share -= step.above;", ";"),
    Mutant("any/top_k_top_p.cu", "top-k ignores top-p's threshold", "unmask::min_logits",
           "min_logit = fmaxf(min_logit, logit_at_share(row, ByCount(), steps, p.vocab_size, p.top_k));",
           "min_logit = logit_at_share(row, ByCount(), steps, p.vocab_size, p.top_k);"),
    Mutant("any/top_k_top_p.cu", "no barrier before a digit's counts are read", "unmask::the_same_bits_in_every_order",
           "weight(logit));\n    });\n    __syncthreads();", "weight(logit));\n    });\n    ;"),
    # ---- logits, random numbers
    Mutant("common/logits.cuh", "the last token of the vocabulary is dropped", "unmask::vocabularies_and_policies",
           "first + j < vocab_size ? row[first + j]", "first + j < vocab_size - 1 ? row[first + j]"),
    Mutant("common/logits.cuh", "infinite logits stay infinite", "unmask::nan_and_infinities",
           "return fminf(fmaxf(logit, -INFINITY), FLT_MAX);", "return fmaxf(logit, -INFINITY);"),
    Mutant("common/logits.cuh", "guidance is rounded once less", "unmask::guidance_rounds_as_the_originals",
           "__fadd_rn(unconditional, __fmul_rn(scale + 1.f, __fsub_rn(conditional, unconditional)))",
           "fmaf(scale + 1.f, __fsub_rn(conditional, unconditional), unconditional)"),
    Mutant("common/philox.cuh", "large noise is computed from a rounded u", "unmask::large_noise_is_exact",
           "const bool high = bits >> 52;", "const bool high = false;"),
    # ---- selection, reductions, memory
    Mutant("common/select.cuh", "the k-th is found one bucket low", "vverify::ratios",
           "above < k && k <= above + content", "above <= k && k < above + content"),
    Mutant("common/select.cuh", "the count above a digit is not subtracted", "vverify::ratios",
           "k -= bucket.above;", ";"),
    Mutant("common/select.cuh", "buckets of other warps are not added", "vverify::ratios",
           "int w = warp + 1; w < kWarps;", "int w = warp + 2; w < kWarps;"),
    Mutant("common/select.cuh", "no barrier before the histogram is read", "vverify::ratios",
           "__syncthreads();\n    const Bucket<int> bucket", ";\n    const Bucket<int> bucket"),
    Mutant("common/select.cuh", "no barrier after the histogram is cleared", "vverify::ratios",
           "histogram[threadIdx.x] = 0;\n    __syncthreads();", "histogram[threadIdx.x] = 0;\n    ;"),
    Mutant("common/select.cuh", "no barrier before the bucket found is read", "vverify::ratios",
           "__syncthreads();\n  return found;", ";\n  return found;"),
    Mutant("common/reduce.cuh", "negative numbers are in reverse order", "vverify::ratios",
           "bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u)", "bits ^ 0x80000000u"),
    Mutant("common/reduce.cuh", "a warp's other half is not reduced", "norm::equals_the_reference",
           "int lanes = kWarp / 2;", "int lanes = kWarp / 4;"),
    Mutant("common/reduce.cuh", "lanes read past the warps' results", "norm::equals_the_reference",
           "lane < kWarps ? results[lane] : zero", "lane < kWarp ? results[lane] : zero"),
    Mutant("common/reduce.cuh", "no barrier before the warps' results are read", "norm::equals_the_reference",
           "= x;\n  __syncthreads();", "= x;\n  ;"),
    Mutant("common/reduce.cuh", "no barrier before results are overwritten",
           "vverify::batch_invariant_in_any_order",
           "__syncthreads();  // the results of the previous call have been read", ";"),
    Mutant("common/memory.cuh", "the counter is not reset", "vverify::ratios",
           "if (last) *counter = 0;", ";"),
    Mutant("common/memory.cuh", "no barrier before all threads read `last`", "vverify::ratios",
           "__syncthreads();\n  return last;", ";\n  return last;"),
    Mutant("common/memory.cuh", "no block is the last", "vverify::ratios",
           "atomicAdd(counter, 1u) == total - 1;", "atomicAdd(counter, 1u) == total;"),
    Mutant("common/memory.cuh", "the count of rows is ignored", "gather_scatter::counts_on_the_device",
           "return count ? max(0, min(*at<const int32_t>(count), max_rows)) : max_rows;", "return max_rows;"),
    # ---- vverify
    Mutant("any/vverify.cu", "indices of a warp start one warp late", "vverify::ratios",
           "if (w < warp) before += warp_total[w];", "if (w <= warp) before += warp_total[w];"),
    Mutant("any/vverify.cu", "each tile of rows writes to the elements of the first", "vverify::ratios",
           "      written += warp_total[w];", "      ;"),
    Mutant("any/vverify.cu", "a lane counts itself", "vverify::ratios",
           "lanes & ((1u << lane) - 1)", "lanes & ((2u << lane) - 1)"),
    Mutant("any/vverify.cu", "no barrier before a tile's totals are overwritten", "vverify::ratios",
           "__syncthreads();  // the totals of the previous tile have been read", ";"),
    Mutant("any/vverify.cu", "no barrier before a tile's totals are read", "vverify::ratios",
           "= __popc(lanes);\n    __syncthreads();", "= __popc(lanes);\n    ;"),
    Mutant("any/vverify.cu", "no guard for zero vectors", "vverify::equal_rows_have_cosine_one_and_zero_vectors_zero",
           "kEpsSquare = 1e-16f;", "kEpsSquare = 0.f;"),
    Mutant("any/vverify.cu", "cached rows are updated before they are compared",
           "vverify::fewer_rows_than_the_maximum",
           "b = Vector<T>::unpack(cached_bits[u]);", "b = Vector<T>::load(cached + i + u * kStep);"),
    Mutant("any/vverify.cu", "minus zero ranks below zero", "vverify::equal_rows_have_cosine_one_and_zero_vectors_zero",
           "ranked(0.f - load_from_other_block(&slots[i].similarity), i)",
           "ranked(-load_from_other_block(&slots[i].similarity), i)"),
    Mutant("any/vverify.cu", "NaN remains a cosine", "vverify::nan_counts_as_the_lowest",
           "return cosine == cosine ? cosine : -INFINITY;", "return cosine;"),
    Mutant("any/vverify.cu", "the cosine of equal rows is not exactly 1",
           "vverify::equal_rows_have_cosine_one_and_zero_vectors_zero",
           "dot / fresh_square * sqrtf(fresh_square / cached_square);",
           "dot / (sqrtf(fresh_square) * sqrtf(cached_square));"),
    Mutant("any/vverify.cu", "the number of rows to select is computed in f32", "vverify::ratios",
           "int(double(rows) * p.ratio)", "int(float(rows) * float(p.ratio))"),
    Mutant("any/vverify.cu", "the number selected before is that of the next sequence",
           "vverify::sequences_of_any_length_and_none",
           "selected_before += num_selected(p, rows);", "selected_before = num_selected(p, first + rows);"),
    Mutant("any/vverify.cu", "ends of sequences are not clamped", "vverify::invalid_cu_rows",
           "max(first, min(end, p.max_rows)) - first;", "max(first, end) - first;"),
    Mutant("any/vverify.cu", "the bound of cached rows is one high", "vverify::cached_rows_by_a_map",
           "cached_row < p.num_cached_rows", "cached_row <= p.num_cached_rows"),
    Mutant("any/vverify.cu", "the second vector of a thread is dropped", "vverify::agrees_with_the_reference_bf16",
           "if (i + u * kStep >= width) break;", "if (i + u * kStep >= width || u > 0) break;"),
    Mutant("any/vverify.cu", "the second vector of a thread is compared with the first",
           "vverify::agrees_with_the_reference_bf16",
           "(cached + i + u * kStep);\n      }", "(cached + i);\n      }"),
    Mutant("any/vverify.cu", "every second vector is taken twice", "vverify::agrees_with_the_reference_bf16",
           "i += kUnroll * kStep", "i += kStep"),
    Mutant("any/vverify.cu", "fresh_row is ignored", "vverify::fresh_rows_by_a_map",
           "at<const T>(p.fresh, fresh_row * p.fresh_stride)", "at<const T>(p.fresh, row * p.fresh_stride)"),
    Mutant("any/vverify.cu", "the bound of fresh rows is one high", "vverify::fresh_rows_by_a_map",
           "fresh_row < num_fresh_rows", "fresh_row <= num_fresh_rows"),
    Mutant("any/vverify.cu", "a negative fresh row is read", "vverify::fresh_rows_by_a_map",
           "if (fresh_row >= 0 && fresh_row", "if (fresh_row"),
    Mutant("any/vverify.cu", "all lists start where the first sequence's does", "vverify::lists_inside_larger_ones",
           "at<const int32_t>(p.first_selected)[sequence.index]", "at<const int32_t>(p.first_selected)[0]"),
    Mutant("any/vverify.cu", "num_listed is ignored",
           "vverify::elements_outside_the_lists",
           "uint32_t(p.num_listed ? p.num_listed : p.max_rows)", "uint32_t(p.max_rows)"),
    Mutant("any/vverify.cu", "a slot before the list is not out of range", "vverify::elements_outside_the_lists",
           "if (slot >= uint32_t(p.num_listed ? p.num_listed : p.max_rows))",
           "if (int(slot) >= (p.num_listed ? p.num_listed : p.max_rows))"),
    Mutant("any/vverify.cu", "a slot out of range is not reported", "vverify::elements_outside_the_lists",
           "if (p.failed) *at<int32_t>(p.failed) = DLLM_INDEX_FAILED;", ";"),
    Mutant("any/vverify.cu", "all tables equal the first", "vverify::lists_inside_larger_ones",
           "at<const int32_t>(p.tables[k])[row];", "at<const int32_t>(p.tables[0])[row];"),
    # ---- gather_scatter, embed
    Mutant("any/gather_scatter.cu", "one row past the count is copied", "gather_scatter::counts_on_the_device",
           "if (row >= num_rows(p.count, p.max_rows)) return;", "if (row > num_rows(p.count, p.max_rows)) return;"),
    Mutant("common/memory.cuh", "a round's first vector is copied four times", "gather_scatter::copies_rows",
           "bits[u] = from[first + u * kThreads];", "bits[u] = from[first];"),
    Mutant("common/memory.cuh", "stores go past the row", "gather_scatter::copies_rows",
           "if (first + u * kThreads < vectors) to[", "if (first < vectors) to["),
    Mutant("common/memory.cuh", "loads go past the row", "gather_scatter::copies_rows",
           "if (first + u * kThreads < vectors) bits[u]", "if (first < vectors) bits[u]"),
    Mutant("any/gather_scatter.cu", "the bound of indices is one high", "gather_scatter::leaves_out_rows_out_of_range",
           "indexed >= p.num_indexed_rows", "indexed > p.num_indexed_rows"),
    Mutant("any/gather_scatter.cu", "an index out of range is not reported",
           "gather_scatter::leaves_out_rows_out_of_range",
           "= DLLM_INDEX_FAILED;", "= DLLM_NONE_FAILED;"),
    Mutant("any/embed.cu", "the last vector of a row is dropped", "embed::embeds_rows",
           "int(p.row_bytes / 16));", "int(p.row_bytes / 16) - 1);"),
    Mutant("any/embed.cu", "the table's rows have the output's stride", "embed::embeds_rows",
           "token * (p.table_stride_bytes / 16)", "token * (p.out_stride_bytes / 16)"),
    Mutant("any/embed.cu", "the bound of tokens is one high", "embed::leaves_out_rows_out_of_range",
           "token >= p.vocab_size", "token > p.vocab_size"),
    Mutant("any/embed.cu", "the bound of indices is one high", "embed::leaves_out_rows_out_of_range",
           "index < p.num_tokens", "index <= p.num_tokens"),
    # ---- norm
    Mutant("any/norm.cu", "the normalised value is not rounded before the weight", "norm::equals_the_reference",
           "rounded<T>(values[v].x[j] * scale) * weight.x[j]", "values[v].x[j] * scale * weight.x[j]"),
    Mutant("any/norm.cu", "the residual sum is not rounded before it is squared", "norm::equals_the_reference",
           "rounded<T>(values[v].x[j] + delta_values.x[j])", "values[v].x[j] + delta_values.x[j]"),
    Mutant("any/norm.cu", "the residual stream is not written", "norm::equals_the_reference",
           "values[v].store(x + element(v));", ";"),
    Mutant("any/norm.cu", "eps is added to the root", "norm::equals_the_reference",
           "1.f / sqrtf(mean + p.eps)", "1.f / (sqrtf(mean) + p.eps)"),
    Mutant("any/norm.cu", "the tail is squared though it was not loaded", "norm::equals_the_reference",
           "float sum = 0.f;\n#pragma unroll\n  for (int v = 0; v < kVectors; v++) {\n    if (element(v) >= p.width) break;",
           "float sum = 0.f;\n#pragma unroll\n  for (int v = 0; v < kVectors; v++) {\n    if (element(v) > p.width) break;"),
    Mutant("any/norm.cu", "all vectors use the weights of the first", "norm::equals_the_reference",
           "at<const T>(p.weight) + element(v));", "at<const T>(p.weight) + element(0));"),
    Mutant("any/norm.cu", "all vectors use the delta of the first", "norm::equals_the_reference",
           "(delta + element(v));", "(delta + element(0));"),
    Mutant("any/norm.cu", "a vector past the row's end is loaded", "norm::equals_the_reference",
           "if (element(v) < p.width) {", "if (element(v) <= p.width) {"),
    Mutant("any/norm.cu", "delta_row is ignored", "norm::adds_rows_by_a_map",
           "at<const T>(p.delta, delta_row * p.delta_stride)", "at<const T>(p.delta, row * p.delta_stride)"),
    Mutant("any/norm.cu", "the bound of delta's rows is one high", "norm::adds_rows_by_a_map",
           "(uint32_t(delta_row) < uint32_t(num_delta_rows))", "(uint32_t(delta_row) <= uint32_t(num_delta_rows))"),
    Mutant("any/norm.cu", "a delta_row of -1 reads before the first row", "norm::adds_rows_by_a_map",
           "(uint32_t(delta_row) < uint32_t(num_delta_rows))", "(delta_row < num_delta_rows)"),
    # ---- rope
    Mutant("any/rope.cu", "the sign of the sine is wrong", "rope::equals_the_reference",
           "low.x[j] = __fsub_rn(", "low.x[j] = __fadd_rn("),
    Mutant("any/rope.cu", "neighbours are paired instead of halves", "rope::equals_the_reference",
           "high = Vector<T>::load(at_low + half);", "high = Vector<T>::load(at_low + kVec);"),
    Mutant("any/rope.cu", "a product is not rounded", "rope::equals_the_reference",
           "__fadd_rn(__fmul_rn(b, cosine), __fmul_rn(a, sine))", "fmaf(b, cosine, __fmul_rn(a, sine))"),
    Mutant("any/rope.cu", "every part of the grid computes the first", "rope::equals_the_reference",
           "blockIdx.y * kThreads + threadIdx.x", "threadIdx.x"),
    Mutant("any/rope.cu", "two elements share a cosine", "rope::equals_the_reference",
           "j % 2 ? angle[j / 2].z : angle[j / 2].x,", "angle[j / 2].x,"),
    Mutant("any/rope.cu", "cache_row is ignored for keys", "rope::equals_the_reference",
           "at<T>(p.k_cache, cache_row * p.cache_stride)", "at<T>(p.k_cache, row * p.cache_stride)"),
    Mutant("any/rope.cu", "the first key head is not cached", "rope::equals_the_reference",
           "head >= p.num_heads)", "head > p.num_heads)"),
    Mutant("any/rope.cu", "the upper half of keys is not cached", "rope::equals_the_reference",
           "high.store(key + half);", ";"),
    Mutant("any/rope.cu", "the tail of the values is not cached", "rope::equals_the_reference",
           "item - pairs < p.num_kv_heads * p.head_dim / kVec)",
           "item - pairs < p.num_kv_heads * p.head_dim / kVec - 1)"),
    Mutant("any/rope.cu", "the bound of cache rows is one high", "rope::leaves_out_rows_out_of_range",
           "cache_row >= p.num_cache_rows", "cache_row > p.num_cache_rows"),
    Mutant("any/rope.cu", "values are cached without a v_cache", "rope::caches_keys_alone",
           "else if (p.v_cache && cache_row >= 0", "else if (cache_row >= 0"),
    # ---- swiglu
    Mutant("any/swiglu.cu", "silu is not rounded before the factor", "swiglu::equals_the_reference",
           "rounded<T>(result.x[j] / (1.f + expf(-result.x[j]))) * factor.x[j]",
           "result.x[j] / (1.f + expf(-result.x[j])) * factor.x[j]"),
    Mutant("any/swiglu.cu", "tiles overlap", "swiglu::equals_the_reference",
           "int(blockIdx.y) * kVectors + v", "int(blockIdx.y) + v"),
    Mutant("any/swiglu.cu", "one row past the count is computed", "swiglu::counts_on_the_device",
           "if (row >= num_rows(p.count, p.max_rows)) return;", "if (row > num_rows(p.count, p.max_rows)) return;"),
    # ---- attention
    Mutant("sm80/attention.cu", "keys are not waited for", "attention::segments",
           "cp_async_wait_group<1>();  // the keys have arrived", "// the keys have arrived"),
    Mutant("sm80/attention.cu", "values are not waited for", "attention::segments",
           "cp_async_wait_group<2>();  // the values have arrived", "// the values have arrived"),
    Mutant("sm80/attention.cu", "queries are not waited for", "attention::segments",
           "cp_async_wait_group<kRoomForValues ? 2 : 1>();  // the queries", "// the queries"),
    Mutant("sm80/attention.cu", "no barrier after the queries have arrived", "attention::either_form",
           "// the queries have arrived\n  __syncthreads();", "// the queries have arrived\n  ;"),
    Mutant("sm80/attention.cu", "values are copied over queries that are still read", "attention::either_form",
           "__syncthreads();  // all threads have read their queries", "// all threads have read their queries"),
    Mutant("sm80/attention.cu", "no barrier after the keys have arrived", "attention::many_rows",
           "__syncthreads();           // for all threads; and", "// for all threads; and"),
    Mutant("sm80/attention.cu", "no barrier after the values have arrived", "attention::many_rows",
           "__syncthreads();           // for all threads\n", "// for all threads\n"),
    Mutant("sm80/attention.cu", "tiles that two segments share are read from the first segment", "attention::segments",
           "if (key + kKeys <= source.end) {", "if (key + kKeys <= keys.count()) {"),
    Mutant("sm80/attention.cu", "odd rows of a thread have the swizzle of even ones", "attention::every_shape_of_heads",
           "odd = to + tile_offset<D>(first_row + kRows, chunk);", "odd = even + kRows * D * 2;"),
    Mutant("sm80/attention.cu", "a list's next tile is visited twice", "attention::lists_of_tiles",
           "tile_after_next = visits.tile(i + 2);", "tile_after_next = visits.tile(i + 1);"),
    Mutant("sm80/attention.cu", "tile numbers are not clamped", "attention::lists_of_tiles",
           "int(min(uint32_t(list[i]), uint32_t(kMaxKeys / kKeys)))", "list[i]"),
    Mutant("sm80/attention.cu", "one key past the end counts", "attention::segments",
           "j % 2 >= left) scores", "j % 2 > left) scores"),
    Mutant("sm80/attention.cu", "sums are not rescaled to a new maximum", "attention::segments",
           "sum[half] = sum[half] * shrink + added;", "sum[half] += added;"),
    Mutant("sm80/attention.cu", "the log-sum-exp is of unscaled scores", "attention::segments",
           "max[half] * scale + logf(total);", "max[half] + logf(total);"),
    Mutant("sm80/attention.cu", "the live block ends where the suffix does", "attention::segments",
           "in_b = key < keys.b.end;", "in_b = key < keys.c.end;"),
    Mutant("sm80/attention.cu", "a segment's start is ignored", "attention::segments",
           "first = start - before;", "first = -before;"),
    Mutant("sm80/attention.cu", "every key/value head reads the first", "attention::every_shape_of_heads",
           "first_row) * source.stride + head * D + chunk * 8", "first_row) * source.stride + chunk * 8"),
    Mutant("sm80/attention.cu", "every key/value head reads the first at the ends of segments",
           "attention::every_shape_of_heads",
           "from_row * source.stride + head * D + chunk * 8", "from_row * source.stride + chunk * 8"),
    Mutant("sm80/attention.cu", "every query head of a group reads the first", "attention::every_shape_of_heads",
           "(head * group + r % group) * D + chunk * 8", "head * group * D + chunk * 8"),
    Mutant("sm80/attention.cu", "splits start one tile late", "attention::any_number_of_splits",
           "begin = min(count, split * share);", "begin = min(count, split * share + (split > 0));"),
    Mutant("sm80/attention.cu", "heads use the first head's lists", "attention::lists_of_tiles",
           "(p.per_head ? head : 0)", "0"),
    Mutant("sm80/attention.cu", "query tiles are of packed rows", "attention::groups_of_heads_over_several_query_tiles",
           "first_packed / (DLLM_QUERY_TILE * group)", "first_packed / DLLM_QUERY_TILE"),
    Mutant("sm80/attention.cu", "parts are merged with equal weights", "attention::any_number_of_splits",
           "weights[i] = ex2_approx((weights[i] - top) * kLog2e);", "weights[i] = weights[i] > -INFINITY;"),
    Mutant("sm80/attention.cu", "parts past the 32nd have the weights of earlier ones",
           "attention::any_number_of_splits",
           "first < kWarp ? weights[0] : weights[1]", "weights[0]"),
    Mutant("sm80/attention.cu", "parts of weight 0 are skipped, even with NaN",
           "attention::nan_propagates_with_zero_weight",
           "if (!(counting >> i & 1)) continue;", "if (weight[i] == 0.f) continue;"),
    Mutant("sm80/attention.cu", "the first eight parts are merged again in place of later ones",
           "attention::any_number_of_splits",
           "if (first > 0 && counts) part[i]", "if (first < 0 && counts) part[i]"),
    Mutant("sm80/attention.cu", "a segment's start is not clamped", "attention::out_of_range_device_values",
           "start = clamped(at<const int32_t>(segment.start)[sequence], 0, segment.num_rows);",
           "start = at<const int32_t>(segment.start)[sequence];"),
    # ---- merge_state
    Mutant("any/merge_state.cu", "an empty side's result is used", "merge_state::sides_without_keys",
           "const float b_or_none = b_lse == -INFINITY ? 0.f : y.x[j];", "const float b_or_none = y.x[j];"),
    Mutant("any/merge_state.cu", "sides are exchanged", "merge_state::equals_the_reference",
           "a = a_lse >= b_lse ? larger_weight : smaller_weight;", "a = a_lse < b_lse ? larger_weight : smaller_weight;"),
    Mutant("any/merge_state.cu", "the log-sum-exp may be overwritten before all have read it",
           "merge_state::overwrites_either_side",
           "__syncwarp();  // all lanes", "// all lanes"),
    Mutant("any/merge_state.cu", "one row past the count is merged", "merge_state::counts_on_the_device",
           "row < num_rows(p.count, p.max_rows);", "row <= num_rows(p.count, p.max_rows);"),
    # ---- advance
    Mutant("any/advance.cu", "a warp processes only one sequence", "advance::equals_the_reference",
           "s < p.num_sequences; s += kWarps)", "s < min(kWarps, p.num_sequences); s += kWarps)"),
    Mutant("any/advance.cu", "every load of a round reads the first position",
           "advance::masks_and_ends_at_every_position",
           "token[i] = position < count ? tokens[position] : padding;",
           "token[i] = position < count ? tokens[threadIdx.x % kWarp] : padding;"),
    Mutant("any/advance.cu", "the second round starts one load late", "advance::masks_and_ends_at_every_position",
           "for (; count > 0; count -= kTokensPerRound, tokens += kTokensPerRound) {\n    int token[kLoads];\n    load_tokens(tokens, count, ~",
           "for (; count > 0; count -= kTokensPerRound, tokens += kTokensPerRound + kWarp) {\n    int token[kLoads];\n    load_tokens(tokens, count, ~"),
    Mutant("any/advance.cu", "positions past the range count as masks", "advance::equals_the_reference",
           "load_tokens(tokens, count, ~mask_token, token);", "load_tokens(tokens, count, mask_token, token);"),
    Mutant("any/advance.cu", "an end-of-text token after a mask counts", "advance::masks_and_ends_at_every_position",
           "return found & before_masks;", "return found;"),
    Mutant("any/advance.cu", "the search for an end continues after masks", "advance::masks_and_ends_at_every_position",
           "if (masks | found) return", "if (found) return"),
    Mutant("any/advance.cu", "only the first end token ends", "advance::equals_the_reference",
           "e < p.num_end_tokens; e++)", "e < min(1, p.num_end_tokens); e++)"),
    Mutant("any/advance.cu", "an end-of-text token in the prompt counts", "advance::follows_the_loops",
           "ends(p, tokens + generated, length - generated)", "ends(p, tokens, length)"),
    Mutant("any/advance.cu", "llada: the schedule has one step more", "advance::schedules_equal_the_loops",
           "pass >= control.steps) return 1;", "pass > control.steps) return 1;"),
    Mutant("any/advance.cu", "llada: the last steps commit one more", "advance::schedules_equal_the_loops",
           "(pass < masked % control.steps);", "(pass >= control.steps - masked % control.steps);"),
    Mutant("any/advance.cu", "llada: 0 steps are not checked before the division", "advance::invalid_llada_schedules",
           "if (control.steps <= 0 || pass", "if (pass"),
    Mutant("any/advance.cu", "dream: the last step leaves some", "advance::schedules_equal_the_loops",
           "pass >= num_ratios - 1) return masks;", "pass >= num_ratios) return masks;"),
    Mutant("any/advance.cu", "dream: the share is rounded to nearest", "advance::schedules_equal_the_loops",
           "? int(share) : masks;", "? int(share + 0.5f) : masks;"),
    Mutant("any/advance.cu", "dream: the number of ratios is not clamped", "advance::invalid_dream_schedules",
           "clamped(control.num_ratios, 0, p.max_ratios);", "clamped(control.num_ratios, 0, 0x7fffffff);"),
    Mutant("any/advance.cu", "the quota is that of the previous pass", "advance::follows_the_loops",
           "quota = quota_of(p, control, sequence, pass, counts", "quota = quota_of(p, control, sequence, control.pass, counts"),
    Mutant("any/advance.cu", "carry over: the deficit is dropped", "advance::follows_the_loops",
           "sequence.deficit = rejected;", "sequence.deficit = 0;"),
    Mutant("any/advance.cu", "carry over: extra steps consider new candidates too", "advance::replays",
           "sequence.per_step = 0;", ";"),
    Mutant("any/advance.cu", "carry over: one step too many", "advance::replays",
           "if (pass >= sequence.max_passes && rejected > 0) {", "if (pass >= sequence.max_passes) {"),
    Mutant("any/advance.cu", "one pass too many", "advance::follows_the_loops",
           "pass < sequence.max_passes &&", "pass <= sequence.max_passes &&"),
    Mutant("any/advance.cu", "a sequence that has ended continues", "advance::follows_the_loops",
           "!failed && !sequence.ended && pass", "!failed && pass"),
    Mutant("any/advance.cu", "a sequence that has failed continues", "advance::failures",
           "!failed && !sequence.ended && pass", "!sequence.ended && pass"),
    Mutant("any/advance.cu", "inactive sequences keep their commit_before", "advance::unmasks_without_the_host",
           "quota = 0, commit_before = int(0x80000000u);", "quota = 0, commit_before = 0x7fffffff;"),
    Mutant("any/advance.cu", "ends of ranges are not clamped", "advance::ranges_outside_the_tokens",
           "count_masks(tokens + start, clamped(end, start, length) - start,", "count_masks(tokens + start, end - start,"),
    Mutant("any/advance.cu", "lengths are not clamped", "advance::ranges_outside_the_tokens",
           "clamped(sequence.length, 0, p.num_tokens - first);", "max(0, sequence.length);"),
    Mutant("any/advance.cu", "every lane counts its sequence", "advance::equals_the_reference",
           "if (threadIdx.x % kWarp > 0) return;", "if (threadIdx.x % kWarp > 1) return;"),
    Mutant("any/advance.cu", "a later failure replaces the first", "advance::failures",
           "if (failed != kNone && control.failed_sequence == DLLM_NONE_FAILED) {", "if (failed != kNone) {"),
    Mutant("any/advance.cu", "the step of a failure is the next one", "advance::failures",
           "[failed].forwards) - 1u);", "[failed].forwards));"),
    Mutant("any/advance.cu", "a pass without active sequences counts as a forward", "advance::unmasks_without_the_host",
           "if (took_part > 0) control.nfe", "control.nfe"),
    Mutant("any/advance.cu", "`active` counts sequences that took part, not that continue",
           "advance::follows_the_loops",
           "report_progress(control, continuing,", "report_progress(control, took_part,"),
    # ---- lists of tiles, and the plan of attention: host code
    Mutant("ops/tiles.rs", "the last key tile is left out", "ops::tiles::tests::known_lists",
          "self.num_keys().div_ceil(KEY_TILE)", "self.num_keys() / KEY_TILE"),
    Mutant("ops/tiles.rs", "a tile at the end of a range is left out", "ops::tiles::tests::known_lists",
          "..end.div_ceil(KEY_TILE) }", "..end / KEY_TILE }"),
    Mutant("ops/tiles.rs", "query tiles without rows have lists", "ops::tiles::tests::known_lists",
          "if query_tile * QUERY_TILE < sequence.rows {", "if query_tile * QUERY_TILE <= sequence.rows {"),
    Mutant("ops/tiles.rs", "a window is that of a full query tile", "ops::tiles::tests::known_lists",
          "sequence.rows.min(first + QUERY_TILE) - 1;", "first + QUERY_TILE - 1;"),
    Mutant("ops/tiles.rs", "queries are taken to stand at the first key", "ops::tiles::tests::known_lists",
          "|row| sequence.keys[0] + row);", "|row| row);"),
    Mutant("ops/tiles.rs", "the last key of a window is left out", "ops::tiles::tests::known_lists",
          "last.saturating_add(window).saturating_add(1);", "last.saturating_add(window);"),
    Mutant("ops/tiles.rs", "far tiles are kept from the first one on",
          "ops::tiles::tests::pruned_suffixes_are_what_the_mask_says",
          "far.saturating_add(every - 1);", "far;"),
    Mutant("ops/tiles.rs", "the near window begins with the first key",
          "ops::tiles::tests::pruned_suffixes_are_what_the_mask_says",
          "sequence.tiles_of(0..suffix.saturating_add(near)).end;", "sequence.tiles_of(0..suffix.max(near)).end;"),
    Mutant("ops/tiles.rs", "ties go to the last tile", "ops::tiles::tests::the_best_are_taken",
          ".then(a.cmp(b))", ".then(b.cmp(a))"),
    Mutant("ops/tiles.rs", "a score that is not a number is the best", "ops::tiles::tests::the_best_are_taken",
          "score if score.is_nan() => f32::NEG_INFINITY,", "score if score.is_nan() => f32::NAN,"),
    Mutant("ops/tiles.rs", "minus zero scores below zero", "ops::tiles::tests::the_best_are_taken",
          "score => score + 0.0,", "score => score,"),
    Mutant("ops/tiles.rs", "the best come in any order", "ops::tiles::tests::the_best_are_taken",
          "            order.sort_unstable();", "            ;"),
    Mutant("ops/tiles.rs", "heads have the first head's scores", "ops::tiles::tests::the_best_are_taken",
          "* heads + place.head) * key_tiles;", "* heads) * key_tiles;"),
    Mutant("ops/tiles.rs", "lists of the caller are not checked", "ops::tiles::tests::wrong_lists_are_named",
          "        made.validate(batch)?;", "        ;"),
    Mutant("ops/tiles.rs", "a tile may be listed twice", "ops::tiles::tests::wrong_lists_are_named",
          "if seen[index] == i + 1 =>", "if seen[index] == i + 2 =>"),
    Mutant("ops/tiles.rs", "a tile is checked against the longest sequence", "ops::tiles::tests::wrong_lists_are_named",
          "let key_tiles = batch.sequences[sequence].key_tiles();",
          "let key_tiles = batch.sequences.iter().map(Sequence::key_tiles).max().unwrap_or(sequence);"),
    Mutant("ops/tiles.rs", "indices past the last list are let through", "ops::tiles::tests::wrong_lists_are_named",
          "if !ascending || usize::try_from(self.offsets[lists]) != Ok(self.indices.len()) {", "if !ascending {"),
    Mutant("ops/attention.rs", "a forced form is not heeded", "ops::attention::tests::plans",
          "abi::DLLM_ATTENTION_FORM_FULL => Form::Full,", "abi::DLLM_ATTENTION_FORM_FULL => Form::Streaming,"),
    Mutant("ops/attention.rs", "splits do not know of groups", "ops::attention::tests::splits_follow_the_shape_of_a_sequence",
          "let packed = rows.saturating_mul(num_heads / num_kv_heads.max(1));", "let packed = rows;"),
    Mutant("ops/attention.rs", "log-sum-exps are not rounded up to 16 bytes", "ops::attention::tests::plans",
          "(partial.next_multiple_of(4) + partial", "(partial + partial"),
    Mutant("ops/attention.rs", "results may overwrite the queries", "ops::attention::tests::overlaps_are_seen",
          "std::iter::once(q).chain(", "std::iter::empty().chain("),
]


def in_library(mutant):
    """Whether the mutation is in host code."""
    return mutant.file.endswith(".rs")


def source_path(mutant):
    return ROOT / ("src" if in_library(mutant) else "cuda") / mutant.file


def mutated_text(mutant):
    """Returns the text of the mutant's file with the mutation applied."""
    return source_path(mutant).read_text().replace(mutant.original, mutant.mutated)


def test_sources(mutant):
    """Returns the files that may define the mutant's test."""
    program, slash, path = mutant.test.rpartition("/")
    if in_library(mutant) and not slash:
        stem = source_path(mutant).with_suffix("")
        folder = source_path(mutant).parent
        return [source_path(mutant), *stem.glob("*.rs"), *folder.glob("*.rs")]
    folder, module = ROOT / "tests" / (program or "ops"), path.split("::")[0]
    return [folder / f"{module}.rs", *folder.glob(f"{module}/**/*.rs")]


def misfits(mutant):
    """Yields the reasons why a mutation cannot be applied or checked."""
    path = source_path(mutant)
    name = f"{mutant.file}: {mutant.description}"
    if not path.is_file():
        yield f"{name}: there is no such file"
        return
    count = path.read_text().count(mutant.original)
    if count != 1:
        yield f"{name}: expected the original once in the file, found it {count} times:\n    {mutant.original}"
    original, mutated = mutant.original.split("\n"), mutant.mutated.split("\n")
    if len(original) != len(mutated) or sum(a != b for a, b in zip(original, mutated)) != 1:
        yield f"{name}: expected a change of one line"
    test = mutant.test.rpartition("::")[2]
    texts = [file.read_text() for file in test_sources(mutant) if file.is_file()]
    if not any(re.search(rf"\b{test}\b", text) for text in texts):
        yield f"{name}: there is no test {mutant.test}"


def includes(cuda, file):
    """Returns the names of the file and of the headers of cuda/common that it includes."""
    found, left = set(), [file]
    while left:
        path = left.pop()
        if path.is_file() and path.name not in found:
            found.add(path.name)
            left += [cuda / "common" / name for name in re.findall(r'#include "(.+)"', path.read_text())]
    return found


def harness(program, filters, **options):
    """Runs tests of a built test program and returns the paths of those that failed a check."""
    run = subprocess.run([program, *filters], capture_output=True, text=True, timeout=TIMEOUT_S, **options)
    output = run.stdout + run.stderr
    if run.returncode not in (0, 101) or "test result:" not in output or "running 0 tests" in output:
        raise RuntimeError(f"the tests did not complete ({run.returncode}):\n{output[-2000:]}")
    if run.returncode and "panicked at " not in output:
        raise RuntimeError(f"something other than a check of the tests failed:\n{output[-2000:]}")
    return re.findall(r"^    (\w+(?:::\w+)+)$", output.rpartition("\nfailures:\n")[2], re.M) if run.returncode else []


def listed(program, path):
    """Returns the full paths of the tests of a program that end in the last part of `path` and begin with its other parts."""
    module, _, test = path.rpartition("::")
    lines = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.splitlines()
    tests = [line.removesuffix(": test") for line in lines if line.endswith(": test")]
    found = [name for name in tests if name.startswith(module + "::") and name.endswith("::" + test)]
    # Long tests run a few of their cases; all of them when there is nothing else.
    return [name for name in found if "whole" not in name.split("::")] or found


class Device:
    """The tests of the ops, built once, and the commands that build kernels for the CUDA emulator."""

    def __init__(self, folder):
        command = ["cargo", "test", "--release", "--no-run", "--message-format=json", "--test", "ops"]
        run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if run.returncode:
            sys.exit("the tests do not build")
        messages = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        [self.program] = [m["executable"] for m in messages
                          if m["reason"] == "compiler-artifact" and m["target"]["kind"] == ["test"]]
        [out] = [Path(m["out_dir"]) for m in messages
                 if m["reason"] == "build-script-executed" and "softgpu" in m["package_id"]]
        self.compiler = (out / "kernels.compile").read_text().splitlines()
        self.linker = (out / "kernels.link").read_text().splitlines()
        self.folder = folder
        self.objects = {"kernels_anchor": self.object(ROOT / "cuda", ROOT / "softgpu/cpp/kernels_anchor.cpp", folder)}

    def object(self, cuda, source, folder):
        """Compiles a file with the headers of the folder `cuda`."""
        target = folder / f"{source.stem}.o"
        words = [word.replace(str(ROOT / "cuda"), str(cuda)) for word in self.compiler]
        subprocess.run([*words, "-c", source, "-o", target], check=True, capture_output=True, text=True)
        return target

    def library(self, objects, folder):
        target = folder / "libkernels.so"
        subprocess.run([self.linker[0], *objects.values(), *self.linker[1:], "-o", target], check=True)
        return target

    def run(self, library, test):
        """Runs the tests of this path, or of this module, and returns the names of those that failed a check."""
        filters = ["--exact", *listed(self.program, test)] if "::" in test else [f"{test}::"]
        failed = harness(self.program, [*filters, "--test-threads=1"], cwd=ROOT,
                         env={**os.environ, "SOFTGPU_KERNELS": str(library)})
        return [path.rpartition("::")[2] for path in failed]


class Library:
    """A copy of the repository, in which host code is mutated. Uses the dependencies that the tests of Device have built."""

    # Compiles faster, and still runs decodes.
    CONFIG = "profile.release.package.dllm-kernels.opt-level=1"

    def __init__(self, folder):
        self.folder, self.lock, self.programs = folder / "repository", threading.RLock(), {}
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in files.split("\0"):
            if (ROOT / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.folder / name)

    def build(self, target):
        """Builds the test program of a cargo target and returns its path."""
        command = ["cargo", "test", "--release", "--offline", "--no-run", "--message-format=json", "--config", self.CONFIG]
        environment = {**os.environ, "CARGO_TARGET_DIR": str(ROOT / "target"), "CARGO_INCREMENTAL": "1"}
        build = subprocess.run([*command, *target], cwd=self.folder, env=environment, capture_output=True, text=True)
        if build.returncode:
            raise RuntimeError(f"does not compile:\n{build.stderr[-2000:]}")
        messages = [json.loads(line) for line in build.stdout.splitlines() if line.startswith("{")]
        return [m["executable"] for m in messages if m["reason"] == "compiler-artifact" and m["profile"]["test"]][-1]

    def run(self, mutant):
        """Runs the mutant's test and returns the paths of tests that failed."""
        program, slash, path = mutant.test.rpartition("/")
        if slash:
            target = ["--test", program]
        else:
            target = ["--bin", "dllm"] if mutant.file.startswith("bin/") else ["--lib"]
        with self.lock:
            executable = self.build(target)
            tests = listed(executable, path) if slash else [path]
            return harness(executable, ["--exact", "--include-ignored", *tests], cwd=self.folder)

    def check(self, mutant):
        """As the function `check`. Runs serially, because there is one copy."""
        with self.lock:
            start, path = time.monotonic(), self.folder / "src" / mutant.file
            try:
                path.write_text(mutated_text(mutant))
                problem = "" if self.run(mutant) else "survives"
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                problem = "hangs" if isinstance(error, subprocess.TimeoutExpired) else str(error)
            path.write_text((ROOT / "src" / mutant.file).read_text())
            shutil.rmtree(self.folder / "proptest-regressions", ignore_errors=True)
            return problem, time.monotonic() - start


def check(device, number, mutant):
    """Returns the problem with a mutant, empty if its test detects it, and the seconds taken."""
    start = time.monotonic()
    folder = device.folder / str(number)
    cuda = folder / "cuda"
    shutil.copytree(ROOT / "cuda", cuda)
    path = cuda / mutant.file
    path.write_text(mutated_text(mutant))
    file, test = mutant.test.split("::")[0], mutant.test.rpartition("::")[2]
    objects = {name: device.objects[name] for name in ["kernels_anchor", *KERNELS[file]]}
    try:
        for name in KERNELS[file]:
            if path.name in includes(cuda, source(cuda, name)):
                objects[name] = device.object(cuda, source(cuda, name), folder)
        library = device.library(objects, folder)
        problem = ""
        if test not in device.run(library, mutant.test):
            found = ", ".join(device.run(library, file))
            problem = f"survives, but {found} would detect it" if found else "survives"
    except subprocess.CalledProcessError as error:
        problem = f"does not compile:\n{error.stderr}"
    except subprocess.TimeoutExpired:
        problem = "hangs"
    except RuntimeError as error:
        problem = str(error)
    shutil.rmtree(folder)
    return problem, time.monotonic() - start


def markdown():
    rows = [f"| `{mutant.file}` | {mutant.description} | `{mutant.test}` |" for mutant in MUTANTS]
    return "\n".join(["| file | mutation | detected by |", "|---|---|---|", *rows])


def run_all(selected):
    """Applies the mutations, prints the result of each and returns the problems."""
    problems = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        start = time.monotonic()
        device, library = Device(Path(folder)), Library(Path(folder))
        kernels = sorted({name for mutant in selected if not in_library(mutant)
                          for name in KERNELS[mutant.test.split("::")[0]]})
        device.objects.update(zip(kernels, pool.map(
            lambda name: device.object(ROOT / "cuda", source(ROOT / "cuda", name), device.folder), kernels)))
        # A detection counts only if the same tests pass with the original kernels.
        originals = device.library(device.objects, device.folder)
        run = lambda mutant: library.run(mutant) if in_library(mutant) else device.run(originals, mutant.test)
        tests = sorted({mutant.test: mutant for mutant in selected}.items())
        for (test, _), failed in zip(tests, pool.map(lambda pair: run(pair[1]), tests)):
            problems += [f"{test} fails without a mutation"] if failed else []
        print(f"without a mutation: {len(tests)} tests pass ({time.monotonic() - start:.0f} s)", flush=True)

        find = lambda job: library.check(job[1]) if in_library(job[1]) else check(device, *job)
        for mutant, (problem, seconds) in zip(selected, pool.map(find, enumerate(selected))):
            detected_by = "SURVIVES" if problem else mutant.test
            print(f"{mutant.file:<19} {mutant.description:<66} {detected_by:<62} {seconds:5.1f} s", flush=True)
            problems += [f"{mutant.file}: {mutant.description}: {problem}"] if problem else []
        print(f"{len(selected)} mutations in {time.monotonic() - start:.0f} s")
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="only print the table of all mutations")
    parser.add_argument("--table", action="store_true", help="only check that every mutation fits its source")
    parser.add_argument("mutant", nargs="*", default=[""], help="part of a mutant's file or description")
    arguments = parser.parse_args()
    if arguments.markdown:
        return print(markdown())
    problems = [problem for mutant in MUTANTS for problem in misfits(mutant)]
    if not problems and not arguments.table:
        problems = run_all([mutant for mutant in MUTANTS
                            if any(part in f"{mutant.file} {mutant.description}" for part in arguments.mutant)])
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
