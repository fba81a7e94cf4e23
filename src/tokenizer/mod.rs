//! Tokenizer and chat template of a checkpoint directory.
//!
//! Two layouts are supported: `tokenizer.json` (LLaDA), or `vocab.json` with `merges.txt` (Dream and its derivatives, see
//! `qwen2.rs`). Both become a [`tokenizers::Tokenizer`]; `tokenizer_config.json` adds the names of special tokens and the
//! chat template. None of these files is trusted: every mistake in them is an error that names the file.

mod chat;
mod qwen2;

use std::any::Any;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokenizers::AddedToken;

use crate::{Error, Result};
use chat::ChatTemplate;

const TOKENIZER: &str = "tokenizer.json";
const VOCAB: &str = "vocab.json";
const MERGES: &str = "merges.txt";
const CONFIG: &str = "tokenizer_config.json";
const ADDED: &str = "added_tokens.json";
const SPECIAL: &str = "special_tokens_map.json";

/// Names of special tokens in transformers. A chat template sees each as a variable.
const SPECIAL_NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Tokens that end a turn of LLaDA and of the Qwen2 family, in addition to `eos_token`.
const TURN_ENDS: [&str; 3] = ["<|eot_id|>", "<|im_end|>", "<|endoftext|>"];

/// Tokenizer and chat template of one checkpoint. Immutable, and may be shared by threads.
#[derive(Debug)]
pub struct Tokenizer {
    tokenizer: tokenizers::Tokenizer,
    /// File named in errors: `tokenizer.json` or `vocab.json`.
    file: PathBuf,
    /// Rows of the embedding matrix.
    vocab_size: usize,
    /// Path of `tokenizer_config.json`, for the error of a missing template.
    config_file: PathBuf,
    template: Option<ChatTemplate>,
    end_tokens: Vec<u32>,
}

impl Tokenizer {
    /// Reads the tokenizer files in `dir`; `None` when it has none of them.
    ///
    /// `vocab_size` is the number of rows of the embedding matrix.
    ///
    /// Where files disagree, `tokenizer_config.json` decides which tokens are special, and the ids of added tokens must be equal in
    /// all of them. `special_tokens_map.json` only adds roles that `tokenizer_config.json` leaves open, and is not read when that has
    /// `added_tokens_decoder`. A `mask_token` here has no part in a decode: the mask is `mask_token_id` of `config.json`.
    ///
    /// # Errors
    /// [`Error::Io`] for a required file that is missing or cannot be read. [`Error::Format`], [`Error::Config`] and
    /// [`Error::Tokenizer`] for a file that is malformed, declares a token at another id than the tokenizer, or has a token
    /// whose id is not below `vocab_size`.
    pub fn open(dir: &Path, vocab_size: usize) -> Result<Option<Tokenizer>> {
        fs::metadata(dir).map_err(Error::io(dir))?;
        let mut any = false;
        for name in [TOKENIZER, VOCAB, MERGES, CONFIG, ADDED, SPECIAL] {
            any |= present(&dir.join(name))?;
        }
        if !any {
            return Ok(None);
        }

        let config = TokenizerConfig::read(dir)?;
        let mut file = dir.join(TOKENIZER);
        let mut tokenizer = if present(&file)? {
            let tokenizer = read_tokenizer_json(&file)?;
            check_added(&tokenizer, dir, &config)?;
            tokenizer
        } else {
            file = dir.join(VOCAB);
            qwen2::read(dir, &config)?
        };
        mark_special(&mut tokenizer, &file, &config)?;
        check_ids(&tokenizer, &file, vocab_size)?;

        let names = config.special.named.get("eos_token").map(String::as_str).into_iter().chain(TURN_ENDS);
        let mut end_tokens: Vec<u32> = names.filter_map(|name| tokenizer.token_to_id(name)).collect();
        end_tokens.sort_unstable();
        end_tokens.dedup();

        let template = ChatTemplate::find(dir, &config)?;
        Ok(Some(Tokenizer { tokenizer, file, vocab_size, config_file: config.path, template, end_tokens }))
    }

    /// Returns the token ids of `text`. Special tokens in the text, such as `<|startoftext|>`, are recognised.
    /// `add_special_tokens` adds the tokens that the tokenizer puts around a text; LLaDA and Dream have none.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer fails, or yields an id that is not below `vocab_size`.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let ids = shielded(&self.file, || {
            self.tokenizer.encode_fast(text, add_special_tokens).map(|encoding| encoding.get_ids().to_vec())
        })?;
        // The post-processor of a tokenizer.json has its own ids, which the vocabulary check does not see.
        match ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            Some(id) => Err(tokenizer_error(
                &self.file,
                format!("encoding gave id {id}, expected ids below vocab_size {}", self.vocab_size),
            )),
            None => Ok(ids),
        }
    }

    /// Returns the text of `ids` without special tokens. An id without a token (a padding row of the embedding matrix) has
    /// no text. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        shielded(&self.file, || self.tokenizer.decode(ids, true))
    }

    /// Returns the text of one token for display, also of a special token; `None` for an id without a token. A part of a
    /// character is shown as U+FFFD.
    pub fn token(&self, id: u32) -> Option<String> {
        if let Some(added) = self.tokenizer.get_added_vocabulary().get_added_tokens_decoder().get(&id) {
            return Some(added.content.clone());
        }
        self.tokenizer.id_to_token(id)?;
        shielded(&self.file, || self.tokenizer.decode(&[id], false)).ok()
    }

    /// Returns whether the checkpoint has a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// Applies the chat template to one user message. The result ends with the start of the assistant's answer
    /// (`add_generation_prompt`).
    ///
    /// # Errors
    /// [`Error::Tokenizer`], with the file and the line in the template, when there is no template or it fails.
    pub fn chat(&self, message: &str) -> Result<String> {
        match &self.template {
            Some(template) => template.render(message),
            None => Err(tokenizer_error(
                &self.config_file,
                "expected a chat_template (a string, or a list with one named \"default\") or a file chat_template.jinja, \
                 found no chat_template; pass the prompt without a template",
            )),
        }
    }

    /// Returns the ids that end an answer: `eos_token`, and `<|eot_id|>`, `<|im_end|>` and `<|endoftext|>` if they exist.
    /// Sorted, without duplicates.
    pub fn end_tokens(&self) -> Vec<u32> {
        self.end_tokens.clone()
    }
}

/// Contents of `tokenizer_config.json` and `special_tokens_map.json`.
struct TokenizerConfig {
    /// Path of `tokenizer_config.json`, whether or not it exists.
    path: PathBuf,
    /// Contents of `tokenizer_config.json`; empty when it does not exist.
    json: Map<String, Value>,
    special: SpecialTokens,
}

impl TokenizerConfig {
    fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG);
        let json: Map<String, Value> = read_json(&path)?.unwrap_or_default();
        let mut special = SpecialTokens::default();
        special.take(&path, &json)?;
        // As in transformers: with added_tokens_decoder, tokenizer_config.json is the only source.
        if !json.contains_key("added_tokens_decoder") {
            let map_path = dir.join(SPECIAL);
            special.take(&map_path, &read_json(&map_path)?.unwrap_or_default())?;
        }
        Ok(Self { path, json, special })
    }
}

/// Special tokens by role.
#[derive(Default)]
struct SpecialTokens {
    /// Tokens by the names of [`SPECIAL_NAMES`].
    named: BTreeMap<&'static str, String>,
    /// `additional_special_tokens`.
    additional: Vec<String>,
}

impl SpecialTokens {
    /// Adds the special tokens of one file. Tokens that are already known have precedence.
    fn take(&mut self, path: &Path, json: &Map<String, Value>) -> Result<()> {
        for name in SPECIAL_NAMES {
            if let Some(value) = json.get(name).filter(|value| !value.is_null())
                && !self.named.contains_key(name)
            {
                self.named.insert(name, token_text(path, name, value)?);
            }
        }
        let name = "additional_special_tokens";
        match json.get(name) {
            None | Some(Value::Null) => {}
            Some(Value::Array(values)) => {
                let tokens = values.iter().map(|value| token_text(path, name, value)).collect::<Result<_>>()?;
                if self.additional.is_empty() {
                    self.additional = tokens;
                }
            }
            Some(value) => return Err(wrong_value(path, name, "a list of tokens", value)),
        }
        Ok(())
    }

    fn tokens(&self) -> impl Iterator<Item = &str> {
        self.named.values().chain(&self.additional).map(String::as_str)
    }
}

/// Returns the text of a special token, which is a string or an object with `content`.
fn token_text(path: &Path, key: &str, value: &Value) -> Result<String> {
    match value.as_str().or_else(|| value.get("content")?.as_str()) {
        Some(text) => Ok(text.to_owned()),
        None => Err(wrong_value(path, key, "a string or an object with \"content\"", value)),
    }
}

/// Parts of `tokenizer.json` that the tokenizers crate does not check.
#[derive(Deserialize)]
struct TokenizerJson {
    #[serde(default)]
    added_tokens: Vec<DeclaredToken>,
    model: DeclaredModel,
}

#[derive(Deserialize)]
struct DeclaredToken {
    id: u32,
    content: String,
}

#[derive(Deserialize)]
struct DeclaredModel {
    continuing_subword_prefix: Option<String>,
}

fn read_tokenizer_json(path: &Path) -> Result<tokenizers::Tokenizer> {
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    let declared: TokenizerJson = parse_json(path, &text)?;
    // The crate removes the length of the prefix from each merge without a check. Byte-level BPE, which LLaDA and Dream
    // use, has no such prefix.
    if let Some(prefix) = declared.model.continuing_subword_prefix.filter(|prefix| !prefix.is_empty()) {
        return Err(tokenizer_error(path, format!("model.continuing_subword_prefix: expected none, found {prefix:?}")));
    }

    let mut tokenizer = shielded(path, || {
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(text.as_bytes())?;
        // A saved truncation would silently drop the end of a prompt, and saved padding would lengthen it.
        tokenizer.with_truncation(None)?;
        Ok(tokenizer)
    })?;
    tokenizer.with_padding(None);
    // The crate numbers added tokens itself, and only logs a difference from the declared id.
    for token in &declared.added_tokens {
        check_declared(&tokenizer, path, &token.content, token.id)?;
    }
    Ok(tokenizer)
}

/// Checks that a token declared with an id is found at that id.
fn check_declared(tokenizer: &tokenizers::Tokenizer, path: &Path, content: &str, id: u32) -> Result<()> {
    match tokenizer.token_to_id(content) {
        Some(found) if found == id => Ok(()),
        Some(found) => Err(tokenizer_error(path, format!("added token {content:?}: expected id {id}, found {found}"))),
        None => Err(tokenizer_error(path, format!("added token {content:?}: expected id {id}, found no such token"))),
    }
}

/// Checks that `tokenizer_config.json` or `added_tokens.json` gives no token another id than `tokenizer.json`. A token that only
/// they have stays plain text.
fn check_added(tokenizer: &tokenizers::Tokenizer, dir: &Path, config: &TokenizerConfig) -> Result<()> {
    let (path, added) = qwen2::read_added(dir, config)?;
    for (id, token) in added {
        if tokenizer.token_to_id(&token.content).is_some() || tokenizer.id_to_token(id).is_some() {
            check_declared(tokenizer, &path, &token.content, id)?;
        }
    }
    Ok(())
}

/// Marks the tokens that the configuration names as special, as transformers does: they are recognised in a text and
/// omitted from decoded text. A name without an id stays plain text, because a new id would have an untrained embedding.
fn mark_special(tokenizer: &mut tokenizers::Tokenizer, path: &Path, config: &TokenizerConfig) -> Result<()> {
    let known = tokenizer.get_added_tokens_decoder();
    let mut tokens = Vec::new();
    for content in config.special.tokens() {
        if let Some(id) = tokenizer.token_to_id(content) {
            let token = known.get(&id).cloned().unwrap_or_else(|| AddedToken::from(content, true));
            tokens.push(token.special(true));
        }
    }
    shielded(path, || tokenizer.add_special_tokens(tokens))?;
    Ok(())
}

/// Checks that every token has a row in the embedding matrix. The error names the token with the largest id.
fn check_ids(tokenizer: &tokenizers::Tokenizer, path: &Path, vocab_size: usize) -> Result<()> {
    let last = tokenizer.get_vocab(true).into_iter().map(|(token, id)| (id, token)).max();
    match last {
        Some((id, token)) if id as usize >= vocab_size => Err(tokenizer_error(
            path,
            format!("token {token:?} has id {id}, expected ids below vocab_size {vocab_size} (embedding rows)"),
        )),
        Some(_) => Ok(()),
        None => Err(tokenizer_error(path, "the vocabulary is empty")),
    }
}

thread_local! {
    static SHIELDED: Cell<bool> = const { Cell::new(false) };
}

/// Returns whether this thread runs code whose panics become errors, so that a panic hook should not report them.
pub fn is_shielded() -> bool {
    SHIELDED.try_with(Cell::get).unwrap_or(false)
}

/// Guard during whose lifetime [`is_shielded`] is true in the thread that created it.
struct Shield {
    before: bool,
}

impl Shield {
    fn raise() -> Self {
        Self { before: SHIELDED.replace(true) }
    }
}

impl Drop for Shield {
    fn drop(&mut self) {
        SHIELDED.set(self.before);
    }
}

/// Calls the tokenizers crate and converts its panics to errors. It panics on some malformed files, for example with a merge
/// longer than every token, or a pre-tokenizer that splits at length 0.
fn shielded<T>(path: &Path, call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    let shield = Shield::raise();
    let outcome = catch_unwind(AssertUnwindSafe(call));
    drop(shield);
    let message = match outcome {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => error.to_string(),
        Err(payload) => format!("the tokenizers crate panicked: {}", panic_message(payload.as_ref())),
    };
    Err(tokenizer_error(path, message))
}

fn panic_message(payload: &(dyn Any + Send)) -> &str {
    let literal = payload.downcast_ref::<&str>().copied();
    literal.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

/// Returns whether the path exists. A dangling link counts, so that reading it gives an error with its name.
fn present(path: &Path) -> Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io(path)(error)),
    }
}

fn read_optional(path: &Path) -> Result<Option<String>> {
    if !present(path)? {
        return Ok(None);
    }
    fs::read_to_string(path).map(Some).map_err(Error::io(path))
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    read_optional(path)?.map(|text| parse_json(path, &text)).transpose()
}

fn parse_json<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| Error::Format { path: path.to_owned(), message: error.to_string() })
}

fn tokenizer_error(path: &Path, message: impl Into<String>) -> Error {
    Error::Tokenizer { path: path.to_owned(), message: message.into() }
}

/// Returns the error for a configuration value of the wrong kind. Long values are truncated.
fn wrong_value(path: &Path, key: &str, expected: &str, found: &Value) -> Error {
    let found: String = found.to_string().chars().take(80).collect();
    Error::Config { path: path.to_owned(), key: key.to_owned(), expected: expected.to_owned(), found }
}
