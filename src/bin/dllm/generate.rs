//! `dllm generate`: prompts in, answers out.

use crate::args::{Decoding, argument, model_dir};
use crate::machine::{Machine, Place};
use crate::output::{self, INTERRUPT, Target, io_error};
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

/// The first of the shipped evaluation questions, for checkpoints that bring none.
const QUESTION: &str = "Eva has 4 bags with 11 buttons in each bag. She gives half of them to Finn. \
                        She buys 16 more buttons. How many buttons does Eva have now?";
/// Where the shipped checkpoint keeps them.
const QUESTIONS: &str = "eval/problems_0shot.jsonl";

const EXAMPLES: &str = "\
Examples:
  dllm generate --watch
  dllm generate --model DIR --chat --prompt \"Why is the sky blue?\" --gen-length 256
  dllm generate --model DIR --prompt \"def fib(n):\" --cache none --policy fixed --steps 64
  dllm generate --model DIR --prompt-ids 1,2,3 --prompt-ids 4,5 --json
  dllm generate --trace steps.json --temperature 0.7 --seed 1
";

/// Answers one prompt, or a batch of them.
#[derive(Args, Clone, Debug, Default)]
#[command(after_help = EXAMPLES, group = ArgGroup::new("source"))]
pub struct Generate {
    /// Checkpoint directory [default: models/tiny-math, here or above the program]
    #[arg(long, value_name = "DIR", help_heading = "Model and prompt")]
    model: Option<PathBuf>,
    /// Text to go on from, or to answer with --chat; again for a batch [default: a sample question]
    #[arg(long, value_name = "TEXT", help_heading = "Model and prompt", group = "source")]
    prompt: Vec<String>,
    /// The same, read from a file
    #[arg(long, value_name = "FILE", help_heading = "Model and prompt", group = "source")]
    prompt_file: Option<PathBuf>,
    /// Token ids; again for a batch. Needs no tokenizer
    #[arg(long, value_name = "1,2,3", help_heading = "Model and prompt", group = "source", value_parser = ids)]
    prompt_ids: Vec<Ids>,
    /// Put each prompt into the model's chat template
    #[arg(long, help_heading = "Model and prompt", conflicts_with = "prompt_ids")]
    chat: bool,
    /// How to decode.
    #[command(flatten)]
    decoding: Decoding,
    /// Where.
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
    /// What the program does without a command.
    pub fn demo() -> Generate {
        let decoding = Decoding { gen_length: Some(64), ..Decoding::default() };
        Generate { watch: true, decoding, ..Generate::default() }
    }

    /// The prompts as token ids.
    fn prompts(&self, dir: &Path, text: Option<&Tokenizer>) -> Result<Vec<Vec<u32>>> {
        if !self.prompt_ids.is_empty() {
            return Ok(self.prompt_ids.iter().map(|ids| ids.0.clone()).collect());
        }
        let text = text.ok_or_else(|| {
            let found = format!("no tokenizer.json or vocab.json in {}", dir.display());
            argument("prompt-ids", "token ids, as the model has no tokenizer", found)
        })?;
        let mut chat = self.chat;
        let prompts = match (&self.prompt_file, self.prompt.is_empty()) {
            (Some(file), _) => vec![std::fs::read_to_string(file).map_err(io_error(file))?],
            (None, false) => self.prompt.clone(),
            (None, true) => {
                chat |= text.has_chat_template();
                vec![sample_question(dir)]
            }
        };
        let encode = |prompt: &String| match chat {
            true => text.encode(&text.chat(prompt)?, false),
            false => text.encode(prompt, true),
        };
        prompts.iter().map(encode).collect()
    }
}

/// The first of the questions that the checkpoint brings along.
fn sample_question(dir: &Path) -> String {
    let rows = std::fs::read_to_string(dir.join(QUESTIONS)).unwrap_or_default();
    let row: Option<Value> = rows.lines().next().and_then(|line| serde_json::from_str(line).ok());
    let question = row.as_ref().and_then(|row| row["question"].as_str());
    question.unwrap_or(QUESTION).to_string()
}

/// A model with its tokenizer, and the tokens that end its texts.
pub struct Checkpoint {
    pub dir: PathBuf,
    pub model: Model,
    pub text: Option<Tokenizer>,
    /// Those of the configuration and of the tokenizer.
    pub end_tokens: Vec<u32>,
}

impl Checkpoint {
    /// Opens a directory, or the shipped one, and brings its weights to where the work is done.
    pub fn open(dir: Option<&Path>, place: &Place) -> Result<Checkpoint> {
        let dir = model_dir(dir)?;
        // Draws nothing unless stderr is a terminal.
        let spinner = ProgressBar::new_spinner().with_message(format!("opening {}", dir.display()));
        spinner.enable_steady_tick(Duration::from_millis(100));
        let model = Model::open(&dir);
        let text = model.as_ref().ok().map(|model| Tokenizer::open(&dir, model.config().vocab_size));
        spinner.finish_and_clear();
        let (model, text) = (place.bring(model?)?, text.transpose()?.flatten());
        let of_text = text.as_ref().map(Tokenizer::end_tokens).unwrap_or_default();
        let end_tokens = [&model.config().eos_token_ids[..], &of_text].concat();
        Ok(Checkpoint { dir, model, text, end_tokens })
    }
}

/// Runs the command.
pub fn run(args: &Generate) -> Result<()> {
    let mut options = args.decoding.options();
    let trace_file = args.trace.as_deref().map(Target::new).transpose()?;
    let place = args.machine.start()?;
    for flag in args.decoding.idle_flags() {
        output::note(format_args!("note: {flag} has no effect here"));
    }
    let checkpoint = Checkpoint::open(args.model.as_deref(), &place)?;
    let Checkpoint { model, text, end_tokens, .. } = &checkpoint;
    let config = model.config();
    args.decoding.check_family(config.family)?;
    let prompts = args.prompts(&checkpoint.dir, text.as_ref())?;
    options.end_tokens = end_tokens.clone();
    options.validate(config, &prompts)?;
    // Before the first line that says the work has begun.
    output::catch_interrupts();
    if args.prompt.is_empty() && args.prompt_file.is_none() && args.prompt_ids.is_empty() {
        output::note(format_args!("question: {}", sample_question(&checkpoint.dir)));
    }

    let mut watch = args.watch.then(|| Watch::new(text.as_ref(), end_tokens, config, &options, &prompts));
    let mut trace = trace_file.is_some().then(Trace::default);
    // Frames or lines of steps and an answer growing between them would tear each other apart on one terminal.
    let stream = prompts.len() == 1 && !args.json && !args.watch;
    let mut answer = Answer::new(text.as_ref(), end_tokens, stream);
    let mut observers = Observers { watch: watch.as_mut(), trace: trace.as_mut(), answer: &mut answer };
    let generator = Generator::new(model).options(options.clone()).interrupt(&INTERRUPT);
    let mut generation = generator.generate_observed(&prompts, &mut observers)?;
    generation.elapsed = generation.elapsed.saturating_sub(watch.as_ref().map_or(Duration::ZERO, Watch::paused));
    drop(watch);

    // The answer first: a disk that is full by now must not cost it.
    let printed = match args.json {
        true => print_json(&generation, config, text.as_ref(), &place.name),
        false => print_answers(answer, &generation, config, text.as_ref()),
    };
    if printed.is_ok() {
        summary(&generation, config, &place.name);
    }
    let mut written = Ok(());
    if let (Some(trace), Some(file)) = (trace, trace_file) {
        let name = checkpoint.dir.file_name().unwrap_or_default().to_string_lossy();
        let Generation { tokens, nfe, interrupted, .. } = generation;
        let decoded = Decoded { tokens, nfe, interrupted };
        written = file.write(&format!("{}\n", trace.finish(&name, config, &options, &prompts, &decoded)));
    }
    match printed {
        // A reader that has left is no error, and hides none.
        Err(error) if output::is_closed_pipe(&error) => written.and(Err(error)),
        printed => printed.and(written),
    }
}

/// The text of a finished sequence; `None` without a tokenizer.
fn answer_text(generation: &Generation, s: usize, config: &Config, text: Option<&Tokenizer>) -> Result<Option<String>> {
    // An interrupted decode leaves masks, which have no text.
    let tokens: Vec<u32> = generation.text_tokens(s).iter().copied().filter(|t| *t != config.mask_token_id).collect();
    text.map(|text| text.decode(&tokens)).transpose()
}

fn print_json(generation: &Generation, config: &Config, text: Option<&Tokenizer>, device: &str) -> Result<()> {
    let each = |s: usize| answer_text(generation, s, config, text).map(|t| json!(t));
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

fn print_answers(answer: Answer, generation: &Generation, config: &Config, text: Option<&Tokenizer>) -> Result<()> {
    let mut answers = Vec::new();
    for (s, tokens) in generation.tokens.iter().enumerate() {
        answers.push(answer_text(generation, s, config, text)?.unwrap_or_else(|| list(tokens)));
    }
    match &answers[..] {
        [only] => answer.finish(only),
        all => output::print(&(all.join("\n") + "\n")),
    }
}

/// Token ids as `--prompt-ids` takes them.
fn list(tokens: &[u32]) -> String {
    tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

/// The library's count takes every position for a token, which after Ctrl-C some are not.
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
        "cpu" => format!(" ({} threads)", rayon::current_num_threads()),
        _ => String::new(),
    };
    output::note(format_args!(
        "NFE {}, {:.3} s, {:.1} tokens/s, {device}{threads}",
        generation.nfe,
        generation.elapsed.as_secs_f64(),
        tokens_per_second(generation, config),
    ));
}

/// The answer to one prompt on stdout, as far as it is final.
struct Answer<'a> {
    text: Option<&'a Tokenizer>,
    end_tokens: &'a [u32],
    stream: bool,
    printed: String,
    failure: Option<Error>,
}

impl<'a> Answer<'a> {
    fn new(text: Option<&'a Tokenizer>, end_tokens: &'a [u32], stream: bool) -> Self {
        Answer { text, end_tokens, stream, printed: String::new(), failure: None }
    }

    /// What stands for these tokens, up to where the next ones may change it.
    fn settled(&self, tokens: &[u32]) -> Result<String> {
        let Some(text) = self.text else {
            return Ok(list(tokens));
        };
        let end = tokens.iter().position(|t| self.end_tokens.contains(t)).unwrap_or(tokens.len());
        // A character that is spread over several tokens shows as U+FFFD until the last of them is there.
        Ok(text.decode(&tokens[..end])?.trim_end_matches(char::REPLACEMENT_CHARACTER).to_string())
    }

    /// Prints what `answer` has beyond that which is printed already. False when it does not go on from there.
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

    /// Prints the rest, once all is known.
    fn finish(mut self, answer: &str) -> Result<()> {
        if let Some(failure) = self.failure.take() {
            return Err(failure);
        }
        if !self.advance(answer)? {
            // A decoder that rewrites what stands before new tokens: better twice than wrong.
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
            // Nobody is there to read the rest.
            INTERRUPT.store(true, Ordering::Relaxed);
        }
    }
}

/// Everybody who follows a decode.
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
