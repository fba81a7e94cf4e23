/*
 * The ABI of dllm-kernels: one plain struct of parameters per op.
 *
 * The same struct is what a C caller fills, what the launch layer checks and what the kernel receives by value. Plain C,
 * no CUDA headers. Device pointers are 64-bit integers; 0 is none, allowed only where "or 0" is said. All matrices are
 * row-major; strides count elements unless named _bytes. Element types are dllm_dtype; all arithmetic is f32 inside.
 *
 * Every pointer to elements is aligned to 16 bytes, and so is every row (its stride a multiple of 16 bytes), for kernels
 * load 16 bytes at a time; so are `rows`, `sequences`, `angles` and `workspace`. Pointers to int32 and float are aligned to their type. Ops neither allocate nor wait:
 * each may be captured into a CUDA graph, and what varies from step to step (counts, indices, tokens) is read from
 * device memory. Indices read from device memory are checked against the sizes given here, on the device.
 */
#ifndef DLLM_KERNELS_H
#define DLLM_KERNELS_H

#include <stddef.h>
#include <stdint.h>

/** Version of the structs below; changes with every change of a layout. */
#define DLLM_ABI_VERSION 1

/** Status of a call. */
typedef enum dllm_status {
  DLLM_OK = 0,               /**< Done, or launched. */
  DLLM_INVALID_ARGUMENT = 1, /**< A field is out of range; nothing was launched. */
  DLLM_NO_DEVICE = 2,        /**< No driver, no device, or one that is too old. */
  DLLM_DRIVER = 3,           /**< The driver refused. */
  DLLM_MODULE = 4            /**< A kernel module could not be loaded. */
} dllm_status;

/** Element types. */
typedef enum dllm_dtype {
  DLLM_BF16 = 0, /**< bfloat16 */
  DLLM_F16 = 1,  /**< IEEE half */
  DLLM_F32 = 2   /**< IEEE single */
} dllm_dtype;

/** What ranks a masked row. */
typedef enum dllm_confidence {
  DLLM_CONFIDENCE_PROBABILITY = 0, /**< Probability of the chosen token. */
  DLLM_CONFIDENCE_MARGIN = 1,      /**< Difference of the two largest probabilities. */
  DLLM_CONFIDENCE_ENTROPY = 2,     /**< Negative entropy, sum p ln p. */
  DLLM_CONFIDENCE_RANDOM = 3       /**< A random number. */
} dllm_confidence;

/** Which masked rows of a sequence to commit. */
typedef enum dllm_policy {
  DLLM_POLICY_FIXED = 0,     /**< The best quota[s]. */
  DLLM_POLICY_THRESHOLD = 1, /**< The best, and all others with at least this confidence. */
  DLLM_POLICY_FACTOR = 2     /**< The best n as long as (n + 1) (1 - confidence_n) <= factor; all of them if only the last fails. */
} dllm_policy;

/** How many tokens a sequence may commit in each pass of a block. */
typedef enum dllm_schedule {
  DLLM_SCHEDULE_NONE = 0,  /**< Any number: INT32_MAX. What stands for no schedule counts as this one. */
  DLLM_SCHEDULE_LLADA = 1, /**< Those masked at the block's beginning over its steps, the first steps one more; then 1 a pass. */
  DLLM_SCHEDULE_DREAM = 2, /**< A share of the masks that are left; from the last step on all of them. */
  DLLM_SCHEDULE_CARRY_OVER = 3  /**< Dream's threshold without blocks (Fast-dLLM): so many a step, and those that earlier steps rejected. */
} dllm_schedule;

/** What stands in `failed` when nothing failed. */
#define DLLM_NONE_FAILED (-1)
/** What stands in `failed` when an index read from device memory is out of range. */
#define DLLM_INDEX_FAILED (-2)

/** A row that unmask may commit. Loaded at once, so tables of them are aligned to 16 bytes. */
typedef struct dllm_unmask_row {
  int32_t token;      /**< Index of its token in `tokens`, of no other row. */
  int32_t logits_row; /**< Row of `logits` that predicts it (Dream: that of the position before). */
  int32_t position;   /**< Position in its sequence; keys the random numbers and breaks ties. */
  int32_t sequence;   /**< Its sequence, the one that owns it by `cu_rows`. */
} dllm_unmask_row;

/**
 * unmask: from logits to committed tokens, in one launch.
 *
 * Rows whose token is not `mask_token` are skipped unread. The mask token is never chosen: where its logit is the largest
 * it counts as minus infinity, elsewhere it keeps its share of the probabilities. NaN counts as minus infinity, plus
 * infinity as the largest finite value. Ties go to the lowest token, then to the first row.
 */
typedef struct dllm_unmask_params {
  uint64_t size;          /**< sizeof(dllm_unmask_params) */
  uint64_t logits;        /**< [num_logits_rows, vocab_size] */
  uint64_t uncond_logits; /**< Same layout, for guidance; or 0. */
  uint64_t rows;          /**< [max_rows] dllm_unmask_row, all of them initialised: rows of a sequence together, positions ascending. */
  uint64_t cu_rows;       /**< [num_sequences + 1] int32, ascending from 0: sequence s owns rows cu_rows[s]..cu_rows[s+1]. */
  uint64_t tokens;        /**< [num_tokens] int32, read and written. */
  uint64_t quota;         /**< [num_sequences] int32. Fixed: how many to commit. Threshold: among how many of the best, where 0 of them is none; or no pointer for all. */
  uint64_t commit_before; /**< [num_sequences] int32: positions from here on are scored but not committed; or 0. */
  uint64_t steps;         /**< [num_sequences] int32: forwards the sequence has had, keys the random numbers; or 0 for none. */
  uint64_t min_logit;           /**< [max_rows] f32 of dllm_top_k_top_p_params: lower logits count as minus infinity; or 0. */
  uint64_t masks_left;    /**< Out: [num_sequences] int32, rows that could be committed and still are masked. */
  uint64_t committed;     /**< Out: [num_sequences] int32, rows committed. */
  uint64_t failed;        /**< Out: [num_sequences] int32: position of the first row without a finite logit, when nothing of the sequence is committed; DLLM_NONE_FAILED; DLLM_INDEX_FAILED. */
  uint64_t predicted;        /**< Out: [max_rows] int32, each masked row's token, -1 elsewhere; or 0. */
  uint64_t confidence;    /**< Out: [max_rows] f32, each masked row's confidence, 0 elsewhere; or 0. */
  uint64_t workspace;     /**< workspace_bytes, zeroed before the first use; every launch leaves it ready for the next. */
  uint64_t workspace_bytes; /**< At least what the plan asks. */
  uint64_t seed;            /**< Of every random number. */
  int64_t logits_stride;    /**< Elements from row to row. */
  int32_t max_rows;         /**< Rows the launch has room for, at most 65,535; cu_rows says how many there are. */
  int32_t num_sequences;
  int32_t num_tokens;
  int32_t num_logits_rows;
  int32_t vocab_size;          /**< At most 2^30. */
  int32_t mask_token;          /**< The token of a masked position. */
  int32_t dtype;               /**< dllm_dtype of the logits. */
  int32_t confidence_kind;     /**< dllm_confidence */
  int32_t policy;              /**< dllm_policy */
  int32_t tempered_confidence; /**< 1: confidences after the temperature (Dream). 0: from the plain logits (LLaDA). */
  float temperature;           /**< 0: argmax. 1e-6 to 1e6: Gumbel-max draws from softmax(logits / temperature). */
  float cfg_scale;             /**< Guidance w: u + (w + 1) (c - u); above 0 with uncond_logits, else 0. */
  float alg_temp;              /**< Above 0, policy fixed: rows are drawn from softmax(confidence / alg_temp). */
  float threshold;             /**< Policy threshold: least confidence. */
  float factor;                /**< Policy factor: above 0. */
  int32_t reserved;            /**< 0 */
} dllm_unmask_params;

/**
 * top_k_top_p: per masked row the least logit that top-p, then top-k, keep, and those equal to it; unmask takes it as `min_logit`.
 *
 * Fields as in dllm_unmask_params. Rows that are not masked get minus infinity.
 */
typedef struct dllm_top_k_top_p_params {
  uint64_t size;          /**< sizeof(dllm_top_k_top_p_params) */
  uint64_t logits;        /**< [num_logits_rows, vocab_size] */
  uint64_t uncond_logits; /**< Same layout, for guidance; or 0. */
  uint64_t rows;          /**< [max_rows] dllm_unmask_row */
  uint64_t count;         /**< [1] int32: rows there are, at most max_rows; or 0 for max_rows. */
  uint64_t tokens;        /**< [num_tokens] int32 */
  uint64_t min_logit;           /**< Out: [max_rows] f32 */
  int64_t logits_stride;  /**< Elements from row to row. */
  int32_t max_rows;
  int32_t num_tokens;
  int32_t num_logits_rows;
  int32_t vocab_size; /**< Below 2^24. */
  int32_t mask_token;
  int32_t dtype;     /**< dllm_dtype of the logits. */
  int32_t top_k;     /**< Keep the k largest and those equal to the k-th; 0 keeps all. */
  float top_p;       /**< Keep the shortest run of most probable tokens that sum to more than this; 1 keeps all. */
  float temperature; /**< Of those probabilities; 0 counts as 1. */
  float cfg_scale;   /**< As in unmask. */
} dllm_top_k_top_p_params;

/** What advance knows of a sequence. The host writes it before the first pass of a block, with what unmask takes in that pass. 64 bytes. */
typedef struct dllm_advance_sequence {
  int32_t first_token;   /**< Index in `tokens` of its position 0. */
  int32_t length;        /**< Positions; they, and the ranges below, are brought to within the tokens. */
  int32_t generated;     /**< First generated position: an end-of-text token is looked for from here on. */
  int32_t active_start;    /**< It takes part as long as a position from here ... */
  int32_t active_end;      /**< ... to before this one is masked. */
  int32_t quota_start;   /**< DREAM, CARRY_OVER: the masks that are left are counted from here ... */
  int32_t quota_end;     /**< ... to before this one. */
  int32_t commit_before; /**< commit_before[s] of later passes, while it takes part. */
  int32_t initial_masks;        /**< LLADA: masks of the block when it began. */
  int32_t per_step;      /**< CARRY_OVER: positions to look at in each step. In and out. */
  int32_t deficit;          /**< CARRY_OVER: positions rejected so far. In and out. */
  int32_t max_passes;         /**< Passes of this block, at most; INT32_MAX for no limit. CARRY_OVER: in and out. */
  int32_t forwards;      /**< Passes that it has taken part in, over all blocks. In and out. */
  int32_t active;        /**< In: it took part in the pass that has just run. Out: it takes part in the next one. Once 0, 0 for the rest of the block. */
  int32_t ended;         /**< 1: an end-of-text token stands with no mask before it. In and out. */
  int32_t reserved;      /**< 0 */
} dllm_advance_sequence;

/** What advance knows of a block. The host writes it before the first pass. */
typedef struct dllm_advance_control {
  int32_t schedule;        /**< dllm_schedule */
  int32_t steps;           /**< LLADA: steps of the block. */
  int32_t pass;            /**< Index in the block of the pass that has just run, from 0. In and out: 1 more. */
  int32_t num_ratios;      /**< DREAM: steps, of `ratios`. */
  int32_t passes;          /**< Launches, over all blocks. In and out. */
  int32_t nfe;             /**< Those after a pass in which a sequence took part. In and out. */
  int32_t failed_sequence; /**< DLLM_NONE_FAILED. In and out: once another, it stays. */
  int32_t failed_position; /**< In and out. */
  int32_t failed_step;     /**< In and out. */
  int32_t reserved[3];     /**< 0 */
} dllm_advance_control;

/**
 * What advance tells the host. `passes` is stored last, after a fence for the whole system: a host that reads it and then,
 * with an acquire, the rest, sees at least what that launch told. Where another launch may be under way, `active` and `nfe`
 * may be that one's; of a failure read the rest after a wait for the stream.
 */
typedef struct dllm_progress {
  int32_t passes;          /**< As in dllm_advance_control. */
  int32_t nfe;             /**< As in dllm_advance_control. */
  int32_t active;          /**< Sequences that take part in the next pass; 0: the block is done. */
  int32_t failed_sequence; /**< The first that failed, the lowest of one pass; DLLM_NONE_FAILED. */
  int32_t failed_position; /**< Its `failed` of unmask: a position, or DLLM_INDEX_FAILED. */
  int32_t failed_step;     /**< Its `forwards` before that pass. */
  int32_t reserved[2];     /**< Not written. */
} dllm_progress;

/**
 * advance: what the decoding rules do between two passes, after unmask in the same graph: who goes on, how many tokens the
 * next pass may commit, and a word to the host, which need not wait inside a block.
 *
 * A sequence takes part in the next pass if it took part in this one, has not failed, has not ended, has a mask in its open
 * range, and its limit is not reached. For others quota is 0 and commit_before INT32_MIN: unmask commits nothing.
 */
typedef struct dllm_advance_params {
  uint64_t size;          /**< sizeof(dllm_advance_params) */
  uint64_t control;       /**< In and out: [1] dllm_advance_control */
  uint64_t sequences;     /**< In and out: [num_sequences] dllm_advance_sequence */
  uint64_t tokens;        /**< [num_tokens] int32, as unmask left them. */
  uint64_t committed;     /**< [num_sequences] int32 of unmask. */
  uint64_t failed;        /**< [num_sequences] int32 of unmask. */
  uint64_t quota;         /**< In and out: [num_sequences] int32, for unmask's next pass; CARRY_OVER reads that of this one. */
  uint64_t commit_before; /**< Out: [num_sequences] int32, for unmask's next pass. */
  uint64_t steps;         /**< Out: [num_sequences] int32, for unmask's next pass: forwards. */
  uint64_t ratios;        /**< [max_ratios] f32: the share 1 - t[i + 1] / t[i] that step i commits (Dream); or 0. */
  uint64_t end_tokens;    /**< [num_end_tokens] int32; or 0: no sequence ends early. */
  uint64_t progress;      /**< Out: [1] dllm_progress, in host memory that is pinned and mapped on the device. */
  int32_t num_sequences;  /**< At most 65,535. */
  int32_t num_tokens;
  int32_t mask_token;
  int32_t num_end_tokens; /**< 0 without end_tokens. */
  int32_t max_ratios;     /**< 0 without ratios. */
  int32_t reserved;       /**< 0 */
} dllm_advance_params;

/**
 * vverify: which rows of V turned most (dLLM-Cache, section 3.3).
 *
 * Squares and sums are f32: the rows' elements stay below 1e19. Per sequence the floor(n * ratio) of its n rows whose cosine with the cached row is lowest, ties to the first row. A cosine
 * that is not a number counts as the lowest.
 */
typedef struct dllm_vverify_params {
  uint64_t size;       /**< sizeof(dllm_vverify_params) */
  uint64_t fresh;      /**< [max_rows, width], rows of sequence s at cu_rows[s]..cu_rows[s+1]; with fresh_row [num_fresh_rows, width]. */
  uint64_t fresh_row;  /**< [max_rows] int32: where each row's values stand in `fresh`; or 0 when they are the same. */
  uint64_t cached;     /**< [num_cached_rows, width], of the previous step. */
  uint64_t cached_row; /**< [max_rows] int32: the cached row of each row, distinct with update_cached; or 0 when they are the same. */
  uint64_t cu_rows;    /**< [num_sequences + 1] int32, ascending from 0. */
  uint64_t indices;    /**< Out: [num_listed] int32: selected rows, each sequence's together and ascending. */
  uint64_t tables[3];  /**< Each [max_rows] int32, numbers that are listed with their rows; or 0. */
  uint64_t selected[3]; /**< Out: each [num_listed] int32, beside indices[j] the tables[k][indices[j]]; 0 where tables[k] is. */
  uint64_t first_selected; /**< [num_sequences] int32: where each sequence's part of `indices` and `selected` begins, what is between parts left as it is; or 0: one after the other, nothing between. */
  uint64_t cu_selected; /**< Out: [num_sequences + 1] int32: how many are selected before each sequence, and in all: without first_selected where each part begins. */
  uint64_t similarity;  /**< Out: [max_rows] f32, the cosines; or 0. */
  uint64_t failed;      /**< In and out: [1] int32, set to DLLM_INDEX_FAILED when a fresh_row or cached_row is out of range, which counts as turned most, or when an output list has no such element, which is not written; or 0. */
  uint64_t workspace;   /**< workspace_bytes, zeroed before the first use; every launch leaves it ready for the next, whatever its shape. */
  uint64_t workspace_bytes; /**< At least what the plan asks. */
  int64_t fresh_stride;     /**< Elements from row to row. */
  int64_t cached_stride;    /**< Elements from row to row. */
  double ratio;             /**< rho, 0 to 1. */
  int32_t max_rows;         /**< Rows the launch has room for; cu_rows says how many there are. */
  int32_t num_sequences;
  int32_t num_fresh_rows; /**< Rows of `fresh`; 0 without fresh_row. */
  int32_t num_cached_rows;
  int32_t num_listed;    /**< Elements of `indices` and of each `selected`; or 0 for max_rows. */
  int32_t width;         /**< Elements of a row: all key/value heads. */
  int32_t dtype;         /**< dllm_dtype: bf16 or f16. */
  int32_t update_cached; /**< 1: the fresh rows are written over the cached ones, after the comparison. */
} dllm_vverify_params;

/**
 * gather_scatter: gather, target[i] = source[index[i]]; scatter, target[index[i]] = source[i]. Bytes, whatever they mean. A row whose
 * index is out of range, -1 say, is left out; with failed 0 nothing tells.
 */
typedef struct dllm_gather_scatter_params {
  uint64_t size;   /**< sizeof(dllm_gather_scatter_params) */
  uint64_t source; /**< Gather: [num_indexed_rows, row_bytes]; scatter: [max_rows, row_bytes]. */
  uint64_t target; /**< Gather: [max_rows, row_bytes]; scatter: [num_indexed_rows, row_bytes], indices distinct. */
  uint64_t index;  /**< [max_rows] int32 */
  uint64_t count;  /**< [1] int32: rows to copy, at most max_rows; or 0 for max_rows. */
  uint64_t failed; /**< In and out: [1] int32, set to DLLM_INDEX_FAILED when a row was left out, else untouched; or 0. */
  int64_t source_stride_bytes; /**< From row to row; a multiple of 16. */
  int64_t target_stride_bytes; /**< From row to row; a multiple of 16. */
  int64_t row_bytes;           /**< A multiple of 16. */
  int32_t max_rows;            /**< Rows the launch has room for. */
  int32_t num_indexed_rows;    /**< Rows of the tensor that `index` points into. */
} dllm_gather_scatter_params;

/** embed: out[i] = table[tokens[index[i]]]. */
typedef struct dllm_embed_params {
  uint64_t size;              /**< sizeof(dllm_embed_params) */
  uint64_t table;             /**< [vocab_size, row_bytes] */
  uint64_t tokens;            /**< [num_tokens] int32 */
  uint64_t index;             /**< [max_rows] int32 into tokens; or 0 for 0, 1, 2 ... */
  uint64_t out;               /**< Out: [max_rows, row_bytes] */
  uint64_t count;             /**< [1] int32: rows to embed, at most max_rows; or 0 for max_rows. */
  uint64_t failed;            /**< In and out: [1] int32, set to DLLM_INDEX_FAILED when a row was left out; or 0. */
  int64_t table_stride_bytes; /**< From row to row; a multiple of 16. */
  int64_t out_stride_bytes;   /**< From row to row; a multiple of 16. */
  int64_t row_bytes;          /**< A multiple of 16. */
  int32_t max_rows;           /**< Rows the launch has room for. */
  int32_t num_tokens;
  int32_t vocab_size;
  int32_t reserved; /**< 0 */
} dllm_embed_params;

/**
 * norm: x += delta, rounded to dtype; then out = round(round(x / sqrt(mean(x^2) + eps)) * weight), both roundings to dtype:
 * the order of the original models.
 */
typedef struct dllm_norm_params {
  uint64_t size;        /**< sizeof(dllm_norm_params) */
  uint64_t x;           /**< [max_rows, width], the residual stream; written where something is added. */
  uint64_t delta;       /**< [max_rows, width], with delta_row [num_delta_rows, width]; or 0. */
  uint64_t delta_row;   /**< [max_rows] int32: the row of `delta` that is added to each row, one out of range, -1 say, for nothing; or 0 when they are the same. */
  uint64_t weight;      /**< [width] */
  uint64_t out;         /**< Out: [max_rows, width]; may not overlap the others. */
  uint64_t count;       /**< [1] int32: rows there are, at most max_rows; or 0 for max_rows. */
  int64_t x_stride;     /**< Elements from row to row. */
  int64_t delta_stride; /**< Elements from row to row. */
  int64_t out_stride;   /**< Elements from row to row. */
  int32_t max_rows;     /**< Rows the launch has room for. */
  int32_t width;        /**< A multiple of 16 bytes, at most 8,192 elements. */
  int32_t dtype;        /**< dllm_dtype of all. */
  float eps;
  int32_t num_delta_rows; /**< Rows of `delta`; 0 without delta_row. */
  int32_t reserved;       /**< 0 */
} dllm_norm_params;

/**
 * rope: rotates the queries and keys of qkv in place by their positions, half-split form (element i pairs with
 * i + head_dim / 2), and leaves keys, and values where there is a v_cache, in the cache.
 */
typedef struct dllm_rope_params {
  uint64_t size;        /**< sizeof(dllm_rope_params) */
  uint64_t qkv;         /**< [max_rows, (num_heads + 2 num_kv_heads) * head_dim]: q, k, v; with a k_cache alone q, k will do. */
  uint64_t positions;   /**< [max_rows] int32, below num_positions. */
  uint64_t angles;      /**< [num_positions, head_dim / 2] pairs of f32: cosine, sine. */
  uint64_t k_cache;     /**< Out: [num_cache_rows, num_kv_heads * head_dim], rotated keys; or 0, and no v_cache. */
  uint64_t v_cache;     /**< Out: [num_cache_rows, num_kv_heads * head_dim]; or 0: no values go anywhere, and rows need have none. */
  uint64_t cache_row;   /**< [max_rows] int32: where a row's key and value go, -1 nowhere; 0 without a k_cache. */
  uint64_t count;       /**< [1] int32: rows there are, at most max_rows; or 0 for max_rows. */
  uint64_t failed;      /**< In and out: [1] int32, set to DLLM_INDEX_FAILED when a row was left out; or 0. */
  int64_t qkv_stride;   /**< Elements from row to row. */
  int64_t cache_stride; /**< Elements from row to row, of both caches. */
  int32_t max_rows;     /**< Rows the launch has room for. */
  int32_t num_positions;
  int32_t num_cache_rows;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim; /**< 32, 64 or 128 */
  int32_t dtype;    /**< dllm_dtype of qkv and the caches: bf16 or f16. */
  int32_t reserved; /**< 0 */
} dllm_rope_params;

/** swiglu: out = round(silu(gate)) * up, silu(x) = x / (1 + e^-x). */
typedef struct dllm_swiglu_params {
  uint64_t size;          /**< sizeof(dllm_swiglu_params) */
  uint64_t gate_up;       /**< [max_rows, 2 * width]: gate, up. */
  uint64_t out;           /**< Out: [max_rows, width]; may not overlap gate_up. */
  uint64_t count;         /**< [1] int32: rows there are, at most max_rows; or 0 for max_rows. */
  int64_t gate_up_stride; /**< Elements from row to row. */
  int64_t out_stride;     /**< Elements from row to row. */
  int32_t max_rows;       /**< Rows the launch has room for. */
  int32_t width;          /**< A multiple of 16 bytes. */
  int32_t dtype;          /**< dllm_dtype of both. */
  int32_t reserved;       /**< 0 */
} dllm_swiglu_params;

/** Query rows that share one list of key tiles. */
#define DLLM_QUERY_TILE 128
/** Keys of a tile. */
#define DLLM_KEY_TILE 64

/** How an attention launch is cut into blocks. Both forms give the same bits. */
typedef enum dllm_attention_form {
  DLLM_ATTENTION_FORM_PLANNED = 0,   /**< As the plan chooses, by the packed rows of the longest sequence. */
  DLLM_ATTENTION_FORM_STREAMING = 1, /**< Few rows, many keys: blocks of two warps, several to a multiprocessor. */
  DLLM_ATTENTION_FORM_FULL = 2       /**< Many rows: blocks of eight warps. */
} dllm_attention_form;

/** Keys and values of one part of a sequence, read where they are. 64 bytes. */
typedef struct dllm_segment {
  uint64_t k;        /**< [num_rows, num_kv_heads, head_dim]; 0 when nobody has keys here. */
  uint64_t v;        /**< [num_rows, num_kv_heads, head_dim] */
  uint64_t start;    /**< [num_sequences] int32: first row of each sequence; or 0 for row 0. */
  uint64_t len;      /**< [num_sequences] int32: rows of each sequence, which may be 0. */
  int64_t k_stride;  /**< Elements from row to row. */
  int64_t v_stride;  /**< Elements from row to row. */
  int32_t num_rows;  /**< Rows of k and v; starts and lengths are brought to within. */
  int32_t reserved0; /**< 0 */
  int64_t reserved1; /**< 0 */
} dllm_segment;

/**
 * attention: bidirectional, softmax(scale q k^T) v, over keys in up to three segments; nothing is concatenated.
 *
 * The keys of a sequence are those of segment 0, then 1, then 2 (prefix cache, live block, suffix cache), in tiles of
 * DLLM_KEY_TILE. A query row without a key gives zeros and a log-sum-exp of minus infinity. Rows of sequences that are
 * longer than max_sequence_rows, and those past max_rows, get no defined result.
 */
typedef struct dllm_attention_params {
  uint64_t size;    /**< sizeof(dllm_attention_params) */
  uint64_t q;       /**< [max_rows, num_heads, head_dim] */
  uint64_t out;     /**< Out: [max_rows, num_heads, head_dim]; may not overlap the others. */
  uint64_t lse;     /**< Out: [max_rows, num_heads] f32, natural log-sum-exp of the scaled scores; or 0. */
  uint64_t cu_rows; /**< [num_sequences + 1] int32, ascending from 0: query rows of sequence s. */
  dllm_segment segments[3];
  uint64_t tile_offsets; /**< [num_sequences * query_tiles * (kv heads, if per_head) + 1] int32: which part of tile_indices a query tile visits; or 0 for all tiles. */
  uint64_t tile_indices; /**< [num_tile_indices] int32: key tiles, each at most once in a list; those past the keys are empty. */
  uint64_t workspace;       /**< workspace_bytes, any contents; 0 when the plan asks none. */
  uint64_t workspace_bytes; /**< At least what the plan asks. */
  int64_t q_stride;         /**< Elements from row to row. */
  int64_t out_stride;       /**< Elements from row to row. */
  float scale;              /**< Of the scores, within 1e6 of 0; 1 / sqrt(head_dim). */
  int32_t max_rows;         /**< Query rows the launch has room for; cu_rows says how many there are. */
  int32_t max_sequence_rows; /**< Query rows of one sequence, at most. */
  int32_t num_sequences;
  int32_t num_heads;
  int32_t num_kv_heads; /**< Divides num_heads. */
  int32_t head_dim;     /**< 32, 64 or 128 */
  int32_t dtype;        /**< dllm_dtype: bf16 or f16. */
  int32_t max_splits;   /**< Parts that the keys of a query tile are cut into, at most; 1 to 64. */
  int32_t query_tiles;  /**< Lists a sequence has: max_sequence_rows / DLLM_QUERY_TILE, rounded up. Read with tile_offsets. */
  int32_t per_head;     /**< 1: each key/value head has lists of its own, head after head. */
  int32_t num_tile_indices;
  int32_t form;     /**< dllm_attention_form */
  int32_t reserved; /**< 0 */
} dllm_attention_params;

/**
 * merge_state: two attentions of the same queries, over keys that have none in common, become the attention over both.
 *
 * With l = log-sum-exp: lse = ln(e^l_a + e^l_b), out = e^(l_a - lse) a + e^(l_b - lse) b; equal bits with a and b exchanged.
 * A side whose log-sum-exp is minus infinity has had no keys: the result is the other one exactly, whatever `out` holds there,
 * NaN included; with both it is zeros and minus infinity. Plus infinity outweighs what is finite; NaN, or plus infinity on both
 * sides, gives NaN.
 */
typedef struct dllm_merge_state_params {
  uint64_t size;      /**< sizeof(dllm_merge_state_params) */
  uint64_t a_out;     /**< [max_rows, num_heads, head_dim] */
  uint64_t a_lse;     /**< [max_rows, num_heads] f32, natural log-sum-exps, as attention leaves them. */
  uint64_t b_out;     /**< [max_rows, num_heads, head_dim] */
  uint64_t b_lse;     /**< [max_rows, num_heads] f32 */
  uint64_t out;       /**< Out: [max_rows, num_heads, head_dim]; a_out or b_out with its stride (in place), else apart from both. */
  uint64_t lse;       /**< Out: [max_rows, num_heads] f32; a_lse or b_lse (in place), else apart from both. */
  uint64_t count;     /**< [1] int32: rows there are, at most max_rows; or 0 for max_rows. */
  int64_t a_stride;   /**< Elements from row to row of a_out. */
  int64_t b_stride;   /**< Elements from row to row of b_out. */
  int64_t out_stride; /**< Elements from row to row of out. */
  int32_t max_rows;   /**< Rows the launch has room for. */
  int32_t num_heads;
  int32_t head_dim; /**< A multiple of 16 bytes. */
  int32_t dtype;    /**< dllm_dtype of a_out, b_out and out. */
} dllm_merge_state_params;

/** read_bandwidth: reads memory and does nothing with it, which is the most that a kernel bound by reading can reach. */
typedef struct dllm_read_bandwidth_params {
  uint64_t size;   /**< sizeof(dllm_read_bandwidth_params) */
  uint64_t source; /**< bytes */
  uint64_t sink;   /**< Out: [1] uint32, written only so that the reading is not optimised away. */
  uint64_t bytes;  /**< A multiple of 16. */
} dllm_read_bandwidth_params;

/* A layout that differs between compilers must not compile: size, and where the last field lies, of each struct. */
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
