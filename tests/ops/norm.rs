//! Compares residual add and RMSNorm, launched by the shipped code, with the reference in f64.
//!
//! The residual stream must be bit-equal: it is one rounding of an exact sum. The kernel's scale is within [`SCALE`] of the exact
//! one. Both roundings of the result are monotonic, so the result must be between those for the two ends of the scale.

use crate::common::{
    Float, Random, device, in_every_order, narrowed, on_device, poison, same_bits, spread, stream, widened, within,
};
use dllm_kernels::abi::dllm_norm_params;
use dllm_kernels::ops::norm::{self, Norm};
use dllm_kernels::reference::norm::{add_rounded, rms_norm_rounded, rms_scale};
use half::{bf16, f16};

on_device! {
    equals_the_reference,
    takes_many_rows,
    counts_on_the_device,
    adds_rows_by_a_map,
    same_bits_whatever_else_runs,
    rounds_ties_to_even,
    passes_on_what_is_not_finite,
    overflows_like_f32,
    replays,
    replays_with_a_map,
    wrong_sizes_are_errors,
}

/// Bound of the relative error of the scale. The sum of squares in f32 rounds each square at most 40 times (the square itself, 31
/// sums within a thread, 8 between threads); division and eps round twice more. The square root halves these errors. Root and
/// reciprocal add one rounding each. A rounding is half a unit in the last place.
const SCALE: f64 = (42.0 / 2.0 + 2.0) / (1 << 24) as f64;

#[derive(Clone)]
struct Case<T> {
    width: usize,
    x: Vec<T>,
    delta: Option<Vec<T>>,
    delta_row: Option<Vec<i32>>,
    weight: Vec<T>,
    eps: f32,
    count: Option<i32>,
}

impl<T: Float> Case<T> {
    fn new(random: &mut Random, rows: usize, width: usize) -> Case<T> {
        let weight = (0..width).map(|_| T::of(1.0 + 0.2 * random.normal())).collect();
        let [x, delta] = [(); 2].map(|_| random.floats(rows * width));
        Case { width, x, delta: Some(delta), delta_row: None, weight, eps: 1e-5, count: None }
    }

    /// Makes one row without delta, with weights of 1.
    fn row(x: &[f32]) -> Case<T> {
        let x: Vec<T> = x.iter().map(|x| T::of(*x)).collect();
        Case {
            width: x.len(),
            weight: vec![T::of(1.0); x.len()],
            x,
            delta: None,
            delta_row: None,
            eps: 1e-5,
            count: None,
        }
    }

    /// Launches norm and returns `x` and `out`, including the elements between their rows.
    fn run(&self) -> [Vec<T>; 2] {
        let (width, stream) = (self.width, stream());
        let rows = self.x.len() / width;
        let unit = 16 / size_of::<T>();
        let [x_stride, delta_stride, out_stride] = [1, 2, 3].map(|gap| width + gap * unit);
        let x = stream.upload(&spread(&self.x, width, x_stride)).unwrap();
        let delta = self.delta.as_ref().map(|delta| stream.upload(&spread(delta, width, delta_stride)).unwrap());
        let delta_row = self.delta_row.as_ref().map(|map| stream.upload(map).unwrap());
        let weight = stream.upload(&self.weight).unwrap();
        let out = stream.upload(&vec![poison::<T>(); rows * out_stride]).unwrap();
        let count = self.count.map(|count| stream.upload(&[count]).unwrap());
        let params = dllm_norm_params {
            size: size_of::<dllm_norm_params>() as u64,
            x: x.address(),
            delta: delta.as_ref().map_or(0, |delta| delta.address()),
            delta_row: delta_row.as_ref().map_or(0, |map| map.address()),
            weight: weight.address(),
            out: out.address(),
            count: count.as_ref().map_or(0, |count| count.address()),
            x_stride: x_stride as i64,
            delta_stride: delta_stride as i64,
            out_stride: out_stride as i64,
            max_rows: rows as i32,
            width: width as i32,
            dtype: T::DTYPE as i32,
            eps: self.eps,
            num_delta_rows: delta_row.as_ref().map_or(0, |_| self.delta.as_ref().map_or(0, Vec::len) / width) as i32,
            reserved: 0,
        };
        // SAFETY: the buffers are as large as the struct says, and stay until the stream is synchronised.
        unsafe { norm::launch_raw(stream.device(), stream.raw(), &params) }.unwrap();
        [x.read().unwrap(), out.read().unwrap()]
    }

    fn check(&self, what: &str) {
        let width = self.width;
        let rows = self.x.len() / width;
        let counted = self.count.map_or(rows, |count| count.clamp(0, rows as i32) as usize);
        let mut want_x = self.x.clone();
        let [mut low, mut high] = [(); 2].map(|_| vec![poison::<T>(); rows * width]);
        for row in 0..counted {
            let at = row * width..(row + 1) * width;
            let mut x = widened(&self.x[at.clone()]);
            let delta_row = self.delta_row.as_ref().map_or(row, |map| map[row] as usize);
            if let Some(delta) = self.delta.as_ref().and_then(|delta| delta.chunks_exact(width).nth(delta_row)) {
                add_rounded(&mut x, &widened(delta), T::round);
                want_x[at.clone()].copy_from_slice(&narrowed::<T>(&x));
            }
            let scale = rms_scale(&x, self.eps.into());
            for (end, error) in [(&mut low, -SCALE), (&mut high, SCALE)] {
                let row = rms_norm_rounded(&x, &widened(&self.weight), scale * (1.0 + error), T::round);
                end[at.clone()].copy_from_slice(&narrowed::<T>(&row));
            }
        }

        let what = format!("{what}: {rows} rows of {width}, count {:?}", self.count);
        let unit = 16 / size_of::<T>();
        let [x, out] = self.run();
        same_bits(&format!("x, {what}"), &x, &spread(&want_x, width, width + unit));
        let [low, high] = [low, high].map(|end| spread(&end, width, width + 3 * unit));
        within(&format!("out, {what}"), &out, [&low, &high]);
    }
}

/// Widths of one vector, of a fraction of the 256 threads of a block, and of published models.
fn equals_the_reference() {
    fn check<T: Float>() {
        let random = &mut Random(1);
        for width in [16 / size_of::<T>(), 8, 24, 1024, 3584, 4096, 8184, 8192] {
            for rows in [1, 6] {
                let case = Case::<T>::new(random, rows, width);
                case.check("with delta");
                Case { delta: None, ..case }.check("without delta");
            }
        }
    }
    check::<bf16>();
    check::<f16>();
    check::<f32>();
}

fn takes_many_rows() {
    Case::<f16>::new(&mut Random(12), 1_100, 24).check("many rows");
}

fn counts_on_the_device() {
    let case = Case::<bf16>::new(&mut Random(2), 5, 24);
    for count in [0, 1, 4, 5, 6, i32::MAX, -1, i32::MIN] {
        Case { count: Some(count), ..case.clone() }.check("counted");
    }
}

/// Rows of delta in any order, more and fewer than rows of x. Rows out of range add nothing.
fn adds_rows_by_a_map() {
    fn check<T: Float>() {
        let random = &mut Random(6);
        for width in [16 / size_of::<T>(), 24, 4096, 8192] {
            for delta_rows in [1, 3, 9] {
                let case = Case::<T>::new(random, 6, width);
                let case = Case { delta: Some(random.floats(delta_rows * width)), ..case };
                let map = |map: [i32; 6]| Some(map.to_vec());
                let last = delta_rows as i32 - 1;
                for delta_row in [map([last, 0, 0, last, 0, last]), map([-1, last, last + 1, i32::MAX, 0, i32::MIN])] {
                    let case = Case { delta_row, ..case.clone() };
                    case.check("by a map");
                    Case { count: Some(4), ..case }.check("by a map");
                }
            }
        }
        let case = Case::<T>::new(random, 6, 24);
        let [mapped, plain] = [Some((0..6).collect()), None].map(|delta_row| Case { delta_row, ..case.clone() }.run());
        for (mapped, plain) in mapped.iter().zip(&plain) {
            same_bits("identity map", mapped, plain);
        }
        // Nothing is added, not even a zero: minus zero and the bits of a NaN remain.
        let edge = [-0.0, f32::NAN, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let case = Case { delta: Some(vec![T::of(0.0); 8]), delta_row: Some(vec![-1]), ..Case::<T>::row(&edge) };
        case.check("nothing added");
        // Without a delta the map is ignored.
        Case { delta: None, ..case }.check("no delta");
    }
    check::<bf16>();
    check::<f16>();
    check::<f32>();
}

/// The bits of a row depend neither on the order of threads nor on the other rows.
fn same_bits_whatever_else_runs() {
    let (width, rows) = (3584, 6);
    let case = Case::<f32>::new(&mut Random(3), rows, width);
    let bits = |buffer: Vec<f32>| buffer.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let [x, out] = in_every_order(|| case.run().map(bits));
    for row in 0..rows {
        let at = row * width..(row + 1) * width;
        let delta = case.delta.as_ref().map(|delta| delta[at.clone()].to_vec());
        let alone = Case { x: case.x[at].to_vec(), delta, ..case.clone() };
        let [alone_x, alone_out] = alone.run().map(bits);
        assert_eq!(alone_x, x[row * alone_x.len()..][..alone_x.len()]);
        assert_eq!(alone_out, out[row * alone_out.len()..][..alone_out.len()]);
    }
}

/// Sums halfway between two neighbours, where neighbours are 2 apart.
fn rounds_ties_to_even() {
    fn check<T: Float>(step: f32) {
        let unit = [step, step + 2.0, step + 4.0, step + 6.0];
        let x: Vec<f32> = unit.iter().flat_map(|x| [*x, -*x]).collect();
        let delta = x.iter().map(|x| T::of(x.signum())).collect();
        let case = Case { delta: Some(delta), ..Case::<T>::row(&x) };
        case.check("ties");
        let after: Vec<f32> = case.run()[0][..8].iter().map(|x| x.f32() - step.copysign(x.f32())).collect();
        assert_eq!(after, [0.0, -0.0, 4.0, -4.0, 4.0, -4.0, 8.0, -8.0]);
    }
    check::<bf16>(256.0);
    check::<f16>(2048.0);
}

fn passes_on_what_is_not_finite() {
    fn check<T: Float>() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        let row = [1.0, -2.0, 3.0, -4.0, 0.0, -0.0, 0.5, 8.0];
        let with = |index: usize, value: f32| {
            let mut row = row;
            row[index] = value;
            Case::<T>::row(&row)
        };
        with(3, nan).check("NaN");
        with(3, inf).check("infinity");
        with(0, -inf).check("minus infinity");
        Case { delta: Some(vec![T::of(-inf); 8]), ..with(3, inf) }.check("infinity minus infinity");
        let mut case = Case::<T>::row(&row);
        for (weight, value) in case.weight.iter_mut().zip([nan, inf, -inf, 0.0, inf]) {
            *weight = T::of(value);
        }
        case.check("weights");
        Case::<T>::row(&[0.0; 8]).check("zeros");
        Case { eps: 0.0, ..Case::<T>::row(&[0.0; 8]) }.check("zeros without eps");
        Case::<T>::row(&[T::SMALLEST, -T::SMALLEST, 3.0 * T::SMALLEST, 0.0, 0.0, 0.0, 0.0, 0.0]).check("subnormal");
        let case = Case::<T>::row(&[1.0; 8]);
        Case { weight: vec![T::of(T::SMALLEST); 8], ..case }.check("subnormal results");
    }
    check::<bf16>();
    check::<f16>();
    check::<f32>();
    // f16 overflows at much smaller values than f32.
    let case = Case::<f16>::row(&[f16::LARGEST, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
    Case { delta: Some(vec![f16::of(16.0); 8]), ..case.clone() }.check("a sum that is infinite");
    Case { delta: Some(vec![f16::of(15.0); 8]), ..case.clone() }.check("a sum that is the largest number");
    Case { weight: vec![f16::of(f16::LARGEST); 8], ..case }.check("a result that is infinite");
}

/// Squares beyond the range of f32 give a row of zeros, as in the reference implementations. In f64 they do not overflow.
fn overflows_like_f32() {
    fn check<T: Float>() {
        let large: Vec<f32> = [1e18, 1e19, -2e19, T::LARGEST].into_iter().cycle().take(8).collect();
        let [_, out] = Case::<T>::row(&large).run();
        same_bits("zeros", &out[..8], &large.iter().map(|x| T::of(0.0f32.copysign(*x))).collect::<Vec<_>>());
        Case::<T>::row(&[1e18; 8]).check("large");
    }
    check::<bf16>();
    check::<f32>();
    Case::<f16>::row(&[f16::LARGEST; 4096]).check("large");
}

/// One capture of the safe launch, while the map changes on the device.
fn replays_with_a_map() {
    let (random, stream) = (&mut Random(7), stream());
    let (rows, width, eps) = (4, 24, 1e-5);
    let case = Case { delta: Some(random.floats(3 * width)), ..Case::<f16>::new(random, rows, width) };
    let mut x = stream.upload(&case.x).unwrap();
    let delta = stream.upload(case.delta.as_ref().unwrap()).unwrap();
    let mut map = stream.upload(&[0; 4]).unwrap();
    let weight = stream.upload(&case.weight).unwrap();
    let mut out = stream.zeros::<f16>(rows * width).unwrap();
    let graph = stream.capture(|| {
        let (delta, delta_row, weight) = (Some(&delta), Some(&map), &weight);
        let norm = Norm { max_rows: rows, count: None, x: &mut x, delta, delta_row, weight, eps, out: &mut out };
        norm::launch(&stream, norm)
    });
    let graph = graph.unwrap();
    for delta_row in [[2, -1, 0, 1], [3, 1, 1, -1]] {
        let case = Case { delta_row: Some(delta_row.to_vec()), ..case.clone() };
        case.check("as replayed");
        map.write(&delta_row).unwrap();
        x.write(&case.x).unwrap();
        // SAFETY: the buffers live, and belong to this stream.
        unsafe { graph.launch() }.unwrap();
        let [want_x, want_out] = case.run();
        same_bits("x", &spread(&x.read().unwrap(), width, width + 8), &want_x);
        same_bits("out", &spread(&out.read().unwrap(), width, width + 24), &want_out);
    }
}

/// One capture of the safe launch, while count and rows change on the device.
fn replays() {
    device().preload().unwrap();
    let (random, stream) = (&mut Random(5), stream());
    let (rows, width, eps) = (4, 24, 1e-6);
    let case = Case { eps, ..Case::<bf16>::new(random, rows, width) };
    let mut x = stream.upload(&case.x).unwrap();
    let mut delta = stream.upload(&case.x).unwrap();
    let weight = stream.upload(&case.weight).unwrap();
    let mut out = stream.zeros::<bf16>(rows * width).unwrap();
    let mut count = stream.upload(&[0]).unwrap();
    let graph = stream.capture(|| {
        let (count, delta, weight) = (Some(&count), Some(&delta), &weight);
        let norm = Norm { max_rows: rows, count, x: &mut x, delta, delta_row: None, weight, eps, out: &mut out };
        norm::launch(&stream, norm)
    });
    let graph = graph.unwrap();
    for counted in [3, 4, 1] {
        let fresh = Case { count: Some(counted), weight: case.weight.clone(), eps, ..Case::new(random, rows, width) };
        fresh.check("as replayed");
        let packed = |rows: &[bf16]| -> Vec<bf16> {
            rows.chunks_exact(rows.len() / 4).flat_map(|row| &row[..width]).copied().collect()
        };
        let want = fresh.run().map(|rows| packed(&rows));
        count.write(&[counted]).unwrap();
        delta.write(fresh.delta.as_ref().unwrap()).unwrap();
        for _ in 0..2 {
            x.write(&fresh.x).unwrap();
            out.write(&vec![poison(); rows * width]).unwrap();
            // SAFETY: the buffers live, and belong to this stream.
            unsafe { graph.launch() }.unwrap();
            same_bits("x", &x.read().unwrap(), &want[0]);
            same_bits("out", &out.read().unwrap(), &want[1]);
        }
    }
}

fn wrong_sizes_are_errors() {
    let (stream, other) = (stream(), stream());
    let [mut x, mut out] = [(); 2].map(|_| stream.zeros::<f32>(4 * 8).unwrap());
    let weight = stream.zeros::<f32>(8).unwrap();
    let zeros = |len| stream.zeros::<f32>(len).unwrap();
    macro_rules! refused {
        ($says:literal, $($field:ident: $value:expr),+) => {{
            let (count, delta, delta_row, weight) = (None, None, None, &weight);
            let fits = Norm { max_rows: 4, count, x: &mut x, delta, delta_row, weight, eps: 1e-5, out: &mut out };
            let error = norm::launch(&stream, Norm { $($field: $value,)+ ..fits }).unwrap_err().to_string();
            assert!(error.contains($says), "{error}");
        }};
    }
    refused!("x: expected 40 elements, found 32", max_rows: 5);
    refused!("x: expected", max_rows: usize::MAX);
    refused!("max_rows: expected 1 to", max_rows: 0);
    refused!("x: expected 32 elements, found 31", x: &mut zeros(31));
    refused!("x: expected 124 elements, found 32", weight: &zeros(31));
    refused!("weight: expected 1 elements, found 0", weight: &zeros(0));
    refused!("width: expected a multiple of 4 elements (16 bytes), found 6", weight: &zeros(6));
    refused!("delta: expected 32 elements, found 31", delta: Some(&zeros(31)));
    let [three, four] = [3, 4].map(|len| stream.zeros::<i32>(len).unwrap());
    refused!("delta_row: expected 4 elements, found 3", delta: Some(&zeros(8)), delta_row: Some(&three));
    refused!("delta: expected 8 elements, found 7", delta: Some(&zeros(7)), delta_row: Some(&four));
    refused!("out: expected 32 elements, found 31", out: &mut zeros(31));
    refused!("out: expected a buffer of the stream", out: &mut other.zeros(32).unwrap());
    refused!("count: expected 1 elements, found 0", count: Some(&stream.zeros(0).unwrap()));
    refused!("eps: expected a finite number", eps: -1.0);
}
