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
    "read_bandwidth": ["read_bandwidth"],
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
    # ---- offsets beyond 2^31 elements
    Mutant("any/norm.cu", "offsets of rows are 32 bits", "offsets::norm_far_apart",
           "T* x = at<T>(p.x, row * p.x_stride);", "T* x = at<T>(p.x, int(row * p.x_stride));"),
    Mutant("any/norm.cu", "offsets of results lose their high half", "offsets::norm_far_apart",
           "at<T>(p.out, row * p.out_stride)", "at<T>(p.out, uint32_t(row * p.out_stride))"),
    Mutant("any/norm.cu", "offsets of the delta are 32 bits", "offsets::norm_far_apart",
           "delta_row * p.delta_stride", "int(delta_row * p.delta_stride)"),
    Mutant("any/swiglu.cu", "offsets of rows are 32 bits", "offsets::swiglu_far_apart",
           "row * p.gate_up_stride", "int(row * p.gate_up_stride)"),
    Mutant("any/swiglu.cu", "offsets of results lose their high half", "offsets::swiglu_far_apart",
           "row * p.out_stride", "uint32_t(row * p.out_stride)"),
    Mutant("any/merge_state.cu", "offsets of a are 32 bits", "offsets::merge_state_far_apart",
           "row * p.a_stride + column", "int(row * p.a_stride + column)"),
    Mutant("any/merge_state.cu", "offsets of b lose their high half", "offsets::merge_state_far_apart",
           "row * p.b_stride + column", "uint32_t(row * p.b_stride + column)"),
    Mutant("any/merge_state.cu", "offsets of results are 32 bits", "offsets::merge_state_far_apart",
           "row * p.out_stride + column", "int(row * p.out_stride + column)"),
    Mutant("any/embed.cu", "offsets in the table are 32 bits", "offsets::embed_far_apart",
           "token * (p.table_stride_bytes / 16)", "int(token * (p.table_stride_bytes / 16))"),
    Mutant("any/embed.cu", "offsets of results lose their high half", "offsets::embed_far_apart",
           "row * (p.out_stride_bytes / 16)", "uint32_t(row * (p.out_stride_bytes / 16))"),
    Mutant("any/gather_scatter.cu", "source offsets are 32 bits", "offsets::gather_scatter_far_apart",
           "from * (p.source_stride_bytes / 16)", "int(from * (p.source_stride_bytes / 16))"),
    Mutant("any/gather_scatter.cu", "target offsets lose their high half", "offsets::gather_scatter_far_apart",
           "to * (p.target_stride_bytes / 16)", "uint32_t(to * (p.target_stride_bytes / 16))"),
    Mutant("any/rope.cu", "offsets of rows are 32 bits", "offsets::rope_far_apart",
           "row * p.qkv_stride", "int(row * p.qkv_stride)"),
    Mutant("any/rope.cu", "offsets of cached keys are 32 bits", "offsets::rope_far_apart",
           "at<T>(p.k_cache, cache_row * p.cache_stride)", "at<T>(p.k_cache, int(cache_row * p.cache_stride))"),
    Mutant("any/rope.cu", "offsets of cached values lose their high half", "offsets::rope_far_apart",
           "at<T>(p.v_cache, cache_row * p.cache_stride)", "at<T>(p.v_cache, uint32_t(cache_row * p.cache_stride))"),
    Mutant("any/rope.cu", "offsets of angles are 32 bits", "offsets::rope_far_positions",
           "int64_t(position) * half", "int(uint32_t(position) * uint32_t(half))"),
    Mutant("any/vverify.cu", "offsets of fresh rows are 32 bits", "offsets::vverify_far_apart",
           "fresh_row * p.fresh_stride", "int(fresh_row * p.fresh_stride)"),
    Mutant("any/vverify.cu", "offsets of cached rows lose their high half", "offsets::vverify_far_apart",
           "cached_row * p.cached_stride", "uint32_t(cached_row * p.cached_stride)"),
    Mutant("any/unmask.cu", "offsets of logits are 32 bits", "offsets::unmask_far_apart",
           "at<const T>(p.logits, int64_t(row.logits_row) * p.logits_stride)",
           "at<const T>(p.logits, int(row.logits_row * p.logits_stride))"),
    Mutant("any/unmask.cu", "general: offsets of logits lose their high half", "offsets::unmask_far_apart",
           "const int64_t offset = int64_t(row.logits_row) * p.logits_stride;",
           "const int64_t offset = uint32_t(row.logits_row * p.logits_stride);"),
    Mutant("common/logits.cuh", "offsets of single logits are 32 bits", "offsets::unmask_far_apart",
           "const int64_t offset = row * p.logits_stride + token;", "const int64_t offset = int(row * p.logits_stride + token);"),
    Mutant("any/top_k_top_p.cu", "offsets of logits are 32 bits", "offsets::unmask_far_apart",
           "const int64_t offset = row * p.logits_stride;", "const int64_t offset = int(row * p.logits_stride);"),
    Mutant("sm80/attention.cu", "offsets in full tiles are 32 bits", "offsets::attention_far_apart",
           "(source.first + key + first_row) * source.stride + head * D",
           "int((source.first + key + first_row) * source.stride) + head * D"),
    Mutant("sm80/attention.cu", "steps in full tiles are 32 bits", "offsets::attention_far_apart",
           "from += kRows * source.stride;", "from += int(kRows * source.stride);"),
    Mutant("sm80/attention.cu", "offsets in partial tiles lose their high half", "offsets::attention_far_apart",
           "from_row * source.stride + head * D", "uint32_t(from_row * source.stride) + head * D"),
    Mutant("sm80/attention.cu", "offsets of queries are 32 bits", "offsets::attention_far_apart",
           "r / group * p.q_stride", "int(r / group * p.q_stride)"),
    Mutant("sm80/attention.cu", "offsets of results lose their high half", "offsets::attention_far_apart",
           "row * p.out_stride + column * D", "uint32_t(row * p.out_stride + column * D)"),
    Mutant("sm80/attention.cu", "combine: offsets of results are 32 bits", "offsets::attention_far_apart",
           "int64_t(row_head / p.num_heads) * p.out_stride", "int(int64_t(row_head / p.num_heads) * p.out_stride)"),
    Mutant("sm80/attention.cu", "offsets in the workspace are 32 bits", "offsets::attention_with_a_large_workspace",
           "(splits * rows_of_all + 3) / 4 * 4 + part_row * D", "(splits * rows_of_all + 3) / 4 * 4 + int(part_row * D)"),
    Mutant("sm80/attention.cu", "combine: offsets in the workspace are 32 bits",
           "offsets::attention_with_a_large_workspace",
           "(parts + s * rows_of_all * p.head_dim)", "(parts + int(s * rows_of_all * p.head_dim))"),
    # ---- maxima that start at 0, and other neutral elements
    Mutant("sm80/attention.cu", "the running maximum starts at 0", "attention::scores_far_below_zero",
           "max[0] = max[1] = -FLT_MAX;", "max[0] = max[1] = 0.f;"),
    Mutant("sm80/attention.cu", "combine: the maximum is at least 0", "attention::scores_far_below_zero",
           "larger), -FLT_MAX);", "larger), 0.f);"),
    Mutant("sm80/attention.cu", "combine: parts that do not exist have a log-sum-exp of 0",
           "attention::scores_far_below_zero",
           "lse[s * rows_of_all] : -INFINITY;", "lse[s * rows_of_all] : 0.f;"),
    Mutant("any/merge_state.cu", "the larger log-sum-exp is at least 0", "merge_state::equals_the_reference",
           "const float top = fmaxf(a_lse, b_lse),", "const float top = fmaxf(fmaxf(a_lse, b_lse), 0.f),"),
    Mutant("any/unmask.cu", "a thread's maximum starts at 0", "unmask::logits_far_below_zero",
           "own = -INFINITY;", "own = 0.f;"),
    Mutant("any/unmask.cu", "a block's maximum is at least 0", "unmask::logits_far_below_zero",
           "max = block_reduce<kThreads>(own, -INFINITY, Max());", "max = block_reduce<kThreads>(own, 0.f, Max());"),
    Mutant("any/unmask.cu", "exponents are relative to 0 or more", "unmask::logits_far_below_zero",
           "const float reference = fmaxf(max, -FLT_MAX);", "const float reference = fmaxf(max, 0.f);"),
    Mutant("any/unmask.cu", "general: a thread's maximum starts at 0", "unmask::logits_far_below_zero",
           "  float max = -INFINITY;", "  float max = 0.f;"),
    Mutant("any/unmask.cu", "general: exponents are relative to 0 or more", "unmask::logits_far_below_zero",
           "const float reference = fmaxf(partial.max, -FLT_MAX);", "const float reference = fmaxf(partial.max, 0.f);"),
    Mutant("any/unmask.cu", "a thread's second largest logit starts at 0", "unmask::logits_far_below_zero",
           "moment = 0.f, second = -INFINITY;", "moment = 0.f, second = 0.f;"),
    Mutant("any/unmask.cu", "a block's second largest logit is at least 0", "unmask::logits_far_below_zero",
           "block_reduce<kThreads>(second, -INFINITY, Max())", "block_reduce<kThreads>(second, 0.f, Max())"),
    Mutant("any/unmask.cu", "a thread's best draw starts at 0", "unmask::logits_far_below_zero",
           "float noised = -INFINITY;", "float noised = 0.f;"),
    Mutant("any/unmask.cu", "a row's maximum starts at 0", "unmask::logits_far_below_zero",
           "Partial all{-INFINITY, 0x7fffffff, 0.f,", "Partial all{0.f, 0x7fffffff, 0.f,"),
    # ---- sizes
    Mutant("any/rope.cu", "positions end at 4,096", "rope::far_positions_and_many_rows",
           "position >= p.num_positions", "position >= min(p.num_positions, 4096)"),
    Mutant("any/rope.cu", "rows past the 512th are left out", "rope::far_positions_and_many_rows",
           "num_rows(p.count, p.max_rows)", "num_rows(p.count, min(p.max_rows, 512))"),
    Mutant("any/rope.cu", "angles are those of 16-bit positions", "rope::far_positions_and_many_rows",
           "int64_t(position) * half", "int64_t(uint16_t(position)) * half"),
    Mutant("any/norm.cu", "rows past the 1,024th are left out", "norm::takes_many_rows",
           "if (row >= num_rows(p.count, p.max_rows)) return;", "if (row >= num_rows(p.count, min(p.max_rows, 1024))) return;"),
    Mutant("any/embed.cu", "rows past the 1,024th are left out", "embed::embeds_many_rows",
           "num_rows(p.count, p.max_rows)", "num_rows(p.count, min(p.max_rows, 1024))"),
    Mutant("any/gather_scatter.cu", "rows past the 1,024th are left out", "gather_scatter::copies_many_rows",
           "num_rows(p.count, p.max_rows)", "num_rows(p.count, min(p.max_rows, 1024))"),
    Mutant("any/gather_scatter.cu", "indices end at 65,536", "gather_scatter::copies_many_rows",
           "indexed >= p.num_indexed_rows", "indexed >= min(p.num_indexed_rows, 65536)"),
    # ---- segments of one key
    Mutant("sm80/attention.cu", "a segment of one key is left out", "attention::segments_of_one_key",
           "end = before + min(len, kMaxKeys - before);", "end = before + (len > 1 ? min(len, kMaxKeys - before) : 0);"),
    Mutant("sm80/attention.cu", "one key of the second segment is read from the third", "attention::segments_of_one_key",
           "in_b = key < keys.b.end;", "in_b = key < keys.b.end - (keys.b.end - keys.a.end == 1);"),
    Mutant("sm80/attention.cu", "one key of the first segment is read from the second", "attention::segments_of_one_key",
           "in_a = key < keys.a.end,", "in_a = key < keys.a.end - (keys.a.end == 1),"),
    # ---- failed rows
    Mutant("any/unmask.cu", "a failure is reported by row", "unmask::status_of_failed_rows",
           "failed = min(failed, position);", "failed = min(failed, i);"),
    Mutant("any/unmask.cu", "a thread's last failure is reported", "unmask::status_of_long_sequences",
           "failed = min(failed, position);", "failed = position;"),
    Mutant("any/unmask.cu", "a sequence with a failed row commits", "unmask::status_of_failed_rows",
           "if (bad || failed != 0x7fffffff) count = 0;", "if (bad) count = 0;"),
    Mutant("any/unmask.cu", "failures that could not be committed are not reported", "unmask::status_of_failed_rows",
           "if (result.token == kNoFiniteLogit) failed", "if (result.token == kNoFiniteLogit && position < before) failed"),
    Mutant("any/unmask.cu", "rows that are not masked fail too", "unmask::status_of_failed_rows",
           "if (result.token == kNoFiniteLogit) failed", "if (result.token < 0) failed"),
    Mutant("any/advance.cu", "an index out of range is no failure", "advance::a_failed_row_ends_its_sequence",
           "[s] != DLLM_NONE_FAILED;", "[s] > DLLM_NONE_FAILED;"),
    Mutant("any/advance.cu", "position 0 is no failure", "advance::a_failed_row_ends_its_sequence",
           "[s] != DLLM_NONE_FAILED;", "[s] != DLLM_NONE_FAILED && at<const int32_t>(p.failed)[s] != 0;"),
    Mutant("any/advance.cu", "a failed sequence goes on", "advance::a_failed_row_ends_its_sequence",
           "sequence.active = !failed && !sequence.ended", "sequence.active = !sequence.ended"),
    Mutant("any/advance.cu", "a warp's last failure counts", "advance::a_failed_row_ends_its_sequence",
           "totals.failed = min(totals.failed, s);", "totals.failed = s;"),
    Mutant("any/advance.cu", "a later failure replaces the first", "advance::a_failed_row_ends_its_sequence",
           "if (failed != kNone && control.failed_sequence == DLLM_NONE_FAILED) {", "if (failed != kNone) {"),
    Mutant("any/advance.cu", "the step of a failure is the next one", "advance::a_failed_row_ends_its_sequence",
           "[failed].forwards) - 1u);", "[failed].forwards));"),
    Mutant("any/advance.cu", "without a failure sequence 0 failed", "advance::a_failed_row_ends_its_sequence",
           "block_reduce<kThreads>(-totals.failed, -kNone, Max())", "block_reduce<kThreads>(-totals.failed, 0, Max())"),
    # ---- read_bandwidth
    Mutant("any/read_bandwidth.cu", "the last vector is not read", "read_bandwidth::every_byte_changes_the_result",
           "vector < vectors ?", "vector < vectors - 1 ?"),
    Mutant("any/read_bandwidth.cu", "the last word of each vector is not used",
           "read_bandwidth::every_byte_changes_the_result",
           "bits[i].y ^ bits[i].z ^ bits[i].w;", "bits[i].y ^ bits[i].z ^ bits[i].z;"),
    Mutant("any/read_bandwidth.cu", "the last load of each thread is not used",
           "read_bandwidth::every_byte_changes_the_result",
           "for (int i = 0; i < kLoads; i++) any", "for (int i = 0; i < kLoads - 1; i++) any"),
    Mutant("any/read_bandwidth.cu", "a block reads the first tile", "read_bandwidth::every_byte_changes_the_result",
           "int64_t(blockIdx.x) * (kThreads * kLoads)", "int64_t(0) * (kThreads * kLoads)"),
    # ---- src
    Mutant("ops/read_bandwidth.rs", "the last tile has no block", "ops/read_bandwidth::every_byte_changes_the_result",
           "grid: [params.bytes.div_ceil(TILE) as u32, 1, 1]", "grid: [(params.bytes / TILE).max(1) as u32, 1, 1]"),
    Mutant("ops/rope.rs", "angles stop at position 4,095", "ops::rope::tests::angles_are_known",
           "f64::from(position as f32 * frequency)", "f64::from(position.min(4095) as f32 * frequency)"),
    Mutant("backend/cpu/rope.rs", "angles stop at position 4,095", "backend::cpu::rope::tests::equals_the_reference",
           "(position as f32 * frequency) as f64", "(position.min(4095) as f32 * frequency) as f64"),
    Mutant("backend/cpu/attention.rs", "the maximum starts at 0", "backend::cpu::attention::tests::scores_far_below_zero",
           "let mut max = S::splat(f32::MIN);", "let mut max = S::splat(0.0);"),
    Mutant("backend/cpu/attention.rs", "cached segments of one key are left out",
           "backend::cpu::attention::tests::segments_of_one_key",
           "Some((k, v)) if from < to => {", "Some((k, v)) if from + 1 < to => {"),
    Mutant("backend/cpu/attention.rs", "rows past the 256th have no task", "backend::cpu::attention::tests::long_sequences",
           "for row in (0..sequence.rows()).step_by(ROWS) {", "for row in (0..sequence.rows().min(256)).step_by(ROWS) {"),
    Mutant("backend/cpu/attention.rs", "the order of a sum depends on the threads",
           "backend::cpu::tests::attention_of_a_batch",
           "            let mut total = S::splat(0.0);\n            for j in 0..key {",
           "            let mut total = S::splat(0.0);\n            for j in (0..key).map(|j| if rayon::current_num_threads() > 2 { key - 1 - j } else { j }) {"),
    Mutant("backend/cpu/linear.rs", "rows past the second sweep are left out",
           "backend::cpu::linear::tests::equals_f64_sums",
           "    for m0 in (0..rows).step_by(SWEEP) {", "    for m0 in (0..rows.min(2 * SWEEP)).step_by(SWEEP) {"),
    Mutant("backend/cpu/linear.rs", "the third block of columns is packed as the second",
           "backend::cpu::linear::tests::equals_f64_sums",
           "let k0 = block * DEPTH;", "let k0 = block.min(1) * DEPTH;"),
    Mutant("backend/cpu/norm.rs", "the order of a sum depends on the threads", "backend::cpu::tests::ops_on_rows",
           "    let (chunks, tail) = x.as_chunks::<LANES>();",
           "    let (chunks, tail) = if rayon::current_num_threads() > 2 { (&[][..], x) } else { x.as_chunks::<LANES>() };"),
    Mutant("sampling/sampler.rs", "a total is added up per thread",
           "sampling::sampler::tests::the_same_bits_with_any_number_of_threads",
           "    row.iter().filter(|l| **l >= floor).map(|l| ((*l as f64 - max) / scale).exp()).sum()\n",
           "    row.chunks(row.len().div_ceil(rayon::current_num_threads())).map(|part| part.iter().filter(|l| **l >= floor).map(|l| ((*l as f64 - max) / scale).exp()).sum::<f64>()).sum()\n"),
    Mutant("sampling/sampler.rs", "the largest logit is at least 0", "sampling::sampler::tests::logits_far_below_zero",
           "    let mut max = f64::NEG_INFINITY;", "    let mut max = 0.0f64;"),
    Mutant("sampling/sampler.rs", "the second largest logit is at least 0", "sampling::sampler::tests::logits_far_below_zero",
           "others.map(|(_, l)| *l).fold(f32::NEG_INFINITY, f32::max)", "others.map(|(_, l)| *l).fold(0.0, f32::max)"),
    Mutant("sampling/sampler.rs", "top-p is relative to 0 or more", "sampling::sampler::tests::logits_far_below_zero",
           "row.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64", "row.iter().copied().fold(0.0, f32::max) as f64"),
    Mutant("backend/cuda/staging.rs", "later chunks are written over the first", "engine/cuda::upload::bf16_in_three_chunks",
           "staging.send(to, offset + i * CHUNK, count)?;", "staging.send(to, offset, count)?;"),
    Mutant("backend/cuda/staging.rs", "chunks after the second are written over the second", "engine/cuda::upload::bf16_in_three_chunks",
           "staging.send(to, offset + i * CHUNK, count)?;", "staging.send(to, offset + i.min(1) * CHUNK, count)?;"),
    Mutant("backend/cuda/staging.rs", "chunks ignore the offset of the tensor", "engine/cuda::upload::f32_in_two_chunks",
           "staging.send(to, offset + i * CHUNK, count)?;", "staging.send(to, if i > 0 { i * CHUNK } else { offset }, count)?;"),
    Mutant("backend/cuda/staging.rs", "pieces of f32 are taken as 16-bit", "engine/cuda::upload::f32_in_two_chunks",
           "chunk.par_chunks(PIECE * size)", "chunk.par_chunks(PIECE * 2)"),
    Mutant("backend/cuda/staging.rs", "f32 is truncated", "engine/cuda::upload::f32_is_rounded",
           "*out = bf16::from_f32(*x);", "*out = bf16::from_bits((x.to_bits() >> 16) as u16);"),
    Mutant("backend/cuda/staging.rs", "f16 is rounded half up", "engine/cuda::upload::f16_is_rounded",
           "*out = bf16::from_f32(*x);",
           "*out = if x.is_nan() { bf16::NAN } else { bf16::from_bits((x.to_bits().wrapping_add(0x8000) >> 16) as u16) };"),
    Mutant("backend/cuda/staging.rs", "progress counts bytes of the file", "engine/cuda::upload::f32_in_two_chunks",
           "self.bytes += 2 * count as u64;", "self.bytes += (size * count) as u64;"),
    Mutant("backend/cuda/kv_cache.rs", "offsets of layers lose their high half", "ops/offsets::cache_of_many_layers",
           "bytes(layer * self.positions * self.width)", "bytes((layer * self.positions * self.width) as u32 as usize)"),
    Mutant("any/embed.cu", "tokens have 16 bits", "embed::embeds_many_rows",
           "at<const int32_t>(p.tokens)[index] : -1;", "(at<const int32_t>(p.tokens)[index] & 0xffff) : -1;"),
    Mutant("any/rope.cu", "cache rows have 16 bits", "rope::far_positions_and_many_rows",
           "at<const int32_t>(p.cache_row)[row] : -1;", "int16_t(at<const int32_t>(p.cache_row)[row]) : -1;"),
    Mutant("common/philox.cuh", "positions have 16 bits", "unmask::far_positions_and_steps",
           "c1 = position,", "c1 = position & 0xffff,"),
    Mutant("common/philox.cuh", "steps have 16 bits", "unmask::far_positions_and_steps",
           "c2 = step,", "c2 = step & 0xffff,"),
    Mutant("backend/cpu/norm.rs", "bits of a pass depend on the threads", "engine/threads::logits_have_the_same_bits",
           "    let (chunks, tail) = x.as_chunks::<LANES>();",
           "    let (chunks, tail) = if rayon::current_num_threads() > 2 { (&[][..], x) } else { x.as_chunks::<LANES>() };"),
    Mutant("sampling/sampler.rs", "random numbers depend on the thread", "engine/threads::decodes_have_the_same_tokens",
           "score_row(row, params, group.step, *position)?",
           "score_row(row, params, group.step + rayon::current_thread_index().unwrap_or(0), *position)?"),
    Mutant("backend/cuda/batch.rs", "positions have 8 bits", "engine/cuda::long_sequences",
           'checked_i32("positions", metadata.positions[row])?', 'checked_i32("positions", metadata.positions[row] % 256)?'),
    # ---- command line: printed numbers
    Mutant("bin/dllm/generate.rs", "the speed of the summary is the number of forwards", "cli/printed_numbers::the_summary_of_generate",
           '"NFE {}, {:.3} s, {:.1} tokens/s, {device}{threads}",\n        generation.nfe,\n        generation.elapsed.as_secs_f64(),\n        tokens_per_second(generation, config),',
           '"NFE {}, {:.3} s, {:.1} tokens/s, {device}{threads}",\n        generation.nfe,\n        generation.elapsed.as_secs_f64(),\n        generation.nfe as f64 / tokens_per_second(generation, config),'),
    Mutant("bin/dllm/generate.rs", "the speed in JSON is that of one sequence", "cli/printed_numbers::tokens_per_second_of_generate",
           '"tokens_per_second": tokens_per_second(generation, config),',
           '"tokens_per_second": tokens_per_second(generation, config) / generation.tokens.len() as f64,'),
    Mutant("bin/dllm/generate.rs", "the seconds in JSON are milliseconds", "cli/printed_numbers::seconds_are_the_time_of_the_decode",
           '"seconds": generation.elapsed.as_secs_f64(),', '"seconds": generation.elapsed.as_secs_f64() / 1e3,'),
    Mutant("decode/generator.rs", "tokens after the end of the text count", "cli/printed_numbers::tokens_per_second_of_generate",
           "(self.text_tokens(s).len() + 1).min(self.tokens[s].len());", "self.tokens[s].len();"),
    Mutant("decode/generator.rs", "only the first sequence counts", "cli/printed_numbers::tokens_per_second_of_generate",
           "let tokens: usize = (0..self.tokens.len()).map(counted).sum();", "let tokens: usize = (0..1).map(counted).sum();"),
    Mutant("bin/dllm/bench/summary.rs", "the speed of bench is that of one sequence", "cli/printed_numbers::speeds_of_bench",
           "tokens_per_second: (setup.batch * setup.gen_length) as f64 / seconds,", "tokens_per_second: setup.gen_length as f64 / seconds,"),
    Mutant("bin/dllm/bench/summary.rs", "the ratio to vanilla is inverted", "bench::tests::numbers_of_the_summary",
           "vanilla.map(|v| median(v.seconds.clone()) / seconds),", "vanilla.map(|v| seconds / median(v.seconds.clone())),"),
    Mutant("bin/dllm/bench/summary.rs", "a MAC is one operation", "cli/printed_numbers::multiply_adds_of_bench",
           "gflops: 2e-6 * work()", "gflops: 1e-6 * work()"),
    Mutant("bin/dllm/bench/summary.rs", "the work is that of all rounds", "bench::tests::numbers_of_the_summary",
           ".map(|t| t.macs).sum::<f64>() / run.seconds.len().max(1) as f64;", ".map(|t| t.macs).sum::<f64>();"),
    Mutant("bin/dllm/bench/summary.rs", "the speedup over the reference is inverted", "bench::tests::numbers_of_the_summary",
           "speedup: original.map(|o| o / ms_per_forward),", "speedup: original.map(|o| ms_per_forward / o),"),
    Mutant("bin/dllm/bench/summary.rs", "GB/s of the table is GiB/s", "bench::tests::tables_of_the_summary",
           "digits(1e-6 * self.weight_bytes_per_forward as f64 / k.ms.max(1e-6)),", "digits(1e-6 / 1.073741824 * self.weight_bytes_per_forward as f64 / k.ms.max(1e-6)),"),
    Mutant("bin/dllm/bench/summary.rs", "the floor counts one operation per MAC", "bench::tests::tables_of_the_summary",
           "reading.max(2.0 * k.macs / operations_per_second);", "reading.max(k.macs / operations_per_second);"),
    Mutant("bin/dllm/bench/summary.rs", "the table has the mean work in millions", "cli/printed_numbers::the_tables_of_bench_say_what_its_json_says",
           'let giga = |x: f64| format!("{:.3}", x / 1e9);', 'let giga = |x: f64| format!("{:.3}", x / 1e6);'),
    Mutant("bin/dllm/bench/timed.rs", "rows are those of the first sequence", "cli/printed_numbers::multiply_adds_of_bench",
           "rows: windows.iter().map(|window| window.rows.len()).sum(),", "rows: windows.iter().take(1).map(|window| window.rows.len()).sum(),"),
    Mutant("model/forward.rs", "attention counts scores, not values", "cli/printed_numbers::multiply_adds_of_bench",
           "rows * (d * (q + 2 * kv) + 2 * keys * q);", "rows * (d * (q + 2 * kv) + keys * q);"),
    Mutant("model/forward.rs", "the rest of the last layer is not counted", "cli/printed_numbers::numbers_of_eval",
           "is_open(layer - 1) { after_attention(bucket.logit_rows) } else { 0 };", "is_open(layer - 1) { 0 } else { 0 };"),
    Mutant("bin/dllm/eval.rs", "blank lines count for the limit", "cli/printed_numbers::a_limit_counts_problems",
           "rows.lines().enumerate().filter(|(_, row)| !row.trim().is_empty()).take(limit);",
           "rows.lines().enumerate().take(limit).filter(|(_, row)| !row.trim().is_empty());"),
    Mutant("bin/dllm/eval.rs", "accuracy is that of the wrong ones", "cli/printed_numbers::numbers_of_eval",
           "self.right as f64 / self.problems as f64", "1.0 - self.right as f64 / self.problems as f64"),
    Mutant("bin/dllm/eval.rs", "the work is that of the last problem", "eval::tests::a_score_sums_what_was_generated",
           "self.macs += generation.macs;", "self.macs = generation.macs;"),
    Mutant("bin/dllm/eval.rs", "the time is that of the last problem", "eval::tests::a_score_sums_what_was_generated",
           "self.elapsed += generation.elapsed;", "self.elapsed = generation.elapsed;"),
    Mutant("bin/dllm/eval.rs", "the table has the work of all problems", "eval::tests::scores_are_means_over_the_problems",
           "score.macs() / 1e9,", "score.macs as f64 / 1e9,"),
    Mutant("bin/dllm/eval.rs", "the name of a setting lacks its interval", "eval::tests::every_flag_reaches_the_settings",
           '("response-interval", options.response_interval as f64, default.response_interval as f64),',
           '("response-interval", options.response_interval as f64, options.response_interval as f64),'),
    Mutant("bin/dllm/inspect.rs", "the memory is that of one sequence", "cli/printed_numbers::memory_of_inspect",
           "sizes.prompt_lens = vec![args.prompt_length; batch];", "sizes.prompt_lens = vec![args.prompt_length; 1];"),
    Mutant("bin/dllm/inspect.rs", "logits are those of one sequence", "cli/printed_numbers::memory_of_inspect",
           "sizes.max_candidates *= batch;", "sizes.max_candidates *= 1;"),
    Mutant("bin/dllm/inspect.rs", "the device's total lacks the cache", "cli/printed_numbers::memory_of_inspect",
           'row("all", weights + cache + workspace, "");', 'row("all", weights + workspace, "");'),
    Mutant("bin/dllm/inspect.rs", "the text has the keys' heads", "cli/printed_numbers::architecture_of_inspect",
           'format!("{} of {}{shared}", a.heads, a.head_dim)', 'format!("{} of {}{shared}", a.kv_heads, a.head_dim)'),
    Mutant("bin/dllm/inspect.rs", "tensors have the size of f32", "cli/printed_numbers::architecture_of_inspect",
           "bytes: shape.iter().product::<usize>() * dtype.size(),", "bytes: shape.iter().product::<usize>() * 4,"),
    Mutant("bin/dllm/presets.rs", "the intervals are exchanged", "cli/printed_numbers::numbers_of_presets",
           "let numbers = [preset.prompt_interval.to_string(), preset.response_interval.to_string(), ratio.to_string()];",
           "let numbers = [preset.response_interval.to_string(), preset.prompt_interval.to_string(), ratio.to_string()];"),
    # ---- command line: flags
    Mutant("bin/dllm/args.rs", "--cfg-interval reaches nothing", "args::tests::every_flag_of_a_decode_sets_its_option",
           "cfg_interval: self.cfg_interval.unwrap_or(default.cfg_interval),", "cfg_interval: default.cfg_interval,"),
    Mutant("bin/dllm/args.rs", "--eps reaches nothing", "args::tests::every_flag_of_a_decode_sets_its_option",
           "eps: self.eps.unwrap_or(default.eps),", "eps: default.eps,"),
    Mutant("bin/dllm/args.rs", "--alg-temp sets the temperature", "args::tests::flags_override_a_preset",
           "alg_temp: self.alg_temp.unwrap_or(default.alg_temp),", "alg_temp: self.temperature.unwrap_or(default.alg_temp),"),
    Mutant("bin/dllm/args.rs", "--suffix-window does not choose a mode", "eval::tests::every_flag_reaches_the_settings",
           "            || self.suffix_window.is_some()\n    }", "            || self.preset.is_some()\n    }"),
    Mutant("bin/dllm/args.rs", "--vicinity is never idle", "args::tests::idle_flags",
           '("--vicinity (see --cache)", self.vicinity.is_some() && !refreshes),', '("--vicinity (see --cache)", false),'),
    Mutant("bin/dllm/args.rs", "a second name has no row in the table", "args::tests::every_flag_of_a_decode_sets_its_option",
           '#[arg(long, value_name = "N", help_heading = "Sampling")]\n    pub seed:', '#[arg(long, alias = "random-seed", value_name = "N", help_heading = "Sampling")]\n    pub seed:'),
    Mutant("bin/dllm/bench.rs", "--response-interval reaches nothing", "bench::tests::every_flag_reaches_the_setup",
           "            response_interval: args.response_interval,", "            response_interval: 7,"),
    Mutant("bin/dllm/bench.rs", "all prompts of a batch are the first one", "bench::tests::every_flag_reaches_the_setup",
           "(1.., true) => random_prompt(&setup.config, args.prompt_length, args.seed.wrapping_add(i as u64)),",
           "(1.., true) => random_prompt(&setup.config, args.prompt_length, args.seed.wrapping_add(i as u64 / 9)),"),
    Mutant("bin/dllm/bench.rs", "mode prefix-threshold has the other cache", "bench::tests::modes_have_their_options",
           "Mode::PrefixThreshold => (CacheMode::Prefix,", "Mode::PrefixThreshold => (CacheMode::Dual,"),
    Mutant("bin/dllm/inspect.rs", "--cfg-scale does not reach the sizes", "inspect::tests::every_flag_reaches_the_answer",
           "        cfg_scale: args.cfg_scale,\n        ..Options::default()", "        cfg_scale: 0.0,\n        ..Options::default()"),
    # ---- memory of a decode on the CPU
    Mutant("engine/limits.rs", "the estimate lacks the logits", "engine/memory::large",
           "let logits = limits.logit_rows * config.vocab_size;\n        let angles", "let logits = 0 * config.vocab_size;\n        let angles"),
    Mutant("engine/limits.rs", "the estimate lacks the packed operands", "engine/memory::large",
           "let packed = linear::packed_len(limits.rows, SessionConfig::widest_input(config));", "let packed = 0 * linear::packed_len(limits.rows, SessionConfig::widest_input(config));"),
    Mutant("engine/limits.rs", "the estimate lacks the angles", "engine/memory::small",
           "let angles = limits.longest * config.head_dim;", "let angles = 0 * limits.longest * config.head_dim;"),
    Mutant("engine/limits.rs", "the estimate has the scratch of one thread", "engine/memory::small",
           "scratch: threads * scratch }", "scratch: threads.min(1) * scratch }"),
    Mutant("engine/limits.rs", "the estimate lacks attention's scratch", "engine/memory::small",
           "let scratch = linear::SCRATCH_BYTES + 4 * attention::scratch_len(limits.longest, config.head_dim);",
           "let scratch = linear::SCRATCH_BYTES + 0 * attention::scratch_len(limits.longest, config.head_dim);"),
    Mutant("engine/limits.rs", "the estimate has one copy of the guided logits less", "engine/memory::guided_at_intervals",
           "let guidance = 3 * deltas;", "let guidance = 2 * deltas;"),
    Mutant("model/session_config.rs", "the estimate lacks an activation buffer", "engine/memory::large",
           "3 * self.d + self.qkv + self.q + 3 * self.mlp", "2 * self.d + self.qkv + self.q + 3 * self.mlp"),
    Mutant("model/session_config.rs", "the estimate lacks the logit rows' buffers", "engine/memory::large",
           "        self.d + self.q\n", "        self.q\n"),
    Mutant("model/session.rs", "a decode allocates a buffer more", "engine/memory::large",
           "logit_attn: activations(logit_rows, widths.q)?,", "logit_attn: activations(logit_rows + 200, widths.q)?,"),
    # ---- checkpoints
    Mutant("model/config.rs", "fewer embedding rows than tokens are accepted", "cli/bad_input::config::embedding_rows_and_tensors_that_disagree",
           'rows if rows < keys.size_or("vocab_size", 1)? => {', 'rows if rows < keys.size_or("vocab_size", 1)? - keys.size_or("vocab_size", 1)? => {'),
    Mutant("model/config.rs", "more embedding rows than tokens are not read", "cli/bad_input::config::more_embedding_rows_than_tokens",
           "        rows => rows,\n    };", '        rows => keys.size_or("vocab_size", rows)?,\n    };'),
    Mutant("model/config.rs", "the end of texts is that of the first file", "cli/bad_input::config::special_tokens_of_two_files",
           "config.eos_token_ids.extend(more);", "drop(more);"),
    Mutant("tokenizer/mod.rs", "special_tokens_map.json comes first", "cli/tokenizer::roles_of_tokenizer_config_come_first",
           "&& !self.named.contains_key(name)", "&& (!self.named.contains_key(name) || path.ends_with(SPECIAL))"),
    Mutant("tokenizer/mod.rs", "special_tokens_map.json is always read", "cli/tokenizer::roles_of_tokenizer_config_come_first",
           'if !json.contains_key("added_tokens_decoder") {', 'if !json.contains_key("added_tokens_decoders") {'),
    Mutant("tokenizer/mod.rs", "ids of tokenizer_config.json are not compared", "cli/tokenizer::ids_of_added_tokens_agree",
           "            check_added(&tokenizer, dir, &config)?;\n", "            let _ = check_added(&tokenizer, dir, &config);\n"),
    Mutant("tokenizer/mod.rs", "an id of another token is not noticed", "cli/tokenizer::ids_of_added_tokens_agree",
           "|| tokenizer.id_to_token(id).is_some() {", "|| false {"),
    Mutant("model/weights.rs", "a wrong shape names the directory only", "cli/bad_input::tensors::wrong_shape",
           "Err(mismatch(path, &expected, format!", "Err(mismatch(&self.source, &expected, format!"),
    Mutant("model/weights.rs", "a wrong entry of a header is not named", "cli/bad_input::damage::what_is_said_about_damaged_tensors",
           "bad_entry(header).unwrap_or_else(|| e.to_string())", "None.unwrap_or_else(|| e.to_string())"),
    Mutant("model/weights.rs", "the file of a wrong size is not stated", "cli/bad_input::damage::what_is_said_about_damaged_tensors",
           'return Err(format!("expected {expected} bytes of tensors, found {found}"));', 'return Err(format!("expected {expected} bytes of tensors, found {expected}"));'),
    Mutant("error.rs", "an error of a tensor has no expected shape", "cli/bad_input::damage::damaged_config",
           '#[error("{}: tensor \\"{tensor}\\": expected {expected}, found {found}", path.display())]', '#[error("{}: tensor \\"{tensor}\\": found {found}", path.display())]'),
    # ---- selftest: the comparisons that doctor, benches and tests rely on
    Mutant("selftest/bound.rs", "NaN is within every bound", "selftest::bound::tests::nan_exceeds_every_bound",
           "self.error <= self.bound", "!(self.error > self.bound)"),
    Mutant("selftest/bound.rs", "NaN is forgotten in the largest error",
           "selftest::bound::tests::nan_exceeds_every_bound",
           "if largest.is_nan() || e <= largest { largest } else { e };", "if e > largest { e } else { largest };"),
    Mutant("selftest/bound.rs", "missing elements are not counted",
           "selftest::bound::tests::missing_elements_count_as_differences",
           "count() + got.len().abs_diff(want.len());", "count();"),
    Mutant("selftest/bound.rs", "results may move by four units in the last place",
           "selftest::bound::tests::one_unit_in_the_last_place_is_found",
           "relative, 2.0 * T::EPSILON),", "relative, 4.0 * T::EPSILON),"),
    Mutant("selftest/bound.rs", "all results may move by a unit in the last place",
           "selftest::bound::tests::one_unit_in_the_last_place_is_found",
           "error: moved, bound: 0.01 },", "error: moved, bound: 1.0 },"),
    Mutant("selftest/case.rs", "the last of a few rows is left out",
           "selftest::case::tests::few_rows_are_the_first_the_middle_and_the_last",
           "vec![0, count / 2, count - 1]", "vec![0, count / 2]"),
    Mutant("selftest/case.rs", "a row of a few occurs twice",
           "selftest::case::tests::few_rows_are_the_first_the_middle_and_the_last", "rows.dedup();", ";"),
    Mutant("selftest/case.rs", "a flip changes the lowest byte of a word",
           "selftest::case::tests::a_flip_changes_one_word_much",
           "bytes[(word + 1) * word_bytes::<T>() - 1]", "bytes[word * word_bytes::<T>()]"),
    Mutant("selftest/case.rs", "a word is a whole struct", "selftest::case::tests::a_flip_changes_one_word_much",
           "size_of::<T>().min(4)", "size_of::<T>()"),
    Mutant("selftest/random.rs", "there are no outliers", "selftest::random::tests::numbers_have_their_distributions",
           "== 0 { 4.0 } else { 1.0 };", "== 0 { 1.0 } else { 1.0 };"),
    Mutant("selftest/random.rs", "outliers repeat at a power of two",
           "selftest::random::tests::outliers_repeat_after_a_period_that_divides_no_width",
           "len.min(1_048_583)", "len.min(1_048_576)"),
    Mutant("selftest/random.rs", "a number is drawn twice", "selftest::random::tests::distinct_numbers_are_a_permutation",
           "all.swap(i, other);", "all[i] = all[other];"),
    Mutant("selftest/float.rs", "f16's largest number is infinite",
           "selftest::float::tests::limits_are_those_of_the_conversions",
           "const LARGEST: f32 = 65504.0;", "const LARGEST: f32 = 65536.0;"),
    Mutant("selftest/float.rs", "a result is rounded to f32 only",
           "selftest::float::tests::limits_are_those_of_the_conversions",
           "Self::of(x as f32).f64()", "f64::from(x as f32)"),
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
