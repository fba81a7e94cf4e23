use super::*;

/// Returns the header (without padding) and the data of a file.
fn parts(file: &[u8]) -> (Value, &[u8]) {
    let n = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&file[8..8 + n]).unwrap(), &file[8 + n..])
}

fn join(header: impl AsRef<[u8]>, data: &[u8]) -> Vec<u8> {
    let header = header.as_ref();
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

#[track_caller]
fn refuses(file: &[u8], words: &str) {
    let config = Checkpoint::llada().config.to_string();
    refused(open_files(&config, file), "Format", &[FILE, "not a whole safetensors file: ", words]);
}

#[test]
fn truncated_anywhere() {
    let file = Checkpoint::llada().file();
    let data = file.len() - parts(&file).1.len();
    let mut cuts = vec![0, 1, 4, 7, 8, 9, 20, data / 2, data - 1, data, data + 1, data + 2];
    cuts.extend((1..8).map(|i| data + (file.len() - data) * i / 8));
    cuts.extend([file.len() - 2, file.len() - 1]);
    assert!(cuts.len() > 20);
    for cut in cuts {
        let words = match cut {
            ..8 => "expected 8 bytes before its header, found fewer".into(),
            _ if cut < data => format!("expected a header of at most {} bytes, found {}", cut - 8, data - 8),
            _ => format!("expected {} bytes of tensors, found {}", file.len() - data, cut - data),
        };
        refuses(&file[..cut], &words);
    }
}

#[test]
fn bytes_after_the_end() {
    let file = Checkpoint::llada().file();
    let expected = parts(&file).1.len();
    for more in [&[0], &file[..]] {
        let words = format!("expected {expected} bytes of tensors, found {}", expected + more.len());
        refuses(&[&file, more].concat(), &words);
    }
}

#[test]
fn wrong_header_length() {
    let file = Checkpoint::llada().file();
    let true_length = u64::from_le_bytes(file[..8].try_into().unwrap());
    let left = file.len() as u64 - 8;
    for length in [
        0,
        1,
        true_length - 8,
        true_length + 1,
        left,
        left + 1,
        100_000_001,
        1 << 40,
        i64::MAX as u64,
        u64::MAX - 8,
        u64::MAX,
    ] {
        let mut lie = file.clone();
        lie[..8].copy_from_slice(&length.to_le_bytes());
        let words = match length <= left {
            true => "its header: ".into(),
            false => format!("expected a header of at most {left} bytes, found {length}"),
        };
        refuses(&lie, &words);
    }
}

#[test]
fn wrong_entries() {
    let file = Checkpoint::llada().file();
    let (header, data) = parts(&file);
    let name = "model.transformer.ln_f.weight";
    let [start, end] = [0, 1].map(|i| header[name]["data_offsets"][i].as_u64().unwrap());
    let size = end - start;
    let offsets = |from: u64, to: u64| format!("expected data_offsets from {start} on, found [{from}, {to}]");
    let bytes =
        |expected: u64, info: &str, found: u64| format!("expected the {expected} bytes of {info}, found {found}");
    let overflow = |shape: &str| format!("expected a size that does not overflow, found BF16 {shape}");
    let big = 1u64 << 40;
    // An entry that begins too late may leave its place to the next one, which then overlaps it or leaves a gap.
    let cases = [
        ("overlaps the tensor before", "data_offsets", json!([start - 2, end - 2]), String::new()),
        ("leaves a gap before", "data_offsets", json!([start + 2, end + 2]), offsets(start + 2, end + 2)),
        ("shorter than its shape", "data_offsets", json!([start, end - 2]), bytes(size, "BF16 [64]", size - 2)),
        ("longer than its shape", "data_offsets", json!([start, end + 2]), bytes(size, "BF16 [64]", size + 2)),
        ("the end first", "data_offsets", json!([end, start]), String::new()),
        ("behind the end of the file", "data_offsets", json!([big, big + 128]), String::new()),
        ("at the end of memory", "data_offsets", json!([u64::MAX - 128, u64::MAX]), String::new()),
        ("all of memory", "data_offsets", json!([start, u64::MAX]), bytes(size, "BF16 [64]", u64::MAX - start)),
        ("negative", "data_offsets", json!([-128, 0]), "data_offsets: invalid value: integer `-128`".into()),
        ("one offset", "data_offsets", json!([start]), "data_offsets: invalid length 1, expected".into()),
        ("three offsets", "data_offsets", json!([start, end, end]), "data_offsets: invalid length 3, expected".into()),
        ("no offsets", "data_offsets", Value::Null, "data_offsets: invalid type: null, expected".into()),
        ("more elements than bytes", "shape", json!([65]), bytes(130, "BF16 [65]", size)),
        ("fewer elements than bytes", "shape", json!([63]), bytes(126, "BF16 [63]", size)),
        ("terabytes", "shape", json!([1u64 << 42]), bytes(1 << 43, "BF16 [4398046511104]", size)),
        (
            "more elements than numbers",
            "shape",
            json!([u64::MAX, u64::MAX]),
            overflow("[18446744073709551615, 18446744073709551615]"),
        ),
        ("a product of 0 by overflow", "shape", json!([1u64 << 32, 1u64 << 32]), overflow("[4294967296, 4294967296]")),
        ("negative size", "shape", json!([-64]), "shape: invalid value: integer `-64`, expected usize".into()),
        ("fraction", "shape", json!([64.0]), "shape: invalid type: floating point `64.0`, expected usize".into()),
        ("no list", "shape", json!(64), "shape: invalid type: integer `64`, expected a sequence".into()),
        ("another width", "dtype", json!("F32"), bytes(256, "F32 [64]", size)),
        ("no such type", "dtype", json!("BF17"), "dtype: unknown variant `BF17`, expected one of".into()),
        ("no type", "dtype", json!(null), "dtype: invalid type: null, expected".into()),
    ];
    let of_tensor = format!("its header: tensor {name:?}: ");
    for (what, key, value, words) in cases {
        println!("{what}");
        let mut lie = header.clone();
        lie[name][key] = value;
        match &words[..] {
            // The tensor, or the one whose place is left.
            "" => refuses(&join(lie.to_string(), data), ": expected data_offsets from "),
            words => refuses(&join(lie.to_string(), data), &format!("{of_tensor}{words}")),
        }
    }
}

/// The last tensor ends at the largest offset, so sums with it overflow.
#[test]
fn offsets_that_overflow() {
    for end in [u64::MAX, u64::MAX - 8, u64::MAX - 7 - 77] {
        let header = json!({"x": {"dtype": "U8", "shape": [end], "data_offsets": [0, end]}});
        let words = format!("its header: tensor \"x\": expected a size that does not overflow, found U8 [{end}]");
        refuses(&join(header.to_string(), &[0; 64]), &words);
    }
}

#[test]
fn duplicate_names() {
    let entry = |at: usize| format!(r#""x":{{"dtype":"BF16","shape":[2],"data_offsets":[{at},{}]}}"#, at + 4);
    refuses(
        &join(format!("{{{},{}}}", entry(0), entry(4)), &[0; 8]),
        "its header: tensor \"x\": expected data_offsets from 0 on, found [4, 8]",
    );
    refuses(&join(format!("{{{},{}}}", entry(4), entry(0)), &[0; 8]), "expected 4 bytes of tensors, found 8");
}

#[test]
fn garbage_headers() {
    let nested = "[".repeat(100_000);
    for (header, words) in [
        ("", "line 1 column 0"),
        ("{", "line 1 column 1"),
        ("[]", "line 1 column"),
        ("null", "expected"),
        ("7", "expected"),
        ("\0\0\0\0", "line 1 column 1"),
        ("{\"x\": 7}", "tensor \"x\": dtype: "),
        ("{\"x\": {}}", "tensor \"x\": dtype: "),
        ("{\"__metadata__\": {\"format\": 7}}", "__metadata__: invalid type: integer `7`, expected a string"),
        ("{\"__metadata__\": []}", "__metadata__: invalid type: sequence, expected a map"),
        (&nested, "line 1 column"),
    ] {
        refuses(&join(header, &[0; 16]), "its header: ");
        refuses(&join(header, &[0; 16]), words);
    }
    refuses(&join([0xff, 0xfe, 0xfd], &[]), "its header: ");
}

#[test]
fn no_tensors() {
    let config = Checkpoint::llada().config.to_string();
    refused(open_files(&config, &join("{}", &[])), "Tensor", &["model.transformer.", "found no such tensor"]);
}
