#!/usr/bin/env python3
"""Plants faults into copies of kernels and host code, one at a time; each must make the test fail that its line names.

    tests/mutants.py                       all of them
    tests/mutants.py vverify "no barrier"  those whose file or description contains one of these
    tests/mutants.py --markdown            only print the table for docs/mutation-tests.md
    tests/mutants.py --table               only check that every fault fits its source, and that page

It needs what the tests need (cargo, a C++17 compiler, Linux on x86-64) and python3 without packages. The tests are built
once. For a fault only the kernels that it is in are compiled, with the commands of softgpu/build.rs, and the tests load
them through SOFTGPU_KERNELS. For a fault in src/ a copy of the library is built with its unit tests. Fails if a fault
survives, does not compile, crashes or hangs the tests, or no longer fits its source, and if docs/mutation-tests.md has another
table.
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
PAGE = ROOT / "docs/mutation-tests.md"
# Which kernel files the tests of a file launch.
KERNELS = {
    "unmask": ["unmask", "cut"],
    "vverify": ["vverify", "rows"],
    **{name: [name] for name in ["rows", "embed", "norm", "rope", "swiglu", "attention"]},
    "merge": ["merge", "attention"],
    "advance": ["advance", "unmask"],
}
# A test that runs longer hangs; the slowest takes 10 s alone.
TIMEOUT_S = 120


def source(cuda, name):
    """The kernel file of this name."""
    return next(cuda.glob(f"*/{name}.cu"))


@dataclass
class Fault:
    file: str  # in cuda/, or in src/ if it ends in .rs
    is_wrong: str  # what is wrong with it
    test: str  # FILE::TEST, or the path of a unit test in src/
    good: str  # occurs once in the file; lines around the one that changes are there to tell it from others
    bad: str


FAULTS = [
    # ---- unmask: phase 1
    Fault("common/logits.cuh", "vectors that the vocabulary's end cuts are left at 0",
          "unmask::vocabularies_and_policies",
          "if (first + v * step + kVector<T> > vocab_size) bits[v]", "if (first + v * step >= vocab_size) bits[v]"),
    Fault("common/logits.cuh", "a vector that ends the vocabulary is left at 0", "unmask::vocabularies_and_policies",
          "if (first + v * step + kVector<T> <= vocab_size) bits[v]",
          "if (first + v * step + kVector<T> < vocab_size) bits[v]"),
    Fault("common/logits.cuh", "what lies beyond the vocabulary is 0", "unmask::vocabularies_and_policies",
          "if (first + v * step + kVector<T> > vocab_size) bits[v]",
          "if (first + v * step + kVector<T> > vocab_size && first + v * step < vocab_size) bits[v]"),
    Fault("common/logits.cuh", "all vectors of a thread are its first", "unmask::vocabularies_and_policies",
          "reinterpret_cast<const uint4*>(row + first + v * step);", "reinterpret_cast<const uint4*>(row + first);"),
    Fault("any/unmask.cu", "ties in a vector go to the higher token", "unmask::ties_go_to_the_lowest_token",
          "for (int j = kVector<T> - 1; j >= 0; j--) token", "for (int j = 0; j < kVector<T>; j++) token"),
    Fault("any/unmask.cu", "ties in a thread go to the higher vector", "unmask::ties_go_to_the_lowest_token",
          "for (int v = kVectors - 1; v >= 0; v--) {", "for (int v = 0; v < kVectors; v++) {"),
    Fault("common/reduce.cuh", "ties between threads go to the higher token", "unmask::ties_go_to_the_lowest_token",
          "min(index_of(a), index_of(b))", "max(index_of(a), index_of(b))"),
    Fault("any/unmask.cu", "the repetition with clean logits never happens", "unmask::nan_and_infinities",
          "if (clean || sum_of(both) < INFINITY) break;", "break;"),
    Fault("any/unmask.cu", "the repetition does not clean the logits", "unmask::nan_and_infinities",
          "if (clean) logits[v].x[j] = sanitized(logits[v].x[j]);", ";"),
    Fault("any/unmask.cu", "general: what is not a number stays in the sum", "unmask::nan_and_infinities",
          "float logit = sanitized(logits[i * kThreads]);\n    if (logit < cut)",
          "float logit = logits[i * kThreads];\n    if (logit < cut)"),
    Fault("any/unmask.cu", "general: every batch is the first", "unmask::every_confidence",
          "first_token<T>(chunk, batch), kStep", "first_token<T>(chunk, 0), kStep"),
    Fault("any/unmask.cu", "general: every batch is put where the first is", "unmask::every_confidence",
          "put(logits[((batch + v) * kVec + j) * kThreads]", "put(logits[(v * kVec + j) * kThreads]"),
    Fault("any/unmask.cu", "general: ties in a thread go to the higher token", "unmask::ties_go_to_the_lowest_token",
          "if (logit > max) {", "if (logit >= max) {"),
    Fault("any/unmask.cu", "the mask token takes part in a chunk", "unmask::the_mask_token_is_never_chosen",
          "        logits[v].x[j] = -INFINITY;", "        ;"),
    Fault("any/unmask.cu", "general: the mask token takes part in a chunk", "unmask::the_mask_token_is_never_chosen",
          "      logits[i * kThreads] = -INFINITY;", "      ;"),
    Fault("any/unmask.cu", "the mask token's logit is not put aside", "unmask::the_mask_token_is_never_chosen",
          "if (p.mask_token < p.vocab_size) *mask = sanitized(logits[v].x[j]);", ";"),
    Fault("any/unmask.cu", "general: a mask token below the cut is put aside", "unmask::top_p_and_top_k",
          "if (p.mask_token < p.vocab_size && logit >= cut) *mask", "if (p.mask_token < p.vocab_size) *mask"),
    Fault("any/unmask.cu", "the mask token is looked for in the first chunk only",
          "unmask::the_mask_token_is_never_chosen",
          "if (mask_token / kChunk != chunk) return", "if (mask_token / kChunk != 0 || chunk != 0) return"),
    Fault("any/unmask.cu", "a mask token at a chunk's end is looked for in the next",
          "unmask::the_mask_token_is_never_chosen",
          "if (mask_token / kChunk != chunk) return", "if ((mask_token + 1) / kChunk != chunk) return"),
    Fault("any/unmask.cu", "no barrier before the mask token's logit is put down",
          "unmask::the_same_bits_in_every_order",
          "mask = -INFINITY;\n  __syncthreads();", "mask = -INFINITY;\n  ;"),
    Fault("any/unmask.cu", "no barrier before the mask token's logit is read", "unmask::the_same_bits_in_every_order",
          "take(&mask);\n  __syncthreads();", "take(&mask);\n  ;"),
    Fault("any/unmask.cu", "the mask token's logit is lost between chunks", "unmask::the_mask_token_is_never_chosen",
          "high.mask = fmaxf(high.mask, low.mask);", ";"),
    Fault("any/unmask.cu", "the mask token's logit is lost between lanes",
          "unmask::the_mask_token_is_never_chosen",
          "b.mask = __shfl_xor_sync(kAllLanes, a.mask, lanes);", "b.mask = -INFINITY;"),
    Fault("any/unmask.cu", "the cut drops the logit that it equals", "unmask::top_p_and_top_k",
          "if (logit < cut) logit = -INFINITY;", "if (logit <= cut) logit = -INFINITY;"),
    Fault("any/unmask.cu", "the second largest logit is below its equals", "unmask::ties_go_to_the_lowest_token",
          "if (token_of(i) != partial.token) second", "if (logit < partial.max) second"),
    Fault("any/unmask.cu", "entropy's moment is of logits, not of distances", "unmask::every_confidence",
          "if (weight > 0.f) moment += weight * x;\n    if (token",
          "if (weight > 0.f) moment += weight * logit;\n    if (token"),
    Fault("any/unmask.cu", "confidences are never tempered", "unmask::draws",
          "return p.tempered_confidence && p.temperature > 0.f ? 1.f / p.temperature : 1.f;", "return 1.f;"),
    Fault("any/unmask.cu", "draws take the random numbers of ranks", "unmask::draws",
          "philox(p.seed, kToken, step", "philox(p.seed, kRank, step"),
    Fault("any/unmask.cu", "noise is thought to be at most 3", "unmask::draws",
          "p.temperature * 37.f", "p.temperature * 3.f"),
    # ---- unmask: phase 2
    Fault("any/unmask.cu", "sums of chunks are added without rescaling", "unmask::vocabularies_and_policies",
          "high.sum += weight * low.sum;", "high.sum += low.sum;"),
    Fault("any/unmask.cu", "moments of chunks are not shifted", "unmask::every_confidence",
          "high.moment += weight * (low.moment + x * low.sum);", "high.moment += weight * low.moment;"),
    Fault("any/unmask.cu", "the other chunk's largest is not taken for the second", "unmask::every_confidence",
          "high.second = fmaxf(high.second, low.max);", "high.second = fmaxf(high.second, low.second);"),
    Fault("any/unmask.cu", "chunks past the 16th are dropped", "unmask::published_vocabularies",
          "for (int c = threadIdx.x; c < chunks; c += kWarp) all =",
          "for (int c = threadIdx.x; c < 16; c += kWarp) all ="),
    Fault("any/unmask.cu", "the mask token is left out of the sum", "unmask::the_mask_token_is_never_chosen",
          "    all.sum += weight;", "    ;"),
    Fault("any/unmask.cu", "a mask token that would win keeps its share of the sum",
          "unmask::the_mask_token_is_never_chosen",
          "const bool mask_wins = ranked(all.mask, p.mask_token) > ranked(all.max, all.token);",
          "const bool mask_wins = false;"),
    Fault("any/unmask.cu", "a mask token that equals a later best does not win",
          "unmask::the_mask_token_is_never_chosen",
          "ranked(all.mask, p.mask_token) > ranked(all.max, all.token);", "all.mask > all.max;"),
    Fault("any/unmask.cu", "the mask token is never the second largest", "unmask::the_mask_token_is_never_chosen",
          "all.second = fmaxf(all.second, all.mask);", ";"),
    Fault("any/unmask.cu", "a row without a finite logit counts as text", "unmask::rows_without_a_finite_logit",
          "return {0.f, kNoFiniteLogit};", "return {0.f, kNotMasked};"),
    Fault("any/unmask.cu", "confidence is that of the largest, not of the drawn token", "unmask::draws",
          "const float logit = draws ? logit_at<T>(p, row.logits_row, result.token, cut) : all.max;",
          "const float logit = all.max;"),
    Fault("common/logits.cuh", "an infinite logit that is drawn stays infinite", "unmask::nan_and_infinities",
          "return sanitized(logit);", "return logit;"),
    # ---- unmask: phase 3
    Fault("any/unmask.cu", "the row counter's total is one short", "unmask::vocabularies_and_policies",
          "is_last(workspace.row_counter + row_index, gridDim.x)",
          "is_last(workspace.row_counter + row_index, gridDim.x - 1)"),
    Fault("any/unmask.cu", "all sequences share a counter", "unmask::the_same_bits_in_every_order",
          "is_last(workspace.sequence_counter + row.sequence, rows)", "is_last(workspace.sequence_counter, rows)"),
    Fault("any/unmask.cu", "rows that are not masked can be committed", "unmask::vocabularies_and_policies",
          "if (result.token >= 0 && position < before) {", "if (result.token >= kNotMasked && position < before) {"),
    Fault("any/unmask.cu", "the window's end is one late", "unmask::positions_past_the_window_are_scored_and_left",
          "if (result.token >= 0 && position < before) {", "if (result.token >= 0 && position <= before) {"),
    Fault("any/unmask.cu", "the threshold must be exceeded", "unmask::selections_of_every_size",
          "reach += result.confidence >= p.threshold;", "reach += result.confidence > p.threshold;"),
    Fault("any/unmask.cu", "the threshold's bound is an ulp high", "unmask::selections_of_every_size",
          "uint64_t(ordered(p.threshold)) << 32", "uint64_t(ordered(p.threshold) + 1) << 32"),
    Fault("any/unmask.cu", "the threshold's bound is an ulp low", "unmask::selections_of_every_size",
          "uint64_t(ordered(p.threshold)) << 32", "uint64_t(ordered(p.threshold) - 1) << 32"),
    Fault("any/unmask.cu", "the threshold commits nothing where nothing reaches it",
          "unmask::equal_rows_are_taken_in_order",
          "count = min(count, max(1, reach));", "count = min(count, reach);"),
    Fault("any/unmask.cu", "all that reach the threshold are written, whatever the quota",
          "unmask::vocabularies_and_policies",
          "if (reach > 0 && reach <= count) bound", "if (reach > 0) bound"),
    Fault("any/unmask.cu", "the quota may exceed what there is",
          "unmask::positions_past_the_window_are_scored_and_left",
          "int count = max(0, min(quota, eligible));", "int count = max(0, quota);"),
    Fault("any/unmask.cu", "a failed row does not hold its sequence back", "unmask::rows_without_a_finite_logit",
          "if (bad || failed != 0x7fffffff) count = 0;", "if (bad) count = 0;"),
    Fault("any/unmask.cu", "factor: the bound of the j-th is that of the one before",
          "unmask::selections_of_every_size",
          "1.f - factor / (middle + 2);", "1.f - factor / (middle + 1);"),
    Fault("any/unmask.cu", "factor: the best may fail", "unmask::factors_of_few_rows",
          "int low = 1, high = n;", "int low = 0, high = n;"),
    Fault("any/unmask.cu", "factor: the first to fail is looked for one late", "unmask::selections_of_every_size",
          "Sum()) <= middle) {", "Sum()) < middle) {"),
    Fault("any/unmask.cu", "factor: the last is not taken as the original does", "unmask::selections_of_every_size",
          "if (count == 0 || count == n - 1) count++;", "if (count == 0) count++;"),
    Fault("any/unmask.cu", "the bound of token indices is one high", "unmask::indices_out_of_range",
          "row.token < p.num_tokens &&", "row.token <= p.num_tokens &&"),
    Fault("any/unmask.cu", "the bound of logits rows is one high", "unmask::indices_out_of_range",
          "row.logits_row < p.num_logits_rows;", "row.logits_row <= p.num_logits_rows;"),
    Fault("any/unmask.cu", "an empty sequence alone is not cleared", "unmask::sequences_without_rows_or_masks",
          "(p.num_sequences > 1 || cu_rows[1] <= 0)", "p.num_sequences > 1"),
    Fault("any/unmask.cu", "empty sequences keep their last failure", "unmask::sequences_without_rows_or_masks",
          "at<int32_t>(p.failed)[s] = DLLM_NONE_FAILED;", ";"),
    Fault("any/unmask.cu", "rows' partials overlap", "unmask::the_same_bits_in_every_order",
          "workspace.partials + int64_t(row_index) * gridDim.x;", "workspace.partials + row_index;"),
    # ---- cut
    Fault("any/top_k_top_p.cu", "top-p keeps one token too few at a full sum", "unmask::top_p_and_top_k",
          "(double(p.top_p) * double(total)) + 1;", "(double(p.top_p) * double(total));"),
    Fault("any/top_k_top_p.cu", "a mask token that would win takes part", "unmask::cuts",
          "row.without_mask = rank_index(top) == p.mask_token;", "row.without_mask = false;"),
    Fault("any/top_k_top_p.cu", "a thread's second vector is its first", "unmask::cuts",
          "first, kStep, p.vocab_size, bits);", "first, 0, p.vocab_size, bits);"),
    Fault("any/top_k_top_p.cu", "every second vector is taken twice", "unmask::cuts",
          "first += kBatch * kStep", "first += kStep"),
    Fault("any/top_k_top_p.cu", "what lies above a step is not taken off", "unmask::cuts",
          "share -= step.above;", ";"),
    Fault("any/top_k_top_p.cu", "top-k forgets top-p's cut", "unmask::cuts",
          "cut = fmaxf(cut, reaches(row, ByCount(), steps, p.vocab_size, p.top_k));",
          "cut = reaches(row, ByCount(), steps, p.vocab_size, p.top_k);"),
    Fault("any/top_k_top_p.cu", "no barrier before a digit's counts are read", "unmask::the_same_bits_in_every_order",
          "weight(logit));\n    });\n    __syncthreads();", "weight(logit));\n    });\n    ;"),
    # ---- logits, random numbers
    Fault("common/logits.cuh", "the last token of the vocabulary is dropped", "unmask::vocabularies_and_policies",
          "first + j < vocab_size ? row[first + j]", "first + j < vocab_size - 1 ? row[first + j]"),
    Fault("common/logits.cuh", "infinite logits stay infinite", "unmask::nan_and_infinities",
          "return fminf(fmaxf(logit, -INFINITY), FLT_MAX);", "return fmaxf(logit, -INFINITY);"),
    Fault("common/logits.cuh", "guidance is rounded once less", "unmask::guidance_rounds_as_the_originals",
          "__fadd_rn(unconditional, __fmul_rn(scale + 1.f, __fsub_rn(conditional, unconditional)))",
          "fmaf(scale + 1.f, __fsub_rn(conditional, unconditional), unconditional)"),
    Fault("common/philox.cuh", "large noise is taken from a rounded u", "unmask::large_noise_is_exact",
          "const bool high = bits >> 52;", "const bool high = false;"),
    # ---- selection, reductions, memory
    Fault("common/select.cuh", "the k-th is looked for one bucket low", "vverify::ratios",
          "above < k && k <= above + content", "above <= k && k < above + content"),
    Fault("common/select.cuh", "what lies above a digit is not taken off", "vverify::ratios",
          "k -= bucket.above;", ";"),
    Fault("common/select.cuh", "buckets of other warps are not added", "vverify::ratios",
          "int w = warp + 1; w < kWarps;", "int w = warp + 2; w < kWarps;"),
    Fault("common/select.cuh", "no barrier before the histogram is read", "vverify::ratios",
          "__syncthreads();\n    const Bucket<int> bucket", ";\n    const Bucket<int> bucket"),
    Fault("common/select.cuh", "no barrier after the histogram is cleared", "vverify::ratios",
          "histogram[threadIdx.x] = 0;\n    __syncthreads();", "histogram[threadIdx.x] = 0;\n    ;"),
    Fault("common/select.cuh", "no barrier before the bucket found is read", "vverify::ratios",
          "__syncthreads();\n  return found;", ";\n  return found;"),
    Fault("common/reduce.cuh", "negative numbers in reverse order", "vverify::ratios",
          "bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u)", "bits ^ 0x80000000u"),
    Fault("common/reduce.cuh", "a warp's other half is not reduced", "norm::equals_the_oracle",
          "int lanes = kWarp / 2;", "int lanes = kWarp / 4;"),
    Fault("common/reduce.cuh", "lanes read past the warps' results", "norm::equals_the_oracle",
          "lane < kWarps ? results[lane] : zero", "lane < kWarp ? results[lane] : zero"),
    Fault("common/reduce.cuh", "no barrier before the warps' results are read", "norm::equals_the_oracle",
          "= x;\n  __syncthreads();", "= x;\n  ;"),
    Fault("common/reduce.cuh", "no barrier before results are overwritten",
          "vverify::same_bits_in_any_order_alone_and_in_a_batch",
          "__syncthreads();  // the results of the call before have been read", ";"),
    Fault("common/memory.cuh", "the counter is left as it is", "vverify::ratios",
          "if (last) *counter = 0;", ";"),
    Fault("common/memory.cuh", "no barrier before all learn who is last", "vverify::ratios",
          "__syncthreads();\n  return last;", ";\n  return last;"),
    Fault("common/memory.cuh", "nobody is the last", "vverify::ratios",
          "atomicAdd(counter, 1u) == total - 1;", "atomicAdd(counter, 1u) == total;"),
    Fault("common/memory.cuh", "the count of rows is ignored", "rows::counts_on_the_device",
          "return count ? max(0, min(*at<const int32_t>(count), max_rows)) : max_rows;", "return max_rows;"),
    # ---- vverify
    Fault("any/vverify.cu", "indices of a warp begin one warp late", "vverify::ratios",
          "if (w < warp) before += warp_total[w];", "if (w <= warp) before += warp_total[w];"),
    Fault("any/vverify.cu", "each tile of rows writes where the first did", "vverify::ratios",
          "      written += warp_total[w];", "      ;"),
    Fault("any/vverify.cu", "a lane counts itself", "vverify::ratios",
          "lanes & ((1u << lane) - 1)", "lanes & ((2u << lane) - 1)"),
    Fault("any/vverify.cu", "no barrier before a tile's totals are overwritten", "vverify::ratios",
          "__syncthreads();  // the totals of the tile before have been read", ";"),
    Fault("any/vverify.cu", "no barrier before a tile's totals are read", "vverify::ratios",
          "= __popc(lanes);\n    __syncthreads();", "= __popc(lanes);\n    ;"),
    Fault("any/vverify.cu", "no guard for zero vectors", "vverify::equal_rows_have_cosine_one_and_zero_vectors_zero",
          "kEpsSquare = 1e-16f;", "kEpsSquare = 0.f;"),
    Fault("any/vverify.cu", "cached rows are updated before they are compared",
          "vverify::room_for_more_rows_than_there_are",
          "b = Vector<T>::unpack(cached_bits[u]);", "b = Vector<T>::load(cached + i + u * kStep);"),
    Fault("any/vverify.cu", "minus zero ranks below zero", "vverify::equal_rows_have_cosine_one_and_zero_vectors_zero",
          "ranked(0.f - load_shared_by_blocks(&slots[i].similarity), i)",
          "ranked(-load_shared_by_blocks(&slots[i].similarity), i)"),
    Fault("any/vverify.cu", "a NaN is a cosine", "vverify::what_is_not_a_number_counts_as_turned_most",
          "return cosine == cosine ? cosine : -INFINITY;", "return cosine;"),
    Fault("any/vverify.cu", "equal rows do not have a cosine of just 1",
          "vverify::equal_rows_have_cosine_one_and_zero_vectors_zero",
          "dot / fresh_square * sqrtf(fresh_square / cached_square);",
          "dot / (sqrtf(fresh_square) * sqrtf(cached_square));"),
    Fault("any/vverify.cu", "how many to select is computed in f32", "vverify::ratios",
          "int(double(rows) * p.ratio)", "int(float(rows) * float(p.ratio))"),
    Fault("any/vverify.cu", "prefix sums of the next sequence", "vverify::sequences_of_any_length_and_none",
          "selected_before += num_selected(p, rows);", "selected_before = num_selected(p, first + rows);"),
    Fault("any/vverify.cu", "ends of sequences are believed", "vverify::lies_in_cu_rows_do_no_harm",
          "max(first, min(end, p.max_rows)) - first;", "max(first, end) - first;"),
    Fault("any/vverify.cu", "the bound of cached rows is one high", "vverify::cached_rows_by_a_map",
          "cached_row < p.num_cached_rows", "cached_row <= p.num_cached_rows"),
    Fault("any/vverify.cu", "the second vector of a thread is dropped", "vverify::agrees_with_the_oracle_bf16",
          "if (i + u * kStep >= width) break;", "if (i + u * kStep >= width || u > 0) break;"),
    Fault("any/vverify.cu", "the second vector of a thread is compared with the first",
          "vverify::agrees_with_the_oracle_bf16",
          "(cached + i + u * kStep);\n      }", "(cached + i);\n      }"),
    Fault("any/vverify.cu", "every second vector is taken twice", "vverify::agrees_with_the_oracle_bf16",
          "i += kUnroll * kStep", "i += kStep"),
    Fault("any/vverify.cu", "fresh rows are where their numbers say", "vverify::fresh_rows_by_a_map",
          "at<const T>(p.fresh, fresh_row * p.fresh_stride)", "at<const T>(p.fresh, row * p.fresh_stride)"),
    Fault("any/vverify.cu", "the bound of fresh rows is one high", "vverify::fresh_rows_by_a_map",
          "fresh_row < num_fresh_rows", "fresh_row <= num_fresh_rows"),
    Fault("any/vverify.cu", "a negative fresh row is read", "vverify::fresh_rows_by_a_map",
          "if (fresh_row >= 0 && fresh_row", "if (fresh_row"),
    Fault("any/vverify.cu", "lists begin where the first sequence's does", "vverify::lists_inside_larger_ones",
          "at<const int32_t>(p.first_selected)[sequence.index]", "at<const int32_t>(p.first_selected)[0]"),
    Fault("any/vverify.cu", "lists are believed to have as many elements as there are rows",
          "vverify::places_that_lists_do_not_have",
          "uint32_t(p.num_listed ? p.num_listed : p.max_rows)", "uint32_t(p.max_rows)"),
    Fault("any/vverify.cu", "a place before the list is not told from none", "vverify::places_that_lists_do_not_have",
          "if (place >= uint32_t(p.num_listed ? p.num_listed : p.max_rows))",
          "if (int(place) >= (p.num_listed ? p.num_listed : p.max_rows))"),
    Fault("any/vverify.cu", "a place that is not there is not told", "vverify::places_that_lists_do_not_have",
          "if (p.failed) *at<int32_t>(p.failed) = DLLM_INDEX_FAILED;", ";"),
    Fault("any/vverify.cu", "all tables are the first", "vverify::lists_inside_larger_ones",
          "at<const int32_t>(p.tables[k])[row];", "at<const int32_t>(p.tables[0])[row];"),
    # ---- rows, embed
    Fault("any/gather_scatter.cu", "one row past the count is copied", "rows::counts_on_the_device",
          "if (row >= num_rows(p.count, p.max_rows)) return;", "if (row > num_rows(p.count, p.max_rows)) return;"),
    Fault("common/memory.cuh", "a round's first vector is copied four times", "rows::copies_rows",
          "bits[u] = from[first + u * kThreads];", "bits[u] = from[first];"),
    Fault("common/memory.cuh", "stores go past the row", "rows::copies_rows",
          "if (first + u * kThreads < vectors) to[", "if (first < vectors) to["),
    Fault("common/memory.cuh", "loads go past the row", "rows::copies_rows",
          "if (first + u * kThreads < vectors) bits[u]", "if (first < vectors) bits[u]"),
    Fault("any/gather_scatter.cu", "the bound of indices is one high", "rows::leaves_out_rows_out_of_range",
          "indexed >= p.num_indexed_rows", "indexed > p.num_indexed_rows"),
    Fault("any/gather_scatter.cu", "an index out of range is not told", "rows::leaves_out_rows_out_of_range",
          "= DLLM_INDEX_FAILED;", "= DLLM_NONE_FAILED;"),
    Fault("any/embed.cu", "the last vector of a row is dropped", "embed::embeds_rows",
          "int(p.row_bytes / 16));", "int(p.row_bytes / 16) - 1);"),
    Fault("any/embed.cu", "the table's rows are taken to lie as the output's", "embed::embeds_rows",
          "token * (p.table_stride_bytes / 16)", "token * (p.out_stride_bytes / 16)"),
    Fault("any/embed.cu", "the bound of tokens is one high", "embed::leaves_out_rows_out_of_range",
          "token >= p.vocab_size", "token > p.vocab_size"),
    Fault("any/embed.cu", "the bound of indices is one high", "embed::leaves_out_rows_out_of_range",
          "index < p.num_tokens", "index <= p.num_tokens"),
    # ---- norm
    Fault("any/norm.cu", "the normalised value is not rounded before the weight", "norm::equals_the_oracle",
          "rounded<T>(values[v].x[j] * scale) * weight.x[j]", "values[v].x[j] * scale * weight.x[j]"),
    Fault("any/norm.cu", "the residual sum is not rounded before it is squared", "norm::equals_the_oracle",
          "rounded<T>(values[v].x[j] + delta_values.x[j])", "values[v].x[j] + delta_values.x[j]"),
    Fault("any/norm.cu", "the residual stream is not written", "norm::equals_the_oracle",
          "values[v].store(x + element(v));", ";"),
    Fault("any/norm.cu", "eps is added to the root", "norm::equals_the_oracle",
          "1.f / sqrtf(mean + p.eps)", "1.f / (sqrtf(mean) + p.eps)"),
    Fault("any/norm.cu", "the tail is squared though it was not loaded", "norm::equals_the_oracle",
          "float sum = 0.f;\n#pragma unroll\n  for (int v = 0; v < kVectors; v++) {\n    if (element(v) >= p.width) break;",
          "float sum = 0.f;\n#pragma unroll\n  for (int v = 0; v < kVectors; v++) {\n    if (element(v) > p.width) break;"),
    Fault("any/norm.cu", "all vectors have the first one's weights", "norm::equals_the_oracle",
          "at<const T>(p.weight) + element(v));", "at<const T>(p.weight) + element(0));"),
    Fault("any/norm.cu", "all vectors are added the first one's delta", "norm::equals_the_oracle",
          "(delta + element(v));", "(delta + element(0));"),
    Fault("any/norm.cu", "a vector past the row's end is loaded", "norm::equals_the_oracle",
          "if (element(v) < p.width) {", "if (element(v) <= p.width) {"),
    Fault("any/norm.cu", "rows are added their own delta in spite of a map", "norm::adds_rows_by_a_map",
          "at<const T>(p.delta, delta_row * p.delta_stride)", "at<const T>(p.delta, row * p.delta_stride)"),
    Fault("any/norm.cu", "the bound of delta's rows is one high", "norm::adds_rows_by_a_map",
          "(uint32_t(delta_row) < uint32_t(num_delta_rows))", "(uint32_t(delta_row) <= uint32_t(num_delta_rows))"),
    Fault("any/norm.cu", "a row of -1 is added the row before the first", "norm::adds_rows_by_a_map",
          "(uint32_t(delta_row) < uint32_t(num_delta_rows))", "(delta_row < num_delta_rows)"),
    # ---- rope
    Fault("any/rope.cu", "the sign of the sine is wrong", "rope::equals_the_oracle",
          "low.x[j] = __fsub_rn(", "low.x[j] = __fadd_rn("),
    Fault("any/rope.cu", "neighbours are paired, not halves", "rope::equals_the_oracle",
          "high = Vector<T>::load(at_low + half);", "high = Vector<T>::load(at_low + kVec);"),
    Fault("any/rope.cu", "a product is not rounded", "rope::equals_the_oracle",
          "__fadd_rn(__fmul_rn(b, cosine), __fmul_rn(a, sine))", "fmaf(b, cosine, __fmul_rn(a, sine))"),
    Fault("any/rope.cu", "every part of the grid does the first one", "rope::equals_the_oracle",
          "blockIdx.y * kThreads + threadIdx.x", "threadIdx.x"),
    Fault("any/rope.cu", "two elements share a cosine", "rope::equals_the_oracle",
          "j % 2 ? angle[j / 2].z : angle[j / 2].x,", "angle[j / 2].x,"),
    Fault("any/rope.cu", "keys go to the row's own place in the cache", "rope::equals_the_oracle",
          "at<T>(p.k_cache, cache_row * p.cache_stride)", "at<T>(p.k_cache, row * p.cache_stride)"),
    Fault("any/rope.cu", "the first key head is not cached", "rope::equals_the_oracle",
          "head >= p.num_heads)", "head > p.num_heads)"),
    Fault("any/rope.cu", "the upper half of keys is not cached", "rope::equals_the_oracle",
          "high.store(key + half);", ";"),
    Fault("any/rope.cu", "the tail of the values is not cached", "rope::equals_the_oracle",
          "item - pairs < p.num_kv_heads * p.head_dim / kVec)",
          "item - pairs < p.num_kv_heads * p.head_dim / kVec - 1)"),
    Fault("any/rope.cu", "the bound of cache rows is one high", "rope::leaves_out_rows_out_of_range",
          "cache_row >= p.num_cache_rows", "cache_row > p.num_cache_rows"),
    Fault("any/rope.cu", "values are cached though there is no cache for them", "rope::caches_keys_alone",
          "else if (p.v_cache && cache_row >= 0", "else if (cache_row >= 0"),
    # ---- swiglu
    Fault("any/swiglu.cu", "silu is not rounded before the factor", "swiglu::equals_the_oracle",
          "rounded<T>(result.x[j] / (1.f + expf(-result.x[j]))) * factor.x[j]",
          "result.x[j] / (1.f + expf(-result.x[j])) * factor.x[j]"),
    Fault("any/swiglu.cu", "tiles overlap", "swiglu::equals_the_oracle",
          "int(blockIdx.y) * kVectors + v", "int(blockIdx.y) + v"),
    Fault("any/swiglu.cu", "one row past the count is computed", "swiglu::counts_on_the_device",
          "if (row >= num_rows(p.count, p.max_rows)) return;", "if (row > num_rows(p.count, p.max_rows)) return;"),
    # ---- attention
    Fault("sm80/attention.cu", "keys are not waited for", "attention::segments",
          "cp_async_wait_group<1>();  // the keys are there", "// the keys are there"),
    Fault("sm80/attention.cu", "values are not waited for", "attention::segments",
          "cp_async_wait_group<2>();  // the values are there", "// the values are there"),
    Fault("sm80/attention.cu", "queries are not waited for", "attention::segments",
          "cp_async_wait_group<kRoomForValues ? 2 : 1>();  // the queries", "// the queries"),
    Fault("sm80/attention.cu", "no barrier when the queries are there", "attention::either_form",
          "// the queries are there\n  __syncthreads();", "// the queries are there\n  ;"),
    Fault("sm80/attention.cu", "values are copied over queries that are still read", "attention::either_form",
          "__syncthreads();  // all have read their queries", "// all have read their queries"),
    Fault("sm80/attention.cu", "no barrier when the keys are there", "attention::many_rows",
          "__syncthreads();           // for all threads; and", "// for all threads; and"),
    Fault("sm80/attention.cu", "no barrier when the values are there", "attention::many_rows",
          "__syncthreads();           // for all threads\n", "// for all threads\n"),
    Fault("sm80/attention.cu", "tiles that two segments share are read from the first", "attention::segments",
          "if (key + kKeys <= source.end) {", "if (key + kKeys <= keys.count()) {"),
    Fault("sm80/attention.cu", "every second row of a tile is swizzled as the others", "attention::every_shape_of_heads",
          "odd = to + tile_offset<D>(first_row + kRows, chunk);", "odd = even + kRows * D * 2;"),
    Fault("sm80/attention.cu", "a list's next tile is visited twice", "attention::lists_of_tiles",
          "tile_after_next = visits.tile(i + 2);", "tile_after_next = visits.tile(i + 1);"),
    Fault("sm80/attention.cu", "a tile of any number is believed", "attention::lists_of_tiles",
          "int(min(uint32_t(list[i]), uint32_t(kMostKeys / kKeys)))", "list[i]"),
    Fault("sm80/attention.cu", "one key past the end counts", "attention::segments",
          "j % 2 >= left) scores", "j % 2 > left) scores"),
    Fault("sm80/attention.cu", "sums are not brought under a new maximum", "attention::segments",
          "sum[half] = sum[half] * shrink + added;", "sum[half] += added;"),
    Fault("sm80/attention.cu", "the log-sum-exp is of unscaled scores", "attention::segments",
          "max[half] * scale + logf(total);", "max[half] + logf(total);"),
    Fault("sm80/attention.cu", "the live block ends where the suffix does", "attention::segments",
          "in_b = key < keys.b.end;", "in_b = key < keys.c.end;"),
    Fault("sm80/attention.cu", "a segment is read from its first row on", "attention::segments",
          "first = start - before;", "first = -before;"),
    Fault("sm80/attention.cu", "every key/value head is the first", "attention::every_shape_of_heads",
          "first_row) * source.stride + head * D + chunk * 8", "first_row) * source.stride + chunk * 8"),
    Fault("sm80/attention.cu", "every key/value head is the first at the ends of segments",
          "attention::every_shape_of_heads",
          "from_row * source.stride + head * D + chunk * 8", "from_row * source.stride + chunk * 8"),
    Fault("sm80/attention.cu", "every query head of a group is the first", "attention::every_shape_of_heads",
          "(head * group + r % group) * D + chunk * 8", "head * group * D + chunk * 8"),
    Fault("sm80/attention.cu", "splits begin one tile late", "attention::any_number_of_splits",
          "begin = min(count, split * share);", "begin = min(count, split * share + (split > 0));"),
    Fault("sm80/attention.cu", "heads share the first head's lists", "attention::lists_of_tiles",
          "(p.per_head ? head : 0)", "0"),
    Fault("sm80/attention.cu", "query tiles are of packed rows", "attention::groups_of_heads_over_several_query_tiles",
          "first_packed / (DLLM_QUERY_TILE * group)", "first_packed / DLLM_QUERY_TILE"),
    Fault("sm80/attention.cu", "parts are merged as if equally heavy", "attention::any_number_of_splits",
          "weights[i] = ex2_approx((weights[i] - top) * kLog2e);", "weights[i] = weights[i] > -INFINITY;"),
    Fault("sm80/attention.cu", "parts past the 32nd count as those before", "attention::any_number_of_splits",
          "first < kWarp ? weights[0] : weights[1]", "weights[0]"),
    Fault("sm80/attention.cu", "parts of weight 0 are left out, NaN and all",
          "attention::what_is_not_a_number_shows_without_weight",
          "if (!(counting >> i & 1)) continue;", "if (weight[i] == 0.f) continue;"),
    Fault("sm80/attention.cu", "the first eight parts are merged again in place of later ones",
          "attention::any_number_of_splits",
          "if (first > 0 && counts) part[i]", "if (first < 0 && counts) part[i]"),
    Fault("sm80/attention.cu", "a start past the rows is believed", "attention::numbers_on_the_device_that_lie",
          "start = within(at<const int32_t>(segment.start)[sequence], 0, segment.num_rows);",
          "start = at<const int32_t>(segment.start)[sequence];"),
    # ---- merge
    Fault("any/merge_state.cu", "an empty side's result is used", "merge::sides_without_keys",
          "const float b_or_none = b_lse == -INFINITY ? 0.f : y.x[j];", "const float b_or_none = y.x[j];"),
    Fault("any/merge_state.cu", "sides are exchanged", "merge::equals_the_oracle",
          "a = a_lse >= b_lse ? larger_weight : smaller_weight;", "a = a_lse < b_lse ? larger_weight : smaller_weight;"),
    Fault("any/merge_state.cu", "the log-sum-exp may be overwritten before all have read it", "merge::overwrites_either_side",
          "__syncwarp();  // all lanes", "// all lanes"),
    Fault("any/merge_state.cu", "one row past the count is merged", "merge::counts_on_the_device",
          "row < num_rows(p.count, p.max_rows);", "row <= num_rows(p.count, p.max_rows);"),
    # ---- advance
    Fault("any/advance.cu", "a warp's sequence is the only one", "advance::equals_the_oracle",
          "s < p.num_sequences; s += kWarps)", "s < min(kWarps, p.num_sequences); s += kWarps)"),
    Fault("any/advance.cu", "every load of a round is its first", "advance::masks_and_ends_at_every_position",
          "token[i] = position < count ? tokens[position] : otherwise;",
          "token[i] = position < count ? tokens[threadIdx.x % kWarp] : otherwise;"),
    Fault("any/advance.cu", "the second round begins one load late", "advance::masks_and_ends_at_every_position",
          "for (; count > 0; count -= kRound, tokens += kRound) {\n    int token[kAtOnce];\n    load_tokens(tokens, count, ~",
          "for (; count > 0; count -= kRound, tokens += kRound + kWarp) {\n    int token[kAtOnce];\n    load_tokens(tokens, count, ~"),
    Fault("any/advance.cu", "what lies behind the range is a mask", "advance::equals_the_oracle",
          "load_tokens(tokens, count, ~mask_token, token);", "load_tokens(tokens, count, mask_token, token);"),
    Fault("any/advance.cu", "an end behind a mask counts", "advance::masks_and_ends_at_every_position",
          "return found & before_masks;", "return found;"),
    Fault("any/advance.cu", "an end is looked for behind masks", "advance::masks_and_ends_at_every_position",
          "if (masks | found) return", "if (found) return"),
    Fault("any/advance.cu", "only the first end token ends", "advance::equals_the_oracle",
          "e < p.num_end_tokens; e++)", "e < min(1, p.num_end_tokens); e++)"),
    Fault("any/advance.cu", "an end in the prompt counts", "advance::follows_the_loops",
          "ends(p, tokens + generated, length - generated)", "ends(p, tokens, length)"),
    Fault("any/advance.cu", "llada: the schedule has one step more", "advance::schedules_are_those_of_the_loops",
          "pass >= control.steps) return 1;", "pass > control.steps) return 1;"),
    Fault("any/advance.cu", "llada: the last steps commit one more", "advance::schedules_are_those_of_the_loops",
          "(pass < masked % control.steps);", "(pass >= control.steps - masked % control.steps);"),
    Fault("any/advance.cu", "llada: no steps are divided by", "advance::numbers_that_cannot_be",
          "if (control.steps <= 0 || pass", "if (pass"),
    Fault("any/advance.cu", "dream: the last step leaves some", "advance::schedules_are_those_of_the_loops",
          "pass >= num_ratios - 1) return masks;", "pass >= num_ratios) return masks;"),
    Fault("any/advance.cu", "dream: the share is rounded to nearest", "advance::schedules_are_those_of_the_loops",
          "? int(share) : masks;", "? int(share + 0.5f) : masks;"),
    Fault("any/advance.cu", "dream: the number of ratios is believed", "advance::numbers_that_cannot_be",
          "within(control.num_ratios, 0, p.max_ratios);", "within(control.num_ratios, 0, 0x7fffffff);"),
    Fault("any/advance.cu", "the quota is that of the pass that has run", "advance::follows_the_loops",
          "quota = quota_of(p, control, sequence, pass, counts", "quota = quota_of(p, control, sequence, control.pass, counts"),
    Fault("any/advance.cu", "among: what was rejected is forgotten", "advance::follows_the_loops",
          "sequence.left = rejected;", "sequence.left = 0;"),
    Fault("any/advance.cu", "among: further steps look at new positions too", "advance::replays",
          "sequence.per_step = 0;", ";"),
    Fault("any/advance.cu", "among: a step too many", "advance::replays",
          "if (pass >= sequence.limit && rejected > 0) {", "if (pass >= sequence.limit) {"),
    Fault("any/advance.cu", "a pass too many", "advance::follows_the_loops",
          "pass < sequence.limit && masks", "pass <= sequence.limit && masks"),
    Fault("any/advance.cu", "a sequence that has ended goes on", "advance::follows_the_loops",
          "!failed && !sequence.ended && pass", "!failed && pass"),
    Fault("any/advance.cu", "a sequence that has failed goes on", "advance::failures",
          "!failed && !sequence.ended && pass", "!sequence.ended && pass"),
    Fault("any/advance.cu", "those that take no part are left their window", "advance::unmasks_by_itself",
          "quota = 0, commit_before = int(0x80000000u);", "quota = 0, commit_before = 0x7fffffff;"),
    Fault("any/advance.cu", "ends of ranges are believed", "advance::lies_do_no_harm",
          "count_masks(tokens + start, within(end, start, length) - start,", "count_masks(tokens + start, end - start,"),
    Fault("any/advance.cu", "lengths are believed", "advance::lies_do_no_harm",
          "within(sequence.length, 0, p.num_tokens - first);", "max(0, sequence.length);"),
    Fault("any/advance.cu", "every lane counts its sequence", "advance::equals_the_oracle",
          "if (threadIdx.x % kWarp > 0) return;", "if (threadIdx.x % kWarp > 1) return;"),
    Fault("any/advance.cu", "a later failure takes the first one's place", "advance::failures",
          "if (failed != kNone && control.failed_sequence == DLLM_NONE_FAILED) {", "if (failed != kNone) {"),
    Fault("any/advance.cu", "the step of a failure is the next one", "advance::failures",
          "[failed].forwards) - 1u);", "[failed].forwards));"),
    Fault("any/advance.cu", "a pass of nobody counts as a forward", "advance::unmasks_by_itself",
          "if (took_part > 0) control.nfe", "control.nfe"),
    Fault("any/advance.cu", "the host is told who took part, not who goes on", "advance::follows_the_loops",
          "tell_host(control, go_on,", "tell_host(control, took_part,"),
    # ---- lists of tiles, and the plan of attention: host code
    Fault("ops/tiles.rs", "the last key tile is left out", "ops::tiles::tests::known_lists",
          "self.num_keys().div_ceil(KEY_TILE)", "self.num_keys() / KEY_TILE"),
    Fault("ops/tiles.rs", "a tile at the end of a range is left out", "ops::tiles::tests::known_lists",
          "..end.div_ceil(KEY_TILE) }", "..end / KEY_TILE }"),
    Fault("ops/tiles.rs", "query tiles without rows have lists", "ops::tiles::tests::known_lists",
          "if query_tile * QUERY_TILE < sequence.rows {", "if query_tile * QUERY_TILE <= sequence.rows {"),
    Fault("ops/tiles.rs", "a window is that of a full query tile", "ops::tiles::tests::known_lists",
          "sequence.rows.min(first + QUERY_TILE) - 1;", "first + QUERY_TILE - 1;"),
    Fault("ops/tiles.rs", "queries are taken to stand at the first key", "ops::tiles::tests::known_lists",
          "|row| sequence.keys[0] + row);", "|row| row);"),
    Fault("ops/tiles.rs", "the last key of a window is left out", "ops::tiles::tests::known_lists",
          "last.saturating_add(window).saturating_add(1);", "last.saturating_add(window);"),
    Fault("ops/tiles.rs", "far tiles are kept from the first one on",
          "ops::tiles::tests::pruned_suffixes_are_what_the_mask_says",
          "far.saturating_add(every - 1);", "far;"),
    Fault("ops/tiles.rs", "the near window begins with the first key",
          "ops::tiles::tests::pruned_suffixes_are_what_the_mask_says",
          "sequence.tiles_of(0..suffix.saturating_add(near)).end;", "sequence.tiles_of(0..suffix.max(near)).end;"),
    Fault("ops/tiles.rs", "ties go to the last tile", "ops::tiles::tests::the_best_are_taken",
          ".then(a.cmp(b))", ".then(b.cmp(a))"),
    Fault("ops/tiles.rs", "a score that is not a number is the best", "ops::tiles::tests::the_best_are_taken",
          "score if score.is_nan() => f32::NEG_INFINITY,", "score if score.is_nan() => f32::NAN,"),
    Fault("ops/tiles.rs", "minus zero scores below zero", "ops::tiles::tests::the_best_are_taken",
          "score => score + 0.0,", "score => score,"),
    Fault("ops/tiles.rs", "the best come in any order", "ops::tiles::tests::the_best_are_taken",
          "            order.sort_unstable();", "            ;"),
    Fault("ops/tiles.rs", "heads have the first head's scores", "ops::tiles::tests::the_best_are_taken",
          "* heads + place.head) * key_tiles;", "* heads) * key_tiles;"),
    Fault("ops/tiles.rs", "lists of the caller are not checked", "ops::tiles::tests::wrong_lists_are_named",
          "        made.validate(batch)?;", "        ;"),
    Fault("ops/tiles.rs", "a tile may be listed twice", "ops::tiles::tests::wrong_lists_are_named",
          "if seen[index] == i + 1 =>", "if seen[index] == i + 2 =>"),
    Fault("ops/tiles.rs", "a tile is checked against the longest sequence", "ops::tiles::tests::wrong_lists_are_named",
          "let key_tiles = batch.sequences[sequence].key_tiles();",
          "let key_tiles = batch.sequences.iter().map(Sequence::key_tiles).max().unwrap_or(sequence);"),
    Fault("ops/tiles.rs", "indices past the last list are let through", "ops::tiles::tests::wrong_lists_are_named",
          "if !ascending || usize::try_from(self.offsets[lists]) != Ok(self.indices.len()) {", "if !ascending {"),
    Fault("ops/attention.rs", "a forced form is not heeded", "ops::attention::tests::plans",
          "abi::DLLM_ATTENTION_FORM_FULL => Form::Full,", "abi::DLLM_ATTENTION_FORM_FULL => Form::Streaming,"),
    Fault("ops/attention.rs", "splits do not know of groups", "ops::attention::tests::splits_follow_the_shape_of_a_sequence",
          "let packed = rows.saturating_mul(num_heads / num_kv_heads.max(1));", "let packed = rows;"),
    Fault("ops/attention.rs", "log-sum-exps are not rounded up to 16 bytes", "ops::attention::tests::plans",
          "(partial.next_multiple_of(4) + partial", "(partial + partial"),
    Fault("ops/attention.rs", "results may overwrite the queries", "ops::attention::tests::overlaps_are_seen",
          "std::iter::once(q).chain(", "std::iter::empty().chain("),
]


def in_library(fault):
    """Whether the fault is in host code."""
    return fault.file.endswith(".rs")


def planted(fault):
    """The text of its file with the fault in it."""
    text = (ROOT / ("src" if in_library(fault) else "cuda") / fault.file).read_text()
    if text.count(fault.good) != 1:
        sys.exit(f"{fault.file}: {fault.is_wrong}: occurs {text.count(fault.good)} times, not once:\n{fault.good}")
    good, bad = fault.good.split("\n"), fault.bad.split("\n")
    if len(good) != len(bad) or sum(a != b for a, b in zip(good, bad)) != 1:
        sys.exit(f"{fault.file}: {fault.is_wrong}: not a change of one line")
    return text.replace(fault.good, fault.bad)


def includes(cuda, file):
    """The file and the headers of cuda/common that it includes, by name."""
    found, left = set(), [file]
    while left:
        path = left.pop()
        if path.is_file() and path.name not in found:
            found.add(path.name)
            left += [cuda / "common" / name for name in re.findall(r'#include "(.+)"', path.read_text())]
    return found


class Device:
    """The tests, built once, and what it takes to build kernels for the software device."""

    def __init__(self, folder):
        command = ["cargo", "test", "--release", "--no-run", "--message-format=json"]
        command += [word for name in KERNELS for word in ("--test", name)]
        run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if run.returncode:
            sys.exit("the tests do not build")
        messages = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        self.tests = {m["target"]["name"]: m["executable"] for m in messages
                      if m["reason"] == "compiler-artifact" and m["target"]["kind"] == ["test"]}
        [out] = [Path(m["out_dir"]) for m in messages
                 if m["reason"] == "build-script-executed" and "softgpu" in m["package_id"]]
        self.compiler = (out / "kernels.compile").read_text().splitlines()
        self.linker = (out / "kernels.link").read_text().splitlines()
        self.folder = folder
        self.objects = {"kernels_anchor": self.object(ROOT / "cuda", ROOT / "softgpu/cpp/kernels_anchor.cpp", folder)}

    def object(self, cuda, source, folder):
        """Compiles a file that finds its headers in the folder `cuda`."""
        target = folder / f"{source.stem}.o"
        words = [word.replace(str(ROOT / "cuda"), str(cuda)) for word in self.compiler]
        subprocess.run([*words, "-c", source, "-o", target], check=True, capture_output=True, text=True)
        return target

    def library(self, objects, folder):
        target = folder / "libkernels.so"
        subprocess.run([self.linker[0], *objects.values(), *self.linker[1:], "-o", target], check=True)
        return target

    def run(self, library, file, test):
        """Runs the tests whose name contains `test`; the names of those that failed, and whether by a check of theirs."""
        run = subprocess.run(
            [self.tests[file], test, "--test-threads=1"], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S,
            env={**os.environ, "SOFTGPU_KERNELS": str(library)})
        said = run.stdout + run.stderr
        if run.returncode not in (0, 101) or "test result:" not in said or "running 0 tests" in said:
            raise RuntimeError(f"the tests did not run to their end ({run.returncode}):\n{said[-2000:]}")
        if run.returncode and "panicked at tests/" not in said:
            raise RuntimeError(f"something else failed than a check of the tests:\n{said[-2000:]}")
        return re.findall(r"^    (?:\w+::)*(\w+)$", said.rpartition("\nfailures:\n")[2], re.M) if run.returncode else []


class Library:
    """A copy of the library, built for its unit tests with the dependencies that the tests of Device have built."""

    CONFIG = "profile.release.package.dllm-kernels.opt-level=0"

    def __init__(self, folder):
        self.folder, self.lock = folder / "library", threading.RLock()
        for name in ["src", "cuda", "ptx", "benches", "examples"]:
            shutil.copytree(ROOT / name, self.folder / name)
        for name in ["Cargo.lock", "build.rs", "tests/bindings.rs", "tests/nvtx.rs"]:
            (self.folder / name).parent.mkdir(exist_ok=True)
            shutil.copy2(ROOT / name, self.folder / name)
        # Unit tests do without the software device, which would be built again.
        lines = (ROOT / "Cargo.toml").read_text().splitlines(keepends=True)
        kept = [line for line in lines if not line.startswith(("softgpu =", "[workspace]", "members ="))]
        (self.folder / "Cargo.toml").write_text("".join(kept))

    def run(self, test):
        """Runs the tests whose path begins so; the paths of those that failed."""
        command = ["cargo", "test", "--release", "--offline", "--lib", "--config", self.CONFIG]
        environment = {**os.environ, "CARGO_TARGET_DIR": str(ROOT / "target")}
        with self.lock:
            build = subprocess.run([*command, "--no-run"], cwd=self.folder, env=environment, capture_output=True, text=True)
            if build.returncode:
                raise RuntimeError(f"does not compile:\n{build.stderr[-2000:]}")
            run = subprocess.run([*command, "--", test], cwd=self.folder, env=environment, capture_output=True, text=True,
                                 timeout=TIMEOUT_S)
        if run.returncode not in (0, 101) or "test result:" not in run.stdout or "running 0 tests" in run.stdout:
            raise RuntimeError(f"the tests did not run to their end ({run.returncode}):\n{run.stderr[-2000:]}")
        failures = run.stdout.rpartition("\nfailures:\n")[2] if run.returncode else ""
        return re.findall(r"^    (\w+(?:::\w+)+)$", failures, re.M)

    def check(self, fault):
        """As the function `check`; one after the other, as there is one copy."""
        with self.lock:
            start, path = time.monotonic(), self.folder / "src" / fault.file
            try:
                path.write_text(planted(fault))
                failed = self.run(fault.test.rpartition("::")[0])
                problem = ""
                if fault.test not in failed:
                    problem = f"survives, though {', '.join(failed)} would find it" if failed else "survives"
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                problem = "hangs" if isinstance(error, subprocess.TimeoutExpired) else str(error)
            path.write_text((ROOT / "src" / fault.file).read_text())
            shutil.rmtree(self.folder / "proptest-regressions", ignore_errors=True)
            return problem, time.monotonic() - start


def check(device, number, fault):
    """What is wrong with how the fault was found, empty if nothing; and the seconds that took."""
    start = time.monotonic()
    folder = device.folder / str(number)
    cuda = folder / "cuda"
    shutil.copytree(ROOT / "cuda", cuda)
    path = cuda / fault.file
    path.write_text(planted(fault))
    file, test = fault.test.split("::")
    objects = {name: device.objects[name] for name in ["kernels_anchor", *KERNELS[file]]}
    try:
        for name in KERNELS[file]:
            if path.name in includes(cuda, source(cuda, name)):
                objects[name] = device.object(cuda, source(cuda, name), folder)
        library = device.library(objects, folder)
        problem = ""
        if test not in device.run(library, file, test):
            found = ", ".join(device.run(library, file, ""))
            problem = f"survives, though {found} would find it" if found else "survives"
    except subprocess.CalledProcessError as error:
        problem = f"does not compile:\n{error.stderr}"
    except subprocess.TimeoutExpired:
        problem = "hangs"
    except RuntimeError as error:
        problem = str(error)
    shutil.rmtree(folder)
    return problem, time.monotonic() - start


def markdown():
    rows = [f"| `{fault.file}` | {fault.is_wrong} | `{fault.test}` |" for fault in FAULTS]
    return "\n".join(["| file | fault | found by |", "|---|---|---|", *rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="only print the table for docs/mutation-tests.md")
    parser.add_argument("--table", action="store_true", help="only check that every fault fits its source, and the table")
    parser.add_argument("fault", nargs="*", default=[""], help="part of a fault's file or description")
    arguments = parser.parse_args()
    if arguments.markdown:
        return print(markdown())
    for fault in FAULTS:
        planted(fault)
    chosen = [fault for fault in FAULTS if any(part in f"{fault.file} {fault.is_wrong}" for part in arguments.fault)]

    problems = [] if markdown() in PAGE.read_text() else [f"{PAGE.name}: the table is not what --markdown prints"]
    if arguments.table:
        sys.exit("\n".join(problems) or 0)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        start = time.monotonic()
        device, library = Device(Path(folder)), Library(Path(folder))
        kernels = sorted({name for fault in chosen if not in_library(fault) for name in KERNELS[fault.test.split("::")[0]]})
        device.objects.update(zip(kernels, pool.map(
            lambda name: device.object(ROOT / "cuda", source(ROOT / "cuda", name), device.folder), kernels)))
        # What is found only counts if the same tests pass with the kernels as they are.
        honest = device.library(device.objects, device.folder)
        run = lambda fault: library.run(fault.test) if in_library(fault) else device.run(honest, *fault.test.split("::"))
        tests = sorted({fault.test: fault for fault in chosen}.items())
        for (test, _), failed in zip(tests, pool.map(lambda pair: run(pair[1]), tests)):
            problems += [f"{test} fails without a fault"] if failed else []
        print(f"without a fault: {len(tests)} tests pass ({time.monotonic() - start:.0f} s)", flush=True)

        find = lambda job: library.check(job[1]) if in_library(job[1]) else check(device, *job)
        for fault, (problem, seconds) in zip(chosen, pool.map(find, enumerate(chosen))):
            found_by = "SURVIVES" if problem else fault.test
            print(f"{fault.file:<19} {fault.is_wrong:<66} {found_by:<62} {seconds:5.1f} s", flush=True)
            problems += [f"{fault.file}: {fault.is_wrong}: {problem}"] if problem else []
        print(f"{len(chosen)} faults in {time.monotonic() - start:.0f} s")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
