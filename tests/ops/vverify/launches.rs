//! The safe launch, workspaces, graphs, and invalid device data.

use super::case::{Case, Outcome, UNTOUCHED};
use super::maps::within_a_table;
use crate::common::{Float, Random, assert_nothing_reported, on_device, stream};
use dllm_kernels::abi::dllm_gather_scatter_params;
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::{Workspace, gather_scatter, vverify};
use half::{bf16, f16};

on_device! {
    invalid_cu_rows,
    one_workspace_for_launches_of_any_shape,
    a_captured_launch_follows_the_device,
    a_captured_launch_follows_its_maps,
    gather_takes_the_selected_rows,
    wrong_buffers_are_named,
}

/// Whatever `cu_rows` contains, the kernel accesses its own memory only and leaves the workspace ready. Each end is clamped
/// to be at least the one before it, and at most the number of rows.
fn invalid_cu_rows() {
    let stream = stream();
    let valid = Case::<bf16>::new(&[10, 10, 10], 24, 0.5);
    let mut workspace = stream.zeros(8 * 30).unwrap();
    for (cu_rows, clamped) in [
        ([0, 10, 20, 1000], [0, 10, 20, 30]),
        ([0, i32::MAX, i32::MIN, i32::MAX], [0, 30, 30, 30]),
        ([0, 20, 5, 25], [0, 20, 20, 25]),
        ([9, 4, -3, 8], [0, 4, 4, 8]),
        ([-5, -4, -3, -2], [0, 0, 0, 0]),
        ([1, 1, 1, 1], [0, 1, 1, 1]),
    ] {
        let invalid = Case { cu_rows: cu_rows.to_vec(), ..valid.clone() };
        let expected = Case { cu_rows: clamped.to_vec(), ..valid.clone() };
        assert_eq!(expected.check(&invalid.run_in(&stream, &mut workspace)), 0, "{cu_rows:?}");
        assert_eq!(valid.check(&valid.run_in(&stream, &mut workspace)), 0, "after {cu_rows:?}");
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

/// Buffers of a safe launch of a case.
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

/// One graph, while rows, cached rows and the lengths of the sequences change on the device.
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
        // SAFETY: the buffers live, and no other stream uses them.
        unsafe { graph.launch() }.unwrap();
        assert_eq!(case.check(&buffers.outcome()), 0, "{cu_rows:?}");
    }
    assert_nothing_reported();
}

/// One graph, while maps, tables and the starts of the lists change on the device.
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
    // SAFETY: the buffers live, and no other stream uses them.
    unsafe { graph.launch() }.unwrap();
    assert_eq!(case.check(&buffers.outcome()), 0);
    assert_nothing_reported();
}

/// gather reads the list and the count that vverify wrote, without the host.
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
    wrong(|b, _| b.indices = crate::common::stream().alloc(9).unwrap(), "indices: expected a buffer of the stream");
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
