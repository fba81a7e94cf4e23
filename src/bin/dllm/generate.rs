//! `dllm generate`: generates answers to prompts.

use crate::args::{Decoding, model_dir};
use crate::machine::{ComputeDevice, Machine};
use crate::output::{self, INTERRUPT, OutputFile, io_error};
use crate::report::count;
use crate::watch::Watch;
use clap::{ArgGroup, Args};
use dllm_kernels::decode::{Decoded, trace::Trace};
use dllm_kernels::tokenizer::Tokenizer;
use dllm_kernels::{Config, Error, Generation, Generator, Model, Observer, Result, Step};
use indicatif::ProgressBar;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Sample question, the first evaluation problem of the sample model. For checkpoints without problems.
const QUESTION: &str = "Eva has 4 bags with 11 buttons in each bag. She gives half of them to Finn. \
                        She buys 16 more buttons. How many buttons does Eva have now?";
/// Problem file in the directory of the sample model.
const QUESTIONS: &str = "eval/problems_0shot.jsonl";

const EXAMPLES: &str = "\
Examples:
  dllm generate --watch
  dllm generate --model DIR --chat --prompt \"Why is the sky blue?\" --gen-length 256
  dllm generate --model DIR --prompt \"def fib(n):\" --cache none --policy fixed --steps 64
  dllm generate --model DIR --prompt-ids 1,2,3 --prompt-ids 4,5 --json
  dllm generate --trace steps.json --temperature 0.7 --seed 1
";

/// Generates answers to one prompt or to a batch.
#[derive(Args, Clone, Debug, Default)]
#[command(after_help = EXAMPLES, group = ArgGroup::new("source"))]
pub struct Generate {
    /// Checkpoint directory [default: models/tiny-math, in this directory or above the program]
    #[arg(long, value_name = "DIR", help_heading = "Model and prompt")]
    model: Option<PathBuf>,
    /// Text to continue, or to answer with --chat; repeat for a batch [default: a sample question]
    #[arg(long, value_name = "TEXT", help_heading = "Model and prompt", group = "source")]
    prompt: Vec<String>,
    /// File with the text of one prompt
    #[arg(long, value_name = "FILE", help_heading = "Model and prompt", group = "source")]
    prompt_file: Option<PathBuf>,
    /// Token ids of a prompt; repeat for a batch. Needs no tokenizer
    #[arg(long, value_name = "1,2,3", help_heading = "Model and prompt", group = "source", value_parser = ids)]
    prompt_ids: Vec<Ids>,
    /// Put each prompt into the model's chat template
    #[arg(long, help_heading = "Model and prompt", conflicts_with = "prompt_ids")]
    chat: bool,
    /// Flags of the decode.
    #[command(flatten)]
    decoding: Decoding,
    /// Flags of the machine.
    #[command(flatten)]
    machine: Machine,
    /// Show the answer as it is unmasked, on stderr (slower)
    #[arg(long, help_heading = "Output")]
    watch: bool,
    /// Print one JSON object: text, tokens, nfe, seconds, tokens_per_second, device
    #[arg(long, help_heading = "Output")]
    json: bool,
    /// Write every step to a JSON file (slower)
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    trace: Option<PathBuf>,
}

/// A prompt as token ids.
#[derive(Clone, Debug)]
struct Ids(Vec<u32>);

fn ids(text: &str) -> Result<Ids, String> {
    let id = |part: &str| part.trim().parse().map_err(|_| format!("expected token ids as in 1,2,3, found {part:?}"));
    Ok(Ids(text.split(',').map(id).collect::<Result<_, _>>()?))
}

impl Generate {
    /// Returns the flags of `dllm` without a command.
    pub fn demo() -> Generate {
        let decoding = Decoding { gen_length: Some(64), ..Decoding::default() };
        Generate { watch: true, decoding, ..Generate::default() }
    }

    /// Returns the prompts as token ids.
    fn prompts(&self, dir: &Path, tokenizer: Option<&Tokenizer>) -> Result<Vec<Vec<u32>>> {
        if !self.prompt_ids.is_empty() {
            return Ok(self.prompt_ids.iter().map(|ids| ids.0.clone()).collect());
        }
        let tokenizer = tokenizer.ok_or_else(|| {
            let found = format!("text, but {} has no tokenizer.json or vocab.json", dir.display());
            Error::argument("prompt-ids", "a prompt of token ids", found)
        })?;
        let mut chat = self.chat;
        let prompts = match (&self.prompt_file, self.prompt.is_empty()) {
            (Some(file), _) => vec![std::fs::read_to_string(file).map_err(io_error(file))?],
            (None, false) => self.prompt.clone(),
            (None, true) => {
                chat |= tokenizer.has_chat_template();
                vec![sample_question(dir)]
            }
        };
        let encode = |prompt: &String| {
            if chat { tokenizer.encode(&tokenizer.chat(prompt)?, false) } else { tokenizer.encode(prompt, true) }
        };
        prompts.iter().map(encode).collect()
    }
}

/// Returns the first evaluation problem of the checkpoint, or [`QUESTION`] if it has none.
fn sample_question(dir: &Path) -> String {
    let rows = std::fs::read_to_string(dir.join(QUESTIONS)).unwrap_or_default();
    let row: Option<Value> = rows.lines().next().and_then(|line| serde_json::from_str(line).ok());
    let question = row.as_ref().and_then(|row| row["question"].as_str());
    question.unwrap_or(QUESTION).to_string()
}

/// Opened checkpoint: model, tokenizer and end-of-text tokens.
pub struct Checkpoint {
    pub dir: PathBuf,
    pub model: Model,
    /// `None` when the checkpoint has no tokenizer files.
    pub tokenizer: Option<Tokenizer>,
    /// End-of-text tokens of the configuration and of the tokenizer.
    pub end_tokens: Vec<u32>,
}

impl Checkpoint {
    /// Opens `dir`, by default the sample model, and moves its weights to the device.
    pub fn open(dir: Option<&Path>, device: &ComputeDevice) -> Result<Checkpoint> {
        let dir = model_dir(dir)?;
        // Draws nothing unless stderr is a terminal.
        let spinner = ProgressBar::new_spinner().with_message(format!("opening {}", dir.display()));
        spinner.enable_steady_tick(Duration::from_millis(100));
        let model = Model::open(&dir);
        let tokenizer = model.as_ref().ok().map(|model| Tokenizer::open(&dir, model.config().vocab_size));
        spinner.finish_and_clear();
        let (model, tokenizer) = (device.load(model?)?, tokenizer.transpose()?.flatten());
        let tokenizer_ends = tokenizer.as_ref().map(Tokenizer::end_tokens).unwrap_or_default();
        let end_tokens = [&model.config().eos_token_ids[..], &tokenizer_ends].concat();
        Ok(Checkpoint { dir, model, tokenizer, end_tokens })
    }
}

/// Runs the command.
pub fn run(args: &Generate) -> Result<()> {
    let mut options = args.decoding.options();
    let trace_file = args.trace.as_deref().map(OutputFile::new).transpose()?;
    let device = args.machine.start()?;
    for flag in args.decoding.idle_flags() {
        output::note(format_args!("note: {flag} has no effect here"));
    }
    let checkpoint = Checkpoint::open(args.model.as_deref(), &device)?;
    let Checkpoint { model, tokenizer, end_tokens, .. } = &checkpoint;
    let tokenizer = tokenizer.as_ref();
    let config = model.config();
    args.decoding.check_family(config.family)?;
    let prompts = args.prompts(&checkpoint.dir, tokenizer)?;
    options.end_tokens = end_tokens.clone();
    options.validate(config, &prompts)?;
    // Before the first note about the work.
    output::catch_interrupts();
    if args.prompt.is_empty() && args.prompt_file.is_none() && args.prompt_ids.is_empty() {
        output::note(format_args!("question: {}", sample_question(&checkpoint.dir)));
    }

    let mut watch = args.watch.then(|| Watch::new(tokenizer, end_tokens, config, &options, &prompts));
    let mut trace = trace_file.is_some().then(Trace::default);
    // An answer is not streamed between the frames or lines of steps: on one terminal they would mix.
    let stream = prompts.len() == 1 && !args.json && !args.watch;
    let mut answer = Answer::new(tokenizer, end_tokens, stream);
    let mut observers = Observers { watch: watch.as_mut(), trace: trace.as_mut(), answer: &mut answer };
    let generator = Generator::new(model).options(options.clone()).interrupt(&INTERRUPT);
    let mut generation = generator.generate_observed(&prompts, &mut observers)?;
    generation.elapsed = generation.elapsed.saturating_sub(watch.as_ref().map_or(Duration::ZERO, Watch::paused));
    drop(watch);

    // The answer comes first, so that a full disk does not lose it.
    let printed = if args.json {
        print_json(&generation, config, tokenizer, &device.name)
    } else {
        print_answers(answer, &generation, config, tokenizer)
    };
    if printed.is_ok() {
        summary(&generation, config, &device.name);
    }
    let mut written = Ok(());
    if let (Some(trace), Some(file)) = (trace, trace_file) {
        let name = checkpoint.dir.file_name().unwrap_or_default().to_string_lossy();
        let Generation { tokens, nfe, interrupted, .. } = generation;
        let decoded = Decoded { tokens, nfe, interrupted };
        written = file.write(&format!("{}\n", trace.finish(&name, config, &options, &prompts, &decoded)));
    }
    match printed {
        // A reader of stdout that has gone is no error, but must not hide one of the trace.
        Err(error) if output::is_closed_pipe(&error) => written.and(Err(error)),
        printed => printed.and(written),
    }
}

/// Returns the text of a finished sequence; `None` without a tokenizer.
fn answer_text(
    generation: &Generation,
    s: usize,
    config: &Config,
    tokenizer: Option<&Tokenizer>,
) -> Result<Option<String>> {
    // An interrupted decode leaves mask tokens, which have no text.
    let tokens: Vec<u32> = generation.text_tokens(s).iter().copied().filter(|t| *t != config.mask_token_id).collect();
    tokenizer.map(|tokenizer| tokenizer.decode(&tokens)).transpose()
}

fn print_json(generation: &Generation, config: &Config, tokenizer: Option<&Tokenizer>, device: &str) -> Result<()> {
    let each = |s: usize| answer_text(generation, s, config, tokenizer).map(|t| json!(t));
    let texts = (0..generation.tokens.len()).map(each).collect::<Result<Vec<Value>>>()?;
    let (text, tokens) = match (&texts[..], &generation.tokens[..]) {
        ([text], [tokens]) => (text.clone(), json!(tokens)),
        (texts, tokens) => (json!(texts), json!(tokens)),
    };
    let object = json!({
        "text": text,
        "tokens": tokens,
        "nfe": generation.nfe,
        "seconds": generation.elapsed.as_secs_f64(),
        "tokens_per_second": tokens_per_second(generation, config),
        "device": device,
    });
    output::print(&format!("{object}\n"))
}

fn print_answers(
    answer: Answer,
    generation: &Generation,
    config: &Config,
    tokenizer: Option<&Tokenizer>,
) -> Result<()> {
    let mut answers = Vec::new();
    for (s, tokens) in generation.tokens.iter().enumerate() {
        answers.push(answer_text(generation, s, config, tokenizer)?.unwrap_or_else(|| list(tokens)));
    }
    match &answers[..] {
        [only] => answer.finish(only),
        all => output::print(&(all.join("\n") + "\n")),
    }
}

/// Formats token ids as `--prompt-ids` takes them.
fn list(tokens: &[u32]) -> String {
    tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

/// Returns the tokens per second. After Ctrl-C the library's count would include positions that are still masked.
fn tokens_per_second(generation: &Generation, config: &Config) -> f64 {
    if !generation.interrupted {
        return generation.tokens_per_second();
    }
    let texts = (0..generation.tokens.len()).flat_map(|s| generation.text_tokens(s));
    texts.filter(|t| **t != config.mask_token_id).count() as f64 / generation.elapsed.as_secs_f64().max(1e-9)
}

fn summary(generation: &Generation, config: &Config, device: &str) {
    if generation.interrupted {
        let masks = generation.tokens.iter().flatten().filter(|t| **t == config.mask_token_id).count();
        output::note(format_args!("interrupted with {masks} tokens still masked"));
    }
    let threads = match device {
        "cpu" => format!(" ({})", count(rayon::current_num_threads(), "thread")),
        _ => String::new(),
    };
    output::note(format_args!(
        "NFE {}, {:.3} s, {:.1} tokens/s, {device}{threads}",
        generation.nfe,
        generation.elapsed.as_secs_f64(),
        tokens_per_second(generation, config),
    ));
}

/// Observer that prints the answer to one prompt as soon as it is final.
struct Answer<'a> {
    tokenizer: Option<&'a Tokenizer>,
    end_tokens: &'a [u32],
    stream: bool,
    printed: String,
    failure: Option<Error>,
}

impl<'a> Answer<'a> {
    fn new(tokenizer: Option<&'a Tokenizer>, end_tokens: &'a [u32], stream: bool) -> Self {
        Answer { tokenizer, end_tokens, stream, printed: String::new(), failure: None }
    }

    /// Returns the text of these tokens that later tokens cannot change.
    fn settled(&self, tokens: &[u32]) -> Result<String> {
        let Some(tokenizer) = self.tokenizer else {
            return Ok(list(tokens));
        };
        let end = tokens.iter().position(|t| self.end_tokens.contains(t)).unwrap_or(tokens.len());
        // A character of several tokens decodes to U+FFFD until its last token is known.
        Ok(tokenizer.decode(&tokens[..end])?.trim_end_matches(char::REPLACEMENT_CHARACTER).to_string())
    }

    /// Prints the part of `answer` that is not printed yet. Returns false when it does not continue the printed part.
    fn advance(&mut self, answer: &str) -> Result<bool> {
        let Some(new) = answer.strip_prefix(&self.printed) else {
            return Ok(false);
        };
        if !new.is_empty() {
            output::print(new)?;
            self.printed = answer.to_string();
        }
        Ok(true)
    }

    /// Prints the rest of the final answer.
    fn finish(mut self, answer: &str) -> Result<()> {
        if let Some(failure) = self.failure.take() {
            return Err(failure);
        }
        if !self.advance(answer)? {
            // The decoder changed text before the new tokens: print the answer again.
            output::print(&format!("\n{answer}"))?;
        }
        output::print("\n")
    }
}

impl Observer for Answer<'_> {
    fn finalized(&mut self, _sequence: usize, tokens: &[u32]) {
        if !self.stream || self.failure.is_some() {
            return;
        }
        if let Err(error) = self.settled(tokens).and_then(|text| self.advance(&text)) {
            self.failure = Some(error);
            // The rest has no reader.
            INTERRUPT.store(true, Ordering::Relaxed);
        }
    }
}

/// All observers of a decode.
struct Observers<'o, 'a> {
    watch: Option<&'o mut Watch<'a>>,
    trace: Option<&'o mut Trace>,
    answer: &'o mut Answer<'a>,
}

impl Observer for Observers<'_, '_> {
    fn wants_steps(&self) -> bool {
        self.watch.is_some() || self.trace.is_some()
    }

    fn step(&mut self, step: &Step) {
        if let Some(trace) = &mut self.trace {
            trace.step(step);
        }
        if let Some(watch) = &mut self.watch {
            watch.step(step);
        }
    }

    fn finalized(&mut self, sequence: usize, tokens: &[u32]) {
        self.answer.finalized(sequence, tokens);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::tests::{DECODING, fields, parse, same};
    use crate::machine::Device;

    #[test]
    fn every_flag_sets_its_field() {
        fields::<Generate>(
            "",
            &[
                ("--model=dir", |g| g.model = Some("dir".into())),
                ("--prompt=a --prompt=b", |g| g.prompt = vec!["a".into(), "b".into()]),
                ("--prompt-file=file", |g| g.prompt_file = Some("file".into())),
                ("--prompt-ids=1,2 --prompt-ids=3", |g| g.prompt_ids = vec![Ids(vec![1, 2]), Ids(vec![3])]),
                ("--chat", |g| g.chat = true),
                ("--device=cuda:3", |g| g.machine.device = Some(Device::Cuda(3))),
                ("--threads=5", |g| g.machine.threads = Some(5)),
                ("--watch", |g| g.watch = true),
                ("--json", |g| g.json = true),
                ("--trace=file", |g| g.trace = Some("file".into())),
            ],
        );
        for row in DECODING {
            same(row.line, &parse::<Generate>(row.line).decoding, &parse::<Decoding>(row.line));
        }
    }
}
