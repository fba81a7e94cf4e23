//! Attention launches whose inputs are valid for the host but unusual: invalid values in device memory, NaN and infinity, shared
//! buffers, graph replays.

use super::*;
use crate::common::assert_nothing_reported;
use dllm_kernels::abi::{self, dllm_attention_params, dllm_segment};

on_device!(
    out_of_range_device_values,
    more_rows_than_max_sequence_rows,
    absent_segments,
    a_graph_follows_the_device,
    unvisited_keys_have_no_effect,
    nan_propagates,
    nan_propagates_with_zero_weight,
    in_place_from_a_projection,
    batch_invariance,
    any_contents_of_the_workspace,
    without_lse,
    any_scale,
    groups_of_heads_over_several_query_tiles,
    wrong_buffers_are_errors,
);

const THREE: Heads = Heads { num_heads: 3, num_kv_heads: 3, head_dim: 32 };

/// Case of three sequences, each with a tile list.
fn three_sequences<T: Float>(heads: Heads, splits: usize) -> Case<T> {
    let listed = |rows, keys, tiles: &[i32]| Sequence { rows, keys, tiles: vec![tiles.to_vec()] };
    let sequences =
        vec![listed(5, [70, 5, 30], &[0, 1]), listed(4, [3, 4, 200], &[3, 0, 2]), listed(6, [90, 6, 0], &[1, 0])];
    Case { sparse: true, ..Case::new(&mut Random(21), heads, sequences, splits) }
}

/// Bits of the results of one sequence.
fn rows_of<T>(case: &Case<T>, got: &Got, sequence: usize) -> Vec<u32> {
    let first: usize = case.sequences[..sequence].iter().map(|s| s.rows).sum();
    let bits = |x: &[f32], width: usize| -> Vec<u32> {
        let end = first + case.sequences[sequence].rows;
        x[first * width..end * width].iter().map(|x| x.to_bits()).collect()
    };
    [bits(&got.out, case.heads.num_heads * case.heads.head_dim), bits(&got.lse, case.heads.num_heads)].concat()
}

/// Replaces row counts, starts, lengths and tile lists on the device by out-of-range values. The CUDA emulator reports any access
/// outside the buffers. Sequences whose values are unchanged keep the bits of a valid launch.
fn out_of_range_device_values() {
    const VALUES: [i32; 6] = [i32::MIN, -1_000_000_000, -1, 1, 1 << 30, i32::MAX];
    for (splits, sparse) in [(1, true), (3, false)] {
        let case = Case { sparse, ..three_sequences::<bf16>(THREE, splits) };
        let valid = run(&case);
        let stream = stream();
        let mut launched = OnDevice::new(&stream, &case);
        let mut launch_with = |array: usize, places: &[usize], value: i32, unchanged: &[usize]| {
            let [offsets, indices] = case.lists();
            let starts_and_lens = [0, 1, 2].map(|i| case.starts_and_lens(i)).concat();
            let mut arrays = [vec![case.cu_rows(), offsets, indices], starts_and_lens].concat();
            places.iter().for_each(|place| arrays[array][*place] = value);
            launched.cu_rows.write(&arrays[0]).unwrap();
            if let Some((offsets, indices)) = &mut launched.tiles {
                offsets.write(&arrays[1]).unwrap();
                indices.write(&arrays[2]).unwrap();
            }
            for (i, (_, _, start, len)) in launched.segments.iter_mut().enumerate() {
                start.write(&arrays[3 + 2 * i]).unwrap();
                len.write(&arrays[4 + 2 * i]).unwrap();
            }
            launched.launch(&stream, &case).unwrap();
            let got = launched.read();
            assert_nothing_reported();
            for sequence in unchanged {
                let name = format!("array {array} at {places:?}: {value}, sequence {sequence}");
                assert_eq!(rows_of(&case, &got, *sequence), rows_of(&case, &valid, *sequence), "{name}");
            }
        };
        for value in VALUES {
            for bound in 0..4 {
                launch_with(0, &[bound], value, &[]);
            }
            for array in 3..9 {
                launch_with(array, &[1], value, &[0, 2]);
            }
            if sparse {
                launch_with(1, &[0], value, &[1, 2]);
                launch_with(1, &[1], value, &[2]);
                launch_with(1, &[3], value, &[0, 1]);
                launch_with(2, &[2, 3, 4], value, &[0, 2]);
            }
        }
    }
}

/// A sequence with more rows than `max_sequence_rows` does not change the results of the others.
fn more_rows_than_max_sequence_rows() {
    for splits in [1, 3] {
        let mut case = three_sequences::<bf16>(MHA, splits);
        case.sequences[1].rows = 150;
        case = Case { sparse: false, ..Case::new(&mut Random(22), MHA, case.sequences, splits) };
        let valid = run(&case);
        let stream = stream();
        let mut launched = OnDevice::new(&stream, &case);
        launched.launch_with(&stream, &case, |a| a.max_sequence_rows = 6).unwrap();
        let got = launched.read();
        for sequence in [0, 2] {
            assert_eq!(rows_of(&case, &got, sequence), rows_of(&case, &valid, sequence), "{splits} splits");
        }
    }
}

/// The fields of a segment without keys are ignored. Rows after the last sequence are not written.
fn absent_segments() {
    for splits in [1, 2] {
        let case = Case::<f16>::new(&mut Random(23), MHA, vec![dense(9, [0, 100, 0])], splits);
        let stream = stream();
        let mut launched = OnDevice::new(&stream, &case);
        let width = MHA.num_heads * MHA.head_dim;
        let rows = 12;
        launched.q = stream.upload(&[&case.q[..], &vec![poison(); 3 * case.q_stride]].concat()).unwrap();
        launched.out = stream.upload(&vec![poison(); rows * width]).unwrap();
        launched.lse = stream.upload(&vec![poison(); rows * MHA.num_heads]).unwrap();
        launched.workspace = stream.alloc(op::workspace_len(rows, MHA, splits)).unwrap();
        let (k, v, start, len) = &launched.segments[1];
        let absent = dllm_segment {
            v: 3,
            start: 5,
            len: 7,
            k_stride: -1,
            v_stride: i64::MAX,
            num_rows: 9,
            ..Default::default()
        };
        let live = dllm_segment {
            k: k.address(),
            v: v.address(),
            start: start.address(),
            len: len.address(),
            k_stride: case.kv_stride as i64,
            v_stride: case.kv_stride as i64,
            num_rows: 104,
            ..Default::default()
        };
        let params = dllm_attention_params {
            size: size_of::<dllm_attention_params>() as u64,
            q: launched.q.address() + 2 * case.first as u64,
            out: launched.out.address(),
            lse: launched.lse.address(),
            cu_rows: launched.cu_rows.address(),
            segments: [absent, live, absent],
            tile_offsets: 0,
            tile_indices: 0,
            workspace: launched.workspace.address(),
            workspace_bytes: 4 * launched.workspace.len() as u64,
            q_stride: case.q_stride as i64,
            out_stride: width as i64,
            scale: case.scale,
            max_rows: rows as i32,
            max_sequence_rows: 9,
            num_sequences: 1,
            num_heads: MHA.num_heads as i32,
            num_kv_heads: MHA.num_kv_heads as i32,
            head_dim: MHA.head_dim as i32,
            dtype: abi::DLLM_F16 as i32,
            max_splits: splits as i32,
            query_tiles: 0,
            per_head: 0,
            num_tile_indices: 0,
            form: abi::DLLM_ATTENTION_FORM_PLANNED as i32,
            reserved: 0,
        };
        // SAFETY: addresses and sizes are those of the buffers above, which outlive the read below.
        unsafe { op::launch_raw(stream.device(), stream.raw(), &params) }.unwrap();
        let got = launched.read();
        check(&case, &got, "between absent segments");
        let untouched = |x: &f32| x.to_bits() == poison::<f32>().to_bits() || x.is_nan();
        assert!(got.out[9 * width..].iter().all(untouched) && got.lse[9 * MHA.num_heads..].iter().all(untouched));
    }
}

/// Replays of one captured graph use the rows, starts, lengths and tile lists that are on the device then, while the prefix grows.
fn a_graph_follows_the_device() {
    crate::common::device().preload().unwrap();
    let heads = Heads { num_heads: 4, num_kv_heads: 2, head_dim: 32 };
    let step = |prefix: usize, rows: usize, tiles: [&[i32]; 2]| -> Case<bf16> {
        let [a, b] = tiles.map(|t| vec![t.to_vec()]);
        let sequences = vec![
            Sequence { rows, keys: [prefix, rows, 200 - prefix], tiles: a },
            Sequence { rows: 20, keys: [5, 20, 2 * prefix], tiles: b },
        ];
        Case { sparse: true, ..Case::new(&mut Random(prefix as u64 + 1), heads, sequences, 3) }
    };
    let largest = step(200, 32, [&[0, 1, 2, 3], &[0, 1, 2, 3, 4, 5, 6]]);
    let mut room = Case { ..largest.clone() };
    for (k, v, _) in &mut room.segments {
        k.resize(460 * largest.kv_stride, poison());
        v.resize(460 * largest.kv_stride, poison());
    }
    let stream = stream();
    let mut launched = OnDevice::new(&stream, &room);
    let graph = stream.capture(|| launched.launch(&stream, &room)).unwrap();
    let steps = [
        step(1, 32, [&[3], &[0]]),
        step(64, 32, [&[0, 1, 2, 3], &[2, 1]]),
        step(65, 7, [&[], &[1, 2]]),
        step(199, 1, [&[2, 0], &[6, 0, 3]]),
        largest,
    ];
    for case in &steps {
        launched.cu_rows.write(&case.cu_rows()).unwrap();
        launched.q.write(&case.q).unwrap();
        for (i, (k, v, start, len)) in launched.segments.iter_mut().enumerate() {
            k.write(&case.segments[i].0).unwrap();
            v.write(&case.segments[i].1).unwrap();
            let [starts, lens] = case.starts_and_lens(i);
            start.write(&starts).unwrap();
            len.write(&lens).unwrap();
        }
        let (offsets, indices) = launched.tiles.as_mut().unwrap();
        let lists = case.lists();
        offsets.write(&lists[0]).unwrap();
        indices.write(&lists[1]).unwrap();
        // SAFETY: the buffers are still there, and of this stream.
        unsafe { graph.launch() }.unwrap();
        let got = launched.read();
        check(case, &got, &format!("replayed with {:?}", case.sequences[0]));
        // The same bits as a separate launch.
        let separate = run(case);
        for sequence in 0..2 {
            assert_eq!(rows_of(case, &got, sequence), rows_of(case, &separate, sequence));
        }
    }
}

/// Keys that a sequence does not visit have no effect: rows of no sequence, rows after the end in the last tile, unlisted tiles, other
/// sequences.
fn unvisited_keys_have_no_effect() {
    for splits in [1, 3] {
        for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f16::LARGEST] {
            let mut case = three_sequences::<f16>(MHA, splits);
            for (segment, (k, v, starts)) in case.segments.iter_mut().enumerate() {
                k.iter_mut().chain(v.iter_mut()).filter(|x| x.f32().is_nan()).for_each(|x| *x = f16::of(bad));
                for (s, sequence) in case.sequences.iter().enumerate() {
                    let before: usize = sequence.keys[..segment].iter().sum();
                    for key in 0..sequence.keys[segment] {
                        if s == 1 || !sequence.tiles[0].contains(&(((before + key) / KEY_TILE) as i32)) {
                            let row = (starts[s] + key) * case.kv_stride;
                            k[row..row + case.kv_stride].fill(f16::of(bad));
                            v[row..row + case.kv_stride].fill(f16::of(bad));
                        }
                    }
                }
            }
            let got = run(&case);
            let clean = run(&three_sequences::<f16>(MHA, splits));
            for sequence in [0, 2] {
                assert_eq!(rows_of(&case, &got, sequence), rows_of(&case, &clean, sequence), "{bad}, {splits} splits");
            }
        }
    }
}

/// NaN in a value makes its output column NaN; NaN in a key makes all outputs of its head NaN. With any number of splits.
fn nan_propagates() {
    for splits in [1, 2, 5] {
        let clean = Case::<bf16>::new(&mut Random(24), MHA, vec![dense(3, [100, 3, 90])], splits);
        let before = run(&clean);
        let place = |case: &Case<bf16>| (case.segments[0].2[0] + 70) * case.kv_stride;
        let (mut value, mut key) = (clean.clone(), clean.clone());
        value.segments[0].1[place(&clean) + 5] = bf16::NAN;
        key.segments[0].0[place(&clean) + MHA.head_dim + 5] = bf16::NAN; // of the second head
        let got = run(&value);
        for (i, (got, clean)) in got.out.iter().zip(&before.out).enumerate() {
            let in_column = i % (2 * MHA.head_dim) == 5;
            assert!(if in_column { got.is_nan() } else { got == clean }, "{splits} splits: element {i}: {got}");
        }
        assert_eq!(got.lse, before.lse);
        let got = run(&key);
        for (i, (got, clean)) in got.out.iter().zip(&before.out).enumerate() {
            let of_head = i / MHA.head_dim % 2 == 1;
            assert!(if of_head { got.is_nan() } else { got == clean }, "{splits} splits: element {i}: {got}");
        }
        for (i, (got, clean)) in got.lse.iter().zip(&before.lse).enumerate() {
            assert!(if i % 2 == 1 { got.is_nan() } else { got == clean }, "{splits} splits: lse {i}: {got}");
        }
    }
}

/// NaN propagates also from a value whose weight rounds to 0, alone or with its whole KV split.
fn nan_propagates_with_zero_weight() {
    for splits in [1, 4] {
        let case = Case::<bf16>::new(&mut Random(28), MHA, vec![dense(3, [250, 3, 0])], splits);
        let case = Case { scale: 50.0, ..case };
        for key in [5, 70, 130, 249] {
            let mut value = case.clone();
            let place = (case.segments[0].2[0] + key) * case.kv_stride;
            value.segments[0].1[place + 9] = bf16::NAN;
            for row in run(&value).out.chunks(2 * MHA.head_dim) {
                let propagates = row.iter().enumerate().all(|(column, x)| x.is_nan() == (column == 9));
                assert!(propagates, "{splits} splits, key {key}: {row:?}");
            }
        }
    }
}

/// Queries, keys and values that are column ranges of one buffer.
fn in_place_from_a_projection() {
    for (heads, splits) in [(MHA, 1), (Heads { num_heads: 14, num_kv_heads: 2, head_dim: 32 }, 4)] {
        let sequences = vec![dense(9, [70, 9, 3]), dense(20, [0, 20, 50])];
        let case = Case::<bf16>::new(&mut Random(25), heads, sequences, splits);
        let (width, kv_width) = (heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim);
        let stride = width + 2 * kv_width;
        let mut qkv = Vec::new();
        let (live_k, live_v, starts) = &case.segments[1];
        for (sequence, start) in case.sequences.iter().zip(starts) {
            for row in 0..sequence.rows {
                let q = qkv.len() / stride * case.q_stride + case.first;
                let kv = (start + row) * case.kv_stride;
                qkv.extend_from_slice(&case.q[q..q + width]);
                qkv.extend_from_slice(&live_k[kv..kv + kv_width]);
                qkv.extend_from_slice(&live_v[kv..kv + kv_width]);
            }
        }
        let stream = stream();
        let qkv = stream.upload(&qkv).unwrap();
        let mut launched = OnDevice::new(&stream, &case);
        launched.segments[1].2.write(&case.cu_rows()[..2]).unwrap();
        let columns = |first| Rows { buffer: &qkv, first, stride };
        let launch = launched.launch_with(&stream, &case, |a| {
            a.q = columns(0);
            let live = a.segments[1].as_mut().unwrap();
            (live.k, live.v) = (columns(width), columns(width + kv_width));
        });
        launch.unwrap();
        let got = launched.read();
        check(&case, &got, "in place");
        assert_eq!(bits(&got), bits(&run(&case)));
    }
}

/// A sequence has the same bits alone and in a batch. The longest sequence makes the plan choose the full form for the batch; the
/// others alone get the streaming form.
fn batch_invariance() {
    for splits in [1, 5] {
        let sequences = vec![dense(3, [10, 3, 200]), dense(32, [130, 32, 0]), dense(260, [0, 260, 7])];
        let batch = Case::<bf16>::new(&mut Random(26), MHA, sequences, splits);
        let together = run(&batch);
        let mut first = 0;
        for (s, sequence) in batch.sequences.iter().enumerate() {
            let mut alone = batch.clone();
            alone.sequences = vec![sequence.clone()];
            alone.q = batch.q[first * batch.q_stride..][..sequence.rows * batch.q_stride + batch.first].to_vec();
            alone.segments.iter_mut().for_each(|segment| segment.2 = vec![segment.2[s]]);
            assert_eq!(bits(&run(&alone)), rows_of(&batch, &together, s), "sequence {s}, {splits} splits");
            first += sequence.rows;
        }
    }
}

/// The workspace may hold anything before a launch: poison, infinities, the results of another launch.
fn any_contents_of_the_workspace() {
    let case = three_sequences::<bf16>(MHA, 7);
    let want = bits(&run(&case));
    let stream = stream();
    let mut launched = OnDevice::new(&stream, &case);
    for contents in [poison(), f32::INFINITY, f32::MAX, 0.0] {
        let len = launched.workspace.len();
        launched.workspace.write(&vec![contents; len]).unwrap();
        for _ in 0..2 {
            launched.launch(&stream, &case).unwrap();
            assert_eq!(bits(&launched.read()), want, "after {contents}");
        }
        let dense = Case { sparse: false, splits: 3, scale: 3.0, ..case.clone() };
        launched.launch(&stream, &dense).unwrap();
        launched.launch(&stream, &case).unwrap();
        assert_eq!(bits(&launched.read()), want, "after another launch");
    }
}

fn without_lse() {
    for splits in [1, 3] {
        let case = three_sequences::<bf16>(MHA, splits);
        let want = run(&case);
        let stream = stream();
        let mut launched = OnDevice::new(&stream, &case);
        launched.launch_with(&stream, &case, |a| a.lse = None).unwrap();
        assert_eq!(launched.read().out, want.out);
    }
}

/// Scales of zero, negative, subnormal and ordinary size, with a tile that does not exist before the others.
fn any_scale() {
    for splits in [1, 3] {
        let mut case = three_sequences::<f16>(MHA, splits);
        case.sequences.iter_mut().for_each(|s| s.tiles[0].insert(0, 1000));
        for scale in [0.0, -0.0, 1e-40, -0.125, -0.3, 1.0, 2.0, -1.0] {
            case.scale = scale;
            check(&case, &run(&case), &format!("scale {scale}, {splits} splits"));
            let dense = Case { sparse: false, ..case.clone() };
            check(&dense, &run(&dense), &format!("scale {scale}, {splits} splits, dense"));
        }
    }
}

/// Head groups that do not divide the query tile, over several query tiles.
fn groups_of_heads_over_several_query_tiles() {
    for (num_heads, num_kv_heads, per_head) in [(7, 1, false), (14, 2, true), (14, 1, false)] {
        let heads = Heads { num_heads, num_kv_heads, head_dim: 32 };
        let tiles = vec![vec![0], vec![1], vec![0, 1], vec![1, 0], vec![], vec![1]];
        let sequences = vec![Sequence { rows: 270, keys: [50, 0, 40], tiles }, dense(130, [3, 0, 100])];
        let case = Case::<bf16>::new(&mut Random(27), heads, sequences, 2);
        check(&case, &run(&case), "dense");
        let case = Case { sparse: true, per_head, ..case };
        check(&case, &run(&case), "with lists");
    }
}

fn wrong_buffers_are_errors() {
    let (stream, other) = (stream(), stream());
    let case = three_sequences::<bf16>(MHA, 2);
    let mut elsewhere = OnDevice::new(&other, &case);
    let (mut few_floats, mut few_rows) = (stream.zeros::<f32>(3).unwrap(), elsewhere.out.stream().zeros(4).unwrap());
    let (few, nothing) = (stream.zeros::<i32>(2).unwrap(), stream.zeros::<bf16>(0).unwrap());
    let OnDevice { q, cu_rows, segments, tiles, lse, workspace, .. } = &mut elsewhere;
    let (k, v, start, len) = &segments[0];
    let (offsets, indices) = tiles.as_ref().unwrap();
    macro_rules! refused {
        ($says:literal, $a:ident => $change:expr) => {{
            let mut launched = OnDevice::new(&stream, &case);
            let error = launched.launch_with(&stream, &case, |$a| $change).unwrap_err().to_string();
            assert!(error.contains($says), "{error}");
        }};
    }
    refused!("q: expected a buffer of the stream", a => a.q.buffer = q);
    refused!("cu_rows: expected a buffer of the stream", a => a.cu_rows = cu_rows);
    refused!("segment.k: expected a buffer of the stream", a => a.segments[0].as_mut().unwrap().k.buffer = k);
    refused!("segment.v: expected a buffer of the stream", a => a.segments[1].as_mut().unwrap().v.buffer = v);
    refused!("segment.start: expected a buffer of the stream", a => a.segments[1].as_mut().unwrap().start = Some(start));
    refused!("segment.len: expected a buffer of the stream", a => a.segments[2].as_mut().unwrap().len = len);
    refused!("tile_offsets: expected a buffer of the stream", a => a.tiles.as_mut().unwrap().offsets = offsets);
    refused!("tile_indices: expected a buffer of the stream", a => a.tiles.as_mut().unwrap().indices = indices);
    refused!("out: expected a buffer of the stream", a => a.out = &mut few_rows);
    refused!("lse: expected a buffer of the stream", a => a.lse = Some(lse));
    refused!("workspace: expected a buffer of the stream", a => a.workspace = workspace);
    refused!("q: expected 15 rows, as many as out, found 0", a => a.q = Rows { buffer: &nothing, first: 0, ..a.q });
    refused!("q: expected 15 rows, as many as out, found 14", a => a.q.first += case.q_stride - 16);
    refused!("q: expected an address aligned to 16 bytes", a => a.q.first = 1);
    refused!("q_stride: expected a multiple of 8", a => a.q.stride -= 4);
    refused!("stride: expected at least the width", a => a.q.stride = 64);
    refused!("segment.k: expected 1000000 elements", a => a.segments[0].as_mut().unwrap().k.first = 1_000_000);
    refused!("stride: expected at least the width", a => a.segments[0].as_mut().unwrap().v.stride = 0);
    refused!("segment.start: expected 3 elements, found 2", a => a.segments[0].as_mut().unwrap().start = Some(&few));
    refused!("segment.len: expected 3 elements, found 2", a => a.segments[0].as_mut().unwrap().len = &few);
    refused!("tile_offsets: expected 4 elements, found 2", a => a.tiles.as_mut().unwrap().offsets = &few);
    let more = stream.zeros::<i32>(5).unwrap();
    refused!("tile_offsets: expected 4 elements, found 5", a => a.tiles.as_mut().unwrap().offsets = &more);
    refused!("tile_offsets: expected 7 elements, found 4", a => a.tiles.as_mut().unwrap().per_head = true);
    refused!("lse: expected 30 elements, found 3", a => a.lse = Some(&mut few_floats));
    refused!("workspace: expected 3900 elements, found 3", a => a.workspace = &mut few_floats);
    refused!("max_splits: expected 1 to 64, found 0", a => a.max_splits = 0);
    refused!("workspace", a => a.max_splits = 65);
    refused!("workspace", a => a.max_splits = usize::MAX);
    refused!("scale", a => a.scale = f32::NAN);
    refused!("max_sequence_rows", a => { (a.tiles, a.max_sequence_rows) = (None, 0) });
    refused!("tile_offsets", a => a.max_sequence_rows = usize::MAX);
    refused!("num_kv_heads: expected 1 to", a => a.heads.num_kv_heads = 0);
    refused!("head_dim: expected 32, 64 or 128, found 16", a => {
        a.heads = Heads { num_heads: 8, num_kv_heads: 8, head_dim: 16 };
        (a.max_splits, a.lse) = (1, None);
    });
}
