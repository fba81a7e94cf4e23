//! Weights on the device: each element is the stored one, rounded to bf16 (nearest, ties to even), wherever the chunks and pieces
//! of the upload end.
//!
//! A weight is seen through the embedding kernel, which copies rows, and through [`Backend::read`].

use crate::common::{device, once_on_device};
use dllm_kernels::backend::cuda::Cuda;
use dllm_kernels::backend::{Backend, BatchMetadata, BufferKind, Heads, LaunchBucket, SequenceRows, SessionLimits};
use dllm_kernels::model::Weights;
use half::f16;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::sync::{Arc, Mutex};

once_on_device! {
    bf16_bits_are_kept,
    f16_is_rounded,
    f32_is_rounded,
    bf16_in_three_chunks,
    f16_in_two_chunks,
    f32_in_two_chunks,
}

/// Elements of a chunk of the upload: 32 MiB of bf16.
const CHUNK: usize = 16 << 20;

/// A tensor of a file: element type, rows, and little-endian bytes.
struct Stored {
    dtype: Dtype,
    rows: usize,
    bytes: Vec<u8>,
}

/// Results of an upload.
struct Uploaded {
    /// All elements of the stacked matrix, as bf16 bits. A NaN may have changed its payload.
    bits: Vec<u16>,
    /// Bytes that were reported after each chunk.
    progress: Vec<u64>,
}

/// Writes the tensors to a file, loads them to the device as one matrix of `width` columns, and reads all elements back.
fn upload(width: usize, tensors: &[Stored]) -> Uploaded {
    let dir = tempfile::tempdir().unwrap();
    let views = tensors.iter().enumerate().map(|(i, t)| {
        let view = TensorView::new(t.dtype, vec![t.rows, width], &t.bytes).unwrap();
        (i.to_string(), view)
    });
    safetensors::serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
    let weights = Weights::open(dir.path()).unwrap();
    let parts = tensors.iter().enumerate().map(|(i, t)| weights.get(&i.to_string(), &[t.rows, width]).unwrap());

    let progress = Arc::new(Mutex::new(Vec::new()));
    let reported = progress.clone();
    let mut cuda = Cuda::for_weights(&device(), move |bytes| reported.lock().unwrap().push(bytes)).unwrap();
    let table = cuda.matrix(parts.collect(), vec![]).unwrap();

    let rows = tensors.iter().map(|t| t.rows).sum();
    let heads = Heads { num_heads: 1, num_kv_heads: 1, head_dim: 32 };
    let limits = SessionLimits {
        rows,
        logit_rows: 1,
        sequences: 1,
        longest: rows,
        tokens: rows + 1,
        heads,
        selects_rows: false,
    };
    cuda.prepare(&limits, 10_000.0).unwrap();
    let all: Vec<usize> = (0..rows).collect();
    cuda.write_tokens(&(0..=rows as u32).collect::<Vec<u32>>()).unwrap();
    let mut batch = cuda.batch(&limits).unwrap();
    let metadata = BatchMetadata {
        sequences: &[SequenceRows { sequence: 0, start: 0, end: rows, num_keys: rows, cache_base: 0 }],
        positions: &all,
        tokens: &all,
        logit_rows: &[],
        updates: &[],
        bucket: LaunchBucket { rows, longest: rows, logit_rows: 1, ..LaunchBucket::default() },
    };
    cuda.set_batch(&mut batch, &metadata).unwrap();
    let mut out = cuda.buffer(BufferKind::Activations, rows, width).unwrap();
    cuda.embed(&table, &batch, &mut out).unwrap();
    let bits = cuda.read(&out, rows, width).unwrap().iter().map(|x| (x.to_bits() >> 16) as u16).collect();
    let progress = progress.lock().unwrap().clone();
    Uploaded { bits, progress }
}

/// Rounds f32 bits to bf16 bits: to nearest, ties to even, in integers.
fn rounded(bits: u32) -> u16 {
    match bits & 0x7fff_ffff {
        0x7f80_0001.. => 0x7fc0,
        _ => (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16,
    }
}

#[track_caller]
fn assert_same(what: &str, got: &[u16], want: impl ExactSizeIterator<Item = u16>) {
    assert_eq!(got.len(), want.len(), "{what}");
    let is_nan = |bits: u16| bits & 0x7fff > 0x7f80;
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(*got == want || is_nan(*got) && is_nan(want), "{what}: element {i}: {got:#06x}, expected {want:#06x}");
    }
}

fn bytes_of<const N: usize, T>(values: impl Iterator<Item = T>, bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.flat_map(bytes).collect()
}

/// Every bf16 number.
fn bf16_bits_are_kept() {
    let bytes = bytes_of(0..=u16::MAX, u16::to_le_bytes);
    let got = upload(256, &[Stored { dtype: Dtype::BF16, rows: 256, bytes }]);
    assert_same("bf16", &got.bits, (0..=u16::MAX).collect::<Vec<_>>().into_iter());
}

/// Every f16 number. They have three bits more than bf16, and subnormal numbers that bf16 has too.
fn f16_is_rounded() {
    let bytes = bytes_of(0..=u16::MAX, u16::to_le_bytes);
    let got = upload(256, &[Stored { dtype: Dtype::F16, rows: 256, bytes }]);
    let want: Vec<u16> = (0..=u16::MAX).map(|bits| rounded(f16::from_bits(bits).to_f32().to_bits())).collect();
    assert_same("f16", &got.bits, want.into_iter());
}

/// Every bf16 number and those beyond it: just above, just below half of the way to the next, half of it, just above half, and
/// just below the next.
fn f32_is_rounded() {
    let low = [0, 1, 0x7fff, 0x8000, 0x8001, 0xc000, 0xffff, 0x4000];
    let values: Vec<u32> = (0..1 << 16).flat_map(|high: u32| low.map(|low| high << 16 | low)).collect();
    let bytes = bytes_of(values.iter().copied(), u32::to_le_bytes);
    let got = upload(1024, &[Stored { dtype: Dtype::F32, rows: 512, bytes }]);
    // One is halfway between 0x3f80 and 0x3f81, one is just above it, and one is halfway between 0x3f81 and 0x3f82.
    let known = |bits: u32| got.bits[values.iter().position(|value| *value == bits).unwrap()];
    assert_eq!([0x3f80_8000, 0x3f80_8001, 0x3f81_8000].map(known), [0x3f80, 0x3f81, 0x3f82]);
    assert_same("f32", &got.bits, values.iter().map(|value| rounded(*value)));
}

/// Different bits for each element, those of finite numbers.
fn pattern(i: usize) -> u32 {
    (i as u32).wrapping_mul(0x9e37_79b9) & 0xbfff_ffff
}

const WIDTH: usize = 2048;

/// A small first tensor, so that the second one starts elsewhere, and one that `chunks` chunks do not hold. The rest is more than
/// one of the pieces that threads convert.
fn in_chunks<const N: usize>(dtype: Dtype, chunks: usize, bytes: impl Fn(u32) -> [u8; N], want: impl Fn(u32) -> u16) {
    let rows = [3, chunks * CHUNK / WIDTH + 131];
    let first = [0, rows[0] * WIDTH];
    let len = (rows[0] + rows[1]) * WIDTH;
    let stored = |i: usize| {
        let bytes = (first[i]..first[i] + rows[i] * WIDTH).flat_map(|i| bytes(pattern(i))).collect();
        Stored { dtype, rows: rows[i], bytes }
    };
    let got = upload(WIDTH, &[stored(0), stored(1)]);
    assert_same(&format!("{dtype:?} in chunks"), &got.bits, (0..len).map(|i| want(pattern(i))));
    // The first tensor, each full chunk of the second, and its rest.
    let ends = (0..=chunks).map(|chunk| first[1] + chunk * CHUNK).chain([len]);
    assert_eq!(got.progress, ends.map(|end| 2 * end as u64).collect::<Vec<u64>>(), "{dtype:?}");
}

/// The third chunk takes the memory of the first, from which the copy must be done.
fn bf16_in_three_chunks() {
    let high = |bits: u32| (bits >> 16) as u16;
    in_chunks(Dtype::BF16, 2, |bits| high(bits).to_le_bytes(), high);
}

fn f16_in_two_chunks() {
    let number = |bits: u32| f16::from_bits((bits >> 16) as u16);
    let want = |bits: u32| rounded(number(bits).to_f32().to_bits());
    in_chunks(Dtype::F16, 1, |bits| number(bits).to_le_bytes(), want);
}

fn f32_in_two_chunks() {
    in_chunks(Dtype::F32, 1, |bits| bits.to_le_bytes(), rounded);
}
