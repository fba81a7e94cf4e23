//! One case per op: inputs of a shape, launch, and comparison of the results with the reference. `dllm doctor`, the benchmarks and
//! the tests share them. Nothing else uses this module.

pub mod advance;
pub mod attention;
mod bound;
mod case;
pub mod embed;
mod float;
pub mod gather_scatter;
pub mod merge_state;
pub mod norm;
pub mod product;
mod random;
pub mod rope;
pub mod swiglu;
pub mod top_k_top_p;
pub mod unmask;
pub mod vverify;

pub use bound::{ErrorBound, broken, number};
pub use case::{Case, Entry, HostDevice, Output, Rows, Words, count_or};
pub use float::{Float, narrowed, widened};
pub use random::Random;

/// Returns the checks of `dllm doctor`: every op at the shape of a model, and at one with odd sizes and special contents. The
/// `small` ones take seconds on the CUDA emulator.
pub fn entries(small: bool) -> Vec<Entry> {
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
