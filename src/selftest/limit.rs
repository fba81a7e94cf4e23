//! A time limit for tests: a test program in which no test ends for too long is aborted with a message.
//!
//! Rust's test harness has no limit of its own. Each test program includes this file, whose constructor starts a thread that watches
//! the bytes that the process writes: the harness writes a line for every test that ends. Linux only.
//!
//! `DLLM_TEST_LIMIT_S` sets another limit in seconds; 0 is none, for debuggers.

#![cfg(target_os = "linux")]

use std::time::{Duration, Instant};

/// Limits of runs without and with ignored tests, which are long. On two cores the slowest tests take 20 s and 200 s.
const DEFAULT_S: [u64; 2] = [300, 1200];

// SAFETY: the loader calls the functions of this section once, before `main`, with arguments that a C function may ignore.
#[used]
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = start;

extern "C" fn start() {
    let includes_ignored = std::env::args().any(|arg| matches!(arg.as_str(), "--ignored" | "--include-ignored"));
    let seconds = match std::env::var("DLLM_TEST_LIMIT_S") {
        Ok(value) => value.parse().unwrap_or_else(|_| {
            eprintln!("DLLM_TEST_LIMIT_S: expected seconds, found {value:?}");
            std::process::exit(2)
        }),
        Err(_) => DEFAULT_S[usize::from(includes_ignored)],
    };
    if seconds > 0 {
        std::thread::spawn(move || watch(Duration::from_secs(seconds)));
    }
}

/// Aborts the process when it has written nothing for the time of `limit`.
fn watch(limit: Duration) {
    let (mut written, mut since) = (None, Instant::now());
    loop {
        std::thread::sleep(Duration::from_millis(200));
        let now = bytes_written();
        if now != written {
            (written, since) = (now, Instant::now());
        } else if since.elapsed() >= limit {
            eprintln!(
                "\nno test of this program has ended for {} s, the limit (DLLM_TEST_LIMIT_S): a test hangs. It is the one that \
                 \"has been running for over 60 seconds\", or, with --test-threads=1, the last one of the list.",
                limit.as_secs()
            );
            std::process::abort();
        }
    }
}

/// Returns the number of bytes that this process has written, `None` where the system does not count them.
fn bytes_written() -> Option<u64> {
    let counters = std::fs::read_to_string("/proc/self/io").ok()?;
    counters.lines().find_map(|line| line.strip_prefix("wchar: "))?.parse().ok()
}
