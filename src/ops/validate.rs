//! Checks of parameter fields that several ops share. Each error has the field, the expected and the found value.

use super::Plan;
use crate::abi;
use crate::error::{Error, Result};

/// Checks that an element type is one of those that an op takes, and returns its bytes.
pub fn dtype(dtype: i32, taken: &[abi::dllm_dtype]) -> Result<i64> {
    if !taken.iter().any(|t| *t as i64 == i64::from(dtype)) {
        let names = ["bf16 (0)", "f16 (1)", "f32 (2)"];
        let taken: Vec<_> = taken.iter().filter_map(|t| names.get(*t as usize)).copied().collect();
        return Err(Error::argument("dtype", taken.join(" or "), dtype));
    }
    Ok(if dtype as abi::dllm_dtype == abi::DLLM_F32 { 4 } else { 2 })
}

/// Checks that `min <= value <= max`.
pub fn within(name: &'static str, value: i64, min: i64, max: i64) -> Result<()> {
    if (min..=max).contains(&value) { Ok(()) } else { Err(Error::argument(name, format!("{min} to {max}"), value)) }
}

/// Checks that a size is at least 1.
pub fn size(name: &'static str, value: i32) -> Result<()> {
    within(name, value.into(), 1, i32::MAX.into())
}

/// Checks the `size` field, which is the size of the struct `P`.
pub fn struct_size<P>(size: u64) -> Result<()> {
    if size == size_of::<P>() as u64 {
        Ok(())
    } else {
        Err(Error::argument("size", format!("{}, the size of this version's struct", size_of::<P>()), size))
    }
}

/// Checks that an address is not 0, and aligned to `align` bytes.
pub fn address(name: &'static str, address: u64, align: u64) -> Result<()> {
    match address {
        0 => Err(Error::argument(name, "a device address", "0")),
        _ => optional(name, address, align),
    }
}

/// Checks that an address is 0 or aligned to `align` bytes.
pub fn optional(name: &'static str, address: u64, align: u64) -> Result<()> {
    match address % align {
        0 => Ok(()),
        _ => Err(Error::argument(name, format!("an address aligned to {align} bytes"), format!("{address:#x}"))),
    }
}

/// Checks a stride in bytes between rows of `row_bytes`.
pub fn stride_bytes(name: &'static str, stride: i64, row_bytes: i64) -> Result<()> {
    if stride >= row_bytes && stride % 16 == 0 {
        Ok(())
    } else {
        Err(Error::argument(name, format!("a multiple of 16 bytes, at least {row_bytes}"), stride))
    }
}

/// Checks a stride in elements of `element_bytes` between rows of `width` elements.
pub fn stride(name: &'static str, stride: i64, width: i64, element_bytes: i64) -> Result<()> {
    let unit = 16 / element_bytes;
    if stride >= width && stride % unit == 0 {
        Ok(())
    } else {
        let expected = format!("a multiple of {unit} elements (16 bytes), at least the width, {width}");
        Err(Error::argument(name, expected, stride))
    }
}

/// Checks that a row of `width` elements is a multiple of 16 bytes.
pub fn width(name: &'static str, width: i32, element_bytes: i64) -> Result<()> {
    size(name, width)?;
    let unit = 16 / element_bytes;
    match i64::from(width) % unit {
        0 => Ok(()),
        _ => Err(Error::argument(name, format!("a multiple of {unit} elements (16 bytes)"), width)),
    }
}

/// Checks that a value is neither infinite nor NaN.
pub fn finite(name: &'static str, value: f32) -> Result<()> {
    if value.is_finite() { Ok(()) } else { Err(Error::argument(name, "a finite number", value)) }
}

/// Checks a temperature. Below 1e-6, its reciprocal times a difference of logits could overflow to NaN.
pub fn temperature(name: &'static str, value: f32) -> Result<()> {
    if value == 0.0 || (1e-6..=1e6).contains(&value) {
        Ok(())
    } else {
        Err(Error::argument(name, "0, or 1e-6 to 1e6", value))
    }
}

/// Checks a guidance scale: above 0 with unconditional logits, 0 without.
pub fn guidance(cfg_scale: f32, uncond_logits: u64) -> Result<()> {
    match (cfg_scale, uncond_logits) {
        (0.0, 0) => Ok(()),
        (w, 0) => Err(Error::argument("cfg_scale", "0, as there are no uncond_logits", w)),
        (w, _) if w > 0.0 && w.is_finite() => Ok(()),
        (w, _) => Err(Error::argument("cfg_scale", "a number above 0, as there are uncond_logits", w)),
    }
}

/// Checks that a flag is 0 or 1.
pub fn flag(name: &'static str, value: i32) -> Result<()> {
    within(name, value.into(), 0, 1)
}

/// Checks that a reserved field is 0.
pub fn reserved(value: i32) -> Result<()> {
    match value {
        0 => Ok(()),
        _ => Err(Error::argument("reserved", "0", value)),
    }
}

/// Memory region of the rows of a matrix, whose fields were checked one by one.
#[derive(Clone, Copy)]
pub struct Region {
    pub name: &'static str,
    pub address: u64,
    pub rows: i32,
    pub stride_bytes: i64,
    pub row_bytes: i64,
}

impl Region {
    /// Returns the region of rows of `width` elements, `stride` elements apart.
    pub fn new(name: &'static str, address: u64, rows: i32, stride: i64, width: i64, element_bytes: i64) -> Region {
        // A saturated stride is rejected by `fits_address_space`.
        let stride_bytes = stride.saturating_mul(element_bytes);
        Region { name, address, rows, stride_bytes, row_bytes: width * element_bytes }
    }

    /// One past the last byte of the last row.
    fn end(self) -> i128 {
        i128::from(self.address)
            + i128::from(self.rows - 1) * i128::from(self.stride_bytes)
            + i128::from(self.row_bytes)
    }

    /// Checks that no row extends past the 64-bit address space.
    pub fn fits_address_space(self) -> Result<()> {
        if self.end() <= i128::from(u64::MAX) {
            Ok(())
        } else {
            let found = format!("{} rows, {} bytes apart, from {:#x}", self.rows, self.stride_bytes, self.address);
            Err(Error::argument(self.name, "rows within 64-bit addresses", found))
        }
    }

    /// Checks that no row overlaps a row of `other`. Columns of one matrix, with the same stride, may be interleaved. With
    /// different strides, the gaps between rows must not hold rows of the other region either.
    pub fn disjoint_from(self, other: Region) -> Result<()> {
        let (begin, other_begin) = (i128::from(self.address), i128::from(other.address));
        let disjoint = self.end() <= other_begin || other.end() <= begin;
        let stride = i128::from(self.stride_bytes);
        let column = (other_begin - begin).rem_euclid(stride);
        let is_interleaved = self.stride_bytes == other.stride_bytes
            && column >= i128::from(self.row_bytes)
            && column + i128::from(other.row_bytes) <= stride;
        if disjoint || is_interleaved {
            Ok(())
        } else {
            let found = format!("{:#x}, {} at {:#x}", self.address, other.name, other.address);
            Err(Error::argument(self.name, format!("memory that does not overlap {}", other.name), found))
        }
    }
}

/// Checks that a workspace has at least the bytes of the plan.
pub fn workspace(address: u64, bytes: u64, plan: &Plan) -> Result<()> {
    self::address("workspace", address, 16)?;
    if bytes >= plan.workspace_bytes {
        Ok(())
    } else {
        Err(Error::argument("workspace_bytes", format!("at least {}", plan.workspace_bytes), bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::Region;

    #[test]
    fn overlap_and_the_end_of_memory_are_seen() {
        let region =
            |address, rows, stride_bytes, row_bytes| Region { name: "out", address, rows, stride_bytes, row_bytes };
        let disjoint = |a: Region, b: Region| (a.disjoint_from(b).is_ok(), b.disjoint_from(a).is_ok());
        let rows = region(1000, 3, 64, 48);
        assert_eq!(disjoint(rows, region(1000, 3, 64, 48)), (false, false));
        assert_eq!(disjoint(rows, region(1176, 3, 64, 48)), (true, true), "after the last row, before its stride ends");
        assert_eq!(disjoint(rows, region(1160, 1, 16, 16)), (false, false));
        assert_eq!(disjoint(rows, region(1048, 3, 64, 16)), (true, true), "interleaved");
        assert_eq!(disjoint(rows, region(1032, 3, 64, 16)), (false, false));
        assert_eq!(disjoint(rows, region(1048, 9, 32, 16)), (false, false), "other strides");
        assert!(region(u64::MAX - 100, 2, 64, 16).fits_address_space().is_ok());
        assert!(region(u64::MAX - 100, 3, 64, 16).fits_address_space().is_err());
        let far = Region::new("out", 16, i32::MAX, i64::MAX, 8, 4).fits_address_space().unwrap_err().to_string();
        assert!(far.contains("out: expected rows within 64-bit addresses"), "{far}");
    }
}
