//! Output: results on stdout, notes on stderr, files written atomically, and the handling of Ctrl-C.

use crate::screen::{self, sanitize};
use dllm_kernels::{Error, Result};
use std::fmt::Arguments;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Flag that ends a decode before its next forward. Set by Ctrl-C, and when the reader of stdout has gone.
pub static INTERRUPT: AtomicBool = AtomicBool::new(false);

/// Installs a handler of Ctrl-C: the first sets [`INTERRUPT`], the second ends the process. Call it just before the work
/// that checks the flag, and before the first note about that work.
pub fn catch_interrupts() {
    // If no handler can be installed, Ctrl-C ends the process as usual.
    let _ = ctrlc::set_handler(|| {
        if INTERRUPT.swap(true, Ordering::Relaxed) {
            screen::restore();
            std::process::exit(130);
        }
    });
}

/// Returns whether the decode is to end.
pub fn interrupted() -> bool {
    INTERRUPT.load(Ordering::Relaxed)
}

/// Writes a line to stderr, sanitized on a terminal. A failure is ignored.
pub fn note(line: Arguments) {
    let mut stderr = io::stderr().lock();
    let line = for_terminal(line.to_string(), stderr.is_terminal());
    let _ = writeln!(stderr, "{line}");
}

/// Writes text to stdout and flushes it: unchanged to a file or pipe, sanitized on a terminal.
pub fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    let text = for_terminal(text.into(), stdout.is_terminal());
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    written.map_err(|source| Error::Io { path: PathBuf::from("stdout"), source })
}

/// Writes a JSON value to stdout, indented.
pub fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::Unavailable(format!("JSON output: {e}")))?;
    print(&format!("{text}\n"))
}

/// Sanitizes text for a terminal: models and their files are not trusted with its control characters.
fn for_terminal(text: String, terminal: bool) -> String {
    if terminal { sanitize(&text) } else { text }
}

/// Returns whether the error says that the reader of stdout has gone.
pub fn is_closed_pipe(error: &Error) -> bool {
    matches!(error, Error::Io { path, source } if path.as_os_str() == "stdout" && source.kind() == ErrorKind::BrokenPipe)
}

/// File for a result. It is checked before the work, and written in whole after it.
pub enum OutputFile {
    /// Regular file, replaced by a temporary one of the same directory.
    File(PathBuf),
    /// Pipe or device, which must not be replaced by a file.
    Stream(PathBuf),
}

impl OutputFile {
    /// Checks that a file can be written at `path`.
    ///
    /// # Errors
    /// [`Error::Io`] for a directory, or when its directory is missing or not writable.
    pub fn new(path: &Path) -> Result<OutputFile> {
        // Replace the target of a link, not the link.
        let path = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        match path.metadata() {
            Ok(found) if found.is_dir() => {
                let source = io::Error::new(ErrorKind::IsADirectory, "expected a file, found a directory");
                return Err(Error::Io { path, source });
            }
            Ok(found) if !found.is_file() => return Ok(OutputFile::Stream(path)),
            _ => {}
        }
        // Created and removed at once, so that a process killed during the work leaves no file.
        temporary(&path)?;
        Ok(OutputFile::File(path))
    }

    /// Writes the contents. On an error a regular file keeps its old contents.
    pub fn write(&self, contents: &str) -> Result<()> {
        match self {
            OutputFile::File(path) => {
                let mut file = temporary(path)?;
                let written = file.write_all(contents.as_bytes()).and_then(|()| file.as_file().sync_all());
                written.map_err(io_error(path))?;
                file.persist(path).map_err(|e| io_error(path)(e.error))?;
                Ok(())
            }
            OutputFile::Stream(path) => {
                let mut stream = std::fs::OpenOptions::new().write(true).open(path).map_err(io_error(path))?;
                stream.write_all(contents.as_bytes()).map_err(io_error(path))
            }
        }
    }
}

/// Creates a temporary file in the directory of `path`, so that it can be renamed to `path`.
fn temporary(path: &Path) -> Result<tempfile::NamedTempFile> {
    let dir = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !dir.is_dir() {
        return Err(io_error(path)(io::Error::new(
            ErrorKind::NotFound,
            "expected an existing directory, found none; create it first",
        )));
    }
    let mut builder = tempfile::Builder::new();
    builder.prefix(".dllm-").suffix(".tmp");
    // The mode of an ordinary new file; temporary files are private by default.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(dir).map_err(io_error(path))
}

/// Returns the conversion of an I/O error at `path`.
pub fn io_error(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_path_buf();
    move |source| Error::Io { path, source }
}
