//! Matrix transposition in blocks of 4 x 4. Every product transposes activations between `[rows, width]` and
//! `[width, rows]`; element by element, this would take a tenth of its time.

/// Copies `dst[c * dst_stride + r] = src[r * src_stride + c]` for r < rows, c < cols.
///
/// # Safety
/// The elements named above are valid: in `src` for reads, in `dst` for writes. The two do not overlap.
#[inline(always)]
pub unsafe fn transpose(
    src: *const f32,
    src_stride: usize,
    dst: *mut f32,
    dst_stride: usize,
    rows: usize,
    cols: usize,
) {
    // SAFETY: r + 4 <= rows and c + 4 <= cols, and the caller's condition.
    unsafe {
        let (whole_rows, whole_cols) = (rows / 4 * 4, cols / 4 * 4);
        for r in (0..whole_rows).step_by(4) {
            for c in (0..whole_cols).step_by(4) {
                transpose_4x4(src.add(r * src_stride + c), src_stride, dst.add(c * dst_stride + r), dst_stride);
            }
        }
        for r in 0..rows {
            for c in if r < whole_rows { whole_cols } else { 0 }..cols {
                *dst.add(c * dst_stride + r) = *src.add(r * src_stride + c);
            }
        }
    }
}

/// Transposes one 4 x 4 block.
///
/// # Safety
/// As [`transpose`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn transpose_4x4(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
    use std::arch::x86_64::*;
    // SAFETY: SSE is part of x86-64; the caller's condition for the addresses.
    unsafe {
        let mut r0 = _mm_loadu_ps(src);
        let mut r1 = _mm_loadu_ps(src.add(src_stride));
        let mut r2 = _mm_loadu_ps(src.add(2 * src_stride));
        let mut r3 = _mm_loadu_ps(src.add(3 * src_stride));
        _MM_TRANSPOSE4_PS(&mut r0, &mut r1, &mut r2, &mut r3);
        _mm_storeu_ps(dst, r0);
        _mm_storeu_ps(dst.add(dst_stride), r1);
        _mm_storeu_ps(dst.add(2 * dst_stride), r2);
        _mm_storeu_ps(dst.add(3 * dst_stride), r3);
    }
}

/// Transposes one 4 x 4 block.
///
/// # Safety
/// As [`transpose`].
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
unsafe fn transpose_4x4(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
    for r in 0..4 {
        for c in 0..4 {
            // SAFETY: the caller's condition.
            unsafe { *dst.add(c * dst_stride + r) = *src.add(r * src_stride + c) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::transpose;

    #[test]
    fn transposes_all_small_shapes() {
        for rows in 0..10 {
            for cols in 0..10 {
                let src: Vec<f32> = (0..rows * 13).map(|i| i as f32).collect();
                let mut dst = vec![-1.0; cols * 11];
                // SAFETY: strides 13 and 11 exceed the widths.
                unsafe { transpose(src.as_ptr(), 13, dst.as_mut_ptr(), 11, rows, cols) };
                for (i, got) in dst.iter().enumerate() {
                    let (c, r) = (i / 11, i % 11);
                    assert_eq!(*got, if r < rows { src[r * 13 + c] } else { -1.0 });
                }
            }
        }
    }
}
