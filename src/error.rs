//! The one error type of the crate. Every message names the thing (file, tensor, flag), what was expected and
//! what was found.

use std::path::PathBuf;

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or directory could not be read, mapped or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The operating system's word.
        source: std::io::Error,
    },
    /// A file was read but does not hold what its format promises.
    #[error("{}: {message}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A key of a checkpoint's configuration is missing, or asks for something this crate does not compute.
    #[error("{}: \"{key}\": expected {expected}, found {found}", path.display())]
    Config {
        /// The configuration file.
        path: PathBuf,
        /// The key in it.
        key: String,
        /// What this crate can work with.
        expected: String,
        /// What the file says.
        found: String,
    },
    /// A tensor of a checkpoint is missing or has the wrong shape or element type.
    #[error("{}: tensor \"{tensor}\": expected {expected}, found {found}", path.display())]
    Tensor {
        /// The checkpoint directory or shard.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Shape or element type that the configuration asks for.
        expected: String,
        /// Shape or element type in the file.
        found: String,
    },
    /// An argument of the caller is out of its range, or does not fit the model or the other arguments.
    #[error("{name}: expected {expected}, found {found}")]
    Argument {
        /// The argument, by the name that the command line and the builder share.
        name: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What was given.
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
        /// Forward passes that this sequence had taken part in before.
        step: usize,
    },
    /// The tokenizer or chat template of a checkpoint failed.
    #[error("{}: {message}", path.display())]
    Tokenizer {
        /// The tokenizer file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// The CUDA driver refused a call, or reports that earlier work failed.
    #[error("{call}: {name}: {message}")]
    Driver {
        /// The driver's function.
        call: &'static str,
        /// The driver's name of the error.
        name: String,
        /// The driver's word.
        message: String,
    },
    /// The driver refused a kernel module.
    #[error("kernel module {module}: {error}; the driver's log: {log}")]
    Module {
        /// Its name and what it was compiled for.
        module: String,
        /// The refused call.
        error: String,
        /// What the driver's compiler said.
        log: String,
    },
    /// The device or mode that was asked for is not there.
    #[error("{0}")]
    Unavailable(String),
}

impl Error {
    pub(crate) fn argument(name: &'static str, expected: impl Into<String>, found: impl ToString) -> Self {
        Error::Argument { name, expected: expected.into(), found: found.to_string() }
    }

    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Error::Io { path, source }
    }
}
