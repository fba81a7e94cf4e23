//! `dllm doctor` as a process, on the CUDA emulator and without a device.

use crate::common::process::run_within;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

/// Ops of the report, each at two shapes.
const OPS: [&str; 12] = [
    "attention",
    "merge_state",
    "unmask",
    "top_k_top_p",
    "advance",
    "vverify",
    "gather_scatter",
    "embed",
    "norm",
    "rope",
    "swiglu",
    "product",
];

/// Time limit of a child: every op on the emulator, or a compiler.
const LIMIT: Duration = Duration::from_secs(300);

fn doctor(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dllm"));
    command.arg("doctor").args(args);
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Runs `dllm doctor` on the CUDA emulator. Returns its output and the report of the emulator.
fn on_emulator(args: &[&str], change: impl FnOnce(&mut Command)) -> (Output, String) {
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report");
    let mut command = doctor(args);
    softgpu::lend(&mut command, &report);
    change(&mut command);
    let output = run_within(LIMIT, &mut command);
    let report =
        std::fs::read_to_string(&report).unwrap_or_else(|error| panic!("the emulator was not started: {error}"));
    (output, report)
}

#[test]
fn every_op_passes() {
    let (output, report) = on_emulator(&[], |_| {});
    let shown = text(&output.stdout);
    assert_eq!((output.status.code(), report.as_str()), (Some(0), ""), "{shown}{}", text(&output.stderr));
    for op in OPS {
        let rows: Vec<_> = shown.lines().filter(|line| line.split(' ').next() == Some(op)).collect();
        assert_eq!(rows.len(), 2, "{op}: {shown}");
        assert!(rows.iter().all(|row| row.ends_with("  ok")), "{shown}");
    }
    for part in [
        "PTX 8.0, sources ",
        "driver   CUDA 13.0\n",
        "0: software device 9.0, compute capability 9.0, 8.0 GiB",
        "loads    compute_80 (the only one): advance, attention, embed,",
        "This is a CUDA emulator: results are checked, times are meaningless and left out.",
        "all ok: 24 checks",
    ] {
        assert!(shown.contains(part), "{part:?} in {shown}");
    }
    for number in ["GB/s", "TFLOP/s", "us, cold", "% of roof"] {
        assert!(!shown.contains(number), "{number} in {shown}");
    }
}

#[test]
fn other_thread_orders_and_an_older_device_pass() {
    for seed in ["1", "2"] {
        let (output, report) = on_emulator(&["--small"], |command| {
            command.env("SOFTGPU_SEED", seed).env("SOFTGPU_CC", "8.0").env("SOFTGPU_LAZY", "1");
        });
        let shown = text(&output.stdout);
        assert_eq!((output.status.code(), report.as_str()), (Some(0), ""), "{shown}{}", text(&output.stderr));
        assert!(shown.contains("compute capability 8.0") && shown.contains("all ok"), "{shown}");
    }
}

#[test]
fn json_is_one_complete_object() {
    let (output, _) = on_emulator(&["--json"], |_| {});
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["verdict"], "ok");
    assert_eq!((&json["software"], &json["device"], &json["error"]), (&true.into(), &0.into(), &Value::Null));
    assert_eq!(json["machine"]["cuda"], "13.0");
    assert_eq!(json["machine"]["devices"][0]["capability"], "9.0");
    assert_eq!(json["read_gb_per_s"], Value::Null);
    let modules = json["modules"].as_array().unwrap();
    assert_eq!(modules.len(), json["build"]["modules"].as_array().unwrap().len());
    assert!(modules.iter().all(|module| module["target"] == "compute_80"), "{json}");
    let rows = json["ops"].as_array().unwrap();
    assert_eq!(rows.len(), 2 * OPS.len());
    for row in rows {
        assert_eq!(row["verdict"], "ok", "{row}");
        assert!(row["error"].as_f64().unwrap() <= row["bound"].as_f64().unwrap(), "{row}");
        assert!(row["bytes"].as_u64().unwrap() > 0 && row.get("median_us").is_none(), "{row}");
    }
    // Every module is the file of a checked op, or measures the bandwidth.
    for module in modules {
        let name = module["name"].as_str().unwrap();
        assert!(OPS.contains(&name) || name == "read_bandwidth", "{name} is not checked");
    }
    // Some results are not exact, so that the errors are real comparisons.
    assert!(rows.iter().any(|row| row["error"].as_f64() > Some(0.0)), "{json}");
}

/// Builds a library of kernels in which one line of one file is changed.
fn mutated_kernels(folder: &Path, file: &str, good: &str, bad: &str) -> PathBuf {
    let cuda = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    let source = std::fs::read_to_string(cuda.join(file)).unwrap();
    assert_eq!(source.matches(good).count(), 1, "{good:?} in {file}");
    let name = Path::new(file).file_stem().unwrap().to_str().unwrap();
    let (changed, object) = (folder.join(format!("{name}.cu")), folder.join(format!("{name}.o")));
    std::fs::write(&changed, source.replace(good, bad)).unwrap();
    let built = |what: &str| std::fs::read_to_string(softgpu::library_dir().join(format!("kernels.{what}"))).unwrap();
    let run = |command: &mut Command| {
        let output = run_within(LIMIT, command);
        assert!(output.status.success(), "{}", text(&output.stderr));
    };
    let compile = built("compile");
    let mut words = compile.lines();
    run(Command::new(words.next().unwrap()).args(words).arg("-c").arg(&changed).arg("-o").arg(&object));
    let objects = built("objects");
    let others: Vec<_> = objects.lines().filter(|path| !path.ends_with(&format!("-{name}.o"))).collect();
    assert_eq!(others.len() + 1, objects.lines().count());
    let (link, library) = (built("link"), folder.join("libkernels.so"));
    let mut words = link.lines();
    run(Command::new(words.next().unwrap()).args(others).arg(&object).args(words).arg("-o").arg(&library));
    library
}

#[test]
fn a_mutated_kernel_is_named() {
    for (file, good, bad, op) in [
        // The source row is the target row; the last row is skipped.
        (
            "any/gather_scatter.cu",
            "const int64_t from = kGather ? indexed : row,",
            "const int64_t from = row,",
            "gather_scatter",
        ),
        (
            "any/merge_state.cu",
            "row < num_rows(p.count, p.max_rows);",
            "row + 1 < num_rows(p.count, p.max_rows);",
            "merge_state",
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let library = mutated_kernels(folder.path(), file, good, bad);
        let (output, _) = on_emulator(&[], |command| {
            command.env("SOFTGPU_KERNELS", &library);
        });
        let (shown, error) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(1), "{shown}{error}");
        let verdicts = |op: &str| -> Vec<String> {
            let rows = shown.lines().filter(|line| line.split(' ').next() == Some(op));
            rows.map(|row| row.rsplit(' ').next().unwrap().into()).collect()
        };
        assert!(verdicts(op).contains(&"WRONG".to_string()), "{shown}");
        assert!(error.contains("of 24 checks failed: ") && error.contains(&format!("{op} (")), "{error}");
        for other in OPS.iter().filter(|other| **other != op) {
            assert_eq!(verdicts(other), ["ok", "ok"], "{other}: {shown}");
        }
        let (output, _) = on_emulator(&["--json"], |command| {
            command.env("SOFTGPU_KERNELS", &library);
        });
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((output.status.code(), &json["verdict"]), (Some(1), &"wrong".into()));
        let wrong = |row: &&Value| row["op"] == op && row["verdict"] == "wrong";
        let row = json["ops"].as_array().unwrap().iter().find(wrong).unwrap();
        assert!(row["message"].as_str().unwrap().contains("expected at most"), "{row}");
    }
}

/// An error of the driver is reported with the requirements.
#[test]
fn a_driver_error_is_reported() {
    let (output, report) = on_emulator(&[], |command| {
        command.env("SOFTGPU_KERNELS", "/nowhere/libkernels.so");
    });
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("cuInit: CUDA_ERROR_NOT_FOUND") && error.contains("needed: an NVIDIA driver"), "{error}");
    assert!(report.starts_with("no kernels: "), "{report}");
}

#[test]
fn an_old_device_is_listed_and_refused() {
    let (output, _) = on_emulator(&[], |command| {
        command.env("SOFTGPU_CC", "7.5");
    });
    let (shown, error) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(shown.contains("compute capability 7.5") && shown.contains(": too old for the kernels"), "{shown}");
    assert!(error.contains("compute capability 7.5; the kernels need 8.0"), "{error}");
}

/// Drivers of 525 to 565 run the kernels but cannot time them.
#[test]
fn older_drivers_are_distinguished() {
    let (output, report) = on_emulator(&[], |command| {
        command.env("SOFTGPU_CUDA", "12.0");
    });
    let shown = text(&output.stdout);
    assert_eq!((output.status.code(), report.as_str()), (Some(0), ""), "{shown}{}", text(&output.stderr));
    assert!(shown.contains("driver   CUDA 12.0\n") && shown.contains("all ok"), "{shown}");
    assert!(shown.contains("times    not measured: they need a driver of 570 or later"), "{shown}");
    let (output, _) = on_emulator(&[], |command| {
        command.env("SOFTGPU_CUDA", "11.8");
    });
    assert!(text(&output.stdout).contains("CUDA 11.8: too old; needed: an NVIDIA driver of 525"));
}

#[test]
fn wrong_arguments_are_2() {
    let (output, _) = on_emulator(&["--device", "3"], |_| {});
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("error: --device: expected a device from 0 to 0, found 3"), "{error}");
    for args in [&["--device", "-1"][..], &["--device", "cuda"], &["--nothing"], &["model"]] {
        assert_eq!(run_within(LIMIT, &mut doctor(args)).status.code(), Some(2), "{args:?}");
    }
}

/// An installed driver is hidden by invalid files of the same names.
#[test]
fn without_a_driver_the_requirements_are_shown() {
    let folder = tempfile::tempdir().unwrap();
    let mut names = vec!["libcuda.so".to_string(), "libnvcuda.so".into()];
    names.extend((1..=13).map(|version| format!("libcuda.so.{version}")));
    names.iter().for_each(|name| std::fs::write(folder.path().join(name), "no library").unwrap());
    let run = |args: &[&str]| run_within(LIMIT, doctor(args).env("LD_LIBRARY_PATH", folder.path()));
    let output = run(&[]);
    let (shown, error) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{shown}{error}");
    assert!(shown.contains("  compute_80  ") && shown.contains("unmask ("), "{shown}");
    let needed = "no CUDA driver: libcuda was not found; needed: an NVIDIA driver of 525 or later, and a device of compute \
                  capability 8.0 or later";
    assert!(error.contains(needed), "{error}");
    let json: Value = serde_json::from_slice(&run(&["--json"]).stdout).unwrap();
    assert_eq!((&json["verdict"], &json["machine"]), (&"failed".into(), &Value::Null));
    assert!(json["error"].as_str().unwrap().contains("no CUDA driver"), "{json}");
    assert_eq!(json["build"]["ptx_isa"], "8.0");
}
