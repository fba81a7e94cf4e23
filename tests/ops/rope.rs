//! Compares rotary embedding and the writes to the cache, launched by the shipped code, with the reference.
//!
//! The reference defines every rounding. So the rotated rows, the cache, and the elements that must not be written are bit-equal.

use crate::common::{
    Float, Random, device, in_every_order, narrowed, on_device, poison, same_bits, spread, stream, widened,
};
use dllm_kernels::abi::{DLLM_INDEX_FAILED, DLLM_NONE_FAILED, dllm_rope_params};
use dllm_kernels::backend::Heads;
use dllm_kernels::ops::rope::{self, Caches, Rope};
use dllm_kernels::reference::rope::{Angles, rotate_rounded};
use half::{bf16, f16};

on_device! {
    equals_the_reference,
    far_positions_and_many_rows,
    counts_on_the_device,
    leaves_out_rows_out_of_range,
    rows_may_stay_out_of_the_cache,
    rotates_without_caches,
    caches_keys_alone,
    same_bits_whatever_else_runs,
    passes_on_what_is_not_finite,
    replays,
    wrong_sizes_are_errors,
}

const THETA: f32 = 500_000.0;
const NUM_POSITIONS: usize = 50;

fn heads(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> Heads {
    Heads { num_heads, num_kv_heads, head_dim }
}

#[derive(Clone)]
struct Case<T> {
    heads: Heads,
    qkv: Vec<T>,
    positions: Vec<i32>,
    /// Positions of the table of angles.
    num_positions: usize,
    num_cache_rows: usize,
    cache_row: Vec<i32>,
    count: Option<i32>,
    /// Whether rows have values, and a cache for them.
    values: bool,
}

/// Results of a launch, including the elements between rows: qkv, cached keys, cached values.
type Output<T> = [Vec<T>; 3];

impl<T: Float> Case<T> {
    fn new(random: &mut Random, rows: usize, heads: Heads) -> Case<T> {
        let positions = (0..rows).map(|_| random.below(NUM_POSITIONS) as i32).collect();
        let num_cache_rows = rows + 3;
        let cache_row = random.distinct(rows, num_cache_rows);
        Case {
            heads,
            qkv: random.floats(rows * heads.qkv_width()),
            positions,
            num_positions: NUM_POSITIONS,
            num_cache_rows,
            cache_row,
            count: None,
            values: true,
        }
    }

    fn kv_width(&self) -> usize {
        self.heads.num_kv_heads * self.heads.head_dim
    }

    /// Returns the width of a row of qkv.
    fn width(&self) -> usize {
        self.heads.qkv_width() - if self.values { 0 } else { self.kv_width() }
    }

    /// Returns the strides of qkv and of the caches.
    fn strides(&self) -> [usize; 2] {
        [self.width() + 8, self.kv_width() + 16]
    }

    /// Returns the same rows without values.
    fn without_values(&self) -> Case<T> {
        let width = self.width() - self.kv_width();
        let qkv = self.qkv.chunks_exact(self.width()).flat_map(|row| &row[..width]).copied().collect();
        Case { qkv, values: false, ..self.clone() }
    }

    /// Launches rope and returns its results and the failure code.
    fn run(&self) -> (Output<T>, i32) {
        let [qkv_stride, cache_stride] = self.strides();
        let stream = stream();
        let qkv = stream.upload(&spread(&self.qkv, self.width(), qkv_stride)).unwrap();
        let [k, v] = [(); 2].map(|_| stream.upload(&vec![poison::<T>(); self.num_cache_rows * cache_stride]).unwrap());
        let positions = stream.upload(&self.positions).unwrap();
        let cache_row = stream.upload(&self.cache_row).unwrap();
        let angles = rope::angles(&stream, THETA, self.heads.head_dim, self.num_positions).unwrap();
        let count = self.count.map(|count| stream.upload(&[count]).unwrap());
        let failed = stream.upload(&[DLLM_NONE_FAILED]).unwrap();
        let params = dllm_rope_params {
            size: size_of::<dllm_rope_params>() as u64,
            qkv: qkv.address(),
            positions: positions.address(),
            angles: angles.address(),
            k_cache: k.address(),
            v_cache: if self.values { v.address() } else { 0 },
            cache_row: cache_row.address(),
            count: count.as_ref().map_or(0, |count| count.address()),
            failed: failed.address(),
            qkv_stride: qkv_stride as i64,
            cache_stride: cache_stride as i64,
            max_rows: self.positions.len() as i32,
            num_positions: self.num_positions as i32,
            num_cache_rows: self.num_cache_rows as i32,
            num_heads: self.heads.num_heads as i32,
            num_kv_heads: self.heads.num_kv_heads as i32,
            head_dim: self.heads.head_dim as i32,
            dtype: T::DTYPE as i32,
            reserved: 0,
        };
        // SAFETY: the buffers are as large as the struct says, and stay until the stream is synchronised.
        unsafe { rope::launch_raw(stream.device(), stream.raw(), &params) }.unwrap();
        ([qkv, k, v].map(|buffer| buffer.read().unwrap()), failed.read().unwrap()[0])
    }

    /// Returns the results of the reference.
    fn want(&self) -> (Output<T>, i32) {
        let (width, kv_width) = (self.width(), self.kv_width());
        let mut angles = Angles::default();
        angles.extend(THETA, self.heads.head_dim, self.num_positions);
        let mut qkv = self.qkv.clone();
        let [mut k, mut v] = [(); 2].map(|_| vec![poison::<T>(); self.num_cache_rows * kv_width]);
        let mut failed = DLLM_NONE_FAILED;
        let counted = self.count.map_or(self.positions.len(), |count| count.max(0) as usize);
        for (i, row) in qkv.chunks_exact_mut(width).enumerate().take(counted) {
            let (position, cache_row) = (self.positions[i], self.cache_row[i]);
            if !(0..self.num_positions as i32).contains(&position)
                || !(-1..self.num_cache_rows as i32).contains(&cache_row)
            {
                failed = DLLM_INDEX_FAILED;
                continue;
            }
            let (rotated, values) = row.split_at_mut(if self.values { width - kv_width } else { width });
            let mut wide = widened(rotated);
            rotate_rounded(&mut wide, self.heads.head_dim, angles.at(position as usize), T::round);
            rotated.copy_from_slice(&narrowed::<T>(&wide));
            if let Ok(cache_row) = usize::try_from(cache_row) {
                k[cache_row * kv_width..][..kv_width].copy_from_slice(&rotated[rotated.len() - kv_width..]);
                v[cache_row * kv_width..][..values.len()].copy_from_slice(values);
            }
        }
        let [qkv_stride, cache_stride] = self.strides();
        let [k, v] = [k, v].map(|cache| spread(&cache, kv_width, cache_stride));
        ([spread(&qkv, width, qkv_stride), k, v], failed)
    }

    fn check(&self, what: &str) {
        let ((got, failed), (want, want_failed)) = (self.run(), self.want());
        let what = format!("{what}: {} rows, count {:?}, {:?}", self.positions.len(), self.count, self.heads);
        for (name, got, want) in
            [("qkv", &got[0], &want[0]), ("keys", &got[1], &want[1]), ("values", &got[2], &want[2])]
        {
            same_bits(&format!("{name}, {what}"), got, want);
        }
        assert_eq!(failed, want_failed, "{what}");
    }
}

/// Every head dimension; one head, groups, and the shapes of published models.
fn equals_the_reference() {
    fn check<T: Float>() {
        let random = &mut Random(1);
        for (num_heads, num_kv_heads, head_dim) in
            [(1, 1, 32), (4, 2, 32), (3, 1, 64), (14, 2, 64), (28, 4, 128), (32, 32, 128)]
        {
            for rows in [1, 5] {
                Case::<T>::new(random, rows, heads(num_heads, num_kv_heads, head_dim)).check("random");
            }
        }
    }
    check::<bf16>();
    check::<f16>();
}

/// Positions at and around each power of two from 1,024 to 65,536, in a launch of more than 512 rows and a large cache.
fn far_positions_and_many_rows() {
    let random = &mut Random(11);
    let edges = (10..=16).flat_map(|bits| [(1 << bits) - 1, 1 << bits, (1 << bits) + 1]);
    let edges: Vec<i32> = edges.chain([2_999, 5_000, 12_345, 50_000, 69_999]).collect();
    let num_cache_rows = 70_000;
    let cache_row = random.distinct(600, num_cache_rows);
    let case = Case::<bf16> { num_cache_rows, cache_row, ..Case::new(random, 600, heads(2, 1, 32)) };
    let positions = (0..600).map(|row| edges[row % edges.len()]).collect();
    Case { positions, num_positions: 70_000, ..case }.check("far positions");
}

fn counts_on_the_device() {
    let case = Case::<bf16>::new(&mut Random(2), 5, heads(4, 2, 32));
    for count in [0, 1, 4, 5, 6, i32::MAX, -1, i32::MIN] {
        Case { count: Some(count), ..case.clone() }.check("counted");
    }
}

fn leaves_out_rows_out_of_range() {
    let case = Case::<f16>::new(&mut Random(3), 5, heads(4, 2, 32));
    for row in [0, 4] {
        for wrong in [-1, NUM_POSITIONS as i32, i32::MAX, i32::MIN] {
            let mut case = case.clone();
            case.positions[row] = wrong;
            case.check("position");
            case.count = Some(4); // rows from the count on are not read
            case.check("position");
        }
        for wrong in [-2, 8, i32::MAX, i32::MIN] {
            let mut case = case.clone();
            case.cache_row[row] = wrong;
            case.check("cache row");
        }
    }
}

fn rows_may_stay_out_of_the_cache() {
    let mut case = Case::<bf16>::new(&mut Random(4), 5, heads(4, 2, 64));
    case.cache_row[1] = -1;
    case.cache_row[4] = -1;
    case.check("some");
    Case { cache_row: vec![-1; 5], ..case }.check("all");
}

/// The safe launch, without and with caches.
fn rotates_without_caches() {
    let case = Case::<bf16>::new(&mut Random(5), 5, heads(28, 4, 128));
    let (width, kv_width, [qkv_stride, cache_stride]) = (case.heads.qkv_width(), case.kv_width(), case.strides());
    let packed = |rows: &[bf16], width: usize, stride: usize| -> Vec<bf16> {
        rows.chunks_exact(stride).flat_map(|row| &row[..width]).copied().collect()
    };
    let (want, _) = case.want();
    let stream = stream();
    let angles = rope::angles(&stream, THETA, 128, NUM_POSITIONS).unwrap();
    let positions = stream.upload(&case.positions).unwrap();
    let row = stream.upload(&case.cache_row).unwrap();
    for with_caches in [false, true] {
        let mut qkv = stream.upload(&case.qkv).unwrap();
        let [mut k, mut v] =
            [(); 2].map(|_| stream.upload(&vec![poison::<bf16>(); case.num_cache_rows * kv_width]).unwrap());
        let caches = with_caches.then_some(Caches { k: &mut k, v: Some(&mut v), row: &row });
        let (heads, positions, angles) = (case.heads, &positions, &angles);
        let rows = Rope { heads, qkv: &mut qkv, positions, count: None, angles, caches, failed: None };
        rope::launch(&stream, rows).unwrap();
        same_bits("qkv", &qkv.read().unwrap(), &packed(&want[0], width, qkv_stride));
        for (cache, want) in [(k, &want[1]), (v, &want[2])] {
            let want = if with_caches { packed(want, kv_width, cache_stride) } else { vec![poison(); cache.len()] };
            same_bits("cache", &cache.read().unwrap(), &want);
        }
    }
}

/// Rows `[q | k]` with a cache for keys: the results are those with values.
fn caches_keys_alone() {
    fn check<T: Float>() {
        // Pairs that fill the 256 threads of a block, and pairs that leave threads without work.
        for (num_heads, num_kv_heads, head_dim) in [(1, 1, 32), (14, 2, 64), (28, 4, 128), (32, 32, 128)] {
            let case = Case::<T>::new(&mut Random(9), 5, heads(num_heads, num_kv_heads, head_dim));
            let mut alone = case.without_values();
            alone.check("keys alone");
            let ([_, want, _], _) = case.run();
            same_bits("keys", &alone.run().0[1], &want);
            alone.cache_row[1] = -1;
            alone.cache_row[3] = i32::MAX;
            alone.count = Some(4);
            alone.check("keys alone");
        }
    }
    check::<bf16>();
    check::<f16>();

    // The safe launch.
    let case = Case::<bf16>::new(&mut Random(10), 3, heads(4, 2, 32)).without_values();
    let stream = stream();
    let mut qkv = stream.upload(&case.qkv).unwrap();
    let mut k = stream.upload(&vec![poison::<bf16>(); case.num_cache_rows * case.kv_width()]).unwrap();
    let row = stream.upload(&case.cache_row).unwrap();
    let positions = &stream.upload(&case.positions).unwrap();
    let angles = &rope::angles(&stream, THETA, 32, NUM_POSITIONS).unwrap();
    let caches = Some(Caches { k: &mut k, v: None, row: &row });
    let rows = Rope { heads: case.heads, qkv: &mut qkv, positions, count: None, angles, caches, failed: None };
    rope::launch(&stream, rows).unwrap();
    let ([want_qkv, want_k, _], [qkv_stride, cache_stride]) = (case.want().0, case.strides());
    same_bits("qkv", &spread(&qkv.read().unwrap(), case.width(), qkv_stride), &want_qkv);
    same_bits("keys", &spread(&k.read().unwrap(), case.kv_width(), cache_stride), &want_k);
}

/// The bits of a row depend neither on the order of threads nor on the other rows.
fn same_bits_whatever_else_runs() {
    let case = Case::<bf16>::new(&mut Random(6), 4, heads(14, 2, 64));
    let bits = |output: Output<bf16>| output.map(|buffer| buffer.into_iter().map(bf16::to_bits).collect::<Vec<_>>());
    let [qkv, k, v] = in_every_order(|| bits(case.run().0));
    let [qkv_stride, cache_stride] = case.strides();
    for (i, row) in case.qkv.chunks_exact(case.heads.qkv_width()).enumerate() {
        let (positions, cache_row) = (vec![case.positions[i]], vec![case.cache_row[i]]);
        let alone = Case { qkv: row.to_vec(), positions, cache_row, ..case.clone() };
        let [alone_qkv, alone_k, alone_v] = bits(alone.run().0);
        assert_eq!(alone_qkv, qkv[i * qkv_stride..][..qkv_stride]);
        let to = case.cache_row[i] as usize * cache_stride..(case.cache_row[i] as usize + 1) * cache_stride;
        assert_eq!([&alone_k[to.clone()], &alone_v[to.clone()]], [&k[to.clone()], &v[to]]);
    }
}

fn passes_on_what_is_not_finite() {
    fn check<T: Float>() {
        let random = &mut Random(7);
        let mut case = Case::<T>::new(random, 40, heads(2, 1, 32));
        let edge = [f32::NAN, f32::INFINITY, -f32::INFINITY, 0.0, -0.0, 1.0];
        let edge = edge.into_iter().chain([T::LARGEST, -T::LARGEST, T::SMALLEST, -T::SMALLEST]);
        let edge: Vec<_> = edge.map(T::of).collect();
        for value in &mut case.qkv {
            *value = edge[random.below(edge.len())];
        }
        case.positions = (0..40).collect(); // position 0 rotates nothing
        case.check("edges");
    }
    check::<bf16>();
    check::<f16>();
}

/// One capture of the safe launch, while positions, cache rows and count change on the device.
fn replays() {
    device().preload().unwrap();
    let (random, stream, shape) = (&mut Random(8), stream(), heads(4, 2, 32));
    let first = Case::<f16>::new(random, 5, shape);
    let mut qkv = stream.upload(&first.qkv).unwrap();
    let [mut k, mut v] = [(); 2].map(|_| stream.zeros::<f16>(first.num_cache_rows * first.kv_width()).unwrap());
    let angles = rope::angles(&stream, THETA, 32, NUM_POSITIONS).unwrap();
    let mut positions = stream.upload(&first.positions).unwrap();
    let mut row = stream.upload(&first.cache_row).unwrap();
    let mut count = stream.upload(&[5]).unwrap();
    let mut failed = stream.upload(&[DLLM_NONE_FAILED]).unwrap();
    let graph = stream.capture(|| {
        let caches = Some(Caches { k: &mut k, v: Some(&mut v), row: &row });
        let (count, failed) = (Some(&count), Some(&mut failed));
        let positions = &positions;
        rope::launch(&stream, Rope { heads: shape, qkv: &mut qkv, positions, count, angles: &angles, caches, failed })
    });
    let graph = graph.unwrap();
    for counted in [3, 5, 0] {
        let case = Case { count: Some(counted), ..Case::<f16>::new(random, 5, shape) };
        positions.write(&case.positions).unwrap();
        row.write(&case.cache_row).unwrap();
        count.write(&[counted]).unwrap();
        let (want, _) = case.want();
        for _ in 0..2 {
            qkv.write(&case.qkv).unwrap();
            for cache in [&mut k, &mut v] {
                cache.write(&vec![poison(); cache.len()]).unwrap();
            }
            // SAFETY: the buffers live, and belong to this stream.
            unsafe { graph.launch() }.unwrap();
            let [qkv_stride, cache_stride] = case.strides();
            let spread = |packed: Vec<f16>, width, stride| spread(&packed, width, stride);
            same_bits("qkv", &spread(qkv.read().unwrap(), shape.qkv_width(), qkv_stride), &want[0]);
            same_bits("keys", &spread(k.read().unwrap(), case.kv_width(), cache_stride), &want[1]);
            same_bits("values", &spread(v.read().unwrap(), case.kv_width(), cache_stride), &want[2]);
        }
    }
    assert_eq!(failed.read().unwrap(), [DLLM_NONE_FAILED]);
}

fn wrong_sizes_are_errors() {
    let (stream, other) = (stream(), stream());
    let mut qkv = stream.zeros::<bf16>(3 * 256).unwrap();
    let [mut k, mut v] = [(); 2].map(|_| stream.zeros::<bf16>(7 * 64).unwrap());
    let positions = stream.zeros::<i32>(3).unwrap();
    let angles = rope::angles(&stream, THETA, 32, 9).unwrap();
    macro_rules! refused {
        ($says:literal, $($field:ident: $value:expr),+) => {{
            let fits = {
                let caches = Some(Caches { k: &mut k, v: Some(&mut v), row: &positions });
                let (heads, qkv, positions, angles) = (heads(4, 2, 32), &mut qkv, &positions, &angles);
                Rope { heads, qkv, positions, count: None, angles, caches, failed: None }
            };
            let error = rope::launch(&stream, Rope { $($field: $value,)+ ..fits }).unwrap_err().to_string();
            assert!(error.contains($says), "{error}");
        }};
    }
    let ints = |len| stream.zeros::<i32>(len).unwrap();
    refused!("qkv: expected 1024 elements, found 768", positions: &ints(4));
    refused!("positions: expected 1 elements, found 0", positions: &ints(0));
    refused!("angles: expected 16 elements, found 15", angles: &stream.zeros(15).unwrap());
    refused!("angles: expected a buffer of the stream", angles: &rope::angles(&other, THETA, 32, 9).unwrap());
    refused!("count: expected 1 elements, found 0", count: Some(&ints(0)));
    refused!("qkv: expected 864 elements, found 768", heads: heads(5, 2, 32), caches: None);
    refused!("num_heads: expected at most", heads: heads(usize::MAX, 2, 32));
    refused!("num_heads: expected 1 to", heads: heads(0, 2, 32));
    refused!("num_kv_heads: expected 1 to", heads: heads(4, 0, 32));
    refused!("head_dim: expected 2 to", heads: heads(4, 2, 0));
    refused!("head_dim: expected 2 to", heads: heads(4, 2, 1));
    refused!("head_dim: expected 32, 64 or 128, found 16", heads: heads(4, 2, 16));
    let [mut one, mut two, mut short] = [64, 64, 63].map(|len| stream.zeros::<bf16>(len).unwrap());
    let (k, row) = (&mut one, &positions);
    refused!("caches.v: expected 64 elements, found 63", caches: Some(Caches { k, v: Some(&mut short), row }));
    let (k, v) = (&mut one, &mut two);
    refused!("caches.row: expected 3 elements, found 2", caches: Some(Caches { k, v: Some(v), row: &ints(2) }));
}
