//! Rows further than 2^31 and 2^32 elements from the first: every kernel multiplies rows by strides in 64 bits.
//!
//! Memory of the CUDA emulator takes space only where it is written. So a few rows are spread over gigabytes, and the results must
//! have the bits of the same launch with rows close together, which the tests of each kernel compare with its reference.

use crate::common::{Random, device, once_on_device};
use bytemuck::Pod;
use dllm_kernels::Confidence;
use dllm_kernels::abi::*;
use dllm_kernels::backend::cuda::Cuda;
use dllm_kernels::backend::{
    Backend, BatchMetadata, BufferKind, Heads, LaunchBucket, QkvRows, SequenceRows, SessionLimits,
};
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::attention::{self, Form};
use dllm_kernels::ops::gather_scatter::Copy;
use dllm_kernels::ops::top_k_top_p::{self, TopKTopP};
use dllm_kernels::ops::unmask::{Outcome, Policy, Row, RowTable, Unmask, UnmaskConfig};
use dllm_kernels::ops::{embed, gather_scatter, merge_state, norm, rope, swiglu, unmask, vverify};
use half::bf16;
use softgpu::Opt;

once_on_device! {
    attention_far_apart,
    attention_with_a_large_workspace,
    cache_of_many_layers,
    embed_far_apart,
    gather_scatter_far_apart,
    merge_state_far_apart,
    norm_far_apart,
    rope_far_apart,
    rope_far_positions,
    swiglu_far_apart,
    unmask_far_apart,
    vverify_far_apart,
}

const ROWS: usize = 5;

/// Elements between rows. Row 2 is further than 2^31 elements from row 0, and row 4 further than 2^32. The low 32 bits of these
/// distances point into row 0 or past it, not to another row.
const FAR: usize = (1 << 30) + 128;

/// Allocates memory that the emulator does not fill, and that takes no space until it is written.
fn without_filling<R>(allocate: impl FnOnce() -> R) -> R {
    let before = softgpu::get(Opt::Poison);
    softgpu::set(Opt::Poison, 0);
    let allocated = allocate();
    softgpu::set(Opt::Poison, before);
    allocated
}

/// Rows of `width` elements, `stride` elements apart, in device memory that is not initialised between them.
struct Matrix<T> {
    buffer: Buffer<T>,
    width: usize,
    stride: usize,
}

impl<T: Pod> Matrix<T> {
    fn new(stream: &Stream, rows: usize, width: usize, stride: usize) -> Matrix<T> {
        softgpu::set(Opt::TotalMemory, 1 << 42);
        let buffer = without_filling(|| stream.alloc((rows - 1) * stride + width).unwrap());
        stream.synchronize().unwrap();
        Matrix { buffer, width, stride }
    }

    fn with(stream: &Stream, packed: &[T], width: usize, stride: usize) -> Matrix<T> {
        Matrix::of(stream, packed.len() / width, packed, width, stride)
    }

    /// A matrix of `rows` rows, of which the first are `packed`.
    fn of(stream: &Stream, rows: usize, packed: &[T], width: usize, stride: usize) -> Matrix<T> {
        let matrix = Matrix::new(stream, rows, width, stride);
        for (row, packed) in packed.chunks_exact(width).enumerate() {
            matrix.row(row).copy_from_slice(packed);
        }
        matrix
    }

    /// A row in the memory of the emulator, which is the host's.
    #[allow(clippy::mut_from_ref)]
    fn row(&self, row: usize) -> &mut [T] {
        assert!(row * self.stride + self.width <= self.buffer.len());
        let address = self.buffer.address() as *mut T;
        // SAFETY: within the allocation; the stream was synchronised, and the test holds one such slice at a time.
        unsafe { std::slice::from_raw_parts_mut(address.add(row * self.stride), self.width) }
    }

    fn address(&self) -> u64 {
        self.buffer.address()
    }

    /// Synchronises, and returns all rows without the gaps.
    fn read(&self) -> Vec<u8> {
        self.read_first((self.buffer.len() - self.width) / self.stride + 1)
    }

    /// As [`Matrix::read`], for the first rows.
    fn read_first(&self, rows: usize) -> Vec<u8> {
        self.buffer.stream().synchronize().unwrap();
        (0..rows).flat_map(|row| bytemuck::cast_slice::<T, u8>(self.row(row)).to_vec()).collect()
    }
}

/// Runs `launch` with rows close together and far apart, and compares the bytes of its results.
fn same_far_apart(launch: impl Fn(&Stream, usize) -> Vec<Vec<u8>>) {
    device();
    if !softgpu::active() {
        println!("not run: needs the CUDA emulator, whose memory takes space only where it is written");
        return;
    }
    let stream = crate::common::stream();
    let near = launch(&stream, 0);
    assert!(near.iter().all(|bytes| bytes.iter().any(|byte| *byte != 0)), "no results");
    let far = launch(&stream, FAR);
    for (i, (near, far)) in near.iter().zip(&far).enumerate() {
        assert!(near == far, "result {i}: rows far apart give other bits than rows close together");
    }
}

fn floats(seed: u64, len: usize) -> Vec<bf16> {
    Random(seed).floats(len)
}

const BF16: i32 = DLLM_BF16 as i32;

fn norm_far_apart() {
    const WIDTH: usize = 24;
    for map in [None, Some([4, 2, 0, 3, 1])] {
        same_far_apart(|stream, far| {
            let stride = far.max(WIDTH);
            let matrix = |seed| Matrix::with(stream, &floats(seed, ROWS * WIDTH), WIDTH, stride);
            let (x, delta, out) = (matrix(1), matrix(2), matrix(3));
            let weight = stream.upload(&floats(4, WIDTH)).unwrap();
            let delta_row = map.map(|map| stream.upload(&map).unwrap());
            let params = dllm_norm_params {
                size: size_of::<dllm_norm_params>() as u64,
                x: x.address(),
                delta: delta.address(),
                delta_row: delta_row.as_ref().map_or(0, |map| map.address()),
                weight: weight.address(),
                out: out.address(),
                x_stride: stride as i64,
                delta_stride: stride as i64,
                out_stride: stride as i64,
                max_rows: ROWS as i32,
                width: WIDTH as i32,
                dtype: BF16,
                eps: 1e-5,
                num_delta_rows: map.map_or(0, |map| map.len() as i32),
                ..Default::default()
            };
            // SAFETY: the buffers are as large as the struct says, and stay until the stream is synchronised.
            unsafe { norm::launch_raw(stream.device(), stream.raw(), &params) }.unwrap();
            vec![x.read(), out.read()]
        });
    }
}

fn swiglu_far_apart() {
    const WIDTH: usize = 24;
    same_far_apart(|stream, far| {
        let gate_up = Matrix::with(stream, &floats(1, ROWS * 2 * WIDTH), 2 * WIDTH, far.max(2 * WIDTH));
        let out = Matrix::with(stream, &floats(2, ROWS * WIDTH), WIDTH, far.max(WIDTH));
        let params = dllm_swiglu_params {
            size: size_of::<dllm_swiglu_params>() as u64,
            gate_up: gate_up.address(),
            out: out.address(),
            gate_up_stride: gate_up.stride as i64,
            out_stride: out.stride as i64,
            max_rows: ROWS as i32,
            width: WIDTH as i32,
            dtype: BF16,
            ..Default::default()
        };
        // SAFETY: as above.
        unsafe { swiglu::launch_raw(stream.device(), stream.raw(), &params) }.unwrap();
        vec![out.read()]
    });
}

fn merge_state_far_apart() {
    const WIDTH: usize = 2 * 32;
    same_far_apart(|stream, far| {
        let stride = far.max(WIDTH);
        let matrix = |seed| Matrix::with(stream, &floats(seed, ROWS * WIDTH), WIDTH, stride);
        let (a, b, out) = (matrix(1), matrix(2), matrix(3));
        let lse = |seed| stream.upload(&Random(seed).floats::<f32>(ROWS * 2)).unwrap();
        let (a_lse, b_lse, lse) = (lse(4), lse(5), lse(6));
        let params = dllm_merge_state_params {
            size: size_of::<dllm_merge_state_params>() as u64,
            a_out: a.address(),
            a_lse: a_lse.address(),
            b_out: b.address(),
            b_lse: b_lse.address(),
            out: out.address(),
            lse: lse.address(),
            a_stride: stride as i64,
            b_stride: stride as i64,
            out_stride: stride as i64,
            max_rows: ROWS as i32,
            num_heads: 2,
            head_dim: 32,
            dtype: BF16,
            ..Default::default()
        };
        // SAFETY: as above.
        unsafe { merge_state::launch_raw(stream.device(), stream.raw(), &params) }.unwrap();
        vec![out.read()]
    });
}

/// Rotated rows with caches whose rows are far apart too, in another order.
fn rope_far_apart() {
    const HEADS: usize = 2;
    const KV_HEADS: usize = 1;
    const DIM: usize = 32;
    same_far_apart(|stream, far| {
        let width = (HEADS + 2 * KV_HEADS) * DIM;
        let qkv = Matrix::with(stream, &floats(1, ROWS * width), width, far.max(width));
        let cache = |seed| Matrix::with(stream, &floats(seed, ROWS * DIM), DIM, far.max(DIM));
        let (k, v) = (cache(2), cache(3));
        let positions = stream.upload(&[3, 1, 4, 0, 2]).unwrap();
        let cache_row = stream.upload(&[4, 2, 0, 3, 1]).unwrap();
        let angles = rope::angles(stream, 10_000.0, DIM, 5).unwrap();
        let params = dllm_rope_params {
            size: size_of::<dllm_rope_params>() as u64,
            qkv: qkv.address(),
            positions: positions.address(),
            angles: angles.address(),
            k_cache: k.address(),
            v_cache: v.address(),
            cache_row: cache_row.address(),
            qkv_stride: qkv.stride as i64,
            cache_stride: k.stride as i64,
            max_rows: ROWS as i32,
            num_positions: 5,
            num_cache_rows: ROWS as i32,
            num_heads: HEADS as i32,
            num_kv_heads: KV_HEADS as i32,
            head_dim: DIM as i32,
            dtype: BF16,
            ..Default::default()
        };
        // SAFETY: as above.
        unsafe { rope::launch_raw(stream.device(), stream.raw(), &params) }.unwrap();
        vec![qkv.read(), k.read(), v.read()]
    });
}

/// Positions whose angles are further than 2^31 and 2^32 pairs from the first.
fn rope_far_positions() {
    const DIM: usize = 32;
    same_far_apart(|stream, far| {
        // Rows of the table, `DIM / 2` pairs each.
        let row_of = |i: usize| i * (far / (DIM / 2)).max(1);
        let table = rope::angles(stream, 10_000.0, DIM, ROWS).unwrap().read().unwrap();
        let angles = Matrix::with(stream, &table, DIM / 2, row_of(1) * (DIM / 2));
        let qkv = Matrix::with(stream, &floats(1, ROWS * 3 * DIM), 3 * DIM, 3 * DIM);
        let positions = stream.upload(&[0, 1, 2, 3, 4].map(|i| row_of(i) as i32)).unwrap();
        let params = dllm_rope_params {
            size: size_of::<dllm_rope_params>() as u64,
            qkv: qkv.address(),
            positions: positions.address(),
            angles: angles.address(),
            qkv_stride: qkv.stride as i64,
            max_rows: ROWS as i32,
            num_positions: row_of(4) as i32 + 1,
            num_heads: 1,
            num_kv_heads: 1,
            head_dim: DIM as i32,
            dtype: BF16,
            ..Default::default()
        };
        // SAFETY: as above.
        unsafe { rope::launch_raw(stream.device(), stream.raw(), &params) }.unwrap();
        vec![qkv.read()]
    });
}

/// The kernels that copy rows of bytes count in units of 16 bytes.
const UNIT: usize = 16;

fn embed_far_apart() {
    const WIDTH: usize = 2 * UNIT;
    same_far_apart(|stream, far| {
        let stride = (far * UNIT).max(WIDTH);
        let bytes = |seed| -> Vec<u8> { bytemuck::cast_slice(&floats(seed, ROWS * WIDTH / 2)).to_vec() };
        let table = Matrix::with(stream, &bytes(1), WIDTH, stride);
        let out = Matrix::with(stream, &bytes(2), WIDTH, stride);
        let tokens = stream.upload(&[4, 2, 0, 3, 1]).unwrap();
        let params = dllm_embed_params {
            size: size_of::<dllm_embed_params>() as u64,
            table: table.address(),
            tokens: tokens.address(),
            out: out.address(),
            table_stride_bytes: stride as i64,
            out_stride_bytes: stride as i64,
            row_bytes: WIDTH as i64,
            max_rows: ROWS as i32,
            num_tokens: ROWS as i32,
            vocab_size: ROWS as i32,
            ..Default::default()
        };
        // SAFETY: as above.
        unsafe { embed::launch_raw(stream.device(), stream.raw(), &params) }.unwrap();
        vec![out.read()]
    });
}

fn gather_scatter_far_apart() {
    const WIDTH: usize = 2 * UNIT;
    for copy in [Copy::Gather, Copy::Scatter] {
        same_far_apart(|stream, far| {
            let stride = (far * UNIT).max(WIDTH);
            let bytes = |seed| -> Vec<u8> { bytemuck::cast_slice(&floats(seed, ROWS * WIDTH / 2)).to_vec() };
            let source = Matrix::with(stream, &bytes(1), WIDTH, stride);
            let target = Matrix::with(stream, &bytes(2), WIDTH, stride);
            let index = stream.upload(&[4, 2, 0, 3, 1]).unwrap();
            let params = dllm_gather_scatter_params {
                size: size_of::<dllm_gather_scatter_params>() as u64,
                source: source.address(),
                target: target.address(),
                index: index.address(),
                source_stride_bytes: stride as i64,
                target_stride_bytes: stride as i64,
                row_bytes: WIDTH as i64,
                max_rows: ROWS as i32,
                num_indexed_rows: ROWS as i32,
                ..Default::default()
            };
            // SAFETY: as above.
            unsafe { gather_scatter::launch_raw(stream.device(), stream.raw(), &params, copy) }.unwrap();
            vec![target.read()]
        });
    }
}

fn vverify_far_apart() {
    const WIDTH: usize = 40;
    same_far_apart(|stream, far| {
        let stride = far.max(WIDTH);
        let matrix = |seed| Matrix::with(stream, &floats(seed, ROWS * WIDTH), WIDTH, stride);
        let (fresh, cached) = (matrix(1), matrix(2));
        let cached_row = stream.upload(&[4, 2, 0, 3, 1]).unwrap();
        let cu_rows = stream.upload(&[0, ROWS as i32]).unwrap();
        let (indices, cu_selected) = (stream.zeros::<i32>(ROWS).unwrap(), stream.zeros::<i32>(2).unwrap());
        let similarity = stream.zeros::<f32>(ROWS).unwrap();
        let workspace = stream.zeros::<u64>(ROWS).unwrap();
        let params = dllm_vverify_params {
            size: size_of::<dllm_vverify_params>() as u64,
            fresh: fresh.address(),
            cached: cached.address(),
            cached_row: cached_row.address(),
            cu_rows: cu_rows.address(),
            indices: indices.address(),
            cu_selected: cu_selected.address(),
            similarity: similarity.address(),
            workspace: workspace.address(),
            workspace_bytes: 8 * ROWS as u64,
            fresh_stride: stride as i64,
            cached_stride: stride as i64,
            ratio: 0.5,
            max_rows: ROWS as i32,
            num_sequences: 1,
            num_cached_rows: ROWS as i32,
            width: WIDTH as i32,
            dtype: BF16,
            update_cached: 1,
            ..Default::default()
        };
        // SAFETY: as above.
        unsafe { vverify::launch_raw(stream.device(), stream.raw(), &params) }.unwrap();
        let similarity = bytemuck::cast_slice(&similarity.read().unwrap()).to_vec();
        vec![cached.read(), similarity, bytemuck::cast_slice(&indices.read().unwrap()).to_vec()]
    });
}

/// Logits far apart: the plain form, and the general form with guidance, a draw and top-p.
fn unmask_far_apart() {
    const VOCAB: usize = 40;
    for general in [false, true] {
        same_far_apart(|stream, far| {
            let stride = far.max(VOCAB);
            let logits = |seed| Matrix::with(stream, &floats(seed, ROWS * VOCAB), VOCAB, stride);
            let (logits, uncond) = (logits(1), logits(2));
            let row = |position| Row { token: position, logits_row: [4, 2, 0, 3, 1][position], position };
            let table = RowTable::new(stream, &[(0..ROWS).map(row).collect()]).unwrap();
            let mut tokens = stream.upload(&[3; ROWS]).unwrap();
            let mut outcome = Outcome::new(stream, &table).unwrap();
            let mut workspace = unmask::workspace(stream, &table, VOCAB).unwrap();
            let cfg_scale = if general { 1.5 } else { 0.0 };
            let mut min_logit = stream.zeros::<f32>(ROWS).unwrap();
            let filter = TopKTopP {
                logits: &logits.buffer,
                uncond_logits: general.then_some(&uncond.buffer),
                vocab_size: VOCAB,
                logits_stride: stride,
                rows: &table,
                tokens: &tokens,
                top_p: Some(0.9),
                top_k: None,
                temperature: 0.8,
                cfg_scale,
                mask_token: 3,
                min_logit: &mut min_logit,
            };
            top_k_top_p::launch(stream, filter).unwrap();
            let config = UnmaskConfig {
                confidence: Confidence::Probability,
                policy: Policy::Threshold { threshold: 0.0, top_n: None },
                temperature: if general { 0.8 } else { 0.0 },
                tempered_confidence: false,
                cfg_scale,
                alg_temp: 0.0,
                seed: 7,
                mask_token: 3,
            };
            let arguments = Unmask {
                logits: &logits.buffer,
                uncond_logits: general.then_some(&uncond.buffer),
                vocab_size: VOCAB,
                logits_stride: stride,
                rows: &table,
                tokens: &mut tokens,
                commit_before: None,
                steps: None,
                min_logit: general.then_some(&min_logit),
                outcome: &mut outcome,
                workspace: &mut workspace,
            };
            unmask::launch(stream, arguments, &config).unwrap();
            let bytes = |floats: Vec<f32>| bytemuck::cast_slice(&floats).to_vec();
            let tokens: Vec<i32> = tokens.read().unwrap();
            assert!(!tokens.contains(&3), "all rows are committed: {tokens:?}");
            let confidence = bytes(outcome.confidence.read().unwrap());
            vec![bytemuck::cast_slice(&tokens).to_vec(), confidence, bytes(min_logit.read().unwrap())]
        });
    }
}

/// A launch of attention in bf16: one sequence, whose keys are one segment.
struct Attention {
    queries: usize,
    keys: usize,
    heads: usize,
    head_dim: usize,
    splits: usize,
    form: Form,
}

impl Attention {
    /// Launches with the given strides of queries (and outputs) and of keys (and values). Of `max_rows` rows only the first have
    /// queries. Returns outputs and log-sum-exps.
    fn run(&self, stream: &Stream, q_stride: usize, kv_stride: usize, max_rows: usize) -> Vec<Vec<u8>> {
        let Attention { queries, keys, heads, head_dim, splits, .. } = *self;
        let width = heads * head_dim;
        let matrix =
            |seed, rows, packed: usize, stride| Matrix::of(stream, rows, &floats(seed, packed * width), width, stride);
        let (q, out) = (matrix(1, max_rows, queries, q_stride), matrix(2, max_rows, queries, q_stride));
        let (k, v) = (matrix(3, keys, keys, kv_stride), matrix(4, keys, keys, kv_stride));
        let lse = stream.zeros::<f32>(max_rows * heads).unwrap();
        let cu_rows = stream.upload(&[0, queries as i32]).unwrap();
        let len = stream.upload(&[keys as i32]).unwrap();
        let shape = Heads { num_heads: heads, num_kv_heads: heads, head_dim };
        let workspace_len = attention::workspace_len(max_rows, shape, splits).max(4);
        let workspace = Matrix::<f32>::new(stream, 1, workspace_len, workspace_len);
        let segment = dllm_segment {
            k: k.address(),
            v: v.address(),
            len: len.address(),
            k_stride: kv_stride as i64,
            v_stride: kv_stride as i64,
            num_rows: keys as i32,
            ..Default::default()
        };
        let params = dllm_attention_params {
            size: size_of::<dllm_attention_params>() as u64,
            q: q.address(),
            out: out.address(),
            lse: lse.address(),
            cu_rows: cu_rows.address(),
            segments: [segment, Default::default(), Default::default()],
            workspace: workspace.address(),
            workspace_bytes: 4 * workspace_len as u64,
            q_stride: q_stride as i64,
            out_stride: q_stride as i64,
            scale: 0.2,
            max_rows: max_rows as i32,
            max_sequence_rows: queries as i32,
            num_sequences: 1,
            num_heads: heads as i32,
            num_kv_heads: heads as i32,
            head_dim: head_dim as i32,
            dtype: BF16,
            max_splits: splits as i32,
            form: match self.form {
                Form::Full => DLLM_ATTENTION_FORM_FULL,
                _ => DLLM_ATTENTION_FORM_STREAMING,
            } as i32,
            ..Default::default()
        };
        // SAFETY: as above.
        unsafe { attention::launch_raw(stream.device(), stream.raw(), &params) }.unwrap();
        vec![out.read_first(queries), bytemuck::cast_slice(&lse.read_first(queries * heads).unwrap()).to_vec()]
    }
}

/// Queries, outputs, keys and values, also in a full tile of keys, whose addresses are counted up.
fn attention_far_apart() {
    for (form, splits) in [(Form::Streaming, 1), (Form::Full, 1), (Form::Streaming, 3)] {
        let case = Attention { queries: ROWS, keys: 140, heads: 2, head_dim: 32, splits, form };
        // Key 32 is more than 2^32 elements from the first, and key 16 more than 2^31.
        same_far_apart(|stream, far| case.run(stream, far.max(64), (far / 8).max(64), ROWS));
    }
}

/// Partial results further than 2^31 elements from the first.
fn attention_with_a_large_workspace() {
    let case = Attention { queries: 3, keys: 64 * 64, heads: 1, head_dim: 128, splits: 64, form: Form::Streaming };
    same_far_apart(|stream, far| case.run(stream, 128, 128, if far > 0 { 270_000 } else { 3 }));
}

/// The last layer of a key/value cache begins further than 2^32 elements from the first. Rows are stored in it and read by another
/// pass, as in a decode.
fn cache_of_many_layers() {
    const KEYS: usize = 7;
    let heads = Heads { num_heads: 8, num_kv_heads: 8, head_dim: 128 };
    same_far_apart(|_, far| {
        let (layers, positions) = if far > 0 { (40, 120_000) } else { (1, KEYS) };
        assert!(far == 0 || (layers - 1) * positions * heads.kv_width() > 1 << 32);
        let mut cuda = Cuda::new(&device()).unwrap();
        let limits = SessionLimits {
            rows: KEYS,
            logit_rows: 1,
            sequences: 1,
            longest: KEYS,
            tokens: KEYS + 1,
            heads,
            selects_rows: false,
        };
        cuda.prepare(&limits, 10_000.0).unwrap();
        let mut cache = without_filling(|| cuda.kv_cache(layers, positions, heads.kv_width()).unwrap());
        let mut results = vec![];
        // All rows; then rows 2 and 3, which attend to the cached keys on both sides.
        for (start, end) in [(0, KEYS), (2, 4)] {
            let rows = end - start;
            let width = heads.qkv_width();
            let projection = floats(start as u64 + 1, rows * width);
            let table = stored_matrix(&cuda, &projection, rows, width);
            let mut batch = cuda.batch(&limits).unwrap();
            let index: Vec<usize> = (0..rows).collect();
            let positions: Vec<usize> = (start..end).collect();
            let metadata = BatchMetadata {
                sequences: &[SequenceRows { sequence: 0, start, end, num_keys: KEYS, cache_base: 0 }],
                positions: &positions,
                tokens: &index,
                logit_rows: &[],
                updates: &[],
                bucket: LaunchBucket { rows, longest: rows, logit_rows: 1, ..LaunchBucket::default() },
            };
            cuda.write_tokens(&(0..=KEYS as u32).collect::<Vec<u32>>()).unwrap();
            cuda.set_batch(&mut batch, &metadata).unwrap();
            let mut qkv = cuda.buffer(BufferKind::Activations, rows, width).unwrap();
            let mut out = cuda.buffer(BufferKind::Activations, rows, heads.q_width()).unwrap();
            cuda.embed(&table, &batch, &mut qkv).unwrap();
            cuda.rope((&mut qkv, QkvRows::ALL), heads, &batch, Some((&mut cache, layers - 1))).unwrap();
            cuda.attention((&qkv, QkvRows::ALL), heads, &batch, Some((&cache, layers - 1)), &mut out).unwrap();
            let out = cuda.read(&out, rows, heads.q_width()).unwrap();
            results.push(bytemuck::cast_slice(&out).to_vec());
        }
        results
    });
}

/// Loads a matrix to the device through a file.
fn stored_matrix(cuda: &Cuda, elements: &[bf16], rows: usize, width: usize) -> dllm_kernels::backend::cuda::Matrix {
    let dir = tempfile::tempdir().unwrap();
    let bytes = bytemuck::cast_slice(elements);
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::BF16, vec![rows, width], bytes).unwrap();
    safetensors::serialize_to_file([("m", view)], None, &dir.path().join("model.safetensors")).unwrap();
    let weights = dllm_kernels::model::Weights::open(dir.path()).unwrap();
    cuda.matrix(vec![weights.get("m", &[rows, width]).unwrap()], vec![]).unwrap()
}
