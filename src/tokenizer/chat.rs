//! Chat templates: Jinja as transformers renders it (`apply_chat_template`), with minijinja.
//!
//! A template is part of the checkpoint and is not trusted. minijinja gives it no access to files or network. Its length,
//! instructions and depth are bounded here; the length of the strings that it builds is not.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, ErrorKind, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::Value as Json;

use super::{Shield, TokenizerConfig, panic_message, read_optional, tokenizer_error, wrong_value};
use crate::Result;

/// Template file of newer checkpoints. It has precedence over `tokenizer_config.json`.
const TEMPLATE: &str = "chat_template.jinja";

/// Maximum number of instructions of one rendering. Real templates need a few hundred for one message.
const FUEL: u64 = 50_000;

/// Maximum length of a template in bytes. The longest in use have about 16 KiB.
const MAX_SOURCE_BYTES: usize = 64 << 10;

/// Stack of the rendering thread in bytes. minijinja recurses over an expression without a limit (`----1`, `a.b.b.b`,
/// `[[[x]]]` built in a loop), and a stack overflow ends the process. Measured with minijinja 3.0.5 at opt-level 2: 32 MiB
/// suffice for every template within [`MAX_SOURCE_BYTES`] and [`FUEL`].
const STACK_BYTES: usize = 64 << 20;

/// Chat template and its variables other than the messages.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    file: PathBuf,
    source: String,
    /// Special tokens by name.
    special: BTreeMap<&'static str, Value>,
}

impl ChatTemplate {
    /// Reads the template of `dir`: `chat_template.jinja`, or `chat_template` in the configuration, which is a string or a
    /// list of named templates. Returns `None` when there is none.
    pub(super) fn find(dir: &Path, config: &TokenizerConfig) -> Result<Option<Self>> {
        let mut file = dir.join(TEMPLATE);
        let mut source = read_optional(&file)?;
        if source.is_none() {
            file = config.path.clone();
            source = from_config(config)?;
        }
        let special = &config.special;
        let mut variables: BTreeMap<_, _> =
            special.named.iter().map(|(&name, token)| (name, Value::from(token))).collect();
        if !special.additional.is_empty() {
            variables.insert("additional_special_tokens", Value::from(special.additional.clone()));
        }
        Ok(source.map(|source| Self { file, source, special: variables }))
    }

    /// Renders one user message, followed by the start of the assistant's answer.
    pub(super) fn render(&self, message: &str) -> Result<String> {
        let bytes = self.source.len();
        if bytes > MAX_SOURCE_BYTES {
            let message = format!("chat template: expected at most {MAX_SOURCE_BYTES} bytes, found {bytes}");
            return Err(tokenizer_error(&self.file, message));
        }
        let rendered = thread::scope(|scope| {
            let run = || {
                let _shield = Shield::raise();
                self.run(message)
            };
            let worker = thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, run);
            worker.map_err(|error| format!("cannot start a thread: {error}")).and_then(|worker| {
                worker.join().unwrap_or_else(|payload| Err(format!("panic: {}", panic_message(payload.as_ref()))))
            })
        });
        rendered.map_err(|message| tokenizer_error(&self.file, format!("chat template: {message}")))
    }

    /// Renders in the current thread. An error names the line in the template.
    fn run(&self, message: &str) -> Result<String, String> {
        let context = context! {
            messages => [context! { role => "user", content => message }],
            add_generation_prompt => true,
            // transformers always passes these two, and templates check whether they are none.
            tools => (),
            documents => (),
            ..Value::from(self.special.clone())
        };
        let rendered = environment().and_then(|env| env.render_named_str("chat_template", &self.source, context));
        rendered.map_err(|error| {
            let line = error.line().map_or(String::new(), |line| format!("line {line}: "));
            let detail = error.detail().map_or(String::new(), |detail| format!(": {detail}"));
            format!("{line}{}{detail}", error.kind())
        })
    }
}

fn from_config(config: &TokenizerConfig) -> Result<Option<String>> {
    let key = "chat_template";
    let wrong = |found| wrong_value(&config.path, key, "a string or a list of {\"name\", \"template\"}", found);
    let template = match config.json.get(key) {
        Some(Json::Array(named)) => {
            match named.iter().find(|entry| entry.get("name").is_some_and(|name| name == "default")) {
                Some(default) => Some(default.get("template").ok_or_else(|| wrong(default))?),
                None => None,
            }
        }
        other => other,
    };
    match template {
        None | Some(Json::Null) => Ok(None),
        Some(Json::String(source)) => Ok(Some(source.clone())),
        Some(other) => Err(wrong(other)),
    }
}

/// Returns an environment with the settings of transformers' `_compile_jinja_template`.
fn environment() -> Result<Environment<'static>, minijinja::Error> {
    let mut env = Environment::new();
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_fuel(Some(FUEL));
    // Templates are written for Python and call the methods of its strings and dictionaries.
    env.set_unknown_method_callback(unknown_method_callback);
    env.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", |format: String| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        strftime(&format, now).map_err(|message| minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    Ok(env)
}

const WEEKDAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// Formats a time with the directives of Python's `strftime` that templates use. The time is in UTC, because the standard
/// library has no time zones; transformers uses local time. `seconds` count from 1970-01-01, a Thursday.
fn strftime(format: &str, seconds: u64) -> Result<String, String> {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let name = |names: &[&'static str], index: u64| names.get(index as usize).copied().unwrap_or_default();
    let (weekday, month_name) = (name(&WEEKDAYS, days % 7), name(&MONTHS, month - 1));

    let mut text = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => text += &year.to_string(),
            Some('y') => text += &format!("{:02}", year % 100),
            Some('m') => text += &format!("{month:02}"),
            Some('d') => text += &format!("{day:02}"),
            Some('H') => text += &format!("{:02}", second / 3600),
            Some('M') => text += &format!("{:02}", second / 60 % 60),
            Some('S') => text += &format!("{:02}", second % 60),
            Some('A') => text += weekday,
            Some('a') => text.extend(weekday.chars().take(3)),
            Some('B') => text += month_name,
            Some('b') => text.extend(month_name.chars().take(3)),
            Some('%') => text.push('%'),
            other => {
                let found = other.map_or("a single %".to_owned(), |other| format!("%{other}"));
                return Err(format!(
                    "strftime_now: expected one of %Y %y %m %d %H %M %S %A %a %B %b %%, found {found}"
                ));
            }
        }
    }
    Ok(text)
}

/// Returns year, month (1 to 12) and day of the Gregorian calendar, `days` after 1970-01-01. Its years begin in March, so
/// that the leap day is the last of a year (H. Hinnant, "chrono-Compatible Low-Level Date Algorithms").
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468; // since 0000-03-01
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::strftime;

    /// Recorded with Python 3: `datetime.fromtimestamp(s, timezone.utc).strftime(f)`.
    #[test]
    fn strftime_like_python() {
        for (seconds, expected) in [
            (0, "1970-01-01 00:00:00 Thursday Thu January Jan 70 %"),
            (951_782_399, "2000-02-28 23:59:59 Monday Mon February Feb 00 %"),
            (951_782_400, "2000-02-29 00:00:00 Tuesday Tue February Feb 00 %"),
            (1_735_689_599, "2024-12-31 23:59:59 Tuesday Tue December Dec 24 %"),
            (4_107_542_400, "2100-03-01 00:00:00 Monday Mon March Mar 00 %"),
        ] {
            assert_eq!(strftime("%Y-%m-%d %H:%M:%S %A %a %B %b %y %%", seconds).as_deref(), Ok(expected));
        }
        assert!(strftime("%Q", 0).is_err_and(|message| message.contains("%Q")));
        assert!(strftime("100%", 0).is_err());
    }
}
