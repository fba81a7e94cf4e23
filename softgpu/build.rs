//! Builds three shared libraries: `cuda` (the driver), `cublasLt`, and `kernels` (every kernel file, for the host).

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
    /// Libraries of this build that it needs, by file name.
    needs: &'a [&'a str],
}

impl SharedLibrary<'_> {
    /// `cc` knows the compiler and how to make objects; it only links archives, so the last step is ours. Leaves both
    /// commands in `NAME.compile` and `NAME.link` and the objects in `NAME.objects`, for whoever builds the library again from
    /// other sources.
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
            // Kernels read memory through pointers of other types, as CUDA allows.
            .flag("-fno-strict-aliasing")
            // Without this the compiler may fuse a * b + c, depending on the host.
            .flag("-ffp-contract=off")
            // A kernel that goes wrong is left by a jump to another stack, which these two take for an attack.
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
        // Its own functions before others of the same name: the C library has an `advance` too.
        let soname = format!("-Wl,-soname,lib{}.so", self.name).into();
        let mut behind = vec!["-shared".into(), "-Wl,-Bsymbolic-functions".into(), soname];
        behind.extend(self.needs.iter().map(|name| out.join(name).into()));
        behind.extend(["-lpthread", "-ldl"].map(OsString::from));
        record(&out.join(format!("{}.link", self.name)), &link, &behind);
        let status = link.arg("-o").arg(&library).args(&objects).args(&behind).status();
        let status = status.expect("the C++ compiler starts");
        assert!(status.success(), "linking {} failed", library.display());
    }
}

/// A command without the files that it reads and writes, a word a line. Objects belong before what is `behind`.
fn record(file: &Path, command: &Command, behind: &[OsString]) {
    let words = [command.get_program()].into_iter().chain(command.get_args()).chain(behind.iter().map(|word| &**word));
    let lines: Vec<String> = words.map(|word| word.to_string_lossy().into_owned()).collect();
    fs::write(file, lines.join("\n")).expect("OUT_DIR can be written to");
}

/// The files of a directory with this extension, sorted; none if there is no such directory.
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
    // Switching between the threads of a block is written in x86-64 assembly, and loading relies on ELF.
    if !is_supported_target() {
        return;
    }
    println!("cargo:rustc-cfg=softgpu_supported");

    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").unwrap());
    let out = PathBuf::from(env::var("OUT_DIR").unwrap());
    let cpp = root.join("cpp");
    let cuda = root.parent().expect("the crate lies in the workspace").join("cuda");
    let test_kernels = root.join("tests/kernels");
    // Of a directory cargo watches every file in it, headers too.
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
            // Each undefined operation calls a function, which the driver has; so linking is without this flag.
            "-fsanitize=alignment,bounds,shift,integer-divide-by-zero",
        ],
        needs: &["libcuda.so"],
    }
    .build(&out);
}
