//! Embeds the CUDA kernels in the library, as PTX. Without the feature `cuda` it does nothing.
//!
//! `ptx/` holds every module, built by one pinned compiler.
//!
//! - While `ptx/SOURCE_HASH` matches `cuda/` and the flags below, the build uses these modules, whatever compiler the
//!   machine has.
//! - When the hash does not match, nvcc compiles the modules. A missing nvcc is then an error, because cargo does not show
//!   the warnings of a dependency.
//! - `UPDATE_PTX=1` compiles the modules and rewrites `ptx/`. Nothing else writes outside `OUT_DIR`.
//! - `DLLM_LINEINFO=1` compiles modules with source lines, for profilers, and does not change `ptx/`.
//!
//! See `docs/building.md`.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

/// PTX ISA version that every module is stamped with. nvcc writes its own version, and a driver refuses modules newer than
/// itself. The kernels need no newer ISA than this one, which drivers from 525 on load.
const PTX_ISA: &str = "8.0";
const FLAGS: &[&str] = &["-std=c++17", "-O3", "-ptx", "-Icuda/common", "-Icuda/include"];
/// Flag that `DLLM_LINEINFO` adds.
const LINEINFO: &str = "-lineinfo";
/// Folder of `cuda/`, architecture that its kernels are compiled for, and suffix of its modules' file names. `sm90a` is for
/// kernels with wgmma; the folder is empty today, so git does not store it.
const TARGETS: &[(&str, &str, &str)] =
    &[("any", "compute_80", ".ptx"), ("sm80", "compute_80", ".ptx"), ("sm90a", "compute_90a", ".sm90a.ptx")];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    // Cargo watches every file in a folder, so that it notices an added or removed kernel.
    println!("cargo::rerun-if-changed=cuda");
    println!("cargo::rerun-if-changed=ptx");
    for variable in ["UPDATE_PTX", "DLLM_LINEINFO"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let is_set = |name| env::var_os(name).is_some_and(|value| !value.is_empty() && value != "0");
    let mode = match (is_set("UPDATE_PTX"), is_set("DLLM_LINEINFO")) {
        (false, false) => Ok(BuildMode::Modules),
        (true, false) => Ok(BuildMode::Update),
        (false, true) => Ok(BuildMode::Lines),
        (true, true) => Err(
            "UPDATE_PTX and DLLM_LINEINFO are both set, but ptx/ must not hold modules with source lines. Unset one."
                .into(),
        ),
    };
    let nvcc = find_nvcc(|name| env::var_os(name));
    if let Err(message) = mode.and_then(|mode| build(&root, &out, mode, nvcc.as_deref())) {
        message.lines().for_each(|line| println!("cargo::error={line}"));
        exit(1);
    }
}

/// Mode of a build.
#[derive(Clone, Copy, PartialEq)]
pub enum BuildMode {
    /// Uses the modules of `ptx/` if they are up to date, otherwise compiles them.
    Modules,
    /// Compiles the modules and rewrites `ptx/`.
    Update,
    /// Compiles modules with source lines.
    Lines,
}

/// Writes every module and `modules.rs`, which lists them, to `out`.
pub fn build(root: &Path, out: &Path, mode: BuildMode, nvcc: Option<&Path>) -> Result<(), String> {
    let sources = sources(root)?;
    let kernels = kernels(&sources)?;
    let hash = source_hash(&sources);
    let ptx = root.join("ptx");
    let manifest = fs::read_to_string(ptx.join("SOURCE_HASH")).unwrap_or_default();
    let recorded = manifest.lines().find_map(|line| line.strip_prefix("source ")).unwrap_or("nothing");
    let complete = kernels.iter().all(|kernel| ptx.join(&kernel.file).is_file());

    if recorded == hash && complete && mode == BuildMode::Modules {
        for kernel in &kernels {
            write(&out.join(&kernel.file), &read(&ptx.join(&kernel.file))?)?;
        }
    } else {
        // Only a compiling build depends on these variables. PATH changes too often to depend on it always.
        for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH"] {
            println!("cargo::rerun-if-env-changed={variable}");
        }
        let nvcc = nvcc.ok_or_else(|| match mode {
            BuildMode::Update => format!("UPDATE_PTX is set, but there is no nvcc.\n{NVCC_SEARCH}"),
            BuildMode::Lines => format!("DLLM_LINEINFO is set, but there is no nvcc.\n{NVCC_SEARCH}"),
            BuildMode::Modules => format!(
                "ptx/ was not built from the kernels in cuda/ (expected source hash {hash}, found {recorded} in \
                 ptx/SOURCE_HASH), and there is no nvcc to compile them.\n{NVCC_SEARCH}\nIf the change is not \
                 intended, undo it: `git status cuda ptx build.rs` shows it. If it is, rebuild ptx/ with UPDATE_PTX=1."
            ),
        })?;
        let version = compiler_version(nvcc)?;
        for kernel in &kernels {
            write(&out.join(&kernel.file), &compile(nvcc, root, kernel, out, mode)?)?;
        }
        match mode {
            BuildMode::Update => rewrite(&ptx, out, &kernels, &hash, &version)?,
            BuildMode::Lines => {
                println!("cargo::warning=DLLM_LINEINFO: kernels with source lines, built with {version}")
            }
            BuildMode::Modules => {
                println!(
                    "cargo::warning=ptx/ is out of date: kernels built with {version}; UPDATE_PTX=1 rebuilds ptx/"
                );
            }
        }
    }
    write(&out.join("modules.rs"), &module_list(&kernels, &hash))
}

const NVCC_SEARCH: &str = "Searched: NVCC (the program itself; empty: none), CUDA_HOME/bin, CUDA_PATH/bin, PATH and \
                           /usr/local/cuda/bin.\ndocs/building.md says how to install nvcc with pip.";

/// A `.cu` file and its module.
pub struct Kernel {
    pub source: String,
    pub name: String,
    pub target: &'static str,
    pub file: String,
}

/// Returns the kernels among the sources, sorted by name.
pub fn kernels(sources: &[(String, String)]) -> Result<Vec<Kernel>, String> {
    let mut kernels = Vec::<Kernel>::new();
    for source in sources.iter().map(|(path, _)| path).filter(|path| path.ends_with(".cu")) {
        let (folder, name) = source["cuda/".len()..source.len() - ".cu".len()].split_once('/').unwrap_or_default();
        let (_, target, ending) = TARGETS
            .iter()
            .find(|(target_folder, ..)| *target_folder == folder && !name.contains('/'))
            .ok_or_else(|| format!("{source}: expected a kernel in cuda/any, cuda/sm80 or cuda/sm90a"))?;
        let file = format!("{name}{ending}");
        if let Some(other) = kernels.iter().find(|kernel| kernel.file == file) {
            return Err(format!("{source} and {}: both would become ptx/{file}", other.source));
        }
        kernels.push(Kernel { source: source.clone(), name: name.into(), target, file });
    }
    kernels.sort_by(|a, b| (&a.name, a.target).cmp(&(&b.name, b.target)));
    Ok(kernels)
}

/// Returns the path from the root (with `/`) and the text of every kernel and header below `cuda/`, sorted by path.
pub fn sources(root: &Path) -> Result<Vec<(String, String)>, String> {
    let (mut folders, mut found) = (vec!["cuda".to_string()], Vec::new());
    while let Some(folder) = folders.pop() {
        for path in list(&root.join(&folder))? {
            let name = format!("{folder}/{}", path.file_name().unwrap_or_default().to_string_lossy());
            if path.is_dir() {
                folders.push(name);
            } else if [".cu", ".cuh", ".h"].iter().any(|ending| name.ends_with(ending)) {
                found.push((name, read(&path)?));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// FNV-1a hash of paths, texts, flags and targets. Ignores carriage returns, which git may add. It detects stale modules, not
/// malicious ones.
pub fn source_hash(sources: &[(String, String)]) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |text: &str| {
        // The zero separates neighbouring texts.
        for byte in text.bytes().filter(|byte| *byte != b'\r').chain([0]) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    };
    sources.iter().for_each(|(path, text)| [path, text].into_iter().for_each(|text| add(text)));
    FLAGS.iter().for_each(|flag| add(flag));
    TARGETS.iter().for_each(|(folder, target, ending)| [folder, target, ending].into_iter().for_each(|text| add(text)));
    add(PTX_ISA);
    format!("{hash:016x}")
}

/// Returns the first nvcc found. If `NVCC` is set, it is used unchecked; empty means none.
pub fn find_nvcc(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    if let Some(nvcc) = variable("NVCC") {
        return (!nvcc.is_empty()).then(|| nvcc.into());
    }
    let toolkits =
        ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(&variable).map(|dir| PathBuf::from(dir).join("bin"));
    let path = variable("PATH").unwrap_or_default();
    toolkits
        .chain(env::split_paths(&path))
        .chain([PathBuf::from("/usr/local/cuda/bin")])
        .map(|dir| dir.join(format!("nvcc{}", env::consts::EXE_SUFFIX)))
        .find(|nvcc| nvcc.is_file())
}

/// Returns the line of `nvcc --version` with the version.
fn compiler_version(nvcc: &Path) -> Result<String, String> {
    let output = Command::new(nvcc).arg("--version").output();
    let output = output.map_err(|e| format!("{}: cannot be run: {e}\n{NVCC_SEARCH}", nvcc.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find(|line| line.contains("release "));
    Ok(line
        .ok_or_else(|| format!("{}: expected a line with `release` from --version, found none", nvcc.display()))?
        .trim()
        .into())
}

/// Compiles a kernel to stamped PTX, which is the same in every checkout.
fn compile(nvcc: &Path, root: &Path, kernel: &Kernel, out: &Path, mode: BuildMode) -> Result<String, String> {
    let unstamped = out.join(format!("{}.nvcc", kernel.file));
    let mut command = Command::new(nvcc);
    command.current_dir(root).env_remove("NVCC_PREPEND_FLAGS").env_remove("NVCC_APPEND_FLAGS");
    command
        .args(FLAGS)
        .args((mode == BuildMode::Lines).then_some(LINEINFO))
        .arg(format!("-arch={}", kernel.target))
        .arg(&kernel.source)
        .arg("-o")
        .arg(&unstamped);
    let output = command.output().map_err(|e| format!("{}: cannot be run: {e}", nvcc.display()))?;
    let messages = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{}: nvcc failed with {}\n{messages}", kernel.source, output.status));
    }
    messages.lines().filter(|line| !line.is_empty()).for_each(|line| println!("cargo::warning={line}"));
    stamp(&read(&unstamped)?).ok_or_else(|| format!("{}: nvcc wrote no .version line", kernel.source))
}

/// Replaces nvcc's comment header and `.version` line by [`PTX_ISA`], and the parts that depend on the path of the checkout:
/// nvcc names anonymous namespaces after a hash of the file's absolute path. Returns `None` if there is no `.version` line.
pub fn stamp(ptx: &str) -> Option<String> {
    let ptx = format!("\n{ptx}").replace('\r', "");
    let (_version, body) = ptx.split_once("\n.version ")?.1.split_once('\n')?;
    let mut body = body.to_string();
    for mark in ["_INTERNAL_", "_GLOBAL__N__"] {
        let hash = body.split_once(mark).and_then(|(_, rest)| rest.split_once('_')).map(|(hash, _)| hash.to_string());
        if let Some(hash) = hash.filter(|hash| hash.len() == 8 && hash.bytes().all(|byte| byte.is_ascii_hexdigit())) {
            body = body.replace(&format!("_{hash}_"), "_00000000_");
        }
    }
    // Drops a hint about loads that the ISA has only since 8.3.
    let body: String = body.split_inclusive('\n').filter(|line| !line.contains(".pragma \"used_bytes_mask ")).collect();
    Some(format!(".version {PTX_ISA}\n{body}"))
}

/// Replaces the content of `ptx/` by the modules in `out` and their manifest.
fn rewrite(ptx: &Path, out: &Path, kernels: &[Kernel], hash: &str, version: &str) -> Result<(), String> {
    fs::create_dir_all(ptx).map_err(at(ptx))?;
    for path in list(ptx)?.into_iter().filter(|path| path.extension().is_some_and(|ending| ending == "ptx")) {
        if !kernels.iter().any(|kernel| path.ends_with(&kernel.file)) {
            fs::remove_file(&path).map_err(at(&path))?;
        }
    }
    let mut manifest = format!("source {hash}\ncompiler {version}\nisa {PTX_ISA}\n");
    for kernel in kernels {
        write(&ptx.join(&kernel.file), &read(&out.join(&kernel.file))?)?;
        manifest += &format!("{} {}\n", kernel.file, kernel.target);
    }
    write(&ptx.join("SOURCE_HASH"), &manifest)
}

/// Returns the Rust file that the library includes.
fn module_list(kernels: &[Kernel], hash: &str) -> String {
    let mut list = format!("const PTX_ISA: &str = {PTX_ISA:?};\nconst SOURCE_HASH: &str = {hash:?};\n");
    list += "/// Every module, by name.\npub static MODULES: &[Module] = &[\n";
    for Kernel { name, target, file, .. } in kernels {
        list += &format!("    Module {{ name: {name:?}, target: {target:?}, ptx: include_str!({file:?}) }},\n");
    }
    list + "];\n"
}

fn list(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(folder).map_err(at(folder))?;
    entries.map(|entry| Ok(entry.map_err(at(folder))?.path())).collect()
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(at(path))
}

/// Writes a file unless it already holds the text: a new modification time would trigger another build.
fn write(path: &Path, text: &str) -> Result<(), String> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    fs::write(path, text).map_err(at(path))
}

fn at(path: &Path) -> impl Fn(std::io::Error) -> String {
    move |e| format!("{}: {e}", path.display())
}
