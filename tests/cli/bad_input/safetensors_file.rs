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
    let cases = [
        (
            "overlaps the tensor before",
            "data_offsets",
            json!([start - 2, end - 2]),
            "invalid offset for tensor `model.transformer.ln_f",
        ),
        (
            "leaves a gap before",
            "data_offsets",
            json!([start + 2, end + 2]),
            "invalid offset for tensor `model.transformer.ln_f",
        ),
        ("shorter than its shape", "data_offsets", json!([start, end - 2]), "invalid shape"),
        ("longer than its shape", "data_offsets", json!([start, end + 2]), "invalid shape"),
        ("the end first", "data_offsets", json!([end, start]), "invalid offset for tensor `model.transformer.ln_f"),
        ("behind the end of the file", "data_offsets", json!([1u64 << 40, (1u64 << 40) + 128]), "invalid offset"),
        ("at the end of memory", "data_offsets", json!([u64::MAX - 128, u64::MAX]), "invalid offset"),
        ("all of memory", "data_offsets", json!([start, u64::MAX]), "invalid shape"),
        ("negative", "data_offsets", json!([-128, 0]), "`-128`, expected usize"),
        ("one offset", "data_offsets", json!([start]), "invalid length 1"),
        ("three offsets", "data_offsets", json!([start, end, end]), "invalid length 3"),
        ("no offsets", "data_offsets", Value::Null, "invalid type: null"),
        ("more elements than bytes", "shape", json!([65]), "invalid shape"),
        ("fewer elements than bytes", "shape", json!([63]), "invalid shape"),
        ("terabytes", "shape", json!([1u64 << 42]), "invalid shape"),
        ("more elements than numbers", "shape", json!([u64::MAX, u64::MAX]), "overflow"),
        ("a product of 0 by overflow", "shape", json!([1u64 << 32, 1u64 << 32]), "overflow"),
        ("negative size", "shape", json!([-64]), "`-64`, expected usize"),
        ("fraction", "shape", json!([64.0]), "`64.0`, expected usize"),
        ("no list", "shape", json!(64), "`64`, expected a sequence"),
        ("another width", "dtype", json!("F32"), "invalid shape"),
        ("no such type", "dtype", json!("BF17"), "unknown variant `BF17`"),
        ("no type", "dtype", json!(null), "invalid type: null"),
    ];
    for (what, key, value, words) in cases {
        println!("{what}");
        let mut lie = header.clone();
        lie[name][key] = value;
        refuses(&join(lie.to_string(), data), words);
    }
}

/// The last tensor ends at the largest offset, so sums with it overflow.
#[test]
fn offsets_that_overflow() {
    for end in [u64::MAX, u64::MAX - 8, u64::MAX - 7 - 77] {
        let header = json!({"x": {"dtype": "U8", "shape": [end], "data_offsets": [0, end]}});
        refuses(&join(header.to_string(), &[0; 64]), "its header: ");
    }
}

#[test]
fn duplicate_names() {
    let entry = |at: usize| format!(r#""x":{{"dtype":"BF16","shape":[2],"data_offsets":[{at},{}]}}"#, at + 4);
    refuses(&join(format!("{{{},{}}}", entry(0), entry(4)), &[0; 8]), "its header: invalid offset for tensor `x`");
    refuses(&join(format!("{{{},{}}}", entry(4), entry(0)), &[0; 8]), "expected 4 bytes of tensors, found 8");
}

#[test]
fn garbage_headers() {
    let nested = "[".repeat(100_000);
    let headers = [
        "",
        "{",
        "[]",
        "null",
        "7",
        "\0\0\0\0",
        "{\"x\": 7}",
        "{\"x\": {}}",
        "{\"__metadata__\": {\"format\": 7}}",
        "{\"__metadata__\": []}",
        &nested,
    ];
    for header in headers {
        refuses(&join(header, &[0; 16]), "its header: ");
    }
    refuses(&join([0xff, 0xfe, 0xfd], &[]), "its header: ");
}

#[test]
fn no_tensors() {
    let config = Checkpoint::llada().config.to_string();
    refused(open_files(&config, &join("{}", &[])), "Tensor", &["model.transformer.", "found no such tensor"]);
}
