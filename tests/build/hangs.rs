//! A test that hangs ends its program within the limit, with a message.
#![cfg(target_os = "linux")]

use std::process::Command;
use std::time::{Duration, Instant};

/// Environment variable of the child process, whose test then never ends.
const HANG: &str = "DLLM_TEST_HANG";

#[test]
#[ignore = "runs in the process that the other test of this file starts"]
fn endless() {
    while std::env::var_os(HANG).is_some() {
        std::hint::spin_loop();
    }
}

#[test]
fn a_test_that_hangs_is_ended() {
    for threads in ["1", "2"] {
        let start = Instant::now();
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "hangs::endless", "--ignored", "--test-threads", threads])
            .env(HANG, "1")
            .env("DLLM_TEST_LIMIT_S", "1")
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{error}");
        assert!(error.contains("no test of this program has ended for 1 s"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    }
}
