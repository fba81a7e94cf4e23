//! Tokenizer and chat template of a checkpoint directory.
//!
//! Two layouts are read: `tokenizer.json` (LLaDA), or else `vocab.json` + `merges.txt` (Dream and its children, see
//! `qwen2.rs`). Both end in one [`tokenizers::Tokenizer`]; `tokenizer_config.json` adds the special tokens' names and
//! the chat template. None of these files is trusted: what is wrong in them becomes an error that names the file.

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

/// The names under which transformers keeps a special token; a chat template may read each as a variable.
const SPECIAL_NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Besides `eos_token`, what LLaDA and the Qwen2 family write at the end of a turn.
const TURN_ENDS: [&str; 3] = ["<|eot_id|>", "<|im_end|>", "<|endoftext|>"];

/// The tokenizer and chat template of one checkpoint. Immutable after [`Tokenizer::open`]; may be shared by threads.
#[derive(Debug)]
pub struct Tokenizer {
    tokenizer: tokenizers::Tokenizer,
    /// The file that errors name: `tokenizer.json` or `vocab.json`.
    file: PathBuf,
    /// Rows of the embedding matrix.
    vocab_size: usize,
    /// Files that were searched for a template, for the error when there is none.
    config_file: PathBuf,
    template: Option<ChatTemplate>,
    end_tokens: Vec<u32>,
}

impl Tokenizer {
    /// Reads the tokenizer files in `dir`; `None` when it holds none of them.
    ///
    /// `vocab_size` is the number of rows of the embedding matrix.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that is missing while the others are there, or cannot be read, [`Error::Format`],
    /// [`Error::Config`] and [`Error::Tokenizer`] for one that is malformed, declares a token that the tokenizer does not
    /// place at the declared id, or holds a token whose id is not below `vocab_size`.
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
            read_tokenizer_json(&file)?
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

    /// The token ids of `text`. Special tokens written in the text (`<|startoftext|>`) are recognised as such;
    /// `add_special_tokens` adds those that the tokenizer itself puts around a text, which for the checkpoints of
    /// LLaDA and Dream are none.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer fails, or yields an id that is not below `vocab_size`.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let ids = shielded(&self.file, || {
            self.tokenizer.encode_fast(text, add_special_tokens).map(|encoding| encoding.get_ids().to_vec())
        })?;
        // The post-processor of a tokenizer.json carries ids of its own, which no vocabulary check has seen.
        match ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            Some(id) => Err(text_error(
                &self.file,
                format!("encoding gave id {id}, expected ids below vocab_size {}", self.vocab_size),
            )),
            None => Ok(ids),
        }
    }

    /// The text of `ids`, special tokens left out. An id without a token (a padding row of the embedding matrix) has
    /// no text; bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        shielded(&self.file, || self.tokenizer.decode(ids, true))
    }

    /// One token as text for display, special tokens included; `None` for an id without a token. A token that holds
    /// part of a character shows U+FFFD.
    pub fn token(&self, id: u32) -> Option<String> {
        if let Some(added) = self.tokenizer.get_added_vocabulary().get_added_tokens_decoder().get(&id) {
            return Some(added.content.clone());
        }
        self.tokenizer.id_to_token(id)?;
        shielded(&self.file, || self.tokenizer.decode(&[id], false)).ok()
    }

    /// Whether the checkpoint has a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// One user message through the chat template, ready for the assistant's answer (`add_generation_prompt`).
    ///
    /// # Errors
    /// [`Error::Tokenizer`], with the file and the line in the template, when there is no template or it fails.
    pub fn chat(&self, message: &str) -> Result<String> {
        match &self.template {
            Some(template) => template.render(message),
            None => Err(text_error(
                &self.config_file,
                "no chat_template (a string, or a list with one named \"default\"), and no chat_template.jinja in the same directory",
            )),
        }
    }

    /// The ids at which an answer ends: `eos_token`, and `<|eot_id|>`, `<|im_end|>`, `<|endoftext|>` where they
    /// exist. Sorted, without duplicates.
    pub fn end_tokens(&self) -> Vec<u32> {
        self.end_tokens.clone()
    }
}

/// Contents of `tokenizer_config.json` and `special_tokens_map.json`.
struct TokenizerConfig {
    /// Path of `tokenizer_config.json`, whether or not it exists.
    path: PathBuf,
    /// All of `tokenizer_config.json`; empty when there is none.
    json: Map<String, Value>,
    special: SpecialTokens,
}

impl TokenizerConfig {
    fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG);
        let json: Map<String, Value> = read_json(&path)?.unwrap_or_default();
        let mut special = SpecialTokens::default();
        special.take(&path, &json)?;
        // As transformers does it: with added_tokens_decoder, tokenizer_config.json is the only source.
        if !json.contains_key("added_tokens_decoder") {
            let map_path = dir.join(SPECIAL);
            special.take(&map_path, &read_json(&map_path)?.unwrap_or_default())?;
        }
        Ok(Self { path, json, special })
    }
}

/// The special tokens by their roles.
#[derive(Default)]
struct SpecialTokens {
    /// By name, see [`SPECIAL_NAMES`].
    named: BTreeMap<&'static str, String>,
    /// `additional_special_tokens`.
    additional: Vec<String>,
}

impl SpecialTokens {
    /// Takes the special tokens of one file; those already known stay.
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

/// A special token is written as a string or as an object with `content`.
fn token_text(path: &Path, key: &str, value: &Value) -> Result<String> {
    match value.as_str().or_else(|| value.get("content")?.as_str()) {
        Some(text) => Ok(text.to_owned()),
        None => Err(wrong_value(path, key, "a string or an object with \"content\"", value)),
    }
}

/// The parts of `tokenizer.json` that are checked here because the tokenizers crate does not.
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
    // The crate cuts this many bytes off each merge without looking whether they are there. Byte-level BPE, which
    // LLaDA and Dream use, has no such prefix.
    if let Some(prefix) = declared.model.continuing_subword_prefix.filter(|prefix| !prefix.is_empty()) {
        return Err(text_error(path, format!("model.continuing_subword_prefix: expected none, found {prefix:?}")));
    }

    let mut tokenizer = shielded(path, || {
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(text.as_bytes())?;
        // A saved truncation would silently drop the end of a prompt, a saved padding would lengthen it.
        tokenizer.with_truncation(None)?;
        Ok(tokenizer)
    })?;
    tokenizer.with_padding(None);
    // The crate numbers added tokens by itself and only logs when that is not the declared id.
    for token in &declared.added_tokens {
        check_declared(&tokenizer, path, &token.content, token.id)?;
    }
    Ok(tokenizer)
}

/// Checks that a token declared with an id is found at that id.
fn check_declared(tokenizer: &tokenizers::Tokenizer, path: &Path, content: &str, id: u32) -> Result<()> {
    match tokenizer.token_to_id(content) {
        Some(found) if found == id => Ok(()),
        Some(found) => Err(text_error(path, format!("added token {content:?}: expected id {id}, found {found}"))),
        None => Err(text_error(path, format!("added token {content:?}: expected id {id}, found no such token"))),
    }
}

/// Makes the tokens that the configuration names special, as transformers does: recognised in a text and left out of
/// decoded text. A name without an id stays plain text; a new id would point at a row that was never trained.
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

/// Checks that every token has a row in the embedding matrix; names the one farthest out.
fn check_ids(tokenizer: &tokenizers::Tokenizer, path: &Path, vocab_size: usize) -> Result<()> {
    let last = tokenizer.get_vocab(true).into_iter().map(|(token, id)| (id, token)).max();
    match last {
        Some((id, token)) if id as usize >= vocab_size => Err(text_error(
            path,
            format!("token {token:?} has id {id}, expected ids below vocab_size {vocab_size} (embedding rows)"),
        )),
        Some(_) => Ok(()),
        None => Err(text_error(path, "the vocabulary is empty")),
    }
}

thread_local! {
    static SHIELDED: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is in code of others whose panics become errors, so that a panic hook need not report them.
pub fn is_shielded() -> bool {
    SHIELDED.try_with(Cell::get).unwrap_or(false)
}

/// As long as it lives, [`is_shielded`] holds in the thread that made it.
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

/// Runs a call into the tokenizers crate. It panics on some malformed files (a merge longer than every token, a
/// pre-tokenizer that splits at length 0); that becomes an error like any other.
fn shielded<T>(path: &Path, call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    let shield = Shield::raise();
    let outcome = catch_unwind(AssertUnwindSafe(call));
    drop(shield);
    let message = match outcome {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => error.to_string(),
        Err(payload) => format!("the tokenizers crate panicked: {}", panic_message(payload.as_ref())),
    };
    Err(text_error(path, message))
}

fn panic_message(payload: &(dyn Any + Send)) -> &str {
    let literal = payload.downcast_ref::<&str>().copied();
    literal.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

/// Whether there is an entry of this name. A dangling link counts, so that reading it fails by name.
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

fn text_error(path: &Path, message: impl Into<String>) -> Error {
    Error::Tokenizer { path: path.to_owned(), message: message.into() }
}

/// A configuration value of the wrong kind; long values are cut.
fn wrong_value(path: &Path, key: &str, expected: &str, found: &Value) -> Error {
    let found: String = found.to_string().chars().take(80).collect();
    Error::Config { path: path.to_owned(), key: key.to_owned(), expected: expected.to_owned(), found }
}
