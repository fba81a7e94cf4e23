use super::*;

/// 2 sequences of 32 rows, 28 heads over 4, in one split.
fn params() -> dllm_attention_params {
    let segment = dllm_segment {
        k: 0x10_0000,
        v: 0x20_0000,
        start: 0,
        len: 0x3000,
        k_stride: 512,
        v_stride: 520,
        num_rows: 100,
        ..dllm_segment::default()
    };
    dllm_attention_params {
        size: size_of::<dllm_attention_params>() as u64,
        q: 0x100_0000,
        out: 0x200_0000,
        lse: 0x300_0000,
        cu_rows: 0x2000,
        segments: [dllm_segment::default(), segment, dllm_segment::default()],
        tile_offsets: 0,
        tile_indices: 0,
        workspace: 0x400_0000,
        workspace_bytes: 1 << 30,
        q_stride: 3584,
        out_stride: 3584,
        scale: 0.125,
        max_rows: 64,
        max_sequence_rows: 32,
        num_sequences: 2,
        num_heads: 28,
        num_kv_heads: 4,
        head_dim: 128,
        dtype: abi::DLLM_BF16 as i32,
        max_splits: 1,
        query_tiles: 0,
        per_head: 0,
        num_tile_indices: 0,
        form: abi::DLLM_ATTENTION_FORM_PLANNED as i32,
        reserved: 0,
    }
}

#[test]
fn plans() {
    // 224 packed rows: seven blocks of 32.
    let plan_of = |change: fn(&mut dllm_attention_params)| {
        let mut params = params();
        change(&mut params);
        validate(&params).unwrap();
        plan(&params)
    };
    let one = Plan {
        kernel: "attention_bf16_128_w2",
        grid: [7, 4, 2],
        block: 64,
        shared_bytes: 65_536,
        workspace_bytes: 0,
        combine: None,
    };
    assert_eq!(plan_of(|_| {}), one);
    let partial = 5 * 64 * 28;
    let combine = Some(("attention_combine_bf16", 64 * 28 / 8));
    let five = Plan { grid: [7, 4, 10], workspace_bytes: 4 * (partial + 128 * partial), combine, ..one };
    assert_eq!(plan_of(|p| p.max_splits = 5), five);
    let long = Plan { kernel: "attention_bf16_128_w8", grid: [3, 4, 2], block: 256, ..one };
    assert_eq!(plan_of(|p| p.max_sequence_rows = 37), long, "259 packed rows: three blocks of 128");
    let full = Plan { kernel: "attention_bf16_128_w8", grid: [2, 4, 2], block: 256, ..one };
    assert_eq!(plan_of(|p| p.form = abi::DLLM_ATTENTION_FORM_FULL as i32), full, "forced");
    let streaming = |p: &mut dllm_attention_params| {
        (p.form, p.max_sequence_rows) = (abi::DLLM_ATTENTION_FORM_STREAMING as i32, 37);
    };
    assert_eq!(plan_of(streaming), Plan { grid: [9, 4, 2], ..one }, "forced: nine blocks of 32");
    let narrow = |p: &mut dllm_attention_params| {
        (p.dtype, p.head_dim, p.max_splits, p.max_rows) = (abi::DLLM_F16 as i32, 32, 3, 1);
        (p.num_heads, p.num_kv_heads) = (3, 3);
    };
    let narrow_plan = Plan {
        kernel: "attention_f16_32_w2",
        grid: [1, 3, 6],
        shared_bytes: 16_384,
        workspace_bytes: 4 * (12 + 9 * 32), // 9 log-sum-exps, rounded up to 12
        combine: Some(("attention_combine_f16", 1)),
        ..one
    };
    assert_eq!(plan_of(narrow), narrow_plan);
}

#[test]
fn the_workspace_of_a_safe_launch_is_the_planned() {
    for (max_rows, num_heads, head_dim, max_splits) in [(1, 1, 32, 1), (1, 3, 32, 3), (64, 28, 128, 64)] {
        let heads = Heads { num_heads: num_heads as usize, num_kv_heads: 1, head_dim: head_dim as usize };
        let params = dllm_attention_params { max_rows, num_heads, head_dim, max_splits, num_kv_heads: 1, ..params() };
        let len = workspace_len(max_rows as usize, heads, max_splits as usize);
        assert_eq!(4 * len as u64, plan(&params).workspace_bytes);
    }
    let heads = Heads { num_heads: usize::MAX, num_kv_heads: 1, head_dim: 128 };
    assert_eq!(workspace_len(9, heads, 2), usize::MAX);
}

#[test]
fn splits_follow_the_shape_of_a_sequence() {
    let splits_of = |rows, num_heads, num_kv_heads, head_dim, multiprocessors| {
        splits(rows, Heads { num_heads, num_kv_heads, head_dim }, multiprocessors)
    };
    assert_eq!(splits_of(32, 32, 32, 128, 132), 13, "LLaDA-8B: 32 blocks, 396 wanted");
    assert_eq!(splits_of(32, 28, 4, 128, 132), 15, "Dream-7B: 7 x 4 blocks");
    assert_eq!(splits_of(32, 32, 32, 64, 132), 25, "792 wanted");
    assert_eq!(splits_of(32, 32, 32, 32, 132), 42, "1,320 wanted");
    assert_eq!(splits_of(256, 8, 8, 128, 132), 7);
    assert_eq!(splits_of(257, 8, 8, 128, 132), 1, "many rows");
    assert_eq!(splits_of(37, 28, 4, 128, 132), 1, "many packed rows");
    assert_eq!(splits_of(1, 1, 1, 128, 132), 64, "no more than 64");
    assert_eq!(splits_of(32, 512, 512, 128, 132), 1);
    for odd in [0, 1, usize::MAX] {
        for (heads, kv_heads) in [(0, 0), (1, 0), (0, 1), (usize::MAX, 1), (usize::MAX, usize::MAX)] {
            assert!((1..=64).contains(&splits_of(odd, heads, kv_heads, odd, odd)));
        }
    }
}

#[test]
fn wrong_fields_are_named() {
    let wrong = |change: fn(&mut dllm_attention_params), says: &str| {
        let mut params = params();
        change(&mut params);
        let error = validate(&params).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    wrong(|p| p.size = 0, "size: expected 336");
    wrong(|p| p.q = 0, "q: expected a device address");
    wrong(|p| p.q += 8, "q: expected an address aligned to 16");
    wrong(|p| p.out = 0, "out: expected a device address");
    wrong(|p| p.out += 2, "out: expected an address aligned to 16");
    wrong(|p| p.lse += 2, "lse: expected an address aligned to 4");
    wrong(|p| p.cu_rows = 0, "cu_rows: expected a device address");
    wrong(|p| p.cu_rows += 1, "cu_rows: expected an address aligned to 4");
    wrong(|p| p.dtype = 2, "dtype: expected bf16 (0) or f16 (1), found 2");
    wrong(|p| p.head_dim = 96, "head_dim: expected 32, 64 or 128, found 96");
    wrong(|p| p.num_heads = 0, "num_heads: expected 1 to 65535, found 0");
    wrong(|p| p.num_heads = 65_536, "num_heads: expected 1 to 65535");
    wrong(|p| p.num_kv_heads = 0, "num_kv_heads: expected 1 to 28");
    wrong(|p| p.num_kv_heads = 29, "num_kv_heads: expected 1 to 28");
    wrong(|p| p.num_kv_heads = 3, "num_heads: expected a multiple of num_kv_heads, 3, found 28");
    wrong(|p| p.q_stride = 3576, "q_stride: expected a multiple of 8 elements (16 bytes), at least the width, 3584");
    wrong(|p| p.out_stride = -3584, "out_stride");
    wrong(|p| p.out_stride += 4, "out_stride");
    wrong(|p| p.segments[1].k += 4, "segment.k: expected an address aligned to 16");
    wrong(|p| p.segments[1].v = 0, "segment.v: expected a device address");
    wrong(|p| p.segments[1].start = 3, "segment.start: expected an address aligned to 4");
    wrong(|p| p.segments[1].len = 0, "segment.len: expected a device address");
    wrong(|p| p.segments[1].k_stride = 504, "segment.k_stride");
    wrong(|p| p.segments[1].v_stride = 516, "segment.v_stride");
    wrong(|p| p.segments[1].num_rows = -1, "segment.num_rows");
    wrong(|p| p.segments[1].reserved0 = 1, "reserved");
    wrong(|p| p.segments[1].reserved1 = 1, "reserved");
    wrong(|p| p.scale = f32::NAN, "scale: expected a number from -1e6 to 1e6, found NaN");
    wrong(|p| p.scale = f32::INFINITY, "scale");
    wrong(|p| p.scale = -2e6, "scale");
    wrong(|p| p.max_rows = 0, "max_rows: expected 1 to");
    wrong(|p| p.max_rows = i32::MAX / 28 + 1, "max_rows: expected 1 to");
    wrong(|p| p.max_sequence_rows = 0, "max_sequence_rows: expected 1 to");
    wrong(|p| p.max_sequence_rows = (1 << 30) / 28 + 1, "max_sequence_rows");
    wrong(|p| p.max_splits = 0, "max_splits: expected 1 to 64, found 0");
    wrong(|p| p.max_splits = 65, "max_splits: expected 1 to 64, found 65");
    wrong(|p| p.num_sequences = 0, "num_sequences: expected 1 to 65535");
    wrong(|p| (p.num_sequences, p.max_splits) = (1024, 64), "num_sequences: expected 1 to 1023");
    wrong(|p| p.tile_offsets = 2, "tile_offsets: expected an address aligned to 4");
    wrong(|p| p.tile_offsets = 4, "tile_indices: expected a device address");
    wrong(|p| (p.tile_offsets, p.tile_indices) = (4, 4), "query_tiles: expected 1 to");
    wrong(
        |p| (p.tile_offsets, p.tile_indices, p.query_tiles, p.per_head) = (4, 4, 1, 2),
        "per_head: expected 0 to 1, found 2",
    );
    wrong(
        |p| (p.tile_offsets, p.tile_indices, p.query_tiles, p.num_tile_indices) = (4, 4, 1, -1),
        "num_tile_indices: expected 0 to",
    );
    wrong(|p| p.form = 3, "form: expected 0 to 2, found 3");
    wrong(|p| p.form = -1, "form: expected 0 to 2, found -1");
    wrong(|p| p.reserved = 1, "reserved: expected 0, found 1");
    wrong(|p| (p.max_splits, p.workspace) = (2, 0), "workspace: expected a device address");
    wrong(|p| (p.max_splits, p.workspace) = (2, 8), "workspace: expected an address aligned to 16");
    wrong(|p| (p.max_splits, p.workspace_bytes) = (2, 4), "workspace_bytes: expected at least 1849344, found 4");
}

#[test]
fn overlaps_are_seen() {
    let wrong = |change: fn(&mut dllm_attention_params), says: &str| {
        let mut params = params();
        change(&mut params);
        let error = validate(&params).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    wrong(|p| p.q_stride = i64::MAX - 7, "q: expected rows within 64-bit addresses");
    wrong(|p| p.out_stride = i64::MAX - 7, "out: expected rows within 64-bit addresses");
    wrong(|p| p.segments[1].k_stride = i64::MAX - 7, "segment.k: expected rows within 64-bit addresses");
    wrong(|p| p.segments[1].v_stride = i64::MAX - 7, "segment.v: expected rows within 64-bit addresses");
    wrong(|p| p.out = p.q, "out: expected memory that does not overlap q");
    wrong(|p| p.out = p.segments[1].k, "out: expected memory that does not overlap segment.k");
    wrong(|p| p.out = p.segments[1].v + 1600, "out: expected memory that does not overlap segment.v");
    wrong(|p| p.out = p.lse, "out: expected memory that does not overlap lse");
    wrong(|p| p.lse = p.q + 4, "lse: expected memory that does not overlap q");
    wrong(|p| (p.max_splits, p.workspace) = (2, p.q), "workspace: expected memory that does not overlap q");
}

#[test]
fn what_is_not_used_is_free() {
    let absent = dllm_segment { v: 3, len: 1, k_stride: -1, num_rows: -1, ..dllm_segment::default() };
    let mut unused = params();
    unused.segments[0] = absent;
    (unused.workspace, unused.workspace_bytes) = (7, 0);
    (unused.tile_indices, unused.query_tiles, unused.per_head, unused.num_tile_indices) = (1, -1, 9, -1);
    validate(&unused).unwrap();
    let mut empty = params();
    (empty.segments[1].num_rows, empty.segments[1].k) = (0, empty.out);
    validate(&empty).unwrap();
    // Side by side in one matrix: queries, keys and values of a projection.
    let mut projection = params();
    (projection.q, projection.q_stride) = (0x100_0000, 3584 + 1024);
    let k = projection.q + 2 * 3584;
    let live = dllm_segment { k, v: k + 1024, k_stride: 4608, v_stride: 4608, num_rows: 64, ..params().segments[1] };
    projection.segments[1] = live;
    validate(&projection).unwrap();
}
