//! Compares merged attention states, launched by the shipped code, with the reference.
//!
//! The error of the weights in f32 has a known bound ([`WEIGHT`]). The result must be between the reference's for both bounds.

use crate::common::{
    Float, Random, device, in_every_order, narrowed, on_device, poison, same_bits, spread, stream, widened, within,
};
use dllm_kernels::abi::dllm_merge_state_params;
use dllm_kernels::gpu::Stream;
use dllm_kernels::ops::attention::{self, Attention, Heads, Rows, Segment};
use dllm_kernels::ops::merge_state::{self, MergeState, Partial};
use dllm_kernels::reference::merge_state::merge;
use half::{bf16, f16};

on_device! {
    equals_the_reference,
    counts_on_the_device,
    takes_many_rows,
    sides_without_keys,
    passes_on_what_is_not_finite,
    the_same_bits_with_sides_exchanged,
    overwrites_either_side,
    same_bits_whatever_else_runs,
    halves_of_an_attention,
    many_parts,
    replays,
    wrong_sizes_are_errors,
}

/// Error of `weight_a a + weight_b b` in units of |a| + |b|, where a unit in the last place is 2^-23:
/// - rounding the difference d of the log-sum-exps changes e^-d by at most d e^-d <= 0.37 half units;
/// - the exponential has an error of two units;
/// - the sum, the quotient and the two products have half a unit each.
///
/// The last sum's rounding to f32 is part of the reference. The total is rounded up.
const WEIGHT: f64 = 5.0 / (1 << 23) as f64;
/// Error of the log-sum-exp, relative to itself and absolutely: the rounding of the sum; logarithm and exponential.
const LSE: f64 = 4.0 / (1 << 23) as f64;

/// Underflow error of two products.
const TINY: f64 = f32::from_bits(2) as f64;

const NONE: f32 = f32::NEG_INFINITY;

#[derive(Clone)]
struct Case<T> {
    num_heads: usize,
    head_dim: usize,
    /// `[rows, num_heads, head_dim]` and `[rows, num_heads]`, packed.
    a: (Vec<T>, Vec<f32>),
    b: (Vec<T>, Vec<f32>),
    count: Option<i32>,
}

/// Buffer of the result.
#[derive(Clone, Copy, PartialEq)]
enum To {
    Other,
    A,
    B,
}

impl<T: Float> Case<T> {
    fn new(random: &mut Random, rows: usize, num_heads: usize, head_dim: usize) -> Case<T> {
        let mut side = || {
            let lse = (0..rows * num_heads).map(|_| 4.0 * random.normal()).collect();
            (random.floats(rows * num_heads * head_dim), lse)
        };
        Case { num_heads, head_dim, a: side(), b: side(), count: None }
    }

    /// One row for each pair; all elements of a side are equal.
    fn pairs(pairs: &[[(f32, f32); 2]]) -> Case<T> {
        let side = |i: usize| {
            let out = pairs.iter().flat_map(|pair| [T::of(pair[i].0); 8]).collect();
            (out, pairs.iter().map(|pair| pair[i].1).collect())
        };
        Case { num_heads: 1, head_dim: 8, a: side(0), b: side(1), count: None }
    }

    fn width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    fn rows(&self) -> usize {
        self.a.1.len() / self.num_heads
    }

    /// Strides of a, b and a separate result.
    fn strides(&self) -> [usize; 3] {
        [1, 3, 2].map(|gap| self.width() + gap * 16 / size_of::<T>())
    }

    /// Returns the result with its gaps, its stride, and the log-sum-exps with one more element after them.
    fn run(&self, to: To) -> (Vec<T>, usize, Vec<f32>) {
        let (stream, rows, strides) = (stream(), self.rows(), self.strides());
        let [a, b] = [(&self.a.0, strides[0]), (&self.b.0, strides[1])]
            .map(|(packed, stride)| stream.upload(&spread(packed, self.width(), stride)).unwrap());
        let lse = |packed: &[f32]| stream.upload(&[packed, &[poison()]].concat()).unwrap();
        let [a_lse, b_lse] = [&self.a.1, &self.b.1].map(|packed| lse(packed));
        let other = stream.upload(&vec![poison::<T>(); rows * strides[2]]).unwrap();
        let other_lse = lse(&vec![poison(); self.a.1.len()]);
        let (out, out_lse, out_stride) = match to {
            To::Other => (&other, &other_lse, strides[2]),
            To::A => (&a, &a_lse, strides[0]),
            To::B => (&b, &b_lse, strides[1]),
        };
        let count = self.count.map(|count| stream.upload(&[count]).unwrap());
        let params = dllm_merge_state_params {
            size: size_of::<dllm_merge_state_params>() as u64,
            a_out: a.address(),
            a_lse: a_lse.address(),
            b_out: b.address(),
            b_lse: b_lse.address(),
            out: out.address(),
            lse: out_lse.address(),
            count: count.as_ref().map_or(0, |count| count.address()),
            a_stride: strides[0] as i64,
            b_stride: strides[1] as i64,
            out_stride: out_stride as i64,
            max_rows: rows as i32,
            num_heads: self.num_heads as i32,
            head_dim: self.head_dim as i32,
            dtype: T::DTYPE as i32,
        };
        // SAFETY: the buffers have the sizes of the struct, and live until the stream has been synchronised.
        unsafe { merge_state::launch_raw(stream.device(), stream.raw(), &params) }.unwrap();
        (out.read().unwrap(), out_stride, out_lse.read().unwrap())
    }

    /// Returns the result without gaps, and the log-sum-exps.
    fn packed(&self, to: To) -> (Vec<T>, Vec<f32>) {
        let (out, stride, mut lse) = self.run(to);
        lse.pop();
        (out.chunks_exact(stride).flat_map(|row| &row[..self.width()]).copied().collect(), lse)
    }

    fn check(&self, what: &str) {
        let Case { num_heads, head_dim, .. } = *self;
        let rows = self.rows();
        let counted = self.count.map_or(rows, |count| count.clamp(0, rows as i32) as usize);
        let what = format!("{what}: {rows} rows of {num_heads} heads of {head_dim}, count {:?}", self.count);
        let [mut low, mut high] = [(); 2].map(|_| vec![poison::<T>(); rows * self.width()]);
        let (got, stride, got_lse) = self.run(To::Other);
        for (place, got_lse) in got_lse[..rows * num_heads].iter().enumerate() {
            if place >= counted * num_heads {
                assert!(got_lse.to_bits() == !0, "{what}: lse {place} is written");
                continue;
            }
            let at = place * head_dim..(place + 1) * head_dim;
            let [a, b] = [&self.a, &self.b].map(|side| (widened(&side.0[at.clone()]), f64::from(side.1[place])));
            let (want, lse) = merge((&a.0, a.1), (&b.0, b.1));
            let error = (f64::from(*got_lse) - lse).abs();
            let same = f64::from(*got_lse) == lse || error <= LSE * (1.0 + lse.abs());
            assert!(same || (lse.is_nan() && got_lse.is_nan()), "{what}: lse {got_lse} {lse}");
            let exact = a.1 == f64::NEG_INFINITY || b.1 == f64::NEG_INFINITY;
            for (end, sign) in [(&mut low, -1.0), (&mut high, 1.0)] {
                let end = &mut end[at.clone()];
                for (i, x) in want.iter().enumerate() {
                    let error =
                        if exact || !x.is_finite() { 0.0 } else { WEIGHT * (a.0[i].abs() + b.0[i].abs()) + TINY };
                    end[i] = narrowed::<T>(&[x + sign * error])[0];
                }
            }
        }
        assert_eq!(got_lse.last().unwrap().to_bits(), !0, "{what}: a write after lse");
        let [low, high] = [low, high].map(|end| spread(&end, self.width(), stride));
        within(&what, &got, [&low, &high]);
    }
}

fn bits((out, lse): (Vec<f32>, Vec<f32>)) -> [Vec<u32>; 2] {
    [out, lse].map(|x| x.iter().map(|x| x.to_bits()).collect())
}

/// Heads of one vector, of several that are no power of two, of the models' sizes and of more than a warp holds; full and partial
/// blocks.
fn equals_the_reference() {
    fn check<T: Float>() {
        let random = &mut Random(1);
        let vector = 16 / size_of::<T>();
        for head_dim in [vector, 3 * vector, 32, 64, 128, 33 * vector, 100 * vector] {
            for (rows, num_heads) in [(1, 1), (5, 3), (33, 2)] {
                Case::<T>::new(random, rows, num_heads, head_dim).check("random");
            }
        }
        Case::<T>::new(random, 32, 28, 128).check("Dream");
        let mut far = Case::<T>::new(random, 40, 2, 8);
        far.a.1.iter_mut().for_each(|lse| *lse = 40.0 * *lse + 1000.0);
        far.b.1.iter_mut().for_each(|lse| *lse = 40.0 * *lse + 1000.0);
        far.check("far apart");
        far.b.1 = far.a.1.clone();
        far.check("the same");
        let mut below = Case::<T>::new(random, 40, 2, 8);
        for lse in below.a.1.iter_mut().chain(&mut below.b.1) {
            *lse -= 200.0;
        }
        below.check("far below zero");
    }
    check::<bf16>();
    check::<f16>();
    check::<f32>();
}

fn counts_on_the_device() {
    let case = Case::<bf16>::new(&mut Random(2), 5, 3, 24);
    for count in [0, 1, 4, 5, 6, i32::MAX, -1, i32::MIN] {
        Case { count: Some(count), ..case.clone() }.check("counted");
    }
}

fn takes_many_rows() {
    Case { count: Some(3), ..Case::<f16>::new(&mut Random(3), 70_000, 1, 8) }.check("many");
}

/// With one side empty the result is the other side exactly, whatever the empty side's memory contains.
fn sides_without_keys() {
    fn check<T: Float>() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        let mut pairs = Vec::new();
        for garbage in [nan, inf, -inf, T::LARGEST, 1.0] {
            for x in [1.5, -0.0, 0.0, T::SMALLEST, -T::LARGEST, nan, inf] {
                for lse in [0.1, -300.0, 1e30, f32::MIN] {
                    pairs.push([(garbage, NONE), (x, lse)]);
                    pairs.push([(x, lse), (garbage, NONE)]);
                }
            }
            pairs.push([(garbage, NONE), (garbage, NONE)]);
        }
        let case = Case::<T>::pairs(&pairs);
        case.check("one side empty");
        let (out, lse) = case.packed(To::Other);
        for (i, pair) in pairs.iter().enumerate() {
            let (want, want_lse) = match pair {
                [(_, NONE), (_, NONE)] => (0.0, NONE),
                [(_, NONE), other] | [other, _] => *other,
            };
            same_bits("exactly", &out[i * 8..][..8], &[T::of(want); 8]);
            assert_eq!(lse[i].to_bits(), want_lse.to_bits());
        }
    }
    check::<bf16>();
    check::<f16>();
    check::<f32>();
}

fn passes_on_what_is_not_finite() {
    fn check<T: Float>() {
        let edge = [f32::NAN, f32::INFINITY, -f32::INFINITY, 0.0, 1.0, -2.0];
        let lses = [0.0, 1.0, f32::NAN, f32::INFINITY];
        let sides: Vec<_> = edge.iter().flat_map(|x| lses.iter().map(|lse| (*x, *lse))).collect();
        let pairs: Vec<_> = sides.iter().flat_map(|a| sides.iter().map(|b| [*a, *b])).collect();
        Case::<T>::pairs(&pairs).check("edges");
        // No overflow and no underflow, because the weights sum to one.
        let (max, min) = (T::LARGEST, T::SMALLEST);
        Case::<T>::pairs(&[[(max, 5.0), (max, 5.0)], [(min, 5.0), (min, 5.0)]]).check("ends of the range");
        Case::<T>::pairs(&[[(1.0, f32::MAX), (2.0, f32::MIN)], [(1.0, f32::MAX), (2.0, f32::MAX)]]).check("large sums");
    }
    check::<bf16>();
    check::<f16>();
    check::<f32>();
}

fn the_same_bits_with_sides_exchanged() {
    let case = Case::<f32>::new(&mut Random(4), 40, 3, 128);
    let exchanged = Case { a: case.b.clone(), b: case.a.clone(), ..case.clone() };
    assert_eq!(bits(case.packed(To::Other)), bits(exchanged.packed(To::Other)));
}

fn overwrites_either_side() {
    fn check<T: Float>() {
        // Several heads a warp, and heads of several rounds.
        for head_dim in [24, 128, 1024] {
            let mut case = Case::<T>::new(&mut Random(5), 9, 3, head_dim);
            (case.a.1[4], case.b.1[5]) = (NONE, NONE);
            for count in [None, Some(4)] {
                case.count = count;
                let (want, _, want_lse) = case.run(To::Other);
                let counted = count.map_or(9, |count| count as usize);
                for (to, side) in [(To::A, &case.a), (To::B, &case.b)] {
                    let (out, stride, lse) = case.run(to);
                    let mut rows = side.0.clone();
                    for row in 0..counted {
                        let fresh = &want[row * case.strides()[2]..][..case.width()];
                        rows[row * case.width()..][..case.width()].copy_from_slice(fresh);
                    }
                    same_bits("in place", &out, &spread(&rows, case.width(), stride));
                    let all = [&want_lse[..counted * 3], &side.1[counted * 3..], &[poison()][..]].concat();
                    same_bits("lse in place", &lse, &all);
                }
            }
        }
    }
    check::<bf16>();
    check::<f32>();
}

/// The bits of a row depend neither on the order of threads nor on the other rows.
fn same_bits_whatever_else_runs() {
    let (rows, num_heads, head_dim) = (7, 3, 64);
    let case = Case::<f32>::new(&mut Random(6), rows, num_heads, head_dim);
    let [out, lse] = in_every_order(|| bits(case.packed(To::Other)));
    let width = num_heads * head_dim;
    for row in 0..rows {
        let row_of = |side: &(Vec<f32>, Vec<f32>)| {
            (side.0[row * width..][..width].to_vec(), side.1[row * num_heads..][..num_heads].to_vec())
        };
        let alone = bits(Case { a: row_of(&case.a), b: row_of(&case.b), ..case.clone() }.packed(To::Other));
        assert_eq!(alone, [out[row * width..][..width].to_vec(), lse[row * num_heads..][..num_heads].to_vec()]);
    }
}

const HEADS: Heads = Heads { num_heads: 4, num_kv_heads: 2, head_dim: 32 };

/// Queries, keys and values; attention can run over any range of the keys.
struct Whole<T> {
    rows: usize,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
}

impl<T: Float> Whole<T> {
    fn new(random: &mut Random, rows: usize, keys: usize) -> Whole<T> {
        let Heads { num_heads, num_kv_heads, head_dim } = HEADS;
        let kv = keys * num_kv_heads * head_dim;
        Whole { rows, q: random.floats(rows * num_heads * head_dim), k: random.floats(kv), v: random.floats(kv) }
    }

    fn attend(&self, stream: &Stream, keys: std::ops::Range<usize>) -> (Vec<T>, Vec<f32>) {
        let Heads { num_heads, num_kv_heads, head_dim } = HEADS;
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|x| stream.upload(x).unwrap());
        let width = num_heads * head_dim;
        let kv = |buffer| Rows { buffer, first: 0, stride: num_kv_heads * head_dim };
        let [start, len] = [keys.start, keys.len()].map(|x| stream.upload(&[x as i32]).unwrap());
        let cu_rows = stream.upload(&[0, self.rows as i32]).unwrap();
        let mut out = stream.alloc(self.rows * width).unwrap();
        let mut lse = stream.alloc(self.rows * num_heads).unwrap();
        let attention = Attention {
            heads: HEADS,
            q: Rows { buffer: &q, first: 0, stride: width },
            cu_rows: &cu_rows,
            max_sequence_rows: self.rows,
            segments: [Some(Segment { k: kv(&k), v: kv(&v), start: Some(&start), len: &len }), None, None],
            tiles: None,
            scale: 1.0 / (head_dim as f32).sqrt(),
            max_splits: 1,
            form: None,
            out: &mut out,
            lse: Some(&mut lse),
            workspace: &mut stream.alloc(0).unwrap(),
        };
        attention::launch(stream, attention).unwrap();
        (out.read().unwrap(), lse.read().unwrap())
    }

    /// Merges the second state into the first with the safe launch.
    fn merged(&self, stream: &Stream, a: (Vec<T>, Vec<f32>), b: (Vec<T>, Vec<f32>)) -> (Vec<T>, Vec<f32>) {
        let (mut out, mut lse) = (stream.upload(&a.0).unwrap(), stream.upload(&a.1).unwrap());
        let (b_out, b_lse) = (stream.upload(&b.0).unwrap(), stream.upload(&b.1).unwrap());
        let merge = MergeState {
            max_rows: self.rows,
            count: None,
            num_heads: HEADS.num_heads,
            head_dim: HEADS.head_dim,
            a: None,
            b: Partial { out: &b_out, lse: &b_lse },
            out: &mut out,
            lse: &mut lse,
        };
        merge_state::launch(stream, merge).unwrap();
        (out.read().unwrap(), lse.read().unwrap())
    }

    /// Checks the error relative to the head's largest element: one rounding to T per part and one per merge.
    fn same(&self, got: &(Vec<T>, Vec<f32>), want: &(Vec<T>, Vec<f32>), merges: usize, what: &str) {
        let unit = if T::NAME == "bf16" { 1.0 / 256.0 } else { 1.0 / 2048.0 };
        for (got, want) in got.0.chunks_exact(HEADS.head_dim).zip(want.0.chunks_exact(HEADS.head_dim)) {
            // Elements of parts can be larger than those of the whole, because they are means of fewer values.
            let largest = want.iter().fold(0.5f32, |m, x| m.max(x.f32().abs()));
            for (got, want) in got.iter().zip(want) {
                let error = (got.f32() - want.f32()).abs();
                assert!(error <= 3.0 * (merges as f32 + 1.0) * unit * largest, "{what}: {got:?} {want:?}");
            }
        }
        for (got, want) in got.1.iter().zip(&want.1) {
            assert!(got == want || (got - want).abs() < 3e-6 * (1.0 + want.abs()), "{what}: lse {got} {want}");
        }
    }
}

/// Two parts of the keys, split anywhere, in either order, also with one part empty.
fn halves_of_an_attention() {
    fn check<T: Float>() {
        let (stream, keys) = (stream(), 150);
        let whole = Whole::<T>::new(&mut Random(7), 9, keys);
        let want = whole.attend(&stream, 0..keys);
        for cut in [0, 1, 64, 100, 149, 150] {
            let [a, b] = [0..cut, cut..keys].map(|part| whole.attend(&stream, part));
            let got = whole.merged(&stream, a.clone(), b.clone());
            whole.same(&got, &want, 1, &format!("{} cut at {cut}", T::NAME));
            let exchanged = whole.merged(&stream, b, a);
            same_bits("exchanged", &got.0, &exchanged.0);
            assert_eq!(got.1, exchanged.1);
            if cut == 0 || cut == keys {
                same_bits("all in one half", &got.0, &want.0);
                assert_eq!(got.1, want.1);
            }
        }
    }
    check::<bf16>();
    check::<f16>();
}

/// Several merges in a row.
fn many_parts() {
    let (stream, keys) = (stream(), 200);
    let whole = Whole::<f16>::new(&mut Random(8), 5, keys);
    let want = whole.attend(&stream, 0..keys);
    let mut got = whole.attend(&stream, 0..0);
    for part in [0..3, 3..70, 70..70, 70..128, 128..200] {
        let part = whole.attend(&stream, part);
        got = whole.merged(&stream, got, part);
    }
    whole.same(&got, &want, 4, "several merges");
}

/// Replays of one captured in-place launch use the count that is on the device then.
fn replays() {
    device().preload().unwrap();
    let stream = stream();
    let case = Case::<bf16>::new(&mut Random(9), 4, 2, 32);
    let [mut out, b_out] = [&case.a.0, &case.b.0].map(|x| stream.upload(x).unwrap());
    let [mut lse, b_lse] = [&case.a.1, &case.b.1].map(|x| stream.upload(x).unwrap());
    let mut count = stream.upload(&[0]).unwrap();
    let graph = stream.capture(|| {
        let merge = MergeState {
            max_rows: 4,
            count: Some(&count),
            num_heads: 2,
            head_dim: 32,
            a: None,
            b: Partial { out: &b_out, lse: &b_lse },
            out: &mut out,
            lse: &mut lse,
        };
        merge_state::launch(&stream, merge)
    });
    let graph = graph.unwrap();
    let whole = case.packed(To::Other);
    for counted in [3usize, 4, 0, 1] {
        count.write(&[counted as i32]).unwrap();
        out.write(&case.a.0).unwrap();
        lse.write(&case.a.1).unwrap();
        // SAFETY: the buffers are alive and belong to this stream.
        unsafe { graph.launch() }.unwrap();
        same_bits("out", &out.read().unwrap(), &[&whole.0[..counted * 64], &case.a.0[counted * 64..]].concat());
        same_bits("lse", &lse.read().unwrap(), &[&whole.1[..counted * 2], &case.a.1[counted * 2..]].concat());
    }
}

fn wrong_sizes_are_errors() {
    let (stream, other) = (stream(), stream());
    let zeros = |len| stream.zeros::<f32>(len).unwrap();
    let (a, b, mut out) = (zeros(4 * 2 * 8), zeros(4 * 2 * 8), zeros(4 * 2 * 8));
    let (a_lse, b_lse, mut lse) = (zeros(8), zeros(8), zeros(8));
    macro_rules! refused {
        ($says:literal, $($field:ident: $value:expr),+) => {{
            let fits = MergeState {
                max_rows: 4,
                count: None,
                num_heads: 2,
                head_dim: 8,
                a: Some(Partial { out: &a, lse: &a_lse }),
                b: Partial { out: &b, lse: &b_lse },
                out: &mut out,
                lse: &mut lse,
            };
            let error = merge_state::launch(&stream, MergeState { $($field: $value,)+ ..fits }).unwrap_err().to_string();
            assert!(error.contains($says), "{error}");
        }};
    }
    refused!("out: expected 80 elements, found 64", max_rows: 5);
    refused!("out: expected", max_rows: usize::MAX);
    refused!("max_rows: expected 1 to", max_rows: 0);
    refused!("num_heads: expected 1 to", num_heads: 0);
    refused!("num_heads: expected heads that memory can hold", max_rows: 0, num_heads: usize::MAX);
    refused!("head_dim: expected a multiple of 4 elements (16 bytes), found 6", head_dim: 6);
    refused!("out: expected 64 elements, found 63", out: &mut zeros(63));
    refused!("lse: expected 8 elements, found 7", lse: &mut zeros(7));
    refused!("a_out: expected 64 elements, found 63", a: Some(Partial { out: &zeros(63), lse: &a_lse }));
    refused!("a_lse: expected 8 elements, found 7", a: Some(Partial { out: &a, lse: &zeros(7) }));
    refused!("b_out: expected 64 elements, found 63", b: Partial { out: &zeros(63), lse: &b_lse });
    refused!("b_lse: expected a buffer of the stream", b: Partial { out: &b, lse: &other.zeros(8).unwrap() });
    refused!("count: expected 1 elements, found 0", count: Some(&stream.zeros(0).unwrap()));
}
