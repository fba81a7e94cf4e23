//! A batch of a vverify test, and its launch.

use crate::common::{Float, Random, assert_nothing_reported, spread, stream};
use dllm_kernels::abi::dllm_vverify_params;
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::vverify;

/// Value of outputs before a launch.
pub const UNTOUCHED: i32 = -7;

#[derive(Clone)]
pub struct Case<T> {
    pub width: usize,
    pub ratio: f64,
    pub cu_rows: Vec<i32>,
    pub fresh: Vec<T>,
    pub cached: Vec<T>,
    pub fresh_row: Option<Vec<i32>>,
    pub cached_row: Option<Vec<i32>>,
    pub update_cached: bool,
    pub first_selected: Option<Vec<i32>>,
    /// Length of the lists; 0 means one element per row.
    pub num_listed: usize,
    pub tables: [Option<Vec<i32>>; 3],
    /// Elements of poison after each row of the fresh and of the cached matrix.
    pub pad: [usize; 2],
    /// Whether to request the cosines and `failed`.
    pub optional_outputs: bool,
}

/// Results of a launch.
#[derive(Debug)]
pub struct Outcome {
    pub indices: Vec<i32>,
    /// One list per table of the case.
    pub selected: Vec<Vec<i32>>,
    pub cu_selected: Vec<i32>,
    pub similarity: Vec<f32>,
    pub failed: i32,
    /// Bits of the cached rows.
    pub cached: Vec<u16>,
}

impl<T: Float> Case<T> {
    /// Makes sequences of the given lengths. Every fresh row is its cached row plus noise of a random amplitude.
    pub fn new(lengths: &[usize], width: usize, ratio: f64) -> Case<T> {
        let mut random = Random(width as u64);
        let mut cu_rows = vec![0];
        lengths.iter().for_each(|length| cu_rows.push(cu_rows.last().unwrap() + *length as i32));
        let rows = lengths.iter().sum::<usize>().max(1);
        let cached: Vec<f32> = (0..rows * width).map(|_| random.number()).collect();
        let changed = |row: &[f32]| {
            let amplitude = 0.05 + random.number().abs() * 1.5;
            row.iter().map(|x| T::of(x + amplitude * random.number())).collect::<Vec<_>>()
        };
        Case {
            width,
            ratio,
            cu_rows,
            fresh: cached.chunks(width).flat_map(changed).collect(),
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

    pub fn rows(&self) -> usize {
        self.fresh_row.as_ref().map_or(self.fresh.len() / self.width, Vec::len)
    }

    pub fn listed(&self) -> usize {
        if self.num_listed == 0 { self.rows() } else { self.num_listed }
    }

    pub fn set_fresh(&mut self, row: usize, x: impl Fn(usize) -> f32) {
        (0..self.width).for_each(|i| self.fresh[row * self.width + i] = T::of(x(i)));
    }

    pub fn set_cached(&mut self, row: usize, x: impl Fn(usize) -> f32) {
        (0..self.width).for_each(|i| self.cached[row * self.width + i] = T::of(x(i)));
    }

    /// Launches vverify with a workspace of exactly the required size.
    pub fn run(&self) -> Outcome {
        let stream = stream();
        let mut workspace = stream.zeros(8 * self.rows().max(self.cu_rows.len() - 1)).unwrap();
        self.run_in(&stream, &mut workspace)
    }

    pub fn run_in(&self, stream: &Stream, workspace: &mut Buffer<u8>) -> Outcome {
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
        assert!(counters.iter().all(|byte| *byte == 0), "a counter of the workspace is not 0");
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

    /// Launches vverify and compares the results, for cosines that differ clearly.
    #[track_caller]
    pub fn agrees(&self) {
        assert_eq!(self.check(&self.run()), 0, "sequences with rows near the boundary");
    }
}
