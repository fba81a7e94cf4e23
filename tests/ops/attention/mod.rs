//! Compares the attention kernels, launched by the shipped code, with the reference in f64.

mod invalid_device_data;
mod reference;

use crate::common::{Float, Part, Random, on_device, poison, stream};
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::attention::{self as op, Attention, Form, Heads, KEY_TILE, QUERY_TILE, Rows, Segment, Tiles};
use dllm_kernels::reference::attention::attend;
use half::{bf16, f16};

on_device!(
    every_shape_of_heads,
    segments,
    segments_of_one_key,
    ragged_batches,
    many_rows,
    lists_of_tiles,
    any_number_of_splits,
    the_same_bits_in_every_order,
    scores_of_any_size,
    scores_far_below_zero;
    in_parts:
    either_form,
);

/// Query rows and keys of one sequence.
#[derive(Clone, Debug)]
struct Sequence {
    rows: usize,
    /// Keys in each segment.
    keys: [usize; 3],
    /// Key tiles that each query tile (and kv head, if `per_head`) visits.
    tiles: Vec<Vec<i32>>,
}

fn dense(rows: usize, keys: [usize; 3]) -> Sequence {
    Sequence { rows, keys, tiles: Vec::new() }
}

#[derive(Clone)]
struct Case<T> {
    heads: Heads,
    sequences: Vec<Sequence>,
    sparse: bool,
    per_head: bool,
    splits: usize,
    form: Option<Form>,
    /// `[rows, q_stride]`; queries start at column `first`.
    q: Vec<T>,
    first: usize,
    q_stride: usize,
    /// Per segment: keys and values, `[rows, stride]`, and the first row of each sequence.
    segments: [(Vec<T>, Vec<T>, Vec<usize>); 3],
    kv_stride: usize,
    scale: f32,
}

impl<T: Float> Case<T> {
    /// Random case; memory that must not be read holds poison.
    fn new(random: &mut Random, heads: Heads, sequences: Vec<Sequence>, splits: usize) -> Case<T> {
        let (width, kv_width) = (heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim);
        let (first, q_stride, kv_stride) = (8, width + 24, kv_width + 8);
        let mut fill = |rows: usize, stride: usize, first: usize, width: usize, used: &dyn Fn(usize) -> bool| {
            let mut all = vec![poison::<T>(); rows * stride + first];
            for row in (0..rows).filter(|row| used(*row)) {
                for x in &mut all[row * stride + first..][..width] {
                    *x = T::of(random.normal());
                }
            }
            all
        };
        let rows = sequences.iter().map(|s| s.rows).sum();
        let q = fill(rows, q_stride, first, width, &|_| true);
        let segments = [0, 1, 2].map(|i| {
            // Two rows of poison before each sequence and after the last.
            let mut next = 0;
            let starts: Vec<usize> = sequences
                .iter()
                .map(|s| {
                    let start = next + 2;
                    next = start + s.keys[i];
                    start
                })
                .collect();
            let used = |row: usize| starts.iter().zip(&sequences).any(|(at, s)| (*at..at + s.keys[i]).contains(&row));
            (fill(next + 2, kv_stride, 0, kv_width, &used), fill(next + 2, kv_stride, 0, kv_width, &used), starts)
        });
        let scale = 1.0 / (heads.head_dim as f32).sqrt();
        Case {
            heads,
            sequences,
            sparse: false,
            per_head: false,
            splits,
            form: None,
            q,
            first,
            q_stride,
            segments,
            kv_stride,
            scale,
        }
    }

    fn rows(&self) -> usize {
        self.sequences.iter().map(|s| s.rows).sum()
    }

    fn max_rows(&self) -> usize {
        self.sequences.iter().map(|s| s.rows).max().unwrap().max(1)
    }

    fn cu_rows(&self) -> Vec<i32> {
        let ends = self.sequences.iter().scan(0, |end, s| {
            *end += s.rows as i32;
            Some(*end)
        });
        std::iter::once(0).chain(ends).collect()
    }

    fn starts_and_lens(&self, segment: usize) -> [Vec<i32>; 2] {
        let starts = self.segments[segment].2.iter().map(|s| *s as i32).collect();
        [starts, self.sequences.iter().map(|s| s.keys[segment] as i32).collect()]
    }

    /// Offsets and indices of the tile lists.
    fn lists(&self) -> [Vec<i32>; 2] {
        let (mut offsets, mut indices) = (vec![0], Vec::new());
        let lists = self.max_rows().div_ceil(QUERY_TILE) * if self.per_head { self.heads.num_kv_heads } else { 1 };
        for s in &self.sequences {
            for i in 0..lists {
                indices.extend(s.tiles.get(i).into_iter().flatten());
                offsets.push(indices.len() as i32);
            }
        }
        [offsets, indices]
    }
}

/// Output as floats, and the log-sum-exps.
#[derive(Clone, Debug, PartialEq)]
struct Got {
    out: Vec<f32>,
    lse: Vec<f32>,
}

/// Keys, values, starts, lengths.
type Parts<T> = (Buffer<T>, Buffer<T>, Buffer<i32>, Buffer<i32>);

struct OnDevice<T> {
    q: Buffer<T>,
    cu_rows: Buffer<i32>,
    segments: Vec<Parts<T>>,
    tiles: Option<(Buffer<i32>, Buffer<i32>)>,
    out: Buffer<T>,
    lse: Buffer<f32>,
    workspace: Buffer<f32>,
}

impl<T: Float> OnDevice<T> {
    fn new(stream: &Stream, case: &Case<T>) -> OnDevice<T> {
        let segment = |i: usize| {
            let [k, v] = [&case.segments[i].0, &case.segments[i].1].map(|x| stream.upload(x).unwrap());
            let [starts, lens] = case.starts_and_lens(i).map(|x| stream.upload(&x).unwrap());
            (k, v, starts, lens)
        };
        let tiles = case.sparse.then(|| case.lists()).map(|lists| lists.map(|x| stream.upload(&x).unwrap()).into());
        let rows = case.rows().max(1);
        OnDevice {
            q: stream.upload(&case.q).unwrap(),
            cu_rows: stream.upload(&case.cu_rows()).unwrap(),
            segments: (0..3).map(segment).collect(),
            tiles,
            out: stream.alloc(rows * case.heads.num_heads * case.heads.head_dim).unwrap(),
            lse: stream.alloc(rows * case.heads.num_heads).unwrap(),
            workspace: stream.alloc(op::workspace_len(rows, case.heads, case.splits)).unwrap(),
        }
    }

    fn launch(&mut self, stream: &Stream, case: &Case<T>) -> dllm_kernels::Result<()> {
        self.launch_with(stream, case, |_| {})
    }

    /// Launches with changed parameters.
    fn launch_with<'a>(
        &'a mut self,
        stream: &Stream,
        case: &Case<T>,
        change: impl FnOnce(&mut Attention<'a, T>),
    ) -> dllm_kernels::Result<()> {
        let kv = |buffer| Rows { buffer, first: 0, stride: case.kv_stride };
        let segments: Vec<_> = (0..3)
            .map(|i| {
                let (k, v, start, len) = &self.segments[i];
                // A segment in which no sequence has keys is left out.
                let any = case.sequences.iter().any(|s| s.keys[i] > 0);
                any.then_some(Segment { k: kv(k), v: kv(v), start: Some(start), len })
            })
            .collect();
        let tiles = self.tiles.as_ref().map(|(offsets, indices)| Tiles { offsets, indices, per_head: case.per_head });
        let mut attention = Attention {
            heads: case.heads,
            q: Rows { buffer: &self.q, first: case.first, stride: case.q_stride },
            cu_rows: &self.cu_rows,
            max_sequence_rows: case.max_rows(),
            segments: [segments[0], segments[1], segments[2]],
            tiles,
            scale: case.scale,
            max_splits: case.splits,
            form: case.form,
            out: &mut self.out,
            lse: Some(&mut self.lse),
            workspace: &mut self.workspace,
        };
        change(&mut attention);
        op::launch(stream, attention)
    }

    fn read(&self) -> Got {
        Got { out: self.out.read().unwrap().iter().map(|x| x.f32()).collect(), lse: self.lse.read().unwrap() }
    }
}

fn bits(got: &Got) -> Vec<u32> {
    got.out.iter().chain(&got.lse).map(|x| x.to_bits()).collect()
}

fn run<T: Float>(case: &Case<T>) -> Got {
    let stream = stream();
    let mut on_device = OnDevice::new(&stream, case);
    on_device.launch(&stream, case).unwrap();
    on_device.read()
}

/// Compares all results with the reference: each element relative to its row's largest, and each log-sum-exp.
fn check<T: Float>(case: &Case<T>, got: &Got, name: &str) {
    // Scores and weights are products of rounded numbers in f32; the weights are then rounded to T.
    let tolerance = if T::NAME == "bf16" { 1e-2 } else { 2e-3 };
    let Heads { num_heads, num_kv_heads, head_dim } = case.heads;
    let wide = |x: &[T]| x.iter().map(|x| x.f64()).collect::<Vec<f64>>();
    let mut first_row = 0;
    for (s, sequence) in case.sequences.iter().enumerate() {
        for head in 0..num_heads {
            let kv_head = head / (num_heads / num_kv_heads);
            let mut keys_values = Vec::new();
            for (i, (k, v, starts)) in case.segments.iter().enumerate() {
                for row in starts[s]..starts[s] + sequence.keys[i] {
                    let at = row * case.kv_stride + kv_head * head_dim;
                    keys_values.push((wide(&k[at..at + head_dim]), wide(&v[at..at + head_dim])));
                }
            }
            for row in 0..sequence.rows {
                let visited = |key: usize| {
                    let list = row / QUERY_TILE * if case.per_head { num_kv_heads } else { 1 };
                    let list = list + if case.per_head { kv_head } else { 0 };
                    !case.sparse || sequence.tiles.get(list).is_some_and(|l| l.contains(&((key / KEY_TILE) as i32)))
                };
                let visible: Vec<(&[f64], &[f64])> = (0..keys_values.len())
                    .filter(|key| visited(*key))
                    .map(|key| (&keys_values[key].0[..], &keys_values[key].1[..]))
                    .collect();
                let at = (first_row + row) * case.q_stride + case.first + head * head_dim;
                let (want, want_lse) = attend(&wide(&case.q[at..at + head_dim]), &visible, case.scale as f64);
                let place = (first_row + row) * num_heads + head;
                let out = &got.out[place * head_dim..][..head_dim];
                let largest = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
                for (got, want) in out.iter().zip(&want) {
                    let error = (*got as f64 - want).abs();
                    assert!(error <= tolerance * largest, "{name}: sequence {s} row {row} head {head}: {got} {want}");
                }
                let lse = got.lse[place] as f64;
                let same = lse == want_lse || (lse - want_lse).abs() < 1e-5 + 1e-6 * want_lse.abs();
                assert!(same, "{name}: sequence {s} row {row} head {head}: lse {lse} {want_lse}");
            }
        }
        first_row += sequence.rows;
    }
}

const MHA: Heads = Heads { num_heads: 2, num_kv_heads: 2, head_dim: 64 };

fn check_types(name: &str, heads: Heads, sequences: &[Sequence], splits: usize) {
    let name = format!("{name}, {heads:?}, {splits} splits");
    let case = Case::<bf16>::new(&mut Random(7), heads, sequences.to_vec(), splits);
    check(&case, &run(&case), &name);
    let case = Case::<f16>::new(&mut Random(8), heads, sequences.to_vec(), splits);
    check(&case, &run(&case), &name);
}

fn every_shape_of_heads() {
    for head_dim in [32, 64, 128] {
        for (num_heads, num_kv_heads) in [(1, 1), (4, 4), (4, 1), (14, 2), (14, 1)] {
            let heads = Heads { num_heads, num_kv_heads, head_dim };
            check_types("heads", heads, &[dense(5, [70, 5, 30])], 1);
            check_types("heads", heads, &[dense(33, [100, 33, 0])], 3);
        }
    }
}

/// Each segment empty, all of them, and none; lengths that fill no tile; one key and one query.
fn segments() {
    for keys in [
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
        [0, 0, 0],
        [64, 64, 64],
        [63, 2, 65],
        [0, 32, 96],
        [96, 0, 32],
        [96, 32, 0],
        [1, 1, 1],
        [130, 7, 1],
    ] {
        for (rows, splits) in [(1, 1), (32, 1), (32, 4), (17, 64)] {
            check_types(&format!("{keys:?}"), MHA, &[dense(rows, keys)], splits);
        }
    }
}

/// One segment of exactly one key before, between and after others, and several of them; in both forms, with and without splits.
fn segments_of_one_key() {
    for keys in [
        [1, 5, 9],
        [5, 1, 9],
        [5, 9, 1],
        [1, 1, 9],
        [1, 9, 1],
        [9, 1, 1],
        [1, 1, 1],
        [1, 0, 7],
        [0, 1, 7],
        [7, 0, 1],
        [1, 63, 64],
        [63, 1, 64],
        [64, 1, 63],
        [64, 64, 1],
    ] {
        // Another sequence, which has keys in all segments.
        let sequences = vec![dense(3, keys), dense(2, [2, 3, 4])];
        for (form, splits) in [(Form::Streaming, 1), (Form::Full, 1), (Form::Streaming, 3), (Form::Full, 3)] {
            let mut case = Case::<f16>::new(&mut Random(11), MHA, sequences.clone(), splits);
            case.form = Some(form);
            check(&case, &run(&case), &format!("{keys:?}, {form:?}, {splits} splits"));
        }
    }
}

fn ragged_batches() {
    let sequences = [
        dense(3, [10, 3, 200]),
        dense(0, [5, 0, 0]),
        dense(32, [0, 32, 0]),
        dense(1, [0, 0, 0]),
        dense(20, [64, 20, 44]),
    ];
    for splits in [1, 2, 5] {
        check_types("ragged", MHA, &sequences, splits);
        check_types("ragged", Heads { num_heads: 7, num_kv_heads: 1, head_dim: 32 }, &sequences, splits);
    }
}

/// More packed rows than the streaming form is planned for.
fn many_rows() {
    check_types("full", MHA, &[dense(300, [0, 300, 0]), dense(129, [0, 129, 0])], 1);
    check_types("full", Heads { num_heads: 14, num_kv_heads: 2, head_dim: 128 }, &[dense(70, [20, 70, 3])], 1);
    check_types("full", MHA, &[dense(257, [40, 257, 9])], 2);
}

fn lists_of_tiles() {
    let mut random = Random(3);
    for (heads, per_head) in [(MHA, false), (MHA, true), (Heads { num_heads: 6, num_kv_heads: 2, head_dim: 32 }, true)]
    {
        for (rows, splits) in [(32, 1), (32, 3), (200, 1), (300, 2)] {
            let mut sequence = dense(rows, [150, rows, 201]);
            let tiles = (351 + rows).div_ceil(KEY_TILE) as i32;
            let lists = rows.div_ceil(QUERY_TILE) * if per_head { heads.num_kv_heads } else { 1 };
            for list in 0..lists {
                let mut visited: Vec<i32> = (0..tiles).filter(|_| random.below(2) == 0).collect();
                if list == 0 {
                    visited = vec![tiles - 1]; // only the partial tile
                }
                if random.below(2) == 0 {
                    visited.reverse();
                }
                sequence.tiles.push(visited);
            }
            let mut empty = sequence.clone();
            empty.tiles.iter_mut().for_each(Vec::clear);
            let mut case = Case::<bf16>::new(&mut random, heads, vec![sequence, empty], splits);
            (case.sparse, case.per_head) = (true, per_head);
            check(&case, &run(&case), &format!("{heads:?} {rows} rows, {splits} splits"));
            // Tiles that do not exist are empty, for any tile number.
            case.sequences[0].tiles[0].extend([tiles, tiles + 1000, i32::MAX, -1, i32::MIN]);
            check(&case, &run(&case), "tiles that do not exist");
        }
    }
}

/// Any number of KV splits gives the same result up to rounding in f32, before the final rounding to f16. With 13 tiles, and with
/// 43, so that more than 32 splits have keys.
fn any_number_of_splits() {
    for (sequence, heads) in [
        (dense(32, [500, 32, 300]), MHA),
        (dense(3, [1500, 3, 1200]), Heads { head_dim: 32, ..MHA }),
        (dense(3, [1500, 3, 1200]), Heads { head_dim: 128, num_heads: 2, num_kv_heads: 1 }),
    ] {
        let mut case = Case::<f16>::new(&mut Random(4), heads, vec![sequence], 1);
        let one = run(&case);
        check(&case, &one, "one part");
        for splits in [2, 3, 7, 8, 9, 13, 33, 64] {
            case.splits = splits;
            let parts = run(&case);
            for (a, b) in one.out.iter().zip(&parts.out) {
                assert!((a - b).abs() <= 2e-3 * a.abs().max(0.05), "{splits}: {a} {b}");
            }
            for (a, b) in one.lse.iter().zip(&parts.lse) {
                assert!((a - b).abs() < 2e-6 * a.abs().max(1.0), "{splits}: {a} {b}");
            }
        }
    }
}

/// Both forms of the kernel, on shapes for which the plan chooses either: correct results with the same bits.
fn either_form(part: Part) {
    fn check_forms<T: Float>(random: &mut Random, heads: Heads, splits: usize) {
        let mut sequences = vec![dense(140, [70, 140, 30]), dense(3, [200, 3, 0]), dense(17, [0, 17, 64])];
        sequences[0].tiles = vec![vec![3, 0], vec![1, 2, 0]];
        sequences[1].tiles = vec![vec![2]];
        let mut case = Case::<T>::new(random, heads, sequences, splits);
        for (sparse, sequences) in [(false, 0..3), (true, 0..3), (false, 1..3)] {
            let name = format!("{} {heads:?}, {splits} splits, lists {sparse}, {sequences:?}", T::NAME);
            let skipped: usize = case.sequences[..sequences.start].iter().map(|s| s.rows).sum();
            case.sparse = sparse;
            case.q.drain(..skipped * case.q_stride);
            case.sequences.drain(..sequences.start);
            case.segments.iter_mut().for_each(|(_, _, starts)| _ = starts.drain(..sequences.start));
            let [planned, streaming, full] = [None, Some(Form::Streaming), Some(Form::Full)].map(|form| {
                case.form = form;
                run(&case)
            });
            check(&case, &streaming, &name);
            assert_eq!(bits(&streaming), bits(&full), "{name}");
            assert_eq!(bits(&planned), bits(&full), "{name}");
        }
    }
    let mut random = Random(9);
    for head_dim in part.of([64, 32, 128], 1) {
        for (num_heads, num_kv_heads, splits) in [(2, 2, 1), (6, 2, 3)] {
            let heads = Heads { num_heads, num_kv_heads, head_dim };
            check_forms::<bf16>(&mut random, heads, splits);
            check_forms::<f16>(&mut random, heads, splits);
        }
    }
}

fn the_same_bits_in_every_order() -> Vec<u32> {
    let sequences = [dense(32, [130, 32, 60]), dense(7, [3, 7, 0])];
    let forms = [(1, Form::Streaming), (4, Form::Streaming), (1, Form::Full), (4, Form::Full)];
    let bits = forms.map(|(splits, form)| {
        let case = Case::<bf16>::new(&mut Random(5), MHA, sequences.to_vec(), splits);
        bits(&run(&Case { form: Some(form), ..case }))
    });
    bits.concat()
}

/// Large scores, whose exponentials would overflow, and equal scores.
fn scores_of_any_size() {
    for size in [0.0, 30.0, 3e4] {
        let mut case = Case::<bf16>::new(&mut Random(6), MHA, vec![dense(16, [64, 16, 10])], 2);
        for q in case.q.iter_mut().filter(|q| !q.f32().is_nan()) {
            *q = bf16::of(q.f32() * size);
        }
        check(&case, &run(&case), &format!("times {size}"));
    }
}

/// Scores of about -200 for every key of even rows, and about 200 in odd rows. A maximum, of a tile or of the splits, that starts
/// at 0 instead of minus infinity would make all weights of the even rows 0.
fn scores_far_below_zero() {
    fn check_forms<T: Float>(heads: Heads) {
        for (sequences, splits) in [
            (vec![dense(4, [3, 0, 0])], 1),
            (vec![dense(18, [70, 18, 5]), dense(3, [0, 1, 0])], 1),
            (vec![dense(18, [70, 18, 5]), dense(3, [0, 1, 0])], 2),
            (vec![dense(5, [200, 5, 70])], 5),
        ] {
            let mut case = Case::<T>::new(&mut Random(12), heads, sequences, splits);
            let size = (200.0 / (heads.head_dim as f32).sqrt()).sqrt();
            for (i, q) in case.q.iter_mut().enumerate().filter(|(_, q)| !q.f32().is_nan()) {
                let sign = if ((i - case.first) / case.q_stride).is_multiple_of(2) { 1.0 } else { -1.0 };
                *q = T::of(sign * (size + 0.1 * q.f32()));
            }
            for k in case.segments.iter_mut().flat_map(|(k, _, _)| k).filter(|k| !k.f32().is_nan()) {
                *k = T::of(0.25 * k.f32() - size);
            }
            for form in [Form::Streaming, Form::Full] {
                case.form = Some(form);
                let got = run(&case);
                let low = got.lse.chunks_exact(heads.num_heads).step_by(2).flatten();
                assert!(
                    low.clone().count() > 0 && low.clone().all(|lse| (-230.0..-170.0).contains(lse)),
                    "{:?}",
                    got.lse
                );
                check(&case, &got, &format!("{} {heads:?}, {form:?}, {splits} splits", T::NAME));
            }
        }
    }
    for head_dim in [32, 64, 128] {
        check_forms::<bf16>(Heads { head_dim, ..MHA });
        check_forms::<f16>(Heads { num_heads: 6, num_kv_heads: 2, head_dim });
    }
}
