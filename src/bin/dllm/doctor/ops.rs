//! Every op at two shapes: one as a model has it, and one whose sizes and contents are awkward.

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

/// All checks; `small` ones take seconds on the software device.
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

/// The real size, or the small one.
fn pick<T>(small: bool, real: T, little: T) -> T {
    if small { little } else { real }
}
