//! Checks of every op at two shapes: that of a model, and one with odd sizes and special contents.

mod advance;
mod attention;
mod embed;
mod gather_scatter;
mod merge_state;
mod norm;
mod product;
mod rope;
mod swiglu;
mod top_k_top_p;
mod unmask;
mod vverify;

use super::case::Entry;

/// Returns all checks. The `small` ones take seconds on the CUDA emulator.
pub fn all(small: bool) -> Vec<Entry> {
    [
        attention::entries,
        merge_state::entries,
        unmask::entries,
        top_k_top_p::entries,
        advance::entries,
        vverify::entries,
    ]
    .into_iter()
    .chain([gather_scatter::entries, embed::entries, norm::entries, rope::entries, swiglu::entries, product::entries])
    .flat_map(|entries: fn(bool) -> Vec<Entry>| entries(small))
    .collect()
}

/// Returns the size of a small check, or that of a model.
fn pick<T>(small: bool, model_size: T, small_size: T) -> T {
    if small { small_size } else { model_size }
}
