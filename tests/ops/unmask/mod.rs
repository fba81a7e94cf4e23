//! Compares the kernels unmask and top_k_top_p, launched by the shipped code, with the reference in f64.

mod case;
mod check;
mod commits;
mod confidences;
mod filters;
mod golden;
mod launches;
mod logits;
