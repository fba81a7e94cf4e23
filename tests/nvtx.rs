//! NVTX ranges as a profiler receives them. The profiler is a C library that records every call, in a child process.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

#[path = "../src/selftest/limit.rs"]
mod limit;

use dllm_kernels::gpu::{Device, Module};
use dllm_kernels::ops::gather_scatter::{self, Copy, GatherScatter};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Environment variable that marks the child process.
const CHILD: &str = "DLLM_NVTX_CHILD";

/// Injection library that appends each call to the file `RECORD`. The structs are those of NVTX 3.
const TOOL: &str = r#"
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct attributes {
    uint16_t version, size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type, reserved;
    union { uint64_t u; double d; } payload;
    int32_t message_type;
    union { const char* ascii; void* other; } message;
};
typedef void (*function)(void);
struct callbacks {
    size_t size;
    int (*get_table)(int module, function*** table, unsigned* size);
};
struct version_info {
    size_t size;
    uint32_t version, reserved;
    void (*set_version)(uint32_t);
};

static void say(const char* what, const char* name) {
    FILE* file = fopen(getenv("RECORD"), "a");
    if (file == NULL) abort();
    fprintf(file, "%s %s\n", what, name);
    fclose(file);
}

static char domain;

static void* create(const char* name) {
    say("domain", name);
    return &domain;
}
static int push(void* to, const struct attributes* a) {
    if (to != &domain || a->version != 3 || a->size != sizeof *a || a->message_type != 1) abort();
    say("push", a->message.ascii);
    return 0;
}
static int pop(void* from) {
    if (from != &domain) abort();
    say("pop", "");
    return 0;
}

int InitializeInjectionNvtx2(const void* (*get)(uint32_t)) {
    static const unsigned sizes[] = {0, 16, 9, 15, 7, 16, 7};
    const char* mode = getenv("MODE");
    const struct callbacks* callbacks = get(1);
    const struct version_info* info = get(3);
    if (get(0) != NULL || get(99) != NULL) abort();
    if (callbacks->size != sizeof *callbacks || info->size != sizeof *info || info->version != 3) abort();
    info->set_version(3);
    for (int module = 0; module <= 7; module++) {
        function** table = NULL;
        unsigned size = 0;
        const int known = module >= 1 && module <= 6;
        if (callbacks->get_table(module, &table, &size) != known || (known && size != sizes[module])) abort();
        if (callbacks->get_table(module, NULL, NULL) != known) abort();
        if (!known) continue;
        if (table[0] != NULL || table[size] != NULL) abort();
        /* Like profilers, fills in every module; a call of an unexpected function aborts the process. */
        for (unsigned id = 1; id < size; id++) *table[id] = (function)abort;
        if (module != 5) continue;
        *table[4] = (function)push;
        *table[5] = strcmp(mode, "half") == 0 ? NULL : (function)pop;
        *table[12] = (function)create;
    }
    say("initialised", mode);
    return strcmp(mode, "refuses") != 0;
}
"#;

/// Body of the child process; does nothing when run as a test.
#[test]
fn child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    softgpu::install();
    let device = Device::open(0).unwrap();
    let stream = device.stream().unwrap();
    let source = stream.upload(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]).unwrap();
    let index = stream.upload(&[1, 0, 1]).unwrap();
    for copy in [Copy::Gather, Copy::Gather] {
        let mut target = stream.zeros(12).unwrap();
        let rows =
            GatherScatter { index: &index, count: None, width: 4, source: &source, target: &mut target, failed: None };
        gather_scatter::launch(&stream, rows, copy).unwrap();
        assert_eq!(target.read().unwrap()[..5], [5.0, 6.0, 7.0, 8.0, 1.0]);
    }
    device.preload().unwrap();
    println!("done");
}

/// Runs the child with an injection library in the given mode. Returns the recorded lines.
fn record(folder: &Path, tool: &Path, mode: &str) -> Vec<String> {
    let record = folder.join(mode);
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "child", "--nocapture"]).env(CHILD, "1");
    child.env("NVTX_INJECTION64_PATH", tool).env("MODE", mode).env("RECORD", &record);
    let output = child.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("done"), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let text = std::fs::read_to_string(record).unwrap_or_default();
    text.lines().map(|line| line.trim_end().to_owned()).collect()
}

/// Builds a shared library from C source.
fn build(folder: &Path, name: &str, text: &str) -> PathBuf {
    let [source, library] = [format!("{name}.c"), format!("lib{name}.so")].map(|file| folder.join(file));
    std::fs::write(&source, text).unwrap();
    let compiler = std::env::var("CC").unwrap_or("gcc".into());
    let mut command = Command::new(&compiler);
    command.args(["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o"]).args([&library, &source]);
    let output = command.output().unwrap_or_else(|e| panic!("{compiler}, which this test needs, cannot be run: {e}"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    library
}

#[test]
fn a_profiler_sees_every_launch() {
    let folder = tempfile::tempdir().unwrap();
    let tool = build(folder.path(), "tool", TOOL);
    let seen = record(folder.path(), &tool, "attends");
    let first = [
        "initialised attends",
        "domain dllm",
        "push gather_scatter gather_rows 3x1x1",
        "push load gather_scatter (compute_80)",
        "pop",
        "pop",
        "push gather_scatter gather_rows 3x1x1",
        "pop",
        "push preload",
    ];
    assert_eq!(seen[..first.len()], first);
    // Every module is loaded.
    let loads = |name: &&str| seen.contains(&format!("push load {name} (compute_80)"));
    let mut names: Vec<_> = Module::all().iter().map(|module| module.name).collect();
    names.dedup();
    assert_eq!(names.iter().filter(|name| loads(name)).count(), names.len(), "{seen:?}");
    let count = |what: &str| seen.iter().filter(|line| line.starts_with(what)).count();
    assert_eq!((count("push"), seen.last().unwrap().as_str()), (count("pop"), "pop"));
}

#[test]
fn broken_tools_are_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let tool = build(folder.path(), "tool", TOOL);
    assert_eq!(record(folder.path(), &tool, "refuses"), ["initialised refuses"]);
    assert_eq!(record(folder.path(), &tool, "half"), ["initialised half"]);
    let nothing: [&str; 0] = [];
    assert_eq!(record(folder.path(), Path::new(""), "unset"), nothing);
    assert_eq!(record(folder.path(), &folder.path().join("nowhere.so"), "absent"), nothing);
    let other = build(folder.path(), "other", "int nothing;");
    assert_eq!(record(folder.path(), &other, "another"), nothing);
}
