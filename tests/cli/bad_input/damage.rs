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

/// Opens the checkpoint and, if that succeeds, decodes two tokens. Both may fail with an error, but must not panic.
fn survives(dir: &Path) -> std::result::Result<(), TestCaseError> {
    let model = match Model::open(dir) {
        Ok(model) => model,
        Err(error) => {
            prop_assert!(!error.to_string().is_empty());
            return Ok(());
        }
    };
    for cache in [CacheMode::None, CacheMode::Dual] {
        let options = Options { gen_length: 2, cache, ..Options::default() };
        match generate(&model, &options, &[vec![0], vec![1, 0]]) {
            Ok(output) => {
                let mask = model.config().mask_token_id;
                prop_assert!(output.tokens.iter().all(|tokens| tokens.len() == 2 && !tokens.contains(&mask)));
            }
            Err(Error::NoFiniteLogit { .. } | Error::Argument { .. } | Error::OutOfMemory { .. }) => {}
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
