//! The kernel of vverify compared with its reference.
//!
//! Cosines must be within 1e-6 of the f64 reference. The selection must be the one that the reference makes from the
//! kernel's own cosines, and what it selects from its own, except rows whose cosine lies within 1e-6 of the boundary:
//! [`Case::check`] counts the sequences with such rows, and tests whose cosines are well apart demand that there are none.
#![cfg(feature = "cuda")]

mod common;

use common::{Float, Random, assert_nothing_reported, on_device, spread, stream};
use dllm_kernels::abi::{dllm_gather_scatter_params, dllm_vverify_params};
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::{Workspace, gather_scatter, vverify};
use dllm_kernels::reference::vverify::{cosine, lowest, place};
use half::{bf16, f16};

on_device! {
    agrees_with_the_oracle_bf16,
    agrees_with_the_oracle_f16,
    ratios,
    sequences_of_any_length_and_none,
    room_for_more_rows_than_there_are,
    ties_go_to_the_lower_row,
    equal_rows_have_cosine_one_and_zero_vectors_zero,
    what_is_not_a_number_counts_as_turned_most,
    cached_rows_by_a_map,
    fresh_rows_by_a_map,
    lists_inside_larger_ones,
    places_that_lists_do_not_have,
    maps_that_say_nothing_change_nothing,
    strides_and_optional_outputs,
    same_bits_in_any_order_alone_and_in_a_batch,
    golden_cases,
    lies_in_cu_rows_do_no_harm,
    one_workspace_for_launches_of_any_shape,
    a_captured_launch_follows_the_device,
    a_captured_launch_follows_its_maps,
    gather_takes_the_selected_rows,
    wrong_buffers_are_named,
}

const NEAR: f64 = 1e-6;
/// Contents of outputs before a launch.
const UNTOUCHED: i32 = -7;

#[derive(Clone)]
struct Case<T> {
    width: usize,
    ratio: f64,
    cu_rows: Vec<i32>,
    fresh: Vec<T>,
    cached: Vec<T>,
    fresh_row: Option<Vec<i32>>,
    cached_row: Option<Vec<i32>>,
    update_cached: bool,
    first_selected: Option<Vec<i32>>,
    /// 0: as many as there are rows.
    num_listed: usize,
    tables: [Option<Vec<i32>>; 3],
    /// NaNs between the rows of either matrix.
    pad: [usize; 2],
    /// Whether to ask for the cosines and for `failed`.
    optional_outputs: bool,
}

#[derive(Debug)]
struct Outcome {
    indices: Vec<i32>,
    /// A list for each table that there is.
    selected: Vec<Vec<i32>>,
    cu_selected: Vec<i32>,
    similarity: Vec<f32>,
    failed: i32,
    /// Bits.
    cached: Vec<u16>,
}

impl<T: Float> Case<T> {
    /// Sequences of these lengths; every row is its cached row, turned by more or less.
    fn new(lengths: &[usize], width: usize, ratio: f64) -> Case<T> {
        let mut random = Random(width as u64);
        let mut cu_rows = vec![0];
        lengths.iter().for_each(|length| cu_rows.push(cu_rows.last().unwrap() + *length as i32));
        let rows = lengths.iter().sum::<usize>().max(1);
        let cached: Vec<f32> = (0..rows * width).map(|_| random.number()).collect();
        let turned = |row: &[f32]| {
            let by = 0.05 + random.number().abs() * 1.5;
            row.iter().map(|x| T::of(x + by * random.number())).collect::<Vec<_>>()
        };
        Case {
            width,
            ratio,
            cu_rows,
            fresh: cached.chunks(width).flat_map(turned).collect(),
            cached: cached.iter().map(|x| T::of(*x)).collect(),
            fresh_row: None,
            cached_row: None,
            update_cached: false,
            first_selected: None,
            num_listed: 0,
            tables: Default::default(),
            pad: [0; 2],
            optional_outputs: true,
        }
    }

    fn rows(&self) -> usize {
        self.fresh_row.as_ref().map_or(self.fresh.len() / self.width, Vec::len)
    }

    fn listed(&self) -> usize {
        if self.num_listed == 0 { self.rows() } else { self.num_listed }
    }

    fn set_fresh(&mut self, row: usize, x: impl Fn(usize) -> f32) {
        (0..self.width).for_each(|i| self.fresh[row * self.width + i] = T::of(x(i)));
    }

    fn set_cached(&mut self, row: usize, x: impl Fn(usize) -> f32) {
        (0..self.width).for_each(|i| self.cached[row * self.width + i] = T::of(x(i)));
    }

    /// Runs it in a workspace of just the size that it needs.
    fn run(&self) -> Outcome {
        let stream = stream();
        let mut workspace = stream.zeros(8 * self.rows().max(self.cu_rows.len() - 1)).unwrap();
        self.run_in(&stream, &mut workspace)
    }

    fn run_in(&self, stream: &Stream, workspace: &mut Buffer<u8>) -> Outcome {
        let padded = |rows: &[T], pad| spread(rows, self.width, self.width + pad);
        let fresh = stream.upload(&padded(&self.fresh, self.pad[0])).unwrap();
        let before = padded(&self.cached, self.pad[1]);
        let cached = stream.upload(&before).unwrap();
        let upload = |map: &Option<Vec<i32>>| map.as_ref().map(|map| stream.upload(map).unwrap());
        let address = |buffer: &Option<Buffer<i32>>| buffer.as_ref().map_or(0, Buffer::address);
        let [fresh_row, cached_row, first_selected] =
            [&self.fresh_row, &self.cached_row, &self.first_selected].map(upload);
        let tables = self.tables.each_ref().map(upload);
        let untouched = || stream.upload(&vec![UNTOUCHED; self.listed()]).unwrap();
        let selected = tables.each_ref().map(|table| table.as_ref().map(|_| untouched()));
        let cu_rows = stream.upload(&self.cu_rows).unwrap();
        let indices = untouched();
        let cu_selected = stream.upload(&vec![UNTOUCHED; self.cu_rows.len()]).unwrap();
        let similarity = stream.upload(&vec![UNTOUCHED as f32; self.rows()]).unwrap();
        let failed = stream.upload(&[-1]).unwrap();
        let params = dllm_vverify_params {
            size: size_of::<dllm_vverify_params>() as u64,
            fresh: fresh.address(),
            fresh_row: address(&fresh_row),
            cached: cached.address(),
            cached_row: address(&cached_row),
            cu_rows: cu_rows.address(),
            indices: indices.address(),
            tables: tables.each_ref().map(address),
            selected: selected.each_ref().map(address),
            first_selected: address(&first_selected),
            cu_selected: cu_selected.address(),
            similarity: if self.optional_outputs { similarity.address() } else { 0 },
            failed: if self.optional_outputs { failed.address() } else { 0 },
            workspace: workspace.address(),
            workspace_bytes: workspace.len() as u64,
            fresh_stride: (self.width + self.pad[0]) as i64,
            cached_stride: (self.width + self.pad[1]) as i64,
            ratio: self.ratio,
            max_rows: self.rows() as i32,
            num_sequences: self.cu_rows.len() as i32 - 1,
            num_fresh_rows: if fresh_row.is_some() { (self.fresh.len() / self.width) as i32 } else { 0 },
            num_cached_rows: (self.cached.len() / self.width) as i32,
            num_listed: self.num_listed as i32,
            width: self.width as i32,
            dtype: T::DTYPE as i32,
            update_cached: self.update_cached.into(),
        };
        // SAFETY: the buffers live until they are read below; no two rows of a case have the same cached row.
        unsafe { vverify::launch_raw(stream.device(), stream.raw(), &params) }.unwrap();

        let after = cached.read().unwrap();
        let (before, after): (&[u16], &[u16]) = (bytemuck::cast_slice(&before), bytemuck::cast_slice(&after));
        let rows = || before.chunks(self.width + self.pad[1]).zip(after.chunks(self.width + self.pad[1]));
        assert!(rows().all(|(before, after)| before[self.width..] == after[self.width..]), "written between rows");
        let counters: Vec<u8> = workspace.read().unwrap().chunks(8).flat_map(|slot| slot[..4].to_vec()).collect();
        assert!(counters.iter().all(|byte| *byte == 0), "a counter was left");
        assert_nothing_reported();
        Outcome {
            indices: indices.read().unwrap(),
            selected: selected.iter().flatten().map(|list| list.read().unwrap()).collect(),
            cu_selected: cu_selected.read().unwrap(),
            similarity: similarity.read().unwrap(),
            failed: failed.read().unwrap()[0],
            cached: rows().flat_map(|(_, after)| &after[..self.width]).copied().collect(),
        }
    }

    /// Compares with the reference. Returns the number of sequences whose selections differ, by rows near the boundary.
    #[track_caller]
    fn check(&self, got: &Outcome) -> usize {
        let floats = |rows: &[T], row: usize| -> Vec<f32> {
            rows[row * self.width..(row + 1) * self.width].iter().map(|x| x.f32()).collect()
        };
        let mut cached: Vec<u16> = bytemuck::cast_slice(&self.cached).to_vec();
        let mut similarity = vec![f64::from(UNTOUCHED); self.rows()];
        let mut failed = -1;
        for row in 0..*self.cu_rows.last().unwrap() as usize {
            let [fresh_row, cached_row] =
                [&self.fresh_row, &self.cached_row].map(|map| map.as_ref().map_or(row, |map| map[row] as usize));
            let known = |matrix: &[T], row: usize| row < matrix.len() / self.width;
            if !known(&self.fresh, fresh_row) || !known(&self.cached, cached_row) {
                (similarity[row], failed) = (f64::NAN, -2);
                continue;
            }
            similarity[row] = cosine(&floats(&self.fresh, fresh_row), &floats(&self.cached, cached_row));
            if self.update_cached {
                let fresh = bytemuck::cast_slice(&self.fresh[fresh_row * self.width..(fresh_row + 1) * self.width]);
                cached[cached_row * self.width..(cached_row + 1) * self.width].copy_from_slice(fresh);
            }
        }
        assert!(got.cached == cached, "the cached rows differ");
        if self.optional_outputs {
            for (row, (got, want)) in got.similarity.iter().zip(&similarity).enumerate() {
                match want.is_nan() {
                    true => assert_eq!(*got, f32::NEG_INFINITY, "row {row}"),
                    false => assert!((f64::from(*got) - want).abs() <= NEAR, "row {row}: {got}, expected {want}"),
                }
            }
        }

        let (mut near, mut selected) = (0, 0);
        let mut lists = vec![vec![UNTOUCHED; self.listed()]; 1 + got.selected.len()];
        for (s, rows) in self.cu_rows.windows(2).enumerate() {
            let (first, rows) = (rows[0] as usize, rows[0] as usize..rows[1] as usize);
            let want = lowest(&similarity[rows.clone()], self.ratio);
            assert_eq!(got.cu_selected[s] as usize, selected, "where sequence {s} begins");
            let begins = self.first_selected.as_ref().map_or(selected as i32, |first| first[s]);
            // What has no place is believed.
            let listed = |j: usize| got.indices.get(usize::try_from(i64::from(begins) + j as i64).ok()?);
            let taken: Vec<usize> =
                want.iter().enumerate().map(|(j, i)| listed(j).map_or(*i, |row| *row as usize - first)).collect();
            selected += want.len();
            let numbers = taken.iter().map(|i| (first + i) as i32).collect::<Vec<_>>();
            let of = |table: &Vec<i32>| numbers.iter().map(|row| table[*row as usize]).collect::<Vec<_>>();
            let tables: Vec<_> = self.tables.iter().flatten().map(of).collect();
            for (numbers, list) in [&numbers].into_iter().chain(&tables).zip(&mut lists) {
                if !place(numbers, begins, list) {
                    failed = -2;
                }
            }
            if self.optional_outputs {
                let own: Vec<f64> = got.similarity[rows.clone()].iter().map(|x| f64::from(*x)).collect();
                assert_eq!(taken, lowest(&own, self.ratio), "sequence {s}, by the kernel's cosines");
            }
            if taken != want {
                let cosines = &similarity[rows];
                let boundary = want.iter().map(|i| cosines[*i]).fold(f64::NEG_INFINITY, f64::max);
                let apart = |i: &usize| (cosines[*i] - boundary).abs() > NEAR;
                let differ = |a: &[usize], b: &[usize]| a.iter().any(|i| !b.contains(i) && apart(i));
                assert!(!differ(&taken, &want) && !differ(&want, &taken), "sequence {s}: {taken:?}, expected {want:?}");
                near += 1;
            }
        }
        assert_eq!(*got.cu_selected.last().unwrap() as usize, selected);
        assert!([&got.indices].into_iter().chain(&got.selected).eq(&lists), "the lists differ");
        if self.optional_outputs {
            assert_eq!(got.failed, failed);
        }
        near
    }

    /// Runs and compares where cosines are well apart.
    #[track_caller]
    fn agrees(&self) {
        assert_eq!(self.check(&self.run()), 0, "sequences with rows near the boundary");
    }
}

fn widths_and_lengths<T: Float>() {
    for width in [8, 16, 248, 1000, 2040, 2048, 2056, 4096] {
        for rows in [1, 2, 7, 33, 70] {
            Case::<T>::new(&[rows], width, 0.25).agrees();
        }
    }
    // Above 256 rows the selection goes in tiles, above 1,024 its keys have no room in shared memory.
    for rows in [255, 257, 1024, 1025, 2000] {
        Case::<T>::new(&[rows], 64, 0.25).agrees();
    }
}

fn agrees_with_the_oracle_bf16() {
    widths_and_lengths::<bf16>();
}

fn agrees_with_the_oracle_f16() {
    widths_and_lengths::<f16>();
}

fn ratios() {
    for ratio in [0.0, 1e-9, 0.01, 0.25, 0.5, 1.0 - 1e-12, 1.0] {
        for rows in [1, 40, 1100] {
            Case::<bf16>::new(&[rows], 32, ratio).agrees();
        }
    }
}

fn sequences_of_any_length_and_none() {
    for lengths in
        [&[5, 9, 1][..], &[0, 12], &[12, 0], &[7, 0, 0, 9], &[0], &[0, 0, 0, 0, 0], &[1; 40], &[300, 4, 1030, 90]]
    {
        Case::<f16>::new(lengths, 40, 0.3).agrees();
    }
}

fn room_for_more_rows_than_there_are() {
    let mut case = Case::<bf16>::new(&[20, 30], 64, 0.25);
    case.cu_rows = vec![0, 11, 17];
    case.update_cached = true;
    case.agrees();
}

fn ties_go_to_the_lower_row() {
    // Three kinds of rows, far apart: all rows of a kind have the same bits.
    for rows in [50, 1500] {
        for ratio in [0.1, 0.4, 0.75] {
            let mut case = Case::<bf16>::new(&[rows], 136, ratio);
            for row in 0..rows {
                case.set_cached(row, |i| 0.1 * (i as f32 + 1.0));
                case.set_fresh(row, |i| if i % 4 < row * 7 % 3 { -1.0 } else { 0.3 * i as f32 });
            }
            case.agrees();
        }
    }
}

fn equal_rows_have_cosine_one_and_zero_vectors_zero() {
    fn equal<T: Float>() {
        for width in [8, 1000, 4096] {
            let mut case = Case::<T>::new(&[60, 1], width, 0.5);
            case.cached = case.fresh.clone();
            let got = case.run();
            assert!(got.similarity.iter().all(|x| *x == 1.0), "{:?}", got.similarity);
            assert_eq!(got.indices[..30], (0..30).collect::<Vec<_>>());
            assert_eq!(case.check(&got), 0);
        }
    }
    equal::<bf16>();
    equal::<f16>();

    let mut case = Case::<bf16>::new(&[9], 64, 0.5);
    (0..3).for_each(|row| case.set_fresh(row, |_| 0.0));
    (2..5).for_each(|row| case.set_cached(row, |_| if row == 4 { -0.0 } else { 0.0 }));
    // Among zeros a sign counts for nothing: -0 arises where a tiny negative product meets a long vector.
    case.set_fresh(5, |i| [1e10, 1e-20].get(i).copied().unwrap_or(0.0));
    case.set_cached(5, |i| if i == 1 { -1e-20 } else { 0.0 });
    let got = case.run();
    assert!(got.similarity[..6].iter().all(|x| *x == 0.0), "{:?}", got.similarity);
    assert!(got.similarity[5].is_sign_negative());
    assert_eq!(got.indices[..4], [0, 1, 2, 3]);
}

fn what_is_not_a_number_counts_as_turned_most() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut case = Case::<f16>::new(&[30], 520, 0.2);
        case.fresh[7 * 520 + 519] = f16::of(value);
        case.cached[20 * 520] = f16::of(value);
        case.cached[21 * 520 + 8] = f16::of(value);
        case.fresh[21 * 520 + 8] = f16::of(value);
        case.set_fresh(3, |_| 0.0);
        case.cached[3 * 520 + 100] = f16::of(value);
        case.update_cached = true;
        let got = case.run();
        assert_eq!(case.check(&got), 0);
        assert!([3, 7, 20, 21].iter().all(|row| got.indices.contains(row)), "{:?}", got.indices);
    }
}

fn cached_rows_by_a_map() {
    let mut case = Case::<bf16>::new(&[13, 24], 72, 0.3);
    case.cached.extend(vec![bf16::ONE; 72 * 10]);
    let map: Vec<i32> = (0..37).map(|row| row * 11 % 47).collect();
    let cached = case.cached.clone();
    for (row, to) in map.iter().enumerate() {
        let to = *to as usize * 72;
        case.cached[to..to + 72].copy_from_slice(&cached[row * 72..(row + 1) * 72]);
    }
    case.cached_row = Some(map);
    case.agrees();
    case.update_cached = true;
    case.agrees();

    // Out of range: reported, counted as the lowest, nothing read or written there.
    let map = case.cached_row.as_mut().unwrap();
    (map[2], map[9], map[30]) = (47, i32::MIN, i32::MAX);
    let got = case.run();
    assert_eq!((case.check(&got), got.failed), (0, -2));
    assert!([2, 9, 30].iter().all(|row| got.indices.contains(row)));
    // Without a map, fresh rows beyond the cached ones.
    let mut case = Case::<bf16>::new(&[6], 16, 0.5);
    case.cached.truncate(4 * 16);
    let got = case.run();
    assert_eq!((case.check(&got), got.failed), (0, -2));
    assert!(got.indices.contains(&4) && got.indices.contains(&5));
}

/// Rows stand anywhere in a larger pass, and are cached under their own numbers.
fn fresh_rows_by_a_map() {
    let mut case = Case::<bf16>::new(&[13, 0, 24], 72, 0.3);
    let map: Vec<i32> = (0..37).map(|row| row * 11 % 47).collect();
    let fresh = case.fresh.clone();
    case.fresh = vec![bf16::ONE; 47 * 72];
    for (row, to) in map.iter().enumerate() {
        case.fresh[*to as usize * 72..][..72].copy_from_slice(&fresh[row * 72..][..72]);
    }
    case.fresh_row = Some(map);
    case.agrees();
    case.update_cached = true;
    case.agrees();
    case.cached_row = Some((0..37).rev().collect());
    case.pad = [8, 16];
    case.agrees();

    // Out of range: reported, counted as the lowest, nothing read, and nothing written over the cached row.
    let map = case.fresh_row.as_mut().unwrap();
    (map[2], map[9], map[30], map[36]) = (47, -1, i32::MAX, i32::MIN);
    let got = case.run();
    assert_eq!((case.check(&got), got.failed), (0, -2));
    assert!([2, 9, 30, 36].iter().all(|row| got.indices.contains(row)));
    // A matrix of fewer rows than are compared: two rows are the same one.
    let mut case = Case::<f16>::new(&[9], 16, 0.5);
    case.fresh.truncate(2 * 16);
    case.fresh_row = Some(vec![1, 0, 1, 1, 0, 0, 1, 0, 1]);
    case.agrees();
}

/// A case with a table of 3,000 elements that holds its sequences in another order.
fn within_a_table() -> Case<bf16> {
    let mut case = Case::<bf16>::new(&[20, 0, 270, 3, 30], 24, 0.4);
    case.first_selected = Some(vec![2990, 5, 700, 0, 100]);
    case.num_listed = 3000;
    case.tables = [5, 7, 11].map(|by| Some((0..323).map(|row| row * by % 323).collect()));
    case
}

/// Nothing between the parts is touched.
fn lists_inside_larger_ones() {
    let case = within_a_table();
    case.agrees();
    let [some, other] = [&case.tables[0], &case.tables[1]].map(Clone::clone);
    for tables in [[None, some.clone(), None], [other, None, some], Default::default()] {
        Case { tables, ..case.clone() }.agrees();
    }
    // Without places of their own sequences stand one after the other.
    Case { first_selected: None, ..case.clone() }.agrees();
    Case { first_selected: None, num_listed: 0, ..case }.agrees();
}

fn places_that_lists_do_not_have() {
    let case = within_a_table();
    assert_eq!(case.run().failed, -1);
    for first_selected in [
        vec![2993, 5, 700, 0, 100],
        vec![2990, 5, 700, -1, 100],
        vec![2990, 5, 700, 90, -11],
        vec![3000, 5, 700, 0, 100],
        vec![i32::MAX, 5, i32::MIN, i32::MAX, i32::MIN],
    ] {
        let case = Case { first_selected: Some(first_selected), ..case.clone() };
        let got = case.run();
        assert_eq!((case.check(&got), got.failed), (0, -2));
        Case { optional_outputs: false, ..case }.agrees();
    }
    // A list that is too short without places either: 8 of 20, none, 108 of 270, 1 of 3, 12 of 30.
    let case = Case { first_selected: None, ..case };
    for (num_listed, failed) in [(1, -2), (8, -2), (128, -2), (129, -1)] {
        let case = Case { num_listed, ..case.clone() };
        let got = case.run();
        assert_eq!((case.check(&got), got.failed), (0, failed));
    }
}

fn maps_that_say_nothing_change_nothing() {
    let mut plain = Case::<f16>::new(&[19, 0, 30], 264, 0.25);
    plain.update_cached = true;
    let mut case = plain.clone();
    [case.fresh_row, case.cached_row, case.tables[2]] = [(); 3].map(|_| Some((0..49).collect()));
    case.first_selected = Some(vec![0, 4, 4]);
    case.num_listed = 49;
    let (want, got) = (plain.run(), case.run());
    assert_eq!((case.check(&got), &got.selected), (0, &vec![want.indices.clone()]));
    assert_eq!((got.indices, got.cu_selected, got.cached), (want.indices, want.cu_selected, want.cached));
    let bits = |x: Vec<f32>| x.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    assert_eq!((bits(got.similarity), got.failed), (bits(want.similarity), want.failed));
}

fn strides_and_optional_outputs() {
    for (pad, update_cached, optional_outputs) in
        [([8, 24], true, true), ([24, 0], false, true), ([0, 8], true, false), ([0, 0], false, false)]
    {
        let case = Case::<f16>::new(&[19, 0, 30], 264, 0.25);
        let case = Case { pad, update_cached, optional_outputs, ..case };
        case.agrees();
        // Neither strides nor the update change what is found.
        let plain = Case { pad: [0; 2], update_cached: false, ..case.clone() };
        assert_eq!(plain.run().indices, case.run().indices);
    }
}

/// Returns the bits, which must be the same in every order.
fn same_bits_in_any_order_alone_and_in_a_batch() -> (Vec<i32>, Vec<u32>) {
    let batch = Case::<bf16>::new(&[40, 0, 1100, 3], 520, 0.25);
    let together = batch.run();
    for (s, rows) in batch.cu_rows.windows(2).enumerate().filter(|(_, rows)| rows[0] < rows[1]) {
        let range = |rows: std::ops::Range<i32>| rows.start as usize * 520..rows.end as usize * 520;
        let mut alone = batch.clone();
        alone.fresh = batch.fresh[range(rows[0]..rows[1])].to_vec();
        alone.cached = batch.cached[range(rows[0]..rows[1])].to_vec();
        alone.cu_rows = vec![0, rows[1] - rows[0]];
        let got = alone.run();
        assert_eq!(got.similarity, together.similarity[rows[0] as usize..rows[1] as usize]);
        let part = together.cu_selected[s] as usize..together.cu_selected[s + 1] as usize;
        let want: Vec<i32> = together.indices[part].iter().map(|row| row - rows[0]).collect();
        assert_eq!(got.indices[..want.len()], want);
    }
    (together.indices, together.similarity.iter().map(|x| x.to_bits()).collect())
}

fn golden_cases() {
    let folder = common::golden_dir();
    let json = std::fs::read_to_string(folder.join("sampler_vverify.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let bytes = std::fs::read(folder.join("sampler_vverify.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for golden in json["cases"].as_array().unwrap() {
        let tensor = |name| tensors.tensor(&format!("{}.{name}", golden["name"].as_str().unwrap())).unwrap();
        // Recorded in f32; f16 moves a cosine by up to 1e-4.
        let half = |name| -> Vec<f16> {
            let bytes = tensor(name).data().chunks_exact(4).map(|x| f32::from_le_bytes(x.try_into().unwrap()));
            bytes.map(f16::from_f32).collect()
        };
        let want = tensor("indices").data().chunks_exact(8).map(|x| i64::from_le_bytes(x.try_into().unwrap()) as i32);
        let [batch, rows, width] = tensor("v_new").shape().try_into().unwrap();
        let case = Case {
            fresh: half("v_new"),
            cached: half("v_cached"),
            ..Case::new(&vec![rows; batch], width, golden["transfer_ratio"].as_f64().unwrap())
        };
        let got = case.run();
        assert_eq!(case.check(&got), 0, "{golden}");
        let selected = golden["num_replace"].as_u64().unwrap() as usize;
        let mut want: Vec<i32> = want.enumerate().map(|(i, row)| (i / selected * rows) as i32 + row).collect();
        want.sort_unstable();
        assert_eq!(got.indices[..batch * selected], want, "{golden}");
    }
}

/// With any contents of cu_rows, the kernel stays in its memory and leaves the workspace ready; only ascending bounds count.
fn lies_in_cu_rows_do_no_harm() {
    let stream = stream();
    let honest = Case::<bf16>::new(&[10, 10, 10], 24, 0.5);
    let mut workspace = stream.zeros(8 * 30).unwrap();
    for (lie, counts_as) in [
        ([0, 10, 20, 1000], [0, 10, 20, 30]),
        ([0, i32::MAX, i32::MIN, i32::MAX], [0, 30, 30, 30]),
        ([0, 20, 5, 25], [0, 20, 20, 25]),
        ([9, 4, -3, 8], [0, 4, 4, 8]),
        ([-5, -4, -3, -2], [0, 0, 0, 0]),
        ([1, 1, 1, 1], [0, 1, 1, 1]),
    ] {
        let told = Case { cu_rows: lie.to_vec(), ..honest.clone() };
        let meant = Case { cu_rows: counts_as.to_vec(), ..honest.clone() };
        assert_eq!(meant.check(&told.run_in(&stream, &mut workspace)), 0, "{lie:?}");
        assert_eq!(honest.check(&honest.run_in(&stream, &mut workspace)), 0, "after {lie:?}");
    }
}

fn one_workspace_for_launches_of_any_shape() {
    let stream = stream();
    let mut workspace = stream.zeros(8 * 1300).unwrap();
    for lengths in [&[60][..], &[1300], &[5; 50], &[0; 70], &[1; 200], &[2, 1040]] {
        let case = Case::<bf16>::new(lengths, 16, 0.25);
        assert_eq!(case.check(&case.run_in(&stream, &mut workspace)), 0, "{lengths:?}");
    }
}

/// The buffers of a safe launch of `case`.
struct Buffers<T> {
    fresh: Buffer<T>,
    cached: Buffer<T>,
    fresh_row: Option<Buffer<i32>>,
    cached_row: Option<Buffer<i32>>,
    cu_rows: Buffer<i32>,
    indices: Buffer<i32>,
    tables: [Option<[Buffer<i32>; 2]>; 3],
    first_selected: Option<Buffer<i32>>,
    cu_selected: Buffer<i32>,
    similarity: Buffer<f32>,
    failed: Buffer<i32>,
    workspace: Workspace,
}

impl<T: Float> Buffers<T> {
    fn new(stream: &Stream, case: &Case<T>) -> Buffers<T> {
        let upload = |map: &Option<Vec<i32>>| map.as_ref().map(|map| stream.upload(map).unwrap());
        let list = || stream.upload(&vec![UNTOUCHED; case.listed()]).unwrap();
        Buffers {
            fresh: stream.upload(&case.fresh).unwrap(),
            cached: stream.upload(&case.cached).unwrap(),
            fresh_row: upload(&case.fresh_row),
            cached_row: upload(&case.cached_row),
            cu_rows: stream.upload(&case.cu_rows).unwrap(),
            indices: list(),
            tables: case.tables.each_ref().map(|table| upload(table).map(|table| [table, list()])),
            first_selected: upload(&case.first_selected),
            cu_selected: stream.alloc(case.cu_rows.len()).unwrap(),
            similarity: stream.upload(&vec![UNTOUCHED as f32; case.rows()]).unwrap(),
            failed: stream.upload(&[-1]).unwrap(),
            workspace: vverify::workspace(stream, case.rows(), case.cu_rows.len() - 1).unwrap(),
        }
    }

    fn launch(&mut self, stream: &Stream, case: &Case<T>) -> dllm_kernels::Result<()> {
        let rows = vverify::VVerify {
            width: case.width,
            ratio: case.ratio,
            fresh: &self.fresh,
            fresh_row: self.fresh_row.as_ref(),
            cached: &mut self.cached,
            cached_row: self.cached_row.as_ref(),
            update_cached: case.update_cached,
            cu_rows: &self.cu_rows,
            indices: &mut self.indices,
            tables: self.tables.each_mut().map(|table| {
                let [values, selected] = table.as_mut()?;
                Some(vverify::Table { values, selected })
            }),
            first_selected: self.first_selected.as_ref(),
            cu_selected: &mut self.cu_selected,
            similarity: Some(&mut self.similarity),
            failed: Some(&mut self.failed),
            workspace: &mut self.workspace,
        };
        vverify::launch(stream, rows)
    }

    fn outcome(&self) -> Outcome {
        Outcome {
            indices: self.indices.read().unwrap(),
            selected: self.tables.iter().flatten().map(|[_, selected]| selected.read().unwrap()).collect(),
            cu_selected: self.cu_selected.read().unwrap(),
            similarity: self.similarity.read().unwrap(),
            failed: self.failed.read().unwrap()[0],
            cached: bytemuck::cast_slice(&self.cached.read().unwrap()).to_vec(),
        }
    }
}

/// The same graph, while rows, cached rows and the lengths of the sequences change on the device.
fn a_captured_launch_follows_the_device() {
    let stream = stream();
    let mut case = Case::<bf16>::new(&[25, 0, 40], 80, 0.25);
    case.update_cached = true;
    let mut buffers = Buffers::new(&stream, &case);
    buffers.launch(&stream, &case).unwrap();
    assert_eq!(case.check(&buffers.outcome()), 0);

    let graph = stream.capture(|| buffers.launch(&stream, &case)).unwrap();
    for (seed, cu_rows) in [[0, 25, 25, 65], [0, 1, 60, 65], [0, 0, 0, 0], [0, 30, 30, 41]].into_iter().enumerate() {
        let mut random = Random(seed as u64);
        case.cached = bytemuck::cast_slice(&buffers.outcome().cached).to_vec();
        case.fresh.iter_mut().for_each(|x| *x = bf16::of(random.number()));
        case.cu_rows = cu_rows.to_vec();
        buffers.fresh.write(&case.fresh).unwrap();
        buffers.cu_rows.write(&case.cu_rows).unwrap();
        buffers.indices.write(&[UNTOUCHED; 65]).unwrap();
        buffers.similarity.write(&[UNTOUCHED as f32; 65]).unwrap();
        // SAFETY: the buffers are there, and no other stream uses them.
        unsafe { graph.launch() }.unwrap();
        assert_eq!(case.check(&buffers.outcome()), 0, "{cu_rows:?}");
    }
    assert_nothing_reported();
}

/// The same with maps and lists of every kind, the maps changing on the device.
fn a_captured_launch_follows_its_maps() {
    let stream = stream();
    let mut case = within_a_table();
    case.fresh_row = Some((0..323).rev().collect());
    case.cached_row = Some((0..323).map(|row| row * 7 % 323).collect());
    let mut buffers = Buffers::new(&stream, &case);
    buffers.launch(&stream, &case).unwrap();
    assert_eq!(case.check(&buffers.outcome()), 0);

    let graph = stream.capture(|| buffers.launch(&stream, &case)).unwrap();
    case.fresh_row = Some((0..323).map(|row| row * 5 % 323).collect());
    case.first_selected = Some(vec![0, 0, 2500, 2400, 1000]);
    case.tables[1] = case.fresh_row.clone();
    buffers.fresh_row.as_mut().unwrap().write(case.fresh_row.as_ref().unwrap()).unwrap();
    buffers.first_selected.as_mut().unwrap().write(case.first_selected.as_ref().unwrap()).unwrap();
    let untouched = vec![UNTOUCHED; 3000];
    buffers.indices.write(&untouched).unwrap();
    for ([values, selected], table) in buffers.tables.iter_mut().flatten().zip(case.tables.iter().flatten()) {
        values.write(table).unwrap();
        selected.write(&untouched).unwrap();
    }
    // SAFETY: the buffers are there, and no other stream uses them.
    unsafe { graph.launch() }.unwrap();
    assert_eq!(case.check(&buffers.outcome()), 0);
    assert_nothing_reported();
}

/// The output of vverify is the input of gather, the count included; the host reads nothing in between.
fn gather_takes_the_selected_rows() {
    let stream = stream();
    let case = Case::<bf16>::new(&[30, 0, 23], 48, 0.3);
    let mut buffers = Buffers::new(&stream, &case);
    buffers.launch(&stream, &case).unwrap();
    let row_bytes = 2 * case.width;
    let target = stream.zeros::<bf16>(case.fresh.len()).unwrap();
    let params = dllm_gather_scatter_params {
        size: size_of::<dllm_gather_scatter_params>() as u64,
        source: buffers.fresh.address(),
        target: target.address(),
        index: buffers.indices.address(),
        count: buffers.cu_selected.address() + 4 * 3,
        failed: buffers.failed.address(),
        source_stride_bytes: row_bytes as i64,
        target_stride_bytes: row_bytes as i64,
        row_bytes: row_bytes as i64,
        max_rows: case.rows() as i32,
        num_indexed_rows: case.rows() as i32,
    };
    // SAFETY: the buffers are of these sizes, and live until they are read below.
    unsafe { gather_scatter::launch_raw(stream.device(), stream.raw(), &params, gather_scatter::Copy::Gather) }
        .unwrap();

    let got = buffers.outcome();
    assert_eq!((case.check(&got), got.failed, *got.cu_selected.last().unwrap()), (0, -1, 9 + 6));
    let selected = got.indices[..15].iter().flat_map(|row| case.fresh.chunks(48).nth(*row as usize).unwrap());
    let zeros = std::iter::repeat_n(&bf16::ZERO, (case.rows() - 15) * 48);
    assert!(target.read().unwrap().iter().eq(selected.chain(zeros)));
    assert_nothing_reported();
}

fn wrong_buffers_are_named() {
    fn ints(stream: &Stream, len: usize) -> Option<Buffer<i32>> {
        Some(stream.zeros(len).unwrap())
    }
    fn table(stream: &Stream, lens: [usize; 2]) -> Option<[Buffer<i32>; 2]> {
        Some(lens.map(|len| stream.zeros(len).unwrap()))
    }
    let stream = stream();
    let case = Case::<f16>::new(&[5, 4], 16, 0.5);
    let wrong = |change: fn(&mut Buffers<f16>, &Stream), says: &str| {
        let mut buffers = Buffers::new(&stream, &case);
        change(&mut buffers, &stream);
        let error = buffers.launch(&stream, &case).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    wrong(|b, stream| b.fresh = stream.alloc(15).unwrap(), "fresh: expected 16 elements, found 15");
    wrong(|b, stream| b.cached = stream.alloc(15).unwrap(), "cached: expected 16 elements");
    wrong(|b, stream| b.cu_rows = stream.alloc(1).unwrap(), "cu_rows: expected 2 elements");
    wrong(|b, stream| b.indices = stream.alloc(8).unwrap(), "indices: expected 9 elements");
    wrong(|b, stream| b.cu_selected = stream.alloc(2).unwrap(), "cu_selected: expected 3 elements");
    wrong(|b, stream| b.similarity = stream.alloc(8).unwrap(), "similarity: expected 9 elements");
    wrong(|b, stream| b.failed = stream.alloc(0).unwrap(), "failed: expected 1 elements");
    wrong(|b, _| b.indices = common::stream().alloc(9).unwrap(), "indices: expected a buffer of the stream");
    wrong(|b, stream| b.workspace = vverify::workspace(stream, 8, 2).unwrap(), "workspace_bytes: expected at least 72");
    wrong(|b, stream| b.fresh_row = ints(stream, 0), "fresh_row: expected 1 elements, found 0");
    wrong(|b, stream| b.fresh_row = ints(stream, 10), "indices: expected 10 elements, found 9");
    wrong(|b, stream| b.cached_row = ints(stream, 8), "cached_row: expected 9 elements");
    wrong(|b, stream| b.first_selected = ints(stream, 1), "first_selected: expected 2 elements");
    wrong(|b, stream| b.tables[2] = table(stream, [8, 9]), "tables.values: expected 9 elements");
    wrong(|b, stream| b.tables[0] = table(stream, [9, 8]), "tables.selected: expected 9 elements");
    wrong(
        |b, stream| {
            b.first_selected = ints(stream, 2);
            b.tables[0] = table(stream, [9, 9]);
            b.indices = stream.alloc(10).unwrap();
        },
        "tables.selected: expected 10 elements",
    );
    let mut buffers = Buffers::new(&stream, &case);
    let error = buffers.launch(&stream, &Case { ratio: 1.01, ..case.clone() }).unwrap_err().to_string();
    assert!(error.contains("ratio: expected 0 to 1, found 1.01"), "{error}");
}
