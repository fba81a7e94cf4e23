//! Device memory of a decode.

use super::super::limits::MemoryEstimate;
use crate::backend::cuda::{Cuda, DecodeSizes};
use crate::error::Result;
use crate::model::{Config, SessionConfig};

impl MemoryEstimate {
    /// Computes what a decode allocates on a CUDA device with `multiprocessors` multiprocessors.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] when a size does not fit 32 bits.
    pub fn cuda(session: &SessionConfig, config: &Config, multiprocessors: usize) -> Result<MemoryEstimate> {
        let [cache, workspace] = device_bytes(session, config, multiprocessors)?;
        Ok(MemoryEstimate { cache, workspace, scratch: 0 })
    }
}

/// Sizes of the decode state.
pub(super) fn decode_sizes(session: &SessionConfig, config: &Config) -> DecodeSizes {
    DecodeSizes {
        sequences: session.prompt_lens.len(),
        candidates: session.max_candidates,
        ratios: session.max_ratios,
        end_tokens: session.num_end_tokens,
        vocab_size: config.vocab_size,
    }
}

/// Bytes of device memory of a decode besides the weights: caches, and everything else.
pub(super) fn device_bytes(session: &SessionConfig, config: &Config, multiprocessors: usize) -> Result<[usize; 2]> {
    let limits = session.limits(config);
    let templates = session.num_templates();
    let logits = limits.logit_rows * config.vocab_size;
    let workspace = size_of::<half::bf16>() * session.activation_elements(config)
        + size_of::<f32>() * logits
        + decode_sizes(session, config).device_bytes(templates)?
        + Cuda::session_bytes(&limits, templates, multiprocessors);
    Ok([size_of::<half::bf16>() * session.cache_elements(config), workspace])
}

#[cfg(test)]
mod tests {
    use super::super::WINDOW_BUCKETS;
    use crate::backend::{Heads, SessionLimits, cuda};
    use crate::model::SessionConfig;

    /// Attention's workspace is large enough for every bucket that passes can have: refreshes, blocks, and shrinking passes of any
    /// number of sequences.
    #[test]
    fn no_bucket_needs_more_workspace_than_allocated() {
        for heads in [(32, 32, 128), (28, 4, 128), (4, 4, 64), (2, 2, 32)] {
            let (num_heads, num_kv_heads, head_dim) = heads;
            let heads = Heads { num_heads, num_kv_heads, head_dim };
            for (prompt_lens, gen_length) in
                [(vec![1021; 8], 256), (vec![64, 32], 64), (vec![3], 32), (vec![20, 400, 77, 5], 256), (vec![5], 6)]
            {
                for guided in [false, true] {
                    check_buckets(heads, &prompt_lens, gen_length, guided);
                }
            }
        }
    }

    fn check_buckets(heads: Heads, prompt_lens: &[usize], gen_length: usize, guided: bool) {
        let branches = if guided { 2 } else { 1 };
        let session = SessionConfig {
            prompt_lens: prompt_lens.to_vec(),
            gen_length,
            max_candidates: 1,
            kv_cache: true,
            feature_cache: false,
            reuses_guidance: false,
            guided,
            max_ratios: 0,
            num_end_tokens: 0,
        };
        let rows = (prompt_lens.iter().sum::<usize>() + prompt_lens.len() * gen_length) * branches;
        let limits = SessionLimits {
            rows,
            logit_rows: 1,
            sequences: prompt_lens.len() * branches,
            longest: session.longest(),
            tokens: rows,
            heads,
            selects_rows: false,
        };
        let allocated = cuda::attention_workspace(&limits, 132);
        let full: Vec<usize> = prompt_lens.iter().map(|prompt| prompt + gen_length).collect();
        let passes = (1..=gen_length).map(|len| vec![len; prompt_lens.len()]).chain([full]);
        for (row_counts, buckets) in passes.flat_map(|rows| [(rows.clone(), 0), (rows, WINDOW_BUCKETS)]) {
            let bucket = session.bucket(&row_counts, 1, buckets);
            assert!(bucket.rows <= rows && bucket.longest <= limits.longest, "{bucket:?}");
            assert!(bucket.longest >= row_counts.iter().copied().max().unwrap(), "{bucket:?} {row_counts:?}");
            let needed = cuda::attention_workspace_of(heads, bucket.rows, bucket.longest, 132);
            assert!(needed <= allocated, "{heads:?} {prompt_lens:?} {bucket:?}: {needed} of {allocated}");
        }
    }
}
