//! Byte-level BPE of Qwen2, which Dream 7B, Dream-Coder and DiffuCoder use with two more tokens.
//!
//! Their checkpoints have no `tokenizer.json`. The vocabulary is in `vocab.json` and the merges in `merges.txt`. The added
//! tokens and their ids are in `tokenizer_config.json` (`added_tokens_decoder`) or, in older checkpoints, in
//! `added_tokens.json`. Normaliser, pre-tokenizer and decoder are those of transformers' `tokenization_qwen2.py`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use super::{
    ADDED, MERGES, TokenizerConfig, VOCAB, check_declared, parse_json, read_json, shielded, tokenizer_error,
    wrong_value,
};
use crate::{Error, Result};

/// `PRETOKENIZE_REGEX` of transformers' `tokenization_qwen2.py`.
const PRETOKENIZE: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Tokenizer classes of transformers that this file implements. Others use the same two files with other rules.
const CLASSES: [&str; 3] = ["DreamTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast"];

/// Builds the tokenizer from `vocab.json`, `merges.txt` and the added tokens in `dir`.
pub(super) fn read(dir: &Path, config: &TokenizerConfig) -> Result<tokenizers::Tokenizer> {
    check_class(config)?;
    let vocab_path = dir.join(VOCAB);
    let mut vocab = read_vocab(&vocab_path)?;
    let merges = read_merges(&dir.join(MERGES), &vocab)?;
    let (added_path, added) = read_added(dir, config)?;

    // An added token that is in the model's vocabulary keeps its declared id; otherwise the crate would number it. No merge
    // produces it, so that plain text cannot become it.
    vocab.extend(added.iter().map(|(&id, token)| (token.content.clone(), id)));
    check_unique(&vocab_path, &vocab)?;

    let tokenizer = shielded(&vocab_path, || {
        let model = BPE::builder().vocab_and_merges(vocab.into_iter().collect::<Vocab>(), merges).build()?;
        let split = Split::new(SplitPattern::Regex(PRETOKENIZE.into()), SplitDelimiterBehavior::Isolated, false)?;
        let bytes = ByteLevel::new(false, true, false);
        let mut tokenizer = tokenizers::Tokenizer::new(model);
        tokenizer
            .with_normalizer(Some(NFC))?
            .with_pre_tokenizer(Some(Sequence::new(vec![split.into(), bytes.into()])))
            .with_decoder(Some(bytes));
        tokenizer.add_tokens(added.values().cloned())?;
        Ok(tokenizer)
    })?;
    for (&id, token) in &added {
        check_declared(&tokenizer, &added_path, &token.content, id)?;
    }
    Ok(tokenizer)
}

fn check_class(config: &TokenizerConfig) -> Result<()> {
    match config.json.get("tokenizer_class") {
        None | Some(Value::Null) => Ok(()),
        Some(class) if class.as_str().is_some_and(|name| CLASSES.contains(&name)) => Ok(()),
        Some(class) => {
            let expected = format!("one of {} where there is no tokenizer.json", CLASSES.join(", "));
            Err(wrong_value(&config.path, "tokenizer_class", &expected, class))
        }
    }
}

/// Reads the vocabulary, token to id. All 256 bytes must be in it: the crate silently drops a character without a token.
fn read_vocab(path: &Path) -> Result<HashMap<String, u32>> {
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    let vocab: HashMap<String, u32> = parse_json(path, &text)?;
    let alphabet: BTreeSet<char> = ByteLevel::alphabet().into_iter().collect();
    match alphabet.into_iter().find(|byte| !vocab.contains_key(byte.encode_utf8(&mut [0; 4]) as &str)) {
        Some(byte) => Err(tokenizer_error(path, format!("expected a token for each byte, found none for {byte:?}"))),
        None => Ok(vocab),
    }
}

/// Checks that no two tokens share an id, which would make decoding ambiguous.
fn check_unique(path: &Path, vocab: &HashMap<String, u32>) -> Result<()> {
    let mut by_id: Vec<(u32, &str)> = vocab.iter().map(|(token, &id)| (id, token.as_str())).collect();
    by_id.sort_unstable();
    for pair in by_id.windows(2) {
        if let [(id, first), (other, second)] = pair
            && id == other
        {
            return Err(tokenizer_error(path, format!("tokens {first:?} and {second:?} share id {id}")));
        }
    }
    Ok(())
}

/// Reads the merges in the order of their ranks. They are checked here because the errors of the crate have no line, and
/// because it panics when the merged token would be longer than every token.
fn read_merges(path: &Path, vocab: &HashMap<String, u32>) -> Result<Merges> {
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    let mut merges = Merges::new();
    for (index, line) in text.lines().enumerate() {
        let number = index + 1;
        if line.trim().is_empty() || (index == 0 && line.starts_with("#version:")) {
            continue;
        }
        let mut words = line.split_whitespace();
        let (Some(left), Some(right), None) = (words.next(), words.next(), words.next()) else {
            return Err(tokenizer_error(path, format!("line {number}: expected two tokens, found {line:?}")));
        };
        let merged = format!("{left}{right}");
        for token in [left, right, &merged] {
            if !vocab.contains_key(token) {
                return Err(tokenizer_error(path, format!("line {number}: token {token:?} is not in {VOCAB}")));
            }
        }
        merges.push((left.to_owned(), right.to_owned()));
    }
    Ok(merges)
}

/// Entry of `added_tokens_decoder`.
#[derive(Deserialize)]
struct Added {
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    normalized: Option<bool>,
    #[serde(default)]
    special: bool,
}

impl From<Added> for AddedToken {
    fn from(added: Added) -> Self {
        AddedToken::from(added.content, added.special)
            .single_word(added.single_word)
            .lstrip(added.lstrip)
            .rstrip(added.rstrip)
            .normalized(added.normalized.unwrap_or(!added.special))
    }
}

/// Returns the added tokens by id, and their file. As in transformers, `added_tokens.json` is used only without
/// `added_tokens_decoder`.
pub(super) fn read_added(dir: &Path, config: &TokenizerConfig) -> Result<(PathBuf, BTreeMap<u32, AddedToken>)> {
    let key = "added_tokens_decoder";
    let Some(declared) = config.json.get(key) else {
        let path = dir.join(ADDED);
        let ids: BTreeMap<String, u32> = read_json(&path)?.unwrap_or_default();
        let special: BTreeSet<&str> = config.special.tokens().collect();
        let mut added = BTreeMap::new();
        for (content, id) in ids {
            let token = AddedToken::from(content.as_str(), special.contains(content.as_str()));
            if let Some(other) = added.insert(id, token) {
                return Err(tokenizer_error(
                    &path,
                    format!("tokens {:?} and {content:?} share id {id}", other.content),
                ));
            }
        }
        return Ok((path, added));
    };
    let wrong = |found: &Value| wrong_value(&config.path, key, "an object of id to token", found);
    let mut added = BTreeMap::new();
    for (id, token) in declared.as_object().ok_or_else(|| wrong(declared))? {
        let id: u32 = id.parse().map_err(|_| wrong(&Value::from(id.as_str())))?;
        let token = Added::deserialize(token).map_err(|_| wrong(token))?;
        added.insert(id, token.into());
    }
    Ok((config.path.clone(), added))
}
