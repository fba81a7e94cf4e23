//! C and C++ compilers accept `cuda/include/dllm_kernels.h` on its own, without a warning. The header asserts the sizes of
//! its structs; `src/abi.rs` asserts the same on the Rust side.

use std::env;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// Compiles a file that includes only the header, twice, to check its include guard.
fn compile(compiler: &str, language: &str, standard: &str) {
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda/include");
    let mut child = Command::new(compiler)
        .args(["-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", standard, "-x", language, "-I"])
        .args([include.as_os_str(), "-".as_ref()])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{compiler}, which this test needs, cannot be run: {e}"));
    let source = b"#include \"dllm_kernels.h\"\n#include \"dllm_kernels.h\"\nint unused;\n";
    child.stdin.take().expect("stdin is a pipe").write_all(source).expect("the compiler reads");
    let output = child.wait_with_output().expect("the compiler ends");
    assert!(output.status.success(), "{compiler} {standard}:\n{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn header_is_c() {
    let compiler = env::var("CC").unwrap_or("gcc".into());
    for standard in ["-std=c11", "-std=c17"] {
        compile(&compiler, "c", standard);
    }
}

#[test]
fn header_is_cpp() {
    let compiler = env::var("CXX").unwrap_or("g++".into());
    for standard in ["-std=c++11", "-std=c++17", "-std=c++20"] {
        compile(&compiler, "c++", standard);
    }
}
