//! Compares gather and scatter, launched by the shipped code, with the reference. Bytes are copied, so all must be equal.

use crate::common::{Float, Random, device, on_device, poison, same_bits, spread, stream};
use dllm_kernels::abi::{DLLM_INDEX_FAILED, DLLM_NONE_FAILED, dllm_gather_scatter_params};
use dllm_kernels::ops::gather_scatter::{self, Copy, GatherScatter};
use dllm_kernels::reference;
use half::{bf16, f16};

on_device! {
    copies_rows,
    copies_many_rows,
    counts_on_the_device,
    leaves_out_rows_out_of_range,
    leaves_them_out_without_a_failure_word,
    copies_elements_of_every_type,
    replays,
    wrong_sizes_are_errors,
}

struct Case {
    copy: Copy,
    row_bytes: usize,
    source_stride: usize,
    target_stride: usize,
    num_indexed_rows: usize,
    index: Vec<i32>,
    count: Option<i32>,
    /// Whether the launch has a failure word.
    reports: bool,
}

impl Case {
    /// Case with `rows` distinct indices below `num_indexed_rows`.
    fn new(random: &mut Random, copy: Copy, row_bytes: usize, rows: usize, num_indexed_rows: usize) -> Case {
        let index = random.distinct(rows, num_indexed_rows);
        let (source_stride, target_stride) = (row_bytes + 32, row_bytes + 16);
        Case { copy, row_bytes, source_stride, target_stride, num_indexed_rows, index, count: None, reports: true }
    }

    /// Launches on random bytes and compares all of the target and the failure word with the reference.
    fn check(&self, random: &mut Random) {
        let Case { copy, row_bytes, source_stride, target_stride, .. } = *self;
        let (source_rows, target_rows) = match copy {
            Copy::Gather => (self.num_indexed_rows, self.index.len()),
            Copy::Scatter => (self.index.len(), self.num_indexed_rows),
        };
        let source: Vec<u8> = (0..source_rows * row_bytes).map(|_| random.bits() as u8).collect();
        let mut want = vec![poison::<u8>(); target_rows * row_bytes];
        let counted = self.count.map_or(self.index.len(), |count| count.clamp(0, self.index.len() as i32) as usize);
        let index = &self.index[..counted];
        let in_range = match copy {
            Copy::Gather => reference::gather_scatter::gather(&source, row_bytes, index, &mut want),
            Copy::Scatter => reference::gather_scatter::scatter(&source, row_bytes, index, &mut want),
        };

        let stream = stream();
        let source = stream.upload(&spread(&source, row_bytes, source_stride)).unwrap();
        let target = stream.upload(&vec![poison::<u8>(); target_rows * target_stride]).unwrap();
        let index = stream.upload(&self.index).unwrap();
        let count = self.count.map(|count| stream.upload(&[count]).unwrap());
        let failed = stream.upload(&[DLLM_NONE_FAILED]).unwrap();
        let params = dllm_gather_scatter_params {
            size: size_of::<dllm_gather_scatter_params>() as u64,
            source: source.address(),
            target: target.address(),
            index: index.address(),
            count: count.as_ref().map_or(0, |count| count.address()),
            failed: if self.reports { failed.address() } else { 0 },
            source_stride_bytes: source_stride as i64,
            target_stride_bytes: target_stride as i64,
            row_bytes: row_bytes as i64,
            max_rows: self.index.len() as i32,
            num_indexed_rows: self.num_indexed_rows as i32,
        };
        // SAFETY: the buffers have the sizes of the struct, and live until the stream has been synchronised.
        unsafe { gather_scatter::launch_raw(stream.device(), stream.raw(), &params, copy) }.unwrap();
        let expected = if in_range || !self.reports { DLLM_NONE_FAILED } else { DLLM_INDEX_FAILED };
        assert_eq!(failed.read().unwrap(), [expected]);
        let same = target.read().unwrap() == spread(&want, row_bytes, target_stride);
        assert!(same, "{copy:?}, {} rows of {row_bytes} bytes, count {:?}", self.index.len(), self.count);
    }
}

const BOTH: [Copy; 2] = [Copy::Gather, Copy::Scatter];

/// Rows of one vector, of about one, four and five rounds of the block's 256 threads, and of the models.
fn copies_rows() {
    let random = &mut Random(1);
    for copy in BOTH {
        for row_bytes in [16, 48, 4096, 4112, 7168, 8192, 16384, 16400, 20480] {
            for (rows, indexed) in [(1, 1), (1, 9), (7, 7), (33, 40)] {
                Case::new(random, copy, row_bytes, rows, indexed).check(random);
            }
        }
    }
}

fn copies_many_rows() {
    let random = &mut Random(8);
    for copy in BOTH {
        Case::new(random, copy, 16, 1_100, 70_000).check(random);
    }
}

fn counts_on_the_device() {
    let random = &mut Random(2);
    for copy in BOTH {
        for count in [0, 1, 4, 5, 6, i32::MAX, -1, i32::MIN] {
            let case = Case::new(random, copy, 48, 5, 8);
            Case { count: Some(count), ..case }.check(random);
        }
    }
}

fn leaves_out_rows_out_of_range() {
    let random = &mut Random(3);
    for copy in BOTH {
        for wrong in [-1, 8, i32::MAX, i32::MIN] {
            for place in [0, 4] {
                let mut case = Case::new(random, copy, 48, 5, 8);
                case.index[place] = wrong;
                case.check(random);
                case.count = Some(4); // indices after the count are ignored
                case.check(random);
            }
        }
        let case = Case::new(random, copy, 48, 5, 8);
        Case { index: vec![-1; 5], ..case }.check(random);
    }
}

/// Rows out of range are skipped without a failure word too.
fn leaves_them_out_without_a_failure_word() {
    let random = &mut Random(6);
    for copy in BOTH {
        for index in [vec![-1, 3, -1, 0, 7], vec![6, i32::MIN, 1, 8, -1], vec![-1; 5]] {
            Case { index, reports: false, ..Case::new(random, copy, 4112, 5, 8) }.check(random);
        }
    }
}

/// The safe launch, with and without a failure word.
fn copies_elements_of_every_type() {
    fn check<T: Float>() {
        let (random, width, stream) = (&mut Random(4), 24, stream());
        let source: Vec<T> = random.floats(6 * width);
        let index = [5, 0, 7, 3];
        let mut want = vec![poison(); index.len() * width];
        reference::gather_scatter::gather(&source, width, &index, &mut want);
        let (source, index) = (stream.upload(&source).unwrap(), stream.upload(&index).unwrap());
        for with_failed in [false, true] {
            let mut target = stream.upload(&vec![poison::<T>(); 4 * width]).unwrap();
            let mut failed = stream.upload(&[DLLM_NONE_FAILED]).unwrap();
            let place = with_failed.then_some(&mut failed);
            let rows = GatherScatter {
                index: &index,
                count: None,
                width,
                source: &source,
                target: &mut target,
                failed: place,
            };
            gather_scatter::launch(&stream, rows, Copy::Gather).unwrap();
            same_bits("gathered", &target.read().unwrap(), &want);
            let expected = if with_failed { DLLM_INDEX_FAILED } else { DLLM_NONE_FAILED };
            assert_eq!(failed.read().unwrap(), [expected]);
        }
    }
    check::<bf16>();
    check::<f16>();
    check::<f32>();
}

/// Replays of one captured graph use the count and indices that are on the device then.
fn replays() {
    device().preload().unwrap();
    let (random, width, stream) = (&mut Random(5), 8, stream());
    let values: Vec<f32> = random.floats(10 * width);
    let source = stream.upload(&values).unwrap();
    let mut target = stream.zeros::<f32>(4 * width).unwrap();
    let mut index = stream.upload(&[0, 0, 0, 0]).unwrap();
    let mut count = stream.upload(&[4]).unwrap();
    let mut failed = stream.upload(&[DLLM_NONE_FAILED]).unwrap();
    let graph = stream.capture(|| {
        let (count, failed) = (Some(&count), Some(&mut failed));
        gather_scatter::launch(
            &stream,
            GatherScatter { index: &index, count, width, source: &source, target: &mut target, failed },
            Copy::Gather,
        )
    });
    let graph = graph.unwrap();
    for (rows, indices) in [(3, [1, 9, 4, -1]), (4, [0, 1, 2, 3]), (1, [7, -1, -1, -1])] {
        index.write(&indices).unwrap();
        count.write(&[rows]).unwrap();
        let mut want = vec![poison(); 4 * width];
        assert!(reference::gather_scatter::gather(&values, width, &indices[..rows as usize], &mut want));
        for _ in 0..2 {
            target.write(&vec![poison(); 4 * width]).unwrap();
            // SAFETY: the buffers are alive and belong to this stream.
            unsafe { graph.launch() }.unwrap();
            same_bits("replayed", &target.read().unwrap(), &want);
        }
    }
    assert_eq!(failed.read().unwrap(), [DLLM_NONE_FAILED]);
}

fn wrong_sizes_are_errors() {
    let (stream, other) = (stream(), stream());
    let index = stream.zeros::<i32>(4).unwrap();
    let none = stream.zeros::<i32>(0).unwrap();
    let source = stream.zeros::<f32>(10 * 8).unwrap();
    let mut target = stream.zeros::<f32>(4 * 8).unwrap();
    macro_rules! refused {
        ($says:literal, $($field:ident: $value:expr),+) => {{
            let fits = GatherScatter { index: &index, count: None, width: 8, source: &source, target: &mut target, failed: None };
            let error = gather_scatter::launch(&stream, GatherScatter { $($field: $value,)+ ..fits }, Copy::Gather).unwrap_err().to_string();
            assert!(error.contains($says), "{error}");
        }};
    }
    refused!("target: expected 32 elements, found 31", target: &mut stream.zeros(4 * 8 - 1).unwrap());
    refused!("target: expected a buffer of the stream", target: &mut other.zeros(4 * 8).unwrap());
    refused!("width: expected 1 to", width: 0);
    refused!("width: expected 1 to", width: usize::MAX / 2);
    refused!("row_bytes: expected a multiple of 16", width: 6);
    refused!("max_rows: expected 1 to", index: &none);
    refused!("num_indexed_rows: expected 1 to", source: &stream.zeros(7).unwrap());
    refused!("count: expected 1 elements, found 0", count: Some(&none));
}
