/*
 * The ABI of dllm-kernels: one plain struct of parameters per op.
 *
 * A C caller fills the struct, the launch layer validates it, and the kernel receives it by value. Plain C, no CUDA headers.
 *
 * Pointers: device addresses as 64-bit integers. 0 means "none" and is allowed only where "or 0" is said.
 * Matrices: row-major. Strides count elements unless their name ends in _bytes.
 * Elements: dllm_dtype; arithmetic is f32.
 * Alignment: kernels load 16 bytes at a time. So every pointer to elements and every row (its stride in bytes) is aligned
 * to 16 bytes, and so are `rows`, `sequences`, `angles` and `workspace`. Pointers to int32 and f32 are aligned to
 * 4 bytes.
 * Execution: an op only enqueues work. It neither allocates nor synchronises, so it may be captured into a CUDA graph.
 * Values that change from step to step (counts, indices, tokens) are read from device memory; the device checks such indices
 * against the sizes given here.
 */
#ifndef DLLM_KERNELS_H
#define DLLM_KERNELS_H

#include <stddef.h>
#include <stdint.h>

/** Version of the structs below; changes with every change of a layout. */
#define DLLM_ABI_VERSION 1

/** Status of a call. No function of this header returns it yet. */
typedef enum dllm_status {
  DLLM_OK = 0,               /**< Success: the work is enqueued. */
  DLLM_INVALID_ARGUMENT = 1, /**< A field is out of range; nothing was launched. */
  DLLM_NO_DEVICE = 2,        /**< No driver, no device, or a device that is too old. */
  DLLM_DRIVER = 3,           /**< The driver returned an error. */
  DLLM_MODULE = 4            /**< A kernel module could not be loaded. */
} dllm_status;

/** Element type. */
typedef enum dllm_dtype {
  DLLM_BF16 = 0, /**< bfloat16 */
  DLLM_F16 = 1,  /**< IEEE half */
  DLLM_F32 = 2   /**< IEEE single */
} dllm_dtype;

/** Confidence: the number that ranks masked rows. */
typedef enum dllm_confidence {
  DLLM_CONFIDENCE_PROBABILITY = 0, /**< Probability of the chosen token. */
  DLLM_CONFIDENCE_MARGIN = 1,      /**< Difference of the two largest probabilities. */
  DLLM_CONFIDENCE_ENTROPY = 2,     /**< Negative entropy, sum p ln p. */
  DLLM_CONFIDENCE_RANDOM = 3       /**< A uniform random number. */
} dllm_confidence;

/** Policy: which candidates of a sequence are committed. */
typedef enum dllm_policy {
  DLLM_POLICY_FIXED = 0,     /**< The quota[s] most confident ones. */
  DLLM_POLICY_THRESHOLD = 1, /**< The most confident one, and every other with at least this confidence. */
  /**
   * In order of confidence, as long as (n + 1) (1 - confidence_n) <= factor holds for the n-th; the first always, all of
   * them if only the last fails.
   */
  DLLM_POLICY_FACTOR = 2
} dllm_policy;

/** Quota schedule: how many tokens a sequence may commit in each pass of a block. */
typedef enum dllm_schedule {
  DLLM_SCHEDULE_NONE = 0, /**< No limit (INT32_MAX). Unknown values count as this one. */
  /**
   * The block's initial masks, spread evenly over its steps; the remainder goes to the first steps, one each. After the
   * last step: 1 per pass.
   */
  DLLM_SCHEDULE_LLADA = 1,
  DLLM_SCHEDULE_DREAM = 2, /**< ratios[pass] of the remaining masks, rounded down; from the last step on, all of them. */
  /**
   * Dream's threshold decoding without blocks (Fast-dLLM): per_step candidates, and the deficit carried over from earlier
   * steps, which is the number of candidates that they rejected.
   */
  DLLM_SCHEDULE_CARRY_OVER = 3
} dllm_schedule;

/** Value of `failed` when nothing failed. */
#define DLLM_NONE_FAILED (-1)
/** Value of `failed` when an index read from device memory is out of range. */
#define DLLM_INDEX_FAILED (-2)

/** A row that unmask may commit. 16 bytes, loaded at once: tables of rows are aligned to 16 bytes. */
typedef struct dllm_unmask_row {
  int32_t token;      /**< Index into `tokens` of the row's token; distinct for each row. */
  int32_t logits_row; /**< Row of `logits` that predicts the token (Dream: the row of the position before). */
  int32_t position;   /**< Position in the sequence; keys the random numbers and breaks ties. */
  int32_t sequence;   /**< Index of the sequence that owns the row by `cu_rows`. */
} dllm_unmask_row;

/**
 * unmask: from logits to committed tokens, in one launch.
 *
 * Rows whose token is not `mask_token` are skipped; their logits are not read. The mask token is never chosen: where its
 * logit is the largest it counts as minus infinity, elsewhere it keeps its share of the probabilities. NaN counts as minus
 * infinity, plus infinity as the largest finite value. Ties go to the lowest token, then to the first row.
 */
typedef struct dllm_unmask_params {
  uint64_t size;   /**< sizeof(dllm_unmask_params) */
  uint64_t logits; /**< [num_logits_rows, vocab_size] dtype */
  /** [num_logits_rows, vocab_size] dtype, stride of `logits`: the unconditional logits of guidance; or 0. */
  uint64_t uncond_logits;
  uint64_t rows;    /**< [max_rows] dllm_unmask_row, all initialised: the rows of a sequence together, positions ascending. */
  uint64_t cu_rows; /**< [num_sequences + 1] int32, ascending from 0: sequence s owns rows cu_rows[s]..cu_rows[s+1]. */
  uint64_t tokens;  /**< In and out: [num_tokens] int32. */
  /**
   * [num_sequences] int32. FIXED: tokens to commit. THRESHOLD: number of most confident candidates to consider; 0 commits
   * nothing. FACTOR: ignored. No pointer (0): no limit.
   */
  uint64_t quota;
  /** [num_sequences] int32: rows from this position on get a prediction but are not committed; or 0. */
  uint64_t commit_before;
  /** [num_sequences] int32: forwards of the sequence so far, a key of the random numbers; or 0 for 0 forwards. */
  uint64_t steps;
  uint64_t min_logit;  /**< [max_rows] f32, from top_k_top_p: lower logits count as minus infinity; or 0. */
  uint64_t masks_left; /**< Out: [num_sequences] int32: candidates that are still masked. */
  uint64_t committed;  /**< Out: [num_sequences] int32: tokens committed. */
  /**
   * Out: [num_sequences] int32: position of the first row without a finite logit, or DLLM_INDEX_FAILED, or
   * DLLM_NONE_FAILED. A sequence that failed commits nothing.
   */
  uint64_t failed;
  uint64_t predicted;  /**< Out: [max_rows] int32: predicted token of each masked row, -1 elsewhere; or 0. */
  uint64_t confidence; /**< Out: [max_rows] f32: confidence of each masked row, 0 elsewhere; or 0. */
  /** workspace_bytes, zeroed before the first use; every launch leaves it ready for the next one. */
  uint64_t workspace;
  uint64_t workspace_bytes;    /**< Bytes of `workspace`; at least what the plan requires. */
  uint64_t seed;               /**< Seed of all random numbers. */
  int64_t logits_stride;       /**< Elements from row to row. */
  int32_t max_rows;            /**< Capacity of the launch in rows, at most 65,535; cu_rows holds the actual number. */
  int32_t num_sequences;       /**< Sequences in the batch. */
  int32_t num_tokens;          /**< Elements of `tokens`. */
  int32_t num_logits_rows;     /**< Rows of `logits`. */
  int32_t vocab_size;          /**< Logits in a row; at most 2^30. */
  int32_t mask_token;          /**< Token of a masked position. */
  int32_t dtype;               /**< dllm_dtype of the logits. */
  int32_t confidence_kind;     /**< dllm_confidence */
  int32_t policy;              /**< dllm_policy */
  int32_t tempered_confidence; /**< 1: confidences from logits / temperature (Dream). 0: from the plain logits (LLaDA). */
  float temperature;           /**< 0: argmax. 1e-6 to 1e6: Gumbel-max draws from softmax(logits / temperature). */
  float cfg_scale;             /**< Guidance scale w: u + (w + 1) (c - u). Above 0 with uncond_logits, else 0. */
  float alg_temp;              /**< Above 0 (FIXED only): candidates are drawn from softmax(confidence / alg_temp). */
  float threshold;             /**< THRESHOLD: minimum confidence. */
  float factor;                /**< FACTOR: above 0. */
  int32_t reserved;            /**< 0 */
} dllm_unmask_params;

/**
 * top_k_top_p: for each masked row the smallest logit that top-p, then top-k, keep. Logits equal to it are kept too. unmask
 * takes the result as `min_logit`.
 *
 * Fields as in dllm_unmask_params. Rows that are not masked get minus infinity.
 */
typedef struct dllm_top_k_top_p_params {
  uint64_t size;   /**< sizeof(dllm_top_k_top_p_params) */
  uint64_t logits; /**< [num_logits_rows, vocab_size] dtype */
  /** [num_logits_rows, vocab_size] dtype, stride of `logits`: the unconditional logits of guidance; or 0. */
  uint64_t uncond_logits;
  uint64_t rows;           /**< [max_rows] dllm_unmask_row */
  uint64_t count;          /**< [1] int32: actual number of rows, at most max_rows; or 0 for max_rows. */
  uint64_t tokens;         /**< [num_tokens] int32 */
  uint64_t min_logit;      /**< Out: [max_rows] f32 */
  int64_t logits_stride;   /**< Elements from row to row. */
  int32_t max_rows;        /**< Capacity of the launch in rows. */
  int32_t num_tokens;      /**< Elements of `tokens`. */
  int32_t num_logits_rows; /**< Rows of `logits`. */
  int32_t vocab_size;      /**< Logits in a row; below 2^24. */
  int32_t mask_token;      /**< Token of a masked position. */
  int32_t dtype;           /**< dllm_dtype of the logits. */
  int32_t top_k;           /**< Keep the k largest logits and those equal to the k-th; 0 keeps all. */
  float top_p;             /**< Keep the shortest run of most probable tokens whose sum exceeds this; 1 keeps all. */
  float temperature;       /**< Of the probabilities for top-p; 0 counts as 1. */
  float cfg_scale;         /**< As in dllm_unmask_params. */
} dllm_top_k_top_p_params;

/**
 * Decode state of a sequence, as advance keeps it. 64 bytes.
 *
 * The host writes it before the first pass of a block, together with unmask's inputs for that pass. Ranges are half-open,
 * in positions, and clamped to the sequence.
 */
typedef struct dllm_advance_sequence {
  int32_t first_token;   /**< Index into `tokens` of position 0. */
  int32_t length;        /**< Positions of the sequence; clamped to the tokens. */
  int32_t generated;     /**< First generated position; the search for an end-of-text token starts here. */
  int32_t active_start;  /**< The sequence takes part while a position from here ... */
  int32_t active_end;    /**< ... to before this one is masked. */
  int32_t quota_start;   /**< DREAM, CARRY_OVER: remaining masks are counted from here ... */
  int32_t quota_end;     /**< ... to before this one. */
  int32_t commit_before; /**< Value of commit_before[s] for later passes while the sequence takes part. */
  int32_t initial_masks; /**< LLADA: masks of the block at its start. */
  int32_t per_step;      /**< CARRY_OVER: candidates that each step considers in addition to the deficit. In and out. */
  int32_t deficit;       /**< CARRY_OVER: candidates rejected so far, carried over to the next step. In and out. */
  int32_t max_passes;    /**< Maximum number of passes of this block; INT32_MAX for no limit. CARRY_OVER: in and out. */
  int32_t forwards;      /**< Passes that the sequence took part in, over all blocks. In and out. */
  /** In: took part in the pass that has just run. Out: takes part in the next one. Once 0, 0 for the rest of the block. */
  int32_t active;
  int32_t ended;    /**< 1: there is an end-of-text token with no mask before it. In and out. */
  int32_t reserved; /**< 0 */
} dllm_advance_sequence;

/** State of a block, as advance keeps it. The host writes it before the first pass. */
typedef struct dllm_advance_control {
  int32_t schedule;        /**< dllm_schedule */
  int32_t steps;           /**< LLADA: steps of the block. */
  int32_t pass;            /**< Index in the block of the pass that has just run, from 0. In and out: incremented. */
  int32_t num_ratios;      /**< DREAM: number of steps, which is the number of valid `ratios`. */
  int32_t passes;          /**< Launches so far, over all blocks. In and out: incremented. */
  int32_t nfe;             /**< Launches so far after a pass in which a sequence took part. In and out. */
  int32_t failed_sequence; /**< DLLM_NONE_FAILED, or the sequence that failed first. In and out: keeps the first failure. */
  int32_t failed_position; /**< `failed` of that sequence. In and out. */
  int32_t failed_step;     /**< `forwards` of that sequence before the pass that failed. In and out. */
  int32_t reserved[3];     /**< 0 */
} dllm_advance_control;

/**
 * Progress record that advance writes for the host.
 *
 * `passes` is stored last, after a fence for the whole system. A host that loads it with acquire order and then reads the
 * other fields sees the values of that launch or of a later one. While another launch may be running, `active` and `nfe` may
 * already be that launch's. After a failure, synchronise the stream before you read the remaining fields.
 */
typedef struct dllm_progress {
  int32_t passes;          /**< As in dllm_advance_control. */
  int32_t nfe;             /**< As in dllm_advance_control. */
  int32_t active;          /**< Sequences that take part in the next pass; 0: the block is done. */
  int32_t failed_sequence; /**< First sequence that failed, the lowest one of a pass; DLLM_NONE_FAILED. */
  int32_t failed_position; /**< `failed` of unmask for that sequence: a position, or DLLM_INDEX_FAILED. */
  int32_t failed_step;     /**< `forwards` of that sequence before the pass that failed. */
  int32_t reserved[2];     /**< Not written. */
} dllm_progress;

/**
 * advance: the decoding rules between two passes, after unmask in the same graph. Decides which sequences continue and how
 * many tokens each may commit in the next pass, and reports progress to the host, which need not synchronise inside a block.
 *
 * A sequence takes part in the next pass if all of these hold:
 * - it took part in this pass, has not failed and has not ended;
 * - its active range holds a mask;
 * - max_passes is not reached.
 *
 * For all other sequences quota is 0 and commit_before is INT32_MIN, so that unmask commits nothing.
 */
typedef struct dllm_advance_params {
  uint64_t size;      /**< sizeof(dllm_advance_params) */
  uint64_t control;   /**< In and out: [1] dllm_advance_control */
  uint64_t sequences; /**< In and out: [num_sequences] dllm_advance_sequence */
  uint64_t tokens;    /**< [num_tokens] int32, after unmask. */
  uint64_t committed; /**< [num_sequences] int32, output of unmask. */
  uint64_t failed;    /**< [num_sequences] int32, output of unmask. */
  /** In and out: [num_sequences] int32. In: quota of this pass, read by CARRY_OVER. Out: quota of the next pass. */
  uint64_t quota;
  uint64_t commit_before; /**< Out: [num_sequences] int32, for unmask's next pass. */
  uint64_t steps;         /**< Out: [num_sequences] int32, for unmask's next pass: `forwards`. */
  uint64_t ratios;        /**< [max_ratios] f32: share 1 - t[i + 1] / t[i] that step i commits (Dream); or 0. */
  uint64_t end_tokens;    /**< [num_end_tokens] int32: tokens that end a text; or 0: no sequence ends early. */
  uint64_t progress;      /**< Out: [1] dllm_progress, in host memory that is pinned and mapped on the device. */
  int32_t num_sequences;  /**< Sequences in the batch; at most 65,535. */
  int32_t num_tokens;     /**< Elements of `tokens`. */
  int32_t mask_token;     /**< Token of a masked position. */
  int32_t num_end_tokens; /**< Elements of `end_tokens`; 0 without it. */
  int32_t max_ratios;     /**< Elements of `ratios`; 0 without it. */
  int32_t reserved;       /**< 0 */
} dllm_advance_params;

/**
 * vverify: selects the rows whose value vectors changed most since the previous step (dLLM-Cache, section 3.3).
 *
 * For each sequence of n rows: the floor(n * ratio) rows with the lowest cosine similarity between the fresh and the cached
 * row. Ties go to the first row; a cosine that is NaN counts as the lowest. Dot products and squares are summed in f32, so the
 * magnitude of elements must stay below 1e19.
 */
typedef struct dllm_vverify_params {
  uint64_t size; /**< sizeof(dllm_vverify_params) */
  /** [max_rows, width] dtype, rows of sequence s at cu_rows[s]..cu_rows[s+1]; with fresh_row [num_fresh_rows, width]. */
  uint64_t fresh;
  uint64_t fresh_row; /**< [max_rows] int32: row of `fresh` of each row; or 0 for the row itself. */
  uint64_t cached;    /**< [num_cached_rows, width] dtype, of the previous step; written if update_cached. */
  /** [max_rows] int32: row of `cached` of each row, distinct with update_cached; or 0 for the row itself. */
  uint64_t cached_row;
  uint64_t cu_rows;     /**< [num_sequences + 1] int32, ascending from 0. */
  uint64_t indices;     /**< Out: [num_listed] int32: selected rows, those of a sequence together and ascending. */
  uint64_t tables[3];   /**< Each [max_rows] int32: values to copy for selected rows; or 0. */
  uint64_t selected[3]; /**< Out: each [num_listed] int32: selected[k][j] = tables[k][indices[j]]; 0 where tables[k] is 0. */
  /**
   * [num_sequences] int32: start of each sequence's part of `indices` and `selected`; elements between the parts are not
   * written. Or 0: parts are contiguous.
   */
  uint64_t first_selected;
  /**
   * Out: [num_sequences + 1] int32: number of rows selected before each sequence, and in all. Without first_selected these
   * are the starts of the parts.
   */
  uint64_t cu_selected;
  uint64_t similarity; /**< Out: [max_rows] f32: cosine similarities; or 0. */
  /**
   * In and out: [1] int32, set to DLLM_INDEX_FAILED when a fresh_row or cached_row is out of range (such a row counts as
   * changed most) or when an output list has no such element (it is not written), else untouched; or 0.
   */
  uint64_t failed;
  /** workspace_bytes, zeroed before the first use; every launch leaves it ready for the next one, of any shape. */
  uint64_t workspace;
  uint64_t workspace_bytes; /**< Bytes of `workspace`; at least what the plan requires. */
  int64_t fresh_stride;     /**< Elements from row to row of `fresh`. */
  int64_t cached_stride;    /**< Elements from row to row of `cached`. */
  double ratio;             /**< Share rho of rows to select, 0 to 1. */
  int32_t max_rows;         /**< Capacity of the launch in rows; cu_rows holds the actual number. */
  int32_t num_sequences;    /**< Sequences in the batch. */
  int32_t num_fresh_rows;   /**< Rows of `fresh`; 0 without fresh_row. */
  int32_t num_cached_rows;  /**< Rows of `cached`. */
  int32_t num_listed;       /**< Elements of `indices` and of each `selected`; or 0 for max_rows. */
  int32_t width;            /**< Elements of a row: all key/value heads. */
  int32_t dtype;            /**< dllm_dtype: bf16 or f16. */
  int32_t update_cached;    /**< 1: after the comparison, the fresh rows are written over the cached ones. */
} dllm_vverify_params;

/**
 * gather_scatter: copies rows of bytes by an index list. Gather: target[i] = source[index[i]]. Scatter:
 * target[index[i]] = source[i].
 *
 * A row whose index is out of range (for example -1) is skipped, and reported in `failed` if that is given.
 */
typedef struct dllm_gather_scatter_params {
  uint64_t size;   /**< sizeof(dllm_gather_scatter_params) */
  uint64_t source; /**< Gather: [num_indexed_rows, row_bytes]. Scatter: [max_rows, row_bytes]. */
  /** Out. Gather: [max_rows, row_bytes]. Scatter: [num_indexed_rows, row_bytes], indices distinct. */
  uint64_t target;
  uint64_t index; /**< [max_rows] int32 */
  uint64_t count; /**< [1] int32: rows to copy, at most max_rows; or 0 for max_rows. */
  /** In and out: [1] int32, set to DLLM_INDEX_FAILED when a row was skipped, else untouched; or 0. */
  uint64_t failed;
  int64_t source_stride_bytes; /**< Bytes from row to row; a multiple of 16. */
  int64_t target_stride_bytes; /**< Bytes from row to row; a multiple of 16. */
  int64_t row_bytes;           /**< Bytes of a row; a multiple of 16. */
  int32_t max_rows;            /**< Capacity of the launch in rows. */
  int32_t num_indexed_rows;    /**< Rows of the tensor that `index` points into. */
} dllm_gather_scatter_params;

/** embed: copies embedding rows, out[i] = table[tokens[index[i]]]. */
typedef struct dllm_embed_params {
  uint64_t size;   /**< sizeof(dllm_embed_params) */
  uint64_t table;  /**< [vocab_size, row_bytes] */
  uint64_t tokens; /**< [num_tokens] int32 */
  uint64_t index;  /**< [max_rows] int32: indices into `tokens`; or 0 for 0, 1, 2 ... */
  uint64_t out;    /**< Out: [max_rows, row_bytes] */
  uint64_t count;  /**< [1] int32: rows to embed, at most max_rows; or 0 for max_rows. */
  /** In and out: [1] int32, set to DLLM_INDEX_FAILED when a row was skipped, else untouched; or 0. */
  uint64_t failed;
  int64_t table_stride_bytes; /**< Bytes from row to row; a multiple of 16. */
  int64_t out_stride_bytes;   /**< Bytes from row to row; a multiple of 16. */
  int64_t row_bytes;          /**< Bytes of a row; a multiple of 16. */
  int32_t max_rows;           /**< Capacity of the launch in rows. */
  int32_t num_tokens;         /**< Elements of `tokens`. */
  int32_t vocab_size;         /**< Rows of `table`. */
  int32_t reserved;           /**< 0 */
} dllm_embed_params;

/**
 * norm: residual add and RMSNorm. x += delta, rounded to dtype; then
 * out = round(round(x / sqrt(mean(x^2) + eps)) * weight), both roundings to dtype, as in the reference models.
 */
typedef struct dllm_norm_params {
  uint64_t size;  /**< sizeof(dllm_norm_params) */
  uint64_t x;     /**< In and out: [max_rows, width] dtype, the residual stream; written only where a delta is added. */
  uint64_t delta; /**< [max_rows, width] dtype, with delta_row [num_delta_rows, width]; or 0 to add nothing. */
  /** [max_rows] int32: row of `delta` to add to each row, out of range (for example -1) for none; or 0 for the row itself. */
  uint64_t delta_row;
  uint64_t weight;        /**< [width] dtype */
  uint64_t out;           /**< Out: [max_rows, width] dtype; may not overlap the others. */
  uint64_t count;         /**< [1] int32: actual number of rows, at most max_rows; or 0 for max_rows. */
  int64_t x_stride;       /**< Elements from row to row of `x`. */
  int64_t delta_stride;   /**< Elements from row to row of `delta`. */
  int64_t out_stride;     /**< Elements from row to row of `out`. */
  int32_t max_rows;       /**< Capacity of the launch in rows. */
  int32_t width;          /**< Elements of a row; a multiple of 16 bytes, at most 8,192 elements. */
  int32_t dtype;          /**< dllm_dtype of all tensors. */
  float eps;              /**< Added to the mean square. */
  int32_t num_delta_rows; /**< Rows of `delta`; 0 without delta_row. */
  int32_t reserved;       /**< 0 */
} dllm_norm_params;

/**
 * rope: rotates the queries and keys of qkv in place by their positions, and stores keys (and values, if there is a v_cache)
 * in the cache. Half-split form: element i pairs with i + head_dim / 2.
 */
typedef struct dllm_rope_params {
  uint64_t size; /**< sizeof(dllm_rope_params) */
  /** In and out: [max_rows, (num_heads + 2 num_kv_heads) * head_dim] dtype: q, k, v. Without a v_cache, rows need only q, k. */
  uint64_t qkv;
  uint64_t positions; /**< [max_rows] int32, below num_positions. */
  uint64_t angles;    /**< [num_positions, head_dim / 2] pairs of f32: cosine, sine. */
  /** Out: [num_cache_rows, num_kv_heads * head_dim] dtype, rotated keys; or 0, and then no v_cache either. */
  uint64_t k_cache;
  uint64_t v_cache;       /**< Out: [num_cache_rows, num_kv_heads * head_dim] dtype, values; or 0: values are not stored. */
  uint64_t cache_row;     /**< [max_rows] int32: cache row of each row's key and value, -1 for none; 0 without a k_cache. */
  uint64_t count;         /**< [1] int32: actual number of rows, at most max_rows; or 0 for max_rows. */
  uint64_t failed;        /**< In and out: [1] int32, set to DLLM_INDEX_FAILED when a row was skipped, else untouched; or 0. */
  int64_t qkv_stride;     /**< Elements from row to row of `qkv`. */
  int64_t cache_stride;   /**< Elements from row to row of both caches. */
  int32_t max_rows;       /**< Capacity of the launch in rows. */
  int32_t num_positions;  /**< Rows of `angles`. */
  int32_t num_cache_rows; /**< Rows of each cache. */
  int32_t num_heads;      /**< Query heads. */
  int32_t num_kv_heads;   /**< Key/value heads. */
  int32_t head_dim;       /**< Elements of a head: 32, 64 or 128. */
  int32_t dtype;          /**< dllm_dtype of qkv and the caches: bf16 or f16. */
  int32_t reserved;       /**< 0 */
} dllm_rope_params;

/** swiglu: out = round(silu(gate)) * up, rounded to dtype, with silu(x) = x / (1 + e^-x). */
typedef struct dllm_swiglu_params {
  uint64_t size;          /**< sizeof(dllm_swiglu_params) */
  uint64_t gate_up;       /**< [max_rows, 2 * width] dtype: gate, up. */
  uint64_t out;           /**< Out: [max_rows, width] dtype; may not overlap gate_up. */
  uint64_t count;         /**< [1] int32: actual number of rows, at most max_rows; or 0 for max_rows. */
  int64_t gate_up_stride; /**< Elements from row to row of `gate_up`. */
  int64_t out_stride;     /**< Elements from row to row of `out`. */
  int32_t max_rows;       /**< Capacity of the launch in rows. */
  int32_t width;          /**< Elements of an output row; a multiple of 16 bytes. */
  int32_t dtype;          /**< dllm_dtype of both tensors. */
  int32_t reserved;       /**< 0 */
} dllm_swiglu_params;

/** Query rows that share one list of key tiles. */
#define DLLM_QUERY_TILE 128
/** Keys of a key tile. */
#define DLLM_KEY_TILE 64

/** Launch shape of attention. Both forms give the same bits. */
typedef enum dllm_attention_form {
  DLLM_ATTENTION_FORM_PLANNED = 0,   /**< Chosen by the plan, from the packed rows of the longest sequence. */
  DLLM_ATTENTION_FORM_STREAMING = 1, /**< Few rows, many keys: blocks of two warps, several blocks per multiprocessor. */
  DLLM_ATTENTION_FORM_FULL = 2       /**< Many rows: blocks of eight warps. */
} dllm_attention_form;

/** Keys and values of one part of each sequence, read in place. 64 bytes. */
typedef struct dllm_segment {
  uint64_t k;        /**< [num_rows, num_kv_heads, head_dim] dtype; 0 if no sequence has keys in this segment. */
  uint64_t v;        /**< [num_rows, num_kv_heads, head_dim] dtype */
  uint64_t start;    /**< [num_sequences] int32: first row of each sequence; or 0 for row 0. */
  uint64_t len;      /**< [num_sequences] int32: rows of each sequence, which may be 0. */
  int64_t k_stride;  /**< Elements from row to row of `k`. */
  int64_t v_stride;  /**< Elements from row to row of `v`. */
  int32_t num_rows;  /**< Rows of k and v; starts and lengths are clamped to them. */
  int32_t reserved0; /**< 0 */
  int64_t reserved1; /**< 0 */
} dllm_segment;

/**
 * attention: bidirectional, softmax(scale q k^T) v, over keys in up to three segments that are read in place.
 *
 * The keys of a sequence are those of segment 0, then 1, then 2 (prefix cache, live block, suffix cache), in tiles of
 * DLLM_KEY_TILE. A query row without a key gives zeros and a log-sum-exp of minus infinity. The result is undefined for rows
 * of sequences longer than max_sequence_rows, and for rows past max_rows.
 */
typedef struct dllm_attention_params {
  uint64_t size; /**< sizeof(dllm_attention_params) */
  uint64_t q;    /**< [max_rows, num_heads, head_dim] dtype */
  uint64_t out;  /**< Out: [max_rows, num_heads, head_dim] dtype; may not overlap the others. */
  uint64_t lse;  /**< Out: [max_rows, num_heads] f32, natural log-sum-exp of the scaled scores; or 0. */
  /** [num_sequences + 1] int32, ascending from 0: query rows of sequence s are cu_rows[s]..cu_rows[s+1]. */
  uint64_t cu_rows;
  dllm_segment segments[3]; /**< Prefix cache, live block, suffix cache. */
  /**
   * [num_sequences * query_tiles * (num_kv_heads if per_head, else 1) + 1] int32: CSR offsets into tile_indices; or 0:
   * every query tile visits all key tiles.
   */
  uint64_t tile_offsets;
  /** [num_tile_indices] int32: key tiles, each at most once in a list; tiles past the keys are empty. */
  uint64_t tile_indices;
  uint64_t workspace;        /**< workspace_bytes, any contents; 0 when the plan requires none. */
  uint64_t workspace_bytes;  /**< Bytes of `workspace`; at least what the plan requires. */
  int64_t q_stride;          /**< Elements from row to row of `q`. */
  int64_t out_stride;        /**< Elements from row to row of `out`. */
  float scale;               /**< Factor of the scores, at most 1e6 in magnitude; usually 1 / sqrt(head_dim). */
  int32_t max_rows;          /**< Capacity of the launch in query rows; cu_rows holds the actual number. */
  int32_t max_sequence_rows; /**< Maximum number of query rows of one sequence. */
  int32_t num_sequences;     /**< Sequences in the batch. */
  int32_t num_heads;         /**< Query heads. */
  int32_t num_kv_heads;      /**< Key/value heads; divides num_heads. */
  int32_t head_dim;          /**< Elements of a head: 32, 64 or 128. */
  int32_t dtype;             /**< dllm_dtype of q, k, v and out: bf16 or f16. */
  int32_t max_splits;        /**< KV splits: maximum number of parts that the keys of a query tile are divided into; 1 to 64. */
  /** Lists per sequence: max_sequence_rows / DLLM_QUERY_TILE, rounded up. Read with tile_offsets. */
  int32_t query_tiles;
  int32_t per_head;         /**< 1: each key/value head has lists of its own, head after head. */
  int32_t num_tile_indices; /**< Elements of `tile_indices`. */
  int32_t form;             /**< dllm_attention_form */
  int32_t reserved;         /**< 0 */
} dllm_attention_params;

/**
 * merge_state: combines two attention results of the same queries over disjoint sets of keys into the attention over both.
 *
 * With l = log-sum-exp: lse = ln(e^l_a + e^l_b), out = e^(l_a - lse) a + e^(l_b - lse) b. The bits do not change when a and b
 * are exchanged.
 *
 * Special log-sum-exps:
 * - minus infinity on one side (no keys): the result is exactly the other side, and this side's `out` is ignored, NaN included;
 * - minus infinity on both sides: zeros and minus infinity;
 * - plus infinity on one side outweighs finite values;
 * - NaN, or plus infinity on both sides, gives NaN.
 */
typedef struct dllm_merge_state_params {
  uint64_t size;  /**< sizeof(dllm_merge_state_params) */
  uint64_t a_out; /**< [max_rows, num_heads, head_dim] dtype */
  uint64_t a_lse; /**< [max_rows, num_heads] f32, natural log-sum-exps, as attention stores them. */
  uint64_t b_out; /**< [max_rows, num_heads, head_dim] dtype */
  uint64_t b_lse; /**< [max_rows, num_heads] f32 */
  /** Out: [max_rows, num_heads, head_dim] dtype; a_out or b_out with its stride (in place), else disjoint from both. */
  uint64_t out;
  uint64_t lse;       /**< Out: [max_rows, num_heads] f32; a_lse or b_lse (in place), else disjoint from both. */
  uint64_t count;     /**< [1] int32: actual number of rows, at most max_rows; or 0 for max_rows. */
  int64_t a_stride;   /**< Elements from row to row of a_out. */
  int64_t b_stride;   /**< Elements from row to row of b_out. */
  int64_t out_stride; /**< Elements from row to row of out. */
  int32_t max_rows;   /**< Capacity of the launch in rows. */
  int32_t num_heads;  /**< Query heads. */
  int32_t head_dim;   /**< Elements of a head; a multiple of 16 bytes. */
  int32_t dtype;      /**< dllm_dtype of a_out, b_out and out. */
} dllm_merge_state_params;

/** read_bandwidth: reads memory and discards it; its rate is the upper bound for kernels that are bound by reading. */
typedef struct dllm_read_bandwidth_params {
  uint64_t size;   /**< sizeof(dllm_read_bandwidth_params) */
  uint64_t source; /**< [bytes] */
  uint64_t sink;   /**< Out: [1] uint32, written only so that the loads are not optimised away. */
  uint64_t bytes;  /**< Bytes to read; a multiple of 16. */
} dllm_read_bandwidth_params;

/* A layout that differs between compilers must not compile: the size of each struct and the offset of its last field. */
#ifdef __cplusplus
#define DLLM_ASSERT_LAYOUT(type, last, offset, bytes) \
  static_assert(sizeof(type) == (bytes) && offsetof(type, last) == (offset), #type)
#else
#define DLLM_ASSERT_LAYOUT(type, last, offset, bytes) \
  _Static_assert(sizeof(type) == (bytes) && offsetof(type, last) == (offset), #type)
#endif
DLLM_ASSERT_LAYOUT(dllm_unmask_row, sequence, 12, 16);
DLLM_ASSERT_LAYOUT(dllm_unmask_params, reserved, 212, 216);
DLLM_ASSERT_LAYOUT(dllm_top_k_top_p_params, cfg_scale, 100, 104);
DLLM_ASSERT_LAYOUT(dllm_advance_sequence, reserved, 60, 64);
DLLM_ASSERT_LAYOUT(dllm_advance_control, reserved, 36, 48);
DLLM_ASSERT_LAYOUT(dllm_progress, reserved, 24, 32);
DLLM_ASSERT_LAYOUT(dllm_advance_params, reserved, 116, 120);
DLLM_ASSERT_LAYOUT(dllm_vverify_params, update_cached, 204, 208);
DLLM_ASSERT_LAYOUT(dllm_gather_scatter_params, num_indexed_rows, 76, 80);
DLLM_ASSERT_LAYOUT(dllm_embed_params, reserved, 92, 96);
DLLM_ASSERT_LAYOUT(dllm_norm_params, reserved, 100, 104);
DLLM_ASSERT_LAYOUT(dllm_rope_params, reserved, 116, 120);
DLLM_ASSERT_LAYOUT(dllm_swiglu_params, reserved, 60, 64);
DLLM_ASSERT_LAYOUT(dllm_segment, reserved1, 56, 64);
DLLM_ASSERT_LAYOUT(dllm_attention_params, reserved, 332, 336);
DLLM_ASSERT_LAYOUT(dllm_merge_state_params, dtype, 100, 104);
DLLM_ASSERT_LAYOUT(dllm_read_bandwidth_params, bytes, 24, 32);

#endif
