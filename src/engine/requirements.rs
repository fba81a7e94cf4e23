//! Properties of a decode that some engines do not support, and the checks of the engines.

#[cfg(feature = "cuda")]
use crate::error::{Error, Result};

/// Properties of a decode that some engines do not support. The caller fills the fields; an engine checks them before any
/// work.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EngineRequirements {
    /// Temperature of token sampling; 0 for none.
    pub temperature: f64,
    /// Temperature of the order in which tokens are committed; 0 for none.
    pub alg_temp: f64,
    /// Fast-dLLM's factor, if that is the policy.
    pub factor: Option<f64>,
}

impl EngineRequirements {
    /// Checks the decode for the CUDA engine, whose kernels compute confidences, temperatures and factors in f32.
    ///
    /// # Errors
    /// [`Error::Argument`] names the option that f32 cannot represent.
    #[cfg(feature = "cuda")]
    pub(super) fn check_cuda(&self) -> Result<()> {
        for (name, value) in [("temperature", self.temperature), ("alg-temp", self.alg_temp)] {
            if value != 0.0 && !(1e-6..=1e6).contains(&value) {
                return Err(Error::argument(name, "0, or on a CUDA device 1e-6 to 1e6", value));
            }
        }
        match self.factor {
            Some(factor) if factor as f32 == 0.0 || !(factor as f32).is_finite() => {
                Err(Error::argument("factor", "on a CUDA device a number above 0 in f32", factor))
            }
            _ => Ok(()),
        }
    }
}
