//! The kernel modules, as PTX that the driver compiles when it loads them.

use super::DriverResult;
use crate::error::{Error, Result};
use cudarc::driver::sys;
use std::ffi::{CString, c_void};

/// PTX of one `.cu` file for one target.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// Name of the `.cu` file, without the extension.
    pub name: &'static str,
    /// Compilation target: `compute_80` runs on compute capability 8.0 and later, `compute_90a` on 9.0 only.
    pub target: &'static str,
    /// The PTX text.
    pub ptx: &'static str,
}

include!(concat!(env!("OUT_DIR"), "/modules.rs"));

impl Module {
    /// All modules of this build.
    pub fn all() -> &'static [Module] {
        MODULES
    }

    /// PTX version of all modules, `major.minor`: the version that a driver must support.
    pub fn isa() -> &'static str {
        PTX_ISA
    }

    /// Hash of the kernels' sources and the compiler's flags, as in `ptx/SOURCE_HASH`.
    pub fn source_hash() -> &'static str {
        SOURCE_HASH
    }

    /// Whether the module has line information for profilers, which a build with `DLLM_LINEINFO=1` adds.
    pub fn has_lines(&self) -> bool {
        self.ptx.contains("\n\t.loc\t")
    }

    /// Returns the most specific module named `name` that a device of this compute capability (major, minor) can run; `None`
    /// when there is none.
    pub fn choose(name: &str, capability: (i32, i32)) -> Option<&'static Module> {
        let fits = |module: &&Module| match module.target {
            "compute_90a" => capability == (9, 0),
            _ => capability >= (8, 0),
        };
        MODULES.iter().filter(|module| module.name == name).filter(fits).max_by_key(|module| module.target)
    }

    /// Names of the module's kernels, in the order of the text.
    pub fn kernels(&self) -> impl Iterator<Item = &'static str> {
        self.ptx.lines().filter_map(|line| line.strip_prefix(".visible .entry ")?.split('(').next())
    }

    /// Loads the module into the current context.
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
            // By default the driver's compiler drops line information.
            options.push(sys::CUjit_option_enum::CU_JIT_GENERATE_LINE_INFO);
            values.push(std::ptr::without_provenance_mut(1)); // on
        }
        let mut module = std::ptr::null_mut();
        // SAFETY: the image ends in a zero byte; there are as many values as options; the log outlives the call.
        let result = unsafe {
            let (count, options, values) = (options.len() as u32, options.as_mut_ptr(), values.as_mut_ptr());
            sys::cuModuleLoadDataEx(&mut module, image.as_ptr().cast(), count, options, values)
        };
        result.result().in_call("cuModuleLoadDataEx").map_err(|error| {
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
