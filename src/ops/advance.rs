//! The work of the decoding rules between two passes, on the device: the kernel of `cuda/any/advance.cu`.
//!
//! advance is the last kernel of a captured decoding step, after unmask. It decides which sequences take part in the next pass,
//! computes their quotas, and writes a progress counter to pinned memory. The host can therefore follow a block without a
//! synchronisation. The quota schedules are those of LLaDA (arXiv:2502.09992), Dream (arXiv:2508.15487) and Fast-dLLM
//! (arXiv:2505.22618).
//!
//! There is no safe launch: a safe function could not keep the host from freeing pinned memory that the device still writes.

use super::{Plan, validate};
use crate::abi::{dllm_advance_control, dllm_advance_params, dllm_advance_sequence, dllm_progress};
use crate::error::{Error, Result};
use crate::gpu::Device;
use std::ffi::c_void;

/// Maximum number of sequences, which is the maximum number of rows of unmask.
const MAX_SEQUENCES: i64 = 65_535;

/// Checks all fields without reading the memory that the addresses point to. Calls no driver.
///
/// # Errors
/// [`Error::Argument`] with the field, the expected and the found value.
pub fn validate(params: &dllm_advance_params) -> Result<()> {
    validate::struct_size::<dllm_advance_params>(params.size)?;
    validate::address("sequences", params.sequences, 16)?;
    for (name, address) in [
        ("control", params.control),
        ("tokens", params.tokens),
        ("committed", params.committed),
        ("failed", params.failed),
        ("quota", params.quota),
        ("commit_before", params.commit_before),
        ("steps", params.steps),
        ("progress", params.progress),
    ] {
        validate::address(name, address, 4)?;
    }
    validate::within("num_sequences", params.num_sequences.into(), 1, MAX_SEQUENCES)?;
    validate::size("num_tokens", params.num_tokens)?;
    validate::within("mask_token", params.mask_token.into(), 0, i32::MAX.into())?;
    for (name, address, count_name, count) in [
        ("ratios", params.ratios, "max_ratios", params.max_ratios),
        ("end_tokens", params.end_tokens, "num_end_tokens", params.num_end_tokens),
    ] {
        validate::optional(name, address, 4)?;
        match (address, count) {
            (0, 0) => {}
            (0, _) => return Err(Error::argument(count_name, format!("0, as there are no {name}"), count)),
            _ => validate::size(count_name, count)?,
        }
    }
    validate::reserved(params.reserved)?;
    let region =
        |name, address, rows, bytes| validate::Region { name, address, rows, stride_bytes: bytes, row_bytes: bytes };
    let sequence_bytes = size_of::<dllm_advance_sequence>() as i64;
    region("sequences", params.sequences, params.num_sequences, sequence_bytes).fits_address_space()?;
    region("tokens", params.tokens, params.num_tokens, 4).fits_address_space()
}

/// Returns the plan of a launch: one block of 512 threads, for any parameters.
pub fn plan(_: &dllm_advance_params) -> Plan {
    Plan { kernel: "advance", grid: [1, 1, 1], block: 512, workspace_bytes: 0 }
}

/// Enqueues the kernel on `stream`. Allocates nothing, does not synchronise, and may be captured in a graph. May be called from
/// several threads; each launch in flight needs a state of its own.
///
/// # Errors
/// As [`validate`]; the driver's. Failures of unmask are reported in `progress`.
///
/// # Safety
/// 1. `stream` is a stream of the device's primary context, or null for the legacy default stream. `device` or a clone of it
///    lives until the work is done and graphs that hold it are destroyed.
/// 2. The addresses are of memory that the device can reach, of the sizes that [`dllm_advance_params`] gives, until the work
///    is done.
/// 3. Memory that the launch writes overlaps no other memory of the struct.
/// 4. Until the work is done, the host accesses `progress` only with atomic or volatile loads.
pub unsafe fn launch_raw(device: &Device, stream: *mut c_void, params: &dllm_advance_params) -> Result<()> {
    validate(params)?;
    // SAFETY: as promised by the caller.
    unsafe { super::launch(device, stream, "advance", plan(params), params) }
}

// SAFETY: 32-bit integers, no padding; any bits are a value.
unsafe impl bytemuck::Zeroable for dllm_advance_sequence {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for dllm_advance_sequence {}
// SAFETY: as above.
unsafe impl bytemuck::Zeroable for dllm_advance_control {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for dllm_advance_control {}
// SAFETY: as above.
unsafe impl bytemuck::Zeroable for dllm_progress {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for dllm_progress {}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> dllm_advance_params {
        dllm_advance_params {
            size: size_of::<dllm_advance_params>() as u64,
            control: 0x1000,
            sequences: 0x2000,
            tokens: 0x3000,
            committed: 0x4000,
            failed: 0x5000,
            quota: 0x6000,
            commit_before: 0x7000,
            steps: 0x8000,
            ratios: 0x9000,
            end_tokens: 0xa000,
            progress: 0xb000,
            num_sequences: 3,
            num_tokens: 100,
            mask_token: 0,
            num_end_tokens: 2,
            max_ratios: 8,
            reserved: 0,
        }
    }

    #[test]
    fn plans_one_block() {
        assert!(validate(&params()).is_ok());
        let without = dllm_advance_params { ratios: 0, max_ratios: 0, end_tokens: 0, num_end_tokens: 0, ..params() };
        assert!(validate(&without).is_ok());
        assert_eq!(plan(&params()), Plan { kernel: "advance", grid: [1, 1, 1], block: 512, workspace_bytes: 0 });
    }

    #[test]
    fn wrong_fields_are_named() {
        let wrong = |change: fn(&mut dllm_advance_params), says: &str| {
            let mut params = params();
            change(&mut params);
            let error = validate(&params).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        };
        wrong(|p| p.size += 8, "size: expected 120");
        wrong(|p| p.control = 0, "control: expected a device address, found 0");
        wrong(|p| p.sequences = 0x2008, "sequences: expected an address aligned to 16 bytes, found 0x2008");
        wrong(|p| p.tokens = 0, "tokens");
        wrong(|p| p.committed = 2, "committed");
        wrong(|p| p.failed = 0, "failed");
        wrong(|p| p.quota = 0, "quota");
        wrong(|p| p.commit_before = 0, "commit_before");
        wrong(|p| p.steps = 0, "steps");
        wrong(|p| p.progress = 0, "progress: expected a device address");
        wrong(|p| p.ratios = 1, "ratios: expected an address aligned to 4");
        wrong(|p| p.ratios = 0, "max_ratios: expected 0, as there are no ratios, found 8");
        wrong(|p| p.max_ratios = 0, "max_ratios: expected 1 to");
        wrong(|p| p.end_tokens = 2, "end_tokens: expected an address aligned to 4");
        wrong(|p| p.end_tokens = 0, "num_end_tokens: expected 0, as there are no end_tokens, found 2");
        wrong(|p| p.num_end_tokens = -1, "num_end_tokens: expected 1 to");
        wrong(|p| p.num_sequences = 65_536, "num_sequences: expected 1 to 65535");
        wrong(|p| p.num_tokens = 0, "num_tokens");
        wrong(|p| p.mask_token = -1, "mask_token: expected 0 to");
        wrong(|p| p.reserved = 1, "reserved: expected 0, found 1");
        wrong(|p| p.sequences = u64::MAX - 15, "sequences: expected rows within 64-bit addresses");
        wrong(|p| p.tokens = u64::MAX - 3, "tokens: expected rows within 64-bit addresses");
    }
}
