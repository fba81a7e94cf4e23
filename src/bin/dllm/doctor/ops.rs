//! Every op at two shapes: one as a model has it, and one whose sizes and contents are awkward.

mod advance;
mod attention;
mod cut;
mod embed;
mod merge;
mod norm;
mod product;
mod rope;
mod rows;
mod swiglu;
mod unmask;
mod vverify;

use super::case::Entry;

/// All checks; `small` ones take seconds on the software device.
pub fn all(small: bool) -> Vec<Entry> {
    [attention::entries, merge::entries, unmask::entries, cut::entries, advance::entries, vverify::entries]
        .into_iter()
        .chain([rows::entries, embed::entries, norm::entries, rope::entries, swiglu::entries, product::entries])
        .flat_map(|entries: fn(bool) -> Vec<Entry>| entries(small))
        .collect()
}

/// The real size, or the small one.
fn pick<T>(small: bool, real: T, little: T) -> T {
    if small { little } else { real }
}
