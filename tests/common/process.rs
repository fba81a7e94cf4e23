//! Child processes of tests. A child that runs too long is killed, and its test fails with the command and what it said.

use std::io::Read;
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Time limit of a child. The slowest takes a few seconds on a machine of its own.
pub const LIMIT: Duration = Duration::from_secs(120);

/// Runs a command to its end, as `Command::output`, within [`LIMIT`].
#[track_caller]
pub fn run(command: &mut Command) -> Output {
    run_within(LIMIT, command)
}

/// Runs a command to its end, as `Command::output`, within `limit`.
#[track_caller]
pub fn run_within(limit: Duration, command: &mut Command) -> Output {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    Process::spawn_within(limit, command).output()
}

/// A running child. It is killed when it exceeds its time limit, and when this value is dropped before its end, so that a test that
/// fails leaves no process.
pub struct Process {
    child: Arc<Mutex<Child>>,
    command: String,
    limit: Duration,
    expired: Arc<AtomicBool>,
    /// Dropped to end the watch.
    watch: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Process {
    /// Starts a command that may run for [`LIMIT`].
    #[track_caller]
    pub fn spawn(command: &mut Command) -> Process {
        Process::spawn_within(LIMIT, command)
    }

    #[track_caller]
    fn spawn_within(limit: Duration, command: &mut Command) -> Process {
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let (child, expired) = (Arc::new(Mutex::new(child)), Arc::new(AtomicBool::new(false)));
        let (stop, stopped) = channel();
        let (watched, flag) = (child.clone(), expired.clone());
        let watch = std::thread::spawn(move || {
            if stopped.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                flag.store(true, Ordering::SeqCst);
                // Its end closes the pipes, which ends every read of the test.
                let _ = watched.lock().unwrap().kill();
            }
        });
        let command = format!("{command:?}");
        Process { child, command, limit, expired, watch: Some((stop, watch)) }
    }

    /// Takes the child's stdout, which must be a pipe.
    pub fn stdout(&self) -> ChildStdout {
        self.child.lock().unwrap().stdout.take().unwrap()
    }

    /// Takes the child's stderr, which must be a pipe.
    pub fn stderr(&self) -> ChildStderr {
        self.child.lock().unwrap().stderr.take().unwrap()
    }

    /// Sends the signal of Ctrl-C.
    #[cfg(unix)]
    pub fn interrupt(&self) {
        let id = self.child.lock().unwrap().id().to_string();
        assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    }

    /// Returns the status of a child that has ended.
    pub fn try_wait(&self) -> Option<ExitStatus> {
        self.child.lock().unwrap().try_wait().unwrap()
    }

    /// Waits for the end. Panics when the time limit is exceeded.
    #[track_caller]
    pub fn wait(self) -> ExitStatus {
        self.output().status
    }

    /// Waits for the end, and reads the pipes that were not taken. Panics when the time limit is exceeded.
    #[track_caller]
    pub fn output(self) -> Output {
        let (stdout, stderr) = {
            let mut child = self.child.lock().unwrap();
            (collect(child.stdout.take()), collect(child.stderr.take()))
        };
        let status = loop {
            // Not `wait`, which would hold the lock that the watch needs.
            match self.try_wait() {
                Some(status) => break status,
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        let (stdout, stderr) = (stdout.join().unwrap(), stderr.join().unwrap());
        let late = self.expired.swap(false, Ordering::SeqCst);
        let said = String::from_utf8_lossy(&stderr);
        assert!(!late, "killed after {:?}: {}; its stderr: {said}", self.limit, self.command);
        Output { status, stdout, stderr }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let mut child = self.child.lock().unwrap();
        if let Ok(None) = child.try_wait() {
            let _ = child.kill();
            let _ = child.wait();
        }
        drop(child);
        if let Some((stop, watch)) = self.watch.take() {
            drop(stop);
            let _ = watch.join();
        }
        // The panic of a test that read from the killed child does not say why there was nothing to read.
        if std::thread::panicking() && self.expired.load(Ordering::SeqCst) {
            eprintln!("killed after {:?}: {}", self.limit, self.command);
        }
    }
}

/// Reads a stream to its end in a thread, so that a full pipe cannot block the child.
fn collect(stream: Option<impl Read + Send + 'static>) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            stream.read_to_end(&mut bytes).unwrap();
        }
        bytes
    })
}
