//! Attention in f64, one query row and head at a time.

use crate::backend::SequenceRows;
use crate::tensor::Heads;

/// Returns the attention of one query over pairs of keys and values, and the natural log-sum-exp of the scaled scores. All
/// vectors are `[head_dim]`. Without keys the result is zeros and minus infinity.
pub fn attend(query: &[f64], keys_values: &[(&[f64], &[f64])], scale: f64) -> (Vec<f64>, f64) {
    let dot = |key: &[f64]| query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>();
    let scores: Vec<f64> = keys_values.iter().map(|(key, _)| dot(key) * scale).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut out = vec![0.0; query.len()];
    if keys_values.is_empty() {
        return (out, max);
    }
    let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    for (score, (_, value)) in scores.iter().zip(keys_values) {
        let weight = (score - max).exp() / total;
        out.iter_mut().zip(*value).for_each(|(o, v)| *o += weight * v);
    }
    (out, max + total.ln())
}

/// Computes the attention of every sequence of a batch, with the arguments of the CPU backend.
///
/// `qkv` is `[rows, heads.qkv_width()]`, `out` `[rows, num_heads * head_dim]`, sequence after sequence. A row attends to the
/// rows of its sequence; with `cache`, which holds keys and values `[positions, num_kv_heads * head_dim]`, to all
/// positions of its sequence. Keys of rows in the batch are read from `qkv`.
pub fn attention(qkv: &[f32], heads: Heads, spans: &[SequenceRows], cache: Option<(&[f32], &[f32])>, out: &mut [f32]) {
    let Heads { num_heads, num_kv_heads, head_dim } = heads;
    let (width, kv_width) = (heads.qkv_width(), num_kv_heads * head_dim);
    let mut first = 0;
    for span in spans {
        let visible = if cache.is_some() { 0..span.num_keys } else { span.start..span.end };
        for row in first..first + span.rows() {
            for head in 0..num_heads {
                let kv = head / (num_heads / num_kv_heads) * head_dim;
                let query = &qkv[row * width + head * head_dim..][..head_dim];
                let key_value = |position: usize| match cache {
                    Some((k, v)) if !(span.start..span.end).contains(&position) => {
                        let offset = (span.cache_base + position) * kv_width + kv;
                        (&k[offset..offset + head_dim], &v[offset..offset + head_dim])
                    }
                    _ => {
                        let offset = (first + position - span.start) * width + num_heads * head_dim + kv;
                        (&qkv[offset..offset + head_dim], &qkv[offset + kv_width..offset + kv_width + head_dim])
                    }
                };
                let score = |position| {
                    let key = key_value(position).0;
                    let dot: f64 = query.iter().zip(key).map(|(q, k)| *q as f64 * *k as f64).sum();
                    dot / (head_dim as f64).sqrt()
                };
                let scores: Vec<f64> = visible.clone().map(score).collect();
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                let mut sum = vec![0.0f64; head_dim];
                for (position, s) in visible.clone().zip(&scores) {
                    for (o, v) in sum.iter_mut().zip(key_value(position).1) {
                        *o += (s - max).exp() / total * *v as f64;
                    }
                }
                let to = (row * num_heads + head) * head_dim;
                for (o, s) in out[to..to + head_dim].iter_mut().zip(&sum) {
                    *o = *s as f32;
                }
            }
        }
        first += span.rows();
    }
}
