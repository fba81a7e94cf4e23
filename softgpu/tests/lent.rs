//! Child processes that use the emulator without any code of their own: this test program, started again.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaContext, DriverError};
use std::path::Path;
use std::process::{Command, Output};

/// Environment variable with the task of the child.
const TASK: &str = "SOFTGPU_TEST_TASK";

/// Not a test itself: the code that the children run. It uses cudarc only.
#[test]
fn child() {
    let Ok(task) = std::env::var(TASK) else { return };
    // SAFETY: only asks the system's loader.
    let has_driver = unsafe { cudarc::driver::sys::is_culib_present() };
    if task == "no device" {
        assert!(!softgpu::active());
        return;
    }
    assert!(has_driver && !softgpu::active());
    let opened = CudaContext::new(0);
    if task == "no kernels" {
        assert_eq!(opened.err().map(|DriverError(code)| code), Some(CUresult::CUDA_ERROR_NOT_FOUND));
        return;
    }
    let context = opened.unwrap();
    println!("device: {}", context.name().unwrap());
    // SAFETY: before the first allocation.
    unsafe { context.disable_event_tracking() };
    let gpu = common::Gpu { stream: context.new_stream().unwrap(), context };
    let saxpy = gpu.function(common::entry("saxpy", &[4, 4, 8, 8]));
    let x = gpu.stream.clone_htod(&[1.0f32; 64]).unwrap();
    let y = gpu.stream.clone_htod(&[2.0f32; 64]).unwrap();
    let threads = if task == "misuse" { 65i32 } else { 64 };
    let work = || common::code(launch!(gpu, saxpy, common::shape(1, 128), &threads, &3f32, &x, &y));
    // The report of a thread that has ended is kept too.
    let code = std::thread::scope(|scope| {
        let in_thread = scope.spawn(|| {
            gpu.context.bind_to_thread().unwrap();
            work()
        });
        in_thread.join().unwrap()
    });
    if task == "misuse" {
        assert_eq!(code, CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    } else {
        assert_eq!(code, CUresult::CUDA_SUCCESS);
        assert_eq!(gpu.stream.clone_dtoh(&y).unwrap(), [5.0; 64]);
    }
}

fn run(task: &str, report: &Path, change: impl FnOnce(&mut Command)) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--nocapture"]).env(TASK, task);
    softgpu::lend(&mut command, report);
    change(&mut command);
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Returns a path for a report; no file exists there.
fn report(name: &str) -> std::path::PathBuf {
    let path = std::env::temp_dir().join(format!("softgpu-{name}-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    path
}

fn take(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap();
    std::fs::remove_file(path).unwrap();
    text
}

#[test]
fn kernels_run_in_a_child() {
    let report = report("well");
    let output = run("use it", &report, |_| {});
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("device: software device 9.0"), "{}", text(&output.stdout));
    assert_eq!(take(&report), "", "started, and nothing wrong");

    let output = run("use it", &report, |command| {
        command.env("SOFTGPU_CC", "8.0").env("SOFTGPU_SEED", "3");
    });
    assert!(text(&output.stdout).contains("device: software device 8.0"), "{}", text(&output.stdout));
    assert!(output.status.success() && take(&report).is_empty(), "{}", text(&output.stderr));
}

#[test]
fn misuse_in_a_child_is_reported() {
    let report = report("misuse");
    let output = run("misuse", &report, |_| {});
    assert!(output.status.success(), "{}", text(&output.stderr));
    let lines = take(&report);
    assert!(lines.contains("saxpy: block (0,0,0) thread (64,0,0): touched") && lines.ends_with('\n'), "{lines}");
    assert!(text(&output.stderr).contains("softgpu: saxpy: block"), "{}", text(&output.stderr));
}

#[test]
fn kernels_that_are_not_there_are_an_error() {
    let report = report("kernels");
    let output = run("no kernels", &report, |command| {
        command.env("SOFTGPU_KERNELS", "/nowhere/libkernels.so");
    });
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(take(&report).starts_with("no kernels: /nowhere/libkernels.so: "));
}

#[test]
fn without_use_there_is_no_report() {
    let report = report("unused");
    let output = run("no device", &report, |_| {});
    assert!(output.status.success() && !report.exists(), "{}", text(&output.stderr));
}
