use super::*;
use tempfile::TempDir;

const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

/// Checkpoint in two shards: the head in the second, all other tensors in the first.
fn sharded() -> (TempDir, Value) {
    let checkpoint = Checkpoint::llada();
    let head = checkpoint.head();
    let dir = write(&checkpoint.config.to_string(), &[]);
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    std::fs::write(dir.path().join(SHARDS[0]), checkpoint.file_of(|n| n != head)).unwrap();
    std::fs::write(dir.path().join(SHARDS[1]), checkpoint.file_of(|n| n == head)).unwrap();
    let place = |name: &String| (name.clone(), SHARDS[usize::from(name == head)].into());
    let map: serde_json::Map<_, _> = checkpoint.tensors.keys().map(place).collect();
    let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
    std::fs::write(dir.path().join(INDEX), index.to_string()).unwrap();
    (dir, index)
}

#[test]
fn shards() {
    let (dir, _) = sharded();
    let tokens = [1, 2, 3];
    let want = logits(&open(&Checkpoint::llada()), &tokens);
    assert_eq!(logits(&Model::open(dir.path()).unwrap(), &tokens), want);
    std::fs::remove_file(dir.path().join(INDEX)).unwrap();
    assert_eq!(logits(&Model::open(dir.path()).unwrap(), &tokens), want);
}

#[test]
fn missing_shard() {
    let (dir, _) = sharded();
    std::fs::remove_file(dir.path().join(SHARDS[1])).unwrap();
    refused(Model::open(dir.path()), "Format", &[INDEX, SHARDS[1], "which is not in"]);
}

#[test]
fn empty_shard() {
    let (dir, _) = sharded();
    std::fs::write(dir.path().join(SHARDS[1]), []).unwrap();
    refused(Model::open(dir.path()), "Format", &[SHARDS[1], "not a whole safetensors file"]);
}

#[test]
fn shards_elsewhere() {
    let (dir, index) = sharded();
    let head = Checkpoint::llada().head();
    // Both files exist, one next to the directory and one below it.
    std::fs::create_dir(dir.path().join("inner")).unwrap();
    for inner in ["config.json", SHARDS[0], SHARDS[1]] {
        std::fs::copy(dir.path().join(inner), dir.path().join("inner").join(inner)).unwrap();
    }
    let above = format!("../{}", SHARDS[1]);
    let below = format!("inner/{}", SHARDS[1]);
    let here = format!("./{}", SHARDS[1]);
    let slash = format!("{}/", SHARDS[1]);
    let absolute = dir.path().join(SHARDS[1]).display().to_string();
    for shard in [&above, &below, &here, &slash, &absolute, "/etc/passwd", "../../etc/passwd", "", ".", "..", "/"] {
        for dir in [dir.path().to_path_buf(), dir.path().join("inner")] {
            let mut index = index.clone();
            index["weight_map"][head] = json!(shard);
            std::fs::write(dir.join(INDEX), index.to_string()).unwrap();
            let quoted = format!("shard {shard:?}");
            refused(Model::open(dir), "Format", &[INDEX, &quoted, "is not a plain file name"]);
        }
    }
    for shard in ["a\0b", "inner", "no such shard"] {
        let mut index = index.clone();
        index["weight_map"][head] = json!(shard);
        std::fs::write(dir.path().join(INDEX), index.to_string()).unwrap();
        refused(Model::open(dir.path()), "Format", &[INDEX, &format!("{shard:?}"), "which is not in"]);
    }
}

#[test]
fn tensors_elsewhere() {
    let head = Checkpoint::llada().head();
    let (dir, index) = sharded();
    let mut wrong = index.clone();
    wrong["weight_map"][head] = json!(SHARDS[0]);
    std::fs::write(dir.path().join(INDEX), wrong.to_string()).unwrap();
    refused(Model::open(dir.path()), "Tensor", &[SHARDS[0], head, INDEX, "found no such tensor"]);
    let mut less = index;
    less["weight_map"].as_object_mut().unwrap().remove(head);
    std::fs::write(dir.path().join(INDEX), less.to_string()).unwrap();
    refused(Model::open(dir.path()), "Tensor", &[head, "expected shape [40, 64]", "found no such tensor"]);
}

#[test]
fn not_an_index() {
    let (dir, _) = sharded();
    for text in [
        "",
        "{",
        "[]",
        "{}",
        r#"{"weight_map": null}"#,
        r#"{"weight_map": []}"#,
        r#"{"weight_map": {"x": 7}}"#,
        r#"{"weight_map": {"x": ["a"]}}"#,
    ] {
        std::fs::write(dir.path().join(INDEX), text).unwrap();
        refused(Model::open(dir.path()), "Format", &[INDEX, "line 1 column"]);
    }
    std::fs::write(dir.path().join(INDEX), r#"{"weight_map": {}}"#).unwrap();
    refused(Model::open(dir.path()), "Tensor", &["found no such tensor"]);
}
