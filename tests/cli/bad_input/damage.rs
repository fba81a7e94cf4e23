use super::*;

/// One change to a file.
#[derive(Clone, Debug)]
enum Damage {
    Flip(Index, u8),
    Set(Index, u8),
    Insert(Index, Vec<u8>),
    Delete(Index, usize),
    Truncate(Index),
    /// Overwrites bytes with a copy of others.
    Splice(Index, Index, usize),
}

impl Damage {
    /// Changes `bytes` at offsets below `reach`.
    fn apply(&self, bytes: &mut Vec<u8>, reach: usize) {
        let reach = reach.min(bytes.len());
        if reach == 0 {
            return;
        }
        match self {
            Damage::Flip(at, bit) => bytes[at.index(reach)] ^= 1 << (bit % 8),
            Damage::Set(at, byte) => bytes[at.index(reach)] = *byte,
            Damage::Insert(at, more) => drop(bytes.splice(at.index(reach)..at.index(reach), more.iter().copied())),
            Damage::Delete(at, len) => {
                let at = at.index(reach);
                bytes.drain(at..(at + len).min(bytes.len()));
            }
            Damage::Truncate(at) => bytes.truncate(at.index(reach)),
            Damage::Splice(from, to, len) => {
                let from = from.index(reach);
                let piece = bytes[from..(from + len).min(bytes.len())].to_vec();
                let to = to.index(reach);
                let end = (to + len).min(bytes.len());
                bytes.splice(to..end, piece);
            }
        }
    }
}

fn damage() -> impl Strategy<Value = Damage> {
    let text = proptest::collection::vec(
        prop_oneof![any::<u8>(), proptest::char::range(' ', '~').prop_map(|c| c as u8)],
        1..9,
    );
    prop_oneof![
        (any::<Index>(), any::<u8>()).prop_map(|(at, bit)| Damage::Flip(at, bit)),
        (any::<Index>(), proptest::char::range('0', '9')).prop_map(|(at, digit)| Damage::Set(at, digit as u8)),
        (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Damage::Set(at, byte)),
        (any::<Index>(), text).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
        (any::<Index>(), 1..40usize).prop_map(|(at, len)| Damage::Delete(at, len)),
        any::<Index>().prop_map(Damage::Truncate),
        (any::<Index>(), any::<Index>(), 1..80usize).prop_map(|(from, to, len)| Damage::Splice(from, to, len)),
    ]
}

/// Damaged bytes; in half of the cases only within the first `head` of them.
fn damaged(whole: Vec<u8>, head: usize) -> impl Strategy<Value = Vec<u8>> {
    let reach = prop_oneof![Just(head), Just(usize::MAX)];
    (proptest::collection::vec(damage(), 1..4), reach).prop_map(move |(list, reach)| {
        let mut bytes = whole.clone();
        list.iter().for_each(|damage| damage.apply(&mut bytes, reach));
        bytes
    })
}

fn family() -> impl Strategy<Value = Family> {
    prop_oneof![Just(Family::Llada), Just(Family::Dream)]
}

/// Files of a checkpoint of these tests.
const FILES: [&str; 4] = ["config.json", "generation_config.json", FILE, INDEX];

/// Checks that the message about a damaged checkpoint is one line that begins with the file, and names the key, tensor or place in
/// it, what was expected and what was found.
fn check_message(dir: &Path, error: &Error) -> std::result::Result<(), TestCaseError> {
    let message = error.to_string();
    let is_a_file = |path: &Path| path.parent() == Some(dir) && FILES.iter().any(|name| path.ends_with(name));
    prop_assert!(message.starts_with(&format!("{}", dir.display())) && !message.contains('\n'), "{message:?}");
    match error {
        Error::Config { path, key, expected, found } => {
            prop_assert!(is_a_file(path) && path.extension().is_some_and(|e| e == "json"), "{message}");
            prop_assert!(!key.is_empty() && !expected.is_empty() && !found.is_empty(), "{message}");
            prop_assert!(message.contains(&format!("\"{key}\": expected {expected}, found {found}")), "{message}");
        }
        Error::Tensor { path, tensor, expected, found } => {
            // A tensor that is in no file has the directory.
            let missing = path == dir && found == "no such tensor";
            prop_assert!(missing || (is_a_file(path) && path.ends_with(FILE)), "{message}");
            let stated =
                ["shape [", "the tensor that ", "element type "].iter().any(|start| expected.starts_with(start));
            prop_assert!(!tensor.is_empty() && stated, "{message}");
            let about = ["no such tensor", "shape ["].iter().any(|start| found.starts_with(start));
            prop_assert!(about || expected.starts_with("element type "), "{message}");
        }
        Error::Format { path, message: what } if path.ends_with(FILE) => {
            let Some(what) = what.strip_prefix("not a whole safetensors file: ") else {
                return Err(TestCaseError::fail(message));
            };
            let place =
                ["its header: tensor \"", "its header: __metadata__: "].iter().any(|start| what.starts_with(start));
            let is_json = what.starts_with("its header: ") && what.contains("line ") && what.contains("column ");
            let sizes = what.contains("expected ") && what.contains(", found ");
            prop_assert!(is_a_file(path) && (place || is_json || sizes), "{message}");
        }
        Error::Format { path, message: what } => {
            let shard = path.ends_with(INDEX) && what.contains("shard \"");
            let place = what.contains("line ") && what.contains("column ");
            prop_assert!(is_a_file(path) && (shard || place), "{message}");
        }
        Error::Io { path, source } => {
            // Bytes that are not UTF-8.
            prop_assert!(is_a_file(path) && source.kind() == std::io::ErrorKind::InvalidData, "{message}");
        }
        other => prop_assert!(false, "{other:?}"),
    }
    Ok(())
}

/// Opens the checkpoint and, if that succeeds, decodes two tokens. Both may fail with an error, but must not panic.
fn survives(dir: &Path) -> std::result::Result<(), TestCaseError> {
    let model = match Model::open(dir) {
        Ok(model) => model,
        Err(error) => return check_message(dir, &error),
    };
    for cache in [CacheMode::None, CacheMode::Dual] {
        let options = Options { gen_length: 2, cache, ..Options::default() };
        match generate(&model, &options, &[vec![0], vec![1, 0]]) {
            Ok(output) => {
                let mask = model.config().mask_token_id;
                prop_assert!(output.tokens.iter().all(|tokens| tokens.len() == 2 && !tokens.contains(&mask)));
            }
            // Prompt and options are those of an undamaged checkpoint: only their fit to the damaged one can be refused.
            Err(error @ Error::Argument { .. }) => {
                let message = error.to_string();
                let fits =
                    ["prompt: expected ", "gen-length: expected "].iter().any(|start| message.starts_with(start));
                prop_assert!(fits && message.contains(", found "), "{message}");
            }
            Err(error @ Error::NoFiniteLogit { .. }) => prop_assert!(error.to_string().contains("logit"), "{error}"),
            Err(error @ Error::OutOfMemory { .. }) => prop_assert!(error.to_string().contains("memory"), "{error}"),
            Err(other) => prop_assert!(false, "{other:?}"),
        }
    }
    Ok(())
}

fn any_json() -> impl Strategy<Value = Value> {
    let number = prop_oneof![
        Just(json!(0)),
        (-3i64..300).prop_map(|n| json!(n)),
        any::<i64>().prop_map(|n| json!(n)),
        any::<u64>().prop_map(|n| json!(n)),
        (0u32..64).prop_map(|bits| json!(1u64 << bits)),
        any::<f64>().prop_map(|x| json!(x)),
        Just(json!(1e18)),
    ];
    let leaf = prop_oneof![
        4 => number,
        1 => Just(Value::Null),
        1 => any::<bool>().prop_map(Value::from),
        1 => ".{0,8}".prop_map(Value::from),
        1 => prop_oneof![Just("llada"), Just("Dream"), Just("silu"), Just("rms"), Just("llama")].prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::btree_map(".{0,4}", inner, 0..4).prop_map(|m| json!(m)),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_tensors((family, file) in family().prop_flat_map(|f| (Just(f), damaged(Checkpoint::new(f).file(), 2000)))) {
        let dir = write(&Checkpoint::new(family).config.to_string(), &file);
        survives(dir.path())?;
    }

    #[test]
    fn damaged_config((family, text) in family().prop_flat_map(|f| {
        (Just(f), damaged(serde_json::to_vec_pretty(&Checkpoint::new(f).config).unwrap(), usize::MAX))
    })) {
        let dir = Checkpoint::new(family).write();
        std::fs::write(dir.path().join("config.json"), text).unwrap();
        survives(dir.path())?;
    }

    #[test]
    fn damaged_index(text in {
        let names = Checkpoint::llada().tensors.into_keys();
        let map: serde_json::Map<_, _> = names.map(|name| (name, FILE.into())).collect();
        damaged(serde_json::to_vec_pretty(&json!({"weight_map": map})).unwrap(), usize::MAX)
    }) {
        let dir = Checkpoint::llada().write();
        std::fs::write(dir.path().join(INDEX), text).unwrap();
        survives(dir.path())?;
    }

    /// Sets up to three keys of the config to random values, mostly sizes.
    #[test]
    fn random_values(family in family(), changes in proptest::collection::vec((any::<Index>(), any_json()), 1..4)) {
        let checkpoint = Checkpoint::new(family);
        let mut config = checkpoint.config.clone();
        let keys: Vec<String> = config.as_object().unwrap().keys().cloned().collect();
        for (key, value) in changes {
            config[key.get(&keys)] = value;
        }
        let dir = write(&config.to_string(), &checkpoint.file());
        std::fs::write(dir.path().join("generation_config.json"), config.to_string()).unwrap();
        survives(dir.path())?;
    }
}

/// Replaces the only occurrence of `from` in a file by bytes of the same or of another length.
fn replaced(file: &[u8], from: &str, to: &str) -> Vec<u8> {
    let places: Vec<usize> = (0..file.len()).filter(|at| file[*at..].starts_with(from.as_bytes())).take(2).collect();
    let [at] = places[..] else { panic!("{} times {from:?}", places.len()) };
    [&file[..at], to.as_bytes(), &file[at + from.len()..]].concat()
}

/// One case of each kind of damage to the tensors, with its whole message.
#[test]
fn what_is_said_about_damaged_tensors() {
    let checkpoint = Checkpoint::llada();
    let (file, head) = (checkpoint.file(), checkpoint.head());
    let header = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let data = file.len() - 8 - header;
    let entry: Value = serde_json::from_slice::<Value>(&file[8..8 + header]).unwrap()[head].clone();
    let [from, to]: [usize; 2] = serde_json::from_value(entry["data_offsets"].clone()).unwrap();
    let of_head = |change: (&str, Value)| {
        let mut after = entry.clone();
        after[change.0] = change.1;
        let mut entries: Value = serde_json::from_slice(&file[8..8 + header]).unwrap();
        entries[head] = after;
        let text = entries.to_string();
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &file[8 + header..]].concat()
    };
    let whole = format!("{FILE}: not a whole safetensors file: ");
    let mut lie = file.clone();
    lie[5] ^= 1;
    let claimed = header + (1 << 40);
    let cases = [
        (
            "cut off in the header",
            file[..100].to_vec(),
            format!("{whole}expected a header of at most 92 bytes, found {header}"),
        ),
        (
            "cut off in the tensors",
            file[..file.len() - 7].to_vec(),
            format!("{whole}expected {data} bytes of tensors, found {}", data - 7),
        ),
        (
            "a byte more",
            [&file[..], &[0]].concat(),
            format!("{whole}expected {data} bytes of tensors, found {}", data + 1),
        ),
        (
            "another header length",
            lie,
            format!("{whole}expected a header of at most {} bytes, found {claimed}", file.len() - 8),
        ),
        (
            "another shape",
            of_head(("shape", json!([50, 64]))),
            format!(
                "{whole}its header: tensor \"{head}\": expected the 6400 bytes of BF16 [50, 64], found {}",
                to - from
            ),
        ),
        (
            "another type",
            of_head(("dtype", json!("F32"))),
            format!(
                "{whole}its header: tensor \"{head}\": expected the {} bytes of F32 [40, 64], found {}",
                2 * (to - from),
                to - from
            ),
        ),
        (
            "no number",
            of_head(("shape", json!(["40", 64]))),
            format!("{whole}its header: tensor \"{head}\": shape: invalid type: string \"40\", expected usize"),
        ),
        (
            "exchanged sizes",
            of_head(("shape", json!([64, 40]))),
            format!("{FILE}: tensor \"{head}\": expected shape [40, 64], found shape [64, 40]"),
        ),
        (
            "another name",
            replaced(&file, head, &head.replace("ff_out", "ff_oat")),
            format!(": tensor \"{head}\": expected shape [40, 64], found no such tensor"),
        ),
        (
            "an unsupported type",
            of_head(("dtype", json!("I16"))),
            format!("{FILE}: tensor \"{head}\": expected element type BF16, F16 or F32, found I16"),
        ),
    ];
    for (what, bytes, message) in cases {
        let dir = write(&checkpoint.config.to_string(), &bytes);
        let error = Model::open(dir.path()).map(|_| ()).expect_err(what);
        assert!(error.to_string().ends_with(&message), "{what}: {error}, expected {message}");
        check_message(dir.path(), &error).unwrap();
    }
}

/// One case of each kind of damage to the JSON files, with its whole message.
#[test]
fn what_is_said_about_damaged_json() {
    let checkpoint = Checkpoint::llada();
    let (config, head) = (checkpoint.config.to_string(), checkpoint.head());
    let map: serde_json::Map<_, _> = checkpoint.tensors.keys().map(|name| (name.clone(), FILE.into())).collect();
    let index = json!({"weight_map": map}).to_string();
    let change = |text: &str, from: &str, to: &str| String::from_utf8(replaced(text.as_bytes(), from, to)).unwrap();
    let size = "expected a whole number from 1 to 16777216";
    for (name, text, message) in [
        (
            "config.json",
            config[..config.len() - 1].to_string(),
            format!("config.json: EOF while parsing an object at line 1 column {}", config.len() - 1),
        ),
        ("config.json", change(&config, "\"n_layers\":2", "\"n_layers\":2,"), String::new()),
        (
            "config.json",
            change(&config, "\"n_layers\"", "\"n_layer5\""),
            format!("config.json: \"n_layers\": {size}, found nothing"),
        ),
        (
            "config.json",
            change(&config, "\"n_layers\":2", "\"n_layers\":\"2\""),
            format!("config.json: \"n_layers\": {size}, found \"2\""),
        ),
        (
            "config.json",
            change(&config, "\"n_layers\":2", "\"n_layers\":-2"),
            format!("config.json: \"n_layers\": {size}, found -2"),
        ),
        (
            "config.json",
            change(&config, "\"mask_token_id\":39", "\"mask_token_id\":93"),
            "config.json: \"mask_token_id\": expected a token id below 40, found 93".into(),
        ),
        (
            "config.json",
            change(&config, "\"d_model\":64", "\"d_model\":65"),
            "config.json: \"n_heads\": expected a divisor of the width 65, found 2".into(),
        ),
        (
            "config.json",
            change(&config, "\"mlp_hidden_size\":96", "\"mlp_hidden_size\":97"),
            "expected shape [97, 64], found shape [96, 64]".into(),
        ),
        (
            "generation_config.json",
            "{\"eos_token_id\": [3, 99]}".into(),
            "generation_config.json: \"eos_token_id\": expected a token id below 40, found 99".into(),
        ),
        (
            INDEX,
            change(&index, &format!("\"{head}\""), &format!("\"{head}x\"")),
            format!("{FILE}: tensor \"{head}x\": expected the tensor that "),
        ),
        (
            INDEX,
            change(&index, &format!("\"{head}\":\"model.s"), &format!("\"{head}\":\"model-s")),
            String::from("names the shard \"model-safetensors\", which is not in "),
        ),
        (
            INDEX,
            change(&index, &format!("\"{head}\":\"model.s"), &format!("\"{head}\":\"../model.s")),
            "shard \"../model.safetensors\" is not a plain file name".into(),
        ),
        (INDEX, index[..20].into(), format!("{INDEX}: EOF while parsing a")),
    ] {
        let dir = checkpoint.write();
        std::fs::write(dir.path().join(name), &text).unwrap();
        let error = Model::open(dir.path()).map(|_| ()).expect_err(&message);
        assert!(error.to_string().contains(&message), "{error}, expected {message}");
        check_message(dir.path(), &error).unwrap();
    }
}
