//! V-verify (dLLM-Cache section 3.3): which response tokens changed most since the previous step.

/// Guards the division for zero vectors.
const EPS: f64 = 1e-8;

/// Cosine similarity of two vectors.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>();
    dot(a, b) / (dot(a, a).sqrt().max(EPS) * dot(b, b).sqrt().max(EPS))
}

/// The `floor(n * ratio)` rows of `fresh` (`[n, width]`) whose cosine with the same row of `cached` is lowest, in
/// position order. Ties go to the lower index.
pub fn vverify(fresh: &[f32], cached: &[f32], width: usize, ratio: f64) -> Vec<usize> {
    let rows = fresh.chunks_exact(width).zip(cached.chunks_exact(width));
    let similarity: Vec<f64> = rows.map(|(a, b)| cosine(a, b)).collect();
    let mut order: Vec<usize> = (0..similarity.len()).collect();
    order.sort_by(|a, b| similarity[*a].total_cmp(&similarity[*b]));
    order.truncate((similarity.len() as f64 * ratio) as usize);
    order.sort_unstable();
    order
}
