//! A checkpoint and its forward pass: configuration, mapped weights, and the transformer over a [`crate::backend::Backend`].

pub mod config;
mod family;
mod forward;
mod names;
mod plan;
mod query_rows;
mod random;
mod session;
mod session_config;
mod transformer;
pub mod weights;

pub use config::Config;
pub use family::Family;
pub use plan::{CachePlan, LayerPlan, SelectedRows};
pub use query_rows::QueryRows;
pub use session::{Session, logit_row_for};
pub use session_config::SessionConfig;
pub use transformer::Transformer;
pub use weights::Weights;
