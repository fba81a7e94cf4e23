//! Compares the embedding kernel, launched by the shipped code, with the reference. Bytes are copied, so all must be equal.

use crate::common::{Float, Random, device, on_device, poison, same_bits, spread, stream};
use dllm_kernels::abi::{DLLM_INDEX_FAILED, DLLM_NONE_FAILED, dllm_embed_params};
use dllm_kernels::ops::embed::{self, Embed};
use dllm_kernels::reference;
use half::{bf16, f16};

on_device! {
    embeds_rows,
    embeds_many_rows,
    counts_on_the_device,
    leaves_out_rows_out_of_range,
    embeds_every_token_of_every_type,
    replays,
    wrong_sizes_are_errors,
}

struct Case {
    row_bytes: usize,
    vocab_size: usize,
    tokens: Vec<i32>,
    index: Vec<i32>,
    count: Option<i32>,
}

impl Case {
    fn new(random: &mut Random, row_bytes: usize, rows: usize) -> Case {
        let vocab_size = 19;
        let tokens = (0..rows + 3).map(|_| random.below(vocab_size) as i32).collect();
        Case { row_bytes, vocab_size, tokens, index: random.distinct(rows, rows + 3), count: None }
    }

    /// Launches on random bytes and compares all of `out` and the failure word with the reference.
    fn check(&self, random: &mut Random) {
        let Case { row_bytes, vocab_size, tokens, index, .. } = self;
        let (row_bytes, rows) = (*row_bytes, index.len());
        let (table_stride, out_stride) = (row_bytes + 32, row_bytes + 16);
        let table: Vec<u8> = (0..vocab_size * row_bytes).map(|_| random.bits() as u8).collect();
        let mut want = vec![poison::<u8>(); rows * row_bytes];
        let counted = self.count.map_or(rows, |count| count.clamp(0, rows as i32) as usize);
        let in_range = reference::embed::embed(&table, row_bytes, tokens, &index[..counted], &mut want);

        let stream = stream();
        let table = stream.upload(&spread(&table, row_bytes, table_stride)).unwrap();
        let out = stream.upload(&vec![poison::<u8>(); rows * out_stride]).unwrap();
        let (tokens, index) = (stream.upload(tokens).unwrap(), stream.upload(index).unwrap());
        let count = self.count.map(|count| stream.upload(&[count]).unwrap());
        let failed = stream.upload(&[DLLM_NONE_FAILED]).unwrap();
        let params = dllm_embed_params {
            size: size_of::<dllm_embed_params>() as u64,
            table: table.address(),
            tokens: tokens.address(),
            index: index.address(),
            out: out.address(),
            count: count.as_ref().map_or(0, |count| count.address()),
            failed: failed.address(),
            table_stride_bytes: table_stride as i64,
            out_stride_bytes: out_stride as i64,
            row_bytes: row_bytes as i64,
            max_rows: rows as i32,
            num_tokens: tokens.len() as i32,
            vocab_size: *vocab_size as i32,
            reserved: 0,
        };
        // SAFETY: the buffers have the sizes of the struct, and live until the stream has been synchronised.
        unsafe { embed::launch_raw(stream.device(), stream.raw(), &params) }.unwrap();
        let expected = if in_range { DLLM_NONE_FAILED } else { DLLM_INDEX_FAILED };
        assert_eq!(failed.read().unwrap(), [expected]);
        let same = out.read().unwrap() == spread(&want, row_bytes, out_stride);
        assert!(same, "{rows} rows of {row_bytes} bytes, count {:?}", self.count);
    }
}

/// Rows of one vector, of about one round of the block's 256 threads, and of the models.
fn embeds_rows() {
    let random = &mut Random(1);
    for row_bytes in [16, 48, 4096, 4112, 7168, 8192, 16384] {
        for rows in [1, 7, 33] {
            Case::new(random, row_bytes, rows).check(random);
        }
    }
}

fn embeds_many_rows() {
    let random = &mut Random(6);
    // More tokens than 16 bits hold.
    let vocab_size = 70_000;
    let mut case = Case { vocab_size, ..Case::new(random, 32, 1_100) };
    case.tokens.iter_mut().for_each(|token| *token = (vocab_size - 1 - random.below(4_500)) as i32);
    case.check(random);
}

fn counts_on_the_device() {
    let random = &mut Random(2);
    for count in [0, 1, 4, 5, 6, i32::MAX, -1, i32::MIN] {
        let case = Case::new(random, 48, 5);
        Case { count: Some(count), ..case }.check(random);
    }
}

fn leaves_out_rows_out_of_range() {
    let random = &mut Random(3);
    for place in [0, 4] {
        for wrong in [-1, 8, i32::MAX, i32::MIN] {
            let mut case = Case::new(random, 48, 5);
            case.index[place] = wrong;
            case.check(random);
            case.count = Some(4); // indices after the count are ignored
            case.check(random);
        }
        for wrong in [-1, 19, i32::MAX, i32::MIN] {
            let mut case = Case::new(random, 48, 5);
            case.tokens[case.index[place] as usize] = wrong;
            case.check(random);
        }
    }
}

/// The safe launch without an index list, with and without a failure word.
fn embeds_every_token_of_every_type() {
    fn check<T: Float>() {
        let (random, width, stream) = (&mut Random(4), 24, stream());
        let table: Vec<T> = random.floats(6 * width);
        let tokens = [5, 0, 6, 5];
        let mut want = vec![poison(); tokens.len() * width];
        reference::embed::embed(&table, width, &tokens, &[0, 1, 2, 3], &mut want);
        let (table, tokens) = (stream.upload(&table).unwrap(), stream.upload(&tokens).unwrap());
        for with_failed in [false, true] {
            let mut out = stream.upload(&vec![poison::<T>(); 4 * width]).unwrap();
            let mut failed = stream.upload(&[DLLM_NONE_FAILED]).unwrap();
            let place = with_failed.then_some(&mut failed);
            let (index, count) = (None, None);
            let rows = Embed { table: &table, width, tokens: &tokens, index, count, out: &mut out, failed: place };
            embed::launch(&stream, rows).unwrap();
            same_bits("embedded", &out.read().unwrap(), &want);
            let expected = if with_failed { DLLM_INDEX_FAILED } else { DLLM_NONE_FAILED };
            assert_eq!(failed.read().unwrap(), [expected]);
        }
    }
    check::<bf16>();
    check::<f16>();
    check::<f32>();
}

/// Replays of one captured graph use the count, indices and tokens that are on the device then.
fn replays() {
    device().preload().unwrap();
    let (random, width, stream) = (&mut Random(5), 8, stream());
    let values: Vec<f32> = random.floats(10 * width);
    let table = stream.upload(&values).unwrap();
    let mut out = stream.zeros::<f32>(3 * width).unwrap();
    let mut tokens = stream.upload(&[0, 0, 0, 0]).unwrap();
    let mut index = stream.upload(&[0, 0, 0]).unwrap();
    let mut count = stream.upload(&[3]).unwrap();
    let mut failed = stream.upload(&[DLLM_NONE_FAILED]).unwrap();
    let graph = stream.capture(|| {
        let (index, count, failed) = (Some(&index), Some(&count), Some(&mut failed));
        embed::launch(&stream, Embed { table: &table, width, tokens: &tokens, index, count, out: &mut out, failed })
    });
    let graph = graph.unwrap();
    for (rows, indices, ids) in [(3, [3, 0, 1], [9, 8, -1, 7]), (2, [2, 2, -1], [9, 8, 4, 7]), (0, [-1; 3], [-1; 4])] {
        index.write(&indices).unwrap();
        tokens.write(&ids).unwrap();
        count.write(&[rows]).unwrap();
        let mut want = vec![poison(); 3 * width];
        assert!(reference::embed::embed(&values, width, &ids, &indices[..rows as usize], &mut want));
        for _ in 0..2 {
            out.write(&vec![poison(); 3 * width]).unwrap();
            // SAFETY: the buffers are alive and belong to this stream.
            unsafe { graph.launch() }.unwrap();
            same_bits("replayed", &out.read().unwrap(), &want);
        }
    }
    assert_eq!(failed.read().unwrap(), [DLLM_NONE_FAILED]);
}

fn wrong_sizes_are_errors() {
    let (stream, other) = (stream(), stream());
    let tokens = stream.zeros::<i32>(4).unwrap();
    let none = stream.zeros::<i32>(0).unwrap();
    let table = stream.zeros::<f32>(10 * 8).unwrap();
    let mut out = stream.zeros::<f32>(4 * 8).unwrap();
    macro_rules! refused {
        ($says:literal, $($field:ident: $value:expr),+) => {{
            let fits = Embed { table: &table, width: 8, tokens: &tokens, index: None, count: None, out: &mut out, failed: None };
            let error = embed::launch(&stream, Embed { $($field: $value,)+ ..fits }).unwrap_err().to_string();
            assert!(error.contains($says), "{error}");
        }};
    }
    refused!("out: expected 32 elements, found 31", out: &mut stream.zeros(4 * 8 - 1).unwrap());
    refused!("out: expected a buffer of the stream", out: &mut other.zeros(4 * 8).unwrap());
    refused!("width: expected 1 to", width: 0);
    refused!("row_bytes: expected a multiple of 16", width: 6);
    refused!("tokens: expected 1 elements, found 0", tokens: &none);
    refused!("index: expected 1 elements, found 0", index: Some(&none));
    refused!("count: expected 1 elements, found 0", count: Some(&none));
    refused!("table: expected 8 elements, found 7", table: &stream.zeros(7).unwrap());
}
