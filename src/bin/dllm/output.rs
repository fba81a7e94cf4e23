//! What leaves the program: stdout, notes on stderr, files that are whole or not there, and the reaction to Ctrl-C.

use crate::screen::{self, tame};
use dllm_kernels::{Error, Result};
use std::fmt::Arguments;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Set by Ctrl-C, and when nobody reads the answer any more. Decodes end before their next forward.
pub static INTERRUPT: AtomicBool = AtomicBool::new(false);

/// From here on the first Ctrl-C asks the decode to end, and the second ends the process. To be called just before the
/// work that looks at [`INTERRUPT`], and before anything is said of it.
pub fn catch_interrupts() {
    // Where no handler can be installed, Ctrl-C ends the process as it always does.
    let _ = ctrlc::set_handler(|| {
        if INTERRUPT.swap(true, Ordering::Relaxed) {
            screen::restore();
            std::process::exit(130);
        }
    });
}

/// Whether the decode is to end.
pub fn interrupted() -> bool {
    INTERRUPT.load(Ordering::Relaxed)
}

/// A line on stderr, tame on a terminal. That nobody reads it is no reason to stop.
pub fn note(line: Arguments) {
    let mut stderr = io::stderr().lock();
    let line = shown(line.to_string(), stderr.is_terminal());
    let _ = writeln!(stderr, "{line}");
}

/// Writes to stdout, at once: as it is into a file or pipe, tame onto a terminal.
pub fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    let text = shown(text.into(), stdout.is_terminal());
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    written.map_err(|source| Error::Io { path: PathBuf::from("stdout"), source })
}

/// One JSON value on stdout, over several lines.
pub fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::Unavailable(format!("JSON output: {e}")))?;
    print(&format!("{text}\n"))
}

/// Models and their files are not trusted with the control characters of a terminal.
fn shown(text: String, terminal: bool) -> String {
    if terminal { tame(&text) } else { text }
}

/// Whether this only says that the reader of stdout has gone.
pub fn is_closed_pipe(error: &Error) -> bool {
    matches!(error, Error::Io { path, source } if path.as_os_str() == "stdout" && source.kind() == ErrorKind::BrokenPipe)
}

/// Where a result is to be written: found unfit before the work, written whole after it.
pub enum Target {
    /// A regular file, by way of a temporary one beside it.
    File(PathBuf),
    /// A pipe or device, which must not be replaced by a file.
    Stream(PathBuf),
}

impl Target {
    /// Checks that the file can be written.
    pub fn new(path: &Path) -> Result<Target> {
        // What a link points at is what gets replaced.
        let path = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        match path.metadata() {
            Ok(found) if found.is_dir() => {
                let source = io::Error::new(ErrorKind::IsADirectory, "expected a file, found a directory");
                return Err(Error::Io { path, source });
            }
            Ok(found) if !found.is_file() => return Ok(Target::Stream(path)),
            _ => {}
        }
        // Made and removed again: a process that is killed during the work leaves nothing behind.
        temporary(&path)?;
        Ok(Target::File(path))
    }

    /// Writes all of it, or leaves what was there.
    pub fn write(&self, contents: &str) -> Result<()> {
        match self {
            Target::File(path) => {
                let mut file = temporary(path)?;
                let written = file.write_all(contents.as_bytes()).and_then(|()| file.as_file().sync_all());
                written.map_err(io_error(path))?;
                file.persist(path).map_err(|e| io_error(path)(e.error))?;
                Ok(())
            }
            Target::Stream(path) => {
                let mut stream = std::fs::OpenOptions::new().write(true).open(path).map_err(io_error(path))?;
                stream.write_all(contents.as_bytes()).map_err(io_error(path))
            }
        }
    }
}

/// A file beside `path`, so that it can be renamed to it.
fn temporary(path: &Path) -> Result<tempfile::NamedTempFile> {
    let dir = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !dir.is_dir() {
        return Err(io_error(path)(io::Error::new(ErrorKind::NotFound, "its directory does not exist")));
    }
    let mut builder = tempfile::Builder::new();
    builder.prefix(".dllm-").suffix(".tmp");
    // What any new file gets; by default temporary files are closed to others.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(dir).map_err(io_error(path))
}

/// What a failed access to `path` is as an error.
pub fn io_error(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_path_buf();
    move |source| Error::Io { path, source }
}
