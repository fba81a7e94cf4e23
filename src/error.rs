//! The error type of the crate. Each message names the thing (file, tensor, argument), the expected and the found value.

use std::path::PathBuf;

/// Result of the crate's fallible functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Error of any function of the crate. `Display` gives one line, without a final stop.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or directory could not be read, mapped or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// A file was read, but its contents violate its format.
    #[error("{}: {message}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Description of the violation.
        message: String,
    },
    /// A key of a checkpoint's configuration is missing, or requests something that this crate does not compute.
    #[error("{}: \"{key}\": expected {expected}, found {found}", path.display())]
    Config {
        /// The configuration file.
        path: PathBuf,
        /// The key in it.
        key: String,
        /// Values that this crate supports.
        expected: String,
        /// Value in the file.
        found: String,
    },
    /// A tensor of a checkpoint is missing or has the wrong shape or element type.
    #[error("{}: tensor \"{tensor}\": expected {expected}, found {found}", path.display())]
    Tensor {
        /// The checkpoint directory or shard.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Shape or element type that the configuration requires.
        expected: String,
        /// Shape or element type in the file.
        found: String,
    },
    /// An argument is out of range, or does not fit the model or the other arguments.
    #[error("{name}: expected {expected}, found {found}")]
    Argument {
        /// The argument, by the name that the command line and the builder share. For ops: the field of the parameters.
        name: &'static str,
        /// Values that are accepted.
        expected: String,
        /// Value that was given.
        found: String,
    },
    /// A row of logits has no finite entry, so no token can be chosen from it.
    #[error(
        "sequence {sequence}, position {position}, forward {step}: no finite logit; the weights or an activation hold NaN or infinity"
    )]
    NoFiniteLogit {
        /// Index of the sequence in the batch.
        sequence: usize,
        /// Position in that sequence, prompt included.
        position: usize,
        /// Number of forward passes that this sequence took part in before.
        step: usize,
    },
    /// The tokenizer or chat template of a checkpoint failed.
    #[error("{}: {message}", path.display())]
    Tokenizer {
        /// The tokenizer file.
        path: PathBuf,
        /// Description of the failure.
        message: String,
    },
    /// There is not enough memory. No work was done, and nothing stays allocated.
    #[error("{what} need {}{memory}; {}", mebibytes(*needed_bytes), shortage(*free_bytes, cause))]
    OutOfMemory {
        /// The things that need the memory, in the plural: `the weights`.
        what: String,
        /// Kind of memory: `memory` is that of this machine; `the device's memory`.
        memory: &'static str,
        /// Bytes that `what` needs; `None` when the number is not known.
        needed_bytes: Option<u64>,
        /// Bytes that are free; `None` when the system does not report them, or when an allocation failed.
        free_bytes: Option<u64>,
        /// Error of the allocation that failed; empty when nothing was allocated because too few bytes are free.
        cause: String,
    },
    /// A model shape, batch size, device or driver is outside of what the CUDA kernels or this build support.
    #[error("{what} need {expected}, found {found}")]
    Unsupported {
        /// The things with the limit, in the plural: `the CUDA kernels`.
        what: String,
        /// The requirement, with the name of the size: `head_dim to be 32, 64 or 128`.
        expected: String,
        /// Value that was found.
        found: String,
    },
    /// There is no CUDA driver, no device with the given number, or the device is too old for the kernels.
    #[error("{0}")]
    NoDevice(String),
    /// The CUDA driver or a CUDA library refused a call, or reports that earlier work failed.
    #[error("{call}: {name}: {message}")]
    Driver {
        /// The called function.
        call: &'static str,
        /// The driver's name of the error.
        name: String,
        /// The driver's description of the error.
        message: String,
    },
    /// The driver refused a kernel module.
    #[error("kernel module {module}: {error}; the driver's log: {log}")]
    Module {
        /// The module's name and compilation target.
        module: String,
        /// The refused call.
        error: String,
        /// Log of the driver's compiler.
        log: String,
    },
    /// The call cannot be served in the present state: a library is not installed, an environment variable has an unknown
    /// value, the stream is being captured, or work was interrupted.
    #[error("{0}")]
    Unavailable(String),
}

impl Error {
    /// Returns an [`Error::Argument`] for the argument `name`: `{name}: expected {expected}, found {found}`.
    pub fn argument(name: &'static str, expected: impl Into<String>, found: impl ToString) -> Self {
        Error::Argument { name, expected: expected.into(), found: found.to_string() }
    }

    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Error::Io { path, source }
    }

    /// Returns an [`Error::Unsupported`] with `{name} to be {expected}` as the requirement of the CUDA kernels.
    #[cfg(feature = "cuda")]
    pub(crate) fn unsupported(name: &str, expected: &str, found: impl ToString) -> Self {
        let expected = format!("{name} to be {expected}");
        Error::Unsupported { what: "the CUDA kernels".into(), expected, found: found.to_string() }
    }
}

fn mebibytes(bytes: Option<u64>) -> String {
    bytes.map_or(String::new(), |bytes| format!("{} MiB of ", (bytes >> 20).max(1)))
}

fn shortage(free_bytes: Option<u64>, cause: &str) -> String {
    match free_bytes {
        Some(free) => format!("{} MiB are free", free >> 20),
        None if cause.is_empty() => "the allocation failed".into(),
        None => cause.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::Error;

    #[test]
    fn shortages_of_memory_have_their_numbers() {
        let error = |memory, needed_bytes, free_bytes, cause: &str| {
            let (what, cause) = ("the weights".into(), cause.into());
            Error::OutOfMemory { what, memory, needed_bytes, free_bytes, cause }.to_string()
        };
        let device = "the device's memory";
        let refused = "cuMemAllocAsync: CUDA_ERROR_OUT_OF_MEMORY: out of memory";
        assert_eq!(
            error(device, Some(5 << 20), Some((3 << 20) + 1), ""),
            "the weights need 5 MiB of the device's memory; 3 MiB are free"
        );
        assert_eq!(
            error(device, Some(1000), None, refused),
            format!("the weights need 1 MiB of the device's memory; {refused}")
        );
        assert_eq!(error("memory", Some(7 << 20), None, ""), "the weights need 7 MiB of memory; the allocation failed");
        assert_eq!(error("pinned memory", None, None, "no"), "the weights need pinned memory; no");
    }
}
