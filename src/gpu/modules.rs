//! The kernel modules, as PTX that the driver compiles when it loads them.

use super::DriverResult;
use crate::error::{Error, Result};
use cudarc::driver::sys;
use std::ffi::{CString, c_void};

/// PTX of one `.cu` file.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// The file's name without `.cu`.
    pub name: &'static str,
    /// What it was compiled for: `compute_80` runs on 8.0 and everything after, `compute_90a` on 9.0 only.
    pub target: &'static str,
    /// The text.
    pub ptx: &'static str,
}

include!(concat!(env!("OUT_DIR"), "/modules.rs"));

impl Module {
    /// Every module of this build.
    pub fn all() -> &'static [Module] {
        MODULES
    }

    /// The PTX version that they are stamped with, major and minor: what a driver must know.
    pub fn isa() -> &'static str {
        PTX_ISA
    }

    /// A hash of the kernels' sources and the compiler's flags, as in `ptx/SOURCE_HASH`.
    pub fn source_hash() -> &'static str {
        SOURCE_HASH
    }

    /// Whether it knows its source lines, for a profiler: built with `DLLM_LINEINFO=1`.
    pub fn has_lines(&self) -> bool {
        self.ptx.contains("\n\t.loc\t")
    }

    /// The module of a file that a device of this compute capability should run: the most special one that it can.
    pub fn choose(name: &str, capability: (i32, i32)) -> Option<&'static Module> {
        let fits = |module: &&Module| match module.target {
            "compute_90a" => capability == (9, 0),
            _ => capability >= (8, 0),
        };
        MODULES.iter().filter(|module| module.name == name).filter(fits).max_by_key(|module| module.target)
    }

    /// Names of its kernels.
    pub fn kernels(&self) -> impl Iterator<Item = &'static str> {
        self.ptx.lines().filter_map(|line| line.strip_prefix(".visible .entry ")?.split('(').next())
    }

    /// Loads it into the current context.
    pub(super) fn load(&self) -> Result<sys::CUmodule> {
        const LOG_BYTES: usize = 8192;
        let image = CString::new(self.ptx).map_err(|e| self.refused("cuModuleLoadDataEx", e.to_string()))?;
        let mut log = vec![0u8; LOG_BYTES];
        let mut options = vec![
            sys::CUjit_option_enum::CU_JIT_ERROR_LOG_BUFFER,
            sys::CUjit_option_enum::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
        ];
        let mut values = vec![log.as_mut_ptr().cast::<c_void>(), LOG_BYTES as *mut c_void];
        if self.has_lines() {
            // The driver's compiler drops them unasked.
            options.push(sys::CUjit_option_enum::CU_JIT_GENERATE_LINE_INFO);
            values.push(std::ptr::without_provenance_mut(1)); // on
        }
        let mut module = std::ptr::null_mut();
        // SAFETY: the image ends in a zero byte; there are as many values as options; the log outlives the call.
        let result = unsafe {
            let (count, options, values) = (options.len() as u32, options.as_mut_ptr(), values.as_mut_ptr());
            sys::cuModuleLoadDataEx(&mut module, image.as_ptr().cast(), count, options, values)
        };
        result.result().of("cuModuleLoadDataEx").map_err(|error| {
            let end = log.iter().position(|byte| *byte == 0).unwrap_or(LOG_BYTES);
            let log = String::from_utf8_lossy(&log[..end]);
            self.refused(&error.to_string(), if log.trim().is_empty() { "no log" } else { log.trim() })
        })?;
        Ok(module)
    }

    fn refused(&self, call: &str, log: impl ToString) -> Error {
        Error::Module { module: format!("{} ({})", self.name, self.target), error: call.into(), log: log.to_string() }
    }
}
