//! Compares SwiGLU, launched by the shipped code, with the reference.
//!
//! The error of the kernel's silu is at most [`SILU`]. Both roundings are monotonic, so the result must be between the reference's
//! results for the two bounds.

use crate::common::{Float, Random, device, in_every_order, on_device, poison, same_bits, spread, stream, within};
use dllm_kernels::abi::dllm_swiglu_params;
use dllm_kernels::ops::swiglu::{self, Swiglu};
use dllm_kernels::reference::swiglu::{silu, swiglu_rounded};
use half::{bf16, f16};

on_device! {
    equals_the_reference,
    counts_on_the_device,
    takes_more_rows_than_a_grid_is_high,
    same_bits_whatever_else_runs,
    passes_on_what_is_not_finite,
    replays,
    wrong_sizes_are_errors,
}

/// Relative error of silu in f32: two units in the last place for the exponential, half a unit for the sum. The quotient's half unit
/// is part of the reference, which rounds to f32.
const SILU: f64 = 2.5 / (1 << 23) as f64;

#[derive(Clone)]
struct Case<T> {
    width: usize,
    /// Rows `[gate | up]`.
    gate_up: Vec<T>,
    count: Option<i32>,
}

impl<T: Float> Case<T> {
    fn new(random: &mut Random, rows: usize, width: usize) -> Case<T> {
        Case { width, gate_up: (0..rows * 2 * width).map(|_| T::of(3.0 * random.normal())).collect(), count: None }
    }

    /// One row of these gates and ups, repeated to a whole number of vectors.
    fn row(pairs: &[(f32, f32)]) -> Case<T> {
        let width = pairs.len().next_multiple_of(8);
        let pairs = || pairs.iter().cycle().take(width);
        let gate_up = pairs().map(|pair| pair.0).chain(pairs().map(|pair| pair.1)).map(T::of).collect();
        Case { width, gate_up, count: None }
    }

    fn rows(&self) -> usize {
        self.gate_up.len() / (2 * self.width)
    }

    fn out_stride(&self) -> usize {
        self.width + 2 * 16 / size_of::<T>()
    }

    /// Launches and returns `out` with the gaps between its rows.
    fn run(&self) -> Vec<T> {
        let (width, rows, out_stride, stream) = (self.width, self.rows(), self.out_stride(), stream());
        let gate_up_stride = 2 * width + 16 / size_of::<T>();
        let gate_up = stream.upload(&spread(&self.gate_up, 2 * width, gate_up_stride)).unwrap();
        let out = stream.upload(&vec![poison::<T>(); rows * out_stride]).unwrap();
        let count = self.count.map(|count| stream.upload(&[count]).unwrap());
        let params = dllm_swiglu_params {
            size: size_of::<dllm_swiglu_params>() as u64,
            gate_up: gate_up.address(),
            out: out.address(),
            count: count.as_ref().map_or(0, |count| count.address()),
            gate_up_stride: gate_up_stride as i64,
            out_stride: out_stride as i64,
            max_rows: rows as i32,
            width: width as i32,
            dtype: T::DTYPE as i32,
            reserved: 0,
        };
        // SAFETY: the buffers have the sizes of the struct, and live until the stream has been synchronised.
        unsafe { swiglu::launch_raw(stream.device(), stream.raw(), &params) }.unwrap();
        out.read().unwrap()
    }

    fn check(&self, what: &str) {
        let (width, rows) = (self.width, self.rows());
        let counted = self.count.map_or(rows, |count| count.clamp(0, rows as i32) as usize);
        let ends = [-SILU, SILU].map(|error| {
            let mut end = vec![poison::<T>(); rows * width];
            let rows = self.gate_up.chunks_exact(2 * width).zip(end.chunks_exact_mut(width)).take(counted);
            for (row, end) in rows {
                for (i, end) in end.iter_mut().enumerate() {
                    let gate = row[i].f64();
                    let silu = match silu(gate) {
                        silu if silu.is_nan() => silu,
                        // The divisor is at least 1, so an error does not raise silu above its gate or to infinity.
                        silu => (silu * (1.0 + error)).min(gate.abs()).max(-gate.abs()),
                    };
                    *end = T::of(swiglu_rounded(silu, row[width + i].f64(), T::round) as f32);
                }
            }
            spread(&end, width, self.out_stride())
        });
        let what = format!("{what}: {rows} rows of {width}, count {:?}", self.count);
        within(&what, &self.run(), [&ends[0], &ends[1]]);
    }
}

/// Widths of one vector, of a partial round of the block's 256 threads, of just more than its tile, and those of the models.
fn equals_the_reference() {
    fn check<T: Float>() {
        let random = &mut Random(1);
        let (vector, tile) = (16 / size_of::<T>(), 16384 / size_of::<T>());
        for (width, rows) in
            [(vector, 1), (8, 6), (24, 6), (3584, 2), (tile, 1), (tile + vector, 2), (12288, 1), (18944, 2)]
        {
            Case::<T>::new(random, rows, width).check("random");
        }
    }
    check::<bf16>();
    check::<f16>();
    check::<f32>();
}

fn counts_on_the_device() {
    let case = Case::<bf16>::new(&mut Random(2), 5, 24);
    for count in [0, 1, 4, 5, 6, i32::MAX, -1, i32::MIN] {
        Case { count: Some(count), ..case.clone() }.check("counted");
    }
}

fn takes_more_rows_than_a_grid_is_high() {
    let rows = 70_000;
    let case = Case { count: Some(3), ..Case::<bf16>::new(&mut Random(3), rows, 8) };
    case.check("many");
}

/// The bits of a row depend neither on the order of threads nor on the other rows.
fn same_bits_whatever_else_runs() {
    let (width, rows) = (3584, 3);
    let case = Case::<f32>::new(&mut Random(4), rows, width);
    let bits = |buffer: Vec<f32>| buffer.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let out = in_every_order(|| bits(case.run()));
    for (gate_up, want) in case.gate_up.chunks_exact(2 * width).zip(out.chunks_exact(case.out_stride())) {
        let alone = Case { gate_up: gate_up.to_vec(), ..case.clone() };
        assert_eq!(bits(alone.run()), want);
    }
}

fn passes_on_what_is_not_finite() {
    fn check<T: Float>() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        let edge = [nan, inf, -inf, 0.0, -0.0, 1.0, -1.0, T::LARGEST, -T::LARGEST, T::SMALLEST, -T::SMALLEST];
        let all: Vec<_> = edge.iter().flat_map(|gate| edge.iter().map(|up| (*gate, *up))).collect();
        Case::<T>::row(&all).check("edges");
        // Near -88.7 the exponential exceeds the largest f32.
        let gates = [-80.0, -86.0, -88.5, -89.0, -89.5, -100.0, -104.0, 80.0, 88.5, 89.5, 100.0, 104.0];
        Case::<T>::row(&gates.map(|gate| (gate, 1.5))).check("large exponents");
        let scaled = gates.map(|gate| (gate, if T::LARGEST > 1e6 { 1e30 } else { 60_000.0 }));
        Case::<T>::row(&scaled).check("large exponents and factors");
    }
    check::<bf16>();
    check::<f16>();
    check::<f32>();
    // Signs of zeros and infinities follow IEEE arithmetic.
    let gates = [f32::INFINITY, f32::NEG_INFINITY, -0.0, 0.0, -200.0, f32::NAN, 300.0, -300.0];
    let out = Case::<bf16>::row(&gates.map(|gate| (gate, 1.0))).run();
    let want = [f32::INFINITY, f32::NAN, -0.0, 0.0, -0.0, f32::NAN, 300.0, -0.0].map(bf16::of);
    same_bits("silu", &out[..8], &want);
}

/// Replays of one captured safe launch use the count that is on the device then.
fn replays() {
    device().preload().unwrap();
    let (rows, width, stream) = (4, 24, stream());
    let case = Case::<f16>::new(&mut Random(5), rows, width);
    let gate_up = stream.upload(&case.gate_up).unwrap();
    let mut out = stream.zeros::<f16>(rows * width).unwrap();
    let mut count = stream.upload(&[0]).unwrap();
    let graph = stream.capture(|| {
        let count = Some(&count);
        swiglu::launch(&stream, Swiglu { max_rows: rows, count, width, gate_up: &gate_up, out: &mut out })
    });
    let graph = graph.unwrap();
    case.check("as replayed");
    let whole: Vec<f16> = case.run().chunks_exact(case.out_stride()).flat_map(|row| &row[..width]).copied().collect();
    for counted in [3usize, 4, 1, 0] {
        count.write(&[counted as i32]).unwrap();
        let mut want = whole.clone();
        want[counted * width..].fill(poison());
        for _ in 0..2 {
            out.write(&vec![poison(); rows * width]).unwrap();
            // SAFETY: the buffers are alive and belong to this stream.
            unsafe { graph.launch() }.unwrap();
            same_bits("replayed", &out.read().unwrap(), &want);
        }
    }
}

fn wrong_sizes_are_errors() {
    let (stream, other) = (stream(), stream());
    let gate_up = stream.zeros::<f32>(4 * 16).unwrap();
    let mut out = stream.zeros::<f32>(4 * 8).unwrap();
    macro_rules! refused {
        ($says:literal, $($field:ident: $value:expr),+) => {{
            let fits = Swiglu { max_rows: 4, count: None, width: 8, gate_up: &gate_up, out: &mut out };
            let error = swiglu::launch(&stream, Swiglu { $($field: $value,)+ ..fits }).unwrap_err().to_string();
            assert!(error.contains($says), "{error}");
        }};
    }
    refused!("gate_up: expected 80 elements, found 64", max_rows: 5);
    refused!("gate_up: expected", max_rows: usize::MAX);
    refused!("max_rows: expected 1 to", max_rows: 0);
    refused!("gate_up: expected 64 elements, found 63", gate_up: &stream.zeros(63).unwrap());
    refused!("gate_up: expected a buffer of the stream", gate_up: &other.zeros(64).unwrap());
    refused!("out: expected 32 elements, found 31", out: &mut stream.zeros(31).unwrap());
    refused!("width: expected 1 to", width: 0);
    refused!("width: expected a multiple of 4 elements (16 bytes), found 6", width: 6);
    refused!("gate_up: expected", width: usize::MAX);
    refused!("width: expected at most", max_rows: 0, width: usize::MAX);
    refused!("count: expected 1 elements, found 0", count: Some(&stream.zeros(0).unwrap()));
}
