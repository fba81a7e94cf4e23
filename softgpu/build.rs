//! Builds three shared libraries: `cuda` (the driver), `cublasLt`, and `kernels` (every kernel file, compiled for the host).

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

struct SharedLibrary<'a> {
    name: &'a str,
    sources: Vec<PathBuf>,
    includes: Vec<PathBuf>,
    flags: &'a [&'a str],
    /// Libraries of this build that this one links, by file name.
    needs: &'a [&'a str],
}

impl SharedLibrary<'_> {
    /// Compiles with the crate `cc` and links by itself, because `cc` links only archives. Stores both commands in
    /// `NAME.compile` and `NAME.link` and the paths of the objects in `NAME.objects`, so that `tests/mutants.py` can build the
    /// library again from other sources.
    fn build(&self, out: &Path) {
        let mut build = cc::Build::new();
        build
            .cpp(true)
            .std("c++17")
            .warnings(false)
            .pic(true)
            .opt_level(2)
            .debug(false)
            .define("SOFTGPU", None)
            .out_dir(out.join(self.name))
            // Kernels access memory through pointers of other types, which CUDA allows.
            .flag("-fno-strict-aliasing")
            // Otherwise the compiler may fuse a * b + c, depending on the host.
            .flag("-ffp-contract=off")
            // A failing kernel is left by a jump to another stack, which these two would treat as an attack.
            .flag("-U_FORTIFY_SOURCE")
            .flag("-fno-stack-protector")
            .files(&self.sources)
            .includes(&self.includes);
        for flag in self.flags {
            build.flag(flag);
        }
        record(&out.join(format!("{}.compile", self.name)), &build.get_compiler().to_command(), &[]);
        let objects = build.compile_intermediates();

        let names: Vec<String> = objects.iter().map(|object| object.display().to_string()).collect();
        fs::write(out.join(format!("{}.objects", self.name)), names.join("\n")).expect("OUT_DIR can be written to");

        let library = out.join(format!("lib{}.so", self.name));
        let mut link = cc::Build::new().cpp(true).opt_level(2).get_compiler().to_command();
        // Prefers its own functions to others of the same name: the C library has an `advance` too.
        let soname = format!("-Wl,-soname,lib{}.so", self.name).into();
        let mut after = vec!["-shared".into(), "-Wl,-Bsymbolic-functions".into(), soname];
        after.extend(self.needs.iter().map(|name| out.join(name).into()));
        after.extend(["-lpthread", "-ldl"].map(OsString::from));
        record(&out.join(format!("{}.link", self.name)), &link, &after);
        let status = link.arg("-o").arg(&library).args(&objects).args(&after).status();
        let status = status.expect("the C++ compiler starts");
        assert!(status.success(), "linking {} failed", library.display());
    }
}

/// Stores a command without the files that it reads and writes, one word per line. Objects belong before the words `after`.
fn record(file: &Path, command: &Command, after: &[OsString]) {
    let words = [command.get_program()].into_iter().chain(command.get_args()).chain(after.iter().map(|word| &**word));
    let lines: Vec<String> = words.map(|word| word.to_string_lossy().into_owned()).collect();
    fs::write(file, lines.join("\n")).expect("OUT_DIR can be written to");
}

/// Returns the files of a directory with this extension, sorted; none if the directory does not exist.
fn files_in(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.expect("a readable directory").path())
        .filter(|path| path.extension() == Some(OsStr::new(extension)))
        .collect();
    files.sort();
    files
}

fn is_supported_target() -> bool {
    env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux")
        && env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("x86_64")
}

fn main() {
    println!("cargo:rustc-check-cfg=cfg(softgpu_supported)");
    println!("cargo:rerun-if-changed=build.rs");
    // Fibers are switched in x86-64 assembly, and loading relies on ELF.
    if !is_supported_target() {
        return;
    }
    println!("cargo:rustc-cfg=softgpu_supported");

    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").unwrap());
    let out = PathBuf::from(env::var("OUT_DIR").unwrap());
    let cpp = root.join("cpp");
    let cuda = root.parent().expect("the crate is in the workspace").join("cuda");
    let test_kernels = root.join("tests/kernels");
    // Cargo watches every file in a directory, headers too.
    for directory in [&cpp, &cuda, &test_kernels] {
        println!("cargo:rerun-if-changed={}", directory.display());
    }

    let include = cpp.join("include");
    let mut driver = files_in(&cpp.join("driver"), "cpp");
    driver.extend(files_in(&cpp.join("runner"), "cpp"));
    SharedLibrary { name: "cuda", sources: driver, includes: vec![include.clone()], flags: &[], needs: &[] }
        .build(&out);

    SharedLibrary {
        name: "cublasLt",
        sources: files_in(&cpp.join("blaslt"), "cpp"),
        includes: vec![include.clone()],
        flags: &["-O3"],
        needs: &["libcuda.so"],
    }
    .build(&out);

    let mut kernels = vec![cpp.join("kernels_anchor.cpp")];
    for directory in [cuda.join("any"), cuda.join("sm80"), test_kernels] {
        kernels.extend(files_in(&directory, "cu"));
    }
    SharedLibrary {
        name: "kernels",
        sources: kernels,
        includes: vec![include, cuda.join("common"), cuda.join("include")],
        flags: &[
            "-include",
            "softgpu.h",
            // The compiler does not know the extension .cu.
            "-xc++",
            // Each undefined operation calls a function of the driver library, so linking does not need this flag.
            "-fsanitize=alignment,bounds,shift,integer-divide-by-zero",
        ],
        needs: &["libcuda.so"],
    }
    .build(&out);
}
