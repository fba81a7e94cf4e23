//! Tokenizer and chat template: with the checkpoint tiny-math, against outputs recorded with transformers for a small
//! Dream-style directory (`tests/data/dream-tokenizer/record.py`), and with malformed files.

use std::fs;
use std::path::{Path, PathBuf};

use dllm_kernels::tokenizer::Tokenizer;
use serde_json::{Value, json};
use tempfile::TempDir;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn dream_dir() -> PathBuf {
    root().join("tests/data/dream-tokenizer")
}

fn tiny_math_dir() -> PathBuf {
    root().join("models/tiny-math")
}

fn open(dir: &Path, vocab_size: usize) -> Tokenizer {
    Tokenizer::open(dir, vocab_size).unwrap().unwrap()
}

fn tiny_math() -> Tokenizer {
    open(&tiny_math_dir(), 1024)
}

fn dream() -> Tokenizer {
    open(&dream_dir(), 472)
}

fn read(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn str_of<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap()
}

/// Returns a new directory with copies of the named files of `from`.
fn copy_of(from: &Path, names: &[&str]) -> TempDir {
    let dir = TempDir::new().unwrap();
    for name in names {
        fs::copy(from.join(name), dir.path().join(name)).unwrap();
    }
    dir
}

fn dream_copy() -> TempDir {
    copy_of(&dream_dir(), &["vocab.json", "merges.txt", "tokenizer_config.json"])
}

fn tiny_math_copy() -> TempDir {
    copy_of(&tiny_math_dir(), &["tokenizer.json", "tokenizer_config.json"])
}

/// Edits a JSON file of `dir` with `change`.
fn edit(dir: &TempDir, name: &str, change: impl FnOnce(&mut Value)) {
    let path = dir.path().join(name);
    let mut json = read(&path);
    change(&mut json);
    fs::write(&path, json.to_string()).unwrap();
}

/// Asserts that opening `dir` fails with a message that names `file` and contains each of `parts`.
#[track_caller]
fn assert_refused(dir: &TempDir, file: &str, parts: &[&str]) {
    match Tokenizer::open(dir.path(), 1024) {
        Ok(_) => panic!("opened, expected an error about {file}: {parts:?}"),
        Err(error) => assert_names(&error.to_string(), &dir.path().join(file), parts),
    }
}

#[track_caller]
fn assert_names(message: &str, file: &Path, parts: &[&str]) {
    assert!(message.starts_with(&format!("{}: ", file.display())), "{message:?} does not name {file:?}");
    for part in parts {
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
}

#[test]
fn tiny_math_round_trip() {
    let tokenizer = tiny_math();
    for sample in ["Eva has 4 bags.\n#### 38", "  x  \t\n", "", "été 你好 😀", "4*11=44"] {
        let ids = tokenizer.encode(sample, false).unwrap();
        assert_eq!(ids.is_empty(), sample.is_empty());
        assert_eq!(tokenizer.decode(&ids).unwrap(), sample);
    }
}

#[test]
fn tiny_math_special_tokens() {
    let tokenizer = tiny_math();
    for (name, id) in [("<|startoftext|>", 905), ("<|endoftext|>", 906), ("<|mdm_mask|>", 907), ("<|eot_id|>", 910)] {
        assert_eq!(tokenizer.encode(name, false).unwrap(), [id]);
        assert_eq!(tokenizer.encode(name, true).unwrap(), [id]);
        assert_eq!(tokenizer.token(id).as_deref(), Some(name));
        assert_eq!(tokenizer.decode(&[id]).unwrap(), "");
    }
    assert_eq!(tokenizer.end_tokens(), [906, 910]);
    // Rows 911 to 1023 of the embedding matrix are padding: no token, no text.
    assert_eq!(tokenizer.token(1000), None);
    assert_eq!(tokenizer.decode(&[1000, 907, 4_000_000_000]).unwrap(), "");
}

#[test]
fn tiny_math_prompts() {
    let tokenizer = tiny_math();
    assert!(tokenizer.has_chat_template());
    let problems = fs::read_to_string(tiny_math_dir().join("eval/problems_0shot.jsonl")).unwrap();
    assert!(!problems.is_empty());
    for line in problems.lines() {
        let problem: Value = serde_json::from_str(line).unwrap();
        let prompt = tokenizer.chat(str_of(&problem, "question")).unwrap();
        assert_eq!(prompt, str_of(&problem, "prompt"));
        assert_eq!(tokenizer.encode(&prompt, false).unwrap()[..2], [905, 908]);
    }
}

#[test]
fn dream_like_transformers() {
    let tokenizer = dream();
    let expected = read(&dream_dir().join("expected.json"));
    let texts = expected["texts"].as_array().unwrap();
    assert!(texts.len() >= 15);
    for case in texts {
        let (sample, expected_ids) = (str_of(case, "text"), ids(&case["ids"]));
        assert_eq!(tokenizer.encode(sample, false).unwrap(), expected_ids, "{sample:?}");
        assert_eq!(tokenizer.encode(sample, true).unwrap(), expected_ids, "{sample:?}");
        assert_eq!(tokenizer.decode(&expected_ids).unwrap(), str_of(case, "decoded"));
        assert_eq!(tokenizer.decode(&expected_ids[..expected_ids.len() / 2]).unwrap(), str_of(case, "half"));
    }
    let chats = expected["chats"].as_array().unwrap();
    assert!(!chats.is_empty());
    for case in chats {
        let prompt = tokenizer.chat(str_of(case, "message")).unwrap();
        assert_eq!(prompt, str_of(case, "prompt"));
        assert_eq!(tokenizer.encode(&prompt, false).unwrap(), ids(&case["ids"]));
    }
}

#[test]
fn templates_like_transformers() {
    let dir = dream_copy();
    let expected = read(&dream_dir().join("expected.json"));
    let templates = expected["templates"].as_array().unwrap();
    assert!(!templates.is_empty());
    for case in templates {
        // The file has precedence over the template in the configuration.
        fs::write(dir.path().join("chat_template.jinja"), str_of(case, "template")).unwrap();
        let prompt = open(dir.path(), 472).chat(str_of(case, "message")).unwrap();
        assert_eq!(prompt, str_of(case, "prompt"), "{}", case["template"]);
    }
}

#[test]
fn dream_tokens() {
    let tokenizer = dream();
    assert_eq!(tokenizer.token(471).as_deref(), Some("<|mask|>"));
    assert_eq!(tokenizer.token(459).as_deref(), Some("<tool_call>"));
    assert_eq!(tokenizer.token(220).as_deref(), Some(" "));
    // The first of three bytes of a character.
    assert_eq!(tokenizer.token(158).as_deref(), Some("\u{fffd}"));
    // The gap between the added tokens.
    assert_eq!(tokenizer.token(465), None);
    assert_eq!(tokenizer.end_tokens(), [456, 458]);
}

/// Older checkpoints: added_tokens.json with special_tokens_map.json instead of added_tokens_decoder.
#[test]
fn dream_legacy_added_tokens() {
    let dir = copy_of(&dream_dir(), &["vocab.json", "merges.txt"]);
    let added = json!({"<|mask|>": 471, "<|im_end|>": 458, "<tool_call>": 460});
    fs::write(dir.path().join("added_tokens.json"), added.to_string()).unwrap();
    let map = json!({"eos_token": {"content": "<|im_end|>"}, "bos_token": null, "mask_token": "<|mask|>"});
    fs::write(dir.path().join("special_tokens_map.json"), map.to_string()).unwrap();

    let tokenizer = open(dir.path(), 472);
    let ids = tokenizer.encode("a<|mask|><tool_call><|im_end|>", false).unwrap();
    assert_eq!(ids, [64, 471, 460, 458]);
    assert_eq!(tokenizer.decode(&ids).unwrap(), "a<tool_call>");
    assert_eq!(tokenizer.end_tokens(), [458]);

    assert!(!tokenizer.has_chat_template());
    let message = tokenizer.chat("hi").unwrap_err().to_string();
    assert_names(&message, &dir.path().join("tokenizer_config.json"), &["no chat_template"]);
}

/// Files that disagree on a role: `tokenizer_config.json` comes first, `special_tokens_map.json` fills in what it leaves open.
#[test]
fn roles_of_tokenizer_config_come_first() {
    let ends = |config: Value, map: Value| {
        let dir = copy_of(&tiny_math_dir(), &["tokenizer.json"]);
        fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        fs::write(dir.path().join("special_tokens_map.json"), map.to_string()).unwrap();
        open(dir.path(), 1024).end_tokens()
    };
    // <|endoftext|> (906) and <|eot_id|> (910) end a turn whatever the roles are; these roles are other tokens.
    let (start, header) = (json!({"eos_token": "<|startoftext|>"}), json!({"eos_token": "<|end_header_id|>"}));
    assert_eq!(ends(start.clone(), header.clone()), [905, 906, 910]);
    assert_eq!(ends(header.clone(), start.clone()), [906, 909, 910]);
    assert_eq!(ends(json!({}), start.clone()), [905, 906, 910]);
    assert_eq!(ends(json!({"eos_token": null}), header.clone()), [906, 909, 910]);
    // With added_tokens_decoder, tokenizer_config.json is the only source.
    assert_eq!(ends(json!({"added_tokens_decoder": {}}), start), [906, 910]);
    // A role without a token in the vocabulary is no token.
    assert_eq!(ends(json!({"eos_token": "<|none|>"}), header), [906, 910]);
}

/// Files that disagree on the id of a token are refused; the message has the token, both ids and the file.
#[test]
fn ids_of_added_tokens_agree() {
    let decoder =
        |dir: &TempDir, tokens: Value| edit(dir, "tokenizer_config.json", |c| c["added_tokens_decoder"] = tokens);
    let mask = json!({"content": "<|mdm_mask|>", "special": true});
    let dir = tiny_math_copy();
    decoder(&dir, json!({"907": mask}));
    assert_eq!(open(dir.path(), 1024).encode("<|mdm_mask|>", false).unwrap(), [907]);
    decoder(&dir, json!({"908": mask}));
    assert_refused(&dir, "tokenizer_config.json", &["\"<|mdm_mask|>\"", "expected id 908", "found 907"]);
    // The id belongs to another token.
    decoder(&dir, json!({"907": {"content": "<|mask|>"}}));
    assert_refused(&dir, "tokenizer_config.json", &["\"<|mask|>\"", "expected id 907", "found no such token"]);
    // A token that tokenizer.json does not have stays plain text.
    decoder(&dir, json!({"1000": {"content": "<|mask|>"}}));
    assert!(open(dir.path(), 1024).encode("<|mask|>", false).unwrap().len() > 1);

    let dir = tiny_math_copy();
    fs::write(dir.path().join("added_tokens.json"), json!({"<|mdm_mask|>": 911}).to_string()).unwrap();
    assert_refused(&dir, "added_tokens.json", &["\"<|mdm_mask|>\"", "expected id 911", "found 907"]);
    // As in transformers, added_tokens.json is not read when there is added_tokens_decoder.
    decoder(&dir, json!({"907": mask}));
    assert!(Tokenizer::open(dir.path(), 1024).is_ok());
}

#[test]
fn no_tokenizer() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    assert!(Tokenizer::open(dir.path(), 10).unwrap().is_none());
    let missing = dir.path().join("missing");
    assert_names(&Tokenizer::open(&missing, 10).unwrap_err().to_string(), &missing, &[]);
}

#[test]
fn missing_files_are_named() {
    let dir = copy_of(&dream_dir(), &["vocab.json", "tokenizer_config.json"]);
    assert_refused(&dir, "merges.txt", &[]);
    let dir = copy_of(&dream_dir(), &["merges.txt"]);
    assert_refused(&dir, "vocab.json", &[]);
    let dir = copy_of(&dream_dir(), &["tokenizer_config.json"]);
    assert_refused(&dir, "vocab.json", &[]);
}

#[test]
fn ids_beyond_the_embedding_matrix() {
    let message = Tokenizer::open(&tiny_math_dir(), 910).unwrap_err().to_string();
    let file = tiny_math_dir().join("tokenizer.json");
    assert_names(&message, &file, &["\"<|eot_id|>\"", "id 910", "vocab_size 910"]);
    assert!(Tokenizer::open(&tiny_math_dir(), 911).is_ok());

    let message = Tokenizer::open(&dream_dir(), 471).unwrap_err().to_string();
    assert_names(&message, &dream_dir().join("vocab.json"), &["\"<|mask|>\"", "id 471", "vocab_size 471"]);
}

#[test]
fn malformed_tokenizer_json() {
    let whole = fs::read(tiny_math_dir().join("tokenizer.json")).unwrap();
    let (half, most) = (&whole[..whole.len() / 2], &whole[..whole.len() - 3]);
    let cases: [&[u8]; 9] =
        [b"", b"\0\x01garbage", b"\xff\xfe\0", b"[]", b"3", b"{}", b"{\"model\": null}", half, most];
    for bytes in cases {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("tokenizer.json"), bytes).unwrap();
        assert_refused(&dir, "tokenizer.json", &[]);
    }
    let dir = TempDir::new().unwrap();
    fs::create_dir(dir.path().join("tokenizer.json")).unwrap();
    assert_refused(&dir, "tokenizer.json", &[]);
}

type Change = fn(&mut Value);

#[test]
fn wrong_tokenizer_json() {
    let cases: [(Change, &[&str]); 14] = [
        (|t| t["model"]["vocab"] = json!([1, 2]), &[]),
        (|t| t["model"]["vocab"]["zzz"] = json!(1_u64 << 40), &[]),
        (|t| t["model"]["vocab"]["zzz"] = json!(-1), &[]),
        (|t| t["model"]["vocab"]["!"] = json!(u32::MAX), &["\"!\"", "id 4294967295"]),
        // The crate numbers added tokens after the vocabulary, which this makes longer by one.
        (|t| t["model"]["vocab"]["zzz"] = json!(5), &["\"<|startoftext|>\"", "expected id 905", "found 906"]),
        (|t| t["model"]["merges"] = json!([["not", "there"]]), &["out of vocabulary"]),
        // Both are known, but together longer than every token: the crate panics.
        (|t| t["model"] = json!({"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}), &["panicked"]),
        (|t| t["model"]["merges"] = json!("a b"), &[]),
        (|t| t["model"]["type"] = json!("Nonesuch"), &[]),
        (|t| t["model"]["continuing_subword_prefix"] = json!("####"), &["continuing_subword_prefix", "####"]),
        (|t| t["added_tokens"][2]["id"] = json!(950), &["\"<|mdm_mask|>\"", "expected id 950", "found 907"]),
        (|t| t["added_tokens"][2]["content"] = json!(7), &[]),
        (|t| t["version"] = json!("9.9"), &["9.9"]),
        (|t| t["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!("(unclosed"), &[]),
    ];
    for (change, parts) in cases {
        let dir = tiny_math_copy();
        edit(&dir, "tokenizer.json", change);
        assert_refused(&dir, "tokenizer.json", parts);
    }
}

/// Mistakes that show only in encoding are errors there.
#[test]
fn tokenizer_json_that_fails_late() {
    let dir = tiny_math_copy();
    edit(&dir, "tokenizer.json", |t| t["pre_tokenizer"] = json!({"type": "FixedLength", "length": 0}));
    let message = open(dir.path(), 1024).encode("hello", false).unwrap_err().to_string();
    assert_names(&message, &dir.path().join("tokenizer.json"), &["panicked"]);

    // A post-processor with an id that is not in the vocabulary.
    let dir = tiny_math_copy();
    edit(&dir, "tokenizer.json", |t| {
        t["post_processor"] = json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "X", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"X": {"id": "X", "ids": [5000], "tokens": ["X"]}},
        });
    });
    let tokenizer = open(dir.path(), 1024);
    assert!(tokenizer.encode("hello", false).is_ok());
    let message = tokenizer.encode("hello", true).unwrap_err().to_string();
    assert_names(&message, &dir.path().join("tokenizer.json"), &["id 5000", "vocab_size 1024"]);
}

/// A tokenizer.json saved with truncation or padding still encodes the whole text and nothing more.
#[test]
fn saved_truncation_and_padding_are_ignored() {
    let dir = tiny_math_copy();
    edit(&dir, "tokenizer.json", |t| {
        t["truncation"] = json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
        t["padding"] = json!({"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 906, "pad_type_id": 0, "pad_token": "<|endoftext|>"});
    });
    let sample = "Eva has 4 bags with 11 buttons in each bag.";
    assert_eq!(open(dir.path(), 1024).encode(sample, false).unwrap(), tiny_math().encode(sample, false).unwrap());
}

#[test]
fn wrong_vocab() {
    let cases: [(Change, &[&str]); 5] = [
        (|v| *v = json!(["a"]), &[]),
        (|v| v["zzz"] = json!("7"), &[]),
        (|v| v["zzz"] = json!(5), &["\"zzz\"", "share id 5"]),
        (|v| v["zzz"] = json!(471), &["\"zzz\"", "\"<|mask|>\"", "share id 471"]),
        (|v| drop(v.as_object_mut().unwrap().remove("!")), &["'!'"]),
    ];
    for (change, parts) in cases {
        let dir = dream_copy();
        edit(&dir, "vocab.json", change);
        assert_refused(&dir, "vocab.json", parts);
    }
}

#[test]
fn wrong_merges() {
    for (merges, parts) in [
        ("#version: 0.2\nh e\nh\n", ["line 3", "two tokens"]),
        ("h e l\n", ["line 1", "two tokens"]),
        ("h e\n\nq zz\n", ["line 3", "\"zz\""]),
        // Both are known, but not their merge.
        ("h e\nq q\n", ["line 2", "\"qq\""]),
        // The merge is longer than every token.
        ("Ġbuttons Ġbuttons\n", ["line 1", "\"Ġbuttons"]),
        ("#version: 0.2\n#version: 0.2\n", ["line 2", "\"#version:\""]),
    ] {
        let dir = dream_copy();
        fs::write(dir.path().join("merges.txt"), merges).unwrap();
        assert_refused(&dir, "merges.txt", &parts);
    }
}

#[test]
fn wrong_tokenizer_config() {
    let cases: [(Change, &[&str]); 10] = [
        (|c| *c = json!([]), &[]),
        (|c| c["eos_token"] = json!(7), &["\"eos_token\"", "found 7"]),
        (|c| c["additional_special_tokens"] = json!("<x>"), &["\"additional_special_tokens\"", "found \"<x>\""]),
        (|c| c["additional_special_tokens"] = json!([{"id": 3}]), &["\"additional_special_tokens\""]),
        (|c| c["added_tokens_decoder"] = json!(["<x>"]), &["\"added_tokens_decoder\""]),
        (|c| c["added_tokens_decoder"]["x"] = json!({"content": "<x>"}), &["\"added_tokens_decoder\"", "found \"x\""]),
        (|c| c["added_tokens_decoder"]["461"] = json!({"text": "<x>"}), &["\"added_tokens_decoder\""]),
        (|c| c["added_tokens_decoder"]["461"] = json!({"content": "<|mask|>"}), &["\"<|mask|>\"", "id 461"]),
        (|c| c["chat_template"] = json!(7), &["\"chat_template\"", "found 7"]),
        (|c| c["tokenizer_class"] = json!("GPT2Tokenizer"), &["\"tokenizer_class\"", "GPT2Tokenizer"]),
    ];
    for (change, parts) in cases {
        let dir = dream_copy();
        edit(&dir, "tokenizer_config.json", change);
        assert_refused(&dir, "tokenizer_config.json", parts);
    }
}

#[test]
fn template_from_a_list() {
    let dir = dream_copy();
    let tools = json!({"name": "tool_use", "template": "no"});
    let default = json!({"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}!"});
    edit(&dir, "tokenizer_config.json", |c| {
        c["chat_template"] = json!([tools, default]);
        c["bos_token"] = Value::Null;
    });
    assert_eq!(open(dir.path(), 472).chat("hi").unwrap(), "hi!");

    edit(&dir, "tokenizer_config.json", |c| c["chat_template"] = json!([tools]));
    assert!(!open(dir.path(), 472).has_chat_template());

    edit(&dir, "tokenizer_config.json", |c| c["chat_template"] = json!([{"name": "default", "template": 7}]));
    assert_refused(&dir, "tokenizer_config.json", &["\"chat_template\"", "found 7"]);
}

#[test]
fn failing_templates() {
    let dir = dream_copy();
    let file = dir.path().join("chat_template.jinja");
    for (template, parts) in [
        ("a\n{% if %}", ["line 2", "syntax error"]),
        ("a\n\n{{ messages", ["line 3", "syntax error"]),
        ("\n{{ raise_exception('Only one turn!') }}", ["line 2", "Only one turn!"]),
        ("{{ nonesuch(1) }}", ["line 1", "nonesuch"]),
        ("{{ strftime_now('%Q') }}", ["line 1", "%Q"]),
        ("{% include 'other' %}", ["line 1", "other"]),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", ["line 1", "recursion"]),
        ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", ["line 1", "fuel"]),
    ] {
        fs::write(&file, template).unwrap();
        let tokenizer = open(dir.path(), 472);
        assert!(tokenizer.has_chat_template());
        assert_names(&tokenizer.chat("hi").unwrap_err().to_string(), &file, &parts);
    }
}

/// Recursion in the template engine would overflow an ordinary stack, which ends the process instead of failing.
#[test]
fn deep_templates() {
    let dir = dream_copy();
    let file = dir.path().join("chat_template.jinja");
    let most = 64 * 1024;
    let nest = "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}";
    for template in [
        format!("{{{{ {}1 }}}}", "-".repeat(most - 7)),
        format!("{{{{ a{} }}}}", "()".repeat(most / 2 - 4)),
        format!("{{{{ a{} }}}}", ".b".repeat(most / 2 - 4)),
        format!("{{{{ {} }}}}", "(".repeat(most - 6)),
        format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(most / 12 - 2)),
        nest.replace("9999", "4000"),
        nest.to_owned(),
    ] {
        fs::write(&file, template).unwrap();
        // Some of these are valid; the test is that the call returns.
        if let Err(error) = open(dir.path(), 472).chat("hi") {
            assert_names(&error.to_string(), &file, &["line 1"]);
        }
    }
    fs::write(&file, " ".repeat(most + 1)).unwrap();
    let message = open(dir.path(), 472).chat("hi").unwrap_err().to_string();
    assert_names(&message, &file, &["at most 65536 bytes", "found 65537"]);
}

#[test]
fn template_with_a_date() {
    let dir = dream_copy();
    fs::write(dir.path().join("chat_template.jinja"), "{{ strftime_now('%Y-%m-%d') }}").unwrap();
    let date = open(dir.path(), 472).chat("hi").unwrap();
    let numbers: Vec<u32> = date.split('-').map(|part| part.parse().unwrap()).collect();
    assert!(matches!(numbers[..], [2000..=9999, 1..=12, 1..=31]), "{date}");
}
